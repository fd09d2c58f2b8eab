"""Expectigrad: the authors' trajectories, and what torch.optim is no oracle for."""

import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    EXPECTIGRAD,
    FLOATS,
    HALVES,
    Case,
    allowed_error,
    as_wide,
    assert_same_bits,
    assert_within,
    give_grads,
    parameters,
    parametrize_cases,
    parametrize_dtypes,
    parametrize_kernel_dtypes,
    states_of,
    values,
)
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import Expectigrad, backend

GOLDEN = Path(__file__).parent / "golden"
CASES = [Case(EXPECTIGRAD, name) for name in EXPECTIGRAD.options]
KERNEL_CASES = [Case(EXPECTIGRAD, name) for name in EXPECTIGRAD.kernels]
SHAPES = ((3, 5), (67,), (), (0, 2))
COUNTERS = (True, False)
parametrize_counters = pytest.mark.parametrize("sparse_counter", COUNTERS, ids=["sparse", "dense"])
parametrize_golden = pytest.mark.parametrize(
    "golden", ["expectigrad_default", "expectigrad_dense_counter"]
)
WITH_REFERENCE = ("reference", *(("cpu",) if backend.native() is not None else ()))
parametrize_backends = pytest.mark.parametrize("name", WITH_REFERENCE)


def read(golden: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / f"{golden}.json").read_text())
    return content


def tensors(nested: Sequence[Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(x, dtype=dtype) for x in nested]


# -- the authors' trajectories ---------------------------------------------------------------------


def follow(
    optimizer: Expectigrad, golden: dict[str, Any], tolerance: float, first_step: int = 0
) -> None:
    """Steps with the recorded gradients and compares everything after each."""
    params = optimizer.param_groups[0]["params"]
    for record in golden["steps"][first_step:]:
        for p, grad in zip(params, tensors(record["grads"], params[0].dtype), strict=True):
            p.grad = grad
        optimizer.step()
        for p, truth, state in zip(
            params, tensors(record["params_after"]), record["state_after"], strict=True
        ):
            check(p, truth, tolerance)
            assert optimizer.state[p].keys() == state.keys()
            for name, value in state.items():
                check(optimizer.state[p][name], torch.tensor(value, dtype=torch.float64), tolerance)


def check(actual: Tensor, truth: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(as_wide(actual), truth, rtol=tolerance, atol=tolerance)


@parametrize_golden
@parametrize_backends
def test_the_authors_trajectories_in_float64(golden: str, name: str) -> None:
    record = read(golden)
    params = [Parameter(t) for t in tensors(record["params_init"])]
    follow(Expectigrad(params, **record["hyper"], backend=name), record, 1e-12)


@parametrize_golden
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"]
)
def test_the_authors_trajectories_on_every_engine(
    golden: str, engine: str, dtype: torch.dtype, tolerance: float
) -> None:
    record = read(golden)
    params = [Parameter(t) for t in tensors(record["params_init"], dtype)]
    follow(Expectigrad(params, **record["hyper"], backend=engine), record, tolerance)


def authors_state_dict(record: dict[str, Any], after: int, dtype: torch.dtype) -> dict[str, Any]:
    """What state_dict() of the authors' package returns after a step."""
    state = {
        i: {k: v if k == "step" else torch.tensor(v, dtype=dtype) for k, v in entry.items()}
        for i, entry in enumerate(record["steps"][after]["state_after"])
    }
    group = {**record["hyper"], "params": list(range(len(state)))}
    return {"state": state, "param_groups": [group]}


@parametrize_golden
@parametrize_backends
def test_training_goes_on_from_the_authors_state_dict(golden: str, name: str) -> None:
    record = read(golden)
    params = [Parameter(t) for t in tensors(record["steps"][2]["params_after"])]
    optimizer = Expectigrad(params, lr=7, beta=0.5, eps=1, maximize=False, backend=name)
    optimizer.load_state_dict(authors_state_dict(record, 2, torch.float64))
    follow(optimizer, record, 1e-12, first_step=3)


@parametrize_dtypes(HALVES)
def test_half_precision_state_of_the_authors_becomes_float32(dtype: torch.dtype) -> None:
    record = read("expectigrad_default")
    params = [Parameter(t) for t in tensors(record["params_init"], dtype)]
    optimizer = Expectigrad(params)
    loaded = authors_state_dict(record, 2, dtype)
    optimizer.load_state_dict(loaded)
    for i, p in enumerate(params):
        for name in ("sum", "counter", "momentum"):
            assert_same_bits([optimizer.state[p][name]], [loaded["state"][i][name].float()])


# -- every option ----------------------------------------------------------------------------------


class Plain:
    """The update as the paper writes it, in float64, one tensor at a time."""

    def __init__(self, param: Tensor, options: dict[str, Any]) -> None:
        self.w, self.t = as_wide(param), 0
        self.lr, self.eps = options["lr"], options.get("eps", 1e-8)
        self.beta = options.get("beta", 0.9)
        self.is_sparse = options.get("sparse_counter", True)
        self.sign = -1.0 if options.get("maximize") else 1.0
        self.s, self.n, self.m = (torch.zeros_like(self.w) for _ in range(3))

    def step(self, grad: Tensor) -> None:
        g = self.sign * as_wide(grad)
        self.t += 1
        self.s += g.square()
        self.n = self.n + g.square().sign() if self.is_sparse else torch.full_like(g, self.t)
        mean = torch.where((self.s == 0) & (self.n == 0), 0.0, self.s / self.n)
        q = g / (self.eps + mean.sqrt())
        self.m = self.beta * self.m + (1 - self.beta) * q
        self.w = self.w - self.lr * self.m / (1 - self.beta**self.t)


@parametrize_cases(CASES)
@parametrize_backends
def test_every_option_is_the_papers_update(case: Case, name: str) -> None:
    """With zeros among the gradients, and a tensor that has one at every second step only."""
    params = parameters(SHAPES, torch.float64)
    plain = [Plain(p, case.options) for p in params]
    optimizer = case.ours(params, backend=name)
    for t in range(6):
        give_grads(params, t)
        params[1].grad = None if t % 2 == 0 else params[1].grad
        for p, model in zip(params, plain, strict=True):
            if p.grad is not None:
                p.grad *= values(p.shape, p.dtype, 77 + t) > 0
                model.step(p.grad)
        optimizer.step()
        for p, model in zip(params, plain, strict=True):
            check(p, model.w, 1e-12)
    for p, model in zip(params, plain, strict=True):
        entry = optimizer.state[p]
        assert float(entry["step"]) == model.t
        for key, value in (("sum", model.s), ("counter", model.n), ("momentum", model.m)):
            if key in entry:
                check(entry[key], value, 1e-12)


@pytest.mark.native
@parametrize_cases(KERNEL_CASES)
@parametrize_kernel_dtypes
def test_each_step_is_the_reference_in_float64(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    params = parameters(SHAPES, dtype)
    optimizer = case.ours(params, state_dtype=state_dtype)
    group = optimizer.param_groups[0]
    for t in range(3):
        give_grads(params, t)
        olds = []
        for p in params:
            entry = optimizer.state.get(p, {})
            state = {n: as_wide(entry.get(n, torch.zeros_like(p))) for n in case.state_names}
            olds.append((as_wide(p), state))
        optimizer.step()
        for p, (old, state) in zip(params, olds, strict=True):
            truth, new_state = Expectigrad.reference(old, as_wide(p.grad), state, group, t + 1.0)
            assert_within(p, truth, allowed_error(dtype, truth, old), f"step {t}")
            for n in case.state_names:
                held = optimizer.state[p][n]
                allowed = allowed_error(held.dtype, new_state[n], state[n])
                assert_within(held, new_state[n], allowed, f"step {t}, {n}")


@pytest.mark.parametrize("beta", [0.0, 0.9])
@parametrize_counters
def test_only_the_state_that_an_option_needs_is_kept(beta: float, sparse_counter: bool) -> None:
    params = parameters(SHAPES, torch.float32)
    optimizer = Expectigrad(params, beta=beta, sparse_counter=sparse_counter)
    give_grads(params, 0)
    optimizer.step()
    keys = ["step", "sum"] + ["counter"] * sparse_counter + ["momentum"] * (beta > 0)
    for p in params:
        assert list(optimizer.state[p]) == keys
        assert all(optimizer.state[p][key].shape == p.shape for key in keys[1:])


def test_groups_differ_in_every_option() -> None:
    params = parameters([(5,)] * len(CASES), torch.float64)
    plain = [Plain(p, c.options) for p, c in zip(params, CASES, strict=True)]
    groups = [{"params": [p], **c.options} for p, c in zip(params, CASES, strict=True)]
    optimizer = Expectigrad(groups)
    for t in range(3):
        give_grads(params, t)
        for p, model in zip(params, plain, strict=True):
            model.step(p.grad)
        optimizer.step()
    for p, model in zip(params, plain, strict=True):
        check(p, model.w, 1e-12)


# -- what is nothing, and what is not a number -----------------------------------------------------


def run(optimizer: Expectigrad, grads: Sequence[Sequence[float]]) -> list[Tensor]:
    """Steps the one parameter; returns its values after every step."""
    (param,) = optimizer.param_groups[0]["params"]
    seen = []
    for grad in grads:
        param.grad = torch.tensor(grad).to(param.dtype)
        optimizer.step()
        seen.append(param.detach().clone())
    return seen


@parametrize_counters
@parametrize_dtypes(FLOATS)
def test_no_gradient_is_no_step(engine: str, dtype: torch.dtype, sparse_counter: bool) -> None:
    param = Parameter(values((35,), dtype, 1))
    before = param.detach().clone()
    optimizer = Expectigrad([param], sparse_counter=sparse_counter, backend=engine)
    run(optimizer, [[0.0] * 35, [-0.0] * 35])
    assert_same_bits([param], [before])
    assert all((s == 0).all() for s in states_of(optimizer))


@parametrize_dtypes(FLOATS)
def test_the_counter_counts_squares_that_are_not_zero(engine: str, dtype: torch.dtype) -> None:
    param = Parameter(torch.zeros(4, dtype=dtype))
    optimizer = Expectigrad([param], backend=engine)
    run(optimizer, [[1.0, 0.0, -2.0, 0.0], [1.0, -0.0, 0.0, 3.0], [0.5, 0.0, 1.0, 0.0]])
    assert optimizer.state[param]["counter"].tolist() == [3.0, 0.0, 2.0, 1.0]
    assert optimizer.state[param]["sum"].tolist() == [2.25, 0.0, 5.0, 9.0]


def test_a_square_that_underflows_does_not_count_and_a_subnormal_one_does(engine: str) -> None:
    square = torch.tensor(1e-22).square()
    assert 0 < square < torch.finfo(torch.float32).smallest_normal
    for name in (engine, "reference"):
        param = Parameter(torch.zeros(3))
        optimizer = Expectigrad([param], beta=0, eps=1.0, lr=1.0, backend=name)
        run(optimizer, [[1e-30, 1e-22, torch.nan]])
        assert optimizer.state[param]["counter"].tolist() == [0.0, 1.0, 0.0]
        assert_same_bits([optimizer.state[param]["sum"][:2]], [torch.stack([0 * square, square])])
        assert param[0] == -torch.tensor(1e-30)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@parametrize_counters
@parametrize_dtypes(FLOATS)
def test_a_nan_in_the_sum_stays_and_makes_no_huge_step(
    engine: str, dtype: torch.dtype, sparse_counter: bool, beta: float
) -> None:
    """The authors' package takes it for 0/0: its step of lr*g/eps is 1e5 here."""
    for name in (engine, "reference"):
        param = Parameter(torch.ones(19, dtype=dtype))
        options = {"beta": beta, "sparse_counter": sparse_counter}
        optimizer = Expectigrad([param], backend=name, **options)
        run(optimizer, [[1.0] * 19])
        optimizer.state[param]["sum"][::2] = torch.nan
        param.data.fill_(1.0)
        after = run(optimizer, [[1.0] * 19, [0.0] * 19])
        assert after[0][::2].isnan().all()
        assert after[1][::2].isnan().all()
        # The first step is lr exactly; the second adds 1.9/10 of the first's, or nothing.
        assert ((after[1][1::2] - 1).abs() <= 2**-8).all()


@parametrize_counters
def test_nan_and_infinite_gradients_are_seen(engine: str, sparse_counter: bool) -> None:
    """inf/inf is NaN in the step of the infinity; a sum that is infinite stops its element."""
    param = Parameter(torch.ones(4))
    optimizer = Expectigrad([param], beta=0, sparse_counter=sparse_counter, backend=engine)
    first, second = run(optimizer, [[torch.nan, torch.inf, -torch.inf, 1.0], [1.0] * 4])
    assert first.isnan().tolist() == [True, True, True, False]
    assert second.isnan().tolist() == [True, True, True, False]
    assert optimizer.state[param]["sum"][1:3].tolist() == [torch.inf] * 2
    param.data.fill_(1.0)
    (third,) = run(optimizer, [[1.0] * 4])
    assert third[1:3].tolist() == [1.0] * 2
    assert third[0].isnan()


@parametrize_dtypes(HALVES)
@parametrize_backends
def test_state_of_half_precision_parameters_is_float32(dtype: torch.dtype, name: str) -> None:
    """A bfloat16 counter would stop at 256; in float16 1e-4 squared, and eps, are 0."""
    param = Parameter(torch.zeros(3, dtype=dtype))
    optimizer = Expectigrad([param], lr=1e-3, beta=0, backend=name)
    run(optimizer, [[1e-4] * 3])
    assert (param + 1e-3).abs().max() <= 2**-8 * 1e-3
    run(optimizer, [[1e-4] * 3] * 300)
    assert {optimizer.state[param][n].dtype for n in ("sum", "counter")} == {torch.float32}
    assert optimizer.state[param]["counter"].tolist() == [301.0] * 3
    g = torch.tensor(1e-4).to(dtype).double()
    torch.testing.assert_close(
        optimizer.state[param]["sum"].double(), (301 * g * g).expand(3), rtol=1e-5, atol=0
    )


def test_complex_parts_are_counted_apart() -> None:
    param = Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = Expectigrad([param])
    for grad in ([1j, 1, 1 + 1j], [2j, 0, 1]):
        param.grad = torch.tensor(grad, dtype=torch.complex64)
        optimizer.step()
    assert optimizer.state[param]["counter"].tolist() == [2j, 1, 2 + 1j]
    assert optimizer.state[param]["sum"].tolist() == [5j, 1, 2 + 1j]


# -- the contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": -1e-3}, "lr must be above 0, got -0.001"),
        ({"lr": torch.nan}, "lr must be above 0, got nan"),
        ({"lr": torch.ones(2)}, "lr must have 1 element, got a tensor of shape .2,"),
        ({"eps": 0}, "eps must be above 0, got 0"),
        ({"eps": -1e-8}, "eps must be above 0, got -1e-08"),
        ({"eps": torch.nan}, "eps must be above 0, got nan"),
        ({"beta": torch.tensor(0.5)}, "beta must be a number, .* got tensor.0.5"),
        ({"beta": -0.1}, "beta must be in .0, 1., got -0.1"),
        ({"beta": 1.0}, "beta must be in .0, 1., got 1.0"),
        ({"beta": torch.nan}, "beta must be in .0, 1., got nan"),
        ({"state_dtype": torch.bfloat16}, "state_dtype must be None or torch.float32"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    (param,) = parameters([(3,)], torch.float32)
    with pytest.raises(ValueError, match=message):
        Expectigrad([param], **options)
    if "state_dtype" in options:
        return
    optimizer = Expectigrad([param])
    (late,) = parameters([(3,)], torch.float32)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [late], **options})
    assert len(optimizer.param_groups) == 1


def test_arguments_are_in_the_authors_order_with_their_defaults() -> None:
    (param,) = parameters([(3,)], torch.float32)
    group = Expectigrad([param]).param_groups[0]
    names = ("lr", "beta", "eps", "sparse_counter")
    assert [group[name] for name in names] == [1e-3, 0.9, 1e-8, True]
    group = Expectigrad([param], 0.1, 0.5, 1e-4, False).param_groups[0]
    assert [group[name] for name in names] == [0.1, 0.5, 1e-4, False]


def test_sparse_gradients_are_refused_and_nothing_moves() -> None:
    params = parameters([(3,), (3,)], torch.float32)
    before = [p.detach().clone() for p in params]
    optimizer = Expectigrad(params)
    params[0].grad, params[1].grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="Expectigrad does not support sparse gradients"):
        optimizer.step()
    assert_same_bits(params, before)
    assert not optimizer.state


