"""The three kinds of task: data, network, loss and metric of each, with the paper's lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from . import data, folder
from .data import IGNORED, Data


@dataclass(frozen=True)
class Task:
    """One kind of task.

    Args:
        title, metric_name: for tables and plots.
        default: makes the data that need no download, in about so many steps per epoch.
        paper: reads the paper's data from a folder.
        network: for the data.
        loss, metric: of the network's outputs and the targets.
        epochs, steps: the paper's: of a training, and of an epoch.
        per_epoch: the schedule moves after each epoch, not after each step.
        figures: table 1 of the paper, by optimizer and schedule.
        paper_data: what the paper calls its data and network.
    """

    title: str
    metric_name: str
    default: Callable[[int], Data]
    paper: Callable[[Path], Data]
    network: Callable[[Data], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], float]
    epochs: int
    steps: int
    per_epoch: bool
    figures: dict[str, tuple[float, float, float]]
    paper_data: str

    def load(self, root: Path | None) -> Data:
        """Raises: folder.FolderError where the paper's data are asked for and not there."""
        return self.default(self.steps) if root is None else self.paper(root)


# -- tables ----------------------------------------------------------------------------------------


def perceptron(shape: Data) -> nn.Module:
    """The paper's four linear layers; the sigmoid is in the loss."""
    return nn.Sequential(
        *(nn.Linear(shape.inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
        *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0)),
    )


def binary_accuracy(outputs: Tensor, targets: Tensor) -> float:
    return ((outputs > 0) == (targets > 0)).double().mean().item()


# -- tagging ---------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """[n, length, 3] entries of a vocabulary to [n, length, tags].

    Dilated convolutions that see 14 words to either side (Strubell et al., arXiv:1702.02098).
    """

    def __init__(self, vocabulary: int, tags: int, width: int = 64) -> None:
        super().__init__()
        self.enter = nn.Embedding(vocabulary, width, padding_idx=0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, 5, padding=2 * d, dilation=d) for d in (1, 2, 4)
        )
        self.dropout = nn.Dropout(0.1)
        self.leave = nn.Linear(width, tags)

    def forward(self, words: Tensor) -> Tensor:
        x = self.dropout(self.enter(words).sum(2)).transpose(1, 2)
        for convolution in self.convolutions:
            x = x + F.relu(convolution(x))
        return self.leave(x.transpose(1, 2))


def tagger(shape: Data) -> nn.Module:
    return Tagger(shape.inputs, shape.outputs)


def tag_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def entities(tags: list[int]) -> set[tuple[int, int, int]]:
    """(first, end, kind) of every entity in one sentence.

    Tag 0 is outside, 2k + 1 begins an entity of kind k, 2k + 2 goes on with one; where there is
    none of this kind to go on with, it begins one, as in the evaluation of CoNLL.
    """
    found, first, kind = set(), 0, -1
    for i, tag in enumerate([*tags, 0]):
        goes_on = tag > 0 and tag % 2 == 0 and (tag - 1) // 2 == kind
        if goes_on:
            continue
        if kind >= 0:
            found.add((first, i, kind))
        first, kind = i, (tag - 1) // 2 if tag > 0 else -1
    return found


def entity_f1(outputs: Tensor, targets: Tensor) -> float:
    """F1 over whole entities: all of its words and the kind have to be right."""
    right = predicted = expected = 0
    for guess, target in zip(outputs.argmax(-1).tolist(), targets.tolist(), strict=True):
        length = target.index(IGNORED) if IGNORED in target else len(target)
        ours, true = entities(guess[:length]), entities(target[:length])
        right, predicted, expected = (
            right + len(ours & true),
            predicted + len(ours),
            expected + len(true),
        )
    return 2 * right / (predicted + expected) if predicted + expected else 1.0


# -- images ----------------------------------------------------------------------------------------


def image_network(shape: Data) -> nn.Module:
    """Three convolutions with BatchNorm, images of any size to their classes."""
    layers: list[nn.Module] = []
    for i, o, stride in ((shape.inputs, 16, 2), (16, 32, 2), (32, 64, 1)):
        layers += [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    ends = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, shape.outputs)
    return nn.Sequential(*layers, *ends)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.argmax(-1) == targets).double().mean().item()


# Linear, polynomial, cosine.
TASKS: dict[str, Task] = {
    "tabular": Task(
        *("tabular classification", "accuracy", data.functions, folder.credit_card),
        *(perceptron, F.binary_cross_entropy_with_logits, binary_accuracy),
        *(5, 12, True),
        {
            "AdamW": (0.781, 0.781, 0.781),
            "RMSprop": (0.778, 0.777, 0.781),
            "Adagrad": (0.635, 0.768, 0.669),
        },
        "credit default",
    ),
    "tagging": Task(
        *("sequence tagging", "F1", data.names, folder.conll2003),
        *(tagger, tag_loss, entity_f1),
        *(8, 94, False),
        {
            "AdamW": (0.905, 0.904, 0.900),
            "RMSprop": (0.901, 0.897, 0.900),
            "Adagrad": (0.896, 0.891, 0.896),
        },
        "CoNLL-2003, distilroberta-base",
    ),
    "images": Task(
        *("image classification", "accuracy", data.pictures, folder.ham10000),
        *(image_network, F.cross_entropy, accuracy),
        *(6, 120, False),
        {
            "AdamW": (0.747, 0.732, 0.756),
            "RMSprop": (0.710, 0.703, 0.706),
            "Adagrad": (0.700, 0.700, 0.700),
        },
        "HAM10000, MobileViTv2",
    ),
}


@functools.cache
def load(task: str, root: Path | None) -> Data:
    """Once per process."""
    return TASKS[task].load(root)
