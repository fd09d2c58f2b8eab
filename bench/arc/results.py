"""Runs what judges the controllers, keeps every finished piece in a JSON file, prints tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyoptim import arc

from .choose import (
    RULES,
    closed_loop,
    fold_controllers,
    proxies,
    rule_cohorts,
    shares_lost,
    shares_lost_of,
    under_rules,
)
from .compare import best_so_far
from .generate import Cohort
from .points import KEEP, LOWER, RAISE, Points
from .schedules import RIVALS
from .tasks import TASKS
from .train import BASELINES, RECIPES, Train, cross_validate, decide, leans, regrets, score

Row = dict[str, Any]
# Added to the name of a network that sees the rate, where it is judged as if it did not.
NO_RATE = ", not shown"
LEANS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


class Results:
    """Rows by section and key in a JSON file; a finished row is not made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sections: dict[str, dict[str, Row]] = (
            json.loads(path.read_text()) if path.is_file() else {}
        )

    def once(self, section: str, key: str, make: Callable[[], Row]) -> Row:
        rows = self.sections.setdefault(section, {})
        if key not in rows:
            rows[key] = make()
            partial = self.path.with_suffix(".part")
            partial.write_text(self._text())
            partial.replace(self.path)
            print(f"{section}: {key}", flush=True)
        return rows[key]

    def _text(self) -> str:
        """JSON with one row a line: short files, and a diff that shows what was added."""
        parts = []
        for name, rows in self.sections.items():
            lines = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items()]
            parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
        return "{\n" + ",\n".join(parts) + "\n}\n"


def judge_on_points(
    points: Points, names: Sequence[str], seeds: int, folds: Path, results: Results
) -> None:
    """Leave-families-out scores of the named candidates, with and without validation losses."""
    for name in names:
        for seed in range(seeds):
            key = f"{name} | {seed}"
            results.once("points", key, lambda n=name, s=seed: _point_row(points, n, s, folds))


def _point_row(points: Points, name: str, seed: int, folds: Path) -> Row:
    row: Row = {"name": name, "seed": seed, "points": len(points)}
    if name not in RECIPES:
        return row | _scores(points, BASELINES[name], seed)
    controllers = fold_controllers(points, name, seed, folds)
    for with_rate in (True, False) if RECIPES[name].sees_lr else (True,):
        folds_left = iter(controllers)
        train: Train = lambda _, __, r=with_rate, left=folds_left: partial(  # noqa: E731
            decide, next(left), with_rate=r
        )
        scores = _scores(points, train, seed)
        row |= scores if with_rate else {f"{kind}{NO_RATE}": s for kind, s in scores.items()}
    return row


def _scores(points: Points, train: Train, seed: int) -> Row:
    """By "validation" and "no validation"."""
    found: Row = {}
    for valid, taken in cross_validate(points, train, seed).items():
        result = score(points.select(taken >= 0), taken[taken >= 0])
        found["validation" if valid else "no validation"] = {
            "accuracy": result.accuracy,
            "weighted accuracy": result.weighted_accuracy,
            "opposite": result.opposite,
            "regret": result.regret,
            "confusion": result.confusion.int().tolist(),
        }
    return found


def judge_in_closed_loop(
    points: Points, names: Sequence[str], tasks: Sequence[str], folds: Path, results: Results
) -> None:
    """Whole trainings of held-out families under the named recipes and the fixed rivals."""
    cohorts = [c for c in proxies(tasks) if c.task not in results.sections.get("closed loop", {})]
    if not cohorts:
        return
    controllers = {name: fold_controllers(points, name, 0, folds) for name in names}
    for cohort in cohorts:
        results.once("closed loop", cohort.task, lambda c=cohort: _loop_row(c, controllers))


def _loop_row(cohort: Cohort, controllers: Mapping[str, list[arc.Controller]]) -> Row:
    outcome = closed_loop(cohort, controllers)
    names = [*RIVALS, *controllers]
    return {
        "optimizer": cohort.optimizer,
        "rates": cohort.rates,
        "share lost": dict(zip(names, shares_lost(outcome).tolist(), strict=True)),
    }


def judge_rules(
    points: Points, recipe: str, tasks: Sequence[str], seeds: int, folds: Path, results: Results
) -> None:
    """Whole trainings of held-out families under every rule of `choose.RULES`.

    The networks are those of `seeds` trainings of the rule's recipe, by default `recipe`, which
    take turns over the tasks.
    """
    wanted = dict.fromkeys([None, *(rule.recipe for rule in RULES.values())])
    controllers = [
        {name: fold_controllers(points, name or recipe, seed, folds) for name in wanted}
        for seed in range(seeds)
    ]
    results.once("leans", "all", lambda: _lean_row(points, controllers[0][None]))
    cohorts = rule_cohorts(tasks)
    for number, cohort in enumerate(cohorts, 1):
        print(f"{number}/{len(cohorts)} {cohort.task}, {cohort.optimizer}", flush=True)
        results.once(
            "rules",
            f"{cohort.task} {cohort.index}",
            lambda c=cohort, s=number % seeds: _rule_row(c, controllers[s]),
        )


def _lean_row(points: Points, controllers: Sequence[arc.Controller]) -> Row:
    """What moving and keeping cost where the answer leans little and much, by direction."""
    lean = leans(points, controllers)
    cost = [regrets(points.losses, torch.full((len(points),), k)) for k in (RAISE, KEEP, LOWER)]
    rows = []
    for low, high in pairwise(LEANS):
        row: list[float] = [low, high]
        for move, toward in ((RAISE, lean), (LOWER, -lean)):
            here = (toward > low) & (toward <= high)
            row += [int(here.sum()), *(float(cost[k][here].mean()) for k in (move, KEEP))]
        rows.append(row)
    return {"rows": rows}


