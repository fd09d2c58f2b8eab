"""Nearest rows and centres; semantics: the structs from Matrix on in csrc/cuda/api.hpp.

Scores have the order of csrc/coreset/kernels.inl and so the bits of every other engine.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyoptim import kernels
from pyoptim.coreset.certificate import HUGE_NORM
from pyoptim.coreset.engines import lies_on_16_bytes, packed_dtype
from pyoptim.coreset.search import Packed
from pyoptim.kernels import launcher
from pyoptim.kernels.elements import float64_of, narrow, widen
from pyoptim.kernels.launcher import bits_of

Rows = tuple[Tensor, Tensor | None]

# Of a program of the filter, for whole rows and for split ones, which spill registers on sm_80 and
# sm_120 with larger tiles; elements of a row that it multiplies at once, and how often these are on
# their way.
TILE_ROWS, FILTER_WARPS = 128, 8
TILE_COLUMNS, TILE_DEPTHS, FILTER_STAGES = (128, 64), (64, 32), (3, 3)
# Rows, or pairs, of a program that scores.
ROWS = 32
# Columns that a row is scored against at once where the filter has left it open.
SETTLED_COLUMNS = 64
PACKED_ROWS, PACKED_COLUMNS = 8, 128
PARTS = 2048  # kFarthestParts


# -- scores ----------------------------------------------------------------------------------------


@triton.jit
def _sum_terms(x, y, d, PRODUCT: tl.constexpr, N: tl.constexpr):
    """Of N pairs of rows, given where they begin: 16 partial sums, folded in halves."""
    lanes = tl.arange(0, 16)[None, :]
    sums = tl.zeros([N, 16], tl.float64)
    for k in range(0, d, 16):
        a = widen(tl.load(x[:, None] + (k + lanes), mask=k + lanes < d, other=0)).to(tl.float64)
        b = widen(tl.load(y[:, None] + (k + lanes), mask=k + lanes < d, other=0)).to(tl.float64)
        if PRODUCT:
            sums += a * b
        else:
            sums += (a - b) * (a - b)
    for i in tl.static_range(4):
        sums = tl.sum(tl.reshape(sums, (N, 2, 8 >> i)), axis=1)
    return tl.sum(sums, axis=1)  # of one


@triton.jit
def _cosine_distance(product, xx, yy):
    square = xx * yy
    is_normal = (square > 1e-280) & (square < 1e280)
    norms = tl.where(is_normal, tl.sqrt(square), tl.sqrt(xx) * tl.sqrt(yy))
    is_zero = (xx == 0) | (yy == 0)
    cosine = product / tl.where(is_zero, 1.0, norms)
    cosine = tl.where(cosine < -1, -1.0, tl.where(cosine > 1, 1.0, cosine))
    return tl.where(is_zero, 1.0, 1 - cosine)


@triton.jit
def _score(x, y, d, METRIC: tl.constexpr, N: tl.constexpr):
    """As score_pair in csrc/cuda/scores.hpp."""
    if METRIC == 0:
        score = _sum_terms(x, y, d, False, N)
    else:
        score = -_sum_terms(x, y, d, True, N)
        if METRIC == 2:
            xx, yy = _sum_terms(x, x, d, True, N), _sum_terms(y, y, d, True, N)
            score = _cosine_distance(-score, xx, yy)
    return tl.where(score == score, score, float("inf"))


@triton.jit
def _number(rows, i, mask):
    """The number in the matrix of the i-th row."""
    number = i.to(tl.int64)
    if rows is not None:
        number = tl.load(rows + i, mask=mask, other=0)
    return number


@triton.jit(
    do_not_specialize=["x_stride", "n", "d"],
    do_not_specialize_on_alignment=["x", "x_rows", "squares"],
)
def squares_kernel(x, x_stride, x_rows, n, d, squares, N: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    start = x + _number(x_rows, tl.minimum(i, n - 1), i < n) * x_stride
    tl.store(squares + i, _sum_terms(start, start, d, True, N), mask=i < n)


@triton.jit(
    do_not_specialize=["x_stride", "n", "y_stride", "d", "k"],
    do_not_specialize_on_alignment=["x", "x_rows", "y", "y_rows", "columns", "scores"],
)
def scores_kernel(
    x,
    x_stride,
    x_rows,
    n,
    y,
    y_stride,
    y_rows,
    d,
    columns,  # int64 [n][k], or None
    k,
    scores,  # float64 [n][k]
    METRIC: tl.constexpr,
    N: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    is_pair = pair < n.to(tl.int64) * k
    column = tl.where(is_pair, pair % k, 0)
    row = tl.where(is_pair, pair // k, 0)
    if columns is not None:
        column = tl.load(columns + pair, mask=is_pair, other=0)
    a = x + _number(x_rows, row, is_pair) * x_stride
    b = y + _number(y_rows, column, is_pair) * y_stride
    tl.store(scores + pair, _score(a, b, d, METRIC, N), mask=is_pair)


# -- rows ------------------------------------------------------------------------------------------


@triton.jit
def _direction(x, d, BLOCK: tl.constexpr, N: tl.constexpr):
    """1 / norm; 0 for a row of zeros, infinite for one that cannot be normalised."""
    lanes = tl.arange(0, BLOCK)[None, :]
    squares = tl.zeros([N, BLOCK], tl.float64)
    for k in range(0, d, BLOCK):
        value = widen(tl.load(x[:, None] + (k + lanes), mask=k + lanes < d, other=0))
        squares += value.to(tl.float64) * value.to(tl.float64)
    square = tl.sum(squares, axis=1)
    is_normal = (square > 1e-60) & (square < 1e60)
    scale = tl.where(is_normal, 1.0 / tl.sqrt(tl.where(is_normal, square, 1.0)), float("inf"))
    scale = tl.where(square == 0, 0.0, scale)
    return tl.where(square == square, scale, square)


@triton.jit(
    do_not_specialize=["x_stride", "n", "d", "width"],
    do_not_specialize_on_alignment=["x", "x_rows", "about", "center", "norms", "half_norms"],
)
def pack_kernel(
    x,
    x_stride,
    x_rows,
    n,
    d,
    about,  # float64 [4]
    center,  # float64 [d], or None
    width,
    high,  # 16-bit [n][width], or None
    low,  # the same, or None
    norms,  # float64 [n]
    half_norms,  # float32 [n], or None
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    start = x + _number(x_rows, tl.minimum(i, n - 1), i < n) * x_stride
    scale = tl.full([N], 1.0, tl.float64)
    if METRIC == 2:
        scale = _direction(start, d, BLOCK, N)
    elif low is not None:
        scale = scale * tl.load(about)
    squares = tl.zeros([N, BLOCK], tl.float64)
    for first in range(0, width, BLOCK):
        k = first + tl.arange(0, BLOCK)[None, :]
        raw = tl.load(start[:, None] + k, mask=(k < d) & (i < n)[:, None], other=0)
        value = widen(raw).to(tl.float64) * scale[:, None]
        value = tl.where(k < d, value, 0.0)
        if center is not None:
            value = value - tl.load(center + k, mask=k < d, other=0.0)
        squares += value * value
        to = i[:, None] * width + k
        is_here = (k < width) & (i < n)[:, None]
        if low is not None:
            near = value.to(tl.float32)
            part = narrow(near, tl.uint16)
            tl.store(high + to, part, mask=is_here)
            tl.store(low + to, narrow(near - widen(part), tl.uint16), mask=is_here)
        elif high is not None:
            tl.store(high + to, raw, mask=is_here)
    square = tl.sum(squares, axis=1)
    if METRIC == 2:
        square = tl.where(scale == float("inf"), scale, square)
    tl.store(norms + i, tl.sqrt(square) * (1 + 1e-9), mask=i < n)
    if half_norms is not None:
        half = (0.5 * square).to(tl.float32) if METRIC == 0 else tl.zeros([N], tl.float32)
        tl.store(half_norms + i, half, mask=i < n)


# -- the filter ------------------------------------------------------------------------------------


@triton.jit
def _multiply(a, b, sums, INTERPRETED: tl.constexpr):
    """Adds the products of rows of 16-bit elements; bfloat16 comes as its bits, of which the
    interpreter's dot would make nothing."""
    if a.dtype == tl.uint16:
        if INTERPRETED:
            return tl.dot(widen(a), tl.trans(widen(b)), sums, input_precision="ieee")
        else:
            left, right = a.to(tl.bfloat16, bitcast=True), b.to(tl.bfloat16, bitcast=True)
            return tl.dot(left, tl.trans(right), sums)
    else:
        return tl.dot(a, tl.trans(b), sums)


