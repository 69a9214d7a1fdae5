"""A hint is shown where the error is; that of a missing extra installs it from where edge-run itself came from."""

import traceback

import pytest

from edge_runtime import errors
from edge_runtime.errors import MissingExtraError


@pytest.fixture
def hint(monkeypatch):
    """Return a function from pip's record of an installation to the hint."""

    def call(record):
        monkeypatch.setattr(errors, "_installed_from", lambda: record)
        return MissingExtraError("a plot needs matplotlib", "bench").hint

    return call


def test_hint_names_the_folder_that_was_installed(hint, tmp_path):
    folder = tmp_path / "my checkout"
    folder.mkdir()
    assert hint({"url": folder.as_uri(), "dir_info": {}}) == f'pip install "{folder}[bench]"'


def test_hint_names_the_repository_that_was_installed(hint):
    record = {"url": "https://example.org/edge-run.git", "vcs_info": {"vcs": "git", "commit_id": "0"}}
    assert hint(record) == 'pip install "edge-runtime[bench] @ git+https://example.org/edge-run.git"'


@pytest.mark.parametrize("record", [{}, {"url": "file:///no/such/folder"}])
def test_hint_says_where_to_run_it_if_nothing_is_known(hint, record):
    assert hint(record) == 'pip install ".[bench]", in the source folder of edge-run'


def test_record_is_pips_own():
    assert isinstance(errors._installed_from(), dict)


def test_traceback_shows_the_hint():
    told = traceback.format_exception(errors.EdgeError("wrong", "do that"))
    assert told[-1] == "hint: do that\n"
