"""SAM over AdamP and SGDP on a GPU engine: the base step reads the saved weights, whatever it
projects."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import (
    ADAMP,
    SGDP,
    Case,
    assert_same_bits,
    parametrize_cases,
    parametrize_kernel_dtypes,
    values,
)
from projected import DECISIONS, Shape, grad_at
from test_gpu_step import assert_same_optimizers, launch_counter, on, shift
from torch import Tensor
from torch.nn import Parameter

from pyoptim import SAM, plan

# A vector; one row; rows of a thread, of a part of a warp, in pieces, and channels_last.
SHAPES = (
    Shape((9,)),
    Shape((1, 50)),
    Shape((9, 5)),
    Shape((2, 132)),
    Shape((4, 30), (1, 0)),
    Shape((4, 3, 5, 2), (0, 2, 3, 1)),
)
# Rows of several blocks and chunks.
LONG = (Shape((2, 16388)), Shape((12, 1400)))
PLAIN = Case(ADAMP, "weight_decay")
CASES = [
    *(PLAIN, Case(SGDP, "momentum"), Case(SGDP, "nesterov")),
    *(Case(row, "large_decay") for row in (ADAMP, SGDP)),
]


def made(shapes: Sequence[Shape], dtype: torch.dtype) -> tuple[list[Parameter], list[str]]:
    """A parameter for every shape and decision, and the decisions."""
    of = [(shape, decision) for shape in shapes for decision in DECISIONS]
    tensors = [shape.strided(values(shape.sizes, dtype, i)) for i, (shape, _) in enumerate(of)]
    return [Parameter(x) for x in tensors], [decision for _, decision in of]


def sam(case: Case, params: Sequence[Tensor], engine: str, **options: Any) -> SAM:
    return SAM(params, case.row.ours, rho=0.3, backend=engine, **case.options, **options)


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.empty_like(p).copy_(g)


def grads_of(
    wanted: Sequence[Tensor], decisions: Sequence[str], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """For the first step any, for the second those that lead to the decisions at these weights."""
    first = [values(tuple(p.shape), torch.float64, 500 * seed + i) for i, p in enumerate(wanted)]
    pairs = zip(wanted, decisions, strict=True)
    return first, [grad_at(p, d, 500 * seed + 200 + i) for i, (p, d) in enumerate(pairs)]


def perturb(
    optimizers: Sequence[tuple[SAM, Sequence[Tensor]]], first: list[Tensor], second: list[Tensor]
) -> None:
    """Up to where the second gradients are there."""
    for optimizer, params in optimizers:
        set_grads(params, first)
        optimizer.first_step()
        set_grads(params, second)


def restored_step(optimizer: SAM) -> None:
    """The second step in two passes: what the one pass is to equal."""
    optimizer.restore()
    optimizer.base_optimizer.step()


def no_copying_to(params: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tensor.copy_

    def copy(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert all(self is not p for p in params), "copied weights back"
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "copy_", copy)
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *_: pytest.fail("copied weights back"))


def compare(
    case: Case,
    engine: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[Shape] = SHAPES,
    n_steps: int = 1,
    **options: Any,
) -> None:
    """Both steps by the engine and by the CPU engine, which restores the weights."""
    wanted, decisions = made(shapes, dtype)
    params = on(device, wanted)
    actual, expected = sam(case, params, engine, **options), sam(case, wanted, "cpu", **options)
    places = [p.data_ptr() for p in params]
    for step in range(n_steps):
        perturb([(actual, params), (expected, wanted)], *grads_of(wanted, decisions, step))
        perturbed = [p.detach().clone() for p in params]
        with pytest.MonkeyPatch.context() as patch:
            no_copying_to(params, patch)
            if step:
                patch.setattr(plan, "_step_rows", lambda *_: pytest.fail("no plan"))
            actual.second_step()
        restored_step(expected)
        assert_same_optimizers(actual, expected, params, wanted, f"{case} step {step}")
        assert not any(torch.equal(p, q) for p, q in zip(params, perturbed, strict=True))
    assert [p.data_ptr() for p in params] == places


@parametrize_cases(CASES)
def test_both_steps_equal_the_cpu_without_a_restoring_pass(
    case: Case, engine: str, device: torch.device
) -> None:
    compare(case, engine, device, n_steps=2)


@parametrize_kernel_dtypes
def test_every_dtype_equals_the_cpu(
    dtype: torch.dtype, state_dtype: torch.dtype | None, engine: str, device: torch.device
) -> None:
    compare(PLAIN, engine, device, dtype, SHAPES[:3], state_dtype=state_dtype)


@parametrize_cases([PLAIN, Case(SGDP, "large_decay")])
def test_tensors_of_several_blocks_equal_the_cpu(
    case: Case, engine: str, device: torch.device
) -> None:
    compare(case, engine, device, shapes=LONG)


def test_asam_and_clipping_equal_the_cpu(engine: str, device: torch.device) -> None:
    compare(PLAIN, engine, device, adaptive=True, max_grad_norm=0.5)


@parametrize_cases([PLAIN, Case(SGDP, "momentum")])
def test_both_steps_equal_the_reference(case: Case, engine: str, device: torch.device) -> None:
    wanted, decisions = made(SHAPES[2:5], torch.float64)
    params = on(device, wanted)
    actual, expected = sam(case, params, engine), sam(case, wanted, "reference")
    for step in range(2):
        perturb([(actual, params), (expected, wanted)], *grads_of(wanted, decisions, step))
        actual.second_step()
        expected.second_step()
        # What was stored before it was projected may differ in a bit, as the norm may.
        torch.testing.assert_close(
            [p.detach().cpu() for p in params],
            [p.detach() for p in wanted],
            rtol=1e-12,
            atol=1e-14,
        )


@parametrize_cases(CASES[:2])
def test_the_second_step_takes_the_launches_of_a_base_step(
    case: Case, engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, decisions = made(SHAPES[:3], torch.float32)
    params, restored = on(device, wanted), on(device, wanted)
    actual, expected = sam(case, params, engine), sam(case, restored, engine)
    count = launch_counter(engine, monkeypatch)
    perturb([(actual, params), (expected, restored)], *grads_of(wanted, decisions, 0))
    expected.restore()
    begin = count()
    actual.second_step()
    middle = count()
    expected.base_optimizer.step()
    assert middle - begin == count() - middle > 0
    assert_same_bits(params, restored)


# numpy's, about the arithmetic of inf in Triton's interpreter.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@parametrize_cases(CASES[:2])
def test_a_second_gradient_that_is_not_finite_goes_where_the_cpu_sends_it(
    case: Case, bad: float, engine: str, device: torch.device
) -> None:
    wanted, decisions = made(SHAPES, torch.float32)
    params = on(device, wanted)
    actual, expected = sam(case, params, engine), sam(case, wanted, "cpu")
    first, second = grads_of(wanted, decisions, 0)
    for g in second[::2]:
        g[(-1,) * g.dim()] = bad
    perturb([(actual, params), (expected, wanted)], first, second)
    actual.second_step()
    restored_step(expected)
    assert_same_optimizers(actual, expected, params, wanted)


def test_misaligned_weights_and_such_with_gaps_equal_the_cpu(
    engine: str, device: torch.device
) -> None:
    """Of the third nothing but a dense copy can be stepped, which starts from what was saved."""
    plain, decisions = made((Shape((2, 132)),), torch.float32)
    odd = [Parameter(shift(p.detach().to(device))) for p in plain]
    odd[2].data = torch.zeros(2, 264, device=device)[:, ::2].copy_(odd[2].detach())
    actual, expected = sam(PLAIN, odd, engine), sam(PLAIN, plain, "cpu")
    for step in range(2):
        first, second = grads_of(plain, decisions, step)
        for optimizer, params in ((actual, odd), (expected, plain)):
            for grads, do in ((first, optimizer.first_step), (second, optimizer.second_step)):
                set_grads(params, grads)
                do()
        assert_same_optimizers(actual, expected, odd, plain, f"step {step}")
    room = odd[0].untyped_storage().tolist()
    seven = torch.tensor([7.0]).untyped_storage().tolist()
    assert (room[:4], room[-4:]) == (seven, seven)


def test_parameters_without_a_second_gradient_are_restored_beside_it(
    engine: str, device: torch.device
) -> None:
    wanted, decisions = made(SHAPES[:3], torch.float32)
    params = on(device, wanted)
    actual, expected = sam(PLAIN, params, engine), sam(PLAIN, wanted, "cpu")
    for step in range(2):
        perturb([(actual, params), (expected, wanted)], *grads_of(wanted, decisions, step))
        params[3 * step].grad = wanted[3 * step].grad = None
        actual.second_step()
        restored_step(expected)
        assert_same_bits([p.cpu() for p in params], wanted, f"step {step}")
