"""The alignment data: what the target itself writes, through the runtime, at several temperatures.

A prompt is the beginning of a text, a line of a file, or written by the target too: from its begin-of-text token, or,
with a chat template, the user's turn that the template opens (Magpie, Xu et al. 2024). Each answer has a seed of its
own, so a run that was killed goes on where the file of answers ends and writes what it would have written.

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

import numpy as np
from numpy.typing import NDArray

from edge_export.corpus import Windows
from edge_export.fastdraft.losses import WRITTEN
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from edge_runtime.api import EdgeLLM

TEMPERATURES = (0.6, 0.8, 1.0, 0.0)
"""Answers are spread evenly over these (FastDraft, section 3.3); 0 is greedy."""
OPENING_TOKENS = 8
"""A text that the target writes from nothing begins with so many tokens drawn at temperature 1: greedy ones would all
be the same text."""
SMALL = 100_000_000
"""Parameters up to which several processes write at once, one a core; a larger target keeps all cores busy itself."""
MAX_INSTRUCTION_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How answers are written.

    Attributes:
        model: Model folder of the target.
        device: OpenVINO device it runs on.
        max_new_tokens: Of one answer.
        max_tokens: Of all answers, after which no more are written; None for no bound.
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
    jobs = [Job(*numbered) for numbered in enumerate(prompts)][len(done) :]
    if not jobs or num_tokens >= most:
        return
    with contextlib.closing(_answers(jobs, config)) as answers, out.open("a", encoding="utf-8") as file:
        for count, answer in enumerate(answers, len(done) + 1):
            file.write(json.dumps(answer) + "\n")
            file.flush()
            num_tokens += len(answer["answer_ids"])
            if on_answer:
                on_answer(count, num_tokens)
            if num_tokens >= most:
                return


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


def _answers(jobs: Sequence[Job], config: AnswerConfig) -> Generator[dict[str, Any], None, None]:
    """Yield the answers in the order of the jobs."""
    from edge_runtime.manifest import load_manifest

    size = load_manifest(config.model).num_parameters or SMALL + 1
    workers = config.workers or (os.cpu_count() or 1 if size <= SMALL else 1)
    if workers == 1 or len(jobs) < workers:
        writer = _Writer(config)
        yield from map(writer.write, jobs)
        return
    # spawn: neither OpenVINO nor torch survives a fork, and Windows has nothing else.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (config,)) as pool:
        try:
            yield from pool.map(_write_in_worker, jobs)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: _Writer


def _start_worker(config: AnswerConfig) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker = _Writer(config, num_threads=1)


def _leave_with_parent() -> None:
    """End this process when the one that started it was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _write_in_worker(job: Job) -> dict[str, Any]:
    return _worker.write(job)


class _Writer:
    """A loaded target that answers one prompt after another."""

    def __init__(self, config: AnswerConfig, num_threads: int = 0) -> None:
        from edge_runtime.api import EdgeLLM

        self._config = config
        self._llm: EdgeLLM = EdgeLLM.load(config.model, device=config.device, num_threads=num_threads)

    def write(self, job: Job) -> dict[str, Any]:
        """Return one answer, as its line is to say."""
        config, llm = self._config, self._llm
        temperature = temperature_of(job.number, config.temperatures)
        prompt_ids = self._prompt_ids(job)
        room = llm.engine.target.model.context_length - len(prompt_ids)
        result = llm.generate(
            prompt_ids,
            max_new_tokens=max(1, min(config.max_new_tokens, room)),
            temperature=temperature,
            seed=job.number,
            logprobs=config.top or None,
        )
        ending = list(llm.manifest.eos_token_ids[:1]) if result.finish_reason == "stop" else []
        answer = {
            "index": job.number,
            "temperature": temperature,
            "prompt_ids": prompt_ids,
            "answer_ids": result.token_ids + ending,
        }
        if result.logprobs is not None:
            # The engine keeps the ending's distribution to itself: that it was drawn stands for it, which is unbiased.
            top = [token.top_logprobs or [] for token in result.logprobs]
            answer["top"] = [[[i, round(p, 4)] for i, p in some] for some in top] + [[[i, 0.0]] for i in ending]
        return answer

    def _prompt_ids(self, job: Job) -> list[int]:
        llm, chat = self._llm, self._config.chat
        if job.prompt is None:
            job = job._replace(prompt=self._instruction(job.number) if chat else self._opening(job.number))
        if not isinstance(job.prompt, str):
            ids = list(job.prompt or ())
        elif chat:
            ids = llm.tokenizer.apply_chat_template([{"role": "user", "content": job.prompt}])
        else:
            ids = llm.tokenizer.encode(job.prompt)
        longest = llm.engine.target.model.context_length * 3 // 4
        return ids[-longest:]

    def _opening(self, index: int) -> list[int]:
        """Return the first tokens of a text that the target writes from nothing."""
        manifest = self._llm.manifest
        first = [manifest.bos_token_id] if manifest.bos_token_id is not None else list(manifest.eos_token_ids[:1])
        drawn = self._llm.generate(first, max_new_tokens=OPENING_TOKENS, temperature=1.0, seed=index, ignore_eos=True)
        return first + drawn.token_ids

    def _instruction(self, index: int) -> str:
        """Return a user's turn that the target writes where its template lets the user speak."""
        prefix = user_prefix(self._llm)
        options = {"max_new_tokens": MAX_INSTRUCTION_TOKENS, "temperature": 1.0, "seed": index}
        return self._llm.generate(prefix, **options).text.strip() or "Hello"


