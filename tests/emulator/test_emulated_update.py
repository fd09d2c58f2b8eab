"""The CUDA engine's updates in the emulator: the same bits as the CPU engine, and no others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import (
    ADAM,
    HALVES,
    KERNEL_CASES,
    PROJECTING,
    SGD,
    Case,
    assert_same_bits,
    parametrize_cases,
    parametrize_kernel_dtypes,
    values,
)
from emulated import HYPER_BYTES, MAX_STATES, RULES, Emulator, Factors, Row
from torch import Tensor

from pyoptim import backend

NATIVE = backend.native()
pytestmark = pytest.mark.native

GUARD = 32  # elements before and after every array: a multiple of 16 bytes for every dtype
CHUNK = 64  # elements per block, so that short arrays have several
# Around a vector (2, 4 or 8 elements), a chunk and the block's 256 threads.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000)
DTYPE_SETS = {
    (torch.float64, None): 0,
    (torch.float32, None): 1,
    (torch.bfloat16, None): 2,
    (torch.float16, None): 3,
    (torch.bfloat16, torch.float32): 4,
    (torch.float16, torch.float32): 5,
}
AMSGRAD = Case(ADAM, "amsgrad_weight_decay_maximize")
PLAIN_SGD = Case(SGD, "weight_decay")


def guarded(of: Tensor, offset: int) -> Tensor:
    """A copy that lies `offset` elements after a 16-byte border, between elements of -77."""
    buffer = torch.full((of.numel() + 2 * GUARD,), -77, dtype=of.dtype)
    assert buffer.data_ptr() % 16 == 0
    view = buffer[GUARD + offset : GUARD + offset + of.numel()]
    view.copy_(of)
    return view


def assert_guards(tensor: Tensor) -> None:
    buffer = tensor._base
    assert buffer is not None
    begin = tensor.storage_offset()
    outside = torch.cat([buffer[:begin], buffer[begin + tensor.numel() :]])
    assert (outside == -77).all(), "memory beside an array was written"


@dataclass(frozen=True)
class Problem:
    """Tensors of one case twice: guarded ones for the emulator, and those of the CPU engine."""

    case: Case
    dtype: torch.dtype
    state_dtype: torch.dtype | None
    optimizer: Any
    rows: tuple[Row, ...]
    counters: tuple[Tensor, ...]

    @property
    def info(self) -> dict[str, Any]:
        return NATIVE.rule_info(self.case.row.ours.rule)

    @property
    def rule(self) -> int:
        return [name.lower() for name in RULES].index(self.case.row.ours.rule)

    @property
    def variant(self) -> int:
        return self.info["state_names"].index(tuple(self.case.state_names))

    @property
    def dtypes(self) -> int:
        return DTYPE_SETS[self.dtype, self.state_dtype]

    def raw(self, group: int = 0) -> list[float]:
        options, values = self.optimizer.param_groups[group], []
        for name in self.info["hyper_names"]:
            key, _, index = name.partition(".")
            values.append(float(options[key][int(index)] if index else options[key]))
        return values

    def prepare(self, emulator: Emulator) -> Tensor:
        is_double = self.dtype == torch.float64
        groups = [self.raw(g) for g in range(len(self.optimizer.param_groups))]
        rows = [(c, row.hyper) for c, row in zip(self.counters, self.rows, strict=True)]
        return emulator.prepare(self.rule, groups, rows, is_double)

    def update(
        self,
        emulator: Emulator,
        factors: Factors | None = None,
        is_live: bool = True,
    ) -> int:
        """One step of the emulator, its hyper-parameters by prepare; returns the launches."""
        hypers = self.prepare(emulator)
        rows = self.rows
        if not is_live:
            # One block for all rows of a group, as the host keeps them.
            firsts = {row.hyper: i for i, row in reversed(list(enumerate(rows)))}
            hypers = hypers[[firsts[g] for g in sorted(firsts)]].contiguous()
        return emulator.update(self.rule, self.variant, self.dtypes, rows, hypers, factors, is_live)

    def check(self) -> None:
        """The emulator's tensors are the CPU's, and nothing beside them was touched."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = self.case.state_names
        for row, p in zip(self.rows, params, strict=True):
            what = f"{self.case} of {p.numel()} elements"
            state = [self.optimizer.state[p][name] for name in names]
            assert_same_bits([row.param, *row.states], [p, *state], what)
            for tensor in (row.param, row.grad, *row.states):
                assert_guards(tensor)


