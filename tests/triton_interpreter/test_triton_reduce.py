"""Norms, scaling and row sums in the order of csrc/reduce/order.hpp, bit for bit."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cases import FLOATS, assert_same_bits, parametrize_dtypes, values
from guarded import NAMES, Guarded, int64

from pyoptim.kernels import reduce

# numpy's, about the arithmetic of NaN and inf in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", [0, 1, 2], ids=["squares", "magnitudes", "maximum"])
# Around the 1024 lanes and the 16384 elements of a chunk.
SIZES = (0, 1, 9, 1023, 1024, 1025, 16384, 16385, 33000)


def terms(x: np.ndarray, kind: int) -> np.ndarray:
    return x * x if kind == 0 else np.abs(x)


def folded(x: np.ndarray, kind: int) -> float:
    """One result of float64 terms: over 1024 lanes, then the upper half onto the lower."""
    combine = np.maximum if kind == 2 else np.add
    lanes = np.zeros(1024)
    for begin in range(0, len(x), 1024):
        part = x[begin : begin + 1024]
        lanes[: len(part)] = combine(lanes[: len(part)], part)
    while len(lanes) > 1:
        lanes = combine(lanes[: len(lanes) // 2], lanes[len(lanes) // 2 :])
    return float(lanes[0])


def partials_of(x: np.ndarray, kind: int) -> list[float]:
    return [folded(x[i : i + 16384], kind) for i in range(0, len(x), 16384)]


def wide(array: Guarded) -> np.ndarray:
    return array.values.double().numpy()


def run_partials(kind: int, arrays: Sequence[Guarded], name: str, first: Sequence[int], n: int):
    out = torch.full((n,), -5.0, dtype=torch.float64)
    reduce.partials(
        kind,
        CPU,
        int64([a.address for a in arrays]),
        int64([a.values.numel() for a in arrays]),
        name,
        int64(first),
        out,
    )
    return out


@KINDS
@parametrize_dtypes(FLOATS)
def test_partials_are_in_the_canonical_order(dtype: torch.dtype, kind: int) -> None:
    arrays = [
        Guarded(values((n,), dtype, i), is_aligned)
        for i, n in enumerate(SIZES)
        for is_aligned in (True, False)
    ]
    expected = [partials_of(terms(wide(a), kind), kind) for a in arrays]
    # Behind one another, with a gap of one that must stay as it is.
    first = np.cumsum([0, *(len(e) + 1 for e in expected)])
    out = run_partials(kind, arrays, NAMES[dtype], first[:-1], int(first[-1]))
    joined = torch.tensor([x for e in expected for x in (*e, -5.0)], dtype=torch.float64)
    assert_same_bits([out], [joined])


@KINDS
@pytest.mark.parametrize("special", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
def test_partials_keep_what_is_not_finite(kind: int, special: float) -> None:
    x = values((2000,), torch.float32, 0)
    x[1500] = special
    out = run_partials(kind, [Guarded(x, True)], "f32", [0], 1)
    wanted = torch.nan if special != special else torch.inf
    assert_same_bits([out], [torch.tensor([wanted], dtype=torch.float64)])


@KINDS
def test_norms_are_over_their_own_partials(kind: int) -> None:
    parts = torch.rand(2500, dtype=torch.float64)
    ends = [0, 1, 1025, 1025, 2500]
    results = torch.full((len(ends),), -5.0, dtype=torch.float64)
    reduce.norms(kind, parts, ends, results)
    expected = []
    for begin, end in zip([0, *ends], ends, strict=False):
        total = folded(parts[begin:end].numpy(), kind)
        expected.append(np.sqrt(total) if kind == 0 else total)
    assert_same_bits([results], [torch.tensor(np.array(expected))])


@KINDS
def test_norms_keep_nan(kind: int) -> None:
    parts = torch.tensor([1.0, torch.nan, torch.inf], dtype=torch.float64)
    results = torch.zeros(2, dtype=torch.float64)
    reduce.norms(kind, parts, [1, 3], results)
    assert results[0] == 1.0
    assert results[1].isnan()


@pytest.mark.parametrize("norm", [0.0, 1e-7, 0.3, 3.7, 1e300, torch.inf, torch.nan])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_clip_is_the_factor_of_torch_in_float64(norm: float, scale: float | None) -> None:
    out = torch.zeros(1, dtype=torch.float64)
    grad_scale = None if scale is None else torch.tensor([scale])
    inverse = 0.5 if scale is None else 1 / scale
    reduce.clip(torch.tensor([norm], dtype=torch.float64), 1e-7, 0.5, grad_scale, out)
    factor = 1e-7 / (norm * inverse + 1e-6)
    expected = 1.0 if factor > 1.0 else factor
    assert_same_bits([out], [torch.tensor([expected], dtype=torch.float64)])
    reduce.clip(torch.tensor([norm], dtype=torch.float64), 1e9, 0.5, grad_scale, out)
    assert out.item() == 1.0 or norm > 1e9 or norm != norm


@pytest.mark.parametrize("is_live", [False, True], ids=["number", "tensor"])
@parametrize_dtypes(FLOATS)
def test_scale_multiplies_in_the_arithmetic_of_the_dtype(dtype: torch.dtype, is_live: bool) -> None:
    arrays = [Guarded(values((n,), dtype, i), i % 2 == 0) for i, n in enumerate(SIZES)]
    factor = 1 / 3
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = [
        (a.values.to(compute) * torch.tensor(factor, dtype=compute)).to(dtype) for a in arrays
    ]
    reduce.scale(
        CPU,
        int64([a.address for a in arrays]),
        int64(SIZES),
        NAMES[dtype],
        -7.0 if is_live else factor,
        torch.tensor([factor], dtype=torch.float64) if is_live else None,
    )
    assert_same_bits([a.values for a in arrays], expected)
    assert all(a.is_intact() for a in arrays)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_survives_the_way_through_float32(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    array = Guarded(patterns.view(dtype), True)
    before = array.values.clone()
    reduce.scale(CPU, int64([array.address]), int64([2**16]), NAMES[dtype], 1.0, None)
    assert_same_bits([array.values], [before])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """Every half times 1 + 2^-8 + 2^-12: above, at and below the middle between two halves."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for factor in (1 + 2**-8, 1 + 2**-8 + 2**-12, 1 + 2**-9, 0.5, 2**-9):
        array = Guarded(patterns.view(dtype), False)
        expected = (array.values.float() * torch.tensor(factor)).to(dtype)
        reduce.scale(CPU, int64([array.address]), int64([2**16]), NAMES[dtype], factor, None)
        assert_same_bits([array.values], [expected], str(factor))


