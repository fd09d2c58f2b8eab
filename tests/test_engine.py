"""The CPU engine: the same bits from every instruction set, thread count, alignment and size."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    CPU_KERNEL_CASES,
    FLOATS,
    HALVES,
    KERNEL_CASES,
    KERNEL_DTYPES,
    TORCH_KERNEL_CASES,
    Case,
    as_wide,
    assert_same_bits,
    give_grads,
    parameters,
    parametrize_cases,
    parametrize_dtypes,
    parametrize_kernel_dtypes,
    same_bits,
    states_of,
    values,
)
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import backend
from pyoptim import optimizer as optimizer_module
from pyoptim.optimizer import FusedOptimizer

pytestmark = pytest.mark.native
NATIVE = backend.native()
ISAS = NATIVE.isas() if NATIVE else ["baseline"]

# Around the vector widths (4 to 32 elements), the size where threads start (32768) and the task
# length (65536).
TAILS = (0, 1, 7, 8, 9, 15, 16, 17, 31, 33)
LARGE = (16383, 16385, 32768, 32769, 65535, 65536, 65537, 200003)

AMSGRAD = next(c for c in KERNEL_CASES if str(c) == "adam-amsgrad")  # the most state
parametrize_isas = pytest.mark.parametrize("isa", ISAS)


@lru_cache
def pool(role: int, dtype: torch.dtype) -> Tensor:
    """Values to fill tensors from, the same for a role in every test."""
    return values((max(LARGE),), dtype, seed=7 + role)


def at_offset(source: Tensor, offset: int) -> Tensor:
    """A copy of `source` that begins `offset` elements into its storage."""
    base = torch.zeros(source.numel() + offset, dtype=source.dtype)
    base[offset:] = source
    return base[offset:]


def build(
    case: Case,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    sizes: Sequence[int],
    offsets: Sequence[tuple[int, int, int]] = ((0, 0, 0),),
    first: int = 0,
) -> FusedOptimizer:
    """An optimizer in mid-run over flat tensors.

    Args:
        offsets: of (param, grad, state) into their storages; one combination after the other.
        first: where in the pools the values begin.
    """
    params = []
    for i, n in enumerate(sizes):
        of_param, of_grad, _ = offsets[i % len(offsets)]
        params.append(Parameter(at_offset(pool(0, dtype)[first:][:n], of_param)))
        params[-1].grad = at_offset(pool(1, dtype)[first:][:n], of_grad)
    optimizer = case.ours(params, state_dtype=state_dtype)
    for i, p in enumerate(params):
        entry = optimizer.state[p]
        for k, name in enumerate(case.state_names):
            state = pool(2 + k, state_dtype or dtype)[first:][: p.numel()]
            # Of the names below, the square must exceed the square of the average.
            state = state.abs() + 9 if name in ("exp_avg_sq", "square_avg", "sum") else state
            entry[name] = at_offset(state, offsets[i % len(offsets)][2])
        if optimizer.counts_steps:
            entry["step"] = torch.tensor(3.0)
    return optimizer


def run(optimizer: FusedOptimizer, steps: int = 2) -> list[Tensor]:
    for _ in range(steps):
        optimizer.step()
    return [*optimizer.param_groups[0]["params"], *states_of(optimizer)]


# -- instruction sets, threads, alignment, sizes ---------------------------------------------------


@parametrize_cases(CPU_KERNEL_CASES)
@parametrize_kernel_dtypes
def test_every_instruction_set_gives_the_same_bits(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    sizes = (*TAILS, 5003)
    NATIVE.set_isa("baseline")
    expected = run(build(case, dtype, state_dtype, sizes))
    for isa in ISAS:
        NATIVE.set_isa(isa)
        assert_same_bits(run(build(case, dtype, state_dtype, sizes)), expected, isa)


def short_pieces(size: int, length: int = 30_000) -> list[tuple[int, int]]:
    """(first element, length) of every piece."""
    return [(k, min(length, size - k)) for k in range(0, size, length)]


@pytest.mark.parametrize("size", LARGE)
@parametrize_dtypes((torch.float32, torch.bfloat16))
def test_threads_and_tasks_do_not_change_the_bits(size: int, dtype: torch.dtype) -> None:
    """Alone and among others, with 1 to 4 threads; compared with pieces too short for either."""
    case = AMSGRAD
    pieces = [run(build(case, dtype, None, (n,), first=k)) for k, n in short_pieces(size)]
    expected = [torch.cat([t.detach() for t in column]) for column in zip(*pieces, strict=True)]
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert NATIVE.num_threads() == threads
        for others in ((), (65535, 3)):
            results = run(build(case, dtype, None, (*others, size)))
            n_states = len(case.state_names)
            mine = [results[len(others)], *results[len(results) - n_states :]]
            assert_same_bits(mine, expected, f"{threads} threads beside {others}")


@parametrize_cases(CPU_KERNEL_CASES)
@parametrize_kernel_dtypes
@parametrize_isas
def test_alignment_does_not_change_the_bits(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None, isa: str
) -> None:
    NATIVE.set_isa(isa)
    offsets = [(k, (k + 3) % 10, (2 * k + 1) % 10) for k in range(1, 10)]
    sizes = (100,) * len(offsets)
    moved = run(build(case, dtype, state_dtype, sizes, offsets))
    assert [p.storage_offset() for p in moved[: len(offsets)]] == list(range(1, 10))
    assert_same_bits(moved, run(build(case, dtype, state_dtype, sizes)))


@parametrize_cases(CPU_KERNEL_CASES)
@parametrize_kernel_dtypes
@parametrize_isas
def test_the_tail_computes_what_the_body_does(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None, isa: str
) -> None:
    """Tensors of every length to 67 are the beginnings of one long tensor."""
    NATIVE.set_isa(isa)
    lengths = range(68)
    whole = run(build(case, dtype, state_dtype, (256,)))
    parts = run(build(case, dtype, state_dtype, lengths))
    n_states = len(case.state_names)
    for i, n in enumerate(lengths):
        mine = [parts[i], *parts[len(lengths) + i * n_states :][:n_states]]
        assert_same_bits(mine, [t[:n] for t in whole], f"length {n}")


def test_twenty_thousand_tensors_are_one() -> None:
    case = AMSGRAD
    sizes = [i % 5 for i in range(20_000)]
    flat = build(case, torch.float32, None, (sum(sizes),))
    many = case.ours([Parameter(torch.empty(n)) for n in sizes])
    params, (whole,) = many.param_groups[0]["params"], flat.param_groups[0]["params"]
    pieces = [whole.detach().split(sizes), whole.grad.split(sizes)]
    states = {n: flat.state[whole][n].split(sizes) for n in case.state_names}
    for i, p in enumerate(params):
        p.data, p.grad = pieces[0][i].clone(), pieces[1][i].clone()
        many.state[p].update({n: s[i].clone() for n, s in states.items()}, step=torch.tensor(3.0))
    run(flat)
    run(many)
    assert many._plan is not None
    together = [torch.cat([p.detach() for p in params])]
    together += [torch.cat([many.state[p][n] for p in params]) for n in sorted(case.state_names)]
    assert_same_bits(together, [whole, *states_of(flat)])
    assert {many.state[p]["step"].item() for p in params} == {5.0}


def test_one_large_tensor_is_its_pieces() -> None:
    torch.set_num_threads(2)
    n, cut = 3_000_001, 1_234_567
    whole = Parameter(torch.randn(n))
    pieces = [Parameter(whole.detach()[:cut].clone()), Parameter(whole.detach()[cut:].clone())]
    # The other order, so that tasks begin at other elements.
    one, two = pyoptim.AdamW([whole]), pyoptim.AdamW(pieces[::-1])
    for _ in range(2):
        whole.grad = torch.randn(n)
        pieces[0].grad, pieces[1].grad = whole.grad[:cut], whole.grad[cut:]
        one.step()
        two.step()
    assert_same_bits([whole], [torch.cat([p.detach() for p in pieces])])


# -- values ----------------------------------------------------------------------------------------


@parametrize_cases(TORCH_KERNEL_CASES)
@parametrize_kernel_dtypes
@parametrize_isas
def test_nan_and_infinity_are_kept_as_torch_keeps_them(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None, isa: str
) -> None:
    """Each at every place of body and tail, in the gradient, the parameter and every state."""
    NATIVE.set_isa(isa)
    special = torch.tensor([1.5, torch.nan, torch.inf, -torch.inf])
    n, roles = 67, 2 + len(case.state_names)
    sources = [[pool(r, torch.float64)[:n].clone() for r in range(roles)] for _ in range(4 * roles)]
    for k, tensors in enumerate(sources):
        tensors[k // 4][:] = special[(torch.arange(n) + k) % 4]
    results = []
    for wide in (False, True):
        params = [Parameter(s[0].to(torch.float64 if wide else dtype, copy=True)) for s in sources]
        of_state = torch.float64 if wide else state_dtype or dtype
        optimizer = case.torchs(params) if wide else case.ours(params, state_dtype=state_dtype)
        for p, s in zip(params, sources, strict=True):
            p.grad = s[1].to(p.dtype, copy=True)
            for name, value in zip(case.state_names, s[2:], strict=True):
                square = name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
                value = torch.where(value.isfinite(), value.abs() + 9, value) if square else value
                optimizer.state[p][name] = value.to(of_state, copy=True)
            if case.row.ours.counts_steps:
                optimizer.state[p]["step"] = torch.tensor(3.0)
        optimizer.step()
        results.append([*params, *states_of(optimizer)])
    for mine, truth in zip(*results, strict=True):
        assert torch.equal(mine.isnan(), truth.isnan())
        infinite = truth.isinf()
        assert torch.equal(mine.isinf(), infinite)
        assert torch.equal(mine[infinite].double(), truth[infinite])


@parametrize_isas
@pytest.mark.parametrize("quarter", range(4))
def test_the_square_root_of_every_mantissa_is_correctly_rounded(isa: str, quarter: int) -> None:
    """Every float32 of [1, 4): a root depends on the mantissa and on the exponent's parity."""
    NATIVE.set_isa(isa)
    first = 0x3F800000 + quarter * 2**22
    check_roots(torch.arange(first, first + 2**22, dtype=torch.int32).view(torch.float32))


