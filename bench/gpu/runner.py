"""Measures one case on a device: all implementations interleaved, beside a copy of its memory."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from .. import implementations, machine, memory, timing, workloads
from ..bytes import bytes_per_element
from ..implementations import IMPLEMENTATIONS, Implementation
from ..runner import COMPILE_CALLS, LOOP, Case, Row, Settings, why_no_memory
from ..timing import Summary
from .device import Device, native_launches
from .timing import (
    GpuVariant,
    choose_steps_per_sample,
    pairwise_known,
    summarize_known,
    take_sample,
)

# Sets of parameters are rotated until they are this many times as large as the cache.
ROTATED_CACHES = 2
MAX_SETS = 8


@dataclass
class Entry:
    """One implementation within a case, and what was found before timing it."""

    variant: GpuVariant
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    compile_seconds: float | None = None
    temporary_bytes: int | None = None


def run_case(case: Case, settings: Settings, device: Device) -> tuple[list[Row], list[Row]]:
    """Rows of the implementations that ran, and the reason for each that did not.

    An implementation that raises is one of the latter, marked as failed, so that the others are
    measured all the same.
    """
    device.release()
    available = device.available_bytes() - 2 * device.copy_bytes
    reason = why_no_memory(case, len(settings.implementations), available)
    if reason is not None:
        return [], [case.key | {"implementation": "all", "reason": reason}]
    started = machine.load_average()[0]
    with ExitStack() as stack:
        if any(IMPLEMENTATIONS[name].is_compiled for name in settings.implementations):
            stack.enter_context(implementations.fresh_compiler())
        entries, skipped = _make_entries(case, settings, device)
        roof = make_roof(device)
        variants = [*(entry.variant for entry in entries), roof]
        for variant in variants:
            choose_steps_per_sample(device, variant)
        reps = timing.interleave(
            variants, settings.reps, settings.seconds, sample=partial(take_sample, device)
        )
    context = {"reps": reps, "load_average": [started, machine.load_average()[0]]}
    rows = [_row(case, entry, entries, roof, device) | context for entry in entries]
    if entries:
        rows.append(_roof_row(case, roof, device) | context)
    return rows, skipped


def n_sets(case: Case, device: Device) -> int:
    """How many equal sets of parameters take turns, so that the cache serves none of them."""
    step = case.workload.numel * bytes_per_element(case.optimizer, case.dtypes)
    return min(MAX_SETS, max(1, math.ceil(ROTATED_CACHES * device.cache_bytes / step)))


def _make_entries(case: Case, settings: Settings, device: Device) -> tuple[list[Entry], list[Row]]:
    sets = [
        workloads.make_params(case.workload, case.dtypes, seed, device.torch_device)
        for seed in range(n_sets(case, device))
    ]
    entries, skipped = [], []
    for name in settings.implementations:
        implementation = IMPLEMENTATIONS[name]
        failure = {}
        reason = implementations.why_not(
            implementation, case.optimizer, case.dtypes, device.torch_device.type
        )
        if reason is None:
            try:
                entries.append(_make_entry(implementation, case, sets, device))
            # Whatever one implementation raises (out of memory, a refusal), the others can run.
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                failure = {"failed": True}
        if reason is not None:
            skipped.append(case.key | {"implementation": name, "reason": reason} | failure)
    return entries, skipped


def _make_entry(
    implementation: Implementation, case: Case, sets: list[list[torch.Tensor]], device: Device
) -> Entry:
    """Optimizers with their state made, steps captured or compiled: nothing of it is timed."""
    entry = Entry(GpuVariant(implementation.name, ()))
    steps, compile_seconds = [], 0.0
    for params in sets:
        optimizer = implementations.make_optimizer(
            implementation, case.optimizer, case.dtypes, params
        )
        step = implementations.make_step(implementation, optimizer)
        seconds = [_seconds(step, device) for _ in range(COMPILE_CALLS + 1)]
        compile_seconds += max(0.0, sum(seconds[:-1]) - COMPILE_CALLS * seconds[-1])
        entry.optimizers.append(optimizer)
        steps.append(step)
    entry.compile_seconds = compile_seconds if implementation.is_compiled else None
    entry.temporary_bytes = device.peak_bytes(steps[0])
    is_ours = implementation.name == "pyoptim-cuda"
    launches = native_launches(steps[0]) if is_ours else device.launches(steps[0])
    entry.variant = GpuVariant(implementation.name, steps, launches)
    return entry


def _seconds(step: object, device: Device) -> float:
    assert callable(step)
    start = time.perf_counter()
    step()
    device.synchronize()
    return time.perf_counter() - start


def make_roof(device: Device) -> GpuVariant:
    """A copy of device memory, of random values: zeros can be moved faster than data."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    source = torch.randn(device.copy_bytes // 4, device=device.torch_device, generator=generator)
    target = torch.full_like(source, torch.nan)
    return GpuVariant(LOOP, [lambda: target.copy_(source)], launches=1)


