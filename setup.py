"""Builds pyoptim._C and pyoptim/_cuda.so with ninja; a missing compiler is not an error.

Torch is not needed. Both are built where their compilers are; `pyoptim/_build_info.json` records
what was built and why the rest was not.

Environment:
    CXX: the C++ compiler (default: the first of c++, g++, clang++ that works).
    PYOPTIM_CPU: auto (default), 0 (no extension), 1 (fail if it cannot be built).
    PYOPTIM_CUDA: auto (default), 0 (no CUDA engine), 1 (fail if it cannot be built).
    PYOPTIM_CUDA_ARCHS: compute capabilities, as "90" or "80;90" (default: those of this machine's
        GPUs; without a GPU, all of DEFAULT_ARCHS that nvcc knows).
    PYOPTIM_NVCC: the CUDA compiler (default: nvcc of CUDA_HOME, of CUDA_PATH, of PATH, of
        /usr/local/cuda). nvcc itself reads NVCC_CCBIN, its C++ compiler, and NVCC_APPEND_FLAGS.
    PYOPTIM_SANITIZE: "address,undefined" or "thread", an instrumented build for `make sanitize`.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
IS_MAC = sys.platform == "darwin"
IS_X86 = platform.machine() in ("x86_64", "AMD64")
# Top-level folders that are imported as subpackages of pyoptim.
MAPPED_FOLDERS = ("kernels", "bench")

# -ffp-contract=off: every instruction set and every tail must give the same bits.
FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-pthread", "-Icsrc"),
]
X86_FLAGS = ["-DPYOPTIM_X86"] if IS_X86 else []
# The kernels are written in vectors: the vectoriser would only multiply their scalar tails.
KERNEL_FLAGS = ["-O2", "-fno-tree-vectorize", "-funswitch-loops"]
AVX2_FLAGS = ["-mavx2", "-mf16c", "-mfma"]
# gcc 12's own AVX-512 header warns about its undefined registers.
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
X86_ISAS = {
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
}
# The coreset filter multiplies and adds in one instruction; its results are certified in float64.
FUSED_FLAGS = ["-mfma"]
ISA_FLAGS = {"baseline": [], **(X86_ISAS if IS_X86 else {})}
ISAS = list(ISA_FLAGS)
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if IS_MAC else ["-shared", "-ldl"]
SANITIZERS = ("address,undefined", "thread")
PROBE = "#include <Python.h>\n#include <optional>\n#include <thread>\nstd::optional<int> value;\n"

# --fmad=false and -ffp-contract=off: a GPU must give the bits of the CPU.
CUDA_FLAGS = [
    *("-std=c++17", "-O3", "--fmad=false", "-Icsrc"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"),
]
# The static runtime loads the driver when it is first used: importing needs neither of them.
CUDA_LINK_FLAGS = ["-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]
CUDA_PROBE = "#include <vector>\n__global__ void probe() {}\n"
DEFAULT_ARCHS = ["80", "90", "100", "120"]

# Object -> its source and its own flags.
Units = dict[str, tuple[str, list[str]]]
# What _build_info.json tells of a build.
Record = dict[str, object]


class NotBuilt(Exception):
    """Why this machine cannot build the extension or the CUDA engine."""


# -- settings --------------------------------------------------------------------------------------


def choice(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise OptionError(f"{name}={value!r} is not understood; use auto, 0 or 1")
    return value


def asked_archs() -> list[str]:
    value = os.environ.get("PYOPTIM_CUDA_ARCHS", "")
    archs = re.split(r"[;,\s]+", value.strip()) if value.strip() else []
    if not all(re.fullmatch(r"\d{2,3}", arch) for arch in archs):
        raise OptionError(
            f"PYOPTIM_CUDA_ARCHS={value!r} is not understood; "
            "use compute capabilities without the dot, as '90' or '80;90'"
        )
    return archs


def sanitizer() -> str:
    value = os.environ.get("PYOPTIM_SANITIZE", "")
    if value and value not in SANITIZERS:
        raise OptionError(f"PYOPTIM_SANITIZE={value!r} is not understood; use one of {SANITIZERS}")
    return value


# -- compilers and ninja ---------------------------------------------------------------------------


def stdout_of(*command: str) -> str:
    """What `command` prints; nothing when it cannot run or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout if result.returncode == 0 else ""


