"""The multi-tensor update: one kernel for every rule, variant and set of dtypes.

Semantics: struct Update and struct Prepare in csrc/cuda/api.hpp.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pyoptim.kernels import launcher
from pyoptim.kernels.elements import float64_of, narrow, widen
from pyoptim.kernels.launcher import Array, bits_of, upload
from pyoptim.kernels.rules import RULES

# Elements a program handles at once (half as many in float64): two 16-byte vectors of float32 per
# array in each of the 128 threads, which leaves the largest rule within 128 registers.
BLOCK = 1024
# Elements per program: 1 M elements are then 128 programs, about one for each processor of a large
# GPU. Not measured.
CHUNK = 8 * BLOCK
# Rows per program of `prepare`.
PREPARE_BLOCK = 128
HYPER_BYTES = 96  # kHyperBytes
MAX_HYPERS = 12  # kMaxHypers


class DTypes(NamedTuple):
    """Triton's types of a set of dtypes; bfloat16 as its bits."""

    param: tl.dtype
    state: tl.dtype
    vector: int  # elements in 16 bytes of the widest array; every array is read by this many
    has_master: bool = False  # of a float32 copy, read in place of the parameter

    @property
    def compute(self) -> tl.dtype:
        return tl.float64 if self.param == tl.float64 else tl.float32

    @property
    def compute_torch(self) -> torch.dtype:
        return torch.float64 if self.param == tl.float64 else torch.float32

    @property
    def source(self) -> tl.dtype:
        return tl.float32 if self.has_master else self.param

    def bytes_of(self, array: int) -> int:
        """The size of an element of param (0), grad (1) or a state."""
        dtype = self.param if array < 2 else self.state
        return int(dtype.primitive_bitwidth) // 8


DTYPES = {
    "f64": DTypes(tl.float64, tl.float64, 2),
    "f32": DTypes(tl.float32, tl.float32, 4),
    "bf16": DTypes(tl.uint16, tl.uint16, 8),
    "f16": DTypes(tl.float16, tl.float16, 8),
    "bf16_state32": DTypes(tl.uint16, tl.float32, 4),
    "f16_state32": DTypes(tl.float16, tl.float32, 4),
    "bf16_master": DTypes(tl.uint16, tl.uint16, 4, True),
    "f16_master": DTypes(tl.float16, tl.float16, 4, True),
    "bf16_master_state32": DTypes(tl.uint16, tl.float32, 4, True),
    "f16_master_state32": DTypes(tl.float16, tl.float32, 4, True),
}


