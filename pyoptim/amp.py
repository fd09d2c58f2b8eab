"""GradScaler that looks for infinities in one reading pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyoptim import backend, reductions
from pyoptim.optimizer import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` for pyoptim's optimizers.

    torch reads and writes every gradient to find out whether one is infinite, and pyoptim's update
    unscales them anyway: here the search only reads, half of the memory traffic or less. Arguments,
    methods, state and results are torch's. Other optimizers, sparse gradients and gradients that no
    engine can read are left to torch's code.
    """

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[Any, Any]:
        found = _found_inf(optimizer) if isinstance(optimizer, FusedOptimizer) else None
        if found is None:
            return super()._check_inf_per_device(optimizer)
        self._check_scale_growth_tracker("_check_inf_per_device")
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found


@torch.no_grad()
def _found_inf(optimizer: FusedOptimizer) -> dict[torch.device, Tensor] | None:
    """By device 1.0 where a gradient is not finite, else 0.0; None if torch has to look."""
    groups = optimizer.param_groups
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if any(grad.is_sparse for grad in grads):
        return None
    real = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads]
    parts = reductions.batches(real, math.inf, optimizer.backend or backend.chosen())
    if any(part.is_plain for part in parts):
        return None
    # The largest magnitude keeps NaN and infinity; a sum of squares might make one.
    return {
        part.device: part.norms(math.inf, False).isfinite().logical_not().float().reshape(())
        for part in parts
    }
