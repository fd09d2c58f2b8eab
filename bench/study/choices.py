"""What is compared: optimizers with the paper's constants, schedules with its lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import pyoptim
from pyoptim import lr_scheduler


@dataclass(frozen=True)
class Optimizer:
    """A class of pyoptim with its options.

    Args:
        cls: its name; the optimizer is left out where this version of pyoptim lacks it.
        options: all but the learning rate.
        rate: the middle of the rates that are tried, as a power: 10^(rate/2). None where the
            optimizer needs no learning rate, and so no schedule.
    """

    cls: str
    options: dict[str, Any]
    rate: int | None

    def make(self, params: list[Tensor], rate: float | None) -> Any:
        options = self.options if rate is None else {**self.options, "lr": rate}
        return getattr(pyoptim, self.cls)(params, **options)


# Algorithms 1 to 3 of the paper; it does not say the weight decay: torch's default.
_ADAM = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
_ALL = {
    "AdamW": Optimizer("AdamW", _ADAM, -6),
    "RMSprop": Optimizer("RMSprop", {"alpha": 0.99, "eps": 1e-8}, -6),
    "Adagrad": Optimizer("Adagrad", {"eps": 1e-10}, -4),
    "SGD-momentum": Optimizer("SGD", {"momentum": 0.9}, -2),
    "AdamP": Optimizer("AdamP", _ADAM, -6),
    "SaLSa": Optimizer("SaLSa", {}, None),
}
OPTIMIZERS = {name: choice for name, choice in _ALL.items() if hasattr(pyoptim, choice.cls)}


def rate_of(power: int) -> float:
    """The learning rates that are tried: 1e-3, 3.2e-3, 1e-2 ..."""
    return float(f"{10 ** (power / 2):.3g}")


# -- schedules -------------------------------------------------------------------------------------

NONE = "none"
MARKS = 10  # points of a learning curve, at which ARC decides


@dataclass(frozen=True)
class Length:
    """Of a training: `epochs` of `steps`; `per_epoch`: a schedule moves once per epoch."""

    epochs: int
    steps: int
    per_epoch: bool

    @property
    def total(self) -> int:
        return self.epochs * self.steps

    def marks(self) -> list[int]:
        """The steps after which a training is looked at, the last one among them."""
        return sorted({max(1, round(self.total * i / MARKS)) for i in range(1, MARKS + 1)})


class Control(Protocol):
    """Sets the learning rate."""

    def after_step(self, step: int, loss: Tensor) -> None: ...

    def at_mark(self, loss: float) -> None: ...


class Constant:
    """Leaves it as it is."""

    def after_step(self, step: int, loss: Tensor) -> None:
        pass

    def at_mark(self, loss: float) -> None:
        pass


class Scheduled(Constant):
    """A function of time."""

    def __init__(self, scheduler: torch.optim.lr_scheduler.LRScheduler, every: int) -> None:
        self.scheduler, self.every = scheduler, every

    def after_step(self, step: int, loss: Tensor) -> None:
        if step % self.every == 0:
            self.scheduler.step()


class Watching(Constant):
    """ARC: sees the training losses, and at every mark the validation loss; a mark is its epoch."""

    def __init__(self, optimizer: torch.optim.Optimizer, length: Length) -> None:
        self.arc = lr_scheduler.ARC(optimizer, epochs=len(length.marks()), interval=1)

    def after_step(self, step: int, loss: Tensor) -> None:
        self.arc.record(loss)

    def at_mark(self, loss: float) -> None:
        self.arc.step(loss)


def _linear(optimizer: torch.optim.Optimizer, length: Length) -> Control:
    if length.per_epoch:
        line = lr_scheduler.linear(optimizer, length.epochs, start_factor=1 / 3, end_factor=1e-3)
        return Scheduled(line, length.steps)
    return Scheduled(lr_scheduler.linear(optimizer, length.total), 1)


def _polynomial(optimizer: torch.optim.Optimizer, length: Length) -> Control:
    total, every = (length.epochs, length.steps) if length.per_epoch else (length.total, 1)
    return Scheduled(lr_scheduler.polynomial(optimizer, total, power=2), every)


def _cosine(optimizer: torch.optim.Optimizer, length: Length) -> Control:
    if length.per_epoch:  # T = 5 epochs of 5: no restart falls into the training
        restarts = lr_scheduler.cosine_with_restarts(optimizer, length.epochs)
        return Scheduled(restarts, length.steps)
    return Scheduled(lr_scheduler.cosine(optimizer, length.total, n_cycles=2), 1)


MakeControl = Callable[[torch.optim.Optimizer, Length], Control]
# Section 4 of the paper.
SCHEDULES: dict[str, MakeControl] = {
    NONE: lambda optimizer, length: Constant(),
    "linear": _linear,
    "polynomial": _polynomial,
    "cosine": _cosine,
    "ARC": Watching,
}
IN_PAPER = ("linear", "polynomial", "cosine")


def schedules_of(optimizer: str, chosen: Sequence[str]) -> list[str]:
    """Those of `chosen` that go with the optimizer: one without a rate has its own."""
    return list(chosen) if OPTIMIZERS[optimizer].rate is not None else [NONE]
