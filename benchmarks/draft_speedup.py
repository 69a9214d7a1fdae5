"""What drafting brings on a real pair: tokens/s against plain decoding, against openvino_genai, and against prediction.

All variants decode the same prompts from the same two model folders, in turn prompt by prompt: EdgeLLM plain and with
the draft paced automatically, openvino_genai plain and, greedy, with the draft and 3 or 5 tokens a block, of which its
better one counts (its sampling with a draft is not the target's: sampling_distribution.py). Each round is a fresh
process, the frameworks loaded in alternating order: which of two models gets memory in large pages is luck.

Prediction, in a process of its own so that pacing learns nothing from it: `edge-run bench draft`'s, from the costs of
single steps (edge_runtime/bench/steps.py), with fixed K.

Roofline: plain decoding reads every weight for each token; `plain roofline` is measured read bandwidth / weight bytes.

    python benchmarks/draft_speedup.py --target IR --draft IR --prompts FILE [--temperature 0 0.6] [--plot FILE] --json

FILE holds a JSON object a line: {"prompt": ..., "category": "code" or "text" or another, which is only reported}.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from decode import PRECISIONS
from measure import (
    add_peer_tokenizer,
    bar_chart,
    machine,
    paired_ratio,
    peer_inputs,
    peer_tpot_ms,
    report,
    spread,
)

from edge_runtime import EdgeLLM
from edge_runtime.bench.cats import read_bandwidth
from edge_runtime.bench.draft import DraftBench
from edge_runtime.bench.plot import check_plot
from edge_runtime.bench.prompts import Prompt, read_prompts
from edge_runtime.bench.settings import DraftSettings
from edge_runtime.demo import demo_target
from edge_runtime.text.tokenizer import Tokenizer

BLOCKS = (3, 5)
"""K of the peer, and of the prediction."""
WANTED = {"code": 2.0, "text": 1.6}
"""Category to the speedup over plain decoding that is checked."""
OVER_PEER, WORST, PREDICTED_WITHIN = 1.15, 0.97, 0.1


class Settings(NamedTuple):
    """What all rounds share."""

    target: Path
    draft: Path
    prompts: list[Prompt]
    temperatures: list[float]
    tokens: int
    precision: str


class Answer(NamedTuple):
    """One timed answer; the last two are known of EdgeLLM only."""

    temperature: float
    category: str
    prompt: int
    variant: str
    tokens_per_second: float
    block_efficiency: float = 0.0
    token_ids: tuple[int, ...] = ()


Variant = Callable[[list[int], float], tuple[Any, ...]]
"""Token ids and temperature to the last fields of an Answer."""


def load_pair(settings: Settings) -> EdgeLLM:
    """Load target and draft with EdgeLLM."""
    return EdgeLLM.load(settings.target, draft=settings.draft, **PRECISIONS[settings.precision][0])


def edge_answer(
    llm: EdgeLLM, settings: Settings, ids: list[int], temperature: float, num_draft_tokens: int | str
) -> tuple[float, float, tuple[int, ...]]:
    """Answer once; return tokens/s, block efficiency and the answer."""
    made = llm.generate(
        ids,
        max_new_tokens=settings.tokens,
        temperature=temperature,
        num_draft_tokens=num_draft_tokens,
        seed=0,
        ignore_eos=True,
    )
    return made.metrics.tokens_per_second, made.metrics.block_efficiency, tuple(made.token_ids)


def edge_variants(settings: Settings) -> dict[str, Variant]:
    """Load target and draft with EdgeLLM; return how to answer plainly and with automatic pacing."""
    llm = load_pair(settings)
    return {
        "edge_plain": lambda ids, heat: edge_answer(llm, settings, ids, heat, 0),
        "edge_auto": lambda ids, heat: edge_answer(llm, settings, ids, heat, "auto"),
    }


def peer_variants(settings: Settings) -> dict[str, Variant]:
    """Load the same folders with openvino_genai; return how to answer plainly and with each block size."""
    import openvino_genai

    properties = PRECISIONS[settings.precision][1]
    plain = openvino_genai.LLMPipeline(str(settings.target), "CPU", **properties)
    draft = openvino_genai.draft_model(str(settings.draft), "CPU", **properties)
    drafting = openvino_genai.LLMPipeline(str(settings.target), "CPU", draft_model=draft, **properties)

    def variant(pipeline: Any, **options: int) -> Variant:
        return lambda ids, heat: (peer_tokens_per_second(pipeline, settings, ids, heat, options),)

    blocks = {f"peer_draft_{k}": variant(drafting, num_assistant_tokens=k) for k in BLOCKS}
    return {"peer_plain": variant(plain), **blocks}


def peer_tokens_per_second(
    pipeline: Any, settings: Settings, ids: list[int], temperature: float, options: dict[str, int]
) -> float:
    """Answer once with openvino_genai; return tokens/s after the first token."""
    import openvino_genai

    sampling = {"do_sample": True, "temperature": temperature, "rng_seed": 0} if temperature else {"do_sample": False}
    config = openvino_genai.GenerationConfig(
        max_new_tokens=settings.tokens, ignore_eos=True, apply_chat_template=False, **sampling, **options
    )
    return 1000 / peer_tpot_ms(pipeline, peer_inputs(ids), config)


def speed_round(settings: Settings, is_edge_first: bool) -> list[Answer]:
    """Answer each prompt with each variant, in turn, after one answer of each to warm up."""
    makers = [edge_variants, peer_variants] if is_edge_first else [peer_variants, edge_variants]
    variants = {name: run for make in makers for name, run in make(settings).items()}
    tokenizer = Tokenizer(settings.target)
    prompts = [(prompt.category, prompt.line, tokenizer.encode(prompt.text)) for prompt in settings.prompts]
    answers: list[Answer] = []
    for temperature in settings.temperatures:
        suited = {name: run for name, run in variants.items() if not temperature or "peer_draft" not in name}
        for run in suited.values():
            run(prompts[0][2], temperature)
        for category, prompt, ids in prompts:
            for name, run in suited.items():
                answers.append(Answer(temperature, category, prompt, name, *run(ids, temperature)))
    return answers


def prediction_round(settings: Settings) -> list[dict[str, Any]]:
    """Return the rows of `edge-run bench draft` for each K: what step costs predict, and what came out."""
    rows: list[dict[str, Any]] = []
    for temperature in settings.temperatures:
        asked = DraftSettings(
            num_draft_tokens=BLOCKS, max_new_tokens=settings.tokens, temperature=temperature, drafters=("draft",)
        )
        bench = DraftBench(load_pair(settings), settings.prompts, asked)
        for _ in bench.run():
            pass
        rows += [row for row in bench.rows() if row["num_draft_tokens"] in BLOCKS]
    return rows


def prediction_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return predicted and measured speed-ups of one category, temperature and K, over the rounds."""
    names = {"predicted": "predicted_speedup", "measured": "speedup"}
    figures = {name: [row[column] for row in rows] for name, column in names.items()}
    ratio = [one / other for one, other in zip(*figures.values(), strict=True)]
    figures["predicted / measured"] = ratio
    return {name: statistics.median(values) for name, values in figures.items()}


