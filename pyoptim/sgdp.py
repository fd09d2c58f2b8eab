"""SGDP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pyoptim.arithmetic import signed
from pyoptim.projection import ProjectingOptimizer, check_projection, project, rows_of


class SGDP(ProjectingOptimizer):
    """SGDP: SGD with momentum whose step loses its part along weights that seem scale-invariant.

        b = momentum*b + (1 - dampening)*g, from b = 0;  u = g + momentum*b if nesterov else b
        if |cos(g, p)| < delta/sqrt(row size) in every row of dimension 0:
            u = u - p*<p, u>/(|p| + eps)^2, per row
        p = p*(1 - lr*weight_decay*ratio/(1 - momentum)) - lr*u

    with ratio = wd_ratio where u was projected and else 1; the rest as in `AdamP`. Unlike in
    torch's SGD the decay is decoupled, and dampening holds for the first step too.

    Args:
        params: as in `AdamP`.
        lr: step length per unit of gradient, at least 0; a float or a 1-element tensor.
        momentum: in [0, 1).
        dampening: of the gradient in the momentum.
        weight_decay: fraction of the parameter removed per unit of lr/(1 - momentum), at least 0.
        nesterov: look ahead along the momentum.
        eps: added to |p|, and the least |p| and |g| of the cosine; at least 0.
        delta: bound of the cosine, times the root of the row's size; 0 never projects.
        wd_ratio: factor of weight_decay where a step is projected, at least 0.
        project_buffer: without nesterov, b itself is projected, as the authors' package does; False
            is the paper's Algorithm 1.
        maximize: ascend.
        differentiable: run the reference under autograd.
        state_dtype: None (dtype of the parameter) or torch.float32.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None follows `pyoptim.use_backend`.
        max_grad_norm: clip the 2-norm of all gradients together to this, inside the update; None
            does not clip. The gradients are not written.

    State per param: momentum, shape of the parameter.
    Raises: as `AdamP`.
    Source: Heo et al., arXiv:2006.08217, Algorithm 1. Differs from the authors' package as `AdamP`
    does.
    """

    rule = "sgdp"
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        project_buffer: bool = True,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self._configure(state_dtype, backend, max_grad_norm)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "project_buffer": project_buffer,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        self._check_options(defaults)
        Optimizer.__init__(self, params, defaults)

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum",)

    @staticmethod
    def reference(
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        step: float = 1,
        first: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        momentum, lr = group["momentum"], group["lr"]
        g = signed(grad, group)
        b = momentum * state["momentum"] + (1 - group["dampening"]) * g
        u = g + momentum * b if group["nesterov"] else b
        u, is_projected = project(u, param, grad, group, rows_of(param))
        decay = group["weight_decay"] * (group["wd_ratio"] if is_projected else 1)
        w = param * (1 - lr * decay / (1 - momentum))
        is_aliased = group["project_buffer"] and not group["nesterov"]
        return w - lr * u, {"momentum": u if is_aliased else b}

    @staticmethod
    def _check_options(group: Mapping[str, Any]) -> None:
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
        check_projection(group)
