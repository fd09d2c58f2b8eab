"""The study: optimizers x schedules x tasks; rows that the results file has are not run again."""

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
from . import folder, report
from .choices import OPTIMIZERS, SCHEDULES
from .runner import SettingsError, study
from .tasks import TASKS


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="python -m pyoptim.bench.study",
        description=__doc__,
        epilog=folder.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, choices in (("tasks", TASKS), ("optimizers", OPTIMIZERS), ("schedules", SCHEDULES)):
        result.add_argument(f"--{name}", nargs="+", default=list(choices), choices=choices)
    result.add_argument("--seeds", type=_count, default=3)
    result.add_argument("--data", type=Path, metavar="FOLDER", help="the paper's data, see below")
    result.add_argument("--workers", type=_count, default=machine.available_cores())
    result.add_argument(
        "--out",
        type=Path,
        default=Path("study.json"),
        help="results; plots are written beside it (default study.json)",
    )
    result.add_argument(
        "--again", action="store_true", help="run what is chosen also where its rows are there"
    )
    result.add_argument("--report", action="store_true", help="run nothing: tables and plots only")
    result.add_argument(
        "--write", type=Path, metavar="MD", help="put the tables between the markers of a file"
    )
    return result


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then prints the tables and draws the plots."""
    options = parser().parse_args(arguments)
    results = Results(options.out)
    try:
        if not options.report:
            chosen = (options.tasks, options.optimizers, options.schedules)
            study(*chosen, options.seeds, options.data, results, options.workers, options.again)
        _show(results, options.write)
    except (folder.FolderError, SettingsError, DemoError, ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
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
        print("no plots: they need matplotlib; pip install matplotlib")
        return
    for path in report.draw(results.sections, results.path.with_suffix("")):
        print(f"plot: {path}")
