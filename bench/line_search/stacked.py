"""What trials at several step sizes cost when they are evaluated at once.

The weights of all trials are stacked and one forward pass is made of them by torch.func, against
as many passes one after the other; both without gradients, on the same batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .overhead import OVERHEAD_TASKS
from .tasks import TASKS, Task, load
from .train import Row

TRIALS = (2, 4)
REPETITIONS = 30


def jobs() -> dict[str, tuple[str, int]]:
    """By their key in the results."""
    return {f"{task} | {n}": (task, n) for task in OVERHEAD_TASKS for n in TRIALS}


@torch.no_grad()
def measure(task_name: str, n: int) -> Row:
    """The median over repetitions of the CPU time of n stacked trials over that of n in a row."""
    task, found = TASKS[task_name], load(task_name)
    torch.manual_seed(0)
    network = task.network(found)
    x, y = (part[: found.batch] for part in found.train)
    ways = one_by_one(network, task, x, y, n), at_once(network, task, x, y, n)
    if not torch.allclose(ways[0](), ways[1](), rtol=1e-3):
        raise ValueError(f"stacked trials of {task_name} have other losses")
    times: list[tuple[float, float]] = []
    for i in range(REPETITIONS):
        taken = {way: _seconds(ways[way]) for way in ((0, 1) if i % 2 else (1, 0))}
        times.append((taken[0], taken[1]))
    return {
        "share": round(statistics.median(stacked / rows for rows, stacked in times), 3),
        "ms in a row": round(1e3 * statistics.median(rows for rows, _ in times), 3),
    }


def one_by_one(
    network: nn.Module, task: Task, x: Tensor, y: Tensor, n: int
) -> Callable[[], Tensor]:
    """Returns what evaluates n losses; all at the weights of now, since only time matters."""

    def evaluate() -> Tensor:
        losses = []
        for _ in range(n):
            torch.manual_seed(1)  # the same dropout for all
            losses.append(task.loss(network(x), y))
        return torch.stack(losses)

    return evaluate


def at_once(network: nn.Module, task: Task, x: Tensor, y: Tensor, n: int) -> Callable[[], Tensor]:
    """As `one_by_one`, of stacked weights and buffers, whose making is not in the time."""
    named = dict(network.named_parameters()), dict(network.named_buffers())
    weights, buffers = ({name: torch.stack([t] * n) for name, t in part.items()} for part in named)

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return task.loss(functional_call(network, (weights, buffers), (x,)), y)

    stacked = vmap(loss, randomness="same")

    def evaluate() -> Tensor:
        torch.manual_seed(1)
        found: Tensor = stacked(weights, buffers)
        return found

    return evaluate


def _seconds(function: Callable[[], Tensor]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin
