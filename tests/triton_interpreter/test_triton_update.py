"""The Triton update gives the bits of the CPU engine, and touches nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    ADAM,
    ADAMW,
    KERNEL_CASES,
    PROJECTING,
    RMSPROP,
    SGD,
    Case,
    assert_same_bits,
    parametrize_cases,
    parametrize_kernel_dtypes,
    values,
)
from guarded import NAMES, Guarded, block, int64, prepared
from torch import Tensor
from torch.nn import Parameter

from pyoptim import backend
from pyoptim.kernels import engine

pytestmark = [
    pytest.mark.native,
    # numpy's, about the arithmetic of NaN and inf in the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]
CPU = torch.device("cpu")
# The others have tests of their own.
UPDATE_CASES = [case for case in KERNEL_CASES if case.row not in PROJECTING]
# Around the block of 64 (32 in float64) and the chunk of 128 elements; a vector is 2 to 8.
SIZES = (0, 1, 7, 31, 33, 63, 64, 65, 127, 128, 129, 300)
STEP = 4.0  # of the update under test


@dataclass
class Factors:
    inv_scale: float = 1.0
    grad_scale: Tensor | None = None
    clip: float = 1.0
    clip_at: Tensor | None = None
    found_inf: Tensor | None = None


@dataclass
class Step:
    """The same rows for both engines: row i is aligned if i is even, and in group i // 2 % 2."""

    case: Case
    dtype: torch.dtype
    state_dtype: torch.dtype | None = None
    sizes: Sequence[int] = SIZES
    seed: int = 0
    is_special: bool = False  # NaN, inf, zeros and subnormals among the gradients
    grad_factor: float = 1.0  # multiplies the gradients that the CPU engine is given
    arrays: list[list[Guarded]] = field(init=False)  # [param, grad, *states][row]

    def __post_init__(self) -> None:
        state = self.state_dtype or self.dtype
        dtypes = [self.dtype, self.dtype, *(state for _ in self.case.state_names)]
        self.arrays = [
            [Guarded(self._initial(k, i, n, d), i % 2 == 0) for i, n in enumerate(self.sizes)]
            for k, d in enumerate(dtypes)
        ]

    def _initial(self, array: int, row: int, numel: int, dtype: torch.dtype) -> Tensor:
        x = values((numel,), dtype, 100 * self.seed + 10 * row + array)
        if array == 1 and self.is_special:
            tiny = torch.finfo(dtype).smallest_normal / 4
            special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, -tiny]
            x[: len(special)] = torch.tensor(special[:numel], dtype=dtype)
        return x.abs() if array >= 2 else x  # a variance has no sign

    # -- the CPU engine ----------------------------------------------------------------------------

    def optimizer(self) -> Any:
        """The case's optimizer over copies of the arrays, two groups, just before its step."""
        groups: list[list[Parameter]] = [[], []]
        params = [Parameter(a.values.clone()) for a in self.arrays[0]]
        for i, p in enumerate(params):
            groups[i // 2 % 2].append(p)
        made = self.case.ours(
            [{"params": groups[0]}, {"params": groups[1], "lr": 0.03, "weight_decay": 0.0}],
            state_dtype=self.state_dtype,
            backend="cpu",
        )
        for i, p in enumerate(params):
            p.grad = self.arrays[1][i].values * self.grad_factor
            of_row = zip(made.state_names(made.defaults), self.arrays[2:], strict=True)
            made.state[p] = {name: array[i].values.clone() for name, array in of_row}
            if made.counts_steps:
                made.state[p]["step"] = torch.tensor(STEP - 1)
        return made, params

    def expected(self, scale: float | None = None) -> list[list[Tensor]]:
        made, params = self.optimizer()
        if scale is not None:
            made.grad_scale, made.found_inf = torch.tensor(scale), torch.tensor(0.0)
        made.step()
        names = made.state_names(made.defaults)
        states = [[made.state[p][name] for p in params] for name in names]
        return [[p.detach() for p in params], [p.grad for p in params], *states]

    # -- Triton ------------------------------------------------------------------------------------

    def blocks(self) -> list[bytes]:
        """The hyper-parameters of both groups."""
        made, _ = self.optimizer()
        native = backend.native()
        assert native is not None
        return [
            block(
                prepared(made.rule, native.read_hypers(made.rule, group), STEP),
                self.dtype == torch.float64,
            )
            for group in made.param_groups
        ]

    def groups(self) -> list[int]:
        return [i // 2 % 2 for i in range(len(self.sizes))]

    def addresses(self) -> bytes:
        return int64([a.address for array in self.arrays for a in array])

    def run(
        self,
        factors: Factors | None = None,
        live: Tensor | None = None,
        cache: dict[Any, Any] | None = None,
    ) -> list[list[Tensor]]:
        f = factors or Factors()
        made, _ = self.optimizer()
        rule = made.rule
        names = made.state_names(made.defaults)
        native = backend.native()
        assert native is not None
        variant = native.rule_info(rule)["state_names"].index(names)
        engine.update(
            rule,
            variant,
            NAMES[self.dtype] + ("_state32" if self.state_dtype else ""),
            CPU,
            self.addresses(),
            int64(self.sizes),
            np.array(self.groups(), np.int32).tobytes() if live is None else b"",
            b"".join(self.blocks()) if live is None else b"",
            live,
            *(f.inv_scale, f.grad_scale, f.clip, f.clip_at, f.found_inf),
            {} if cache is None else cache,
        )
        return [[a.values for a in array] for array in self.arrays]

    def check(self, actual: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
        for name, a, e in zip(("param", "grad", "s0", "s1", "s2"), actual, expected, strict=False):
            assert_same_bits(a, e, name)
        assert len(actual) == len(expected)
        assert all(a.is_intact() for array in self.arrays for a in array), "a guard zone is written"


@parametrize_cases(UPDATE_CASES)
@parametrize_kernel_dtypes
def test_update_gives_the_bits_of_the_cpu_engine(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    step = Step(case, dtype, state_dtype)
    expected = step.expected()
    before = [a.values.clone() for a in step.arrays[0]]
    step.check(step.run(), expected)
    assert not torch.equal(torch.cat(before), torch.cat([a.values for a in step.arrays[0]]))


@parametrize_cases(UPDATE_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_special_gradients_give_the_bits_of_the_cpu_engine(case: Case, dtype: torch.dtype) -> None:
    step = Step(case, dtype, None, sizes=(9, 40), is_special=True)
    expected = step.expected()
    step.check(step.run(), expected)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001], ids=hex)
def test_a_nan_of_any_payload_stays_one_in_bfloat16(bits: int) -> None:
    """Rounded like a number, one with every bit set would carry into the sign and become a zero."""
    step = Step(Case(SGD, "momentum"), torch.bfloat16, torch.float32, sizes=(40,))
    step.arrays[2][0].values.view(torch.int32).fill_(bits)
    expected = step.expected()
    assert expected[0][0].isnan().all()
    step.check(step.run(), expected)


@pytest.mark.parametrize("is_live", [False, True], ids=["number", "tensor"])
@parametrize_cases([Case(SGD, "nesterov"), Case(ADAM, "amsgrad")])
@parametrize_kernel_dtypes
def test_unscaled_gradients_are_written_back_rounded_and_read_so(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None, is_live: bool
) -> None:
    scale = 3.0  # 1/3 rounds
    step = Step(case, dtype, state_dtype, sizes=(70, 70, 5, 130))
    expected = step.expected(scale)
    before = [a.values.clone() for a in step.arrays[1]]
    factors = Factors(grad_scale=torch.tensor(scale)) if is_live else Factors(1 / scale)
    step.check(step.run(factors), expected)
    assert not torch.equal(torch.cat(before), torch.cat([a.values for a in step.arrays[1]]))


@pytest.mark.parametrize("is_live", [False, True], ids=["number", "tensor"])
@parametrize_cases([Case(RMSPROP, "momentum_centered"), Case(ADAMW, "plain")])
@parametrize_kernel_dtypes
def test_clip_multiplies_what_the_rule_reads_and_no_gradient(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None, is_live: bool
) -> None:
    """A power of two, by which the CPU engine's gradients can be multiplied without rounding."""
    step = Step(case, dtype, state_dtype, sizes=(70, 70, 5, 130), grad_factor=4.0)
    expected = step.expected()
    expected[1] = [a.values.clone() for a in step.arrays[1]]
    clip = torch.tensor([4.0], dtype=torch.float64)
    step.check(step.run(Factors(clip_at=clip) if is_live else Factors(clip=4.0)), expected)


def test_clip_comes_after_the_rounding_of_unscaled_gradients() -> None:
    """In bfloat16: with lr = 1 and p = 0 the new parameter is minus the gradient that was read."""
    step = Step(Case(SGD, "plain"), torch.bfloat16, sizes=(100, 100))
    for array in step.arrays[0]:
        array.values.zero_()
    grads = [a.values.float() for a in step.arrays[1]]
    unscaled = [(g * torch.tensor(1 / 3)).bfloat16() for g in grads]
    params, written = step.run(Factors(inv_scale=1 / 3, clip=0.7))
    assert_same_bits(written, unscaled)
    rates = (torch.tensor(0.1), torch.tensor(0.1))
    read = [u.float() * torch.tensor(0.7) for u in unscaled]
    assert_same_bits(params, [(0 - r * g).bfloat16() for r, g in zip(rates, read, strict=True)])


@pytest.mark.parametrize("found", [1.0, 2.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_is_written_when_an_infinity_was_found(dtype: torch.dtype, found: float) -> None:
    step = Step(Case(ADAM, "amsgrad"), dtype, sizes=(64, 65, 200))
    before = [[a.values.clone() for a in array] for array in step.arrays]
    scale = torch.tensor([8.0])
    step.check(step.run(Factors(grad_scale=scale, found_inf=torch.tensor([found]))), before)


def test_a_step_without_infinity_is_made() -> None:
    step = Step(Case(ADAM, "amsgrad"), torch.float32, sizes=(64, 65, 200))
    expected = step.expected(8.0)
    scale, none = torch.tensor([8.0]), torch.tensor([0.0])
    step.check(step.run(Factors(grad_scale=scale, found_inf=none)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_live_hyper_parameters_are_read_by_row(dtype: torch.dtype) -> None:
    step = Step(Case(ADAM, "weight_decay"), dtype)
    expected = step.expected()
    blocks = step.blocks()
    data = b"".join(blocks[g] for g in step.groups())
    live = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    step.check(step.run(live=live), expected)


def test_a_first_step_copies_the_gradient_into_the_momentum_buffer() -> None:
    step = Step(Case(SGD, "dampening"), torch.float32, sizes=(70,))
    raw = [0.1, 0.9, 0.3, 0.0, 0.0, 0.0]
    live = torch.from_numpy(
        np.frombuffer(block(prepared("sgd", raw, first=True), False), np.uint8).copy()
    )
    grad = step.arrays[1][0].values.clone()
    assert_same_bits(step.run(live=live)[2], [grad])


def test_a_cache_serves_steps_whose_values_addresses_and_rows_change() -> None:
    cache: dict[Any, Any] = {}
    for seed, sizes in enumerate([SIZES, SIZES, (5, 300), (5, 300), (0, 0), (64, 1, 2)]):
        step = Step(Case(ADAMW, "plain"), torch.float32, sizes=sizes, seed=seed)
        expected = step.expected()
        step.check(step.run(cache=cache), expected)


def test_tables_are_uploaded_only_when_they_change() -> None:
    cache: dict[Any, Any] = {}
    step = Step(Case(ADAMW, "plain"), torch.float32)
    step.run(cache=cache)
    tables = {name: kept[-1] for name, kept in cache.items()}
    step.run(cache=cache)
    assert {name: kept[-1] for name, kept in cache.items()} == tables
    assert all(cache[name][-1] is table for name, table in tables.items())


def test_the_list_of_rules_is_that_of_the_compiled_engine() -> None:
    native = backend.native()
    assert native is not None
    for name, rule in engine.RULES.items():
        info = native.rule_info(name)
        assert tuple(map(len, info["state_names"])) == rule.N_STATES, name
        assert len(info["hyper_names"]) == rule.N_HYPERS, name
        raw = [0.5] * rule.N_HYPERS
        assert len(prepared(name, raw)) == rule.N_FIELDS, name
