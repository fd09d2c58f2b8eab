"""The update of rules that project, in phases as csrc/cuda/phases.hpp has them.

check (rows of tensors that may have a channel view), sweep (tensors without one), rows (tensors
with one), decide (the layer view), write (what had to wait for it). What a phase finds stays on the
device. The order of every sum is csrc/reduce/order.hpp's, the arithmetic csrc/rules/projection.hpp.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pyoptim.kernels import engine, launcher
from pyoptim.kernels.elements import narrow, widen
from pyoptim.kernels.engine import (
    Given,
    factor_of,
    hyper_blocks,
    inverse_of,
    pointer_to,
    pointers_of,
)
from pyoptim.kernels.launcher import Array, bits_of, upload

LANE_STEPS = 10
LANES = 1 << LANE_STEPS  # reduce::kLanes
CHUNK = 16 * LANES  # reduce::kChunk
COLUMNS = 16  # kBlockColumns
# Four lanes per thread: four sums of eight lanes would not fit into its registers.
NUM_WARPS = 8
# Rows of up to so many elements share a block of LANES elements; longer ones pass through it in
# stripes.
SHORT_STEPS = (4, 7)  # to the base of 2
# Of a tensor's rows those that are checked first, as in csrc/cuda/project.cu.
FIRST_ROWS, FIRST_ELEMENTS = 8, 4 * CHUNK
# float64 numbers per chunk of a tensor: kItemSums and kTileSums of csrc/cuda/phases.hpp.
ITEM_SUMS, TILE_SUMS = 6, 7
UNALIGNED = [
    *("addresses", "tensors", "programs", "hypers", "clip_at", "found_inf", "failed", "is_layer"),
    *("sums", "layer", "grad_scale"),
]


# -- arithmetic ------------------------------------------------------------------------------------


@triton.jit
def _is_orthogonal(gw, gg, ww, sign, eps, delta, size):
    sign, eps, delta = sign.to(tl.float64), eps.to(tl.float64), delta.to(tl.float64)
    across, least = sign * gw, eps * eps
    g = sign * sign * gg
    norms = tl.where(ww < least, least, ww) * tl.where(g < least, least, g)
    return across * across * size.to(tl.float64) < delta * delta * norms


@triton.jit
def _radial_part(ww, wu, eps):
    norm = tl.sqrt(ww) + eps.to(tl.float64)
    return wu / (norm * norm)


@triton.jit
def _halve(x, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """The sums left of 2^STEPS lanes each: the upper half is added to the lower.

    A sum of two numbers is the same in any order, whatever the compiler makes of it.
    """
    for i in tl.static_range(STEPS):
        x = tl.sum(tl.reshape(x, (ROWS, 2, (1 << STEPS) >> (i + 1))), axis=1)
    return tl.sum(x, axis=1)  # of one


@triton.jit
def _halve_one(x, STEPS: tl.constexpr):
    for i in tl.static_range(STEPS):
        x = tl.sum(tl.reshape(x, (2, (1 << STEPS) >> (i + 1))), axis=0)
    return tl.sum(x, axis=0)  # of one


# -- loading ---------------------------------------------------------------------------------------


@triton.jit
def _field(tensors, n, row: tl.constexpr, t):
    return tl.load(tensors + row * n + t)


@triton.jit
def _arrays(
    addresses,
    n,
    t,
    start,
    source,
    N_STATES: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Pointers to param, grad, the states and where param is read, from element `start` on.

    Args:
        source: the row of `addresses` that says where tensor t's param is read.
    """
    pointers = pointers_of(addresses, n, t, start, N_STATES, PARAM, STATE, VECTOR)
    pointers += (pointer_to(tl.load(addresses + source * n + t), PARAM, start, VECTOR),)
    return pointers


