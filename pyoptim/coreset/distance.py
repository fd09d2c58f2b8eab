"""Exact nearest-neighbour search, and the matrix of squared distances.

The search multiplies tiles in float32 as a filter and scores what the filter cannot rule out in
float64 from the given values. The filter's error is bounded (csrc/coreset/bound.hpp), so that the
result is that of scoring every pair, at about the speed of the multiplication alone. Neither the
n x m matrix nor a part of it that grows with n x m is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyoptim.coreset.engines import engine_for
from pyoptim.coreset.matrices import (
    as_tensor,
    check_matrix,
    check_no_nan,
    chunks,
    is_whole,
    kernels_for,
    nan_error,
    row_major,
    spans,
)
from pyoptim.coreset.search import nearest as nearest_on_device

if TYPE_CHECKING:
    from pyoptim.coreset.matrices import Array, Rows

# The kernels' metric and what a score of it is; numbered as coreset::Metric.
METRICS = {"sqeuclidean": 0, "euclidean": 0, "ip": 1, "cosine": 2}
# Elements of the reference's float64 differences.
_REFERENCE_ELEMENTS = 1 << 20


@torch.no_grad()
def nearest(
    x: Rows,
    y: Rows,
    k: int = 1,
    *,
    same_class: tuple[Tensor, Tensor] | None = None,
    metric: str = "sqeuclidean",
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of `y` nearest to each row of `x`, exactly.

    The indices are those of scoring every pair in float64 from the given values, by direct
    differences for the Euclidean metrics; of equal scores the lowest index comes first. Distances
    are the float64 scores rounded once. Infinite values are allowed; a distance that would be
    inf - inf counts as infinite, the farthest.

    Args:
        x: float32, float64, bfloat16 or float16 matrix [n, d], or [batch, n, d]; a tensor, a numpy
            array (a `numpy.memmap` is read where it is, not loaded), or an iterable of matrices
            whose rows follow one another. Any strides.
        y: as `x`, of the same dtype: [m, d], or [batch, m, d]. An iterable of `y` is read once per
            chunk of `x`.
        k: how many rows; 1 to m.
        same_class: labels of the rows of `x` and of `y`, integers [n] and [m]; only rows of the
            same label are compared. Each label in `x` needs k rows of it in `y`. Matrices only.
        metric: "sqeuclidean", "euclidean", "cosine" (1 - cos; a row of zeros has cos 0 to every
            other), or "ip" (inner product, the largest first).
        chunk: rows of `x` handled at a time. None: all rows that can be read in place, and about
            2 MB of those that have to be copied.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None is what
            `pyoptim.use_backend` chose. With None and "auto", tensors that no kernel can read are
            left to the reference.

    Returns:
        (distances [n, k], indices [n, k] int64), for k = 1 both [n]; with a batch dimension if the
        inputs have one. Distances are float32, for float64 inputs float64. No gradient flows.

    Raises:
        ValueError: shapes that do not fit, k out of range, a NaN (the message names the row), an
            unknown metric, labels of which `y` has too few rows.
        TypeError: dtypes that differ or have no kernel.
        BackendError: a backend was asked for by name and cannot search these tensors.
    """
    _check_options(k, metric, chunk)
    return _nearest(_Search(k, metric, chunk, backend), x, y, same_class)


def _check_options(k: int, metric: str, chunk: int | None) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a positive integer, got {k!r}")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be a positive number of rows or None, got {chunk!r}")


