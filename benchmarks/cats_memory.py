"""What fused MLPs cost in memory and at load, beside the stock IR of the same weights.

Each variant is loaded in fresh processes, in turn, after one load of each that fills the system's file cache. Resident
memory is read after one answer, when plugins have packed their weights; anonymous is the part that no file backs, which
the system cannot drop. A plugin packs its weights in the first run, not while it loads, so the time that is compared is
that from the start of loading to the end of an answer of 8 tokens; `load_s` alone includes the trial of both forms.

    python benchmarks/cats_memory.py FOLDER... [--rounds 5] [--json]

The first FOLDER is the one to compare with; benchmarks/cats_speed.py --work-dir makes `stock-int8`, `dense-int8` and
`cats-int8`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from measure import interleave, machine, report, spread

from edge_runtime import strict_json

MIB = 1 << 20
NEW_TOKENS = 8


def load_once(folder: str) -> dict[str, float]:
    """Load a model and answer once, in this process; return seconds and MiB."""
    import psutil

    from edge_runtime import EdgeLLM

    process = psutil.Process()
    before = process.memory_info()
    began = time.perf_counter()
    llm = EdgeLLM.load(folder)
    load_s = time.perf_counter() - began
    answer = llm.generate("Once upon a time", max_new_tokens=NEW_TOKENS, ignore_eos=True)
    first_s = time.perf_counter() - began
    assert answer.token_ids
    after = process.memory_info()
    return {
        "load_s": load_s,
        "first_answer_s": first_s,
        "resident_mib": (after.rss - before.rss) / MIB,
        "anonymous_mib": (after.rss - after.shared - before.rss + before.shared) / MIB,
    }


def in_fresh_process(folder: Path, made: list[dict[str, float]]) -> float:
    """Measure a folder in a process of its own; return its seconds."""
    done = subprocess.run(
        [sys.executable, __file__, "--once", str(folder)], stdout=subprocess.PIPE, check=True, text=True
    )
    made.append(json.loads(done.stdout.splitlines()[-1]))
    return made[-1]["load_s"]


def measure(folders: list[Path], rounds: int) -> list[dict[str, Any]]:
    """Return the median and the spread of each figure of each folder."""
    made: dict[str, list[dict[str, float]]] = {folder.name: [] for folder in folders}
    runs = {folder.name: partial(in_fresh_process, folder, made[folder.name]) for folder in folders}
    interleave(runs, rounds, warmup=1)
    return [
        {"model": name, **{figure: spread([run[figure] for run in runs[1:]]) for figure in runs[0]}}
        for name, runs in made.items()
    ]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    if options.once:
        print(strict_json.dumps(load_once(options.once)))
        return
    rows = measure(options.folders, options.rounds)
    stock = rows[0]
    checks = {
        f"{row['model']}: {figure} no higher than that of {stock['model']}": row[figure].median <= stock[figure].p90
        for row in rows[1:]
        for figure in ("first_answer_s", "resident_mib")
    }
    sys.exit(report({"rows": rows, "machine": machine()}, checks, options.json))


if __name__ == "__main__":
    main()
