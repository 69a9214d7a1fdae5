"""Framework cost: what a token costs beside the model's own arithmetic, side by side with openvino_genai.

A model so small that its arithmetic hardly counts (2 layers, hidden size 64, random weights) makes the framework
visible. Measured: µs per emitted token, prompt included, of openvino_genai.LLMPipeline and of EdgeLLM, plain, with a
useless draft (random weights, up to 8 tokens a block) and with openvino_genai's own speculation over that draft; then
process start to first token, and the time to import, in fresh processes.

    python benchmarks/overhead.py --json

Roofline: none is claimed; the model's own forward is the floor of both frameworks and is printed as `forward_us`.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import add_peer_tokenizer, interleave, machine, paired_ratio, peer_inputs, report, spread

PROMPT_IDS = [10, 50, 60, 40, 70, 80, 90, 100]
NEW_TOKENS = 256

EDGE_SCRIPT = """
from edge_runtime import EdgeLLM
llm = EdgeLLM.load({model!r})
print(next(iter(llm.stream("Once upon a time", max_new_tokens=1, ignore_eos=True))).text, flush=True)
"""
PEER_SCRIPT = """
import openvino_genai
pipeline = openvino_genai.LLMPipeline({model!r}, "CPU")
print(pipeline.generate("Once upon a time", max_new_tokens=1, ignore_eos=True, do_sample=False), flush=True)
"""


def make_models(folder: Path) -> tuple[Path, Path]:
    """Export a tiny random target and a draft with other random weights."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny_models import make_hf_model

    from edge_export.convert import export_model

    made = []
    for name, seed in (("target", 0), ("draft", 1)):
        source = make_hf_model("llama", folder / f"{name}-source", seed=seed)
        export_model(source, folder / name, weights="fp32")
        add_peer_tokenizer(folder / name)
        made.append(folder / name)
    return made[0], made[1]


def peer_variant(pipeline: Any, **options: Any) -> Any:
    """Return a function that times one openvino_genai request, in µs per emitted token."""
    import openvino_genai

    config = openvino_genai.GenerationConfig(
        max_new_tokens=NEW_TOKENS, ignore_eos=True, do_sample=False, apply_chat_template=False, **options
    )
    inputs = peer_inputs(PROMPT_IDS)

    def run() -> float:
        begin = time.perf_counter()
        result = pipeline.generate(inputs, config)
        return 1e6 * (time.perf_counter() - begin) / len(result.tokens[0])

    return run


def edge_variant(llm: Any, **options: Any) -> Any:
    """Return a function that times one EdgeLLM request, in µs per emitted token."""

    def run() -> float:
        begin = time.perf_counter()
        result = llm.generate(PROMPT_IDS, max_new_tokens=NEW_TOKENS, ignore_eos=True, **options)
        return 1e6 * (time.perf_counter() - begin) / len(result.token_ids)

    return run


def token_cost(target: Path, draft: Path, rounds: int) -> dict[str, list[float]]:
    """Return µs per token of every variant, round by round."""
    import openvino_genai

    from edge_runtime import EdgeLLM
    from edge_runtime.models.base import advance, catch_up

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    llm = EdgeLLM.load(target, draft=draft, precision="f32")
    plain_peer = openvino_genai.LLMPipeline(str(target), "CPU", **exact)
    drafting_peer = openvino_genai.LLMPipeline(
        str(target), "CPU", draft_model=openvino_genai.draft_model(str(draft), "CPU", **exact), **exact
    )

    def forward() -> float:
        with contextlib.closing(llm.target.sequence()) as sequence:
            catch_up(llm.target, sequence, PROMPT_IDS)
            begin = time.perf_counter()
            for _ in range(NEW_TOKENS):
                advance(llm.target, sequence, [5])
            return 1e6 * (time.perf_counter() - begin) / NEW_TOKENS

    return interleave(
        {
            "forward_us": forward,
            "edge_plain_us": edge_variant(llm, num_draft_tokens=0),
            "peer_plain_us": peer_variant(plain_peer),
            "edge_useless_draft_us": edge_variant(llm, max_draft_tokens=8),
            "peer_useless_draft_us": peer_variant(drafting_peer, num_assistant_tokens=8),
        },
        rounds,
    )


def seconds_to_output(script: str) -> float:
    """Return seconds from starting a Python process to its first output."""
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - begin
    if process.returncode or not line:
        raise SystemExit(f"the process ended with {process.returncode}")
    return seconds


def start_cost(target: Path, rounds: int) -> dict[str, list[float]]:
    """Return seconds of process starts: to the first token, and for imports."""
    scripts = {
        "edge_first_token_s": EDGE_SCRIPT.format(model=str(target)),
        "peer_first_token_s": PEER_SCRIPT.format(model=str(target)),
        "import_edge_runtime_s": "import edge_runtime; print(1)",
        "import_edge_llm_s": "from edge_runtime import EdgeLLM; print(1)",
        "import_openvino_s": "import openvino; print(1)",
    }
    return interleave({name: lambda s=script: seconds_to_output(s) for name, script in scripts.items()}, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=21, help="counted rounds of each variant")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target, draft = make_models(Path(folder))
        figures = token_cost(target, draft, arguments.rounds) | start_cost(target, arguments.rounds)
    ratios = {
        "plain / peer plain": paired_ratio(figures["edge_plain_us"], figures["peer_plain_us"]),
        "useless draft / own plain": paired_ratio(figures["edge_useless_draft_us"], figures["edge_plain_us"]),
        "peer's useless draft / its plain": paired_ratio(figures["peer_useless_draft_us"], figures["peer_plain_us"]),
        "first token / peer": paired_ratio(figures["edge_first_token_s"], figures["peer_first_token_s"]),
        "import edge_runtime / openvino": paired_ratio(figures["import_edge_runtime_s"], figures["import_openvino_s"]),
        "import EdgeLLM / openvino": paired_ratio(figures["import_edge_llm_s"], figures["import_openvino_s"]),
    }
    bounds = {
        "plain / peer plain": 0.8,
        "useless draft / own plain": 1.1,
        "first token / peer": 0.7,
        "import edge_runtime / openvino": 1.3,
        "import EdgeLLM / openvino": 1.3,
    }
    checks = {f"{name} is at most {bound}": ratios[name].median <= bound for name, bound in bounds.items()}
    result = {"figures": {n: spread(v) for n, v in figures.items()}, "ratios": ratios, "machine": machine()}
    return report(result, checks, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
