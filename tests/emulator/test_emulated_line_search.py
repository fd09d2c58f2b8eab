"""The CUDA engine's trials of a line search in the emulator: bits, guards, launches, refusals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import HALVES, KERNEL_DTYPES, assert_same_bits, values
from emulated import HYPER_BYTES, RULES, Emulator, Factors, Row
from test_emulated_update import DTYPE_SETS, assert_guards, guarded
from torch import Tensor

from pyoptim import backend, gpu

NATIVE = backend.native()
pytestmark = pytest.mark.native

CHUNK = 16 * 1024
TRIAL, STEP = RULES.index("LineTrial"), RULES.index("LineStep")
# Around a thread's 4 elements, a round of 1024 lanes, and the chunk.
SIZES = (0, 1, 3, 4, 5, 1023, 1024, 1025, 2047, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1030)
FEW = (1, 5, 1025, CHUNK + 6)
# By the rule's names; Adam, along the momentum.
GROUP = {
    "lr": 0.3,
    "lr_scale": 0.7,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "preconditioner": 1.0,
    "accumulates": 0.0,
    "corrects": 1.0,
    "bias_offset": 0.0,
    "by_momentum": 1.0,
}
VARIANT = 3  # exp_avg, exp_avg_sq


@dataclass(frozen=True)
class Trial:
    """The same rows twice: guarded ones for the emulator, and those of the CPU engine."""

    dtypes: int
    rows: tuple[Row, ...]
    wanted: tuple[Row, ...]
    sums: Tensor  # NaN, and one more at either end

    def hypers(self, emulator: Emulator) -> Tensor:
        is_double = self.dtypes == 0
        counters = [(torch.tensor(3.0), 0) for _ in self.rows]
        return emulator.prepare(TRIAL, [list(GROUP.values())], counters, is_double)

    def run(self, emulator: Emulator, factors: Factors | None = None, **more: Any) -> int:
        return emulator.update(
            *(TRIAL, VARIANT, self.dtypes, self.rows, self.hypers(emulator), factors),
            **{"is_live": True, "sums": self.sums[1:], **more},
        )

    def total(self, emulator: Emulator) -> float:
        """The engine's sum over the chunks of all rows."""
        n = self.sums.numel() - 2
        return float(emulator.norms(1, self.sums[1:-1], [n]))

    def totals(self, emulator: Emulator) -> list[float]:
        """The engine's sums of every row by itself, in which no last bit is lost."""
        ends = [row.first_chunk for row in self.rows[1:]] + [self.sums.numel() - 2]
        return emulator.norms(1, self.sums[1:-1], ends).tolist()

    def expected(self, clip: float = 1.0) -> float:
        """Makes the trial of the CPU engine."""
        return self._cpu_total(self.wanted, clip)

    def expected_totals(self) -> list[float]:
        """Makes a trial of every row from what was saved."""
        rows = [replace(row, param=row.param.clone(), source=row.saved) for row in self.wanted]
        return [self._cpu_total([replace(row, saved=row.param.clone())], 1.0) for row in rows]

    @staticmethod
    def _cpu_total(rows: Sequence[Row], clip: float) -> float:
        total = torch.full((), torch.nan, dtype=torch.float64)
        fields = [
            (r.param, r.grad, r.states, torch.tensor(3.0), 0, False, 0, False, r.source, r.saved)
            for r in rows
        ]
        NATIVE.run_rows("line_trial", [GROUP], fields, 1.0, clip, None, gpu.Memory(), total)
        return float(total)

    def check(self) -> None:
        for row, wanted in zip(self.rows, self.wanted, strict=True):
            what = f"{row.param.numel()} elements"
            held = [(row.param, wanted.param), (row.grad, wanted.grad), (row.saved, wanted.saved)]
            pairs = [*held, *zip(row.states, wanted.states, strict=True)]
            assert_same_bits([a for a, _ in pairs], [b for _, b in pairs], what)
            for tensor, _ in pairs:
                assert_guards(tensor)
        assert self.sums[[0, -1]].isnan().all(), "memory beside the sums was written"


