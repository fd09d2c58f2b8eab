"""The emulator itself: CUDA's words mean what they mean, and faults in kernels are found."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import emulated
import numpy as np
import pytest
import test_emulated_reduce as reduce_tests
import test_emulated_update as update_tests
import torch
from cases import SGD, Case
from emulated import Emulator, Factors, build_kernels, build_with

KERNELS = (
    *("down", "across", "from", "half", "ballot", "vote", "poison", "neighbour", "order"),
    *("ended", "elsewhere", "missing", "outside", "mixed"),
)
THREADS = np.arange(256.0)
WARP_OF = THREADS // 32 * 32


# -- words -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("words")
    library = ctypes.CDLL(str(build_kernels(folder, Path(__file__).with_name("words.cu"))))
    library.run_kernel.restype = ctypes.c_char_p
    return library


def run(words: ctypes.CDLL, kernel: str, seed: int = 0) -> tuple[np.ndarray, str | None]:
    out = np.full(256, -1.0)
    words.pyoptim_emulator_seed(seed)
    pointer = out.ctypes.data_as(ctypes.c_void_p)
    message = words.run_kernel(KERNELS.index(kernel), pointer)
    return out, message and message.decode()


EXPECTED = {
    "down": np.where(THREADS % 32 < 29, THREADS + 3, THREADS),
    "across": WARP_OF + (THREADS.astype(int) % 32 ^ 5),
    "from": WARP_OF + 7,
    "half": np.where(THREADS % 32 < 16, 10 * (THREADS.astype(int) ^ 1), -1.0),
    "ballot": np.full(256, float(0xAAAAAAAA)),
    "vote": np.where(THREADS < 32, 0, np.where(THREADS < 64, 3, 2)),
    "poison": np.full(256, np.nan),
    "neighbour": 10.0 * ((THREADS + 1) % 256) + 2,
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kernel", EXPECTED)
def test_words_mean_what_they_mean_in_cuda(words: ctypes.CDLL, kernel: str, seed: int) -> None:
    out, message = run(words, kernel, seed)
    assert message is None
    np.testing.assert_array_equal(out, EXPECTED[kernel])


def test_seeds_choose_the_order_of_threads(words: ctypes.CDLL) -> None:
    orders = [np.argsort(run(words, "order", seed)[0]).tolist() for seed in (0, 1, 2)]
    assert orders[0] == list(range(256))
    assert all(sorted(order) == orders[0] for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("ended", "1 have ended, 255 wait at __syncthreads in line"),
        ("elsewhere", "0 have ended, 128 wait at __syncthreads in line"),
        ("missing", "31 wait at __shfl_down_sync in line"),
        ("outside", "wait at __shfl_down_sync in line"),
        ("mixed", "1 wait at __syncwarp in line"),
    ],
)
def test_threads_that_wait_for_ever_are_an_error(
    words: ctypes.CDLL, kernel: str, message: str, seed: int
) -> None:
    found = run(words, kernel, seed)[1]
    assert found is not None
    assert "wait for each other" in found
    assert message in found
    # The next kernel starts afresh.
    assert run(words, "neighbour", seed)[1] is None


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(emulated, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=r"'no-such-compiler' does not start.*install g\+\+"):
        emulated.build()


# -- planted faults --------------------------------------------------------------------------------

NESTEROV = Case(SGD, "nesterov")


def check_update(emulator: Emulator) -> None:
    update_tests.test_bits_are_the_cpu_engines(emulator, NESTEROV, torch.float32, None, (0,))


def check_found_inf(emulator: Emulator) -> None:
    p = update_tests.problem(NESTEROV)
    before = [row.param.clone() for row in p.rows]
    p.update(emulator, Factors(found_inf=torch.ones(1)))
    assert all(torch.equal(a, row.param) for a, row in zip(before, p.rows, strict=True))


def check_norms(emulator: Emulator) -> None:
    for seed in (0, 1, 2):
        reduce_tests.test_sums_do_not_depend_on_the_order_of_threads(emulator, seed)


def check_row_sums(emulator: Emulator) -> None:
    reduce_tests.test_row_sums_do_not_depend_on_the_order_of_threads(emulator, 1, 50_000)


# What is changed, in which unit, and who finds it.
FAULTS: dict[str, tuple[str, str, str, str, Callable[[Emulator], None]]] = {
    "no barrier in the sum": (
        *("cuda/reduce.cu", "  __syncthreads();\n  return threadIdx.x", "  return threadIdx.x"),
        *("reduce", check_norms),
    ),
    "a barrier that one thread misses": (
        *("cuda/reduce.cu", "  __syncthreads();\n  return threadIdx.x"),
        *("  if (threadIdx.x != 3) __syncthreads();\n  return threadIdx.x", "reduce", check_norms),
    ),
    "lanes combined in another order": (
        *("cuda/lanes.hpp", "lanes[i + N / 2]);", "lanes[N - 1 - i]);", "reduce", check_row_sums),
    ),
    "a vector beyond the end": (
        *("cuda/update.cu", "rest = end - (end - begin) % kVector;"),
        *("rest = end + (begin - end) % kVector + kVector;", "update_Sgd", check_update),
    ),
    "no tail": (
        *("cuda/update.cu", "update_range<Rule, V, P, S, M, 1>(arrays, h, by, rest, end);", ""),
        *("update_Sgd", check_update),
    ),
    "the last row of a table is not found": (
        *("cuda/device.hpp", "high = n_rows;", "high = n_rows - 1;", "update_Sgd", check_update),
    ),
    "the first block of a row goes to the row before": (
        *("cuda/device.hpp", "[middle] <= block", "[middle] < block"),
        *("update_Sgd", check_update),
    ),
    "found_inf is not read": (
        *(
            "cuda/update.cu",
            "if (table.factors.found_inf && *table.factors.found_inf != 0) return;",
        ),
        *("", "update_Sgd", check_found_inf),
    ),
}


@pytest.mark.native  # the CPU engine says what is right
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, built: Emulator) -> None:
    file, old, new, unit, check = FAULTS[fault]
    check(built)
    built.api.tune(0, 0)
    built.seed(0)
    with pytest.raises((AssertionError, RuntimeError)):
        check(Emulator(build_with(tmp_path, file, old, new, unit)))


UPDATE_AT_OFFSET = """
import sys
from pathlib import Path
import torch
from emulated import HYPER_BYTES, Emulator, Row
row = Row(*(torch.zeros(16)[int(sys.argv[2]) :] for _ in range(2)))
Emulator(Path(sys.argv[1])).update(0, 0, 1, [row], torch.zeros(1, HYPER_BYTES, dtype=torch.uint8))
"""


def test_an_unaligned_vector_access_is_found(tmp_path: Path) -> None:
    # A GPU would refuse it; the CPU that stands in for it does not, but the sanitizer does.
    library = build_with(
        tmp_path,
        *("cuda/update.cu", "if (arrays.template are_aligned<kVector>()) {", "if (true) {"),
        unit="update_Sgd",
    )
    results = [
        subprocess.run(
            [sys.executable, "-c", UPDATE_AT_OFFSET, str(library), offset],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        for offset in ("4", "1")
    ]
    assert results[0].returncode == 0, results[0].stderr
    assert results[1].returncode != 0
    assert "misaligned address" in results[1].stderr
