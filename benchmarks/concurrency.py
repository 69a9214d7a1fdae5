"""Many answers at once: total speed, how long a newcomer waits, and whether all are served alike.

A Llama shape of 1.04 billion random parameters, in int8 and int4 with fused MLPs, writes 1, 2, 4, 8, 16 answers of 64
tokens to prompts of 64, at defaults. openvino_genai's ContinuousBatchingPipeline writes the same answers from the same
weights with stock ops (it cannot load ours), with as many threads and keys and values in u8; both are loaded in one
process and take turns. Then a newcomer: the time to the first token after a prompt of 512 tokens while 8 others write,
over that of the same prompt alone, and Jain's index of fairness of the 8 writers' tokens a second meanwhile,
(sum x)^2 / (n sum x^2), 1 where all are equal.

    python benchmarks/concurrency.py --json --plot concurrency.png
    python benchmarks/concurrency.py --model FUSED --peer-model STOCK

Roofline: the weights are read once for all answers, so n answers take at best the time of one, until their arithmetic
takes longer than that reading; `step_ms` over that of one answer shows where that is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from decode import TARGET, make_source
from measure import add_peer_tokenizer, interleave, machine, paired_ratio, report, spread

NEW_TOKENS, PROMPT_TOKENS, LONG_PROMPT_TOKENS, WRITERS = 64, 64, 512, 8
COUNTS = (1, 2, 4, 8, 16)
WANTED = {2: 1.85, 4: 3.4, 8: 5.5}
"""Least total tokens a second over those of one answer alone."""
WANTED_OVER_PEER, MOST_PREFILLS, LEAST_FAIRNESS = 1.1, 2.0, 0.98
CACHE_GB = 2

Run = Callable[[], float]


def make_folders(folder: Path, weights: str) -> tuple[Path, Path]:
    """Export one random model twice: with fused MLPs for us, in stock ops for the peer."""
    from edge_export.convert import export_model

    source = folder / "source"
    if not source.is_dir():
        make_source(source, TARGET, 0)
    made = folder / f"{weights}-fused", folder / f"{weights}-stock"
    export_model(source, made[0], weights=weights, mlp="fused")
    export_model(source, made[1], weights=weights)
    return made


def prompts(count: int, length: int = PROMPT_TOKENS, seed: int = 0) -> list[list[int]]:
    """Return prompts of random tokens, no two of which begin alike."""
    return np.random.default_rng((seed, length)).integers(10, 10_000, (count, length)).tolist()


def edge_runs(llm: Any, counts: list[int]) -> dict[str, Run]:
    """Return a function for each count that returns the total tokens a second of so many answers."""

    def run(count: int) -> float:
        begin = time.perf_counter()
        results = llm.generate_many(fresh(count), max_new_tokens=NEW_TOKENS, ignore_eos=True)
        return sum(len(result.token_ids) for result in results) / (time.perf_counter() - begin)

    return {f"edge {count}": lambda count=count: run(count) for count in counts}


_seed = 0


def fresh(count: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """Return prompts that nobody has seen."""
    global _seed
    _seed += 1
    return prompts(count, length, _seed)


def peer_runs(pipeline: Any, counts: list[int]) -> dict[str, Run]:
    """Return the same for openvino_genai."""
    import openvino as ov
    import openvino_genai

    config = openvino_genai.GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True, do_sample=False)

    def run(count: int) -> float:
        inputs = [ov.Tensor(np.array([ids], np.int64)) for ids in fresh(count)]
        begin = time.perf_counter()
        results = pipeline.generate(inputs, [config] * count)
        return sum(len(result.m_generation_ids[0]) for result in results) / (time.perf_counter() - begin)

    return {f"peer {count}": lambda count=count: run(count) for count in counts}


def load_peer(folder: Path, num_threads: int) -> Any:
    """Load openvino_genai's pipeline for many requests."""
    import openvino_genai

    add_peer_tokenizer(folder)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    properties = {"KV_CACHE_PRECISION": "u8", "INFERENCE_NUM_THREADS": num_threads}
    return openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)


