"""Tensors that AdamP and SGDP decide about, and training of the same ones by two engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case, assert_same_bits, values
from torch import Tensor
from torch.nn import Parameter

DECISIONS = ("channel", "layer", "none")
GUARD = 32  # elements before and after every array: a multiple of 16 bytes for every dtype
SENTINEL = -77.0


@dataclass(frozen=True)
class Shape:
    """A parameter's sizes, and the order of its dimensions in memory."""

    sizes: tuple[int, ...]
    order: tuple[int, ...] | None = None

    def strided(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x.contiguous()
        back = [self.order.index(d) for d in range(x.dim())]
        return x.permute(self.order).contiguous().permute(back)


# Around the parts of a warp that have a row of up to 1024 elements, and the vectors of a longer
# one; rows in pieces; a matrix of one row, and of one column; what has no rows, or nothing.
SHAPES = (
    Shape(()),
    Shape((9,)),
    Shape((0, 3)),
    Shape((3, 0)),
    Shape((1, 50)),
    Shape((40, 1)),
    Shape((5, 3)),
    Shape((70, 8)),
    Shape((6, 33)),
    Shape((3, 257)),
    Shape((3, 1024)),
    Shape((3, 1028)),
    Shape((2, 1033)),
    Shape((7, 12), (1, 0)),
    Shape((3, 600), (1, 0)),
    Shape((2, 1100), (1, 0)),
    Shape((4, 3, 5, 2), (0, 2, 3, 1)),
    Shape((4, 3, 5, 2), (2, 0, 3, 1)),
)


def weight_and_grad(shape: Shape, decision: str, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    """A parameter and a gradient about which they decide so, where the shape lets them."""
    p = values(shape.sizes, torch.float64, 2 * seed)
    g = grad_at(p, decision, 2 * seed + 1)
    return shape.strided(p.to(dtype)), shape.strided(g.to(dtype))


def grad_at(weight: Tensor, decision: str, seed: int) -> Tensor:
    """A float64 gradient about which the optimizers decide so at this weight, where its shape lets
    them: that of "channel" is at right angles to every row, that of "layer" to the tensor."""
    p, g = weight.detach().double(), values(tuple(weight.shape), torch.float64, seed)
    if p.dim() > 1 and p.numel():
        n_rows = len(p) if decision == "channel" else 1
        w, rows = p.reshape(n_rows, -1), g.reshape(n_rows, -1)
        along = (w * rows).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True) * w
        g = (rows + along if decision == "none" else rows - along).reshape(p.shape)
        if decision == "layer":  # opposite parts along two rows, whose norms are not the same
            norms = p.reshape(len(p), -1).square().sum(1)
            if len(p) > 1:
                g[0] += 3 * p[0]
                g[1] -= 3 * p[1] * norms[0] / norms[1]
    return g


def guarded(x: Tensor, offset: int) -> Tensor:
    """A copy of the same strides, `offset` elements after a 16-byte border, between sentinels."""
    buffer = torch.full((x.numel() + 2 * GUARD + offset,), SENTINEL, dtype=x.dtype, device=x.device)
    inside = buffer[GUARD + offset : GUARD + offset + x.numel()]
    # An empty tensor needs no memory.
    view = inside.as_strided(x.shape, x.stride()) if x.numel() else inside.reshape(x.shape)
    return view.copy_(x)


def is_intact(x: Tensor) -> bool:
    """Whether what lies around a guarded tensor is as it was."""
    memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    begin = x.storage_offset() if x.numel() else GUARD
    around = torch.cat([memory[:begin], memory[begin + x.numel() :]])
    return bool((around == SENTINEL).all())


@dataclass
class Training:
    """Guarded parameters of every shape and decision, in the middle of their training."""

    case: Case
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None
    shapes: Sequence[Shape] = SHAPES
    decisions: Sequence[str] = DECISIONS
    offsets: Sequence[int] = (0,)  # of the arrays in turn
    backend: str = "cpu"
    device: torch.device | str = "cpu"
    n_groups: int = 1
    step: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        of = [(shape, decision) for shape in self.shapes for decision in self.decisions]
        pairs = [weight_and_grad(*x, self.dtype, self.seed + i) for i, x in enumerate(of)]
        self.params = [Parameter(self._placed(p, i)) for i, (p, _) in enumerate(pairs)]
        for i, (p, (_, g)) in enumerate(zip(self.params, pairs, strict=True)):
            p.grad = self._placed(g, i + 1)
        groups = [
            {"params": self.params[k :: self.n_groups], "lr": self.case.options["lr"] / (k + 1)}
            for k in range(self.n_groups)
        ]
        self.optimizer = self.case.ours(groups, state_dtype=self.state_dtype, backend=self.backend)
        for i, p in enumerate(self.params):
            self._fill_state(i, p)

    def _placed(self, x: Tensor, i: int) -> Tensor:
        return guarded(x.to(self.device), self.offsets[i % len(self.offsets)])

    def _fill_state(self, i: int, p: Parameter) -> None:
        entry = self.optimizer.state[p]
        dtype = self.optimizer._dtype_of_state(p)
        for k, name in enumerate(self.case.state_names):
            x = torch.empty_like(p, dtype=dtype).copy_(values(p.shape, p.dtype, 7000 + 2 * i + k))
            entry[name] = self._placed(x.abs() if name == "exp_avg_sq" else x / 8, i + 2 + k)
        if self.optimizer.counts_steps:
            entry["step"] = torch.tensor(self.step)

    def states(self) -> list[Tensor]:
        return [
            self.optimizer.state[p][name] for p in self.params for name in self.case.state_names
        ]

    def arrays(self) -> list[Tensor]:
        grads = [p.grad for p in self.params if p.grad is not None]
        return [*(p.detach() for p in self.params), *grads, *self.states()]

    def step_from_copies(self, offset: int = 0) -> None:
        """A step that reads guarded copies of the parameters, which are NaN themselves until then.

        Args:
            offset: of the copies, in elements after a 16-byte border.
        """
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        copies = [guarded(p.detach(), offset) for p in params]
        kept = [copy.clone() for copy in copies]
        with torch.no_grad():
            for p in params:
                p.fill_(torch.nan)
        self.optimizer._sources = list(copies)
        try:
            self.optimizer.step()
        finally:
            del self.optimizer._sources
        assert_same_bits(copies, kept, "copies")
        assert all(is_intact(copy) for copy in copies), "memory beside a copy was written"

    def check_guards(self) -> None:
        assert all(is_intact(x) for x in self.arrays()), "memory beside an array was written"
