"""Plain-torch float64 forms of the search kernels: nearest neighbours, class medians, k-center."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_BYTES = 1 << 24  # float64 temporaries of a block


def nearest(
    x: Tensor,
    y: Tensor,
    k: int = 1,
    *,
    same_class: tuple[Tensor, Tensor] | None = None,
    metric: str = "sqeuclidean",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(squared distances [n, k] float64, indices [n, k] int64) of the rows of y nearest to x."""
    distances, indices = [], []
    step = chunk or max(1, _BLOCK_BYTES // (8 * max(1, len(y))))
    own = y.double()
    for start in range(0, len(x), step):
        rows = x[start : start + step].double()
        square = torch.cdist(rows, own, compute_mode="donot_use_mm_for_euclid_dist").square()
        if same_class is not None:
            other = same_class[0][start : start + step, None] != same_class[1][None]
            square.masked_fill_(other, float("inf"))
        values, order = square.sort(dim=1, stable=True)
        distances.append(values[:, :k])
        indices.append(order[:, :k])
    return torch.cat(distances), torch.cat(indices)


def class_medians(x: Tensor, numbers: Tensor, num_classes: int) -> Tensor:
    """[classes, d], dtype of x: per class and dimension the mean of the two middle values."""
    centers = []
    for c in range(num_classes):
        rows = x[numbers == c].sort(dim=0).values
        low, high = rows[(len(rows) - 1) // 2], rows[len(rows) // 2]
        centers.append(((low.double() + high.double()) / 2).to(x.dtype))
    return torch.stack(centers)


def center_distances(x: Tensor, numbers: Tensor, centers: Tensor) -> Tensor:
    """[n], float64: Euclidean distance of every row to the centre of its class."""
    step = max(1, _BLOCK_BYTES // (8 * x.shape[1]))
    parts = [
        (x[i : i + step].double() - centers[numbers[i : i + step]].double()).norm(dim=1)
        for i in range(0, len(x), step)
    ]
    return torch.cat(parts)


def k_center_step(x: Tensor, center: Tensor, min_sqdist: Tensor) -> int:
    """Lowers min_sqdist [n] float64 by the distances to center [d]; returns its first arg max."""
    step = max(1, _BLOCK_BYTES // (8 * x.shape[1]))
    for i in range(0, len(x), step):
        square = (x[i : i + step].double() - center.double()).square().sum(1)
        torch.minimum(min_sqdist[i : i + step], square, out=min_sqdist[i : i + step])
    return int(min_sqdist.argmax())
