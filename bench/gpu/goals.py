"""The goals of the CUDA engine; none of them is met before a GPU has measured it."""

from __future__ import annotations

from ..goals import FIVE, FOREACH, FUSED, HAVE_FUSED, Goal, Measure, share_of_loop
from ..results import Row
from ..workloads import LARGE_WORKLOADS
from .plan import FOUR

HUGE = ("1x200000000", "1x1000000000")
MANY = (*HUGE, "1x16000000", "1x64000000", "transformer", *LARGE_WORKLOADS)
# Two equal steps differ by this much from run to run.
NOISE = 0.02


def launches(row: Row) -> float | None:
    return row["launches_per_step"]  # type: ignore[no-any-return]


def host_ns_per_tensor(row: Row) -> float | None:
    return float(row["host_ns_per_tensor"])


def host_over(baseline: str) -> Measure:
    def measure(row: Row) -> float | None:
        ratio = row["host_speedup_over"].get(baseline)
        return float(ratio["median"]) if ratio else None

    return measure


def _of_copy(title: str, workloads: tuple[str, ...], bound: float) -> list[Goal]:
    return [
        Goal(f"{title}, {dtypes}: share of the copy", FOUR, workloads, share_of_loop, bound,
             dtypes=dtypes, device="cuda")
        for dtypes in ("float32", "bfloat16")
    ]  # fmt: skip


GPU_GOALS: tuple[Goal, ...] = (
    *_of_copy("200 M and more", HUGE, 0.9),
    *_of_copy("16 M in one tensor", ("1x16000000",), 0.75),
    Goal("any size: over fused", HAVE_FUSED, None, FUSED, 1 - NOISE, dtypes=None, device="cuda"),
    Goal("16 M and more: over foreach", ("rmsprop",), MANY, FOREACH, 2.5, device="cuda"),
    Goal("small: launches", FIVE, ("small",), launches, 3, True, device="cuda"),
    Goal(
        "small: host ns per tensor", FIVE, ("small",), host_ns_per_tensor, 200, True, device="cuda"
    ),
    Goal(
        "small: host time over fused",
        HAVE_FUSED,
        ("small",),
        host_over("torch-fused"),
        10.0,
        device="cuda",
    ),
)
