"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyoptim.arithmetic import decayed, signed, sqrt
from pyoptim.optimizer import FusedOptimizer
from pyoptim.rows import Row


class Adam(FusedOptimizer, torch.optim.Adam):
    """Adam, drop-in for `torch.optim.Adam`.

        m = m + (1 - beta1)*(g - m);  v = beta2*v + (1 - beta2)*g*g
        p = p - lr/(1 - beta1^t) * m/(sqrt(v)/sqrt(1 - beta2^t) + eps)

    Args:
        params: tensors, named tensors or groups; floating-point or complex; any shape and strides.
        lr: step length per coordinate; a float or a 1-element tensor.
        betas: decay rates of the averages of the gradient and of its square.
        eps: added to the root.
        weight_decay: L2 penalty, added to the gradient, unless decoupled.
        amsgrad: divide by the root of the largest v so far.
        foreach, fused: accepted for compatibility; pyoptim has one implementation per backend.
        maximize: ascend.
        capturable: needs parameters on an accelerator.
        differentiable: run the reference under autograd.
        decoupled_weight_decay: p = (1 - lr*weight_decay)*p instead of the L2 penalty (AdamW).
        state_dtype: torch.float32 keeps the state of half-precision parameters in float32; None
            follows torch (the parameter's dtype).
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None follows `pyoptim.use_backend`.
        max_grad_norm: clip the 2-norm of all gradients together to this, inside the update; None
            does not clip. The gradients are not written.

    State per param: step (0-dim), exp_avg, exp_avg_sq, with amsgrad max_exp_avg_sq, shape of the
    parameter.
    Raises: ValueError for an option out of range; BackendError if `backend` cannot run here.
    Source: Kingma and Ba, arXiv:1412.6980, Algorithm 1; amsgrad: Reddi et al., ICLR 2018. Differs:
    as torch, amsgrad takes the maximum of the uncorrected v.
    """

    rule = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self._configure(state_dtype, backend, max_grad_norm)
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))

    @staticmethod
    def reference(
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        step: float = 1,
        first: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
        decoupled = group["decoupled_weight_decay"]
        w = param * (1 - lr * decay) if decoupled else param
        g = decayed(signed(grad, group), w, 0 if decoupled else decay)
        m = state["exp_avg"] + (1 - beta1) * (g - state["exp_avg"])
        v = beta2 * state["exp_avg_sq"] + ((1 - beta2) * g) * g
        new_state = {"exp_avg": m, "exp_avg_sq": v}
        if group["amsgrad"]:
            v = new_state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
        denom = sqrt(v) * (1 / (1 - beta2**step) ** 0.5) + group["eps"]
        return w - lr / (1 - beta1**step) * (m / denom), new_state

    def _check_sparse(self, row: Row, group: Mapping[str, Any]) -> None:
        raise RuntimeError(
            "Adam does not support sparse gradients, please consider SparseAdam instead"
        )


class AdamW(Adam, torch.optim.AdamW):
    """AdamW, drop-in for `torch.optim.AdamW`: Adam with decoupled weight decay.

        p = (1 - lr*weight_decay)*p;  then Adam's step with the undecayed gradient

    Args: as `pyoptim.Adam`, without `decoupled_weight_decay` (always on).
        weight_decay: fraction of the parameter removed per unit of lr.

    State per param: as `pyoptim.Adam`.
    Raises: as `pyoptim.Adam`.
    Source: Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2. Differs: as torch, there is no
    schedule multiplier.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            state_dtype=state_dtype,
            backend=backend,
            max_grad_norm=max_grad_norm,
        )
