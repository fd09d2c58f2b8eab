"""Line searches with nothing tuned against tuned optimizers; finished rows are not run again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pyoptim.demo import DemoError

from .. import machine
from ..arc.results import Results
from ..report import replace_section
from . import report
from .methods import METHODS
from .runner import overhead, stacked, study
from .tasks import TASKS


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="python -m pyoptim.bench.line_search", description=__doc__
    )
    result.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    result.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    result.add_argument("--seeds", type=int, default=5)
    result.add_argument("--workers", type=int, default=machine.available_cores())
    result.add_argument(
        "--out",
        type=Path,
        default=Path("line-search.json"),
        help="results; the plot is written beside it (default line-search.json)",
    )
    result.add_argument("--report", action="store_true", help="run nothing: tables and plot only")
    result.add_argument(
        "--overhead",
        action="store_true",
        help="measure the time beyond Adam's, on a machine with nothing else to do, and no quality",
    )
    result.add_argument(
        "--stacked",
        action="store_true",
        help="measure several trials in one pass of stacked weights, likewise, and no quality",
    )
    result.add_argument(
        "--write", type=Path, metavar="MD", help="put the tables between the markers of a file"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then prints the tables and draws the plot."""
    options = parser().parse_args(arguments)
    results = Results(options.out)
    chosen = options.tasks, options.methods, options.seeds, results
    try:
        if options.overhead:
            overhead(*chosen)
        elif options.stacked:
            stacked(results)
        elif not options.report:
            study(*chosen, options.workers)
        _show(results, options.write)
    except (DemoError, ValueError, OSError) as error:
        print(f"line_search: {error}", file=sys.stderr)
        return 1
    return 0


def _show(results: Results, document: Path | None) -> None:
    """Raises: ValueError where `document` lacks the markers."""
    tables = report.report(results.sections)
    print(f"\n{tables}\n")
    if document:
        text = document.read_text(encoding="utf-8")
        document.write_text(replace_section(text, tables), encoding="utf-8")
    if find_spec("matplotlib") is None:
        print("no plot: it needs matplotlib; pip install matplotlib")
    elif results.sections.get("runs"):
        print(f"plot: {report.draw(results.sections, results.path.with_suffix('.png'))}")