def newcomer(llm: Any) -> tuple[float, float]:
    """Return a newcomer's seconds to its first token over those alone, and the fairness among 8 writers meanwhile."""
    (alone,), (prompt,) = fresh(1, LONG_PROMPT_TOKENS), fresh(1, LONG_PROMPT_TOKENS)
    alone_s = llm.generate(alone, max_new_tokens=1, ignore_eos=True).metrics.ttft_s
    written = [0] * WRITERS
    have_begun = threading.Barrier(WRITERS + 1)
    is_over = threading.Event()

    def write(number: int, ids: list[int]) -> None:
        with llm.stream(ids, max_new_tokens=1000, ignore_eos=True, num_draft_tokens=0) as stream:
            for index, _ in enumerate(stream):
                if index == 4:
                    have_begun.wait()
                written[number] += 1
                if is_over.is_set():
                    return

    threads = [threading.Thread(target=write, args=pair) for pair in enumerate(fresh(WRITERS))]
    for thread in threads:
        thread.start()
    have_begun.wait()
    before = list(written)
    beside_s = llm.generate(prompt, max_new_tokens=1, ignore_eos=True).metrics.ttft_s
    time.sleep(beside_s)  # as long again, so that a difference of one token weighs little
    shares = np.subtract(written, before)
    is_over.set()
    for thread in threads:
        thread.join()
    return beside_s / alone_s, float(shares.sum() ** 2 / (len(shares) * (shares**2).sum()))


def measure(ours: Path, theirs: Path | None, counts: list[int], rounds: int) -> tuple[dict[str, Any], dict[str, bool]]:
    """Return the figures of one model, and which bounds hold."""
    from edge_runtime import EdgeLLM

    with EdgeLLM.load(ours) as llm:
        peer = theirs and load_peer(theirs, llm.report()["target"]["inference_num_threads"])
        runs = edge_runs(llm, counts) | (peer_runs(peer, counts) if peer else {})
        speeds = interleave(runs, rounds, warmup=1)
        waits, fairness = zip(*[newcomer(llm) for _ in range(rounds)], strict=True)
        report_of_ours = llm.report()
    del peer
    scaling = {n: paired_ratio(speeds[f"edge {n}"], speeds["edge 1"]) for n in counts if n > 1}
    over_peer = {n: paired_ratio(speeds[f"edge {n}"], speeds[f"peer {n}"]) for n in counts} if theirs else {}
    figures = {
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "step_ms": {n: round(1000 * n / spread(speeds[f"edge {n}"]).median, 2) for n in counts},
        "over_one_alone": scaling,
        "over_peer": over_peer,
        "newcomer_over_alone": spread(list(waits)),
        "fairness": spread(list(fairness)),
        "report": report_of_ours,
    }
    checks = {
        f"{n} answers have {WANTED[n]} times the speed of one": scaling[n].median >= WANTED[n]
        for n in WANTED
        if n in scaling
    }
    checks |= {
        f"{n} answers have {WANTED_OVER_PEER} times the peer's speed": r.median >= WANTED_OVER_PEER
        for n, r in over_peer.items()
    }
    checks[f"a newcomer waits for at most {MOST_PREFILLS} prefills"] = (
        figures["newcomer_over_alone"].median <= MOST_PREFILLS
    )
    checks[f"fairness is at least {LEAST_FAIRNESS}"] = figures["fairness"].median >= LEAST_FAIRNESS
    return figures, checks


def plot(path: Path, models: dict[str, dict[str, Any]]) -> None:
    """Draw total tokens a second over the number of answers, for each model and engine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(models), 3.6), layout="constrained")
    for axes, (name, figures) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        for engine, label, colour in (("edge", "edge-run", "#4477aa"), ("peer", "openvino_genai", "#aaaaaa")):
            points = [
                (int(key.split()[1]), value) for key, value in figures["tokens_per_second"].items() if engine in key
            ]
            if points:
                counts, speeds = zip(*points, strict=True)
                medians = [speed.median for speed in speeds]
                axes.plot(counts, medians, "o-", label=label, color=colour)
                axes.fill_between(counts, [s.p10 for s in speeds], [s.p90 for s in speeds], alpha=0.2, color=colour)
        axes.set(title=name, xlabel="answers at once", ylabel="tokens a second, all together", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures as a PNG file")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each number of answers")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="numbers of answers, with commas")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="measure this model folder only")
    parser.add_argument("--peer-model", type=Path, metavar="FOLDER", help="the same model in stock ops for the peer")
    arguments = parser.parse_args()
    counts = sorted({1, *map(int, arguments.counts.split(","))})
    models: dict[str, dict[str, Any]] = {}
    checks: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        for weights in ["model"] if arguments.model else ["int8", "int4"]:
            made = (arguments.model, arguments.peer_model) if arguments.model else make_folders(Path(folder), weights)
            print(f"measuring {weights}", file=sys.stderr)
            models[weights], held = measure(*made, counts, arguments.rounds)
            checks |= {f"{weights}: {name}": value for name, value in held.items()}
    if arguments.plot:
        plot(arguments.plot, models)
    return report({"models": models, "machine": machine()}, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