def probe_error(name: str, text: str, compiler: list[str], link: list[str]) -> str | None:
    """Compiles and links a few lines as the library will be; returns the error, if any."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, name)
        source.write_text(text)
        command = [*compiler, str(source), *link, "-o", str(source.with_suffix(".so"))]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return str(error)
    if result.returncode == 0:
        return None
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    return lines[0].replace(str(source), "probe") if lines else f"exit status {result.returncode}"


def ninja_text(
    folder: str,
    library: str,
    units: Units,
    compiler: list[str],
    linker: list[str],
    link: list[str],
) -> str:
    def line(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    text = [
        f"builddir = {folder}",
        f"rule compile\n  command = {line(compiler)} $own -MMD -MF $out.d -c $in -o $out",
        "  description = $name\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {line(linker)} $in -o $out {line(link)}",
        "  description = $out",
    ]
    objects = []
    for name, (source, own) in units.items():
        objects.append(f"{folder}/{name}.o")
        text.append(f"build {objects[-1]}: compile {source}\n  own = {line(own)}\n  name = {name}")
    text.append(f"build {library}: link {' '.join(objects)}\n")
    return "\n".join(text)


def ninja_command() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return "ninja"
    return str(Path(BIN_DIR, "ninja"))


def run_ninja(folder: str, text: str) -> bool:
    """Builds in the source folder, so that object files survive for the next build."""
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    (ROOT / folder / "build.ninja").write_text(text)
    command = [ninja_command(), "-f", f"{folder}/build.ninja"]
    return subprocess.run(command, cwd=ROOT).returncode == 0


# -- _C --------------------------------------------------------------------------------------------


def common_flags() -> list[str]:
    if not sanitizer():
        return FLAGS + X86_FLAGS
    debug = ["-O1", "-g", "-fno-omit-frame-pointer", "-DPYBIND11_DETAILED_ERROR_MESSAGES"]
    return [
        *(FLAGS + X86_FLAGS + debug),
        *(f"-fsanitize={sanitizer()}", "-fno-sanitize-recover=all"),
    ]


def python_includes() -> list[str]:
    folders = dict.fromkeys(sysconfig.get_path(key) for key in ("include", "platinclude"))
    return [f"-I{folder}" for folder in folders]


def find_compiler() -> list[str]:
    if sys.platform not in ("linux", "darwin"):
        raise NotBuilt(f"the kernels are built on Linux and macOS only, not on {sys.platform}")
    asked = os.environ.get("CXX")
    names = [asked] if asked else [n for n in ("c++", "g++", "clang++") if shutil.which(n)]
    errors = []
    for name in names:
        flags = [*common_flags(), *python_includes()]
        error = probe_error("probe.cpp", PROBE, shlex.split(name) + flags, LINK_FLAGS)
        if error is None:
            return shlex.split(name)
        errors.append(f"{name} cannot build extensions: {error}")
    raise NotBuilt("; ".join(errors) or "no C++ compiler found (c++, g++ or clang++)")


def cpu_units() -> Units:
    """Every file that this architecture needs."""
    import pybind11

    includes = [*python_includes(), f"-I{pybind11.get_include()}"]
    found: Units = {"csrc/bindings.cpp": ("csrc/bindings.cpp", includes)}
    paths = [p for folder in ("cpu", "coreset") for p in (ROOT / "csrc" / folder).glob("*.cpp")]
    for path in sorted(paths):
        source = path.relative_to(ROOT).as_posix()
        isa = path.stem.removeprefix("isa_")
        if isa == path.stem:
            found[source] = (source, [])
        elif isa in ISAS:
            fused = FUSED_FLAGS if path.parent.name == "coreset" and ISA_FLAGS[isa] else []
            found[source] = (source, [*KERNEL_FLAGS, *ISA_FLAGS[isa], *fused])
    return found


def build_cpu(module: Path) -> Record:
    """Builds the extension at `module` and describes the build."""
    compiler, sanitize = find_compiler(), sanitizer()
    kind = sanitize.replace(",", "-") or "release"
    folder = f"build/ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{kind}"
    built = f"{folder}/{module.name}"
    link = LINK_FLAGS + ([f"-fsanitize={sanitize}"] if sanitize else [])
    commands = ([*compiler, *common_flags()], [*compiler, "-pthread"], link)
    if not run_ninja(folder, ninja_text(folder, built, cpu_units(), *commands)):
        raise CompileError("pyoptim._C does not compile (the compiler's messages are above)")
    shutil.copy2(ROOT / built, module)
    version = stdout_of(*compiler, "--version").partition("\n")[0]
    return {"compiler": version, "flags": common_flags(), "isas": ISAS}


# -- _cuda.so --------------------------------------------------------------------------------------


def find_nvcc() -> str:
    if sys.platform != "linux":
        raise NotBuilt(f"the CUDA engine is built on Linux only, not on {sys.platform}")
    if asked := os.environ.get("PYOPTIM_NVCC"):
        return asked
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = [shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes if home]
    found += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    for nvcc in filter(None, found):
        return nvcc
    raise NotBuilt(
        "no CUDA compiler found; install the CUDA toolkit, or name its nvcc with CUDA_HOME"
    )


def find_archs(nvcc: str) -> list[str]:
    """The compute capabilities to build for, in ascending order."""
    offered = re.findall(r"compute_(\d+)", stdout_of(nvcc, "--list-gpu-arch"))
    if not offered:
        raise NotBuilt(f"{nvcc} does not run: it lists no GPU architectures")
    asked = asked_archs()
    if absent := [arch for arch in asked if arch not in offered]:
        known = ", ".join(sorted(offered, key=int))
        raise OptionError(f"PYOPTIM_CUDA_ARCHS: {nvcc} knows no {absent[0]}, only {known}")
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    own = re.findall(r"^(\d+)\.(\d)$", stdout_of(*query), re.MULTILINE)
    # A GPU that is newer than nvcc runs the PTX of the newest default.
    wanted = asked or [a for a in map("".join, own) if a in offered] or DEFAULT_ARCHS
    return sorted({arch for arch in wanted if arch in offered}, key=int)


def cuda_flags(nvcc: str) -> list[str]:
    has_modes = "--compress-mode" in stdout_of(nvcc, "--help")
    return CUDA_FLAGS + (["--compress-mode=size"] if has_modes else [])


def arch_flags(archs: list[str]) -> list[str]:
    """Machine code for every one of `archs`, and PTX of the last for GPUs to come."""
    codes = [f"code=sm_{arch}" for arch in archs[:-1]]
    codes.append(f"code=[sm_{archs[-1]},compute_{archs[-1]}]")
    return [f"-gencode=arch=compute_{a},{code}" for a, code in zip(archs, codes, strict=True)]


def cuda_units() -> Units:
    """Every CUDA file, and update.cu once for every rule."""
    rules = re.findall(r"^\s*X\((\w+)\)", (ROOT / "csrc/rules/all.hpp").read_text(), re.MULTILINE)
    found: Units = {}
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        source = path.relative_to(ROOT).as_posix()
        if path.stem == "update":
            for rule in rules:
                found[f"{source}.{rule}"] = (source, [f"-DPYOPTIM_RULE={rule}"])
        else:
            found[source] = (source, [])
    return found


def build_cuda(library: Path, module: Path) -> Record:
    """Builds the CUDA engine at `library` and describes the build."""
    if sanitizer():
        raise NotBuilt("PYOPTIM_SANITIZE instruments code of the CPU only")
    if not module.exists():
        raise NotBuilt("it is used through pyoptim._C, which is not built")
    nvcc = find_nvcc()
    archs = find_archs(nvcc)
    flags = cuda_flags(nvcc)
    compiler = [nvcc, *flags, *arch_flags(archs)]
    # nvcc links device code too, even where there is none to link: for the same GPUs.
    link = [*CUDA_LINK_FLAGS, *arch_flags(archs)]
    if error := probe_error("probe.cu", CUDA_PROBE, compiler, CUDA_LINK_FLAGS):
        raise NotBuilt(f"{nvcc} cannot build CUDA code: {error}")
    version = "".join(re.findall(r"V([\d.]+)", stdout_of(nvcc, "--version")))
    folder = f"build/cuda-{version}-{sysconfig.get_platform()}-{'-'.join(archs)}"
    built = f"{folder}/{library.name}"
    text = ninja_text(folder, built, cuda_units(), compiler, [nvcc], link)
    if not run_ninja(folder, text):
        raise NotBuilt(f"{nvcc} failed on pyoptim's sources; the build's output says where")
    shutil.copy2(ROOT / built, library)
    return {"compiler": f"nvcc {version}", "flags": flags, "archs": archs}


# -- setuptools ------------------------------------------------------------------------------------


def attempt(option: str, what: str, build: Callable[[], Record], absent: Record) -> Record:
    """Builds if `option` lets it; describes the build, or says why there is none."""
    asked = choice(option)
    try:
        if asked == "0":
            raise NotBuilt(f"{option}=0")
        return {"built": True, "reason": None, **build()}
    except NotBuilt as error:
        if asked == "1":
            raise CompileError(f"{option}=1, but {what} cannot be built: {error}") from None
        if asked == "auto":
            print(f"pyoptim: {what} is not built: {error}", file=sys.stderr)
        return {"built": False, "reason": str(error), "compiler": None, "flags": [], **absent}


class BuildNative(build_ext):
    """Builds what this machine can; records what was built, or why not, beside it."""

    def run(self) -> None:
        # A mistake in a setting shows before minutes have passed.
        choice("PYOPTIM_CUDA")
        asked_archs()
        module = Path(self.get_ext_fullpath("pyoptim._C"))
        module.parent.mkdir(parents=True, exist_ok=True)
        library, info = module.with_name("_cuda.so"), module.with_name("_build_info.json")
        # Not overwritten in place: a running process may have the old file mapped.
        for earlier in (module, library, info):
            earlier.unlink(missing_ok=True)
        build_engine = partial(build_cuda, library, module)
        records = {
            "cpu": attempt("PYOPTIM_CPU", "_C", partial(build_cpu, module), {"isas": []}),
            "cuda": attempt("PYOPTIM_CUDA", "_cuda.so", build_engine, {"archs": []}),
        }
        info.write_text(json.dumps(records, indent=2) + "\n")


class BuildFresh(build_py):
    """Forgets an earlier build: a wheel must not hold modules that are gone from the source."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, "pyoptim"), ignore_errors=True)
        super().run()


def packages() -> list[str]:
    found = find_packages(include=["pyoptim", "pyoptim.*"])
    for folder in MAPPED_FOLDERS:
        found += [f"pyoptim.{name}" for name in find_packages(include=[folder, f"{folder}.*"])]
    return found


setup(
    packages=packages(),
    package_dir={f"pyoptim.{folder}": folder for folder in MAPPED_FOLDERS},
    package_data={"pyoptim": ["py.typed", "*.pyi", "weights/*.safetensors"]},
    ext_modules=[Extension("pyoptim._C", ["csrc/bindings.cpp"])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildFresh},
)
