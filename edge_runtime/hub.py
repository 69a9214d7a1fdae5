"""Download OpenVINO model folders from the Hugging Face hub.

A download goes to `FOLDER.partial/files`, which takes its name once every file is there in full: a folder without that
ending is complete. A second call keeps the files that the first one finished.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from edge_runtime.checksums import FileFacts, damaged
from edge_runtime.errors import ConfigError, DownloadError
from edge_runtime.manifest import MANIFEST_NAME, MODEL_NAME, load_manifest
from edge_runtime.outputs import check_output, check_work_folder, claimed

WANTED = (
    MODEL_NAME,
    MODEL_NAME.replace(".xml", ".bin"),
    MANIFEST_NAME,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.*",
    "LICENSE*",
    "README.md",
)
"""Files of a model folder; the rest of a repository stays on the hub."""

TIMEOUT_S = 10
TRY_AGAIN = "check the connection and run the command again; complete files are kept"


class Pulled(NamedTuple):
    """A finished download.

    Attributes:
        folder: The model folder.
        revision: The commit it is of.
    """

    folder: Path
    revision: str


def pull(hub_id: str, output: Path | None = None, revision: str | None = None) -> Pulled:
    """Download a model; progress is shown on a terminal's stderr.

    Args:
        hub_id: `OWNER/NAME` on the hub.
        output: The folder to make; `./NAME` by default.
        revision: Branch, tag or commit; the hub's default branch by default.

    Raises:
        ConfigError: `output` exists already or another process is making it, or `hub_id` is not one.
        DownloadError: The hub cannot be reached, or has no such model for us.
    """
    folder = output or Path(hub_id.split("/")[-1])
    if folder.exists():
        raise ConfigError(f"`{folder}` exists already", "remove it, or name another folder with `-o FOLDER`")
    place = check_output(folder)
    with _hub_errors(hub_id, revision):
        commit, files = _list_files(hub_id, revision)
    if MODEL_NAME not in files:
        raise DownloadError(
            f"`{hub_id}` holds no {MODEL_NAME}, so it is not an OpenVINO model",
            f"convert it: `edge-run export {hub_id}`",
        )
    partial = place.with_name(place.name + ".partial")
    check_work_folder(partial)
    with claimed(partial):
        with _hub_errors(hub_id, revision):
            _download(hub_id, commit, list(files), partial / "files")
        _finish(partial / "files", place, files)
    return Pulled(folder, commit)


def _list_files(hub_id: str, revision: str | None) -> tuple[str, dict[str, FileFacts]]:
    """Return the commit and the wanted files with their sizes, and hashes where the hub says them: of large files."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(hub_id, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
    files = {
        file.rfilename: FileFacts(file.size or 0, file.lfs.sha256 if file.lfs else "") for file in info.siblings or ()
    }
    return str(info.sha), {name: facts for name, facts in files.items() if any(fnmatch(name, w) for w in WANTED)}


def _download(hub_id: str, commit: str, names: list[str], folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its advice on tokens and caches is not for our users
    for abandoned in folder.glob(".cache/**/*.incomplete"):
        abandoned.unlink()  # of a process that was killed; the client begins such a file anew under another name
    snapshot_download(hub_id, revision=commit, local_dir=folder, allow_patterns=names)


def _finish(partial: Path, folder: Path, files: dict[str, FileFacts]) -> None:
    """Check that everything is there and whole, drop what is not part of the model, and give the folder its name.

    The hub's client returns an unfinished folder without a word when the network fails at the wrong moment.
    """
    for name, facts in files.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != facts.num_bytes:
            raise DownloadError(f"the download of `{name}` is incomplete", TRY_AGAIN)
        if facts.sha256 and damaged(partial, {name: facts}):
            path.unlink()
            raise DownloadError(f"`{name}` arrived damaged: its SHA-256 is not the hub's", TRY_AGAIN)
    if MANIFEST_NAME in files and (found := damaged(partial, load_manifest(partial).files)):
        raise DownloadError(f"`{found[0]}` is not what its {MANIFEST_NAME} says", "tell the model's author")
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in files:
            path.unlink()  # of another revision, begun earlier
    os.replace(partial, folder)


@contextmanager
def _hub_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into our errors."""
    from huggingface_hub import constants, errors

    # httpx's base class; which copy of httpx it is depends on the client's release.
    transport_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.HFValidationError as error:
        raise ConfigError(
            f"`{hub_id}` is not a hub id", "expected OWNER/NAME, as in the model page's address"
        ) from error
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"`{hub_id}` requires its licence to be accepted", "accept it on the model's page, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"`{hub_id}` has no revision `{revision}`", "leave out `--revision`") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"the model hub has no model `{hub_id}`", "check the spelling; a private model needs `hf auth login`"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise DownloadError("HF_HUB_OFFLINE is set, so the model hub cannot be used", "unset HF_HUB_OFFLINE") from error
    except (transport_error, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise DownloadError(f"the model hub {constants.ENDPOINT} cannot be reached: {error}", TRY_AGAIN) from error
