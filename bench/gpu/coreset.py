"""Nearest neighbours and k-center steps on a GPU: `python -m pyoptim.bench.gpu.coreset`.

Nearest neighbours (k = 1, squared Euclidean) against what people use, interleaved. Every method's
indices are compared with those of scoring every pair in float64. The share of the limit is the
multiply-adds of the filter (three products of bfloat16 for float32 and float64, one for 16-bit
inputs) over the time, over what torch.mm reaches on 8192 x 8192 of bfloat16 in the same repetition.
A k-center step is compared with the time in which a copy moves as many bytes as the features have.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyoptim
from pyoptim.coreset import CenterDistances, nearest

from ..machine import describe_machine, describe_versions
from ..report import markdown_table
from ..timing import Summary, pairwise, summarize
from .device import CudaDevice, Device
from .runner import make_roof
from .timing import GpuVariant, choose_steps_per_sample, take_sample

SHAPES = ("50000x500x768", "50000x500x64", "100000x1000x384", "20000x20000x64", "100000x4096x512")
DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("pyoptim-cuda", "pyoptim-triton", "cdist+argmin", "addmm+argmin", "flash-kmeans")
LIMIT = "limit"
ADDMM_ROWS = 8192
LIMIT_SIZE = 8192
EXACT_ELEMENTS = 1 << 26
# From 256 elements on the multiplication decides.
LONG_ROW, LIMIT_SHARE = 256, 0.6
STEP_SHARE = 0.67  # of the copy: at most 1.5 times one read
Search = Callable[[Tensor, Tensor], Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """n rows of x, m of y, d elements."""

    n: int
    m: int
    d: int
    dtype: str

    @classmethod
    def parse(cls, shape: str, dtype: str) -> Case:
        n, m, d = map(int, shape.split("x"))
        return cls(n, m, d, dtype)

    @property
    def flops(self) -> float:
        products = 3 if self.dtype in ("float32", "float64") else 1
        return 2.0 * self.n * self.m * self.d * products


# -- the methods -----------------------------------------------------------------------------------


def load_method(name: str) -> Search:
    """Raises ImportError or BackendError where the method cannot run here."""
    if name.startswith("pyoptim-"):
        backend = pyoptim.backend.check_choice(name.removeprefix("pyoptim-"))
        return lambda x, y: nearest(x, y, backend=backend)[1]
    if name == "flash-kmeans":
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        return lambda x, y: euclid_assign_triton(x[None], y[None], _squares(x)[None])[0]
    return {"addmm+argmin": search_by_addmm, "cdist+argmin": search_by_cdist}[name]


def _squares(x: Tensor) -> Tensor:
    return x.float().square().sum(dim=1)


def search_by_cdist(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).argmin(dim=1)


def search_by_addmm(x: Tensor, y: Tensor) -> Tensor:
    half = y.square().sum(dim=1).mul_(0.5)
    parts = [torch.addmm(half, part, y.T, alpha=-1).argmin(dim=1) for part in x.split(ADDMM_ROWS)]
    return torch.cat(parts)


def exact_indices(x: Tensor, y: Tensor) -> Tensor:
    """Of every pair in float64, by differences."""
    wide = y.double()
    step = max(1, EXACT_ELEMENTS // wide.numel())
    parts = [(p.double()[:, None] - wide).square_().sum(2).argmin(1) for p in x.split(step)]
    return torch.cat(parts)


# -- measuring -------------------------------------------------------------------------------------


def measure(case: Case, methods: Sequence[str], reps: int, device: Device) -> list[Row]:
    """One row per method; what cannot run has a reason in place of times."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    x, y = (
        torch.randn(rows, case.d, generator=generator, device=device.torch_device).to(
            getattr(torch, case.dtype)
        )
        for rows in (case.n, case.m)
    )
    expected = exact_indices(x, y)
    variants, rows = [_limit(device)], []
    for name in methods:
        row: Row = {"method": name, **asdict(case)}
        rows.append(row)
        try:
            search = load_method(name)
            row["wrong"] = int((search(x, y) != expected).sum())
            row["peak_bytes"] = device.peak_bytes(partial(search, x, y))
            variants.append(GpuVariant(name, [partial(search, x, y)]))
        # Whatever one method raises, the others can run.
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    _take_turns(variants, reps, device)
    for variant in variants[1:]:
        next(row for row in rows if row["method"] == variant.name).update(
            _times(case, variant, variants)
        )
    return rows


def _limit(device: Device, size: int | None = None) -> GpuVariant:
    size = size or (LIMIT_SIZE if device.torch_device.type == "cuda" else 64)
    a = torch.randn(size, size, device=device.torch_device).bfloat16()
    return GpuVariant(f"{LIMIT} {size}", [partial(torch.mm, a, a)])


