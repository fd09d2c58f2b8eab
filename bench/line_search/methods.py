"""What is compared: line searches with nothing tuned, and optimizers with a tuned rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import pyoptim

Make = Callable[[list[Tensor], int, float | None], Any]


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        make: the optimizer for (parameters, steps per epoch, learning rate).
        rates: the learning rates that are tried; none for a line search.
        has_cosine: whether the rate falls along a cosine, for a line search the factor of its own.
    """

    make: Make
    rates: tuple[float, ...] = ()
    has_cosine: bool = False


def _searching(**options: Any) -> Make:
    return lambda params, steps, rate: pyoptim.SaLSa(params, **options)


def _adam(params: list[Tensor], steps: int, rate: float | None) -> Any:
    assert rate is not None
    return pyoptim.Adam(params, lr=rate)


def _sgd(params: list[Tensor], steps: int, rate: float | None) -> Any:
    assert rate is not None
    return pyoptim.SGD(params, lr=rate, momentum=0.9)


# Half a decade apart; a best rate at an end of the list would show in the table.
ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SGD_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

METHODS: dict[str, Method] = {
    "SaLSa": Method(_searching()),
    "SaLSa, a search every step": Method(_searching(search_interval=1)),
    "SaLSa, SGD": Method(_searching(base="sgd")),
    "SaLSa as released": Method(_searching(variant="release")),
    "AdamSLS": Method(lambda p, steps, _: pyoptim.AdaSLS(p, steps, base_opt="adam", beta=0.999)),
    "SLS": Method(lambda p, steps, _: pyoptim.SLS(p, steps)),
    "Adam, tuned, cosine": Method(_adam, ADAM_RATES, has_cosine=True),
    "Adam, tuned": Method(_adam, ADAM_RATES),
    "SGD, tuned, cosine": Method(_sgd, SGD_RATES, has_cosine=True),
    "SGD, tuned": Method(_sgd, SGD_RATES),
}
