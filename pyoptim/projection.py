"""What AdamP and SGDP share: the projection of a step, and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from pyoptim import backend
from pyoptim.optimizer import FusedOptimizer
from pyoptim.rows import Row, shards

BLOCK = 16  # kBlockColumns and kBlockRounds of csrc/rules/projection.hpp


class ProjectingOptimizer(FusedOptimizer):
    """An optimizer whose step loses its part along weights that seem scale-invariant.

    Rows are those of dimension 0; only parameters of two or more dimensions are projected.
    """

    def _check_row(self, row: Row, group: Mapping[str, Any]) -> None:
        if not _is_cut(row.key):
            return
        placements = row.key.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise RuntimeError(
                f"{row.place} is a DTensor of placements {placements}, whose values no process "
                "has; redistribute() it as shards or replicas"
            )
        if group.get("differentiable"):
            raise RuntimeError(
                f"{row.place} is cut over processes, whose sums autograd does not record; use "
                "differentiable=False"
            )
        choice = self.backend or backend.chosen()
        if choice in backend.ENGINES:
            raise backend.BackendError(
                f"backend={choice!r} cannot add over the processes that hold {row.place}; use "
                "backend='auto' or 'reference'"
            )

    def _needs_reference(self, row: Row) -> bool:
        return _is_cut(row.key)

    def _reference_step(self, row: Row, group: Mapping[str, Any]) -> None:
        # The reference sees complex numbers as pairs, a vector of them as a matrix; no cosine is
        # below 0.
        if row.param.is_complex() and row.param.dim() < 2:
            group = {**group, "delta": 0.0}
        elif _is_cut(row.key):
            group = {**group, "cut": Cut.of(row.key)}
        super()._reference_step(row, group)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # torch says what is wrong otherwise
            self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @staticmethod
    def _check_options(group: Mapping[str, Any]) -> None:
        """Raises ValueError for an option out of range."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The authors' package does not save the options that it lacks.
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _is_cut(tensor: Tensor) -> bool:
    """Whether this is a DTensor of two or more dimensions that no process holds all of."""
    return tensor.dim() > 1 and shards(tensor) > 1


@dataclass(frozen=True)
class Cut:
    """What is to be known of a whole tensor where a process may hold a part of it."""

    n_rows: int
    numel: int  # real numbers
    of_rows: tuple[Any, ...] = ()  # process groups that share rows among them
    of_columns: tuple[Any, ...] = ()  # process groups that share each row

    @classmethod
    def of(cls, tensor: Any) -> Cut:
        cuts = [
            (tensor.device_mesh.get_group(i), placement.dim)
            for i, placement in enumerate(tensor.placements)
            if tensor.device_mesh.size(i) > 1 and not placement.is_replicate()
        ]
        return cls(
            tensor.shape[0],
            tensor.numel() * (2 if tensor.is_complex() else 1),
            tuple(group for group, dim in cuts if dim == 0),
            tuple(group for group, dim in cuts if dim > 0),
        )

    def add(self, sums: Tensor, is_whole: bool) -> Tensor:
        """Adds sums over parts of rows, or of the tensor as one row, over the processes."""
        for group in (*self.of_columns, *(self.of_rows if is_whole else ())):
            distributed.all_reduce(sums, group=group)
        return sums

    def holds(self, condition: Tensor) -> bool:
        """Whether a condition holds for all rows, those of other processes too."""
        answer = condition.all().int()
        for group in (*self.of_columns, *self.of_rows):
            distributed.all_reduce(answer, distributed.ReduceOp.MIN, group=group)
        return bool(answer)


def project(
    direction: Tensor, param: Tensor, grad: Tensor, group: Mapping[str, Any], n_rows: int
) -> tuple[Tensor, bool]:
    """Returns (the direction, projected if gradient and weights say so; whether it was).

    A view of the tensor as rows passes when |cos(g, w)| < delta/sqrt(row size) in every row; the
    direction u then becomes u - w*<w, u>/(|w| + eps)^2, per row. First the rows of dimension 0 are
    tried, then the whole tensor as one row. Sums of several rows and decisions run in float64, the
    sums of one row by blocks of `BLOCK`^2 elements, see `_sum_by_blocks`.

    Args:
        param, grad: of the direction's shape; the weights before the step, the raw gradient.
        group: the options; as "cut" the `Cut` of a tensor of which these are a part.
        n_rows: size of dimension 0; 0: never projected.
    """
    cut = group.get("cut") or Cut(n_rows, param.numel())
    if cut.n_rows == 0 or cut.numel == 0:
        return direction, False
    for is_whole in (False, True) if cut.n_rows > 1 else (False,):
        rows, size = (1, cut.numel) if is_whole else (n_rows, cut.numel // cut.n_rows)
        width = param.numel() // max(rows, 1)
        u, w, g = (t.reshape(rows, width) for t in (direction, param, grad))
        add_up = _sum_by_blocks if is_whole or cut.n_rows == 1 else _sum_of_products
        sums = cut.add(torch.stack([add_up(a, b) for a, b in ((w, g), (w, w), (g, g))]), is_whole)
        if not cut.holds(_is_orthogonal(sums.detach(), size, group)):
            continue
        along = cut.add(add_up(w, u), is_whole)
        c = (along / (sums[1].sqrt() + float(group["eps"])) ** 2).unsqueeze(1)
        radial = c.to(param.dtype).expand_as(w).reshape(param.shape) * param
        return direction - radial, True
    return direction, False


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Of every row, in float64."""
    return (a.double() * b.double()).sum(1)


def _sum_by_blocks(a: Tensor, b: Tensor) -> Tensor:
    """Of every row: each column of a block in the tensors' dtype, these in float64."""
    n_rows, size = a.shape
    n_blocks = -(-size // BLOCK**2)
    padded = torch.nn.functional.pad(a * b, (0, n_blocks * BLOCK**2 - size))
    of_columns, *others = padded.reshape(n_rows, n_blocks, BLOCK, BLOCK).unbind(2)
    for products in others:
        of_columns = of_columns + products
    return of_columns.double().sum((1, 2))


def _is_orthogonal(sums: Tensor, size: int, group: Mapping[str, Any]) -> Tensor:
    """Of rows with sums (w*g, w*w, g*g): whether |cosine| < delta/sqrt(row size); NaN is not."""
    dot, *squares = sums
    w, g = (square.clamp(min=float(group["eps"]) ** 2) for square in squares)
    is_below: Tensor = dot * dot * size < float(group["delta"]) ** 2 * (w * g)
    return is_below


def rows_of(param: Tensor) -> int:
    """The rows that `project` is to look at."""
    return param.shape[0] if param.dim() > 1 else 0


def check_projection(group: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that both optimizers have out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must have 1 element, got a tensor of shape {tuple(lr.shape)}")
    for name in ("lr", "eps", "weight_decay", "delta", "wd_ratio"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}")
