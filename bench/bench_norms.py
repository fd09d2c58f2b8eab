"""Norms and clipping on the CPU: `python -m pyoptim.bench.bench_norms [elements]`.

Interleaved with torch's functions and with the loop that only adds, on one thread. Prints the
fastest of each in GB/s of what has to be read and written, and its share of the loop's; then AdamW
steps with clipped gradients, as medians of the ratios per repetition.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.nn import Parameter

import pyoptim

from .bytes import DtypeSet
from .probe import Arrays, load_stream
from .probe import run as run_stream
from .timing import Variant, interleave, pairwise, summarize
from .workloads import make_params, parse

DTYPES = (torch.float32, torch.bfloat16)
REPETITIONS, SECONDS = 15, 30.0
NO_LIMIT = 1e30


class Shrinking:
    """A limit that is always below the last, so that every clip has to scale."""

    def __init__(self) -> None:
        self.limit = 1.0

    def __call__(self) -> float:
        self.limit *= 0.9
        return self.limit


def measure(numel: int, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """(name, seconds of the fastest run, bytes that it has to move)."""
    param = Parameter(torch.zeros(numel, dtype=dtype))
    param.grad = torch.randn(numel).to(dtype)
    grad, size, limit = param.grad, param.nbytes, Shrinking()
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "norm": (lambda: pyoptim.total_norm(grad), size),
        "norm, torch": (lambda: torch.nn.utils.get_total_norm([grad]), size),
        "clip": (lambda: pyoptim.clip_grad_norm_(param, limit()), 3 * size),
        "clip, torch": (lambda: torch.nn.utils.clip_grad_norm_(param, limit()), 3 * size),
        "clip without need": (lambda: pyoptim.clip_grad_norm_(param, NO_LIMIT), size),
    }
    stream = load_stream()
    if stream is not None:
        # Adds 0, so that the values stay what they are.
        arrays = [Arrays([torch.zeros(numel, dtype=dtype)], [torch.ones(numel, dtype=dtype)])]
        cases["loop"] = (lambda: run_stream(stream, arrays, threads=1), arrays[0].nbytes())
    variants = [Variant(name, step) for name, (step, _) in cases.items()]
    interleave(variants, REPETITIONS, SECONDS)
    return [(v.name, summarize(v.wall).min, cases[v.name][1]) for v in variants]


def measure_clipped_steps(workload: str) -> dict[str, list[float]]:
    """Seconds of CPU time per repetition of an AdamW step with clipped gradients, by how."""
    dtypes = DtypeSet(torch.float32, torch.float32)
    ours, plain, theirs = (make_params(parse(workload), dtypes) for _ in range(3))
    clipping, limit, limit_of_torch = (
        pyoptim.AdamW(ours, max_grad_norm=1.0),
        Shrinking(),
        Shrinking(),
    )
    step = pyoptim.AdamW(plain).step
    fused = torch.optim.AdamW(theirs, fused=True).step
    variants = [
        Variant("max_grad_norm", clipping.step, warm_steps=1),
        Variant("clip, step", lambda: (pyoptim.clip_grad_norm_(plain, limit()), step())),
        Variant(
            "torch clip, fused",
            lambda: (torch.nn.utils.clip_grad_norm_(theirs, limit_of_torch()), fused()),
        ),
    ]
    for variant in variants:
        variant.step()
    interleave(variants, REPETITIONS, SECONDS)
    return {variant.name: variant.cpu for variant in variants}


def print_clipped_steps(workload: str) -> None:
    times = measure_clipped_steps(workload)
    print(f"AdamW with clipping, {parse(workload).title}, float32, 1 thread")
    for name, of_one in times.items():
        ratio = pairwise(of_one, times["max_grad_norm"]).median
        print(f"  {name:18} {summarize(of_one).median * 1e3:8.2f} ms  {ratio:6.2f}")


def main() -> None:
    numel = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000_000
    for dtype in DTYPES:
        results = measure(numel, dtype)
        loop = next((size / time for name, time, size in results if name == "loop"), None)
        print(f"{numel:,} x {dtype}, 1 thread")
        for name, time, size in results:
            share = "" if loop is None else f"  {size / time / loop:5.2f} of the loop"
            print(f"  {name:18} {time * 1e3:8.2f} ms  {size / time / 1e9:6.1f} GB/s{share}")
    for workload in ("1000x1024", "1x10000000"):
        print_clipped_steps(workload)


if __name__ == "__main__":
    main()
