"""Tasks for judging a finished controller: other data and other architectures than in `tasks`."""

from __future__ import annotations

import functools
import gzip
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .compare import Metric
from .layers import Layer, Linear, Replicas, dropout
from .tasks import Batch, Problem, cross_entropy, squared_error

# Where Debian's package dataset-fashion-mnist puts the files.
FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Unseen:
    """A task of the comparison.

    Args:
        optimizer: one of `generate.OPTIMIZERS`.
        rates: initial rates that span a factor of 100; the constant rate survives the largest.
        epochs, steps, batch: length of a training, as in `generate.Cohort`.
        unit: what the metric is.
    """

    build: Callable[[], Problem]
    metric: Callable[[Problem], Metric]
    unit: str
    higher_is_better: bool
    optimizer: str
    rates: tuple[float, float, float]
    epochs: int
    steps: int
    batch: int


class MixerBlock(Layer):
    """[B, N, tokens, width] to the same: mixes tokens, then channels (arXiv:2105.01601)."""

    def __init__(self, name: str, tokens: int, width: int) -> None:
        super().__init__(name)
        self.tokens = Linear(f"{name}.tokens", tokens, tokens)
        self.up = Linear(f"{name}.up", width, 2 * width)
        self.down = Linear(f"{name}.down", 2 * width, width)
        self.shapes = {**self.tokens.shapes, **self.up.shapes, **self.down.shapes}

    def __call__(self, r: Replicas, x: Tensor) -> Tensor:
        mixed = self.tokens(r, F.layer_norm(x, x.shape[-1:]).transpose(-1, -2))
        x = x + F.gelu(mixed).transpose(-1, -2)
        return x + self.down(r, F.gelu(self.up(r, F.layer_norm(x, x.shape[-1:]))))


class LSTM(Layer):
    """[B, N, length, inputs] to the hidden states [B, N, length, width]."""

    def __init__(self, name: str, inputs: int, width: int) -> None:
        super().__init__(name)
        self.width = width
        self.inward = Linear(f"{name}.in", inputs, 4 * width)
        self.across = Linear(f"{name}.rec", width, 4 * width)
        self.shapes = {**self.inward.shapes, **self.across.shapes}

    def __call__(self, r: Replicas, x: Tensor) -> Tensor:
        h = c = x.new_zeros(*x.shape[:2], self.width)
        states = []
        for gates in self.inward(r, x).unbind(2):
            enter, forget, new, leave = (gates + self.across(r, h)).chunk(4, -1)
            c = torch.sigmoid(forget + 1) * c + torch.sigmoid(enter) * torch.tanh(new)
            h = torch.sigmoid(leave) * torch.tanh(c)
            states.append(h)
        return torch.stack(states, 2)


def _images(name: str) -> Tensor:
    path = FASHION / f"{name}-images-idx3-ubyte.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: install Debian's package dataset-fashion-mnist"
        )
    raw = bytearray(gzip.decompress(path.read_bytes()))
    return torch.frombuffer(raw, dtype=torch.uint8, offset=16).reshape(-1, 28, 28).float() / 255


def _labels(name: str) -> Tensor:
    raw = bytearray(gzip.decompress((FASHION / f"{name}-labels-idx1-ubyte.gz").read_bytes()))
    return torch.frombuffer(raw, dtype=torch.uint8, offset=8).long()


def _patches(images: Tensor) -> Tensor:
    """[rows, 28, 28] to 16 patches of 7 x 7: [rows, 16, 49]."""
    return images.unflatten(1, (4, 7)).unflatten(3, (4, 7)).transpose(2, 3).flatten(3).flatten(1, 2)


def fashion_mixer() -> Problem:
    """Fashion-MNIST, 20 000 training and 1000 validation pictures, in a patch mixer."""
    enter, leave = Linear("enter", 49, 32), Linear("leave", 32, 10)
    blocks = [MixerBlock(f"block{i}", 16, 32) for i in range(2)]

    def logits(r: Replicas, x: Tensor) -> Tensor:
        x = enter(r, x)
        for block in blocks:
            x = block(r, x)
        return leave(r, x.mean(2))

    train = (_patches(_images("train")[:20000]), _labels("train")[:20000])
    valid = (_patches(_images("t10k")[:1000]), _labels("t10k")[:1000])
    return Classified([enter, *blocks, leave], logits, train, valid)


class Classified(Problem):
    """A problem whose loss is the cross-entropy of `logits(replicas, x)`."""

    def __init__(
        self,
        layers: list[Layer],
        logits: Callable[[Replicas, Tensor], Tensor],
        train: Batch,
        valid: Batch,
    ) -> None:
        super().__init__(layers, lambda r, b: cross_entropy(logits(r, b[0]), b[1]), train, valid)
        object.__setattr__(self, "logits", logits)


def accuracy(problem: Problem) -> Metric:
    """Percent of the rows whose largest logit is that of their label."""
    logits: Callable[[Replicas, Tensor], Tensor] = problem.logits  # type: ignore[attr-defined]

    def metric(r: Replicas, batch: Batch) -> Tensor:
        right = logits(r, batch[0]).argmax(-1) == batch[1]
        return 100 * right.float().mean(1)

    return metric


