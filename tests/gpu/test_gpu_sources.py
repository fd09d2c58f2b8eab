"""A step that reads parameters from copies, as SAM's second, is that of the parameters restored."""

from collections.abc import Sequence
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
    parametrize_kernel_dtypes,
    values,
)
from test_gpu_step import SHAPES, assert_same_optimizers, copy_grads, on, shift
from torch import Tensor
from torch.nn import Parameter

ADAMW = next(c for c in KERNEL_CASES if str(c) == "adamw-plain")


def step_from(optimizer: Any, sources: list[Tensor | None]) -> None:
    optimizer._sources = sources
    try:
        optimizer.step()
    finally:
        del optimizer._sources


def moved_away(params: Sequence[Parameter], seed: int) -> list[Tensor | None]:
    """Copies of all parameters but the first, which are then spoilt."""
    copies: list[Tensor | None] = [None, *(p.detach().clone() for p in params[1:])]
    with torch.no_grad():
        for i, p in enumerate(params[1:]):
            p.copy_(values(p.shape, p.dtype, 77 * seed + i))
    return copies


def compare(
    actual: Any, expected: Any, params: list[Parameter], wanted: list[Parameter], n: int
) -> None:
    for step in range(n):
        give_grads(wanted, step)
        copy_grads(wanted, params)
        sources = moved_away(params, step)
        kept = [None if s is None else s.clone() for s in sources]
        step_from(actual, sources)
        expected.step()
        assert_same_optimizers(actual, expected, params, wanted, f"step {step}")
        pairs = [(s, k) for s, k in zip(sources, kept, strict=True) if s is not None]
        assert_same_bits([s for s, _ in pairs], [k for _, k in pairs], "sources")


@parametrize_cases(KERNEL_CASES)
@parametrize_kernel_dtypes
def test_every_kernel_reads_from_copies(
    case: Case, dtype: torch.dtype, state_dtype: Any, engine: str, device: torch.device
) -> None:
    wanted = parameters(SHAPES, dtype)
    params = on(device, wanted)
    actual = case.ours(params, backend=engine, state_dtype=state_dtype)
    expected = case.ours(wanted, backend="cpu", state_dtype=state_dtype)
    compare(actual, expected, params, wanted, 2)  # the second step walks the plan


def test_copies_may_be_misaligned(engine: str, device: torch.device) -> None:
    wanted = parameters([(67,), (130,), (5, 6)], torch.float32)
    params = on(device, wanted)
    actual, expected = ADAMW.ours(params, backend=engine), ADAMW.ours(wanted, backend="cpu")
    for step in range(2):
        give_grads(wanted, step)
        copy_grads(wanted, params)
        sources: list[Any] = [shift(p.detach()) for p in params]
        with torch.no_grad():
            for p in params:
                p.zero_()
        step_from(actual, sources)
        expected.step()
        assert_same_optimizers(actual, expected, params, wanted, f"step {step}")


def test_more_rows_than_a_launch_takes(engine: str, device: torch.device) -> None:
    """With copies a table of the CUDA engine has half as many rows (325 of AdamW)."""
    n = 700 if engine == "cuda" else 40
    wanted = parameters([(3,)] * n, torch.float32)
    params = on(device, wanted)
    actual, expected = ADAMW.ours(params, backend=engine), ADAMW.ours(wanted, backend="cpu")
    compare(actual, expected, params, wanted, 2)


@pytest.mark.parametrize("is_skipped", [False, True], ids=["stepped", "skipped"])
def test_a_skipped_step_writes_nothing(is_skipped: bool, engine: str, device: torch.device) -> None:
    """Whoever lets a GradScaler skip must restore the parameters himself, as SAM does."""
    params = on(device, parameters([(5,), (70,)], torch.float32))
    optimizer = ADAMW.ours(params, backend=engine)
    for step in range(2):
        give_grads(params, step)
        for p in params:
            p.grad = p.grad.to(device)
        sources = moved_away(params, step)
        before = [p.detach().clone() for p in params]
        optimizer.found_inf = torch.tensor(float(is_skipped), device=device)
        step_from(optimizer, sources)
        changed = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
        assert changed == [not is_skipped] * 2
