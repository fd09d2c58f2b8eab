"""Shapes of the parameters that a step is measured on."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .bytes import DtypeSet

Shape = tuple[int, ...]

LAYERS, WIDTH, HIDDEN, VOCABULARY, CONTEXT = 12, 384, 1536, 8192, 512


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


def transformer_shapes() -> tuple[Shape, ...]:
    """The 150 tensors of a GPT-like model with tied embeddings: 24.6 M parameters."""
    norm: list[Shape] = [(WIDTH,), (WIDTH,)]
    attention: list[Shape] = [(3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,)]
    mlp: list[Shape] = [(HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,)]
    embeddings: list[Shape] = [(VOCABULARY, WIDTH), (CONTEXT, WIDTH)]
    layer = norm + attention + norm + mlp
    return tuple(embeddings + norm + LAYERS * layer + norm)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("large", "one tensor of 50 M", ((50_000_000,),)),
        Workload("transformer", "150 tensors / 24.6 M (small transformer)", transformer_shapes()),
        Workload("small", "1000 tensors of 1024", ((1024,),) * 1000),
        Workload("tiny", "1000 tensors of 16 (host cost)", ((16,),) * 1000, is_host_bound=True),
        Workload("one", "one tensor of one element (fixed cost)", ((1,),), is_host_bound=True),
    )
}


def parse(name: str) -> Workload:
    """A workload by name, or `COUNTxNUMEL`: equal tensors, for example 100x4096.

    Raises: ValueError for anything else.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if match is None:
        raise ValueError(
            f"workloads: {name!r} is neither one of {', '.join(WORKLOADS)} nor COUNTxNUMEL"
        )
    count, numel = int(match[1]), int(match[2])
    return Workload(name, f"{count} x {numel} elements", ((numel,),) * count)


def make_params(workload: Workload, dtypes: DtypeSet, seed: int = 0) -> list[torch.Tensor]:
    """Leaf tensors with gradients, normally distributed: no zeros, no subnormal values."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in workload.shapes:
        param = torch.randn(shape, generator=generator).to(dtypes.param)
        param.grad = torch.randn(shape, generator=generator).to(dtypes.param)
        params.append(param.requires_grad_())
    return params
