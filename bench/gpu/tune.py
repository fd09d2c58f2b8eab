"""Sweeps the engines' launch settings on a GPU, interleaved, beside a copy of its memory.

    python -m pyoptim.bench.gpu.tune --backend cuda --chunks 0,8192,65536 --rows 0,64
    python -m pyoptim.bench.gpu.tune --backend triton --blocks 1024,2048 --chunks 8,16 --warps 4,8

It changes nothing: the best setting is for a person to write into the engine, with its measurement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import implementations, timing, workloads
from ..bytes import DtypeSet
from ..report import markdown_table
from ..results import Results
from ..runner import Case
from .device import CudaDevice, Device
from .runner import make_roof, n_sets, share_of_copy
from .timing import GpuVariant, choose_steps_per_sample, summarize_known, take_sample

Setting = dict[str, int]
Apply = Callable[[Setting], None]

CASES = (
    *(("1x200000000", "float32"), ("1x200000000", "bfloat16"), ("1x16000000", "float32")),
    *(("transformer", "float32"), ("small", "float32")),
)
WARM_STEPS = 3  # with a new setting: a kernel may have to be compiled, a table to be sent


def apply_to_cuda(setting: Setting) -> None:
    """`chunk` elements per block and `rows` per launch; 0: as the engine chooses."""
    import_module("pyoptim._C").tune_cuda(setting["chunk"], setting["rows"])


def apply_to_triton(setting: Setting) -> None:
    """`block` elements at once, `chunk` blocks per program, `warps` per program."""
    engine: Any = import_module("pyoptim.kernels.engine")
    engine.BLOCK = setting["block"]
    engine.CHUNK = setting["block"] * setting["chunk"]
    import_module("pyoptim.kernels.launcher").OPTIONS["num_warps"] = setting["warps"]


def settings(names: Sequence[str], values: Sequence[Sequence[int]]) -> list[Setting]:
    """All combinations."""
    return [dict(zip(names, row, strict=True)) for row in itertools.product(*values)]


def sweep(
    case: Case,
    implementation: str,
    sweep_settings: Sequence[Setting],
    apply: Apply,
    device: Device,
    reps: int = 7,
    seconds: float = 10.0,
) -> list[dict[str, Any]]:
    """One row per setting; all settings step the same memory."""
    steps = _make_steps(case, implementation, device)
    by_name = {str(setting): setting for setting in sweep_settings}
    roof = make_roof(device)

    def sample(variant: GpuVariant) -> None:
        if variant is not roof:
            _use(variant, by_name[variant.name], apply)
        take_sample(device, variant)

    variants = [GpuVariant(name, steps) for name in by_name]
    for variant in variants:
        _use(variant, by_name[variant.name], apply)
        choose_steps_per_sample(device, variant)
    choose_steps_per_sample(device, roof)
    timing.interleave([*variants, roof], reps, seconds, sample=sample)
    return [_row(case, by_name[v.name], v, roof, device) for v in variants]


def _make_steps(case: Case, implementation: str, device: Device) -> list[Callable[[], object]]:
    chosen = implementations.IMPLEMENTATIONS[implementation]
    steps: list[Callable[[], object]] = []
    for seed in range(n_sets(case, device)):
        params = workloads.make_params(case.workload, case.dtypes, seed, device.torch_device)
        steps.append(
            implementations.make_optimizer(chosen, case.optimizer, case.dtypes, params).step
        )
    return steps


def _use(variant: GpuVariant, setting: Setting, apply: Apply) -> None:
    apply(setting)
    for step in variant.steps:
        for _ in range(WARM_STEPS):
            step()


def _row(
    case: Case, setting: Setting, variant: GpuVariant, roof: GpuVariant, device: Device
) -> dict[str, Any]:
    busy, share = summarize_known(variant.device), share_of_copy(case, variant, roof, device)
    return case.key | {
        "setting": setting,
        "wall_seconds": timing.summarize(variant.wall).median,
        "device_seconds": busy.median if busy else None,
        "host_seconds": timing.summarize(variant.host).median,
        "share_of_copy": share.median if share else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per case and setting."""
    lines = [
        [
            f"{row['workload']}, {row['dtypes']}",
            " ".join(f"{name}={value}" for name, value in row["setting"].items()),
            f"{row['wall_seconds'] * 1e6:,.1f}",
            f"{row['device_seconds'] * 1e6:,.1f}" if row["device_seconds"] else "-",
            f"{row['host_seconds'] * 1e6:,.1f}",
            f"{row['share_of_copy']:.1%}" if row["share_of_copy"] else "-",
        ]
        for row in rows
    ]
    header = ["workload, dtype", "setting", "us", "device us", "host us", "of the copy"]
    return markdown_table(header, lines)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep until the time is over, print a table, write JSON; returns 2 if nothing can run."""
    parser = argparse.ArgumentParser(
        prog="python -m pyoptim.bench.gpu.tune", description="Sweep launch settings."
    )
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--optimizer", choices=implementations.OPTIMIZERS, default="adamw")
    parser.add_argument(
        "--chunks", type=_numbers, help="cuda: elements per block; triton: blocks per program"
    )
    parser.add_argument("--rows", type=_numbers, default=[0], help="cuda: tensors per launch")
    parser.add_argument("--blocks", type=_numbers, default=[1024], help="triton: elements at once")
    parser.add_argument("--warps", type=_numbers, default=[4], help="triton: warps per program")
    parser.add_argument("--seconds", type=float, default=120.0, help="no case starts after this")
    parser.add_argument("--out", type=Path, metavar="JSON")
    arguments = parser.parse_args(argv)
    try:
        device = CudaDevice()
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    rows = _sweep_all(arguments, device)
    print(table(rows))
    if arguments.out:
        run = Results.start("tune", "cuda").runs[0]
        arguments.out.write_text(json.dumps({"run": run, "rows": rows}, indent=1) + "\n")
    return 0


def _sweep_all(arguments: argparse.Namespace, device: Device) -> list[dict[str, Any]]:
    is_cuda = arguments.backend == "cuda"
    chunks = arguments.chunks or ([0, 8192, 16384, 32768, 65536] if is_cuda else [4, 8, 16])
    if is_cuda:
        chosen = settings(("chunk", "rows"), (chunks, arguments.rows))
    else:
        chosen = settings(("block", "chunk", "warps"), (arguments.blocks, chunks, arguments.warps))
    rows, deadline = [], time.monotonic() + arguments.seconds
    for workload, dtypes in CASES:
        if time.monotonic() > deadline:
            print(f"not measured, the time was over: {workload}, {dtypes}")
            continue
        case = Case(
            arguments.optimizer,
            DtypeSet.parse(dtypes),
            workloads.parse(workload),
            1,
            device="cuda",
        )
        apply = apply_to_cuda if is_cuda else apply_to_triton
        rows += sweep(case, f"pyoptim-{arguments.backend}", chosen, apply, device)
        device.release()
    return rows


if __name__ == "__main__":
    sys.exit(main())
