"""Norms and clipping on the CPU: `python -m pyoptim.bench.bench_norms [elements]`.

Interleaved with torch's functions and with the loop that only adds, on one thread. Prints the
fastest of each in GB/s of what has to be read and written, and its share of the loop's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.nn import Parameter

import pyoptim

from .probe import Arrays, load_stream
from .probe import run as run_stream
from .timing import Variant, interleave, summarize

DTYPES = (torch.float32, torch.bfloat16)
REPETITIONS, SECONDS = 15, 30.0
# The second clip to it finds a norm that is 1 but for a rounding, and still scales: 1 / (1 + 1e-6).
LIMIT, NO_LIMIT = 1.0, 1e30


def measure(numel: int, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """(name, seconds of the fastest run, bytes that it has to move)."""
    param = Parameter(torch.zeros(numel, dtype=dtype))
    param.grad = torch.randn(numel).to(dtype)
    grad, size = param.grad, param.nbytes
    cases: dict[str, tuple[Callable[[], object], int]] = {
        "norm": (lambda: pyoptim.total_norm(grad), size),
        "norm, torch": (lambda: torch.nn.utils.get_total_norm([grad]), size),
        "clip": (lambda: pyoptim.clip_grad_norm_(param, LIMIT), 3 * size),
        "clip, torch": (lambda: torch.nn.utils.clip_grad_norm_(param, LIMIT), 3 * size),
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


def main() -> None:
    numel = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000_000
    for dtype in DTYPES:
        results = measure(numel, dtype)
        loop = next((size / time for name, time, size in results if name == "loop"), None)
        print(f"{numel:,} x {dtype}, 1 thread")
        for name, time, size in results:
            share = "" if loop is None else f"  {size / time / loop:5.2f} of the loop"
            print(f"  {name:18} {time * 1e3:8.2f} ms  {size / time / 1e9:6.1f} GB/s{share}")


if __name__ == "__main__":
    main()
