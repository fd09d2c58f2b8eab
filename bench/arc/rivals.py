"""Optimizers that find their own learning rate: what a user could take in place of a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import pyoptim

from .compare import MakeTrainer


class Prodigy:
    """Prodigy (arXiv:2306.06101) of the package prodigyopt, with its defaults.

    Args:
        annealed: with the cosine to zero that its authors recommend.
    """

    def __init__(self, params: list[Tensor], steps: int, annealed: bool) -> None:
        from prodigyopt import Prodigy as Optimizer

        self.optimizer = Optimizer(params, lr=1.0)
        schedules = pyoptim.lr_scheduler
        self.schedule = (
            schedules.cosine(self.optimizer, steps)
            if annealed
            else schedules.constant(self.optimizer)
        )

    def step(self, loss: Callable[[], Tensor]) -> None:
        self.optimizer.zero_grad()
        loss().backward()
        self.optimizer.step()
        self.schedule.step()

    def rate(self) -> float:
        group = self.optimizer.param_groups[0]
        return float(group["lr"] * group["d"])


class SaLSa:
    """`pyoptim.SaLSa` with its defaults: a line search on each mini-batch."""

    def __init__(self, params: list[Tensor]) -> None:
        self.optimizer: Any = pyoptim.SaLSa(params)  # type: ignore[attr-defined]

    def step(self, loss: Callable[[], Tensor]) -> None:
        self.optimizer.step(loss)

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def available() -> dict[str, MakeTrainer]:
    """By name, what is installed; says what is not."""
    found: dict[str, MakeTrainer] = {}
    try:
        import prodigyopt  # noqa: F401

        found["prodigy"] = lambda params, steps: Prodigy(params, steps, annealed=False)
        found["prodigy, cosine"] = lambda params, steps: Prodigy(params, steps, annealed=True)
    except ImportError:
        print("prodigy is left out: pip install prodigyopt")
    if hasattr(pyoptim, "SaLSa"):
        found["salsa"] = lambda params, steps: SaLSa(params)
    else:
        print("salsa is left out: this pyoptim has no SaLSa")
    return found