def problem(
    case: Case,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    sizes: Sequence[int] = SIZES,
    offsets: Sequence[int] = (0,),
    n_groups: int = 1,
) -> Problem:
    """Row i has array k at `offsets[(i + k) % len(offsets)]`; the groups differ by their lr."""
    params, rows = [], []
    for i, size in enumerate(sizes):
        at = [offsets[(i + k) % len(offsets)] for k in range(2 + MAX_STATES)]
        p, g = values((size,), dtype, i), values((size,), dtype, 500 + i)
        params.append(p.clone())
        params[-1].grad = g.clone()
        kind = state_dtype or dtype
        start = case.options.get("initial_accumulator_value", 0.0)
        states = tuple(
            guarded(torch.full((size,), start, dtype=kind), at[2 + k])
            for k in range(len(case.state_names))
        )
        rows.append(Row(guarded(p, at[0]), guarded(g, at[1]), states, i * n_groups // len(sizes)))
    groups = [
        {
            "params": [p for p, row in zip(params, rows, strict=True) if row.hyper == g],
            "lr": case.options["lr"] * (g + 1),
        }
        for g in range(n_groups)
    ]
    optimizer = case.ours(groups, state_dtype=state_dtype, backend="cpu")
    # Of this dtype even where the class would make it wider; SGD asks whether it made the buffer.
    for p, row in zip(params, rows, strict=True) if optimizer.counts_steps else ():
        held = zip(case.state_names, row.states, strict=True)
        optimizer.state[p].update((name, state.clone()) for name, state in held)
    counters = tuple(torch.zeros(()) for _ in sizes)
    return Problem(case, dtype, state_dtype, optimizer, tuple(rows), counters)


# -- every kernel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [(0,), (1, 0, 3)], ids=["aligned", "misaligned"])
@parametrize_kernel_dtypes
@parametrize_cases([case for case in KERNEL_CASES if case.row not in PROJECTING])
def test_bits_are_the_cpu_engines(
    emulator: Emulator,
    case: Case,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    offsets: tuple[int, ...],
) -> None:
    emulator.api.tune(CHUNK, 0)
    p = problem(case, dtype, state_dtype, offsets=offsets)
    for _ in range(2):
        p.update(emulator)
        p.optimizer.step()
    p.check()


@parametrize_kernel_dtypes
def test_bits_are_the_cpu_engines_in_blocks_of_the_default_size(
    emulator: Emulator, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    # A block is 4096 elements: 256 threads with two accesses of 2, 4 or 8 elements, several times.
    sizes = (4095, 4096, 4097, 2048, 2047, 1024 + 8, 8192 + 9)
    p = problem(AMSGRAD, dtype, state_dtype, sizes)
    assert p.update(emulator) == 1
    p.optimizer.step()
    p.check()


@pytest.mark.parametrize("array", range(2 + MAX_STATES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_misaligned_array_of_a_row_is_enough(
    emulator: Emulator, dtype: torch.dtype, array: int
) -> None:
    p = problem(AMSGRAD, dtype, sizes=(257,))
    row = p.rows[0]
    arrays = [row.param, row.grad, *row.states]
    arrays[array] = guarded(arrays[array], 1)
    p = replace(p, rows=(Row(arrays[0], arrays[1], tuple(arrays[2:])),))
    p.update(emulator)
    p.optimizer.step()
    p.check()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bits_do_not_depend_on_the_order_of_threads(emulator: Emulator, seed: int) -> None:
    emulator.api.tune(CHUNK, 0)
    emulator.seed(seed)
    p = problem(AMSGRAD, offsets=(0, 0, 1))
    p.update(emulator)
    p.optimizer.step()
    p.check()


@parametrize_kernel_dtypes
def test_nan_and_inf_reach_the_result(
    emulator: Emulator, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    p = problem(AMSGRAD, dtype, state_dtype, sizes=(37, 5))
    params = p.optimizer.param_groups[0]["params"]
    for row, param in zip(p.rows, params, strict=True):
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=dtype)
        row.grad[:5] = param.grad[:5] = special
    p.update(emulator)
    p.optimizer.step()
    assert p.rows[0].param[:3].isnan().all()
    p.check()


# -- tables and launches ---------------------------------------------------------------------------


def test_nothing_to_do_launches_nothing(emulator: Emulator) -> None:
    assert problem(AMSGRAD, sizes=()).update(emulator) == 0
    assert problem(AMSGRAD, sizes=(0, 0)).update(emulator) == 0


def test_more_rows_than_a_table_holds_take_several_launches(emulator: Emulator) -> None:
    # A row of amsgrad takes 5 addresses, a size, a block and an index: 56 of 32764 bytes.
    p = problem(AMSGRAD, sizes=[1 + i % 5 if i % 7 else 0 for i in range(1400)])
    assert p.update(emulator) == 3
    p.optimizer.step()
    p.check()


@pytest.mark.parametrize("is_live", [True, False], ids=["live", "host"])
@pytest.mark.parametrize("rows_per_launch", [1, 3, 22])
def test_bits_do_not_depend_on_the_launches(
    emulator: Emulator, rows_per_launch: int, is_live: bool
) -> None:
    emulator.api.tune(CHUNK, rows_per_launch)
    p = problem(AMSGRAD, n_groups=3)
    n_rows = sum(size > 0 for size in SIZES)
    assert p.update(emulator, is_live=is_live) == -(-n_rows // rows_per_launch)
    p.optimizer.step()
    p.check()


@pytest.mark.parametrize("n_groups", [1, 8, 9, 20])
def test_groups_have_their_own_hyper_parameters(emulator: Emulator, n_groups: int) -> None:
    p = problem(AMSGRAD, sizes=[5] * 40, n_groups=n_groups)
    # 8 blocks fit in a launch.
    assert p.update(emulator, is_live=False) == -(-n_groups // 8)
    p.optimizer.step()
    p.check()


def test_hyper_parameters_may_alternate_between_rows(emulator: Emulator) -> None:
    p = problem(PLAIN_SGD, sizes=[3] * 30, n_groups=10)
    order = [3 * (i % 10) + i // 10 for i in range(30)]
    rows = tuple(p.rows[i] for i in order)
    hypers = emulator.prepare(p.rule, [p.raw(g) for g in range(10)], [(None, g) for g in range(10)])
    assert emulator.update(p.rule, p.variant, p.dtypes, rows, hypers) == 4
    p.optimizer.step()
    p.check()


@pytest.mark.parametrize("chunk", [1, 8, 100, 4096])
def test_bits_do_not_depend_on_the_chunk(emulator: Emulator, chunk: int) -> None:
    emulator.api.tune(chunk, 0)
    p = problem(AMSGRAD, torch.bfloat16)
    p.update(emulator)
    p.optimizer.step()
    p.check()


# -- factors of the gradient -----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1024.0, 3.0])
@pytest.mark.parametrize("is_live", [True, False], ids=["live", "host"])
@parametrize_kernel_dtypes
def test_unscaled_gradients_are_written_back_rounded(
    emulator: Emulator,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    scale: float,
    is_live: bool,
) -> None:
    p = problem(AMSGRAD, dtype, state_dtype, offsets=(0, 0, 0, 1))
    factors = Factors(inv_scale=1 / scale)
    if is_live:
        factors = Factors(inv_scale=torch.nan, grad_scale=torch.tensor([scale]))
    p.update(emulator, factors)
    compute = torch.float32 if dtype in HALVES else dtype
    for param in p.optimizer.param_groups[0]["params"]:
        inverse = torch.tensor(1 / scale, dtype=torch.float64).to(compute)
        param.grad = (param.grad.to(compute) * inverse).to(dtype)
    p.optimizer.step()
    p.check()
    grads = [q.grad for q in p.optimizer.param_groups[0]["params"]]
    assert_same_bits([row.grad for row in p.rows], grads)


@pytest.mark.parametrize("is_live", [True, False], ids=["live", "host"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_clipped_gradients_are_not_written(
    emulator: Emulator, dtype: torch.dtype, is_live: bool
) -> None:
    p = problem(AMSGRAD, dtype)
    factors = Factors(clip=0.3)
    if is_live:
        factors = Factors(clip=torch.nan, clip_at=torch.tensor([0.3], dtype=torch.float64))
    before = [row.grad.clone() for row in p.rows]
    p.update(emulator, factors)
    for param in p.optimizer.param_groups[0]["params"]:
        param.grad = param.grad * torch.tensor(0.3, dtype=torch.float64).to(dtype)
    p.optimizer.step()
    p.check()
    assert_same_bits([row.grad for row in p.rows], before)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_clipping_multiplies_what_unscaling_has_rounded(
    emulator: Emulator, dtype: torch.dtype
) -> None:
    p = problem(PLAIN_SGD, dtype, sizes=(1001,))
    row, lr, decay = p.rows[0], p.raw()[0], PLAIN_SGD.options["weight_decay"]
    param, grad = row.param.float(), row.grad.float()
    p.update(emulator, Factors(inv_scale=1 / 3, clip=0.3))
    written = (grad * torch.tensor(1 / 3)).to(dtype)
    g = written.float() * torch.tensor(0.3)
    g = g + torch.tensor(decay) * param
    assert_same_bits([row.grad, row.param], [written, (param - torch.tensor(lr) * g).to(dtype)])


def test_a_clip_factor_of_one_changes_nothing(emulator: Emulator) -> None:
    p = problem(AMSGRAD)
    p.update(emulator, Factors(clip_at=torch.ones(1, dtype=torch.float64)))
    p.optimizer.step()
    p.check()


@pytest.mark.parametrize("found", [1.0, torch.nan, 2.0])
def test_nothing_is_written_when_inf_was_found(emulator: Emulator, found: float) -> None:
    p = problem(AMSGRAD, offsets=(0, 1))
    before = [t.clone() for row in p.rows for t in (row.param, row.grad, *row.states)]
    p.update(emulator, Factors(inv_scale=0.5, clip=0.5, found_inf=torch.tensor([found])))
    after = [t for row in p.rows for t in (row.param, row.grad, *row.states)]
    assert_same_bits(after, before)


def test_the_step_is_made_when_no_inf_was_found(emulator: Emulator) -> None:
    p = problem(AMSGRAD)
    p.update(emulator, Factors(found_inf=torch.zeros(1)))
    p.optimizer.step()
    p.check()


# -- hyper-parameters on the device ----------------------------------------------------------------


@pytest.mark.parametrize("counter_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_counters_go_on_from_where_they_are(
    emulator: Emulator, dtype: torch.dtype, counter_dtype: torch.dtype
) -> None:
    p = problem(AMSGRAD, dtype, sizes=(3, 4, 5))
    p.optimizer.step()  # makes the state
    steps = (7.0, 0.0, 12345.0)
    params = p.optimizer.param_groups[0]["params"]
    rows = []
    for row, param, step in zip(p.rows, params, steps, strict=True):
        state = p.optimizer.state[param]
        state["step"].fill_(step)
        held = tuple(guarded(state[name], 0) for name in p.case.state_names)
        rows.append(Row(guarded(param, 0), row.grad, held))
    counters = tuple(torch.tensor(step, dtype=counter_dtype) for step in steps)
    p = replace(p, rows=tuple(rows), counters=counters)
    p.update(emulator)
    p.optimizer.step()
    p.check()
    assert [float(c) for c in p.counters] == [step + 1 for step in steps]


@pytest.mark.parametrize("n_rows", [0, 1, 255, 256, 257, 3000])
def test_every_row_gets_its_block(emulator: Emulator, n_rows: int) -> None:
    # The table holds about 1600 rows; groups of 40 rows make more than the 32 of one launch.
    raw = problem(AMSGRAD, sizes=()).raw()
    groups = [[0.001 * (g + 1), *raw[1:]] for g in range(-(-n_rows // 40))]
    counters = [torch.tensor(float(i % 5)) for i in range(n_rows)]
    guarded_hypers = torch.full((n_rows + 1, HYPER_BYTES), 0xAA, dtype=torch.uint8)
    rows = [(counter, i // 40) for i, counter in enumerate(counters)]
    hypers = emulator.prepare(RULES.index("Adam"), groups, rows, hypers=guarded_hypers)
    one_by_one = [
        emulator.prepare(RULES.index("Adam"), [groups[i // 40]], [(torch.tensor(i % 5.0), 0)])
        for i in range(0, n_rows, 97)
    ]
    for block, i in zip(one_by_one, range(0, n_rows, 97), strict=True):
        assert torch.equal(hypers[i], block[0]), f"row {i}"
    assert (hypers[n_rows] == 0xAA).all()
    assert [float(c) for c in counters] == [i % 5 + 1 for i in range(n_rows)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_hyper_parameters_are_read_from_tensors(emulator: Emulator, dtype: torch.dtype) -> None:
    rule, raw = RULES.index("Adam"), problem(AMSGRAD, sizes=()).raw()
    # 1/4 and 1/2 are the same number in both dtypes.
    lr, beta1 = torch.tensor(0.25, dtype=dtype), torch.tensor(0.5, dtype=dtype)
    live = emulator.prepare(rule, [[lr, beta1, *raw[2:]]], [(torch.zeros(()), 0)])
    host = emulator.prepare(rule, [[0.25, 0.5, *raw[2:]]], [(torch.zeros(()), 0)])
    assert torch.equal(live, host)


def test_found_inf_keeps_counters_and_hyper_parameters(emulator: Emulator) -> None:
    counter = torch.tensor(4.0)
    raw = problem(AMSGRAD, sizes=()).raw()
    found = torch.ones(1)
    hypers = emulator.prepare(RULES.index("Adam"), [raw], [(counter, 0)], found_inf=found)
    assert float(counter) == 4.0
    assert (hypers == 0xAA).all()


# -- devices, streams and errors -------------------------------------------------------------------


def test_work_goes_to_its_device_and_stream(emulator: Emulator) -> None:
    p = problem(PLAIN_SGD, sizes=(5,))
    hypers = p.prepare(emulator)
    emulator.update(p.rule, p.variant, p.dtypes, p.rows, hypers, device=1, stream=0x1234)
    assert emulator.library.pyoptim_emulator_last_device() == 1
    assert emulator.library.pyoptim_emulator_last_stream() == 0x1234
    assert emulator.library.pyoptim_emulator_current_device() == 0


def test_errors_name_the_work_and_restore_the_device(emulator: Emulator) -> None:
    p = problem(AMSGRAD, sizes=(5,))
    hypers = p.prepare(emulator)
    arguments = (p.rule, p.variant, p.dtypes, p.rows, hypers)
    emulator.library.pyoptim_emulator_fail_in(1)
    with pytest.raises(
        RuntimeError,
        match=r"^pyoptim cuda: update of rule adam on device 1 failed: "
        r"asked to fail \(cudaErrorLaunchFailure\)$",
    ):
        emulator.update(*arguments, device=1)
    assert emulator.library.pyoptim_emulator_current_device() == 0
    with pytest.raises(RuntimeError, match=r"on device 7 failed: .*cudaErrorInvalidDevice"):
        emulator.update(*arguments, device=7)
    emulator.update(*arguments)  # the errors are over


@pytest.mark.parametrize("launch", [1, 2, 3])
def test_the_first_failing_launch_ends_the_work(emulator: Emulator, launch: int) -> None:
    emulator.api.tune(0, 1)
    p = problem(PLAIN_SGD, sizes=(5, 5, 5))
    hypers = p.prepare(emulator)
    emulator.library.pyoptim_emulator_fail_in(launch)
    before = emulator.api.launches()
    with pytest.raises(RuntimeError, match="asked to fail"):
        emulator.update(p.rule, p.variant, p.dtypes, p.rows, hypers)
    assert emulator.api.launches() - before == launch


@pytest.mark.parametrize(
    ("rule", "variant", "dtypes"), [(1, 2, 1), (1, -1, 1), (1, 0, 6), (99, 0, 1), (-1, 0, 1)]
)
def test_what_has_no_kernel_is_an_error(
    emulator: Emulator, rule: int, variant: int, dtypes: int
) -> None:
    p = problem(PLAIN_SGD, sizes=(5,))
    hypers = p.prepare(emulator)
    with pytest.raises(RuntimeError, match=r"^pyoptim cuda: update .*failed: "):
        emulator.update(rule, variant, dtypes, p.rows, hypers)
