"""Compiles what the engine launches, through Triton's own launch path, and reads the machine code.

The calls are those of the engine. Only the driver is not real, and the last step, the launch, is
`warmup`, which compiles for the same arguments.
"""

import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from pyoptim.kernels import engine, launcher, reduce, search

# Kind of rows, whether the values are stored: the filters that are compiled.
FilterJob = tuple[str, bool]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CPU = torch.device("cpu")
ARCHS = (80, 90, 100, 120)
# Without a master copy of the parameter.
PLAIN_SETS = tuple(name for name, types in engine.DTYPES.items() if not types.has_master)
# Rule, variant, dtypes, is aligned, with live factors and parameters that are read from copies.
UpdateJob = tuple[str, int, str, bool, bool]


class PretendedDriver:
    """As much of a driver as a launch asks for before it would touch the device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # one cache of compiled kernels for each

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self) -> tuple[int, int]:
        return divmod(self.arch, 10)


@dataclass(frozen=True)
class Code:
    """What is known of one compiled kernel."""

    name: str
    registers: int
    stack: int
    shared: int
    ptx: str
    sass: str  # or nothing: of some kernels for sm_90

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

    def count_instructions(self, pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}", self.sass))


def compile_calls(name: str, arch: int, call: Callable[[], None]) -> list[Code]:
    """The kernels that `call` would launch on a device of this architecture."""
    found: list[Any] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        found.append(kernel.warmup(*args, grid=grid, **{**launcher.OPTIONS, **constants}))

    real = launcher.launch
    triton.runtime.driver.set_active(PretendedDriver(arch))
    launcher.launch = compile_only
    try:
        call()
    finally:
        launcher.launch = real
    # Disassembling takes as long as compiling: two rules show what ptxas makes of all.
    with_sass = arch == 90 and name.startswith(("sgd.", "adam.", "line_", "filter"))
    return [read(f"sm_{arch} {name}", k.asm["cubin"], k.asm["ptx"], with_sass) for k in found]


def read(name: str, cubin: bytes, ptx: str, with_sass: bool) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name) if with_sass else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found, usage
    # Without comments: they would name instructions too.
    code = "\n".join(line for line in ptx.splitlines() if not line.lstrip().startswith("//"))
    return Code(name, *map(int, found.groups()), code, sass)


def _run(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


# -- jobs, by name: they run in other processes ----------------------------------------------------


def is_complete(arch: int) -> bool:
    """Whether all kernels are compiled for it."""
    return arch == 90 or os.environ.get("PYOPTIM_TRITON_AOT") == "all"


def update_jobs(arch: int) -> list[UpdateJob]:
    """Every update kernel for sm_90, and for the other architectures those of two sets of dtypes,
    one aligned and one not, or with PYOPTIM_TRITON_AOT=all every one.

    The rest would take two thirds of the time and has never differed in more than registers. The
    live factors and copies add the same instructions to every rule: one of them stands for all.
    """
    kinds = [("f32", True), ("bf16_state32", False)]
    if is_complete(arch):
        kinds = list(itertools.product(PLAIN_SETS, (True, False)))
    jobs = [
        (rule, variant, *kind, False)
        for rule, module in engine.RULES.items()
        if not (hasattr(module, "projection") or rule.startswith("line_"))
        for variant in range(len(module.N_STATES))
        for kind in kinds
    ]
    return jobs + [("adam", 1, *kind, True) for kind in kinds]


def array_jobs(arch: int) -> list[tuple[str, bool]]:
    """Dtype, is aligned."""
    if is_complete(arch):
        return list(itertools.product(("f64", "f32", "bf16", "f16"), (True, False)))
    return [("f32", True), ("bf16", False)]


def line_jobs(arch: int) -> list[UpdateJob]:
    """Steps and trials of a line search; of a trial with live factors the one that adds up.

    Two variants, with every set of dtypes for sm_90: the others leave out what these two have.
    """
    jobs = [("line_step", 5, "f32", True, False), ("line_trial", 5, "f32", True, True)]
    if arch != 90:
        return jobs
    jobs += [("line_step", 3, d, True, False) for d in engine.DTYPES if d not in PLAIN_SETS]
    jobs += [("line_trial", 3, d, True, True) for d in engine.DTYPES]
    return [*jobs, *(("line_trial", 3, "f32", *flags) for flags in ((True, False), (False, True)))]


def job_name(job: UpdateJob) -> str:
    rule, variant, dtypes, is_aligned, is_live = job
    aligned = "aligned" if is_aligned else "unaligned"
    return f"{rule}.{variant} {dtypes} {aligned}" + (" factors" if is_live else "")


def compile_update(job: UpdateJob, arch: int) -> list[Code]:
    rule, variant, dtypes, is_aligned, is_live = job
    n_arrays = 2 + engine.RULES[rule].N_STATES[variant] + is_live
    size = engine.DTYPES[dtypes].bytes_of(0)
    addresses = torch.full((n_arrays,), 4096 if is_aligned else 4096 + size).numpy().tobytes()
    float32, float64 = torch.ones(1), torch.ones(1, dtype=torch.float64)

    def call() -> None:
        engine.update(
            *(rule, variant, dtypes, CPU, addresses, torch.tensor([100]).numpy().tobytes()),
            *(bytes(4), bytes(96), torch.zeros(96, dtype=torch.uint8) if is_live else None),
            *(1.0, float32 if is_live else None, 1.0, float64 if is_live else None),
            *(float32 if is_live else None, {}, is_live),
        )

    return compile_calls(job_name(job), arch, call)


def compile_line(job: UpdateJob, arch: int) -> list[Code]:
    rule, variant, dtypes, is_aligned, is_live = job
    types = engine.DTYPES[dtypes]
    n_arrays = 2 + engine.RULES[rule].N_STATES[variant] + types.has_master
    addresses = torch.full((n_arrays,), 4096 if is_aligned else 4096 + types.bytes_of(0))
    saved = torch.tensor([0 if types.has_master or not is_live else 4096, 0])
    clip, sums = torch.ones(1, dtype=torch.float64), torch.zeros(8, dtype=torch.uint8)

    def call() -> None:
        engine.update(
            *(rule, variant, dtypes, CPU, addresses.numpy().tobytes()),
            *(torch.tensor([100]).numpy().tobytes(), bytes(4), bytes(96), None),
            *(1.0, None, 1.0, clip if is_live else None, None, {}, types.has_master),
            *(b"", saved.numpy().tobytes(), sums if is_live else None),
        )

    return compile_calls(job_name(job), arch, call)


def project_jobs(arch: int) -> list[UpdateJob]:
    """Some updates of rules that project: a step has ten kernels, which are long to compile.

    One architecture stands for all but in the most common set of dtypes.
    """
    jobs = [("adamp", 1, "f32", True, True)]
    if arch == 90:
        jobs += [("sgdp", 0, "bf16_state32", False, False), ("adamp", 0, "f64", True, False)]
    return jobs


def compile_project(job: UpdateJob, arch: int) -> list[Code]:
    """Every phase, for a tensor of short rows and one of rows of several chunks."""
    rule, variant, dtypes, is_aligned, is_live = job
    n_arrays = 2 + engine.RULES[rule].N_STATES[variant] + is_live
    size = engine.DTYPES[dtypes].bytes_of(0)
    addresses = torch.full((2 * n_arrays,), 4096 if is_aligned else 4096 + size)
    numels, rows = torch.tensor([24, 80000]), torch.tensor([3, 4, 8, 20000])
    scale, clip = (torch.ones(1), torch.ones(1, dtype=torch.float64)) if is_live else (None, None)

    def call() -> None:
        engine.update(
            *(rule, variant, dtypes, CPU, addresses.numpy().tobytes(), numels.numpy().tobytes()),
            *(bytes(8), bytes(96), torch.zeros(192, dtype=torch.uint8) if is_live else None),
            *(1.0, scale, 1.0, clip, scale, {}, is_live, rows.numpy().tobytes()),
        )

    return compile_calls(f"{job_name(job)} project", arch, call)


def compile_prepare(rule: str, arch: int) -> list[Code]:
    def call() -> None:
        for is_double in (False, True):
            engine.prepare(
                *(rule, is_double, CPU, bytes(96), bytes(96), bytes(12), bytes(8), bytes(1)),
                *(bytes(4), torch.zeros(1), torch.zeros(96, dtype=torch.uint8), {}),
            )

    return compile_calls(f"prepare {rule}", arch, call)


def compile_arrays(dtype: str, is_aligned: bool, arch: int) -> list[Code]:
    """The kernels that read arrays given by addresses: partials of four kinds, and scale."""
    address = torch.tensor([4096 if is_aligned else 4098]).numpy().tobytes()
    numel, first = (torch.tensor([n]).numpy().tobytes() for n in (100, 0))
    out = torch.zeros(1, dtype=torch.float64)

    def call() -> None:
        for kind in (0, 1, 2):
            reduce.partials(kind, CPU, address, numel, dtype, first, out)
        reduce.partials(0, CPU, address, numel, dtype, first, out, address, first)
        reduce.scale(CPU, address, numel, dtype, 0.5, None)

    return compile_calls(f"{dtype} {'aligned' if is_aligned else 'unaligned'}", arch, call)


def compile_others(arch: int) -> list[Code]:
    out = torch.zeros(3, dtype=torch.float64)

    def call() -> None:
        for kind in (0, 1, 2):
            reduce.norms(kind, out, [3], out)
        reduce.clip(out, 1.0, 1.0, torch.ones(1), out)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = torch.zeros(8, dtype=dtype)
            reduce.row_sums(x, x, 2, 4, 4, out)
            reduce.row_sums(x, x, 2, 4, 1, out)
        reduce.row_sums(x, x, 2, 1 << 20, 8, out)

    return compile_calls("sums", arch, call)


def filter_jobs(arch: int) -> list[FilterJob]:
    """They take long to compile: one stands for all but on sm_90."""
    if not is_complete(arch):
        return [("split", False)]
    return [("split", False), ("split", True), ("bfloat16", False), ("float16", False)]


def compile_filter(job: FilterJob, arch: int) -> list[Code]:
    kind, stores = job
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    high, norms = torch.zeros(40, 64, dtype=dtype), torch.zeros(40, dtype=torch.float64)
    low = torch.zeros(40, 64, dtype=dtype) if kind == "split" else None
    rows = search.Packed(high, low, norms, torch.zeros(40))
    kernels = search.TritonEngine(CPU)

    def call() -> None:
        if stores:
            kernels.values(rows, rows, 64, 2)
        else:
            kernels.nearest(rows, rows, 64, 2)

    return compile_calls(f"filter {kind}{' values' if stores else ''}", arch, call)


def compile_scores(dtype: torch.dtype, arch: int) -> list[Code]:
    """What reads rows: ten kernels, of which one is compiled for every metric."""
    kernels, x = search.TritonEngine(CPU), torch.zeros(40, 33, dtype=dtype)
    numbers, rows = torch.zeros(40, dtype=torch.float64), torch.arange(40)
    least = torch.zeros(1, 3, 40), torch.zeros(1, 2, 40, dtype=torch.int32)
    memory = torch.zeros(2048 * 24, dtype=torch.uint8)

    def call() -> None:
        kernels.squares(x, rows)
        kernels.pack(x, rows, 0, True, numbers, numbers, True)
        for metric in (0, 1, 2):
            kernels.scores((x, None), (x, rows), metric, None)
        factors = (1.0, 1.0, 1.0, 1.0)
        kernels.certify(
            *((x, None), (x, rows), 0, factors, numbers, numbers, least, 0, numbers, rows)
        )
        kernels.step_center(x, None, numbers, memory, memory[:24])
        kernels.center_sqdist(x, rows, numbers.expand(2, -1).contiguous())

    return compile_calls(f"scores {dtype}", arch, call)
