"""Two pictures per device: the roofline of the largest workload, and bars for all workloads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import workloads
from .bytes import COSTS
from .implementations import OPTIMIZERS
from .report import seconds
from .results import Results, Row, in_order
from .runner import HOT, LOOP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DTYPES = "float32"
# Okabe and Ito's palette, readable with any colour vision; ours is the strong one.
COLORS = {
    "torch-for-loop": "#999999",
    "torch-foreach": "#E69F00",
    "torch-fused": "#56B4E9",
    "torch-compiled": "#CC79A7",
    "pyoptim": "#D55E00",
    "pyoptim-cuda": "#D55E00",
    "pyoptim-triton": "#009E73",
}
MARKERS = dict(zip(COLORS, "vs^DooP", strict=True))
# What the roof is, by device.
ROOFS = {"cpu": "loop with the same reads and writes", "cuda": "copy of as many bytes"}


def draw(results: Results, folder: Path) -> list[Path]:
    """Write `roofline.png` and `bars.png`, for a GPU `*-gpu.png`, where there is data for them.

    Raises: ImportError where matplotlib is missing.
    """
    written = _draw_device(results.of_device("cpu"), folder, "")
    return written + _draw_device(results.of_device("cuda"), folder, "-gpu")


def _draw_device(results: Results, folder: Path, suffix: str) -> list[Path]:
    written = []
    threads = min((row["threads"] for row in results.rows), default=1)
    rows = results.find(dtypes=DTYPES, threads=threads, grads=HOT)
    roof = [row for row in rows if row["workload"] == _largest(rows)]
    if any(row["implementation"] == LOOP for row in roof):
        written.append(_roofline(roof, threads, folder / f"roofline{suffix}.png"))
    bars = [row for row in rows if not workloads.parse(row["workload"]).is_host_bound]
    if bars:
        written.append(_bars(bars, threads, folder / f"bars{suffix}.png"))
    return written


def _largest(rows: list[Row]) -> str | None:
    names = {row["workload"] for row in rows}
    return max(names, key=lambda name: workloads.parse(name).numel, default=None)


def _roofline(rows: list[Row], threads: int, path: Path) -> Path:
    """Arithmetic per second over arithmetic per byte; the roof is the loop's bandwidth.

    The flat part of the roof, the arithmetic units' limit, lies above the picture: these rules do
    less than one operation per byte.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    loops = [row for row in rows if row["implementation"] == LOOP]
    _draw_roof(axes, loops)
    for name in COLORS:
        found = [row for row in rows if row["implementation"] == name]
        axes.plot(
            [_intensity(row) for row in found],
            [_gigaops(row) for row in found],
            MARKERS[name],
            color=COLORS[name],
            markersize=8,
            markeredgecolor="white",
            label=name if found else None,
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("10⁹ operations per second")
    title = workloads.parse(rows[0]["workload"]).title
    axes.set_title(f"One step on {title}, {DTYPES}, {_place(rows, threads)}")
    _frame(axes, rows)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    return path


def _draw_roof(axes: Axes, loops: list[Row]) -> None:
    """The loop of every optimizer as a dash, the fastest one as the roof, names above."""
    fastest = max(row["gb_per_second"] for row in loops)
    ends = [0.1, 1.0]
    roof = ROOFS[loops[0]["device"]]
    label = f"{fastest:.0f} GB/s, the fastest {roof.partition(' ')[0]}"
    axes.plot(ends, [end * fastest for end in ends], "k-", linewidth=1, label=label)
    for row in loops:
        loop = roof if row is loops[0] else None
        axes.plot(_intensity(row), _gigaops(row), "k_", markersize=16, label=loop)
        axes.annotate(
            row["optimizer"],
            (_intensity(row), _intensity(row) * fastest),
            xytext=(-3, 10),
            textcoords="offset points",
            rotation=65,
            fontsize=9,
        )


def _frame(axes: Axes, rows: list[Row]) -> None:
    """Limits with room for the names above and the points below; plain numbers on the axes."""
    from matplotlib.ticker import NullFormatter

    intensities = [_intensity(row) for row in rows]
    speeds = [_gigaops(row) for row in rows]
    axes.set_xticks([tick / 10 for tick in range(1, 8) if min(intensities) <= tick / 10])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0.85 * min(intensities), 1.2 * max(intensities))
    axes.set_yticks([digit * 10.0**power for power in range(-1, 5) for digit in (1, 2, 5)])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0.7 * min(speeds), 2.5 * max(speeds))
    axes.grid(which="major", alpha=0.3)


def _intensity(row: Row) -> float:
    return COSTS[row["optimizer"]].operations / float(row["bytes_per_element"])


def _gigaops(row: Row) -> float:
    return COSTS[row["optimizer"]].operations / float(row["ns_per_element"])


def _bars(rows: list[Row], threads: int, path: Path) -> Path:
    """Milliseconds of a step, one panel per workload, one group per optimizer."""
    from matplotlib.figure import Figure

    names = in_order((row["workload"] for row in rows), workloads.WORKLOADS)
    figure = Figure(figsize=(9, 3 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        _bar_panel(axes, [row for row in rows if row["workload"] == name])
        axes.set_title(workloads.parse(name).title, loc="left", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel(f"median of interleaved steps, {DTYPES}, {_place(rows, threads)}", fontsize=9)
    figure.savefig(path, dpi=150)
    return path


def _bar_panel(axes: Axes, rows: list[Row]) -> None:
    from matplotlib.ticker import NullFormatter

    optimizers = in_order((row["optimizer"] for row in rows), OPTIMIZERS)
    shown = [name for name in COLORS if any(row["implementation"] == name for row in rows)]
    width = 0.8 / len(shown)
    milliseconds = {(row["optimizer"], row["implementation"]): seconds(row) * 1e3 for row in rows}
    for index, name in enumerate(shown):
        places = [
            (at, milliseconds.get((optimizer, name))) for at, optimizer in enumerate(optimizers)
        ]
        offset = (index - (len(shown) - 1) / 2) * width
        xs = [at + offset for at, value in places if value]
        bars = axes.bar(xs, [value for _, value in places if value], width, color=COLORS[name])
        bars.set_label(name)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    for at, optimizer in enumerate(optimizers):
        loop = milliseconds.get((optimizer, LOOP))
        if loop:
            label = ROOFS[rows[0]["device"]] if at == 0 else None
            ends = (at - 0.45, at + 0.45)
            axes.plot(ends, (loop, loop), "k--", linewidth=1, label=label, zorder=3)
    axes.set_xticks(range(len(optimizers)), optimizers)
    axes.set_yscale("log")
    values = milliseconds.values()
    axes.set_ylim(0.4 * min(values), 2 * max(values))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("ms per step")
    axes.spines[["top", "right"]].set_visible(False)


def _place(rows: list[Row], threads: int) -> str:
    if rows[0]["device"] != "cpu":
        return "GPU"
    return "1 thread" if threads == 1 else f"{threads} threads"
