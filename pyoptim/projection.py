"""What AdamP and SGDP share: the projection of a step, and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyoptim.optimizer import FusedOptimizer
from pyoptim.rows import Row, is_dtensor


class ProjectingOptimizer(FusedOptimizer):
    """An optimizer whose step loses its part along weights that seem scale-invariant.

    Rows are those of dimension 0; only parameters of two or more dimensions are projected.
    """

    def _check_row(self, row: Row, group: Mapping[str, Any]) -> None:
        if row.key.dim() > 1 and is_dtensor(row.key) and _is_cut(row.key):
            raise RuntimeError(
                f"{row.place} is a DTensor of placements {row.key.placements}, but "  # type: ignore[attr-defined]
                f"{type(self).__name__} decides by sums over whole parameters; replicate those of "
                "two and more dimensions, or use AdamW or SGD"
            )

    def _reference_step(self, row: Row, group: Mapping[str, Any]) -> None:
        # The reference sees complex numbers as pairs, a vector of them as a matrix; no cosine is
        # below 0.
        is_vector = row.param.is_complex() and row.param.dim() < 2
        super()._reference_step(row, {**group, "delta": 0.0} if is_vector else group)

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


def _is_cut(tensor: Any) -> bool:
    """Whether no process holds all of a DTensor."""
    sizes = tensor.device_mesh.shape
    return any(
        size > 1 and not placement.is_replicate()
        for size, placement in zip(sizes, tensor.placements, strict=True)
    )


def project(
    direction: Tensor, param: Tensor, grad: Tensor, group: Mapping[str, Any], n_rows: int
) -> tuple[Tensor, bool]:
    """Returns (the direction, projected if gradient and weights say so; whether it was).

    A view of the tensor as rows passes when |cos(g, w)| < delta/sqrt(row size) in every row; the
    direction u then becomes u - w*<w, u>/(|w| + eps)^2, per row. First the rows of dimension 0 are
    tried, then the whole tensor as one row. Sums and decision run in float64.

    Args:
        param, grad: of the direction's shape; the weights before the step, the raw gradient.
        n_rows: size of dimension 0; 0: never projected.
    """
    if n_rows == 0 or param.numel() == 0:
        return direction, False
    for rows in dict.fromkeys((n_rows, 1)):
        u, w, g = (t.double().reshape(rows, -1) for t in (direction, param, grad))
        if not _is_orthogonal(w.detach(), g.detach(), group):
            continue
        c = (w * u).sum(1, keepdim=True) / (_norm(w) + float(group["eps"])) ** 2
        radial = c.to(param.dtype).expand_as(w).reshape(param.shape) * param
        return direction - radial, True
    return direction, False


def _is_orthogonal(w: Tensor, g: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the largest |cosine| of two rows is below delta/sqrt(row size); NaN is not."""
    eps = float(group["eps"])
    cosine = (w * g).sum(1, keepdim=True).abs() / (_floor(_norm(w), eps) * _floor(_norm(g), eps))
    return bool((cosine < float(group["delta"]) / w.shape[1] ** 0.5).all())


def _norm(rows: Tensor) -> Tensor:
    return (rows * rows).sum(1, keepdim=True).sqrt()


def _floor(norm: Tensor, eps: float) -> Tensor:
    return norm.clamp(min=eps)


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
