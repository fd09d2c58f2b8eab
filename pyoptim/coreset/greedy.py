"""Greedy selections in feature space: k-center and herding."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pyoptim.coreset.centers import CenterDistances
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
    count = resolve_budget(n, fraction, budget)
    is_initial = _initial_mask(initial, n, count).to(x.device)

    def pick(members: Tensor, k: int) -> Tensor:
        rows = x if len(members) == n else x[members]
        return _farthest(CenterDistances(rows), k, is_initial[members], generator, progress)

    return Selection(pick_in_scope(n, count, labels, scope, x.device, pick))


class Distances(Protocol):
    """What k-center asks of the data; `CenterDistances` is one."""

    def add(self, center: int, /) -> tuple[int, float]: ...


def pick_farthest(
    distances: Distances,
    n: int,
    count: int,
    initial: Tensor | None,
    generator: torch.Generator | None,
    progress: bool,
    device: torch.device,
) -> Selection:
    """`k_center_greedy` with scope="global" from distances that may be computed anywhere."""
    is_initial = _initial_mask(initial, n, count).to(device)
    chosen = _farthest(distances, count, is_initial, generator, progress)
    return Selection(chosen.sort().values)


def _initial_mask(initial: Tensor | None, n: int, count: int) -> Tensor:
    """[n], bool; leaves `count` samples free."""
    is_initial = torch.zeros(n, dtype=torch.bool)
    if initial is not None:
        check_labels("initial", initial, len(initial))
        if len(initial) and not 0 <= int(initial.min()) <= int(initial.max()) < n:
            raise ValueError(f"initial must be in 0..{n - 1}, got {initial.tolist()}")
        is_initial[initial.cpu().long()] = True
    free = int((~is_initial).sum())
    if count > free:
        raise ValueError(f"{count} samples are wanted, but {n - free} of the {n} are initial")
    return is_initial


def _farthest(
    distances: Distances,
    k: int,
    is_initial: Tensor,
    generator: torch.Generator | None,
    progress: bool,
) -> Tensor:
    free = int((~is_initial).sum())
    if k > free:
        raise ValueError(
            f"a class has {free} samples beside the initial ones, but its share is {k}; "
            'use scope="global" or a smaller budget'
        )
    is_taken = is_initial.clone()
    chosen: list[int] = []
    if not bool(is_taken.any()):
        chosen = [int(torch.randint(len(is_taken), (), generator=generator))]
        is_taken[chosen] = True
    farthest, sqdist = 0, 0.0
    for center in is_taken.nonzero().squeeze(1).tolist():
        farthest, sqdist = distances.add(center)
    for _ in track(range(k - len(chosen)), "k-center", progress):
        if sqdist == 0.0:  # all that is left coincides with a centre, and so may what is farthest
            farthest = int((~is_taken).int().argmax())
        chosen.append(farthest)
        is_taken[farthest] = True
        farthest, sqdist = distances.add(farthest)
    return torch.tensor(chosen, device=is_initial.device)


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
