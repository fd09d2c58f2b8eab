"""The plain-PyTorch references: right in float64, and the kernels agree with them in every bit."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    COMPLEX,
    FLOATS,
    HALVES,
    KERNEL_CASES,
    TORCH_CASES,
    Case,
    allowed_error,
    as_wide,
    assert_same_bits,
    assert_within,
    examples,
    give_grads,
    parameters,
    parametrize_cases,
    parametrize_dtypes,
    parametrize_kernel_dtypes,
    states_of,
    values,
)
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import backend
from pyoptim.optimizer import FusedOptimizer

SHAPES = ((3, 5), (67,), ())


def run(optimizer: FusedOptimizer, steps: int = 4) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    for t in range(steps):
        give_grads(params, seed=t)
        optimizer.step()
    counters = [s["step"] for s in optimizer.state.values() if "step" in s]
    return [*params, *states_of(optimizer), *counters]


@pytest.mark.native
@parametrize_cases()
@parametrize_kernel_dtypes
def test_the_kernels_give_the_references_bits(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    results = [
        run(case.ours(parameters(SHAPES, dtype), state_dtype=state_dtype, backend=name))
        for name in ("cpu", "reference")
    ]
    assert_same_bits(*results)


@pytest.mark.native
@parametrize_cases(KERNEL_CASES)
@parametrize_dtypes(COMPLEX)
def test_the_kernels_give_the_references_bits_for_complex(case: Case, dtype: torch.dtype) -> None:
    results = [run(case.ours(parameters(SHAPES, dtype), backend=b)) for b in ("cpu", "reference")]
    assert_same_bits(*results)


@pytest.mark.native
@parametrize_cases(KERNEL_CASES)
@parametrize_dtypes(FLOATS)
def test_the_kernels_give_the_references_bits_from_any_state(
    case: Case, dtype: torch.dtype
) -> None:
    """Magnitudes from subnormal to overflow, zeros of both signs, infinities and NaN."""
    n = 4099
    wide = [torch.randn(n, dtype=torch.float64) for _ in range(5)]
    limits = torch.finfo(dtype)
    span = torch.log2(torch.tensor([limits.smallest_normal, limits.max], dtype=torch.float64))
    low, high = span[0].item() - 8, span[1].item() + 2
    for x in wide:
        x *= torch.exp2(torch.empty(n, dtype=torch.float64).uniform_(low, high))
        x[torch.randint(n, (400,))] = torch.randn(400, dtype=torch.float64)
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
        x[torch.randint(n, (200,))] = special[torch.randint(5, (200,))].double()
    results = []
    for name in ("cpu", "reference"):
        param = Parameter(wide[0].to(dtype, copy=True))
        optimizer = case.ours([param], backend=name)
        for i, state in enumerate(case.state_names):
            value = wide[2 + i] if state in SIGNED_STATES else wide[2 + i].abs()
            optimizer.state[param][state] = value.to(dtype, copy=True)
        if optimizer.counts_steps:
            optimizer.state[param]["step"] = torch.tensor(6.0)
        param.grad = wide[1].to(dtype)
        optimizer.step()
        results.append([param, *states_of(optimizer)])
    assert_same_bits(*results)


SIGNED_STATES = ("exp_avg", "grad_avg", "momentum_buffer", "momentum")


@pytest.mark.native
@parametrize_dtypes(FLOATS)
def test_the_kernels_square_root_is_correctly_rounded(dtype: torch.dtype) -> None:
    """RMSprop with alpha = lr = 1 and eps = 0 subtracts 1/sqrt(square_avg)."""
    n = 20_000
    squares = torch.rand(n, dtype=torch.float64).mul(4).to(dtype)
    results = []
    for name in ("cpu", "reference"):
        param = Parameter(torch.zeros(n, dtype=dtype))
        optimizer = pyoptim.RMSprop([param], lr=1, alpha=1, eps=0, backend=name)
        optimizer.state[param]["square_avg"] = squares.clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        results.append([param])
    assert_same_bits(*results)
    compute = torch.float32 if dtype in HALVES else dtype
    root = torch.from_numpy(np.sqrt(squares.to(compute).numpy()))  # numpy's root is IEEE's
    assert_same_bits([results[0][0].detach()], [(-1 / root).to(dtype)])


# -- the reference in float64 ----------------------------------------------------------------------


@parametrize_cases(TORCH_CASES)
def test_the_reference_is_torchs_step_in_float64(case: Case) -> None:
    params = parameters(SHAPES, torch.float64)
    torchs = case.torchs(params)
    group = case.ours([torch.zeros(1)]).param_groups[0]
    names = case.state_names
    for t in range(4):
        give_grads(params, seed=t)
        olds = [
            (p.detach().clone(), {n: old_state(case, torchs, p, n) for n in names}) for p in params
        ]
        torchs.step()
        for p, (old, state) in zip(params, olds, strict=True):
            new, new_state = case.row.ours.reference(old, p.grad, state, group, t + 1, t == 0)
            assert_within(new, p, allowed_error(p.dtype, as_wide(p), old))
            for n in names:
                truth = as_wide(torchs.state[p][n])
                assert_within(new_state[n], truth, allowed_error(p.dtype, truth, state[n]))


def old_state(case: Case, optimizer: torch.optim.Optimizer, param: Tensor, name: str) -> Tensor:
    entry = optimizer.state.get(param, {})
    held = entry.get(name)
    return torch.zeros_like(param) if held is None else held.detach().clone()


@parametrize_cases()
def test_the_reference_changes_nothing_it_is_given(case: Case) -> None:
    param, grad = values((9,), torch.float64, 1), values((9,), torch.float64, 2)
    state = {n: values((9,), torch.float64, 3 + i).abs() for i, n in enumerate(case.state_names)}
    given_tensors = [param, grad, *state.values()]
    copies = [t.clone() for t in given_tensors]
    group = case.ours([torch.zeros(1)]).param_groups[0]
    new, new_state = case.row.ours.reference(param, grad, state, group, 3.0, False)
    assert_same_bits(given_tensors, copies)
    assert new.dtype == torch.float64
    assert set(new_state) == set(case.state_names)
    outputs = {t.data_ptr() for t in (new, *new_state.values())}
    assert outputs.isdisjoint(t.data_ptr() for t in (param, *state.values()))


@parametrize_cases(KERNEL_CASES)
def test_a_reference_is_differentiable(case: Case) -> None:
    param, grad = values((4,), torch.float64, 1), values((4,), torch.float64, 2)
    # Squares well above the square of any average: no root near zero.
    state = {n: values((4,), torch.float64, 3 + i) for i, n in enumerate(case.state_names)}
    state = {n: s if n in SIGNED_STATES else s.abs() + 9 for n, s in state.items()}
    group = case.ours([torch.zeros(1)]).param_groups[0]

    def update(p: Tensor, g: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        new, new_state = case.row.ours.reference(
            p, g, dict(zip(state, states, strict=True)), group, 2.0
        )
        return new, *new_state.values()

    inputs = tuple(t.requires_grad_() for t in (param, grad, *state.values()))
    assert torch.autograd.gradcheck(update, inputs)


@parametrize_cases(KERNEL_CASES)
def test_backend_reference_calls_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    reference = case.row.ours.reference

    def counted(*args: Any) -> Any:
        calls.append(args)
        return reference(*args)

    monkeypatch.setattr(case.row.ours, "reference", staticmethod(counted))
    run(case.ours(parameters(SHAPES, torch.float32), backend="reference"), steps=2)
    assert len(calls) == 2 * len(SHAPES)
    if backend.native() is not None:
        calls.clear()
        run(case.ours(parameters(SHAPES, torch.float32), backend="cpu"), steps=2)
        assert not calls


# -- extreme hyper-parameters ----------------------------------------------------------------------

small = st.sampled_from([0.0, 1e-30, 1e-12, 1e-8, 1e-3, 0.1, 0.5, 1.0])
large = st.sampled_from([2.0, 1e3, 1e10, 1e30])
rates = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 1e-9, 0.5, 0.999, 1 - 1e-9])
flags = st.booleans()
HYPERS: dict[type[FusedOptimizer], dict[str, st.SearchStrategy[Any]]] = {
    pyoptim.SGD: {
        "lr": small | large,
        "momentum": small | large,
        "dampening": small,
        "weight_decay": small | large,
        "maximize": flags,
    },
    pyoptim.Adam: {
        "lr": small | large,
        "betas": st.tuples(rates, rates),
        "eps": small | large,
        "weight_decay": small | large,
        "amsgrad": flags,
        "maximize": flags,
        "decoupled_weight_decay": flags,
    },
    pyoptim.RMSprop: {
        "lr": small | large,
        "alpha": rates | st.sampled_from([1.0, 1.5]),
        "eps": small | large,
        "weight_decay": small | large,
        "momentum": small | large,
        "centered": flags,
        "maximize": flags,
    },
    pyoptim.Adagrad: {
        "lr": small | large,
        "lr_decay": small | large,
        "eps": small | large,
        "weight_decay": small | large,
        "initial_accumulator_value": small | large,
        "maximize": flags,
    },
    pyoptim.Expectigrad: {
        "lr": (small | large).filter(bool),
        "beta": rates,
        "eps": (small | large).filter(bool),
        "sparse_counter": flags,
        "maximize": flags,
    },
}


@pytest.mark.native
@pytest.mark.parametrize("cls", HYPERS, ids=lambda cls: cls.__name__)
@given(data=st.data())
@examples(150)
def test_the_bits_agree_at_extreme_hyperparameters(
    cls: type[FusedOptimizer], data: st.DataObject
) -> None:
    options = data.draw(st.fixed_dictionaries({}, optional=HYPERS[cls]), "options")
    dtype = data.draw(st.sampled_from(FLOATS), "dtype")
    # torch fills the state at construction, and refuses values that the dtype cannot hold.
    assume(options.get("initial_accumulator_value", 0) < torch.finfo(dtype).max)
    done = data.draw(st.sampled_from([0, 1, 1000, 2**24 - 2, 2**30]), "steps done")
    results = []
    for name in ("cpu", "reference"):
        params = parameters(SHAPES, dtype)
        optimizer = cls(params, backend=name, **options)
        for p in params if cls.counts_steps else ():
            optimizer.state[p]["step"] = torch.tensor(float(done), dtype=torch.float64)
        results.append(run(optimizer, steps=2))
    assert_same_bits(*results)


@pytest.mark.native
@given(lr=st.floats(1e-6, 10), beta=st.floats(0, 0.9999), step=st.integers(1, 10**6))
@example(lr=0.1, beta=0.9999, step=10**6)
def test_bias_corrections_are_those_of_float64(lr: float, beta: float, step: int) -> None:
    """A constant gradient of 1 from a state of zeros: the whole update is known in closed form."""
    param = Parameter(torch.zeros(3))
    optimizer = pyoptim.Adam([param], lr=lr, betas=(beta, beta), eps=0)
    zeros = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    optimizer.state[param].update(step=torch.tensor(float(step - 1)), **zeros)
    param.grad = torch.ones(3)
    optimizer.step()
    beta_to_t = torch.tensor(beta, dtype=torch.float64) ** step
    truth = -lr * ((1 - beta) / (1 - beta_to_t)) ** 0.5
    allowed = allowed_error(torch.float32, truth, torch.zeros(()).double())
    assert_within(param, truth.expand(3), allowed.expand(3))
