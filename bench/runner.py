"""Measures one case: one optimizer on one workload, all implementations on the same memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import implementations, machine, memory, probe, timing, workloads
from .bytes import COSTS, DtypeSet, bytes_per_element
from .implementations import IMPLEMENTATIONS
from .timing import Variant
from .workloads import Workload

LOOP = "loop"
ONE_THREAD = "pyoptim-1-thread"
FLOAT32 = DtypeSet(torch.float32, torch.float32)
FRESH, HOT = "fresh", "hot"
# Calls until a compiled step has seen its state both absent and present.
COMPILE_CALLS = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is measured together, interleaved.

    Args:
        grads: HOT leaves the gradients in place, FRESH lets backward make them before each step.
        device: "cpu" or "cuda".
    """

    optimizer: str
    dtypes: DtypeSet
    workload: Workload
    threads: int
    grads: str = HOT
    device: str = "cpu"

    @property
    def key(self) -> Row:
        return {
            "optimizer": self.optimizer,
            "dtypes": str(self.dtypes),
            "workload": self.workload.name,
            "threads": self.threads,
            "grads": self.grads,
            "device": self.device,
        }

    def __str__(self) -> str:
        return " ".join(str(value) for value in self.key.values())


@dataclass
class Entry:
    """One implementation within a case, and what was found before timing it."""

    variant: Variant
    dtypes: DtypeSet
    optimizer: torch.optim.Optimizer
    is_compiled: bool
    compile_seconds: float | None = None
    temporary_bytes: int | None = None


@dataclass(frozen=True)
class Settings:
    implementations: Sequence[str] = implementations.DEFAULT_IMPLEMENTATIONS
    reps: int = 20
    seconds: float = 20.0


def run_case(case: Case, settings: Settings) -> tuple[list[Row], list[Row]]:
    """Rows of the implementations that ran, and the reason for each that did not."""
    reason = why_no_memory(case, len(settings.implementations), memory.available_bytes())
    if reason is not None:
        return [], [case.key | {"implementation": "all", "reason": reason}]
    started = machine.load_average()[0]
    with ExitStack() as stack:
        if any(IMPLEMENTATIONS[name].is_compiled for name in settings.implementations):
            stack.enter_context(implementations.fresh_compiler())
        entries, skipped = _make_entries(case, settings)
        loop, loop_bytes = _make_loop(case)
        torch.set_num_threads(case.threads)
        for entry in entries:
            _warm_up(entry)
        variants = [entry.variant for entry in entries] + ([loop] if loop else [])
        for variant in variants:
            variant.warm_steps = case.workload.warm_steps
            timing.choose_steps_per_sample(variant)
        reps = timing.interleave(variants, settings.reps, settings.seconds)
    context = {"reps": reps, "load_average": [started, machine.load_average()[0]]}
    rows = [_row(case, entry, entries, loop) | context for entry in entries]
    if loop is not None:
        rows.append(_time_row(case, loop, loop_bytes) | context)
    return rows, skipped


def _make_entries(case: Case, settings: Settings) -> tuple[list[Entry], list[Row]]:
    params = {case.dtypes: workloads.make_params(case.workload, case.dtypes)}
    entries, skipped = [], []
    for name, implementation_name, dtypes, threads in _wanted(case, settings):
        implementation = IMPLEMENTATIONS[implementation_name]
        reason = implementations.why_not(implementation, case.optimizer, dtypes)
        if reason is not None:
            skipped.append(case.key | {"implementation": name, "reason": reason})
            continue
        if dtypes not in params:
            params[dtypes] = workloads.make_params(case.workload, dtypes)
        optimizer = implementations.make_optimizer(
            implementation, case.optimizer, dtypes, params[dtypes]
        )
        variant = Variant(name, implementations.make_step(implementation, optimizer), threads)
        if case.grads == FRESH:
            variant.before = _backward(params[dtypes])
        entries.append(Entry(variant, dtypes, optimizer, implementation.is_compiled))
    return entries, skipped


