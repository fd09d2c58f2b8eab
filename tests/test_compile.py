"""torch.compile of functions that create, drive and step an optimizer: a graph break, no error."""

from typing import Any

import pytest
import torch
from dropin import OURS, TORCHS, assert_same, make_params, set_grads
from torch import Tensor

import pyoptim

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def train(cls: Any, compiler: str | None, is_created_inside: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    inputs = torch.randn(5, 4, dtype=torch.float64)
    optimizer = None if is_created_inside else cls(model.parameters(), lr=0.1)

    def one_step(inputs: Tensor, lr: float) -> Tensor:
        nonlocal optimizer
        if optimizer is None:
            optimizer = cls(model.parameters(), lr=0.1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = torch.compile(one_step, backend=compiler) if compiler else one_step
    losses = [compiled(inputs, 0.1 / (t + 1)) for t in range(3)]
    optimizer.step()  # outside of what was compiled
    return [*losses, *model.parameters()]


@pytest.mark.parametrize("is_created_inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(
    ("name", "compiler"),
    [("SGD", "eager"), ("AdamW", "eager"), ("AdamW", "aot_eager"), ("Adagrad", "eager")],
)
def test_compiled_training_equals_torchs(name: str, compiler: str, is_created_inside: bool) -> None:
    expected = train(TORCHS[name], None, False)
    assert_same(train(OURS[name], compiler, is_created_inside), expected)


def test_a_compiled_step_method() -> None:
    results = []
    for cls in (pyoptim.Adam, torch.optim.Adam):
        params = make_params()
        optimizer = cls(params)
        is_ours = cls is pyoptim.Adam
        step = torch.compile(optimizer.step, backend="eager") if is_ours else optimizer.step
        for t in range(3):
            set_grads(params, t)
            step()
        results.append(params)
    assert_same(*results)


def test_capturable_asked_for_by_the_user_is_still_refused() -> None:
    params = make_params()
    optimizer = pyoptim.Adam(params, capturable=True)
    set_grads(params, 0)
    with pytest.raises(AssertionError, match="capturable=True"):
        torch.compile(lambda: optimizer.step(), backend="eager")()
