"""Muon for the matrices of the layers, AdamW for everything else: more learned from each token than AdamW alone.

The update of a matrix is its momentum with all singular values moved near 1, by five Newton-Schulz steps of the odd
polynomial a x + b x^3 + c x^5, scaled so that its root mean square is that of an AdamW update: one learning rate serves
both. Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the scale 0.2 sqrt(max(m, n)) from Liu et al. 2025
(arXiv 2502.16982, section 2.2).

torch has a Muon too, always in bf16: a processor without bf16 instructions takes 0.3 GFLOP/s for that and 110 in f32
(AVX2, 2 cores). This one computes in f32 there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c: the steepest at 0 that keeps what is in (0, 1] near 1 (Jordan et al.)."""
NUM_STEPS = 5
MOMENTUM = 0.95
RMS = 0.2
"""Root mean square of an AdamW update, as measured by Liu et al."""
BETAS, EPSILON = (0.9, 0.95), 1e-8


class Muon(torch.optim.Optimizer):
    """One optimiser over two kinds of parameter groups, told apart by the group's `is_matrix`.

    Args:
        groups: Parameter groups with `is_matrix` and `weight_decay`.
        lr: Learning rate of both.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "is_matrix": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            update = self._matrix_update if group["is_matrix"] else self._adam_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update(parameter), alpha=group["lr"])

    def _matrix_update(self, parameter: torch.Tensor) -> torch.Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        nesterov = torch.lerp(gradient, momentum, MOMENTUM)
        return orthogonal(nesterov) * (RMS * max(parameter.shape) ** 0.5)

    def _adam_update(self, parameter: torch.Tensor) -> torch.Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = BETAS
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        step = float(state["step"])
        scale = state["square"].div(1 - second**step).sqrt_().add_(EPSILON)
        return state["mean"].div(scale).div_(1 - first**step)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix (M, N) with the singular vectors of `matrix` and singular values of about 0.7 to 1.2."""
    x = matrix.to(torch.bfloat16 if has_fast_bf16(matrix.device.type) else torch.float32)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if is_tall else x).to(matrix.dtype)


def has_fast_bf16(device_type: str) -> bool:
    """Whether a device multiplies bf16 in hardware; a processor without takes hundreds of times as long as for f32."""
    return device_type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
