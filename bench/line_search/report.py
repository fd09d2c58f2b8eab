"""Tables and plots of the line searches."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arc.compare import ranks
from ..report import markdown_table
from .methods import METHODS
from .overhead import OVERHEAD_TASKS
from .tasks import TASKS
from .train import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sections = Mapping[str, Mapping[str, Row]]
SERIES = {
    "loss": "training loss",
    "metric": "validation metric",
    "step size": "step size or rate",
    "trials": "trials per step",
}
# Okabe and Ito's palette, readable with any colour vision.
COLORS = {
    "SaLSa": "#D55E00",
    "SaLSa as released": "#E69F00",
    "AdamSLS": "#CC79A7",
    "SLS": "#999999",
    "Adam, tuned, cosine": "#0072B2",
    "SGD, tuned, cosine": "#009E73",
}


def rows_of(sections: Sections, task: str) -> dict[str, list[Row]]:
    """By method, in the order of the study; a row per seed."""
    found: dict[str, list[Row]] = {name: [] for name in METHODS}
    for key, row in sections.get("runs", {}).items():
        of_task, method, _ = key.split(" | ")
        if of_task == task and method in found:
            found[method].append(row)
    return {method: rows for method, rows in found.items() if rows}


def report(sections: Sections) -> str:
    """All tables."""
    shown = [task for task in TASKS if rows_of(sections, task)]
    parts = [_places(sections, shown)] if shown else []
    parts += [_section(sections, task) for task in shown]
    if sections.get("overhead"):
        parts.append(_overhead(sections))
    if sections.get("stacked"):
        parts.append(_stacked(sections))
    return "\n\n".join(parts) or "no results"


def _section(sections: Sections, task: str) -> str:
    lines = []
    for method, rows in rows_of(sections, task).items():
        rate = rows[0]["rate"]
        trials = [row["trials"] / row["steps"] for row in rows]
        lines.append(
            [
                method,
                "own" if rate is None else f"{rate:g}",
                _mean_and_deviation([row["train loss"] for row in rows]),
                _mean_and_deviation([row["test"] for row in rows]),
                "-" if rate is not None else f"{statistics.mean(trials):.2f}",
                f"{statistics.mean(row['seconds'] for row in rows):.1f}",
            ]
        )
    metric = TASKS[task].metric_name
    head = ["method", "rate", "training loss", f"test {metric}", "trials per step", "CPU s"]
    steps = next(iter(rows_of(sections, task).values()))[0]["steps"]
    return f"**{TASKS[task].title}**, {steps} steps\n\n{markdown_table(head, lines)}"


def _mean_and_deviation(values: Sequence[float]) -> str:
    if max(values) >= 1e30:
        return f"diverged in {sum(v >= 1e30 for v in values)} of {len(values)}"
    return f"{statistics.mean(values):.4f} ± {statistics.pstdev(values):.4f}"


def _places(sections: Sections, tasks: Sequence[str]) -> str:
    """The mean place of every method over the tasks, by training loss and by test metric."""
    found = [rows_of(sections, task) for task in tasks]
    methods = [m for m in METHODS if all(m in rows for rows in found)]
    columns = []
    for name, is_more_better in (("train loss", False), ("test", True)):
        means = [[statistics.mean(r[name] for r in rows[m]) for m in methods] for rows in found]
        places = zip(*(ranks(m, is_more_better) for m in means), strict=True)
        columns.append([statistics.mean(p) for p in places])
    lines = [[m, *(f"{c[i]:.2f}" for c in columns)] for i, m in enumerate(methods)]
    n_seeds = min(len(rows[m]) for rows in found for m in methods)
    title = f"**Mean place over {len(tasks)} tasks, {n_seeds} seeds**"
    return f"{title}\n\n{markdown_table(['method', 'by training loss', 'by test metric'], lines)}"


def _overhead(sections: Sections) -> str:
    found: dict[tuple[str, str], list[Row]] = {}
    for key, row in sections["overhead"].items():
        task, method, _ = key.split(" | ")
        found.setdefault((task, method), []).append(row)
    lines = []
    for (task, method), rows in sorted(found.items(), key=lambda e: OVERHEAD_TASKS.index(e[0][0])):
        shares = [
            statistics.median(r[name] for r in rows)
            for name in ("first epoch", "after it", "whole")
        ]
        trials = statistics.mean(row["trials"] / row["steps"] for row in rows)
        lines.append([method, task, *(f"{100 * s:.1f} %" for s in shares), f"{trials:.2f}"])
    head = ["method", "task", "first epoch", "after it", "whole", "trials per step"]
    title = "**Time beyond the same training with pyoptim's Adam**, medians over seeds"
    return f"{title}\n\n{markdown_table(head, lines)}"


def _stacked(sections: Sections) -> str:
    lines = []
    for key, row in sections["stacked"].items():
        task, n = key.split(" | ")
        lines.append([task, n, f"{row['ms in a row']:.2f}", f"{row['share']:.2f}"])
    head = ["task", "trials", "in a row, ms", "at once, times that"]
    title = "**Several trials in one forward pass of stacked weights**"
    return f"{title}\n\n{markdown_table(head, lines)}"


# -- plots -----------------------------------------------------------------------------------------


def draw(sections: Sections, path: Path) -> Path:
    """A row of panels per task: loss, metric, step size and trials; means and range over seeds.

    Raises: ImportError where matplotlib is missing.
    """
    from matplotlib.figure import Figure

    shown = [task for task in TASKS if rows_of(sections, task)]
    figure = Figure(figsize=(3.4 * len(SERIES), 2.6 * len(shown) + 0.6), layout="constrained")
    panels = figure.subplots(len(shown), len(SERIES), squeeze=False)
    for axes_row, task in zip(panels, shown, strict=True):
        for axes, series in zip(axes_row, SERIES, strict=True):
            _panel(axes, rows_of(sections, task), series)
        axes_row[0].set_ylabel(TASKS[task].title)
    for axes, title in zip(panels[0], SERIES.values(), strict=True):
        axes.set_title(title)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=90)
    return path


def _panel(axes: Axes, found: Mapping[str, Sequence[Row]], series: str) -> None:
    for method in (name for name in COLORS if name in found):
        curves: list[dict[str, Any]] = [row["curve"] for row in found[method]]
        points = list(zip(*(curve[series] for curve in curves), strict=True))
        steps, color = curves[0]["step"], COLORS[method]
        axes.fill_between(steps, [*map(min, points)], [*map(max, points)], color=color, alpha=0.15)
        axes.plot(steps, [*map(statistics.mean, points)], color=color, label=method)
    if series in ("loss", "step size"):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
