"""Nearest rows and centres on a GPU engine equal the CPU engine's, bit for bit."""

from typing import Any

import pytest
import torch
from engines import HAS_GPU
from searches import HARD, normal
from torch import Tensor

from pyoptim.coreset import CenterDistances, center_distances, class_medians, nearest

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Without a GPU the kernels have tests of their own, and are slow.
LARGE = ((3000, 1000, 200), (500, 5000, 33)) if HAS_GPU else ((6, 40, 20),)


def assert_as_on_cpu(
    engine: str, device: torch.device, x: Tensor, y: Tensor, k: int, **options: Any
) -> None:
    got = nearest(x.to(device), y.to(device), k, backend=engine, **options)
    want = nearest(x, y, k, backend="cpu", **options)
    assert torch.equal(got[1].cpu(), want[1])
    assert torch.equal(got[0].cpu(), want[0])


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nearest_rows_equal_the_cpu(
    shape: tuple[int, int, int], dtype: torch.dtype, engine: str, device: torch.device
) -> None:
    n, m, d = shape
    x, y = normal(n, d, 1, dtype), normal(m, d, 2, dtype)
    for metric in ("sqeuclidean", "ip", "cosine") if HAS_GPU else ("sqeuclidean",):
        for k in (1, 5):
            assert_as_on_cpu(engine, device, x, y, k, metric=metric)


@pytest.mark.parametrize("data", HARD if HAS_GPU else ["offset"])
def test_hard_data_equals_the_cpu(data: str, engine: str, device: torch.device) -> None:
    x, y = HARD[data]()
    n, m = (len(x), len(y)) if HAS_GPU else (6, 40)
    for k in (1, 3):
        assert_as_on_cpu(engine, device, x[:n], y[:m], k)


def test_sums_that_tensor_cores_cut_most_stay_within_the_bound(
    engine: str, device: torch.device
) -> None:
    """A large product first, then many that are just below its last bit."""
    n, m, d = (40, 200, 512) if HAS_GPU else (3, 10, 64)
    y = torch.full((m, d), 2.0**-13)
    y[:, 0] = 1.0
    y[:, 1:] *= 1 + normal(m, d - 1, 3) * 2.0**-10
    x = torch.full((n, d), 2.0**-12)
    x[:, 0] = 1.0 + normal(n, 1, 4)[:, 0] * 2.0**-20
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_on_cpu(engine, device, x.to(dtype), y.to(dtype), 1)
        assert_as_on_cpu(engine, device, x.to(dtype), y.to(dtype), 1, metric="ip")


def test_centres_equal_the_cpu(engine: str, device: torch.device) -> None:
    x = normal(5000, 77, 1) if HAS_GPU else normal(40, 33, 1)
    got, want = CenterDistances(x.to(device), backend=engine), CenterDistances(x, backend="cpu")
    farthest = 0
    for _ in range(4):
        found = got.add(farthest)
        assert found == want.add(farthest)
        farthest = found[0]
    assert torch.equal(got.sqdist.cpu(), want.sqdist)
    labels = torch.arange(len(x)) * 7 % 5
    centers = class_medians(x.to(device), labels, backend=engine)
    assert torch.equal(centers.cpu(), class_medians(x, labels, backend="cpu"))
    distances = center_distances(x.to(device), labels, centers, backend=engine)
    assert torch.equal(distances.cpu(), center_distances(x, labels, centers.cpu(), backend="cpu"))
