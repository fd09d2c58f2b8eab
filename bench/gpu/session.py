"""A run on a GPU: the most valuable cases first, and what there was no time for is said."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import report
from ..results import Results, Row
from ..runner import Case, Settings

RunCase = Callable[[Case, Settings], tuple[list[Row], list[Row]]]
# One case, at most: there are many cases, and a median needs few of these repetitions.
CASE_SECONDS = 2.0


@dataclass(frozen=True)
class Limits:
    """When to stop: samples of each variant, and seconds after which no case is started."""

    reps: int
    seconds: float


def measure(
    found: Results,
    cases: Sequence[Case],
    run: RunCase,
    implementations: Callable[[Case], list[str]],
    limits: Limits,
    out: Path,
) -> None:
    """Measure one case after the other into `found`, and save it to `out` after each."""
    deadline = time.monotonic() + limits.seconds
    for done, case in enumerate(cases):
        if time.monotonic() >= deadline:
            found.skipped += [_no_time(left) for left in cases[done:]]
            break
        rows, skipped = run(case, Settings(implementations(case), limits.reps, CASE_SECONDS))
        found.rows += rows
        found.skipped += skipped
        found.save(out)
        _progress(f"[{done + 1}/{len(cases)}] {case}", rows, skipped)
    found.save(out)


def has_failed(found: Results) -> bool:
    """Whether an implementation of pyoptim raised; that one of torch did is only reported."""
    return any(row.get("failed") and "pyoptim" in row["implementation"] for row in found.skipped)


def _no_time(case: Case) -> Row:
    reason = "the time was over before this case"
    return case.key | {"implementation": f"all of {case}", "reason": reason}


def _progress(title: str, rows: list[Row], skipped: list[Row]) -> None:
    times = [f"{row['implementation']} {report.seconds(row) * 1e3:.3g} ms" for row in rows]
    failed = [f"{row['implementation']} FAILED" for row in skipped if row.get("failed")]
    text = ", ".join(times + failed) or "nothing measured"
    print(f"{title}: {text}", file=sys.stderr, flush=True)
