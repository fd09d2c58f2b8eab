"""The limit: a loop with the optimizer's mix of reads and writes and next to no arithmetic.

`pyoptim._C.stream` adds the read-only arrays to the read-write arrays in the driver that also runs
the optimizer rules (same chunks, same threads). It works on arrays of its own beside the shared
gradients, because adding bits to a parameter would make subnormal values and slow its owner down.
Dtype sets with two item sizes are two calls, one per item size, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch

from .bytes import COSTS, DtypeSet
from .workloads import Workload

Stream = Callable[[list[int], list[int], int, int, int], None]


@dataclass(frozen=True)
class Arrays:
    """Arrays of one item size that go through one call."""

    read_only: Sequence[torch.Tensor]
    read_write: Sequence[torch.Tensor]

    def nbytes(self) -> int:
        read = sum(array.nbytes for array in self.read_only)
        return read + 2 * sum(array.nbytes for array in self.read_write)


def load_stream() -> Stream | None:
    """The compiled loop, or None where pyoptim runs without its native module."""
    try:
        native = import_module("pyoptim._C")
    except ImportError:
        return None
    stream: Stream = native.stream
    return stream


def make_arrays(optimizer: str, dtypes: DtypeSet, workload: Workload) -> list[Arrays]:
    """Arrays with the sizes of gradient, parameter and states, one tensor each, all written."""
    states = [dtypes.state] * len(COSTS[optimizer].states)
    grad = torch.ones(workload.numel, dtype=dtypes.param)
    written = [torch.ones(workload.numel, dtype=dtype) for dtype in [dtypes.param, *states]]
    if not dtypes.has_own_state_dtype or not states:
        return [Arrays([grad], written)]
    return [Arrays([grad], written[:1]), Arrays([], written[1:])]


def run(stream: Stream, arrays: Sequence[Arrays], threads: int) -> None:
    """Read and write every array once."""
    for part in arrays:
        first = part.read_write[0]
        stream(
            [array.data_ptr() for array in part.read_only],
            [array.data_ptr() for array in part.read_write],
            first.numel(),
            first.element_size(),
            threads,
        )