@triton.jit
def pointer_to(address, ELEMENT: tl.constexpr, start, VECTOR: tl.constexpr):
    pointer = address.to(tl.pointer_type(ELEMENT)) + start
    if VECTOR > 1:
        # On the pointer, not on the integer: the hint does not survive the cast.
        pointer = tl.multiple_of(pointer, VECTOR * (ELEMENT.primitive_bitwidth // 8))
    return pointer


@triton.jit
def pointers_of(
    addresses,
    n_rows,
    row,
    start,
    N_STATES: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Pointers to param, grad and the states of a row, from element `start` on."""
    pointers = ()
    for i in tl.static_range(2 + N_STATES):
        address = tl.load(addresses + i * n_rows + row)
        if i < 2:
            pointers += (pointer_to(address, PARAM, start, VECTOR),)
        else:
            pointers += (pointer_to(address, STATE, start, VECTOR),)
    return pointers


@triton.jit
def hyper_at(hypers, index, N_FIELDS: tl.constexpr, HYPER_STRIDE: tl.constexpr):
    """The fields of a block of hyper-parameters."""
    block = hypers + index * HYPER_STRIDE
    hyper = ()
    for i in tl.static_range(N_FIELDS):
        hyper += (tl.load(block + i),)
    return hyper


@triton.jit
def factor_of(bits, at, COMPUTE: tl.constexpr):
    """The float64 at `at`, or of these bits where that is None, in the type of the arithmetic."""
    factor = float64_of(bits)
    if at is not None:
        factor = tl.load(at)
    return factor.to(COMPUTE)


@triton.jit
def inverse_of(inv_scale_bits, grad_scale, COMPUTE: tl.constexpr):
    """What unscales gradients: 1 / grad_scale where there is one."""
    inv_scale = float64_of(inv_scale_bits)
    if grad_scale is not None:
        inv_scale = 1.0 / tl.load(grad_scale).to(tl.float64)
    return inv_scale.to(COMPUTE)


@triton.jit
def load_states(pointers, offsets, mask, N_STATES: tl.constexpr):
    states = ()
    for i in tl.static_range(N_STATES):
        states += (widen(tl.load(pointers[2 + i] + offsets, mask=mask)),)
    return states


@triton.jit
def _update_block(
    pointers,  # to param, grad, states, and where param is read
    offsets,
    mask,
    hyper,
    inv_scale,  # or None
    clip,  # or None
    UPDATE: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    HAS_MASTER: tl.constexpr,
):
    p = widen(tl.load(pointers[2 + N_STATES] + offsets, mask=mask))
    g = widen(tl.load(pointers[1] + offsets, mask=mask))
    states = load_states(pointers, offsets, mask, N_STATES)
    if inv_scale is not None:
        rounded = narrow(g * inv_scale, pointers[1].dtype.element_ty)
        tl.store(pointers[1] + offsets, rounded, mask=mask)
        g = widen(rounded)
    if clip is not None:
        g = g * clip
    p, states = UPDATE(p, g, states, hyper, V)
    tl.store(pointers[0] + offsets, narrow(p, pointers[0].dtype.element_ty), mask=mask)
    if HAS_MASTER:
        tl.store(pointers[2 + N_STATES] + offsets, p, mask=mask)
    for i in tl.static_range(N_STATES):
        state = narrow(states[i], pointers[2 + i].dtype.element_ty)
        tl.store(pointers[2 + i] + offsets, state, mask=mask)


@triton.jit(
    do_not_specialize=["inv_scale_bits", "clip_bits", "n_rows", "n_chunks"],
    do_not_specialize_on_alignment=[
        *("addresses", "layout", "hypers", "grad_scale", "clip_at", "found_inf")
    ],
)
def update_kernel(
    addresses,  # int64 [2 + N_STATES + HAS_SOURCES][n_rows]
    layout,  # int64: numel [n_rows], hyper [n_rows], row [n_chunks], number in row [n_chunks]
    n_rows,
    n_chunks,
    hypers,  # COMPUTE, blocks of HYPER_STRIDE
    inv_scale_bits: tl.int64,
    grad_scale,  # float32 [1], or None
    clip_bits: tl.int64,
    clip_at,  # float64 [1], or None
    found_inf,  # float32 [1], or None
    UPDATE: tl.constexpr,
    V: tl.constexpr,
    N_STATES: tl.constexpr,
    N_FIELDS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    PARAM: tl.constexpr,
    SOURCE: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    UNSCALES: tl.constexpr,
    CLIPS: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    of_chunk = layout + 2 * n_rows + tl.program_id(0)
    row = tl.load(of_chunk)
    start = tl.load(of_chunk + n_chunks) * CHUNK
    left = tl.minimum(tl.load(layout + row) - start, CHUNK).to(tl.int32)
    if found_inf is not None:
        left = tl.where(tl.load(found_inf) == 0, left, 0)
    inv_scale, clip = None, None
    if UNSCALES:
        inv_scale = inverse_of(inv_scale_bits, grad_scale, COMPUTE)
    if CLIPS:
        clip = factor_of(clip_bits, clip_at, COMPUTE)
    hyper = hyper_at(hypers, tl.load(layout + n_rows + row), N_FIELDS, HYPER_STRIDE)
    pointers = pointers_of(addresses, n_rows, row, start, N_STATES, PARAM, STATE, VECTOR)
    read_at = addresses + (2 + N_STATES if HAS_SOURCES else 0) * n_rows + row
    pointers += (pointer_to(tl.load(read_at), SOURCE, start, VECTOR),)
    lanes = tl.arange(0, BLOCK)
    full = left // BLOCK * BLOCK
    for begin in range(0, full, BLOCK):
        _update_block(
            pointers, begin + lanes, None, hyper, inv_scale, clip, UPDATE, V, N_STATES, HAS_MASTER
        )
    if full < left:
        at, mask = full + lanes, full + lanes < left
        _update_block(pointers, at, mask, hyper, inv_scale, clip, UPDATE, V, N_STATES, HAS_MASTER)


@triton.jit
def _live_value(value, source, is_double, mask):
    """`value`, or what lies at the address `source`, if it is not 0."""
    is_live = mask & (source != 0)
    single = tl.load(
        source.to(tl.pointer_type(tl.float32)), mask=is_live & (is_double == 0), other=0.0
    )
    double = tl.load(
        source.to(tl.pointer_type(tl.float64)), mask=is_live & (is_double != 0), other=0.0
    )
    live = tl.where(is_double != 0, double, single.to(tl.float64))
    return tl.where(is_live, live, value)


@triton.jit(
    do_not_specialize=["n_rows", "n_groups"],
    do_not_specialize_on_alignment=["rows", "raw", "live", "found_inf", "hypers"],
)
def prepare_kernel(
    rows,  # int64: counter address [n_rows], whether it is float64 [n_rows], group [n_rows]
    n_rows,
    raw,  # float64 [n_groups][MAX_HYPERS]
    live,  # int64: address [n_groups][MAX_HYPERS], whether it is float64 [n_groups][MAX_HYPERS]
    n_groups,
    found_inf,  # float32 [1], or None
    hypers,  # COMPUTE, blocks of HYPER_STRIDE, output
    PREPARE: tl.constexpr,
    COUNTS: tl.constexpr,
    N_HYPERS: tl.constexpr,
    N_FIELDS: tl.constexpr,
    MAX_HYPERS: tl.constexpr,
    HYPER_STRIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n_active = n_rows
    if found_inf is not None:
        n_active = tl.where(tl.load(found_inf) == 0, n_rows, 0)
    mask = row < n_active
    counter = tl.load(rows + row, mask=mask, other=0)
    is_double = tl.load(rows + n_rows + row, mask=mask, other=0)
    step = _live_value(tl.zeros([BLOCK], tl.float64), counter, is_double, mask) + 1.0
    first = (counter != 0) & (step == 1.0)
    of_group = tl.load(rows + 2 * n_rows + row, mask=mask, other=0) * MAX_HYPERS
    values = ()
    for i in tl.static_range(N_HYPERS):
        value = tl.load(raw + of_group + i, mask=mask, other=0.0)
        source = tl.load(live + of_group + i, mask=mask, other=0)
        source_is_double = tl.load(live + n_groups * MAX_HYPERS + of_group + i, mask=mask, other=0)
        values += (_live_value(value, source, source_is_double, mask),)
    fields = PREPARE(values, step, first)
    for i in tl.static_range(N_FIELDS):
        tl.store(hypers + row * HYPER_STRIDE + i, fields[i].to(COMPUTE), mask=mask)
    if COUNTS:
        counts = mask & (counter != 0)
        single = counter.to(tl.pointer_type(tl.float32))
        tl.store(single, step.to(tl.float32), mask=counts & (is_double == 0))
        tl.store(counter.to(tl.pointer_type(tl.float64)), step, mask=counts & (is_double != 0))


_serials = itertools.count()


@dataclass(eq=False)  # each is the key of its own tables
class _Part:
    """The rows of one launch."""

    vector: int
    rows: Array  # indices
    layout: Array
    n_chunks: int
    # Tells it from every other: an id() is given again once its object is gone.
    serial: int = field(default_factory=lambda: next(_serials))


@dataclass(frozen=True)
class Given:
    """What `update` is given, whatever the rule."""

    rule: str
    variant: int
    dtypes: str
    device: torch.device
    addresses: bytes
    numels: bytes
    hyper_index: bytes
    hypers: bytes
    live_hypers: Tensor | None
    inv_scale: float
    grad_scale: Tensor | None
    clip: float
    clip_at: Tensor | None
    found_inf: Tensor | None
    cache: dict[Any, Any]
    has_sources: bool

    @property
    def unscales(self) -> bool:
        return self.grad_scale is not None or self.inv_scale != 1.0

    @property
    def clips(self) -> bool:
        return self.clip_at is not None or self.clip != 1.0


def update(
    rule: str,
    variant: int,
    dtypes: str,
    device: torch.device,
    addresses: bytes,
    numels: bytes,
    hyper_index: bytes,
    hypers: bytes,
    live_hypers: Tensor | None,
    inv_scale: float,
    grad_scale: Tensor | None,
    clip: float,
    clip_at: Tensor | None,
    found_inf: Tensor | None,
    cache: dict[Any, Any],
    has_sources: bool = False,
    rows: bytes = b"",
    saved: bytes = b"",
    sums: Tensor | None = None,
) -> None:
    """Updates rows that share a rule, a variant and a set of dtypes, on torch's current stream.

    Args:
        dtypes: a key of DTYPES.
        addresses: int64 [2 + n_states + has_sources][n]: param, grad, states, and where the
            parameter is read from instead of from where it is written. With a master that is the
            source, and takes what the parameter takes rounded.
        numels: int64 [n].
        hyper_index: int32 [n], which block of `hypers`; not read with `live_hypers`.
        hypers: [m] blocks of 96 bytes, the rule's C++ Hyper struct.
        live_hypers: uint8 [n * 96] on `device`, one block per row, in place of `hypers`; or None.
        inv_scale, grad_scale, clip, clip_at, found_inf: as struct GradFactors in csrc/cuda/api.hpp.
        cache: of the caller, for these rows; keeps the tables on the device, for as long as graphs
            captured from calls with it may be replayed.
        rows: int64 [2][n], TableRow::n_rows and inner, of a rule that projects; or empty, without
            rows.
        saved, sums: of a rule that yields terms, as for `terms.update`.
    """
    given = Given(
        *(rule, variant, dtypes, device, addresses, numels, hyper_index, hypers, live_hypers),
        *(inv_scale, grad_scale, clip, clip_at, found_inf, cache, has_sources),
    )
    if hasattr(RULES[rule], "projection"):
        from pyoptim.kernels import project

        project.update(given, rows)
    elif hasattr(RULES[rule], "point"):
        from pyoptim.kernels import terms

        terms.update(given, saved, sums)
    else:
        _update_elements(given)


def _update_elements(given: Given) -> None:
    """As `update`, of a rule that is a function of one element."""
    of_rule, types = RULES[given.rule], DTYPES[given.dtypes]
    device, cache, has_sources = given.device, given.cache, given.has_sources
    n_arrays = 2 + of_rule.N_STATES[given.variant] + has_sources
    table = np.frombuffer(given.addresses, np.int64).reshape(n_arrays, -1)
    with launcher.on(device):
        blocks, hyper_index = hyper_blocks(given)
        sizes = [types.bytes_of(i) for i in range(n_arrays - has_sources)]
        sizes += [types.source.primitive_bitwidth // 8] * has_sources
        for part in parts_of(cache, types, table, sizes, given.numels, hyper_index, CHUNK):
            launcher.launch(
                *(update_kernel, (part.n_chunks,)),
                *tables_of(cache, device, part, table, given.addresses),
                *(len(part.rows), part.n_chunks, blocks),
                *(bits_of(given.inv_scale), given.grad_scale),
                *(bits_of(given.clip), given.clip_at, given.found_inf),
                UNSCALES=given.unscales,
                CLIPS=given.clips,
                UPDATE=of_rule.update,
                HAS_SOURCES=has_sources,
                HAS_MASTER=types.has_master,
                BLOCK=BLOCK // (2 if types.compute == tl.float64 else 1),
                CHUNK=CHUNK,
                **constants_of(of_rule, given.variant, types, part.vector),
            )


def add_up(sums: Tensor, n: int, total: Tensor) -> None:
    """total = the first n of the sums, float64 as bytes, in the order of csrc/reduce/order.hpp."""
    from pyoptim.kernels import reduce

    reduce.norms(1, sums.view(torch.float64), [n], total.view(1))


def hyper_blocks(given: Given) -> tuple[Tensor, bytes]:
    """The blocks in the type of the arithmetic, and which one each row has; empty: its own."""
    compute = DTYPES[given.dtypes].compute_torch
    if given.live_hypers is not None:
        return given.live_hypers.view(compute), b""
    source = np.frombuffer(given.hypers, np.uint8)
    blocks = upload(given.cache, "hypers", given.device, given.hypers, source.copy)
    return blocks.view(compute), given.hyper_index


def constants_of(of_rule: Any, variant: int, types: DTypes, vector: int) -> dict[str, Any]:
    """What the compiled kernels of a rule are made for, whatever it does with its arrays."""
    return {
        "V": variant,
        "N_STATES": of_rule.N_STATES[variant],
        "N_FIELDS": of_rule.N_FIELDS,
        "HYPER_STRIDE": HYPER_BYTES // types.compute_torch.itemsize,
        "PARAM": types.param,
        "SOURCE": types.source,
        "STATE": types.state,
        "COMPUTE": types.compute,
        "VECTOR": vector,
    }


def tables_of(
    cache: dict[Any, Any], device: torch.device, part: _Part, table: Array, addresses: bytes
) -> tuple[Tensor, Tensor]:
    """Addresses and layout of a part's rows, on the device."""
    # `part` is made anew where anything but the addresses changes.
    return (
        upload(
            *(cache, f"addresses of {part.vector}", device, (addresses, part.serial)),
            lambda: np.ascontiguousarray(table[:, part.rows]).reshape(-1),
        ),
        upload(cache, f"layout of {part.vector}", device, part.serial, lambda: part.layout),
    )


def parts_of(
    cache: dict[Any, Any],
    types: DTypes,
    table: Array,
    sizes: list[int],
    numels: bytes,
    hyper_index: bytes,
    chunk: int,
    more: bytes = b"",
) -> list[_Part]:
    """Rows that are aligned for whole vectors, and the others: a kernel for both would be slow.

    Args:
        table, sizes: addresses [arrays][n], and the size of their elements.
        more: int64 [n], a column of the layout behind the hyper-parameters' indices; or nothing.
    """
    is_aligned = (table % (types.vector * np.array(sizes)[:, None]) == 0).all(axis=0)
    key = (types, numels, hyper_index, is_aligned.tobytes(), chunk, more)
    if cache.get("parts", (None,))[0] != key:
        numel = np.frombuffer(numels, np.int64)
        index = np.frombuffer(hyper_index, np.int32) if hyper_index else np.arange(len(numel))
        columns = [numel, index, *([np.frombuffer(more, np.int64)] if more else [])]
        parts = [
            _part(vector, np.flatnonzero((numel > 0) & rows), columns, chunk)
            for vector, rows in ((types.vector, is_aligned), (1, ~is_aligned))
        ]
        cache["parts"] = key, [part for part in parts if part.n_chunks]
    found: list[_Part] = cache["parts"][1]
    return found


def _part(vector: int, rows: Array, columns: list[Array], chunk: int) -> _Part:
    row, number = launcher.cut(columns[0][rows], chunk)
    layout = np.concatenate([*(c[rows] for c in columns), row, number]).astype(np.int64)
    return _Part(vector, rows, layout, len(row))


def prepare(
    rule: str,
    is_double: bool,
    device: torch.device,
    raw: bytes,
    sources: bytes,
    source_is_double: bytes,
    counters: bytes,
    counter_is_double: bytes,
    groups: bytes,
    found_inf: Tensor | None,
    hypers: Tensor,
    cache: dict[Any, Any],
) -> None:
    """Counts a step and prepares the hyper-parameters of every row, on torch's current stream.

    Args:
        raw: float64 [g][12], in the order of kHyperNames.
        sources: int64 [g][12], addresses on the device that replace raw; 0 where none does.
        source_is_double: uint8 [g][12], else float32.
        counters: int64 [n], addresses of step counters; 0 where the rule has none.
        counter_is_double: uint8 [n], else float32.
        groups: int32 [n], the group of each row.
        found_inf: float32 [1]: when it is not 0, nothing is written; or None.
        hypers: uint8 [n * 96], output.
        cache: as for `update`.
    """
    of_rule = RULES[rule]
    compute, compute_torch = (
        (tl.float64, torch.float64) if is_double else (tl.float32, torch.float32)
    )
    n_rows, n_groups = len(counter_is_double), len(raw) // (8 * MAX_HYPERS)
    if n_rows == 0:
        return
    rows_of = ((counters, np.int64), (counter_is_double, np.uint8), (groups, np.int32))
    live_of = ((sources, np.int64), (source_is_double, np.uint8))
    with launcher.on(device):
        launcher.launch(
            prepare_kernel,
            (-(-n_rows // PREPARE_BLOCK),),
            upload(cache, "rows", device, rows_of, lambda: _int64(rows_of)),
            n_rows,
            upload(cache, "raw", device, raw, lambda: np.frombuffer(raw).copy()),
            upload(cache, "live", device, live_of, lambda: _int64(live_of)),
            n_groups,
            found_inf,
            hypers.view(compute_torch),
            PREPARE=of_rule.prepare,
            COUNTS=getattr(of_rule, "WRITES_STATES", True),
            N_HYPERS=of_rule.N_HYPERS,
            N_FIELDS=of_rule.N_FIELDS,
            MAX_HYPERS=MAX_HYPERS,
            HYPER_STRIDE=HYPER_BYTES // compute_torch.itemsize,
            COMPUTE=compute,
            BLOCK=PREPARE_BLOCK,
        )


def _int64(arrays: tuple[tuple[bytes, Any], ...]) -> Array:
    return np.concatenate([np.frombuffer(data, dtype).astype(np.int64) for data, dtype in arrays])
