"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad as torch_adagrad
from torch.optim.optimizer import ParamsT

from pyoptim.arithmetic import decayed, signed, sqrt
from pyoptim.optimizer import FusedOptimizer
from pyoptim.rows import Row


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    """Adagrad, drop-in for `torch.optim.Adagrad`.

        s = s + g*g;  p = p - lr/(1 + (t - 1)*lr_decay) * g/(sqrt(s) + eps)

    Args:
        params: tensors, named tensors or groups; floating-point or complex; any shape and strides.
        lr: step length per coordinate; a float or a 1-element tensor.
        lr_decay: decay of lr per step.
        weight_decay: L2 penalty, added to the gradient.
        initial_accumulator_value: first value of s.
        eps: added to the root.
        foreach, fused: accepted for compatibility; pyoptim has one implementation per backend.
        maximize: ascend.
        differentiable: run the reference under autograd.
        state_dtype: torch.float32 keeps the state of half-precision parameters in float32; None
            follows torch (the parameter's dtype).
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None follows `pyoptim.use_backend`.
        max_grad_norm: clip the 2-norm of all gradients together to this, inside the update; None
            does not clip. The gradients are not written.

    State per param, from construction on: step (0-dim), sum, shape of the parameter.
    Raises: ValueError for an option out of range; BackendError if `backend` cannot run here.
    Source: Duchi et al., JMLR 12 (2011), Figure 1, diagonal form. Differs: none from torch's form.
    """

    rule = "adagrad"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self._configure(state_dtype, backend, max_grad_norm)
        torch.optim.Adagrad.__init__(
            self,
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        for param, entry in self.state.items():
            entry["sum"] = entry["sum"].to(self._dtype_of_state(param))

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def _new_state(self, name: str, param: Tensor) -> Tensor:
        value = self.defaults["initial_accumulator_value"]
        return (
            super()
            ._new_state(name, param)
            .fill_(complex(value, value) if param.is_complex() else value)
        )

    @staticmethod
    def reference(
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        step: float = 1,
        first: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        g = decayed(signed(grad, group), param, group["weight_decay"])
        s = state["sum"] + g * g
        lr = group["lr"] / (1 + (step - 1) * group["lr_decay"])
        return param - lr * (g / (sqrt(s) + group["eps"])), {"sum": s}

    def _check_sparse(self, row: Row, group: Mapping[str, Any]) -> None:
        if group["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")

    def _sparse_step(self, row: Row, group: Mapping[str, Any]) -> None:
        entry = self.state[row.key]
        torch_adagrad(
            [row.param],
            [row.grad],
            [entry["sum"]],
            [entry["step"]],
            has_sparse_grad=True,
            foreach=False,
            fused=False,
            **{name: group[name] for name in ("lr", "weight_decay", "lr_decay", "eps", "maximize")},
        )
