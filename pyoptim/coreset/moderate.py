"""Moderate coreset: samples at a middling distance from the median of their class."""

from __future__ import annotations

import torch
from torch import Tensor

from pyoptim.coreset.centers import center_distances, class_medians
from pyoptim.coreset.selection import (
    Selection,
    check_choice,
    class_numbers,
    matrix,
    pick_in_scope,
    resolve_budget,
    top,
)

RULES = ("window", "closest")
CENTERS = ("median", "mean")


def moderate_scores(features: Tensor, labels: Tensor, *, center: str = "median") -> Tensor:
    """Euclidean distance of each sample to the centre of its class; [n], float64.

    Args:
        features: [n, ...], floating point, finite.
        labels: [n], integers; gaps between them do not matter.
        center: "median" per dimension (of an even number the mean of the two middle values), in the
            dtype of the features as in the official code; or "mean".

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    check_choice("center", center, CENTERS)
    x = matrix("features", features)
    numbers, num_classes = class_numbers(labels, len(x), x.device)
    if center == "median":
        centers = class_medians(x, numbers, num_classes).to(x.dtype)
    else:
        centers = _class_means(x, numbers, num_classes)
    return center_distances(x, numbers, centers)


def moderate(
    features: Tensor,
    labels: Tensor,
    *,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    rule: str = "window",
    center: str = "median",
) -> Selection:
    """The samples whose distance to their class centre is in the middle of all distances.

    Args:
        features, labels, center: as for `moderate_scores`.
        fraction: share of the samples, in (0, 1]; or
        budget: number of samples.
        scope: "global", as the official code: classes get what falls into the middle, some maybe
            nothing. "class": the middle of every class, in proportion to its size.
        rule: "window" keeps the middle ranks, as the official code: with scope="global" and a
            fraction r of n the ranks round(n*(0.5 - r/2)) up to round(n*(0.5 + r/2)), exclusive,
            which can be one more or less than round(r*n). "closest" keeps the distances closest to
            the median distance, as the text of the paper says.

    Of equal distances the first sample comes first (the official code leaves it open).

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: Xia et al., Moderate coreset, ICLR 2023, section 3; tmllab/2023_ICLR_Moderate-DS.
    Differs: a class with one sample has that sample as its centre.
    """
    distances = moderate_scores(features, labels, center=center)
    return select_middle(
        distances, labels, fraction=fraction, budget=budget, scope=scope, rule=rule
    )


def select_middle(
    distances: Tensor,
    labels: Tensor,
    *,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    rule: str = "window",
) -> Selection:
    """`moderate` from the distances [n] to the centres."""
    check_choice("rule", rule, RULES)
    n = len(distances)
    count = resolve_budget(n, fraction, budget)
    if fraction is not None and scope == "global" and rule == "window":
        low, high = round(n * (0.5 - fraction / 2)), round(n * (0.5 + fraction / 2))
        if low == high:
            raise ValueError(f"the window of fraction={fraction!r} of {n} is empty; use budget=1")
        return Selection(top(distances, n, largest=False)[low:high].sort().values)

    def pick(members: Tensor, k: int) -> Tensor:
        own = distances[members]
        if rule == "closest":
            return top((own - middle(own)).abs(), k, largest=False)
        low = round((len(own) - k) / 2)
        return top(own, len(own), largest=False)[low : low + k]

    return Selection(pick_in_scope(n, count, labels, scope, distances.device, pick))


def middle(values: Tensor) -> Tensor:
    """The median of a vector; of an even number the mean of the two middle values."""
    ordered = values.sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _class_means(x: Tensor, numbers: Tensor, num_classes: int) -> Tensor:
    return torch.stack([x[numbers == c].mean(0, dtype=torch.float64) for c in range(num_classes)])
