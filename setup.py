"""Builds pyoptim._C with ninja; torch is not needed, and a missing compiler is not an error.

Environment:
    CXX: the C++ compiler (default: the first of c++, g++, clang++ that works).
    PYOPTIM_CPU: auto (default), 0 (no extension), 1 (fail if it cannot be built).
    PYOPTIM_CUDA: auto (default), 0, 1 (fail if it cannot be built).
    PYOPTIM_SANITIZE: "address,undefined" or "thread", an instrumented build for `make sanitize`.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
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
AVX2_FLAGS = ["-mavx2", "-mf16c"]
# gcc 12's own AVX-512 header warns about its undefined registers.
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-maybe-uninitialized"),
]
X86_ISAS = {
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
}
ISA_FLAGS = {"baseline": [], **(X86_ISAS if IS_X86 else {})}
ISAS = list(ISA_FLAGS)
LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if IS_MAC else ["-shared", "-ldl"]
SANITIZERS = ("address,undefined", "thread")
PROBE = "#include <Python.h>\n#include <optional>\n#include <thread>\nstd::optional<int> value;\n"


class NotBuilt(Exception):
    """Why this machine cannot build the extension."""


def choice(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise OptionError(f"{name}={value!r} is not understood; use auto, 0 or 1")
    return value


def sanitizer() -> str:
    value = os.environ.get("PYOPTIM_SANITIZE", "")
    if value and value not in SANITIZERS:
        raise OptionError(f"PYOPTIM_SANITIZE={value!r} is not understood; use one of {SANITIZERS}")
    return value


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


def probe_error(compiler: list[str]) -> str | None:
    """Compiles and links a few lines as the extension will be; returns the error, if any."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        command = [*compiler, *common_flags(), *python_includes(), str(source), *LINK_FLAGS]
        try:
            result = subprocess.run(
                [*command, "-o", str(source.with_suffix(".so"))], capture_output=True, text=True
            )
        except OSError as error:
            return str(error)
    if result.returncode == 0:
        return None
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    return lines[0].replace(str(source), "probe") if lines else f"exit status {result.returncode}"


def find_compiler() -> list[str]:
    if sys.platform not in ("linux", "darwin"):
        raise NotBuilt(f"the kernels are built on Linux and macOS only, not on {sys.platform}")
    asked = os.environ.get("CXX")
    names = [asked] if asked else [n for n in ("c++", "g++", "clang++") if shutil.which(n)]
    errors = []
    for name in names:
        error = probe_error(shlex.split(name))
        if error is None:
            return shlex.split(name)
        errors.append(f"{name} cannot build extensions: {error}")
    raise NotBuilt("; ".join(errors) or "no C++ compiler found (c++, g++ or clang++)")


def units() -> dict[str, list[str]]:
    """Source file -> its own flags, for every file that this architecture needs."""
    import pybind11

    found = {"csrc/bindings.cpp": [*python_includes(), f"-I{pybind11.get_include()}"]}
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        isa = path.stem.removeprefix("isa_")
        if isa == path.stem:
            found[path.relative_to(ROOT).as_posix()] = []
        elif isa in ISAS:
            found[path.relative_to(ROOT).as_posix()] = [*KERNEL_FLAGS, *ISA_FLAGS[isa]]
    return found


def ninja_text(compiler: list[str], folder: str, module: str) -> str:
    def line(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    flags, sanitize = common_flags(), sanitizer()
    link = LINK_FLAGS + ([f"-fsanitize={sanitize}"] if sanitize else [])
    text = [
        f"builddir = {folder}",
        f"rule compile\n  command = {line(compiler + flags)} $own -MMD -MF $out.d -c $in -o $out",
        "  description = $in\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {line(compiler)} -pthread $in -o $out {line(link)}",
        "  description = $out",
    ]
    objects = []
    for source, own in units().items():
        objects.append(f"{folder}/{source}.o")
        text.append(f"build {objects[-1]}: compile {source}\n  own = {line(own)}")
    text.append(f"build {module}: link {' '.join(objects)}\n")
    return "\n".join(text)


def ninja_command() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return "ninja"
    return str(Path(BIN_DIR, "ninja"))


def compile_module(compiler: list[str], filename: str) -> Path:
    """Runs ninja in the source folder, so that object files survive for the next build."""
    kind = sanitizer().replace(",", "-") or "release"
    folder = f"build/ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{kind}"
    module = f"{folder}/{filename}"
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    (ROOT / folder / "build.ninja").write_text(ninja_text(compiler, folder, module))
    command = [ninja_command(), "-f", f"{folder}/build.ninja"]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise CompileError("pyoptim._C does not compile (the compiler's messages are above)")
    return ROOT / module


def cuda_record() -> dict[str, object]:
    asked = choice("PYOPTIM_CUDA")
    if asked == "1":
        raise OptionError(
            "PYOPTIM_CUDA=1: this version of pyoptim has no CUDA kernels; "
            "unset PYOPTIM_CUDA or use PYOPTIM_CUDA=0"
        )
    reason = "PYOPTIM_CUDA=0" if asked == "0" else "this version has no CUDA kernels"
    return {"built": False, "reason": reason}


def cpu_record(module: Path) -> dict[str, object]:
    """Builds the extension at `module` and describes the build."""
    if choice("PYOPTIM_CPU") == "0":
        raise NotBuilt("PYOPTIM_CPU=0")
    compiler = find_compiler()
    built = compile_module(compiler, module.name)
    shutil.copy2(built, module)
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return {
        "built": True,
        "reason": None,
        "compiler": version.partition("\n")[0],
        "flags": common_flags(),
        "isas": ISAS,
    }


class BuildNative(build_ext):
    """Builds `_C` where this machine can; records what was built, or why not, beside it."""

    def run(self) -> None:
        cuda = cuda_record()
        module = Path(self.get_ext_fullpath("pyoptim._C"))
        module.parent.mkdir(parents=True, exist_ok=True)
        # Not overwritten in place: a running process may have the old file mapped.
        module.unlink(missing_ok=True)
        try:
            cpu = cpu_record(module)
        except NotBuilt as error:
            if choice("PYOPTIM_CPU") == "1":
                raise CompileError(f"PYOPTIM_CPU=1, but _C cannot be built: {error}") from None
            print(f"pyoptim: _C is not built, the reference will run: {error}", file=sys.stderr)
            cpu = {"built": False, "reason": str(error), "compiler": None, "flags": [], "isas": []}
        text = json.dumps({"cpu": cpu, "cuda": cuda}, indent=2)
        module.with_name("_build_info.json").write_text(text + "\n")


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
    package_data={"pyoptim": ["py.typed", "*.pyi"]},
    ext_modules=[Extension("pyoptim._C", ["csrc/bindings.cpp"])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildFresh},
)
