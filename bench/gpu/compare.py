"""Two backends side by side on random tensors: are the bits the same, and if not, by how much?

    python -m pyoptim.bench.gpu.compare --backend cuda --against cpu

Every optimizer, option set and set of dtypes makes several steps on tensors of odd sizes that begin
anywhere in their memory, with special values among the gradients, under a GradScaler, with clipping
and with several groups. Compared are parameters, states, counters and gradients. Memory beside the
tensors is filled with a mark that must still be there at the end.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyoptim

from ..bytes import DtypeSet
from ..report import markdown_table
from .scenarios import (
    DTYPES,
    LR,
    OPTIONS,
    SCENARIOS,
    Model,
    Options,
    make_model,
    may_differ,
    why_not,
)


@dataclass(frozen=True)
class Task:
    """What one process compares: an optimizer in one set of dtypes, all options and scenarios."""

    optimizer: str
    dtypes: str
    device: str
    backend: str
    against: str
    steps: int
    is_small: bool


@dataclass
class Finding:
    """One scenario of one optimizer in one set of dtypes, over all its option sets."""

    optimizer: str
    dtypes: str
    scenario: str
    may_differ: bool = False
    elements: int = 0
    differing: int = 0
    max_ulp: int = 0
    is_close: bool = True
    example: str = ""
    error: str = ""

    def verdict(self, is_equality_required: bool) -> str:
        if self.error:
            return "FAILED"
        if not self.differing:
            return "equal"
        must_be_equal = is_equality_required and not self.may_differ
        return "close" if self.is_close and not must_be_equal else "DIFFERS"


def compare_task(task: Task) -> list[Finding]:
    """One finding per scenario that exists."""
    findings = []
    for name in SCENARIOS:
        if why_not(name, task.optimizer, task.device) is None:
            has_reference = "reference" in (task.backend, task.against)
            allowed = may_differ(name, task.optimizer, task.dtypes, has_reference)
            finding = Finding(task.optimizer, task.dtypes, name, allowed)
            for options in OPTIONS[task.optimizer]:
                _compare_options(finding, task, options)
            findings.append(finding)
    return findings


def _compare_options(finding: Finding, task: Task, options: Options) -> None:
    try:
        ours = run(task, finding.scenario, options, task.device, task.backend)
        theirs = run(task, finding.scenario, options, "cpu", task.against)
        for name, tensor in ours.items():
            _compare_tensors(finding, f"{options} {name}", tensor, theirs[name])
    # A refusal or a crash is this finding's result; the others are still to be found.
    except Exception as error:
        finding.error = finding.error or f"{options}: {type(error).__name__}: {error}"


def run(
    task: Task, scenario: str, options: Options, device: str, backend: str
) -> dict[str, Tensor]:
    """Everything that the steps have written, by name, on the CPU."""
    dtypes = DtypeSet.parse(task.dtypes)
    if dtypes.has_own_state_dtype:
        options = options | {"state_dtype": dtypes.state}
    make = functools.partial(
        getattr(pyoptim, task.optimizer), **{"lr": LR, "backend": backend} | options
    )
    model = make_model(dtypes.param, device, task.is_small)
    optimizer = SCENARIOS[scenario](make, model, task.steps)
    if not model.is_guard_intact():
        raise AssertionError(f"backend {backend!r} wrote beside a tensor")
    return {name: tensor.detach().cpu() for name, tensor in _written(model, optimizer)}


def _written(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for index, param in enumerate(model.params):
        shape = tuple(param.shape)
        yield f"param {index} {shape}", param
        if param.grad is not None:
            yield f"grad {index} {shape}", param.grad
        for name, value in sorted(optimizer.state.get(param, {}).items()):
            if isinstance(value, Tensor):
                yield f"{name} {index} {shape}", value


def _compare_tensors(finding: Finding, what: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        kinds = [(str(t.dtype), tuple(t.shape)) for t in (ours, theirs)]
        raise AssertionError(f"{what}: {kinds[0]} is not {kinds[1]}")
    finding.elements += ours.numel()
    a, b = bits(ours), bits(theirs)
    differs = (a != b).flatten()
    if not differs.any():
        return
    finding.differing += int(differs.sum())
    finding.max_ulp = max(finding.max_ulp, int((_ordered(a) - _ordered(b)).abs().max()))
    finding.is_close &= _is_close(ours, theirs)
    if not finding.example:
        k = int(differs.nonzero()[0])
        pair = [t.flatten()[k].item() for t in (ours, theirs)]
        finding.example = f"{what}[{k}]: {pair[0]!r} is not {pair[1]!r}"


def bits(tensor: Tensor) -> Tensor:
    """The bits as integers; NaNs are equal whatever their payload."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.nan, tensor).view(integer)


def _ordered(pattern: Tensor) -> Tensor:
    """Integers in the order of the numbers: neighbours differ by one."""
    magnitude = pattern.to(torch.int64) & torch.iinfo(pattern.dtype).max
    return torch.where(pattern < 0, -magnitude, magnitude)


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    """Within the roundings of a few steps; all values are about 1."""
    allowed = 64 * torch.finfo(ours.dtype).eps
    return torch.allclose(ours.double(), theirs.double(), allowed, allowed, equal_nan=True)


# -- command line ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print a table, write JSON; returns 1 if something differs, 2 if nothing can run."""
    arguments = _parser().parse_args(argv)
    reason = _why_cannot_run(arguments)
    if reason is not None:
        print(f"compare: {reason}", file=sys.stderr)
        return 2
    started = time.monotonic()
    tasks = [
        Task(
            optimizer,
            dtypes,
            arguments.device,
            arguments.backend,
            arguments.against,
            arguments.steps,
            arguments.small,
        )
        for optimizer in arguments.optimizers
        for dtypes in arguments.dtypes
    ]
    findings = [finding for found in _run_all(tasks, arguments.jobs) for finding in found]
    print(_table(findings, arguments))
    print(f"{time.monotonic() - started:.0f} s")
    if arguments.out:
        arguments.out.write_text(json.dumps(_record(findings, arguments), indent=1) + "\n")
    verdicts = [finding.verdict(arguments.require == "equal") for finding in findings]
    return int(not set(verdicts) <= {"equal", "close"})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pyoptim.bench.gpu.compare",
        description="Compare what two backends compute, bit for bit.",
    )

    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            for name in text.split(","):
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
            return text.split(",")

        return parse

    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backend", default="cuda", choices=pyoptim.backend.BACKENDS)
    parser.add_argument("--against", default="cpu", choices=("cpu", "reference"))
    parser.add_argument(
        "--require",
        default="equal",
        choices=("equal", "close"),
        help="close: a difference of a few roundings is stated, but is no failure",
    )
    parser.add_argument("--optimizers", type=names(list(OPTIONS)), default=list(OPTIONS))
    parser.add_argument("--dtypes", type=names(DTYPES), default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="few and small tensors")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--out", type=Path, metavar="JSON")
    return parser


def _why_cannot_run(arguments: argparse.Namespace) -> str | None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device here; use --device cpu, or a machine with a GPU"
    for name in (arguments.backend, arguments.against):
        reason = pyoptim.backend.status()[name]
        if reason is not None:
            return f"backend {name!r} cannot run here: {reason}"
    return None


def _run_all(tasks: list[Task], jobs: int) -> Iterator[list[Finding]]:
    if jobs == 1:
        yield from map(compare_task, tasks)
        return
    # Not forked: a forked child cannot use CUDA.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compare_task, tasks)


def _table(findings: Sequence[Finding], arguments: argparse.Namespace) -> str:
    title = f"{arguments.backend} on {arguments.device} against {arguments.against} on the CPU"
    header = ["optimizer, dtype", "scenario", "elements", "differing", "max ulp", "verdict"]
    lines = [
        [
            f"{found.optimizer}, {found.dtypes}",
            found.scenario,
            f"{found.elements:,}",
            f"{found.differing:,}",
            f"{found.max_ulp:,}",
            found.verdict(arguments.require == "equal"),
        ]
        for found in findings
    ]
    details = [
        f"- {found.optimizer}, {found.dtypes}, {found.scenario}: {found.error or found.example}"
        for found in findings
        if found.error or found.example
    ]
    missing = {
        f"- not compared: {scenario}: {reason}"
        for optimizer in arguments.optimizers
        for scenario in SCENARIOS
        if (reason := why_not(scenario, optimizer, arguments.device)) is not None
    }
    table = markdown_table(header, lines)
    return "\n".join([title, "", table, "", *details, *sorted(missing)])


def _record(findings: Sequence[Finding], arguments: argparse.Namespace) -> dict[str, Any]:
    is_strict = arguments.require == "equal"
    return {
        "backend": arguments.backend,
        "against": arguments.against,
        "device": arguments.device,
        "steps": arguments.steps,
        "findings": [asdict(f) | {"verdict": f.verdict(is_strict)} for f in findings],
    }


if __name__ == "__main__":
    sys.exit(main())
