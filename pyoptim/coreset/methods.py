"""One call for all selection methods, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyoptim.coreset.gradients import craig, facility_location, glister, gradmatch
from pyoptim.coreset.greedy import herding, k_center_greedy
from pyoptim.coreset.moderate import moderate
from pyoptim.coreset.scores import el2n, forgetting, grand, random, uncertainty
from pyoptim.coreset.selection import Selection, check_choice

METHODS: dict[str, Callable[..., Selection]] = {
    "random": random,
    "moderate": moderate,
    "k_center_greedy": k_center_greedy,
    "herding": herding,
    "facility_location": facility_location,
    "uncertainty": uncertainty,
    "el2n": el2n,
    "grand": grand,
    "forgetting": forgetting,
    "craig": craig,
    "glister": glister,
    "gradmatch": gradmatch,
}


def select(
    data: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = "moderate",
    fraction: float | None = None,
    budget: int | None = None,
    **options: Any,
) -> Selection:
    """Selects a subset by any method: `METHODS[method](data, labels, ...)`.

    Args:
        data: what the method takes first: features [n, ...] ("random", "moderate",
            "k_center_greedy", "herding", "facility_location", "grand", "craig", "glister",
            "gradmatch"), logits [n, classes] ("uncertainty", "el2n"), or scores [n] ("forgetting").
        labels: [n], integers; several methods need them.
        method: a name in `METHODS`.
        fraction: share of the samples, in (0, 1]; or
        budget: number of samples.
        options: further arguments of the method.

    Raises:
        ValueError, TypeError: an argument is not as the method describes.
    """
    check_choice("method", method, tuple(METHODS))
    return METHODS[method](data, labels, fraction=fraction, budget=budget, **options)
