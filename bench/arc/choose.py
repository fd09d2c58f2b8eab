"""Closed loop: whole trainings of held-out families, steered by controllers that never saw them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyoptim.arc import Controller, load, save

from .compare import Outcome, best_so_far, simulate
from .generate import Cohort, draw_cohort
from .points import Points
from .schedules import RIVALS, MakePolicy, controlled
from .tasks import TASKS
from .train import FOLDS, RECIPES

EPOCHS = 28
SEEDS = 3
RULE_STEPS = 20
# Per optimizer: far too small, usual, at the edge.
START_RATES = {
    "adam": (3e-5, 1e-3, 3e-2),
    "rmsprop": (3e-5, 1e-3, 3e-2),
    "sgd": (3e-3, 0.1, 1.0),
    "momentum": (3e-4, 1e-2, 0.1),
}


# Factors of 100 as in the comparison; every task survives the largest.
RULE_RATES = {
    "adam": (1e-2, 1e-3, 1e-4),
    "rmsprop": (1e-2, 1e-3, 1e-4),
    "sgd": (1.0, 0.1, 0.01),
    "momentum": (0.1, 0.01, 1e-3),
}
RULE_DRAWS = 2
PAPER_RULE: dict[str, Any] = {"margins": None, "final_decay": 0.0}


@dataclass(frozen=True)
class Rule:
    """What the scheduler does with the answers of a network.

    Args:
        options: of `pyoptim.lr_scheduler.ARC`.
        recipe: of the network; None is the one that ships.
    """

    options: Mapping[str, Any]
    recipe: str | None = None


FORMER = "perceptrons, half soft"  # sees how the rate changed, not the rate
RULES = {
    "the paper's": Rule(PAPER_RULE),
    "margins 0.4, 0.4, final decay": Rule({"margins": (0.4, 0.4)}),
    "the same, optimizer unknown": Rule({"margins": (0.4, 0.4), "usual_lr": None}),
    "the same, a network that does not see the rate": Rule({"margins": (0.4, 0.4)}, FORMER),
}


def rule_cohorts(tasks: Sequence[str]) -> list[Cohort]:
    """Whole trainings for judging the rules: two draws of each task, other optimizers in each."""
    optimizers, cohorts = list(RULE_RATES), []
    for draw in range(RULE_DRAWS):
        for i, task in enumerate(tasks):
            optimizer = optimizers[(i + 2 * draw + i // 4) % 4]
            cohort = replace(
                draw_cohort(20_000 + 100 * draw + i),
                task=task,
                optimizer=optimizer,
                weight_decay=0.0,
                epochs=EPOCHS,
                steps=RULE_STEPS,
                batch=16,
                rates=RULE_RATES[optimizer],
            )
            cohorts.append(cohort)
    return cohorts


def proxies(tasks: Sequence[str]) -> list[Cohort]:
    """One cohort of whole trainings per task; the optimizers take turns."""
    optimizers = list(START_RATES)
    return [
        replace(
            draw_cohort(10_000 + i),
            task=task,
            optimizer=optimizers[i % len(optimizers)],
            epochs=EPOCHS,
            steps=20,
            batch=16,
            rates=START_RATES[optimizers[i % len(optimizers)]],
        )
        for i, task in enumerate(tasks)
    ]


def fold_controllers(points: Points, name: str, seed: int, folder: Path) -> list[Controller]:
    """One controller of the named recipe per fold, which never saw that fold's families.

    They are kept in `folder`, under the number of points, and not trained again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    controllers = []
    for i, fold in enumerate(FOLDS):
        title = re.sub(r"\W+", "-", name)
        path = folder / f"{title}-seed{seed}-fold{i}-{len(points)}.safetensors"
        if not path.is_file():
            seen = torch.from_numpy(~np.isin(points.families, fold))
            save(RECIPES[name].controller(points.select(seen), seed), path)
        controllers.append(load(path))
    return controllers


def closed_loop(cohort: Cohort, controllers: Mapping[str, list[Controller]]) -> Outcome:
    """The task of a cohort under the rivals and the controllers of the fold that holds it out.

    The likeliest answer is followed, every third epoch, to the end.
    """
    fold = _fold_of(cohort)
    return _outcome(
        cohort,
        {
            name: controlled(by_fold[fold], cohort.optimizer, interval=3, **PAPER_RULE)
            for name, by_fold in controllers.items()
        },
    )


def under_rules(
    cohort: Cohort,
    rules: Mapping[str, Rule],
    controllers: Mapping[str | None, Sequence[Controller]],
) -> Outcome:
    """The task of a cohort under the rivals, and under every rule.

    Args:
        controllers: of the recipe of each rule, by fold.
    """
    fold = _fold_of(cohort)
    return _outcome(
        cohort,
        {
            name: controlled(controllers[rule.recipe][fold], cohort.optimizer, **rule.options)
            for name, rule in rules.items()
        },
    )


def _fold_of(cohort: Cohort) -> int:
    family = TASKS[cohort.task].family
    return next(i for i, families in enumerate(FOLDS) if family in families)


def _outcome(cohort: Cohort, policies: Mapping[str, MakePolicy]) -> Outcome:
    draw, rng = random.Random(cohort.index), torch.Generator().manual_seed(cohort.index)
    problem = TASKS[cohort.task].build(draw, rng)
    return simulate(problem, cohort, {**RIVALS, **policies}, SEEDS, problem.losses)


def shares_lost(outcome: Outcome) -> Tensor:
    """How far each policy's best loss is from the best policy's, [policies, rates].

    Mean over seeds of (loss - best)/scale: the best policy of the same start, and as scale the gap
    between the best and the worst of all starts, so that differences within the noise count little.
    A loss that was never finite counts 1.
    """
    return shares_lost_of(best_so_far(outcome.metric, higher_is_better=False)[..., -1])


def shares_lost_of(final: Tensor) -> Tensor:
    """See `shares_lost`; `final` is the best loss of every run, [policies, rates, seeds]."""
    best, alive = final.amin(0), final.where(final.isfinite(), -torch.inf)
    scale = (alive.amax((0, 1)) - final.amin((0, 1))).clamp_min(1e-12)
    return ((final - best) / scale).nan_to_num(nan=1.0, posinf=1.0).clamp(0, 1).mean(2)
