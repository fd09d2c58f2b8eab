"""Which kernels read feature matrices on a device, and how they are called."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pyoptim import backend as backends
from pyoptim.coreset.search import Packed

Rows = tuple[Tensor, Tensor | None]


def engine_for(tensor: Tensor, backend: str | None) -> CudaEngine | None:
    """Returns the GPU engine that reads `tensor`, or None where another backend has to.

    Raises:
        ValueError: `backend` is not a backend.
        BackendError: the backend cannot run here.
    """
    choice = backends.chosen() if backend is None else backends.check_choice(backend)
    is_cuda = tensor.device.type == "cuda"
    if choice == "auto" and is_cuda:
        choice = backends.select("auto", tensor)
    if choice not in backends.GPU_ENGINES or tensor.device.type != backends.device_type(choice):
        return None
    if backends.native() is None:
        return None
    return CudaEngine(tensor.device) if choice == "cuda" else _triton(tensor.device)


def _triton(device: torch.device) -> Any:
    return importlib.import_module("pyoptim.kernels.search").TritonEngine(device)


class CudaEngine:
    """The CUDA engine, or the emulator's for tensors of the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.native: Any = backends.native()

    @property
    def queue(self) -> tuple[int, int]:
        if self.device.type != "cuda":
            return 0, 0
        index = self.device.index
        return index, torch.cuda.current_stream(self.device).cuda_stream

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def squares(self, x: Tensor, rows: Tensor | None) -> Tensor:
        out = self._empty(len(x) if rows is None else len(rows))
        self.native.coreset_gpu_squares(x, rows, out, self.queue)
        return out

    def pack(
        self,
        x: Tensor,
        rows: Tensor | None,
        metric: int,
        splits: bool,
        about: Tensor,
        center: Tensor | None,
        has_half_norms: bool,
    ) -> Packed:
        n, width = len(x) if rows is None else len(rows), max(32, -(-x.shape[1] // 32) * 32)
        is_ready = not splits and rows is None and lies_on_16_bytes(x)
        high = None if is_ready else self._empty(n, width, dtype=torch.int16)
        low = self._empty(n, width, dtype=torch.int16) if splits else None
        norms = self._empty(n)
        half_norms = self._empty(n, dtype=torch.float32) if has_half_norms else None
        self.native.coreset_gpu_pack(
            *(x, rows, metric, about, center, width, high, low, norms, half_norms, self.queue)
        )
        packed = x if high is None else high.view(packed_dtype(x, splits))
        return Packed(packed, low, norms, half_norms)

    def nearest(self, x: Packed, y: Packed, d: int, n_parts: int) -> tuple[Tensor, Tensor]:
        n = len(x.norms)
        least = self._empty(n_parts, 3, n, dtype=torch.float32)
        columns = self._empty(n_parts, 2, n, dtype=torch.int32)
        self._filter(x, y, d, n_parts, least, columns, None)
        return least, columns

    def values(self, x: Packed, y: Packed, d: int, n_parts: int) -> Tensor:
        values = self._empty(len(x.norms), len(y.norms), dtype=torch.float32)
        self._filter(x, y, d, n_parts, None, None, values)
        return values

    def _filter(
        self,
        x: Packed,
        y: Packed,
        d: int,
        n_parts: int,
        least: Tensor | None,
        columns: Tensor | None,
        values: Tensor | None,
    ) -> None:
        self.native.coreset_gpu_filter(
            *(x.high, x.low, y.high, y.low, d, x.high.dtype == torch.float16, y.half_norms),
            *(n_parts, least, columns, values, self.queue),
        )

    def certify(
        self,
        x: Rows,
        y: Rows,
        metric: int,
        slack: tuple[float, ...],
        about: Tensor,
        norms: Tensor,
        least: tuple[Tensor, Tensor],
        first_index: int,
        scores: Tensor,
        indices: Tensor,
    ) -> Tensor:
        is_settled = self._empty(len(norms), dtype=torch.uint8)
        self.native.coreset_gpu_certify(
            *(*x, *y, metric, slack, about, norms, len(least[0]), *least),
            *(first_index, scores, indices, is_settled, self.queue),
        )
        return is_settled

    def scores(self, x: Rows, y: Rows, metric: int, columns: Tensor | None) -> Tensor:
        n, m = (len(t) if rows is None else len(rows) for t, rows in (x, y))
        out = self._empty(n, m if columns is None else columns.shape[1])
        self.native.coreset_gpu_scores(*x, *y, metric, columns, out, self.queue)
        return out

    def step_center(
        self, x: Tensor, center: Tensor | None, sqdist: Tensor, partials: Tensor, found: Tensor
    ) -> None:
        self.native.coreset_gpu_step_center(x, center, sqdist, partials, found, self.queue)

    def center_sqdist(self, x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        out = self._empty(len(x))
        self.native.coreset_gpu_center_sqdist(x, labels, centers, out, self.queue)
        return out


def lies_on_16_bytes(x: Tensor) -> bool:
    """Whether every 16-bit row begins where 16 bytes can be read at once."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0


def packed_dtype(x: Tensor, splits: bool) -> torch.dtype:
    """The type of packed elements."""
    is_half = x.dtype == torch.float16 and not splits
    return torch.float16 if is_half else torch.bfloat16
