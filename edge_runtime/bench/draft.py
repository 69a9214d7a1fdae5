"""Measure what drafting brings: a draft model, prompt lookup and a draft that knows nothing, beside plain decoding.

Every prompt is answered by every variant in turn, so that a disturbance of the machine hits all of them; a speed-up is
the median over prompts of the plain answer's time per token divided by the variant's, its interval a bootstrap over
prompts. Times are of decoding alone: both models hold the prompt before an answer begins. Counts are summed over the
prompts of a category, and defined in `metrics.py`. The first prompt is answered once more before, uncounted.

Perplexity does not tell which draft is better, acceptance does (FastDraft, Zafrir et al. 2024, arXiv 2411.11055).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from edge_runtime.api import EdgeLLM
from edge_runtime.bench.prompts import Prompt
from edge_runtime.bench.rows import acceptance, num_decoded, num_equal, rounded, speedup
from edge_runtime.bench.settings import DraftSettings
from edge_runtime.bench.steps import REPEATS, FixedText, Step, median_step, predicted_speedup, run_step, step_counts
from edge_runtime.bench.variants import Variant, make_variants
from edge_runtime.decoding.request import check_prompt
from edge_runtime.decoding.sampling import Sampler
from edge_runtime.errors import ConfigError, ContextOverflowError
from edge_runtime.manifest import load_manifest, weight_bytes
from edge_runtime.metrics import Metrics, mbsu
from edge_runtime.models.base import catch_up
from edge_runtime.text.stream import GenerationResult


class DraftBench:
    """Measures a loaded target and draft over prompts.

    Args:
        llm: The target with its draft; without one only the baselines are measured.
        prompts: At least one.
        settings: What is measured.
        relative_size: c, the draft's size divided by the target's.

    Raises:
        ConfigError: A prompt cannot be encoded, or the model has no chat template.
        ContextOverflowError: A prompt does not fit the context.
    """

    def __init__(
        self, llm: EdgeLLM, prompts: list[Prompt], settings: DraftSettings, relative_size: float = 0.0
    ) -> None:
        self._prompts, self._settings, self._relative_size = prompts, settings, relative_size
        self._llm = llm
        self._ids = [_encode(llm, prompt, settings.is_chat) for prompt in prompts]
        self._variants = [
            variant
            for variant in make_variants(llm, settings.num_draft_tokens)
            if variant.drafter in ("plain", *settings.drafters)
        ]
        self._answers: dict[str, list[list[GenerationResult]]] = defaultdict(list)  # by category, prompt, variant
        self._steps: dict[tuple[str, str, int], list[Step]] = defaultdict(list)  # by category, drafter, tokens

    @property
    def num_answers(self) -> int:
        """How many answers `run` takes."""
        return (1 + len(self._prompts)) * len(self._variants)

    def run(self) -> Iterator[None]:
        """Measure, yielding after each answer; what was measured of whole prompts stays if it is left early."""
        yield from self._answer_all(self._prompts[0], self._ids[0], [])
        for prompt, ids in zip(self._prompts, self._ids, strict=True):
            answers: list[GenerationResult] = []
            yield from self._answer_all(prompt, ids, answers)
            self._measure_steps(prompt, ids, answers)
            self._answers[prompt.category].append(answers)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each category and variant."""
        return [
            self._row(category, index, variant)
            for category in self._answers
            for index, variant in enumerate(self._variants)
        ]

    def steps(self) -> list[dict[str, Any]]:
        """Return the measured seconds of decoding steps by category, drafter and drafted tokens."""
        return [
            {"category": category, "drafter": drafter, "num_draft_tokens": length, **median_step(steps)._asdict()}
            for (category, drafter, length), steps in sorted(self._steps.items())
        ]

    def _answer_all(self, prompt: Prompt, ids: list[int], answers: list[GenerationResult]) -> Iterator[None]:
        for variant in self._variants:
            self._hold(ids)
            config = self._settings.request(
                num_draft_tokens=variant.num_draft_tokens, lookup=variant.drafter == "lookup", seed=prompt.line
            )
            answers.append(variant.llm.generate(ids, **vars(config)))
            yield

    def _hold(self, ids: list[int]) -> None:
        """Let both models read the prompt, whichever variant comes first; what they read is kept for the next."""
        self._llm.generate(ids, max_new_tokens=3, ignore_eos=True, num_draft_tokens=1 if self._llm.drafter else 0)

    def _measure_steps(self, prompt: Prompt, ids: list[int], answers: list[GenerationResult]) -> None:
        """Measure the kinds of steps that this prompt's answers took, in the middle of the plain answer."""
        plain = answers[0].token_ids
        context = ids + plain[: len(plain) // 2]
        kinds = {
            (variant.drafter, length): variant.source
            for variant, answer in zip(self._variants, answers, strict=True)
            for length in step_counts([answer.metrics])
            if (length or not variant.source) and len(context) + length <= self._llm.context_length
        }
        target, text = self._llm.target, FixedText(context)
        with contextlib.closing(target.sequence(context)) as sequence:
            catch_up(target, sequence, context)
            for (drafter, length), source in kinds.items():
                sampler = Sampler(self._settings.request(), context, Random(0))
                with contextlib.closing(source.open(text)) if source else contextlib.nullcontext() as draft:
                    steps = [run_step(target, sequence, draft, context, length, sampler) for _ in range(1 + REPEATS)]
                self._steps[prompt.category, drafter, length] += steps[1:]

    def _row(self, category: str, index: int, variant: Variant) -> dict[str, Any]:
        answers = [of_prompt[index] for of_prompt in self._answers[category]]
        plain = [of_prompt[0] for of_prompt in self._answers[category]]
        requests = [answer.metrics for answer in answers]
        return {
            "category": category,
            "drafter": variant.drafter,
            "num_draft_tokens": variant.num_draft_tokens,
            "temperature": self._settings.temperature,
            **acceptance(requests),
            **self._efficiency(category, variant, requests),
            **speedup([answer.metrics for answer in plain], requests),
            "equal_to_plain": None if self._settings.temperature else num_equal(answers, plain),
            "prompts": len(answers),
            "new_tokens": sum(metrics.new_tokens for metrics in requests),
        }

    def _efficiency(self, category: str, variant: Variant, requests: list[Metrics]) -> dict[str, Any]:
        forwards = sum(metrics.target_forwards for metrics in requests)
        num_tokens = num_decoded(requests)
        if not forwards:
            return {"block_efficiency": None, "mbsu": None, "predicted_speedup": None}
        efficiency = num_tokens / forwards
        mean_drafted = sum(metrics.proposed_tokens for metrics in requests) / forwards
        drafted = mean_drafted if variant.num_draft_tokens == "auto" else variant.num_draft_tokens
        size = self._relative_size if variant.drafter == "draft" else 0.0
        predicted = predicted_speedup(num_tokens, step_counts(requests), self._costs(category, variant.drafter))
        return {
            "block_efficiency": rounded(efficiency),
            "mbsu": rounded(mbsu(efficiency, drafted, size)),
            "predicted_speedup": rounded(predicted),
        }

    def _costs(self, category: str, drafter: str) -> dict[int, float]:
        """Return the seconds of a step by drafted tokens; one with none is a plain one."""
        return {
            length: sum(median_step(steps))
            for (of_category, of_drafter, length), steps in self._steps.items()
            if of_category == category and of_drafter in ("plain", drafter)
        }


def relative_size(target: Path, draft: Path) -> float:
    """Return c: the draft's parameters divided by the target's, or their files' bytes where those are unknown."""
    parameters = [load_manifest(folder).num_parameters for folder in (target, draft)]
    if parameters[0] and parameters[1]:
        return parameters[1] / parameters[0]
    return weight_bytes(draft) / weight_bytes(target)


def _encode(llm: EdgeLLM, prompt: Prompt, is_chat: bool) -> list[int]:
    tokenizer = llm.tokenizer
    try:
        if is_chat:
            ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}])
        else:
            ids = tokenizer.encode(prompt.text)
        check_prompt(ids, llm.context_length, llm.manifest.context_length)
    except (ConfigError, ContextOverflowError) as error:
        raise type(error)(f"prompt of line {prompt.line}: {error}", error.hint) from error
    return ids
