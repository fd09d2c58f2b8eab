"""The package as users get it: sdist, wheel, editable install, no compiler, and the command line.

Builds run in a copy of the source tree that takes along the object files of the last build, so that
they compile only what changed. The CUDA engine is built by a toolkit that is made up, so that its
tests need neither minutes nor nvcc; tests/test_cuda_build.py looks at what the real one makes.
"""

import importlib
import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import types
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyoptim import cli

ROOT = Path(__file__).resolve().parents[1]
LOCAL = (".git", ".venv", "build", "dist", ".*_cache", "*.egg-info", "__pycache__", "*.so")
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
# Runs a hook of the build backend as pip does; torch is blocked, since a build must not need it.
HOOK = (
    "import sys; sys.modules['torch'] = None; from setuptools import build_meta; "
    "print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
)
STEP = """
import pyoptim, torch
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
pyoptim.SGD([param], lr=0.5).step()
print(pyoptim.__file__, pyoptim.backend.native() is not None, param.tolist())
"""

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the source tree is not here: setup.py is missing"
)
needs_compiler = pytest.mark.skipif(
    importlib.import_module("pyoptim.backend").native() is None,
    reason="pyoptim._C was not built here, so there is no working C++ compiler",
)


def run(
    *words: object, cwd: Path, python: Path | str = sys.executable, **env: str
) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYOPTIM_")}
    inherited["PYOPTIM_CUDA"] = "0"
    # ninja lies beside the Python that runs the tests.
    inherited["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(python), *map(str, words)],
        cwd=cwd,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


def output(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy_objects(target: Path) -> None:
    for folder in ROOT.glob("build/ninja-*-release"):
        shutil.copytree(folder, target / "build" / folder.name)


def build(hook: str, source: Path, folder: Path, **env: str) -> Path:
    folder.mkdir()
    return folder / output(run("-c", HOOK, hook, folder, cwd=source, **env)).split()[-1]


@dataclass
class Environment:
    """A virtual environment that also sees the outer one's libraries, but not its pyoptim."""

    python: Path
    site: Path

    @classmethod
    def create(cls, folder: Path) -> "Environment":
        output(run("-m", "venv", "--without-pip", folder, cwd=folder.parent))
        variables = {"base": str(folder), "platbase": str(folder)}
        site = Path(sysconfig.get_path("purelib", "venv", variables))
        # An editable pyoptim of the outer environment stays out: its own .pth file is not read.
        (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return cls(Path(sysconfig.get_path("scripts", "venv", variables)) / "python", site)

    def install(self, *what: object) -> None:
        options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
        command = ("-m", "pip", "--python", self.python, "install", *options, *what)
        output(run(*command, cwd=self.site))

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        return run(*words, cwd=self.site.parent, python=self.python)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment.create(tmp_path / "venv")


def build_info(package: Path) -> dict:
    return json.loads((package / "_build_info.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree that tests may build in."""
    target = tmp_path_factory.mktemp("copy") / "source"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LOCAL, "_build_info.json"))
    copy_objects(target)
    return target


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    return build("build_sdist", source, source.parent / "sdist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    copy_objects(unpacked)
    return build("build_wheel", unpacked, folder / "dist", PYOPTIM_CPU="1")


def test_sdist_holds_what_a_build_and_the_tests_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "Makefile", "README.md", "setup.py", "tests/test_package.py"):
        assert name in names
    for folder in ("csrc", "kernels", "bench"):
        sources = [
            path
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".hpp", ".cpp", ".inl", ".cu", ".cuh")
        ]
        assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]


@needs_compiler
def test_wheel_holds_the_module_the_mapped_folders_and_the_license(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"pyoptim/{MODULE}", "pyoptim/py.typed", "pyoptim/_build_info.json"} <= names
    assert {"pyoptim/kernels/__init__.py", "pyoptim/bench/__init__.py"} <= names
    assert "pyoptim/weights/arc-default.safetensors" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert wheel.name.startswith("pyoptim_kernels-")
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "pyoptim",
        "pyoptim_kernels",
    }


@needs_compiler
def test_wheel_from_sdist_steps_with_its_own_kernels(wheel: Path, environment: Environment) -> None:
    environment.install(wheel)
    package = environment.site / "pyoptim"
    steps = output(environment.run("-W", "error", "-c", STEP))
    assert steps == f"{package}/__init__.py True [0.5, 0.5, 0.5]\n"
    mapped = "import pyoptim.kernels as k, pyoptim.bench as b; print(k.__file__, b.__file__)"
    folders = output(environment.run("-c", mapped)).split()
    assert folders == [f"{package}/{name}/__init__.py" for name in ("kernels", "bench")]
    assert build_info(package)["cpu"]["reason"] is None


