"""The alignment data: what the target itself writes, through the runtime, at several temperatures.

A prompt is the beginning of a text, a line of a file, or written by the target too: from its begin-of-text token, or,
with a chat template, the user's turn that the template opens (Magpie, Xu et al. 2024).

Answers are written BATCH at a time. Each has a seed of its own and always the same neighbours, so a run that was killed
goes on where the file of answers ends and writes what it would have written.

With a distillation loss the target's most likely tokens are kept for every token it wrote.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_runtime import strict_json

if TYPE_CHECKING:
    from edge_runtime.api import EdgeLLM
    from edge_runtime.text.stream import GenerationResult

TEMPERATURES = (0.6, 0.8, 1.0, 0.0)
"""Answers are spread evenly over these (FastDraft, section 3.3); 0 is greedy."""
OPENING_TOKENS = 8
"""A text that the target writes from nothing begins with so many tokens drawn at temperature 1: greedy ones would all
be the same text."""
BATCH = 16
"""Answers of one batch, stepped together as far as memory allows. With a target of 9 M parameters, two processes and 16
likely tokens kept of each: 2 600 tokens/s, one answer at a time 900 (2 cores, AVX2)."""
SMALL = 100_000_000
"""Parameters up to which several processes write at once, one a core; a larger target keeps all cores busy itself."""
MAX_INSTRUCTION_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How answers are written.

    Attributes:
        model: Model folder of the target.
        device: OpenVINO device it runs on.
        max_new_tokens: Longest answer, in tokens.
        max_tokens: Tokens of all answers after which no more are written; None for no bound.
        temperatures: Used in turn, begun one later each time, so that prompts whose kinds take turns get all of them.
        chat: Put prompts into the target's chat template.
        top: Most likely tokens kept for each token; 0 for none.
        workers: Processes; None for one a core for a small target.
    """

    model: Path
    device: str = "CPU"
    max_new_tokens: int = 256
    max_tokens: float | None = None
    temperatures: tuple[float, ...] = TEMPERATURES
    chat: bool = False
    top: int = 0
    workers: int | None = None


class Job(NamedTuple):
    """One answer to write: its number, and a prompt as text, as token ids, or None for the target's own."""

    number: int
    prompt: str | list[int] | None


Batch = Sequence[Job]


