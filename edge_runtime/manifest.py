"""`edge_model.json`: the only contract between export and runtime.

A model folder holds `openvino_model.xml/.bin`, `tokenizer.json` (+ `tokenizer_config.json`, chat template),
`config.json`, `generation_config.json` and this manifest. A folder that optimum-intel or the hub's OpenVINO
organisation made has no manifest: `load_manifest` then reads the same facts from `config.json`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edge_runtime import strict_json
from edge_runtime.checksums import FileFacts, facts_of
from edge_runtime.errors import ConfigError, ModelFormatError
from edge_runtime.models.attention import AttentionPattern

FORMAT_VERSION = 1
MANIFEST_NAME = "edge_model.json"
MODEL_NAME = "openvino_model.xml"
CHECKED_NAMES = (MODEL_NAME, "openvino_model.bin", "tokenizer.json")
"""Files with checksums: what decides an answer, and nobody edits by hand."""
_OPTIONAL = ("mlp", "attention", "hidden_layers", "files")
"""Left out where they say nothing: a reader that does not know an entry refuses it."""

_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_POINTER = b"version https://git-lfs"
_GGUF = b"GGUF"


@dataclass(frozen=True, kw_only=True)
class MlpFacts:
    """How the gated MLPs are stored, where not as OpenVINO's own ops.

    Attributes:
        kind: `fused`: one op CatsMlp for each.
        activation_sparsity: Share of their neurons that was to be skipped; None where none are.
        method: How the thresholds were found: `cats` or `chess`; None without sparsity.
    """

    kind: str
    activation_sparsity: float | None = None
    method: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Facts about one exported model that the runtime cannot read from the graph.

    Attributes:
        architecture: Hugging Face `model_type`, such as `llama`.
        context_length: Largest number of tokens, prompt and answer together; None if unknown.
        vocab_size: Rows of the embedding, which may exceed the tokenizer's entries (padding).
        eos_token_ids: Every id that ends an answer.
        bos_token_id: None where the model has none.
        weights: How the weights are stored: `fp32`, `fp16`, `bf16`, `int8` or `int4`.
        group_size: Quantisation group along the input axis; -1 per channel, None if not grouped.
        num_parameters: Number of parameters of the source model, embeddings included; None if unknown.
        source: Where the model came from: a folder name or a hub id.
        versions: Package name to version, of what made this folder.
        attention: What each layer's queries see; None, and absent from the file, where that is every earlier token.
        mlp: How gated MLPs are stored; None, and absent from the file, for OpenVINO's own ops.
        hidden_layers: Layers whose output the model's drafter reads beside the last hidden states; empty, and absent
            from the file, where there are none.
        files: Size and hash of CHECKED_NAMES as `save` found them; empty, and absent from the file, where nobody did.
        format_version: Version of this file's format.
    """

    architecture: str
    context_length: int | None
    vocab_size: int | None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    weights: str = "unknown"
    group_size: int | None = None
    num_parameters: int | None = None
    source: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    attention: AttentionPattern | None = None
    mlp: MlpFacts | None = None
    hidden_layers: tuple[int, ...] = ()
    files: dict[str, FileFacts] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, value in (("context_length", self.context_length), ("vocab_size", self.vocab_size)):
            if value is not None and not (_is_whole(value) and value > 0):
                raise TypeError(f"{name} is {value!r}, expected a number of tokens")
        if not all(_is_whole(token_id) for token_id in self.eos_token_ids):
            raise TypeError(f"eos_token_ids is {self.eos_token_ids!r}, expected token ids")
        if not all(_is_whole(layer) for layer in self.hidden_layers):
            raise TypeError(f"hidden_layers is {self.hidden_layers!r}, expected numbers of layers")

    def save(self, folder: Path) -> Manifest:
        """Write `edge_model.json` into `folder`, whole or not at all, with checksums of the files that are there now.

        Returns:
            What was written.
        """
        made = replace(self, files=facts_of(folder, CHECKED_NAMES))
        content = {name: value for name, value in asdict(made).items() if value or name not in _OPTIONAL}
        if made.files:
            content["files"] = {name: facts._asdict() for name, facts in made.files.items()}
        temporary = folder / (MANIFEST_NAME + ".tmp")
        temporary.write_text(strict_json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / MANIFEST_NAME)
        return made


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a model folder, or derive it where there is none.

    Raises:
        ModelFormatError: The folder is missing or holds no model, or a JSON file in it cannot be used.
    """
    if folder.is_file():
        raise _is_a_file(folder)
    if folder.exists() and not folder.is_dir():
        raise ModelFormatError(f"`{folder}` is a device or pipe, expected a model folder")
    if not folder.is_dir():
        raise ModelFormatError(
            f"model folder `{folder}` does not exist",
            "make one with `edge-run export SOURCE -o FOLDER` or `edge-run pull HUB_ID`",
        )
    if not (folder / MODEL_NAME).is_file():
        raise ModelFormatError(
            f"`{folder}` holds no {MODEL_NAME}, so it is not an OpenVINO model folder",
            f"convert it first: `edge-run export {folder} -o OUT`",
        )
    for name in (MODEL_NAME, Path(MODEL_NAME).with_suffix(".bin")):
        check_is_no_pointer(folder / name)
    path = folder / MANIFEST_NAME
    return _from_manifest(path) if path.is_file() else _from_config(folder)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a model folder's weights."""
    return (folder / MODEL_NAME).with_suffix(".bin").stat().st_size


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, with or without a byte order mark; {} where the file does not exist.

    Raises:
        ModelFormatError: The file is not a JSON object in UTF-8, or says two things at once.
    """
    if not path.is_file():
        return {}
    check_is_no_pointer(path)
    try:
        raw = path.read_bytes()
        if raw.startswith(_UTF_16_MARKS):
            raise ModelFormatError(f"`{path}` is UTF-16 text, expected UTF-8", "save it as UTF-8")
        content = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_without_contradiction)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"`{path}` is not readable JSON: {error}", "copy or export the model again") from error
    if not isinstance(content, dict):
        raise ModelFormatError(
            f"`{path}` holds a JSON {type(content).__name__}, expected an object", "copy or export the model again"
        )
    return content


def _is_a_file(path: Path) -> ModelFormatError:
    if is_gguf(path):
        return ModelFormatError(
            f"`{path}` is a GGUF file, which edge-run does not read", "export the model's Hugging Face folder or hub id"
        )
    return ModelFormatError(f"`{path}` is a file, expected a model folder", f"give its folder: {path.parent}")


def is_gguf(path: Path) -> bool:
    """Return whether a file is a GGUF file, whatever its name."""
    with path.open("rb") as file:
        return file.read(len(_GGUF)) == _GGUF


def check_is_no_pointer(path: Path) -> None:
    """Refuse a file that git put there in place of a large one; a file that does not exist passes.

    Raises:
        ModelFormatError: It is a pointer of Git LFS.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ModelFormatError(
                f"`{path}` is a Git LFS pointer, not the file itself", f"run `git lfs pull` in `{path.parent}`"
            )


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; an entry that comes twice with different values has no meaning that readers agree on."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content and content[name] != value:
            raise ValueError(f"`{name}` comes twice, as {content[name]!r} and as {value!r}")
        content[name] = value
    return content


