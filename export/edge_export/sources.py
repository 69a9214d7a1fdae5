"""What can be exported: a Hugging Face folder or hub id, a LoRA folder with its base, or an ONNX file or folder.

`open_source` answers where the files are and what the model says about itself, and refuses early, before torch is
imported and gigabytes are read, what cannot become a language model folder.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_export.adapters import CONFIG_NAME, Adapter, read_adapter
from edge_export.checkpoint_kinds import needs_own_code, no_weights, refuse_file, refuse_other_kinds
from edge_export.quantization import Quantization, read_quantization, without_quantization
from edge_export.quiet import quiet
from edge_export.weight_files import find_weight_files, list_tensors
from edge_runtime import hub_cache
from edge_runtime.errors import ConfigError, DownloadError, ExportError
from edge_runtime.manifest import MODEL_NAME, read_json

VERIFIED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt2")
"""`model_type`s that the tests hold equal to PyTorch; others that optimum-intel knows are tried."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Patterns of what is downloaded: safetensors, and pickles only where there are none."""
_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_SIXTEEN_BIT = ("float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to be exported.

    Attributes:
        name: Folder name, file name or hub id, for reports and the manifest.
        folder: Holds config.json and the tokenizer.
        onnx: The ONNX file; None for a PyTorch checkpoint.
        config: The content of config.json, without the description of a quantisation.
        weight_files: The files that hold a PyTorch checkpoint's weights.
        quantization: How they are quantised; None for plain ones.
        adapter: The LoRA adapter to be merged into them; all of the above is then its base's.
    """

    name: str
    folder: Path
    onnx: Path | None
    config: dict[str, Any]
    weight_files: tuple[Path, ...] = ()
    quantization: Quantization | None = None
    adapter: Adapter | None = None

    @property
    def model_type(self) -> str:
        """Hugging Face name of the architecture, such as `llama`."""
        return str(self.config["model_type"])

    @property
    def is_sixteen_bit(self) -> bool:
        """Whether the checkpoint says that its weights are 16-bit floats."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.") in _SIXTEEN_BIT

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, once restored where they are quantised."""
        if self.onnx:
            beside = [path for path in self.onnx.parent.glob(f"{self.onnx.name}*") if path.is_file()]
            return sum(path.stat().st_size for path in beside)
        stored = sum(path.stat().st_size for path in self.weight_files)
        plain_bits = 16 if self.is_sixteen_bit else 32
        return stored * plain_bits // self.quantization.num_bits if self.quantization else stored

    @property
    def merged_config(self) -> dict[str, Any]:
        """The content of config.json once the adapter is merged, which may bring tokens of its own."""
        num_tokens = self.adapter.num_tokens if self.adapter else None
        return {**self.config, "vocab_size": num_tokens} if num_tokens else self.config

    @property
    def of_tokenizer(self) -> Source:
        """The source as its tokenizer sees it: an adapter's own tokenizer is the one that it was trained with."""
        has_own = self.adapter is not None and self.adapter.has_tokenizer
        folder = self.adapter.folder if self.adapter and has_own else self.folder
        return dataclasses.replace(self, folder=folder, config=self.merged_config)

    def notes(self, weights: str) -> tuple[str, ...]:
        """Return lines that say what was made of the source before it was exported as `weights`."""
        notes = []
        if self.quantization:
            again = f"; as {weights} they are rounded a second time" if weights in ("int8", "int4") else ""
            notes.append(f"weights restored from {self.quantization.words}{again}")
        if self.adapter:
            notes.append(f"LoRA adapter `{self.adapter.folder}` merged into its base `{self.folder}`")
        return tuple(notes)


def open_source(source: str | Path, base: str | Path | None = None) -> Source:
    """Find the files of a model, downloading them if `source` is a hub id.

    Args:
        source: A model folder, a LoRA folder, an ONNX file, or a hub id of any.
        base: The model that a LoRA folder is merged into; None for the folder that it names.

    Raises:
        ConfigError: A base is given for a source that is no LoRA folder.
        ExportError: There is no model there, or not one that can be exported.
        DownloadError: The hub cannot be reached, has no such model or does not give it out.
    """
    found = _find(source)
    if isinstance(found, Path):  # an ONNX file
        opened = _onnx_source(found, found.name)
    else:
        folder, name = found
        if adapter := read_adapter(folder):
            return _adapted(adapter, base, name)
        opened = _folder_source(folder, name)
    if base is not None:
        raise ConfigError(f"base is `{base}`, but `{source}` is no LoRA folder", "leave out --base")
    return opened