@parametrize_isas
def test_the_square_root_of_every_exponent_is_correctly_rounded(isa: str) -> None:
    NATIVE.set_isa(isa)
    exponents = torch.arange(256, dtype=torch.int32).repeat_interleave(1024) << 23
    mantissas = torch.randint(2**23, exponents.shape, dtype=torch.int32)
    mantissas[::1024], mantissas[1::1024], mantissas[2::1024] = 0, 1, 2**23 - 1
    check_roots((exponents | mantissas).view(torch.float32))


def check_roots(x: Tensor) -> None:
    """RMSprop with alpha = lr = 1, eps = 0 makes 0 - x/sqrt(x): another for every root."""
    param = Parameter(torch.zeros_like(x))
    optimizer = pyoptim.RMSprop([param], lr=1, alpha=1, eps=0)
    optimizer.state[param]["square_avg"] = x
    param.grad = x
    optimizer.step()
    assert same_bits(optimizer.state[param]["square_avg"], x)
    with np.errstate(invalid="ignore", divide="ignore"):
        truth = 0 - x.numpy() / np.sqrt(x.numpy())  # numpy's root is the processor's instruction
    assert_same_bits([param], [torch.from_numpy(truth)])


# -- gradient scaling ------------------------------------------------------------------------------


@parametrize_dtypes(FLOATS)
@parametrize_isas
@pytest.mark.parametrize("scale", [65536.0, 3.0])
def test_unscaling_in_the_step_equals_unscaling_before(
    dtype: torch.dtype, isa: str, scale: float
) -> None:
    NATIVE.set_isa(isa)
    sizes = (1, 33, 4095, 4096, 4097, 70001)  # unscaled in blocks of 4096
    results = []
    for inside in (True, False):
        params = [Parameter(pool(0, dtype)[:n].clone()) for n in sizes]
        optimizer = pyoptim.AdamW(params, lr=0.1)
        for t in range(2):
            for p in params:
                p.grad = pool(1 + t, dtype)[: p.numel()].clone()
            if inside:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            else:
                compute = torch.float32 if dtype in HALVES else dtype
                factor = torch.tensor(1 / scale, dtype=compute)
                for p in params:
                    p.grad = (p.grad.to(compute) * factor).to(dtype)
            optimizer.step()
        results.append([*params, *(p.grad for p in params), *states_of(optimizer)])
    assert_same_bits(*results)