def in_fresh_processes(settings: Settings, rounds: int) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Run all rounds, each in a process of its own; return their figures."""
    answers: list[Answer] = []
    predictions: list[dict[str, Any]] = []
    for index in range(rounds):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            answers += fresh.submit(speed_round, settings, index % 2 == 0).result()
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            predictions += fresh.submit(prediction_round, settings).result()
    return answers, predictions


def grouped(items: list[Any], name: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Return the items under their names, both in order of appearance."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(name(item), []).append(item)
    return groups


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Return speeds and ratios of the answers of one category and temperature."""
    variants = grouped(answers, lambda answer: answer.variant)
    speeds = {name: [answer.tokens_per_second for answer in made] for name, made in variants.items()}
    best = max((name for name in speeds if "peer" in name), key=lambda name: statistics.median(speeds[name]))
    pairs = list(zip(variants["edge_auto"], variants["edge_plain"], strict=True))
    result = {
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "speedup": paired_ratio(speeds["edge_auto"], speeds["edge_plain"]),
        "peer's best": best,
        "over peer's best": paired_ratio(speeds["edge_auto"], speeds[best]),
        "worst prompt": min(prompt_speedups(pairs)),
        "block_efficiency": spread([auto.block_efficiency for auto, _ in pairs]),
    }
    if answers[0].temperature == 0:  # sampled answers differ: drafting draws other random numbers
        result["equal to plain"] = sum(auto.token_ids == plain.token_ids for auto, plain in pairs) / len(pairs)
    return result


