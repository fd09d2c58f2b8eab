"""Every kernel compiles for every architecture, to machine code as good and as exact as meant."""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import cubins
import pytest
import torch
import triton
import triton.language as tl
from cubins import (
    ARCHS,
    CPU,
    Code,
    array_jobs,
    compile_calls,
    filter_jobs,
    is_complete,
    job_name,
    line_jobs,
    project_jobs,
    update_jobs,
)

from pyoptim.kernels import engine, launcher

# Four blocks of 128 threads share the 65536 registers of a processor: enough for the loads of the
# one to be under way while another computes.
MAX_REGISTERS = 128
# ptxas (12.8 and 13.0) puts a value or two aside rather than take the registers that would cost a
# resident block: 9 of 480 kernels, none of them an aligned one on sm_80 or sm_90. With maxnreg=128
# none does, but then every kernel takes up to 128.
MAX_STACK = 16
FUSED = r"\bfma\."
INEXACT = r"\.ftz|\.approx|\bdiv\.full"


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[Code]]:
    """Every kernel for every architecture, by its part of the library; two at a time."""
    jobs: list[tuple[str, Callable[..., list[Code]], tuple[Any, ...]]] = []
    for arch in ARCHS:
        jobs += [("update", cubins.compile_update, (job, arch)) for job in update_jobs(arch)]
        jobs += [("line", cubins.compile_line, (job, arch)) for job in line_jobs(arch)]
        jobs += [("project", cubins.compile_project, (job, arch)) for job in project_jobs(arch)]
        jobs += [("prepare", cubins.compile_prepare, (rule, arch)) for rule in engine.RULES]
        jobs += [("arrays", cubins.compile_arrays, (*job, arch)) for job in array_jobs(arch)]
        jobs.append(("sums", cubins.compile_others, (arch,)))
        jobs += [("filter", cubins.compile_filter, (job, arch)) for job in filter_jobs(arch)]
    jobs += [("scores", cubins.compile_scores, (dtype, 90)) for dtype in (torch.float32,)]
    found: dict[str, list[Code]] = {}
    # LLVM's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        pending = [(part, pool.submit(function, *args)) for part, function, args in jobs]
        for part, future in pending:
            found.setdefault(part, []).extend(future.result())
    return found


def of(codes: dict[str, list[Code]], *parts: str) -> list[Code]:
    return [code for part in parts for code in codes[part]]


def offenders(codes: Iterable[Code], is_wrong: Callable[[Code], bool]) -> list[str]:
    codes = list(codes)
    assert codes, "nothing to check"
    return [code.name for code in codes if is_wrong(code)]


def is_spilling(code: Code) -> bool:
    return code.stack > MAX_STACK


def is_synchronised(code: Code) -> bool:
    return code.shared > 0 or code.count(r"\bbar\.|ld\.shared|st\.shared") > 0


def has_wide_access(code: Code) -> bool:
    """Loads or stores of more than one element of 32 bits, or of more than one of 64."""
    # The tables are read one element at a time.
    return code.count(r"(ld|st)\.global[\w.:]*\.v[248]\.") > 0


def lacks_wide_access(code: Code) -> bool:
    """Whether an array is not read and written by whole vectors."""
    dtypes = code.name.split()[2]
    is_plain_sgd = code.name.split()[1] == "sgd.0"
    if dtypes.endswith("_state32"):  # the 16-bit arrays go by 64 bits
        wide = ("v2.b32",) if is_plain_sgd else ("v2.b32", "v4.b32")
    else:
        wide = ("v2.b64",) if dtypes == "f64" else ("v4.b32",)
    # Ascent saves the weight without a look at what it saved before.
    only_writes = code.name.split()[1].startswith("ascent.") and dtypes.endswith("_state32")
    ops = ("st",) if only_writes else ("ld", "st")
    in_ptx = all(code.count(rf"{op}\.global[\w.:]*\.{w}") for w in wide for op in ops)
    sass = "64" if dtypes.endswith("_state32") and is_plain_sgd else "128"
    in_sass = all(code.count_instructions(rf"{op.upper()}G\.E\.{sass}") for op in ops)
    return not in_ptx or (code.sass != "" and not in_sass)


