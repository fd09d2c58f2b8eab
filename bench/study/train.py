"""One training, and the choice of a learning rate by a few of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .choices import OPTIMIZERS, SCHEDULES, Length, rate_of
from .data import Data, Part
from .tasks import TASKS, Task, load

Row = dict[str, Any]
# No seed of the study, and the schedule whose mean rate is between the others'.
TUNING_SEED, TUNING_SCHEDULE = 1000, "cosine"
MOST_RATES = 7
EVALUATED_AT_ONCE = 500


@dataclass(frozen=True)
class Job:
    """One cell of the study with one seed; `root`: where the paper's data are, or None."""

    task: str
    optimizer: str
    schedule: str
    seed: int
    rate: float | None
    root: Path | None

    @property
    def key(self) -> str:
        return f"{self.task} | {self.optimizer} | {self.schedule} | {self.seed}"


@dataclass
class Curve:
    """What is seen at the marks; the losses of training are means since the mark before."""

    epoch: list[float] = field(default_factory=list)
    metric: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)

    def add(self, *values: float) -> None:
        for series, value in zip(vars(self).values(), values, strict=True):
            series.append(value)


def run(job: Job) -> Row:
    """Trains, and evaluates the test part once, at the end.

    Returns: rate, the test metric and loss, the curve on the validation part, CPU seconds.
    """
    begin = time.process_time()
    found, task = load(job.task, job.root), TASKS[job.task]
    loaded = time.process_time()
    network, curve = train(job, task, found)
    test, test_loss = evaluate(task, network, found.test)
    return {
        "rate": job.rate,
        "test": _rounded(test),
        "test loss": _rounded(test_loss),
        "curve": {name: [_rounded(x) for x in values] for name, values in vars(curve).items()},
        "seconds": round(time.process_time() - loaded, 2),
        "seconds of loading": round(loaded - begin, 2),
    }


def _rounded(value: float) -> float | None:
    """Five digits; None for what is not finite, which JSON has no word for."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def train(job: Job, task: Task, found: Data) -> tuple[nn.Module, Curve]:
    """Seeds fix the start and the order of the data, for all optimizers and schedules alike."""
    torch.manual_seed(job.seed)
    network = task.network(found)
    optimizer = OPTIMIZERS[job.optimizer].make(list(network.parameters()), job.rate)
    length = Length(task.epochs, found.steps, task.per_epoch)
    control = SCHEDULES[job.schedule](optimizer, length)
    searches = job.rate is None
    curve, marks, losses = Curve(), length.marks(), []
    for step, batch in enumerate(batches(found, task.epochs, job.seed), 1):
        losses.append(_step(task, network, optimizer, batch, searches))
        rate = float(optimizer.param_groups[0]["lr"])
        control.after_step(step, losses[-1])
        if step in marks:
            metric, loss = evaluate(task, network, found.valid)
            control.at_mark(loss)
            curve.add(step / found.steps, metric, loss, torch.stack(losses).mean().item(), rate)
            losses = []
    return network, curve


def batches(found: Data, epochs: int, seed: int) -> Iterator[Part]:
    """Shuffled anew in each epoch; the last batch of an epoch may be smaller."""
    x, y = found.train
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=order).split(found.batch):
            yield x[rows], y[rows]


def _step(task: Task, network: nn.Module, optimizer: Any, batch: Part, searches: bool) -> Tensor:
    x, y = batch

    def closure() -> Tensor:
        return task.loss(network(x), y)

    if searches:
        loss: Tensor = optimizer.step(closure)  # runs backward itself
        return loss.detach()
    optimizer.zero_grad()
    loss = closure()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(task: Task, network: nn.Module, part: Part) -> tuple[float, float]:
    """Metric and loss on all of a part."""
    network.eval()
    outputs = torch.cat([network(x) for x in part[0].split(EVALUATED_AT_ONCE)])
    network.train()
    return task.metric(outputs, part[1]), task.loss(outputs, part[1]).item()


# -- learning rates --------------------------------------------------------------------------------


def tune(task: str, optimizer: str, root: Path | None) -> Row:
    """The rate whose training has the best validation metric at its end, equals by their loss.

    The paper tuned its rates by hand and does not say them. Three rates, each sqrt(10) times the
    one before it; the range grows while its end is the best, up to MOST_RATES. The test part is
    not touched.
    """
    middle = OPTIMIZERS[optimizer].rate
    assert middle is not None
    begin, found = time.process_time(), load(task, root)
    tried: dict[int, tuple[bool, float, float]] = {}
    waiting = [middle - 1, middle, middle + 1]
    while waiting and len(tried) < MOST_RATES:
        power = waiting.pop(0)
        job = Job(task, optimizer, TUNING_SCHEDULE, TUNING_SEED, rate_of(power), root)
        curve = train(job, TASKS[task], found)[1]
        metric, loss = curve.metric[-1], curve.loss[-1]
        tried[power] = (math.isfinite(loss), metric, -loss)
        best = max(tried, key=tried.__getitem__)
        if not waiting:
            waiting = [p for p in (best - 1, best + 1) if p not in tried]
    return {
        "rate": rate_of(best),
        "tried": {f"{rate_of(p):.2g}": _rounded(tried[p][1]) for p in sorted(tried)},
        "seconds": round(time.process_time() - begin, 2),
    }
