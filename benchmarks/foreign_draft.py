"""A draft trained for a target that somebody else trained, against the target's own first layers as its draft.

    edge-run train draft --target T --stages align --prompts self --size S -o D
    python benchmarks/foreign_draft.py --target T --draft D --prompts FILE --json

Every draft meets the same loaded target over the same prompts with the same seeds, so differences are paired by prompt.
The first layers keep the target's embeddings, last norm and output layer, and cost no training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from draft_stages import differences_of, measure, rows_of
from measure import machine, report

from edge_export.convert import export_model
from edge_export.quiet import quiet
from edge_runtime.manifest import load_manifest

LARGEST_SHARE = 1 / 8
"""Of the target's parameters, what the draft may have."""


def first_layers(target: Path, count: int, out: Path) -> Path:
    """Return an f32 model folder of the target's first layers."""
    if out.is_dir():
        return out
    with quiet():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(target, dtype="float32", local_files_only=True)
        model.model.layers = model.model.layers[:count]
        model.config.num_hidden_layers = count
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:count]
        source = out.with_name(out.name + "-hf")
        model.save_pretrained(source)
    for path in target.glob("tokenizer*"):
        (source / path.name).write_bytes(path.read_bytes())
    export_model(source, out, weights="fp32")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--draft", type=Path, required=True, help="folder made by `edge-run train draft`")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with prompt")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.6])
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3, 4], help="how many first layers")
    parser.add_argument("--tokens", type=int, default=150, help="of each answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    work = arguments.draft / "first-layers"
    work.mkdir(exist_ok=True)
    target = work / "target"
    if not target.is_dir():
        export_model(arguments.target, target, weights="fp32")
    drafts = {"trained": arguments.draft / "openvino"}
    drafts |= {f"first {n}": first_layers(arguments.target, n, work / str(n)) for n in arguments.layers}
    sizes = {name: load_manifest(folder).num_parameters or 0 for name, folder in {"target": target, **drafts}.items()}
    rows, differences = [], []
    for temperature in arguments.temperature:
        counts = measure(target, drafts, arguments.prompts, arguments.tokens, temperature, arguments.num_draft_tokens)
        rows += [{"temperature": temperature, **row} for row in rows_of(counts)]
        pairs = [("trained", name) for name in drafts if name != "trained"]
        differences += [{"temperature": temperature, **row} for row in differences_of(counts, pairs)]
    checks = {f"{d['difference']} at T = {d['temperature']:g} excludes 0": d["ci"][0] > 0 for d in differences}
    checks["the draft is an eighth of the target"] = sizes["trained"] <= sizes["target"] * LARGEST_SHARE
    result = {"parameters": sizes, "rows": rows, "differences": differences, "machine": machine()}
    return report(result, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
