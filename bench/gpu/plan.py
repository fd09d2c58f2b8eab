"""Which cases a run on a GPU measures, the most valuable first: it stops when its time is over."""

from __future__ import annotations

from collections.abc import Iterator

from .. import workloads
from ..bytes import DtypeSet
from ..implementations import OPTIMIZERS
from ..runner import Case

FOUR = ("adamw", "sgd-momentum", "rmsprop", "adagrad")
# Copies of graphs beside the eager steps where the host is the limit.
GRAPHS = ("pyoptim-cuda-graph", "torch-fused-graph")
GRAPH_WORKLOADS = ("small",)

# (workload, dtypes, optimizers)
FULL: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("small", "float32", FOUR),
    ("1x200000000", "float32", FOUR),
    ("1x200000000", "bfloat16", FOUR),
    ("1x16000000", "float32", FOUR),
    ("1x16000000", "bfloat16", FOUR),
    ("1x200000000", "bfloat16+float32", FOUR),
    ("gpt-124m", "float32", ("adamw", "rmsprop")),
    ("transformer", "float32", FOUR),
    ("1x1000000000", "float32", FOUR),
    ("4000x1024", "float32", ("adamw", "rmsprop")),
    ("gpt-1b", "bfloat16", ("adamw", "rmsprop")),
    ("1x1000000", "float32", FOUR),
    ("1x64000000", "float32", ("adamw", "rmsprop")),
    ("small", "bfloat16", FOUR),
    ("1x1000000000", "bfloat16", FOUR),
    ("1x200000000", "float16", FOUR),
    ("transformer", "bfloat16", FOUR),
    ("1x200000000", "float32", tuple(name for name in OPTIMIZERS if name not in FOUR)),
    ("1x16000000", "bfloat16+float32", FOUR),
    ("1x64000000", "bfloat16", FOUR),
    ("gpt-1b", "float32", FOUR),
    ("1x1000000", "bfloat16", FOUR),
    ("gpt-124m", "bfloat16", FOUR),
    ("4000x1024", "bfloat16", FOUR),
)
QUICK = (
    ("small", "float32", ("adamw", "rmsprop")),
    ("1x200000000", "float32", ("adamw", "rmsprop")),
    ("1x200000000", "bfloat16", ("adamw",)),
    ("transformer", "float32", ("adamw",)),
)


def cases(is_quick: bool) -> Iterator[Case]:
    """The cases of a whole or a quick run, in order of value."""
    for workload, dtypes, optimizers in QUICK if is_quick else FULL:
        for optimizer in optimizers:
            yield Case(
                optimizer, DtypeSet.parse(dtypes), workloads.parse(workload), 1, device="cuda"
            )