def through_load(optimizer: Expectigrad) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file)
    return loaded


@parametrize_cases(KERNEL_CASES)
@parametrize_dtypes(FLOATS)
def test_training_goes_on_from_a_state_dict_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    whole, halves = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    optimizer, first = case.ours(whole), case.ours(halves)
    for t in range(5):
        give_grads(whole, t)
        give_grads(halves, t)
        optimizer.step()
        if t == 3:
            second = Expectigrad(halves)
            second.load_state_dict(through_load(first))
            first = copy.deepcopy(second)  # of parameters of its own
            halves = first.param_groups[0]["params"]
            give_grads(halves, t)
        first.step()
    assert_same_bits([*halves, *states_of(first)], [*whole, *states_of(optimizer)])


@parametrize_cases(KERNEL_CASES)
def test_clipping_inside_the_step_is_clipping_before_it(case: Case, engine: str) -> None:
    inside, before = (parameters(SHAPES, torch.float32) for _ in range(2))
    one = case.ours(inside, backend=engine, max_grad_norm=0.5)
    other = case.ours(before, backend=engine)
    for t in range(3):
        give_grads(inside, t)
        give_grads(before, t)
        pyoptim.clip_grad_norm_(before, 0.5, backend=engine)
        one.step()
        other.step()
    assert_same_bits([*inside, *states_of(one)], [*before, *states_of(other)])


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, pyoptim.GradScaler])
def test_an_overflow_of_the_loss_scale_does_not_count(scaler_class: Any) -> None:
    (param,), (plain,) = (parameters([(9,)], torch.float32) for _ in range(2))
    optimizer, expected = Expectigrad([param]), Expectigrad([plain])
    scaler = scaler_class("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    for t in range(4):
        give_grads([plain], t)
        param.grad = plain.grad * scaler.get_scale()
        if t in (0, 2):
            param.grad[4] = torch.inf
        else:
            expected.step()
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits([param, *states_of(optimizer)], [plain, *states_of(expected)])
    assert float(optimizer.state[param]["step"]) == 2


@pytest.mark.native
def test_the_number_of_threads_does_not_matter() -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = parameters([(150_001,), (70_003,)], torch.float32)
        optimizer = Expectigrad(params)
        for t in range(2):
            give_grads(params, t)
            optimizer.step()
        results.append([*params, *states_of(optimizer)])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
@pytest.mark.parametrize("is_created_inside", [False, True], ids=["outside", "inside"])
def test_compiled_training_is_the_uncompiled_one(is_created_inside: bool) -> None:
    torch._dynamo.reset()
    results = []
    for is_compiled in (True, False):
        params = parameters([(3, 4), (5,)], torch.float64)
        optimizer = None if is_created_inside else Expectigrad(params, lr=0.1)

        def train(lr: float, params: Any = params) -> None:
            nonlocal optimizer
            if optimizer is None:
                optimizer = Expectigrad(params, lr=0.1)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            sum((p**4).sum() for p in params).backward()
            optimizer.step()

        step = torch.compile(train, backend="eager") if is_compiled else train
        for t in range(3):
            step(0.1 / (t + 1))
        assert optimizer is not None
        results.append([*params, *states_of(optimizer)])
    assert_same_bits(*results)


def test_a_scheduler_and_a_tensor_as_lr() -> None:
    (param,), (other,) = (parameters([(9,)], torch.float64) for _ in range(2))
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer, expected = Expectigrad([param], lr=lr), Expectigrad([other], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(expected, lambda t: t / 4)  # from 0
    for t in range(4):
        lr.fill_(0.1 * t / 4)
        give_grads([param], t)
        give_grads([other], t)
        optimizer.step()
        expected.step()
        scheduler.step()
    check(param, as_wide(other), 1e-15)


def test_a_differentiable_step_has_no_nan_where_nothing_was_counted() -> None:
    """Autograd meets 0/0 and the root of 0 there."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.ones(3, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    param = start.clone()
    optimizer = Expectigrad([param], lr=lr, differentiable=True)
    for grad in ([1.0, 0.0, 0.0], [2.0, 0.0, 1.0]):
        param.grad = scale * torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    found = torch.autograd.grad(param.sum(), (lr, start, scale))
    assert all(t.isfinite().all() for t in found)
    assert_same_bits([found[1]], [torch.ones(3, dtype=torch.float64)])
    # sum = -lr * (the corrected averages): linear in lr.
    torch.testing.assert_close(found[0] * lr, (param - start).sum(), rtol=1e-12, atol=0)
    assert found[2][1] == 0
