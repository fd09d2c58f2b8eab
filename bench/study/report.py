"""Tables beside the paper's table 1, and learning curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arc.compare import ranks
from ..report import markdown_table
from .choices import IN_PAPER, NONE, SCHEDULES
from .tasks import TASKS, Task
from .train import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sections = Mapping[str, Mapping[str, Row]]
Cells = dict[str, dict[str, list[Row]]]  # optimizer, schedule: a row per seed
# Okabe and Ito's palette, readable with any colour vision.
COLORS = dict(zip(SCHEDULES, ("#999999", "#0072B2", "#009E73", "#E69F00", "#D55E00"), strict=True))


def cells(sections: Sections, task: str) -> Cells:
    """The rows of a task, in the order of the study."""
    found: Cells = {}
    for key, row in sections.get("runs", {}).items():
        of_task, optimizer, schedule, _ = key.split(" | ")
        if of_task == task:
            found.setdefault(optimizer, {}).setdefault(schedule, []).append(row)
    return found


def report(sections: Sections) -> str:
    """All tables."""
    shown = [task for task in TASKS if cells(sections, task)]
    parts = [_section(sections, task) for task in shown]
    return "\n\n".join([*parts, _places(sections, shown)]) if parts else "no results"


def _section(sections: Sections, task: str) -> str:
    settings = sections["settings"][task]
    train, valid, test = settings["examples"]
    title = f"**{TASKS[task].title.capitalize()}: {TASKS[task].metric_name} on the test part**"
    about = (
        f"{settings['data']}, {train:,} examples to train, {valid:,} to choose, {test:,} to test; "
        f"{settings['epochs']} epochs of {settings['steps per epoch']} steps, batch "
        f"{settings['batch']}. Beside it the paper's: {TASKS[task].paper_data}."
    )
    if TASKS[task].metric_name == "accuracy":
        share = f"{settings['most frequent']:.3f}"
        about += f" Always to name the most frequent class has an accuracy of {share}."
    return f"{title}\n\n{about}\n\n{_table(sections, task)}"


def _table(sections: Sections, task: str) -> str:
    head = ["optimizer", "lr"]
    for schedule in SCHEDULES:
        head += [schedule, f"{schedule}, paper"] if schedule in IN_PAPER else [schedule]
    lines = []
    for optimizer, by_schedule in cells(sections, task).items():
        rate = next(iter(by_schedule.values()))[0]["rate"]
        line = [optimizer, "own" if rate is None else f"{rate:.2g}"]
        for schedule in SCHEDULES:
            line.append(_mean_and_deviation(by_schedule.get(schedule, [])))
            if schedule in IN_PAPER:
                line.append(_papers(TASKS[task], optimizer, schedule))
        lines.append(line)
    return markdown_table(head, lines)


def _mean_and_deviation(rows: Sequence[Row]) -> str:
    scores = [row["test"] for row in rows]
    if not scores:
        return "-"
    return f"{statistics.mean(scores):.3f} ± {statistics.pstdev(scores):.3f}"


def _papers(task: Task, optimizer: str, schedule: str) -> str:
    figures = task.figures.get(optimizer)
    return f"{figures[IN_PAPER.index(schedule)]:.3f}" if figures else "-"


def _places(sections: Sections, tasks: Sequence[str]) -> str:
    """Mean place of every combination; those that some task lacks are left out."""
    means: dict[tuple[str, str], list[float]] = {}
    for task in tasks:
        for optimizer, by_schedule in cells(sections, task).items():
            for schedule, rows in by_schedule.items():
                mean = statistics.mean(row["test"] for row in rows)
                means.setdefault((optimizer, schedule), []).append(mean)
    full = {key: scores for key, scores in means.items() if len(scores) == len(tasks)}
    columns = [ranks(scores, True) for scores in zip(*full.values(), strict=True)]
    mean_place = dict(zip(full, map(statistics.mean, zip(*columns, strict=True)), strict=True))
    lines = [
        [name, *(f"{mean_place[name, s]:.1f}" if (name, s) in full else "-" for s in SCHEDULES)]
        for name in dict.fromkeys(name for name, _ in full)
    ]
    title = f"**Mean place among all {len(full)} combinations, over {len(tasks)} tasks**"
    return f"{title}\n\n{markdown_table(['optimizer', *SCHEDULES], lines)}"


# -- plots -----------------------------------------------------------------------------------------


def draw(sections: Sections, stem: Path) -> list[Path]:
    """`<stem>-<task>.png`: a panel per optimizer, a line per schedule.

    Raises: ImportError where matplotlib is missing.
    """
    shown = [task for task in TASKS if cells(sections, task)]
    return [_figure(sections, task, stem.with_name(f"{stem.name}-{task}.png")) for task in shown]


def _figure(sections: Sections, task: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    found = cells(sections, task)
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (optimizer, by_schedule) in zip(panels.flat, found.items(), strict=False):
        _panel(axes, optimizer, by_schedule)
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"{TASKS[task].title}, {sections['settings'][task]['data']}")
    figure.supylabel(f"{TASKS[task].metric_name}, validation part")
    figure.savefig(path, dpi=100)
    return path


def _panel(axes: Axes, optimizer: str, by_schedule: Mapping[str, Sequence[Row]]) -> None:
    """Means over the seeds, and all of their range as a band."""
    for schedule in (name for name in SCHEDULES if name in by_schedule):
        curves: list[dict[str, Any]] = [row["curve"] for row in by_schedule[schedule]]
        points = list(zip(*(curve["metric"] for curve in curves), strict=True))
        epochs, color = curves[0]["epoch"], COLORS[schedule]
        axes.fill_between(epochs, [*map(min, points)], [*map(max, points)], color=color, alpha=0.15)
        axes.plot(epochs, [*map(statistics.mean, points)], color=color, label=schedule)
    axes.set_title(f"{optimizer}, its own rate" if [*by_schedule] == [NONE] else optimizer)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
