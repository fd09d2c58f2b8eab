"""Steps only enqueue work: they never wait for the device, and allocate nothing once warm.

    python -m pyoptim.bench.gpu.asynchronous --backends cuda,triton

torch's own check sees waiting that goes through torch; waiting inside an engine would show in the
host's time, which must be far below the device's for a large step.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

import pyoptim

from .. import workloads
from ..bytes import DtypeSet
from ..report import markdown_table
from ..timing import summarize
from .device import CudaDevice, Device
from .scenarios import LR, OPTIONS
from .timing import GpuVariant, choose_steps_per_sample, take_sample

LARGE, SMALL = "1x100000000", "100x1023"
# A large step of AdamW in float32 takes about 0.7 ms on the fastest GPUs of 2025; enqueuing it
# takes tens of microseconds, whatever its size.
HOST_SHARE = 0.25
STEPS, SAMPLES = 5, 5
# It returns the norm, a new tensor each time.
CLIP_BEFORE = "clip_grad_norm_ before"

Step = Callable[[], object]


class Watch(Protocol):
    """What notices that a step waits or allocates."""

    def forbids_waiting(self) -> AbstractContextManager[None]:
        """Within it, whatever waits for the device raises."""

    def allocations(self) -> int:
        """How many times device memory has been asked for so far."""


class CudaWatch:
    """torch's checks and counters."""

    @contextmanager
    def forbids_waiting(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def allocations(self) -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"])


@dataclass(frozen=True)
class Check:
    """One claim about one way of stepping."""

    claim: str
    subject: str
    has_passed: bool
    detail: str = ""


def check_waiting(subject: str, step: Step, watch: Watch) -> Check:
    """The first steps may wait (they make state and load kernels); later ones may not."""
    claim = "does not wait"
    try:
        for _ in range(STEPS):
            step()
        with watch.forbids_waiting():
            for _ in range(STEPS):
                step()
    # Waiting shows as an error of torch; any other error is a failed check as well.
    except Exception as error:
        return Check(claim, subject, False, f"{type(error).__name__}: {error}")
    return Check(claim, subject, True)


def check_allocations(subject: str, step: Step, watch: Watch) -> Check:
    """Once warm, a step asks for no memory."""
    claim = "allocates nothing"
    for _ in range(STEPS):
        step()
    before = watch.allocations()
    for _ in range(STEPS):
        step()
    made = watch.allocations() - before
    return Check(claim, subject, made == 0, f"{made} allocations in {STEPS} steps" if made else "")


def check_host_time(subject: str, step: Step, device: Device) -> Check:
    """The host is far ahead of the device in a large step."""
    for _ in range(STEPS):
        step()
    variant = GpuVariant(subject, [step])
    choose_steps_per_sample(device, variant)
    for _ in range(SAMPLES):
        take_sample(device, variant)
    host, wall = summarize(variant.host).median, summarize(variant.wall).median
    detail = f"host {host * 1e6:.0f} us, step {wall * 1e6:.0f} us"
    return Check("host far ahead of a large step", subject, host <= HOST_SHARE * wall, detail)


def steppers(
    backend: str, optimizer: str, device: torch.device
) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Ways of stepping that a training loop may use, by name, made when they are needed."""
    cls = getattr(pyoptim, optimizer)
    accepted = inspect.signature(cls).parameters
    options = OPTIONS[optimizer][-1]

    def make(**more: object) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = workloads.make_params(
            workloads.parse(SMALL), DtypeSet.parse("float32"), device=device
        )
        made = cls(params, **{"lr": LR, "backend": backend, **options, **more})
        return params, made

    def plain(**more: object) -> Step:
        return make(**more)[1].step

    def scaled() -> Step:
        """As GradScaler leaves its numbers before it calls step."""
        _, made = make()
        made.grad_scale = torch.tensor(1024.0, device=device)  # type: ignore[attr-defined]
        made.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
        return made.step

    def clipped_before() -> Step:
        params, made = make()
        clip = pyoptim.clip_grad_norm_  # type: ignore[attr-defined]

        def step() -> None:
            clip(params, 1.0)
            made.step()

        return step

    yield "plain", plain
    yield "grad_scale and found_inf", scaled
    if "max_grad_norm" in accepted:
        yield "max_grad_norm", partial(plain, max_grad_norm=1.0)
    if "capturable" in accepted and device.type != "cpu":
        lr = torch.tensor(LR, device=device)
        yield "capturable, lr on the device", partial(plain, capturable=True, lr=lr)
    if hasattr(pyoptim, "clip_grad_norm_"):
        yield CLIP_BEFORE, clipped_before


def checks(
    backend: str, optimizer: str, watch: Watch, device: Device, large: str = LARGE
) -> Iterator[Check]:
    """All claims about one optimizer."""
    for name, make in steppers(backend, optimizer, device.torch_device):
        subject = f"{optimizer}, {backend}, {name}"
        yield from _small_checks(subject, make, watch, may_allocate=name == CLIP_BEFORE)
    params = workloads.make_params(
        workloads.parse(large), DtypeSet.parse("float32"), device=device.torch_device
    )
    made = getattr(pyoptim, optimizer)(params, lr=LR, backend=backend)
    yield check_host_time(f"{optimizer}, {backend}, {large}", made.step, device)
    del params, made
    device.release()


def _small_checks(
    subject: str, make: Callable[[], Step], watch: Watch, may_allocate: bool
) -> Iterator[Check]:
    try:
        step = make()
    except Exception as error:  # a refusal is a failed check; the others are still to be made
        yield Check("can be made", subject, False, f"{type(error).__name__}: {error}")
        return
    waiting = check_waiting(subject, step, watch)
    yield waiting
    if waiting.has_passed and not may_allocate:
        yield check_allocations(subject, step, watch)


def main(argv: Sequence[str] | None = None) -> int:
    """Check all, print a table, write JSON; returns 1 if one failed, 2 if nothing can run."""
    parser = argparse.ArgumentParser(
        prog="python -m pyoptim.bench.gpu.asynchronous",
        description="Check that steps only enqueue work.",
    )
    parser.add_argument("--backends", default="cuda,triton", help="separated by commas")
    parser.add_argument("--out", type=Path, metavar="JSON")
    arguments = parser.parse_args(argv)
    try:
        device = CudaDevice()
    except ValueError as error:
        print(f"asynchronous: {error}", file=sys.stderr)
        return 2
    found = [
        check
        for backend in arguments.backends.split(",")
        for optimizer in OPTIONS
        for check in checks(backend, optimizer, CudaWatch(), device)
    ]
    print(table(found))
    if arguments.out:
        arguments.out.write_text(json.dumps([asdict(check) for check in found], indent=1) + "\n")
    return int(not all(check.has_passed for check in found))


def table(found: Sequence[Check]) -> str:
    """One line per check."""
    lines = [[c.subject, c.claim, "yes" if c.has_passed else "NO", c.detail] for c in found]
    return markdown_table(["way of stepping", "claim", "holds", "detail"], lines)


if __name__ == "__main__":
    sys.exit(main())
