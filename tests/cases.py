"""One row per optimizer, the values that tests feed it, and how far two results may lie apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import pyoptim
from pyoptim.optimizer import FusedOptimizer

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64)
HALVES = (torch.bfloat16, torch.float16)
DTYPE_IDS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.complex128: "complex128",
    torch.complex64: "complex64",
}
# (parameter, state_dtype): every combination that has a kernel.
KERNEL_DTYPES = [(d, None) for d in FLOATS] + [(d, torch.float32) for d in HALVES]


@dataclass(frozen=True)
class Row:
    """An optimizer: its class, torch's, and named option sets."""

    ours: type[FusedOptimizer]
    torchs: type[Optimizer] | None  # None: torch has none
    has_fused: bool  # torch has a fused implementation on the CPU
    options: Mapping[str, Mapping[str, Any]]
    kernels: tuple[
        str, ...
    ]  # one option set per variant of the rule: together they reach every kernel


@dataclass(frozen=True, repr=False)
class Case:
    """An optimizer with one option set."""

    row: Row
    options_id: str

    def __str__(self) -> str:
        return f"{self.row.ours.__name__.lower()}-{self.options_id}"

    __repr__ = __str__

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.row.options[self.options_id])

    def ours(self, params: Iterable[Any], **more: Any) -> FusedOptimizer:
        return self.row.ours(params, **{**self.options, **more})

    def torchs(self, params: Iterable[Any], **more: Any) -> Optimizer:
        """torch's optimizer; its for-loop, unless `more` asks for another implementation."""
        assert self.row.torchs is not None, "not among TORCH_CASES"
        more = {"foreach": False, **more} if "fused" not in more else more
        return self.row.torchs(params, **{**self.options, **more})

    @property
    def state_names(self) -> tuple[str, ...]:
        return self.row.ours.state_names(self.ours([torch.zeros(1)]).param_groups[0])


