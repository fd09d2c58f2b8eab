"""Runs the tests of the Triton kernels in processes of their own.

Triton reads TRITON_INTERPRET when the kernels are imported, and the tests of the machine code give
Triton a driver that only pretends: neither can share a process with anything else.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyoptim.kernels

ROOT = Path(__file__).parents[1]
INTERPRETED = {"TRITON_INTERPRET": "1"}
COMPILED = {"PYOPTIM_TRITON_AOT": "1", "TRITON_INTERPRET": "0"}
NORMS = ("tests/test_norms.py", "tests/test_clip_grad_norm.py", "-k", "triton")
# What pytest runs, where, and how many tests at least: a folder in which nothing is collected
# proves nothing.
RUNS: dict[str, tuple[tuple[str, ...], dict[str, str], int]] = {
    "kernels": (("tests/triton_interpreter",), INTERPRETED, 240),
    "optimizers": (("tests/gpu",), INTERPRETED, 215),
    "norms": (NORMS, INTERPRETED, 125),
    "machine_code": (("tests/triton_aot",), COMPILED, 13),
}
# The only reason to skip a test of a run.
NEEDS_GPU = "graphs, streams and devices need a CUDA device"


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


STATUS = "import pyoptim.kernels as k; print(k.triton_status())"


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_the_kernels_pass_their_own_tests(run: str, tmp_path: Path) -> None:
    arguments, environment, at_least = RUNS[run]
    reason = python(STATUS, TRITON_INTERPRET="1")
    if reason != "None":
        pytest.skip(reason)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        # A cache of its own: kernels are to be compiled, not found.
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0, result.stdout[-20000:]
    assert passed, result.stdout
    assert int(passed[1]) >= at_least, result.stdout
    skips = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all(NEEDS_GPU in line for line in skips), skips


def test_status_is_none_or_one_line() -> None:
    reason = pyoptim.kernels.triton_status()
    assert reason is None or (reason and "\n" not in reason)


@pytest.mark.parametrize("library", ["triton", "numpy"])
def test_a_missing_library_is_the_reason(library: str) -> None:
    hide = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {library!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    pytest.importorskip("triton", reason="triton is not installed")
    assert python(hide + STATUS) == f"{library} is not installed"


def test_a_library_that_fails_to_load_is_the_reason() -> None:
    broken = (
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'triton':\n"
        "            raise OSError('libtriton.so: no such file\\nand more')\n"
        "sys.meta_path.insert(0, Broken())\n"
    )
    expected = "triton cannot be imported: libtriton.so: no such file"
    assert python(broken + STATUS) == expected


def test_interpreted_kernels_run_on_the_cpu() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    code = STATUS + "; print(k.device_type())"
    assert python(code, TRITON_INTERPRET="1").split() == ["None", "cpu"]
    assert python(code, TRITON_INTERPRET="0").split()[-1] == "cuda"
