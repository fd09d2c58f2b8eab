"""Norms, clip factors, scaling and row sums; the order of every sum is csrc/reduce/order.hpp's.

Semantics: struct Partials, Norms, Clip, Scale and RowSums in csrc/cuda/api.hpp.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pyoptim.kernels import launcher
from pyoptim.kernels.elements import float64_of, narrow, widen
from pyoptim.kernels.launcher import Array, bits_of, upload

LANES = 1024  # reduce::kLanes
CHUNK = 16 * LANES  # reduce::kChunk
# Triton's type, bfloat16 as its bits, and elements in 16 bytes.
DTYPES = {
    "f64": (tl.float64, 2),
    "f32": (tl.float32, 4),
    "bf16": (tl.uint16, 8),
    "f16": (tl.float16, 8),
}


@triton.jit
def _term(x, KIND: tl.constexpr):
    """What an element adds; of the maximum the bits, which are in the order of the magnitudes.

    As integers even a NaN has its place: above infinity.
    """
    if KIND == 0:
        return x * x
    elif KIND == 1:
        return tl.abs(x)
    else:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def _weigh(grad, weight, eta):
    """As reduce::weigh in csrc/reduce/order.hpp."""
    return (tl.where(weight < 0, -weight, weight) + eta.to(weight.dtype)) * grad


@triton.jit
def _combine(a, b, KIND: tl.constexpr):
    if KIND == 2:
        return tl.maximum(a, b)
    else:
        return a + b


@triton.jit
def _zeros(LANES: tl.constexpr, KIND: tl.constexpr):
    if KIND == 2:
        return tl.zeros([LANES], tl.int64)
    else:
        return tl.zeros([LANES], tl.float64)


@triton.jit
def halve(x):
    """The one sum left of 1024 lanes: the upper half is added to the lower.

    A sum of two numbers is the same in any order, whatever the compiler makes of it.
    """
    for i in tl.static_range(10):
        x = tl.sum(tl.reshape(x, (2, 512 >> i)), axis=0)
    return tl.sum(x, axis=0)  # of one


@triton.jit
def _reduce_lanes(x, KIND: tl.constexpr):
    if KIND == 2:
        # No order changes a maximum.
        return tl.max(x, axis=0).to(tl.float64, bitcast=True)
    else:
        return halve(x)


@triton.jit
def _array(address, start, ELEMENT: tl.constexpr, VECTOR: tl.constexpr):
    pointer = address.to(tl.pointer_type(ELEMENT)) + start
    if VECTOR > 1:
        # On the pointer, not on the integer: the hint does not survive the cast.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(
    do_not_specialize=["n_arrays", "n_chunks"],
    do_not_specialize_on_alignment=["arrays", "chunks", "out"],
)
def partials_kernel(
    # int64: address [n_arrays], numel [n_arrays], index of the first partial [n_arrays], and if
    # WEIGHTED address of the weights [n_arrays] or 0, bits of eta as float64 [n_arrays]
    arrays,
    n_arrays,
    chunks,  # int64: array [n_chunks], number in array [n_chunks]
    n_chunks,
    out,  # float64
    ELEMENT: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    array = tl.load(chunks + tl.program_id(0))
    number = tl.load(chunks + n_chunks + tl.program_id(0))
    start = number * CHUNK
    left = tl.minimum(tl.load(arrays + n_arrays + array) - start, CHUNK).to(tl.int32)
    data = _array(tl.load(arrays + array), start, ELEMENT, VECTOR)
    weight = data
    is_weighted = False
    eta = 0.0
    if WEIGHTED:
        address = tl.load(arrays + 3 * n_arrays + array)
        is_weighted = address != 0
        # Where there are none their place is taken by what can be read.
        address = tl.where(is_weighted, address, tl.load(arrays + array))
        weight = _array(address, start, ELEMENT, VECTOR)
        eta = float64_of(tl.load(arrays + 4 * n_arrays + array))
    lanes = tl.arange(0, LANES)
    sums = _zeros(LANES, KIND)
    full = left // LANES * LANES
    for begin in range(0, full, LANES):
        x = widen(tl.load(data + begin + lanes))
        if WEIGHTED:
            w = widen(tl.load(weight + begin + lanes))
            x = tl.where(is_weighted, _weigh(x, w, eta), x)
        sums = _combine(sums, _term(x.to(tl.float64), KIND), KIND)
    if full < left:
        offsets = full + lanes
        x = widen(tl.load(data + offsets, mask=offsets < left, other=0))
        if WEIGHTED:
            w = widen(tl.load(weight + offsets, mask=offsets < left, other=0))
            x = tl.where(is_weighted & (offsets < left), _weigh(x, w, eta), x)
        sums = _combine(sums, _term(x.to(tl.float64), KIND), KIND)
    to = out + tl.load(arrays + 2 * n_arrays + array) + number
    tl.store(to, _reduce_lanes(sums, KIND))


@triton.jit(do_not_specialize_on_alignment=["partials", "bounds", "results"])
def norms_kernel(
    partials,  # float64
    bounds,  # int64 [grid + 1]
    results,  # float64 [grid]
    KIND: tl.constexpr,
    LANES: tl.constexpr,
):
    begin = tl.load(bounds + tl.program_id(0))
    count = tl.load(bounds + tl.program_id(0) + 1) - begin
    lanes = tl.arange(0, LANES)
    sums = _zeros(LANES, KIND)
    for i in range(0, count, LANES):
        offsets = i + lanes
        x = tl.load(partials + begin + offsets, mask=offsets < count, other=0.0)
        # A partial maximum is its own term; the others are sums already.
        sums = _combine(sums, x.to(tl.int64, bitcast=True) if KIND == 2 else x, KIND)
    result = _reduce_lanes(sums, KIND)
    if KIND == 0:
        result = tl.sqrt(result)
    tl.store(results + tl.program_id(0), result)


@triton.jit(
    do_not_specialize=["max_norm_bits", "inv_scale_bits"],
    do_not_specialize_on_alignment=["norm", "grad_scale", "clip"],
)
def clip_kernel(
    norm,  # float64 [1]
    max_norm_bits: tl.int64,
    inv_scale_bits: tl.int64,
    grad_scale,  # float32 [1], or None
    clip,  # float64 [1], output
):
    inv_scale = float64_of(inv_scale_bits)
    if grad_scale is not None:
        inv_scale = 1.0 / tl.load(grad_scale).to(tl.float64)
    unscaled = tl.load(norm) * inv_scale
    factor = float64_of(max_norm_bits) / (unscaled + 1e-6)
    tl.store(clip, tl.where(factor > 1.0, 1.0, factor))


@triton.jit(
    do_not_specialize=["n_arrays", "n_chunks", "factor_bits"],
    do_not_specialize_on_alignment=["arrays", "chunks", "factor_at"],
)
def scale_kernel(
    arrays,  # int64: address [n_arrays], numel [n_arrays]
    n_arrays,
    chunks,  # int64: array [n_chunks], number in array [n_chunks]
    n_chunks,
    factor_bits: tl.int64,
    factor_at,  # float64 [1], or None
    ELEMENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    array = tl.load(chunks + tl.program_id(0))
    start = tl.load(chunks + n_chunks + tl.program_id(0)) * CHUNK
    left = tl.minimum(tl.load(arrays + n_arrays + array) - start, CHUNK).to(tl.int32)
    data = _array(tl.load(arrays + array), start, ELEMENT, VECTOR)
    factor = float64_of(factor_bits)
    if factor_at is not None:
        factor = tl.load(factor_at)
    factor = factor.to(COMPUTE)
    lanes = tl.arange(0, BLOCK)
    full = left // BLOCK * BLOCK
    for begin in range(0, full, BLOCK):
        to = data + begin + lanes
        tl.store(to, narrow(widen(tl.load(to)) * factor, ELEMENT))
    if full < left:
        offsets = full + lanes
        x = widen(tl.load(data + offsets, mask=offsets < left))
        tl.store(data + offsets, narrow(x * factor, ELEMENT), mask=offsets < left)


@triton.jit
def _row_lanes(a, b, row, begin, end, n_rows, inner, CONTIGUOUS: tl.constexpr, LANES: tl.constexpr):
    """The lanes of (a*b, a*a, b*b) over elements begin to end of a row."""
    ab = tl.zeros([LANES], tl.float64)
    aa = tl.zeros([LANES], tl.float64)
    bb = tl.zeros([LANES], tl.float64)
    for first in range(begin, end, LANES):
        i = first + tl.arange(0, LANES)
        if CONTIGUOUS:  # noqa: SIM108
            offsets = row * inner + i
        else:
            offsets = (i // inner * n_rows + row) * inner + i % inner
        x = widen(tl.load(a + offsets, mask=i < end, other=0)).to(tl.float64)
        y = widen(tl.load(b + offsets, mask=i < end, other=0)).to(tl.float64)
        ab += x * y
        aa += x * x
        bb += y * y
    return ab, aa, bb


@triton.jit(
    do_not_specialize=["n_rows", "row_size", "inner", "n_chunks", "by_chunk", "by_sum"],
    do_not_specialize_on_alignment=["a", "b", "out"],
)
def row_sums_kernel(
    a,
    b,
    n_rows,
    row_size,
    inner,
    n_chunks,  # of a row
    out,  # float64, a chunk's three sums `by_sum` apart, those of the next chunk `by_chunk` on
    by_chunk,
    by_sum,
    CONTIGUOUS: tl.constexpr,  # a row lies in one piece
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row = chunk // n_chunks
    begin = chunk % n_chunks * CHUNK
    end = tl.minimum(begin + CHUNK, row_size.to(tl.int64))
    ab, aa, bb = _row_lanes(a, b, row, begin, end, n_rows, inner.to(tl.int64), CONTIGUOUS, LANES)
    to = out + chunk * by_chunk
    tl.store(to, halve(ab))
    tl.store(to + by_sum, halve(aa))
    tl.store(to + 2 * by_sum.to(tl.int64), halve(bb))


@triton.jit(
    do_not_specialize=["n_rows", "n_chunks"],
    do_not_specialize_on_alignment=["partials", "sums"],
)
def fold_rows_kernel(
    partials,  # float64 [3][n_rows][n_chunks]
    n_rows,
    n_chunks,
    sums,  # float64 [n_rows][3]
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = partials + (tl.program_id(1) * n_rows + row) * n_chunks
    lanes = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    for i in range(0, n_chunks, LANES):
        total += tl.load(first + i + lanes, mask=i + lanes < n_chunks, other=0.0)
    tl.store(sums + row * 3 + tl.program_id(1), halve(total))


def partials(
    kind: int,
    device: torch.device,
    addresses: bytes,
    numels: bytes,
    dtype: str,
    first: bytes,
    out: Tensor,
    weights: bytes | None = None,
    etas: bytes = b"",
) -> None:
    """One partial result per chunk of 16384 elements of every array.

    Args:
        kind: 0 squares, 1 magnitudes, 2 maximum.
        addresses, numels, first: int64 [n]; `first` is the index of an array's first partial.
        dtype: "f64", "f32", "bf16" or "f16".
        out: float64 on `device`.
        weights: int64 [n], addresses of the weights of squares, 0 for an array without; or None.
        etas: float64 [n], what is added to the size of a weight.
    """
    element, _ = DTYPES[dtype]
    own = () if weights is None else (weights, etas)
    columns = [np.frombuffer(data, np.int64) for data in (addresses, numels, first, *own)]
    with launcher.on(device):
        aligned = columns[0] if weights is None else columns[0] | columns[3]
        for vector, rows in _split(aligned, columns[1], dtype):
            arrays, chunks, n_chunks = _tables(device, [c[rows] for c in columns], CHUNK)
            launcher.launch(
                partials_kernel,
                (n_chunks,),
                arrays,
                len(rows),
                chunks,
                n_chunks,
                out,
                ELEMENT=element,
                KIND=kind,
                WEIGHTED=weights is not None,
                VECTOR=vector,
                LANES=LANES,
                CHUNK=CHUNK,
            )


def _split(address: Array, numel: Array, dtype: str) -> list[tuple[int, Array]]:
    """(elements per access, indices) of the arrays that are aligned to 16 bytes and of the rest."""
    is_aligned = address % 16 == 0
    parts = (DTYPES[dtype][1], is_aligned), (1, ~is_aligned)
    found = [(vector, np.flatnonzero((numel > 0) & rows)) for vector, rows in parts]
    return [(vector, rows) for vector, rows in found if len(rows)]


def _tables(device: torch.device, columns: list[Array], chunk: int) -> tuple[Tensor, Tensor, int]:
    array, number = launcher.cut(columns[1], chunk)
    arrays = upload(None, "arrays", device, None, lambda: np.concatenate(columns))
    chunks = upload(None, "chunks", device, None, lambda: np.concatenate([array, number]))
    return arrays, chunks, len(array)


def norms(kind: int, partials: Tensor, ends: list[int], results: Tensor) -> None:
    """results[s] = the norm over partials[ends[s - 1] : ends[s]], the first from 0.

    Args:
        kind: as for `partials`.
        partials, results: float64, [ends[-1]] and [len(ends)], on one device.
    """
    device = partials.device
    if not ends:
        return
    with launcher.on(device):
        bounds = upload(None, "bounds", device, None, lambda: np.array([0, *ends], np.int64))
        launcher.launch(
            norms_kernel, (len(ends),), partials, bounds, results, KIND=kind, LANES=LANES
        )


def clip(
    norm: Tensor, max_norm: float, inv_scale: float, grad_scale: Tensor | None, clip: Tensor
) -> None:
    """clip[0] = min(1, max_norm / (norm / loss scale + 1e-6)); NaN where the norm is.

    Args:
        norm, clip: float64 [1] on one device.
        inv_scale: 1 / loss scale, unless grad_scale, float32 [1] on the device, holds the scale.
    """
    with launcher.on(norm.device):
        launcher.launch(
            clip_kernel, (1,), norm, bits_of(max_norm), bits_of(inv_scale), grad_scale, clip
        )


def scale(
    device: torch.device,
    addresses: bytes,
    numels: bytes,
    dtype: str,
    factor: float,
    factor_at: Tensor | None,
) -> None:
    """Multiplies every element of the arrays in place.

    Args:
        addresses, numels: int64 [n].
        dtype: "f64", "f32", "bf16" or "f16".
        factor: unless factor_at, float64 [1] on `device`, holds it.
    """
    element, _ = DTYPES[dtype]
    columns = [np.frombuffer(data, np.int64) for data in (addresses, numels)]
    with launcher.on(device):
        for vector, rows in _split(columns[0], columns[1], dtype):
            arrays, chunks, n_chunks = _tables(device, [c[rows] for c in columns], CHUNK)
            launcher.launch(
                scale_kernel,
                (n_chunks,),
                arrays,
                len(rows),
                chunks,
                n_chunks,
                bits_of(factor),
                factor_at,
                ELEMENT=element,
                COMPUTE=tl.float64 if dtype == "f64" else tl.float32,
                VECTOR=vector,
                BLOCK=LANES,
                CHUNK=CHUNK,
            )


def row_sums(a: Tensor, b: Tensor, n_rows: int, row_size: int, inner: int, sums: Tensor) -> None:
    """sums[r] = (a.b, a.a, b.b) over row r of two dense tensors of one layout and dtype.

    Args:
        inner: element i of row r lies at (i // inner * n_rows + r) * inner + i % inner.
        sums: float64 [n_rows, 3], contiguous, on the device of a and b.
    """
    if n_rows == 0:
        return
    if a.dtype == torch.bfloat16:
        a, b = a.detach().view(torch.uint16), b.detach().view(torch.uint16)
    n_chunks = max(1, -(-row_size // CHUNK))
    with launcher.on(a.device):
        n = n_rows * n_chunks
        partials = sums if n_chunks == 1 else sums.new_empty(3 * n)
        strides = (3, 1) if n_chunks == 1 else (1, n)
        launcher.launch(
            row_sums_kernel,
            (n,),
            *(a, b, n_rows, row_size, inner, n_chunks, partials, *strides),
            CONTIGUOUS=inner == row_size,
            LANES=LANES,
            CHUNK=CHUNK,
        )
        if n_chunks > 1:
            grid = (n_rows, 3)
            launcher.launch(fold_rows_kernel, grid, partials, n_rows, n_chunks, sums, LANES=LANES)
