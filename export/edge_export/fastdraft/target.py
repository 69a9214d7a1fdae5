"""The target as a draft's trainer needs it: tokenizer, vocabulary, special tokens, and a model folder that writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_export.tokenizer_files import copy_files
from edge_export.tokenizer_ids import library_tokenizer
from edge_runtime.errors import ConfigError, ModelFormatError, ModelPairError
from edge_runtime.manifest import MODEL_NAME, Manifest, load_manifest, read_json
from edge_runtime.text.tokenizer import TOKENIZER_NAME, Tokenizer

if TYPE_CHECKING:
    import tokenizers

LONGEST_WINDOW = 1024


@dataclass(frozen=True, kw_only=True)
class Target:
    """A target.

    Attributes:
        folder: Model folder, as the runtime loads it.
        manifest: Its facts.
        config: Content of its config.json.
    """

    folder: Path
    manifest: Manifest
    config: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        assert self.manifest.vocab_size is not None
        return self.manifest.vocab_size

    @property
    def window(self) -> int:
        """Tokens of a training window where none is asked for."""
        return min(self.manifest.context_length or LONGEST_WINDOW, LONGEST_WINDOW)

    @property
    def end_of_text(self) -> int:
        """Id that separates documents: the one that ends an answer, else the one that begins a text, else 0."""
        manifest = self.manifest
        return (*manifest.eos_token_ids, manifest.bos_token_id or 0)[0]

    @property
    def special_tokens(self) -> dict[str, Any]:
        """bos, eos and pad as the target's config has them."""
        config = self.config.get("text_config") or self.config
        return {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer says how a chat is written."""
        return Tokenizer(self.folder).has_chat_template

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer for whole corpora."""
        return library_tokenizer(self.folder)

    def copy_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer's files, byte for byte, into a folder."""
        copy_files(self.folder, folder)

    def check_draft(self, config: Any, where: Path) -> None:
        """Refuse a draft to start from whose vocabulary is another.

        Raises:
            ModelPairError: It is.
        """
        if config.vocab_size != self.vocab_size:
            raise ModelPairError(
                f"draft `{where}` has a vocabulary of {config.vocab_size}, but the target's has {self.vocab_size}",
                "start from a draft of this target, or from none",
            )


def open_target(name: str, work: Path) -> Target:
    """Return the target; a checkpoint is first exported to int8 into `work`.

    Raises:
        ModelFormatError: It is no model, or has no vocabulary size.
        ExportError: It cannot be exported.
    """
    folder = Path(name)
    if not (folder / MODEL_NAME).is_file():
        folder = work / "target"
        if not (folder / MODEL_NAME).is_file():
            from edge_export.convert import export_model

            export_model(name, folder, weights="int8")
    manifest = load_manifest(folder)
    if manifest.vocab_size is None:
        raise ModelFormatError(
            f"`{folder}` has no vocabulary size in its manifest or config.json", "export the target again"
        )
    if not (folder / TOKENIZER_NAME).is_file():
        raise ConfigError(f"target `{name}` has no {TOKENIZER_NAME}", "copy it from the original model")
    return Target(folder=folder, manifest=manifest, config=read_json(folder / "config.json"))
