"""A seed's answers: are they the same however they are drafted, and what does that cost in accepted drafts?

Three measurements of a target, with a draft or with prompt lookup alone:

- acceptance: accepted / proposed tokens of the coupling that a seed brings, beside the maximal one without a seed, over
  the same prompts, temperatures 0.6 and 1.0, K = 4. Needs a draft.
- exact: in f32, how many answers equal the same seed's plain answer, by what is drafted (K = 1 to 8, chosen by cost,
  lookup, both), with half of the prompt held, as one of two streams that take turns, and all at once. Checked: all.
- default: the same in the default precision, where rounding depends on how many tokens a forward has.

    python benchmarks/seeded.py --json                                   # the embedded pair
    python benchmarks/seeded.py --json --model TARGET --draft DRAFT
    python benchmarks/seeded.py --json --model TARGET --chat             # prompt lookup alone
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from measure import machine, report

from edge_runtime import EdgeLLM, GenerationConfig, strict_json
from edge_runtime.models.base import catch_up

PROMPTS = (
    "Once upon a time there was a little girl who",
    "def read_config(path):\n    ",
    "One day, Tom and his dog went to the park. They saw",
    "import os\nimport sys\n\ndef main(arguments):\n",
    "The king looked out of the window of his castle and",
)
TEMPERATURES, NUM_DRAFT_TOKENS = (0.6, 1.0), 4


class Runs:
    """Answers of one loaded model.

    Args:
        llm: The target, with a draft or without.
        prompts: As token ids.
        options: Options of every request.
    """

    def __init__(self, llm: EdgeLLM, prompts: list[list[int]], options: dict[str, Any]) -> None:
        self._llm, self._prompts, self._options = llm, prompts, options

    def prompt(self, number: int) -> list[int]:
        """Return the prompt of a numbered request; they come in turn."""
        return self._prompts[number % len(self._prompts)]

    def answer(self, number: int, *, held: int = 0, **options: Any) -> list[int]:
        """Return one answer, with `held` tokens of the prompt in the caches before."""
        target, ids = self._llm.target, self.prompt(number)
        with contextlib.closing(target.sequence()) as sequence:
            if held:
                catch_up(target, sequence, ids[:held])
            return self._llm.generate(ids, **self._options, **options).token_ids

    def acceptance(self, temperature: float, count: int, *, is_seeded: bool) -> float:
        """Return accepted / proposed tokens over so many answers."""
        counted: Counter[str] = Counter()
        for number in range(count):
            request = {"temperature": temperature, "num_draft_tokens": NUM_DRAFT_TOKENS}
            seed = number if is_seeded else None
            made = self._llm.generate(self.prompt(number), seed=seed, **self._options, **request).metrics
            counted["accepted"] += made.accepted_tokens
            counted["proposed"] += made.proposed_tokens
        return round(counted["accepted"] / counted["proposed"], 3)

    def equal_answers(self, count: int) -> dict[str, str]:
        """Return for each way to decode how many of a seed's answers equal its plain one."""
        ways = self._ways()
        equal = dict.fromkeys([*ways, "half of the prompt held", "streams in turn", "all at once"], 0)
        all_at_once = self._answer_at_once(count)
        for number in range(count):
            request = {"temperature": 1.0, "seed": number}
            plain = self.answer(number, num_draft_tokens=0, **request)
            for way, options in ways.items():
                equal[way] += self.answer(number, **options, **request) == plain
            half = len(self.prompt(number)) // 2
            equal["half of the prompt held"] += self.answer(number, held=half, num_draft_tokens=0, **request) == plain
            equal["streams in turn"] += self._answer_in_turn(number, request) == plain
            equal["all at once"] += all_at_once[number] == plain
        return {way: f"{found} of {count}" for way, found in equal.items()}

    def _ways(self) -> dict[str, dict[str, Any]]:
        ways: dict[str, dict[str, Any]] = {"lookup, K = 4": {"num_draft_tokens": 4, "lookup": True}}
        if self._llm.drafter is None:
            return ways | {"lookup, K by cost": {"lookup": True}}
        ways = {f"draft, K = {length}": {"num_draft_tokens": length} for length in range(1, 9)} | ways
        return ways | {"draft, K by cost": {}, "draft and lookup, K by cost": {"lookup": True}}

    def _answer_in_turn(self, number: int, request: dict[str, Any]) -> list[int]:
        stream = self._llm.stream(self.prompt(number), **self._options, **request)
        other = self._llm.stream(self.prompt(number + 1), **self._options, **request)
        for place, _ in enumerate(stream):
            if place % 8 == 0:
                next(other, None)
        other.close()
        return stream.result.token_ids

    def _answer_at_once(self, count: int) -> list[list[int]]:
        prompts = [self.prompt(number) for number in range(count)]
        configs = [GenerationConfig(temperature=1.0, seed=number) for number in range(count)]
        return [answer.token_ids for answer in self._llm.generate_many(prompts, configs, **self._options)]


def read_prompts(llm: EdgeLLM, path: Path | None, is_chat: bool) -> list[list[int]]:
    """Return prompts as token ids: those of a JSON Lines file, or our own."""
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    texts = [json.loads(line)["prompt"] for line in lines] or list(PROMPTS)
    if is_chat:
        return [llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
    return [llm.tokenizer.encode(text) for text in texts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--model", help="folder of the target (default: the embedded pair)")
    parser.add_argument("--draft", help="folder of the draft")
    parser.add_argument("--prompts", type=Path, help="JSON Lines with `prompt` (default: five stories and programs)")
    parser.add_argument("--chat", action="store_true", help="ask prompts as questions, in the model's chat template")
    parser.add_argument("--seeds", type=int, default=50, help="answers of each kind")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--only", choices=("acceptance", "exact", "default"), help="one of the three measurements")
    arguments = parser.parse_args()
    folders = {"model": arguments.model, "draft": arguments.draft}
    options = {"max_new_tokens": arguments.new_tokens, "ignore_eos": True}
    figures: dict[str, Any] = {}
    checks: dict[str, bool] = {}
    for precision in ("auto", "f32"):
        llm = EdgeLLM.load(**folders, precision=precision, prefix_cache_bytes=0)
        runs = Runs(llm, read_prompts(llm, arguments.prompts, arguments.chat), options)
        if precision == "auto" and llm.drafter and arguments.only in (None, "acceptance"):
            figures["acceptance"] = {
                f"T = {temperature}": {
                    name: runs.acceptance(temperature, arguments.seeds, is_seeded=name == "seeded")
                    for name in ("maximal", "seeded")
                }
                for temperature in TEMPERATURES
            }
        if precision == "auto" and arguments.only in (None, "default"):
            figures["default"] = runs.equal_answers(arguments.seeds)
        if precision == "f32" and arguments.only in (None, "exact"):
            figures["exact"] = runs.equal_answers(arguments.seeds)
            whole = f"{arguments.seeds} of {arguments.seeds}"
            checks["in f32 all answers of a seed are the same"] = set(figures["exact"].values()) == {whole}
        print(strict_json.dumps(figures), file=sys.stderr)
    setting = {"seeds": arguments.seeds, "new_tokens": arguments.new_tokens, "K of acceptance": NUM_DRAFT_TOKENS}
    return report({"figures": figures, "setting": setting, "machine": machine()}, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
