"""Nearest rows and centres by the CUDA kernels: the CPU engine's results, bit for bit.

The emulated tensor cores cut every sum as the hardware is known to, so that the certificate has
errors to reckon with.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import running
from searches import HARD, normal
from torch import Tensor

from pyoptim import backend
from pyoptim.coreset import (
    CenterDistances,
    center_distances,
    certificate,
    class_medians,
    nearest,
    search,
)
from pyoptim.coreset.engines import CudaEngine

pytestmark = pytest.mark.native
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
parametrize_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
parametrize_metrics = pytest.mark.parametrize("metric", ["sqeuclidean", "ip", "cosine"])


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    with running("cuda"):
        yield


def assert_as_on_cpu(x: Any, y: Any, k: int = 1, **options: Any) -> None:
    got = nearest(x, y, k, backend="cuda", **options)
    want = nearest(x, y, k, backend="cpu", **options)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])


# -- nearest rows ----------------------------------------------------------------------------------


# Around rows and columns of a tile (256 x 128), elements of a stage (32), and of a score (16).
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(1, 1, 1), (9, 1, 7), (257, 129, 31), (3, 300, 33), (20, 30, 100), (5, 3, 0)],
)
def test_shapes_around_a_tile(n: int, m: int, d: int) -> None:
    assert_as_on_cpu(normal(n, d, 1), normal(m, d, 2))
    assert_as_on_cpu(normal(min(n, 50), d, 1), normal(m, d, 2), min(3, m))


@parametrize_dtypes
@parametrize_metrics
def test_every_dtype_and_metric(dtype: torch.dtype, metric: str) -> None:
    # Of the rows only x's lie where 16 bytes can be read at once.
    x, y = normal(30, 40, 1, dtype), normal(60, 41, 2, dtype)[:, 1:]
    assert_as_on_cpu(x, y, metric=metric)
    assert_as_on_cpu(x[:9], y, 5, metric=metric)


@pytest.mark.parametrize("data", HARD)
def test_hard_data(data: str) -> None:
    x, y = HARD[data]()
    assert_as_on_cpu(x, y, metric="euclidean")
    assert_as_on_cpu(x, y, 4)


@pytest.mark.parametrize("data", ["outliers", "infinite", "huge", "zeros", "many magnitudes"])
@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_hard_data_of_other_metrics(data: str, metric: str) -> None:
    assert_as_on_cpu(*HARD[data](), metric=metric)


@pytest.mark.parametrize(
    ("data", "dtype"),
    [("offset", torch.bfloat16), ("ties", torch.float16), ("infinite", torch.float64)],
    ids=str,
)
def test_hard_data_of_other_dtypes(data: str, dtype: torch.dtype) -> None:
    x, y = (t.to(dtype) for t in HARD[data]())
    assert_as_on_cpu(x, y)
    assert_as_on_cpu(x, y, 3)


def test_k_may_be_all_rows() -> None:
    assert_as_on_cpu(normal(20, 6, 1), normal(170, 6, 2), 170)
    assert_as_on_cpu(normal(20, 6, 1), normal(170, 6, 2), 128)


@pytest.mark.parametrize("k", [1, 3])
def test_blocks_of_rows_and_columns_meet(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(270, 20, 1), normal(400, 20, 2)
    monkeypatch.setattr(search, "X_BYTES", 1)
    monkeypatch.setattr(search, "Y_BYTES", 200 * 4 * 32)
    monkeypatch.setattr(search, "n_parts", lambda *_: 3)
    assert_as_on_cpu(x, y, k)
    assert_as_on_cpu([x[:100], x[100:]], [y[:1], y[1:]], k)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_threads_changes_nothing(
    seed: int, built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "n_parts", lambda *_: 2)
    built.seed(seed)
    try:
        assert_as_on_cpu(normal(70, 70, 1), normal(200, 70, 2))
    finally:
        built.seed(0)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_anywhere_in_memory(dtype: torch.dtype, k: int) -> None:
    x, y = normal(40, 35, 1, dtype), normal(60, 35, 2, dtype)
    wide = torch.full((80, 64), torch.nan, dtype=dtype)
    wide[::2, 5:40] = x
    assert_as_on_cpu(wide[::2, 5:40], y.T.contiguous().T, k)
    assert_as_on_cpu(x[3:4].expand(9, -1), y, k)


@pytest.mark.parametrize("k", [1, 2])
def test_only_rows_of_the_same_class_are_compared(k: int) -> None:
    x, y = normal(90, 30, 1), normal(150, 30, 2)
    labels = (torch.arange(90) * 7 % 5, torch.arange(150) * 3 % 5)
    assert_as_on_cpu(x, y, k, same_class=labels)


@pytest.mark.parametrize("k", [1, 2])
def test_batches(k: int) -> None:
    x, y = (torch.stack([normal(n, 9, s) for s in (n, n + 1)]) for n in (20, 30))
    assert_as_on_cpu(x, y, k)


@pytest.mark.parametrize("k", [1, 2])
def test_a_nan_is_reported_with_its_row(k: int) -> None:
    x, y = normal(300, 9, 1), normal(140, 9, 2)
    x[270, 8] = torch.nan
    with pytest.raises(ValueError, match=r"x\[270\] holds a NaN"):
        nearest(x, y, k, backend="cuda")
    y[131, 0] = torch.nan
    with pytest.raises(ValueError, match=r"y\[131\] holds a NaN"):
        nearest(x, y, k, backend="cuda")
    labels = torch.arange(300) % 2, torch.arange(140) % 2
    x[270] = 0.0
    with pytest.raises(ValueError, match=r"y\[131\] holds a NaN"):
        nearest(x, y, k, same_class=labels, backend="cuda")


def test_no_rows() -> None:
    distances, indices = nearest(normal(0, 4, 1), normal(3, 4, 2), backend="cuda")
    assert (distances.shape, indices.shape) == ((0,), (0,))


def settled(x: Tensor, y: Tensor) -> float:
    """The share of rows of which every pair was scored."""
    engine = CudaEngine(x.device)
    found = search._Search(engine, (x, None), (y, None), search.SQDIST)
    packed = found._pack(x, None)
    least = engine.nearest(packed, found.packed, x.shape[1], 1)
    scores, indices = torch.full((len(x),), torch.inf).double(), torch.full((len(x),), -1)
    is_settled = engine.certify(
        *((x, None), (y, None), search.SQDIST, found.slack, found.about, packed.norms, least),
        *(0, scores, indices),
    )
    return float(is_settled.double().mean())


def share_of_bound(x: Tensor, y: Tensor) -> float:
    """The largest error of a value of the filter over what the certificate allows for it."""
    engine, d = CudaEngine(x.device), x.shape[1]
    found = search._Search(engine, (x, None), (y, None), search.SQDIST)
    packed = found._pack(x, None)
    values = engine.values(packed, found.packed, d, 1).double()
    center = 0.0 if found.center is None else found.center
    a, b = (t.double() * found.about[0] - center for t in (x, y))
    exact = b.square().sum(1) / 2 - a @ b.T
    product, square, _, tiny = found.slack
    norms = packed.norms[:, None], found.packed.norms
    slack = product * norms[0] * norms[1] + square * norms[1] ** 2 + tiny
    return float(((values - exact).abs() / (slack / 2)).max())


def test_errors_of_the_filter_stay_within_the_bound_and_near_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bound without one of its parts would be too small for data that is worst for the part."""
    d = 512
    x, y = torch.full((3, d), 2.0**-12), torch.full((4, d), 1.9 * 2.0**-13)
    x[:, 0] = y[:, 0] = 1.0  # every product but the first is below the last bit of the sum
    assert 0.1 <= share_of_bound(x.bfloat16(), y.bfloat16()) <= 1
    assert share_of_bound(normal(9, 70, 1), normal(9, 70, 2)) <= 1
    # Sums without a rounding, so that only the parts left out are lost.
    monkeypatch.setattr(certificate, "_SIXTEEN_PRODUCTS", 0.0)
    v = torch.full((1, 2), 1 + 0.99 * 2.0**-9)
    assert 0.2 <= share_of_bound(v, torch.cat([v, -v])) <= 1


