"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyoptim.arithmetic import decayed, signed, sqrt
from pyoptim.optimizer import FusedOptimizer


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """RMSprop, drop-in for `torch.optim.RMSprop`.

        v = alpha*v + (1 - alpha)*g*g;  d = g/(sqrt(v) + eps);  b = momentum*b + d;  p = p - lr*b

    With `centered`, sqrt(v - a*a) takes the place of sqrt(v), where a = a + (1 - alpha)*(g - a).

    Args:
        params: tensors, named tensors or groups; floating-point or complex; any shape and strides.
        lr: step length per coordinate; a float or a 1-element tensor.
        alpha: decay rate of the averages.
        eps: added to the root.
        weight_decay: L2 penalty, added to the gradient.
        momentum: weight of the former step; 0 keeps no buffer.
        centered: divide by the estimated standard deviation of the gradient.
        capturable: needs parameters on an accelerator.
        foreach: accepted for compatibility; pyoptim has one implementation per backend.
        maximize: ascend.
        differentiable: run the reference under autograd.
        state_dtype: torch.float32 keeps the state of half-precision parameters in float32; None
            follows torch (the parameter's dtype).
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None follows `pyoptim.use_backend`.
        max_grad_norm: clip the 2-norm of all gradients together to this, inside the update; None
            does not clip. The gradients are not written.

    State per param: step (0-dim), square_avg, with momentum momentum_buffer, with centered
    grad_avg, shape of the parameter.
    Raises: ValueError for an option out of range; BackendError if `backend` cannot run here.
    Source: Tieleman and Hinton, lecture 6.5, 2012; centered: Graves, arXiv:1308.0850; in torch's
    form. Differs: none.
    """

    rule = "rmsprop"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        state_dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self._configure(state_dtype, backend, max_grad_norm)
        torch.optim.RMSprop.__init__(
            self,
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        momentum = ("momentum_buffer",) if group["momentum"] > 0 else ()
        centered = ("grad_avg",) if group["centered"] else ()
        return ("square_avg", *momentum, *centered)

    @staticmethod
    def reference(
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        step: float = 1,
        first: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        alpha = group["alpha"]
        g = decayed(signed(grad, group), param, group["weight_decay"])
        v = alpha * state["square_avg"] + ((1 - alpha) * g) * g
        new_state = {"square_avg": v}
        if group["centered"]:
            a = new_state["grad_avg"] = state["grad_avg"] + (1 - alpha) * (g - state["grad_avg"])
            v = v - a * a
        d = g / (sqrt(v) + group["eps"])
        if group["momentum"] > 0:
            d = new_state["momentum_buffer"] = group["momentum"] * state["momentum_buffer"] + d
        return param - group["lr"] * d, new_state
