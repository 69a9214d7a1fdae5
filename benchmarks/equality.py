"""How often a greedy answer is the same with drafting and without, at default precision and in f32.

Each prompt is answered plainly, then by verifying several tokens at once: with prompt lookup of four tokens at every
step, and with a draft if one is given. In f32 all are equal by construction; at default precision the rounding of a
product depends on how many tokens it has, and a near-tie may fall the other way.

    python benchmarks/equality.py MODEL [--draft FOLDER] --prompts PROMPTS.jsonl --json

Prompts are JSON lines as `edge-run bench draft` takes them; models with a chat template get them as a chat.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measure import machine, report

PRECISIONS: dict[str, dict[str, Any]] = {"default": {}, "f32": {"precision": "f32"}}


def answers(llm: Any, prompts: list[str], new_tokens: int, **options: Any) -> list[list[int]]:
    """Return the token ids of each answer."""
    ask = llm.chat if llm.tokenizer.has_chat_template else llm.generate
    return [ask(prompt, max_new_tokens=new_tokens, **options).token_ids for prompt in prompts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--draft", type=Path, help="folder of its draft")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines")
    parser.add_argument("--limit", type=int, help="most prompts of each category")
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens of each answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    from edge_runtime import EdgeLLM
    from edge_runtime.bench.prompts import read_prompts

    prompts = [prompt.text for prompt in read_prompts(arguments.prompts, arguments.limit)]
    equal: dict[str, int] = {}
    for precision, options in PRECISIONS.items():
        variants: dict[str, tuple[Path | None, dict[str, Any]]] = {"lookup": (None, {"lookup": True})}
        if arguments.draft:
            variants["draft"] = arguments.draft, {}
        for name, (draft, drafting) in variants.items():
            with_drafts = EdgeLLM.load(arguments.model, draft=draft, **options)
            plain = answers(with_drafts, prompts, arguments.tokens, num_draft_tokens=0)
            drafted = answers(with_drafts, prompts, arguments.tokens, num_draft_tokens=4, **drafting)
            equal[f"{precision}, {name}"] = sum(a == b for a, b in zip(plain, drafted, strict=True))
    checks = {f"{name}: all equal": count == len(prompts) for name, count in equal.items() if name.startswith("f32")}
    return report({"machine": machine(), "prompts": len(prompts), "equal": equal}, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
