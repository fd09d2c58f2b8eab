"""k-center steps, class medians and distances to centres, against float64 and numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyoptim import backend
from pyoptim.coreset import CenterDistances, center_distances, class_medians

NATIVE = backend.native()
ISAS = NATIVE.isas() if NATIVE else ()
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "reference")

pytestmark = pytest.mark.native
parametrize_isas = pytest.mark.parametrize("isa", ISAS)
parametrize_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
parametrize_backends = pytest.mark.parametrize("name", BACKENDS)


def normal(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator).to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """The same values shifted by an element, with gaps between rows, and by columns."""
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    wide = torch.zeros(2 * len(x), x.shape[1] + 9, dtype=x.dtype)
    wide[::2, 3 : x.shape[1] + 3] = x
    return [shifted, wide[::2, 3 : x.shape[1] + 3], x.T.contiguous().T]


# -- k-center --------------------------------------------------------------------------------------


def plain_steps(x: Tensor, n_steps: int) -> tuple[list[int], list[float], Tensor]:
    """Rows and distances of k-center greedy from row 0, and the last minimum."""
    wide, row = x.double(), 0
    least = torch.full((len(x),), torch.inf, dtype=torch.float64)
    rows, sqdists = [], []
    for _ in range(n_steps):
        least = torch.minimum(least, (wide - wide[row]).square().sum(dim=1))
        row = int((least == least.max()).int().argmax())
        rows.append(row)
        sqdists.append(float(least[row]))
    return rows, sqdists, least


@parametrize_isas
@parametrize_dtypes
def test_steps_are_those_of_k_center_greedy(isa: str, dtype: torch.dtype) -> None:
    assert NATIVE
    NATIVE.set_isa(isa)
    for n, d in ((1, 1), (2, 17), (50, 16), (300, 33), (9000, 40)):
        x = normal(n, d, dtype, n)
        rows, sqdists, least = plain_steps(x, 6)
        distances = CenterDistances(x)
        found = [distances.add(row) for row in [0, *rows[:-1]]]
        assert [row for row, _ in found] == rows
        assert [sqdist for _, sqdist in found] == pytest.approx(sqdists, rel=1e-13)
        torch.testing.assert_close(distances.sqdist, least, rtol=1e-13, atol=0.0)


@parametrize_dtypes
def test_distances_do_not_depend_on_threads_isa_or_layout(dtype: torch.dtype) -> None:
    assert NATIVE
    x = normal(3000, 37, dtype)
    center = normal(1, 37, torch.float64, 1)[0]

    def run(x: Tensor) -> tuple[tuple[int, float], Tensor]:
        distances = CenterDistances(x)
        distances.add(5)
        return distances.add(center), distances.sqdist

    want = run(x)
    for isa in ISAS:
        NATIVE.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got = run(x)
            assert got[0] == want[0]
            assert torch.equal(got[1], want[1])
    for form in layouts(x):
        got = run(form)
        assert got[0] == want[0]
        assert torch.equal(got[1], want[1])


@parametrize_isas
@pytest.mark.parametrize("d", [1, 3, 16, 65, 300, 5000])
@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e-18, 1e15, 1e18])
def test_a_centre_that_is_hardly_nearer_is_noticed(isa: str, d: int, scale: float) -> None:
    """By less than float32 tells: the second centre is the first with other last bits."""
    assert NATIVE
    NATIVE.set_isa(isa)
    x, first = normal(200, d) * scale, normal(1, d, seed=1)[0] * scale
    directions = torch.where(normal(1, d, seed=2)[0] > 0, torch.inf, -torch.inf)
    second = first.nextafter(directions.float())
    alone = []
    for center in (first, second):
        distances = CenterDistances(x)
        distances.add(center)
        alone.append(distances.sqdist.clone())
    assert (alone[1] < alone[0]).any()
    assert (alone[1] > alone[0]).any()
    distances = CenterDistances(x)
    distances.add(first)
    distances.add(second)
    assert torch.equal(distances.sqdist, torch.minimum(*alone))


@parametrize_backends
def test_of_equally_far_rows_the_lowest_is_found(name: str) -> None:
    x = torch.zeros(70_000, 4)
    x[[333, 44_444, 69_999], 1] = 2.0
    assert CenterDistances(x, backend=name).add(0) == (333, 4.0)
    assert CenterDistances(torch.ones(5, 2), backend=name).add(3) == (0, 0.0)
    assert CenterDistances(torch.ones(5, 0), backend=name).add(3) == (0, 0.0)
    assert CenterDistances(torch.ones(0, 2), backend=name).add(torch.ones(2)) == (-1, 0.0)


@parametrize_backends
def test_a_nan_leaves_no_trace(name: str) -> None:
    x = normal(500, 6)
    x[123, 5] = x[400, 0] = torch.nan
    distances = CenterDistances(x, backend=name)
    with pytest.raises(ValueError, match=r"x\[123\] holds a NaN"):
        distances.add(0)
    assert torch.isinf(distances.sqdist).all()
    distances = CenterDistances(normal(10, 6), backend=name)
    distances.add(0)
    before = distances.sqdist.clone()
    for center in (torch.full((6,), torch.nan), torch.full((6,), torch.inf)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            distances.add(center)
    with pytest.raises(ValueError, match="real vector of 6 elements"):
        distances.add(torch.ones(5))
    with pytest.raises(IndexError, match="center=10 is not a row"):
        distances.add(10)
    with pytest.raises(IndexError, match="center=-1 is not a row"):
        distances.add(-1)
    assert torch.equal(distances.sqdist, before)


# -- medians ---------------------------------------------------------------------------------------


def numpy_medians(x: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    wide = x.double().numpy()
    rows = [wide[(labels == c).numpy()] for c in range(n_classes)]
    return torch.from_numpy(
        np.array([np.median(r, axis=0) if len(r) else np.full(x.shape[1], np.nan) for r in rows])
    )


@parametrize_dtypes
@parametrize_backends
def test_medians_are_numpys(name: str, dtype: torch.dtype) -> None:
    """Classes of 1, 2, 3 and many rows, of none, of both parities; around blocks of columns."""
    for n, d, n_classes in ((1, 1, 1), (7, 3, 5), (900, 31, 4), (1001, 70, 3), (5000, 5, 2)):
        x = normal(n, d, dtype, n)
        x[::3] = x[::3].round()  # many equal values
        labels = torch.randint(0, n_classes, (n,), generator=torch.Generator().manual_seed(n))
        got = class_medians(x, labels, n_classes + 1, backend=name)
        want = numpy_medians(x, labels, n_classes + 1)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.to(got.dtype).nan_to_num())


# Classes of none, one and two rows; around blocks of 8 and 16 rows, 32 values that are ranked by
# comparing all with all, and 512 rows of which a sample is taken.
CLASS_SIZES = (1, 0, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 34, 511, 512, 513, 1030)


@parametrize_isas
@pytest.mark.parametrize("d", [1, 7, 8, 9, 17, 40])
def test_medians_of_classes_of_every_size(isa: str, d: int) -> None:
    assert NATIVE
    NATIVE.set_isa(isa)
    labels = torch.repeat_interleave(torch.arange(len(CLASS_SIZES)), torch.tensor(CLASS_SIZES))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(d))]
    x = normal(len(labels), d, seed=d)
    kinds = [
        x,
        x.round(),  # ties
        torch.full_like(x, -0.75),
        torch.where(x > 0, 1.0, -1.0),  # the middle values of an even number often differ
        torch.where(x.abs() > 1, x.sign() * torch.inf, x),
    ]
    for values in [*kinds, torch.cat(kinds, dim=1)]:
        got = class_medians(values, labels, len(CLASS_SIZES))
        with np.errstate(invalid="ignore"):  # the mean of both infinities
            want = numpy_medians(values, labels, len(CLASS_SIZES)).float()
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@given(data=st.data())
def test_medians_of_unfriendly_distributions(data: st.DataObject) -> None:
    """Long tails, few distinct values, infinities, sorted rows."""
    n = data.draw(st.integers(1, 3000))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    kind = data.draw(st.sampled_from(["tails", "binary", "infinite", "sorted", "two clusters"]))
    x = torch.randn(n, 3, generator=generator)
    if kind == "tails":
        x = torch.exp(20 * x)
    elif kind == "binary":
        x = (x > data.draw(st.floats(-2, 2))).float()
    elif kind == "infinite":
        x = torch.where(x > 0.1, torch.inf, torch.where(x < -0.2, -torch.inf, x))
    elif kind == "sorted":
        x = x.sort(dim=0, descending=data.draw(st.booleans())).values
    else:
        x = torch.where(x > 0, x * 1e-20 + 1e20, x * 1e20 - 1e-20)
    labels = torch.zeros(n, dtype=torch.int64)
    with np.errstate(invalid="ignore"):
        want = numpy_medians(x, labels, 1).float()
    torch.testing.assert_close(class_medians(x, labels), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [511, 512, 4096, 5003])
@pytest.mark.parametrize("value", [1e6, -1e6, 0.0, torch.inf])
def test_medians_where_every_sampled_row_misleads(n: int, value: float) -> None:
    """The kernels bracket medians by 128 rows, evenly apart; here those rows are all the same."""
    x = normal(n, 37)
    x[torch.arange(128) * n // 128] = value
    x[:, 5] = x[:, 5].clamp(min=0)  # half of the column
    x[:, 6] = (torch.arange(n) >= n // 2).float()  # the two middle values of an even n differ
    labels = torch.zeros(n, dtype=torch.int64)
    assert torch.equal(class_medians(x, labels), numpy_medians(x, labels, 1).float())


def test_the_mean_of_huge_middle_values_is_finite() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.full((4, 2), torch.finfo(dtype).max, dtype=dtype)
        for name in BACKENDS:
            got = class_medians(x, torch.zeros(4, dtype=torch.int64), backend=name)
            assert torch.equal(got, x[:1].to(got.dtype))


@parametrize_dtypes
def test_medians_do_not_depend_on_threads_isa_or_layout(dtype: torch.dtype) -> None:
    assert NATIVE
    x, labels = normal(2000, 45, dtype), torch.arange(2000) % 3
    want = class_medians(x, labels)
    for isa in ISAS:
        NATIVE.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(class_medians(x, labels), want)
    for form in layouts(x):
        assert torch.equal(class_medians(form, labels), want)


@parametrize_backends
def test_medians_name_the_row_with_a_nan(name: str) -> None:
    x, labels = normal(3000, 40), torch.arange(3000) % 2
    x[2001, 39] = x[1004, 0] = torch.nan
    with pytest.raises(ValueError, match=r"x\[1004\] holds a NaN"):
        class_medians(x, labels, backend=name)


@parametrize_isas
def test_medians_find_a_nan_wherever_it_is(isa: str) -> None:
    """In whole and partial blocks of rows and columns, with and without a sample."""
    assert NATIVE
    NATIVE.set_isa(isa)
    for n, d, rows in ((1, 1, [0]), (13, 11, list(range(13))), (530, 19, [0, 7, 512, 525, 529])):
        x, labels = normal(n, d), torch.zeros(n, dtype=torch.int64)
        for row in rows:
            for column in range(d):
                bad = x.clone()
                bad[row, column] = torch.nan
                with pytest.raises(ValueError, match=rf"x\[{row}\] holds a NaN"):
                    class_medians(bad, labels)


@parametrize_backends
def test_medians_of_nothing(name: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert class_medians(torch.zeros(0, 3), none, backend=name).shape == (0, 3)
    assert class_medians(torch.zeros(0, 3), none, 2, backend=name).isnan().all()
    zeros = torch.zeros(4, dtype=torch.int64)
    assert class_medians(torch.zeros(4, 0), zeros, backend=name).shape == (1, 0)


# -- distances to the own centre -------------------------------------------------------------------


@parametrize_isas
@parametrize_dtypes
def test_distances_are_to_the_centre_of_the_label(isa: str, dtype: torch.dtype) -> None:
    assert NATIVE
    NATIVE.set_isa(isa)
    for n, d in ((1, 1), (70, 16), (3000, 33), (5, 0), (0, 3)):
        x, centers = normal(n, d, dtype, n), normal(4, d, torch.float32, 7)
        labels = torch.arange(n) * 7 % 4
        want = (x.double() - centers.double()[labels]).square().sum(dim=1).sqrt()
        for form in [x, *layouts(x)]:
            for name in BACKENDS:
                got = center_distances(form, labels, centers, backend=name)
                torch.testing.assert_close(got, want, rtol=1e-13, atol=0.0)


L = torch.zeros(4, dtype=torch.int64)
X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: class_medians(X, L[:3]), ValueError, "labels have shape"),
        (lambda: class_medians(X, L.float()), ValueError, "dtype torch.float32"),
        (lambda: class_medians(X, L - 1), ValueError, r"labels\[0\] is -1"),
        (lambda: class_medians(X, L + 2, 2), ValueError, r"labels\[0\] is 2"),
        (lambda: class_medians(X[0], L), ValueError, r"x has shape \(3,\)"),
        (lambda: class_medians(X.int(), L), TypeError, "x has dtype torch.int32"),
        (lambda: center_distances(X, L, X[:, :2]), ValueError, "centers has shape"),
        (lambda: center_distances(X, L + 4, X), ValueError, r"labels\[0\] is 4"),
        (lambda: CenterDistances(X[0]), ValueError, r"x has shape \(3,\)"),
        (lambda: CenterDistances(X.int()), TypeError, "x has dtype torch.int32"),
        (lambda: CenterDistances(X, backend="gpu"), ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