@needs_compiler
@pytest.mark.skipif(not shutil.which("ldd"), reason="ldd, which lists linked libraries, is missing")
def test_module_links_neither_torch_nor_an_openmp_runtime() -> None:
    module = importlib.import_module("pyoptim._C").__file__
    linked = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in linked
    assert not [
        name for name in ("torch", "libc10", "gomp", "libomp", "libpython") if name in linked
    ]


@needs_compiler
@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump, which lists sections, is missing")
def test_kernel_files_run_nothing_when_the_module_loads() -> None:
    """Their code is for one instruction set; the processor is only looked at later."""
    starts_at_load = {
        path.name: ".init_array"
        in subprocess.run(["objdump", "-h", path], capture_output=True, text=True).stdout
        for path in ROOT.glob("build/ninja-*-release/csrc/cpu/*.o")
    }
    assert starts_at_load.pop("engine.cpp.o"), "the check sees no initialiser where there is one"
    assert {"isa_baseline.cpp.o"} <= starts_at_load.keys()
    assert not any(starts_at_load.values()), starts_at_load


@needs_compiler
def test_editable_install_runs_the_source_tree(source: Path, environment: Environment) -> None:
    environment.install("--editable", source)
    code = f"{STEP}\nimport pyoptim.kernels, pyoptim.bench\nprint(pyoptim.kernels.__file__)"
    first, second = output(environment.run("-c", code)).splitlines()
    assert first == f"{source}/pyoptim/__init__.py True [0.5, 0.5, 0.5]"
    assert second == f"{source}/kernels/__init__.py"
    assert build_info(source / "pyoptim")["cpu"]["built"]


@needs_compiler
def test_editing_a_header_rebuilds_what_includes_it(source: Path) -> None:
    output(run("setup.py", "-q", "build_ext", "--inplace", cwd=source))
    [plan] = source.glob("build/ninja-*/build.ninja")
    ninja = [shutil.which("ninja", path=sysconfig.get_path("scripts")) or "ninja", "-n", "-f", plan]
    assert "no work to do" in subprocess.check_output(ninja, cwd=source, text=True)
    header = source / "csrc/cpu/engine.inl"
    before = header.stat()
    header.touch()
    steps = subprocess.check_output(ninja, cwd=source, text=True)
    os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "csrc/cpu/isa_baseline.cpp" in steps
    assert "csrc/bindings.cpp" not in steps


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CXX": "/bin/false"}, "/bin/false cannot build extensions: exit status 1"),
        ({"PYOPTIM_CPU": "0"}, "PYOPTIM_CPU=0"),
    ],
    ids=["no_compiler", "not_wanted"],
)
def test_without_kernels_one_line_says_why_and_the_reference_runs(
    source: Path, tmp_path: Path, environment: Environment, env: dict[str, str], reason: str
) -> None:
    built = build("build_wheel", source, tmp_path / "dist", **env)
    assert f"pyoptim/{MODULE}" not in zipfile.ZipFile(built).namelist()
    environment.install(built)
    package = environment.site / "pyoptim"
    missing = {"built": False, "reason": reason, "compiler": None, "flags": [], "isas": []}
    assert build_info(package)["cpu"] == missing
    result = environment.run("-c", STEP)
    assert output(result) == f"{package}/__init__.py False [0.5, 0.5, 0.5]\n"
    [line] = [line for line in result.stderr.splitlines() if "Warning" in line]
    assert "reference" in line
    assert reason in line
    report = output(environment.run("-m", "pyoptim", "info"))
    assert f"not built: {reason}" in report
    assert f"not available: {reason}" in report


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"PYOPTIM_CUDA": "1", "PYOPTIM_CPU": "0"},
            "PYOPTIM_CUDA=1, but _cuda.so cannot be built: it is used through pyoptim._C",
        ),
        ({"PYOPTIM_CUDA": "yes"}, "PYOPTIM_CUDA='yes' is not understood; use auto, 0 or 1"),
        (
            {"PYOPTIM_CUDA_ARCHS": "90;banana"},
            "PYOPTIM_CUDA_ARCHS='90;banana' is not understood; use compute capabilities",
        ),
        ({"PYOPTIM_CPU": "1", "CXX": "/bin/false"}, "PYOPTIM_CPU=1, but _C cannot be built"),
        ({"PYOPTIM_SANITIZE": "memory"}, "PYOPTIM_SANITIZE='memory' is not understood"),
    ],
    ids=["cuda", "cuda_choice", "cuda_archs", "cpu", "sanitizer"],
)
def test_build_fails_when_a_request_cannot_be_met(
    source: Path, tmp_path: Path, env: dict[str, str], message: str
) -> None:
    result = run("setup.py", "-q", "build_ext", "--build-lib", tmp_path, cwd=source, **env)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"PYOPTIM_CUDA": "0"}, "PYOPTIM_CUDA=0"),
        ({}, "it is used through pyoptim._C, which is not built"),
        ({"PYOPTIM_SANITIZE": "thread"}, "PYOPTIM_SANITIZE instruments code of the CPU only"),
    ],
    ids=["not_wanted", "no_module", "sanitizer"],
)
def test_build_info_says_why_there_is_no_cuda(
    source: Path, tmp_path: Path, env: dict[str, str], reason: str
) -> None:
    env = {"PYOPTIM_CPU": "0", "PYOPTIM_CUDA": "auto", **env}
    output(run("setup.py", "-q", "build_ext", "--build-lib", tmp_path, cwd=source, **env))
    missing = {"built": False, "reason": reason, "compiler": None, "flags": [], "archs": []}
    assert build_info(tmp_path / "pyoptim")["cuda"] == missing


