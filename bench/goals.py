"""The goals of the engines beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import workloads
from .report import OURS, markdown_table, significant
from .results import Results, Row
from .runner import FRESH, HOT, ONE_THREAD

FIVE = ("adamw", "adam", "sgd-momentum", "rmsprop", "adagrad")
HAVE_FUSED = ("adamw", "adam", "sgd-momentum", "adagrad")
ALL_WORKLOADS = tuple(workloads.WORKLOADS)
# Device -> the implementation that the goals are about.
ENGINES = {"cpu": OURS, "cuda": "pyoptim-cuda"}

Measure = Callable[[Row], float | None]


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of pyoptim's rows that match; the worst of them is reported.

    Args:
        workloads: None: every one.
        has_threads: the rows with several threads count, else those with one; None: both.
    """

    title: str
    optimizers: Sequence[str]
    workloads: Sequence[str] | None
    measure: Measure
    bound: float
    is_upper_bound: bool = False
    dtypes: str | None = "float32"
    has_threads: bool | None = False
    grads: str = HOT
    device: str = "cpu"

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.is_upper_bound else value >= self.bound


def over(*baselines: str) -> Measure:
    """Speed-up over the fastest of `baselines`."""

    def measure(row: Row) -> float | None:
        found = [row["speedup_over"].get(name) for name in baselines]
        return min((ratio["median"] for ratio in found if ratio), default=None)

    return measure


def share_of_loop(row: Row) -> float | None:
    share = row["share_of_loop"]
    return float(share["median"]) if share else None


def ns_per_tensor(row: Row) -> float | None:
    return float(row["ns_per_tensor"])


FUSED = over("torch-fused")
FOREACH = over("torch-foreach")
FOR_LOOP = over("torch-for-loop")
BEST_TORCH = over("torch-for-loop", "torch-foreach", "torch-fused")
COMPILED = over("torch-compiled")

GOALS: tuple[Goal, ...] = (
    Goal("large, 1 thread: share of the loop", HAVE_FUSED, ("large",), share_of_loop, 0.95),
    Goal("large, 1 thread: over fused", HAVE_FUSED, ("large",), FUSED, 0.97),
    Goal("large, 2 threads: over fused", HAVE_FUSED, ("large",), FUSED, 1.0, has_threads=True),
    Goal("large: over the best of torch", ("rmsprop",), ("large",), BEST_TORCH, 6.0),
    Goal("transformer: over the best of torch", ("rmsprop",), ("transformer",), BEST_TORCH, 2.8),
    Goal("large, bfloat16: over fused", ("adamw",), ("large",), FUSED, 1.8, dtypes="bfloat16"),
    Goal(
        "large, bfloat16 with float32 state: over float32",
        ("adamw",),
        ("large",),
        over("pyoptim-float32"),
        1.4,
        dtypes="bfloat16+float32",
    ),
    Goal("transformer: over fused", ("adamw",), ("transformer",), FUSED, 1.0),
    Goal("transformer: over foreach", ("adamw",), ("transformer",), FOREACH, 3.5),
    Goal("transformer: over for-loop", ("adamw",), ("transformer",), FOR_LOOP, 3.5),
    Goal("small, 1 thread: over fused", ("adamw",), ("small",), FUSED, 6.0),
    Goal("small, 2 threads: over fused", ("adamw",), ("small",), FUSED, 10.0, has_threads=True),
    Goal("small: over foreach", ("rmsprop",), ("small",), FOREACH, 18.0),
    Goal("small: over fused", ("sgd-momentum",), ("small",), FUSED, 3.5),
    Goal("small: over fused", ("adagrad",), ("small",), FUSED, 7.0),
    Goal("tiny, hot: ns per tensor", ("adamw",), ("tiny",), ns_per_tensor, 100, True),
    Goal(
        "tiny, fresh: ns per tensor", ("adamw",), ("tiny",), ns_per_tensor, 250, True, grads=FRESH
    ),
    Goal("one: ns per step", ("adamw",), ("one",), ns_per_tensor, 10_000, True),
    Goal(
        "2 threads over 1",
        FIVE,
        ALL_WORKLOADS,
        over(ONE_THREAD),
        1.0,
        dtypes=None,
        has_threads=True,
    ),
    Goal(
        "transformer, 2 threads, busy machine: over fused",
        ("adamw",),
        ("transformer",),
        FUSED,
        2.0,
        has_threads=True,
    ),
    Goal(
        "over the compiled step", FIVE, ALL_WORKLOADS, COMPILED, 1.0, dtypes=None, has_threads=None
    ),
)


def values(goal: Goal, results: Results) -> dict[str, float]:
    """The worst value of each optimizer that was measured."""
    worst = max if goal.is_upper_bound else min
    found: dict[str, list[float]] = {}
    for row in results.find(implementation=ENGINES[goal.device], grads=goal.grads):
        value = goal.measure(row) if _matches(goal, row) else None
        if value is not None:
            found.setdefault(row["optimizer"], []).append(value)
    return {name: worst(found[name]) for name in goal.optimizers if name in found}


def _matches(goal: Goal, row: Row) -> bool:
    return (
        row["optimizer"] in goal.optimizers
        and (goal.workloads is None or row["workload"] in goal.workloads)
        and goal.dtypes in (None, row["dtypes"])
        and goal.has_threads in (None, row["threads"] > 1)
    )


def goals_table(results: Results, goals: Sequence[Goal] = GOALS) -> str:
    """Target and measured value of every goal; where several rows match, the worst one."""
    lines = []
    for goal in goals:
        found = values(goal, results)
        measured = ", ".join(f"{name} {significant(value)}" for name, value in found.items())
        missing = [name for name in goal.optimizers if name not in found]
        if found and missing:
            measured += f" (not measured: {', '.join(missing)})"
        sign = "<=" if goal.is_upper_bound else ">="
        lines.append(
            [_title(goal), f"{sign} {goal.bound:g}", measured or "-", _verdict(goal, found)]
        )
    return markdown_table(["goal", "target", "measured", "met"], lines)


def _title(goal: Goal) -> str:
    who = "each of the five" if goal.optimizers == FIVE else ", ".join(goal.optimizers)
    return f"{who}: {goal.title}"


def _verdict(goal: Goal, found: dict[str, float]) -> str:
    if not found:
        return "not measured"
    missed = [name for name, value in found.items() if not goal.is_met(value)]
    return f"no: {', '.join(missed)}" if missed else "yes"
