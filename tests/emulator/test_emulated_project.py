"""AdamP and SGDP of the CUDA engine in the emulator: the bits of the CPU engine, and no others."""

from collections.abc import Iterator
from dataclasses import replace
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
)
from emulated import RULES, Emulator, Factors, Row
from projected import DECISIONS, SHAPES, Shape, Training, is_intact

from pyoptim import backend

NATIVE = backend.native()
pytestmark = pytest.mark.native

KERNEL_CASES = [Case(row, name) for row in (ADAMP, SGDP) for name in row.kernels]
EVERY_WRITE = [Case(ADAMP, "weight_decay"), Case(SGDP, "momentum")]
DEFERRED = [Case(ADAMP, "large_decay"), Case(SGDP, "large_decay")]
SMALL = tuple(shape for shape in SHAPES if torch.Size(shape.sizes).numel() < 300)
PLAIN = Case(ADAMP, "weight_decay")


@pytest.fixture(autouse=True)
def engine(emulator: Emulator) -> Iterator[None]:
    assert backend.load_cuda_engine(emulator.library._name) is None
    yield
    backend.load_cuda_engine(None)


def check(training: Training, n_steps: int = 2) -> None:
    """Trains the same tensors by both engines."""
    expected = replace(training, offsets=(0,), backend="cpu")
    actual = replace(training, backend="cuda")
    before = [x.clone() for x in actual.arrays()]
    for _ in range(n_steps):
        actual.optimizer.step()
        expected.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())
    actual.check_guards()
    assert any(not torch.equal(a, b) for a, b in zip(actual.arrays(), before, strict=True))


@parametrize_kernel_dtypes
@parametrize_cases(KERNEL_CASES)
def test_bits_are_the_cpu_engines(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    check(Training(case, dtype, state_dtype, SMALL, offsets=(0, 0, 0, 1)), n_steps=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@parametrize_cases(EVERY_WRITE)
def test_rows_of_every_length_have_the_bits_of_the_cpu_engine(
    case: Case, dtype: torch.dtype
) -> None:
    """In float64, which alone shows the last bits of the sums, too."""
    check(Training(case, dtype, shapes=SHAPES), n_steps=1)


@pytest.mark.parametrize("offset", [1, 2], ids=["odd", "even"])
@parametrize_cases(EVERY_WRITE)
def test_bits_do_not_depend_on_alignment(case: Case, offset: int) -> None:
    check(Training(case, shapes=SHAPES[7:], offsets=(offset,)), n_steps=1)


@parametrize_cases(DEFERRED)
def test_a_large_decay_has_the_bits_of_the_cpu_engine(case: Case) -> None:
    check(Training(case, shapes=SMALL))


# A row of more than 16384 elements has several chunks, and a tensor of more several tiles; up to
# 65536 elements of the first rows are checked before the others.
LONG = (
    Shape((3, 16385)),
    Shape((2, 20000), (1, 0)),
    Shape((1, 20000)),
    Shape((2, 70000)),
    Shape((13, 1500)),
    Shape((33, 500)),
    Shape((2100, 8)),
)


@pytest.mark.parametrize("decision", DECISIONS)
@parametrize_cases(EVERY_WRITE)
def test_tensors_of_several_blocks_have_the_bits_of_the_cpu_engine(
    case: Case, decision: str
) -> None:
    dtype = torch.float64 if case is EVERY_WRITE[0] else torch.float32
    check(Training(case, dtype, shapes=LONG, decisions=(decision,)), n_steps=1)


@pytest.mark.parametrize("row", [0, 7, 8, 12])
def test_one_row_that_fails_is_found_wherever_it_is(row: int) -> None:
    """Before the row that fails is only seen by the blocks of the check that come later."""

    def made(name: str) -> Training:
        training = Training(
            PLAIN, shapes=(Shape((13, 1500)),), decisions=("channel",), backend=name
        )
        p = training.params[0]
        assert p.grad is not None
        p.grad[row] += p.detach()[row]
        return training

    actual, expected = made("cuda"), made("cpu")
    actual.optimizer.step()
    expected.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())


@pytest.mark.parametrize("seed", [1, 2])
def test_bits_do_not_depend_on_the_order_of_threads(emulator: Emulator, seed: int) -> None:
    emulator.seed(seed)
    check(Training(PLAIN, shapes=(*SHAPES[6:12], LONG[4])), n_steps=1)


@parametrize_cases(EVERY_WRITE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0], ids=str)
def test_special_values_have_the_bits_of_the_cpu_engine(case: Case, value: float) -> None:
    """One in a gradient, or one in a weight, or all of a row."""

    def made(name: str) -> Training:
        training = Training(case, shapes=SMALL, backend=name)
        for i, p in enumerate(training.params):
            assert p.grad is not None
            if p.numel():
                [p.grad, p.data][i % 2].view_as(p)[(0,) * p.dim()] = value
                if i % 3 == 0 and p.dim() > 1:
                    p.grad[-1] = value
        return training

    actual, expected = made("cuda"), made("cpu")
    for _ in range(2):
        actual.optimizer.step()
        expected.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())