# Knows three architectures, and "compiles" by writing its command line into the output.
NVCC = """#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release 99.1, V99.1.7"; exit ;;
    --list-gpu-arch) printf 'compute_90\\ncompute_80\\ncompute_120\\n'; exit ;;
    --help) echo "--compress-mode"; exit ;;
esac
words="$*"
{failure}
while [ "$1" != -o ]; do shift; done
echo "$words" >"$2"
"""


@dataclass
class Toolkit:
    """A CUDA toolkit and a driver, made up of shell scripts."""

    folder: Path

    def write(self, name: str, script: str) -> Path:
        path = self.folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def build(self, source: Path, target: Path, **env: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        home = {"PYOPTIM_CUDA": "auto", "CUDA_HOME": str(self.folder), "PATH": path}
        command = ("setup.py", "-q", "build_ext", "--build-lib", target)
        return run(*command, cwd=source, **{**home, **env})


@pytest.fixture
def toolkit(tmp_path: Path) -> Toolkit:
    made = Toolkit(tmp_path / "toolkit")
    made.write("nvcc", NVCC.format(failure=""))
    made.write("nvidia-smi", "#!/bin/sh\nexit 9\n")
    return made


@needs_compiler
def test_wheel_holds_the_cuda_engine(source: Path, tmp_path: Path, toolkit: Toolkit) -> None:
    env = {"PYOPTIM_CUDA": "1", "PYOPTIM_NVCC": str(toolkit.folder / "bin" / "nvcc")}
    built = zipfile.ZipFile(build("build_wheel", source, tmp_path / "dist", **env))
    command = built.read("pyoptim/_cuda.so").decode()
    assert "-shared -cudart static" in command
    assert {f"update.cu.{rule}.o" for rule in ("Sgd", "Adam", "RmsProp", "Adagrad")} <= {
        Path(word).name for word in command.split()
    }
    cuda = json.loads(built.read("pyoptim/_build_info.json"))["cuda"]
    assert (cuda["built"], cuda["reason"]) == (True, None)
    assert cuda["compiler"] == "nvcc 99.1.7"
    assert {"--fmad=false", "--compress-mode=size"} <= set(cuda["flags"])


@needs_compiler
@pytest.mark.parametrize(
    ("gpus", "asked", "archs"),
    [
        ("9.0\n9.0\n8.0", "", ["80", "90"]),
        ("9.0", "120, 80", ["80", "120"]),
        ("13.0", "", ["80", "90", "120"]),
        (None, "", ["80", "90", "120"]),
    ],
    ids=["of_the_machine", "asked", "newer_than_nvcc", "no_gpu"],
)
def test_cuda_engine_is_built_for_the_gpus(
    source: Path, tmp_path: Path, toolkit: Toolkit, gpus: str | None, asked: str, archs: list[str]
) -> None:
    """No GPU: those of 80, 90, 100 and 120 that the made-up nvcc knows."""
    if gpus:
        toolkit.write("nvidia-smi", f"#!/bin/sh\necho '{gpus}'\n")
    output(toolkit.build(source, tmp_path, PYOPTIM_CUDA_ARCHS=asked))
    assert build_info(tmp_path / "pyoptim")["cuda"]["archs"] == archs
    command = (tmp_path / "pyoptim" / "_cuda.so").read_text()
    codes = [f"code=sm_{arch}" for arch in archs[:-1]]
    codes.append(f"code=[sm_{archs[-1]},compute_{archs[-1]}]")
    for arch, code in zip(archs, codes, strict=True):
        assert f"-gencode=arch=compute_{arch},{code}" in command
    assert command.count("-gencode") == len(archs)


@needs_compiler
@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ("#!/bin/sh\nexit 1\n", "{nvcc} does not run: it lists no GPU architectures"),
        (
            NVCC.format(failure="echo 'fatal error: the host compiler is too new' >&2; exit 1"),
            "{nvcc} cannot build CUDA code: fatal error: the host compiler is too new",
        ),
        (
            NVCC.format(
                failure='case "$*" in *update.cu*) echo "update.cu: error" >&2; exit 1; esac'
            ),
            "{nvcc} failed on pyoptim's sources; the build's output says where",
        ),
    ],
    ids=["broken", "no_host_compiler", "sources"],
)
def test_a_failing_nvcc_costs_the_cuda_engine_and_no_more(
    source: Path, tmp_path: Path, toolkit: Toolkit, nvcc: str, reason: str
) -> None:
    path = toolkit.write("nvcc", nvcc)
    result = toolkit.build(source, tmp_path)
    said = output(result) + result.stderr
    info, reason = build_info(tmp_path / "pyoptim"), reason.format(nvcc=path)
    assert info["cpu"]["built"]
    assert (tmp_path / "pyoptim" / MODULE).exists()
    assert (info["cuda"]["built"], info["cuda"]["reason"]) == (False, reason)
    assert f"pyoptim: _cuda.so is not built: {reason}" in said
    assert not (tmp_path / "pyoptim" / "_cuda.so").exists()
    required = toolkit.build(source, tmp_path, PYOPTIM_CUDA="1")
    assert required.returncode != 0
    assert f"PYOPTIM_CUDA=1, but _cuda.so cannot be built: {reason}" in required.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PYOPTIM_NVCC": "/nonexistent"}, "cannot be built: /nonexistent does not run"),
        ({"PYOPTIM_CUDA_ARCHS": "130"}, "nvcc knows no 130, only 80, 90, 120"),
    ],
    ids=["nvcc", "archs"],
)
def test_build_fails_when_nvcc_cannot_do_what_was_asked(
    source: Path, tmp_path: Path, toolkit: Toolkit, env: dict[str, str], message: str
) -> None:
    result = toolkit.build(source, tmp_path, PYOPTIM_CUDA="1", **env)
    assert result.returncode != 0
    assert message in result.stderr


