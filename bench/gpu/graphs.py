"""Steps in CUDA graphs: replays give the bits of eager steps, and follow an edited learning rate.

python -m pyoptim.bench.gpu.graphs --backends cuda,triton
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyoptim

from ..bytes import DtypeSet
from ..implementations import WARM_UP_STEPS, capture
from ..report import markdown_table
from .compare import bits
from .scenarios import LR, OPTIONS, Model, Options, make_model

DTYPES = ("float32", "bfloat16+float32")
REPLAYS = 5
# Between replays, in place: a schedule as a training loop in a graph has it.
LR_FACTOR = 0.5

Step = Callable[[], object]


@dataclass(frozen=True)
class Check:
    """What one optimizer did in a graph."""

    backend: str
    optimizer: str
    dtypes: str
    options: str
    verdict: str  # "equal", "DIFFERS", "FAILED"
    detail: str = ""


def check(
    backend: str,
    optimizer: str,
    dtypes: str,
    options: Options,
    device: str = "cuda",
    capture: Callable[[Step], Step] = capture,
) -> Check:
    """Two equal models, one stepped eagerly, one by replays of one captured step.

    Args:
        capture: makes the callable whose calls replay the step that it was given.
    """
    result = (backend, optimizer, dtypes, str(options))
    try:
        eager = _run(backend, optimizer, dtypes, options, device, lambda step: step)
        graph = _run(backend, optimizer, dtypes, options, device, capture)
    # A refusal or a crash is this check's result; the others are still to be made.
    except Exception as error:
        return Check(*result, "FAILED", f"{type(error).__name__}: {error}")
    for name, tensor in graph.items():
        differing = int((bits(tensor) != bits(eager[name])).sum())
        if differing:
            detail = f"{name}: {differing} of {tensor.numel()} differ"
            return Check(*result, "DIFFERS", detail)
    return Check(*result, "equal")


def _run(
    backend: str,
    optimizer: str,
    dtypes: str,
    options: Options,
    device: str,
    capture: Callable[[Step], Step],
) -> dict[str, Tensor]:
    """Everything that a few ordinary steps and then a few replays have written."""
    dtype_set = DtypeSet.parse(dtypes)
    lr = torch.tensor(LR, device=device)
    cls = getattr(pyoptim, optimizer)
    more: Options = {"lr": lr, "backend": backend}
    # Others count no steps, or have their counters on the device because lr is there.
    if device != "cpu" and "capturable" in inspect.signature(cls).parameters:
        more["capturable"] = True
    if dtype_set.has_own_state_dtype:
        more["state_dtype"] = dtype_set.state
    model = make_model(dtype_set.param, device, is_small=True)
    made = cls(model.params, **options, **more)
    model.give_grads(0, has_specials=True)
    for _ in range(WARM_UP_STEPS):
        made.step()
    replay = capture(made.step)
    for step in range(1, REPLAYS + 1):
        _refill_grads(model, step)
        replay()
        lr.mul_(LR_FACTOR)
    return {name: tensor.detach().cpu() for name, tensor in _written(model, made)}


def _refill_grads(model: Model, step: int) -> None:
    """New values in the tensors whose addresses the graph has recorded."""
    former = [param.grad for param in model.params]
    model.give_grads(step, has_specials=True)
    for param, grad in zip(model.params, former, strict=True):
        assert grad is not None
        assert param.grad is not None
        grad.copy_(param.grad)
        param.grad = grad


def _written(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for index, param in enumerate(model.params):
        yield f"param {index}", param
        for name, value in sorted(optimizer.state.get(param, {}).items()):
            if isinstance(value, Tensor):
                yield f"{name} {index}", value


def main(argv: Sequence[str] | None = None) -> int:
    """Check all, print a table, write JSON; returns 1 if one failed, 2 if nothing can run."""
    parser = argparse.ArgumentParser(
        prog="python -m pyoptim.bench.gpu.graphs", description="Check steps in CUDA graphs."
    )
    parser.add_argument("--backends", default="cuda,triton", help="separated by commas")
    parser.add_argument("--out", type=Path, metavar="JSON")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("graphs: torch finds no CUDA device here; use a machine with a GPU", file=sys.stderr)
        return 2
    checks = list(_all_checks(arguments.backends.split(",")))
    print(table(checks))
    if arguments.out:
        found: list[dict[str, Any]] = [asdict(check) for check in checks]
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(check.verdict != "equal" for check in checks))


def _all_checks(backends: Sequence[str]) -> Iterator[Check]:
    for optimizer, option_sets in OPTIONS.items():
        for backend in backends:
            for dtypes in DTYPES:
                for options in option_sets:
                    yield check(backend, optimizer, dtypes, options)


def table(checks: Sequence[Check]) -> str:
    """One line per check."""
    lines = [
        [f"{c.optimizer} {c.options}, {c.dtypes}", c.backend, c.verdict, c.detail] for c in checks
    ]
    return markdown_table(["optimizer, dtype", "backend", "verdict", "detail"], lines)


if __name__ == "__main__":
    sys.exit(main())
