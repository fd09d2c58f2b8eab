"""What the kernels read on the device: counters, hyper-parameters, loss scale, clip factor."""

from typing import Any

import pytest
import torch
from cases import (
    KERNEL_CASES,
    Case,
    assert_same_bits,
    give_grads,
    parameters,
    parametrize_cases,
    states_of,
)
from test_gpu_step import DAMPED, assert_same_optimizers, copy_grads, on
from torch import Tensor
from torch.nn import Parameter

import pyoptim

NAMES = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Expectigrad"]


def scalar(value: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def scaled_step(optimizer: Any, scale: float, found_inf: bool, device: torch.device) -> None:
    """A step as GradScaler makes it."""
    optimizer.grad_scale = scalar(scale, device)
    optimizer.found_inf = scalar(float(found_inf), device)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("scale", [1024.0, 3.0])
@parametrize_cases(KERNEL_CASES)
def test_scaled_gradients_equal_the_cpu(
    case: Case, scale: float, engine: str, device: torch.device
) -> None:
    wanted = parameters([(5, 3), (70,)], torch.bfloat16)
    params = on(device, wanted)
    actual, expected = case.ours(params, backend=engine), case.ours(wanted, backend="cpu")
    for step in range(3):
        give_grads(wanted, step)
        copy_grads(wanted, params)
        scaled_step(actual, scale, step == 1, device)
        scaled_step(expected, scale, step == 1, torch.device("cpu"))
        assert_same_bits([p.grad.cpu() for p in params], [p.grad for p in wanted], "grads")
        assert_same_optimizers(actual, expected, params, wanted, f"step {step}")


@parametrize_cases([*KERNEL_CASES, DAMPED])
def test_an_overflow_at_the_first_step_leaves_no_trace(
    case: Case, engine: str, device: torch.device
) -> None:
    """The step after it is still the first one: no bias correction or dampening is lost."""
    wanted = parameters([(5, 3), (70,)], torch.float32)
    params = on(device, wanted)
    actual, expected = case.ours(params, backend=engine), case.ours(wanted, backend="cpu")
    give_grads(wanted, 9)
    copy_grads(wanted, params)
    params[0].grad[0] = torch.inf
    before = [t.clone() for t in (*params, *(p.grad for p in params))]
    scaled_step(actual, 8.0, True, device)
    assert_same_bits([*params, *(p.grad for p in params)], before)
    for step in range(3):
        give_grads(wanted, step)
        copy_grads(wanted, params)
        scaled_step(actual, 8.0, False, device)
        scaled_step(expected, 8.0, False, torch.device("cpu"))
        assert_same_optimizers(actual, expected, params, wanted, f"step {step}")


@parametrize_cases([*KERNEL_CASES, DAMPED])
def test_steps_with_and_without_a_scaler_mix(case: Case, engine: str, device: torch.device) -> None:
    wanted = parameters([(5, 3), (70,)], torch.float32)
    params = on(device, wanted)
    actual, expected = case.ours(params, backend=engine), case.ours(wanted, backend="cpu")
    for step in range(6):
        give_grads(wanted, step)
        if step < 3:
            wanted[1].grad = None  # its first gradient comes late
        copy_grads(wanted, params)
        if step % 2:
            scaled_step(actual, 8.0, step == 3, device)
            scaled_step(expected, 8.0, step == 3, torch.device("cpu"))
        else:
            actual.step()
            expected.step()
        assert_same_bits([p.cpu() for p in params], wanted, f"step {step}")


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, pyoptim.GradScaler], ids=str)
def test_grad_scaler_itself(scaler_class: Any, engine: str, device: torch.device) -> None:
    results = []
    for name, where in ((engine, device), ("cpu", torch.device("cpu"))):
        params = on(where, parameters([(5, 3), (70,)], torch.float32))
        optimizer = pyoptim.AdamW(params, backend=name)
        scaler = scaler_class(where.type, init_scale=64.0, growth_interval=2)
        for step in range(6):
            optimizer.zero_grad()
            loss = sum((p * (3.0e38 if step == 2 else step + 1.0)).sum() for p in params)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([*(p.detach().cpu() for p in params), torch.tensor(scaler.get_scale())])
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_capturable_equals_the_cpu(
    name: str, dtype: torch.dtype, engine: str, device: torch.device
) -> None:
    """lr and weight decay are tensors that change in place between the steps."""
    wanted = parameters([(5, 3), (70,)], torch.float32)
    params = on(device, wanted)
    lr, decay = scalar(0.25, device, dtype), scalar(0.0, device, dtype)
    actual = getattr(pyoptim, name)(params, lr=0.25, backend=engine)
    expected = getattr(pyoptim, name)(wanted, lr=0.25, backend="cpu")
    for group in actual.param_groups:  # where torch has no such argument, the group still may
        group.update(lr=lr, weight_decay=decay, capturable=True)
    for step in range(4):
        give_grads(wanted, step)
        copy_grads(wanted, params)
        lr.fill_(0.25 / (step + 1))
        decay.fill_(0.5 * step)
        for group in expected.param_groups:
            group.update(lr=float(lr), weight_decay=float(decay))
        actual.step()
        expected.step()
        assert_same_optimizers(actual, expected, params, wanted, f"step {step}")
    assert all(s["step"].device == device for s in actual.state.values() if "step" in s)


