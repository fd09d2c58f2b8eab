"""ASAM's norm in one pass: every engine gives the bits of the products' norm, and of the CPU."""

from typing import Any

import pytest
import torch
from cases import FLOATS, parametrize_dtypes, values
from test_gpu_step import shift
from torch import Tensor

from pyoptim import reductions

# Around a lane's four elements, the 1024 lanes of a round and a chunk of 16384.
SIZES = (0, 1, 3, 5, 1023, 1025, 16385)


def norm_of(grads: list[Tensor], weights: list[Any], engine: str) -> float:
    parts = reductions.batches(grads, 2.0, engine, weights)
    return float(reductions.total(parts, 2.0))


def problem(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Any]]:
    """Every third tensor has no weight; etas differ."""
    grads = [values((n,), dtype, i).to(device) for i, n in enumerate(SIZES)]
    params = [values((n,), dtype, 50 + i).to(device) for i, n in enumerate(SIZES)]
    weights = [None if i % 3 == 2 else (p, i / 10) for i, p in enumerate(params)]
    return grads, weights


@parametrize_dtypes(FLOATS)
def test_a_weighted_norm_is_that_of_the_products(
    dtype: torch.dtype, engine: str, device: torch.device
) -> None:
    grads, weights = problem(dtype, device)
    products = [
        g if w is None else reductions.weighted(g, w) for g, w in zip(grads, weights, strict=True)
    ]
    assert norm_of(grads, weights, engine) == norm_of(products, [None] * len(grads), engine)
    on_cpu = [None if w is None else (w[0].cpu(), w[1]) for w in weights]
    assert norm_of(grads, weights, engine) == norm_of([g.cpu() for g in grads], on_cpu, "cpu")
    exact = sum(
        (g.double() * (1.0 if w is None else w[0].double().abs() + w[1])).square().sum()
        for g, w in zip(grads, weights, strict=True)
    )
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    assert norm_of(grads, weights, engine) == pytest.approx(float(exact) ** 0.5, rel=4 * unit)


@pytest.mark.parametrize("which", ["grads", "weights", "both"])
def test_a_weighted_norm_does_not_depend_on_alignment(
    which: str, engine: str, device: torch.device
) -> None:
    grads, weights = problem(torch.float32, device)
    expected = norm_of(grads, weights, engine)
    if which != "weights":
        grads = [shift(g) for g in grads]
    if which != "grads":
        weights = [None if w is None else (shift(w[0]), w[1]) for w in weights]
    assert norm_of(grads, weights, engine) == expected


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 1], ids=["grad", "weight"])
def test_what_is_not_finite_reaches_the_norm(
    place: int, bad: float, engine: str, device: torch.device
) -> None:
    pair = [values((2000,), torch.float32, i).abs() for i in range(2)]
    pair[place][1999] = bad
    found = norm_of([pair[0].to(device)], [(pair[1].to(device), 0.5)], engine)
    assert str(found) == str(float(torch.tensor(bad)))


def test_many_weighted_tensors_take_several_launches(engine: str, device: torch.device) -> None:
    n = 1500 if engine == "cuda" else 20  # a table of the CUDA engine has 812 rows with weights
    grads = [values((3,), torch.float32, i).to(device) for i in range(n)]
    weights: list[Any] = [(values((3,), torch.float32, -i - 1).to(device), 0.0) for i in range(n)]
    on_cpu: list[Any] = [(p.cpu(), eta) for p, eta in weights]
    expected = norm_of([g.cpu() for g in grads], on_cpu, "cpu")
    assert norm_of(grads, weights, engine) == expected


def test_a_weight_laid_out_otherwise_is_multiplied_first(engine: str, device: torch.device) -> None:
    grad, param = (values((5, 7), torch.float64, i).to(device) for i in range(2))
    expected = norm_of([grad], [(param, 0.1)], engine)
    strided = norm_of([grad], [(param.t().contiguous().t(), 0.1)], engine)
    assert strided == pytest.approx(expected, rel=1e-15)