def test_the_filter_settles_nearly_everything() -> None:
    """Otherwise the results would be right, and the kernels useless."""
    x, y = normal(100, 64, 1) + 1e3, normal(64, 64, 2) + 1e3
    assert settled(x, y) <= 0.02
    assert settled(x.half() - 1e3, y.half() - 1e3) <= 0.02
    y[5] = 1e6  # one long row must not spoil the others' certificates
    assert settled(x, y) <= 0.02
    assert settled(x, torch.cat([y, y, y])) == 1.0


# -- centres ---------------------------------------------------------------------------------------


@parametrize_dtypes
@pytest.mark.parametrize(("n", "d"), [(1, 1), (70, 33), (200, 100), (9, 0)])
def test_steps_of_k_center(n: int, d: int, dtype: torch.dtype) -> None:
    x = normal(n, d + 1, 1, dtype)[:, 1:] if d % 2 else normal(n, d, 1, dtype)
    got, want = CenterDistances(x, backend="cuda"), CenterDistances(x, backend="cpu")
    farthest = 0
    for center in [None] * 5 + [normal(1, d, 9)[0]] + [None] * 2:
        step = farthest if center is None else center
        found = got.add(step)
        assert found == want.add(step)
        assert torch.equal(got.sqdist, want.sqdist)
        farthest = found[0]


