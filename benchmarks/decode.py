"""Decoding a bandwidth-bound model, cell by cell against openvino_genai: int8 and int4, f32 and default precision.

The model is Llama-shaped with 1.04 billion random parameters (16 layers, hidden 2048, 32 query and 8 KV heads). Cells:
plain; a draft that is the target's twin (every token accepted, drafting as dear as the target); a useless draft (a
small model with random weights). Each framework gets the same IR files, prompt and number of tokens, in turn, in one
process for each cell and order of loading; peak memory is measured in a process of its own.

    python benchmarks/decode.py --json [--work-dir DIR]     (5 GB of disk; made once in DIR and kept)

Roofline: a token reads every weight once, so it takes at least weight bytes / memory bandwidth. `roofline_ms` uses the
bandwidth of a plain read of 1 GB by all cores, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import add_peer_tokenizer, interleave, machine, paired_ratio, peer_inputs, peer_tpot_ms, report, spread

from edge_runtime import strict_json
from edge_runtime.bench.cats import read_bandwidth

PROMPT_IDS = list(range(100, 164))
PEER_F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
PRECISIONS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "f32": ({"precision": "f32", "activation_group_size": 128}, PEER_F32),
    "default": ({}, {}),
    "exact": ({"precision": "f32"}, PEER_F32),
}
"""Name to EdgeLLM's options and to openvino_genai's properties.

The peer's f32 rounds activations to int8 in groups of 32; so does ours in `f32`, in groups of 128. `exact` is what
`precision="f32"` alone means here: nothing is rounded, verifying equals plain decoding. It has no counterpart there and
is reported, not checked.
"""
CHECKED = ("f32", "default")
TARGET = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
DRAFT = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "num_attention_heads": 8}
Figures = dict[str, list[float]]
TOKENS = {"plain": "none", "twin": "target", "useless": "draft"}
"""Cell to the folder of its draft."""


LLAMA: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096}


def make_source(folder: Path, sizes: dict[str, int], seed: int, family: str = "Llama") -> Path:
    """Write a Hugging Face folder with random weights in bfloat16 and a real byte-level tokenizer."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from edge_export.quiet import hide_packages

    hide_packages()
    import torch
    import transformers
    from tiny_models import make_tokenizer

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**LLAMA, **sizes, "tie_word_embeddings": True})
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_models(folder: Path, weights: str) -> dict[str, Path]:
    """Return the model folders of one weight format, exported unless they are there."""
    from edge_export.convert import export_model

    made = {}
    for name, sizes, seed in (("target", TARGET, 0), ("draft", DRAFT, 1)):
        made[name] = folder / f"{name}-{weights}"
        if not made[name].is_dir():
            source = folder / f"{name}-source"
            export_model(source if source.is_dir() else make_source(source, sizes, seed), made[name], weights=weights)
        add_peer_tokenizer(made[name])
    return made


def edge_cell(models: dict[str, Path], cell: str, precision: str, tokens: int) -> Callable[[], float]:
    """Load with EdgeLLM; return a function that decodes once and returns ms per token."""
    from edge_runtime import EdgeLLM

    llm = EdgeLLM.load(models["target"], draft=models.get(TOKENS[cell]), **PRECISIONS[precision][0])
    return lambda: llm.generate(PROMPT_IDS, max_new_tokens=tokens, ignore_eos=True).metrics.tpot_ms


def peer_cell(models: dict[str, Path], cell: str, precision: str, tokens: int) -> Callable[[], float]:
    """Load with openvino_genai; return a function that decodes once and returns ms per token."""
    import openvino_genai

    properties: dict[str, Any] = dict(PRECISIONS[precision][1])
    draft = models.get(TOKENS[cell])
    drafting = {"draft_model": openvino_genai.draft_model(str(draft), "CPU", **properties)} if draft else {}
    pipeline = openvino_genai.LLMPipeline(str(models["target"]), "CPU", **drafting, **properties)
    config = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
    if draft:
        config.num_assistant_tokens = 5  # its documented default
    inputs = peer_inputs(PROMPT_IDS)
    return lambda: peer_tpot_ms(pipeline, inputs, config)


def peak_memory(framework: str, models: dict[str, Path], cell: str, precision: str, tokens: int) -> int:
    """Return the peak resident bytes of a fresh process that loads and decodes once."""
    call = f"{framework}_cell({_plain(models)!r}, {cell!r}, {precision!r}, {tokens})()"
    return int(_in_fresh_process(f"{call}\nfrom edge_runtime.metrics import peak_rss_bytes; print(peak_rss_bytes())"))


def measure_cell(models: dict[str, Path], cell: str, precision: str, tokens: int, rounds: int, first: str) -> Figures:
    """Measure both frameworks in turn in this process; `first` is loaded first."""
    makers = {"edge_ms": edge_cell, "peer_ms": peer_cell}
    names = sorted(makers, key=lambda name: name != first)
    return interleave({name: makers[name](models, cell, precision, tokens) for name in names}, rounds, warmup=1)


def run_cell(models: dict[str, Path], cell: str, precision: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure one cell in two fresh processes, in which the frameworks are loaded in either order.

    Which of two models gets memory in large pages is luck, and worth a factor of two: a process that has loaded models
    before, or one order alone, would measure that.
    """
    figures: Figures = {"edge_ms": [], "peer_ms": []}
    for first in figures:
        call = f"measure_cell({_plain(models)!r}, {cell!r}, {precision!r}, {tokens}, {-(-rounds // 2)}, {first!r})"
        for name, values in json.loads(_in_fresh_process(f"print(json.dumps({call}))")).items():
            figures[name] += values
    return {
        "edge_ms": spread(figures["edge_ms"]),
        "peer_ms": spread(figures["peer_ms"]),
        "speedup": paired_ratio(figures["peer_ms"], figures["edge_ms"]),
        "edge_peak_bytes": peak_memory("edge", models, cell, precision, tokens),
        "peer_peak_bytes": peak_memory("peer", models, cell, precision, tokens),
    }


def _plain(models: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in models.items()}


def _in_fresh_process(statement: str) -> str:
    """Run a statement with this module's names in a new Python; return the last line that it prints."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom decode import *\n{statement}"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--work-dir", type=Path, help="where models are made and kept; a temporary folder by default")
    parser.add_argument("--weights", nargs="+", default=["int8", "int4"])
    parser.add_argument("--precisions", nargs="+", default=list(CHECKED), choices=list(PRECISIONS))
    parser.add_argument("--cells", nargs="+", default=list(TOKENS), choices=list(TOKENS))
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of each cell")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bandwidth = read_bandwidth()
        result: dict[str, Any] = {"machine": machine(), "read_bandwidth_gb_s": bandwidth / 1e9}
        checks: dict[str, bool] = {}
        for weights in arguments.weights:
            models = make_models(folder, weights)
            roofline = (models["target"] / "openvino_model.bin").stat().st_size / bandwidth * 1000
            for precision in arguments.precisions:
                for cell in arguments.cells:
                    name = f"{weights} {precision} {cell}"
                    row = run_cell(models, cell, precision, arguments.tokens, arguments.rounds)
                    result[name] = {**row, "roofline_ms": roofline}
                    print(strict_json.dumps({name: result[name]}), file=sys.stderr, flush=True)
                    if precision not in CHECKED:
                        continue
                    checks[f"{name}: at least the peer's tokens/s"] = row["speedup"].median >= 1
                    checks[f"{name}: peak memory no higher"] = row["edge_peak_bytes"] <= row["peer_peak_bytes"]
    return report(result, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
