"""What multiplies the gradients of one step: the inverse loss scale and the clip factor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyoptim import backend
from pyoptim.gpu import Memory, index_of

if TYPE_CHECKING:
    from pyoptim.optimizer import FusedOptimizer

# (loss scale, found_inf, clip factor) on one device.
OnDevice = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Factors:
    """Numbers for rows of the CPU engine; for the GPU engines tensors that no one waits for.

    Args:
        inv_scale: 1/loss scale where the host knows it; gradients are multiplied by it and written
            back.
        clip: multiplies the gradients as they are read by the CPU engine.
        devices: by `gpu.index_of` of the device.
    """

    inv_scale: float = 1.0
    clip: float = 1.0
    devices: dict[int, OnDevice] | None = None

    @property
    def writes_grads(self) -> bool:
        scales = (self.devices or {}).values()
        return self.inv_scale != 1.0 or any(scale is not None for scale, _, _ in scales)

    def on_host(self, device: torch.device) -> tuple[float, float] | None:
        """Returns (inv_scale, clip) for gradients on `device`, None if the step is to be skipped.

        Waits for the device.
        """
        scale, found_inf, clip = (self.devices or {}).get(index_of(device), (None, None, None))
        if found_inf is not None and float(found_inf) != 0:
            return None
        inv_scale = self.inv_scale if scale is None else 1.0 / float(scale)
        return inv_scale, self.clip if clip is None else float(clip)


def step_factors(
    optimizer: FusedOptimizer, grads: list[Tensor], is_on_gpu: bool, devices: Iterable[int]
) -> Factors | None:
    """Returns the factors of this step, or None when it is to be skipped.

    Args:
        grads: of every parameter that will be stepped.
        is_on_gpu: all of them are, so that the host need not know anything.
        devices: where they are, by `gpu.index_of`.
    """
    found_inf = optimizer.found_inf
    scale = getattr(optimizer, "grad_scale", None) if found_inf is not None else None
    if is_on_gpu:
        return _device_factors(optimizer, grads, devices, scale, found_inf)
    if found_inf is not None and float(found_inf) != 0:
        return None
    inv_scale = 1.0 if scale is None else 1.0 / float(scale)
    if optimizer.max_grad_norm is None:
        return Factors(inv_scale)
    by_device = _clip_factors(optimizer, grads, inv_scale, None)
    on_host = by_device.pop(-1, None)
    return Factors(
        inv_scale,
        1.0 if on_host is None else float(on_host),
        {index: (None, None, clip) for index, clip in by_device.items()} or None,
    )


def _device_factors(
    optimizer: FusedOptimizer,
    grads: list[Tensor],
    devices: Iterable[int],
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> Factors:
    clips: dict[int, Tensor] = {}
    if optimizer.max_grad_norm is not None:
        clips = _clip_factors(optimizer, grads, 1.0, scale)
    return Factors(
        devices={
            index: (_moved(scale, index), _moved(found_inf, index), clips.get(index))
            for index in devices
        }
    )


def _clip_factors(
    optimizer: FusedOptimizer, grads: list[Tensor], inv_scale: float, scale: Tensor | None
) -> dict[int, Tensor]:
    from pyoptim import norms

    assert optimizer.max_grad_norm is not None
    choice = optimizer.backend or backend.chosen()
    clips = norms.clip_factor(grads, optimizer.max_grad_norm, inv_scale, scale, choice)
    return {
        index_of(device): torch.as_tensor(clip, dtype=torch.float64)
        for device, clip in clips.items()
    }


def _moved(value: Tensor | None, index: int) -> Tensor | None:
    if value is None:
        return None
    return torch.as_tensor(value).to(Memory.device(index), torch.float32, non_blocking=True)