def test_of_equally_far_rows_the_lowest_is_found() -> None:
    x = torch.ones(3000, 3)
    x[[2999, 71, 1500]] = 2.0
    distances = CenterDistances(x, backend="cuda")
    assert distances.add(0) == (71, 3.0)
    assert distances.add(71) == (0, 0.0)


def test_steps_of_k_center_report_a_nan_and_infinities() -> None:
    x = normal(300, 5, 1)
    x[280, 1] = x[290, 1] = torch.nan
    distances = CenterDistances(x, backend="cuda")
    with pytest.raises(ValueError, match=r"x\[280\] holds a NaN"):
        distances.add(0)
    assert distances.sqdist.isinf().all()
    x = normal(300, 5, 1)
    x[7, 2] = torch.inf
    distances = CenterDistances(x, backend="cuda")
    assert distances.add(0) == (7, float("inf"))
    with pytest.raises(ValueError, match="infinite"):
        distances.add(7)


@parametrize_dtypes
def test_medians_and_distances_to_them(dtype: torch.dtype) -> None:
    x, labels = normal(90, 37, 1, dtype), torch.arange(90) * 7 % 5
    centers = class_medians(x, labels, 6, backend="cuda")
    assert torch.equal(centers[:5], class_medians(x, labels, 6, backend="cpu")[:5])
    assert centers[5].isnan().all()
    found = [center_distances(x, labels, centers, backend=name) for name in ("cuda", "cpu")]
    assert torch.equal(*found)


def test_a_failed_launch_is_an_error(built: Any) -> None:
    built.library.pyoptim_emulator_fail_in(2)
    with pytest.raises(RuntimeError, match="failed"):
        nearest(normal(5, 5, 1), normal(5, 5, 2), backend="cuda")
    built.library.pyoptim_emulator_fail_in(0)


def test_a_backend_that_cannot_read_the_tensors_is_refused() -> None:
    backend.load_cuda_engine(None)
    with pytest.raises(backend.BackendError, match="cuda"):
        nearest(normal(5, 5, 1), normal(5, 5, 2), backend="cuda")
