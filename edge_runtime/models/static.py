"""A decoder on an Intel NPU: OpenVINO's NPUW compiles the stateful model into two graphs of static shape.

One reads a prompt, in chunks; the other takes a step of up to `npu_step_tokens` tokens and
returns logits for all of them. A step costs the same however few tokens it holds. Where a call goes is NPUW's decision:
more than one token at position 0 is a prompt and begins anew, everything else is a step. So a prompt that shares its
beginning with what is held is continued in steps, or read again from the start where that was measured to cost less.

A long prompt is given a chunk at a time, so that it can be cancelled between two. NPUW goes on with a prompt where it
was asked to keep whole chunks of it ("continuous prefill"), but keeps nothing of one that no step has followed
(2026.4.1): hence one step on the next tokens, which the chunk then computes again.

Rolling back is passing a smaller position. Two things that NPUW takes without a word and answers wrongly (logits that
differ by 8 where rounding differs by 0.05; OpenVINO 2026.4.1) are avoided here:

- A step only writes as much of the attention mask as it is given. After a long rollback what lies behind stays visible,
  so every step gives the whole mask.
- The first step after a prompt copies the prompt's last keys and values, even where fewer are to be kept: a rollback
  into a prompt that no step has followed begins anew.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from edge_runtime.devices import device_label
from edge_runtime.errors import ContextOverflowError, DeviceError
from edge_runtime.models.base import Output, Rows, Sequence, Span, num_common
from edge_runtime.models.plan import CompilePlan


class StaticSequence:
    """Tokens of which the device has the keys and values; implements `base.Sequence`.

    Args:
        model: Whose device.
    """

    def __init__(self, model: StaticModel) -> None:
        self._model = model

    @property
    def token_ids(self) -> list[int]:
        """Ids of the tokens held: none any more once another sequence has taken the place."""
        return self._model.held_by(self)

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return len(self.token_ids)

    def rollback(self, num_tokens: int) -> int:
        """Keep the first `num_tokens` tokens and forget the rest; return how many are kept.

        After NaN none are: a step reads all of the context, where 0 times NaN is NaN behind the mask too.
        """
        if num_tokens < self.num_tokens:
            del self.token_ids[0 if self._model.has_nan else num_tokens :]
        return self.num_tokens

    def reserve(self, num_tokens: int) -> None:
        """Do nothing: the memory was taken when the model was compiled."""

    def discard(self) -> None:
        """Hold nothing any more, nor let the device keep anything: it may be NaN."""
        self.rollback(0)
        self.close()

    def close(self) -> None:
        """Hold nothing any more; a new sequence that begins alike finds what the device still has."""
        self._model.release(self)


class StaticModel:
    """One compiled decoder with keys and values of static size for one sequence; implements `base.CausalModel`.

    A sequence that another has taken the place of holds nothing; it takes the place back when it is continued.

    Args:
        compiled: A model that `loading.load_model` has compiled.
        plan: How it was compiled.
        token_kv_bytes: Bytes that one token adds to the keys and values.
        mlp: What runs its fused MLPs and why; None where it has none.

    Attributes:
        has_nan: Whether keys and values on the device may be NaN.
    """

    max_sequences = 1

    def __init__(self, compiled: ov.CompiledModel, plan: CompilePlan, token_kv_bytes: int, mlp: str | None) -> None:
        self._compiled, self._plan, self._mlp = compiled, plan, mlp
        self.device, self.context_length = device_label(plan.device), plan.context_length
        self.token_kv_bytes = token_kv_bytes
        self.vocab_size = int(compiled.output("logits").get_partial_shape()[2].get_length())
        self._step_tokens, self._chunk_tokens = plan.step_tokens, plan.chunk_size
        self._step_s = self._chunk_s = 0.0
        self._owner: Sequence | None = None
        self._held: list[int] = []
        self._open_request()
        self.chunk_size = self._chunk_tokens if self._kept else self.context_length

    def sequence(self, token_ids: list[int] | None = None) -> StaticSequence:
        """Return a new sequence, which takes the place of the one before and what the device has of `token_ids`."""
        ids = token_ids or []
        count = 0 if self.has_nan else min(num_common(self._held, ids), max(0, len(ids) - 1))
        made = StaticSequence(self)
        self._owner, self._held = made, self._held[:count]
        return made

    def forward(self, spans: list[Span]) -> list[Output]:
        """Append tokens to a sequence; return its output.

        Where the device fails, the sequence holds nothing any more, since what it held may be overwritten.

        Raises:
            ContextOverflowError: The context does not hold them.
        """
        ((sequence, token_ids, num_rows),) = spans
        end = sequence.num_tokens + len(token_ids)
        if end > self.context_length:
            raise ContextOverflowError(
                f"{end} tokens do not fit the NPU's context of {self.context_length}",
                "shorten the prompt, or load the model with a larger `context_length`",
            )
        if sequence is not self._owner:
            self._owner, self._held = sequence, []
        begin = len(self._held)
        self._held += token_ids
        try:
            return [Output(self._compute(begin, end, num_rows))]
        except BaseException:
            self._held.clear()
            self._is_lost = True
            raise

    def held_by(self, sequence: Sequence) -> list[int]:
        """Return the ids that the device holds of a sequence, to be cut and not to be extended."""
        return self._held if sequence is self._owner else []

    def release(self, sequence: Sequence) -> None:
        """Take what the device holds from a sequence, for the next one."""
        if sequence is self._owner:
            self._owner = None

    def save(self, path: Path, token_ids: list[int]) -> None:
        """Refuse: the device gives its keys and values to nobody."""
        raise DeviceError(f"keys and values on {self.device} cannot be saved", "run the model on CPU")

    def load(self, path: Path) -> int:
        """Refuse: the device takes keys and values from nobody."""
        raise DeviceError(f"keys and values on {self.device} cannot be loaded", "run the model on CPU")

    def close(self) -> None:
        """Give the memory back; the model is not used any more."""
        self._owner, self._held = None, []
        for name in ("_request", "_kept", "_compiled"):
            vars(self).pop(name, None)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of a full context."""
        return self.context_length * self.token_kv_bytes

    def report(self) -> dict[str, Any]:
        """Return how the model really runs: arithmetic and why, partitioning, fused MLPs, added properties."""
        added = self._plan.added_properties
        return {
            "device": self.device,
            "inference_precision_hint": "f16",
            "kv_cache_precision": "f16",
            "reason": self._plan.reason,
            "npuw_online_pipeline": str(self._compiled.get_property("NPUW_ONLINE_PIPELINE")),
            "kv_bytes": self.kv_bytes,
            **({"mlp": self._mlp} if self._mlp else {}),
            **({"properties": added} if added else {}),
        }

    def _compute(self, begin: int, end: int, num_rows: int) -> Rows:
        """Compute the tokens held from `begin` on, or all of them if that costs less; return the last `num_rows`."""
        parts = []
        prompt_end = end - (num_rows - 1)
        if self._can_read_on(begin, prompt_end):
            parts, begin = [self._read_on(begin, prompt_end).copy()], prompt_end
        elif self._begins_anew(begin, end, num_rows):
            begin = 0
        if begin == 0 and (self.has_nan or self._is_lost):
            self._open_request()
        parts += [self._infer(*span).copy() for span in self._spans(begin, end, num_rows)]
        return np.concatenate(parts)[-num_rows:]

    def _begins_anew(self, begin: int, end: int, num_rows: int) -> bool:
        """Whether to compute all `end` tokens again rather than those from `begin` on."""
        if begin < self._unstepped:
            return True
        num_steps = _calls(end - begin, self._step_tokens)
        saved_steps = num_steps - _calls(num_rows - 1, self._step_tokens)
        return num_steps > 1 and _calls(end, self._chunk_tokens) * self._chunk_s < saved_steps * self._step_s

    def _spans(self, begin: int, end: int, num_rows: int) -> Iterator[tuple[int, int]]:
        """Cut tokens `begin` to `end` into calls; those that together return the last `num_rows` rows come last."""
        if begin == 0:  # the prompt's graph gives the rows of its last chunk, which may be one
            begin = end - (num_rows - 1)
            yield 0, begin
        for first in range(begin, end, self._step_tokens):
            yield first, min(first + self._step_tokens, end)

    def _open_request(self) -> None:
        """Begin with empty keys and values."""
        self._request = self._compiled.create_infer_request()
        self._request.set_tensor("beam_idx", ov.Tensor(np.zeros(1, np.int32)))
        has_chunks = self._chunk_tokens < self.context_length
        self._kept = _kept_tokens(self._compiled, self._request) if has_chunks else None
        self.has_nan = self._is_lost = False
        self._unstepped = 0

    def _can_read_on(self, begin: int, end: int) -> bool:
        """Whether tokens `begin` to `end` go on with a prompt that ends there, for less than they cost as steps."""
        chunk = self._chunk_tokens
        if self._kept is None or not 0 < begin == self._unstepped <= self.context_length - chunk or begin % chunk:
            return False
        num_steps = _calls(end - begin, self._step_tokens)
        return num_steps > 1 and (not self._step_s or self._chunk_s + self._step_s < num_steps * self._step_s)

    def _read_on(self, begin: int, end: int) -> Rows:
        """Compute tokens `begin` to `end` as the continuation of a prompt; return the last one's row."""
        self._infer(begin, min(begin + self._step_tokens, end))
        assert self._kept is not None
        self._kept.state = ov.Tensor(np.array([begin], np.int64))
        if int(self._kept.state.data[0]) == begin:
            return self._run(begin, end, is_prompt=True)
        self._open_request()
        return self._infer(0, end)

    def _infer(self, begin: int, end: int) -> Rows:
        """Compute tokens `begin` to `end`; return their rows, of a prompt's only the last one."""
        return self._run(begin, end, is_prompt=begin == 0 and end > 1)

    def _run(self, begin: int, end: int, is_prompt: bool) -> Rows:
        width = end - begin
        mask = np.zeros((1, end if is_prompt else self.context_length + width), np.int64)
        mask[:, :begin] = mask[:, -width:] = 1
        self._request.set_tensor("input_ids", ov.Tensor(np.array([self._held[begin:end]], np.int64)))
        self._request.set_tensor("position_ids", ov.Tensor(np.array([range(begin, end)], np.int64)))
        self._request.set_tensor("attention_mask", ov.Tensor(mask))
        started = time.perf_counter()
        self._request.infer(share_outputs=True)
        self._learn(time.perf_counter() - started, begin, end if is_prompt else 0)
        rows: Rows = self._request.get_tensor("logits").data[0][-1 if is_prompt else -width :]
        self.has_nan |= bool(np.isnan(rows[:, 0]).any())  # a hidden state with NaN makes every logit NaN
        return rows

    def _learn(self, seconds: float, begin: int, prompt_tokens: int) -> None:
        """Keep the least seconds of a step and of a prompt's chunk, and how long a prompt no step has followed is."""
        self._unstepped = prompt_tokens
        if prompt_tokens:
            seconds /= _calls(prompt_tokens - begin, self._chunk_tokens)
            self._chunk_s = min(seconds, self._chunk_s or seconds)
        else:
            self._step_s = min(seconds, self._step_s or seconds)


def _kept_tokens(compiled: ov.CompiledModel, request: ov.InferRequest) -> ov.VariableState | None:
    """Return the state by which NPUW is asked to keep the beginning of a prompt; None where it cannot."""
    with contextlib.suppress(RuntimeError):
        if compiled.get_property("NPUW_LLM_CONTINUOUS_PREFILL_SUPPORTED"):
            return next((state for state in request.query_state() if state.name == "npuw_stored_tokens_state"), None)
    return None


def _calls(num_tokens: int, tokens_per_call: int) -> int:
    return -(-num_tokens // tokens_per_call)