@triton.jit
def _products(
    x_high,
    x_low,
    x_stride,
    n,
    y_high,
    y_low,
    y_stride,
    m,
    width,
    rows,
    columns,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The products of a tile of rows and a tile of columns."""
    sums = tl.zeros([BM, BN], tl.float32)
    at_x = rows.to(tl.int64)[:, None] * x_stride
    at_y = columns.to(tl.int64)[:, None] * y_stride
    for first in range(0, width, BK):
        k = first + tl.arange(0, BK)[None, :]
        in_x, in_y = (rows < n)[:, None] & (k < width), (columns < m)[:, None] & (k < width)
        a = tl.load(x_high + at_x + k, mask=in_x, other=0)
        b = tl.load(y_high + at_y + k, mask=in_y, other=0)
        if x_low is not None:
            # The small products first.
            c = tl.load(x_low + at_x + k, mask=in_x, other=0)
            e = tl.load(y_low + at_y + k, mask=in_y, other=0)
            sums = _multiply(c, b, sums, INTERPRETED)
            sums = _multiply(a, e, sums, INTERPRETED)
        sums = _multiply(a, b, sums, INTERPRETED)
    return sums


@triton.jit
def _insert(first, second, third, i, j, value, column):
    """A value that may be among the three smallest."""
    is_first, is_second, is_third = value < first, value < second, value < third
    third = tl.where(is_second, second, tl.where(is_third, value, third))
    j = tl.where(is_first, i, tl.where(is_second, column, j))
    second = tl.where(is_first, first, tl.where(is_second, value, second))
    i = tl.where(is_first, column, i)
    first = tl.where(is_first, value, first)
    return first, second, third, i, j


@triton.jit(
    do_not_specialize=["n", "m", "n_parts"],
    do_not_specialize_on_alignment=["half_norms", "least", "columns_out", "values"],
)
def filter_kernel(
    x_high,
    x_low,
    x_stride,
    n,
    y_high,
    y_low,
    y_stride,
    m,
    width,
    half_norms,  # float32 [m]
    n_parts,
    least,  # float32 [n_parts][3][n], or None
    columns_out,  # int32 [n_parts][2][n], or None
    values,  # float32 [n][m], or None
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    part = tl.program_id(0) % n_parts
    rows = (tl.program_id(0) // n_parts) * BM + tl.arange(0, BM)
    n_tiles = tl.cdiv(m, BN).to(tl.int64)
    begin = (part * n_tiles // n_parts).to(tl.int32)
    end = ((part + 1) * n_tiles // n_parts).to(tl.int32)
    first = tl.full([BM], float("inf"), tl.float32)
    second, third = first, first
    i = tl.full([BM], -1, tl.int32)
    j = i
    for tile in range(begin, end):
        columns = tile * BN + tl.arange(0, BN)
        sums = _products(
            *(x_high, x_low, x_stride, n, y_high, y_low, y_stride, m, width, rows, columns),
            *(INTERPRETED, BM, BN, BK),
        )
        half = tl.load(half_norms + columns, mask=columns < m, other=float("inf"))
        value = half[None, :] - sums
        # inf - inf is as far as can be.
        value = tl.where(value == value, value, float("inf"))
        if values is not None:
            to = values + rows.to(tl.int64)[:, None] * m + columns[None, :]
            tl.store(to, value, mask=(rows < n)[:, None] & (columns < m)[None, :])
        else:
            for _ in tl.static_range(3):
                lowest, at = tl.min(value, axis=1, return_indices=True)
                first, second, third, i, j = _insert(
                    first, second, third, i, j, lowest, tile * BN + at
                )
                value = tl.where(tl.arange(0, BN)[None, :] == at[:, None], float("inf"), value)
    if values is None:
        n_64 = n.to(tl.int64)
        to = least + 3 * part * n_64 + rows
        tl.store(to, first, mask=rows < n)
        tl.store(to + n_64, second, mask=rows < n)
        tl.store(to + 2 * n_64, third, mask=rows < n)
        to = columns_out + 2 * part * n_64 + rows
        tl.store(to, i, mask=rows < n)
        tl.store(to + n_64, j, mask=rows < n)


# -- what the filter leaves over -------------------------------------------------------------------


@triton.jit
def _keep_best(scores, indices, at, score, index, mask):
    """The lower score, of equal ones the lower index; an index of -1 is none."""
    known, known_index = (
        tl.load(scores + at, mask=mask, other=0.0),
        tl.load(indices + at, mask=mask, other=0),
    )
    is_better = (score < known) | ((score == known) & (index < known_index)) | (known_index < 0)
    tl.store(scores + at, score, mask=mask & is_better)
    tl.store(indices + at, index, mask=mask & is_better)


@triton.jit
def _slack_of(norm, score, about, products, squares, whole, tiny, METRIC: tl.constexpr):
    """As reach_of and slack_of in csrc/cuda/search.cu."""
    largest = tl.load(about + 1)
    reach = norm * 0 + largest
    if METRIC == 0:
        around = (norm + tl.load(about) * tl.sqrt(score)) * (1 + 1e-6)
        reach = tl.where(around < largest, around, largest)
    total = norm + reach + tl.load(about + 2)
    slack = float64_of(products) * norm * reach + float64_of(squares) * reach * reach
    return slack + float64_of(whole) * total * total + float64_of(tiny) * (1 + norm + reach)


@triton.jit(
    do_not_specialize=[
        *("x_stride", "n", "y_stride", "d", "products", "squares", "whole", "tiny"),
        *("n_parts", "first_index"),
    ],
    do_not_specialize_on_alignment=[
        *("x", "x_rows", "y", "y_rows", "about", "norms", "least", "columns", "scores"),
        *("indices", "is_settled"),
    ],
)
def certify_kernel(
    x,
    x_stride,
    x_rows,
    n,
    y,
    y_stride,
    y_rows,
    d,
    products: tl.int64,  # bits of Slack's factors
    squares: tl.int64,
    whole: tl.int64,
    tiny: tl.int64,
    about,
    norms,
    n_parts,
    least,
    columns,
    first_index,
    scores,
    indices,
    is_settled,  # uint8 [n]: whether every pair has still to be scored
    HUGE: tl.constexpr,
    METRIC: tl.constexpr,
    N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    is_row = row < n
    norm = tl.load(norms + row, mask=is_row, other=0.0)
    mode = tl.load(about + (3 + tl.zeros([N], tl.int32)))
    first = tl.full([N], float("inf"), tl.float32)
    second, third = first, first
    i = tl.full([N], -1, tl.int32)
    j = i
    is_filtered = is_row & (norm < HUGE) & (mode == 0)
    for part in range(n_parts):
        value_at, column_at = least + 3 * part * n.to(tl.int64), columns + 2 * part * n.to(tl.int64)
        for s in tl.static_range(2):
            value = tl.load(value_at + s * n.to(tl.int64) + row, mask=is_filtered, other=0.0)
            column = tl.load(column_at + s * n.to(tl.int64) + row, mask=is_filtered, other=-1)
            first, second, third, i, j = _insert(first, second, third, i, j, value, column)
        value = tl.load(value_at + 2 * n.to(tl.int64) + row, mask=is_filtered, other=0.0)
        third = tl.where(value < third, value, third)
    is_filtered = is_filtered & (i >= 0)
    at_x = _number(x_rows, tl.where(is_row, row, 0), is_row)
    at_y = _number(y_rows, tl.where(is_filtered, i, 0), is_filtered)
    score = _score(x + at_x * x_stride, y + at_y * y_stride, d, METRIC, N)
    slack = _slack_of(norm, score, about, products, squares, whole, tiny, METRIC)
    limit = first.to(tl.float64) + slack
    is_certain = is_filtered & (third.to(tl.float64) > limit)
    has_two = is_certain & ~(second.to(tl.float64) > limit)
    if tl.sum(has_two.to(tl.int32), axis=0) > 0:
        at_z = _number(y_rows, tl.where(has_two, j, 0), has_two)
        other = _score(x + at_x * x_stride, y + at_z * y_stride, d, METRIC, N)
        is_better = has_two & ((other < score) | ((other == score) & (at_z < at_y)))
        score, at_y = tl.where(is_better, other, score), tl.where(is_better, at_z, at_y)
    _keep_best(scores, indices, at_x, score, first_index + at_y, is_certain)
    # A NaN is not settled: the caller will be told of it.
    is_open = (norm == norm) & (mode != 2) & ~is_certain
    tl.store(is_settled + row, is_open.to(tl.uint8), mask=is_row)


@triton.jit(
    do_not_specialize=["x_stride", "y_stride", "m", "d", "first_index"],
    do_not_specialize_on_alignment=[
        *("x", "x_rows", "y", "y_rows", "scores", "indices", "is_settled"),
    ],
)
def settle_kernel(
    x,
    x_stride,
    x_rows,
    y,
    y_stride,
    y_rows,
    m,
    d,
    first_index,
    scores,
    indices,
    is_settled,
    METRIC: tl.constexpr,
    N: tl.constexpr,
):
    """A program for every row; nearly all of them have nothing to do."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(is_settled + row) == 0:
        return
    one = tl.arange(0, 1)
    at_x = _number(x_rows, row + one, one < 1)
    start = x + (at_x + tl.zeros([N], tl.int64)) * x_stride
    best = tl.full([N], float("inf"), tl.float64)
    column = tl.full([N], -1, tl.int64)
    for begin in range(0, m, N):
        i = begin + tl.arange(0, N)
        at_y = _number(y_rows, tl.where(i < m, i, 0), i < m)
        score = _score(start, y + at_y * y_stride, d, METRIC, N)
        is_better = (i < m) & ((score < best) | (column < 0))
        best = tl.where(is_better, score, best)
        column = tl.where(is_better, at_y, column)
    best = tl.where(column < 0, float("inf"), best)
    lowest = tl.min(best, axis=0)
    is_lowest = (best == lowest) & (column >= 0)
    index = first_index + tl.min(tl.where(is_lowest, column, 0x7FFFFFFFFFFFFFFF), axis=0)
    _keep_best(scores, indices, at_x, lowest + tl.zeros([1], tl.float64), index + one, one < 1)


# -- centres ---------------------------------------------------------------------------------------


@triton.jit
def _farthest(sqdist, row, nan_row):
    """The largest, the lowest row that has it, the first that is no number; -1 where none is."""
    none: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    largest = tl.max(tl.where(row >= 0, sqdist, -1.0), axis=0)
    lowest = tl.min(tl.where((row >= 0) & (sqdist == largest), row, none), axis=0)
    first = tl.min(tl.where(nan_row >= 0, nan_row, none), axis=0)
    return largest, tl.where(lowest == none, -1, lowest), tl.where(first == none, -1, first)


@triton.jit(
    do_not_specialize=["x_stride", "n", "d", "rounds"],
    do_not_specialize_on_alignment=["x", "center", "former", "min_sqdist", "sqdists", "rows"],
)
def step_center_kernel(
    x,
    x_stride,
    n,
    d,
    center,  # float64 [d], or None
    former,  # int64 [1]: a row of x in its place
    min_sqdist,  # float64 [n]
    rounds,
    sqdists,  # float64 [grid]
    rows,  # int64 [2][grid]
    N: tl.constexpr,
):
    lanes = tl.arange(0, N)
    best = tl.full([N], -1.0, tl.float64)
    row, nan_row = tl.full([N], -1, tl.int64), tl.full([N], -1, tl.int64)
    start = center
    if center is None:
        start = x + tl.load(former) * x_stride
    at_center = start + tl.zeros([N], tl.int64)
    for r in range(rounds):
        i = (r + tl.zeros([N], tl.int64)) * tl.num_programs(0) * N + tl.program_id(0) * N + lanes
        is_row = i < n
        sqdist = _sum_terms(x + tl.where(is_row, i, 0) * x_stride, at_center, d, False, N)
        known = tl.load(min_sqdist + i, mask=is_row, other=-1.0)
        least = tl.where(sqdist < known, sqdist, known)
        tl.store(min_sqdist + i, least, mask=is_row & (sqdist < known))
        is_farther = is_row & (least > best)
        best, row = tl.where(is_farther, least, best), tl.where(is_farther, i, row)
        is_first_nan = is_row & (sqdist != sqdist) & (nan_row < 0)
        nan_row = tl.where(is_first_nan, i, nan_row)
    best_of_all, row_of_all, nan_of_all = _farthest(best, row, nan_row)
    part = tl.program_id(0)
    tl.store(sqdists + part, best_of_all)
    tl.store(rows + part, row_of_all)
    tl.store(rows + tl.num_programs(0) + part, nan_of_all)


@triton.jit(
    do_not_specialize=["n"], do_not_specialize_on_alignment=["sqdists", "rows", "sqdist", "row"]
)
def farthest_kernel(sqdists, rows, n, sqdist, row, N: tl.constexpr):
    i = tl.arange(0, N)
    values = tl.load(sqdists + i, mask=i < n, other=-1.0)
    found = tl.load(rows + i, mask=i < n, other=-1)
    nans = tl.load(rows + n + i, mask=i < n, other=-1)
    largest, lowest, first = _farthest(values, found, nans)
    tl.store(sqdist, largest)
    tl.store(row, lowest)
    tl.store(row + 1, first)


@triton.jit(
    do_not_specialize=["x_stride", "n", "d"],
    do_not_specialize_on_alignment=["x", "labels", "centers", "out"],
)
def center_sqdist_kernel(x, x_stride, n, d, labels, centers, out, N: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    label = tl.load(labels + i, mask=i < n, other=0)
    start = x + tl.where(i < n, i, 0) * x_stride
    sqdist = _sum_terms(start, centers + label * d, d, False, N)
    tl.store(out + i, sqdist, mask=i < n)


# -- host ------------------------------------------------------------------------------------------


def _elements(x: Tensor) -> Tensor:
    """bfloat16 as its bits."""
    return x.view(torch.uint16) if x.dtype == torch.bfloat16 else x


def _size(x: Tensor, rows: Tensor | None) -> int:
    return len(x) if rows is None else len(rows)


class TritonEngine:
    """The calls that `pyoptim.coreset.search` and `CenterDistances` make."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _launch(self, kernel: Any, n: int, *args: Any, **constants: Any) -> None:
        if n > 0:
            with launcher.on(self.device):
                launcher.launch(kernel, (n,), *args, **constants)

    def squares(self, x: Tensor, rows: Tensor | None) -> Tensor:
        n = _size(x, rows)
        out = self._empty(n)
        grid = -(-n // ROWS)
        args = (_elements(x), x.stride(0), rows, n, x.shape[1], out)
        self._launch(squares_kernel, grid, *args, N=ROWS)
        return out

    def pack(
        self,
        x: Tensor,
        rows: Tensor | None,
        metric: int,
        splits: bool,
        about: Tensor,
        center: Tensor | None,
        has_half_norms: bool,
    ) -> Packed:
        n, d = _size(x, rows), x.shape[1]
        width = max(32, -(-d // 32) * 32)
        # Packed rows end with zeros, and the filter reads them to their end.
        is_ready = not splits and rows is None and d % 32 == 0 and lies_on_16_bytes(x)
        dtype = packed_dtype(x, splits)
        high = None if is_ready else self._empty(n, width, dtype=dtype)
        low = self._empty(n, width, dtype=dtype) if splits else None
        norms = self._empty(n)
        half_norms = self._empty(n, dtype=torch.float32) if has_half_norms else None
        self._launch(
            *(pack_kernel, -(-n // PACKED_ROWS), _elements(x), x.stride(0), rows, n, d, about),
            *(center, width, None if high is None else _elements(high)),
            *(None if low is None else _elements(low), norms, half_norms),
            METRIC=metric,
            BLOCK=PACKED_COLUMNS,
            N=PACKED_ROWS,
        )
        return Packed(x if high is None else high, low, norms, half_norms)

    def nearest(self, x: Packed, y: Packed, d: int, n_parts: int) -> tuple[Tensor, Tensor]:
        n = len(x.norms)
        least = self._empty(n_parts, 3, n, dtype=torch.float32)
        columns = self._empty(n_parts, 2, n, dtype=torch.int32)
        self._filter(x, y, n_parts, least, columns, None)
        return least, columns

    def values(self, x: Packed, y: Packed, d: int, n_parts: int) -> Tensor:
        values = self._empty(len(x.norms), len(y.norms), dtype=torch.float32)
        self._filter(x, y, n_parts, None, None, values)
        return values

    def _filter(
        self,
        x: Packed,
        y: Packed,
        n_parts: int,
        least: Tensor | None,
        columns: Tensor | None,
        values: Tensor | None,
    ) -> None:
        n, m = len(x.norms), len(y.norms)
        splits = x.low is not None
        operands: list[Any] = []
        for packed, size in ((x, n), (y, m)):
            low = None if packed.low is None else _elements(packed.low)
            operands += [_elements(packed.high), low, packed.high.stride(0), size]
        self._launch(
            *(filter_kernel, -(-n // TILE_ROWS) * n_parts, *operands, x.high.shape[1]),
            *(y.half_norms, n_parts, least, columns, values),
            INTERPRETED=kernels.device_type() == "cpu",
            BM=TILE_ROWS,
            BN=TILE_COLUMNS[splits],
            BK=TILE_DEPTHS[splits],
            num_warps=FILTER_WARPS,
            num_stages=FILTER_STAGES[splits],
        )

    def certify(
        self,
        x: Rows,
        y: Rows,
        metric: int,
        slack: tuple[float, ...],
        about: Tensor,
        norms: Tensor,
        least: tuple[Tensor, Tensor],
        first_index: int,
        scores: Tensor,
        indices: Tensor,
    ) -> Tensor:
        n, d = len(norms), x[0].shape[1]
        is_settled = self._empty(n, dtype=torch.uint8)
        a = (_elements(x[0]), x[0].stride(0), x[1])
        b = (_elements(y[0]), y[0].stride(0), y[1])
        self._launch(
            *(certify_kernel, -(-n // ROWS), *a, n, *b, d, *map(bits_of, slack), about, norms),
            *(len(least[0]), *least, first_index, scores, indices, is_settled),
            HUGE=HUGE_NORM,
            METRIC=metric,
            N=ROWS,
        )
        self._launch(
            *(settle_kernel, n, *a, *b, _size(*y), d, first_index, scores, indices, is_settled),
            METRIC=metric,
            N=SETTLED_COLUMNS,
        )
        return is_settled

    def scores(self, x: Rows, y: Rows, metric: int, columns: Tensor | None) -> Tensor:
        n, d = _size(*x), x[0].shape[1]
        k = _size(*y) if columns is None else columns.shape[1]
        out = self._empty(n, k)
        self._launch(
            *(scores_kernel, -(-n * k // ROWS), _elements(x[0]), x[0].stride(0), x[1], n),
            *(_elements(y[0]), y[0].stride(0), y[1], d, columns, k, out),
            METRIC=metric,
            N=ROWS,
        )
        return out

    def step_center(
        self, x: Tensor, center: Tensor | None, sqdist: Tensor, partials: Tensor, found: Tensor
    ) -> None:
        n, d = x.shape
        grid = min(PARTS, -(-n // ROWS))
        rounds = -(-n // (grid * ROWS))
        sqdists = partials[: 8 * PARTS].view(torch.float64)
        rows = partials[8 * PARTS :].view(torch.int64)
        row = found[8:].view(torch.int64)
        self._launch(
            *(step_center_kernel, grid, _elements(x), x.stride(0), n, d, center, row, sqdist),
            *(rounds, sqdists, rows),
            N=ROWS,
        )
        largest = found[:8].view(torch.float64)
        self._launch(farthest_kernel, 1, sqdists, rows, grid, largest, row, N=PARTS)

    def center_sqdist(self, x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        n, d = x.shape
        out = self._empty(n)
        args = (_elements(x), x.stride(0), n, d, labels, centers, out)
        self._launch(center_sqdist_kernel, -(-n // ROWS), *args, N=ROWS)
        return out