def test_groups_have_their_own_hyper_parameters() -> None:
    # 8 blocks fit in a launch.
    check(Training(PLAIN, shapes=SMALL, n_groups=19), n_steps=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipped_gradients_have_the_bits_of_the_cpu_engine(dtype: torch.dtype) -> None:
    actual, expected = (
        Training(PLAIN, dtype, torch.float32, SMALL, backend=name) for name in ("cuda", "cpu")
    )
    for training in (actual, expected):
        training.optimizer.max_grad_norm = 0.75
        training.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())


# -- copies of the parameters ----------------------------------------------------------------------


def check_copies(training: Training, offset: int = 0, n_steps: int = 1) -> None:
    """Trains the same tensors, on the CUDA engine by steps that read copies of the parameters."""
    expected = replace(training, offsets=(0,), backend="cpu")
    actual = replace(training, backend="cuda")
    for _ in range(n_steps):
        actual.step_from_copies(offset)
        expected.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())
    actual.check_guards()


@parametrize_kernel_dtypes
@parametrize_cases([*KERNEL_CASES, *DEFERRED])
def test_copies_of_every_dtype_are_read(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    """The second step walks a plan, which could not copy anything back."""
    check_copies(Training(case, dtype, state_dtype, SMALL), n_steps=2)


@parametrize_cases([*EVERY_WRITE, *DEFERRED])
def test_copies_of_rows_of_every_length_are_read(case: Case) -> None:
    check_copies(Training(case, torch.float64, shapes=SHAPES))


@pytest.mark.parametrize("decision", DECISIONS)
@parametrize_cases([*EVERY_WRITE, *DEFERRED])
def test_copies_of_tensors_of_several_blocks_are_read(case: Case, decision: str) -> None:
    check_copies(Training(case, shapes=(*LONG[:3], LONG[4]), decisions=(decision,)))


@pytest.mark.parametrize("offsets", [(0, 1), (1, 0), (1, 1)], ids=str)
@parametrize_cases([EVERY_WRITE[0], DEFERRED[1]])
def test_copies_may_be_aligned_unlike_their_parameters(
    case: Case, offsets: tuple[int, int]
) -> None:
    check_copies(Training(case, shapes=SHAPES[7:], offsets=offsets[:1]), offset=offsets[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@parametrize_cases([*EVERY_WRITE, *DEFERRED])
def test_special_values_are_read_from_copies(case: Case, value: float) -> None:
    actual, expected = (Training(case, shapes=SMALL, backend=name) for name in ("cuda", "cpu"))
    for training in (actual, expected):
        for i, p in enumerate(training.params):
            assert p.grad is not None
            if p.numel():
                [p.grad, p.data][i % 2].view_as(p)[(0,) * p.dim()] = value
    actual.step_from_copies()
    expected.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())


def test_groups_read_their_own_copies() -> None:
    check_copies(Training(PLAIN, shapes=SMALL, n_groups=3))


# -- the table of functions ------------------------------------------------------------------------


def rows_of(training: Training, from_copies: bool = False) -> list[Row]:
    """The rows of a training, of one group, for the emulator's own functions.

    Args:
        from_copies: of the parameters, which are NaN themselves from now on.
    """
    rows = []
    for i, p in enumerate(training.params):
        n_rows = p.shape[0] if p.dim() > 1 else 0
        inner = p.stride(0) if n_rows > 1 else p.numel()
        states = tuple(training.optimizer.state[p][name] for name in training.case.state_names)
        assert p.grad is not None
        source = p.detach().clone() if from_copies else None
        if from_copies:
            p.data.fill_(torch.nan)
        rows.append(Row(p.detach(), p.grad, states, i % training.n_groups, n_rows, inner, source))
    return rows


def raw_hypers(training: Training, group: int = 0) -> list[float]:
    options, found = training.optimizer.param_groups[group], []
    for name in NATIVE.rule_info(training.optimizer.rule)["hyper_names"]:
        key, _, index = name.partition(".")
        found.append(float(options[key][int(index)] if index else options[key]))
    return found


def update(
    emulator: Emulator,
    training: Training,
    factors: Factors | None = None,
    is_live: bool = False,
    fail_in: int = 0,
    from_copies: bool = False,
) -> int:
    """One step by Api::update; returns the launches."""
    rule = [name.lower() for name in RULES].index(training.optimizer.rule)
    groups = [raw_hypers(training, g) for g in range(training.n_groups)]
    rows = rows_of(training, from_copies)
    of_rows: list[tuple[Any, int]] = [(torch.tensor(training.step), row.hyper) for row in rows]
    of_groups: list[tuple[Any, int]] = [
        (torch.tensor(training.step), g) for g in range(training.n_groups)
    ]
    hypers = emulator.prepare(rule, groups, of_rows if is_live else of_groups)
    emulator.library.pyoptim_emulator_fail_in(fail_in)
    return emulator.update(rule, 0, 1, rows, hypers, factors, is_live)


def test_live_hyper_parameters_and_factors_give_the_bits_of_numbers(emulator: Emulator) -> None:
    numbers, live = (Training(PLAIN, shapes=SMALL, n_groups=3) for _ in range(2))
    update(emulator, numbers, Factors(inv_scale=1 / 3, clip=0.3))
    factors = Factors(
        inv_scale=torch.nan,
        grad_scale=torch.tensor([3.0]),
        clip=torch.nan,
        clip_at=torch.tensor([0.3], dtype=torch.float64),
        found_inf=torch.zeros(1),
    )
    update(emulator, live, factors, is_live=True)
    assert_same_bits(live.arrays(), numbers.arrays())


def test_unscaled_gradients_are_written_before_they_are_read(emulator: Emulator) -> None:
    actual, expected = (Training(PLAIN, shapes=SMALL) for _ in range(2))
    update(emulator, actual, Factors(inv_scale=1 / 3))
    for p in expected.params:
        assert p.grad is not None
        p.grad.mul_(torch.tensor(1 / 3))
    expected.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())
    actual.check_guards()


@pytest.mark.parametrize("found", [1.0, torch.nan])
@parametrize_cases([PLAIN, DEFERRED[0]])
def test_nothing_is_written_when_inf_was_found(
    emulator: Emulator, case: Case, found: float
) -> None:
    training = Training(case, shapes=(*SMALL, LONG[0]))
    before = [x.clone() for x in training.arrays()]
    update(emulator, training, Factors(inv_scale=0.5, found_inf=torch.tensor([found])))
    assert_same_bits(training.arrays(), before)
    assert all(is_intact(x) for x in training.arrays())


def test_a_step_takes_as_many_launches_as_its_tensors_need(emulator: Emulator) -> None:
    """deal and update; decide and write for rows; check for more rows than deal looks at; two
    folds for long rows."""

    def launches(*shapes: Shape) -> int:
        return update(emulator, Training(PLAIN, shapes=shapes, decisions=("channel",)))

    assert launches(Shape((0, 3))) == 0
    assert launches(Shape((9,)), Shape((0, 3))) == 2
    assert launches(Shape((9,)), Shape((3, 7))) == 4
    assert launches(Shape((1, 20000))) == 4
    assert launches(Shape((13, 1500))) == 5
    assert launches(Shape((3, 16385))) == 7


@parametrize_cases([*EVERY_WRITE, *DEFERRED])
def test_a_step_from_copies_takes_the_launches_of_any(emulator: Emulator, case: Case) -> None:
    shapes = (*SMALL, LONG[0], LONG[4])
    copied, plain = (Training(case, shapes=shapes) for _ in range(2))
    assert update(emulator, copied, from_copies=True) == update(emulator, plain) == 7
    assert_same_bits(copied.arrays(), plain.arrays())


@pytest.mark.parametrize("from_copies", [False, True])
def test_more_tensors_than_a_table_holds_take_several_launches(
    emulator: Emulator, from_copies: bool
) -> None:
    # A tensor takes 72 of 32764 bytes.
    actual, expected = (Training(PLAIN, shapes=(Shape((2, 3)),) * 180) for _ in range(2))
    assert update(emulator, actual, from_copies=from_copies) == 2 + 3
    expected.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())


@pytest.mark.parametrize("rows_per_launch", [1, 7])
def test_bits_do_not_depend_on_the_launches(emulator: Emulator, rows_per_launch: int) -> None:
    emulator.api.tune(0, rows_per_launch)
    check(Training(PLAIN, shapes=SMALL), n_steps=1)


@pytest.mark.parametrize("launch", [1, 2, 3, 4, 5, 6, 7])
def test_a_failing_launch_is_told(emulator: Emulator, launch: int) -> None:
    training = Training(PLAIN, shapes=(LONG[0],), decisions=("channel",))
    with pytest.raises(RuntimeError, match=r"^pyoptim cuda: update of rule adamp .*asked to fail"):
        update(emulator, training, fail_in=launch)
