"""What a line search costs: `python -m pyoptim.bench.bench_line_search [--out FILE]`.

The passes of `pyoptim.line_search.fused` one by one, each beside a loop that moves as many bytes in
the same mix of reads and writes, and whole steps (pass and trials, without any forward pass) beside
SaLSa's released program as a loop over tensors, all interleaved on one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyoptim.line_search.fused import FusedDirection

from . import machine
from .bench_sam import one_thread
from .bytes import DtypeSet
from .probe import Arrays, load_stream
from .probe import run as run_stream
from .report import markdown_table
from .timing import Variant, choose_steps_per_sample, interleave, pairwise, summarize
from .workloads import Workload, make_params, parse

WORKLOADS = ("transformer", "small")
FLOAT32 = DtypeSet(torch.float32, torch.float32)
ETA = 1e-4
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Pass:
    """One pass, and the loop of its mix: read-only and read-write arrays."""

    name: str
    nbytes: int  # per element of float32
    loop: tuple[int, int]


PASSES = (
    Pass("start", 20, (1, 2)),  # p, g, v; p, saved
    Pass("trial", 16, (2, 1)),  # saved, g, v; p
    Pass("finish", 28, (1, 3)),  # saved, g, m, v; p, m, v
    Pass("plain", 28, (1, 3)),
)


class Owner(torch.optim.Optimizer):
    """Groups and state for a direction, with SaLSa's options."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        options = {"base": "adam", "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
        options |= {"lr_scale": 1.0, "momentum": 0.0, "use_mv": False, "bias_offset": 0}
        super().__init__(list(params), options)


class ReleasedSaLSa:
    """A searched step of the released `SaLSA`, tensor by tensor, every formula as it is written.

    Its tensor operations move 208 bytes per element of float32 with one trial and 72 for each
    further one, somewhat less than the 236 and 76 counted in the authors' program. Trials are
    accepted as they come: what is measured is what they cost.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.t = 0

    @torch.no_grad()
    def searched_step(self, trials: int = 1) -> float:
        """Returns the sum of g^2/(sqrt(v_hat) + eps)."""
        self.t += 1
        start = copy.deepcopy([p.data for p in self.params])
        beta1, beta2 = BETAS
        for i, p in enumerate(self.params):
            g = self._grad(p)
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
        norm = torch.zeros(())
        for i, p in enumerate(self.params):
            _, d = self._corrected(i)
            norm += (self._grad(p) ** 2 * d).sum()
        for k in range(trials):
            self._try(start, ETA * 0.8**k)
        if bool(torch.isnan(self.params[0].view(-1)[:1]).any()):
            raise ValueError("NaN in the first parameter")
        return float(norm)

    def _try(self, start: list[Tensor], eta: float) -> None:
        for i, (p, w) in enumerate(zip(self.params, start, strict=True)):
            _, d = self._corrected(i)
            p.data = w - eta * d * self._grad(p)

    def _corrected(self, i: int) -> tuple[Tensor, Tensor]:
        """m_hat and D, both of which every trial computes anew, whichever it needs."""
        m = self.m[i] / (1 - BETAS[0] ** (self.t + 1))
        return m, 1 / (torch.sqrt(self.v[i] / (1 - BETAS[1] ** (self.t + 1))) + EPS)

    @staticmethod
    def _grad(param: Tensor) -> Tensor:
        assert param.grad is not None
        return param.grad


def measure(workload: Workload, reps: int, seconds: float) -> dict[str, Any]:
    """Passes beside their loops, steps beside the released program's; seconds and ratios."""
    variants = make_variants(workload)
    for variant in variants:
        variant.warm_steps = workload.warm_steps
        choose_steps_per_sample(variant)
    n = interleave(variants, reps, seconds)
    times = {variant.name: variant.cpu for variant in variants}
    row: dict[str, Any] = {
        "workload": workload.name,
        "numel": workload.numel,
        "repetitions": n,
        "seconds": {name: vars(summarize(of_one)) for name, of_one in times.items()},
        "over_loop": {},
        "released_over_ours": {},
    }
    for own in PASSES:
        loop = times.get(_loop_name(own))
        if loop:
            row["over_loop"][own.name] = vars(pairwise(times[own.name], loop))
    for trials in (1, 2):
        ours, theirs = times[f"ours, {trials}"], times[f"released, {trials}"]
        row["released_over_ours"][str(trials)] = vars(pairwise(theirs, ours))
    return row