SGD = Row(
    pyoptim.SGD,
    torch.optim.SGD,
    has_fused=True,
    options={
        "plain": {"lr": 0.1},
        "weight_decay": {"lr": 0.1, "weight_decay": 0.2},
        "momentum": {"lr": 0.1, "momentum": 0.9},
        "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
        "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        "maximize": {"lr": 0.1, "maximize": True},
        "nesterov_weight_decay_maximize": {
            "lr": 0.1,
            "momentum": 0.8,
            "nesterov": True,
            "weight_decay": 0.2,
            "maximize": True,
        },
    },
    kernels=("weight_decay", "nesterov"),
)
ADAM = Row(
    pyoptim.Adam,
    torch.optim.Adam,
    has_fused=True,
    options={
        "plain": {"lr": 0.05},
        "weight_decay": {"lr": 0.05, "weight_decay": 0.2},
        "decoupled": {"lr": 0.05, "weight_decay": 0.2, "decoupled_weight_decay": True},
        "amsgrad": {"lr": 0.05, "amsgrad": True},
        "maximize": {"lr": 0.05, "maximize": True},
        "amsgrad_weight_decay_maximize": {
            "lr": 0.05,
            "betas": (0.8, 0.95),
            "eps": 1e-3,
            "amsgrad": True,
            "weight_decay": 0.2,
            "maximize": True,
        },
    },
    kernels=("weight_decay", "amsgrad"),
)
ADAMW = Row(
    pyoptim.AdamW,
    torch.optim.AdamW,
    has_fused=True,
    options={
        "plain": {"lr": 0.05},
        "no_weight_decay": {"lr": 0.05, "weight_decay": 0},
        "amsgrad": {"lr": 0.05, "weight_decay": 0.2, "amsgrad": True},
        "maximize": {"lr": 0.05, "weight_decay": 0.2, "maximize": True},
        "amsgrad_maximize": {
            "lr": 0.05,
            "betas": (0.8, 0.95),
            "eps": 1e-3,
            "amsgrad": True,
            "weight_decay": 0.2,
            "maximize": True,
        },
    },
    kernels=("plain",),
)
RMSPROP = Row(
    pyoptim.RMSprop,
    torch.optim.RMSprop,
    has_fused=False,
    options={
        "plain": {"lr": 0.05},
        "momentum": {"lr": 0.05, "momentum": 0.9},
        "centered": {"lr": 0.05, "centered": True},
        "momentum_centered": {"lr": 0.05, "momentum": 0.9, "centered": True},
        "weight_decay": {"lr": 0.05, "weight_decay": 0.2},
        "maximize": {"lr": 0.05, "maximize": True},
        "momentum_centered_weight_decay_maximize": {
            "lr": 0.05,
            "alpha": 0.9,
            "eps": 1e-3,
            "momentum": 0.8,
            "centered": True,
            "weight_decay": 0.2,
            "maximize": True,
        },
    },
    kernels=("weight_decay", "momentum", "centered", "momentum_centered"),
)
ADAGRAD = Row(
    pyoptim.Adagrad,
    torch.optim.Adagrad,
    has_fused=True,
    options={
        "plain": {"lr": 0.1},
        "lr_decay": {"lr": 0.1, "lr_decay": 0.1},
        "weight_decay": {"lr": 0.1, "weight_decay": 0.2},
        "initial_accumulator_value": {"lr": 0.1, "initial_accumulator_value": 0.5},
        "maximize": {"lr": 0.1, "maximize": True},
        "lr_decay_weight_decay_maximize": {
            "lr": 0.1,
            "lr_decay": 0.2,
            "eps": 1e-3,
            "initial_accumulator_value": 0.1,
            "weight_decay": 0.2,
            "maximize": True,
        },
    },
    kernels=("weight_decay",),
)
EXPECTIGRAD = Row(
    pyoptim.Expectigrad,
    None,
    has_fused=False,
    options={
        "plain": {"lr": 0.05},
        "no_momentum": {"lr": 0.05, "beta": 0},
        "dense_counter": {"lr": 0.05, "sparse_counter": False},
        "dense_counter_no_momentum": {"lr": 0.05, "beta": 0, "sparse_counter": False},
        "eps_maximize": {"lr": 0.05, "beta": 0.5, "eps": 1e-2, "maximize": True},
    },
    kernels=("plain", "no_momentum", "dense_counter", "dense_counter_no_momentum"),
)
ADAMP = Row(
    pyoptim.AdamP,
    None,
    has_fused=False,
    options={
        "plain": {"lr": 0.05},
        "weight_decay": {"lr": 0.05, "weight_decay": 0.2},
        "always": {"lr": 0.05, "weight_decay": 0.2, "delta": 1e6},
        "large_decay": {"lr": 0.5, "weight_decay": 1.2, "wd_ratio": 0.3},
        "nesterov_maximize": {
            "lr": 0.05,
            "betas": (0.8, 0.95),
            "eps": 1e-3,
            "weight_decay": 0.2,
            "delta": 0.2,
            "wd_ratio": 0.5,
            "nesterov": True,
            "maximize": True,
        },
    },
    kernels=("weight_decay", "nesterov_maximize"),
)
SGDP = Row(
    pyoptim.SGDP,
    None,
    has_fused=False,
    options={
        "plain": {"lr": 0.1},
        "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02},
        "always": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "delta": 1e6},
        "large_decay": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.12, "wd_ratio": 0.3},
        "dampening": {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "maximize": True},
        "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
        "own_buffer": {"lr": 0.1, "momentum": 0.9, "project_buffer": False},
    },
    kernels=("momentum", "nesterov", "own_buffer"),
)
PROJECTING = (ADAMP, SGDP)
ROWS = (SGD, ADAM, ADAMW, RMSPROP, ADAGRAD, EXPECTIGRAD)

CASES = [Case(row, name) for row in ROWS for name in row.options]
KERNEL_CASES = [Case(row, name) for row in ROWS for name in row.kernels]
# With those that run on the CPU only.
CPU_KERNEL_CASES = [*KERNEL_CASES, *(Case(r, name) for r in PROJECTING for name in r.kernels)]
# Those that torch.optim is an oracle for.
TORCH_CASES = [case for case in CASES if case.row.torchs is not None]
TORCH_KERNEL_CASES = [case for case in KERNEL_CASES if case.row.torchs is not None]


def parametrize_cases(cases: Sequence[Case] = CASES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def parametrize_dtypes(dtypes: Sequence[torch.dtype]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes, ids=DTYPE_IDS.__getitem__)


parametrize_kernel_dtypes = pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    KERNEL_DTYPES,
    ids=[DTYPE_IDS[d] + ("_state32" if s else "") for d, s in KERNEL_DTYPES],
)


def examples(count: int) -> settings:
    """At least `count` examples; more where the Hypothesis profile asks for more."""
    return settings(max_examples=max(count, settings.default.max_examples))


# -- values ----------------------------------------------------------------------------------------


def values(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values; the same for every dtype of one seed, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), dtype=wide, generator=generator).to(dtype)


