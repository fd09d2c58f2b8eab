"""The reference direction against formulas in float64, and what it puts back."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import FLOATS
from dropin import same_bits, set_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim.line_search.direction import BASES, ReferenceDirection, state_names

SHAPES = [(3, 4), (0,), (), (17,), (5, 1, 7)]
OPTIONS: dict[str, Any] = {
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "lr_scale": 0.5,
    "momentum": 0.9,
    "use_mv": False,
}


def make(base: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    params = [
        Parameter(torch.randn(s, dtype=torch.float64, generator=generator).to(dtype))
        for s in SHAPES
    ]
    groups = [
        {"params": params[:2], "base": base, **OPTIONS, **more},
        {"params": params[2:], "base": base, **OPTIONS, **more, "lr_scale": 2.0},
    ]
    state: dict[Tensor, Any] = {}

    class State(dict):  # type: ignore[type-arg]
        def __missing__(self, key: Tensor) -> Any:
            return self.setdefault(key, {})

    state = State()
    return SimpleNamespace(param_groups=groups, state=state, state_dtype=None)


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def values(optimizer: Any) -> list[Tensor]:
    """Everything that a step may change."""
    states = [t for p in params_of(optimizer) for t in optimizer.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*params_of(optimizer), *states)]


class Formulas:
    """One element of the contract, written down once more."""

    def __init__(self, w: Tensor, group: dict[str, Any]) -> None:
        self.w, self.group, self.t = w.detach().double().clone(), group, 0
        self.m = self.v = self.top = self.b = torch.zeros_like(self.w)

    def advance(self, g: Tensor) -> None:
        group, (b1, b2) = self.group, self.group["betas"]
        self.t += 1
        self.g = g.double()
        self.m = b1 * self.m + (1 - b1) * self.g
        square = self.g * self.g
        self.v = self.v + square if group["base"] == "adagrad" else b2 * self.v + (1 - b2) * square
        self.top = torch.maximum(self.top, self.v)
        self.b = self.g if self.t == 1 else group["momentum"] * self.b + self.g

    @property
    def scale(self) -> Any:
        base, t = self.group["base"], self.t + self.group.get("bias_offset", 0)
        if base == "sgd":
            return 1.0
        v = self.top if base == "amsgrad" else self.v
        if base in ("adam", "amsgrad"):
            v = v / (1 - self.group["betas"][1] ** t)
        return 1 / (v.sqrt() + self.group["eps"])

    @property
    def mean(self) -> Tensor:
        base, t = self.group["base"], self.t + self.group.get("bias_offset", 0)
        if base == "sgd":
            return self.b
        return self.m / (1 - self.group["betas"][0] ** t if base in ("adam", "amsgrad") else 1)

    @property
    def d(self) -> Tensor:
        return self.scale * (self.mean if self.group["use_mv"] else self.g)

    def trial(self, eta: float) -> Tensor:
        return self.w - eta * self.group["lr_scale"] * self.d

    def step(self, eta: float) -> Tensor:
        rate = eta * self.group["lr_scale"]
        self.w = self.w * (1 - self.group["weight_decay"] * rate) - rate * self.scale * self.mean
        return self.w


def assert_close(params: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close([p.detach() for p in params], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("use_mv", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("base", BASES)
def test_the_contract_in_float64(base: str, offset: int, use_mv: bool) -> None:
    optimizer = make(base, bias_offset=offset, use_mv=use_mv)
    params, direction = params_of(optimizer), ReferenceDirection(optimizer)
    rows = [Formulas(p, g) for g in optimizer.param_groups for p in g["params"]]
    for step in range(5):
        set_grads(params, step)
        for row, param in zip(rows, params, strict=True):
            assert param.grad is not None
            row.advance(param.grad * 0.5)
        if step % 2:
            direction.plain(0.3, torch.tensor(0.5, dtype=torch.float64))
        else:
            slope = direction.start(0.7, 0.5)
            assert slope.dtype == torch.float64
            assert slope.dim() == 0
            expected = sum(float((r.g * r.d).sum()) * r.group["lr_scale"] for r in rows)
            assert float(slope) == pytest.approx(expected, rel=1e-12)
            assert_close(params, [row.trial(0.7) for row in rows])
            direction.trial(0.2)
            assert_close(params, [row.trial(0.2) for row in rows])
            direction.finish(0.3)
        assert_close(params, [row.step(0.3) for row in rows])


@pytest.mark.parametrize("base", BASES)
def test_without_momentum_there_is_no_buffer(base: str) -> None:
    optimizer = make(base, betas=(0.0, 0.99), momentum=0.0)
    direction = ReferenceDirection(optimizer)
    set_grads(params_of(optimizer), 0)
    direction.plain(0.1)
    for entry in optimizer.state.values():
        assert not {"exp_avg", "momentum_buffer"} & entry.keys()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("base", BASES)
@settings(max_examples=8)
@given(n_before=st.integers(0, 2), n_trials=st.integers(0, 2), factor=st.floats(-2, 2))
def test_undo_and_restore_are_exact(
    base: str, dtype: torch.dtype, n_before: int, n_trials: int, factor: float
) -> None:
    optimizer = make(base, dtype)
    params, direction = params_of(optimizer), ReferenceDirection(optimizer)
    for step in range(n_before):
        set_grads(params, step)
        direction.plain(0.1)
    set_grads(params, 9)
    before, addresses = values(optimizer), [p.data_ptr() for p in params]
    versions = [p._version for p in params]
    direction.start(0.5, factor)
    for trial in range(n_trials):
        direction.trial(0.1 / (1 + trial))
    direction.restore()
    assert all(map(same_bits, params, before))
    direction.trial(3.0)
    direction.undo()
    assert all(map(same_bits, values(optimizer), before))
    assert len(values(optimizer)) == len(before)
    assert [p.data_ptr() for p in params] == addresses
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plain_step_is_adams_to_the_bit(dtype: torch.dtype) -> None:
    optimizer = make("adam", dtype, lr_scale=1.0)
    optimizer.param_groups[1]["lr_scale"] = 1.0
    params = params_of(optimizer)
    twins = copy.deepcopy(params)
    adam = pyoptim.AdamW(twins, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    direction = ReferenceDirection(optimizer)
    for step in range(5):
        set_grads(params, step)
        set_grads(twins, step)
        if step == 2:
            direction.start(0.3)
            direction.finish(0.01)
        else:
            direction.plain(0.01)
        adam.step()
    assert all(map(same_bits, params, twins))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_copies_keep_what_rounding_would_lose(dtype: torch.dtype) -> None:
    optimizer = make("sgd", dtype, momentum=0.0, weight_decay=0.0)
    params, direction = params_of(optimizer), ReferenceDirection(optimizer)
    for param in params:
        optimizer.state[param]["master_param"] = param.detach().float()
    exact = [p.detach().double() for p in params]
    for step in range(20):
        set_grads(params, step)
        if step % 2:
            direction.plain(1e-4)
        else:
            direction.start(1e-3)
            master = optimizer.state[params[0]]["master_param"].clone()
            direction.trial(1e-2)
            assert same_bits(optimizer.state[params[0]]["master_param"], master)
            direction.finish(1e-4)
        rates = [0.5, 0.5, 2.0, 2.0, 2.0]
        exact = [
            w - 1e-4 * r * p.grad.double()  # type: ignore[union-attr]
            for w, r, p in zip(exact, rates, params, strict=True)
        ]
    for param, w in zip(params, exact, strict=True):
        master = optimizer.state[param]["master_param"]
        assert master.dtype == torch.float32
        torch.testing.assert_close(master.double(), w, rtol=1e-5, atol=1e-6)
        assert same_bits(param.detach(), master.to(dtype))


@pytest.mark.parametrize("base", BASES)
def test_bad_gradients_and_states_change_nothing(base: str) -> None:
    optimizer = make(base)
    params, direction = params_of(optimizer), ReferenceDirection(optimizer)
    set_grads(params, 0)
    direction.plain(0.1)
    before = values(optimizer)
    params[-1].grad = None
    wrong = torch.ones(3).double().to_sparse()
    extra = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.param_groups[1]["params"].append(extra)
    extra.grad = wrong
    with pytest.raises(RuntimeError, match="parameter 3 of group 1 has a sparse gradient"):
        direction.start(0.1)
    extra.data = torch.ones(3).to(torch.complex64)
    extra.grad = torch.ones(3).to(torch.complex64)
    with pytest.raises(RuntimeError, match=r"dtype torch\.complex64"):
        direction.plain(0.1)
    optimizer.param_groups[1]["params"].pop()
    names = state_names(optimizer.param_groups[0])
    if names:
        kept = optimizer.state[params[0]][names[0]]
        optimizer.state[params[0]][names[0]] = torch.ones(2)
        with pytest.raises(RuntimeError, match=r"has shape \(2,\), its parameter \(3, 4\)"):
            direction.start(0.1)
        optimizer.state[params[0]][names[0]] = kept
    assert all(map(same_bits, values(optimizer), before))


def test_no_gradient_at_all() -> None:
    optimizer = make("adam")
    direction = ReferenceDirection(optimizer)
    assert float(direction.start(1.0)) == 0.0
    direction.finish(1.0)
    direction.plain(1.0)
    assert not optimizer.state


def test_saved_weights_stay_allocated_and_follow_the_parameter() -> None:
    optimizer = make("adam")
    params, direction = params_of(optimizer), ReferenceDirection(optimizer)
    set_grads(params, 0)
    direction.start(0.1)
    first = {key: copy_.data_ptr() for key, copy_ in direction._copies.items()}
    direction.finish(0.1)
    direction.start(0.1)
    assert {key: copy_.data_ptr() for key, copy_ in direction._copies.items()} == first
    direction.undo()
    optimizer.state.clear()
    with torch.no_grad():
        params[0].data = params[0].float()
    params[0].grad = torch.ones_like(params[0])
    direction.start(0.1)
    direction.restore()
    assert direction._copies[id(params[0])].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_accept_stays_where_the_parameters_are(dtype: torch.dtype) -> None:
    optimizer = make("adam", dtype)
    params, direction = params_of(optimizer), ReferenceDirection(optimizer)
    for param in params if dtype == torch.bfloat16 else ():
        optimizer.state[param]["master_param"] = param.detach().float()
    for step in range(3):
        set_grads(params, step)
        direction.start(0.5)
        direction.trial(0.125)
        before = [p.detach().clone() for p in params]
        direction.accept()
        assert all(map(same_bits, params, before))
        for param in params if dtype == torch.bfloat16 else ():
            master = optimizer.state[param]["master_param"]
            assert same_bits(param.detach(), master.to(dtype))
            assert float(optimizer.state[param]["step"]) == step + 1
    set_grads(params, 4)
    before = values(optimizer)
    direction.start(0.5)
    direction.restore()
    direction.accept()
    assert all(map(same_bits, params, before))
