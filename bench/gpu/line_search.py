"""What a line search costs on a device: `python -m pyoptim.bench.gpu.line_search [--out FILE]`.

Every pass of `pyoptim.line_search.fused` by itself, on each engine, beside a copy on the device
that moves as many bytes, interleaved; and whether a search makes the host wait.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pyoptim.line_search.fused import FusedDirection

from ..bench_line_search import ETA, FLOAT32, PASSES, Owner, pass_alone, search
from ..report import markdown_table
from ..timing import Summary, summarize
from ..workloads import Workload, make_params, parse
from .asynchronous import Check, CudaWatch, Watch, check_waiting
from .device import CudaDevice, Device
from .timing import (
    GpuVariant,
    choose_steps_per_sample,
    pairwise_known,
    summarize_known,
    take_sample,
)

WORKLOADS = ("1x100000000", "transformer")
COPY = "copy"
COPY_BYTES = 8  # per element of float32: read and written


def measure(backend: str, workload: Workload, device: Device, reps: int) -> dict[str, Any]:
    """Seconds of every pass on the device and on the host, and times the copy of its bytes."""
    variants = make_variants(backend, workload, device)
    for variant in variants:
        choose_steps_per_sample(device, variant)
    for _ in range(reps):
        for variant in variants:
            take_sample(device, variant)
    named = {variant.name: variant for variant in variants}
    row: dict[str, Any] = {
        "backend": backend,
        "workload": workload.name,
        "numel": workload.numel,
        "seconds": {},
        "host_seconds": {},
        "over_copy": {},
    }
    for name, variant in named.items():
        of_device = summarize_known(variant.device) or summarize(variant.wall)
        row["seconds"][name] = asdict(of_device)
        row["host_seconds"][name] = asdict(summarize(variant.host))
    for own in PASSES:
        by = own.nbytes / COPY_BYTES
        over = _over(named[own.name].device, named[COPY].device, by)
        over = over or _over(named[own.name].wall, named[COPY].wall, by)
        row["over_copy"][own.name] = None if over is None else asdict(over)
    return row


def _over(times: Sequence[float | None], copy: Sequence[float | None], by: float) -> Summary | None:
    """Ratios to `by` copies by one clock; None where it is not known."""
    return pairwise_known(times, [None if t is None else t * by for t in copy])


def make_direction(backend: str, workload: Workload, device: Device) -> FusedDirection:
    """One that has made a step."""
    owner = Owner(make_params(workload, FLOAT32, device=device.torch_device))
    owner.backend = backend  # type: ignore[attr-defined]
    direction = FusedDirection(owner)
    search(direction, 2)
    direction.plain(ETA)
    return direction


def make_variants(backend: str, workload: Workload, device: Device) -> list[GpuVariant]:
    direction = make_direction(backend, workload, device)
    steps = {own.name: pass_alone(direction, own.name) for own in PASSES}
    arrays = [torch.ones(workload.numel, device=device.torch_device) for _ in range(2)]
    steps[COPY] = lambda: arrays[0].copy_(arrays[1])  # type: ignore[assignment,return-value]
    return [GpuVariant(name, [step], device.launches(step)) for name, step in steps.items()]


def check_search(backend: str, device: Device, watch: Watch) -> Check:
    """A whole step with two trials and a factor that is on the device."""
    direction = make_direction(backend, parse("100x1023"), device)
    factor = torch.tensor(0.5, device=device.torch_device)

    def step() -> None:
        direction.start(ETA, factor)
        direction.trial(ETA / 2)
        direction.restore()
        direction.finish(ETA)

    return check_waiting(f"line search, {backend}", step, watch)


def table(rows: Sequence[Any], found: Sequence[Check]) -> str:
    lines = []
    for row in rows:
        for own in PASSES:
            seconds, over = row["seconds"][own.name]["median"], row["over_copy"][own.name]
            lines.append(
                [
                    f"{own.name}, {row['backend']}, {parse(row['workload']).title}",
                    f"{seconds * 1e6:.0f}",
                    f"{own.nbytes * row['numel'] / seconds / 1e9:.0f}",
                    f"{over['median']:.2f}" if over else "-",
                    f"{row['host_seconds'][own.name]['median'] * 1e6:.0f}",
                ]
            )
    head = ["pass, engine, parameters", "us", "GB/s", "times a copy", "host, us"]
    checks = [f"- {c.subject}: {c.claim}: {c.has_passed} {c.detail}".rstrip() for c in found]
    return "\n".join([markdown_table(head, lines), "", *checks])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, check, print tables, write JSON; 1 if a search waits, 2 if nothing can run."""
    parser = argparse.ArgumentParser(
        prog="python -m pyoptim.bench.gpu.line_search",
        description="Measure the passes of a line search on a CUDA device.",
    )
    parser.add_argument("--backends", default="cuda,triton", help="separated by commas")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--out", type=Path, metavar="JSON")
    arguments = parser.parse_args(argv)
    try:
        device = CudaDevice()
    except ValueError as error:
        print(f"line_search: {error}", file=sys.stderr)
        return 2
    rows, found = [], []
    for backend in arguments.backends.split(","):
        found.append(check_search(backend, device, CudaWatch()))
        for name in arguments.workloads.split(","):
            rows.append(measure(backend, parse(name), device, arguments.reps))
            device.release()
    print(table(rows, found))
    if arguments.out:
        record = {"rows": rows, "checks": [asdict(check) for check in found]}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(not all(check.has_passed for check in found))


if __name__ == "__main__":
    sys.exit(main())