def test_every_kernel_is_compiled_for_every_architecture(compiled: dict[str, list[Code]]) -> None:
    rules = [
        rule
        for name, rule in engine.RULES.items()
        if not (hasattr(rule, "projection") or name.startswith("line_"))
    ]
    n_variants = sum(len(rule.N_STATES) for rule in rules)
    n_kinds = sum(12 if is_complete(arch) else 2 for arch in ARCHS)
    assert len(compiled["update"]) == (n_variants + 1) * n_kinds
    assert len(compiled["line"]) == sum(len(line_jobs(arch)) for arch in ARCHS)
    assert len(compiled["prepare"]) == 2 * len(engine.RULES) * len(ARCHS)
    # Short rows are checked in one launch, long ones too; those are summed, folded and written.
    n_phases = 2 + 2 + 3 + 1 + 1 + 1
    n_unscaling = sum(job[-1] for arch in ARCHS for job in project_jobs(arch))
    n_jobs = sum(len(project_jobs(arch)) for arch in ARCHS)
    assert len(compiled["project"]) == n_phases * n_jobs + n_unscaling
    assert len(compiled["arrays"]) == 5 * sum(len(array_jobs(arch)) for arch in ARCHS)
    assert len(compiled["filter"]) == sum(len(filter_jobs(arch)) for arch in ARCHS)
    assert len(compiled["scores"]) == 2 + 3 + 2 + 2 + 1
    assert len(compiled["sums"]) == (3 + 1 + 4 * 2 + 2) * len(ARCHS)


def test_no_kernel_spills_registers(compiled: dict[str, list[Code]]) -> None:
    assert offenders(of(compiled, *compiled), is_spilling) == []


def test_registers_leave_room_for_four_blocks(compiled: dict[str, list[Code]]) -> None:
    codes = of(compiled, *(part for part in compiled if part != "filter"))
    assert offenders(codes, lambda code: code.registers > MAX_REGISTERS) == []


def test_filters_multiply_on_tensor_cores(compiled: dict[str, list[Code]]) -> None:
    """Warp groups' instructions on sm_90, warps' elsewhere; packed rows come 16 bytes at once."""

    def is_slow(code: Code) -> bool:
        word = "wgmma.mma_async" if code.name.startswith("sm_90") else "mma.sync|tcgen05.mma"
        copies = r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10"
        return code.count(word) == 0 or code.count(copies) == 0

    assert offenders(compiled["filter"], is_slow) == []
    sm_90 = [code for code in compiled["filter"] if code.name.startswith("sm_90")]
    assert offenders(sm_90, lambda code: code.count_instructions("HGMMA") == 0) == []


def test_sweeps_of_rules_that_project_access_four_elements_at_once(
    compiled: dict[str, list[Code]],
) -> None:
    codes = [c for c in compiled["project"] if " aligned" in c.name]
    wide = [c for c in codes if has_wide_access(c)]
    # Of ten: sweep, write, the check of long rows, and their two phases; unscaling.
    assert len(wide) >= 5 * sum(
        " aligned" in job_name(job) for a in ARCHS for job in project_jobs(a)
    )
    unaligned = [c for c in compiled["project"] if " unaligned" in c.name]
    assert offenders(unaligned, has_wide_access) == []


def test_aligned_arrays_are_accessed_by_16_bytes(compiled: dict[str, list[Code]]) -> None:
    codes = [c for c in compiled["update"] if " aligned" in c.name]
    assert offenders(codes, lacks_wide_access) == []
    codes = [c for c in of(compiled, "arrays", "line") if " aligned" in c.name]
    assert offenders(codes, lambda code: not has_wide_access(code)) == []
    codes = [c for c in compiled["line"] if " f32 aligned" in c.name]
    assert offenders(codes, lacks_wide_access) == []


def test_unaligned_arrays_are_accessed_by_element(compiled: dict[str, list[Code]]) -> None:
    codes = [c for c in of(compiled, "update", "arrays", "line") if " unaligned" in c.name]
    assert offenders(codes, has_wide_access) == []
    assert offenders(codes, lambda code: code.count_instructions(r"(LDG|STG)\.E\.128") > 0) == []


def test_no_update_waits_for_another_thread(compiled: dict[str, list[Code]]) -> None:
    assert offenders(of(compiled, "update", "prepare"), is_synchronised) == []


def test_no_kernel_uses_atomics(compiled: dict[str, list[Code]]) -> None:
    assert offenders(of(compiled, *compiled), lambda c: c.count(r"\b(atom|red)\.") > 0) == []


