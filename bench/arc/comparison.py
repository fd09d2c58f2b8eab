"""The comparison of the paper's section 4 on unseen tasks: runs, tables, goal, plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyoptim import arc

from . import rivals
from .compare import (
    MakeTrainer,
    Outcome,
    best_so_far,
    ranks,
    simulate,
    simulate_alone,
    steps_to,
    threshold_of,
)
from .generate import Cohort
from .results import Results, Row, table
from .schedules import RIVALS, MakePolicy, controlled
from .unseen import UNSEEN, Unseen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SECTION = "unseen"
SEEDS = 5
# The paper's own comparison: its threshold of convergence is the worst of these, and its places.
PAPER = ("constant", "cyclic cosine", "exponential", "arc")
# Okabe and Ito's palette, readable with any colour vision; ours is the strong one.
COLORS = {
    "constant": "#999999",
    "cyclic cosine": "#56B4E9",
    "exponential": "#E69F00",
    "plateau": "#CC79A7",
    "arc": "#D55E00",
    "prodigy": "#0072B2",
    "prodigy, cosine": "#009E73",
    "salsa": "#000000",
}


def policies(
    names: Sequence[str], optimizer: str, others: Mapping[str, MakeTrainer]
) -> dict[str, MakePolicy | MakeTrainer]:
    """What is compared, by name: schedules, "arc" and "arc NAME" of each network, `others`.

    Args:
        names: of `pyoptim.arc.WEIGHTS`.
        optimizer: of the task, one of `generate.OPTIMIZERS`.
    """
    arcs = {
        "arc" if name == "default" else f"arc {name}": controlled(arc.load(name), optimizer)
        for name in names
    }
    found = {**RIVALS, **arcs, **others}
    # A comparison that is cut short then has the paper's part.
    return dict(sorted(found.items(), key=lambda item: item[0] not in PAPER))


def run(tasks: Sequence[str], weights: Sequence[str], results: Results, seeds: int = SEEDS) -> None:
    """Every task under every policy that is not in `results` yet; rows are written one by one."""
    others = rivals.available()
    chosen = {task: policies(weights, UNSEEN[task].optimizer, others) for task in tasks}
    pairs = [(task, name) for name in next(iter(chosen.values())) for task in tasks]
    for number, (task, name) in enumerate(pairs, 1):
        print(f"{number}/{len(pairs)} {task}, {name}", flush=True)
        results.once(
            SECTION, f"{task} | {name}", lambda t=task, n=name: _row(t, n, chosen[t][n], seeds)
        )


def _row(task_name: str, name: str, make: Any, seeds: int) -> Row:
    task = UNSEEN[task_name]
    cohort = Cohort(
        *(0, "unseen", task.optimizer, 0.0, task.epochs, task.steps, task.batch), task.rates
    )
    outcome = _outcome(task, cohort, name, make, seeds)
    return {
        "task": task_name,
        "policy": name,
        "metric": _rounded(outcome.metric[0]),
        "lrs": _rounded(outcome.lrs[0]),
    }


def _outcome(task: Unseen, cohort: Cohort, name: str, make: Any, seeds: int) -> Outcome:
    problem = task.build()
    metric = task.metric(problem)
    if name in RIVALS or name.startswith("arc"):
        return simulate(problem, cohort, {name: make}, seeds, metric)
    return simulate_alone(problem, cohort, make, seeds, metric)


def _rounded(values: Tensor) -> Any:
    """Nested lists with five digits; null where a value is not finite, as JSON wants it."""
    if values.ndim:
        return [_rounded(part) for part in values]
    value = float(values)
    return float(f"{value:.5g}") if math.isfinite(value) else None


def metrics(row: Row) -> Tensor:
    """[rates, seeds, epochs] as stored; one rate for an optimizer that needs none."""
    return _tensor(row["metric"])


def _tensor(values: Any) -> Tensor:
    def known(part: Any) -> Any:
        if isinstance(part, list):
            return [known(p) for p in part]
        return math.nan if part is None else part

    return torch.tensor(known(values), dtype=torch.float64)


def cells(results: Results) -> Iterator[tuple[str, float, dict[str, Tensor]]]:
    """(task, initial rate, policy to [seeds, epochs]) in the order of the tasks."""
    rows = list(results.sections.get(SECTION, {}).values())
    rows.sort(key=lambda row: [*COLORS, row["policy"]].index(row["policy"]))
    for task in dict.fromkeys(row["task"] for row in rows):
        found = {row["policy"]: metrics(row) for row in rows if row["task"] == task}
        for i, rate in enumerate(UNSEEN[task].rates):
            yield task, rate, {name: m[min(i, len(m) - 1)] for name, m in found.items()}


def _summary(task: Unseen, cell: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Per policy: best and final of every run, steps of those that converge, both places."""
    up = task.higher_is_better
    threshold = threshold_of(torch.stack([cell[name] for name in PAPER if name in cell]), up)
    best = {name: best_so_far(m, up)[..., -1].tolist() for name, m in cell.items()}
    means = {name: statistics.mean(values) for name, values in best.items()}
    among = [means[name] for name in PAPER if name in means]
    places = dict(zip(means, ranks(list(means.values()), up), strict=True))
    return {
        name: {
            "best": best[name],
            "final": m[..., -1].tolist(),
            "steps": steps_to(threshold, m, task.steps, up).tolist(),
            "place": places[name],
            "paper": ranks([means[name], *among], up)[0] if name.startswith("arc") else None,
        }
        for name, m in cell.items()
    }


