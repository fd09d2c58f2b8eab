"""`python -m pyoptim bench`: measure, or make tables and pictures from results."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from . import goals, machine, plots, report, results, workloads
from .bytes import DtypeSet
from .gpu import plan, session
from .gpu import report as gpu_report
from .gpu.device import CudaDevice
from .gpu.goals import GPU_GOALS
from .gpu.runner import run_case as run_case_on
from .implementations import (
    DEFAULT_IMPLEMENTATIONS,
    DEFAULT_ON_CUDA,
    IMPLEMENTATIONS,
    OPTIMIZERS,
)
from .results import Results
from .runner import FRESH, HOT, Case, Settings, run_case
from .workloads import Workload

PROGRAM = "python -m pyoptim bench"
QUICK_SECONDS = 40.0
QUICK_REPS = 7
DEFAULT_DTYPES = ("float32", "bfloat16", "bfloat16+float32")
QUICK_WORKLOADS = "small,tiny,one"

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(argv)
    try:
        if arguments.table or arguments.goals or arguments.plot or arguments.write_readme:
            return _report(arguments)
        return _measure(arguments, shlex.join([*PROGRAM.split(), *argv]))
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Time optimizer steps of pyoptim and of torch.optim, interleaved.",
    )
    measure = parser.add_argument_group("measure (lists are separated by commas)")
    measure.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    measure.add_argument("--optimizers", type=_list(_optimizer), metavar="LIST")
    measure.add_argument("--workloads", type=_list(workloads.parse), metavar="LIST")
    measure.add_argument("--dtypes", type=_list(DtypeSet.parse), metavar="LIST")
    measure.add_argument("--threads", type=_list(_count), metavar="LIST", help="default: 1,cores")
    measure.add_argument("--implementations", type=_list(_implementation), metavar="LIST")
    measure.add_argument("--compile", action="store_true", help="add torch.compile; takes minutes")
    measure.add_argument("--reps", type=_count, help="samples of each variant (default 20)")
    measure.add_argument("--seconds", type=float, help="about how long in total (default 1200)")
    measure.add_argument("--quick", action="store_true", help="a small selection, under a minute")
    measure.add_argument("--out", type=Path, default=Path("pyoptim-bench.json"), metavar="JSON")
    show = parser.add_argument_group("report from result files instead")
    show.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="print all as Markdown")
    show.add_argument("--goals", type=Path, nargs="+", metavar="JSON", help="goals and measured")
    show.add_argument("--plot", type=Path, nargs="+", metavar="JSON", help="draw beside the first")
    show.add_argument(
        "--write-readme",
        type=Path,
        metavar="FILE",
        help=f"with --table: put the short table between {report.BEGIN} and {report.END}",
    )
    return parser


def _report(arguments: argparse.Namespace) -> int:
    if arguments.write_readme:
        _write_readme(arguments)
    elif arguments.table:
        print(_full_report(results.load(arguments.table)))
    if arguments.goals:
        print(_goals_tables(results.load(arguments.goals)))
    if arguments.plot:
        _plot(results.load(arguments.plot), arguments.plot[0].parent)
    return 0


def _write_readme(arguments: argparse.Namespace) -> None:
    if not arguments.table:
        raise ValueError("--write-readme needs --table JSON")
    found = results.load(arguments.table)
    if found.of_device("cuda").rows:
        raise ValueError("--write-readme shows CPU results only; leave out the GPU's files")
    report.write_readme(arguments.write_readme, found)


def _full_report(found: Results) -> str:
    parts = {"cpu": report.full_report, "cuda": gpu_report.full_report}
    shown = [(make, found.of_device(device)) for device, make in parts.items()]
    return "\n\n".join(make(part) for make, part in shown if part.rows or part.skipped)


def _goals_tables(found: Results) -> str:
    tables = {"cpu": goals.GOALS, "cuda": GPU_GOALS}
    shown = [(found.of_device(device), table) for device, table in tables.items()]
    return "\n\n".join(goals.goals_table(part, table) for part, table in shown if part.rows)


def _plot(found: Results, folder: Path) -> None:
    try:
        written = plots.draw(found, folder)
    except ImportError as error:
        print(f"no pictures: {error}; install matplotlib", file=sys.stderr)
        return
    for path in written:
        print(f"wrote {path}", file=sys.stderr)


def _measure(arguments: argparse.Namespace, command: str) -> int:
    if arguments.device == "cuda":
        return _measure_on_cuda(arguments, command)
    cases = _cases(arguments)
    budget = arguments.seconds or (QUICK_SECONDS if arguments.quick else 1200.0)
    reps = arguments.reps or (QUICK_REPS if arguments.quick else 20)
    names = _implementations(arguments)
    found = Results.start(command)
    deadline = time.monotonic() + budget
    for done, case in enumerate(cases):
        started = time.monotonic()
        # Warm-up and setting up take about as long as the samples: half of what is left is theirs.
        share = max(0.0, deadline - started) / (len(cases) - done) / 2
        rows, skipped = run_case(case, Settings(names, reps, share))
        found.rows += rows
        found.skipped += skipped
        found.save(arguments.out)
        _progress(done + 1, len(cases), case, rows, started, deadline)
    print(f"wrote {arguments.out}", file=sys.stderr)
    _plot(found, arguments.out.parent)
    print(_full_report(found))
    return 0


def _measure_on_cuda(arguments: argparse.Namespace, command: str) -> int:
    device = CudaDevice()
    found = Results.start(command, "cuda")
    limits = session.Limits(
        arguments.reps or (QUICK_REPS if arguments.quick else 20),
        arguments.seconds or (QUICK_SECONDS if arguments.quick else 1200.0),
    )
    session.measure(
        found,
        _cuda_cases(arguments),
        lambda case, settings: run_case_on(case, settings, device),
        lambda case: _cuda_implementations(arguments, case),
        limits,
        arguments.out,
    )
    print(f"wrote {arguments.out}", file=sys.stderr)
    _plot(found, arguments.out.parent)
    print(_full_report(found))
    return int(session.has_failed(found))


def _cuda_cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases in order of value; or all combinations of what was chosen."""
    if arguments.threads:
        raise ValueError("--threads is about the CPU; leave it out with --device cuda")
    if not (arguments.workloads or arguments.optimizers or arguments.dtypes):
        return list(plan.cases(arguments.quick))
    chosen = itertools.product(
        arguments.workloads or [workloads.parse("small"), workloads.parse("1x200000000")],
        arguments.dtypes or [DtypeSet.parse("float32")],
        arguments.optimizers or list(goals.FIVE),
    )
    return [
        Case(optimizer, dtypes, workload, 1, device="cuda")
        for workload, dtypes, optimizer in chosen
    ]


