"""SAM's two steps on a GPU engine equal the CPU engine's, bit for bit; the norm stays there."""

from typing import Any

import pytest
import torch
from cases import FLOATS, assert_same_bits, give_grads, parameters, parametrize_dtypes
from test_gpu_live import scaled_step
from test_gpu_step import SHAPES, assert_same_optimizers, copy_grads, on, shift
from torch import Tensor
from torch.nn import Parameter

import pyoptim

KINDS: dict[str, dict[str, Any]] = {
    "sam": {"rho": 0.3},
    "asam": {"rho": 2.0, "adaptive": True},
    "asam_eta_maximize": {"rho": 0.5, "adaptive": True, "eta": 0.01, "maximize": True},
}
parametrize_kinds = pytest.mark.parametrize("kind", KINDS)
CPU = torch.device("cpu")


def make(params: Any, engine: str, kind: str = "sam", base: Any = pyoptim.SGD, **more: Any) -> Any:
    momentum = {} if base is pyoptim.AdamW else {"momentum": 0.9}
    options = {**KINDS[kind], "lr": 0.1, **momentum, **more}
    return pyoptim.SAM(params, base, backend=engine, **options)


def both_steps(
    actual: Any, expected: Any, params: list[Parameter], wanted: list[Parameter], seed: int
) -> None:
    """Every gradient but the first parameter's first and the last one's second."""
    before = [p.detach().clone() for p in params]
    give_grads(wanted, 2 * seed)
    wanted[0].grad = None
    copy_grads(wanted, params)
    actual.first_step(zero_grad=True)
    expected.first_step(zero_grad=True)
    assert_same_bits([p.cpu() for p in params], wanted, f"step {seed} perturbed")
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[-1], before[-1])
    give_grads(wanted, 2 * seed + 1)
    wanted[-1].grad = None
    copy_grads(wanted, params)
    actual.second_step()
    expected.second_step()
    assert torch.equal(params[-1], before[-1])
    assert_same_optimizers(actual, expected, params, wanted, f"step {seed}")


@parametrize_kinds
@parametrize_dtypes(FLOATS)
def test_both_steps_equal_the_cpu(
    dtype: torch.dtype, kind: str, engine: str, device: torch.device
) -> None:
    wanted = parameters(SHAPES, dtype)
    params = on(device, wanted)
    actual, expected = make(params, engine, kind), make(wanted, "cpu", kind)
    for seed in range(3):
        both_steps(actual, expected, params, wanted, seed)


def test_any_base_of_ours_steps_on_the_engine(engine: str, device: torch.device) -> None:
    wanted = parameters(SHAPES, torch.float32)
    params = on(device, wanted)
    base: Any = pyoptim.AdamW
    actual, expected = make(params, engine, base=base), make(wanted, "cpu", base=base)
    for seed in range(3):
        both_steps(actual, expected, params, wanted, seed)


@parametrize_kinds
def test_misaligned_and_strided_weights_equal_the_cpu(
    kind: str, engine: str, device: torch.device
) -> None:
    plain = parameters([(67,), (130,), (5, 6)], torch.float32)
    odd = [Parameter(shift(p.detach().to(device))) for p in plain]
    odd[2].data = odd[2].data.t().contiguous().t()
    actual, expected = make(odd, engine, kind), make(plain, "cpu", kind)
    before = [p.detach().clone() for p in odd]
    for seed in range(2):
        give_grads(plain, seed)
        for p, q in zip(plain, odd, strict=True):
            q.grad = shift(p.grad.to(device))
        odd[2].grad = odd[2].grad.t().contiguous().t()
        actual.first_step()
        expected.first_step()
        # The norm adds the elements of the third in their order in memory.
        torch.testing.assert_close(
            [p.detach().cpu() for p in odd], [p.detach() for p in plain], rtol=2e-7, atol=1e-8
        )
        actual.restore()
        expected.restore()
        assert_same_bits(odd, before)
    guards = odd[0].untyped_storage().tolist()[:4], odd[0].untyped_storage().tolist()[-4:]
    seven = torch.tensor([7.0]).untyped_storage().tolist()
    assert guards == (seven, seven)


