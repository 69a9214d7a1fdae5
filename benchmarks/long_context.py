"""LongGen on a whole model at long context, beside full attention in the same runtime and openvino.genai's op.

The model has the shape of Qwen3-0.6B and random weights in int4, so only time and bytes are read. What is measured is
`edge-run bench attention --model`; this script makes the model and checks the ratios. LongGen's paper has, at 128K,
1.41x in decoding and 1.67x in prefill.

    python benchmarks/long_context.py --work-dir DIR [--context 131072] [--json] [--plot FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from decode import make_source
from measure import machine, report

from edge_runtime.bench.attention import AttentionBench
from edge_runtime.bench.attention_plot import save_time_plot
from edge_runtime.bench.settings import AttentionSettings

SHAPE: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
}
WANTED = {"decode": 2.0, "prefill": 1.67}
"""Speed of LongGen over full attention, ours and OpenVINO's."""


def make_model(folder: Path) -> Path:
    """Return the model folder, exported unless it is there."""
    from edge_export.convert import export_model

    made = folder / "qwen3-shape-int4"
    if not made.is_dir():
        source = folder / "qwen3-shape-source"
        export_model(source if source.is_dir() else make_source(source, SHAPE, 0, "Qwen3"), made, weights="int4")
    return made


def checks(rows: list[dict[str, Any]], context: int) -> dict[str, bool]:
    """Return what the paper claims and whether it holds here."""
    found = {(row["impl"], row["pattern"], row["phase"]): row["ms"] for row in rows if row["context"] == context}
    return {
        f"{phase} at {context}: LongGen {wanted} times as fast as {impl} full": found[impl, "full", phase]
        >= wanted * found["edge", "longgen", phase]
        for phase, wanted in WANTED.items()
        for impl in ("edge", "genai")
        if (impl, "full", phase) in found
    }


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="where the model is made and kept")
    parser.add_argument("--context", type=int, nargs="*", default=[131_072])
    parser.add_argument("--stride", type=int, nargs="*", default=[8])
    parser.add_argument("--longest-peer", type=int, default=131_072)
    parser.add_argument("--rounds", type=int, default=AttentionSettings.rounds)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    settings = AttentionSettings(
        contexts=tuple(options.context),
        strides=tuple(options.stride),
        longest_peer=options.longest_peer,
        rounds=options.rounds,
    )
    bench = AttentionBench(settings, make_model(options.work_dir), scopes=("model",))
    for _ in bench.run():
        pass
    if options.plot:
        save_time_plot(bench.rows(), options.plot)
    result = {"rows": bench.rows(), "machine": machine()}
    return report(result, checks(bench.rows(), max(options.context)), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
