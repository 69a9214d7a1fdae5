"""Two processes that each decode a small model on one thread: do they get a core each?

Each process loads the model twice, as edge-run compiles it and with OpenVINO's default pinning, and times forwards of
both in turn; once alone and once beside a second process that does the same.

    python benchmarks/processes.py [--model FOLDER] --json
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from measure import interleave, machine, report

from edge_runtime import EdgeLLM
from edge_runtime.demo import demo_target
from edge_runtime.models.base import advance

CONTEXT, REPEATS = 64, 300
VARIANTS: dict[str, dict[str, bool]] = {"edge-run's": {}, "OpenVINO's default": {"ENABLE_CPU_PINNING": True}}


def token_ms(folder: Path) -> dict[str, float]:
    """Return the median milliseconds of a token, by variant."""
    models = {
        name: EdgeLLM.load(folder, num_threads=1, properties=properties).target for name, properties in VARIANTS.items()
    }
    sequences = {name: model.sequence() for name, model in models.items()}

    def forward_ms(name: str) -> float:
        sequences[name].rollback(CONTEXT)
        begin = time.perf_counter()
        advance(models[name], sequences[name], [0])
        return 1000 * (time.perf_counter() - begin)

    for name, model in models.items():
        advance(model, sequences[name], [0] * CONTEXT)
    timed = interleave({name: lambda name=name: forward_ms(name) for name in models}, REPEATS)
    return {name: statistics.median(values) for name, values in timed.items()}


def together(folder: Path, count: int) -> dict[str, float]:
    """Return the slowest process's milliseconds of a token, by variant, where `count` run at a time."""
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        made = list(pool.map(token_ms, [folder] * count))
    return {name: round(max(times[name] for times in made), 3) for name in VARIANTS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_target(), help="model folder; by default the embedded one")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    figures = {f"{count} at a time": together(arguments.model, count) for count in (1, 2)}
    ours, default = figures["2 at a time"].values()
    checks = {"two processes are faster than with the default": ours < default}
    return report({"ms a token": figures, "machine": machine()}, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