def _nearest(
    search: _Search, x: Rows, y: Rows, same_class: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Of matrices, iterables of them, or batches."""
    if is_whole(x) and is_whole(y):
        a, b = as_tensor(x, "x"), as_tensor(y, "y")  # type: ignore[arg-type]
        if a.ndim == 3 or b.ndim == 3:
            return _nearest_batched(search, a, b, same_class)
        x, y = a, b
    if same_class is not None:
        return search.results(_nearest_by_class(search, x, y, same_class))
    return search.results(search.run(x, y))


@dataclass
class _Found:
    """The k best scores so far, float64, and their indices, -1 where there is none."""

    scores: Tensor
    indices: Tensor
    dtype: torch.dtype

    @classmethod
    def nothing(cls, n: int, k: int, like: Tensor) -> _Found:
        scores = torch.full((n, k), torch.inf, dtype=torch.float64, device=like.device)
        return cls(scores, torch.full((n, k), -1, device=like.device), like.dtype)


@dataclass
class _Search:
    k: int
    metric: str
    chunk: int | None
    backend: str | None

    def run(self, x: Rows, y: Rows) -> _Found:
        if not is_whole(y) and iter(y) is y and not is_whole(x):
            raise ValueError(
                "y is an iterator, which can be read only once, but x has several chunks; "
                "give y as a list of chunks or as one tensor"
            )
        if not is_whole(y) and iter(y) is y and self.chunk is not None:
            raise ValueError("y is an iterator, which can be read only once; leave chunk=None")
        if not is_whole(y) and iter(y) is y:
            return self._against(as_tensor(x, "x"), y, 0)  # type: ignore[arg-type]
        parts = [self._against(rows, y, first) for first, rows in chunks(x, "x", self.chunk)]
        if not parts:
            raise ValueError("x has no chunks; give at least one matrix, which may have no rows")
        if len(parts) == 1:
            return parts[0]
        if len({part.dtype for part in parts}) > 1:
            raise TypeError("the chunks of x have several dtypes; give one")
        scores, indices = (torch.cat(tensors) for tensors in _transposed(parts))
        return _Found(scores, indices, parts[0].dtype)

    def _against(self, x: Tensor, y: Rows, first_row: int) -> _Found:
        """Rows of x against all of y; first_row is the number of x's first in messages."""
        check_matrix(x, "x")
        if is_whole(y):
            self.check_size(len(y))  # type: ignore[arg-type]
        found = _Found.nothing(len(x), self.k, x)
        m = 0
        for first, rows in chunks(y, "y", None):
            _check_pair(x, rows)
            m = first + len(rows)
            self._merge(x, rows, None, None, first_row, first, found)
        self.check_size(m)
        return found

    def check_size(self, m: int) -> None:
        if m < self.k:
            raise ValueError(f"k={self.k} but y has {m} rows; give k of at most {m}")

    def _merge(
        self,
        x: Tensor,
        y: Tensor,
        x_rows: Tensor | None,
        y_rows: Tensor | None,
        first_row: int,
        first: int,
        found: _Found,
    ) -> None:
        options = self.k, METRICS[self.metric], first, found.scores, found.indices
        if (engine := engine_for(x, self.backend)) is not None:
            x_nan, y_nan = nearest_on_device(engine, x, y, x_rows, y_rows, *options)
        elif (native := kernels_for(x, self.backend)) is not None:
            x, y = row_major(x), row_major(y)
            x_nan, y_nan = native.coreset_nearest(x, y, x_rows, y_rows, *options)
        else:
            _merge_plainly(x, y, x_rows, y_rows, self.metric, first_row, first, found)
            return
        if y_nan >= 0:
            raise nan_error("y", first + y_nan)
        if x_nan >= 0:
            raise nan_error("x", first_row + x_nan)

    def results(self, found: _Found) -> tuple[Tensor, Tensor]:
        """Distances of the metric from scores, and the shape that k = 1 has."""
        distances = found.scores
        if self.metric == "euclidean":
            distances = distances.sqrt_()
        elif self.metric == "ip":
            distances = distances.neg_()
        distances = distances.to(torch.promote_types(found.dtype, torch.float32))
        indices = found.indices
        return (distances[:, 0], indices[:, 0]) if self.k == 1 else (distances, indices)


def _transposed(parts: list[_Found]) -> Iterator[list[Tensor]]:
    yield [part.scores for part in parts]
    yield [part.indices for part in parts]


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"x has dtype {x.dtype} but y has {y.dtype}; convert one of them")
    if x.device != y.device:
        raise ValueError(f"x is on {x.device} but y is on {y.device}; move one of them")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} but y has {tuple(y.shape)}; "
            "rows of both must have the same number of features"
        )


def _nearest_batched(
    search: _Search, x: Tensor, y: Tensor, same_class: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    if x.ndim != 3 or y.ndim != 3 or len(x) != len(y):
        raise ValueError(
            f"x has shape {tuple(x.shape)} but y has {tuple(y.shape)}; "
            "give [batch, n, d] and [batch, m, d], or two matrices"
        )
    if same_class is not None:
        raise ValueError("same_class takes matrices; call nearest once per batch entry")
    _check_pair(x, y)
    search.check_size(y.shape[1])
    tail = (search.k,) if search.k > 1 else ()
    distances = torch.empty(
        (*x.shape[:2], *tail),
        dtype=torch.promote_types(x.dtype, torch.float32),
        device=x.device,
    )
    indices = torch.empty(distances.shape, dtype=torch.int64, device=x.device)
    for b in range(len(x)):
        try:
            distances[b], indices[b] = search.results(search.run(x[b], y[b]))
        except ValueError as error:
            raise ValueError(f"batch entry {b}: {error}") from None
    return distances, indices


# -- classes ---------------------------------------------------------------------------------------


def _nearest_by_class(
    search: _Search, x: Rows, y: Rows, same_class: tuple[Tensor, Tensor]
) -> _Found:
    if not (is_whole(x) and is_whole(y)):
        raise ValueError("same_class takes matrices, not iterables of chunks")
    a = check_matrix(as_tensor(x, "x"), "x")  # type: ignore[arg-type]
    b = check_matrix(as_tensor(y, "y"), "y")  # type: ignore[arg-type]
    _check_pair(a, b)
    x_groups = _groups(_labels(same_class, 0, len(a)))
    y_groups = _groups(_labels(same_class, 1, len(b)))
    for label in x_groups:
        size = len(y_groups.get(label, ()))
        if size < search.k:
            raise ValueError(
                f"same_class: y has {size} rows of label {label}, fewer than k={search.k}; "
                "give y more of them, or leave the rows of that label out of x"
            )
    found = _Found.nothing(len(a), search.k, a)
    a, b = row_major(a), row_major(b)
    for label, rows in x_groups.items():
        search._merge(a, b, rows, y_groups[label], 0, 0, found)
    return found


def _labels(same_class: tuple[Tensor, Tensor], which: int, n: int) -> Tensor:
    name = "xy"[which]
    if isinstance(same_class, Tensor) or len(same_class) != 2:
        raise TypeError("same_class must be a pair: labels of the rows of x, labels of those of y")
    labels = torch.as_tensor(same_class[which])
    if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"same_class: labels of {name} have shape {tuple(labels.shape)} and dtype "
            f"{labels.dtype}; give {n} integers, one per row"
        )
    return labels.cpu().long()