@needs_compiler
def test_a_build_without_cuda_removes_the_engine_of_an_earlier_one(
    source: Path, tmp_path: Path, toolkit: Toolkit
) -> None:
    library = tmp_path / "pyoptim" / "_cuda.so"
    output(toolkit.build(source, tmp_path))
    assert library.exists()
    output(toolkit.build(source, tmp_path, PYOPTIM_CUDA="0"))
    assert not library.exists()


def test_kernels_refuses_to_be_a_top_level_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=r"'pyoptim\.kernels', not 'kernels'"):
        importlib.import_module("kernels")


def triton_that(find_target: object) -> types.SimpleNamespace:
    active = types.SimpleNamespace(get_current_target=find_target)
    runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=active))
    knobs = types.SimpleNamespace(runtime=types.SimpleNamespace(interpret=False))
    return types.SimpleNamespace(runtime=runtime, knobs=knobs)


def no_driver() -> None:
    raise RuntimeError("0 active drivers ([]).\nsecond line")


@pytest.mark.parametrize(
    ("module", "status"),
    [
        (None, "triton is not installed"),
        (
            triton_that(no_driver),
            "triton found no GPU driver: 0 active drivers ([]).",
        ),
        (triton_that(lambda: types.SimpleNamespace(backend="cuda")), None),
    ],
    ids=["absent", "no_driver", "ready"],
)
def test_triton_status_is_none_or_one_line(
    monkeypatch: pytest.MonkeyPatch, module: object, status: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "triton", module)
    assert importlib.import_module("pyoptim.kernels").triton_status() == status


def test_info_reports_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    report = capsys.readouterr().out
    for name in ("pyoptim", "torch", "triton", "threads", "active", "cuda", "reference"):
        assert f"\n  {name} " in report
    assert "error:" not in report


def test_info_prints_on_when_a_probe_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "BUILD_INFO", Path("absent.json"))
    assert cli.main(["info"]) == 0
    report = capsys.readouterr().out
    assert "cpu                   error: FileNotFoundError" in report
    assert "reference             available" in report


def test_commands_pass_their_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(sys.modules, "pyoptim.demo", types.SimpleNamespace(main=seen.append))
    assert cli.main(["demo", "--help", "--steps", "3"]) == 0
    assert seen == [["--help", "--steps", "3"]]


@pytest.mark.parametrize("argv", [[], ["unknown"]])
def test_unknown_command_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "usage: python -m pyoptim" in capsys.readouterr().err