@triton.jit
def _hyper(
    hypers,
    tensors,
    n,
    t,
    clip_bits,
    clip_at,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The fields of tensor t's block, the sign multiplied by the clip factor as on the CPU."""
    block = hypers + _field(tensors, n, 5, t) * HYPER_STRIDE
    hyper = (tl.load(block) * factor_of(clip_bits, clip_at, COMPUTE),)
    for i in tl.static_range(1, N_FIELDS):
        hyper += (tl.load(block + i),)
    return hyper


@triton.jit
def _active(found_inf, count):
    """`count`, or 0 when nothing is to be done."""
    if found_inf is not None:
        count = tl.where(tl.load(found_inf) == 0, count, 0)
    return count


@triton.jit
def _load(pointer, mask):
    """Elements in the compute type; 0 where the mask, unless it is None, is false."""
    if mask is None:
        return widen(tl.load(pointer))
    else:
        return widen(tl.load(pointer, mask=mask, other=0))


@triton.jit
def _load_states(pointers, offsets, mask, N_STATES: tl.constexpr):
    states = ()
    for i in tl.static_range(N_STATES):
        states += (_load(pointers[2 + i] + offsets, mask),)
    return states


@triton.jit
def _short_product(x, y, mask):
    """x*y in their type; 0 for no element, whose direction may be NaN."""
    if mask is None:
        return x * y
    else:
        return tl.where(mask, x * y, 0.0)


@triton.jit
def _product(w, u, mask):
    """w*u in float64; 0 for no element, whose direction may be NaN."""
    product = w.to(tl.float64) * u.to(tl.float64)
    if mask is None:
        return product
    else:
        return tl.where(mask, product, 0.0)


@triton.jit
def _new_averages(
    AVERAGE: tl.constexpr,
    pointers,
    offsets,
    mask,
    g,
    hyper,
    N_STATES: tl.constexpr,
    STATE: tl.constexpr,
):
    """Stores the new averages and returns them as they are stored."""
    averages = AVERAGE(g, _load_states(pointers, offsets, mask, N_STATES), hyper)
    states = ()
    for i in tl.static_range(N_STATES):
        stored = narrow(averages[i], STATE)
        tl.store(pointers[2 + i] + offsets, stored, mask=mask)
        states += (widen(stored),)
    return states


# -- rows ------------------------------------------------------------------------------------------
#
# A program has items of one tensor, begin to end: its rows, or the chunks of rows that are longer.


@triton.jit
def _items(programs, n_programs, tensors, n, found_inf, CHUNK: tl.constexpr):
    """(tensor, first item, end, n_rows, row_size, inner, n_chunks) of this program."""
    program = programs + tl.program_id(0)
    t = tl.load(program)
    begin = tl.load(program + n_programs)
    end = _active(found_inf, tl.load(program + 2 * n_programs))
    n_rows = _field(tensors, n, 1, t)
    row_size = _field(tensors, n, 0, t) // n_rows
    inner = _field(tensors, n, 2, t)
    return t, begin, end, n_rows, row_size, inner, (row_size + CHUNK - 1) // CHUNK


@triton.jit
def _item(item, n_rows, n_chunks, row_size, inner, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    """(row, chunk, its size, where pointers to it begin, where it begins in these).

    Neighbours are neighbouring rows where a row does not lie in one piece.
    """
    is_contiguous = inner == row_size
    row = tl.where(is_contiguous, item // n_chunks, item % n_rows)
    chunk = tl.where(is_contiguous, item % n_chunks, item // n_rows)
    size = tl.minimum(row_size - chunk * CHUNK, CHUNK).to(tl.int32)
    base, at = chunk * 0, chunk * CHUNK
    if VECTOR > 1:
        base, at = row * row_size + chunk * CHUNK, chunk * 0
    return row, chunk, size, base, at


@triton.jit
def _short_rows(first, end, n_rows, row_size, inner, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """(offsets, mask) of the rows from `first`, each within 2^STEPS columns."""
    row = first + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, 1 << STEPS)[None, :].to(tl.int64)
    offsets = (i // inner * n_rows + row) * inner + i % inner
    return offsets, (row < end) & (i < row_size)


@triton.jit
def _stripe(i, row, n_rows, inner, VECTOR: tl.constexpr):
    """Offsets of elements i of a row; of a chunk, whose start is in the pointers, in one piece."""
    if VECTOR > 1:
        return i
    else:
        return (i // inner * n_rows + row) * inner + i % inner


@triton.jit
def _fail_if(fails, failed):
    """Marks a tensor that has no channel view; many programs may, always with the same number."""
    if fails:
        tl.store(failed, 1)


@triton.jit(
    do_not_specialize=["n", "n_programs", "clip_bits"], do_not_specialize_on_alignment=UNALIGNED
)
def check_short_kernel(
    addresses,  # int64 [2 + N_STATES][n], and [n] more where param is read elsewhere
    tensors,  # int64 [6][n]: numel, n_rows, inner, first tile, number of tiles, hyper
    n,
    programs,  # int64 [3][n_programs]: tensor, first item, end
    n_programs,
    hypers,  # COMPUTE, blocks of HYPER_STRIDE
    clip_bits: tl.int64,
    clip_at,  # float64 [1], or None
    found_inf,  # float32 [1], or None
    failed,  # int32 [n]
    PROJECTION: tl.constexpr,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    PARAM: tl.constexpr,
    SOURCE: tl.constexpr,  # the row of addresses that says where param is read
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,  # of the tree over a row's columns
    CHUNK: tl.constexpr,
):
    t, begin, end, n_rows, row_size, inner, _n_chunks = _items(
        programs, n_programs, tensors, n, found_inf, CHUNK
    )
    hyper = _hyper(hypers, tensors, n, t, clip_bits, clip_at, N_FIELDS, HYPER_STRIDE, COMPUTE)
    eps, _, _, _, delta = PROJECTION(hyper)
    arrays = _arrays(addresses, n, t, 0, SOURCE, 0, PARAM, PARAM, 1)
    for first in range(begin, end, ROWS):
        # By another program, while this one runs.
        if tl.load(failed + t, volatile=True) == 0:
            offsets, mask = _short_rows(first, end, n_rows, row_size, inner, ROWS, STEPS)
            w = _load(arrays[2] + offsets, mask).to(tl.float64)
            g = _load(arrays[1] + offsets, mask).to(tl.float64)
            passes = _is_orthogonal(
                _halve(g * w, ROWS, STEPS),
                _halve(g * g, ROWS, STEPS),
                _halve(w * w, ROWS, STEPS),
                hyper[0],
                eps,
                delta,
                row_size,
            )
            fails = (first + tl.arange(0, ROWS) < end) & (passes == 0)
            _fail_if(tl.sum(fails.to(tl.int32), axis=0) > 0, failed + t)


@triton.jit
def _add_check(arrays, offsets, mask, gw, gg, ww):
    w = _load(arrays[2] + offsets, mask).to(tl.float64)
    g = _load(arrays[1] + offsets, mask).to(tl.float64)
    return gw + g * w, gg + g * g, ww + w * w


@triton.jit(
    do_not_specialize=["n", "n_programs", "clip_bits"], do_not_specialize_on_alignment=UNALIGNED
)
def check_kernel(
    addresses,
    tensors,
    n,
    programs,
    n_programs,
    hypers,
    clip_bits: tl.int64,
    clip_at,
    found_inf,
    failed,
    sums,  # float64 [TILE_SUMS][tiles] by tensor
    PROJECTION: tl.constexpr,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    PARAM: tl.constexpr,
    SOURCE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_SUMS: tl.constexpr,
):
    LANES: tl.constexpr = 1 << STEPS
    t, begin, end, n_rows, row_size, inner, n_chunks = _items(
        programs, n_programs, tensors, n, found_inf, CHUNK
    )
    hyper = _hyper(hypers, tensors, n, t, clip_bits, clip_at, N_FIELDS, HYPER_STRIDE, COMPUTE)
    eps, _, _, _, delta = PROJECTION(hyper)
    lanes = tl.arange(0, LANES)
    for item in range(begin, end):
        if tl.load(failed + t, volatile=True) == 0:
            row, chunk, size, base, at = _item(
                item, n_rows, n_chunks, row_size, inner, CHUNK, VECTOR
            )
            arrays = _arrays(addresses, n, t, base, SOURCE, 0, PARAM, PARAM, VECTOR)
            gw = tl.zeros([LANES], tl.float64)
            gg = tl.zeros([LANES], tl.float64)
            ww = tl.zeros([LANES], tl.float64)
            full = size // LANES * LANES
            for k in range(0, full, LANES):
                offsets = _stripe(at + k + lanes, row, n_rows, inner, VECTOR)
                gw, gg, ww = _add_check(arrays, offsets, None, gw, gg, ww)
            if full < size:
                offsets = _stripe(at + full + lanes, row, n_rows, inner, VECTOR)
                gw, gg, ww = _add_check(arrays, offsets, full + lanes < size, gw, gg, ww)
            gw1 = _halve_one(gw, STEPS)
            gg1 = _halve_one(gg, STEPS)
            ww1 = _halve_one(ww, STEPS)
            if n_chunks == 1:
                passes = _is_orthogonal(gw1, gg1, ww1, hyper[0], eps, delta, row_size)
                _fail_if(passes == 0, failed + t)
            else:
                to = sums + _field(tensors, n, 3, t) * TILE_SUMS + 3 * (row * n_chunks + chunk)
                tl.store(to, gw1)
                tl.store(to + 1, gg1)
                tl.store(to + 2, ww1)


@triton.jit
def _fold(first, count, STRIDE: tl.constexpr, STEPS: tl.constexpr):
    """The sum of `count` partial results, STRIDE apart, as of the elements of one chunk."""
    lanes = tl.arange(0, 1 << STEPS)
    total = tl.zeros([1 << STEPS], tl.float64)
    for i in range(0, count, 1 << STEPS):
        total += tl.load(first + (i + lanes) * STRIDE, mask=i + lanes < count, other=0.0)
    return _halve_one(total, STEPS)


@triton.jit(
    do_not_specialize=["n", "n_programs", "clip_bits"], do_not_specialize_on_alignment=UNALIGNED
)
def fold_kernel(
    tensors,
    n,
    programs,  # int64 [2][n_programs]: tensor, row of more than a chunk
    n_programs,
    hypers,
    clip_bits: tl.int64,
    clip_at,
    found_inf,
    failed,
    sums,
    CHECKS: tl.constexpr,  # the rows, or else finds the radial parts
    PROJECTION: tl.constexpr,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ITEM_SUMS: tl.constexpr,
    TILE_SUMS: tl.constexpr,
):
    t = tl.load(programs + tl.program_id(0))
    row = tl.load(programs + n_programs + tl.program_id(0))
    row_size = _field(tensors, n, 0, t) // _field(tensors, n, 1, t)
    n_chunks = (row_size + CHUNK - 1) // CHUNK
    hyper = _hyper(hypers, tensors, n, t, clip_bits, clip_at, N_FIELDS, HYPER_STRIDE, COMPUTE)
    eps, _, _, _, delta = PROJECTION(hyper)
    of_tensor = sums + _field(tensors, n, 3, t) * TILE_SUMS
    if _active(found_inf, 1) * (tl.load(failed + t) == 0).to(tl.int32) > 0:
        if CHECKS:
            first = of_tensor + 3 * row * n_chunks
            gw = _fold(first, n_chunks, 3, STEPS)
            gg = _fold(first + 1, n_chunks, 3, STEPS)
            ww = _fold(first + 2, n_chunks, 3, STEPS)
            passes = _is_orthogonal(gw, gg, ww, hyper[0], eps, delta, row_size)
            _fail_if(passes == 0, failed + t)
        else:
            first = of_tensor + 2 * row * n_chunks
            ww = _fold(first, n_chunks, 2, STEPS)
            wu = _fold(first + 1, n_chunks, 2, STEPS)
            to = of_tensor + ITEM_SUMS * _field(tensors, n, 4, t) + row
            tl.store(to, _radial_part(ww, wu, eps))


@triton.jit(
    do_not_specialize=["n", "n_programs", "clip_bits"], do_not_specialize_on_alignment=UNALIGNED
)
def rows_short_kernel(
    addresses,
    tensors,
    n,
    programs,
    n_programs,
    hypers,
    clip_bits: tl.int64,
    clip_at,
    found_inf,
    failed,
    AVERAGE: tl.constexpr,
    DIRECTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    PROJECTS_BUFFER: tl.constexpr,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    PARAM: tl.constexpr,
    SOURCE: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    t, begin, end, n_rows, row_size, inner, _n_chunks = _items(
        programs, n_programs, tensors, n, found_inf, CHUNK
    )
    if tl.load(failed + t) == 0:
        hyper = _hyper(hypers, tensors, n, t, clip_bits, clip_at, N_FIELDS, HYPER_STRIDE, COMPUTE)
        eps, step_size, _, decay, _ = PROJECTION(hyper)
        arrays = _arrays(addresses, n, t, 0, SOURCE, N_STATES, PARAM, STATE, 1)
        for first in range(begin, end, ROWS):
            offsets, mask = _short_rows(first, end, n_rows, row_size, inner, ROWS, STEPS)
            p = _load(arrays[2 + N_STATES] + offsets, mask)
            g = _load(arrays[1] + offsets, mask)
            states = _new_averages(AVERAGE, arrays, offsets, mask, g, hyper, N_STATES, STATE)
            u = DIRECTION(g, states, hyper, V)
            ww = _halve(_product(p, p, mask), ROWS, STEPS)
            wu = _halve(_product(p, u, mask), ROWS, STEPS)
            u = u - _radial_part(ww, wu, eps).to(COMPUTE)[:, None] * p
            tl.store(arrays[0] + offsets, narrow(p * decay - step_size * u, PARAM), mask=mask)
            if PROJECTS_BUFFER:
                tl.store(arrays[2] + offsets, narrow(u, STATE), mask=mask)


@triton.jit
def _add_averages(
    arrays,
    offsets,
    mask,
    hyper,
    ww,
    wu,
    AVERAGE: tl.constexpr,
    DIRECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    STATE: tl.constexpr,
):
    p = _load(arrays[2 + N_STATES] + offsets, mask)
    g = _load(arrays[1] + offsets, mask)
    states = _new_averages(AVERAGE, arrays, offsets, mask, g, hyper, N_STATES, STATE)
    u = DIRECTION(g, states, hyper, V)
    return ww + _product(p, p, mask), wu + _product(p, u, mask)


@triton.jit
def _stored_direction(
    arrays,
    offsets,
    mask,
    hyper,
    DIRECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    READS_GRAD: tl.constexpr,
):
    """(p, u) from the averages in memory."""
    p = _load(arrays[2 + N_STATES] + offsets, mask)
    g = p
    if READS_GRAD:
        g = _load(arrays[1] + offsets, mask)
    states = _load_states(arrays, offsets, mask, N_STATES)
    return p, DIRECTION(g, states, hyper, V)


@triton.jit
def _write_projected(
    arrays,
    offsets,
    mask,
    hyper,
    radial,
    DIRECTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    READS_GRAD: tl.constexpr,
    PROJECTS_BUFFER: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
):
    _, step_size, _, decay, _ = PROJECTION(hyper)
    p, u = _stored_direction(arrays, offsets, mask, hyper, DIRECTION, V, N_STATES, READS_GRAD)
    u = u - radial * p
    tl.store(arrays[0] + offsets, narrow(p * decay - step_size * u, PARAM), mask=mask)
    if PROJECTS_BUFFER:
        tl.store(arrays[2] + offsets, narrow(u, STATE), mask=mask)


@triton.jit
def _average_item(
    arrays,
    at,
    size,
    row,
    n_rows,
    inner,
    hyper,
    AVERAGE: tl.constexpr,
    DIRECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    STATE: tl.constexpr,
    VECTOR: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Stores the new averages of a chunk of a row; returns its sums of w*w and w*u."""
    LANES: tl.constexpr = 1 << STEPS
    lanes = tl.arange(0, LANES)
    ww = tl.zeros([LANES], tl.float64)
    wu = tl.zeros([LANES], tl.float64)
    full = size // LANES * LANES
    for k in range(0, full, LANES):
        offsets = _stripe(at + k + lanes, row, n_rows, inner, VECTOR)
        ww, wu = _add_averages(
            *(arrays, offsets, None, hyper, ww, wu, AVERAGE, DIRECTION, V, N_STATES, STATE)
        )
    if full < size:
        offsets = _stripe(at + full + lanes, row, n_rows, inner, VECTOR)
        mask = full + lanes < size
        ww, wu = _add_averages(
            *(arrays, offsets, mask, hyper, ww, wu, AVERAGE, DIRECTION, V, N_STATES, STATE)
        )
    return _halve_one(ww, STEPS), _halve_one(wu, STEPS)


@triton.jit
def _radial_of_item(of_tensor, item, n_chunks, ww, wu, eps):
    """Of a row of one chunk; of several the sums are kept for fold_kernel."""
    if n_chunks > 1:
        tl.store(of_tensor + 2 * item, ww)
        tl.store(of_tensor + 2 * item + 1, wu)
    return _radial_part(ww, wu, eps)


@triton.jit
def _write_item(
    arrays,
    at,
    size,
    row,
    n_rows,
    inner,
    hyper,
    radial,
    DIRECTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    READS_GRAD: tl.constexpr,
    PROJECTS_BUFFER: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    VECTOR: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The projected step of a chunk of a row, from averages that are stored."""
    LANES: tl.constexpr = 1 << STEPS
    lanes = tl.arange(0, LANES)
    full = size // LANES * LANES
    for k in range(0, full, LANES):
        offsets = _stripe(at + k + lanes, row, n_rows, inner, VECTOR)
        _write_projected(
            *(arrays, offsets, None, hyper, radial, DIRECTION, PROJECTION, V),
            *(N_STATES, READS_GRAD, PROJECTS_BUFFER, PARAM, STATE),
        )
    if full < size:
        offsets = _stripe(at + full + lanes, row, n_rows, inner, VECTOR)
        _write_projected(
            *(arrays, offsets, full + lanes < size, hyper, radial, DIRECTION, PROJECTION, V),
            *(N_STATES, READS_GRAD, PROJECTS_BUFFER, PARAM, STATE),
        )


@triton.jit(
    do_not_specialize=["n", "n_programs", "clip_bits"], do_not_specialize_on_alignment=UNALIGNED
)
def rows_kernel(
    addresses,
    tensors,
    n,
    programs,
    n_programs,
    hypers,
    clip_bits: tl.int64,
    clip_at,
    found_inf,
    failed,
    sums,
    IS_WRITE: tl.constexpr,  # of long rows, after their sums; else of all, and of those the sums
    AVERAGE: tl.constexpr,
    DIRECTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    READS_GRAD: tl.constexpr,
    PROJECTS_BUFFER: tl.constexpr,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    PARAM: tl.constexpr,
    SOURCE: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ITEM_SUMS: tl.constexpr,
    TILE_SUMS: tl.constexpr,
):
    t, begin, end, n_rows, row_size, inner, n_chunks = _items(
        programs, n_programs, tensors, n, found_inf, CHUNK
    )
    if tl.load(failed + t) == 0:
        hyper = _hyper(hypers, tensors, n, t, clip_bits, clip_at, N_FIELDS, HYPER_STRIDE, COMPUTE)
        eps, _, _, _, _ = PROJECTION(hyper)
        of_tensor = sums + _field(tensors, n, 3, t) * TILE_SUMS
        of_rows = of_tensor + ITEM_SUMS * _field(tensors, n, 4, t)
        for item in range(begin, end):
            row, chunk, size, base, at = _item(
                item, n_rows, n_chunks, row_size, inner, CHUNK, VECTOR
            )
            arrays = _arrays(addresses, n, t, base, SOURCE, N_STATES, PARAM, STATE, VECTOR)
            if IS_WRITE:
                radial = tl.load(of_rows + row)
            else:
                ww, wu = _average_item(
                    *(arrays, at, size, row, n_rows, inner, hyper),
                    *(AVERAGE, DIRECTION, V, N_STATES, STATE, VECTOR, STEPS),
                )
                radial = _radial_of_item(of_tensor, row * n_chunks + chunk, n_chunks, ww, wu, eps)
            if IS_WRITE or n_chunks == 1:
                tl.debug_barrier()  # what other threads stored is read again
                _write_item(
                    *(arrays, at, size, row, n_rows, inner, hyper, radial.to(COMPUTE), DIRECTION),
                    *(PROJECTION, V, N_STATES, READS_GRAD, PROJECTS_BUFFER, PARAM, STATE),
                    *(VECTOR, STEPS),
                )


# -- elements --------------------------------------------------------------------------------------


@triton.jit
def _tile(programs, n_programs, tensors, n, found_inf, CHUNK: tl.constexpr):
    """(tensor, number, start, size) of the tile of this program."""
    t = tl.load(programs + tl.program_id(0))
    number = tl.load(programs + n_programs + tl.program_id(0))
    start = number * CHUNK
    size = tl.minimum(_field(tensors, n, 0, t) - start, CHUNK)
    return t, number, start, _active(found_inf, size).to(tl.int32)


@triton.jit
def _is_deferred(decay):
    return decay < 0.5


@triton.jit
def _sweep(
    arrays,
    offsets,
    mask,
    hyper,
    writes_param,
    gw,
    gg,
    ww,
    wu,
    AVERAGE: tl.constexpr,
    DIRECTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
):
    _, step_size, decay, _, _ = PROJECTION(hyper)
    p = _load(arrays[2 + N_STATES] + offsets, mask)
    g = _load(arrays[1] + offsets, mask)
    states = _new_averages(AVERAGE, arrays, offsets, mask, g, hyper, N_STATES, STATE)
    u = DIRECTION(g, states, hyper, V)
    if writes_param:
        tl.store(arrays[0] + offsets, narrow(p * decay - step_size * u, PARAM), mask=mask)
    gw += _short_product(g, p, mask)
    gg += _short_product(g, g, mask)
    return gw, gg, ww + _short_product(p, p, mask), wu + _short_product(u, p, mask)


@triton.jit
def _store_sums(to, gw, gg, ww, wu, STEPS: tl.constexpr):
    """Of a tile: of its blocks' columns, in float64."""
    tl.store(to, _halve_one(gw.to(tl.float64), STEPS))
    tl.store(to + 1, _halve_one(gg.to(tl.float64), STEPS))
    tl.store(to + 2, _halve_one(ww.to(tl.float64), STEPS))
    tl.store(to + 3, _halve_one(wu.to(tl.float64), STEPS))


@triton.jit(
    do_not_specialize=["n", "n_programs", "clip_bits"], do_not_specialize_on_alignment=UNALIGNED
)
def sweep_kernel(
    addresses,
    tensors,
    n,
    programs,  # int64 [2][n_programs]: tensor, tile
    n_programs,
    hypers,
    clip_bits: tl.int64,
    clip_at,
    found_inf,
    failed,
    sums,
    AVERAGE: tl.constexpr,
    DIRECTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    PARAM: tl.constexpr,
    SOURCE: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_SUMS: tl.constexpr,
):
    LANES: tl.constexpr = 1 << STEPS
    t, number, start, size = _tile(programs, n_programs, tensors, n, found_inf, CHUNK)
    if (tl.load(failed + t) != 0) & (size > 0):
        has_rows = _field(tensors, n, 1, t) > 0
        hyper = _hyper(hypers, tensors, n, t, clip_bits, clip_at, N_FIELDS, HYPER_STRIDE, COMPUTE)
        _, _, decay, _, _ = PROJECTION(hyper)
        writes_param = (has_rows & _is_deferred(decay)) == 0
        arrays = _arrays(addresses, n, t, start, SOURCE, N_STATES, PARAM, STATE, VECTOR)
        # A lane is a column of a block, its elements COLUMNS apart: csrc/rules/projection.hpp.
        lanes = tl.arange(0, LANES)
        lanes = lanes // COLUMNS * (CHUNK // LANES * COLUMNS) + lanes % COLUMNS
        gw = tl.zeros([LANES], COMPUTE)
        gg = tl.zeros([LANES], COMPUTE)
        ww = tl.zeros([LANES], COMPUTE)
        wu = tl.zeros([LANES], COMPUTE)
        if size == CHUNK:
            for k in range(0, CHUNK // LANES * COLUMNS, COLUMNS):
                gw, gg, ww, wu = _sweep(
                    *(arrays, k + lanes, None, hyper, writes_param, gw, gg, ww, wu),
                    *(AVERAGE, DIRECTION, PROJECTION, V, N_STATES, PARAM, STATE),
                )
        else:
            for k in range(0, tl.minimum(size, CHUNK // LANES * COLUMNS), COLUMNS):
                gw, gg, ww, wu = _sweep(
                    *(arrays, k + lanes, k + lanes < size, hyper, writes_param, gw, gg, ww, wu),
                    *(AVERAGE, DIRECTION, PROJECTION, V, N_STATES, PARAM, STATE),
                )
        if has_rows:
            to = sums + _field(tensors, n, 3, t) * TILE_SUMS + 4 * number
            _store_sums(to, gw, gg, ww, wu, STEPS)


@triton.jit(do_not_specialize=["n", "clip_bits"], do_not_specialize_on_alignment=UNALIGNED)
def decide_kernel(
    tensors,
    n,
    hypers,
    clip_bits: tl.int64,
    clip_at,
    found_inf,
    failed,
    sums,
    is_layer,  # int32 [n]
    layer,  # float64 [n][2]: radial part, that of a step to be repaired
    PROJECTION: tl.constexpr,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    STEPS: tl.constexpr,
    TILE_SUMS: tl.constexpr,
):
    t = tl.program_id(0)
    numel = _field(tensors, n, 0, t)
    has_layer = (_field(tensors, n, 1, t) > 0) & (tl.load(failed + t) != 0) & (numel > 0)
    if _active(found_inf, has_layer.to(tl.int32)) > 0:
        hyper = _hyper(hypers, tensors, n, t, clip_bits, clip_at, N_FIELDS, HYPER_STRIDE, COMPUTE)
        eps, step_size, decay, projected_decay, delta = PROJECTION(hyper)
        first = sums + _field(tensors, n, 3, t) * TILE_SUMS
        n_tiles = _field(tensors, n, 4, t)
        gw = _fold(first, n_tiles, 4, STEPS)
        gg = _fold(first + 1, n_tiles, 4, STEPS)
        ww = _fold(first + 2, n_tiles, 4, STEPS)
        wu = _fold(first + 3, n_tiles, 4, STEPS)
        passes = _is_orthogonal(gw, gg, ww, hyper[0], eps, delta, numel)
        radial = _radial_part(ww, wu, eps)
        wide = decay.to(tl.float64)
        less_decay = projected_decay.to(tl.float64) - wide
        tl.store(is_layer + t, passes.to(tl.int32))
        if _is_deferred(decay):
            tl.store(layer + 2 * t, radial)
        else:
            tl.store(layer + 2 * t, radial / wide)
            pull = (less_decay + step_size.to(tl.float64) * radial) / wide
            tl.store(layer + 2 * t + 1, pull)


@triton.jit
def _write(
    arrays,
    offsets,
    mask,
    hyper,
    is_layer,
    radial,
    pull,
    DIRECTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    READS_GRAD: tl.constexpr,
    PROJECTS_BUFFER: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
):
    _, step_size, decay, projected_decay, _ = PROJECTION(hyper)
    p, u = _stored_direction(arrays, offsets, mask, hyper, DIRECTION, V, N_STATES, READS_GRAD)
    if _is_deferred(decay):
        decay = tl.where(is_layer, projected_decay, decay)
        # Not u - 0*p, which would be NaN for an infinite p.
        u = tl.where(is_layer, u - radial * p, u)
        p = p * decay - step_size * u
    else:
        # A result that has overflowed stays, where inf - inf would make it NaN.
        decayed = tl.where(p - p == 0, p + step_size * u, 0.0)
        p = p + pull * decayed
        u = u - radial * decayed
    tl.store(arrays[0] + offsets, narrow(p, PARAM), mask=mask)
    if PROJECTS_BUFFER:  # noqa: SIM102
        if is_layer:
            tl.store(arrays[2] + offsets, narrow(u, STATE), mask=mask)


@triton.jit(
    do_not_specialize=["n", "n_programs", "clip_bits"], do_not_specialize_on_alignment=UNALIGNED
)
def write_kernel(
    addresses,
    tensors,
    n,
    programs,  # int64 [2][n_programs]: tensor, tile
    n_programs,
    hypers,
    clip_bits: tl.int64,
    clip_at,
    found_inf,
    failed,
    is_layer,
    layer,
    DIRECTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    READS_GRAD: tl.constexpr,
    PROJECTS_BUFFER: tl.constexpr,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    PARAM: tl.constexpr,
    SOURCE: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    LANES: tl.constexpr = 1 << STEPS
    t, _number, start, size = _tile(programs, n_programs, tensors, n, found_inf, CHUNK)
    hyper = _hyper(hypers, tensors, n, t, clip_bits, clip_at, N_FIELDS, HYPER_STRIDE, COMPUTE)
    _, _, decay, _, _ = PROJECTION(hyper)
    projects = tl.load(is_layer + t) != 0
    if (tl.load(failed + t) != 0) & (projects | _is_deferred(decay)) & (size > 0):
        radial = tl.load(layer + 2 * t).to(COMPUTE)
        pull = tl.load(layer + 2 * t + 1).to(COMPUTE)
        # A repair starts from the result of the sweep.
        source = tl.where(_is_deferred(decay), SOURCE, 0)
        arrays = _arrays(addresses, n, t, start, source, N_STATES, PARAM, STATE, VECTOR)
        lanes = tl.arange(0, LANES)
        full = size // LANES * LANES
        for k in range(0, full, LANES):
            _write(
                *(arrays, k + lanes, None, hyper, projects, radial, pull, DIRECTION, PROJECTION),
                *(V, N_STATES, READS_GRAD, PROJECTS_BUFFER, PARAM, STATE),
            )
        if full < size:
            offsets = full + lanes
            _write(
                *(arrays, offsets, offsets < size, hyper, projects, radial, pull, DIRECTION),
                *(PROJECTION, V, N_STATES, READS_GRAD, PROJECTS_BUFFER, PARAM, STATE),
            )


@triton.jit(
    do_not_specialize=["n", "n_programs", "inv_scale_bits"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def unscale_kernel(
    addresses,
    tensors,
    n,
    programs,
    n_programs,
    inv_scale_bits: tl.int64,
    grad_scale,  # float32 [1], or None
    found_inf,
    PARAM: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    LANES: tl.constexpr = 1 << STEPS
    t, _number, start, size = _tile(programs, n_programs, tensors, n, found_inf, CHUNK)
    grad = pointer_to(tl.load(addresses + n + t), PARAM, start, VECTOR)
    factor = inverse_of(inv_scale_bits, grad_scale, COMPUTE)
    lanes = tl.arange(0, LANES)
    full = size // LANES * LANES
    for k in range(0, full, LANES):
        tl.store(grad + k + lanes, narrow(_load(grad + k + lanes, None) * factor, PARAM))
    if full < size:
        offsets = full + lanes
        mask = offsets < size
        tl.store(grad + offsets, narrow(_load(grad + offsets, mask) * factor, PARAM), mask=mask)


# -- host ------------------------------------------------------------------------------------------


_serials = itertools.count()


@dataclass(eq=False)
class _Programs:
    """What the programs of one launch work on: int64 [k][n_programs]."""

    name: str  # of its table in the cache
    table: Array

    def __len__(self) -> int:
        return int(self.table.shape[1])


@dataclass(eq=False)
class _Plan:
    """All that does not depend on addresses: who does what."""

    tensors: Array  # int64 [6][n]
    flags: Array  # int32 [2][n]: failed, is_layer, as a step begins
    n_tiles: int
    # By (steps, vector) of the rows: the first rows of every tensor, the others, all items, those
    # of long rows.
    first: dict[tuple[int, int], _Programs] = field(default_factory=dict)
    others: dict[tuple[int, int], _Programs] = field(default_factory=dict)
    rows: dict[tuple[int, int], _Programs] = field(default_factory=dict)
    long_rows: dict[tuple[int, int], _Programs] = field(default_factory=dict)
    folds: _Programs | None = None
    # By vector: the tiles of all tensors, those of tensors with rows.
    tiles: dict[int, _Programs] = field(default_factory=dict)
    row_tiles: dict[int, _Programs] = field(default_factory=dict)
    serial: int = field(default_factory=lambda: next(_serials))


def _plan(numel: Array, n_rows: Array, inner: Array, hyper: Array, vector: Array) -> _Plan:
    """The plan for tensors of which `vector` elements may be accessed at once."""
    n_tiles = -(-numel // CHUNK)
    first_tile = np.cumsum(n_tiles) - n_tiles
    tensors = np.stack([numel, n_rows, inner, first_tile, n_tiles, hyper]).astype(np.int64)
    flags = np.stack([n_rows < 2, np.zeros_like(numel)]).astype(np.int32)
    plan = _Plan(tensors, flags, int(n_tiles.sum()))
    for name, of in (("tiles", numel > 0), ("row_tiles", (numel > 0) & (n_rows > 0))):
        for v in np.unique(vector[of]):
            which = np.flatnonzero(of & (vector == v))
            tensor, tile = launcher.cut(numel[which], CHUNK)
            programs = _Programs(f"{name} of {v}", np.stack([which[tensor], tile]))
            getattr(plan, name)[int(v)] = programs
    row_size = numel // np.maximum(n_rows, 1)
    _plan_rows(plan, np.flatnonzero((n_rows > 1) & (numel > 0)), row_size, vector)
    return plan


def _plan_rows(plan: _Plan, of: Array, row_size: Array, vector: Array) -> None:
    parts: dict[str, dict[tuple[int, int], list[Array]]] = {
        name: {} for name in ("first", "others", "rows", "long_rows")
    }
    folds = []
    for t in of.tolist():
        _, n_rows, inner, _, n_tiles, _ = plan.tensors[:, t].tolist()
        size = int(row_size[t])
        n_chunks = -(-size // CHUNK)
        n_first, n_items = _n_first(n_rows, size), n_rows * n_chunks
        kind = _kind(size, inner, int(vector[t]))
        parts["first"].setdefault(kind, []).append(_shares(t, 0, n_first, 1))
        parts["others"].setdefault(kind, []).append(_shares(t, n_first, n_items, n_tiles))
        parts["rows"].setdefault(kind, []).append(_shares(t, 0, n_items, n_tiles))
        if n_chunks > 1:
            parts["long_rows"].setdefault(kind, []).append(_shares(t, 0, n_items, n_tiles))
            folds.append(np.stack([np.full(n_rows, t), np.arange(n_rows)]))
    for name, by_kind in parts.items():
        for kind, shares in by_kind.items():
            programs = _Programs(f"{name} of {kind}", np.concatenate(shares, axis=1))
            if len(programs):
                getattr(plan, name)[kind] = programs
    if folds:
        plan.folds = _Programs("folds", np.concatenate(folds, axis=1))


def _n_first(n_rows: int, size: int) -> int:
    """Rows to check before the others; none of long ones, whose sums take a phase of their own."""
    for steps in SHORT_STEPS:
        if size <= 1 << steps:
            return min(n_rows, LANES >> steps)
    return 0 if size > CHUNK else min(n_rows, FIRST_ROWS, FIRST_ELEMENTS // size)


def _kind(size: int, inner: int, vector: int) -> tuple[int, int]:
    """(steps of the tree over the columns of a block, vector)."""
    for steps in SHORT_STEPS:
        if size <= 1 << steps:
            return steps, 1
    return LANE_STEPS, vector if inner == size and size % vector == 0 else 1


def _shares(tensor: int, begin: int, end: int, n: int) -> Array:
    """int64 [3][<= n]: tensor, begin and end of n equal shares, without the empty ones."""
    bounds = begin + np.arange(n + 1) * (end - begin) // n
    shares = np.stack([np.full(n, tensor), bounds[:-1], bounds[1:]])
    return shares[:, shares[1] < shares[2]]


class _Step:
    """One update: its tables and memory on the device, and the launches of its phases."""

    def __init__(self, given: Given, plan: _Plan, blocks: Tensor) -> None:
        self.given, self.plan = given, plan
        self.rule, self.types = engine.RULES[given.rule], engine.DTYPES[given.dtypes]
        self.source = 2 + self.rule.N_STATES[given.variant] if given.has_sources else 0
        n, addresses = plan.tensors.shape[1], given.addresses
        self.addresses = self._upload("addresses", np.frombuffer(addresses, np.int64), addresses)
        self.tensors = self._upload("tensors", plan.tensors.reshape(-1)), n
        self.hypers = blocks, bits_of(given.clip), given.clip_at, given.found_inf
        self.sums, self.layer, flags = self._memory(n)
        self.failed, self.is_layer = flags[:n], flags[n:]
        flags.copy_(self._upload("flags", plan.flags.reshape(-1)))

    def _upload(self, name: str, array: Array, more: object = None) -> Tensor:
        key = (self.plan.serial, more)
        return upload(self.given.cache, f"project {name}", self.given.device, key, array.copy)

    def _memory(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """(sums, layer, flags); a captured graph may use it as long as the cache lives."""
        n_sums, n_bytes = TILE_SUMS * self.plan.n_tiles, 0
        n_bytes = 8 * (n_sums + 2 * n) + 4 * 2 * n
        made = self.given.cache.setdefault("project memory", [])
        if not made or made[-1].numel() < n_bytes:
            size = 1 << (n_bytes - 1).bit_length()
            made.append(torch.empty(size, dtype=torch.uint8, device=self.given.device))
        doubles = made[-1][: 8 * (n_sums + 2 * n)].view(torch.float64)
        flags = made[-1][8 * (n_sums + 2 * n) : n_bytes].view(torch.int32)
        return doubles[:n_sums], doubles[n_sums:], flags

    # -- phases ------------------------------------------------------------------------------------

    def unscale(self) -> None:
        for vector, programs in self.plan.tiles.items():
            launcher.launch(
                *(unscale_kernel, (len(programs),), self.addresses, *self.tensors),
                *(*self._table(programs), bits_of(self.given.inv_scale), self.given.grad_scale),
                self.hypers[-1],
                PARAM=self.types.param,
                COMPUTE=self.types.compute,
                VECTOR=vector,
                STEPS=LANE_STEPS,
                CHUNK=CHUNK,
                num_warps=NUM_WARPS,
            )

    def check(self) -> None:
        for of in (self.plan.first, self.plan.others):
            for (steps, vector), programs in of.items():
                constants = {"PARAM": self.types.param, "SOURCE": self.source, **self._constants()}
                if steps < LANE_STEPS:
                    more = {"ROWS": LANES >> steps, "STEPS": steps, "CHUNK": CHUNK}
                    self._launch(check_short_kernel, programs, **constants, **more)
                else:
                    more = {"VECTOR": vector, **self._lanes(), "TILE_SUMS": TILE_SUMS}
                    self._launch(check_kernel, programs, self.sums, **constants, **more)
        self._fold(is_check=True)

    def sweep(self) -> None:
        for vector, programs in self.plan.tiles.items():
            constants = {**self._of_rule(), **self._constants(), **self._lanes()}
            del constants["READS_GRAD"], constants["PROJECTS_BUFFER"]
            more = {"VECTOR": vector, "COLUMNS": COLUMNS, "TILE_SUMS": TILE_SUMS}
            self._launch(sweep_kernel, programs, self.sums, **constants, **more)

    def update_rows(self) -> None:
        for (steps, vector), programs in self.plan.rows.items():
            constants = {**self._of_rule(), **self._constants()}
            if steps < LANE_STEPS:
                del constants["READS_GRAD"]
                more = {"ROWS": LANES >> steps, "STEPS": steps, "CHUNK": CHUNK}
                self._launch(rows_short_kernel, programs, **constants, **more)
            else:
                self._long(programs, vector, is_write=False)
        self._fold(is_check=False)
        for (_, vector), programs in self.plan.long_rows.items():
            self._long(programs, vector, is_write=True)

    def decide(self) -> None:
        launcher.launch(
            *(decide_kernel, (self.tensors[1],), *self.tensors, *self.hypers),
            *(self.failed, self.sums, self.is_layer, self.layer),
            **self._constants(),
            STEPS=LANE_STEPS,
            TILE_SUMS=TILE_SUMS,
        )

    def write(self) -> None:
        for vector, programs in self.plan.row_tiles.items():
            constants = {**self._of_rule(), **self._constants(), **self._lanes()}
            del constants["AVERAGE"]
            self._launch(
                *(write_kernel, programs, self.is_layer, self.layer), **constants, VECTOR=vector
            )

    def _long(self, programs: _Programs, vector: int, is_write: bool) -> None:
        constants = {**self._of_rule(), **self._constants(), **self._lanes()}
        more = {"IS_WRITE": is_write, "ITEM_SUMS": ITEM_SUMS, "TILE_SUMS": TILE_SUMS}
        self._launch(rows_kernel, programs, self.sums, **constants, **more, VECTOR=vector)

    def _fold(self, is_check: bool) -> None:
        if (programs := self.plan.folds) is None:
            return
        launcher.launch(
            *(fold_kernel, (len(programs),), *self.tensors, *self._table(programs)),
            *(*self.hypers, self.failed, self.sums),
            **self._constants(),
            **self._lanes(),
            CHECKS=is_check,
            ITEM_SUMS=ITEM_SUMS,
            TILE_SUMS=TILE_SUMS,
        )

    def _launch(self, kernel: Any, programs: _Programs, *args: Any, **constants: Any) -> None:
        launcher.launch(
            *(kernel, (len(programs),), self.addresses, *self.tensors, *self._table(programs)),
            *(*self.hypers, self.failed, *args),
            **constants,
        )

    def _table(self, programs: _Programs) -> tuple[Tensor, int]:
        return self._upload(programs.name, programs.table.reshape(-1)), len(programs)

    def _constants(self) -> dict[str, Any]:
        return {
            "PROJECTION": self.rule.projection,
            "N_FIELDS": self.rule.N_FIELDS,
            "HYPER_STRIDE": engine.HYPER_BYTES // self.types.compute_torch.itemsize,
            "COMPUTE": self.types.compute,
            "num_warps": NUM_WARPS,
        }

    def _of_rule(self) -> dict[str, Any]:
        return {
            "AVERAGE": self.rule.average,
            "DIRECTION": self.rule.direction,
            "V": self.given.variant,
            "N_STATES": self.rule.N_STATES[self.given.variant],
            "READS_GRAD": self.rule.READS_GRAD[self.given.variant],
            "PROJECTS_BUFFER": self.rule.PROJECTS_BUFFER[self.given.variant],
            "PARAM": self.types.param,
            "SOURCE": self.source,
            "STATE": self.types.state,
        }

    @staticmethod
    def _lanes() -> dict[str, Any]:
        return {"STEPS": LANE_STEPS, "CHUNK": CHUNK}


def update(given: Given, rows: bytes) -> None:
    """As engine.update, of a rule that projects.

    Args:
        rows: int64 [2][n]: TableRow::n_rows and inner; empty: all 0.
    """
    types, has_sources = engine.DTYPES[given.dtypes], given.has_sources
    n_arrays = 2 + engine.RULES[given.rule].N_STATES[given.variant]
    table = np.frombuffer(given.addresses, np.int64).reshape(n_arrays + has_sources, -1)
    numel = np.frombuffer(given.numels, np.int64)
    if not numel.any():
        return
    sizes = [types.bytes_of(i) for i in range(n_arrays)] + [types.bytes_of(0)] * has_sources
    most = min(types.vector, LANES // (32 * NUM_WARPS))
    vector = np.where((table % (most * np.array(sizes)[:, None]) == 0).all(axis=0), most, 1)
    with launcher.on(given.device):
        blocks, hyper_index = hyper_blocks(given)
        key = (types, given.numels, rows, hyper_index, vector.tobytes())
        if given.cache.get("project plan", (None,))[0] != key:
            index = np.frombuffer(hyper_index, np.int32) if hyper_index else np.arange(len(numel))
            n_rows, inner = np.frombuffer(rows or bytes(16 * len(numel)), np.int64).reshape(2, -1)
            given.cache["project plan"] = key, _plan(numel, n_rows, inner, index, vector)
        step = _Step(given, given.cache["project plan"][1], blocks)
        if given.unscales:
            step.unscale()
        step.check()
        step.sweep()
        step.update_rows()
        if step.plan.row_tiles:
            step.decide()
            step.write()