def _groups(labels: Tensor) -> dict[int, Tensor]:
    """Ascending row numbers by label."""
    if len(labels) == 0:
        return {}
    order = labels.argsort(stable=True)
    values, counts = torch.unique(labels, return_counts=True)
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return {v: order[a:b] for v, a, b in zip(values.tolist(), starts, ends, strict=True)}


# -- the reference ---------------------------------------------------------------------------------


@torch.no_grad()
def nearest_reference(
    x: Tensor, y: Tensor, k: int = 1, *, metric: str = "sqeuclidean"
) -> tuple[Tensor, Tensor]:
    """`nearest` of two matrices in plain PyTorch: every pair in float64, then a stable sort.

    Arguments, results and errors are those of `nearest`.
    """
    return nearest(x, y, k, metric=metric, backend="reference")


def _merge_plainly(
    x: Tensor,
    y: Tensor,
    x_rows: Tensor | None,
    y_rows: Tensor | None,
    metric: str,
    first_row: int,
    first: int,
    found: _Found,
) -> None:
    check_no_nan(y, "y", first)
    check_no_nan(x, "x", first_row)
    score = _SCORES[METRICS[metric]]
    rows = torch.arange(len(x), device=x.device) if x_rows is None else x_rows.to(x.device)
    columns = torch.arange(len(y), device=y.device) if y_rows is None else y_rows.to(y.device)
    wide = y[columns].double()
    k = found.scores.shape[1]
    for span in spans(len(rows), _REFERENCE_ELEMENTS // max(1, wide.numel())):
        part = rows[span]
        scores = score(x[part].double(), wide).nan_to_num_(torch.inf, torch.inf, -torch.inf)
        scores = torch.cat([found.scores[part], scores], dim=1)
        indices = torch.cat([found.indices[part], (columns + first).expand(len(part), -1)], dim=1)
        scores.masked_fill_(indices < 0, torch.inf)
        # What is not there yet sorts behind what is infinitely far.
        order = (indices < 0).int().argsort(dim=1, stable=True)
        scores, indices = scores.gather(1, order), indices.gather(1, order)
        order = scores.argsort(dim=1, stable=True)[:, :k]
        found.scores[part] = scores.gather(1, order)
        found.indices[part] = indices.gather(1, order)


def _sqdist(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).square_().sum(dim=2)


def _negative_product(x: Tensor, y: Tensor) -> Tensor:
    return -(x[:, None] * y).sum(dim=2)


def _one_minus_cosine(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(dim=1)[:, None] * y.square().sum(dim=1)
    cosines = (x[:, None] * y).sum(dim=2) / squares.sqrt()
    return 1 - cosines.masked_fill_(squares == 0, 0).clamp_(-1, 1)


_SCORES: list[Callable[[Tensor, Tensor], Tensor]] = [_sqdist, _negative_product, _one_minus_cosine]


# -- the matrix ------------------------------------------------------------------------------------


@torch.no_grad()
def pairwise_sqdist(x: Tensor | Array, y: Tensor | Array, *, backend: str | None = None) -> Tensor:
    """The squared Euclidean distances of all pairs, without cancellation.

    Every entry is the float64 sum of squared differences, rounded once; the distance of a row to an
    equal row is exactly 0. (`torch.cdist` expands the square, which loses the digits that large
    norms have in common.)

    Args:
        x: float32, float64, bfloat16 or float16 matrix [n, d]; a tensor or numpy array.
        y: matrix [m, d] of the same dtype and device.
        backend: "auto", "cpu" or "reference"; None is what `pyoptim.use_backend` chose.

    Returns:
        [n, m], float32, or float64 for float64 inputs. No gradient flows. NaN stays NaN.

    Raises: ValueError for shapes that do not fit; TypeError for dtypes.
    """
    a, b = check_matrix(as_tensor(x, "x"), "x"), check_matrix(as_tensor(y, "y"), "y")
    _check_pair(a, b)
    dtype = torch.promote_types(a.dtype, torch.float32)
    out = torch.empty((len(a), len(b)), dtype=dtype, device=a.device)
    if (native := kernels_for(a, backend)) is not None:
        native.coreset_pairwise(row_major(a), row_major(b), out)
        return out
    wide = b.double()
    for part in spans(len(a), _REFERENCE_ELEMENTS // max(1, wide.numel())):
        out[part] = _sqdist(a[part].double(), wide)
    return out
