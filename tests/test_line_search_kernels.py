"""The fused passes of a line search, held to a few lines of float64 PyTorch."""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from cases import (
    DTYPE_IDS,
    HALVES,
    KERNEL_DTYPES,
    UNIT,
    allowed_error,
    as_wide,
    assert_same_bits,
    assert_within,
    examples,
    give_grads,
    parameters,
    values,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import backend
from pyoptim.line_search import fused
from pyoptim.line_search.fused import FusedDirection
from pyoptim.reductions import batches, total

NATIVE = backend.native()
pytestmark = pytest.mark.native
# Empty, 0-d, around a vector of every instruction set, more than one round of lanes.
SHAPES = [(3,), (0,), (), (17, 5), (64,), (65, 67)]
BASES: dict[str, dict[str, Any]] = {
    "adam": {"base": "adam"},
    "adam-plain": {"base": "adam", "betas": (0.0, 0.99)},
    "amsgrad": {"base": "amsgrad"},
    "amsgrad-plain": {"base": "amsgrad", "betas": (0.0, 0.99)},
    "rmsprop": {"base": "rmsprop", "betas": (0.0, 0.99)},
    "rmsprop-momentum": {"base": "rmsprop", "betas": (0.8, 0.99)},
    "adagrad": {"base": "adagrad", "betas": (0.0, 0.0)},
    "adagrad-momentum": {"base": "adagrad", "betas": (0.9, 0.0)},
    "sgd": {"base": "sgd"},
    "sgd-momentum": {"base": "sgd", "momentum": 0.9},
}
# With a float32 master copy or without.
DTYPES = [(d, s, False) for d, s in KERNEL_DTYPES] + [
    (d, s, True) for d, s in KERNEL_DTYPES if d in HALVES
]
DEFAULTS: dict[str, Any] = {
    "betas": (0.9, 0.99),
    "eps": 1e-3,
    "weight_decay": 0.2,
    "lr_scale": 0.7,
    "momentum": 0.0,
    "use_mv": False,
    "bias_offset": 0,
}
MANY = [(5,), (100_003,), (300, 401), (7,)]

parametrize_bases = pytest.mark.parametrize("base", BASES)
parametrize_dtypes = pytest.mark.parametrize(
    ("dtype", "state_dtype", "has_master"),
    DTYPES,
    ids=[DTYPE_IDS[d] + ("_state32" if s else "") + ("_master" if m else "") for d, s, m in DTYPES],
)


class Owner(torch.optim.Optimizer):
    """What a direction belongs to: groups and state."""

    def __init__(self, params: Any, state_dtype: Any = None, backend: Any = None, **options: Any):
        self.state_dtype, self.backend = state_dtype, backend
        super().__init__(params, {**DEFAULTS, **options})

    def rows(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield param, group


def give_masters(owner: Owner) -> None:
    for param, _ in owner.rows():
        if "master_param" not in owner.state[param]:
            owner.state[param]["master_param"] = param.detach().float()


def tensors_of(owner: Owner) -> list[Tensor]:
    """Parameters and state, the latter by name."""
    params = [p for group in owner.param_groups for p in group["params"]]
    states = [
        owner.state[p][name] for p in params if p in owner.state for name in sorted(owner.state[p])
    ]
    return [t.detach() for t in (*params, *states)]


def snapshot(owner: Owner) -> list[Tensor]:
    return [t.clone() for t in tensors_of(owner)]


# -- the truth -------------------------------------------------------------------------------------


class Truth:
    """One parameter in float64, from the state that it is in."""

    def __init__(
        self, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], by: float
    ):
        self.group, self.by = group, by
        state = dict(state)
        self.step = float(state.pop("step", 0.0)) + 1
        master = state.pop("master_param", None)
        self.w = as_wide(param if master is None else master)
        self.g = as_wide(param.grad) * by
        self.moments = {name: as_wide(value) for name, value in state.items()}
        self._move()

    def _zero(self, name: str) -> Tensor:
        return self.moments.get(name, torch.zeros_like(self.w))

    def _move(self) -> None:
        group, g, new = self.group, self.g, {}
        beta1, beta2 = group["betas"]
        if group["base"] == "sgd":
            if group["momentum"]:
                new["momentum_buffer"] = group["momentum"] * self._zero("momentum_buffer") + g
            self.moments = new
            return
        if beta1:
            new["exp_avg"] = beta1 * self._zero("exp_avg") + (1 - beta1) * g
        if group["base"] == "adagrad":
            new["sum"] = self._zero("sum") + g * g
        else:
            new["exp_avg_sq"] = beta2 * self._zero("exp_avg_sq") + (1 - beta2) * g * g
        if group["base"] == "amsgrad":
            new["max_exp_avg_sq"] = torch.maximum(self._zero("max_exp_avg_sq"), new["exp_avg_sq"])
        self.moments = new

    def direction(self, by_momentum: bool) -> Tensor:
        group = self.group
        m = self.moments.get("momentum_buffer", self.moments.get("exp_avg", self.g))
        exponent = self.step + group["bias_offset"]
        is_corrected = group["base"] in ("adam", "amsgrad")
        unbias = [1 - beta**exponent if is_corrected else 1.0 for beta in group["betas"]]
        d = m / (unbias[0] if "exp_avg" in self.moments else 1.0) if by_momentum else self.g
        if group["base"] == "sgd":
            return d
        v = next(
            self.moments[n] for n in ("max_exp_avg_sq", "exp_avg_sq", "sum") if n in self.moments
        )
        return d / ((v / unbias[1]).sqrt() + group["eps"])

    def trial(self, eta: float) -> Tensor:
        return self.w - eta * self.group["lr_scale"] * self.direction(self.group["use_mv"])

    def finished(self, eta: float) -> Tensor:
        rate = eta * self.group["lr_scale"]
        return self.w * (1 - rate * self.group["weight_decay"]) - rate * self.direction(True)

    def slope(self) -> Tensor:
        """Every term."""
        return self.group["lr_scale"] * self.g * self.direction(self.group["use_mv"])


def truths(owner: Owner, by: float = 1.0) -> list[Truth]:
    return [Truth(p, group, owner.state.get(p, {}), by) for p, group in owner.rows()]


def check_params(owner: Owner, wanted: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for (param, _), truth, start in zip(owner.rows(), wanted, before, strict=True):
        allowed = allowed_error(param.dtype, truth, start)
        assert_within(param, truth, allowed, f"param {tuple(param.shape)}")
        master = owner.state.get(param, {}).get("master_param")
        if master is not None and owner.__dict__.get("checks_masters"):
            assert_within(master, truth, allowed_error(torch.float32, truth, start), "master")
            assert torch.equal(master.to(param.dtype), param)


def check_moments(owner: Owner, found: Sequence[Truth], steps: float) -> None:
    for (param, _), truth in zip(owner.rows(), found, strict=True):
        state = dict(owner.state[param])
        assert float(state.pop("step")) == steps
        state.pop("master_param", None)
        assert set(state) == set(truth.moments)
        for name, value in state.items():
            wide = truth.moments[name]
            scale = wide.abs() + truth.g.abs() + truth.g * truth.g
            unit = max(UNIT[value.dtype], UNIT[torch.float32] if value.dtype in HALVES else 0.0)
            assert_within(value, wide, 8 * unit * scale + 2.0**-24 * (value.dtype in HALVES), name)


def check_slope(slope: Tensor, found: Sequence[Truth], dtype: torch.dtype) -> None:
    assert (slope.dtype, slope.dim()) == (torch.float64, 0)
    terms = torch.cat([truth.slope().flatten() for truth in found])
    unit = UNIT[torch.float64] if dtype == torch.float64 else UNIT[torch.float32]
    assert_within(slope, terms.sum(), 16 * unit * terms.abs().sum() + 1e-300, "slope")


def searched_step(owner: Owner, direction: FusedDirection, seed: int, by: float = 1.0) -> None:
    """A step with two trials, every part of it checked."""
    params = [p for p, _ in owner.rows()]
    give_grads(params, seed)
    found = truths(owner, by)
    before = [truth.w for truth in found]
    dtype = params[0].dtype
    owner.__dict__["checks_masters"] = False
    check_slope(direction.start(0.3, by), found, dtype)
    check_params(owner, [t.trial(0.3) for t in found], before)
    direction.trial(0.2)
    check_params(owner, [t.trial(0.2) for t in found], before)
    direction.finish(0.25)
    owner.__dict__["checks_masters"] = True
    check_params(owner, [t.finished(0.25) for t in found], before)
    check_moments(owner, found, found[0].step)


def plain_step(owner: Owner, direction: FusedDirection, seed: int, by: float = 1.0) -> None:
    give_grads([p for p, _ in owner.rows()], seed)
    found = truths(owner, by)
    direction.plain(0.1, by)
    check_params(owner, [t.finished(0.1) for t in found], [t.w for t in found])
    check_moments(owner, found, found[0].step)


# -- passes ----------------------------------------------------------------------------------------


@parametrize_bases
@parametrize_dtypes
def test_every_pass_is_right(
    base: str, dtype: torch.dtype, state_dtype: Any, has_master: bool
) -> None:
    params = parameters(SHAPES, dtype)
    owner = Owner(params, state_dtype, **BASES[base])
    give_grads(params, 0)
    if has_master:
        give_masters(owner)
    direction = FusedDirection(owner)
    for seed in range(3):
        searched_step(owner, direction, seed)
    plain_step(owner, direction, 3)


@pytest.mark.parametrize(
    "options",
    [{"use_mv": True}, {"bias_offset": 1}, {"use_mv": True, "bias_offset": 1}, {"eps": 1e-8}],
    ids=str,
)
@pytest.mark.parametrize("base", ["adam", "amsgrad", "adagrad-momentum", "sgd-momentum", "sgd"])
def test_every_option_is_right(base: str, options: dict[str, Any]) -> None:
    params = parameters(SHAPES, torch.float32)
    owner = Owner(params, **{**BASES[base], **options})
    give_grads(params, 0)
    direction = FusedDirection(owner)
    for seed in range(3):
        searched_step(owner, direction, seed, by=0.37)
    plain_step(owner, direction, 3, by=0.37)


def test_a_factor_may_be_a_tensor() -> None:
    for by in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        params = parameters(SHAPES, torch.float32)
        give_grads(params, 0)
        owner = Owner(params, **BASES["adam"])
        found = truths(owner, 0.5)
        grads = [p.grad.clone() for p in params]  # type: ignore[union-attr]
        direction = FusedDirection(owner)
        check_slope(direction.start(0.1, by), found, torch.float32)
        direction.finish(0.1)
        check_params(owner, [t.finished(0.1) for t in found], [t.w for t in found])
        assert_same_bits([p.grad for p in params], grads)  # type: ignore[misc]


def test_groups_have_their_own_options() -> None:
    params = parameters([(9,), (20,), (33,), ()], torch.float32)
    groups: list[Any] = [
        {"params": params[:1], "lr_scale": 2.0, "weight_decay": 0.0, **BASES["amsgrad"]},
        {"params": params[1:3], **BASES["sgd"]},
        {"params": params[3:], "lr_scale": 0.0, **BASES["adagrad"]},
    ]
    owner = Owner(groups, base="adam")
    give_grads(params, 0)
    direction = FusedDirection(owner)
    for seed in range(2):
        searched_step(owner, direction, seed)
    owner.param_groups[1].update(weight_decay=0.5, lr_scale=3.0)
    owner.add_param_group({"params": parameters([(4,)], torch.float32, 5), **BASES["adam"]})
    give_grads([p for g in owner.param_groups for p in g["params"]], 2)
    found = truths(owner)
    direction.plain(0.1)
    check_params(owner, [t.finished(0.1) for t in found], [t.w for t in found])


@pytest.mark.parametrize(
    ("base", "other"),
    [
        ("adam", lambda p: pyoptim.AdamW(p, 0.07, (0.9, 0.99), 1e-3, 0.2)),
        ("amsgrad", lambda p: pyoptim.AdamW(p, 0.07, (0.9, 0.99), 1e-3, 0.2, True)),
        ("rmsprop", lambda p: pyoptim.RMSprop(p, 0.07, 0.99, 1e-3)),
        ("adagrad", lambda p: pyoptim.Adagrad(p, 0.07, eps=1e-3)),
        ("sgd", lambda p: pyoptim.SGD(p, 0.07)),
        ("sgd-momentum", lambda p: pyoptim.SGD(p, 0.07, 0.9)),
    ],
)
def test_a_plain_step_is_that_of_the_optimizer(base: str, other: Callable[[Any], Any]) -> None:
    params, wanted = (parameters(SHAPES, torch.float32) for _ in range(2))
    decay = 0.2 if base in ("adam", "amsgrad") else 0.0
    owner = Owner(params, **BASES[base], weight_decay=decay)
    direction, optimizer = FusedDirection(owner), other(wanted)
    for seed in range(3):
        give_grads(params, seed)
        give_grads(wanted, seed)
        direction.plain(0.1)
        optimizer.step()
        assert_same_bits(params, wanted, f"step {seed}")


@parametrize_bases
def test_a_search_comes_to_the_same_bits_every_way(base: str) -> None:
    """One trial or several, finished or plain: the step depends on the last step size only."""
    results = []
    for way in range(4):
        params = parameters(SHAPES, torch.float32)
        owner = Owner(params, **BASES[base])
        direction = FusedDirection(owner)
        for seed in range(2):
            give_grads(params, seed)
            if way == 3:
                direction.plain(0.1)
                continue
            direction.start(0.1 if way else 0.7)
            for eta in ((), (0.3, 0.1), (1e30, 0.2))[way]:
                direction.trial(eta)
            if way == 2:
                direction.restore()
            direction.finish(0.1)
        results.append(snapshot(owner))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@parametrize_bases
@pytest.mark.parametrize("has_master", [False, True])
def test_acceptance_leaves_the_weights_and_writes_the_moments(base: str, has_master: bool) -> None:
    dtype = torch.bfloat16 if has_master else torch.float32
    owners = []
    for way in range(3):
        params = parameters(SHAPES, dtype)
        owner = Owner(params, **BASES[base])
        give_grads(params, 0)
        if has_master:
            give_masters(owner)
        direction = FusedDirection(owner)
        direction.start(0.3)
        if way == 0:
            direction.finish(0.1)
        else:
            direction.trial(0.2)
            trial = [p.detach().clone() for p in params]
            before = parameters(SHAPES, dtype)
            if way == 2:
                direction.restore()
            direction.accept()
            assert_same_bits(params, trial if way == 1 else before, "params")
            if has_master:
                rounded = [owner.state[p]["master_param"].to(dtype) for p in params]
                assert_same_bits(rounded, params, "masters")
        owners.append(owner)
    n = len(SHAPES)
    moments = [
        [
            owner.state[p][k]
            for p in owner.param_groups[0]["params"]
            for k in sorted(owner.state[p])
            if k != "master_param"
        ]
        for owner in owners
    ]
    assert len(moments[0]) >= n
    assert_same_bits(moments[1], moments[0], "moments")
    assert_same_bits(moments[2], moments[0], "moments")


def test_a_first_trial_and_a_later_one_are_the_same() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(SHAPES, dtype)
        owner = Owner(params, **BASES["adam"])
        give_grads(params, 0)
        direction = FusedDirection(owner)
        direction.start(0.3)
        first = [p.detach().clone() for p in params]
        direction.trial(0.1)
        assert not torch.equal(params[-1], first[-1])
        direction.trial(0.3)
        assert_same_bits(params, first)


# -- sums ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_slope_is_added_up_in_the_order_of_norms(dtype: torch.dtype) -> None:
    params = parameters([*MANY, (40_000,), (0,)], dtype)
    give_grads(params, 0)
    owner = Owner(params, **BASES["sgd"], lr_scale=1.0)
    slope = FusedDirection(owner).start(0.1)
    squares = [as_wide(p.grad).square() for p in params]  # type: ignore[arg-type]
    assert slope.item() == total(batches(squares, 1.0, "cpu"), 1.0).item()


@pytest.mark.parametrize(
    ("base", "dtype", "has_master"),
    [
        ("adam", torch.float32, False),
        ("amsgrad", torch.float64, False),
        ("sgd-momentum", torch.bfloat16, True),
        ("adagrad", torch.float16, False),
    ],
)
def test_threads_and_instruction_sets_change_no_bit(
    base: str, dtype: torch.dtype, has_master: bool
) -> None:
    results = []
    for isa in NATIVE.isas():
        for threads in (1, 3):
            NATIVE.set_isa(isa)
            torch.set_num_threads(threads)
            params = parameters([*MANY, (300_001,)], dtype)
            owner = Owner(params, **BASES[base], use_mv=base == "sgd-momentum")
            give_grads(params, 0)
            if has_master:
                give_masters(owner)
            direction = FusedDirection(owner)
            direction.plain(0.1)
            slope = direction.start(0.1)
            trial = [p.detach().clone() for p in params]
            direction.trial(0.2)
            trial += [p.detach().clone() for p in params]
            direction.finish(0.1)
            results.append([slope, *trial, *snapshot(owner)])
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("shift", [0, 1])
def test_large_tensors_are_as_many_small_ones(dtype: torch.dtype, shift: int) -> None:
    """Whose results go past the caches."""
    n = 300_001
    whole = Parameter(torch.zeros(n + shift, dtype=dtype)[shift:])
    with torch.no_grad():
        whole.copy_(values((n,), dtype, 1))
    parts = [Parameter(part.clone()) for part in whole.detach().split(7001)]
    whole.grad = values((n,), dtype, 2)
    for part, grad in zip(parts, whole.grad.split(7001), strict=True):
        part.grad = grad.clone()
    before = whole.detach().clone()
    directions = [FusedDirection(Owner(p, **BASES["adam"])) for p in ([whole], parts)]
    for seed in range(2):
        slopes = [direction.start(0.1) for direction in directions]
        assert_same_bits([whole], [torch.cat([p.detach() for p in parts])], f"start {seed}")
        torch.testing.assert_close(*slopes, rtol=1e-13, atol=0)
        for direction in directions:
            direction.trial(0.3)
        assert_same_bits([whole], [torch.cat([p.detach() for p in parts])], f"trial {seed}")
        directions[0].restore()
        if seed == 0:
            assert_same_bits([whole], [before], "restored")
        for direction in directions:
            direction.finish(0.1)
        assert_same_bits([whole], [torch.cat([p.detach() for p in parts])], f"finish {seed}")


# -- layouts ---------------------------------------------------------------------------------------


def transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def with_gaps(t: Tensor) -> Tensor:
    room = torch.zeros(t.shape[0], 2 * t.shape[1], dtype=t.dtype)
    return room[:, ::2].copy_(t)


def shifted(t: Tensor) -> Tensor:
    return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


LAYOUTS = [torch.clone, transposed, with_gaps, shifted]


@given(
    of_param=st.sampled_from(LAYOUTS),
    of_grad=st.sampled_from([*LAYOUTS, lambda t: t[:, :1].expand_as(t)]),
    shape=st.tuples(st.integers(0, 9), st.integers(1, 40)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    has_master=st.booleans(),
)
@examples(60)
def test_no_layout_changes_a_bit(
    of_param: Any, of_grad: Any, shape: Any, dtype: torch.dtype, has_master: bool
) -> None:
    has_master = has_master and dtype in HALVES
    results = []
    for is_plain in (True, False):
        start, grad = values(shape, dtype, 1), of_grad(values(shape, dtype, 2))
        param = Parameter(start if is_plain else of_param(start))
        others = parameters([(3,)], dtype)
        owner = Owner([param, *others], **BASES["adam"])
        give_grads(others, 1)
        param.grad = grad.clone(memory_format=torch.contiguous_format) if is_plain else grad
        if has_master:
            give_masters(owner)
        direction = FusedDirection(owner)
        place = param.data_ptr()
        for _ in range(2):
            direction.start(0.1)
            trial = param.detach().clone()
            direction.trial(0.2)
            second = param.detach().clone()
            direction.restore()
            restored = param.detach().clone()
            direction.finish(0.2)
        assert param.data_ptr() == place
        state = owner.state[param]
        results.append(
            [param.detach(), trial, second, restored, *(state[k] for k in sorted(state))]
        )
    assert_same_bits([t.contiguous() for t in results[1]], [t.contiguous() for t in results[0]])


def test_channels_last_runs_by_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (6, 5, 4, 3)
    param, wanted = (Parameter(values(shape, torch.float32, 1)) for _ in range(2))
    param.data = param.data.to(memory_format=torch.channels_last)
    directions = [FusedDirection(Owner([p], **BASES["adam"])) for p in (param, wanted)]
    for seed in range(3):
        if seed:
            no_general_path(monkeypatch)
        for p, direction in zip((param, wanted), directions, strict=True):
            grad = values(shape, torch.float32, seed)
            p.grad = grad.to(memory_format=torch.channels_last) if p is param else grad
            direction.start(0.1)
            direction.trial(0.2)
            direction.finish(0.1)
        assert_same_bits([param], [wanted])


def no_general_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fused._Pass, "run_anew", lambda *_, **__: pytest.fail("took the general path")
    )


@pytest.mark.parametrize("symbols", [True, False], ids=["symbols", "dlpack"])
def test_a_second_step_is_planned(symbols: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not symbols:
        NATIVE.use_symbols(0)
    params = parameters(SHAPES, torch.float32)
    owner = Owner(params, **BASES["adam"])
    give_grads(params, 0)
    direction = FusedDirection(owner)
    searched_step(owner, direction, 0)
    plain_step(owner, direction, 1)
    no_general_path(monkeypatch)
    searched_step(owner, direction, 2)
    plain_step(owner, direction, 3)
    params[0].grad = None  # and gradients may come and go
    searched_step(owner, direction, 4)


# -- gradients that are missing or not finite ------------------------------------------------------


def test_gradients_come_late_and_go() -> None:
    params = parameters([(9,), (20,), (33,)], torch.float32)
    owner = Owner(params, **BASES["adam"])
    direction = FusedDirection(owner)
    steps = [0, 0, 0]
    for seed, present in enumerate([(0,), (0, 2), (1,), (), (0, 1, 2)]):
        for i, p in enumerate(params):
            p.grad = values(p.shape, p.dtype, 10 * seed + i) if i in present else None
        before = [p.detach().clone() for p in params]
        found = truths(owner)
        slope = direction.start(0.3)
        if present:
            check_slope(slope, found, torch.float32)
        else:
            assert slope.item() == 0.0
        direction.finish(0.1)
        check_params(owner, [t.finished(0.1) for t in found], [t.w for t in found])
        for i, p in enumerate(params):
            steps[i] += i in present
            assert float(owner.state.get(p, {}).get("step", 0)) == steps[i]
            assert torch.equal(p, before[i]) == (i not in present)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("base", ["adam", "adagrad", "sgd"])
def test_what_is_not_finite_shows_in_the_slope(bad: float, base: str) -> None:
    params = parameters([(40_000,), (5,)], torch.float32)
    owner = Owner(params, **BASES[base])
    give_grads(params, 0)
    params[0].grad[31_000] = bad  # type: ignore[index]
    before = snapshot(owner)
    direction = FusedDirection(owner)
    found = truths(owner)
    slope, terms = direction.start(0.1), torch.cat([t.slope() for t in found])
    assert not slope.isfinite()
    assert_within(slope, terms.sum(), torch.zeros(()), "slope")
    for param, truth in zip(params, found, strict=True):
        wanted = truth.trial(0.1)
        torch.testing.assert_close(as_wide(param), wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
    direction.undo()
    assert_same_bits(snapshot(owner), before)
    direction.start(0.1)
    direction.restore()
    direction.accept()
    assert_same_bits(params, before[:2], "a step of 0 moves nothing")


def test_a_step_size_of_zero_moves_nothing() -> None:
    params = parameters(SHAPES, torch.float32)
    owner = Owner(params, **BASES["adam"])
    give_grads(params, 0)
    params[-1].grad[0, 0] = torch.nan  # type: ignore[index]
    before = [p.detach().clone() for p in params]
    direction = FusedDirection(owner)
    direction.start(0.0)
    assert_same_bits(params, before)
    direction.finish(0.0)
    assert_same_bits(params, before)


# -- going back ------------------------------------------------------------------------------------

ODD_BITS = {
    torch.float32: ([0x7FA00001, 0x80000000, 0x00000001, 0x7F800000], torch.int32),
    torch.bfloat16: ([0x7FA1, 0x8000, 0x0001, 0x7F80], torch.int16),
    torch.float16: ([0x7D01, 0x8000, 0x0001, 0x7C00], torch.int16),
}


@pytest.mark.parametrize("dtype", ODD_BITS, ids=DTYPE_IDS.__getitem__)
def test_restoring_is_exact_to_the_bit(dtype: torch.dtype) -> None:
    bits, integer = ODD_BITS[dtype]
    raw = torch.tensor(bits * 25, dtype=torch.int64).to(integer)
    param = Parameter(raw.view(dtype).clone())
    direction = FusedDirection(Owner([param], **BASES["adam"]))
    place, version = param.data_ptr(), param._version
    for seed in range(2):
        param.grad = values((100,), dtype, seed)
        direction.start(0.1)
        assert not torch.equal(param.detach().view(integer), raw)
        direction.restore()
        assert torch.equal(param.detach().view(integer), raw)
        direction.trial(0.1)
        direction.undo()
        assert torch.equal(param.detach().view(integer), raw)
    assert param.data_ptr() == place
    assert param._version >= version + 6


@parametrize_bases
@pytest.mark.parametrize("has_master", [False, True])
def test_undoing_leaves_everything_as_it_was(base: str, has_master: bool) -> None:
    params = parameters(SHAPES, torch.bfloat16 if has_master else torch.float32)
    owner = Owner(params, **BASES[base])
    give_grads(params, 0)
    if has_master:
        give_masters(owner)
    direction = FusedDirection(owner)
    for seed in range(2):
        names, before = [sorted(owner.state.get(p, {})) for p in params], snapshot(owner)
        give_grads(params, seed)
        direction.start(0.3)
        direction.trial(0.2)
        direction.undo()
        assert [sorted(owner.state.get(p, {})) for p in params] == names
        assert_same_bits(snapshot(owner), before)
        direction.undo()  # there is none any more
        direction.plain(0.1)


def test_versions_of_parameters_are_counted() -> None:
    params = parameters([(9,), (2,)], torch.float32)
    direction = FusedDirection(Owner(params, **BASES["adam"]))
    give_grads(params, 0)
    for _ in range(2):
        for act in (
            lambda: direction.start(0.1),
            lambda: direction.trial(0.2),
            direction.restore,
            lambda: direction.finish(0.1),
            lambda: direction.plain(0.1),
        ):
            before = [p._version for p in params]
            act()
            assert all(p._version > v for p, v in zip(params, before, strict=True))


# -- bad input -------------------------------------------------------------------------------------


def ready(**options: Any) -> tuple[list[Parameter], Owner, FusedDirection]:
    params = parameters([(9,), (4, 5)], torch.float32)
    give_grads(params, 0)
    owner = Owner(params, **{**BASES["adam"], **options})
    return params, owner, FusedDirection(owner)


def spoil_shape(params: list[Parameter], owner: Owner) -> None:
    params[1].data = torch.zeros(3)


def spoil_state(params: list[Parameter], owner: Owner) -> None:
    owner.state[params[1]] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}


def spoil_option(params: list[Parameter], owner: Owner) -> None:
    owner.param_groups[0]["eps"] = "small"


def spoil_base(params: list[Parameter], owner: Owner) -> None:
    owner.param_groups[0]["base"] = "lion"


@pytest.mark.parametrize("spoil", [spoil_shape, spoil_state, spoil_option, spoil_base])
@pytest.mark.parametrize("is_searched", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_bad_input_changes_nothing(
    spoil: Callable[[list[Parameter], Owner], None], is_searched: bool, is_first: bool
) -> None:
    params, owner, direction = ready()
    if not is_first:
        direction.start(0.1)
        direction.finish(0.1)
    spoil(params, owner)
    before = snapshot(owner)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        (direction.start if is_searched else direction.plain)(0.1)
    assert_same_bits(snapshot(owner), before)
    with pytest.raises(RuntimeError, match=r"without start\(\)"):
        direction.trial(0.1)


@pytest.mark.parametrize("eta", [torch.nan, torch.inf])
def test_a_step_size_is_a_finite_number(eta: float) -> None:
    _, owner, direction = ready()
    before = snapshot(owner)
    for act in (direction.start, direction.plain):
        with pytest.raises(ValueError, match="eta must be a finite number"):
            act(eta)
    assert_same_bits(snapshot(owner), before)
    direction.start(0.1)
    for act in (direction.trial, direction.finish):
        with pytest.raises(ValueError, match="eta must be a finite number"):
            act(eta)
    direction.finish(0.1)


def test_a_search_has_an_end() -> None:
    _, _, direction = ready()
    direction.start(0.1)
    for act in (direction.start, direction.plain):
        with pytest.raises(RuntimeError, match="during a line search"):
            act(0.1)
    direction.accept()
    direction.start(0.1)
    direction.undo()
    direction.plain(0.1)


def test_gradients_are_kept_for_the_search() -> None:
    params, owner, direction = ready()
    found = truths(owner)
    direction.start(0.1)
    owner.zero_grad(set_to_none=True)
    direction.trial(0.2)
    direction.finish(0.1)
    give_grads(params, 0)
    check_params(owner, [t.finished(0.1) for t in found], [t.w for t in found])


def test_written_gradients_are_noticed() -> None:
    _, owner, direction = ready()
    before = snapshot(owner)
    direction.start(0.1)
    owner.zero_grad(set_to_none=False)
    for act in (direction.trial, direction.finish):
        with pytest.raises(RuntimeError, match="a gradient was written"):
            act(0.1)
    direction.undo()
    assert_same_bits(snapshot(owner), before)


def test_parameters_stay_the_same_during_a_search() -> None:
    params, owner, direction = ready()
    direction.start(0.1)
    owner.add_param_group({"params": parameters([(2,)], torch.float32)})
    with pytest.raises(RuntimeError, match="added or removed"):
        direction.trial(0.1)
    owner.param_groups.pop()
    params[0].data = params[0].data.double()
    with pytest.raises(RuntimeError, match="dtype"):
        direction.trial(0.1)


def test_parameters_may_move_in_memory_during_a_search() -> None:
    params, owner, direction = ready()
    found = truths(owner)
    direction.start(0.1)
    params[0].data = params[0].data.clone()
    direction.trial(0.2)
    check_params(owner, [t.trial(0.2) for t in found], [t.w for t in found])


# -- what the reference runs -----------------------------------------------------------------------


def sparse(params: list[Parameter], owner: Owner) -> None:
    params[0].grad = params[0].grad.to_sparse()  # type: ignore[union-attr]


def shared(params: list[Parameter], owner: Owner) -> None:
    params[1].data = params[0].data[2:6]
    params[1].grad = torch.ones(4)


def named(params: list[Parameter], owner: Owner) -> None:
    owner.backend = "reference"


def other_state(params: list[Parameter], owner: Owner) -> None:
    owner.state_dtype = None
    owner.state[params[0]]["exp_avg_sq"] = torch.zeros(9, dtype=torch.float64)


@pytest.mark.parametrize("change", [sparse, shared, named, other_state])
def test_what_no_kernel_runs_is_left_to_the_reference(
    change: Callable[[list[Parameter], Owner], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, owner, direction = ready()
    change(params, owner)
    names, before = [sorted(owner.state.get(p, {})) for p in params], snapshot(owner)
    calls: list[Any] = []

    class Other:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append((name, *args))

    def other(self: FusedDirection, why: str, for_search: bool = True) -> Any:
        if for_search:
            self._other = Other()
        return Other()

    monkeypatch.setattr(FusedDirection, "_reference", other)
    direction.start(0.1)
    assert [sorted(owner.state.get(p, {})) for p in params] == names
    assert_same_bits(snapshot(owner), before)
    direction.trial(0.2)
    direction.restore()
    direction.finish(0.3)
    direction.start(0.1, 0.5)
    direction.accept()
    direction.start(0.1)
    direction.undo()
    direction.plain(0.4, 0.5)
    assert calls == [
        *(("start", 0.1, 1.0), ("trial", 0.2), ("restore",), ("finish", 0.3)),
        *(("start", 0.1, 0.5), ("accept",), ("start", 0.1, 1.0), ("undo",), ("plain", 0.4, 0.5)),
    ]


def test_a_backend_that_was_asked_for_is_not_replaced() -> None:
    params, owner, direction = ready(backend="cpu")
    sparse(params, owner)
    before = snapshot(owner)
    with pytest.raises(backend.BackendError, match="cannot run this line search"):
        direction.start(0.1)
    assert_same_bits(snapshot(owner), before)


def test_engines_of_a_gpu_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, direction = ready()
    monkeypatch.setattr(backend, "select", lambda *_: "triton")
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.setattr(
        FusedDirection, "_reference", lambda self, why: pytest.fail(why), raising=True
    )
    with (
        pytest.warns(RuntimeWarning, match="line searches have no triton kernels"),
        pytest.raises(pytest.fail.Exception, match="triton"),
    ):
        direction.start(0.1)


def test_copies_start_anew() -> None:
    params, owner, direction = ready()
    direction.start(0.1)
    direction.finish(0.1)
    for twin in (copy.deepcopy((owner, direction)), pickle.loads(pickle.dumps((owner, direction)))):
        own, other = twin
        give_grads(own.param_groups[0]["params"], 1)
        give_grads(params, 1)
        other.plain(0.1)
        assert other._optimizer is own
    direction.plain(0.1)
    assert_same_bits(own.param_groups[0]["params"], params)
