"""What the drop-in tests share: both classes of every optimizer, their options, and a small model.

Trajectories are compared in float64, where the roundings of two correct implementations differ by
a few units in the last place: a handful of steps on numbers near 1 stays within `CLOSE`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import pyoptim
from pyoptim.optimizer import FusedOptimizer

NAMES = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad")
OURS: dict[str, type[FusedOptimizer]] = {name: getattr(pyoptim, name) for name in NAMES}
TORCHS: dict[str, type[Optimizer]] = {name: getattr(torch.optim, name) for name in NAMES}
# Where torch has a fused implementation on the CPU.
HAS_FUSED = ("SGD", "Adam", "AdamW", "Adagrad")

# One option set per set of state tensors, and the others that torch treats specially.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd-momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "sgd-nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": ("Adam", {"lr": 0.1, "weight_decay": 0.01}),
    "adam-amsgrad": ("Adam", {"lr": 0.1, "amsgrad": True, "betas": (0.8, 0.9)}),
    "adamw": ("AdamW", {"lr": 0.1, "weight_decay": 0.1}),
    "adamw-amsgrad": ("AdamW", {"lr": 0.1, "amsgrad": True, "maximize": True}),
    "rmsprop": ("RMSprop", {"lr": 0.1}),
    "rmsprop-full": ("RMSprop", {"lr": 0.1, "momentum": 0.9, "centered": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
}
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
SHAPES = ((3, 4), (17,), ())


def make_params(
    shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(_normal(shape, dtype, generator)) for shape in shapes]


def set_grads(params: Iterable[Tensor], seed: int) -> None:
    """Gives every parameter a fresh gradient that depends on the seed and the position only."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = _normal(tuple(param.shape), param.dtype, generator)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def run(optimizer: Optimizer, params: Iterable[Tensor], steps: Iterable[int]) -> None:
    params = list(params)
    for seed in steps:
        set_grads(params, seed)
        optimizer.step()


def assert_same(actual: Iterable[Tensor], expected: Iterable[Tensor], **tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), **(tolerance or CLOSE))


def snapshot(optimizer: Optimizer) -> tuple[list[Tensor], list[dict[str, Any]], int]:
    """Values of everything that a step may change; `assert_unchanged` compares it bit by bit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
        if p in optimizer.state
        else {}
        for p in params
    ]
    return [p.detach().clone() for p in params], states, len(optimizer.state)


def assert_unchanged(
    optimizer: Optimizer, before: tuple[list[Tensor], list[dict[str, Any]], int]
) -> None:
    params, states, entries = before
    now, states_now, entries_now = snapshot(optimizer)
    assert entries_now == entries
    assert all(map(same_bits, now, params))
    for state, state_now in zip(states, states_now, strict=True):
        assert state_now.keys() == state.keys()
        for name, value in state.items():
            assert not isinstance(value, Tensor) or same_bits(state_now[name], value), name


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if a.device.type == "meta":
        return a.shape == b.shape and a.dtype == b.dtype
    as_bytes = (t.resolve_conj().resolve_neg().contiguous().view(-1) for t in (a, b))
    return a.dtype == b.dtype and torch.equal(*(t.view(torch.uint8) for t in as_bytes))
