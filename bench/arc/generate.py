"""Makes labelled points by branching real trainings: section 3.2 and 3.3 of the ARC paper.

A *run* is a training of 11 cycles of n epochs. After each of its first ten cycles three *branches*
leave it, one cycle each at 1.618, 1 and 0.618 times its rate; the run then follows one of them by
training that cycle again, which gives the *repeat* that the label is corrected with. Runs that
share task, sizes, n and optimizer train together as one stack of networks: a *cohort*, one file.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyoptim
from pyoptim import arc

from .layers import Replicas, create
from .tasks import TASKS, Batch, Problem

FACTORS = (1.618, 1.0, 0.618)  # raise, keep, lower
RUNS = 6  # per cohort; three times as many branches train at once
ROUNDS = 10
# How often the worst branch is followed, if it is finite: the paper's scheme never does, and its
# controller then raises the rate of a diverging training.
FOLLOW_WORST = 0.1
# Log-uniform starts. The paper's 1e-5..1e-2 is widened to where every task diverges.
RATES = {"adam": (1e-5, 1e-1), "rmsprop": (1e-5, 1e-1), "sgd": (1e-3, 3.0), "momentum": (1e-4, 1.0)}
OPTIMIZERS: dict[str, tuple[Any, dict[str, float]]] = {
    "adam": (pyoptim.Adam, {}),
    "rmsprop": (pyoptim.RMSprop, {}),
    "sgd": (pyoptim.SGD, {}),
    "momentum": (pyoptim.SGD, {"momentum": 0.9}),
}


def usual_lr(optimizer: str) -> float:
    """Of one of `OPTIMIZERS`, as `pyoptim.arc.usual_lr` finds it."""
    cls, options = OPTIMIZERS[optimizer]
    found = arc.usual_lr(cls([torch.zeros(1)], lr=1.0, **options))
    assert found is not None
    return found


@dataclass(frozen=True)
class Cohort:
    """What the runs of one file share, and the initial rate of each of them."""

    index: int
    task: str
    optimizer: str
    weight_decay: float
    epochs: int  # per cycle, the paper's n
    steps: int  # per epoch
    batch: int
    rates: tuple[float, ...]


def draw_cohort(index: int) -> Cohort:
    """The cohort of this index, the same on every machine; tasks take turns."""
    draw = random.Random(index)
    task = list(TASKS)[index % len(TASKS)]
    optimizer = draw.choice(["adam", "adam", "rmsprop", "rmsprop", "sgd", "momentum"])
    low, high = (math.log(rate) for rate in RATES[optimizer])
    return Cohort(
        index=index,
        task=task,
        optimizer=optimizer,
        weight_decay=draw.choice([0.0, 0.0, 1e-4, 1e-2]),
        epochs=draw.randint(1, 10),
        steps=draw.choice(TASKS[task].steps),
        batch=draw.choice([16, 32]),
        rates=tuple(math.exp(draw.uniform(low, high)) for _ in range(RUNS)),
    )


class Stack:
    """Replicas with one optimizer, in which each replica is a group with a rate of its own."""

    def __init__(self, cohort: Cohort, replicas: Replicas) -> None:
        self.replicas = replicas
        cls, options = OPTIMIZERS[cohort.optimizer]
        groups = [{"params": self._views(b)} for b in range(replicas.count)]
        self.optimizer = cls(groups, lr=0.0, weight_decay=cohort.weight_decay, **options)

    def _views(self, replica: int) -> list[Tensor]:
        views = []
        for param in self.replicas.params.values():
            view, grad = param.data[replica], param.grad
            assert grad is not None
            view.grad = grad[replica]
            views.append(view)
        return views

    def set_rates(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def load(self, other: Stack, sources: Sequence[int]) -> None:
        """Replica b becomes a copy of `other`'s replica `sources[b]`, optimizer state included."""
        index = torch.tensor(sources)
        for name, param in self.replicas.params.items():
            param.data.copy_(other.replicas.params[name].data[index])
        for name, buffer in self.replicas.buffers.items():
            buffer.copy_(other.replicas.buffers[name][index])
        for group, source in zip(self.optimizer.param_groups, sources, strict=True):
            origin = other.optimizer.param_groups[source]["params"]
            for param, old in zip(group["params"], origin, strict=True):
                state = other.optimizer.state[old]
                self.optimizer.state[param] = {k: v.clone() for k, v in state.items()}

    def step(self, problem: Problem, batch: Batch) -> Tensor:
        for param in self.replicas.params.values():
            assert param.grad is not None
            param.grad.zero_()
        losses = problem.losses(self.replicas, batch)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()

    def validate(self, problem: Problem) -> Tensor:
        self.replicas.training = False
        batch = tuple(t.expand(self.replicas.count, *t.shape) for t in problem.valid)
        with torch.no_grad():
            losses = problem.losses(self.replicas, batch)
        self.replicas.training = True
        return losses.detach()


