"""Training sets with wrong labels or rare classes, for `bench_cwerm`; its network and features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pyoptim
from pyoptim import coreset
from pyoptim.coreset import Training
from pyoptim.demo import Data

SETTINGS = ("noise", "imbalance")
NOISE, IMBALANCE = 0.4, 100.0
# Trusted samples per class, taken out of the training images: as Meta-Weight-Net's official code.
META_PER_CLASS = {"noise": 100, "imbalance": 10}
VALIDATION = 12  # one of so many training images is for validation, and never learnt
CODE = 64  # width of the auto-encoder's code


@dataclass(frozen=True, eq=False)
class Task:
    """One training set.

    Attributes:
        train: images and labels to learn.
        true: [n]; the labels before some were replaced.
        meta: trusted images and labels.
        validation, test: for measuring.
    """

    train: TensorDataset
    true: Tensor
    meta: TensorDataset
    validation: TensorDataset
    test: TensorDataset

    @property
    def images(self) -> Tensor:
        return self.train.tensors[0]

    @property
    def labels(self) -> Tensor:
        return self.train.tensors[1]


def make_task(data: Data, setting: str, seed: int, samples: int) -> Task:
    """Splits off validation and meta set, then spoils the rest: wrong labels, or rare classes."""
    generator = torch.Generator().manual_seed(seed)
    n = len(data.train_labels)
    order = torch.randperm(n, generator=generator)
    held, order = order[: n // VALIDATION], order[n // VALIDATION :]
    labels = data.train_labels[order]
    # With few images, no more than a fifth of a class is trusted.
    per_class = min(META_PER_CLASS[setting], int(labels.bincount().min()) // 5)
    is_meta = _rank_in_class(labels) < per_class
    meta, order = order[is_meta], order[~is_meta]
    if setting == "imbalance":
        order = order[_is_kept(data.train_labels[order], samples)]
    order = order[:samples]
    true = data.train_labels[order]
    given = _with_noise(true, generator) if setting == "noise" else true
    return Task(
        TensorDataset(data.train_images[order], given),
        true,
        TensorDataset(data.train_images[meta], data.train_labels[meta]),
        TensorDataset(data.train_images[held], data.train_labels[held]),
        TensorDataset(data.test_images, data.test_labels),
    )


def _rank_in_class(labels: Tensor) -> Tensor:
    """[n]: the how-manieth of its class each sample is."""
    rank = torch.zeros_like(labels)
    for c in labels.unique().tolist():
        rank[labels == c] = torch.arange(int((labels == c).sum()))
    return rank


def _with_noise(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Of `NOISE` of the labels, uniform ones; a tenth of those are right by chance."""
    classes = int(labels.max()) + 1
    is_drawn = torch.rand(len(labels), generator=generator) < NOISE
    drawn = torch.randint(classes, (len(labels),), generator=generator)
    return torch.where(is_drawn, drawn, labels)


def _is_kept(labels: Tensor, samples: int) -> Tensor:
    """Class sizes in proportion to IMBALANCE^(-c/(C-1)), about `samples` in total."""
    sizes = labels.bincount()
    shape = IMBALANCE ** -torch.linspace(0, 1, len(sizes), dtype=torch.float64)
    largest = min(samples / float(shape.sum()), float((sizes / shape).min()))
    return _rank_in_class(labels) < (largest * shape).round().clamp(min=1)[labels]


def make_network(side: int) -> nn.Module:
    """Two convolutions with BatchNorm and one linear layer, side x side to 10."""
    layers: list[nn.Module] = []
    for i, o in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    left = math.ceil(math.ceil(side / 2) / 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * left**2, 10))


class AutoEncoder(nn.Module):
    """pixels - 256 - code - 256 - pixels; it sees no labels."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, CODE)
        )
        self.decoder = nn.Sequential(
            nn.ReLU(), nn.Linear(CODE, 256), nn.ReLU(), nn.Linear(256, pixels)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.encoder(x))
        return out


def make_features(task: Task, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Of the images to learn and of the meta set: pixels, or codes of an auto-encoder."""
    images, trusted = task.images, task.meta.tensors[0]
    if kind == "pixels":
        return images.flatten(1), trusted.flatten(1)
    training = Training(
        lambda: AutoEncoder(images[0].numel()),
        lambda params: pyoptim.Adam(params, lr=1e-3),
        epochs=3,
        loss_fn=lambda out, target: (out - target.flatten(1)).square().mean(1),
        seed=seed,
        progress=False,
    )
    model = coreset.train_weighted(TensorDataset(images, images), training)
    codes = [
        coreset.extract_features(model, x, layer="encoder", progress=False).features
        for x in (images, trusted)
    ]
    return codes[0], codes[1]