def test_arithmetic_is_rounded_as_on_the_cpu(compiled: dict[str, list[Code]]) -> None:
    """No fused multiply-add, approximation or flushed subnormal but in the powers of Adam,
    Expectigrad and line searches, whose float64 exp2 and log2 are made of such."""
    with_powers = ("prepare adam", "prepare expectigrad", "prepare line_")
    codes = [c for c in of(compiled, *compiled) if not any(p in c.name for p in with_powers)]
    assert offenders(codes, lambda code: code.count(f"{FUSED}|{INEXACT}") > 0) == []
    # ptxas would fuse too; where no division or root hides it, the machine code shows that it did
    # not.
    plain = [c for c in codes if c.name.startswith("sm_90 sgd.")]
    assert offenders(plain, lambda code: code.count_instructions("[FD]FMA") > 0) == []


# -- that the checks can fail ----------------------------------------------------------------------


@triton.jit
def multiply_add_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) * tl.load(x + BLOCK + i) + tl.load(y + i))


@triton.jit
def inexact_kernel(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, 1.0 / tl.sqrt(tl.load(x + i)))


@triton.jit
def atomic_kernel(x, BLOCK: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, BLOCK), 1.0)


@triton.jit
def sum_kernel(x, BLOCK: tl.constexpr):
    tl.store(x, tl.sum(tl.load(x + tl.arange(0, BLOCK)), axis=0))


def compile_faulty(kernel: Any, *args: Any, **constants: Any) -> Code:
    def call() -> None:
        launcher.launch(kernel, (1,), *args, **constants)

    [code] = compile_calls("sgd.0 f32", 90, call)
    return code


def test_the_checks_notice_a_spill() -> None:
    code = compile_faulty(multiply_add_kernel, torch.ones(1), torch.ones(1), BLOCK=1 << 16)
    assert is_spilling(code)


def test_the_checks_notice_fused_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    args = torch.ones(1), torch.ones(1)
    exact = compile_faulty(multiply_add_kernel, *args, BLOCK=128)
    assert exact.count(FUSED) == exact.count_instructions("FFMA") == 0
    monkeypatch.setitem(launcher.OPTIONS, "enable_fp_fusion", True)
    fused = compile_faulty(multiply_add_kernel, *args, BLOCK=128)
    assert fused.count(FUSED) + fused.count_instructions("FFMA") > 0


def test_the_checks_notice_approximations_barriers_and_atomics() -> None:
    assert compile_faulty(inexact_kernel, torch.ones(1), BLOCK=128).count(INEXACT) > 0
    assert is_synchronised(compile_faulty(sum_kernel, torch.ones(1), BLOCK=1024))
    assert compile_faulty(atomic_kernel, torch.ones(1), BLOCK=128).count(r"\b(atom|red)\.") > 0


def test_the_checks_notice_a_wrong_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors for arrays that are not aligned, and none for those that are."""
    job = ("adam", 0, "f32", False, False)
    monkeypatch.setattr(engine, "parts_of", forced_vector(engine.parts_of, 4))
    [code] = cubins.compile_update(job, 90)
    assert has_wide_access(code)
    assert code.count_instructions(r"LDG\.E\.128") > 0
    monkeypatch.undo()
    monkeypatch.setattr(engine, "parts_of", forced_vector(engine.parts_of, 1))
    [code] = cubins.compile_update(("adam", 0, "f32", True, False), 90)
    assert lacks_wide_access(code)


def forced_vector(real: Callable[..., Any], vector: int) -> Callable[..., Any]:
    def parts(*args: Any) -> Any:
        found = real(*args)
        for part in found:
            part.vector = vector
        return found

    return parts


def test_values_compile_nothing_anew() -> None:
    """Numbers of rows, chunks and groups, scales and clips, addresses: none is part of a kernel."""
    seen = set()

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        seen.add(id(kernel.warmup(*args, grid=grid, **{**launcher.OPTIONS, **constants})))

    triton.runtime.driver.set_active(cubins.PretendedDriver(90))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "launch", note)
        for n, numel, inv_scale, clip in (
            (1, 1, 0.5, 0.5),
            (2, 1, -0.0, 7.0),
            (16, 10**6, 2, 1e-300),
        ):
            addresses = torch.full((2 * n,), 4096 * n).numpy().tobytes()
            numels = torch.full((n,), numel).numpy().tobytes()
            engine.update(
                *("sgd", 0, "f32", CPU, addresses, numels, bytes(4 * n), bytes(96), None),
                *(inv_scale, None, clip, None, None, {}),
            )
    assert len(seen) == 1