@parametrize_cases(CPU_KERNEL_CASES)
def test_a_step_with_found_inf_changes_nothing(case: Case) -> None:
    optimizer = build(case, torch.float32, None, (33, 5))
    fresh = case.ours(parameters(((3,),), torch.float32))
    before = {p: {k: s.clone() for k, s in fresh.state[p].items()} for p in fresh.state}
    for o in (optimizer, fresh):
        params = o.param_groups[0]["params"]
        give_grads(params, seed=1)
        tensors = [t for p in params for t in (p, p.grad, *o.state.get(p, {}).values())]
        copies = [t.detach().clone() for t in tensors]
        o.grad_scale, o.found_inf = torch.tensor(8.0), torch.tensor(1.0)
        o.step()
        assert_same_bits(tensors, copies)
    assert {p: set(e) for p, e in fresh.state.items()} == {p: set(e) for p, e in before.items()}


# -- counters and plans ----------------------------------------------------------------------------


@parametrize_cases([c for c in CPU_KERNEL_CASES if c.row.ours.counts_steps])
@pytest.mark.parametrize("start", [2**24 - 3, 2**24, 2**31])
def test_step_counters_are_exact_where_float32_cannot_count(case: Case, start: int) -> None:
    param = Parameter(torch.zeros(3))
    optimizer = case.ours([param])
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[param]["step"] = torch.tensor(float(start))
    for t in range(1, 6):
        optimizer.step()
        assert optimizer.state[param]["step"].item() == start + t


