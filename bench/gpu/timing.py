"""Three clocks of a step on a device: what the user waits, what the device works, what the host.

A step is enqueued by the host and run by the device later. *Wall* is the time per step of steps in
a row, whoever is slower. *Device* is the time per step when the queue is kept full: the device is
occupied first, until all steps of the sample are enqueued. *Host* is the time to enqueue one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..timing import MIN_REPS, SAMPLE_SECONDS, Summary, summarize
from .device import Device

MAX_STEPS_PER_SAMPLE = 200
# A stream's queue holds 1024 launches before the host has to wait for the device; some room for
# marks and for what a step enqueues beside its kernels.
QUEUE = 800
# The device is occupied this much longer than the host is expected to need.
MARGIN, SETTLE_SECONDS = 1.5, 100e-6


@dataclass
class GpuVariant:
    """One implementation in a comparison.

    Args:
        steps: one step for each of several equal sets of parameters. They take turns where wall
            and device are timed, so that no cache serves one step what another has left there.
        launches: operations of one step on the device; None where unknown.
    """

    name: str
    steps: Sequence[Callable[[], object]]
    launches: int | None = None
    steps_per_sample: int = 1
    host_steps: int = 1
    enqueue_seconds: float = 0.0
    wall: list[float] = field(default_factory=list)
    device: list[float | None] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._turns: Iterator[Callable[[], object]] = itertools.cycle(self.steps)

    def run_sample(self) -> None:
        for _ in range(self.steps_per_sample):
            next(self._turns)()

    @property
    def fits_queue(self) -> bool:
        return (self.launches or 1) * self.steps_per_sample <= QUEUE


def choose_steps_per_sample(device: Device, variant: GpuVariant) -> None:
    """Set how many steps make one sample, from one trial step: 5 ms, and no more than fit."""
    device.synchronize()
    start = device.now()
    variant.steps[0]()
    enqueued = device.now()
    device.synchronize()
    elapsed = max(device.now() - start, 1e-7)
    room = max(1, QUEUE // (variant.launches or 1))
    wanted = int(SAMPLE_SECONDS / elapsed)
    variant.steps_per_sample = max(1, min(MAX_STEPS_PER_SAMPLE, wanted, room))
    # The host waits for nothing as long as the queue is short: half of what fits.
    variant.host_steps = max(1, min(variant.steps_per_sample, room // 2))
    variant.enqueue_seconds = (enqueued - start) * variant.steps_per_sample


def take_sample(device: Device, variant: GpuVariant) -> None:
    """Add one value to each clock of `variant`."""
    variant.host.append(_host_seconds(device, variant))
    variant.wall.append(_wall_seconds(device, variant))
    variant.device.append(_device_seconds(device, variant) if variant.fits_queue else None)


def _host_seconds(device: Device, variant: GpuVariant) -> float:
    """One set of parameters only: what the host reads of it is in its caches, as in training."""
    step = variant.steps[0]
    step()
    device.synchronize()
    start = device.now()
    for _ in range(variant.host_steps):
        step()
    elapsed = device.now() - start
    device.synchronize()
    return elapsed / variant.host_steps


def _wall_seconds(device: Device, variant: GpuVariant) -> float:
    device.synchronize()
    start = device.mark()
    variant.run_sample()
    end = device.mark()
    device.synchronize()
    return device.seconds(start, end) / variant.steps_per_sample


def _device_seconds(device: Device, variant: GpuVariant) -> float | None:
    """None where the host did not get all steps into the queue before the device came to them."""
    for _ in range(2):
        device.synchronize()
        device.occupy(MARGIN * variant.enqueue_seconds + SETTLE_SECONDS)
        start = device.mark()
        began = device.now()
        variant.run_sample()
        enqueue = device.now() - began
        was_queued = not device.is_reached(start)
        end = device.mark()
        device.synchronize()
        if was_queued:
            return device.seconds(start, end) / variant.steps_per_sample
        variant.enqueue_seconds = max(MARGIN * variant.enqueue_seconds, enqueue)
    return None


def summarize_known(values: Sequence[float | None]) -> Summary | None:
    """Order statistics of the values that are known; None where they are too few."""
    known = [value for value in values if value is not None]
    return summarize(known) if len(known) >= min(MIN_REPS, len(values)) and known else None


def pairwise_known(
    numerator: Sequence[float | None], denominator: Sequence[float | None]
) -> Summary | None:
    """Order statistics of the ratios of the repetitions in which both values are known."""
    pairs = zip(numerator, denominator, strict=True)
    return summarize_known([a / b if a is not None and b is not None else None for a, b in pairs])