def trial(
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    sizes: tuple[int, ...] = SIZES,
    offsets: tuple[int, ...] = (0,),
) -> Trial:
    """Row i has array k at `offsets[(i + k) % len(offsets)]`."""
    rows, wanted, n_chunks = [], [], 0
    for i, size in enumerate(sizes):
        kinds = [dtype, dtype, *[state_dtype or dtype] * 2]
        arrays = [values((size,), kind, 10 * i + k) for k, kind in enumerate(kinds)]
        arrays[3] = arrays[3].abs()
        at = [offsets[(i + k) % len(offsets)] for k in range(5)]
        p, g, *states = (guarded(x, by) for x, by in zip(arrays, at, strict=False))
        saved = guarded(torch.zeros(size, dtype=dtype), at[4])
        rows.append(Row(p, g, tuple(states), i, saved=saved, first_chunk=n_chunks))
        own = [x.clone() for x in arrays]
        wanted.append(Row(own[0], own[1], tuple(own[2:]), saved=torch.zeros(size, dtype=dtype)))
        n_chunks += -(-size // CHUNK)
    sums = torch.full((n_chunks + 2,), torch.nan, dtype=torch.float64)
    return Trial(DTYPE_SETS[dtype, state_dtype], tuple(rows), tuple(wanted), sums)


# -- bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [(0,), (0, 0, 0, 1)], ids=["aligned", "misaligned"])
@pytest.mark.parametrize(("dtype", "state_dtype"), KERNEL_DTYPES, ids=str)
def test_bits_are_the_cpu_engines(
    emulator: Emulator,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    offsets: tuple[int, ...],
) -> None:
    t = trial(dtype, state_dtype, offsets=offsets)
    assert t.run(emulator) == 1
    assert t.total(emulator) == t.expected()
    assert t.totals(emulator) == t.expected_totals()
    t.check()


@pytest.mark.parametrize("array", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_misaligned_array_of_a_row_is_enough(
    emulator: Emulator, dtype: torch.dtype, array: int
) -> None:
    t = trial(dtype, sizes=(1030,))
    row = t.rows[0]
    arrays = [row.param, row.grad, *row.states, row.saved]
    arrays[array] = guarded(arrays[array], 1)
    p, g, m, v, saved = arrays
    t = replace(t, rows=(replace(row, param=p, grad=g, states=(m, v), saved=saved),))
    t.run(emulator)
    assert t.total(emulator) == t.expected()
    t.check()


@pytest.mark.parametrize("seed", [1, 2])
def test_bits_do_not_depend_on_the_order_of_threads(emulator: Emulator, seed: int) -> None:
    emulator.seed(seed)
    t = trial(sizes=FEW)
    t.run(emulator)
    assert t.total(emulator) == t.expected()
    t.check()


@pytest.mark.parametrize("rows_per_launch", [1, 3])
def test_bits_do_not_depend_on_the_launches(emulator: Emulator, rows_per_launch: int) -> None:
    # What is asked of the chunk is not for sums.
    emulator.api.tune(64, rows_per_launch)
    t = trial(sizes=FEW)
    assert t.run(emulator) == -(-len(FEW) // rows_per_launch)
    assert t.total(emulator) == t.expected()
    t.check()


@pytest.mark.parametrize("chunk", [0, 8, 100, 1 << 20])
def test_a_trial_without_a_sum_reads_what_was_saved(emulator: Emulator, chunk: int) -> None:
    emulator.api.tune(chunk, 0)
    t = trial(sizes=FEW, offsets=(0, 0, 1))
    t.expected()
    copies = [row.param.clone() for row in t.rows]
    for row in t.rows:
        row.saved.copy_(row.param)  # type: ignore[union-attr]
        row.param.zero_()
    rows = tuple(replace(row, source=row.saved, saved=None) for row in t.rows)
    emulator.update(TRIAL, VARIANT, t.dtypes, rows, t.hypers(emulator), is_live=True)
    assert t.sums.isnan().all()
    assert_same_bits([row.saved for row in t.rows], copies)  # type: ignore[misc]
    t.check()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_saved_bits_are_those_that_were_read(emulator: Emulator, dtype: torch.dtype) -> None:
    """A signalling NaN would become a quiet one on the way through float32."""
    t = trial(dtype, sizes=(37, 1030), offsets=(0, 1))
    nan = 0x7F81 if dtype == torch.bfloat16 else 0x7C01
    for row in t.rows:
        row.param.view(torch.int16)[5:9] = nan
    kept = [row.param.clone() for row in t.rows]
    t.run(emulator)
    for row, before in zip(t.rows, kept, strict=True):
        assert row.saved is not None
        assert torch.equal(row.saved.view(torch.int16), before.view(torch.int16))


# -- factors and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("is_live", [True, False], ids=["live", "host"])
def test_clipped_gradients_are_not_written(emulator: Emulator, is_live: bool) -> None:
    t = trial(sizes=FEW)
    by = torch.tensor([0.3], dtype=torch.float64)
    t.run(emulator, Factors(clip=torch.nan, clip_at=by) if is_live else Factors(clip=0.3))
    assert t.total(emulator) == t.expected(clip=0.3)
    t.check()


@pytest.mark.parametrize("factors", [Factors(0.5), Factors(grad_scale=torch.ones(1))], ids=str)
def test_a_trial_does_not_unscale(emulator: Emulator, factors: Factors) -> None:
    t = trial(sizes=FEW)
    with pytest.raises(RuntimeError, match=r"update of rule line_trial .*cudaErrorInvalidValue"):
        t.run(emulator, factors)
    assert t.sums.isnan().all()


def test_nothing_is_written_when_an_infinity_was_found(emulator: Emulator) -> None:
    t = trial(sizes=FEW)
    hypers = t.hypers(emulator)
    factors = Factors(found_inf=torch.ones(1))
    work = (TRIAL, VARIANT, t.dtypes, t.rows, hypers, factors)
    emulator.update(*work, is_live=True, sums=t.sums[1:])
    assert t.sums.isnan().all()
    t.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trials_are_not_counted_and_steps_are(emulator: Emulator, dtype: torch.dtype) -> None:
    """Both are prepared for the step after those that were made."""
    counters = [torch.tensor(4.0, dtype=dtype) for _ in range(2)]
    tried, made = (
        emulator.prepare(rule, [list(GROUP.values())], [(counter, 0)])
        for rule, counter in zip((TRIAL, STEP), counters, strict=True)
    )
    assert [float(counter) for counter in counters] == [4.0, 5.0]
    words = [hypers.view(torch.float32)[0, : HYPER_BYTES // 4] for hypers in (tried, made)]
    is_decay = torch.arange(HYPER_BYTES // 4) == 1
    assert_same_bits([words[0][~is_decay]], [words[1][~is_decay]])
    assert [float(w[1]) for w in words] == [1.0, float(torch.tensor(1 - 0.3 * 0.1))]
