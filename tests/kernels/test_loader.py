"""How Python finds the compiled library, and what it says when that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import openvino
import pytest

import ov_kernels
from edge_runtime.errors import ExtensionError


@pytest.fixture
def bare_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A search path on which no library lies."""
    monkeypatch.delenv(ov_kernels.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(ov_kernels, "__path__", [str(tmp_path / "checkout" / "ov_kernels")])
    monkeypatch.setattr(sys, "path", [str(tmp_path / "checkout"), str(tmp_path / "site-packages")])
    return tmp_path


def place_library(folder: Path, built_for: str) -> Path:
    """Put a file in the library's place, whose note says that it was built for `built_for`."""
    library = folder / "ov_kernels" / "lib" / ov_kernels.LIBRARY_NAME
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    library.with_name("openvino_version.txt").write_text(built_for + "\n", encoding="utf-8")
    return library


def installed_release() -> str:
    return openvino.__version__.split("-")[0]


def test_pure_python_install_has_no_library(bare_path: Path) -> None:
    assert ov_kernels.library_path() is None
    assert ov_kernels.add_to(openvino.Core()) is False


def test_missing_library_is_an_error_only_where_it_is_required(bare_path: Path) -> None:
    with pytest.raises(ExtensionError, match="not installed") as caught:
        ov_kernels.add_to(openvino.Core(), required=True)
    assert "pip install" in (caught.value.hint or "")


def test_library_in_site_packages_is_found_behind_a_checkout(bare_path: Path) -> None:
    """The checkout hides site-packages when Python runs in it, and an editable install splits the package in two."""
    (bare_path / "checkout" / "ov_kernels").mkdir(parents=True)
    library = place_library(bare_path / "site-packages", installed_release())
    assert ov_kernels.library_path() == library.resolve()


def test_environment_variable_comes_first(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_library(bare_path / "site-packages", installed_release())
    own = place_library(bare_path / "own", installed_release())
    monkeypatch.setenv(ov_kernels.LIBRARY_VARIABLE, str(own))
    assert ov_kernels.library_path() == own.resolve()


def test_environment_variable_that_names_no_file_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Falling back to the installed library would time or test the wrong one."""
    monkeypatch.setenv(ov_kernels.LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    with pytest.raises(ExtensionError, match=r"EDGE_KERNELS_LIBRARY is `.*absent\.so`"):
        ov_kernels.library_path()


def test_library_for_another_release_is_refused_with_both_versions(bare_path: Path) -> None:
    place_library(bare_path / "site-packages", "2026.4.0")
    with pytest.raises(ExtensionError, match=f"built for OpenVINO 2026.4.0, but {installed_release()}") as caught:
        ov_kernels.add_to(openvino.Core())
    assert "pip install openvino==2026.4.0" in (caught.value.hint or "")


def test_damaged_library_is_one_line_with_its_path(bare_path: Path) -> None:
    library = place_library(bare_path / "site-packages", installed_release())
    with pytest.raises(ExtensionError) as caught:
        ov_kernels.add_to(openvino.Core())
    assert str(library) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.kernels
@pytest.mark.skipif(sys.platform != "linux", reason="rewrites an ELF file")
def test_library_linked_to_another_soname_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library without its note: the dynamic linker looks for an OpenVINO that is not there."""
    real = ov_kernels.library_path()
    assert real is not None
    content = real.read_bytes()
    assert b"libopenvino.so.2" in content
    other = tmp_path / ov_kernels.LIBRARY_NAME
    other.write_bytes(content.replace(b"libopenvino.so.2", b"libopenvino.so.1"))
    monkeypatch.setenv(ov_kernels.LIBRARY_VARIABLE, str(other))
    with pytest.raises(ExtensionError, match=r"cannot load .*libopenvino\.so\.1"):
        ov_kernels.add_to(openvino.Core())


def test_unrelated_read_error_is_not_explained() -> None:
    assert ov_kernels.explain_read_error(RuntimeError("Cannot create X layer from unsupported opset: other")) is None


@pytest.mark.kernels
def test_adding_twice_does_no_harm() -> None:
    core = openvino.Core()
    assert ov_kernels.add_to(core)
    assert ov_kernels.add_to(core)
