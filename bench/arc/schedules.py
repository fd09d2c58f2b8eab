"""Learning-rate policies that see one training each: the rivals of a controller, and controllers.

A policy is told the losses of each epoch and says the rate of the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Protocol

import torch

from pyoptim.arc import FACTORS, MAX_CYCLES, Controller


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
    """A controller asked ten times in a training. A loss that is not finite lowers the rate."""

    def __init__(self, controller: Controller, rate: float, epochs: int) -> None:
        self.controller, self.rate, self.interval = controller, rate, max(1, round(epochs / 10))
        self.train: list[list[float]] = []
        self.valid: list[list[float]] = []
        self.rates: list[float] = []
        self.epoch = 0

    def next_rate(self, train_losses: Sequence[float], val_loss: float) -> float:
        if self.epoch % self.interval == 0:
            for history, entry in ((self.train, []), (self.valid, []), (self.rates, self.rate)):
                history.append(entry)  # type: ignore[attr-defined]
                del history[:-MAX_CYCLES]  # type: ignore[attr-defined]
        self.train[-1] += train_losses
        self.valid[-1].append(val_loss)
        self.epoch += 1
        if self.epoch % self.interval == 0:
            self.rate *= FACTORS[self._decision()]
        return self.rate

    def _decision(self) -> int:
        train, valid = list(chain(*self.train)), list(chain(*self.valid))
        if not all(map(math.isfinite, train + valid)):
            return 2
        likely = self.controller.probabilities(train, valid, self.rates)
        return likely.index(max(likely))


def constant(rate: float, epochs: int) -> Policy:
    return Exponential(rate, 1.0)


def exponential(rate: float, epochs: int) -> Policy:
    return Exponential(rate, 0.9)


def controlled(controller: Controller) -> MakePolicy:
    return lambda rate, epochs: Controlled(controller, rate, epochs)


RIVALS: dict[str, MakePolicy] = {
    "constant": constant,
    "cyclic cosine": CyclicCosine,
    "exponential": exponential,
    "plateau": Plateau,
}