def _from_manifest(path: Path) -> Manifest:
    content = read_json(path)
    content.pop("attention_groups", None)  # always empty in what was written while it existed
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelFormatError(
            f"`{path}` has format version {version}, but this edge-run reads version {FORMAT_VERSION}",
            "export the model again",
        )
    known = {f.name for f in fields(Manifest)}
    unknown = sorted(set(content) - known)
    if unknown:
        raise ModelFormatError(f"`{path}` has unknown entries {unknown}", "export the model again")
    try:
        for name in ("eos_token_ids", "hidden_layers"):
            content[name] = tuple(content.get(name, ()))
        if content.get("mlp") is not None:
            content["mlp"] = MlpFacts(**content["mlp"])
        if content.get("attention") is not None:
            content["attention"] = AttentionPattern.from_json(content["attention"])
        content["files"] = _files(content.get("files", {}))
        return Manifest(**content)
    except (TypeError, KeyError, ConfigError) as error:
        raise ModelFormatError(f"`{path}` cannot be used: {error}", "export the model again") from error


def _files(content: Any) -> dict[str, FileFacts]:
    """Return the entry `files`; names must be those of files beside the manifest.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(content, dict) or any(Path(name).name != name for name in content):
        raise TypeError(f"files is {content!r:.60}, expected an object of file names")
    made = {name: FileFacts(**facts) for name, facts in content.items()}
    for name, facts in made.items():
        if not (_is_whole(facts.num_bytes) and isinstance(facts.sha256, str)):
            raise TypeError(f"files has {facts!r:.90} for {name}, expected num_bytes and sha256")
    return made


def _from_config(folder: Path) -> Manifest:
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    text = config.get("text_config") or config  # where images or sound are understood too
    try:
        eos = _first_known("eos_token_id", generation, text, config)
        return Manifest(
            architecture=config.get("model_type", "unknown"),
            context_length=text.get("max_position_embeddings") or text.get("n_positions"),
            vocab_size=text.get("vocab_size"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            bos_token_id=_first_known("bos_token_id", generation, text),
            source=config.get("_name_or_path", ""),
        )
    except (AttributeError, TypeError) as error:
        raise ModelFormatError(
            f"`{folder / 'config.json'}` cannot be used: {error}", "copy the model folder again"
        ) from error


def _first_known(name: str, *sources: dict[str, Any]) -> Any:
    """Return the first value that is not null; exporters write null for what a source leaves to another."""
    return next((source[name] for source in sources if source.get(name) is not None), None)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
