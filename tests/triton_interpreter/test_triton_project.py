"""AdamP and SGDP of the Triton engine give the bits of the CPU engine, and touch nothing else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import ADAMP, KERNEL_DTYPES, SGDP, Case, assert_same_bits, parametrize_cases
from engines import running
from projected import Shape, Training
from torch import Tensor
from torch.nn import Parameter

from pyoptim.kernels import launcher

pytestmark = [
    pytest.mark.native,
    # numpy's, about the arithmetic of NaN and inf in the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]
PLAIN = Case(ADAMP, "weight_decay")
KERNEL_CASES = [Case(row, name) for row in (ADAMP, SGDP) for name in row.kernels]
# Rows of up to 16 and of up to 128 elements, more rows than a block has; longer ones, which vectors
# fit or do not; rows in pieces; one row; no rows; nothing.
SHAPES = (
    Shape((9,)),
    Shape((0, 3)),
    Shape((1, 50)),
    Shape((70, 8)),
    Shape((9, 33)),
    Shape((2, 1030)),
    Shape((7, 12), (1, 0)),
    Shape((2, 150), (1, 0)),
)
FEW = (Shape((9,)), Shape((9, 5)), Shape((2, 132)))
FEWER = FEW[:2]
DEFERRED = (Case(ADAMP, "large_decay"), Case(SGDP, "large_decay"))
LONG = (Shape((2, 16388)), Shape((2, 16390), (1, 0)), Shape((12, 1400)))


def check(training: Training) -> None:
    """One step of the same tensors by both engines."""
    expected, actual = replace(training, offsets=(0,)), replace(training, backend="triton")
    before = [x.clone() for x in actual.arrays()]
    with running("triton"):
        actual.optimizer.step()
    expected.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())
    actual.check_guards()
    assert any(not torch.equal(a, b) for a, b in zip(actual.arrays(), before, strict=True))


@pytest.mark.parametrize("case", [Case(ADAMP, "weight_decay"), Case(SGDP, "momentum")], ids=str)
def test_rows_of_every_length_have_the_bits_of_the_cpu_engine(case: Case) -> None:
    check(Training(case, shapes=SHAPES, offsets=(0, 0, 0, 0, 1)))


@parametrize_cases([*KERNEL_CASES, Case(ADAMP, "large_decay"), Case(SGDP, "large_decay")])
def test_every_variant_has_the_bits_of_the_cpu_engine(case: Case) -> None:
    check(Training(case, shapes=FEW))


@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [pair for pair in KERNEL_DTYPES if pair[0] != torch.float32], ids=str
)
def test_every_dtype_has_the_bits_of_the_cpu_engine(
    dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    check(Training(PLAIN, dtype, state_dtype, shapes=FEWER, offsets=(0, 0, 0, 1)))


@pytest.mark.parametrize("decision", ["channel", "none"])
def test_tensors_of_several_programs_have_the_bits_of_the_cpu_engine(decision: str) -> None:
    check(Training(PLAIN, shapes=LONG, decisions=(decision,)))


def check_copies(training: Training, offset: int = 0, n_steps: int = 1) -> None:
    """Trains the same tensors, by Triton's engine in steps that read copies of the parameters."""
    expected, actual = replace(training, offsets=(0,)), replace(training, backend="triton")
    for _ in range(n_steps):
        with running("triton"):
            actual.step_from_copies(offset)
        expected.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())
    actual.check_guards()


@pytest.mark.parametrize("case", [PLAIN, Case(SGDP, "momentum"), *DEFERRED], ids=str)
def test_copies_are_read_in_place_of_every_parameter(case: Case) -> None:
    """The second step walks a plan, which could not copy anything back."""
    check_copies(Training(case, shapes=SHAPES), n_steps=2 if case is PLAIN else 1)


