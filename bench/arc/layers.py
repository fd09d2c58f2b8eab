"""Layers of stacked networks: every weight is [replicas, ...], so many small runs cost one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Replicas:
    """Weights of `count` networks of one shape, which never see each other.

    Args:
        params: name to leaf [count, ...] that requires grad; its `.grad` is kept and added to.
        buffers: name to [count, ...], the running averages of batch normalisation.
        training: batch statistics and dropout on.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    training: bool = field(default=True)

    @property
    def count(self) -> int:
        return next(iter(self.params.values())).shape[0]


class Layer:
    """Declares its weights in `shapes` as (shape, bound of the uniform start; 0 is all zeros)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shapes: dict[str, tuple[tuple[int, ...], float]] = {}
        self.buffers: dict[str, tuple[int, ...]] = {}


class Linear(Layer):
    """[B, ..., inputs] to [B, ..., outputs]."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        super().__init__(name)
        bound = math.sqrt(3 / inputs)
        self.shapes = {f"{name}.w": ((inputs, outputs), bound), f"{name}.b": ((1, outputs), 0.0)}

    def __call__(self, r: Replicas, x: Tensor) -> Tensor:
        flat = x.reshape(r.count, -1, x.shape[-1])
        y = torch.baddbmm(r.params[f"{self.name}.b"], flat, r.params[f"{self.name}.w"])
        return y.reshape(*x.shape[:-1], -1)


class Conv(Layer):
    """[B, N, channels, ...] to [B, N, outputs, ...], one or two spatial dims, padding size//2."""

    def __init__(
        self, name: str, channels: int, outputs: int, size: int = 3, dims: int = 2
    ) -> None:
        super().__init__(name)
        self.dims, self.size = dims, size
        fan_in = channels * size**dims
        shape = (outputs, channels, *[size] * dims)
        bound = math.sqrt(3 / fan_in)
        self.shapes = {f"{name}.w": (shape, bound), f"{name}.b": ((outputs,), 0.0)}

    def __call__(self, r: Replicas, x: Tensor, stride: int = 1) -> Tensor:
        count = len(x)
        grouped = x.transpose(0, 1).flatten(1, 2)
        w, b = r.params[f"{self.name}.w"].flatten(0, 1), r.params[f"{self.name}.b"].flatten()
        convolve = F.conv2d if self.dims == 2 else F.conv1d
        y = convolve(grouped, w, b, stride=stride, padding=self.size // 2, groups=count)
        return y.unflatten(1, (count, -1)).transpose(0, 1)


class BatchNorm(Layer):
    """Over all dims but the replica's and `dim`; running averages (weight 0.1) outside training."""

    def __init__(self, name: str, channels: int, dim: int) -> None:
        super().__init__(name)
        self.dim = dim
        self.shapes = {f"{name}.g": ((channels,), 0.0), f"{name}.b": ((channels,), 0.0)}
        self.buffers = {f"{name}.mean": (channels,), f"{name}.var": (channels,)}

    def __call__(self, r: Replicas, x: Tensor) -> Tensor:
        mean, var = r.buffers[f"{self.name}.mean"], r.buffers[f"{self.name}.var"]
        if r.training:
            dims = [d for d in range(1, x.ndim) if d != self.dim % x.ndim]
            batch_var, batch_mean = torch.var_mean(x, dims, correction=0)
            mean.lerp_(batch_mean.detach(), 0.1)
            var.lerp_(batch_var.detach() - 1, 0.1)  # stored less one: buffers start at zero
            mean, var = batch_mean, batch_var - 1
        gain, bias = r.params[f"{self.name}.g"] + 1, r.params[f"{self.name}.b"]
        scale = gain * (var + (1 + 1e-5)).rsqrt()
        shift = bias - mean * scale
        shape = [1] * x.ndim
        shape[0], shape[self.dim % x.ndim] = r.count, -1
        return x * scale.reshape(shape) + shift.reshape(shape)


class Embedding(Layer):
    """[B, ...] indices to [B, ..., width]."""

    def __init__(self, name: str, entries: int, width: int, bound: float = 1.0) -> None:
        super().__init__(name)
        self.shapes = {f"{name}.w": ((entries, width), bound)}

    def __call__(self, r: Replicas, indices: Tensor) -> Tensor:
        w = r.params[f"{self.name}.w"]
        offsets = torch.arange(r.count).mul_(w.shape[1]).reshape(-1, *[1] * (indices.ndim - 1))
        return F.embedding(indices + offsets, w.flatten(0, 1))


class GRU(Layer):
    """[B, N, length, inputs] to the hidden states [B, N, length, width]."""

    def __init__(self, name: str, inputs: int, width: int) -> None:
        super().__init__(name)
        self.width = width
        self.inward = Linear(f"{name}.in", inputs, 3 * width)
        self.across = Linear(f"{name}.rec", width, 3 * width)
        self.shapes = {**self.inward.shapes, **self.across.shapes}

    def __call__(self, r: Replicas, x: Tensor) -> Tensor:
        h = x.new_zeros(*x.shape[:2], self.width)
        states = []
        for gates in self.inward(r, x).unbind(2):
            reset, update, new = gates.chunk(3, -1)
            h_reset, h_update, h_new = self.across(r, h).chunk(3, -1)
            candidate = torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new)
            h = torch.lerp(candidate, h, torch.sigmoid(update + h_update))
            states.append(h)
        return torch.stack(states, 2)


class Attention(Layer):
    """One causal block of a transformer, [B, N, length, width] to the same, before-norm."""

    def __init__(self, name: str, width: int, heads: int) -> None:
        super().__init__(name)
        self.heads = heads
        self.qkv = Linear(f"{name}.qkv", width, 3 * width)
        self.out = Linear(f"{name}.out", width, width)
        self.up = Linear(f"{name}.up", width, 2 * width)
        self.down = Linear(f"{name}.down", 2 * width, width)
        for layer in (self.qkv, self.out, self.up, self.down):
            self.shapes |= layer.shapes

    def __call__(self, r: Replicas, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:])
        heads = self.qkv(r, normed).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)
        q, k, v = heads.transpose(-2, -3).unbind(0)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + self.out(r, mixed.transpose(-2, -3).flatten(-2))
        return x + self.down(r, F.gelu(self.up(r, F.layer_norm(x, x.shape[-1:]))))


def dropout(r: Replicas, x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p, training=r.training and p > 0)


def create(layers: Iterable[Layer], count: int, rng: torch.Generator) -> Replicas:
    """`count` networks, each with a start of its own."""
    params, buffers = {}, {}
    for layer in layers:
        for name, (shape, bound) in layer.shapes.items():
            start = torch.rand(count, *shape, generator=rng).mul_(2).sub_(1).mul_(bound)
            params[name] = start.requires_grad_()
            start.grad = torch.zeros_like(start)
        buffers |= {name: torch.zeros(count, *shape) for name, shape in layer.buffers.items()}
    return Replicas(params, buffers)
