"""Greedy selections in feature space: k-center and herding."""

from __future__ import annotations

import torch
from torch import Tensor

from pyoptim.coreset._stand_in import k_center_step
from pyoptim.coreset.progress import track
from pyoptim.coreset.selection import (
    Selection,
    check_labels,
    matrix,
    pick_in_scope,
    resolve_budget,
)


def k_center_greedy(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    initial: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Selection:
    """Repeatedly takes the sample that is farthest (Euclidean) from all taken so far.

    The largest distance of any sample to the selection is at most twice the smallest possible one.

    Args:
        features: [n, ...], floating point, finite.
        labels: [n], integers; needed for scope="class".
        fraction: share of the samples, in (0, 1]; or
        budget: number of samples to select.
        scope: "global", or "class": k-center within each class, shares in proportion to its size.
        initial: [i], integers: samples that are centres from the start (an already labelled pool).
            They are not returned and do not count. None: a random sample is the first, of each
            class with scope="class".
        generator: draws the first sample; on the CPU. None is torch's default one.
        progress: whether to show a bar.

    Of equally far samples the first is taken. Memory: one number per sample.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: Sener and Savarese, arXiv:1708.00489, algorithm 1; Gonzalez (1985).
    """
    x = matrix("features", features)
    n = len(x)
    is_initial = torch.zeros(n, dtype=torch.bool, device=x.device)
    if initial is not None:
        is_initial[_checked_initial(initial, n)] = True
    free = int((~is_initial).sum())
    count = resolve_budget(n, fraction, budget)
    if count > free:
        raise ValueError(f"{count} samples are wanted, but {n - free} of the {n} are initial")

    def pick(members: Tensor, k: int) -> Tensor:
        rows = x if len(members) == n else x[members]
        return _farthest(rows, k, is_initial[members], generator, progress)

    return Selection(pick_in_scope(n, count, labels, scope, x.device, pick))


def _checked_initial(initial: Tensor, n: int) -> Tensor:
    check_labels("initial", initial, len(initial))
    if len(initial) and not 0 <= int(initial.min()) <= int(initial.max()) < n:
        raise ValueError(f"initial must be in 0..{n - 1}, got {initial.tolist()}")
    return initial.long()


def _farthest(
    x: Tensor, k: int, is_initial: Tensor, generator: torch.Generator | None, progress: bool
) -> Tensor:
    free = int((~is_initial).sum())
    if k > free:
        raise ValueError(
            f"a class has {free} samples beside the initial ones, but its share is {k}; "
            'use scope="global" or a smaller budget'
        )
    min_sqdist = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)
    centers = is_initial.nonzero().squeeze(1).tolist()
    chosen = []
    if not centers:
        centers = chosen = [int(torch.randint(len(x), (), generator=generator))]
    chosen = list(chosen)
    following = 0
    for center in centers:
        following = _add_center(x, center, min_sqdist)
    for _ in track(range(k - len(chosen)), "k-center", progress):
        chosen.append(following)
        following = _add_center(x, following, min_sqdist)
    return torch.tensor(chosen, device=x.device)


def _add_center(x: Tensor, center: int, min_sqdist: Tensor) -> int:
    min_sqdist[center] = -1.0  # below all others, so that it is never the farthest again
    return k_center_step(x, x[center], min_sqdist)


def herding(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "class",
    progress: bool = False,
) -> Selection:
    """Repeatedly takes the sample that brings the mean of the selection closest to the mean of all.

    Args:
        features: [n, ...], floating point, finite.
        labels: [n], integers; needed for scope="class".
        fraction: share of the samples, in (0, 1]; or
        budget: number of samples.
        scope: "class": the mean of each class, shares in proportion to its size; or "global".
        progress: whether to show a bar.

    Computed in float64 about the mean; of equally good samples the first is taken.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: Welling (2009); Rebuffi et al., iCaRL, arXiv:1611.07725, algorithm 4. Differs: without
    replacement.
    """
    x = matrix("features", features)
    count = resolve_budget(len(x), fraction, budget)

    def pick(members: Tensor, k: int) -> Tensor:
        rows = x[members].double()
        return _herd(rows.sub_(rows.mean(0)), k, progress)

    return Selection(pick_in_scope(len(x), count, labels, scope, x.device, pick))


def _herd(centered: Tensor, k: int, progress: bool) -> Tensor:
    """With mean 0, the mean of t samples is closest to it where ||x + sum|| is smallest."""
    square = centered.square().sum(1)
    total = torch.zeros_like(centered[0])
    chosen = []
    for _ in track(range(k), "herding", progress):
        best = int((square + 2.0 * (centered @ total)).argmin())
        chosen.append(best)
        total += centered[best]
        square[best] = float("inf")
    return torch.tensor(chosen, device=centered.device)