def _cuda_implementations(arguments: argparse.Namespace, case: Case) -> list[str]:
    names = list(arguments.implementations or DEFAULT_ON_CUDA)
    if not arguments.implementations and case.workload.name in plan.GRAPH_WORKLOADS:
        names += plan.GRAPHS
    if arguments.compile and "torch-compiled" not in names:
        names.append("torch-compiled")
    return names


def _cases(arguments: argparse.Namespace) -> list[Case]:
    chosen: list[Workload] = arguments.workloads or _list(workloads.parse)(
        QUICK_WORKLOADS if arguments.quick else ",".join(workloads.WORKLOADS)
    )
    optimizers = arguments.optimizers or list(goals.FIVE)
    dtypes = arguments.dtypes or [
        DtypeSet.parse(name) for name in (["float32"] if arguments.quick else DEFAULT_DTYPES)
    ]
    cores = machine.available_cores()
    threads = arguments.threads or ([1] if arguments.quick else sorted({1, cores}))
    return [
        Case(optimizer, dtype, workload, count, grads)
        for workload, dtype, optimizer, count in itertools.product(
            chosen, dtypes, optimizers, threads
        )
        for grads in ([HOT, FRESH] if workload.is_host_bound else [HOT])
    ]


def _implementations(arguments: argparse.Namespace) -> list[str]:
    names = list(arguments.implementations or DEFAULT_IMPLEMENTATIONS)
    if arguments.compile and "torch-compiled" not in names:
        names.append("torch-compiled")
    return names


def _progress(
    done: int,
    total: int,
    case: Case,
    rows: list[results.Row],
    started: float,
    deadline: float,
) -> None:
    times = ", ".join(f"{row['implementation']} {report.seconds(row) * 1e3:.3g} ms" for row in rows)
    now = time.monotonic()
    print(
        f"[{done}/{total}] {case}: {times or 'nothing measured'} "
        f"({now - started:.0f} s; at most about {max(0.0, deadline - now):.0f} s left)",
        file=sys.stderr,
        flush=True,
    )


def _list(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """An argparse type for values separated by commas."""

    def parse_all(text: str) -> list[T]:
        try:
            return [parse(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_all


def _one_of(what: str, known: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise ValueError(f"{what}: {text!r} is not one of {', '.join(known)}")
        return text

    return parse


_optimizer = _one_of("optimizers", list(OPTIMIZERS))
_implementation = _one_of("implementations", list(IMPLEMENTATIONS))


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(f"{text} is not a positive number")
    return count
