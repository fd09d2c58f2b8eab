"""The update of a rule that yields terms: it keeps what it reads of the parameters, and adds up the
terms in the order of csrc/reduce/order.hpp. It writes no states.

Semantics: struct Update in csrc/cuda/api.hpp.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pyoptim.kernels import launcher, reduce
from pyoptim.kernels.elements import narrow, widen
from pyoptim.kernels.engine import (
    DTYPES,
    Given,
    constants_of,
    factor_of,
    hyper_at,
    hyper_blocks,
    load_states,
    parts_of,
    pointer_to,
    pointers_of,
    tables_of,
)
from pyoptim.kernels.launcher import bits_of
from pyoptim.kernels.reduce import halve
from pyoptim.kernels.rules import RULES

# A thread then has 4 of the 1024 lanes, and as many elements of every array at once.
NUM_WARPS = 8


@triton.jit
def _block(
    pointers,  # to param, grad, states, where param is read, and what keeps it
    offsets,
    mask,
    hyper,
    clip,  # or None
    POINT: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    SAVES: tl.constexpr,
):
    """Returns the terms, in float64."""
    source = tl.load(pointers[2 + N_STATES] + offsets, mask=mask)
    g = widen(tl.load(pointers[1] + offsets, mask=mask))
    states = load_states(pointers, offsets, mask, N_STATES)
    if clip is not None:
        g = g * clip
    p, a, b = POINT(widen(source), g, states, hyper, V)
    tl.store(pointers[0] + offsets, narrow(p, pointers[0].dtype.element_ty), mask=mask)
    if SAVES:  # the bits as they were read
        tl.store(pointers[3 + N_STATES] + offsets, source, mask=mask)
    return a.to(tl.float64) * b.to(tl.float64)


@triton.jit(
    do_not_specialize=["clip_bits", "n_rows", "n_chunks"],
    do_not_specialize_on_alignment=[
        *("addresses", "layout", "hypers", "clip_at", "found_inf", "sums")
    ],
)
def terms_kernel(
    addresses,  # int64 [4 + N_STATES][n_rows]: param, grad, states, source, saved
    # int64: numel [n_rows], hyper [n_rows], first chunk [n_rows], row [n_chunks], number in row
    # [n_chunks]
    layout,
    n_rows,
    n_chunks,
    hypers,  # COMPUTE, blocks of HYPER_STRIDE
    clip_bits: tl.int64,
    clip_at,  # float64 [1], or None
    found_inf,  # float32 [1], or None
    sums,  # float64, or None
    POINT: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    PARAM: tl.constexpr,
    SOURCE: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    CLIPS: tl.constexpr,
    SAVES: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    of_chunk = layout + 3 * n_rows + tl.program_id(0)
    row = tl.load(of_chunk)
    number = tl.load(of_chunk + n_chunks)
    start = number * CHUNK
    left = tl.minimum(tl.load(layout + row) - start, CHUNK).to(tl.int32)
    is_made = True
    if found_inf is not None:
        is_made = tl.load(found_inf) == 0
        left = tl.where(is_made, left, 0)
    clip = None
    if CLIPS:
        clip = factor_of(clip_bits, clip_at, COMPUTE)
    hyper = hyper_at(hypers, tl.load(layout + n_rows + row), N_FIELDS, HYPER_STRIDE)
    pointers = pointers_of(addresses, n_rows, row, start, N_STATES, PARAM, STATE, VECTOR)
    last = addresses + (2 + N_STATES) * n_rows + row
    pointers += (pointer_to(tl.load(last), SOURCE, start, VECTOR),)
    pointers += (pointer_to(tl.load(last + n_rows), PARAM, start, VECTOR),)
    lanes = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    full = left // LANES * LANES
    for begin in range(0, full, LANES):
        total += _block(pointers, begin + lanes, None, hyper, clip, POINT, V, N_STATES, SAVES)
    if full < left:
        mask = full + lanes < left
        terms = _block(pointers, full + lanes, mask, hyper, clip, POINT, V, N_STATES, SAVES)
        total += tl.where(mask, terms, 0.0)
    if sums is not None:
        to = sums + tl.load(layout + 2 * n_rows + row) + number
        tl.store(to, halve(total), mask=is_made)


def update(given: Given, saved: bytes, sums: Tensor | None) -> None:
    """Updates rows of a rule that yields terms, on torch's current stream.

    Args:
        saved: int64 [2][n]: addresses that take what is read of the parameter, or 0 where nothing
            does, and where in the sums those of a row begin.
        sums: uint8 on `device`, takes as float64 the sum of the terms of every chunk; or None.

    Raises:
        ValueError: gradients would be unscaled, which is to write them.
    """
    if given.unscales:
        raise ValueError(f"an update of rule {given.rule} cannot unscale gradients")
    of_rule, types = RULES[given.rule], DTYPES[given.dtypes]
    device, cache, n_states = given.device, given.cache, of_rule.N_STATES[given.variant]
    table = np.frombuffer(given.addresses, np.int64)
    table = table.reshape(2 + n_states + given.has_sources, -1)
    kept, first_chunk = np.frombuffer(saved, np.int64).reshape(2, -1)
    source = table[-1] if given.has_sources else table[0]
    table = np.concatenate([table[: 2 + n_states], [source, kept]])
    sizes = [types.bytes_of(i) for i in range(2 + n_states)]
    sizes += [types.source.primitive_bitwidth // 8, types.bytes_of(0)]
    with launcher.on(device):
        blocks, hyper_index = hyper_blocks(given)
        columns = (given.numels, hyper_index, reduce.CHUNK, first_chunk.tobytes())
        for part in parts_of(cache, types, table, sizes, *columns):
            launcher.launch(
                *(terms_kernel, (part.n_chunks,)),
                *tables_of(cache, device, part, table, table.tobytes()),
                *(len(part.rows), part.n_chunks, blocks),
                *(bits_of(given.clip), given.clip_at, given.found_inf),
                None if sums is None else sums.view(torch.float64),
                POINT=of_rule.point,
                CLIPS=given.clips,
                SAVES=bool(kept[part.rows].any()),
                LANES=reduce.LANES,
                CHUNK=reduce.CHUNK,
                num_warps=NUM_WARPS,
                **constants_of(of_rule, given.variant, types, part.vector),
            )