def parameters(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, seed: int = 0
) -> list[Parameter]:
    return [Parameter(values(shape, dtype, 1000 * seed + i)) for i, shape in enumerate(shapes)]


def give_grads(params: Sequence[Tensor], seed: int) -> None:
    """Gradients that depend on the seed only."""
    for i, p in enumerate(params):
        p.grad = values(p.shape, p.dtype, 1000 * seed + 500 + i)


def states_of(optimizer: Optimizer) -> list[Tensor]:
    """Every state tensor but the step counters, in order of parameters and names."""
    entries = (optimizer.state[p] for g in optimizer.param_groups for p in g["params"])
    return [
        entry[n] for entry in entries for n in sorted(entry) if n != "step" and entry[n] is not None
    ]


# -- comparing -------------------------------------------------------------------------------------

# Unit roundoff: half the distance from 1 to the next number, 2^-(bits of the significand).
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.complex128: 2.0**-53,
    torch.complex64: 2.0**-24,
}
# Half the distance between subnormals: the rounding error of a value however small.
TINY = {
    torch.float64: 0.0,
    torch.float32: 2.0**-150,
    torch.bfloat16: 2.0**-134,
    torch.float16: 2.0**-25,
}
# The type that the arithmetic runs in has this unit roundoff.
COMPUTE_UNIT = {d: UNIT[torch.float32] if d in HALVES else UNIT[d] for d in UNIT}
# Roundings on the longest way through a rule (Adam with amsgrad, weight decay and maximize): 2 in g
# + wd*w, 3 in m, 4 in v that the root halves, the root, its correction and that constant, + eps,
# m/denom, step_size and that constant, the last subtraction. Each moves the result by at most one
# unit roundoff of a term no larger than `scale` below.
ROUNDINGS = 16


def allowed_error(
    dtype: torch.dtype, truth: Tensor, before: Tensor, stores: int = 1, arithmetic: int = 1
) -> Tensor:
    """How far one update in `dtype` may lie from the float64 `truth` of the same update.

    One rounding to nearest when the result is stored, and ROUNDINGS of the arithmetic, on terms as
    large as the old value and the largest step. `stores` and `arithmetic` count them for several
    updates, or several implementations.
    """
    step = (truth - before).abs().max() if truth.numel() else truth.abs().sum()
    scale = truth.abs().maximum(before.abs()) + step
    stored = UNIT[dtype] * truth.abs() if COMPUTE_UNIT[dtype] != UNIT[dtype] else 0.0
    return (
        stores * (stored + TINY.get(dtype, 0.0))
        + arithmetic * ROUNDINGS * COMPUTE_UNIT[dtype] * scale
    )


def as_wide(tensor: Tensor) -> Tensor:
    """An exact copy in float64 or complex128."""
    tensor = tensor.detach()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit; NaNs are equal whatever their payload."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    t = t.detach()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    nan = t.isnan()
    return (torch.where(nan, torch.nan, t) if nan.any() else t.contiguous()).view(integer)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str = "") -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if same_bits(a, e):
            continue
        kinds = [(t.dtype, tuple(t.shape)) for t in (a, e)]
        assert kinds[0] == kinds[1], f"{what} tensor {i}"
        differs = (_bits(a) != _bits(e)).flatten()
        k = int(differs.nonzero()[0])
        pair = [
            (torch.view_as_real(t) if t.is_complex() else t).flatten()[k].item() for t in (a, e)
        ]
        raise AssertionError(
            f"{what} tensor {i} {kinds[0]}: {int(differs.sum())} of {differs.numel()} differ, "
            f"the first at {k}: {pair[0]!r} is not {pair[1]!r}"
        )


def assert_within(actual: Tensor, truth: Tensor, allowed: Tensor, what: str = "") -> None:
    """Non-finite values must agree; finite ones may differ by `allowed`."""
    actual, truth = as_wide(actual), as_wide(truth)
    if actual.is_complex():
        actual, truth = torch.view_as_real(actual), torch.view_as_real(truth)
        allowed = allowed[..., None].expand_as(truth)
    error = torch.where(actual == truth, 0.0, (actual - truth).abs())
    error = torch.where(actual.isnan() & truth.isnan(), 0.0, error)
    wrong = ~(error <= allowed)
    if wrong.any():
        k = int(wrong.flatten().nonzero()[0])
        worst = (error / allowed).nan_to_num(torch.inf).max().item()
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} are wrong, by up to {worst:.3g} times "
            f"what is allowed; the first at {k}: {actual.flatten()[k].item()!r}, "
            f"truth {truth.flatten()[k].item()!r}"
        )
