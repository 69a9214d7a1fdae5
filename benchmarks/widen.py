"""A small trained Llama becomes a large one with the same function: real text and acceptance, the bytes of a big model.

Speed without public weights: a model that nobody trained at size N writes no text worth measuring, and one that we can
train is too small to be bound by memory. Widening keeps the trained function and adds weights around it:

- Hidden channels are added that stay exactly 0: whatever writes to the residual stream (embedding, o_proj, down_proj)
  has zero rows for them. RMSNorm divides by the root of a mean over d channels, now over D, so its weight is scaled by
  sqrt(d / D) and its epsilon by d / D. What reads the stream gets columns of random weights.
- Heads and FFN neurons are added with random q, k, v, gate and up, and zero columns in o_proj and down_proj.
- Layers are added whose o_proj and down_proj are zero and all else is random.

Added weights are drawn from the trained row they extend (new rows: from some trained row), so they are as large as
trained ones and never leave the row's range: the int8 grid of every row, and the int4 grid of every group, stay what
they were. Zero is on both grids. Dense kernels read and multiply zeros like all else, so no engine can skip any of it;
only arithmetic is spent differently from a model trained at that size. Embeddings are untied, since the two halves are
widened differently; heads keep their size and their ratio to KV heads.

    python benchmarks/widen.py [SOURCE] -o OUT [--params 1e9] [--weights int8 int4] [--text FILE] [--json]

SOURCE is a Hugging Face folder, or an int8 IR, whose dequantised weights count; the embedded target by default.
OUT/hf holds f32: bf16 would round trained weights, and logits with them, by far more than the 1e-4 that is checked.
OUT/int8 and OUT/int4 are compared with the source, exported alike and padded the same way to whole groups.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from decode import PRECISIONS
from ir_weights import llama_of_ir
from measure import machine, report
from numpy.typing import NDArray

from edge_export import torch_source, verify
from edge_export.convert import export_model
from edge_export.quiet import quiet
from edge_export.sources import open_source
from edge_runtime import EdgeLLM
from edge_runtime.demo import demo_target
from edge_runtime.manifest import MODEL_NAME
from edge_runtime.metrics import peak_rss_bytes
from edge_runtime.models.base import advance
from edge_runtime.outputs import check_apart, check_output
from edge_runtime.text.tokenizer import Tokenizer

GROUP = 128
"""Sizes are multiples of it, so that groups of int4 weights and of rounded activations are whole."""
TOLERANCE = 1e-4
"""Largest difference of f32 logits, over their standard deviation: sums of other length round differently."""
WRITERS = ("embed_tokens", "o_proj", "down_proj")
"""What writes to the residual stream: its added weights are zero."""
TOKEN_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*", "vocab*", "merges*")
MAX_TOKENS, WINDOW = 1024, 64
GREEDY_PROMPTS, GREEDY_TOKENS = 4, 48
CHECKED_PRECISIONS = ("exact", "default")


def num_parameters(config: Any) -> int:
    """Return the weights of an untied Llama without biases."""
    attention = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (attention * config.head_dim + 3 * config.intermediate_size + 2)
    return config.num_hidden_layers * layer + (2 * config.vocab_size + 1) * config.hidden_size


def resized(config: Any, hidden: int, ffn: int, layers: int, heads: int) -> Any:
    """Return the config of other sizes and, given widened weights, the same function."""
    ratio = config.num_attention_heads // config.num_key_value_heads
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    same = {
        "num_key_value_heads": heads // ratio,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / hidden,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return type(config).from_dict({**config.to_dict(), **sizes, **same})


def head_step(config: Any) -> int:
    """Return the number of heads by which a model may grow: whole KV heads and whole groups."""
    ratio = config.num_attention_heads // config.num_key_value_heads
    return math.lcm(ratio * config.head_dim, GROUP) // config.head_dim


def padded(config: Any) -> Any:
    """Return the least config whose sizes are whole groups."""
    return resized(
        config,
        _up(config.hidden_size, GROUP),
        _up(config.intermediate_size, GROUP),
        config.num_hidden_layers,
        _up(config.num_attention_heads, head_step(config)),
    )


def wide(config: Any, params: float) -> Any:
    """Return a config of about `params` weights in the proportions of common models.

    An FFN of four times the hidden size and 128 channels for each layer make 16 D² weights a layer and D³ / 8 in all;
    layers and FFN then absorb what rounding left over.
    """
    least, step = padded(config), head_step(config)
    hidden = max(least.hidden_size, _near(math.cbrt(8 * params), GROUP))
    heads = max(least.num_attention_heads, _near(hidden / config.head_dim, step))
    usual = resized(config, hidden, 4 * hidden, 1, heads)
    fixed = (2 * config.vocab_size + 1) * hidden
    layers = max(least.num_hidden_layers, round((params - fixed) / (num_parameters(usual) - fixed)))
    without_ffn = num_parameters(resized(config, hidden, 0, layers, heads))
    ffn = _near((params - without_ffn) / (3 * hidden * layers), GROUP)
    if ffn < least.intermediate_size:
        smallest = num_parameters(resized(config, hidden, least.intermediate_size, layers, heads))
        raise SystemExit(f"error: {params:.3g} parameters are too few for this source, expected {smallest:.3g} or more")
    return resized(config, hidden, ffn, layers, heads)


def widen(source: Any, config: Any, seed: int) -> dict[str, Any]:
    """Return the state of a model of `config`, at least as large as the source, that computes the same logits."""
    import torch
    from transformers import LlamaForCausalLM

    if any(name.endswith("bias") for name in source.state_dict()):
        raise SystemExit("error: the source has biases, expected a Llama without")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    random = torch.Generator().manual_seed(seed)
    norm_scale = math.sqrt(source.config.hidden_size / config.hidden_size)
    state = {}
    for name, shape in shapes.items():
        origin = re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) % source.config.num_hidden_layers}", name)
        trained = source.state_dict()[origin].float()
        writes = any(writer in name for writer in WRITERS)
        if trained.ndim == 1:
            trained = trained * norm_scale
        state[name] = torch.zeros(shape) if writes else drawn(trained, shape, random)
        if origin == name:
            state[name][tuple(slice(size) for size in trained.shape)] = trained
    return state


def drawn(trained: Any, shape: tuple[int, ...], random: Any) -> Any:
    """Return random weights of `shape`, each row drawn with replacement from a trained one.

    Columns that fill up the last group of trained columns are drawn from that group, whose grid they share.
    """
    import torch

    table = trained.reshape(-1, trained.shape[-1])
    (rows, columns), num_rows, num_columns = (table.shape, math.prod(shape[:-1]), shape[-1])
    own = torch.cat([torch.arange(rows), torch.randint(rows, (num_rows - rows,), generator=random)])
    chosen = torch.randint(columns, (num_rows, num_columns), generator=random)
    begin, end = columns // GROUP * GROUP, min(_up(columns, GROUP), num_columns)
    if begin < columns:
        chosen[:, columns:end] = torch.randint(begin, columns, (num_rows, end - columns), generator=random)
    return table[own].gather(1, chosen).reshape(shape)


def save_wide(source: Any, folder: Path, config: Any, out: Path, seed: int) -> Path:
    """Write the source, whose files are in `folder`, widened to `config` as a Hugging Face folder in f32."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    for pattern in TOKEN_FILES:
        for path in folder.glob(pattern):
            shutil.copyfile(path, out / path.name)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    save_file(widen(source, config, seed), out / "model.safetensors", {"format": "pt"})
    return out


