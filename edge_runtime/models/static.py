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
from typing import Any

import numpy as np
import openvino as ov

from edge_runtime.devices import device_label
from edge_runtime.errors import ContextOverflowError
from edge_runtime.models.base import Rows
from edge_runtime.models.plan import CompilePlan


class StaticModel:
    """One compiled decoder with a KV cache of static size for one sequence; implements `model.CausalModel`.

    Args:
        compiled: A model that `loading.load_model` has compiled.
        plan: How.
        token_kv_bytes: Bytes that one token adds to the keys and values.
        mlp: What runs its fused MLPs and why; None where it has none.
    """

    def __init__(self, compiled: ov.CompiledModel, plan: CompilePlan, token_kv_bytes: int, mlp: str | None) -> None:
        self._compiled, self._plan, self._mlp = compiled, plan, mlp
        self.device, self.context_length = device_label(plan.device), plan.context_length
        self._kv_bytes = self.context_length * token_kv_bytes
        self.vocab_size = int(compiled.output("logits").get_partial_shape()[2].get_length())
        self.num_tokens = 0
        self._step_tokens, self._chunk_tokens = plan.step_tokens, plan.chunk_size
        self._open_request()
        self._step_s = self._chunk_s = 0.0
        self._ids: list[int] = []
        self._unstepped = 0
        self.chunk_size = self._chunk_tokens if self._kept else self.context_length

    def forward(self, token_ids: list[int], num_rows: int) -> Rows:
        """Append T tokens and return the logits of the last `num_rows`, (num_rows, V): valid until the next call.

        Raises:
            ContextOverflowError: The context does not hold them.
        """
        end = self.num_tokens + len(token_ids)
        if end > self.context_length:
            raise ContextOverflowError(
                f"{end} tokens do not fit the NPU's context of {self.context_length}",
                "shorten the prompt, or load the model with a larger `context_length`",
            )
        self._ids[self.num_tokens :] = token_ids
        begin, prompt_end = self.num_tokens, end - (num_rows - 1)
        parts = []
        if self._can_read_on(begin, prompt_end):
            parts, begin = [self._read_on(begin, prompt_end).copy()], prompt_end
        elif self._begins_anew(end, num_rows):
            begin = 0
        if begin == 0 and (self._has_nan or self._is_lost):
            self._open_request()
        parts += [self._infer(*span).copy() for span in self._spans(begin, end, num_rows)]
        self.num_tokens = end
        return np.concatenate(parts)[-num_rows:]

    def rollback(self, num_tokens: int) -> int:
        """Keep the first `num_tokens` tokens and forget the rest; return how many are kept."""
        self.num_tokens = min(self.num_tokens, num_tokens)
        return self.num_tokens

    def reserve(self, num_tokens: int) -> None:
        """Do nothing: the memory was taken when the model was compiled."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of a full context."""
        return self._kv_bytes

    @property
    def properties(self) -> dict[str, Any]:
        """What is really used, for reports."""
        return {
            "device": self.device,
            "inference_precision_hint": "f16",
            "kv_cache_precision": "f16",
            "reason": self._plan.reason,
            "npuw_online_pipeline": str(self._compiled.get_property("NPUW_ONLINE_PIPELINE")),
            **({"mlp": self._mlp} if self._mlp else {}),
            **({"properties": self._plan.added_properties} if self._plan.added_properties else {}),
        }

    def _begins_anew(self, end: int, num_rows: int) -> bool:
        """Whether to compute all `end` tokens again rather than those after the ones held."""
        if self.num_tokens < self._unstepped:
            return True
        num_steps = _calls(end - self.num_tokens, self._step_tokens)
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
        """Begin with empty keys and values: a step reads all of the context, where NaN stays NaN behind the mask."""
        self._request = self._compiled.create_infer_request()
        self._request.set_tensor("beam_idx", ov.Tensor(np.zeros(1, np.int32)))
        has_chunks = self._chunk_tokens < self.context_length
        self._kept = _kept_tokens(self._compiled, self._request) if has_chunks else None
        self._has_nan = self._is_lost = False

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
        self._is_lost, self._unstepped = True, self.context_length  # should it fail, the next call begins anew
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
        self._request.set_tensor("input_ids", ov.Tensor(np.array([self._ids[begin:end]], np.int64)))
        self._request.set_tensor("position_ids", ov.Tensor(np.array([range(begin, end)], np.int64)))
        self._request.set_tensor("attention_mask", ov.Tensor(mask))
        self._is_lost, self._unstepped = True, self.context_length  # should it fail, the next call begins anew
        started = time.perf_counter()
        self._request.infer(share_outputs=True)
        self._learn(time.perf_counter() - started, begin, end if is_prompt else 0)
        rows: Rows = self._request.get_tensor("logits").data[0][-1 if is_prompt else -width :]
        self._has_nan |= bool(np.isnan(rows[:, 0]).any())  # a hidden state with NaN makes every logit NaN
        self._is_lost = False
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
