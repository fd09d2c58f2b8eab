"""What nvcc made of the CUDA kernels, read from their machine code; needs no GPU.

The PTX shows the arithmetic as the compiler was told to do it: later stages expand divisions and
roots into sequences of fused multiply-adds, which round correctly. The machine code shows the
registers, the stack and the width of every access.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

import pyoptim

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(pyoptim.__file__).parent
ARCHS = ("80", "90", "100", "120")
ITEM_SIZES = {"double": 8, "float": 4, "Bf16": 2, "F16": 2}
# The most that a kernel's parameters may hold, with a driver and a compiler of CUDA 12.1 or later.
PARAMETER_BYTES = 32764
# Of the 65,536 registers of a multiprocessor, 80 leave room for three blocks of 256 threads: some
# load while others compute. 128 leave room for two, which is the least.
REGISTERS, MOST_REGISTERS = 80, 128
# Of the filters one block has a multiprocessor to itself: its accumulators are 128 of the 255.
FILTER_REGISTERS = 255
FILTERS = {
    f"{kind}_kernel<{element}, {parts}>"
    for kind in ("nearest", "values")
    for element, parts in (("Bf16", 1), ("F16", 1), ("Bf16", 2))
}

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the source tree is not here: setup.py is missing"
)


# -- tools -----------------------------------------------------------------------------------------


def toolkit_folders() -> list[Path]:
    """Where CUDA's programs may be; triton brings a disassembler of its own."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home, "bin") for home in homes if home]
    folders += [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return folders


def tool(name: str) -> str:
    path = os.pathsep.join(map(str, toolkit_folders()))
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is missing: it is part of the CUDA toolkit, and comes with triton")
    return found


def printed(*command: object, stdin: str | None = None) -> str:
    path = os.pathsep.join(map(str, toolkit_folders()))
    result = subprocess.run(
        [str(word) for word in command],
        input=stdin,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def demangled(text: str) -> str:
    """`text` with C++ names as written, unnamed namespaces left out."""
    plain = printed(shutil.which("c++filt") or tool("cu++filt"), stdin=text)
    return re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+?::|pyoptim::|gpu::", "", plain)


def built_here() -> Path:
    """The engine as setup.py builds it for all of ARCHS; object files are kept in build/."""
    if os.environ.get("PYOPTIM_CUDA") == "0":
        pytest.skip(
            "the CUDA engine is missing, and PYOPTIM_CUDA=0 keeps the tests from building it"
        )
    target = ROOT / "build" / "cuda-tests"
    env = {key: value for key, value in os.environ.items() if key != "PYOPTIM_SANITIZE"}
    env["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{env['PATH']}"
    env["PYOPTIM_CUDA_ARCHS"] = ";".join(ARCHS)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    cuda = json.loads((target / "pyoptim" / "_build_info.json").read_text())["cuda"]
    assert "failed on pyoptim's sources" not in (cuda["reason"] or ""), result.stdout
    if not cuda["built"]:
        pytest.skip(f"the CUDA engine cannot be built here: {cuda['reason']}")
    return target / "pyoptim"


@pytest.fixture(scope="module")
def package() -> Path:
    """The folder with the engine and its record: as installed, or else built for the tests."""
    info = PACKAGE / "_build_info.json"
    if info.exists() and json.loads(info.read_text())["cuda"]["built"]:
        return PACKAGE
    return built_here()


@pytest.fixture(scope="module")
def library(package: Path) -> Path:
    return package / "_cuda.so"


@pytest.fixture(scope="module")
def archs(package: Path) -> list[str]:
    return json.loads((package / "_build_info.json").read_text())["cuda"]["archs"]


# -- machine code ----------------------------------------------------------------------------------


@dataclass
class Kernel:
    """One kernel in the machine code of one architecture, or in PTX (architecture "ptx")."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    parameter_bytes: int = 0
    code: Counter[str] = field(default_factory=Counter)  # instruction -> times

    def count(self, pattern: str) -> int:
        return sum(n for word, n in self.code.items() if re.fullmatch(pattern, word))


@cache
def machine_code(path: Path, arch: str) -> list[Kernel]:
    """Every kernel of `path` for compute capability `arch`."""
    cuobjdump = tool("cuobjdump")
    usage = printed(cuobjdump, "-arch", f"sm_{arch}", "-res-usage", path)
    kernels = {
        name: Kernel(name, arch, int(registers), int(stack) + int(local))
        for name, registers, stack, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
        )
    }
    for part in printed(cuobjdump, "-arch", f"sm_{arch}", "-sass", path).split("Function : ")[1:]:
        words = re.findall(r"/\*\w{4,}\*/ +(?:@!?\w+ +)?([A-Z][\w.]*)", part)
        kernels[part.split(None, 1)[0]].code.update(words)
    return with_plain_names(kernels.values())


@cache
def ptx(path: Path) -> list[Kernel]:
    """Every kernel of `path` in PTX."""
    return parsed_ptx(printed(tool("cuobjdump"), "-ptx", path))


def parsed_ptx(text: str) -> list[Kernel]:
    sizes = {"8": 1, "16": 2, "32": 4, "64": 8}
    kernels = []
    for part in text.split(".entry ")[1:]:
        name, head, body = re.match(r"([\w$]+)\((.*?)\)(.*)", part, re.DOTALL).groups()
        parameters = re.findall(r"\.param .*?\.[a-z](\d+) \w+(?:\[(\d+)\])?", head)
        kernels.append(
            Kernel(
                name,
                "ptx",
                parameter_bytes=sum(sizes[bits] * int(n or 1) for bits, n in parameters),
                code=Counter(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*)", body, re.MULTILINE)),
            )
        )
    return with_plain_names(kernels)


def with_plain_names(kernels: Iterable[Kernel]) -> list[Kernel]:
    found = list(kernels)
    names = demangled("\n".join(kernel.name for kernel in found)).splitlines()
    for kernel, name in zip(found, names, strict=True):
        kernel.name = re.match(r"(?:void )?(\w+(?:<.*?>)?)\(", name)[1]
    return found


@dataclass(frozen=True)
class Instance:
    """The template arguments of an update kernel, or of one that adds up terms."""

    rule: str
    variant: int
    param: str
    state: str
    source: str  # float where the parameter has a master
    adds_up: bool = False

    @classmethod
    def of(cls, kernel: Kernel) -> "Instance | None":
        found = re.match(
            r"(update|sum)_kernel<(\w+)<\w+>, (\d), (\w+), (\w+)(?:, (\w+))?>", kernel.name
        )
        if found is None:
            return None
        _, rule, variant, param, state, source = found.groups()
        return cls(rule, int(variant), param, state, source or param, found[1] == "sum")

    @property
    def has_master(self) -> bool:
        return self.source != self.param

    @property
    def n_states(self) -> int:
        return state_counts()[self.rule][self.variant]

    @property
    def n_states_read(self) -> int:
        """Ascent saves the weight without a look at what it saved before."""
        return 0 if self.rule == "Ascent" else self.n_states

    @property
    def n_params_written(self) -> int:
        """A trial saves what it read, unless there is a master."""
        return 2 if self.adds_up and not self.has_master else 1


@cache
def state_counts(projecting: bool = False) -> dict[str, list[int]]:
    """Rule -> the number of its states by variant, from the headers of the rules that project rows,
    or of the others."""
    counts, bases = {}, {}
    for path in (ROOT / "csrc" / "rules").glob("*.hpp"):
        text = path.read_text()
        bases.update(re.findall(r"^struct (\w+) : (\w+)<T> \{", text, re.MULTILINE))
        if ("bool kProjectsBuffer[kVariants]" in text) != projecting:
            continue
        if found := re.search(r"int kStates\[kVariants\] = \{([\d, ]+)\}", text):
            rule = re.findall(r"^struct (\w+) \{", text[: found.start()], re.MULTILINE)[-1]
            counts[rule] = [int(n) for n in found[1].split(",")]
    derived = {rule: counts[base] for rule, base in bases.items() if base in counts}
    return {rule: n for rule, n in counts.items() if rule not in bases.values()} | derived


# -- what is checked: each takes a kernel and returns what is wrong with it ------------------------


# ptxas 13.0 puts two values of this one aside, for sm_100 only.
SET_ASIDE = ("partials_kernel<(reduce::Kind)0>", "100", 16)


def spills(kernel: Kernel) -> str | None:
    if (kernel.name, str(kernel.arch), kernel.stack) == SET_ASIDE:
        return None
    accesses = kernel.count(r"(LDL|STL)(\..*)?")
    if kernel.stack or accesses:
        return f"{kernel.stack} bytes of stack, {accesses} accesses to it"
    return None


def needs_too_many_registers(kernel: Kernel) -> str | None:
    """Sums keep many partial results; of sixteen bytes, eight 16-bit or two float64 elements take
    as much room as two accesses to float32."""
    instance = Instance.of(kernel)
    is_lean = instance is not None and instance.state == "float" and not instance.adds_up
    most = REGISTERS if is_lean else MOST_REGISTERS
    most = FILTER_REGISTERS if kernel.name in FILTERS else most
    return f"{kernel.registers} registers, not {most}" if kernel.registers > most else None


def uses_atomics(kernel: Kernel) -> str | None:
    n = kernel.count(r"(ATOM|RED)[GS]?(\..*)?")
    return f"{n} atomic instructions" if n else None


def accesses_too_narrowly(kernel: Kernel) -> str | None:
    """Wants one access per array that moves as many elements as 16 bytes of the widest array, and
    where terms are added up four."""
    instance = Instance.of(kernel)
    if instance is None:
        return None
    names = (instance.param, instance.state, instance.source)
    sizes = {name: ITEM_SIZES[name] for name in names}
    n_elements = 4 if instance.adds_up else 16 // max(sizes.values())
    loads, stores = Counter[int](), Counter[int]()
    for element, n_loads, n_stores in (
        (instance.source, 1, int(instance.has_master and not instance.adds_up)),
        (instance.param, 1, instance.n_params_written),  # its gradient is read
        (instance.state, instance.n_states_read, 0 if instance.adds_up else instance.n_states),
    ):
        bits = min(128, 8 * n_elements * sizes[element])
        loads[bits] += n_loads
        stores[bits] += n_stores
    wanted = [("LDG", bits, n) for bits, n in loads.items()]
    wanted += [("STG", bits, n) for bits, n in stores.items()]
    missing = [
        f"{found} {name} of {bits} bits for {n} arrays"
        for name, bits, n in wanted
        if (found := kernel.count(rf"{name}\.E(\..*)?\.{bits}(\..*)?")) < n
    ]
    return ", ".join(missing) or None


def projects_too_narrowly(kernel: Kernel) -> str | None:
    """Wants one access per array that moves four elements, or 16 bytes of them, in the kernels that
    visit every element of a rule that projects, and in the check of rows. Their pointers come from
    memory, which makes loads generic, as those of the tables are not; stores name their space."""
    found = re.match(
        r"(project_update|check)_kernel<(?:(\w+)<\w+>, )?(\w+)(?:, (\w+))?>", kernel.name
    )
    if found is None:
        return None
    n_states = state_counts(projecting=True)[found[2]][0] if found[2] else 0
    loads, stores = Counter[int](), Counter[int]()
    for element, n_loads, n_stores in ((found[3], 2, bool(found[2])), (found[4], *[n_states] * 2)):
        bits = min(128, 4 * 8 * ITEM_SIZES[element or found[3]])
        loads[bits] += n_loads
        stores[bits] += n_stores
    wanted = [("LD", bits, n) for bits, n in loads.items()]
    wanted += [("STG", bits, n) for bits, n in stores.items()]
    missing = [
        f"{seen} {name} of {bits} bits for {n} arrays"
        for name, bits, n in wanted
        if (seen := kernel.count(rf"{name}\.E(\..*)?\.{bits}(\..*)?")) < n
    ]
    return ", ".join(missing) or None


def multiplies_too_slowly(kernel: Kernel) -> str | None:
    """Wants of a filter the products of 32 x 128 elements of a warp, 32 instructions for 16 of them
    each, on tensor cores, twice per stage and three times with two parts; matrices by ldmatrix
    and copies of 16 bytes that go on beside them."""
    if kernel.name not in FILTERS:
        return None
    parts = 2 if kernel.name.endswith("2>") else 1
    wanted = {
        "HMMA": (r"HMMA\.16816\.F32(\.BF16)?", 64 * (3 if parts == 2 else 1)),
        "LDSM": (r"LDSM\.16\.M88\.4", 2 * 10 * parts),
        "LDGSTS": (r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128(\.ZFILL)?", 6 * parts),
    }
    missing = [
        f"{found} {name}, not {least}"
        for name, (pattern, least) in wanted.items()
        if (found := kernel.count(pattern)) < least
    ]
    return ", ".join(missing) or None


def has_fused_multiply_adds(kernel: Kernel) -> str | None:
    n = kernel.count(r"FFMA(\..*)?")
    return f"{n} fused multiply-adds" if n else None


def rounds_differently(kernel: Kernel) -> str | None:
    """Of the floating-point instructions of PTX, those that do not round once, to nearest."""
    arithmetic = r"(fma|mad|mul|add|sub|div|sqrt|rcp|rsqrt)\.(.*\.)?f(16|32|64)(x2)?|ex2.*|lg2.*"
    found = [
        word
        for word in kernel.code
        if re.fullmatch(arithmetic, word)
        and not re.fullmatch(r"(mul|add|sub|div|sqrt|rcp)\.rn\.f(32|64)", word)
    ]
    return ", ".join(found) or None


def has_too_large_parameters(kernel: Kernel) -> str | None:
    n = kernel.parameter_bytes
    return f"{n} bytes of parameters" if n > PARAMETER_BYTES else None


Check = Callable[[Kernel], str | None]


def faults(kernels: Iterable[Kernel], check: Check) -> list[str]:
    return [
        f"{kernel.name} for {kernel.arch}: {fault}"
        for kernel in kernels
        if (fault := check(kernel)) is not None
    ]


# -- the engine ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(library: Path, archs: list[str]) -> list[Kernel]:
    return [kernel for arch in archs for kernel in machine_code(library, arch)]


def listed_archs(path: Path) -> tuple[list[str], list[str]]:
    """The architectures of the machine code and of the PTX in `path`."""
    listing = printed(tool("cuobjdump"), "-lelf", "-lptx", path)
    found = (
        re.findall(rf"\.sm_(\d+)\.{kind}$", listing, re.MULTILINE) for kind in ("cubin", "ptx")
    )
    elf, ptx = (sorted(set(archs), key=int) for archs in found)
    return elf, ptx


def test_every_architecture_has_machine_code_and_the_newest_ptx(
    library: Path, archs: list[str]
) -> None:
    assert listed_archs(library) == (archs, archs[-1:])


@pytest.mark.slow
def test_every_rule_variant_and_set_of_dtypes_has_a_kernel(library: Path, archs: list[str]) -> None:
    pairs = [(p, p) for p in ITEM_SIZES] + [("Bf16", "float"), ("F16", "float")]
    wanted = {
        Instance(rule, variant, param, state, param, rule == "LineTrial")
        for rule, counts in state_counts().items()
        for variant, n_states in enumerate(counts)
        for param, state in pairs
        if n_states or param == state
    }
    wanted |= {
        Instance(rule, variant, param, state, "float", rule == "LineTrial")
        for rule in ("LineTrial", "LineStep")
        for variant in range(6)
        for param in ("Bf16", "F16")
        for state in (param, "float")
    }
    assert len(wanted) >= 52 + 2 * 6 * 10 - 4
    everywhere = [*(machine_code(library, arch) for arch in archs), ptx(library)]
    for kernels in everywhere:
        assert wanted <= {Instance.of(kernel) for kernel in kernels}
        assert {kernel.name for kernel in kernels} == {kernel.name for kernel in everywhere[-1]}
        assert all(kernel.code for kernel in kernels)


def test_every_rule_that_projects_has_its_kernels(library: Path, archs: list[str]) -> None:
    """One for all variants, which it tells apart as it runs."""
    pairs = [(p, p) for p in ITEM_SIZES] + [("Bf16", "float"), ("F16", "float")]
    wanted = {
        f"project_{phase}_kernel<{rule}<{'double' if param == 'double' else 'float'}>"
        f", {param}, {state}>"
        for phase in ("update", "write")
        for rule in state_counts(projecting=True)
        for param, state in pairs
    }
    wanted |= {f"{phase}_kernel<{param}>" for phase in ("deal", "check") for param in ITEM_SIZES}
    wanted |= {"check_long_rows_kernel", "fold_long_rows_kernel", "decide_kernel"}
    assert len(wanted) == 2 * 2 * 6 + 2 * 4 + 3
    for found in [*(machine_code(library, arch) for arch in archs), ptx(library)]:
        assert wanted <= {kernel.name for kernel in found}


def test_kernels_that_project_move_four_elements_at_once(kernels: list[Kernel]) -> None:
    assert faults(kernels, projects_too_narrowly) == []


def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    assert faults(kernels, spills) == []


def test_several_blocks_fit_into_a_multiprocessor(kernels: list[Kernel]) -> None:
    assert faults(kernels, needs_too_many_registers) == []


def test_update_kernels_move_sixteen_bytes_at_once(kernels: list[Kernel]) -> None:
    assert faults(kernels, accesses_too_narrowly) == []


@pytest.mark.parametrize("name", ["partials_kernel", "scale_kernel"])
def test_kernels_for_every_dtype_move_sixteen_bytes_at_once(
    kernels: list[Kernel], archs: list[str], name: str
) -> None:
    found = [kernel for kernel in kernels if kernel.name.startswith(name)]
    assert {kernel.arch for kernel in found} == set(archs)
    instruction = r"(LDG|STG)\.E(\..*)?\.128(\..*)?"
    assert all(kernel.count(instruction) >= 4 for kernel in found), found


def test_filters_multiply_on_tensor_cores(kernels: list[Kernel], archs: list[str]) -> None:
    found = [kernel for kernel in kernels if kernel.name in FILTERS]
    assert len(found) == len(FILTERS) * len(archs)
    assert faults(found, multiplies_too_slowly) == []


@pytest.mark.parametrize("name", ["step_center_kernel", "center_sqdist_kernel", "squares_kernel"])
def test_kernels_that_read_features_move_sixteen_bytes_at_once(
    kernels: list[Kernel], name: str
) -> None:
    """Four elements: 16 bytes of float32, twice that of float64, 8 of the half types."""
    found = [kernel for kernel in kernels if kernel.name.startswith(name)]
    assert {kernel.name for kernel in found} == {f"{name}<{element}>" for element in ITEM_SIZES}
    for kernel in found:
        bits = 64 if "16" in kernel.name else 128
        # Four blocks in flight.
        assert kernel.count(rf"LDG\.E(\..*)?\.{bits}(\..*)?") >= 4, kernel


def test_no_kernel_uses_atomics(kernels: list[Kernel]) -> None:
    """Their order would change from run to run, and the sums with it."""
    assert faults(kernels, uses_atomics) == []


def test_arithmetic_rounds_once_and_to_nearest(library: Path) -> None:
    """But for the powers that `prepare` takes, which the CUDA library computes its own way."""
    found = [kernel for kernel in ptx(library) if not kernel.name.startswith("prepare_kernel")]
    assert faults(found, rounds_differently) == []


def test_sgd_has_no_fused_multiply_add(kernels: list[Kernel]) -> None:
    """The only rule without a division in float32, which later stages expand into multiply-adds."""
    sgd = [kernel for kernel in kernels if kernel.name.startswith("update_kernel<Sgd<float>")]
    assert sgd
    assert faults(sgd, has_fused_multiply_adds) == []


def test_parameters_fit_into_a_launch(library: Path) -> None:
    assert max(kernel.parameter_bytes for kernel in ptx(library)) > 4096
    assert faults(ptx(library), has_too_large_parameters) == []


@pytest.mark.skipif(not shutil.which("ldd"), reason="ldd, which lists linked libraries, is missing")
def test_engine_links_neither_the_driver_nor_the_cuda_runtime(library: Path) -> None:
    linked = printed("ldd", library)
    assert "libc.so" in linked
    assert not [name for name in ("libcuda", "torch", "libpython") if name in linked]


@pytest.mark.skipif(not shutil.which("nm"), reason="nm, which lists symbols, is missing")
def test_engine_exports_one_function(library: Path) -> None:
    symbols = demangled(printed("nm", "-D", "--defined-only", "--format=posix", library))
    own = [line.split()[0] for line in symbols.splitlines() if not line.startswith("std::")]
    assert own == ["pyoptim_cuda_api"]


def test_engine_loads_without_a_driver(library: Path) -> None:
    code = (
        "import ctypes, sys; engine = ctypes.CDLL(sys.argv[1]); "
        "engine.pyoptim_cuda_api.restype = ctypes.POINTER(ctypes.c_int32); "
        "print(engine.pyoptim_cuda_api()[0], 'libcuda' in open('/proc/self/maps').read())"
    )
    version = re.search(r"kApiVersion = (\d+)", (ROOT / "csrc/cuda/api.hpp").read_text())[1]
    assert printed(sys.executable, "-c", code, library).split() == [version, "False"]


# -- planted faults: every check finds what it is there for ----------------------------------------

PLANTED = """
#include <cstdint>
namespace pyoptim::gpu {
struct Bf16 { uint16_t bits; };
template <class T> struct Sgd {};
template <class T> struct Adagrad {};

template <class Rule, int V, class P, class S>
__global__ void update_kernel(P* p, const P* g, S* s) {
  const int i = threadIdx.x;
  p[i] = g[i];
  s[i] = s[i] + 1;
}
template __global__ void update_kernel<Sgd<float>, 0, float, float>(float*, const float*, float*);

// Moves 128 bits of the state, but 128 of the 16-bit arrays as well: they are not in step.
template <>
__global__ void update_kernel<Adagrad<float>, 0, Bf16, float>(
    Bf16* p, const Bf16* g, float* s) {
  const int i = threadIdx.x;
  reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(g)[i];
  reinterpret_cast<uint4*>(s)[i] = reinterpret_cast<uint4*>(s)[i + 1];
}

__global__ void indexes_a_local_array(float* x, int n) {
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i];
  for (int i = 0; i < n; ++i) x[i] = local[local[i] > 0 ? i % 7 : i % 64];
}

__global__ void __launch_bounds__(1024, 2) spills(double* x) {
  double live[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) live[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 48; ++i) x[i * 1024 + threadIdx.x] = live[47 - i] * live[(i * 5) % 48];
}

template <int N>
__device__ __forceinline__ void keep(float* x) {
  float live[N];
#pragma unroll
  for (int i = 0; i < N; ++i) live[i] = x[i * 256 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i * 256 + threadIdx.x] = live[N - 1 - i] * live[(i * 5) % N];
}
__global__ void keeps_many_values(float* x) { keep<160>(x); }
__global__ void keeps_fewer_values(float* x) { keep<90>(x); }
template <>
__global__ void update_kernel<Adagrad<float>, 0, float, float>(
    float* p, const float* g, float* s) {
  keep<90>(p);
  const int i = threadIdx.x;
  reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(g)[i];
  reinterpret_cast<uint4*>(s)[i] = reinterpret_cast<uint4*>(p)[i + 1];
  reinterpret_cast<uint4*>(p + 4096)[i] = reinterpret_cast<uint4*>(s)[i + 1];
}

__global__ void adds_atomically(float* x, int* y) {
  atomicAdd(x, 1.0f);
  y[threadIdx.x] = atomicAdd(y, 2);
}

template <class P>
__global__ void check_kernel(const P* p, const P* g, double* y) { y[0] = p[0] * (1.0 + g[0]); }
template __global__ void check_kernel<float>(const float*, const float*, double*);

// Products without tensor cores.
template <class E, int kParts>
__global__ void nearest_kernel(float* x) {
  for (int k = 0; k < 64; ++k)
    x[threadIdx.x] = __fadd_rn(x[threadIdx.x], __fmul_rn(x[256 + k], x[512 + k]));
}
template __global__ void nearest_kernel<Bf16, 1>(float*);

__global__ void contracts(float* x) { x[0] = x[1] * x[2] + x[3]; }
__global__ void contracts_double(double* x) { x[0] = x[1] * x[2] + x[3]; }
__global__ void divides_roughly(float* x) { x[0] = __fdividef(x[1], x[2]); }
__global__ void truncates(float* x) { x[0] = __fadd_rz(x[1], x[2]); }
}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled as the engine is, except that multiply-adds may be fused."""
    source = tmp_path_factory.mktemp("planted") / "planted.cu"
    source.write_text(PLANTED)
    built = source.with_suffix(".o")
    flags = ("-std=c++17", "-O3", "-gencode=arch=compute_90,code=[sm_90,compute_90]")
    printed(tool("nvcc"), *flags, "-c", source, "-o", built)
    return built


@pytest.mark.parametrize(
    ("check", "names"),
    [
        (spills, {"indexes_a_local_array", "spills"}),
        (
            needs_too_many_registers,
            {"keeps_many_values", "update_kernel<Adagrad<float>, 0, float, float>"},
        ),
        (uses_atomics, {"adds_atomically"}),
        (
            accesses_too_narrowly,
            {
                "update_kernel<Sgd<float>, 0, float, float>",
                "update_kernel<Adagrad<float>, 0, Bf16, float>",
            },
        ),
        (projects_too_narrowly, {"check_kernel<float>"}),
        (has_fused_multiply_adds, {"contracts"}),
        (multiplies_too_slowly, {"nearest_kernel<Bf16, 1>"}),
    ],
)
def test_check_of_machine_code_finds_the_planted_fault(
    planted: Path, check: Check, names: set[str]
) -> None:
    assert {kernel.name for kernel in machine_code(planted, "90") if check(kernel)} == names


def test_check_of_rounding_finds_the_planted_faults(planted: Path) -> None:
    found = {kernel.name: rounds_differently(kernel) for kernel in ptx(planted)}
    faults = {
        "contracts": "fma.rn.f32",
        "contracts_double": "fma.rn.f64",
        "divides_roughly": "div.approx.f32",
        "truncates": "add.rz.f32",
        "keeps_many_values": "mul.f32",  # left to a later stage, which may fuse it
    }
    assert {name: found[name] for name in faults} == faults


def test_check_of_parameters_finds_a_table_that_is_too_large() -> None:
    text = ".visible .entry _Z1kv(.param .u32 a,\n.param .align 8 .b8 b[{}]\n)\n{{\nret;\n}}"
    sizes = (PARAMETER_BYTES - 4, PARAMETER_BYTES - 3)
    found = [has_too_large_parameters(*parsed_ptx(text.format(size))) for size in sizes]
    assert found == [None, f"{PARAMETER_BYTES + 1} bytes of parameters"]


def test_architectures_are_read_from_the_file(planted: Path) -> None:
    assert listed_archs(planted) == (["90"], ["90"])