def torch_logits(folder: Path, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the logits of a Hugging Face folder, computed in f32."""
    return torch_source.reference_logits(load(folder), token_ids)


def load(folder: Path) -> Any:
    """Return the model of a Hugging Face folder, or of an int8 IR, in f32."""
    if (folder / MODEL_NAME).is_file():
        return llama_of_ir(folder)
    with quiet():
        return torch_source.load(open_source(folder), "fp32")


def text_windows(folder: Path, text: str) -> NDArray[np.int64]:
    """Return the text's first tokens as (B, WINDOW) ids."""
    token_ids = Tokenizer(folder).encode(text)[:MAX_TOKENS]
    return np.array(token_ids[: len(token_ids) // WINDOW * WINDOW], np.int64).reshape(-1, WINDOW)


def ir_logits(llm: EdgeLLM, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the logits of (B, T) token ids as the runtime computes them."""

    def window(row: list[int]) -> NDArray[np.float32]:
        with contextlib.closing(llm.target.sequence()) as sequence:
            return advance(llm.target, sequence, row, len(row)).copy()

    return np.stack([window(row.tolist()) for row in token_ids])


def perplexity(logits: NDArray[np.float32], token_ids: NDArray[np.int64]) -> float:
    """Return exp of the mean negative log-likelihood of each window's tokens after the first."""
    shifted = logits[:, :-1].astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, token_ids[:, 1:, None], -1)[..., 0]
    return float(np.exp(np.mean(np.log(np.exp(shifted).sum(-1)) - chosen)))


def greedy(llm: EdgeLLM, token_ids: NDArray[np.int64]) -> list[list[int]]:
    """Return greedy continuations of the first half of a few windows."""
    prompts = token_ids[:GREEDY_PROMPTS, : WINDOW // 2].tolist()
    return [llm.generate(ids, max_new_tokens=GREEDY_TOKENS, ignore_eos=True).token_ids for ids in prompts]


def compare_irs(small: Path, large: Path, precision: str, token_ids: NDArray[np.int64]) -> dict[str, float]:
    """Compare two exported models: logits, perplexity, and greedy text up to the first different token."""
    models = [EdgeLLM.load(folder, **PRECISIONS[precision][0]) for folder in (small, large)]
    logits = [ir_logits(llm, token_ids) for llm in models]
    texts = [greedy(llm, token_ids) for llm in models]
    same = sum(_shared(*pair) for pair in zip(*texts, strict=True))
    found = verify.compare(*logits)
    return {
        "max_error": found.max_abs_error / float(np.std(logits[0])),
        "rms_error": found.error,
        "top1_agreement": found.top1_agreement,
        "kl_divergence": found.kl_divergence,
        "small_perplexity": perplexity(logits[0], token_ids),
        "wide_perplexity": perplexity(logits[1], token_ids),
        "greedy_equal": same / sum(map(len, texts[0])),
    }


def checks_of(result: dict[str, Any]) -> dict[str, bool]:
    """Return what must hold."""
    checks = {f"f32 logits are equal to {TOLERANCE}": result["f32"]["max_error"] <= TOLERANCE}
    for name, row in result["quantised"].items():
        near = abs(row["wide_perplexity"] / row["small_perplexity"] - 1) <= 0.01
        checks[f"{name}: perplexity within 1 %, the same token in 97 %"] = near and row["top1_agreement"] >= 0.97
    return checks


def main() -> int:
    arguments = _arguments()
    check_apart(arguments.output, source=arguments.source, text=arguments.text)
    check_output(arguments.output / "hf")
    source = load(arguments.source)
    config = wide(source.config, arguments.params)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else " ".join(verify.PROMPTS)
    token_ids = text_windows(arguments.source, text)
    began = time.perf_counter()
    hf = save_wide(source, arguments.source, config, arguments.output / "hf", arguments.seed)
    expected = torch_source.reference_logits(source, token_ids)
    found = verify.compare(expected, torch_logits(hf, token_ids))
    result: dict[str, Any] = {
        "source_parameters": torch_source.num_parameters(source),
        "parameters": num_parameters(config),
        "config": config.to_diff_dict(),
        "tokens": token_ids.size,
        "f32": {
            "max_error": found.max_abs_error / float(expected.std()),
            "perplexity": perplexity(expected, token_ids),
        },
        "quantised": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        small = save_wide(source, arguments.source, padded(source.config), Path(folder) / "hf", arguments.seed)
        for weights in arguments.weights:
            export_model(small, Path(folder) / weights, weights=weights)
            export_model(hf, arguments.output / weights, weights=weights, overwrite=True)
            for precision in CHECKED_PRECISIONS:
                row = compare_irs(Path(folder) / weights, arguments.output / weights, precision, token_ids)
                result["quantised"][f"{weights} {precision}"] = row
    result |= {"seconds": time.perf_counter() - began, "peak_bytes": peak_rss_bytes(), "machine": machine()}
    return report(result, checks_of(result), arguments.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, nargs="?", default=demo_target(), help="folder of a Llama: Hugging Face or int8 IR"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder in which hf and one folder for each format are made"
    )
    parser.add_argument("--params", type=float, default=1e9, help="parameters wanted")
    parser.add_argument("--weights", nargs="*", default=["int8", "int4"])
    parser.add_argument("--text", type=Path, help="text for perplexity and agreement; a few paragraphs by default")
    parser.add_argument("--seed", type=int, default=0, help="of the added weights")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args()


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _near(size: float, step: int) -> int:
    return round(size / step) * step


def _shared(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


if __name__ == "__main__":
    raise SystemExit(main())
