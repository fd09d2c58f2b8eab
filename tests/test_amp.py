"""GradScaler: unscaling, skipped steps, and what torch's fused SGD gets wrong at the first one."""

from typing import Any

import pytest
import torch
from dropin import (
    NAMES,
    OPTIONS,
    OURS,
    TORCHS,
    assert_same,
    assert_unchanged,
    make_params,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import pyoptim

each_option = pytest.mark.parametrize("option", OPTIONS)
# Powers of two unscale exactly; the others are rounded once, to float32, in torch.
SCALES = {"power-of-two": 2.0**10, "odd": 1000.7}
# float32 gradients: one rounding of the scaled gradient, one of 1/scale, one of the product.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


SCALERS = {"torch": torch.amp.GradScaler, "pyoptim": pyoptim.GradScaler}


@pytest.fixture(autouse=True, params=SCALERS)
def scaler_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(make_scaler, "scaler", SCALERS[request.param], raising=False)
    return make_scaler.scaler  # type: ignore[attr-defined]


def make_scaler(scale: float = 2.0**10) -> torch.amp.GradScaler:
    scaler = make_scaler.scaler("cpu", init_scale=scale, growth_interval=2)  # type: ignore[attr-defined]
    scaler.scale(torch.ones(()))  # sets it up, as the first backward pass would
    return scaler


def scale_grads(params: list[Parameter], scaler: torch.amp.GradScaler, seed: int) -> list[Tensor]:
    """Gradients as backward() of a scaled loss leaves them; returns the unscaled ones."""
    set_grads(params, seed)
    plain = [p.grad.clone() for p in params]
    for p in params:
        p.grad.mul_(scaler.get_scale())
    return plain


def amp_run(
    optimizer: Optimizer, params: list[Parameter], scale: float, steps: int = 8
) -> list[float]:
    """Overflows at the first and the fourth step; the others go through."""
    scaler, scales = make_scaler(scale), []
    for step in range(steps):
        scale_grads(params, scaler, step)
        if step in (0, 3):
            params[step % 2].grad.view(-1)[-1] = torch.inf if step else torch.nan
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("scale", SCALES)
@each_option
def test_equals_torchs_for_loop_with_growth_and_backoff(option: str, scale: str) -> None:
    name, kwargs = OPTIONS[option]
    results = []
    for cls, more in ((OURS[name], {}), (TORCHS[name], {"foreach": False})):
        params = make_params(dtype=torch.float32)
        scales = amp_run(cls(params, **kwargs, **more), params, SCALES[scale])
        results.append((params, scales))
    assert results[0][1] == results[1][1]
    assert len(set(results[0][1])) > 2
    assert_same(results[0][0], results[1][0], **TOLERANCE)


@each_option
def test_an_overflow_at_the_first_step_leaves_no_trace(option: str) -> None:
    name, kwargs = OPTIONS[option]
    params = make_params(dtype=torch.float32)
    optimizer = OURS[name](params, **kwargs)
    before, scaler = snapshot(optimizer), make_scaler()
    assert (len(optimizer.state) == 0) == (name != "Adagrad")
    scale_grads(params, scaler, 0)
    params[2].grad.fill_(torch.inf)
    assert scaler.step(optimizer) is None
    assert_unchanged(optimizer, before)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


@pytest.mark.parametrize("is_first", [True, False], ids=["general-path", "plan"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_written_back_unscaled(name: str, backend: str, is_first: bool) -> None:
    params = make_params(dtype=torch.float32)
    optimizer, scaler = OURS[name](params, backend=backend), make_scaler()
    for step in range(1 if is_first else 3):
        grads = scale_grads(params, scaler, step)
        versions = [p.grad._version for p in params]
        scaler.step(optimizer)
        scaler.update()
    assert_same([p.grad for p in params], grads, rtol=0, atol=0)
    assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))


def test_gradients_of_every_layout_are_written_back_unscaled() -> None:
    """Strided unlike the parameter, lazily negated, lazily conjugated."""
    values = torch.arange(12.0).view(3, 4) + 1
    params = [Parameter(torch.ones(3, 4)) for _ in range(2)]
    params.append(Parameter(torch.ones(3, 4, dtype=torch.complex64)))
    params[0].grad = values.t().contiguous().t()
    negated = torch.complex(torch.zeros(3, 4), -values).conj().imag
    assert negated.is_neg()
    params[1].grad = negated
    params[2].grad = torch.complex(values, values).conj()
    expected = [p.grad.resolve_conj().resolve_neg().clone() for p in params]
    for backend in ("auto", "reference"):
        optimizer = pyoptim.SGD(params, backend=backend)
        for p in params:
            p.grad.mul_(4.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        optimizer.step()
        assert_same([p.grad.resolve_conj().resolve_neg() for p in params], expected, rtol=0, atol=0)


@each_option
def test_clipping_between_unscale_and_step(option: str) -> None:
    name, kwargs = OPTIONS[option]
    results = []
    for cls in (OURS[name], TORCHS[name]):
        params = make_params(dtype=torch.float32)
        optimizer, scaler = cls(params, **kwargs), make_scaler()
        for step in range(4):
            scale_grads(params, scaler, step)
            if step == 2:
                params[0].grad[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 0.5)
            grads = [p.grad.clone() for p in params]
            scaler.step(optimizer)
            scaler.update()
            assert step == 2 or all(map(torch.equal, (p.grad for p in params), grads))
        results.append(params)
    assert_same(*results, **TOLERANCE)


@each_option
def test_a_first_gradient_that_comes_late(option: str) -> None:
    name, kwargs = OPTIONS[option]
    results = []
    for cls in (OURS[name], TORCHS[name]):
        params = make_params(dtype=torch.float32)
        optimizer, scaler = cls(params, **kwargs), make_scaler()
        for step in range(5):
            scale_grads(params, scaler, step)
            if step < 2:
                params[1].grad = None
            if step == 2:  # the late one overflows at once
                params[1].grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            assert (
                step != 2 or "step" not in optimizer.state.get(params[1], {}) or name == "Adagrad"
            )
        results.append([*params, *(e["step"] for e in optimizer.state.values() if "step" in e)])
    assert_same(*results, **TOLERANCE)


def test_two_optimizers_and_two_steps_in_one_iteration() -> None:
    results = []
    for module in (pyoptim, torch.optim):
        first, second = make_params(dtype=torch.float32), make_params(dtype=torch.float32, seed=1)
        one, other = module.AdamW(first, lr=0.1), module.SGD(second, lr=0.1, momentum=0.9)
        scaler = make_scaler()
        for step in range(4):
            scale_grads(first, scaler, step)
            scale_grads(second, scaler, step)
            if step == 1:
                second[0].grad[0, 0] = torch.inf  # one of the two is skipped
            scaler.step(one)
            scaler.step(other)
            with pytest.raises(RuntimeError, match="already been called"):
                scaler.step(one)
            scaler.update()
        results.append([*first, *second])
    assert_same(*results, **TOLERANCE)


def test_a_disabled_scaler_only_steps() -> None:
    params, expected = make_params(), make_params()
    ours, theirs = pyoptim.AdamW(params), torch.optim.AdamW(expected)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(2):
        for optimizer, own in ((ours, params), (theirs, expected)):
            set_grads(own, step)
            scaler.step(optimizer)
    assert_same(params, expected)


def test_a_scale_of_the_users_own_is_multiplied_in() -> None:
    """GradScaler's rule: `optimizer.grad_scale`, when set, is one more factor on the gradients."""
    params, expected = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    ours, theirs = pyoptim.SGD(params), torch.optim.SGD(expected)
    set_grads(params, 0)
    set_grads(expected, 0)
    scaler = make_scaler()
    for p in params:
        p.grad.mul_(scaler.get_scale() * 8)
    ours.grad_scale = torch.tensor(8.0)
    scaler.step(ours)
    theirs.step()
    assert_same(params, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients(dtype: torch.dtype) -> None:
    """torch's fused AdamW takes them; its for-loop refuses float16."""
    results: list[Any] = []
    for cls, more in ((pyoptim.AdamW, {}), (torch.optim.AdamW, {"fused": True})):
        params = make_params(dtype=dtype)
        optimizer, scaler = cls(params, lr=0.1, **more), make_scaler(2.0**4)
        for step in range(3):
            scale_grads(params, scaler, step)
            scaler.step(optimizer)
            scaler.update()
        results.append([*params, *(p.grad for p in params)])
    unit = torch.finfo(dtype).eps
    assert_same(*results, rtol=4 * unit, atol=2 * unit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 0.0], ids=str)
def test_whatever_is_not_finite_skips_the_step(value: float, dtype: torch.dtype) -> None:
    """And nothing else: the square of 3e38 is no float32."""
    for place in (0, 1, 2):
        params = make_params(dtype=dtype)
        optimizer, scaler = pyoptim.SGD(params, lr=1e-30), make_scaler(1.0)
        scale_grads(params, scaler, 0)
        params[place].grad.view(-1)[-1] = value
        before = params[place].detach().clone()
        scaler.step(optimizer)
        is_finite = value in (3e38, 0.0)
        assert scaler._found_inf_per_device(optimizer)[torch.device("cpu")].item() == (
            not is_finite
        )
        assert is_finite or torch.equal(params[place], before)


def test_sparse_and_complex_gradients_are_searched_too() -> None:
    for spoil in (False, True):
        for param, grad in (
            (torch.zeros(3), torch.tensor([0.0, 1.0, 2.0]).to_sparse()),
            (torch.zeros(3, dtype=torch.complex64), torch.ones(3, dtype=torch.complex64).conj()),
        ):
            parameter = Parameter(param)
            parameter.grad = grad * (torch.nan if spoil else 1.0)
            scaler = pyoptim.GradScaler("cpu")
            scaler.scale(torch.ones(()))
            scaler.step(pyoptim.SGD([parameter], lr=1.0))
            assert bool(torch.count_nonzero(parameter.detach())) == (not spoil)


def test_without_gradients_nothing_happens() -> None:
    param = Parameter(torch.ones(3))
    make_scaler().step(pyoptim.SGD([param], lr=1.0))
    assert param.tolist() == [1.0] * 3
