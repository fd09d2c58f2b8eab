"""Learning-rate policies that see one training each: the rivals of a controller, and controllers.

A policy is told the losses of each epoch and says the rate of the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from pyoptim.arc import Controller
from pyoptim.lr_scheduler.arc import ARC, Judge

from .generate import OPTIMIZERS


class Policy(Protocol):
    def next_rate(self, train_losses: Sequence[float], val_loss: float) -> float: ...


MakePolicy = Callable[[float, int], Policy]
"""(initial rate, epochs of the training) to a fresh policy."""


class Exponential:
    """The rate times `gamma` after every epoch; the paper's "ED" has 0.9, constant is 1."""

    def __init__(self, rate: float, gamma: float) -> None:
        self.rate, self.gamma = rate, gamma

    def next_rate(self, train_losses: Sequence[float], val_loss: float) -> float:
        self.rate *= self.gamma
        return self.rate


class CyclicCosine:
    """Cosines from the rate to zero, each twice as long as the one before; three fit ("CCD")."""

    def __init__(self, rate: float, epochs: int) -> None:
        self.rate, self.length, self.epoch = rate, max(1, epochs // 7), 0

    def next_rate(self, train_losses: Sequence[float], val_loss: float) -> float:
        self.epoch += 1
        if self.epoch >= self.length:
            self.epoch, self.length = 0, 2 * self.length
        return self.rate * (1 + math.cos(math.pi * self.epoch / self.length)) / 2


class Plateau:
    """`torch.optim.lr_scheduler.ReduceLROnPlateau` with a patience of a tenth of the training."""

    def __init__(self, rate: float, epochs: int) -> None:
        self.optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, patience=max(1, epochs // 10)
        )

    def next_rate(self, train_losses: Sequence[float], val_loss: float) -> float:
        self.scheduler.step(val_loss)
        return float(self.optimizer.param_groups[0]["lr"])


class Controlled:
    """`pyoptim.lr_scheduler.ARC`, told the length of the training; `options` are its own.

    It finds an optimizer of the kind that trains, one of `generate.OPTIMIZERS`.
    """

    def __init__(
        self, judge: Controller | Judge, optimizer: str, rate: float, epochs: int, **options: Any
    ) -> None:
        cls, own = OPTIMIZERS[optimizer]
        self.optimizer = cls([torch.zeros(1)], lr=rate, **own)
        self.scheduler = ARC(self.optimizer, epochs=epochs, weights=judge, **options)

    def next_rate(self, train_losses: Sequence[float], val_loss: float) -> float:
        for loss in train_losses:
            self.scheduler.record(loss)
        self.scheduler.step(val_loss)
        return float(self.optimizer.param_groups[0]["lr"])


def constant(rate: float, epochs: int) -> Policy:
    return Exponential(rate, 1.0)


def exponential(rate: float, epochs: int) -> Policy:
    return Exponential(rate, 0.9)


def controlled(judge: Controller | Judge, optimizer: str, **options: Any) -> MakePolicy:
    """ARC with some network, for one of `generate.OPTIMIZERS`; `options` are the scheduler's."""
    return lambda rate, epochs: Controlled(judge, optimizer, rate, epochs, **options)


RIVALS: dict[str, MakePolicy] = {
    "constant": constant,
    "cyclic cosine": CyclicCosine,
    "exponential": exponential,
    "plateau": Plateau,
}
