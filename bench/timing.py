"""Interleaved timing: every variant once per repetition, in random order, compared pairwise.

On a shared machine the speed of everything drifts by tens of percent within seconds. Two variants
timed in the same repetition saw nearly the same machine, so the median of their ratios per
repetition is steady where the ratio of two medians is not.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

MIN_REPS = 3
# A sample shorter than this is dominated by clock resolution and interrupts: repeat the step.
SAMPLE_SECONDS = 5e-3
MAX_STEPS_PER_SAMPLE = 500


@dataclass
class Variant:
    """One implementation in a comparison.

    Args:
        step: what is timed.
        threads: torch's thread count while it runs.
        before: run before every timed step, untimed (fresh gradients); None leaves them in place.
        warm_steps: untimed steps before each sample. One is not enough where the arrays fit in the
            last-level cache: what a large neighbour has evicted comes back over several steps.
    """

    name: str
    step: Callable[[], object]
    threads: int = 1
    before: Callable[[], object] | None = None
    warm_steps: int = 0
    steps_per_sample: int = 1
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """Order statistics of one series; seconds or a ratio."""

    median: float
    min: float
    q25: float
    q75: float


def summarize(values: Sequence[float]) -> Summary:
    """Median, minimum and quartiles (inclusive method) of at least one value."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], values[0])
    q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, min(values), q25, q75)


def pairwise(numerator: Sequence[float], denominator: Sequence[float]) -> Summary:
    """Order statistics of the ratios taken repetition by repetition."""
    return summarize([a / b for a, b in zip(numerator, denominator, strict=True)])


def choose_steps_per_sample(variant: Variant) -> None:
    """Set how many steps make one sample, from one trial step."""
    torch.set_num_threads(variant.threads)
    for _ in range(variant.warm_steps):
        variant.step()
    start = time.perf_counter()
    variant.step()
    elapsed = max(time.perf_counter() - start, 1e-7)
    variant.steps_per_sample = max(1, min(MAX_STEPS_PER_SAMPLE, int(SAMPLE_SECONDS / elapsed)))


def interleave(
    variants: Sequence[Any],
    reps: int,
    seconds: float,
    seed: int = 0,
    sample: Callable[[Any], None] | None = None,
) -> int:
    """Time all variants `reps` times, or until `seconds` have passed but at least MIN_REPS times.

    Args:
        sample: times one variant once; None: on the CPU.

    Returns: the number of repetitions made.
    """
    sample = sample or _take_sample
    order = list(variants)
    shuffle = random.Random(seed).shuffle
    deadline = time.perf_counter() + seconds
    with _no_garbage_collection(), _same_threads_after():
        for rep in range(reps):
            if rep >= MIN_REPS and time.perf_counter() > deadline:
                return rep
            shuffle(order)
            for variant in order:
                sample(variant)
    return reps


def _take_sample(variant: Variant) -> None:
    torch.set_num_threads(variant.threads)
    for _ in range(variant.warm_steps):
        variant.step()
    wall, cpu = _time_fresh(variant) if variant.before else _time_hot(variant)
    variant.wall.append(wall / variant.steps_per_sample)
    variant.cpu.append(cpu / variant.steps_per_sample)


def _time_hot(variant: Variant) -> tuple[float, float]:
    step = variant.step
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    for _ in range(variant.steps_per_sample):
        step()
    cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
    return wall * 1e-9, cpu * 1e-9


def _time_fresh(variant: Variant) -> tuple[float, float]:
    assert variant.before is not None
    total_wall = total_cpu = 0
    for _ in range(variant.steps_per_sample):
        variant.before()
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        variant.step()
        cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
        total_wall, total_cpu = total_wall + wall, total_cpu + cpu
    return total_wall * 1e-9, total_cpu * 1e-9


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
