"""Weights of a coreset, given to every sample by its nearest neighbour in the coreset."""

from __future__ import annotations

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
    metric: str = "sqeuclidean",
    **options: Any,
) -> Tensor:
    """The weight of the nearest coreset sample, for every sample; [n], dtype of `weights`.

        w_i = weights[argmin_j distance(features_i, features[indices_j])]

    Args:
        features: [n, ...], floating point, finite.
        indices: [k], integers: the coreset, in any order.
        weights: [k], floating point, finite: its weights, in the order of `indices`.
        labels: [n], integers; needed for same_class.
        same_class: look only at coreset samples with the sample's own label. Without it the
            nearest one carries another label for a third of Fashion-MNIST's pixels, so that a
            neighbour that looks mislabelled decides the weight.
        metric, options: passed on to `nearest`.

    Of equally near coreset samples the first in `indices` decides; a coreset sample without a
    duplicate keeps its own weight.

    Raises:
        ValueError: an argument is not as described; a class has no sample in the coreset.
        TypeError: a tensor has the wrong kind of dtype.

    Source: paper "Classification via coreset reweighting" (CW-ERM), equation 3.
    """
    x = matrix("features", features)
    n = len(x)
    indices, weights = _checked_coreset(indices, weights, n)
    classes = None
    if same_class:
        if labels is None:
            raise ValueError("same_class=True needs labels")
        check_labels("labels", labels, n)
        labels = labels.to(x.device)
        _check_covered(labels, labels[indices.to(x.device)])
        classes = (labels, labels[indices.to(x.device)])
    coreset = x[indices.to(x.device)]
    _, at = nearest(x, coreset, same_class=classes, metric=metric, **options)
    return weights[at.reshape(n).to(weights.device)]


def _checked_coreset(indices: Tensor, weights: Tensor, n: int) -> tuple[Tensor, Tensor]:
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


def _check_covered(labels: Tensor, of_coreset: Tensor) -> None:
    missing = labels[~torch.isin(labels, of_coreset)]
    if len(missing):
        raise ValueError(
            f"the coreset has no sample of label {int(missing[0])}, so same_class=True finds no "
            'neighbour; select with scope="class" or a larger fraction, or use same_class=False'
        )