@functools.cache
def words(vocabulary: int) -> Tensor:
    """Python's help topics as word numbers; 0 is any word that is not among the most frequent."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    tokens = re.findall(r"\w+|[^\w\s]", text.lower())
    ranked = sorted(Counter(tokens).items(), key=lambda item: (-item[1], item[0]))
    numbers = {word: i for i, (word, _) in enumerate(ranked[: vocabulary - 1], 1)}
    return torch.tensor([numbers.get(token, 0) for token in tokens])


def words_lstm() -> Problem:
    """The next word of Python's help topics, vocabulary 600, windows of 12, dropout a half."""
    vocabulary, width, length = 600, 32, 13
    text = words(vocabulary)
    rows = text[: len(text) // length * length].reshape(-1, length)
    end = len(rows) * 9 // 10
    enter, lstm = Linear("enter", vocabulary, width), LSTM("lstm", width, 2 * width)
    leave = Linear("leave", 2 * width, vocabulary)

    def losses(r: Replicas, batch: Batch) -> Tensor:
        tokens = batch[0]
        offsets = torch.arange(r.count).mul_(vocabulary).reshape(-1, 1, 1)
        table = r.params["enter.w"].flatten(0, 1) * math.sqrt(vocabulary / 3)
        hidden = lstm(r, F.embedding(tokens[..., :-1] + offsets, table))
        return cross_entropy(leave(r, dropout(r, hidden, 0.5)), tokens[..., 1:])

    return Problem([enter, lstm, leave], losses, (rows[:end],), (rows[end:][:256],))


def perplexity(problem: Problem) -> Metric:
    return lambda r, batch: problem.losses(r, batch).exp()


def photo_coordinates() -> Problem:
    """A photograph as a function of place: sine network (arXiv:2006.09661), a tenth held out."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    small = F.avg_pool2d(image.float()[None] / 255, 4)[0]
    height, width = small.shape[1:]
    ys, xs = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    places, colours = torch.stack([ys, xs], -1).reshape(-1, 2), small.flatten(1).T
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    held, rest = order[:1500], order[len(order) // 10 :]
    layers = [Linear("first", 2, 48), Linear("second", 48, 48), Linear("third", 48, 3)]

    def losses(r: Replicas, batch: Batch) -> Tensor:
        x = torch.sin(15 * layers[0](r, batch[0]))
        x = torch.sin(3 * layers[1](r, x))
        return squared_error(layers[2](r, x), batch[1])

    return Problem(layers, losses, (places[rest], colours[rest]), (places[held], colours[held]))


def peak_signal_to_noise(problem: Problem) -> Metric:
    return lambda r, batch: -10 * problem.losses(r, batch).log10()


SOLIDS = 6


def solids(rows: int, points: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clouds of points on six surfaces, turned and stretched: [rows, points, 3], which surface."""
    kind = torch.randint(SOLIDS, (rows,), generator=rng)
    u, v, w = torch.rand(3, rows, points, generator=rng)
    around, height, side = 2 * math.pi * u, 2 * v - 1, (w > 0.5).float() * 2 - 1
    flat = (1 - height.square()).sqrt()
    ring = 0.7 + 0.3 * torch.cos(2 * math.pi * v)
    cube = torch.stack([2 * u - 1, height, side], -1)
    turned = torch.randint(3, (rows, points, 1), generator=rng)
    cube = cube.gather(-1, (torch.arange(3) + turned) % 3)

    def wound(radius: Tensor, z: Tensor) -> Tensor:
        return torch.stack([radius * torch.cos(around), radius * torch.sin(around), z], -1)

    surfaces = [
        wound(flat, height),  # sphere
        cube,
        wound(torch.ones_like(u), height),  # cylinder
        wound((1 - height) / 2, height),  # cone
        wound(ring, 0.3 * torch.sin(2 * math.pi * v)),  # torus
        wound(v, 1.5 * (2 * u - 1)),  # spiral stair
    ]
    cloud = torch.stack(surfaces, 1)[torch.arange(rows), kind]
    cloud = cloud * (0.6 + 0.8 * torch.rand(rows, 1, 3, generator=rng))
    turn = torch.linalg.qr(torch.randn(rows, 3, 3, generator=rng)).Q
    return cloud @ turn + 0.05 * torch.randn(cloud.shape, generator=rng), kind


def solids_pointnet() -> Problem:
    """Which surface 24 noisy points are from: one network for every point, then the largest."""
    rng = torch.Generator().manual_seed(0)
    clouds, kinds = solids(5000, 24, rng)
    layers = [Linear("first", 3, 32), Linear("second", 32, 64)]
    layers += [Linear("third", 64, 32), Linear("leave", 32, SOLIDS)]

    def logits(r: Replicas, x: Tensor) -> Tensor:
        x = F.relu(layers[1](r, F.relu(layers[0](r, x)))).amax(2)
        return layers[3](r, F.relu(layers[2](r, x)))

    return Classified(
        list(layers), logits, (clouds[:4000], kinds[:4000]), (clouds[4000:], kinds[4000:])
    )


UNSEEN: dict[str, Unseen] = {
    "fashion-mixer": Unseen(
        *(fashion_mixer, accuracy, "accuracy, %", True),
        *("adam", (1e-2, 1e-3, 1e-4), 28, 40, 16),
    ),
    "words-lstm": Unseen(
        *(words_lstm, perplexity, "perplexity", False),
        *("momentum", (1.0, 0.1, 0.01), 28, 30, 16),
    ),
    "solids-pointnet": Unseen(
        *(solids_pointnet, accuracy, "accuracy, %", True),
        *("sgd", (0.3, 0.03, 0.003), 28, 40, 32),
    ),
    "photo-coordinates": Unseen(
        *(photo_coordinates, peak_signal_to_noise, "PSNR, dB", True),
        *("rmsprop", (1e-2, 1e-3, 1e-4), 28, 40, 128),
    ),
}