def write_answers(
    prompts: Sequence[str | list[int] | None],
    config: AnswerConfig,
    out: Path,
    on_answer: Callable[[int, int], None] | None = None,
) -> None:
    """Append an answer to every prompt to the JSON lines `out`; those that it has already are kept.

    Args:
        prompts: Texts, token ids, or None for a prompt that the target writes.
        config: How.
        out: The file; each line has index, temperature, prompt_ids, answer_ids and, if kept, top.
        on_answer: Called with the number of answers done and of their tokens.
    """
    done = _repair(out)
    num_tokens, most = sum(done), config.max_tokens or float("inf")
    jobs = [Job(*numbered) for numbered in enumerate(prompts)]
    if len(done) == len(jobs) or num_tokens >= most:
        return
    batches = _parts(jobs, BATCH)[len(done) // BATCH :]
    with contextlib.closing(_answers(batches, config)) as answers, out.open("a", encoding="utf-8") as file:
        for answer in answers:
            if answer["index"] < len(done):
                continue
            file.write(strict_json.dumps(answer) + "\n")
            file.flush()
            num_tokens += len(answer["answer_ids"])
            if on_answer:
                on_answer(answer["index"] + 1, num_tokens)
            if num_tokens >= most:
                return


def _parts(items: Sequence[Any], size: int) -> list[Any]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def _repair(out: Path) -> list[int]:
    """Cut off an incomplete last line; return how many tokens each answer has that is there, in order."""
    if not out.is_file():
        return []
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return [len(json.loads(line)["answer_ids"]) for line in whole.splitlines()]


def _answers(batches: Sequence[Batch], config: AnswerConfig) -> Generator[dict[str, Any], None, None]:
    """Yield the answers in the order of the jobs."""
    from edge_runtime.manifest import load_manifest

    size = load_manifest(config.model).num_parameters or SMALL + 1
    workers = config.workers or (os.cpu_count() or 1 if size <= SMALL else 1)
    if workers == 1 or len(batches) < workers:
        writer = _Writer(config)
        for batch in batches:
            yield from writer.write(batch)
        return
    # spawn: neither OpenVINO nor torch survives a fork, and Windows has nothing else.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (config,)) as pool:
        try:
            for answers in pool.map(_write_in_worker, batches):
                yield from answers
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_config: AnswerConfig
_worker: _Writer | None = None


def _start_worker(config: AnswerConfig) -> None:
    global _config
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _config = config


def _leave_with_parent() -> None:
    """End this process when the one that started it was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _write_in_worker(batch: Batch) -> list[dict[str, Any]]:
    global _worker
    _worker = _worker or _Writer(_config, num_threads=1)  # what goes wrong here reaches the first process as it is
    return _worker.write(batch)


class _Writer:
    """A loaded target that answers one batch of prompts after another."""

    def __init__(self, config: AnswerConfig, num_threads: int = 0) -> None:
        from edge_runtime.api import EdgeLLM

        self._config = config
        # Nothing is kept of earlier batches: they are others where a run goes on, and rounding would differ.
        self._llm = EdgeLLM.load(config.model, device=config.device, num_threads=num_threads, prefix_cache_bytes=0)

    def write(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the answers as lines of the file."""
        config, prompts = self._config, self._prompts(batch)
        heats = [temperature_of(job.number, config.temperatures) for job in batch]
        made = self._continue(prompts, batch, heats, max_new_tokens=config.max_new_tokens, logprobs=config.top or None)
        return [
            {"index": job.number, "temperature": heat, "prompt_ids": ids, **_written(answer)}
            for job, heat, ids, answer in zip(batch, heats, prompts, made, strict=True)
        ]

    def _continue(
        self, prompts: Sequence[list[int]], batch: Batch, temperatures: Sequence[float], **options: Any
    ) -> list[GenerationResult]:
        from edge_runtime.config import GenerationConfig

        configs = [
            GenerationConfig(temperature=temperature, seed=job.number)
            for job, temperature in zip(batch, temperatures, strict=True)
        ]
        return self._llm.generate_many(prompts, configs, **options)

    def _prompts(self, batch: Batch) -> list[list[int]]:
        """Return the prompts' token ids; those that are left to the target are written first."""
        own = [job for job in batch if job.prompt is None]
        written = zip(own, self._own_prompts(own), strict=True) if own else ()
        by_number = {job.number: prompt for job, prompt in written}
        longest = self._llm.context_length * 3 // 4
        return [self._ids(by_number.get(job.number, job.prompt))[-longest:] for job in batch]

    def _ids(self, prompt: str | list[int] | None) -> list[int]:
        tokenizer = self._llm.tokenizer
        if not isinstance(prompt, str):
            return list(prompt or ())
        if self._config.chat:
            return tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        return tokenizer.encode(prompt)

    def _own_prompts(self, batch: Batch) -> Sequence[str | list[int]]:
        """Return texts begun from nothing or, with a chat template, what stands where it lets the user speak."""
        heats = [1.0] * len(batch)
        if self._config.chat:
            opened = [user_prefix(self._llm)] * len(batch)
            made = self._continue(opened, batch, heats, max_new_tokens=MAX_INSTRUCTION_TOKENS)
            return [answer.text.strip() or "Hello" for answer in made]
        manifest = self._llm.manifest
        first = [manifest.bos_token_id] if manifest.bos_token_id is not None else list(manifest.eos_token_ids[:1])
        made = self._continue([first] * len(batch), batch, heats, max_new_tokens=OPENING_TOKENS, ignore_eos=True)
        return [first + answer.token_ids for answer in made]


def _written(answer: GenerationResult) -> dict[str, Any]:
    """Return what a line says of an answer; a stop token is one of its tokens, for the draft to learn where to end."""
    end = [answer.stop_token] if answer.stop_token else []
    line: dict[str, Any] = {"answer_ids": [*answer.token_ids, *(token.token_id for token in end)]}
    if answer.logprobs is not None:
        tops = [token.top_logprobs or [] for token in (*answer.logprobs, *end)]
        line["top"] = [[[token_id, round(logprob, 4)] for token_id, logprob in top] for top in tops]
    return line


def temperature_of(number: int, temperatures: Sequence[float]) -> float:
    """Return the temperature of an answer: 0 1 2 3, then 1 2 3 0 and so on."""
    turn, place = divmod(number, len(temperatures))
    return temperatures[(turn + place) % len(temperatures)]


def user_prefix(llm: EdgeLLM) -> list[int]:
    """Return the tokens of the chat template up to where the user's words begin: what two chats have in common."""
    one, other = (llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in ("What", "hello"))
    return one[: next(i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])]