def _row(case: Case, entry: Entry, entries: list[Entry], roof: GpuVariant, device: Device) -> Row:
    """Everything that is reported about one implementation in one case."""
    variant = entry.variant
    nbytes = case.workload.numel * bytes_per_element(case.optimizer, case.dtypes)
    wall, busy = timing.summarize(variant.wall), summarize_known(variant.device)
    host = timing.summarize(variant.host)
    share = share_of_copy(case, variant, roof, device)
    others = [other.variant for other in entries if other is not entry]
    return _time_row(case, variant, nbytes, wall, busy) | {
        "host_seconds": asdict(host),
        "host_ns_per_tensor": host.median / len(case.workload.shapes) * 1e9,
        "launches_per_step": variant.launches,
        "rotated_sets": len(variant.steps),
        "share_of_loop": asdict(share) if share else None,
        "speedup_over": {o.name: asdict(timing.pairwise(o.wall, variant.wall)) for o in others},
        "host_speedup_over": {
            o.name: asdict(timing.pairwise(o.host, variant.host)) for o in others
        },
        "compile_seconds": entry.compile_seconds,
        "state_bytes": memory.state_bytes(entry.optimizers[0]),
        "temporary_bytes": entry.temporary_bytes,
    }


def _time_row(
    case: Case, variant: GpuVariant, nbytes: int, wall: Summary, busy: Summary | None
) -> Row:
    """Bandwidth is the device's where its time is known, else that of the wall."""
    seconds = (busy or wall).median
    return case.key | {
        "implementation": variant.name,
        "wall_seconds": asdict(wall),
        "cpu_seconds": None,
        "device_seconds": asdict(busy) if busy else None,
        "steps_per_sample": variant.steps_per_sample,
        "bytes_per_element": nbytes / case.workload.numel,
        "ns_per_element": seconds / case.workload.numel * 1e9,
        "ns_per_tensor": wall.median / len(case.workload.shapes) * 1e9,
        "gb_per_second": nbytes / seconds * 1e-9,
    }


def share_of_copy(
    case: Case, variant: GpuVariant, roof: GpuVariant, device: Device
) -> Summary | None:
    """Bytes per second of the step over those of the copy, repetition by repetition."""
    nbytes = case.workload.numel * bytes_per_element(case.optimizer, case.dtypes)
    busy = variant.device if summarize_known(variant.device) else variant.wall
    scaled = [_of_bytes(seconds, nbytes, device) for seconds in _busy(roof)]
    return pairwise_known(scaled, busy)


def _roof_row(case: Case, roof: GpuVariant, device: Device) -> Row:
    """The time in which a copy moves as many bytes as a step must."""
    nbytes = case.workload.numel * bytes_per_element(case.optimizer, case.dtypes)
    seconds = summarize_known([_of_bytes(value, nbytes, device) for value in _busy(roof)])
    assert seconds is not None
    return _time_row(case, roof, nbytes, seconds, seconds)


def _busy(roof: GpuVariant) -> list[float | None]:
    return roof.device if summarize_known(roof.device) else list(roof.wall)


def _of_bytes(seconds: float | None, nbytes: int, device: Device) -> float | None:
    return None if seconds is None else seconds * nbytes / (2 * device.copy_bytes)
