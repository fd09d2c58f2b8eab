"""SAM in functions that torch.compile compiles: steps run between graphs, and stay the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_bits, give_grads, parameters
from torch import Tensor, nn

import pyoptim
from pyoptim import SAM

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def by_hand(model: nn.Module, optimizer: SAM, x: Tensor) -> Tensor:
    model(x).square().mean().backward()
    optimizer.first_step(zero_grad=True)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.second_step(zero_grad=True)
    return loss.detach()


def in_one_call(model: nn.Module, optimizer: SAM, x: Tensor) -> Tensor:
    loss: Tensor = optimizer.step(lambda: model(x).square().mean())
    return loss.detach()


def train(form: Callable[..., Tensor], compiler: str | None, base: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    optimizer = SAM(model.parameters(), base, rho=0.3, adaptive=True, lr=0.1)
    compiled = torch.compile(form, backend=compiler) if compiler else form
    losses = [compiled(model, optimizer, x) for _ in range(3)]
    losses.append(form(model, optimizer, x))  # outside of what was compiled
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("base", [pyoptim.AdamW, torch.optim.SGD], ids=["pyoptim", "torch"])
@pytest.mark.parametrize("form", [by_hand, in_one_call], ids=lambda form: form.__name__)
def test_compiled_training_equals_eager_training(form: Any, base: Any) -> None:
    assert_same_bits(train(form, "eager", base), train(form, None, base))


def test_compiled_methods_step_alike() -> None:
    results = []
    for is_compiled in (False, True):
        params = parameters([(5,), (3, 2)], torch.float32)
        optimizer = SAM(params, pyoptim.SGD, lr=0.1, momentum=0.9)
        first, second = optimizer.first_step, optimizer.second_step
        if is_compiled:
            first, second = (torch.compile(f, backend="eager") for f in (first, second))
        for seed in range(3):
            give_grads(params, 2 * seed)
            first()
            give_grads(params, 2 * seed + 1)
            second()
        results.append(params)
    assert_same_bits(*results)