def make_variants(workload: Workload) -> list[Variant]:
    """The released program, which moves its parameters in memory, has its own."""
    direction = FusedDirection(Owner(make_params(workload, FLOAT32)))
    released = ReleasedSaLSa(make_params(workload, FLOAT32, seed=1))
    direction.plain(ETA)
    search(direction, 1)
    steps: dict[str, Callable[[], object]] = {
        **{own.name: pass_alone(direction, own.name) for own in PASSES},
        **{f"ours, {n}": lambda n=n: search(direction, n) for n in (1, 2)},  # type: ignore[misc]
        **{f"released, {n}": lambda n=n: released.searched_step(n) for n in (1, 2)},  # type: ignore[misc]
    }
    stream = load_stream()
    if stream is not None:
        for name, (read_only, read_write) in {_loop_name(own): own.loop for own in PASSES}.items():
            sizes = [workload.numel] * (read_only + read_write)
            arrays = [torch.ones(n) for n in sizes]
            group = [Arrays(arrays[:read_only], arrays[read_only:])]
            steps[name] = lambda group=group: run_stream(stream, group, threads=1)  # type: ignore[misc]
    return [Variant(name, step) for name, step in steps.items()]


def _loop_name(own: Pass) -> str:
    return "loop of {} + {}".format(*own.loop)


def search(direction: FusedDirection, trials: int) -> None:
    direction.start(ETA)
    for k in range(1, trials):
        direction.trial(ETA * 0.8**k)
    direction.finish(ETA)


def pass_alone(direction: FusedDirection, name: str) -> Callable[[], None]:
    """One pass; what the next repetition needs costs nothing: the search is dropped or kept."""

    def step() -> None:
        if name == "plain":
            direction.plain(ETA)
            return
        if name == "start":
            direction.start(ETA)
        else:
            direction._search = kept
            (direction.trial if name == "trial" else direction.finish)(ETA)
        direction._search = None

    direction.start(ETA)
    kept = direction._search
    direction.undo()
    return step


def table(rows: Sequence[Any]) -> str:
    head = ["pass, parameters", "ms", "GB/s", "times its loop"]
    lines = []
    for row in rows:
        for own in PASSES:
            seconds = row["seconds"][own.name]["median"]
            over = row["over_loop"].get(own.name)
            lines.append(
                [
                    f"{own.name}, {parse(row['workload']).title}",
                    f"{seconds * 1e3:.3f}",
                    f"{own.nbytes * row['numel'] / seconds / 1e9:.1f}",
                    f"{over['median']:.2f}" if over else "-",
                ]
            )
    steps = []
    for row in rows:
        for trials in ("1", "2"):
            ours, theirs = (
                row["seconds"][f"{who}, {trials}"]["median"] for who in ("ours", "released")
            )
            steps.append(
                [
                    f"{trials}, {parse(row['workload']).title}",
                    f"{ours * 1e3:.2f}",
                    f"{theirs * 1e3:.2f}",
                    f"{row['released_over_ours'][trials]['median']:.1f}",
                ]
            )
    titles = ["trials, parameters", "ours, ms", "released, ms", "released, times ours"]
    return markdown_table(head, lines) + "\n\n" + markdown_table(titles, steps)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pyoptim.bench.bench_line_search", description=__doc__
    )
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=20.0, help="per workload")
    parser.add_argument("--out", type=Path, help="JSON file to add the rows to")
    arguments = parser.parse_args(argv)
    with one_thread():
        rows = [
            measure(parse(name), arguments.reps, arguments.seconds)
            for name in arguments.workloads.split(",")
        ]
    print(table(rows))
    if arguments.out:
        runs = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
        command = ["python -m pyoptim.bench.bench_line_search", *(argv or sys.argv[1:])]
        run = {
            "command": " ".join(command),
            "versions": machine.describe_versions(),
            "machine": machine.describe_machine(),
            "rows": rows,
        }
        arguments.out.write_text(json.dumps([*runs, run], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
