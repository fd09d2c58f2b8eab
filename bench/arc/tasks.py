"""The training tasks that the controller learns from: small networks, real and generated data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sources
from .layers import GRU, Attention, BatchNorm, Conv, Embedding, Layer, Linear, Replicas, dropout

Batch = tuple[Tensor, ...]
VALIDATION_ROWS = 256


@dataclass(frozen=True)
class Problem:
    """One task with its sizes drawn.

    Args:
        layers: those that own the weights.
        losses: (replicas, batch of [B, rows, ...] tensors) to the mean loss of each replica, [B].
        train, valid: tensors of [examples, ...], of equal first dim.
    """

    layers: Sequence[Layer]
    losses: Callable[[Replicas, Batch], Tensor]
    train: Batch
    valid: Batch


@dataclass(frozen=True)
class Task:
    """`steps`: the lengths of an epoch to draw from, shorter where a step costs more."""

    family: str
    build: Callable[[random.Random, torch.Generator], Problem]
    steps: tuple[int, ...] = (8, 16, 32)


class Classifier:
    """Linear layers with ReLU between, optional batch normalisation and dropout."""

    def __init__(self, sizes: Sequence[int], draw: random.Random, name: str = "fc") -> None:
        self.linears = [Linear(f"{name}{i}", a, b) for i, (a, b) in enumerate(pairwise(sizes))]
        normal = draw.random() < 0.4
        self.norms = [
            BatchNorm(f"{name}{i}.norm", width, -1) for i, width in enumerate(sizes[1:-1]) if normal
        ]
        self.dropout = draw.choice([0.0, 0.0, 0.1, 0.3])
        self.layers: list[Layer] = [*self.linears, *self.norms]

    def __call__(self, r: Replicas, x: Tensor) -> Tensor:
        for i, linear in enumerate(self.linears[:-1]):
            x = linear(r, x)
            x = F.relu(self.norms[i](r, x) if self.norms else x)
            x = dropout(r, x, self.dropout)
        return self.linears[-1](r, x)


class ConvNet:
    """Two 3x3 convolutions, the second of stride 2, two residual ones if asked, a linear end."""

    def __init__(self, size: int, outputs: int, residual: bool, draw: random.Random) -> None:
        width = draw.choice([4, 6, 8])
        channels = [1, width, 2 * width, *([2 * width] * 2 if residual else [])]
        self.convs = [Conv(f"conv{i}", a, b) for i, (a, b) in enumerate(pairwise(channels))]
        normal = residual or draw.random() < 0.4
        self.norms = [
            BatchNorm(f"conv{i}.norm", c, 2) for i, c in enumerate(channels[1:]) if normal
        ]
        self.end = Linear("end", 2 * width * ((size + 1) // 2) ** 2, outputs)
        self.layers: list[Layer] = [*self.convs, *self.norms, self.end]

    def _block(self, r: Replicas, i: int, x: Tensor, stride: int = 1) -> Tensor:
        y = self.convs[i](r, x, stride)
        return self.norms[i](r, y) if self.norms else y

    def __call__(self, r: Replicas, x: Tensor) -> Tensor:
        x = F.relu(self._block(r, 1, F.relu(self._block(r, 0, x)), stride=2))
        if len(self.convs) > 2:
            x = F.relu(x + self._block(r, 3, F.relu(self._block(r, 2, x))))
        return self.end(r, x.flatten(2))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return each.reshape(len(labels), -1).mean(1)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return each.flatten(1).mean(1)


def _split(data: Batch, draw: random.Random, rng: torch.Generator) -> tuple[Batch, Batch]:
    """A random validation part of at most a third; the training part is sometimes cut short."""
    rows = len(data[0])
    held = min(VALIDATION_ROWS, rows // 3)
    order = torch.randperm(rows, generator=rng)
    kept = int((rows - held) * draw.choice([0.3, 1.0, 1.0]))
    train, valid = order[held : held + kept], order[:held]
    return tuple(t[train] for t in data), tuple(t[valid] for t in data)


def _mislabelled(labels: Tensor, classes: int, draw: random.Random, rng: torch.Generator) -> Tensor:
    wrong = torch.rand(len(labels), generator=rng) < draw.choice([0.0, 0.0, 0.1, 0.2])
    return torch.where(wrong, torch.randint(classes, labels.shape, generator=rng), labels)


def _widths(draw: random.Random) -> list[int]:
    return [draw.choice([16, 32, 64])] * draw.choice([1, 2, 2, 3])


def _classification(
    data: tuple[Tensor, Tensor], classes: int, draw: random.Random, rng: torch.Generator
) -> Problem:
    x, y = data
    train, valid = _split((x, _mislabelled(y, classes, draw, rng)), draw, rng)
    net = Classifier([x.shape[1], *_widths(draw), classes], draw)
    return Problem(net.layers, lambda r, b: cross_entropy(net(r, b[0]), b[1]), train, valid)


def _regression(data: tuple[Tensor, Tensor], draw: random.Random, rng: torch.Generator) -> Problem:
    x, y = data
    train, valid = _split((x, y.unsqueeze(1)), draw, rng)
    net = Classifier([x.shape[1], *_widths(draw), 1], draw)
    return Problem(net.layers, lambda r, b: squared_error(net(r, b[0]), b[1]), train, valid)


def digits_mlp(draw: random.Random, rng: torch.Generator) -> Problem:
    return _classification(sources.digits(), 10, draw, rng)


def _convolutional(
    images: Tensor,
    labels: Tensor,
    classes: int,
    residual: bool,
    draw: random.Random,
    rng: torch.Generator,
) -> Problem:
    data = (images, _mislabelled(labels, classes, draw, rng))
    train, valid = _split(data, draw, rng)
    net = ConvNet(images.shape[-1], classes, residual, draw)
    return Problem(net.layers, lambda r, b: cross_entropy(net(r, b[0]), b[1]), train, valid)


def digits_resnet(draw: random.Random, rng: torch.Generator) -> Problem:
    x, y = sources.digits()
    return _convolutional(x.reshape(-1, 1, 8, 8), y, 10, True, draw, rng)


def shapes_cnn(draw: random.Random, rng: torch.Generator) -> Problem:
    x, _, kind = sources.shapes(3000, 10, draw.choice([0.1, 0.3]), rng)
    return _convolutional(x, kind, sources.SHAPE_CLASSES, False, draw, rng)


def cancer_mlp(draw: random.Random, rng: torch.Generator) -> Problem:
    return _classification(sources.table("breast_cancer"), 2, draw, rng)


def wine_mlp(draw: random.Random, rng: torch.Generator) -> Problem:
    return _classification(sources.table("wine"), 3, draw, rng)


def diabetes_mlp(draw: random.Random, rng: torch.Generator) -> Problem:
    return _regression(sources.table("diabetes"), draw, rng)


def friedman_mlp(draw: random.Random, rng: torch.Generator) -> Problem:
    rows, noise = draw.choice([600, 3000]), draw.choice([0.05, 0.3])
    return _regression(sources.friedman(rows, noise, rng), draw, rng)


def mixture_mlp(draw: random.Random, rng: torch.Generator) -> Problem:
    data = sources.mixture(3000, draw.choice([8, 24]), 5, draw.choice([0.2, 0.4]), rng)
    return _classification(data, 5, draw, rng)


def _characters(length: int, draw: random.Random, rng: torch.Generator) -> tuple[Batch, Batch]:
    """Training windows of one module's first nine tenths, validation windows of its end."""
    text = sources.characters(draw.choice(sources.MODULES))
    end = len(text) * 9 // 10
    rows = draw.choice([1000, 6000])
    train = sources.cut(text[:end], sources.windows(text[:end], length, rows, rng), length)
    held = sources.windows(text[end:], length, VALIDATION_ROWS // 2, rng)
    return (train,), (sources.cut(text[end:], held, length),)


def _language(draw: random.Random, rng: torch.Generator, body: Callable[[int], Layer]) -> Problem:
    width = draw.choice([24, 32])
    train, valid = _characters(11, draw, rng)
    enter = Embedding("enter", sources.VOCABULARY, width)
    middle, leave = body(width), Linear("leave", width, sources.VOCABULARY)

    def losses(r: Replicas, batch: Batch) -> Tensor:
        tokens = batch[0]
        hidden = middle(r, enter(r, tokens[..., :-1]))  # type: ignore[operator]
        return cross_entropy(leave(r, hidden), tokens[..., 1:])

    return Problem([enter, middle, leave], losses, train, valid)


def char_gru(draw: random.Random, rng: torch.Generator) -> Problem:
    return _language(draw, rng, lambda width: GRU("gru", width, width))


def char_transformer(draw: random.Random, rng: torch.Generator) -> Problem:
    return _language(draw, rng, lambda width: Attention("block", width, 2))


def char_mlp(draw: random.Random, rng: torch.Generator) -> Problem:
    """The next character from the seven before it."""
    width = draw.choice([8, 16])
    train, valid = _characters(8, draw, rng)
    enter = Embedding("enter", sources.VOCABULARY, width)
    net = Classifier([7 * width, *_widths(draw), sources.VOCABULARY], draw)

    def losses(r: Replicas, batch: Batch) -> Tensor:
        tokens = batch[0]
        return cross_entropy(net(r, enter(r, tokens[..., :-1]).flatten(2)), tokens[..., -1])

    return Problem([enter, *net.layers], losses, train, valid)


def text_origin(draw: random.Random, rng: torch.Generator) -> Problem:
    """Which module a window of 40 characters is from: mean of embedded character pairs."""
    rows, length, width = draw.choice([600, 3000]), 40, draw.choice([8, 16])
    texts = [sources.characters(name) for name in sources.MODULES]
    label = torch.randint(len(texts), (rows,), generator=rng)
    cuts = [sources.cut(t, sources.windows(t, length, rows, rng), length) for t in texts]
    tokens = torch.stack(cuts, 1)[torch.arange(rows), label]
    pairs = (tokens[:, :-1] * 31 + tokens[:, 1:] * 7) % 512  # hashed
    train, valid = _split((pairs, label), draw, rng)
    enter = Embedding("enter", 512, width)
    net = Classifier([width, *_widths(draw), len(texts)], draw)

    def losses(r: Replicas, batch: Batch) -> Tensor:
        return cross_entropy(net(r, enter(r, batch[0]).mean(2)), batch[1])

    return Problem([enter, *net.layers], losses, train, valid)


def _tagged(draw: random.Random, rng: torch.Generator, length: int) -> tuple[Batch, Batch]:
    name = draw.choice(sources.MODULES)
    text, tags = sources.characters(name), sources.character_tags(name)
    starts = sources.windows(text, length, draw.choice([800, 4000]), rng)
    data = (sources.cut(text, starts, length), sources.cut(tags, starts, length))
    return _split(data, draw, rng)


def tagging_gru(draw: random.Random, rng: torch.Generator) -> Problem:
    width = draw.choice([16, 32])
    train, valid = _tagged(draw, rng, length=12)
    enter, gru = Embedding("enter", sources.VOCABULARY, 16), GRU("gru", 16, width)
    leave = Linear("leave", width, sources.TAGS)

    def losses(r: Replicas, batch: Batch) -> Tensor:
        return cross_entropy(leave(r, gru(r, enter(r, batch[0]))), batch[1])

    return Problem([enter, gru, leave], losses, train, valid)


def tagging_conv(draw: random.Random, rng: torch.Generator) -> Problem:
    width = draw.choice([16, 24])
    train, valid = _tagged(draw, rng, length=12)
    enter = Embedding("enter", sources.VOCABULARY, 12)
    first, second = Conv("conv0", 12, width, 5, dims=1), Conv("conv1", width, width, 5, dims=1)
    leave = Linear("leave", width, sources.TAGS)

    def losses(r: Replicas, batch: Batch) -> Tensor:
        x = enter(r, batch[0]).transpose(-1, -2)
        x = F.relu(second(r, F.relu(first(r, x)))).transpose(-1, -2)
        return cross_entropy(leave(r, x), batch[1])

    return Problem([enter, first, second, leave], losses, train, valid)


class PixelNet:
    """Three 3x3 convolutions at full size, [B, N, 1, S, S] to the same."""

    def __init__(self, draw: random.Random) -> None:
        width = draw.choice([4, 6])
        sizes = [1, width, width, 1]
        self.convs = [Conv(f"conv{i}", a, b) for i, (a, b) in enumerate(pairwise(sizes))]
        normal = draw.random() < 0.4
        self.norms = [BatchNorm(f"conv{i}.norm", width, 2) for i in range(2) if normal]
        self.layers: list[Layer] = [*self.convs, *self.norms]

    def __call__(self, r: Replicas, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs[:-1]):
            x = conv(r, x)
            x = F.relu(self.norms[i](r, x) if self.norms else x)
        return self.convs[-1](r, x)


def shapes_segmentation(draw: random.Random, rng: torch.Generator) -> Problem:
    x, mask, _ = sources.shapes(1500, 8, draw.choice([0.2, 0.4]), rng)
    train, valid = _split((x, mask), draw, rng)
    net = PixelNet(draw)
    return Problem(net.layers, lambda r, b: binary_cross_entropy(net(r, b[0]), b[1]), train, valid)


def shapes_denoising(draw: random.Random, rng: torch.Generator) -> Problem:
    x, mask, _ = sources.shapes(1500, 8, draw.choice([0.2, 0.4]), rng)
    train, valid = _split((x, mask), draw, rng)
    net = PixelNet(draw)
    return Problem(net.layers, lambda r, b: squared_error(net(r, b[0]), b[1]), train, valid)


def digits_autoencoder(draw: random.Random, rng: torch.Generator) -> Problem:
    """Clean digits from noisy ones through a narrow middle."""
    clean, _ = sources.digits()
    noisy = clean + draw.choice([0.2, 0.6]) * torch.randn(clean.shape, generator=rng)
    train, valid = _split((noisy, clean), draw, rng)
    net = Classifier([64, 48, draw.choice([8, 16]), 48, 64], draw)
    return Problem(net.layers, lambda r, b: squared_error(net(r, b[0]), b[1]), train, valid)


def digits_siamese(draw: random.Random, rng: torch.Generator) -> Problem:
    """Contrastive loss (Hadsell et al. 2006, margin 1) on pairs, half of them of one class."""
    x, y = sources.digits()
    first = torch.randint(len(x), (3000,), generator=rng)
    order = torch.randperm(len(x), generator=rng)
    other = order[torch.randint(len(x), (3000, 12), generator=rng)]
    same = (torch.arange(3000) % 2).float()
    matches = (y[other] == y[first].unsqueeze(1)) == (same > 0).unsqueeze(1)
    second = other.gather(1, matches.int().argmax(1, keepdim=True)).squeeze(1)
    same = (y[first] == y[second]).float()
    train, valid = _split((x[first], x[second], same), draw, rng)
    net = Classifier([64, *_widths(draw), 8], draw)

    def losses(r: Replicas, batch: Batch) -> Tensor:
        a, b = net(r, torch.cat(batch[:2], 1)).chunk(2, 1)
        distance = ((a - b).square().sum(-1) + 1e-6).sqrt()
        apart = F.relu(1 - distance).square()
        return (batch[2] * distance.square() + (1 - batch[2]) * apart).mean(1)

    return Problem(net.layers, losses, train, valid)


def digits_adversarial(draw: random.Random, rng: torch.Generator) -> Problem:
    """Half the loss on clean digits, half after the fast gradient sign attack (arXiv:1412.6572)."""
    x, y = sources.digits()
    train, valid = _split((x, y), draw, rng)
    net = Classifier([64, *_widths(draw), 10], draw)
    reach = draw.choice([0.05, 0.15])

    def losses(r: Replicas, batch: Batch) -> Tensor:
        with torch.enable_grad():
            x = batch[0].detach().clone().requires_grad_()
            clean = cross_entropy(net(r, x), batch[1])
            (slope,) = torch.autograd.grad(clean.sum(), x, retain_graph=True)
            attacked = cross_entropy(net(r, (x + reach * slope.sign()).detach()), batch[1])
            return (clean + attacked) / 2

    return Problem(net.layers, losses, train, valid)


def rating_factors(draw: random.Random, rng: torch.Generator) -> Problem:
    """Matrix factorisation with biases."""
    pairs, values = sources.ratings(8000, draw.choice([3, 6]), draw.choice([0.1, 0.4]), rng)
    train, valid = _split((pairs, values), draw, rng)
    width, bound = draw.choice([4, 8]), draw.choice([0.1, 0.5])
    users, items = Embedding("user", 120, width, bound), Embedding("item", 100, width, bound)
    levels = Embedding("user.level", 120, 1, 0.0), Embedding("item.level", 100, 1, 0.0)

    def losses(r: Replicas, batch: Batch) -> Tensor:
        user, item = batch[0].unbind(-1)
        level = levels[0](r, user) + levels[1](r, item)
        return squared_error((users(r, user) * items(r, item)).sum(-1) + level[..., 0], batch[1])

    return Problem([users, items, *levels], losses, train, valid)


def shapes_multitask(draw: random.Random, rng: torch.Generator) -> Problem:
    """Class and coarse mask of a shape from one trunk, the two losses added."""
    x, mask, kind = sources.shapes(2500, 10, draw.choice([0.1, 0.3]), rng)
    coarse = F.avg_pool2d(mask, 2).flatten(1)
    train, valid = _split((x.flatten(1), coarse, kind), draw, rng)
    trunk = Classifier([100, *_widths(draw), 64], draw, "trunk")
    kinds, masks = Linear("kinds", 64, sources.SHAPE_CLASSES), Linear("masks", 64, 25)
    weight = draw.choice([1.0, 4.0])

    def losses(r: Replicas, batch: Batch) -> Tensor:
        h = F.relu(trunk(r, batch[0]))
        return cross_entropy(kinds(r, h), batch[2]) + weight * binary_cross_entropy(
            masks(r, h), batch[1]
        )

    return Problem([*trunk.layers, kinds, masks], losses, train, valid)


LONG = (16, 32, 64, 128)
TASKS: dict[str, Task] = {
    "digits-mlp": Task("image", digits_mlp),
    "digits-resnet": Task("image", digits_resnet),
    "shapes-cnn": Task("image", shapes_cnn),
    "cancer-mlp": Task("tabular", cancer_mlp, LONG),
    "wine-mlp": Task("tabular", wine_mlp, LONG),
    "mixture-mlp": Task("tabular", mixture_mlp, LONG),
    "diabetes-mlp": Task("regression", diabetes_mlp, LONG),
    "friedman-mlp": Task("regression", friedman_mlp, LONG),
    "char-gru": Task("language", char_gru),
    "char-transformer": Task("language", char_transformer),
    "char-mlp": Task("language", char_mlp),
    "text-origin": Task("text", text_origin, LONG),
    "tagging-gru": Task("tagging", tagging_gru),
    "tagging-conv": Task("tagging", tagging_conv),
    "shapes-segmentation": Task("segmentation", shapes_segmentation),
    "shapes-denoising": Task("reconstruction", shapes_denoising),
    "digits-autoencoder": Task("reconstruction", digits_autoencoder, LONG),
    "digits-siamese": Task("metric", digits_siamese, LONG),
    "digits-adversarial": Task("adversarial", digits_adversarial),
    "rating-factors": Task("factorisation", rating_factors, LONG),
    "shapes-multitask": Task("multitask", shapes_multitask, LONG),
}
