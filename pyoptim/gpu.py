"""What the GPU engines need from torch: streams, and memory that outlives a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Memory:
    """Device memory of one optimizer's steps.

    A CUDA graph may have recorded any of it, so nothing is freed or moved while the optimizer
    lives. One optimizer's steps follow each other in the order of a stream, as its parameters
    demand, and so may share it.
    """

    def __init__(self) -> None:
        self._workspaces: dict[tuple[int, int], list[Tensor]] = {}
        self._caches: dict[int, dict[Any, Any]] = {}

    def workspace(self, slot: int, n_bytes: int, device: int) -> Tensor:
        """Returns at least n_bytes on `device`, the same for one slot as long as they suffice."""
        made = self._workspaces.setdefault((slot, device), [])
        if not made or made[-1].numel() < n_bytes:
            size = 1 << (n_bytes - 1).bit_length()
            made.append(torch.empty(size, dtype=torch.uint8, device=self.device(device)))
        return made[-1]

    def cache(self, slot: int) -> dict[Any, Any]:
        """Returns the dict in which the Triton engine keeps the tables of one slot."""
        return self._caches.setdefault(slot, {})

    @property
    def triton(self) -> Any:
        """The Triton engine."""
        from pyoptim.kernels import engine

        return engine

    @staticmethod
    def device(index: int) -> torch.device:
        """Returns the CUDA device, or the CPU for -1 (the emulator, Triton's interpreter)."""
        return torch.device("cpu") if index < 0 else torch.device("cuda", index)

    @staticmethod
    def stream(index: int) -> int:
        """Returns the handle of torch's current stream."""
        return 0 if index < 0 else torch._C._cuda_getCurrentRawStream(index)

    @staticmethod
    def check_not_capturing() -> None:
        """Raises inside a CUDA graph's capture, for a step whose number the host keeps."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Attempting CUDA graph capture of a step() whose number the host keeps: every "
                "replay would make the same step. Set capturable=True, in the constructor or in "
                "param_groups, and make a step before the capture"
            )

    @staticmethod
    def on_device(value: Tensor, name: str, index: int) -> Tensor:
        """Returns a hyper-parameter as one float32 or float64 number on the device.

        Raises:
            RuntimeError: it is not one number.
        """
        if value.numel() != 1 or not value.is_floating_point():
            raise RuntimeError(
                f"{name!r} is a tensor of shape {tuple(value.shape)} and dtype {value.dtype}; "
                "a hyper-parameter is one floating-point number"
            )
        dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float64
        return value.detach().to(Memory.device(index), dtype, non_blocking=True)


def index_of(device: torch.device) -> int:
    """Returns a CUDA device's index, -1 for any other device."""
    return -1 if device.type != "cuda" else int(device.index)


def is_capturing(device: torch.device) -> bool:
    """Whether work for the device is being recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
