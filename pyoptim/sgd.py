"""SGD, with optional momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd as torch_sgd

from pyoptim.arithmetic import decayed, signed
from pyoptim.optimizer import FusedOptimizer
from pyoptim.rows import Row


class SGD(FusedOptimizer, torch.optim.SGD):
    """Stochastic gradient descent, drop-in for `torch.optim.SGD`.

        g = grad + weight_decay*p;  b = momentum*b + (1 - dampening)*g, at first b = g
        p = p - lr*b

    Args:
        params: tensors, named tensors or groups; floating-point or complex; any shape and strides.
        lr: step length; a float or a 1-element tensor.
        momentum: weight of the former buffer; 0 keeps no buffer.
        dampening: part of the gradient left out of the buffer.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: step along grad + momentum*b; needs momentum > 0 and dampening 0.
        maximize: ascend.
        foreach, fused: accepted for compatibility; pyoptim has one implementation per backend.
        differentiable: run the reference under autograd.
        state_dtype: torch.float32 keeps the buffer of half-precision parameters in float32; None
            follows torch (the parameter's dtype).
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None follows `pyoptim.use_backend`.
        max_grad_norm: clip the 2-norm of all gradients together to this, inside the update; None
            does not clip. The gradients are not written.

    State per param, with momentum: momentum_buffer, shape of the parameter.
    Raises: ValueError for an option out of range; BackendError if `backend` cannot run here.
    Source: Sutskever et al., ICML 2013, in torch's form. Differs: none.
    """

    rule = "sgd"
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self._configure(state_dtype, backend, max_grad_norm)
        torch.optim.SGD.__init__(
            self,
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    @staticmethod
    def reference(
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        step: float = 1,
        first: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        momentum = group["momentum"]
        g = decayed(signed(grad, group), param, group["weight_decay"])
        if momentum == 0:
            return param - group["lr"] * g, {}
        b = g if first else momentum * state["momentum_buffer"] + (1 - group["dampening"]) * g
        d = g + momentum * b if group["nesterov"] else b
        return param - group["lr"] * d, {"momentum_buffer": b}

    def _check_sparse(self, row: Row, group: Mapping[str, Any]) -> None:
        # torch's SGD takes sparse gradients, but adds nothing dense to them.
        buffer = self.state.get(row.key, {}).get("momentum_buffer")
        is_dense = isinstance(buffer, Tensor) and not buffer.is_sparse
        if group["weight_decay"] != 0 or (group["nesterov"] and is_dense):
            raise RuntimeError(
                "add(sparse, dense) is not supported. Use add(dense, sparse) instead: "
                f"{row.place} has a sparse gradient, weight_decay or nesterov needs a dense one"
            )

    def _sparse_step(self, row: Row, group: Mapping[str, Any]) -> None:
        buffers = [self.state[row.key].get("momentum_buffer")] if group["momentum"] != 0 else [None]
        options = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
        torch_sgd(
            [row.param],
            [row.grad],
            buffers,
            has_sparse_grad=True,
            foreach=False,
            fused=False,
            **{name: group[name] for name in options},
        )
        if group["momentum"] != 0:
            self.state[row.key]["momentum_buffer"] = buffers[0]
