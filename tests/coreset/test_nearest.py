"""nearest: exact to float64 whatever the data, and the same result however it is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pyoptim import backend
from pyoptim.coreset import nearest, nearest_reference, pairwise_sqdist

NATIVE = backend.native()
ISAS = NATIVE.isas() if NATIVE else ()
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
METRICS = ("sqeuclidean", "euclidean", "cosine", "ip")
# One of everything; around strips of 4 and 6 rows, panels of 8, 24 and 64 columns, runs of 256 and
# 512 products; so few rows that no filter runs.
SHAPES = (
    (1, 1, 1),
    (9, 1, 7),
    (13, 31, 15),
    (12, 32, 16),
    (25, 33, 17),
    (5, 70, 8),
    (40, 129, 63),
    (14, 49, 257),
    (30, 40, 513),
    (11, 35, 1030),
)

pytestmark = pytest.mark.native
parametrize_isas = pytest.mark.parametrize("isa", ISAS)
parametrize_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
parametrize_metrics = pytest.mark.parametrize("metric", METRICS)


def normal(n: int, d: int, dtype: torch.dtype, seed: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, dtype=torch.float64, generator=generator) + offset).to(dtype)


def exact_scores(x: Tensor, y: Tensor, metric: str) -> NDArray[np.longdouble]:
    """What is to be minimised, in extended precision."""
    a, b = (t.double().numpy().astype(np.longdouble) for t in (x, y))
    if "euclidean" in metric:
        scores = np.array([((row - b) ** 2).sum(axis=1) for row in a]).reshape(len(a), len(b))
        return np.sqrt(scores) if metric == "euclidean" else scores
    products = a @ b.T
    if metric == "ip":
        return -products
    norms = np.sqrt((a * a).sum(axis=1))[:, None] * np.sqrt((b * b).sum(axis=1))
    return 1 - np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)


def assert_nearest(x: Tensor, y: Tensor, k: int, metric: str, found: tuple[Tensor, Tensor]) -> None:
    """The k smallest scores, ascending; another index only where float64 cannot tell them apart."""
    distances, indices = (t.reshape(len(x), k) for t in found)
    scores = exact_scores(x, y, metric)
    order = np.argsort(scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    chosen = np.take_along_axis(scores, indices.numpy(), axis=1)
    whole = 1 if metric == "cosine" else np.abs(scores).max(initial=0)
    noise = 1e-15 * (x.shape[1] + 1) * (whole if metric in ("cosine", "ip") else best)
    assert (np.abs(chosen - best) <= noise).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    clear = (chosen == best).all(axis=1)
    assert (indices.numpy()[clear] == order[clear]).all()
    expected = -best if metric == "ip" else best
    rounding = 2.0 ** (-52 if distances.dtype == torch.float64 else -23)
    error = np.abs(distances.double().numpy() - expected.astype(np.float64))
    assert (error <= np.abs(expected) * rounding + noise).all()


# -- exact -----------------------------------------------------------------------------------------


@parametrize_isas
@parametrize_metrics
@parametrize_dtypes
def test_result_is_that_of_scoring_every_pair(isa: str, metric: str, dtype: torch.dtype) -> None:
    assert NATIVE
    NATIVE.set_isa(isa)
    for seed, (n, m, d) in enumerate(SHAPES):
        x, y = normal(n, d, dtype, seed), normal(m, d, dtype, seed + 100)
        for k in {1, min(3, m), m}:
            assert_nearest(x, y, k, metric, nearest(x, y, k, metric=metric))


@parametrize_isas
@pytest.mark.parametrize("offset", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("k", [1, 4])
def test_common_offsets_lose_no_digit(isa: str, offset: float, k: int) -> None:
    assert NATIVE
    NATIVE.set_isa(isa)
    x, y = (normal(n, 40, torch.float32, n, offset) for n in (60, 90))
    assert_nearest(x, y, k, "sqeuclidean", nearest(x, y, k))


@parametrize_isas
@parametrize_metrics
@pytest.mark.parametrize("k", [1, 5])
def test_rows_that_float32_products_cannot_tell_apart(isa: str, metric: str, k: int) -> None:
    """Every row of y is the same but for its last bits, at every scale of norms."""
    assert NATIVE
    NATIVE.set_isa(isa)
    d, m = 48, 80
    generator = torch.Generator().manual_seed(k)
    for scale in (1.0, 300.0, 1e-12, 1e12):
        base = torch.randn(d, generator=generator)
        ulps = torch.randint(-8, 9, (m, d), generator=generator)
        y = (base * (1 + ulps * 2.0**-23)) * scale
        x = torch.randn(20, d, generator=generator) * scale
        x[:10] = y[:10] + scale * 1e-6
        assert_nearest(x, y, k, metric, nearest(x, y, k, metric=metric))


@parametrize_isas
@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "ip"])
@pytest.mark.parametrize("d", [256, 512, 1536])
def test_sums_that_lose_every_term_are_certified(isa: str, metric: str, d: int) -> None:
    """Products of 2^-25 added to 1 vanish one by one in float32, hundreds of roundings in all."""
    assert NATIVE
    NATIVE.set_isa(isa)
    x = torch.full((20, d), 2.0**-6)
    x[:, 0] = 1
    y = torch.zeros(130, d)
    y[:, 0] = 1
    y[:65, -1] = (
        torch.linspace(0.5, 0.8, 65) * min(d - 1, 511) * 2.0**-19
    )  # in one term: always seen
    y[64] = 2.0**-19
    y[64, 0] = 1
    y[65:] = -y[:65]  # so that the mean is zero
    found = nearest(x, y, metric=metric)
    assert found[1].tolist() == [64] * 20
    assert_nearest(x, y, 1, metric, found)


def test_far_clusters_and_outliers_are_certified_too() -> None:
    centers = normal(8, 24, torch.float32, 0) * 1e4
    y = centers[torch.arange(200) % 8] + normal(200, 24, torch.float32, 1) * 1e-2
    x = centers[torch.arange(100) % 8] + normal(100, 24, torch.float32, 2) * 1e-2
    y[7] *= 1e6
    assert_nearest(x, y, 2, "sqeuclidean", nearest(x, y, 2))
    assert_nearest(x, y, 1, "sqeuclidean", nearest(x, y))


@parametrize_isas
@given(data=st.data())
def test_random_values_of_many_magnitudes(isa: str, data: st.DataObject) -> None:
    assert NATIVE
    NATIVE.set_isa(isa)
    n, m, d = (data.draw(st.integers(1, top)) for top in (20, 40, 20))
    spread = data.draw(st.sampled_from([0, 2, 12, 60]))
    metric, k = data.draw(st.sampled_from(METRICS)), data.draw(st.integers(1, m))
    dtype = data.draw(st.sampled_from(FLOATS[:3]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))

    def draw(rows: int) -> Tensor:
        mantissa = torch.randint(-64, 65, (rows, d), generator=generator).double() / 64
        exponent = torch.randint(-spread, spread + 1, (rows, d), generator=generator)
        return (mantissa * 2.0**exponent).to(dtype)

    x, y = draw(n), draw(m)
    assert_nearest(x, y, k, metric, nearest(x, y, k, metric=metric))


@pytest.mark.parametrize("power", [-500, -160, -130, 60, 120, 500])
@parametrize_dtypes
def test_values_near_the_ends_of_their_range(power: int, dtype: torch.dtype) -> None:
    """Where float32 under- or overflows; what float64 cannot hold ties, as in any brute force."""
    limit = {torch.float64: 510, torch.float16: 5}.get(dtype, 120)
    scale = 2.0 ** max(-limit - 10, min(limit, power))
    x, y = ((normal(n, 9, torch.float64, n) * scale).to(dtype) for n in (30, 50))
    got, want = nearest(x, y, 3), nearest_reference(x, y, 3)
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0.0)


# -- ties ------------------------------------------------------------------------------------------


@parametrize_isas
@parametrize_dtypes
@pytest.mark.parametrize("metric", ["sqeuclidean", "ip"])
def test_exact_ties_take_the_lowest_index(isa: str, dtype: torch.dtype, metric: str) -> None:
    """Small integers: float64 is exact, so the reference's stable order is the only right one."""
    assert NATIVE
    NATIVE.set_isa(isa)
    generator = torch.Generator().manual_seed(3)
    for n, m, d in ((40, 150, 3), (9, 700, 1), (30, 64, 40)):
        x, y = (torch.randint(-2, 3, (r, d), generator=generator).to(dtype) for r in (n, m))
        for k in (1, 3, m // 2, m):
            got = nearest(x, y, k, metric=metric)
            want = nearest_reference(x, y, k, metric=metric)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


@parametrize_isas
@pytest.mark.parametrize("k", [1, 2, 150])
def test_equal_rows_beyond_every_buffer(isa: str, k: int) -> None:
    assert NATIVE
    NATIVE.set_isa(isa)
    y = torch.full((900, 5), 0.3)
    _, indices = nearest(normal(25, 5, torch.float32, 0), y, k)
    assert torch.equal(indices.reshape(25, k), torch.arange(k).expand(25, k))


def test_distance_to_an_equal_row_is_zero() -> None:
    x = normal(300, 768, torch.float32, 0, offset=50)
    for metric in ("sqeuclidean", "euclidean", "cosine"):
        distances, indices = nearest(x, x, metric=metric)
        assert torch.equal(indices, torch.arange(300))
        assert torch.equal(distances, torch.zeros(300))


# -- however it is computed ------------------------------------------------------------------------


@parametrize_dtypes
@pytest.mark.parametrize("k", [1, 7])
def test_result_does_not_depend_on_threads_isa_alignment_strides_or_chunks(
    dtype: torch.dtype, k: int
) -> None:
    assert NATIVE
    x, y = normal(700, 30, dtype, 0), normal(150, 30, dtype, 1)
    want = nearest(x, y, k)

    def shifted(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    wide = torch.zeros(1400, 64, dtype=dtype)
    wide[::2, 5:35] = x
    forms: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "shifted": lambda: nearest(shifted(x), shifted(y), k),
        "rows apart": lambda: nearest(wide[::2, 5:35], y, k),
        "columns": lambda: nearest(x.T.contiguous().T, y.T.contiguous().T, k),
        "chunk": lambda: nearest(x, y, k, chunk=64),
        "chunks": lambda: nearest([x[:5], x[5:5], x[5:]], iter_twice(y), k),
        "generator": lambda: nearest(x, (part for part in y.split(40)), k),
    }
    for isa in ISAS:
        NATIVE.set_isa(isa)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert_same(nearest(x, y, k), want, f"{isa}, {threads} threads")
    for name, form in forms.items():
        assert_same(form(), want, name)


def iter_twice(y: Tensor) -> list[Tensor]:
    return [y[:1], y[1:70], y[70:]]


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], what: str) -> None:
    assert torch.equal(got[0], want[0]), what
    assert torch.equal(got[1], want[1]), what


