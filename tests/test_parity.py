"""Every optimizer, option and dtype against torch.optim.

Each step against torch's for-loop in float64, from our values; and whole runs against torch's
for-loop, foreach and fused implementations in the same dtype.
"""

import pytest
import torch
from cases import (
    COMPLEX,
    DTYPE_IDS,
    FLOATS,
    HALVES,
    PROJECTING,
    ROWS,
    SGD,
    TORCH_CASES,
    UNIT,
    Case,
    Row,
    allowed_error,
    as_wide,
    assert_within,
    give_grads,
    parameters,
    parametrize_cases,
    parametrize_dtypes,
    states_of,
    values,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pyoptim.optimizer import FusedOptimizer

SHAPES = ((3, 5), (67,), (), (2, 1, 9))  # a body, tails, one element
STEPS = 3
IMPLEMENTATIONS = ("for-loop", "foreach", "fused")


def wide_copy(case: Case, optimizer: FusedOptimizer) -> Optimizer:
    """torch's for-loop in float64, in exactly the state that `optimizer` is in now."""
    params = [Parameter(as_wide(p)) for p in optimizer.param_groups[0]["params"]]
    copy = case.torchs(params)
    for p, q in zip(params, optimizer.param_groups[0]["params"], strict=True):
        p.grad = as_wide(q.grad)
        for name, value in optimizer.state.get(q, {}).items():
            copy.state[p][name] = value.clone() if name == "step" else as_wide(value)
    return copy


@parametrize_cases(TORCH_CASES)
@parametrize_dtypes((*FLOATS, *COMPLEX))
def test_each_step_is_torchs_step_in_float64(case: Case, dtype: torch.dtype) -> None:
    params = parameters(SHAPES, dtype)
    optimizer = case.ours(params)
    for t in range(STEPS):
        give_grads(params, seed=t)
        truth = wide_copy(case, optimizer)
        before = [as_wide(p) for p in params]
        old_states = [as_wide(s) for s in states_of(truth)]
        optimizer.step()
        truth.step()
        for p, true, old in zip(params, truth.param_groups[0]["params"], before, strict=True):
            allowed = allowed_error(dtype, as_wide(true), old)
            assert_within(p, true, allowed, f"step {t}, parameter of shape {tuple(p.shape)}")
        news, trues = states_of(optimizer), states_of(truth)
        olds = old_states or [torch.zeros_like(s) for s in trues]
        for s, true, old in zip(news, trues, olds, strict=True):
            assert s.dtype == dtype
            allowed = allowed_error(dtype, as_wide(true), old)
            assert_within(s, true, allowed, f"step {t}, state of shape {tuple(s.shape)}")


def implementations(row: Row, dtype: torch.dtype) -> list[str]:
    """torch's implementations that exist for `dtype` and whose own result is right."""
    names = ["for-loop", "foreach"]
    # torch 2.13's fused SGD is wrong on the CPU for half-precision tensors of 16 elements and more.
    is_right = not (row is SGD and dtype in HALVES)
    return [*names, "fused"] if row.has_fused and not dtype.is_complex and is_right else names


RUNS = [
    pytest.param(case, dtype, name, id=f"{case}-{DTYPE_IDS[dtype]}-{name}")
    for case in TORCH_CASES
    for dtype in (*FLOATS, *COMPLEX)
    for name in implementations(case.row, dtype)
]


def run(optimizer: Optimizer) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    for t in range(STEPS):
        # The same gradients in every dtype, float64 included: exact in bfloat16 and in float16.
        for i, p in enumerate(params):
            p.grad = (
                values(p.shape, p.dtype, 1000 * t + i).to(COARSE[p.dtype.is_complex]).to(p.dtype)
            )
        optimizer.step()
    return params


COARSE = {False: torch.bfloat16, True: torch.complex64}


def start(dtype: torch.dtype) -> list[Parameter]:
    coarse = [values(s, dtype, 100 + i).to(COARSE[dtype.is_complex]) for i, s in enumerate(SHAPES)]
    return [Parameter(c.to(dtype)) for c in coarse]


@pytest.mark.parametrize(("case", "dtype", "name"), RUNS)
def test_a_run_follows_torchs(case: Case, dtype: torch.dtype, name: str) -> None:
    flags = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    wide = torch.complex128 if dtype.is_complex else torch.float64
    ours = run(case.ours(start(dtype)))
    torchs = run(case.torchs(start(dtype), **flags[name]))
    truth = run(case.torchs(start(wide)))
    check = compare_half if dtype in HALVES else compare_full
    check(dtype, ours, torchs, truth, start(wide))


def compare_full(
    dtype: torch.dtype,
    ours: list[Tensor],
    torchs: list[Tensor],
    truth: list[Tensor],
    before: list[Parameter],
) -> None:
    # Errors of a step reach the later ones undamped at most: STEPS of them, each in up to STEPS
    # updates.
    for p, q, true, old in zip(ours, torchs, truth, before, strict=True):
        allowed = allowed_error(dtype, as_wide(true), as_wide(old), arithmetic=STEPS * STEPS)
        assert_within(p, true, allowed, "from the truth")
        assert_within(p, as_wide(q), 2 * allowed, "from torch")


def compare_half(
    dtype: torch.dtype,
    ours: list[Tensor],
    torchs: list[Tensor],
    truth: list[Tensor],
    before: list[Parameter],
) -> None:
    """torch rounds after every operation: ours must not be further from the truth.

    One rounding a step, where the truth has none, puts single elements further off by chance: so
    the mean over all elements is compared, and it may exceed torch's by a tenth of a rounding.
    """

    def mean_error(results: list[Tensor]) -> float:
        errors = [
            ((as_wide(p) - as_wide(t)).abs() / as_wide(t).abs().maximum(as_wide(b).abs())).flatten()
            for p, t, b in zip(results, truth, before, strict=True)
        ]
        # Where float16's eps rounds to 0, torch's for-loop divides by zero: an error of 1, as large
        # as the value.
        return torch.cat(errors).nan_to_num(1.0).clamp(max=1.0).mean().item()

    assert mean_error(ours) <= 1.1 * mean_error(torchs) + 0.1 * UNIT[dtype]
    assert mean_error(ours) <= 2 * STEPS * UNIT[dtype]


def test_every_row_has_a_case_for_every_kernel() -> None:
    for row in (*ROWS, *PROJECTING):
        assert set(row.kernels) <= set(row.options), row.ours