def temperature_of(number: int, temperatures: Sequence[float]) -> float:
    """Return the temperature of an answer: 0 1 2 3, then 1 2 3 0 and so on."""
    turn, place = divmod(number, len(temperatures))
    return temperatures[(turn + place) % len(temperatures)]


def user_prefix(llm: EdgeLLM) -> list[int]:
    """Return the tokens of the chat template up to where the user's words begin: what two chats have in common."""
    one, other = (llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in ("What", "hello"))
    return one[: next(i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])]


class Teacher:
    """The target's sparse distributions of the tokens of windows.

    Args:
        top_ids: (N, T, k) token ids.
        probabilities: (N, T, k) of those tokens; 0 where the target wrote nothing.
    """

    def __init__(self, top_ids: NDArray[np.int32], probabilities: NDArray[np.float16]) -> None:
        self.top_ids, self.probabilities = top_ids, probabilities

    def batch(self, index: NDArray[np.int64], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and probabilities of some windows, (B, T, k) each."""
        import torch

        ids = torch.from_numpy(self.top_ids[index].astype(np.int64)).to(device)
        return ids, torch.from_numpy(self.probabilities[index].astype(np.float32)).to(device)


def answer_windows(answers: Path, length: int, end_of_text: int, top: int) -> tuple[Windows, Teacher | None]:
    """Pack prompts and answers into windows, what the target wrote marked; the incomplete rest is left out.

    Args:
        answers: JSON lines of `write_answers`.
        length: T of a window.
        end_of_text: Id that separates an answer from the next prompt, as it does documents; unmarked.
        top: k; 0 for no teacher.

    Raises:
        ConfigError: The answers do not fill one window.
    """
    ids: list[int] = []
    tops: list[list[tuple[int, float]]] = []
    for line in answers.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        ids += [*answer["prompt_ids"], *(token_id | WRITTEN for token_id in answer["answer_ids"]), end_of_text]
        if top:
            tops += [*([[]] * len(answer["prompt_ids"])), *answer["top"], []]
    count = len(ids) // length
    if count == 0:
        raise ConfigError(
            f"the answers have {len(ids)} tokens, a window has {length}", "write more answers, or a shorter --window"
        )
    windows = np.array(ids[: count * length], np.uint32).reshape(count, length)
    first = np.sort(np.unique(windows, axis=0, return_index=True)[1])
    return windows[first], _teacher(tops, count, length, top, first) if top else None


def _teacher(
    tops: list[list[tuple[int, float]]], count: int, length: int, top: int, kept: NDArray[np.int64]
) -> Teacher:
    top_ids = np.zeros((count * length, top), np.int32)
    probabilities = np.zeros((count * length, top), np.float16)
    for row, some in enumerate(tops[: count * length]):
        for column, (token_id, logprob) in enumerate(some[:top]):
            top_ids[row, column], probabilities[row, column] = token_id, np.exp(logprob)
    shape = (count, length, top)
    return Teacher(top_ids.reshape(shape)[kept], probabilities.reshape(shape)[kept])