def test_blocks_of_y_and_runs_of_products_meet() -> None:
    """y of more than one 4 MB block, rows of more than one run."""
    x, y = normal(30, 700, torch.float32, 0), normal(1700, 700, torch.float32, 1)
    for k in (1, 3):
        want = (x.double() @ y.double().T * -2 + y.double().square().sum(1)).topk(
            k, dim=1, largest=False
        )
        assert torch.equal(nearest(x, y, k)[1].reshape(30, k), want.indices)


@parametrize_metrics
def test_batches_are_searched_one_by_one(metric: str) -> None:
    x, y = normal(60, 9, torch.float32, 0).view(3, 20, 9), normal(45, 9, torch.float32, 1)
    y = y.view(3, 15, 9)
    for k in (1, 4):
        distances, indices = nearest(x, y, k, metric=metric)
        for b in range(3):
            assert_same(
                (distances[b], indices[b]), nearest(x[b], y[b], k, metric=metric), f"entry {b}"
            )
    assert nearest(x[:0], y[:0])[1].shape == (0, 20)


@parametrize_metrics
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("k", [1, 5])
def test_same_class_compares_rows_of_one_label_only(backend_name: str, metric: str, k: int) -> None:
    x, y = normal(200, 6, torch.float32, 0), normal(90, 6, torch.float32, 1)
    x_labels, y_labels = torch.arange(200) % 3 * 7 - 7, torch.arange(90) % 4 * 7 - 7
    labels = (x_labels, y_labels)
    found = nearest(x, y, k, same_class=labels, metric=metric, backend=backend_name)
    distances, indices = (t.reshape(200, k) for t in found)
    for label in (-7, 0, 7):
        rows, columns = x_labels == label, torch.nonzero(y_labels == label)[:, 0]
        positions = torch.searchsorted(columns, indices[rows])
        assert torch.equal(columns[positions], indices[rows]), "another label"
        assert_nearest(x[rows], y[columns], k, metric, (distances[rows], positions))


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_same_class_takes_the_lowest_index_of_ties(backend_name: str) -> None:
    x, y = torch.ones(20, 3), torch.ones(60, 3)
    x_labels, y_labels = torch.arange(20) % 2, (torch.arange(60) + 1) % 3
    for metric in METRICS:
        found = nearest(
            x, y, 2, same_class=(x_labels, y_labels), metric=metric, backend=backend_name
        )
        want = torch.tensor([[2, 5], [0, 3]])[x_labels]
        assert torch.equal(found[1], want), metric