def prompt_speedups(pairs: list[tuple[Answer, Answer]]) -> list[float]:
    """Return each prompt's speedup, the median over its rounds."""
    prompts = grouped(pairs, lambda pair: pair[0].prompt).values()
    return [statistics.median(auto.tokens_per_second / plain.tokens_per_second for auto, plain in p) for p in prompts]


def checks_of(rows: dict[str, dict[str, Any]], predicted: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Return what must hold."""
    checks: dict[str, bool] = {}
    for name, row in rows.items():
        wanted = WANTED.get(name.rsplit(" ", 1)[0])
        if wanted:
            checks[f"{name}: {wanted} times plain"] = row["speedup"].median >= wanted
        if "peer_draft_3" in row["tokens_per_second"]:
            checks[f"{name}: {OVER_PEER} times the peer's best"] = row["over peer's best"].median >= OVER_PEER
        checks[f"{name}: {WORST} times plain on the worst prompt"] = row["worst prompt"] >= WORST
    for name, row in predicted.items():
        within = abs(row["predicted / measured"] - 1) <= PREDICTED_WITHIN
        checks[f"{name}: prediction within {PREDICTED_WITHIN:.0%}"] = within
    return checks


def with_peer_tokenizer(folder: Path, copy: Path) -> Path:
    """Return a folder with the peer's tokenizer files: of the package's own models a copy, they stay as they are."""
    if folder.resolve().parent == demo_target().parent:
        folder = Path(shutil.copytree(folder, copy))
    add_peer_tokenizer(folder)
    return folder


def main() -> int:
    arguments = _arguments()
    if arguments.plot:
        check_plot(arguments.plot, target=arguments.target, draft=arguments.draft, prompts=arguments.prompts)
    settings = Settings(
        arguments.target,
        arguments.draft,
        read_prompts(arguments.prompts),
        arguments.temperature,
        arguments.tokens,
        arguments.precision,
    )
    with tempfile.TemporaryDirectory() as temporary:
        pair = [with_peer_tokenizer(f, Path(temporary) / f.name) for f in (settings.target, settings.draft)]
        settings = settings._replace(target=pair[0], draft=pair[1])
        answers, predictions = in_fresh_processes(settings, arguments.rounds)
    made = grouped(answers, lambda one: f"{one.category} {one.temperature:g}")
    rows = {name: summary(group) for name, group in made.items()}
    made = grouped(predictions, lambda row: "{category} {temperature:g} K={num_draft_tokens}".format(**row))
    predicted = {name: prediction_summary(group) for name, group in made.items()}
    if arguments.plot:
        bars = {f"{n} {v}": s for n, row in rows.items() for v, s in row["tokens_per_second"].items()}
        bar_chart(arguments.plot, "tokens/s", bars)
    result = {
        **rows,
        "prediction": predicted,
        "plain roofline, tokens/s": read_bandwidth() / (arguments.target / "openvino_model.bin").stat().st_size,
        "setting": {"precision": settings.precision, "tokens": settings.tokens, "rounds": arguments.rounds},
        "machine": machine(),
    }
    return report(result, checks_of(rows, predicted), arguments.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="model folder")
    parser.add_argument("--draft", type=Path, required=True, help="model folder of the same vocabulary")
    parser.add_argument("--prompts", type=Path, required=True, help="a JSON object a line: prompt, category")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.6])
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes that answer every prompt")
    parser.add_argument("--precision", default="default", choices=list(PRECISIONS))
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--plot", type=Path, help="picture of tokens/s to write")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
