"""Runs what is missing in the results file, in several processes of one thread each."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import machine
from ..arc.results import Results
from .choices import OPTIMIZERS, schedules_of
from .data import IGNORED, Data
from .tasks import TASKS, load
from .train import Job, Row, run, tune

T = TypeVar("T")
Map = Callable[[Callable[..., Row], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Row]]]


class SettingsError(Exception):
    """The results file was made from other data."""


def study(
    tasks: Sequence[str],
    optimizers: Sequence[str],
    schedules: Sequence[str],
    seeds: int,
    root: Path | None,
    results: Results,
    workers: int,
    again: bool = False,
) -> None:
    """Adds the missing rows: learning rates first, then trainings, a whole seed after the other.

    Args:
        again: trainings that are there are run too, and replaced as each is done; rates stay.

    Raises: SettingsError before anything is run; what the loading of data raises.
    """
    for task in tasks:
        _check_settings(results, task, describe(task, load(task, root)))
    pairs = [(task, optimizer) for task in tasks for optimizer in optimizers]
    _tune(pairs, root, results, workers)
    jobs = [
        Job(task, optimizer, schedule, seed, _rate(results, task, optimizer), root)
        for seed in range(seeds)
        for task, optimizer in pairs
        for schedule in schedules_of(optimizer, schedules)
    ]
    done = results.sections.get("runs", {})
    missing = [job for job in jobs if again or job.key not in done]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} trainings are there", flush=True)
    progress = Progress(len(missing))
    for i, row in _map(workers, run, [(job,) for job in missing]):
        results.sections.get("runs", {}).pop(missing[i].key, None)
        results.once("runs", missing[i].key, lambda row=row: row)
        score = f"{TASKS[missing[i].task].metric_name} {row['test']}"
        progress.tell(f"{score}, {row['seconds']} s")
    if missing:
        results.once("machine", _now(results), lambda: _machine(workers, progress.elapsed()))


def describe(task: str, data: Data) -> Row:
    """What decides whether results can stand in one file."""
    length = TASKS[task]
    return {
        "data": data.name,
        "examples": [len(part[1]) for part in (data.train, data.valid, data.test)],
        "batch": data.batch,
        "epochs": length.epochs,
        "steps per epoch": data.steps,
        "most frequent": round(_most_frequent(data.test[1]), 5),
    }


def _most_frequent(targets: Tensor) -> float:
    """Share of the most frequent target, which is the accuracy of one who has learnt nothing."""
    kept = targets[targets != IGNORED].long()
    return torch.bincount(kept.flatten()).max().item() / kept.numel()


def _check_settings(results: Results, task: str, settings: Row) -> None:
    found = results.sections.get("settings", {}).get(task)
    if found is not None and found != settings:
        raise SettingsError(
            f"{results.path} has results of {task} from {found}, not from {settings}; "
            "choose another file with --out"
        )
    results.once("settings", task, lambda: settings)


def _tune(
    pairs: Sequence[tuple[str, str]], root: Path | None, results: Results, workers: int
) -> None:
    done = results.sections.get("rates", {})
    missing = [
        (task, optimizer, root)
        for task, optimizer in pairs
        if OPTIMIZERS[optimizer].rate is not None and f"{task} | {optimizer}" not in done
    ]
    progress = Progress(len(missing))
    for i, row in _map(workers, tune, missing):
        results.once("rates", " | ".join(missing[i][:2]), lambda row=row: row)
        progress.tell(f"{row['rate']:g} of {row['tried']}, {row['seconds']} s")


def _rate(results: Results, task: str, optimizer: str) -> float | None:
    if OPTIMIZERS[optimizer].rate is None:
        return None
    return float(results.sections["rates"][f"{task} | {optimizer}"]["rate"])


def _now(results: Results) -> str:
    return str(len(results.sections.get("machine", {})))


def _machine(workers: int, seconds: float) -> Row:
    return {
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
        "workers": workers,
        "seconds": round(seconds, 1),
    }


class Progress:
    """Lines that say how far it is."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begin = total, 0, time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def tell(self, text: str) -> None:
        self.done += 1
        left = self.elapsed() / self.done * (self.total - self.done)
        print(f"  {text}; {self.done} of {self.total}, {left / 60:.1f} min left", flush=True)


def _map(
    workers: int, function: Callable[..., Row], arguments: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, Row]]:
    """(place, result) of every call, as it is done."""
    if workers == 1 or len(arguments) < 2:
        for i, given in enumerate(arguments):
            yield i, _on_one_thread(function, *given)
        return
    # Not forked: OpenMP threads do not survive a fork, and the child would wait for them for ever.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(_on_one_thread, function, *given): i for i, given in enumerate(arguments)
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _on_one_thread(function: Callable[..., Row], *arguments: Any) -> Row:
    """The networks are too small for more; denormal numbers take a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