def test_arrays_on_disk_are_read_where_they_are(tmp_path: Path) -> None:
    x, y = normal(500, 20, torch.float32, 0), normal(60, 20, torch.float32, 1)
    for name, data in (("x", x), ("y", y)):
        data.numpy().tofile(tmp_path / name)
    a = np.memmap(tmp_path / "x", np.float32, mode="r", shape=(500, 20))
    b = np.memmap(tmp_path / "y", np.float32, mode="r", shape=(60, 20))
    assert_same(nearest(a, b, 2), nearest(x, y, 2), "memmap")
    assert_same(nearest([a[:77], a[77:]], [b], 2), nearest(x, y, 2), "chunks of memmaps")


def test_more_than_2_to_the_31_pairs() -> None:
    n, m = 70_001, 35_000
    positions = torch.arange(n) * 7919 % m
    x = torch.stack([positions + 0.25, torch.ones(n)], dim=1)
    y = torch.stack([torch.arange(m).float(), torch.ones(m)], dim=1)
    distances, indices = nearest(x, y)
    assert torch.equal(indices, positions)
    assert torch.equal(distances, torch.full((n,), 0.0625))


# -- the promise of speed and memory ---------------------------------------------------------------


@parametrize_metrics
def test_the_filter_leaves_hardly_more_than_the_answer(metric: str) -> None:
    assert NATIVE
    for dtype in FLOATS:
        for n, m, d, k in ((2000, 300, 64, 1), (500, 300, 700, 1), (500, 800, 32, 10)):
            x, y = normal(n, d, dtype, 0), normal(m, d, dtype, 1)
            before = NATIVE.coreset_n_scored()
            nearest(x, y, k, metric=metric)
            scored = NATIVE.coreset_n_scored() - before
            assert k * n <= scored <= 1.25 * k * n, (dtype, n, m, d, k)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_does_not_grow_with_the_matrix(threads: int) -> None:
    """50 000 x 500 x 64 in less than 8 MiB beyond inputs; the matrix would take 95."""
    torch.set_num_threads(threads)
    x, y = torch.randn(50_000, 64), torch.randn(500, 64)
    nearest(x[:1000], y)
    before = _peak_kib(reset=True)
    nearest(x, y)
    assert _peak_kib() - before < 8 * 1024


