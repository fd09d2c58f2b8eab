"""What SaLSa takes beyond the same training with pyoptim's Adam, at as many steps.

Both trainings take turns step by step on the same batches, each with its own network; the time is
the process's CPU time, which with one thread is what a step takes.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from ..study.train import batches
from .methods import METHODS
from .tasks import TASKS, load
from .train import Row, make_step

ADAM_RATE = 1e-3
OVERHEAD_TASKS = ("images", "text")


def measure(task_name: str, method: str, seed: int) -> Row:
    """Times of one pair of trainings: sums over the first epoch, and over all after it."""
    task, found = TASKS[task_name], load(task_name)
    rivals: list[tuple[nn.Module, Any]] = []
    for name, rate in ((method, None), ("Adam, tuned", ADAM_RATE)):
        torch.manual_seed(seed)
        network = task.network(found)
        make = METHODS[name].make
        rivals.append((network, make(list(network.parameters()), found.steps, rate)))
    times: list[list[float]] = [[], []]
    for step, (x, y) in enumerate(batches(found, task.epochs, seed)):
        for i in (0, 1) if step % 2 else (1, 0):
            begin = time.process_time()
            make_step(*rivals[i], task, x, y)
            times[i].append(time.process_time() - begin)
    searching = rivals[0][1]
    first = found.steps
    return {
        "first epoch": _share(times, 0, first),
        "after it": _share(times, first, None),
        "whole": _share(times, 0, None),
        "adam ms": round(1e3 * statistics.median(times[1]), 3),
        "searches": searching.n_searches,
        "trials": searching.n_trials,
        "steps": len(times[0]),
    }


def _share(times: list[list[float]], begin: int, end: int | None) -> float:
    ours, adam = (sum(t[begin:end]) for t in times)
    return round(ours / adam - 1, 4)
