"""`edge-run pull`, with a hub that is a function."""

import hashlib
import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from edge_runtime.outputs import LOCK_NAME, claimed

FILES = {"openvino_model.xml": 5, "openvino_model.bin": 9, "tokenizer.json": 4, "config.json": 2, "README.md": 3}
OTHERS = {"model.safetensors": 50, "onnx/openvino_model.xml": 5, "openvino_tokenizer.xml": 5, ".gitattributes": 1}
COMMIT = "0123abcd" * 5


class Hub:
    """What the client would do, without a network.

    Attributes:
        files: In the repository, with their sizes.
        lfs: Size and hash of large files, by name.
        failure: Raised before anything is looked up.
        breaks_after: Files that arrive before the connection breaks.
    """

    def __init__(self):
        self.files = {**FILES, **OTHERS}
        self.lfs = {}
        self.failure = None
        self.breaks_after = 99
        self.asked = []

    def model_info(self, hub_id, *, revision, timeout, files_metadata):
        self.asked.append((hub_id, revision))
        if self.failure:
            raise self.failure
        assert files_metadata
        siblings = [
            types.SimpleNamespace(rfilename=n, size=size, lfs=self.lfs.get(n)) for n, size in self.files.items()
        ]
        return types.SimpleNamespace(sha=COMMIT, siblings=siblings)

    def snapshot_download(self, hub_id, *, revision, local_dir, allow_patterns):
        assert revision == COMMIT
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(allow_patterns):
            if number == self.breaks_after:
                raise errors.LocalEntryNotFoundError("connection lost\nin the middle")
            (local_dir / name).write_bytes(b"x" * self.files[name])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    fake = Hub()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fake.model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_model_folder_appears_with_what_a_model_needs(hub, edge_run, tmp_path):
    done = edge_run("pull", "owner/name")
    assert (done.code, done.out) == (0, "name\n")
    assert "edge-run generate -m name" in done.err
    assert names(tmp_path) == {"name"}
    assert names(tmp_path / "name") == set(FILES)


def test_folder_revision_and_json(hub, edge_run, tmp_path):
    done = edge_run("pull", "owner/name", "-o", tmp_path / "deep" / "mine", "--revision", "v1", "--json")
    assert done.json == {"folder": str(tmp_path / "deep" / "mine"), "source": "owner/name", "revision": COMMIT}
    assert done.err == ""
    assert hub.asked == [("owner/name", "v1")]


def test_broken_download_is_kept_and_resumed(hub, edge_run, tmp_path):
    hub.breaks_after = 2
    done = edge_run("pull", "owner/name")
    assert (done.code, done.out) == (1, "")
    assert "run the command again" in done.err.splitlines()[1]
    assert names(tmp_path) == {"name.partial"}
    hub.breaks_after = 99
    assert edge_run("pull", "owner/name").code == 0
    assert names(tmp_path) == {"name"}


def test_abandoned_pieces_do_not_pile_up(hub, edge_run, tmp_path):
    """A download that was killed leaves its piece, and the client never looks at it again."""
    partial = tmp_path / "name.partial"
    piece = partial / "files" / ".cache" / "huggingface" / "download" / "abc.1234.incomplete"
    piece.parent.mkdir(parents=True)
    piece.write_bytes(b"x")
    (partial / LOCK_NAME).touch()
    hub.breaks_after = 1
    assert edge_run("pull", "owner/name").code == 1
    assert not piece.exists()


def test_incomplete_file_is_not_taken_for_a_model(hub, edge_run, tmp_path, monkeypatch):
    """The client returns a folder that it could not check as if it were complete."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, local_dir, **_: local_dir.mkdir())
    done = edge_run("pull", "owner/name")
    assert done.code == 1
    assert "is incomplete" in done.err
    assert names(tmp_path) == {"name.partial"}


def test_file_that_arrives_damaged_is_fetched_again(hub, edge_run, tmp_path):
    """Its size is right; the hub says the hash of large files."""
    hub.lfs["openvino_model.bin"] = types.SimpleNamespace(sha256="0" * 64)
    done = edge_run("pull", "owner/name")
    assert done.code == 1
    assert "`openvino_model.bin` arrived damaged" in done.err
    assert not (tmp_path / "name.partial" / "files" / "openvino_model.bin").exists()
    hub.lfs["openvino_model.bin"] = types.SimpleNamespace(sha256=hashlib.sha256(b"x" * 9).hexdigest())
    assert edge_run("pull", "owner/name").code == 0


def test_files_of_another_revision_do_not_stay(hub, edge_run, tmp_path):
    (tmp_path / "name.partial" / "files").mkdir(parents=True)
    (tmp_path / "name.partial" / LOCK_NAME).touch()
    (tmp_path / "name.partial" / "files" / "chat_template.jinja").write_text("of another revision")
    assert edge_run("pull", "owner/name").code == 0
    assert names(tmp_path / "name") == set(FILES)


def test_existing_folder_is_left_alone(hub, edge_run, tmp_path):
    (tmp_path / "name").mkdir()
    done = edge_run("pull", "owner/name")
    assert (done.code, done.out) == (2, "")
    assert "`name` exists already" in done.err
    assert hub.asked == []


def test_folder_of_the_users_that_ends_in_partial_is_left_alone(hub, edge_run, tmp_path):
    """Whatever it held was removed, as files of another revision."""
    (tmp_path / "name.partial").mkdir()
    (tmp_path / "name.partial" / "thesis.txt").write_text("precious")
    done = edge_run("pull", "owner/name")
    assert done.code == 2
    assert "edge-run did not create it" in done.err
    assert names(tmp_path / "name.partial") == {"thesis.txt"}


def test_second_download_to_one_place_is_refused(hub, edge_run, tmp_path):
    with claimed(tmp_path / "name.partial"):
        done = edge_run("pull", "owner/name")
    assert done.code == 2
    assert "another edge-run is at work" in done.err


def test_repository_without_an_openvino_model(hub, edge_run, tmp_path):
    del hub.files["openvino_model.xml"]
    done = edge_run("pull", "owner/name")
    assert done.code == 1
    assert "hint: convert it: `edge-run export owner/name`" in done.err
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        (errors.RepositoryNotFoundError, 1, "the model hub has no model `owner/name`"),
        (errors.GatedRepoError, 1, "licence"),
        (errors.RevisionNotFoundError, 1, "has no revision `v9`"),
        (errors.HfHubHTTPError, 1, "cannot be reached"),
        (errors.OfflineModeIsEnabled, 1, "HF_HUB_OFFLINE"),
        (errors.HFValidationError, 2, "is not a hub id"),
        (TimeoutError, 1, "cannot be reached"),
    ],
)
def test_refusals_of_the_hub(hub, edge_run, tmp_path, kind, code, said):
    hub.failure = kind.__new__(kind)  # those with an HTTP response cannot be made without one
    done = edge_run("pull", "owner/name", "--revision", "v9")
    assert (done.code, done.out) == (code, "")
    lines = done.err.splitlines()
    assert said in lines[0]
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert names(tmp_path) == set()