def _peak_kib(reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError("no VmHWM in /proc/self/status")


# -- special values --------------------------------------------------------------------------------


@parametrize_metrics
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("n", [3, 40])
def test_infinite_values_are_as_far_as_can_be(metric: str, backend_name: str, n: int) -> None:
    x, y = normal(n, 5, torch.float32, 0), normal(70, 5, torch.float32, 1)
    clean = nearest(x, y, 70, metric=metric)
    y[3, 1], y[50, 2], x[0, 1] = torch.inf, -torch.inf, torch.inf
    if metric in ("sqeuclidean", "euclidean"):
        distances, indices = nearest(x, y, 70, metric=metric, backend=backend_name)
        assert torch.equal(indices[0], torch.arange(70))
        assert torch.isinf(distances[0]).all()
        assert (indices[1:, -2:] == torch.tensor([3, 50])).all()
        assert torch.isinf(distances[1:, -2:]).all()
        kept = (clean[1][1:] != 3) & (clean[1][1:] != 50)
        assert torch.equal(indices[1:, :68], clean[1][1:][kept].view(-1, 68))
    got = nearest(x, y, 9, metric=metric, backend=backend_name)
    want = nearest_reference(x, y, 9, metric=metric)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@parametrize_dtypes
def test_a_nan_is_an_error_that_names_the_first_row(backend_name: str, dtype: torch.dtype) -> None:
    for n in (3, 500):
        x, y = normal(n, 20, dtype, 0), normal(300, 20, dtype, 1)
        bad = x.clone()
        bad[n - 1, 19] = bad[n - 2, 3] = torch.nan
        with pytest.raises(ValueError, match=rf"x\[{n - 2}\] holds a NaN"):
            nearest(bad, y, backend=backend_name)
        with pytest.raises(ValueError, match=rf"x\[{n + n - 2}\] holds a NaN"):
            nearest([x, bad], y, backend=backend_name)
        bad = y.clone()
        bad[77, 0] = bad[250, 0] = torch.nan
        with pytest.raises(ValueError, match=r"y\[77\] holds a NaN"):
            nearest(x, bad, backend=backend_name)
        with pytest.raises(ValueError, match=r"y\[377\] holds a NaN"):
            nearest(x, [y, bad], backend=backend_name)
    with pytest.raises(ValueError, match=r"batch entry 1: y\[77\] holds a NaN"):
        nearest(torch.stack([x, x]), torch.stack([y, bad]), backend=backend_name)


def test_rows_of_zeros_have_cosine_zero() -> None:
    x, y = normal(20, 4, torch.float32, 0), normal(40, 4, torch.float32, 1)
    x[3], y[5], y[9] = 0, 0, 0
    distances, indices = nearest(x, y, 40, metric="cosine")
    assert torch.equal(indices[3], torch.arange(40))
    assert torch.equal(distances[3], torch.ones(40))
    assert_nearest(x, y, 6, "cosine", nearest(x, y, 6, metric="cosine"))


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_nothing_to_search_for_and_nothing_to_compare(backend_name: str) -> None:
    y = normal(40, 4, torch.float32, 0)
    for k, shape in ((1, (0,)), (3, (0, 3))):
        distances, indices = nearest(y[:0], y, k, backend=backend_name)
        assert (distances.shape, indices.shape) == (shape, shape)
        assert (distances.dtype, indices.dtype) == (torch.float32, torch.int64)
    distances, indices = nearest(torch.empty(30, 0), torch.empty(50, 0), 3, backend=backend_name)
    assert torch.equal(indices, torch.arange(3).expand(30, 3))
    assert torch.equal(distances, torch.zeros(30, 3))


# -- errors ----------------------------------------------------------------------------------------

X, Y = torch.zeros(4, 3), torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nearest(X, Y, 6), ValueError, "k=6 but y has 5 rows"),
        (lambda: nearest(X, Y[:0]), ValueError, "k=1 but y has 0 rows"),
        (lambda: nearest(X, [Y, Y], 11), ValueError, "k=11 but y has 10 rows"),
        (lambda: nearest(X, Y, 0), ValueError, "k must be a positive integer, got 0"),
        (lambda: nearest(X, Y, True), ValueError, "k must be a positive integer, got True"),
        (lambda: nearest(X, Y, chunk=0), ValueError, "chunk must be"),
        (lambda: nearest(X, Y, metric="l1"), ValueError, "metric must be one of .* got 'l1'"),
        (lambda: nearest(X, Y[:, :2]), ValueError, "same number of features"),
        (lambda: nearest(X[0], Y), ValueError, r"x has shape \(3,\)"),
        (lambda: nearest(X, Y.double()), TypeError, "x has dtype torch.float32 but y has"),
        (lambda: nearest(X.long(), Y.long()), TypeError, "x has dtype torch.int64"),
        (lambda: nearest(X.to_sparse(), Y), TypeError, "layout torch.sparse_coo"),
        (lambda: nearest(X.cfloat(), Y.cfloat()), TypeError, "x has dtype torch.complex64"),
        (lambda: nearest(["a"], Y), TypeError, "x is a str"),
        (lambda: nearest([], Y), ValueError, "x has no chunks"),
        (lambda: nearest([X, X], iter([Y])), ValueError, "y is an iterator"),
        (lambda: nearest(X, iter([Y]), chunk=2), ValueError, "y is an iterator"),
        (lambda: nearest([X, X.double()], [Y]), TypeError, "x has dtype torch.float64 but y"),
        (lambda: nearest(X[None], Y), ValueError, r"give \[batch, n, d\]"),
        (lambda: nearest(X[None], torch.stack([Y, Y])), ValueError, r"give \[batch, n, d\]"),
        (
            lambda: nearest(X, Y, same_class=(torch.zeros(4).long(), torch.ones(5).long())),
            ValueError,
            "y has 0 rows of label 0, fewer than k=1",
        ),
        (
            lambda: nearest(X, Y, same_class=(torch.zeros(4), torch.ones(5).long())),
            ValueError,
            "labels of x have shape .* and dtype torch.float32",
        ),
        (lambda: nearest(X, Y, same_class=torch.zeros(4).long()), TypeError, "must be a pair"),
        (
            lambda: nearest(X[None], Y[None], same_class=(torch.zeros(1, 4), torch.zeros(1, 5))),
            ValueError,
            "same_class takes matrices; call nearest once per batch entry",
        ),
        (
            lambda: nearest([X], Y, same_class=(torch.zeros(4).long(), torch.zeros(5).long())),
            ValueError,
            "same_class takes matrices, not iterables of chunks",
        ),
        (lambda: nearest(X, Y, backend="gpu"), ValueError, "backend must be one of"),
        (
            lambda: nearest(np.zeros((4, 3), ">f4"), Y),
            TypeError,
            "byte order is not this machine's",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_inputs_are_left_as_they_are_and_need_no_gradient() -> None:
    x = normal(30, 4, torch.float32, 0).requires_grad_()
    y = normal(40, 4, torch.float32, 1)
    before = x.detach().clone(), y.clone()
    distances, _ = nearest(x, y)
    assert not distances.requires_grad
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert_same(nearest(torch._neg_view(-y), y), nearest(y, y), "lazily negated")


# -- the matrix ------------------------------------------------------------------------------------


@parametrize_isas
@parametrize_dtypes
def test_pairwise_sqdist_keeps_the_digits(isa: str, dtype: torch.dtype) -> None:
    assert NATIVE
    NATIVE.set_isa(isa)
    for n, m, d in (*SHAPES, (0, 3, 2), (3, 0, 2), (3, 4, 0), (100, 5, 3)):
        x, y = normal(n, d, dtype, 0, 100.0), normal(m, d, dtype, 1, 100.0)
        got = pairwise_sqdist(x, y)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        wanted = torch.from_numpy(exact_scores(x, y, "sqeuclidean").astype(np.float64))
        rounding = 2.0**-23 if got.dtype == torch.float32 else 1e-15 * (d + 1)
        torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=0.0)
        assert torch.equal(pairwise_sqdist(x, x).diagonal(), torch.zeros(n, dtype=got.dtype))
    assert torch.equal(pairwise_sqdist(x.T.contiguous().T, y[::2]), got[:, ::2])


def test_pairwise_sqdist_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="same number of features"):
        pairwise_sqdist(X, Y[:, :2])
    with pytest.raises(TypeError, match=r"but y has torch\.float64"):
        pairwise_sqdist(X, Y.double())
    nan = X.clone()
    nan[1, 1] = torch.nan
    assert pairwise_sqdist(nan, Y).isnan().any(dim=1).tolist() == [False, True, False, False]
