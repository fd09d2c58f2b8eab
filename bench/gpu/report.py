"""Markdown of what was measured on a GPU."""

from __future__ import annotations

from .. import workloads
from ..implementations import IMPLEMENTATIONS, OPTIMIZERS
from ..report import BASELINES, markdown_table, megabytes, runs, significant, skipped_section
from ..results import Results, Row, in_order

OURS = ("pyoptim-cuda", "pyoptim-triton", "pyoptim-cuda-graph")
SHOWN = (*OURS, *BASELINES, "torch-fused-graph")
LEGEND = (
    "Medians of interleaved repetitions. *ms*: steps in a row, by CUDA events, host or device "
    "whichever is slower. *device ms*: with the queue kept full. *host us*: to enqueue one step. "
    "GB/s counts each input read once and each output written once, over the device's time. *Of "
    "the copy*: beside a copy of 2 GiB, read and written, in the same repetition. *Launches*: "
    "kernels, copies and fills of one step. *x ...*: how many times shorter the step is (*ms*)."
)
HEADER = (
    *("optimizer, dtype", "implementation", "ms", "device ms", "host us", "host ns per tensor"),
    *("launches", "GB/s", "of the copy", "x torch-fused", "x torch-foreach"),
)


def full_report(results: Results) -> str:
    """Everything: machine, speed by workload, memory, compile time, what was not measured."""
    names = in_order((row["workload"] for row in results.rows), workloads.WORKLOADS)
    parts = [
        runs(results),
        LEGEND,
        *(_workload_section(results, name) for name in names),
        _memory_section(results),
        skipped_section(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _workload_section(results: Results, workload: str) -> str:
    rows = results.find(workload=workload)
    lines = []
    for dtypes in dict.fromkeys(row["dtypes"] for row in rows):
        for optimizer in in_order((row["optimizer"] for row in rows), OPTIMIZERS):
            for name in SHOWN:
                found = [
                    row
                    for row in rows
                    if (row["dtypes"], row["optimizer"], row["implementation"])
                    == (dtypes, optimizer, name)
                ]
                lines += [_cells(row) for row in found]
    if not lines:
        return ""
    table = markdown_table(HEADER, lines)
    return f"**{workloads.parse(workload).title}**, {_rotation(rows)}\n\n{table}"


def _rotation(rows: list[Row]) -> str:
    sets = max(row.get("rotated_sets", 1) for row in rows)
    return f"{sets} sets of parameters in turn" if sets > 1 else "larger than the cache"


def _cells(row: Row) -> list[str]:
    busy, share = row["device_seconds"], row["share_of_loop"]
    return [
        f"{row['optimizer']}, {row['dtypes']}",
        row["implementation"],
        f"{row['wall_seconds']['median'] * 1e3:.4g}",
        f"{busy['median'] * 1e3:.4g}" if busy else "-",
        f"{row['host_seconds']['median'] * 1e6:,.0f}",
        f"{row['host_ns_per_tensor']:,.0f}",
        "not known" if row["launches_per_step"] is None else str(row["launches_per_step"]),
        f"{row['gb_per_second']:,.0f}",
        f"{share['median']:.0%}" if share else "-",
        *(_ratio(row, name) for name in ("torch-fused", "torch-foreach")),
    ]


def _ratio(row: Row, baseline: str) -> str:
    found = row["speedup_over"].get(baseline)
    return significant(found["median"]) if found else "-"


def _memory_section(results: Results) -> str:
    """One line per case and implementation, of the largest workload of each dtype set."""
    rows = [row for row in results.rows if row["implementation"] in IMPLEMENTATIONS]
    largest: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda row: workloads.parse(row["workload"]).numel):
        largest[row["optimizer"], row["dtypes"], row["implementation"]] = row
    lines = [
        [
            row["optimizer"],
            row["dtypes"],
            row["workload"],
            row["implementation"],
            megabytes(row["state_bytes"]),
            megabytes(row["temporary_bytes"]),
            "-" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}",
        ]
        for row in largest.values()
    ]
    header = ["optimizer", "dtype", "workload", "implementation", "state MB", "temporary MB"]
    table = markdown_table([*header, "seconds to compile"], lines)
    return f"**Memory of a step**\n\n{table}" if lines else ""
