"""Why hybrid layers matter: small models learn to find needles, and only some can find those beyond the window.

A text of 512 tokens is random filler but for 8 needles anywhere in it, one of each kind, that carry a value; at its end
stand 8 questions, and the model is to say the value of each kind. Models of 6 layers and 4 heads are trained from
scratch on the same texts, alike but for what their layers see (blocks of 16 tokens):

    full      everything
    longgen   the middle third everything, the rest the first 16 and the last 32 tokens
    window    the last 32 tokens in every layer: 6 layers reach 192 tokens back at most
    s2        the last 32 tokens and one block of 4, a different one by each head: together everything

Retrieval is measured by distance on new texts in PyTorch, and again in the runtime, from the exported model with caches
of its own. Training texts grow from 64 to 512 tokens: in long ones alone the search takes long to be found at all.

    python benchmarks/needle.py --work-dir DIR [--patterns full longgen window s2] [--steps 700] [--json] [--plot FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, report
from numpy.typing import NDArray

from edge_export.quiet import hide_packages
from edge_runtime import strict_json
from edge_runtime.models.attention import FULL, AttentionPattern, LayerPattern, longgen, s2

BLOCK, WINDOW, LAYERS, HEADS, HIDDEN = 16, 32, 6, 4, 64
LENGTH, FILLERS, KINDS, VALUES = 512, 64, 8, 16
NEEDLE = 1 + FILLERS
QUESTION = NEEDLE + KINDS * VALUES
ANSWER = QUESTION + KINDS
VOCAB = ANSWER + VALUES
STEP_TOKENS, MOST_QUESTIONS, RATE, WARM_UP = 4096, 32, 1e-2, 20
FIRST_LENGTH, LEARNED, LATEST = 64, 0.1, 0.5
"""Training texts have 64 tokens until the loss is that small, or half the steps are over; 128 then, and so on."""
REACH = LAYERS * WINDOW
"""Tokens that a stack of windows can see over."""
BINS = (0, 32, 64, 128, REACH, 256, 320, 384, 448, 512)
TEST_TEXTS = 400
PATTERNS: dict[str, AttentionPattern] = {
    "full": AttentionPattern.of_layers([FULL] * LAYERS, BLOCK),
    "longgen": longgen(LAYERS, sink=BLOCK, window=WINDOW, block_size=BLOCK),
    "window": AttentionPattern.of_layers([LayerPattern(window=WINDOW)] * LAYERS, BLOCK),
    "s2": s2(LAYERS, HEADS, window=WINDOW, stride=HEADS, block_size=BLOCK),
}
FINDS = {"full": True, "longgen": True, "s2": True, "window": False}

Ints = NDArray[np.int64]


def texts(count: int, length: int, num_questions: int, random: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """Return texts (N, length), and for each question, (N, Q), its answer and how far its needle lies back."""
    body = length - num_questions
    ids = random.integers(1, NEEDLE, (count, length))
    places = np.argsort(random.random((count, body)), axis=1)[:, :KINDS]
    values = random.integers(0, VALUES, (count, KINDS))
    asked = np.argsort(random.random((count, num_questions)), axis=1) % KINDS
    np.put_along_axis(ids, places, NEEDLE + np.arange(KINDS) * VALUES + values, 1)
    ids[:, body:] = QUESTION + asked
    distances = np.arange(body, length) - np.take_along_axis(places, asked, 1)
    return ids, ANSWER + np.take_along_axis(values, asked, 1), distances


def new_model() -> Any:
    """Return a model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 2 * LENGTH}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0))


def new_optimizer(model: Any) -> Any:
    """Return Muon for the matrices of the layers, AdamW for the rest: AdamW alone takes twice the steps."""
    from edge_export.muon import Muon

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "is_matrix": True, "weight_decay": 0.01}, {"params": others, "is_matrix": False}]
    return Muon(groups, lr=RATE)


