"""pytest-benchmark cases: id = optimizer-implementation-dtype-workload.

For following one case over time, or one case under a profiler. Its variants are not interleaved:
ratios between implementations come from `python -m pyoptim bench`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from . import timing, workloads
from .bytes import DtypeSet, bytes_per_element
from .goals import FIVE
from .implementations import (
    DEFAULT_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    make_optimizer,
    make_step,
    why_not,
)
from .timing import Variant
from .workloads import WORKLOADS

CASES = [
    pytest.param(
        *case, id="-".join([case[0].replace("-", "_"), case[1].replace("-", "_"), *case[2:]])
    )
    for workload in WORKLOADS
    for dtypes in ("float32", "bfloat16")
    for optimizer in FIVE
    for implementation in DEFAULT_IMPLEMENTATIONS
    for case in [(optimizer, implementation, dtypes, workload)]
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("optimizer", "implementation", "dtypes", "workload"), CASES)
def test_step(
    benchmark: Any, optimizer: str, implementation: str, dtypes: str, workload: str
) -> None:
    dtype_set, shapes = DtypeSet.parse(dtypes), WORKLOADS[workload]
    chosen = IMPLEMENTATIONS[implementation]
    reason = why_not(chosen, optimizer, dtype_set)
    if reason is not None:
        pytest.skip(reason)
    params = workloads.make_params(shapes, dtype_set)
    step = make_step(chosen, make_optimizer(chosen, optimizer, dtype_set, params))
    step()
    benchmark.extra_info["bytes"] = shapes.numel * bytes_per_element(optimizer, dtype_set)
    _measure(benchmark, step)


def _measure(benchmark: Any, step: Callable[[], object]) -> None:
    variant = Variant("step", step)
    timing.choose_steps_per_sample(variant)
    benchmark.pedantic(step, rounds=10, iterations=variant.steps_per_sample, warmup_rounds=1)
