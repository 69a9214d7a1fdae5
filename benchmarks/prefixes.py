"""Prompts that were read before: two chats in turns, and a long prompt that comes from a file.

Two chats of ten rounds take turns; each turn should compute its new message and the last token of the answer before,
which nobody has read yet, and nothing else. Then a prompt of 4 000 tokens is read, written with `save_prefix`, and
taken from the file by a model that was loaded anew: seconds of each, medians over the rounds.

    python benchmarks/prefixes.py FOLDER --json

FOLDER is an export of a chat model with a context of at least 4 100 tokens. Roofline of the file: its bytes over those
that a core hashes a second, since every byte is checked.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, paired_ratio, report, spread

LONG_PROMPT_TOKENS, ROUNDS_OF_CHAT, NEW_TOKENS = 4000, 10, 16
QUESTIONS = ("What is gravity?", "Name a river in France.")


def unread_tokens(llm: Any) -> list[int]:
    """Return how many tokens each turn of two chats computed that it need not have."""
    texts: list[list[int]] = [[], []]
    held, unread = [0, 0], []
    for turn in range(ROUNDS_OF_CHAT):
        for number, ids in enumerate(texts):
            ids.extend(llm.tokenizer.encode(f"{QUESTIONS[number]} {turn}"))
            result = llm.generate(ids, max_new_tokens=NEW_TOKENS, ignore_eos=True)
            unread.append(held[number] - result.metrics.reused_tokens)
            ids.extend(result.token_ids)
            held[number] = len(ids) - 1
    return unread


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> int:
    from edge_runtime import EdgeLLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="FOLDER", help="model folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of the long prompt")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"prefill_s": [], "save_s": [], "load_s": []}
    with EdgeLLM.load(arguments.model) as llm:
        unread = unread_tokens(llm)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            ids = np.random.default_rng(number).integers(10, 10_000, LONG_PROMPT_TOKENS).tolist()
            file = Path(folder) / f"{number}.edgekv"
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
            with EdgeLLM.load(arguments.model) as llm:
                llm.warm_up()
                times["prefill_s"].append(llm.generate(ids, max_new_tokens=1, ignore_eos=True).metrics.ttft_s)
                times["save_s"].append(timed(lambda: llm.save_prefix(file, ids)))  # noqa: B023 - called at once
            with EdgeLLM.load(arguments.model) as llm:
                llm.warm_up()
                times["load_s"].append(timed(lambda: llm.load_prefix(file)))  # noqa: B023 - called at once
                assert llm.generate(ids, max_new_tokens=1).metrics.reused_tokens == LONG_PROMPT_TOKENS - 1
        num_bytes = file.stat().st_size
    ratio = paired_ratio(times["load_s"], times["prefill_s"])
    figures = {name: spread(values) for name, values in times.items()}
    checks = {
        "two chats in turns compute only what is new": not any(unread),
        "a file takes at most a tenth of the prefill": ratio.median <= 0.1,
    }
    result = {**figures, "load_over_prefill": ratio, "file_bytes": num_bytes, "machine": machine()}
    return report(result, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