def test_betas_may_be_tensors(engine: str, device: torch.device) -> None:
    wanted = parameters([(5, 3)], torch.float32)
    params = on(device, wanted)
    betas = scalar(0.5, device), scalar(0.75, device)
    actual = pyoptim.AdamW(params, lr=scalar(0.1, device), betas=betas, capturable=True)
    actual.backend = engine
    expected = pyoptim.AdamW(wanted, lr=float(torch.tensor(0.1)), betas=(0.5, 0.75), backend="cpu")
    for step in range(3):
        give_grads(wanted, step)
        copy_grads(wanted, params)
        actual.step()
        expected.step()
        assert_same_optimizers(actual, expected, params, wanted)


def test_a_hyper_parameter_of_two_numbers_is_refused(engine: str, device: torch.device) -> None:
    params = on(device, parameters([(5,)], torch.float32))
    optimizer = pyoptim.AdamW(params, lr=scalar(0.1, device), capturable=True, backend=engine)
    give_grads(params, 0)
    optimizer.param_groups[0]["lr"] = torch.ones(2, device=device)
    before = params[0].detach().clone()
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Expectigrad"])
def test_a_capturable_state_dict_loads_on_both_sides(
    name: str, engine: str, device: torch.device
) -> None:
    wanted = parameters([(5, 3)], torch.float32)
    params = on(device, wanted)
    actual = getattr(pyoptim, name)(params, lr=0.25, capturable=True, backend=engine)
    expected = getattr(pyoptim, name)(wanted, lr=0.25, backend="cpu")
    for step in range(4):
        give_grads(wanted, step)
        copy_grads(wanted, params)
        actual.step()
        expected.step()
        if step == 1:
            saved = actual.state_dict(), expected.state_dict()
            actual.load_state_dict(saved[1])
            expected.load_state_dict(saved[0])
    assert_same_optimizers(actual, expected, params, wanted)


MAX_NORM = 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@parametrize_cases(KERNEL_CASES)
def test_clipped_steps_equal_the_cpu(
    case: Case, dtype: torch.dtype, engine: str, device: torch.device
) -> None:
    wanted = parameters([(5, 3), (70,), (0,)], dtype)
    params = on(device, wanted)
    actual = case.ours(params, backend=engine, max_grad_norm=MAX_NORM)
    expected = case.ours(wanted, backend="cpu", max_grad_norm=MAX_NORM)
    for step in range(4):
        give_grads(wanted, step)
        if step == 2:  # below the limit: nothing is clipped
            for p in wanted:
                p.grad.mul_(2.0**-10)
        copy_grads(wanted, params)
        grads = [p.grad.clone() for p in params]
        actual.step()
        expected.step()
        assert_same_bits([p.grad for p in params], grads, "grads")
        assert_same_optimizers(actual, expected, params, wanted, f"step {step}")


def test_clipping_comes_after_unscaling(engine: str, device: torch.device) -> None:
    wanted = parameters([(5, 3), (70,)], torch.float32)
    params, plain = on(device, wanted), on(torch.device("cpu"), wanted)
    actual = pyoptim.SGD(params, lr=0.5, backend=engine, max_grad_norm=MAX_NORM)
    expected = pyoptim.SGD(wanted, lr=0.5, backend="cpu", max_grad_norm=MAX_NORM)
    unscaled = pyoptim.SGD(plain, lr=0.5, backend="cpu", max_grad_norm=MAX_NORM)
    for step in range(2):
        give_grads(wanted, step)
        copy_grads(wanted, plain)
        for p in wanted:
            p.grad.mul_(1024.0)
        copy_grads(wanted, params)
        scaled_step(actual, 1024.0, False, device)
        scaled_step(expected, 1024.0, False, torch.device("cpu"))
        unscaled.step()
        assert_same_bits([p.cpu() for p in params], wanted)
        assert_same_bits([p.cpu() for p in params], plain)


def test_clipped_steps_equal_clip_grad_norm_and_a_step(engine: str, device: torch.device) -> None:
    wanted = parameters([(5, 3), (70,)], torch.float32)
    params = on(device, wanted)
    clipped = pyoptim.SGD(params, lr=0.5, backend=engine, max_grad_norm=MAX_NORM)
    plain = pyoptim.SGD(wanted, lr=0.5, backend="cpu")
    for step in range(2):
        give_grads(wanted, step)
        copy_grads(wanted, params)
        clipped.step()
        pyoptim.clip_grad_norm_(wanted, MAX_NORM)
        plain.step()
        assert_same_bits([p.cpu() for p in params], wanted)


def spoil(params: list[Parameter]) -> None:
    params[0].grad[0] = torch.nan


def test_a_nan_norm_spoils_every_parameter_as_torchs_clipping_does(
    engine: str, device: torch.device
) -> None:
    params = on(device, parameters([(5,), (70,)], torch.float32))
    optimizer = pyoptim.SGD(params, lr=0.5, backend=engine, max_grad_norm=MAX_NORM)
    give_grads(params, 0)
    spoil(params)
    optimizer.step()
    assert all(p.isnan().all() for p in params)
    assert not states_of(optimizer)
