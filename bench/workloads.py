"""Shapes of the parameters that a step is measured on."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .bytes import DtypeSet

Shape = tuple[int, ...]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workload:
    """Shapes of one model.

    Args:
        is_host_bound: the arithmetic is negligible: time per tensor is what counts, measured with
            the gradients left in place (hot) and with gradients that backward has just made.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    is_host_bound: bool = False

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def warm_steps(self) -> int:
        """Untimed steps before a sample: 3 where arrays of a few MB are to be measured hot."""
        return 3 if self.numel < 4_000_000 else 0


def transformer_shapes(layers: int, width: int, vocabulary: int, context: int) -> tuple[Shape, ...]:
    """The tensors of a GPT-like model with tied embeddings."""
    hidden = 4 * width
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp: list[Shape] = [(hidden, width), (hidden,), (width, hidden), (width,)]
    embeddings: list[Shape] = [(vocabulary, width), (context, width)]
    layer = norm + attention + norm + mlp
    return tuple(embeddings + norm + layers * layer + norm)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("large", "one tensor of 50 M", ((50_000_000,),)),
        Workload(
            "transformer",
            "150 tensors / 24.6 M (small transformer)",
            transformer_shapes(layers=12, width=384, vocabulary=8192, context=512),
        ),
        Workload("small", "1000 tensors of 1024", ((1024,),) * 1000),
        Workload("tiny", "1000 tensors of 16 (host cost)", ((16,),) * 1000, is_host_bound=True),
        Workload("one", "one tensor of one element (fixed cost)", ((1,),), is_host_bound=True),
    )
}

# By name only: what projects rows needs rows.
MATRIX_WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("matrix", "one matrix of 12500 x 4000", ((12500, 4000),)),
        Workload("matrices", "1000 matrices of 32 x 32", ((32, 32),) * 1000),
    )
}

# By name only: too large for a usual machine without a GPU.
LARGE_WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            "gpt-124m",
            "150 tensors / 124 M (transformer)",
            transformer_shapes(layers=12, width=768, vocabulary=50304, context=1024),
        ),
        Workload(
            "gpt-1b",
            "294 tensors / 1.02 G (transformer)",
            transformer_shapes(layers=24, width=1792, vocabulary=50304, context=1024),
        ),
    )
}


def parse(name: str) -> Workload:
    """A workload by name, or `COUNTxNUMEL`: equal tensors, for example 100x4096.

    Raises: ValueError for anything else.
    """
    known = WORKLOADS | MATRIX_WORKLOADS | LARGE_WORKLOADS
    if name in known:
        return known[name]
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if match is None:
        raise ValueError(
            f"workloads: {name!r} is neither one of {', '.join(known)} nor COUNTxNUMEL"
        )
    count, numel = int(match[1]), int(match[2])
    return Workload(name, f"{count} x {numel} elements", ((numel,),) * count)


def make_params(
    workload: Workload,
    dtypes: DtypeSet,
    seed: int = 0,
    device: torch.device = CPU,
) -> list[torch.Tensor]:
    """Leaf tensors with gradients, normally distributed: no zeros, no subnormal values."""
    generator = torch.Generator(device).manual_seed(seed)

    def values(shape: Shape) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtypes.param)

    params = []
    for shape in workload.shapes:
        param = values(shape)
        param.grad = values(shape)
        params.append(param.requires_grad_())
    return params