def _rule_row(cohort: Cohort, controllers: Mapping[str | None, Sequence[arc.Controller]]) -> Row:
    best = best_so_far(under_rules(cohort, RULES, controllers).metric, higher_is_better=False)
    names = [*RIVALS, *RULES]
    return {
        "optimizer": cohort.optimizer,
        "rates": cohort.rates,
        "best": dict(zip(names, best[..., -1].tolist(), strict=True)),
    }


def ship(points: Points, choices: Mapping[str, str], folder: Path, note: str) -> dict[str, str]:
    """Trains the chosen recipes on all points; name to the SHA-256 of the file that it wrote."""
    folder.mkdir(exist_ok=True)
    return {
        name: arc.save(
            RECIPES[recipe].controller(points, seed=0), folder / f"arc-{name}.safetensors", note
        )
        for name, recipe in choices.items()
    }


def describe(points: Points) -> Row:
    """Counts of the data set, for the model card."""
    confirmed = float((points.labels == points.raw_labels).double().mean())
    return {
        "points": len(points),
        "runs": len(points.runs.unique()),
        "labels": torch.bincount(points.labels, minlength=3).tolist(),
        "raw labels": torch.bincount(points.raw_labels, minlength=3).tolist(),
        "unchanged by the repeat": confirmed,
        "with a branch that is not finite": int((~points.losses.isfinite()).any(1).sum()),
        "tasks": {
            task: {
                "family": TASKS[task].family,
                "points": int((points.tasks == task).sum()),
                "labels": torch.bincount(
                    points.labels[torch.from_numpy(points.tasks == task)], minlength=3
                ).tolist(),
            }
            for task in TASKS
        },
        "optimizers": {
            str(o): int((points.optimizers == o).sum()) for o in np.unique(points.optimizers)
        },
    }


def markdown(results: Results) -> str:
    """All sections as tables."""
    tables = {
        "points": _points_table,
        "closed loop": _loop_table,
        "leans": _leans_table,
        "rules": _rules_table,
    }
    return "\n\n".join(
        make(list(results.sections[name].items()))
        for name, make in tables.items()
        if name in results.sections
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _points_table(rows: list[tuple[str, Row]]) -> str:
    names = dict.fromkeys(
        (row["name"], part)
        for _, row in rows
        for part in ("", NO_RATE)
        if f"validation{part}" in row
    )
    lines = []
    for name, part in names:
        line = [f"{name}{part}"]
        for kind in (f"validation{part}", f"no validation{part}"):
            scores = [row[kind] for _, row in rows if row["name"] == name]
            line += [
                f"{100 * statistics.mean(s[measure] for s in scores):.1f}"
                for measure in ("accuracy", "weighted accuracy", "opposite", "regret")
            ]
        lines.append(line)
    head = ["%", "accuracy", "weighted", "opposite", "regret"]
    return table([*head, *(f"{h}, no validation" for h in head[1:])], lines)


def _loop_table(rows: list[tuple[str, Row]]) -> str:
    names = list(rows[0][1]["share lost"])
    lines = []
    for name in names:
        shares = torch.tensor([row["share lost"][name] for _, row in rows])
        cells = [*shares.mean(0).tolist(), float(shares.mean())]
        lines.append([name, *(f"{100 * cell:.0f}" for cell in cells)])
    return table(["share lost, %", "small rate", "usual", "large", "all"], lines)


def _leans_table(rows: list[tuple[str, Row]]) -> str:
    lines = [
        [
            f"{low:g} to {high:g}",
            *(f"{100 * x:.0f}" if isinstance(x, float) else str(x) for x in rest),
        ]
        for low, high, *rest in rows[0][1]["rows"]
    ]
    up, down = (["points", f"{move}: regret, %", "keep: regret, %"] for move in ("raise", "lower"))
    head = ["lean", *(f"{h}, up" for h in up), *(f"{h}, down" for h in down)]
    return table(head, lines)


def _rules_table(rows: list[tuple[str, Row]]) -> str:
    names = list(rows[0][1]["best"])
    best = torch.tensor([[row["best"][name] for name in names] for _, row in rows])
    shares = torch.stack([shares_lost_of(task) for task in best]).mean(0)  # [policies, rates]
    second, worse = _seconds(best, names), _worse(best)
    lines = []
    for i, name in enumerate(names):
        cells = [*shares[i].tolist(), float(shares[i].mean()), float(second[i]), float(worse[i])]
        lines.append([name, *(f"{100 * cell:.0f}" for cell in cells)])
    head = ["share lost, %", "large rate", "middle", "small", "all"]
    return table([*head, "best or second, %", "worse than constant, %"], lines)


def _seconds(best: Tensor, names: Sequence[str]) -> Tensor:
    """Share of cells in which a policy is first or second among itself and the paper's three."""
    means = best.mean(3)  # [tasks, policies, rates]
    rivals = [names.index(name) for name in ("constant", "cyclic cosine", "exponential")]
    places = []
    for p in range(len(names)):
        others = means[:, [r for r in rivals if r != p]]
        places.append((others < means[:, p : p + 1]).sum(1) < 2)
    return torch.stack(places).double().mean((1, 2))


def _worse(best: Tensor) -> Tensor:
    """Share of cells in which a policy's mean is worse than constant by more than its deviation."""
    mean, spread = best.mean(3), best[:, :1].std(3, correction=0)
    return (mean - mean[:, :1] > spread).double().mean((0, 2))
