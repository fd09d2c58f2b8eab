"""SAM's overhead over its base optimizer: `python -m pyoptim.bench.bench_sam [--out FILE]`.

One step of pyoptim's base alone and of pyoptim's SAM around it, one of torch's fused base alone and
of SAM's official form around that, interleaved on one thread; what SAM adds is the difference
within a repetition. Beside it the loop that reads and writes the 20 bytes per float32 element that
SAM has to move: norm 4, ascent 16, restoring 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyoptim

from . import machine
from .bytes import DtypeSet
from .probe import Arrays, load_stream
from .probe import run as run_stream
from .report import markdown_table
from .timing import Variant, choose_steps_per_sample, interleave, pairwise, summarize
from .workloads import Workload, make_params, parse

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd-momentum": ("SGD", {"lr": 1e-3, "momentum": 0.9}),
    "adamw": ("AdamW", {"lr": 1e-3}),
}
WORKLOADS = ("large", "transformer", "small")
RHO = 0.05
BYTES = 20  # per element of float32
FLOAT32 = DtypeSet(torch.float32, torch.float32)


class UnfusedSAM:
    """SAM and ASAM as davda54 steps them, operation by operation.

    To restore, the saved copy takes the parameter's place: its storage changes at every step.

    Args:
        base: an optimizer of any library, whose parameters are perturbed and stepped.
    """

    def __init__(self, base: torch.optim.Optimizer, rho: float, adaptive: bool = False) -> None:
        self.base, self.rho, self.adaptive = base, rho, adaptive
        self._saved: dict[Tensor, Tensor] = {}

    def _params(self) -> Iterator[Tensor]:
        for group in self.base.param_groups:
            yield from (p for p in group["params"] if p.grad is not None)

    @torch.no_grad()
    def first_step(self) -> None:
        norms = [((p.abs() if self.adaptive else 1.0) * p.grad).norm(p=2) for p in self._params()]
        scale = self.rho / (torch.stack(norms).norm(p=2) + 1e-12)
        for p in self._params():
            self._saved[p] = p.detach().clone()
            p.add_((p.pow(2) if self.adaptive else 1.0) * p.grad * scale.to(p))

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self._params():
            p.data = self._saved[p]
        self.base.step()


def measure(base: str, workload: Workload, adaptive: bool, reps: int, seconds: float) -> Any:
    """What SAM adds to one step of `base`, in seconds and as ratios; and the whole steps."""
    params = make_params(workload, FLOAT32)
    variants = make_variants(base, workload, params, adaptive)
    for variant in variants:
        variant.warm_steps = workload.warm_steps
        choose_steps_per_sample(variant)
    n = interleave(variants, reps, seconds)
    times = {variant.name: variant.cpu for variant in variants}
    added = _added(times["pyoptim"], times["base"])
    unfused = _added(times["official"], times["torch base"])
    loop = times.get("loop")
    row: dict[str, Any] = {
        "base": base,
        "workload": workload.name,
        "adaptive": adaptive,
        "repetitions": n,
        "seconds": {name: vars(summarize(of_one)) for name, of_one in times.items()},
        "added": vars(summarize(added)),
        "added_unfused": vars(summarize(unfused)),
        "unfused_over_ours": vars(pairwise(unfused, added)),
        "official_step_over_ours": vars(pairwise(times["official"], times["pyoptim"])),
    }
    if loop:
        row["added_over_loop"] = vars(pairwise(added, loop))
    return row


def make_variants(
    base: str, workload: Workload, params: list[Tensor], adaptive: bool
) -> list[Variant]:
    """Each has its own state; the official form, which moves its parameters, has its own."""
    name, options = BASES[base]
    ours: Any = getattr(pyoptim, name)
    theirs: Any = getattr(torch.optim, name)
    sam = pyoptim.SAM(params, ours, rho=RHO, adaptive=adaptive, **options)
    moving = make_params(workload, FLOAT32)
    official = UnfusedSAM(theirs(moving, fused=True, **options), RHO, adaptive)
    steps: dict[str, Callable[[], object]] = {
        "base": ours(params, **options).step,
        "pyoptim": _both_steps(sam),
        "torch base": theirs(params, fused=True, **options).step,
        "official": _both_steps(official),
        "norm": lambda: pyoptim.total_norm([p.grad for p in params if p.grad is not None]),
    }
    stream = load_stream()
    if stream is not None:
        # As many arrays as there are gradients, parameters and saved weights.
        arrays = [
            Arrays([torch.zeros(workload.numel)], [torch.ones(workload.numel) for _ in range(2)])
        ]
        steps["loop"] = lambda: run_stream(stream, arrays, threads=1)
    return [Variant(name, step) for name, step in steps.items()]


def _both_steps(optimizer: Any) -> Callable[[], None]:
    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def _added(times: Sequence[float], base: Sequence[float]) -> list[float]:
    return [whole - alone for whole, alone in zip(times, base, strict=True)]


def table(rows: Sequence[Any]) -> str:
    head = ["SAM around", "base, ms", "added, ms", "GB/s of 20 B", "added / loop of 20 B"]
    head += ["official form adds, times ours", "official step, times ours"]
    lines = []
    for row in rows:
        added = row["added"]["median"]
        loop = row.get("added_over_loop")
        numel = parse(row["workload"]).numel
        lines.append(
            [
                f"{row['base']}, {parse(row['workload']).title}"
                + (" (ASAM)" if row["adaptive"] else ""),
                f"{row['seconds']['base']['median'] * 1e3:.2f}",
                f"{added * 1e3:.2f}",
                f"{BYTES * numel / added / 1e9:.1f}",
                f"{loop['median']:.2f}" if loop else "-",
                f"{row['unfused_over_ours']['median']:.2f}",
                f"{row['official_step_over_ours']['median']:.2f}",
            ]
        )
    return markdown_table(head, lines)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pyoptim.bench.bench_sam", description=__doc__)
    parser.add_argument("--bases", default=",".join(BASES))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--adaptive", action="store_true", help="ASAM in the place of SAM")
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=8.0, help="per base and workload")
    parser.add_argument("--out", type=Path, help="JSON file to add the rows to")
    arguments = parser.parse_args(argv)
    rows = []
    with one_thread():
        for base in arguments.bases.split(","):
            for name in arguments.workloads.split(","):
                case = base, parse(name), arguments.adaptive
                rows.append(measure(*case, arguments.reps, arguments.seconds))
    print(table(rows))
    if arguments.out:
        save(rows, arguments.out, argv)
    return 0


def save(rows: list[Any], path: Path, argv: Sequence[str] | None) -> None:
    """Adds a run to the file."""
    runs = json.loads(path.read_text()) if path.exists() else []
    run = {
        "command": " ".join(["python -m pyoptim.bench.bench_sam", *(argv or sys.argv[1:])]),
        "versions": machine.describe_versions(),
        "machine": machine.describe_machine(),
        "rows": rows,
    }
    path.write_text(json.dumps([*runs, run], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
