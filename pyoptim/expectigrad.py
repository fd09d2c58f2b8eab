"""Expectigrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pyoptim.arithmetic import signed, sqrt
from pyoptim.optimizer import FusedOptimizer
from pyoptim.rows import HALF_DTYPES


class Expectigrad(FusedOptimizer):
    """Expectigrad: the gradient over the root of the plain mean of its squares, then averaged.

        s = s + g*g;  n = n + sign(g*g);  q = g/(eps + sqrt(s/n)), where 0/0 = 0
        m = beta*m + (1 - beta)*q;  p = p - lr/(1 - beta^t) * m

    With `beta=0`, p = p - lr*q. With `sparse_counter=False`, n = t.

    Args:
        params: tensors, named tensors or groups; floating-point or complex, of which the real and
            the imaginary parts are counted apart; any shape and strides.
        lr: step length per coordinate, above 0; a float or a 1-element tensor.
        beta: decay rate of the average m, in [0, 1); 0 keeps none.
        eps: added to the root, above 0.
        sparse_counter: n counts, per element, the gradients whose square is not 0; else the steps
            of the parameter.
        maximize: ascend.
        capturable: needs parameters on an accelerator.
        differentiable: run the reference under autograd.
        state_dtype: None or torch.float32: the state of half-precision parameters is float32 in any
            case, since a bfloat16 counter stops at 256.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None follows `pyoptim.use_backend`.
        max_grad_norm: clip the 2-norm of all gradients together to this, inside the update; None
            does not clip. The gradients are not written.

    State per param: step (0-dim), sum, with `sparse_counter` counter, with `beta` momentum, shape
    of the parameter, float32 or wider. A float32 counter is exact up to 2^24 gradients.
    Raises: ValueError for an option out of range; RuntimeError for sparse gradients; BackendError
    if `backend` cannot run here.
    Source: Daley and Amato, arXiv:2010.01356, Algorithm 1. Differs from the authors' package:
    beta and sparse_counter belong to the group; a NaN in s stays NaN, where the package takes it
    for 0/0 and steps by lr*g/eps; there are `maximize` and float32 state.
    """

    rule = "expectigrad"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        beta: float = 0.9,
        eps: float = 1e-8,
        sparse_counter: bool = True,
        *,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self._configure(state_dtype, backend, max_grad_norm)
        defaults = {
            "lr": lr,
            "beta": beta,
            "eps": eps,
            "sparse_counter": sparse_counter,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        _check_options(defaults)
        Optimizer.__init__(self, params, defaults)

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        counter = ("counter",) if group["sparse_counter"] else ()
        momentum = ("momentum",) if group["beta"] > 0 else ()
        return ("sum", *counter, *momentum)

    @staticmethod
    def reference(
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        step: float = 1,
        first: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        g, beta = signed(grad, group), group["beta"]
        square = g * g
        s = state["sum"] + square
        new_state = {"sum": s}
        if group["sparse_counter"]:
            n = new_state["counter"] = state["counter"] + (square > 0)
            root = _root_of_mean(s, n)
        else:
            root = sqrt(s) * (1 / step**0.5)
        d = g / (group["eps"] + root)
        if beta > 0:
            d = new_state["momentum"] = beta * state["momentum"] + (1 - beta) * d
        return param - group["lr"] / (1 - beta**step) * d, new_state

    def _dtype_of_state(self, param: Tensor) -> torch.dtype:
        return torch.float32 if param.dtype in HALF_DTYPES else param.dtype

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # torch says what is wrong otherwise
            _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The authors' package saves lr, beta, eps and sparse_counter only.
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _root_of_mean(s: Tensor, n: Tensor) -> Tensor:
    """sqrt(s/n), 0 where nothing was counted; there autograd would meet 0/0 and a root of 0."""
    is_counted = n > 0
    mean = torch.where(is_counted, s, 1) / torch.where(is_counted, n, 1)
    return torch.where(is_counted, sqrt(mean), 0)


def _check_options(group: Mapping[str, Any]) -> None:
    lr, beta, eps = group["lr"], group["beta"], group["eps"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must have 1 element, got a tensor of shape {tuple(lr.shape)}")
    if not lr > 0.0:
        raise ValueError(f"lr must be above 0, got {lr}; a scheduler may set 0 later")
    if isinstance(beta, Tensor):
        raise ValueError(f"beta must be a number, since 0 keeps no average, got {beta!r}")
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must be in [0, 1), got {beta}; 0 keeps no average")
    if not eps > 0.0:
        raise ValueError(f"eps must be above 0, got {eps}")
