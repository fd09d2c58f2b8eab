"""A small linear classifier on features: the network that CW-ERM learns its weights with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyoptim.coreset.selection import matrix

# Oversampling and power iterations of the randomized principal components: with these, variances of
# 15 components of Fashion-MNIST's pixels agree with the exact ones to 0.5 %.
_EXTRA, _ITERATIONS = 10, 4


class LinearHead(nn.Module):
    """Logits of a linear layer over the first principal components of features, whitened.

    Meta-Weight-Net tells wrong labels by their loss. A network that can fit a few hundred samples,
    whatever their labels, gives all of them the same small loss; this one cannot, with few
    components. It is also cheap: a step costs about a millisecond.

    Args:
        mean: [d]; subtracted from features.
        components: [d, q]; principal directions, each divided by the deviation along it.
        classes: number of outputs.

    Shape: features [n, ...], flattened to [n, d], to logits [n, classes].
    """

    mean: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, components: Tensor, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes!r}")
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)
        self.linear = nn.Linear(components.shape[1], classes)

    @classmethod
    def of(cls, features: Tensor, classes: int, dims: int, seed: int = 0) -> LinearHead:
        """A fresh head for such features.

        Args:
            features: [n, ...], floating point, finite; without labels.
            classes: number of outputs.
            dims: components, at least 1; directions along which nothing varies are left out.
            seed: of the randomized decomposition and of the layer.

        Raises:
            ValueError, TypeError: an argument is not as described.
        """
        if isinstance(dims, bool) or not isinstance(dims, int) or dims < 1:
            raise ValueError(f"dims must be an int of at least 1, got {dims!r}")
        x = matrix("features", features).float()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            mean, components = _principal(x, dims)
            return cls(mean, components, classes).to(x.device)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(
            (x.flatten(1).to(self.mean.dtype) - self.mean) @ self.components
        )
        return logits


@torch.no_grad()
def _principal(x: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """(mean [d], whitened directions [d, q]), q at most dims."""
    mean = x.mean(0)
    rank = min(dims + _EXTRA, *x.shape)
    _, values, directions = torch.svd_lowrank(x - mean, rank, _ITERATIONS)
    deviations = (values / max(1, len(x)) ** 0.5)[:dims]
    is_varied = deviations > 1e-6 * deviations.max().clamp(min=torch.finfo(x.dtype).tiny)
    if not bool(is_varied.any()):  # all samples are equal: the bias alone can tell
        return mean, torch.zeros_like(directions[:, :1])
    return mean, directions[:, :dims][:, is_varied] / deviations[is_varied]
