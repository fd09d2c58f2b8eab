"""A device as the benchmarks use it: a queue that runs behind the host, marks in it, memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Protocol

import torch
from torch._C._autograd import DeviceType

# A copy this large (read and written) takes about a millisecond on the fastest memory of 2025, far
# longer than a launch, and no cache holds it.
COPY_BYTES = 2**31
# Cycles of the spin that calibrates the spin: about 10 ms, long enough for clocks to rise.
CALIBRATION_CYCLES = 20_000_000


class Device(Protocol):
    """Where steps run.

    Attributes:
        torch_device: where tensors are made.
        cache_bytes: what repeated steps over the same memory could be served from.
        copy_bytes: size of the source of the copy that serves as the roof.
    """

    torch_device: torch.device
    cache_bytes: int
    copy_bytes: int

    def now(self) -> float:
        """The host's clock in seconds."""

    def synchronize(self) -> None:
        """Waits until the queue is empty."""

    def occupy(self, seconds: float) -> None:
        """Keeps the device busy, so that what is enqueued next waits in the queue."""

    def mark(self) -> Any:
        """Puts a time stamp into the queue."""

    def is_reached(self, mark: Any) -> bool:
        """Whether the device has passed `mark`."""

    def seconds(self, start: Any, end: Any) -> float:
        """The device's time between two marks that it has passed."""

    def available_bytes(self) -> int:
        """Free memory."""

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """The most memory that `call` holds beyond what was held before it."""

    def launches(self, call: Callable[[], object]) -> int | None:
        """Kernels, copies and fills that `call` enqueues; None where that cannot be counted."""

    def release(self) -> None:
        """Gives memory that is cached but unused back to the device."""


class CudaDevice:
    """The current CUDA device, its current stream, and events on it.

    Raises: ValueError where torch finds no CUDA device.
    """

    copy_bytes = COPY_BYTES

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: torch finds no CUDA device here; run on a machine with one, with "
                "a CUDA build of torch, or use --device cpu"
            )
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = int(torch.cuda.get_device_properties(self.torch_device).L2_cache_size)
        self._cycles_per_second = self._calibrate()

    def _calibrate(self) -> float:
        for _ in range(2):  # the first raises the clocks
            start = self.mark()
            _spin(CALIBRATION_CYCLES)
            end = self.mark()
            self.synchronize()
        return CALIBRATION_CYCLES / self.seconds(start, end)

    def now(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def occupy(self, seconds: float) -> None:
        _spin(int(seconds * self._cycles_per_second))

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def is_reached(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())  # type: ignore[no-untyped-call]

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        milliseconds: float = start.elapsed_time(end)
        return milliseconds * 1e-3

    def available_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def peak_bytes(self, call: Callable[[], object]) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def launches(self, call: Callable[[], object]) -> int | None:
        from torch.profiler import ProfilerActivity, profile

        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call()
            self.synchronize()
        return count_device_work(found.events()) or None

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def _spin(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def count_device_work(events: Iterable[Any]) -> int:
    """Kernels, copies and fills among a profiler's events; ranges drawn around them do not count.

    An optimizer's own range appears on the device's time line as well.
    """
    cuda = DeviceType.CUDA
    return sum(
        event.device_type == cuda
        and not event.is_user_annotation
        and not event.name.startswith(("Optimizer.", "ProfilerStep"))
        for event in events
    )


def native_launches(call: Callable[[], object]) -> int | None:
    """Launches of the CUDA engine during `call`, as it counts them; None without such an engine."""
    count = getattr(import_module("pyoptim._C"), "cuda_launches", None)
    if count is None:
        return None
    before = int(count())
    call()
    return int(count()) - before
