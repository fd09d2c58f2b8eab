"""A step of a GPU engine equals the CPU engine's, bit for bit, and moves nothing else."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    KERNEL_CASES,
    Case,
    assert_same_bits,
    give_grads,
    parameters,
    parametrize_cases,
    parametrize_kernel_dtypes,
    states_of,
    values,
)
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import plan

# Empty, 0-d, below and above one vector, odd, more than one block of either engine.
SHAPES = [(3,), (0,), (), (17, 5), (4, 4), (65, 67)]


def on(device: torch.device, params: Sequence[Tensor]) -> list[Parameter]:
    """Parameters on `device` with the values and strides of `params`."""
    return [Parameter(p.detach().clone().to(device)) for p in params]


def copy_grads(source: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    for p, q in zip(source, to, strict=True):
        q.grad = None if p.grad is None else p.grad.clone().to(q.device)


def assert_same_optimizers(
    actual: Any, expected: Any, params: Sequence[Tensor], wanted: Sequence[Tensor], what: str = ""
) -> None:
    assert_same_bits([p.cpu() for p in params], list(wanted), f"{what} params")
    assert_same_bits([s.cpu() for s in states_of(actual)], states_of(expected), f"{what} states")
    for p, q in zip(params, wanted, strict=True):
        assert float(actual.state[p].get("step", 0)) == float(expected.state[q].get("step", 0))


def compare(
    case: Case,
    engine: str,
    device: torch.device,
    wanted: list[Parameter],
    *,
    steps: int = 3,
    change: Callable[[int, list[Parameter]], object] = lambda step, params: None,
    **options: Any,
) -> Any:
    """Steps both engines side by side; returns the GPU engine's optimizer."""
    params = on(device, wanted)
    actual = case.ours(params, backend=engine, **options)
    expected = case.ours(wanted, backend="cpu", **options)
    for step in range(steps):
        give_grads(wanted, step + 1)
        change(step, wanted)
        copy_grads(wanted, params)
        actual.step()
        expected.step()
        assert_same_optimizers(actual, expected, params, wanted, f"{case} step {step}")
    return actual


@parametrize_cases(CASES)
def test_every_option_equals_the_cpu(case: Case, engine: str, device: torch.device) -> None:
    compare(case, engine, device, parameters(SHAPES, torch.float32))


@parametrize_cases(KERNEL_CASES)
@parametrize_kernel_dtypes
def test_every_kernel_equals_the_cpu(
    case: Case, dtype: torch.dtype, state_dtype: Any, engine: str, device: torch.device
) -> None:
    compare(case, engine, device, parameters(SHAPES, dtype), state_dtype=state_dtype, steps=2)


@parametrize_cases(KERNEL_CASES)
def test_infinities_and_nans_go_where_the_cpu_sends_them(
    case: Case, engine: str, device: torch.device
) -> None:
    def spoil(step: int, params: list[Parameter]) -> None:
        params[0].grad[::7] = torch.nan
        params[0].grad[1::7] = torch.inf
        params[0].grad[2::7] = -torch.inf
        params[0].grad[3::7] = -0.0

    compare(case, engine, device, parameters([(41,)], torch.float32), change=spoil)