def epoch_order(replicas: int, rows: int, needed: int, rng: torch.Generator) -> Tensor:
    """[replicas, needed] row numbers: as many shuffled passes as needed, an order per replica."""
    passes = -(-needed // rows)
    shuffled = torch.rand(replicas, passes, rows, generator=rng).argsort(2)
    return shuffled.flatten(1)[:, :needed]


def train_cycle(
    stack: Stack, problem: Problem, cohort: Cohort, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Trains one cycle; per-step training losses [B, n*steps], per-epoch validation [B, n]."""
    train, valid = [], []
    needed = cohort.steps * cohort.batch
    for _ in range(cohort.epochs):
        order = epoch_order(stack.replicas.count, len(problem.train[0]), needed, rng)
        for rows in order.split(cohort.batch, 1):
            train.append(stack.step(problem, tuple(t[rows] for t in problem.train)))
        valid.append(stack.validate(problem))
    return torch.stack(train, 1), torch.stack(valid, 1)


def follow(losses: Sequence[float], draw: random.Random) -> int:
    """The branch to go on with: one of the better two, now and then the worst; never a dead one."""
    ranked = sorted(range(3), key=lambda i: (not math.isfinite(losses[i]), losses[i]))
    alive = [i for i in ranked if math.isfinite(losses[i])]
    if not alive:
        return 2
    if len(alive) == 3 and draw.random() < FOLLOW_WORST:
        return ranked[2]
    return draw.choice(alive[:2])


def run_cohort(cohort: Cohort) -> dict[str, np.ndarray]:
    """All runs of a cohort.

    Returns: train_losses [runs, 11, n*steps], val_losses [runs, 11, n], lrs [runs, 11],
        branch_losses [runs, 10, 3, n] (validation, by epoch; raise, keep, lower),
        branch_train [runs, 10, 3] (mean training loss of the last epoch), followed [runs, 10].
        The repeat of round i is val_losses[:, i + 1, -1], of branch followed[:, i].
    """
    draw = random.Random(f"run {cohort.index}")
    rng = torch.Generator().manual_seed(cohort.index)
    torch.manual_seed(cohort.index)  # dropout
    problem = TASKS[cohort.task].build(draw, rng)
    runs = len(cohort.rates)
    main = Stack(cohort, create(problem.layers, runs, rng))
    branches = Stack(cohort, create(problem.layers, 3 * runs, rng))
    lrs = list(cohort.rates)
    record: dict[str, list[Any]] = {name: [] for name in FIELDS}
    for round_ in range(ROUNDS + 1):
        main.set_rates(lrs)
        train, valid = train_cycle(main, problem, cohort, rng)
        for name, value in zip(FIELDS[:3], (train, valid, torch.tensor(lrs)), strict=True):
            record[name].append(value.numpy())
        if round_ == ROUNDS:
            break
        branches.load(main, [b // 3 for b in range(3 * runs)])
        branches.set_rates([lr * factor for lr in lrs for factor in FACTORS])
        train, valid = train_cycle(branches, problem, cohort, rng)
        final = valid[:, -1].reshape(runs, 3)
        chosen = [follow(row, draw) for row in final.tolist()]
        lrs = [lr * FACTORS[c] for lr, c in zip(lrs, chosen, strict=True)]
        last = train[:, -cohort.steps :].mean(1)
        for name, value in zip(
            FIELDS[3:], (valid.reshape(runs, 3, -1), last.reshape(runs, 3), chosen), strict=True
        ):
            record[name].append(np.asarray(value))
    return {name: np.stack(values, 1) for name, values in record.items()}


FIELDS = ("train_losses", "val_losses", "lrs", "branch_losses", "branch_train", "followed")


def expense(cohort: Cohort) -> int:
    """About proportional to the time that a cohort takes."""
    # Tasks with long epochs have them because a step costs about a fifth of the others' (measured).
    per_step = 1 if max(TASKS[cohort.task].steps) > 32 else 5
    return cohort.epochs * cohort.steps * cohort.batch * per_step


def cohort_path(folder: Path, cohort: Cohort) -> Path:
    return folder / f"cohort-{cohort.index:05d}.npz"


def write_cohort(folder: Path, cohort: Cohort) -> float:
    """Makes a cohort's file; a half-written one is never seen. Returns the CPU seconds used."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    begin = time.process_time()
    arrays = run_cohort(cohort)
    seconds = time.process_time() - begin
    meta = {**asdict(cohort), "family": TASKS[cohort.task].family, "seconds": seconds}
    path = cohort_path(folder, cohort)
    partial = path.with_suffix(f".{os.getpid()}.part")
    with partial.open("wb") as file:
        np.savez_compressed(file, meta=np.array(repr(meta)), **arrays)
    partial.replace(path)
    return seconds


def generate(folder: Path, cohorts: Sequence[Cohort], workers: int) -> None:
    """Makes the missing ones of `cohorts`, `workers` processes at a time, with progress.

    The cheap ones come first, so that a campaign that is cut short has the most points.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [c for c in cohorts if not cohort_path(folder, c).exists()]
    missing.sort(key=expense)
    print(f"{len(cohorts) - len(missing)} of {len(cohorts)} cohorts are there", flush=True)
    begin = time.monotonic()
    for done, (cohort, seconds) in enumerate(_written(folder, missing, workers), 1):
        rate = done / (time.monotonic() - begin) * 60
        print(
            f"{len(cohorts) - len(missing) + done}/{len(cohorts)} {cohort.task} {seconds:.1f} s; "
            f"{rate * RUNS * ROUNDS:.0f} points/min, {(len(missing) - done) / rate:.0f} min left",
            flush=True,
        )


def _written(
    folder: Path, cohorts: Sequence[Cohort], workers: int
) -> Iterator[tuple[Cohort, float]]:
    """Each cohort as its file is done."""
    if workers == 1:
        yield from ((cohort, write_cohort(folder, cohort)) for cohort in cohorts)
        return
    # Not forked: OpenMP threads do not survive a fork, and the child would wait for them for ever.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(write_cohort, folder, cohort): cohort for cohort in cohorts}
        for future in as_completed(futures):
            yield futures[future], future.result()