def markdown(results: Results) -> str:
    """A table per task, and the goal."""
    parts: dict[str, list[list[str]]] = {}
    for task, rate, cell in cells(results):
        for name, found in _summary(UNSEEN[task], cell).items():
            parts.setdefault(task, []).append([f"{rate:g}", name, *_line(found)])
    head = ["initial rate", "policy", "best", "final", "steps", "place", "among the paper's"]
    texts = [
        f"{task}, {UNSEEN[task].unit}:\n\n{table(head, lines)}" for task, lines in parts.items()
    ]
    return "\n\n".join([overview(results), goal(results), *texts])


def overview(results: Results) -> str:
    """One line per cell: the best metric of every policy, mean over seeds; the best is bold."""
    found = [(task, rate, _summary(UNSEEN[task], cell)) for task, rate, cell in cells(results)]
    names = list(dict.fromkeys(name for _, _, cell in found for name in cell))
    lines = []
    for task, rate, cell in found:
        line = [task, f"{rate:g}"]
        for name in names:
            if name not in cell:
                line.append("")
                continue
            text = _spread(cell[name]["best"], ".2f")
            line.append(f"**{text}**" if cell[name]["place"] == 1 else text)
        lines.append(line)
    return table(["best metric", "initial rate", *names], lines)


def _line(found: dict[str, Any]) -> list[str]:
    best, final = (_spread(found[key], ".2f") for key in ("best", "final"))
    reached = [s for s in found["steps"] if math.isfinite(s)]
    steps = _spread(reached, ".0f") if reached else "never"
    if 0 < len(reached) < len(found["steps"]):
        steps += f" ({len(reached)} of {len(found['steps'])})"
    return [best, final, steps, str(found["place"]), str(found["paper"] or "")]


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ± {statistics.pstdev(values):{form}}"


def goal(results: Results, name: str = "arc") -> str:
    """In how many cells the goal is met, in words."""
    among_four = among_all = below = runs = count = total = 0
    for task, _, cell in cells(results):
        if name not in cell or "constant" not in cell:
            continue
        found, up = _summary(UNSEEN[task], cell), UNSEEN[task].higher_is_better
        best = found[name]["best"]
        floor = _floor(found["constant"]["best"], up)
        count, total = count + 1, total + len(best)
        among_four += found[name]["paper"] <= 2
        among_all += found[name]["place"] <= 2
        below += _is_worse(statistics.mean(best), floor, up)
        runs += sum(_is_worse(value, floor, up) for value in best)
    return (
        f"{name}: best or second in {among_four} of {count} cells among the paper's four, in "
        f"{among_all} among all; more than a standard deviation of the constant rate's runs below "
        f"their mean in {below} cells, and in {runs} of {total} single runs."
    )


def _floor(constant: Sequence[float], higher_is_better: bool) -> float:
    """The constant rate's mean, one of its standard deviations to the worse."""
    mean, spread = statistics.mean(constant), statistics.pstdev(constant)
    return mean - spread if higher_is_better else mean + spread


def _is_worse(value: float, than: float, higher_is_better: bool) -> bool:
    return value < than if higher_is_better else value > than


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes `arc-unseen.png`, metrics, and `arc-unseen-rates.png`, rates; means over the seeds."""
    return [
        _draw(results, "metric", folder / "arc-unseen.png"),
        _draw(results, "lrs", folder / "arc-unseen-rates.png"),
    ]


def _draw(results: Results, what: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    rows = list(results.sections[SECTION].values())
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(11, 2.7 * len(tasks) + 0.6), layout="constrained")
    panels = figure.subplots(len(tasks), 3, squeeze=False)
    for task, line in zip(tasks, panels, strict=True):
        for i, (rate, axes) in enumerate(zip(UNSEEN[task].rates, line, strict=True)):
            for row in rows:
                if row["task"] == task and row["policy"] in COLORS:
                    _curve(axes, row, what, i)
            axes.set_title(f"{task}, initial rate {rate:g}", fontsize=9)
            axes.grid(alpha=0.3)
        line[0].set_ylabel(UNSEEN[task].unit if what == "metric" else "learning rate")
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    known = [axes.get_legend_handles_labels() for axes in panels.flat]
    by_name = {
        name: line for lines, names in known for line, name in zip(lines, names, strict=True)
    }
    figure.legend(
        by_name.values(),
        by_name.keys(),
        loc="outside lower center",
        ncols=8,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    return path


def _curve(axes: Axes, row: Row, what: str, rate: int) -> None:
    values = _tensor(row[what])
    mean = values[min(rate, len(values) - 1)].nanmean(0)
    name = row["policy"]
    width = 2.2 if name == "arc" else 1.2
    axes.plot(range(1, len(mean) + 1), mean, color=COLORS[name], label=name, linewidth=width)
    log = what == "lrs" or not UNSEEN[row["task"]].higher_is_better
    axes.set_yscale("log" if log else "linear")
