"""Coreset kernels on the CPU: `python -m pyoptim.bench.bench_coreset [--out FILE.json]`.

Nearest neighbours (k = 1, squared Euclidean, float32) against what people use, each in a process of
its own. The processes take turns; in every turn one runs the float32 GEMM of the shape (torch.mm on
4096 rows at a time, into memory it has) and then its method, so that ratios survive a machine that
changes its speed. The share of the peak is 2 n m d operations over the time, over what a core does
in registers right before, times threads. With one thread CPU time counts, with several wall time.

How many indices are wrong is counted on that data, and on smaller data (4000 x 300 x 64) to which a
constant is added: distances do not change, but products of large numbers lose their digits.

Then the k-center step, distances to the own class's centre and class medians, as multiples of one
read of the features (torch.sum) in the same repetition.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .machine import describe_machine, describe_versions

SHAPES = ("50000x500x768", "50000x500x64", "100000x1000x384", "20000x20000x64")
METHODS = ("pyoptim", "faiss", "addmm+argmin", "cdist+argmin", "sklearn")
GEMM_ROWS, ADDMM_ROWS = 4096, 1024
SHIFTED_SHAPE, OFFSETS = (4000, 300, 64), (100, 1000)
PEAK_ROUNDS, PEAK_RUNS = 2_000_000, 8
Search = Callable[[torch.Tensor, torch.Tensor], Any]


# -- the methods -----------------------------------------------------------------------------------


def load_method(name: str) -> Search:
    """Raises ImportError where its library is missing."""
    if name == "pyoptim":
        from pyoptim.coreset import nearest

        return lambda x, y: nearest(x, y)[1]
    if name == "faiss":
        import faiss

        return lambda x, y: faiss.knn(x.numpy(), y.numpy(), 1)[1][:, 0]
    if name == "sklearn":
        from sklearn.metrics import pairwise_distances_argmin

        return lambda x, y: pairwise_distances_argmin(x.numpy(), y.numpy())
    return {"addmm+argmin": search_by_addmm, "cdist+argmin": search_by_cdist}[name]


def search_by_cdist(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x, y).argmin(dim=1)


def search_by_addmm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    squares, indices = y.square().sum(dim=1), torch.empty(len(x), dtype=torch.int64)
    scores = torch.empty(ADDMM_ROWS, len(y))
    for start in range(0, len(x), ADDMM_ROWS):
        part = x[start : start + ADDMM_ROWS]
        out = scores[: len(part)]
        torch.addmm(squares, part, y.T, alpha=-2, out=out)
        torch.argmin(out, dim=1, out=indices[start : start + ADDMM_ROWS])
    return indices


def multiply(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    for start in range(0, len(x), GEMM_ROWS):
        part = x[start : start + GEMM_ROWS]
        torch.mm(part, y.T, out=out[: len(part)])


# -- a worker --------------------------------------------------------------------------------------


def work(name: str, shape: str, threads: int) -> None:
    """Answers every line on stdin with one turn's measurements, or at first with why it cannot."""
    try:
        search = load_method(name)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    torch.set_num_threads(threads)
    if name == "faiss":
        import faiss

        faiss.omp_set_num_threads(threads)
    n, m, d = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(n + d)
    x, y = (torch.randn(rows, d, generator=generator) for rows in (n, m))
    out = torch.empty(GEMM_ROWS, m)
    before = peak_bytes(reset=True)
    indices = torch.as_tensor(search(x, y))
    extra = peak_bytes() - before
    wrong = count_wrong(x, y, indices)
    shifted = {str(offset): wrong_when_shifted(search, offset) for offset in OFFSETS}
    answer = {"extra_bytes": extra, "wrong": wrong, "wrong_shifted": shifted}
    print(json.dumps(answer), flush=True)
    with limited(threads):
        for _ in sys.stdin:
            turn = {
                "peak": peak_rate(threads),
                "gemm": timed(lambda: multiply(x, y, out), threads),
                "time": timed(lambda: search(x, y), threads),
            }
            print(json.dumps(turn), flush=True)


def limited(threads: int) -> Any:
    """Libraries with thread pools of their own keep to `threads`."""
    from contextlib import nullcontext

    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    return threadpool_limits(threads)


def count_wrong(x: torch.Tensor, y: torch.Tensor, indices: torch.Tensor) -> int:
    """How many of 2000 rows have another index than float64 finds."""
    rows = torch.arange(0, len(x), max(1, len(x) // 2000))
    scores = y.double().square().sum(dim=1) - 2 * (x[rows].double() @ y.double().T)
    return int((scores.argmin(dim=1) != indices[rows]).sum())


def wrong_when_shifted(search: Search, offset: float) -> float:
    """The share of rows with another index than direct differences in float64 find."""
    n, m, d = SHIFTED_SHAPE
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, d, generator=generator) + offset for rows in (n, m))
    indices = torch.as_tensor(search(x, y))
    parts = [(part[:, None] - y.double()).square_().sum(dim=2) for part in x.double().split(200)]
    return float((torch.cat(parts).argmin(dim=1) != indices).double().mean())


def timed(run: Callable[[], object], threads: int) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def peak_rate(threads: int) -> float:
    """Operations per second of `threads` cores that multiply and add in registers; 0: unknown."""
    try:
        from pyoptim._C import coreset_multiply_registers as run
    except ImportError:
        return 0.0
    rates = []
    for _ in range(PEAK_RUNS):
        start = time.process_time()
        count = run(PEAK_ROUNDS)
        rates.append(2 * count * threads / (time.process_time() - start))
    return max(rates)


def peak_bytes(reset: bool = False) -> int:
    """The most resident memory so far, or since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


# -- turns -----------------------------------------------------------------------------------------


def measure(shape: str, threads: int, methods: list[str], turns: int) -> list[dict[str, Any]]:
    """One row per method, medians over the turns."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--worker"]
    workers = {
        name: subprocess.Popen(
            [*command, name, shape, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in methods
    }
    rows = {name: {"method": name, **read(worker)} for name, worker in workers.items()}
    turns_of: dict[str, list[dict[str, float]]] = {
        name: [] for name, row in rows.items() if "missing" not in row
    }
    for _ in range(turns):
        for name, done in turns_of.items():
            stdin = workers[name].stdin
            assert stdin is not None
            stdin.write("turn\n")
            stdin.flush()
            done.append(read(workers[name]))
    for worker in workers.values():
        worker.communicate()
    for name, done in turns_of.items():
        rows[name].update(summary(shape, done, turns_of["pyoptim"]))
    return [{"shape": shape, "threads": threads, **row} for row in rows.values()]


def read(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker ended: {worker.args!r}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def summary(
    shape: str, turns: list[dict[str, float]], ours: list[dict[str, float]]
) -> dict[str, float]:
    n, m, d = map(int, shape.split("x"))
    operations = 2 * n * m * d
    pairs = list(zip(turns, ours, strict=True))
    return {
        "ms": min(turn["time"] for turn in turns) * 1e3,
        "gflops": operations / statistics.median(turn["time"] for turn in turns) * 1e-9,
        "of_peak": statistics.median(operations / t["time"] / max(t["peak"], 1) for t in turns),
        "of_gemm": statistics.median(turn["time"] / turn["gemm"] for turn in turns),
        "gemm_of_peak": statistics.median(
            operations / t["gemm"] / max(t["peak"], 1) for t in turns
        ),
        "over_pyoptim": statistics.median(turn["time"] / own["time"] for turn, own in pairs),
    }


# -- centres ---------------------------------------------------------------------------------------


def measure_centers(shape: str, threads: int, turns: int) -> dict[str, Any]:
    """Times as multiples of one read of the features."""
    from pyoptim.coreset import CenterDistances, center_distances, class_medians

    torch.set_num_threads(threads)
    n, d = map(int, shape.split("x"))
    x, labels = torch.randn(n, d), torch.randint(0, 10, (n,))
    medians, distances = class_medians(x, labels), CenterDistances(x)
    farthest = [0]
    # The first steps, which change most distances, are few of a search for some hundred centres.
    for _ in range(10):
        farthest[0], _ = distances.add(farthest[0])

    def step() -> None:
        farthest[0], _ = distances.add(farthest[0])

    cases: dict[str, Callable[[], object]] = {
        "read": lambda: x.sum(),
        "k_center_step": step,
        "center_distances": lambda: center_distances(x, labels, medians),
        "class_medians": lambda: class_medians(x, labels),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(turns):
        for name, run in cases.items():
            times[name].append(timed(run, threads))
    reads = times["read"]
    row: dict[str, Any] = {"shape": shape, "threads": threads}
    for name, own in times.items():
        row[f"{name}_ms"] = min(own) * 1e3
        row[f"{name}_reads"] = statistics.median(a / b for a, b in zip(own, reads, strict=True))
    return row


# -- the command -----------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    lines = [
        "| n x m x d | threads | method | ms | GFLOP/s | of the peak | x GEMM | x pyoptim "
        "| extra MiB | wrong of 2000 | wrong at +100 | at +1000 |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["nearest"]:
        if "missing" in row:
            continue
        lines.append(
            f"| {row['shape']} | {row['threads']} | {row['method']} | {row['ms']:.1f} "
            f"| {row['gflops']:.0f} | {row['of_peak']:.0%} | {row['of_gemm']:.2f} "
            f"| {row['over_pyoptim']:.2f} | {row['extra_bytes'] / 2**20:.1f} | {row['wrong']} "
            f"| {row['wrong_shifted']['100']:.1%} | {row['wrong_shifted']['1000']:.1%} |"
        )
    lines += [
        "",
        "| n x d | threads | one read, ms | k-center step, reads | own centre, reads "
        "| class medians, reads |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["centers"]:
        lines.append(
            f"| {row['shape']} | {row['threads']} | {row['read_ms']:.2f} "
            f"| {row['k_center_step_reads']:.2f} | {row['center_distances_reads']:.2f} "
            f"| {row['class_medians_reads']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def merge(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Adds to the results in the file, replacing rows of the same case."""
    if not path.exists():
        return results
    earlier = json.loads(path.read_text())
    for part, keys in (
        ("nearest", ("shape", "threads", "method")),
        ("centers", ("shape", "threads")),
    ):
        cases = {tuple(row[key] for key in keys) for row in results[part]}
        kept = [row for row in earlier[part] if tuple(row[key] for key in keys) not in cases]
        results[part] = kept + results[part]
    return results


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, shape, threads = sys.argv[2:]
        return work(name, shape, int(threads))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="NxMxD, ...; empty for none")
    parser.add_argument("--centers", default="50000x64,50000x768", help="NxD, ...; empty for none")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file; rows of an earlier run are kept")
    asked = parser.parse_args()
    threads = [int(count) for count in asked.threads.split(",")]
    results: dict[str, Any] = {"machine": describe_machine(), "versions": describe_versions()}
    results["nearest"] = [
        row
        for shape in filter(None, asked.shapes.split(","))
        for count in threads
        for row in measure(shape, count, asked.methods.split(","), asked.turns)
    ]
    results["centers"] = [
        measure_centers(shape, count, asked.turns)
        for shape in filter(None, asked.centers.split(","))
        for count in threads
    ]
    print(table(results))
    if asked.out:
        results = merge(asked.out, results)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")
        asked.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