def _take_turns(variants: Sequence[GpuVariant], reps: int, device: Device) -> None:
    for variant in variants:
        choose_steps_per_sample(device, variant)
    for _ in range(reps):
        for variant in variants:
            take_sample(device, variant)


def _times(case: Case, variant: GpuVariant, variants: Sequence[GpuVariant]) -> Row:
    """Wall time: the search waits once, for a NaN to be reported."""
    size = int(variants[0].name.split()[1])
    scale = case.flops / (2.0 * size**3)
    share = pairwise([seconds * scale for seconds in variants[0].wall], variant.wall)
    others = {v.name: asdict(pairwise(v.wall, variant.wall)) for v in variants[1:] if v != variant}
    return {
        "seconds": asdict(summarize(variant.wall)),
        "share_of_limit": asdict(share),
        "speedup_over": others,
    }


def measure_steps(case: Case, backends: Sequence[str], reps: int, device: Device) -> list[Row]:
    """k-center steps, in each of which the farthest row becomes a centre."""
    x = torch.randn(case.n, case.d, device=device.torch_device).to(getattr(torch, case.dtype))
    roof = make_roof(device)
    rows = []
    for backend in backends:
        row: Row = {"method": f"k-center step, {backend}", **asdict(case)}
        rows.append(row)
        try:
            distances = CenterDistances(x, backend=backend)
            variant = GpuVariant(backend, [Steps(distances)])
            _take_turns([roof, variant], reps, device)
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            continue
        part = x.numel() * x.element_size() / (2 * device.copy_bytes)
        share: Summary = pairwise([seconds * part for seconds in roof.wall], variant.wall)
        row |= {"seconds": asdict(summarize(variant.wall)), "share_of_copy": asdict(share)}
        roof.wall.clear()
    return rows


class Steps:
    """One step after the other."""

    def __init__(self, distances: CenterDistances) -> None:
        self.distances, self.center = distances, 0

    def __call__(self) -> None:
        self.center, _ = self.distances.add(self.center)


# -- goals and command line ------------------------------------------------------------------------


def unmet_goals(rows: Sequence[Row]) -> list[str]:
    """What a run on a GPU shows to be missed; a method that cannot run misses nothing."""
    unmet = []
    for row in rows:
        name = f"{row['method']}, {row['n']} x {row['m']} x {row['d']}, {row['dtype']}"
        if "seconds" not in row:
            continue
        if "share_of_copy" in row and row["share_of_copy"]["median"] < STEP_SHARE:
            unmet.append(f"{name}: {row['share_of_copy']['median']:.2f} of the copy")
        if not row["method"].startswith("pyoptim-"):
            continue
        if row["wrong"]:
            unmet.append(f"{name}: {row['wrong']} wrong indices")
        if row["d"] >= LONG_ROW and row["share_of_limit"]["median"] < LIMIT_SHARE:
            unmet.append(f"{name}: {row['share_of_limit']['median']:.2f} of the limit")
        for other, ratio in row["speedup_over"].items():
            if not other.startswith("pyoptim-") and ratio["median"] < 1:
                unmet.append(f"{name}: {ratio['median']:.2f} times as fast as {other}")
    return unmet


def table(rows: Sequence[Row]) -> str:
    """One line per method and case."""
    lines = []
    for row in rows:
        found = row.get("seconds")
        share = row.get("share_of_limit") or row.get("share_of_copy")
        lines.append(
            [
                f"{row['n']} x {row['m']} x {row['d']}, {row['dtype']}",
                row["method"],
                f"{found['median'] * 1e3:.3f}" if found else row.get("reason", "-"),
                f"{share['median']:.2f}" if share else "-",
                str(row.get("wrong", "-")),
                f"{row['peak_bytes'] / 2**20:.1f}" if row.get("peak_bytes") is not None else "-",
            ]
        )
    header = ["shape, dtype", "method", "ms", "share of limit or copy", "wrong", "peak MiB"]
    return markdown_table(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, write JSON; returns 1 if a result is wrong, 2 if nothing can run."""
    parser = argparse.ArgumentParser(prog="python -m pyoptim.bench.gpu.coreset")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="NxMxD, separated by commas")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="JSON")
    arguments = parser.parse_args(argv)
    try:
        device = CudaDevice()
    except ValueError as error:
        print(f"coreset: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for shape in arguments.shapes.split(","):
        for dtype in arguments.dtypes.split(","):
            case = Case.parse(shape, dtype)
            rows += measure(case, arguments.methods.split(","), arguments.reps, device)
            device.release()
        case = Case.parse(shape, "float32")
        rows += measure_steps(case, ("cuda", "triton"), arguments.reps, device)
        if arguments.out:
            record = {"machine": describe_machine(), "versions": describe_versions(), "rows": rows}
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    print("\n".join(["", "Goals that are not met:", *unmet_goals(rows)]))
    is_wrong = any(row.get("wrong") and row["method"].startswith("pyoptim-") for row in rows)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
