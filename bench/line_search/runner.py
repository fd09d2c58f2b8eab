"""Runs what the results file does not have yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..arc.results import Results
from ..study.runner import Progress
from ..study.runner import _map as run_all
from . import stacked as stacks
from .methods import METHODS
from .overhead import OVERHEAD_TASKS, measure
from .train import Job, Row, run, tune


def study(
    tasks: Sequence[str], methods: Sequence[str], seeds: int, results: Results, workers: int
) -> None:
    """Learning rates first, then trainings, a whole seed after the other."""
    tuned = [(t, m) for t in tasks for m in methods if METHODS[m].rates]
    _fill(results, "rates", tune, {f"{t} | {m}": (t, m) for t, m in tuned}, workers)
    jobs = [
        Job(task, method, seed, _rate(results, task, method))
        for seed in range(seeds)
        for task in tasks
        for method in methods
    ]
    _fill(results, "runs", run, {job.key: (job,) for job in jobs}, workers)


def overhead(tasks: Sequence[str], methods: Sequence[str], seeds: int, results: Results) -> None:
    """One pair of trainings at a time, so that none disturbs another."""
    jobs = {
        f"{task} | {method} | {seed}": (task, method, seed)
        for seed in range(seeds)
        for task in tasks
        if task in OVERHEAD_TASKS
        for method in methods
        if method.startswith("SaLSa")
    }
    _fill(results, "overhead", measure, jobs, 1)


def stacked(results: Results) -> None:
    """What several trials in one pass take."""
    _fill(results, "stacked", stacks.measure, dict(stacks.jobs()), 1)


def _fill(
    results: Results,
    section: str,
    function: Callable[..., Row],
    jobs: dict[str, tuple[object, ...]],
    workers: int,
) -> None:
    done = results.sections.get(section, {})
    missing = {key: given for key, given in jobs.items() if key not in done}
    print(f"{section}: {len(jobs) - len(missing)} of {len(jobs)} are there", flush=True)
    progress, keys = Progress(len(missing)), list(missing)
    for i, row in run_all(workers, function, list(missing.values())):
        results.once(section, keys[i], lambda row=row: row)
        progress.tell(keys[i])


def _rate(results: Results, task: str, method: str) -> float | None:
    if not METHODS[method].rates:
        return None
    return float(results.sections["rates"][f"{task} | {method}"]["rate"])
