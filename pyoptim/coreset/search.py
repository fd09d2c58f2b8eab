"""Exact nearest rows on the device where the data lies, whichever engine's kernels do the work.

A filter multiplies on the tensor cores and keeps, for k = 1, the three smallest values of every
row. Their error is bounded (`pyoptim.coreset.certificate`), and what the filter cannot rule out is
scored in float64, in the order of the CPU's scores and so with its bits. For k = 1 nothing waits
for the device until all is done, when a NaN has to be reported. For larger k a block of values is
stored and `torch.topk` names the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyoptim.coreset.certificate import HUGE_NORM, slack_factors
from pyoptim.coreset.matrices import spans

SQDIST, IP, COSINE = 0, 1, 2
# Packed rows of x and of y at once, which bounds the memory: x's stay in the cache of a large GPU.
X_BYTES, Y_BYTES = 1 << 26, 1 << 28
# Elements of the block of values that is stored for k > 1, and pairs that are scored at once where
# the filter rules out too little.
VALUES = 1 << 24
SETTLED_PAIRS = 1 << 22
TILE_ROWS, TILE_COLUMNS = 256, 128
# Rows that the centre of y is the mean of.
CENTER_ROWS = 1024
# Blocks per multiprocessor that a filter is dealt to.
WAVES = 4
# Candidates beside the k: enough for a few that the filter cannot tell apart.
SPARE_CANDIDATES = 16


@dataclass
class Packed:
    """Rows as the filter reads them: 16-bit [n, width], `low` None where they are not split."""

    high: Tensor
    low: Tensor | None
    norms: Tensor
    half_norms: Tensor | None


class Engine(Protocol):
    """The kernels; semantics as of the structs of these names in csrc/cuda/api.hpp."""

    def squares(self, x: Tensor, rows: Tensor | None) -> Tensor: ...

    def pack(
        self,
        x: Tensor,
        rows: Tensor | None,
        metric: int,
        splits: bool,
        about: Tensor,
        center: Tensor | None,
        has_half_norms: bool,
    ) -> Packed: ...

    def nearest(self, x: Packed, y: Packed, d: int, n_parts: int) -> tuple[Tensor, Tensor]: ...

    def values(self, x: Packed, y: Packed, d: int, n_parts: int) -> Tensor: ...

    def certify(
        self,
        x: tuple[Tensor, Tensor | None],
        y: tuple[Tensor, Tensor | None],
        metric: int,
        slack: tuple[float, ...],
        about: Tensor,
        norms: Tensor,
        least: tuple[Tensor, Tensor],
        first_index: int,
        scores: Tensor,
        indices: Tensor,
    ) -> Tensor: ...

    def scores(
        self,
        x: tuple[Tensor, Tensor | None],
        y: tuple[Tensor, Tensor | None],
        metric: int,
        columns: Tensor | None,
    ) -> Tensor: ...


def nearest(
    engine: Engine,
    x: Tensor,
    y: Tensor,
    x_rows: Tensor | None,
    y_rows: Tensor | None,
    k: int,
    metric: int,
    first_index: int,
    scores: Tensor,
    indices: Tensor,
) -> tuple[int, int]:
    """Merges the k best rows of y into `scores` and `indices`, as `_C.coreset_nearest` does.

    Returns: (first row of x, first row of y) that holds a NaN, -1 where there is none.
    """
    x, y = dense_rows(x), dense_rows(y)
    x_rows, y_rows = (None if r is None else r.to(x.device) for r in (x_rows, y_rows))
    n, m = (len(t) if r is None else len(r) for t, r in ((x, x_rows), (y, y_rows)))
    if n == 0 or m == 0:
        return _first_nan(engine, x, x_rows), _first_nan(engine, y, y_rows)
    if x.shape[1] == 0:
        _score_all(engine, (x, x_rows), (y, y_rows), k, metric, first_index, scores, indices)
        return -1, -1
    width = _width(x.shape[1])
    block = max(TILE_COLUMNS, Y_BYTES // (4 * width))
    if k > 1:  # so that the values of a whole tile of rows can be stored
        block = min(block, VALUES // TILE_ROWS)
    for part in spans(m, block):
        y_part, y_part_rows, first = _part(y, y_rows, part)
        search = _Search(engine, (x, x_rows), (y_part, y_part_rows), metric)
        bad = search.run(k, first_index + first, scores, indices)
        if bad[1] >= 0:
            return -1, first + bad[1]
        if bad[0] >= 0:
            return bad
    return -1, -1


def _score_all(
    engine: Engine,
    x: tuple[Tensor, Tensor | None],
    y: tuple[Tensor, Tensor | None],
    k: int,
    metric: int,
    first_index: int,
    scores: Tensor,
    indices: Tensor,
) -> None:
    """Without a filter."""
    n, m = (len(t) if r is None else len(r) for t, r in (x, y))
    every = torch.arange(n, device=x[0].device)
    for part in open_rows(torch.ones_like(every, dtype=torch.bool), m):
        rows = part if x[1] is None else x[1][part]
        found, columns = engine.scores((x[0], rows), y, metric, None).sort(dim=1, stable=True)
        columns = columns[:, :k] if y[1] is None else y[1][columns[:, :k]]
        merge(found[:, :k], columns + first_index, scores, indices, rows)


def dense_rows(x: Tensor) -> Tensor:
    """Returns x, or a copy whose rows have their elements side by side where they belong."""
    is_dense = x.stride(1) == 1 or x.shape[1] <= 1
    return x if is_dense and x.data_ptr() % x.element_size() == 0 else x.contiguous()


def _width(d: int) -> int:
    return max(32, -(-d // 32) * 32)


def _part(x: Tensor, rows: Tensor | None, part: slice) -> tuple[Tensor, Tensor | None, int]:
    """Some rows, and what their numbers begin with: those listed keep theirs."""
    if rows is None:
        return x[part], None, part.start
    return x, rows[part], 0


def _first_nan(engine: Engine, x: Tensor, rows: Tensor | None) -> int:
    n = len(x) if rows is None else len(rows)
    return _row(_first(engine.squares(x, rows).isnan()), rows) if n and x.shape[1] else -1


def _first(is_bad: Tensor) -> Tensor:
    """0-dim, the first place that is true, -1 where none is; nobody waits."""
    return torch.where(is_bad.any(), is_bad.int().argmax(), -1)


def _row(at: Tensor | int, rows: Tensor | None) -> int:
    found = int(at)
    return found if found < 0 or rows is None else int(rows[found])


class _Search:
    """All rows of x against some of y."""

    def __init__(
        self,
        engine: Engine,
        x: tuple[Tensor, Tensor | None],
        y: tuple[Tensor, Tensor | None],
        metric: int,
    ) -> None:
        self.engine, self.x, self.y, self.metric = engine, x, y, metric
        self.d = x[0].shape[1]
        self.m = len(y[0]) if y[1] is None else len(y[1])
        # Rows of 16 bits are exact as they are; what is normalised is not.
        self.splits = metric == COSINE or x[0].dtype.itemsize > 2
        self.slack = slack_factors(self.d, self.splits)
        self.squares = engine.squares(*y)
        # Of y alone; -1 where there is none.
        self.nan = _first(self.squares.isnan())
        self.about, self.center = self._about()
        self.packed = self._pack(*y, has_half_norms=True)
        norms = self.packed.norms
        self.about[1] = torch.where(norms.isfinite(), norms, 0.0).max()

    def _about(self) -> tuple[Tensor, Tensor | None]:
        """scale, 0, norm of the centre, mode; and the centre."""
        squares = self.squares
        is_finite = squares.isfinite()
        largest = torch.where(is_finite, squares, 0.0).max().sqrt()
        zero = torch.zeros_like(largest)
        exponent = torch.frexp(largest)[1] if self.splits else torch.zeros_like(self.nan)
        scale = torch.ldexp(zero + 1, -exponent.clamp(-120, 120))
        center = self._mean() * scale if self.splits and self.metric != COSINE else None
        scores_all = ~is_finite.all() if self._needs_finite() else zero.bool()
        if self.metric == COSINE:
            is_normal = ((squares > 1e-60) & (squares < 1e60)) | (squares == 0)
            scores_all = scores_all | ~is_normal.all()
        elif not self.splits:
            scores_all = scores_all | (largest >= HUGE_NORM)
        mode = torch.where(self.nan >= 0, 2.0, scores_all.double())
        norm = zero if center is None else torch.linalg.vector_norm(center)
        return torch.stack([scale, zero, norm * (1 + 1e-9), mode]), center

    def _needs_finite(self) -> bool:
        """An infinite row is infinitely far, but its products are of either sign; and float64 rows
        may only be too large for float64 squares."""
        return self.metric != SQDIST or self.y[0].dtype == torch.float64

    def _mean(self) -> Tensor:
        """Of some rows, without the longest: one of them could draw the mean away from all."""
        tensor, rows = self.y
        step = max(1, self.m // CENTER_ROWS)
        some = tensor[::step] if rows is None else tensor[rows[::step]]
        squares = self.squares[::step]
        counts = (squares.isfinite() & (squares <= 4 * squares.median()))[:, None]
        return torch.where(counts, some.double(), 0.0).sum(0) / counts.sum().clamp(min=1)

    def _pack(self, x: Tensor, rows: Tensor | None, has_half_norms: bool = False) -> Packed:
        is_y_only = self.metric == IP and not has_half_norms
        center = None if is_y_only else self.center
        return self.engine.pack(
            x, rows, self.metric, self.splits, self.about, center, has_half_norms
        )

    def run(self, k: int, first_index: int, scores: Tensor, indices: Tensor) -> tuple[int, int]:
        x, rows = self.x
        n = len(x) if rows is None else len(rows)
        step = max(1, X_BYTES // (4 * _width(self.d) * TILE_ROWS)) * TILE_ROWS
        if k > 1:
            if int(self.nan) >= 0:
                return -1, _row(self.nan, self.y[1])
            step = max(1, min(step, VALUES // self.m))
        bad = []
        for part in spans(n, step):
            x_part, x_part_rows, _ = _part(x, rows, part)
            packed = self._pack(x_part, x_part_rows)
            at = _first(packed.norms.isnan())
            bad.append(torch.where(at < 0, at, at + part.start))
            into = (scores[part], indices[part]) if rows is None else (scores, indices)
            if k == 1:
                self._find_one((x_part, x_part_rows), packed, first_index, *into)
            else:
                self._find_several((x_part, x_part_rows), packed, first_index, k, *into)
        found = torch.stack([self.nan, *bad]).tolist()
        of_x = [at for at in found[1:] if at >= 0]
        return (
            _row(of_x[0], rows) if of_x else -1,
            _row(found[0], self.y[1]),
        )

    def _find_one(
        self,
        x: tuple[Tensor, Tensor | None],
        packed: Packed,
        first_index: int,
        scores: Tensor,
        indices: Tensor,
    ) -> None:
        parts = n_parts(len(packed.norms), self.m, x[0].device)
        least = self.engine.nearest(packed, self.packed, self.d, parts)
        self.engine.certify(
            x,
            self.y,
            self.metric,
            self.slack,
            self.about,
            packed.norms,
            least,
            first_index,
            scores,
            indices,
        )

    def _find_several(
        self,
        x: tuple[Tensor, Tensor | None],
        packed: Packed,
        first_index: int,
        k: int,
        scores: Tensor,
        indices: Tensor,
    ) -> None:
        k, parts = min(k, self.m), n_parts(len(packed.norms), self.m, x[0].device)
        values, columns = self.engine.values(packed, self.packed, self.d, parts).topk(
            min(k + SPARE_CANDIDATES, self.m), largest=False
        )
        columns, order = columns.sort(dim=1)
        found, order = self.engine.scores(x, self.y, self.metric, columns).sort(dim=1, stable=True)
        found, columns = found[:, :k], columns.gather(1, order[:, :k])
        is_open = ~self._is_certain(k, packed.norms, values.double(), found[:, -1])
        for part in open_rows(is_open, self.m):
            rows = part if x[1] is None else x[1][part]
            every = self.engine.scores((x[0], rows), self.y, self.metric, None)
            every, order = every.sort(dim=1, stable=True)
            found[part], columns[part] = every[:, :k], order[:, :k]
        if self.y[1] is not None:
            columns = self.y[1][columns]
        at: Any = slice(None) if x[1] is None else x[1]
        merge(found, columns + first_index, scores, indices, at)

    def _is_certain(self, k: int, norms: Tensor, values: Tensor, kth_score: Tensor) -> Tensor:
        """Whether all columns but the candidates, whose values are given, are ruled out."""
        if values.shape[1] == self.m:
            return torch.ones_like(norms, dtype=torch.bool)
        scale, largest, center_norm, mode = self.about
        reach = largest
        if self.metric == SQDIST:
            reach = torch.minimum((norms + scale * kth_score.sqrt()) * (1 + 1e-6), largest)
        product, square, whole, tiny = self.slack
        slack = product * norms * reach + square * reach.square() + tiny * (1 + norms + reach)
        slack = slack + whole * (norms + reach + center_norm).square()
        is_filtered = (norms < HUGE_NORM) & (mode == 0)
        is_certain: Tensor = is_filtered & (values[:, -1] > values[:, k - 1] + slack)
        return is_certain


def open_rows(is_open: Tensor, m: int) -> list[Tensor]:
    """The rows that the filter left open, so many at a time as can be scored at once."""
    rows = is_open.nonzero().squeeze(1)
    parts = spans(len(rows), SETTLED_PAIRS // max(1, m)) if len(rows) else ()
    return [rows[part] for part in parts]


def merge(found: Tensor, columns: Tensor, scores: Tensor, indices: Tensor, at: Any) -> None:
    """Puts the k best of what was known and what was found in place, the earlier first of equals;
    what is not there yet (-1) comes behind what is infinitely far."""
    k = scores.shape[1]
    found = torch.cat([scores[at], found], dim=1)
    columns = torch.cat([indices[at], columns], dim=1)
    order = found.argsort(dim=1, stable=True)
    found, columns = found.gather(1, order), columns.gather(1, order)
    order = (columns < 0).int().argsort(dim=1, stable=True)
    found, columns = found.gather(1, order), columns.gather(1, order)
    scores[at], indices[at] = found[:, :k], columns[:, :k]


def n_parts(n: int, m: int, device: torch.device) -> int:
    """How many blocks share the columns of a tile of rows, so that no multiprocessor is idle."""
    tiles, most = -(-n // TILE_ROWS), -(-m // TILE_COLUMNS)
    return max(1, min(most, -(-WAVES * _multiprocessors(device) // tiles)))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
