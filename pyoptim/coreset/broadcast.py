"""Weights of a coreset, given to every sample by its nearest neighbour in the coreset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyoptim.coreset.distance import nearest
from pyoptim.coreset.selection import check_labels, matrix


def broadcast_weights(
    features: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    labels: Tensor | None = None,
    same_class: bool = False,
    neighbors: int = 1,
    metric: str = "sqeuclidean",
    **options: Any,
) -> Tensor:
    """The weight of the nearest coreset sample, for every sample; [n], dtype of `weights`.

        w_i = weights[argmin_j distance(features_i, features[indices_j])]

    With several neighbors it is the mean of their weights.

    Args:
        features: [n, ...], floating point, finite.
        indices: [k], integers: the coreset, in any order.
        weights: [k], floating point, finite: its weights, in the order of `indices`.
        labels: [n], integers; needed for same_class.
        same_class: look only at coreset samples with the sample's own label. Without it the
            nearest one carries another label for a third of Fashion-MNIST's pixels, so that a
            neighbour that looks mislabelled decides the weight.
        neighbors: how many of the nearest are averaged; all of them, where the coreset (or, with
            same_class, the sample's class in it) has fewer.
        metric, options: passed on to `nearest`.

    Of equally near coreset samples the first in `indices` decides; with one neighbor, a coreset
    sample without a duplicate keeps its own weight.

    Raises:
        ValueError: an argument is not as described; a class has no sample in the coreset.
        TypeError: a tensor has the wrong kind of dtype.

    Source: paper "Classification via coreset reweighting" (CW-ERM), equation 3.
    """
    x = matrix("features", features)
    n = len(x)
    indices, weights = checked_coreset(indices, weights, n)
    check_neighbors(neighbors)
    at = indices.to(x.device)
    classes = _classes(labels, n, at) if same_class else None
    return average_of_nearest(x, x[at], weights, classes, neighbors, metric=metric, **options)


def average_of_nearest(
    x: Tensor,
    coreset: Tensor,
    weights: Tensor,
    classes: tuple[Tensor, Tensor] | None,
    neighbors: int,
    **options: Any,
) -> Tensor:
    """[n]: the mean weight of the nearest rows of the coreset, for every row of x.

    Args:
        x, coreset: [n, d] and [k, d].
        weights: [k].
        classes: labels of both, [n] and [k], each of the first also in the second; None compares
            all rows with all.
        neighbors, options: as for `broadcast_weights`.
    """
    own = weights.to(x.device)
    result = torch.empty(len(x), dtype=own.dtype, device=own.device)
    for k, rows, columns in _groups(classes, len(coreset), neighbors):
        among = None if classes is None else (classes[0][rows], classes[1][columns])
        _, found = nearest(x[rows], coreset[columns], k, same_class=among, **options)
        result[rows] = own[columns][found.reshape(-1, k)].mean(1)
    return result.to(weights.device)


def check_neighbors(neighbors: int) -> None:
    """Raises ValueError unless it is an int of at least 1."""
    if isinstance(neighbors, bool) or not isinstance(neighbors, int) or neighbors < 1:
        raise ValueError(f"neighbors must be an int of at least 1, got {neighbors!r}")


def _classes(labels: Tensor | None, n: int, at: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of all samples and of the coreset."""
    if labels is None:
        raise ValueError("same_class=True needs labels")
    check_labels("labels", labels, n)
    labels = labels.to(at.device)
    check_covered(labels, labels[at])
    return labels, labels[at]


def _groups(
    classes: tuple[Tensor, Tensor] | None, m: int, neighbors: int
) -> Iterator[tuple[int, slice | Tensor, slice | Tensor]]:
    """(neighbors, samples, coreset samples), for all classes that have that many at once."""
    if classes is None:
        yield min(neighbors, m), slice(None), slice(None)
        return
    labels, of_coreset = classes
    values, numbers, counts = torch.unique(of_coreset, return_inverse=True, return_counts=True)
    sizes = counts.clamp(max=neighbors)
    if bool((sizes == sizes[0]).all()):
        yield int(sizes[0]), slice(None), slice(None)
        return
    of_sample, of_column = sizes[torch.searchsorted(values, labels)], sizes[numbers]
    for k in sizes.unique().tolist():
        yield k, (of_sample == k).nonzero().squeeze(1), (of_column == k).nonzero().squeeze(1)


def checked_coreset(indices: Tensor, weights: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Both, of a coreset of n samples; raises ValueError or TypeError for what cannot be one."""
    check_labels("indices", indices, len(indices))
    if len(indices) == 0:
        raise ValueError("indices is empty; a broadcast needs at least one coreset sample")
    if not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise ValueError(f"indices must be in 0..{n - 1}, got {indices.tolist()}")
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights must be a floating-point tensor, got {weights!r}")
    if weights.shape != indices.shape:
        raise ValueError(
            f"weights must be one per index, shape {tuple(indices.shape)}; "
            f"got {tuple(weights.shape)}"
        )
    if not bool(weights.isfinite().all()):
        at = int((~weights.isfinite()).nonzero()[0])
        raise ValueError(f"weights holds NaN or inf, first at {at}")
    return indices.long(), weights.detach()


def check_covered(labels: Tensor, of_coreset: Tensor) -> None:
    """Raises ValueError for a label that the coreset has not."""
    missing = labels[~torch.isin(labels, of_coreset)]
    if len(missing):
        raise ValueError(
            f"the coreset has no sample of label {int(missing[0])}, so same_class=True finds no "
            'neighbour; select with scope="class" or a larger fraction, or use same_class=False'
        )