def _find(source: str | Path) -> Path | tuple[Path, str]:
    """Return an ONNX file, or a folder and its name."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".onnx":
            raise refuse_file(path)
        return path
    if path.is_dir():
        folder = hub_cache.resolve(path)
        return folder, hub_cache.hub_id(folder.resolve()) or folder.resolve().name
    if not _HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
        raise ExportError(
            f"`{source}` does not exist", "give a model folder, a .onnx file or a hub id such as ORG/NAME"
        )
    return _download(str(source)), str(source)


def _adapted(adapter: Adapter, base: str | Path | None, name: str) -> Source:
    if find_weight_files(adapter.folder):
        raise ExportError(
            f"`{adapter.folder}` holds a whole model and a LoRA adapter",
            f"move {CONFIG_NAME} away to export the model, or the adapter to a folder of its own",
        )
    place = base or adapter.base_folder
    if place is None:
        raise ExportError(
            f"`{adapter.folder}` is a LoRA adapter for `{adapter.base}`, which is no folder here",
            f"name its base: `edge-run export {adapter.folder} --base {adapter.base or 'FOLDER'}`",
        )
    found = _find(place)
    opened = None if isinstance(found, Path) or (found[0] / CONFIG_NAME).is_file() else _folder_source(*found)
    if opened is None or opened.onnx:
        raise ExportError(f"base `{place}` is no checkpoint, expected the model that the adapter was trained on")
    return dataclasses.replace(opened, name=name, adapter=adapter)


def _folder_source(folder: Path, name: str) -> Source:
    if (folder / MODEL_NAME).is_file():
        raise ExportError(
            f"`{folder}` is an OpenVINO model folder already", f"run it: `edge-run generate -m {folder} PROMPT`"
        )
    files = find_weight_files(folder)
    if not files and (file := _find_onnx(folder)):
        return _onnx_source(file, name)
    refuse_other_kinds(folder, read_json(folder / "config.json"))
    if not files and not (folder / "config.json").is_file():
        raise no_weights(folder)
    config = _read_config(folder)
    if not files:
        raise no_weights(folder)
    quantization = read_quantization(folder, config, list_tensors(files))
    return Source(
        name=name,
        folder=folder,
        onnx=None,
        config=without_quantization(config),
        weight_files=tuple(files),
        quantization=quantization,
    )


def _onnx_source(file: Path, name: str) -> Source:
    # Hub repositories often keep the ONNX file in a subfolder and all else above it.
    folder = next((place for place in (file.parent, file.parent.parent) if (place / "config.json").is_file()), None)
    return Source(name=name, folder=folder or file.parent, onnx=file, config=_read_config(folder or file.parent))


def _find_onnx(folder: Path) -> Path | None:
    for place in (folder, folder / "onnx"):
        if (place / "model.onnx").is_file():
            return place / "model.onnx"
    files = sorted(folder.glob("*.onnx"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ExportError(f"`{folder}` holds several ONNX files: {names}", "name the file to export")
    return files[0] if files else None


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ExportError(f"`{folder}` holds no config.json", "copy it from the original model")
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ExportError(f"`{folder / 'config.json'}` names no model_type, expected one of {_families()}")
    if config.get("is_encoder_decoder"):
        raise ExportError(f"`{kind}` is an encoder-decoder model, expected a decoder such as {_families()}")
    if "vision_config" in config or "audio_config" in config:
        raise ExportError(f"`{kind}` takes images or sound, expected a model of text alone such as {_families()}")
    return config


def unsupported(source: Source) -> ExportError:
    """Return the error for an architecture that no exporter knows."""
    if source.config.get("auto_map"):
        return ExportError(
            f"model_type `{source.model_type}` needs Python code from its own repository, which edge-run does not run",
            f"use a model of a family that transformers has, such as {_families()}",
        )
    return ExportError(
        f"model_type `{source.model_type}` is not supported, expected {_families()} or another decoder "
        "that optimum-intel exports",
        "models.md lists the supported families",
    )


def _families() -> str:
    return ", ".join(VERIFIED_FAMILIES)


def _download(hub_id: str) -> Path:
    """Return the local copy of a hub model: files of the top folder only, and safetensors rather than pickles."""
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), ignore_patterns=["*/*"]))

    try:
        folder = fetch(*_TEXT_FILES, _WEIGHTS[0])
        return folder if list(folder.glob(_WEIGHTS[0])) else fetch(*_TEXT_FILES, _WEIGHTS[1], "adapter_model.bin")
    except GatedRepoError as error:
        raise DownloadError(
            f"`{hub_id}` requires its licence to be accepted",
            "accept it on the model's page and log in with `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(f"no folder named `{hub_id}`, and the model hub has no such model") from error
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise DownloadError(
            f"no folder named `{hub_id}`, and the model hub cannot be reached",
            "check the network, or give the path of a folder",
        ) from error


def load_config(source: Source) -> Any:
    """Return the transformers config of a model.

    Raises:
        ExportError: transformers does not know the architecture, or the config holds values that it refuses.
    """
    with quiet():
        import transformers

        classes = transformers.CONFIG_MAPPING
        try:
            kind = classes[source.model_type]
        except KeyError as error:
            raise unsupported(source) from error
        if code := needs_own_code(source.config, lambda name: hasattr(transformers, name)):
            raise ExportError(
                f"`{source.name}` is a {source.model_type} changed by Python code of its own ({code}), "
                "which edge-run does not run",
                "export a model that works without trust_remote_code",
            )
        try:
            return kind.from_dict(dict(source.config))
        except Exception as error:  # the classes raise whatever their checks come upon
            told = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
            raise ExportError(
                f"`{source.folder / 'config.json'}` cannot be used: {told}", "copy it from the original model"
            ) from error
