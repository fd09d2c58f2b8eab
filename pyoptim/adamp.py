"""AdamP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pyoptim.arithmetic import signed, sqrt
from pyoptim.projection import ProjectingOptimizer, check_projection, project, rows_of


class AdamP(ProjectingOptimizer):
    """AdamP: AdamW whose step loses its part along weights that seem scale-invariant.

        m = m + (1 - beta1)*(g - m);  v = beta2*v + (1 - beta2)*g*g
        u = m/(sqrt(v)/sqrt(1 - beta2^t) + eps)
        if |cos(g, p)| < delta/sqrt(row size) in every row of dimension 0:
            u = u - p*<p, u>/(|p| + eps)^2, per row
        p = p*(1 - lr*weight_decay*ratio) - lr/(1 - beta1^t)*u

    with ratio = wd_ratio where u was projected and else 1. When a row of dimension 0 fails (output
    features of a Linear, input channels of a transposed convolution), the tensor as one row is
    tried in the same way. Parameters of fewer than two dimensions are never projected. A NaN in the
    gradient or the weights means no projection.

    Args:
        params: tensors, named tensors or groups; floating-point or complex (pairs of real numbers);
            any shape and strides. Shards (DTensor) of two and more dimensions are stepped by the
            reference, whose sums go over the processes, all of which must step.
        lr: step length per coordinate, at least 0; a float or a 1-element tensor.
        betas: decay rates of m and v, each in [0, 1).
        eps: added to the root and to |p|, and the least |p| and |g| of the cosine; at least 0.
        weight_decay: fraction of the parameter removed per unit of lr, at least 0.
        delta: bound of the cosine, times the root of the row's size; 0 never projects.
        wd_ratio: factor of weight_decay where a step is projected, at least 0.
        nesterov: (beta1*m + (1 - beta1)*g) in the place of m in u.
        maximize: ascend.
        capturable: needs parameters on an accelerator.
        differentiable: run the reference under autograd.
        state_dtype: None (dtype of the parameter) or torch.float32; the state of float16 parameters
            is float32 in any case, since u is computed from v as stored, which would underflow.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None follows `pyoptim.use_backend`.
        max_grad_norm: clip the 2-norm of all gradients together to this, inside the update; None
            does not clip. The gradients are not written.

    State per param: step (0-dim), exp_avg, exp_avg_sq, shape of the parameter.
    Raises: ValueError for an option out of range; RuntimeError for sparse gradients, and for shards
    with differentiable=True; BackendError if `backend` cannot run here, or names an engine and the
    parameter is a shard.
    Source: Heo et al., arXiv:2006.08217, Algorithm 2. Differs from the authors' package: sums
    of rows and decisions run in float64, the sums of the tensor as one row over 16 terms in the
    parameter's precision (half types: float32) and from there on in float64; rows are those of
    dimension 0 in every memory format; in the kernels, a tensor that is projected as one row is
    projected after its result was stored, so that the last bit may differ.
    """

    rule = "adamp"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        self._check_options(defaults)
        Optimizer.__init__(self, params, defaults)

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @staticmethod
    def reference(
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        step: float = 1,
        first: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = group["betas"]
        g = signed(grad, group)
        m = state["exp_avg"] + (1 - beta1) * (g - state["exp_avg"])
        v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
        numerator = beta1 * m + (1 - beta1) * g if group["nesterov"] else m
        u = numerator / (sqrt(v) * (1 / (1 - beta2**step) ** 0.5) + group["eps"])
        u, is_projected = project(u, param, grad, group, rows_of(param))
        decay = group["weight_decay"] * (group["wd_ratio"] if is_projected else 1)
        w = param * (1 - group["lr"] * decay)
        return w - group["lr"] / (1 - beta1**step) * u, {"exp_avg": m, "exp_avg_sq": v}

    def _dtype_of_state(self, param: Tensor) -> torch.dtype:
        is_float16 = param.dtype == torch.float16
        return torch.float32 if is_float16 else super()._dtype_of_state(param)

    @staticmethod
    def _check_options(group: Mapping[str, Any]) -> None:
        for i, beta in enumerate(group["betas"]):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")
        check_projection(group)