def test_groups_with_their_own_options_equal_the_cpu(engine: str, device: torch.device) -> None:
    wanted = parameters([(5,), (300,), (7,)], torch.float32)
    params = on(device, wanted)
    optimizers = []
    for own, name in ((params, engine), (wanted, "cpu")):
        groups = [
            {"params": own[:1]},
            {"params": own[1:2], "adaptive": True, "eta": 0.5},
            {"params": own[2:], "rho": 0.0},
        ]
        optimizers.append(make(groups, name))
    for seed in range(3):
        give_grads(wanted, seed)
        copy_grads(wanted, params)
        for optimizer in optimizers:
            optimizer.param_groups[0]["rho"] = 0.5 * (seed + 1)
            optimizer.first_step()
        assert_same_bits([p.cpu() for p in params], wanted)
        for optimizer in optimizers:
            optimizer.restore()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 0.0])
@parametrize_kinds
def test_a_norm_that_is_not_finite_or_zero_perturbs_nothing(
    kind: str, bad: float, engine: str, device: torch.device
) -> None:
    params = on(device, parameters([(5,), (70,)], torch.float32))
    optimizer = make(params, engine, kind)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    params[1].grad[3] = bad
    optimizer.first_step()
    assert_same_bits(params, before)
    optimizer.restore()
    assert_same_bits(params, before)


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (pyoptim.SGD, {}),
    "capturable_adamw": (pyoptim.AdamW, {"capturable": True}),
}


@pytest.mark.parametrize("base", BASES)
@parametrize_kinds
def test_the_host_never_reads_the_norm(
    kind: str, base: str, engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = on(device, parameters([(5,), (70,)], torch.float32))
    optimizer = make(params, engine, kind, BASES[base][0], **BASES[base][1])
    for read in (False, True):
        give_grads(params, read)
        for p in params:
            p.grad = p.grad.to(device)
        if read:
            for name in ("item", "__float__", "__bool__", "__int__", "tolist"):
                monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("read a tensor"))
        optimizer.first_step()
        optimizer.second_step()
    monkeypatch.undo()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("overflow", ["first", "second"])
def test_an_overflow_in_either_pass_leaves_no_trace(
    overflow: str, engine: str, device: torch.device
) -> None:
    wanted = parameters([(5, 3), (70,)], torch.float32)
    params = on(device, wanted)
    base: Any = pyoptim.AdamW
    actual, expected = make(params, engine, base=base), make(wanted, "cpu", base=base)
    for seed in range(4):
        for optimizer, own, where in ((actual, params, device), (expected, wanted, CPU)):
            is_lost = seed in (0, 2)
            give_grads(wanted, 2 * seed)
            copy_grads(wanted, own)
            if is_lost and overflow == "first":
                own[0].grad[0, 0] = torch.inf
            before = [p.detach().clone() for p in own]
            optimizer.first_step()
            give_grads(wanted, 2 * seed + 1)
            copy_grads(wanted, own)
            scaled_step(optimizer, 8.0, is_lost and overflow == "second", where)
            changed = [not torch.equal(p, b) for p, b in zip(own, before, strict=True)]
            assert changed == [not is_lost] * 2
        assert_same_bits([p.cpu() for p in params], wanted, f"step {seed}")


def test_a_loss_is_all_that_a_step_needs(engine: str, device: torch.device) -> None:
    results = []
    for name, where in ((engine, device), (("cpu"), CPU)):
        params = on(where, parameters([(5, 3), (70,)], torch.float64))
        optimizer = make(params, name, "asam")
        losses = [
            optimizer.step(lambda p=params: sum(q.square().sum() for q in p)).detach().cpu()
            for _ in range(4)
        ]
        assert losses == sorted(losses, reverse=True)
        results.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(*results, rtol=1e-14, atol=0.0)
