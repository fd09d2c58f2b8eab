"""Command line of the ARC pipeline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import generate


def _generate(options: argparse.Namespace) -> None:
    cohorts = [generate.draw_cohort(i) for i in range(options.cohorts)]
    generate.generate(options.folder, cohorts, options.workers)


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="python -m pyoptim.bench.arc", description=__doc__)
    commands = top.add_subparsers(required=True)
    make = commands.add_parser("generate", help="train and branch; continues where it was stopped")
    make.add_argument("--folder", type=Path, default=Path("arc-data"))
    make.add_argument("--cohorts", type=int, default=420, help="files of 60 points each")
    make.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    make.set_defaults(run=_generate)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.run(options)
    return 0