@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [pair for pair in KERNEL_DTYPES if pair[0] != torch.float32], ids=str
)
def test_copies_of_every_dtype_are_read(
    dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    check_copies(Training(PLAIN, dtype, state_dtype, shapes=FEWER))


@pytest.mark.parametrize("offsets", [(0, 1), (1, 0)], ids=str)
def test_copies_may_be_aligned_unlike_their_parameters(offsets: tuple[int, int]) -> None:
    check_copies(Training(PLAIN, shapes=FEW, offsets=offsets[:1]), offset=offsets[1])


@pytest.mark.parametrize("offset", [0, 1])
def test_vectors_are_read_where_copies_are_aligned_too(
    offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter would not notice; a GPU would refuse the access."""
    widths: set[int] = set()
    launch = launcher.launch

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        widths.update({constants["VECTOR"]} if "VECTOR" in constants else ())
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(launcher, "launch", note)
    check_copies(Training(PLAIN, shapes=FEWER), offset)
    assert widths == ({1} if offset else {4})


@pytest.mark.parametrize("decision", ["channel", "layer"])
def test_copies_of_tensors_of_several_programs_are_read(decision: str) -> None:
    check_copies(Training(PLAIN, shapes=LONG, decisions=(decision,)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_special_values_have_the_bits_of_the_cpu_engine(value: float) -> None:
    def made(name: str) -> Training:
        training = Training(Case(SGDP, "momentum"), shapes=FEW, backend=name)
        for i, p in enumerate(training.params):
            assert p.grad is not None
            [p.grad, p.data][i % 2].view_as(p)[(0,) * p.dim()] = value
        return training

    actual, expected = made("triton"), made("cpu")
    with running("triton"):
        actual.optimizer.step()
    expected.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())


def check_changed(shapes: tuple[Shape, ...], change: Callable[[Parameter, Tensor], None]) -> None:
    """One step by both engines after change(param, grad), for tensors with a channel view."""
    actual, expected = (
        Training(PLAIN, shapes=shapes, decisions=("channel",), backend=name)
        for name in ("triton", "cpu")
    )
    for training in (actual, expected):
        for p in training.params:
            assert p.grad is not None
            change(p, p.grad)
        with running("triton"):
            training.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())


@pytest.mark.parametrize("row", [0, 63, 64, 69])
def test_one_row_that_fails_is_found_wherever_it_is(row: int) -> None:
    def fail(p: Parameter, grad: Tensor) -> None:
        grad[row] += p.detach()[row]

    check_changed((Shape((70, 8)),), fail)


@pytest.mark.parametrize("sizes", [(70, 8), (2, 16388)], ids=str)
def test_a_small_gradient_that_is_nearly_at_right_angles_is_projected(
    sizes: tuple[int, int],
) -> None:
    """A norm in the other's place would make its cosine, half of the limit, 1000 times larger."""

    def tilt(p: Parameter, grad: Tensor) -> None:
        w = p.detach()
        norms = grad.norm(dim=1, keepdim=True) / w.norm(dim=1, keepdim=True)
        grad += 0.05 / sizes[1] ** 0.5 * norms * w
        grad *= 1e-3

    check_changed((Shape(sizes),), tilt)


def test_a_gradient_shorter_than_eps_is_at_right_angles() -> None:
    def shrink(p: Parameter, grad: Tensor) -> None:
        grad += p.detach()
        grad *= 1e-11

    check_changed((Shape((70, 8)),), shrink)


def test_no_eps_makes_no_nan_beside_a_row() -> None:
    actual, expected = (Training(PLAIN, shapes=FEW, backend=name) for name in ("triton", "cpu"))
    for training in (actual, expected):
        training.optimizer.param_groups[0]["eps"] = 0.0
        with running("triton"):
            training.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())


def test_clipped_and_unscaled_gradients_have_the_bits_of_the_cpu_engine() -> None:
    actual, expected = (
        Training(PLAIN, shapes=FEW, n_groups=2, backend=name) for name in ("triton", "cpu")
    )
    for training in (actual, expected):
        training.optimizer.max_grad_norm = 0.75
        training.optimizer.grad_scale = torch.tensor(3.0)
        training.optimizer.found_inf = torch.tensor(0.0)
        with running("triton"):
            training.optimizer.step()
    assert_same_bits(actual.arrays(), expected.arrays())


def test_nothing_is_written_when_an_infinity_was_found() -> None:
    training = Training(PLAIN, shapes=(*FEW, Shape((2, 16388))), backend="triton")
    before = [x.clone() for x in training.arrays()]
    training.optimizer.grad_scale = torch.tensor(2.0)
    training.optimizer.found_inf = torch.tensor(1.0)
    with running("triton"):
        training.optimizer.step()
    assert_same_bits(training.arrays(), before)
