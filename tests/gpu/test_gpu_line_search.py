"""Trials and steps of a line search on a GPU engine have the bits of the CPU engine."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import assert_same_bits, give_grads, parameters, values
from engines import GPU_ENGINES
from test_gpu_step import copy_grads, on, shift
from test_line_search_kernels import (
    BASES,
    DTYPES,
    SHAPES,
    Owner,
    give_masters,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter

from pyoptim import backend
from pyoptim.line_search.fused import FusedDirection

CHUNK = 16 * 1024
# Several chunks, whole rounds of lanes and not, and a tail of one element.
LONG = [(CHUNK + 1025,), (5,), (2, CHUNK), (1023,)]
EVERY = [(base, *dtypes) for base in BASES for dtypes in DTYPES]
# The interpreter takes about a second for one; Triton's kernels are made from one text.
FEW = [case for case in EVERY if case[0] == "adam" or case[1:] == (torch.float32, None, False)]
CASES = EVERY if "cuda" in GPU_ENGINES else FEW
pytestmark = [
    pytest.mark.native,
    # numpy's, about the arithmetic of NaN and inf in the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


class Pair:
    """The same search twice: on the engine, and on the CPU engine."""

    def __init__(
        self,
        engine: str,
        device: torch.device,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype | None = None,
        has_master: bool = False,
        **options: Any,
    ) -> None:
        self.wanted = parameters(shapes, dtype)
        self.params = on(device, self.wanted)
        self.expected = Owner(self.wanted, state_dtype, "cpu", **options)
        self.actual = Owner(self.params, state_dtype, engine, **options)
        self.give_grads(0)
        for owner in (self.actual, self.expected) if has_master else ():
            give_masters(owner)
        self.directions = FusedDirection(self.actual), FusedDirection(self.expected)

    def give_grads(self, seed: int) -> None:
        give_grads(self.wanted, seed)
        copy_grads(self.wanted, self.params)

    def each(self, action: str, *args: Any, what: str = "") -> list[Any]:
        results = [getattr(direction, action)(*args) for direction in self.directions]
        self.check(f"{what} {action}")
        return results

    def check(self, what: str) -> None:
        assert self.directions[0]._other is None, "the reference ran"
        actual = [t.cpu() for t in snapshot(self.actual)]
        assert_same_bits(actual, snapshot(self.expected), what)

    def start(self, eta: float, factor: Any = 1.0, what: str = "") -> None:
        device = self.params[0].device
        mine = factor.to(device) if isinstance(factor, Tensor) else factor
        slope = self.directions[0].start(eta, mine)
        expected = self.directions[1].start(eta, factor)
        assert (slope.device, slope.dtype, slope.dim()) == (device, torch.float64, 0)
        assert_same_bits([slope.cpu()], [expected], f"{what} slope")
        self.check(f"{what} start")

    def search(self, seed: int, factor: Any = 1.0) -> None:
        """A step with three trials that ends in one of the two ways."""
        self.give_grads(seed)
        self.start(0.3, factor, f"step {seed}")
        self.each("trial", 0.2, what=f"step {seed}")
        self.each("restore", what=f"step {seed}")
        self.each("trial", 0.1, what=f"step {seed}")
        self.each(*(("finish", 0.25) if seed % 2 == 0 else ("accept",)), what=f"step {seed}")


# -- every kernel ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "dtype", "state_dtype", "has_master"), CASES, ids=str)
def test_every_pass_equals_the_cpu(
    base: str,
    dtype: torch.dtype,
    state_dtype: Any,
    has_master: bool,
    engine: str,
    device: torch.device,
) -> None:
    pair = Pair(engine, device, SHAPES, dtype, state_dtype, has_master, **BASES[base])
    for seed in range(2):
        pair.search(seed)
    pair.each("plain", 0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_slopes_of_many_chunks_are_summed_in_order(
    dtype: torch.dtype, engine: str, device: torch.device
) -> None:
    pair = Pair(engine, device, LONG, dtype, use_mv=True, **BASES["adam"])
    pair.search(0)


def test_slopes_of_one_chunk_are_summed_in_order(engine: str, device: torch.device) -> None:
    """One by one: the last bit of a larger sum would hide the last bits of these."""
    for n in (1023, 1025, 2049, 3000, 3070, 4000):
        pair = Pair(engine, device, [(n,)], torch.float64, **BASES["sgd-momentum"])
        pair.start(0.3)


def test_what_lies_beyond_the_end_is_no_term(engine: str, device: torch.device) -> None:
    """Without eps the quotient of what is not there would be NaN."""
    pair = Pair(engine, device, [(1,), (6,), (1027,)], eps=0.0, **BASES["rmsprop"])
    pair.search(0)


def test_rows_of_several_kernels_have_one_slope(engine: str, device: torch.device) -> None:
    """Their chunks are summed in the order of the parameters, not of the launches."""
    bases = ["adam", "sgd", "adam", "amsgrad", "sgd-momentum", "adagrad"]
    pair = Pair(engine, device, [(CHUNK + 3,), (70,), (1000,), (9,), (5, 5), (300,)], base="adam")
    for owner in (pair.actual, pair.expected):
        params = owner.param_groups.pop()["params"]
        for p, base in zip(params, bases, strict=True):
            owner.add_param_group({"params": [p], **BASES[base]})
    for seed in range(2):
        pair.search(seed)


def test_misaligned_and_strided_rows_equal_the_cpu(engine: str, device: torch.device) -> None:
    pair = Pair(engine, device, [(67,), (1030,), (5, 6)], use_mv=True, **BASES["adam"])
    shifted = [shift(p.detach()) for p in pair.params[:2]]
    with torch.no_grad():
        for p, data in zip(pair.params, shifted, strict=False):
            p.data = data
        for params in (pair.wanted, pair.params):
            params[2].data = params[2].data.t().contiguous().t()
    for seed in range(2):
        pair.search(seed)
    for data in shifted:
        room = data._base
        assert room is not None
        assert room[[0, -1]].tolist() == [7.0, 7.0], "memory beside a row was written"


# -- factors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("is_tensor", [True, False], ids=["tensor", "number"])
def test_a_factor_of_the_gradients_equals_the_cpu(
    is_tensor: bool, dtype: torch.dtype, engine: str, device: torch.device
) -> None:
    pair = Pair(engine, device, has_master=False, dtype=torch.bfloat16, **BASES["adam"])
    for seed, by in enumerate((0.37, 1 / 3)):
        pair.search(seed, torch.tensor(by, dtype=dtype) if is_tensor else by)
    factor = torch.tensor(0.7, dtype=dtype) if is_tensor else 0.7
    pair.give_grads(2)
    pair.directions[0].plain(0.1, factor.to(device) if isinstance(factor, Tensor) else factor)
    pair.directions[1].plain(0.1, factor)
    pair.check("plain")


def test_a_factor_may_be_overwritten_during_the_search(engine: str, device: torch.device) -> None:
    pair = Pair(engine, device, **BASES["adam"])
    factor = torch.tensor(0.25, dtype=torch.float64, device=device)
    pair.directions[0].start(0.3, factor)
    pair.directions[1].start(0.3, 0.25)
    factor.fill_(torch.nan)
    pair.each("trial", 0.2)
    pair.each("finish", 0.2)


def test_a_factor_is_one_number(engine: str, device: torch.device) -> None:
    pair = Pair(engine, device, **BASES["adam"])
    with pytest.raises(ValueError, match="grad_factor must be one number"):
        pair.directions[0].start(0.1, torch.ones(2, device=device))


def test_the_host_never_reads_a_tensor(
    engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(engine, device, **BASES["adam"])
    direction = pair.directions[0]
    factor = torch.tensor(0.5, device=device)
    for is_warm in (False, True):
        pair.give_grads(is_warm)
        if is_warm:
            for name in ("item", "__float__", "__bool__", "__int__", "tolist"):
                monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("read a tensor"))
        slope = direction.start(0.3, factor)
        direction.trial(0.2)
        direction.restore()
        direction.finish(0.1)
        direction.plain(0.1, factor)
    monkeypatch.undo()
    assert slope.isfinite()


# -- what is not finite, what is missing -----------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_the_slope(
    bad: float, engine: str, device: torch.device
) -> None:
    pair = Pair(engine, device, [(40_000,), (5,)], **BASES["adam"])
    pair.wanted[0].grad[31_000] = bad  # type: ignore[index]
    copy_grads(pair.wanted, pair.params)
    pair.start(0.1)
    pair.each("undo")


def test_gradients_come_and_go(engine: str, device: torch.device) -> None:
    pair = Pair(engine, device, [(9,), (20,), (33,)], **BASES["adam"])
    for seed, present in enumerate([(0,), (0, 2), (1,), (0, 1, 2)]):
        pair.give_grads(seed)
        for params in (pair.params, pair.wanted):
            for i, p in enumerate(params):
                p.grad = p.grad if i in present else None
        pair.start(0.3)
        pair.each("finish", 0.1)


def test_empty_rows_have_a_slope_of_zero(engine: str, device: torch.device) -> None:
    pair = Pair(engine, device, [(0,), (0, 3)], **BASES["adam"])
    for _ in range(2):
        slope = pair.directions[0].start(0.1)
        assert (float(slope), slope.device) == (0.0, pair.params[0].device)
        pair.directions[0].finish(0.1)


def test_saved_bits_are_those_that_were_read(engine: str, device: torch.device) -> None:
    """NaNs keep their payload, and misaligned rows too."""
    raw = torch.tensor([0x7FA1, 0x8000, 0x0001, 0x7F80, 0xFFC3] * 21, dtype=torch.int32)
    for by in (0, 1):
        held = torch.zeros(raw.numel() + by, dtype=torch.int16, device=device)
        held[by:] = raw.to(torch.int16).to(device)
        param = Parameter(held[by:].view(torch.bfloat16))
        direction = FusedDirection(Owner([param], None, engine, **BASES["adam"]))
        param.grad = values((raw.numel(),), torch.bfloat16, 1).to(device)
        direction.start(0.1)
        changed = param.detach().view(torch.int16).clone()
        direction.restore()
        assert torch.equal(param.detach().view(torch.int16).cpu(), raw.to(torch.int16))
        assert not torch.equal(changed.cpu(), raw.to(torch.int16))


def test_moments_and_counters_wait_for_the_end(engine: str, device: torch.device) -> None:
    pair = Pair(engine, device, **BASES["amsgrad"])
    pair.search(0)
    pair.give_grads(1)
    before = [t.clone() for t in snapshot(pair.actual)[len(pair.params) :]]
    pair.start(0.3)
    pair.each("trial", 0.2)
    assert_same_bits(snapshot(pair.actual)[len(pair.params) :], before)


# -- limits ----------------------------------------------------------------------------------------


def test_more_rows_than_a_launch_takes(engine: str, device: torch.device) -> None:
    n = 900 if engine == "cuda" else 40
    pair = Pair(engine, device, [(3,)] * n, **BASES["amsgrad"])
    for seed in range(2):
        pair.search(seed)


def test_a_sum_is_one_float64_number() -> None:
    native = backend.native()
    assert native is not None
    for total in (torch.zeros(()), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="one float64 number on the device of the rows"):
            native.run_rows("line_trial", [], [], 1.0, 1.0, None, None, total)
