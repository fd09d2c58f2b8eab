"""Nearest rows and centres by the Triton kernels: the CPU engine's results, bit for bit."""

from typing import Any

import pytest
import torch
from searches import HARD, normal
from torch import Tensor

from pyoptim.coreset import CenterDistances, center_distances, class_medians, nearest, search
from pyoptim.kernels import search as kernels

pytestmark = [
    pytest.mark.native,
    # numpy's, about the arithmetic of NaN and inf in the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE_ROWS", 16)
    monkeypatch.setattr(kernels, "TILE_COLUMNS", (32, 32))
    monkeypatch.setattr(kernels, "TILE_DEPTHS", (16, 16))
    monkeypatch.setattr(kernels, "ROWS", 16)
    monkeypatch.setattr(search, "n_parts", lambda *_: 2)


def assert_as_on_cpu(x: Any, y: Any, k: int = 1, **options: Any) -> None:
    got = nearest(x, y, k, backend="triton", **options)
    want = nearest(x, y, k, backend="cpu", **options)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (17, 33, 31), (3, 70, 33), (20, 10, 0)])
@pytest.mark.parametrize("k", [1, 3])
def test_shapes_around_a_tile(n: int, m: int, d: int, k: int) -> None:
    assert_as_on_cpu(normal(n, d, 1), normal(m, d, 2), min(k, m))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("metric", ["sqeuclidean", "ip", "cosine"])
def test_every_dtype_and_metric(dtype: torch.dtype, metric: str) -> None:
    # Of the rows only x's lie where 16 bytes can be read at once.
    x, y = normal(10, 32, 1, dtype), normal(40, 33, 2, dtype)[:, 1:]
    assert_as_on_cpu(x, y, metric=metric)
    assert_as_on_cpu(x[:3], y, 5, metric=metric)


@pytest.mark.parametrize("data", HARD)
def test_hard_data(data: str) -> None:
    x, y = HARD[data]()
    assert_as_on_cpu(x[:16], y[:70])
    if data in ("offset", "ties", "infinite"):
        assert_as_on_cpu(x[:16], y[:70], 4)


@pytest.mark.parametrize("data", ["outliers", "infinite", "zeros"])
def test_hard_data_of_another_metric(data: str) -> None:
    x, y = HARD[data]()
    assert_as_on_cpu(x[:10], y[:40], metric="cosine")


@pytest.mark.parametrize("k", [1, 2])
def test_rows_anywhere_in_memory_and_of_the_same_class(k: int) -> None:
    x, y = normal(20, 20, 1), normal(40, 20, 2)
    wide = torch.full((40, 64), torch.nan)
    wide[::2, 5:25] = x
    labels = (torch.arange(20) * 7 % 2, torch.arange(40) * 5 % 2)
    assert_as_on_cpu(wide[::2, 5:25], y.T.contiguous().T, k, same_class=labels)


@pytest.mark.parametrize("k", [1, 2])
def test_a_nan_is_reported_with_its_row(k: int) -> None:
    x, y = normal(30, 9, 1), normal(40, 9, 2)
    x[27, 8] = torch.nan
    with pytest.raises(ValueError, match=r"x\[27\] holds a NaN"):
        nearest(x, y, k, backend="triton")
    y[31, 0] = torch.nan
    with pytest.raises(ValueError, match=r"y\[31\] holds a NaN"):
        nearest(x, y, k, backend="triton")


def settled(x: Tensor, y: Tensor) -> float:
    """The share of rows of which every pair was scored."""
    engine = kernels.TritonEngine(x.device)
    found = search._Search(engine, (x, None), (y, None), search.SQDIST)
    packed = found._pack(x, None)
    least = engine.nearest(packed, found.packed, x.shape[1], 1)
    scores, indices = torch.full((len(x),), torch.inf).double(), torch.full((len(x),), -1)
    is_settled = engine.certify(
        *((x, None), (y, None), search.SQDIST, found.slack, found.about, packed.norms, least),
        *(0, scores, indices),
    )
    return float(is_settled.double().mean())


def test_the_filter_settles_nearly_everything() -> None:
    x, y = normal(50, 64, 1) + 1e3, normal(40, 64, 2) + 1e3
    assert settled(x, y) <= 0.02
    assert settled(x, torch.cat([y, y, y])) == 1.0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_steps_of_k_center_medians_and_distances(dtype: torch.dtype) -> None:
    x = normal(70, 34, 1, dtype)[:, 1:]
    got, want = CenterDistances(x, backend="triton"), CenterDistances(x, backend="cpu")
    farthest = 0
    for center in (None, None, normal(1, 33, 9)[0], None):
        step = farthest if center is None else center
        found = got.add(step)
        assert found == want.add(step)
        assert torch.equal(got.sqdist, want.sqdist)
        farthest = found[0]
    labels = torch.arange(70) * 7 % 5
    centers = class_medians(x, labels, backend="triton")
    assert torch.equal(centers, class_medians(x, labels, backend="cpu"))
    distances = [center_distances(x, labels, centers, backend=b) for b in ("triton", "cpu")]
    assert torch.equal(*distances)


def test_steps_of_k_center_take_the_lowest_row_and_report_a_nan() -> None:
    x = torch.ones(100, 3)
    x[[99, 71, 80]] = 2.0
    distances = CenterDistances(x, backend="triton")
    assert distances.add(0) == (71, 3.0)
    assert distances.add(71) == (0, 0.0)
    x[88, 1] = torch.nan
    with pytest.raises(ValueError, match=r"x\[88\] holds a NaN"):
        CenterDistances(x, backend="triton").add(0)