@parametrize_cases(KERNEL_CASES)
def test_misaligned_memory_gives_the_same_bits(
    case: Case, engine: str, device: torch.device
) -> None:
    """Views that start one element into their storage: no 16-byte access may touch them."""
    plain = parameters([(67,), (130,)], torch.float32)
    shifted = [Parameter(shift(p.detach().to(device))) for p in plain]
    actual, expected = case.ours(shifted, backend=engine), case.ours(plain, backend="cpu")
    for step in range(2):
        give_grads(plain, step)
        for p, q in zip(plain, shifted, strict=True):
            q.grad = shift(p.grad.to(device))
        actual.step()
        expected.step()
        assert_same_optimizers(actual, expected, shifted, plain)
    storage = shifted[0].untyped_storage()
    guard = torch.empty(0, device=device).set_(storage, 0, (storage.nbytes() // 4,))
    assert float(guard[0]) == float(guard[-1]) == 7.0


def shift(t: Tensor) -> Tensor:
    """A copy between guards, one element off alignment."""
    room = torch.full((t.numel() + 2,), 7.0, dtype=t.dtype, device=t.device)
    room[1:-1] = t.flatten()
    return room[1:-1].view(t.shape)


ADAMW = next(c for c in CASES if str(c) == "adamw-amsgrad")
DAMPED = next(c for c in CASES if str(c) == "sgd-dampening")


def test_gradients_laid_out_unlike_their_parameters(engine: str, device: torch.device) -> None:
    def transpose(step: int, params: list[Parameter]) -> None:
        params[0].grad = params[0].grad.t().contiguous().t()
        params[1].grad = params[1].grad.contiguous(memory_format=torch.channels_last)
        params[2].grad = params[2].grad[:1].expand(5, 3)

    wanted = parameters([(5, 3), (2, 3, 4, 5), (5, 3)], torch.float32)
    compare(ADAMW, engine, device, wanted, change=transpose)


def test_parameters_in_every_dense_layout(engine: str, device: torch.device) -> None:
    wanted = [
        Parameter(values((6, 5), torch.float32, 0).t()),
        Parameter(values((2, 3, 4, 5), torch.float32, 1).to(memory_format=torch.channels_last)),
        Parameter(values((7, 6), torch.float32, 2)[:, 1:4]),
    ]
    compare(ADAMW, engine, device, wanted)


def test_complex_parameters(engine: str, device: torch.device) -> None:
    compare(ADAMW, engine, device, parameters([(5, 3), (2,)], torch.complex64))


def test_groups_with_their_own_options(engine: str, device: torch.device) -> None:
    wanted = parameters([(5,), (300,), (7,), (9,)], torch.float32)
    params = on(device, wanted)
    optimizers = [
        pyoptim.AdamW(
            [
                {"params": own[:2]},
                {"params": own[2:3], "lr": 0.5, "amsgrad": True},
                {"params": own[3:], "weight_decay": 0.0, "maximize": True},
            ],
            backend=name,
        )
        for own, name in ((params, engine), (wanted, "cpu"))
    ]
    for step in range(4):
        give_grads(wanted, step)
        wanted[step].grad = None  # each misses one step: their counters differ
        copy_grads(wanted, params)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
    assert_same_optimizers(*optimizers, params, wanted)


def launch_counter(engine: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    if engine == "cuda":
        return pyoptim.backend.native().cuda_launches
    from pyoptim.kernels import launcher

    launches: list[tuple[Any, ...]] = []
    launch = launcher.launch

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        launches.append(grid)
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(launcher, "launch", record)
    return lambda: len(launches)


def test_many_tensors_need_few_launches(
    engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Interpreted programs take milliseconds each.
    n_tensors = 1000 if engine == "cuda" or device.type == "cuda" else 50
    wanted = parameters([(n % 5,) for n in range(n_tensors)], torch.float32)
    params = on(device, wanted)
    actual, expected = pyoptim.AdamW(params, backend=engine), pyoptim.AdamW(wanted, backend="cpu")
    count = launch_counter(engine, monkeypatch)
    for step in range(2):
        give_grads(wanted, step)
        copy_grads(wanted, params)
        before = count()
        actual.step()
        expected.step()
    assert count() - before <= 3
    assert_same_optimizers(actual, expected, params, wanted)


def test_the_second_step_walks_the_plan(
    engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = on(device, parameters([(5,), (3,)], torch.float32))
    optimizer = pyoptim.AdamW(params, backend=engine)
    give_grads(params, 0)
    optimizer.step()
    monkeypatch.setattr(plan, "_step_rows", lambda *_: pytest.fail("took the general path"))
    versions = [p._version for p in params]
    give_grads(params, 1)
    optimizer.step()
    assert all(p._version > v for p, v in zip(params, versions, strict=True))


def test_a_step_that_raises_has_changed_nothing(engine: str, device: torch.device) -> None:
    params = on(device, parameters([(5,), (3,)], torch.float32))
    optimizer = pyoptim.AdamW(params, backend=engine)
    give_grads(params, 0)
    optimizer.step()
    before = [t.clone() for t in (*params, *states_of(optimizer))]
    params[1].grad = torch.zeros(3, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same_bits([*params, *states_of(optimizer)], before)


def test_parameters_that_share_memory_step_in_order(engine: str, device: torch.device) -> None:
    results = []
    for name, where in ((engine, device), ("cpu", torch.device("cpu"))):
        room = values((9,), torch.float32, 0).to(where)
        params = [Parameter(room[:6]), Parameter(room[3:])]
        optimizer = pyoptim.SGD(params, lr=0.1, momentum=0.9, backend=name)
        for step in range(2):
            give_grads(params, step)
            for p in params:
                p.grad = p.grad.to(where)
            optimizer.step()
        results.append([room.cpu(), *(s.cpu() for s in states_of(optimizer))])
    assert_same_bits(*results)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_torch_agrees(name: str, engine: str, device: torch.device) -> None:
    params = on(device, parameters([(40, 3), (7,)], torch.float64))
    expected = on(device, params)
    ours = getattr(pyoptim, name)(params, lr=0.1, backend=engine)
    theirs = getattr(torch.optim, name)(expected, lr=0.1)
    for step in range(4):
        for p, q in zip(params, expected, strict=True):
            p.grad = values(p.shape, p.dtype, step).to(device)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-13)


def test_a_compiled_graph_holds_the_step(engine: str, device: torch.device) -> None:
    torch._dynamo.reset()
    wanted = parameters([(5, 3), (7,)], torch.float32)
    params = on(device, wanted)
    actual = DAMPED.ours(params, backend=engine)
    expected = DAMPED.ours(wanted, backend="cpu")
    compiled = torch.compile(lambda: actual.step(), backend="eager", fullgraph=True)
    for step in range(3):
        give_grads(wanted, step)
        copy_grads(wanted, params)
        compiled()
        expected.step()
        assert_same_optimizers(actual, expected, params, wanted)
