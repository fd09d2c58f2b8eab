"""One training, and the choice of a learning rate by a few of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyoptim import lr_scheduler
from pyoptim.line_search import LineSearch

from ..study.train import batches, evaluate
from .methods import METHODS
from .tasks import TASKS, Data, Task, load

Row = dict[str, Any]
TUNING_SEED = 1000  # no seed of the study
MARKS = 10  # points of a curve
# Of the training part, to evaluate the loss at the end: of images in random order, and nearly all
# sequences. Of the other tasks all; the table is sorted by what its rows come from.
MOST_EXAMPLES = {"images": 3000, "sequences": 3000}


@dataclass(frozen=True)
class Job:
    """One training."""

    task: str
    method: str
    seed: int
    rate: float | None

    @property
    def key(self) -> str:
        return f"{self.task} | {self.method} | {self.seed}"


class Recorder:
    """Means between marks of the loss, the step size and the trials, and evaluations at marks."""

    def __init__(self) -> None:
        self.curve: dict[str, list[float]] = {
            name: [] for name in ("step", "loss", "step size", "trials", "metric")
        }
        self._losses: list[Tensor] = []
        self._trials = 0

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss)

    def mark(self, step: int, optimizer: Any, metric: float) -> None:
        trials = optimizer.n_trials if isinstance(optimizer, LineSearch) else 0
        per_step = (trials - self._trials) / len(self._losses)
        loss, rate = torch.stack(self._losses).mean().item(), optimizer.param_groups[0]["lr"]
        for series, value in zip(
            self.curve.values(), (step, loss, float(rate), per_step, metric), strict=True
        ):
            series.append(_rounded(value))
        self._losses, self._trials = [], trials


def _rounded(value: float) -> float:
    """Five digits; 1e30 for what is not finite, which JSON has no word for."""
    return float(f"{value:.5g}") if math.isfinite(value) else 1e30


def run(job: Job) -> Row:
    """Trains, and evaluates the test part once, at the end."""
    found, task = load(job.task), TASKS[job.task]
    begin = time.process_time()
    network, optimizer, curve = train(job, task, found)
    seconds = time.process_time() - begin
    some = tuple(part[: MOST_EXAMPLES.get(job.task)] for part in found.train)
    train_loss, (test, test_loss) = (
        evaluate(task, network, some)[1],
        evaluate(task, network, found.test),
    )
    return {
        "rate": job.rate,
        "train loss": _rounded(train_loss),
        "test": _rounded(test),
        "test loss": _rounded(test_loss),
        "searches": getattr(optimizer, "n_searches", 0),
        "trials": getattr(optimizer, "n_trials", 0),
        "steps": task.epochs * found.steps,
        "seconds": round(seconds, 2),
        "curve": curve,
    }


def train(job: Job, task: Task, found: Data) -> tuple[nn.Module, Any, dict[str, list[float]]]:
    """Seeds fix the start and the order of the data, for all methods alike."""
    torch.manual_seed(job.seed)
    network, method = task.network(found), METHODS[job.method]
    optimizer = method.make(list(network.parameters()), found.steps, job.rate)
    total, recorder = task.epochs * found.steps, Recorder()
    scheduler = lr_scheduler.cosine(optimizer, total) if method.has_cosine else None
    marks = {max(1, round(total * i / MARKS)) for i in range(1, MARKS + 1)}
    for step, loss in enumerate(losses(network, optimizer, task, found, job.seed), 1):
        recorder.add(loss)
        if step in marks:
            recorder.mark(step, optimizer, evaluate(task, network, found.valid)[0])
        if scheduler is not None:
            scheduler.step()
    return network, optimizer, recorder.curve


def losses(
    network: nn.Module, optimizer: Any, task: Task, found: Data, seed: int
) -> Iterator[Tensor]:
    """Makes a step on every batch, and yields its loss."""
    for x, y in batches(found, task.epochs, seed):
        yield make_step(network, optimizer, task, x, y)


def make_step(network: nn.Module, optimizer: Any, task: Task, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(optimizer, LineSearch):
        found: Tensor = optimizer.step(lambda: task.loss(network(x), y))
        return found
    optimizer.zero_grad()
    loss = task.loss(network(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def tune(task: str, method: str) -> Row:
    """The rate whose training has the lowest validation loss at its end."""
    found, tried = load(task), {}
    for rate in METHODS[method].rates:
        network = train(Job(task, method, TUNING_SEED, rate), TASKS[task], found)[0]
        tried[rate] = _rounded(evaluate(TASKS[task], network, found.valid)[1])
    best = min(tried, key=tried.__getitem__)
    return {"rate": best, "tried": {f"{rate:g}": loss for rate, loss in tried.items()}}
