"""Four tasks that differ in architecture: data, network, loss and metric of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arc import sources
from ..study import data
from ..study.data import Data, Part
from ..study.tasks import accuracy, binary_accuracy, image_network, perceptron

LENGTH = 32  # characters that a network sees at once
TRAIN_MODULES = ("argparse", "ast", "datetime", "inspect", "mailbox", "pickle")
VALID_MODULES, TEST_MODULES = ("doctest",), ("statistics",)


@dataclass(frozen=True)
class Task:
    """One kind of task.

    Args:
        title, metric_name: for tables and plots.
        make: the data.
        network: for the data.
        loss, metric: of the network's outputs and the targets.
        epochs: of a training.
    """

    title: str
    metric_name: str
    make: Callable[[], Data]
    network: Callable[[Data], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], float]
    epochs: int


# -- text ------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """[n, length] characters to [n, length, characters], each from those before it."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.enter = nn.Embedding(sources.VOCABULARY, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        # On a CPU dropout everywhere takes as long as all the rest.
        self.drop = nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.leave = nn.Linear(width, sources.VOCABULARY)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.drop(self.enter(text) + self.places)
        x = self.layers(x, self.mask, is_causal=True)
        return self.leave(x)


class Recurrent(nn.Module):
    """[n, length] characters to [n, length, tags], by a GRU in both directions."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.enter = nn.Embedding(sources.VOCABULARY, 24)
        self.gru = nn.GRU(24, width, batch_first=True, bidirectional=True)
        self.leave = nn.Linear(2 * width, sources.TAGS)

    def forward(self, text: Tensor) -> Tensor:
        return self.leave(self.gru(self.enter(text))[0])


def next_characters() -> Data:
    """Sources of Python's standard library; the targets are the characters one place later."""

    def part(modules: tuple[str, ...], rows: int) -> Part:
        found = [_windows(sources.characters(m), LENGTH + 1, rows // len(modules)) for m in modules]
        text = torch.cat(found)
        return text[:, :-1], text[:, 1:]

    return _texts("characters of Python code", part, batch=16, rows=(1600, 200, 600))


def token_kinds() -> Data:
    """What each character of Python code belongs to: name, keyword, number, string, comment..."""

    def part(modules: tuple[str, ...], rows: int) -> Part:
        found = [
            (
                _windows(sources.characters(m), LENGTH, n),
                _windows(sources.character_tags(m), LENGTH, n),
            )
            for m in modules
            for n in [rows // len(modules)]
        ]
        x, y = zip(*found, strict=True)
        return torch.cat(x), torch.cat(y)

    return _texts("kinds of tokens in Python code", part, batch=32, rows=(3200, 200, 600))


def _windows(sequence: Tensor, length: int, rows: int) -> Tensor:
    rng = torch.Generator().manual_seed(len(sequence))
    return sources.cut(sequence, sources.windows(sequence, length, rows, rng), length)


def _texts(
    name: str,
    part: Callable[[tuple[str, ...], int], Part],
    batch: int,
    rows: tuple[int, int, int],
) -> Data:
    modules = (TRAIN_MODULES, VALID_MODULES, TEST_MODULES)
    parts = [part(m, n) for m, n in zip(modules, rows, strict=True)]
    return Data(name, *parts, inputs=sources.VOCABULARY, outputs=sources.TAGS, batch=batch)


def sequence_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


# -- the list --------------------------------------------------------------------------------------


def table() -> Data:
    return replace(data.functions(100), batch=116)


TASKS: dict[str, Task] = {
    "table": Task(
        *("perceptron on a table", "accuracy", table, perceptron),
        *(F.binary_cross_entropy_with_logits, binary_accuracy, 6),
    ),
    "images": Task(
        *("CNN with BatchNorm on images", "accuracy", lambda: data.pictures(120), image_network),
        *(F.cross_entropy, accuracy, 5),
    ),
    "text": Task(
        *("transformer on text", "accuracy", next_characters, lambda _: Transformer()),
        *(sequence_loss, accuracy, 4),
    ),
    "sequences": Task(
        *("GRU on text", "accuracy", token_kinds, lambda _: Recurrent()),
        *(sequence_loss, accuracy, 4),
    ),
}


@functools.cache
def load(name: str) -> Data:
    """Once per process."""
    return TASKS[name].make()
