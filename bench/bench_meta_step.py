"""A Meta-Weight-Net step in plain training steps: `python -m pyoptim.bench.bench_meta_step`.

One training step (forward, backward, SGD with momentum) of a small convolutional network with
BatchNorm, batches of 100, interleaved with steps of `MetaReweighter`: with the forward-mode
meta-gradient, and with the double backward of the official code. Prints medians of the ratios per
repetition; the meta part is what a step costs beyond a plain one.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyoptim
from pyoptim.reweight import MetaReweighter

from . import machine
from .report import markdown_table
from .timing import Variant, interleave, pairwise, summarize

PROGRAM = "python -m pyoptim.bench.bench_meta_step"
BATCH, CLASSES = 100, 10
REPETITIONS, SECONDS = 15, 25.0
PLAIN, EVERY_FIFTH = "plain step", "forward mode, every 5th step"


def make_model(width: int = 32, side: int = 28) -> nn.Module:
    """Four convolutions, each with BatchNorm and ReLU; two of them halve the image."""
    layers: list[nn.Module] = []
    channels = 1
    for out, stride in ((width, 1), (width, 2), (2 * width, 1), (2 * width, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 1, 28, 28, generator=generator)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def make_sgd(model: nn.Module) -> pyoptim.SGD:
    return pyoptim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def plain_step(model: nn.Module) -> Callable[[], object]:
    (x, y), optimizer = batch(0), make_sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def meta_step(model: nn.Module, **options: object) -> Callable[[], object]:
    train, meta = batch(0), batch(1)
    reweighter = MetaReweighter(model, make_sgd(model), **options)
    return lambda: reweighter.step(*train, *meta)


def measure(threads: int) -> list[dict[str, object]]:
    """Medians: milliseconds per step, and the ratio to a plain step of the same repetition."""
    torch.manual_seed(0)
    model = make_model()
    ways: dict[str, dict[str, object]] = {
        "forward mode": {},
        EVERY_FIFTH: {"interval": 5},
        "double backward": {"meta_gradient": "double_backward"},
    }
    variants = [Variant(PLAIN, plain_step(copy.deepcopy(model)), threads)]
    for name, options in ways.items():
        step = meta_step(copy.deepcopy(model), **options)
        # Of five steps, one has a meta part.
        count = 5 if name == EVERY_FIFTH else 1
        variants.append(Variant(name, step, threads, steps_per_sample=count))
    interleave(variants, REPETITIONS, SECONDS)
    clock = "cpu" if threads == 1 else "wall"
    plain = getattr(variants[0], clock)
    rows = []
    for variant in variants:
        times = getattr(variant, clock)
        ratio = pairwise(times, plain).median
        milliseconds = summarize(times).median * 1e3
        rows.append({"step": variant.name, "milliseconds": milliseconds, "plain_steps": ratio})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args(argv)
    rows = measure(arguments.threads)
    clock = "CPU" if arguments.threads == 1 else "wall"
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), {clock} time, batch {BATCH}\n"
    )
    head = ["step", "ms", "in plain steps", "meta part"]
    print(markdown_table(head, [_cells(row) for row in rows]))
    if arguments.out:
        content = {
            "command": shlex.join([*PROGRAM.split(), *(sys.argv[1:] if argv is None else argv)]),
            "versions": machine.describe_versions(),
            "machine": machine.describe_machine(),
            "batch": BATCH,
            "threads": arguments.threads,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    meta = "-" if row["step"] == PLAIN else f"{row['plain_steps'] - 1:.2f}"
    return [row["step"], f"{row['milliseconds']:.1f}", f"{row['plain_steps']:.2f}", meta]


if __name__ == "__main__":
    sys.exit(main())
