"""Many short requests of many threads: does memory grow, is an answer wrong, is a thread left?

Threads send requests of several kinds to one model: answered whole, read as a stream, left half-way, cancelled, failed.
Half of the prompts are new; half are known, and their answers are compared with those of the same requests alone, which
in f32 must be equal. The resident memory after each 50 requests, from the first 1 000 on, is fitted by a line whose
slope is the growth for each request.

OpenVINO keeps kernels for each number of tokens that a step has had, hundreds of MB for some hundred numbers. They are
made before, so that they do not count as growth.

    python benchmarks/soak.py --json [--requests 10000] [--model FOLDER --draft FOLDER]     (Linux)
"""

from __future__ import annotations

import argparse
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, report

REQUESTS, THREADS, WARM_UP = 10_000, 16, 1_000
EVERY = 50
"""Requests from one look at the memory to the next."""
MOST_GROWTH = 1024
"""Bytes for each request."""
MOST_TOKENS, MOST_ROWS = 384, 192
"""Tokens and rows of logits of a step, hardly ever exceeded: all threads with a prompt, or with the longest draft."""
KINDS = ("whole", "stream", "left", "cancelled", "failing")
PROMPTS = ("Once upon a time", "The ship sailed", "def main():", "It was a dark night, and", "She said")
OPTIONS: tuple[dict[str, Any], ...] = (
    {"num_draft_tokens": 0},
    {},
    {"num_draft_tokens": 3},
    {"lookup": True},
    {"temperature": 0.8, "seed": 1},
    {"repetition_penalty": 1.2, "stop": ["e"]},
)


class Soak:
    """Requests to one model, and what becomes of them.

    Args:
        llm: The model, with a draft, in f32.
        wanted: How many requests.

    Attributes:
        ended: Kind of request to how many have ended.
        wrong: Answers to known prompts that were not those that the same requests had alone.
        memory: Requests ended and bytes resident, at each look.
    """

    def __init__(self, llm: Any, wanted: int) -> None:
        self._llm, self._wanted = llm, wanted
        self._no_token = dict.fromkeys(range(llm.vocab_size), float("-inf"))
        self._known = {
            (prompt, number): llm.generate(prompt, max_new_tokens=8, **OPTIONS[number]).token_ids
            for prompt in PROMPTS
            for number in range(len(OPTIONS))
        }
        self._lock = threading.Lock()
        self._sent = 0
        self.ended: Counter[str] = Counter()
        self.wrong = 0
        self.memory: list[tuple[int, int]] = []

    def run(self, num_threads: int) -> None:
        """Send all requests."""
        threads = [threading.Thread(target=self._send, args=(random.Random(seed),)) for seed in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def growth(self, warm_up: int) -> float:
        """Return the bytes for each request, after the first `warm_up`."""
        ended, resident = zip(*[look for look in self.memory if look[0] >= warm_up], strict=True)
        return float(np.polyfit(ended, resident, 1)[0])

    def _send(self, chance: random.Random) -> None:
        while self._is_due():
            kind, number = chance.choice(KINDS), chance.randrange(len(OPTIONS))
            is_known = chance.random() < 0.5
            prompt = chance.choice(PROMPTS) if is_known else f"{chance.random()} {PROMPTS[0]}"
            token_ids = self._request(kind, prompt, {"max_new_tokens": 8, **OPTIONS[number]})
            self._count(kind, is_known and token_ids != self._known[prompt, number][: len(token_ids)])

    def _request(self, kind: str, prompt: str, options: dict[str, Any]) -> list[int]:
        """Make one request and return the tokens read of it."""
        if kind == "whole":
            ids: list[int] = self._llm.generate(prompt, **options).token_ids
            return ids
        if kind == "failing":  # no token is left to choose, which is found after the first forward
            options["logit_bias"] = self._no_token
        stream = self._llm.stream(prompt, **options)
        try:
            for index, _ in enumerate(stream):
                if kind == "left" and index == 2:
                    break  # neither closed nor cancelled
                if kind == "cancelled" and index == 2:
                    stream.cancel()
        except Exception:
            if kind != "failing":
                raise
        return list(stream.result.token_ids)

    def _is_due(self) -> bool:
        with self._lock:
            self._sent += 1
            return self._sent <= self._wanted

    def _count(self, kind: str, is_wrong: bool) -> None:
        with self._lock:
            self.ended[kind] += 1
            self.wrong += is_wrong
            if self.ended.total() % EVERY == 0:
                self.memory.append((self.ended.total(), resident_bytes()))


def make_kernels(model: Any) -> None:
    """Let OpenVINO make the kernels of all steps that may come."""
    from edge_runtime.models.base import Span

    sequence = model.sequence()
    for tokens in range(1, MOST_TOKENS + 1):
        model.forward([Span(sequence, [0] * tokens, min(tokens, MOST_ROWS))])
        sequence.rollback(0)
    sequence.close()


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(
    model: Path | None, draft: Path | None, requests: int, num_threads: int, warm_up: int
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Return what was measured, and which bounds hold; the embedded pair stands in for no model."""
    from edge_runtime import EdgeLLM

    threads, begin = threading.active_count(), time.perf_counter()
    with EdgeLLM.load(model, draft=draft, precision="f32") as llm:
        for compiled in (llm.target, llm.drafter.model):
            make_kernels(compiled)
        run = Soak(llm, requests)
        run.run(num_threads)
        growth = run.growth(warm_up)
    deadline = time.perf_counter() + 1
    while threading.active_count() > threads and time.perf_counter() < deadline:
        time.sleep(0.01)
    figures = {
        "ended": dict(run.ended),
        "wrong": run.wrong,
        "bytes_a_request": round(growth, 1),
        "resident_bytes": run.memory[:: max(1, len(run.memory) // 20)],
        "threads_left": threading.active_count() - threads,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    checks = {
        f"all {requests} requests have ended": run.ended.total() == requests,
        "known answers are those of the same requests alone": run.wrong == 0,
        f"memory grows by less than {MOST_GROWTH} bytes a request": growth < MOST_GROWTH,
        "no thread is left": figures["threads_left"] == 0,
    }
    return figures, checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="how many requests, all threads together")
    parser.add_argument("--threads", type=int, default=THREADS, help="threads that send them")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="model folder; by default the embedded pair")
    parser.add_argument("--draft", type=Path, metavar="FOLDER", help="draft of that model")
    arguments = parser.parse_args()
    warm_up = min(WARM_UP, arguments.requests // 2)
    figures, checks = soak(arguments.model, arguments.draft, arguments.requests, arguments.threads, warm_up)
    return report({**figures, "machine": machine()}, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