def train(name: str, folder: Path, steps: int, seed: int) -> Path:
    """Return the folder of a trained model; made unless it is there."""
    if (folder / "config.json").is_file():
        return folder
    import torch

    from edge_export.hybrid.torch_attention import use_pattern

    torch.manual_seed(seed)
    model = new_model()
    use_pattern(model, PATTERNS[name])
    optimizer, random, began = new_optimizer(model), np.random.default_rng(seed), time.monotonic()
    length = FIRST_LENGTH
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = (
            RATE * min(1.0, (step + 1) / WARM_UP) * min(1.0, 3 * (steps - step) / steps)
        )
        num_questions = min(length // 4, MOST_QUESTIONS)
        ids, answers, _ = texts(STEP_TOKENS // length, length, num_questions, random)
        hidden = model.model(torch.from_numpy(ids)).last_hidden_state[:, -num_questions:]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), torch.from_numpy(answers).ravel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49:
            print(f"{name} {step + 1}/{steps}: {length} tokens, loss {loss.item():.3f}, "
                  f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
        if length < LENGTH and (loss.item() < LEARNED or step > LATEST * steps):
            length *= 2
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose words are the token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", unk_token="t0").save_pretrained(folder)


def found_in_torch(name: str, folder: Path, ids: Ints) -> Ints:
    """Return the values that a model says, (N, 8)."""
    import torch
    from transformers import LlamaForCausalLM

    from edge_export.hybrid.torch_attention import use_pattern

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    use_pattern(model, PATTERNS[name])
    with torch.no_grad():
        parts = [model(torch.from_numpy(ids[i : i + 16])).logits[:, -KINDS:].argmax(-1) for i in range(0, len(ids), 16)]
    return np.concatenate([part.numpy() for part in parts])


def found_in_runtime(folder: Path, ids: Ints) -> Ints:
    """Return the same from the exported model, read in chunks of 100 tokens with the caches of its pattern."""
    from edge_export.convert import export_model
    from edge_runtime.config import LoadConfig
    from edge_runtime.manifest import load_manifest
    from edge_runtime.models.base import advance
    from edge_runtime.models.loading import load_model

    exported = folder.with_name(folder.name + "-int8")
    if not exported.is_dir():
        export_model(folder, exported, weights="int8")
    model = load_model(exported, load_manifest(exported), LoadConfig(attention="block_sparse"))
    made = []
    for row in ids.tolist():
        sequence = model.sequence()
        for begin in range(0, LENGTH - KINDS, 100):
            advance(model, sequence, row[begin : min(begin + 100, LENGTH - KINDS)])
        made.append(advance(model, sequence, row[-KINDS:], KINDS).argmax(-1))
        sequence.close()
    return np.array(made)


def by_distance(hits: NDArray[np.bool_], distances: Ints) -> list[dict[str, Any]]:
    """Return the share of needles found in each range of distances."""
    rows = []
    for low, high in itertools.pairwise(BINS):
        inside = (distances > low) & (distances <= high)
        rows.append({"from": low, "to": high, "found": float(hits[inside].mean()), "needles": int(inside.sum())})
    return rows


def measure(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train, unless done; return what is found at which distance."""
    model = train(name, folder, steps, seed=0)
    ids, values, distances = texts(TEST_TEXTS, LENGTH, KINDS, np.random.default_rng(99))
    hits = found_in_torch(name, model, ids) == values
    some = slice(0, 100)
    runtime_hits = found_in_runtime(model, ids[some]) == values[some]
    far = distances > REACH
    return {
        "pattern": name,
        "beyond_reach": float(hits[far].mean()),
        "beyond_reach_in_runtime": float(runtime_hits[far[some]].mean()),
        "by_distance": by_distance(hits, distances),
    }


def save_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the share that is found by distance, a line for each pattern."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):  # lines that lie on one another are wide below and narrow above
        bins = row["by_distance"]
        middles, found = [(b["from"] + b["to"]) / 2 for b in bins], [b["found"] for b in bins]
        axes.plot(middles, found, "-", linewidth=8 - 2 * number, alpha=0.8, label=row["pattern"])
    axes.axhline(1 / VALUES, color="gray", linestyle="--", label="a guess")
    axes.axvline(REACH, color="gray", linestyle=":", label="reach of stacked windows")
    axes.set_xlabel("tokens from needle to question")
    axes.set_ylabel("needles found")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="where models and results are kept")
    parser.add_argument("--patterns", nargs="*", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    hide_packages()
    rows = []
    for name in options.patterns:
        kept = options.work_dir / f"{name}.json"
        if not kept.is_file():
            made = measure(name, options.work_dir / name, options.steps)
            kept.write_text(strict_json.dumps(made), encoding="utf-8")
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
    if options.plot:
        save_plot(rows, options.plot)
    checks = {}
    for row in rows:
        for place in ("beyond_reach", "beyond_reach_in_runtime"):
            is_found = row[place] >= 0.95
            wanted = "95 % are found" if FINDS[row["pattern"]] else "few are found"
            holds = is_found if FINDS[row["pattern"]] else row[place] < 0.2
            checks[f"{row['pattern']}, {place.replace('_', ' ')}: {wanted}"] = holds
    return report({"rows": rows, "machine": machine()}, checks, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