def rows_of(x: torch.Tensor, n_rows: int, row_size: int, inner: int) -> np.ndarray:
    i = np.arange(row_size)
    at = (i // inner * n_rows + np.arange(n_rows)[:, None]) * inner + i % inner
    return x.double().flatten().numpy()[at]


def folded_rows(x: np.ndarray) -> float:
    parts = partials_of(x, 0)
    return parts[0] if len(parts) == 1 else folded(np.array(parts), 0)


@parametrize_dtypes(FLOATS)
@pytest.mark.parametrize(
    ("n_rows", "row_size", "inner"),
    [(3, 1, 1), (5, 100, 100), (2, 2050, 2050), (3, 72, 9), (4, 60, 1), (1, 16384, 16384)],
)
def test_row_sums_are_in_the_canonical_order(
    dtype: torch.dtype, n_rows: int, row_size: int, inner: int
) -> None:
    check_row_sums(dtype, n_rows, row_size, inner)


def test_sums_of_rows_of_many_chunks_are_in_the_canonical_order() -> None:
    check_row_sums(torch.float32, 2, 50_001, 50_001)
    check_row_sums(torch.float32, 2, 40_000, 8)


def check_row_sums(dtype: torch.dtype, n_rows: int, row_size: int, inner: int) -> None:
    a, b = (values((n_rows * row_size + 1,), dtype, seed)[1:] for seed in (1, 2))
    sums = torch.full((n_rows + 1, 3), -5.0, dtype=torch.float64)
    reduce.row_sums(a, b, n_rows, row_size, inner, sums[:n_rows])
    x, y = (rows_of(t, n_rows, row_size, inner) for t in (a, b))
    expected = [
        [folded_rows(u * v) for u, v in ((r, s), (r, r), (s, s))] for r, s in zip(x, y, strict=True)
    ]
    assert_same_bits([sums[:n_rows]], [torch.tensor(expected, dtype=torch.float64)])
    assert (sums[n_rows] == -5.0).all()