def _wanted(case: Case, settings: Settings) -> list[tuple[str, str, DtypeSet, int]]:
    """Name, implementation, dtypes and threads of each variant.

    Beside the implementations asked for: pyoptim with one thread where the case has several, and
    the float32 step where the case mixes dtypes, for both are claims about the ratio of the two.
    """
    names = list(settings.implementations)
    wanted = [(name, name, case.dtypes, case.threads) for name in names]
    if "pyoptim" in names and case.threads > 1:
        wanted.append((ONE_THREAD, "pyoptim", case.dtypes, 1))
    if case.dtypes.has_own_state_dtype:
        wanted += [
            (f"{name}-float32", name, FLOAT32, case.threads)
            for name in names
            if name in ("pyoptim", "torch-fused")
        ]
    return wanted


def _backward(params: list[torch.Tensor]) -> Callable[[], None]:
    """Gives every parameter a gradient tensor that Python has never seen, as backward does."""
    grads = [param.grad for param in params]

    def backward() -> None:
        for param in params:
            param.grad = None
        torch.autograd.backward(params, grads)

    return backward


def _make_loop(case: Case) -> tuple[Variant | None, int]:
    """The loop with the same reads and writes; none where the host, not the memory, is measured."""
    stream = probe.load_stream()
    if stream is None or case.workload.is_host_bound:
        return None, 0
    arrays = probe.make_arrays(case.optimizer, case.dtypes, case.workload)
    nbytes = sum(part.nbytes() for part in arrays)
    return Variant(LOOP, lambda: probe.run(stream, arrays, case.threads), case.threads), nbytes


def _warm_up(entry: Entry) -> None:
    """Create the state, compile, and measure memory: nothing of it is in the timings."""
    step = entry.variant.step
    first = _seconds(step)
    if entry.is_compiled:
        first += sum(_seconds(step) for _ in range(COMPILE_CALLS - 1))
        entry.compile_seconds = max(0.0, first - COMPILE_CALLS * _seconds(step))
    entry.temporary_bytes = memory.peak_bytes(step)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _row(case: Case, entry: Entry, entries: list[Entry], loop: Variant | None) -> Row:
    """Everything that is reported about one implementation in one case."""
    variant = entry.variant
    total = case.workload.numel * bytes_per_element(case.optimizer, entry.dtypes)
    row = _time_row(case, variant, total)
    row["share_of_loop"] = None
    if loop is not None and entry.dtypes == case.dtypes:
        row["share_of_loop"] = _ratio(loop, variant)
    row["speedup_over"] = {
        other.variant.name: _ratio(other.variant, variant)
        for other in entries
        if other is not entry
    }
    row["compile_seconds"] = entry.compile_seconds
    row["state_bytes"] = memory.state_bytes(entry.optimizer)
    row["temporary_bytes"] = entry.temporary_bytes
    return row


def _time_row(case: Case, variant: Variant, nbytes: int) -> Row:
    wall = timing.summarize(variant.wall)
    cpu = timing.summarize(variant.cpu) if variant.threads == 1 else None
    seconds = (cpu or wall).median
    return case.key | {
        "implementation": variant.name,
        "wall_seconds": asdict(wall),
        "cpu_seconds": asdict(cpu) if cpu else None,
        "steps_per_sample": variant.steps_per_sample,
        "bytes_per_element": nbytes / case.workload.numel,
        "ns_per_element": seconds / case.workload.numel * 1e9,
        "ns_per_tensor": seconds / len(case.workload.shapes) * 1e9,
        "gb_per_second": nbytes / seconds * 1e-9,
    }


def _ratio(numerator: Variant, denominator: Variant) -> dict[str, float]:
    """Pairwise ratio: of thread CPU time where both use one thread, else of wall time."""
    one_thread = numerator.threads == denominator.threads == 1
    clock = "cpu" if one_thread else "wall"
    summary = timing.pairwise(getattr(numerator, clock), getattr(denominator, clock))
    return asdict(summary)


def why_no_memory(case: Case, variants: int, available: int | None) -> str | None:
    """Refuse a case that would not fit: each variant has its own state, foreach also a copy."""
    states = len(COSTS[case.optimizer].states)
    width = max(case.dtypes.state.itemsize, case.dtypes.param.itemsize)
    arrays = 2 + (variants + 1) * (states + 1) + 3
    needed = arrays * width * case.workload.numel
    if available is None or needed < available:
        return None
    return f"needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"
