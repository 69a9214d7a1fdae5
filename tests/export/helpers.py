"""What PyTorch says and what the runtime says, for the same token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from edge_export.quiet import quiet
from edge_runtime.config import LoadConfig
from edge_runtime.manifest import MODEL_NAME, load_manifest
from edge_runtime.models.base import advance
from edge_runtime.models.loading import load_model
from edge_runtime.text.tokenizer import Tokenizer
from tests.tiny_models import SENTENCES


def torch_logits(folder: Path, token_ids: list[int]) -> NDArray[np.float32]:
    """Return (T, V) logits of transformers in f32."""
    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        with torch.no_grad():
            logits: NDArray[np.float32] = model(torch.tensor([token_ids])).logits[0].numpy()
    return logits


def runtime_logits(folder: Path, token_ids: list[int], *, parts: int = 3) -> NDArray[np.float32]:
    """Return (T, V) logits of the runtime's own model class in f32, the prompt fed in `parts` forwards."""
    model = load_model(folder, load_manifest(folder), LoadConfig(precision="f32"))
    pieces = [piece.tolist() for piece in np.array_split(token_ids, parts)]
    sequence = model.sequence()
    return np.concatenate([advance(model, sequence, piece, len(piece)).copy() for piece in pieces])


def write_shuffled(path: Path, repeats: int) -> Path:
    """Write the words of the tokenizers' sentences, so many times each, in a fixed random order."""
    words = " ".join(SENTENCES).split()
    order = np.random.default_rng(0).permutation(np.arange(repeats * len(words)) % len(words))
    path.write_text(" ".join(words[i] for i in order), encoding="utf-8")
    return path


def encode(folder: Path, text: str) -> list[int]:
    """Return the ids that the runtime's tokenizer gives."""
    return Tokenizer(folder).encode(text)


def weight_types(folder: Path) -> set[str]:
    """Return the element types of the weight matrices in a model folder."""
    model = ov.Core().read_model(folder / MODEL_NAME)
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return {node.get_element_type().get_type_name() for node in constants if np.prod(node.shape) >= 1024}
