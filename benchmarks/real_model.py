"""A real model at defaults, beside openvino_genai on the same files: what somebody who installs either gets.

Each engine runs in a process of its own, with no option set, and they are asked in turn: an answer of 64 tokens to a
chat question (ms a token after the first), the first token after a prompt of 1 024 tokens; then fresh processes, from
start to first token. Peak memory is each process's own.

    python benchmarks/real_model.py FOLDER --json --plot speed.png

FOLDER is an export of a chat model, such as `edge-run export SOURCE --weights int8` makes. `roofline_tokens_per_second`
is the bandwidth of a plain read of memory over the bytes of the weights: no engine that reads each weight once a token
can be faster, unless the caches hold a good part of the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import (
    Spread,
    add_peer_tokenizer,
    bar_chart,
    interleave,
    machine,
    paired_ratio,
    peer_inputs,
    peer_tpot_ms,
    report,
    spread,
)
from overhead import EDGE_SCRIPT, PEER_SCRIPT, seconds_to_output

from edge_runtime import strict_json

QUESTION = "What is gravity? Explain in two sentences."
LONG_PROMPT_TOKENS = 1024
NEW_TOKENS = 64
TEXT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
ENGINES = {"edge": "edge-run", "peer": "openvino_genai"}


def edge_engine(folder: str) -> Callable[[list[int], int], dict[str, float]]:
    """Load with EdgeLLM; return a function that answers token ids."""
    from edge_runtime import EdgeLLM

    llm = EdgeLLM.load(folder)

    def answer(ids: list[int], new_tokens: int) -> dict[str, float]:
        metrics = llm.generate(ids, max_new_tokens=new_tokens, ignore_eos=True).metrics
        return {"ttft_s": metrics.ttft_s, "tpot_ms": metrics.tpot_ms}

    return answer


def peer_engine(folder: str) -> Callable[[list[int], int], dict[str, float]]:
    """Load with openvino_genai; return a function that answers token ids."""
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(folder, "CPU")

    def answer(ids: list[int], new_tokens: int) -> dict[str, float]:
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        inputs = peer_inputs(ids)
        if new_tokens > 1:
            return {"tpot_ms": peer_tpot_ms(pipeline, inputs, config)}
        begin = time.perf_counter()
        pipeline.generate(inputs, config)
        return {"ttft_s": time.perf_counter() - begin}

    return answer


def serve(engine: str, folder: str) -> None:
    """Answer requests of one JSON line each on stdin: token ids and how many new ones."""
    from edge_runtime.metrics import peak_rss_bytes

    answer = {"edge": edge_engine, "peer": peer_engine}[engine](folder)
    print("ready", flush=True)
    for line in sys.stdin:
        print(strict_json.dumps({**answer(*json.loads(line)), "peak_bytes": peak_rss_bytes()}), flush=True)


class Served:
    """An engine in a process of its own."""

    def __init__(self, engine: str, folder: Path) -> None:
        command = [sys.executable, __file__, str(folder), "--serve", engine]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def ask(self, ids: list[int], new_tokens: int) -> dict[str, float]:
        """Return what one request took."""
        assert self._process.stdin is not None
        print(strict_json.dumps([ids, new_tokens]), file=self._process.stdin, flush=True)
        answer: dict[str, float] = json.loads(self._read())
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("an engine's process ended early")
        return line


def prompts(folder: Path) -> tuple[list[int], Callable[[], list[int]]]:
    """Return the ids of the question, and a function that gives a long prompt that no cache holds yet."""
    from edge_runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    question = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    begins = iter(range(0, len(ids) - LONG_PROMPT_TOKENS, 7))
    return question, lambda: ids[(begin := next(begins)) : begin + LONG_PROMPT_TOKENS]


def measure(folder: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return every figure round by round, and the engines' peak memory."""
    engines = {name: Served(name, folder) for name in ENGINES}
    question, long_prompt = prompts(folder)
    peak: dict[str, int] = {}

    def ask(engine: str, ids: list[int], new_tokens: int, wanted: str) -> float:
        answer = engines[engine].ask(ids, new_tokens)
        peak[engine] = int(answer["peak_bytes"])
        return answer[wanted]

    variants: dict[str, Callable[[], float]] = {}
    for engine in ENGINES:
        variants[f"{engine}_tpot_ms"] = lambda e=engine: ask(e, question, NEW_TOKENS, "tpot_ms")
        variants[f"{engine}_first_of_1024_s"] = lambda e=engine: ask(e, long_prompt(), 1, "ttft_s")
    figures = interleave(variants, rounds)
    for served in engines.values():
        served.close()
    starts = {"edge_start_s": EDGE_SCRIPT, "peer_start_s": PEER_SCRIPT}
    scripts = {name: script.format(model=str(folder)) for name, script in starts.items()}
    figures |= interleave({name: lambda s=script: seconds_to_output(s) for name, script in scripts.items()}, rounds)
    return figures, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder of a chat model")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--plot", type=Path, help="draw tokens/s of both engines here")
    parser.add_argument("--rounds", type=int, default=11, help="counted rounds of each figure")
    parser.add_argument("--serve", choices=list(ENGINES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, str(arguments.folder))
        return 0
    from edge_runtime.bench.cats import read_bandwidth
    from edge_runtime.manifest import weight_bytes

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        for path in arguments.folder.iterdir():  # the peer wants files of its own beside the model's
            (folder / path.name).symlink_to(path.resolve())
        add_peer_tokenizer(folder)
        figures, peak = measure(folder, arguments.rounds)
    ratios = {
        f"{name}, times as fast as openvino_genai": paired_ratio(figures[f"peer_{name}"], figures[f"edge_{name}"])
        for name in ("tpot_ms", "first_of_1024_s", "start_s")
    }
    result = {
        "machine": machine(),
        "weight_bytes": weight_bytes(arguments.folder),
        "roofline_tokens_per_second": read_bandwidth() / weight_bytes(arguments.folder),
        "figures": {name: spread(values) for name, values in figures.items()},
        "ratios": ratios,
        "peak_bytes": peak,
    }
    if arguments.plot:
        speeds = {e: spread([1000 / ms for ms in figures[f"{e}_tpot_ms"]]) for e in ENGINES}
        bars: dict[str, Spread] = {ENGINES[e]: speed for e, speed in speeds.items()}
        bar_chart(arguments.plot, f"tokens/s, {arguments.folder.name}, both at defaults", bars)
    return report(result, {}, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