@parametrize_cases(CPU_KERNEL_CASES)
def test_the_second_step_takes_the_fast_path(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = build(case, torch.float32, None, (33, 5))
    optimizer.step()
    assert optimizer._plan is not None

    def refuse(*_: object) -> None:
        raise AssertionError("the general path ran")

    monkeypatch.setattr(optimizer_module, "general_step", refuse)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for _ in range(3):
        optimizer.step()
    for p, b in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert not torch.equal(p, b)


@parametrize_cases(CPU_KERNEL_CASES)
def test_a_plan_of_another_instruction_set_is_dropped(case: Case) -> None:
    NATIVE.set_isa(ISAS[-1])
    optimizer = build(case, torch.float32, None, (33,))
    optimizer.step()
    plan = optimizer._plan
    NATIVE.set_isa(ISAS[0])
    optimizer.step()
    assert (optimizer._plan is plan) == (len(ISAS) == 1)
    assert_same_bits(run(optimizer, 0), run(build(case, torch.float32, None, (33,))))


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        NATIVE.set_isa("mmx")
    assert NATIVE.active_isa() in ISAS


# -- ways to the tensors ---------------------------------------------------------------------------


def digest() -> str:
    """Of every kernel's results, with a late gradient and a new gradient layout."""
    sha = hashlib.sha256()
    for case in KERNEL_CASES:
        for dtype, state_dtype in (*KERNEL_DTYPES, (torch.complex64, None)):
            params = parameters(((4, 3), (17,), ()), dtype)
            optimizer = case.ours(params, state_dtype=state_dtype)
            for t in range(4):
                give_grads(params, seed=t)
                params[1].grad = None if t == 1 else params[1].grad
                if t == 2:
                    params[0].grad = params[0].grad.t().contiguous().t()
                optimizer.step()
            for tensor in (*params, *states_of(optimizer)):
                sha.update(as_wide(tensor).numpy().tobytes())
    return sha.hexdigest()


REPORT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_engine
native = test_engine.NATIVE
print(native.access_path(), native.active_isa(), test_engine.digest(), sep="|")
"""


def test_the_environment_chooses_access_and_instruction_set() -> None:
    command = [sys.executable, "-c", REPORT, str(Path(__file__).parent)]
    env = {**os.environ, "PYOPTIM_ACCESS": "dlpack", "PYOPTIM_ISA": "baseline"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().split("|") == ["dlpack", "baseline", digest()]


def test_the_symbols_of_libtorch_are_in_use() -> None:
    """Not promised for every torch: a failure here means that steps are slower, not wrong."""
    if "PYOPTIM_ACCESS" in os.environ:
        pytest.skip("PYOPTIM_ACCESS is set")
    assert NATIVE.access_path() == "libtorch symbols"


# -- machine code ----------------------------------------------------------------------------------

# Of the rules that project: what they do without a projection.
UPDATE = r"update_segment|9Projected\w+6updateE"
RANGE = "update_range"
REGISTERS = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm", "avx512_bf16": "zmm"}


def objdump(*options: str) -> str:
    return subprocess.run(
        ["objdump", *options, NATIVE.__file__], capture_output=True, text=True, check=True
    ).stdout


def functions_by_address(name: str) -> dict[int, str]:
    """Address of every function so named -> the instruction set it was compiled for."""
    found, isa = {}, ""
    for line in objdump("--syms").splitlines():
        if re.search(r"\bdf \*ABS\*", line):
            isa = re.sub(r"^isa_(\w+)\.cpp$", r"\1", line.split()[-1])
        elif re.search(name, line) and " F " in line:
            found[int(line.split()[0], 16)] = isa
    return found


def test_every_kernel_computes_in_full_vector_registers() -> None:
    if platform.machine() != "x86_64":
        pytest.skip(f"the registers of {platform.machine()} are not known to this test")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    isas = functions_by_address(UPDATE)
    if not isas:
        pytest.skip("pyoptim._C is stripped of its symbols")
    infos = [NATIVE.rule_info(rule) for rule in NATIVE.rules()]
    # Every half-precision parameter, with a master.
    n_dtypes = [len(KERNEL_DTYPES) + 4 * info["has_master"] for info in infos]
    n_kernels = sum(n * len(info["state_names"]) for n, info in zip(n_dtypes, infos, strict=True))
    assert {isa: list(isas.values()).count(isa) for isa in NATIVE.built_isas()} == dict.fromkeys(
        NATIVE.built_isas(), n_kernels
    )
    # What was not put in line, for one.
    isas |= functions_by_address(RANGE)
    scalar = []
    for text in objdump("-d", "--no-show-raw-insn").split("\n\n"):
        head = re.match(rf"\s*([0-9a-f]+) <(\S*(?:{UPDATE}|{RANGE})\S*)>:", text)
        if head is None or int(head[1], 16) not in isas:
            continue
        isa = isas.pop(int(head[1], 16))
        if re.search(
            rf"^\S+\s+jmp\s+\S+ <\S*(?:{UPDATE}|{RANGE})\S*>", text.split("\n", 1)[1].strip()
        ):
            continue  # the compiler found an equal function: state types of a rule without state
        suffix = "pd" if "IdEE" in head[2] else "ps"
        if not re.search(rf"\bv?mul{suffix}\s.*%{REGISTERS[isa]}\d", text):
            scalar.append(f"{isa}: {head[2]}")
    assert not isas, "not every kernel was disassembled"
    assert not scalar
