"""Norms, clipping, scaling and row sums of the CUDA engine in the emulator: the canonical order."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from cases import FLOATS, assert_same_bits, parametrize_dtypes, values
from emulated import KINDS, Emulator
from torch import Tensor

LANES, CHUNK = 1024, 16 * 1024
# Around what a thread reads at once (4), a round of the lanes, several of them, and the chunk.
SIZES = (0, 1, 3, 4, 5, 1023, 1024, 1025, 4095, 4097, 4100, CHUNK - 1, CHUNK, CHUNK + 1, 40_000)
ORDERS = (1.0, 2.0, float("inf"))


def fold(terms: np.ndarray, combine: Callable[..., np.ndarray]) -> float:
    """One chunk in the order of csrc/reduce/order.hpp: lanes, then halves."""
    rounds = np.zeros(-(-len(terms) // LANES) * LANES)
    rounds[: len(terms)] = terms
    lanes = np.zeros(LANES)
    for one_round in rounds.reshape(-1, LANES):
        lanes = combine(lanes, one_round)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = combine(lanes[:half], lanes[half:])
    return float(lanes[0])


def canonical_partials(tensor: Tensor, order: float) -> list[float]:
    x = tensor.double().numpy()
    terms = x * x if order == 2 else np.abs(x)
    return [fold(terms[i : i + CHUNK], combine_of(order)) for i in range(0, len(terms), CHUNK)]


def canonical_norm(partials: Sequence[float], order: float) -> float:
    total = fold(np.array(partials), combine_of(order))
    return math.sqrt(total) if order == 2 and total >= 0 else total


def combine_of(order: float) -> Callable[..., np.ndarray]:
    return np.maximum if order == float("inf") else np.add


def offset_by(n: int, of: Tensor) -> Tensor:
    """A copy that starts n elements after a 16-byte border."""
    view = torch.empty(n + of.numel(), dtype=of.dtype)[n:]
    return view.copy_(of)


def tensors_of(dtype: torch.dtype, offset: int = 0, sizes: Sequence[int] = SIZES) -> list[Tensor]:
    return [offset_by(offset, values((n,), dtype, n)) for n in sizes]


def n_chunks(tensors: Sequence[Tensor]) -> int:
    return sum(-(-t.numel() // CHUNK) for t in tensors)


# -- norms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
@parametrize_dtypes(FLOATS)
def test_norms_are_summed_in_the_canonical_order(
    emulator: Emulator, dtype: torch.dtype, order: float, offset: int
) -> None:
    tensors = tensors_of(dtype, offset)
    expected = [canonical_partials(t, order) for t in tensors]
    flat = [x for partials in expected for x in partials]
    partials = emulator.partials(KINDS[order], tensors, len(flat))
    assert partials.tolist() == flat
    ends = np.cumsum([len(partials) for partials in expected]).tolist()
    norms = emulator.norms(KINDS[order], partials, ends)
    assert norms.tolist() == [canonical_norm(partials, order) for partials in expected]
    total = emulator.norms(KINDS[order], partials, [len(flat)])
    assert total.tolist() == [canonical_norm(flat, order)]
    # torch has no maximum of nothing.
    truth = [float(torch.linalg.vector_norm(t.double(), order)) if len(t) else 0.0 for t in tensors]
    assert norms.tolist() == pytest.approx(truth, rel=1e-12)


def test_one_list_may_have_every_dtype(emulator: Emulator) -> None:
    tensors = [values((n,), d, n) for d in FLOATS for n in (5, CHUNK + 5)]
    expected = [x for t in tensors for x in canonical_partials(t, 2.0)]
    assert emulator.partials(0, tensors, len(expected)).tolist() == expected


@pytest.mark.parametrize("n", [1023, 1025, CHUNK + 1, 5 * CHUNK + 3])
@pytest.mark.parametrize("order", ORDERS)
def test_many_partial_results_are_summed_in_one_go(
    emulator: Emulator, order: float, n: int
) -> None:
    partials = values((n + 1,), torch.float64, n).abs()
    # From the second on, so that 16-byte accesses are not possible everywhere.
    results = emulator.norms(KINDS[order], partials, [1, n + 1])
    parts = [partials[:1].tolist(), partials[1:].tolist()]
    assert results.tolist() == [canonical_norm(part, order) for part in parts]


@pytest.mark.parametrize("rows_per_launch", [1, 4, 1000])
def test_norms_do_not_depend_on_the_launches(emulator: Emulator, rows_per_launch: int) -> None:
    emulator.api.tune(64, rows_per_launch)
    tensors = tensors_of(torch.float32)
    expected = [canonical_partials(t, 2.0) for t in tensors]
    flat = [x for partials in expected for x in partials]
    before = emulator.api.launches()
    partials = emulator.partials(0, tensors, len(flat))
    n_used = sum(t.numel() > 0 for t in tensors)
    assert emulator.api.launches() - before == -(-n_used // rows_per_launch)
    assert partials.tolist() == flat
    ends = np.cumsum([len(p) for p in expected]).tolist()
    assert emulator.norms(0, partials, ends).tolist() == [canonical_norm(p, 2.0) for p in expected]


def test_thousands_of_tensors_have_their_own_norms(emulator: Emulator) -> None:
    # A table holds about 1360 spans, and 4087 ends.
    tensors = [values((i % 3,), torch.float32, i) for i in range(4200)]
    squares = [sum((x * x for x in t.tolist()), 0.0) for t in tensors]
    expected = [s for s, t in zip(squares, tensors, strict=True) if len(t)]
    partials = emulator.partials(0, tensors, len(expected))
    assert partials.tolist() == expected
    ends = np.cumsum([len(t) > 0 for t in tensors]).tolist()
    assert emulator.norms(0, partials, ends).tolist() == [math.sqrt(s) for s in squares]


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_sums_do_not_depend_on_the_order_of_threads(emulator: Emulator, seed: int) -> None:
    emulator.seed(seed)
    tensors = tensors_of(torch.float32, sizes=(3000, CHUNK + 1))
    expected = [x for t in tensors for x in canonical_partials(t, 2.0)]
    partials = emulator.partials(0, tensors, len(expected))
    assert partials.tolist() == expected
    assert emulator.norms(0, partials, [3]).tolist() == [canonical_norm(expected, 2.0)]


@pytest.mark.parametrize("at", [0, 700, 1023, 1024, 4999])
@pytest.mark.parametrize("order", ORDERS)
@parametrize_dtypes(FLOATS)
def test_norms_keep_nan_and_inf(
    emulator: Emulator, dtype: torch.dtype, order: float, at: int
) -> None:
    tensor = values((5000,), dtype, 0)
    for special in (torch.inf, -torch.inf, torch.nan):
        tensor[at] = special
        partials = emulator.partials(KINDS[order], [tensor], 1)
        norm = float(emulator.norms(KINDS[order], partials, [1]))
        assert math.isnan(norm) if math.isnan(special) else norm == math.inf


def test_squares_that_float32_cannot_hold_are_summed(emulator: Emulator) -> None:
    partials = emulator.partials(0, [torch.full((3,), 3e38)], 1)
    assert float(emulator.norms(0, partials, [1])) == pytest.approx(math.sqrt(3) * 3e38, rel=1e-6)


# -- clipping and scaling --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "max_norm", "expected"),
    [
        (4.0, 1.0, 1.0 / (4.0 + 1e-6)),
        (0.5, 1.0, 1.0),
        (0.0, 1.0, 1.0),
        (math.inf, 1.0, 0.0),
        (math.nan, 1.0, math.nan),
        (2.0, 0.0, 0.0),
    ],
)
def test_clip_factor_is_torchs(
    emulator: Emulator, norm: float, max_norm: float, expected: float
) -> None:
    factor = emulator.clip(torch.tensor([norm], dtype=torch.float64), max_norm)
    assert_same_bits([factor], [torch.tensor([expected], dtype=torch.float64)])


@pytest.mark.parametrize("scale", [3.0, 65536.0])
def test_clip_factor_is_of_the_unscaled_norm(emulator: Emulator, scale: float) -> None:
    norm = torch.tensor([7.0 * scale], dtype=torch.float64)
    expected = 2.0 / (float(norm) * (1.0 / scale) + 1e-6)
    assert float(emulator.clip(norm, 2.0, inv_scale=1.0 / scale)) == expected
    live = emulator.clip(norm, 2.0, inv_scale=math.nan, grad_scale=torch.tensor([scale]))
    assert float(live) == expected


@pytest.mark.parametrize("is_live", [True, False], ids=["live", "host"])
@pytest.mark.parametrize("offset", [0, 1])
@parametrize_dtypes(FLOATS)
def test_every_element_is_scaled_once(
    emulator: Emulator, dtype: torch.dtype, offset: int, is_live: bool
) -> None:
    emulator.api.tune(64, 0)
    buffers = [values((n + 64,), dtype, n) for n in (0, 1, 7, 8, 9, 63, 64, 65, 1000)]
    views = [buffer[32 + offset : -32 + offset] for buffer in buffers]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = [buffer.clone() for buffer in buffers]
    for e in expected:
        view = e[32 + offset : -32 + offset]
        factor = torch.tensor(0.3, dtype=torch.float64).to(compute)
        view.copy_((view.to(compute) * factor).to(dtype))
    if is_live:
        emulator.scale(views, math.nan, torch.tensor([0.3], dtype=torch.float64))
    else:
        emulator.scale(views, 0.3)
    assert_same_bits(buffers, expected)


def test_scaling_takes_every_dtype_and_more_than_a_table(emulator: Emulator) -> None:
    tensors = [values((i % 4,), FLOATS[i % 3], i) for i in range(3000)]
    expected = [t * 0.5 for t in tensors]
    emulator.scale(tensors, 0.5)
    assert_same_bits(tensors, expected)


# -- sums of rows ----------------------------------------------------------------------------------


def canonical_row_sums(a: Tensor, b: Tensor) -> list[list[float]]:
    """a, b: [rows, size]."""
    found = []
    for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True):
        sums = []
        for terms in (x * y, x * x, y * y):
            chunks = [fold(terms[i : i + CHUNK], np.add) for i in range(0, len(terms), CHUNK)]
            sums.append(fold(np.array(chunks), np.add))
        found.append(sums)
    return found


@pytest.mark.parametrize(
    ("n_rows", "row_size"),
    [
        *((1, 1), (3, 31), (9, 32), (8, 33), (7, 64), (2, 1000), (17, 1024), (5, 1025)),
        *((3, 5000), (2, CHUNK - 1), (2, CHUNK), (2, CHUNK + 1), (2, 9 * CHUNK + 1500)),
    ],
)
@parametrize_dtypes(FLOATS)
def test_row_sums_are_in_the_canonical_order(
    emulator: Emulator, dtype: torch.dtype, n_rows: int, row_size: int
) -> None:
    a, b = (values((n_rows, row_size), dtype, seed) for seed in (1, 2))
    sums = emulator.row_sums(a, b, n_rows, row_size, row_size)
    assert sums.tolist() == canonical_row_sums(a, b)
    x, y = a.double(), b.double()
    truth = torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)], 1)
    torch.testing.assert_close(sums, truth, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("inner", [1, 6])
@pytest.mark.parametrize(("n_rows", "row_size"), [(5, 36), (3, 1200), (2, CHUNK + 2)])
@parametrize_dtypes(FLOATS)
def test_rows_may_lie_between_each_other(
    emulator: Emulator, dtype: torch.dtype, n_rows: int, row_size: int, inner: int
) -> None:
    a, b = (values((n_rows, row_size), dtype, seed) for seed in (1, 2))

    def interleaved(x: Tensor) -> Tensor:
        return x.reshape(n_rows, -1, inner).transpose(0, 1).contiguous()

    sums = emulator.row_sums(interleaved(a), interleaved(b), n_rows, row_size, inner)
    assert sums.tolist() == canonical_row_sums(a, b)


def test_rows_without_elements_have_sums_of_zero(emulator: Emulator) -> None:
    empty = torch.empty(3, 0)
    assert emulator.row_sums(empty, empty, 3, 0, 0).tolist() == [[0.0] * 3] * 3
    assert emulator.row_sums(empty, empty, 0, 5, 5).tolist() == []


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("row_size", [700, 3 * CHUNK])
def test_row_sums_do_not_depend_on_the_order_of_threads(
    emulator: Emulator, seed: int, row_size: int
) -> None:
    emulator.seed(seed)
    a, b = (values((3, row_size), torch.float32, s) for s in (1, 2))
    assert emulator.row_sums(a, b, 3, row_size, row_size).tolist() == canonical_row_sums(a, b)


def test_row_sums_keep_nan_and_inf(emulator: Emulator) -> None:
    a, b = values((3, 2000), torch.float32, 1), values((3, 2000), torch.float32, 2)
    a[0, 1999] = torch.nan
    b[1, 0] = torch.inf
    sums = emulator.row_sums(a, b, 3, 2000, 2000)
    assert sums[0, :2].isnan().all()
    assert sums[0, 2].isfinite()
    assert sums[1, [0, 2]].isinf().all()
    assert sums[1, 1].isfinite()
    assert sums[2].isfinite().all()
