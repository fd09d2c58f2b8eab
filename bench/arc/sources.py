"""Data that every machine with Python and scikit-learn has: (inputs, targets) as tensors."""

from __future__ import annotations

import functools
import io
import keyword
import math
import sysconfig
import tokenize
from pathlib import Path

import torch
from torch import Tensor

# Modules every CPython ships: sources of several authors and styles.
MODULES = ("argparse", "ast", "datetime", "doctest", "inspect", "mailbox", "pickle", "statistics")
VOCABULARY = 97  # printable ASCII and one for everything else
TAGS = 7
SHAPE_CLASSES = 6


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits: [1797, 64] in about -1..1, labels 0..9."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)


@functools.cache
def table(name: str) -> tuple[Tensor, Tensor]:
    """A data set bundled with scikit-learn; columns, and a real target, have mean 0 and std 1."""
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    target = torch.tensor(y)
    if name == "diabetes":
        target = _standard(target.float())
    return _standard(torch.tensor(x, dtype=torch.float32)), target


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6)


def friedman(rows: int, noise: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Friedman's first regression problem (1991): [rows, 10] uniform, target of std about 1."""
    x = torch.rand(rows, 10, generator=rng)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y = (y + 10 * x[:, 3] + 5 * x[:, 4] - 14.4) / 4.9
    return x, y + noise * torch.randn(rows, generator=rng)


def mixture(
    rows: int, columns: int, classes: int, spread: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two Gaussian clusters per class, [rows, columns], around centres of length about 1."""
    centres = torch.randn(2 * classes, columns, generator=rng) / math.sqrt(columns)
    cluster = torch.randint(2 * classes, (rows,), generator=rng)
    x = centres[cluster] + spread * torch.randn(rows, columns, generator=rng)
    return x * math.sqrt(columns), cluster % classes


def shapes(
    rows: int, size: int, noise: float, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy pictures of one shape: [rows, 1, size, size], mask of the shape, its class."""
    kind = torch.randint(SHAPE_CLASSES, (rows,), generator=rng)
    centre = size / 2 + (torch.rand(rows, 2, generator=rng) - 0.5) * size / 3
    radius = (size * (0.18 + 0.16 * torch.rand(rows, generator=rng))).reshape(-1, 1, 1)
    grid = torch.arange(size) + 0.5
    dy = grid.reshape(1, -1, 1) - centre[:, :1, None]
    dx = grid.reshape(1, 1, -1) - centre[:, 1:, None]
    distance, square = (dx * dx + dy * dy).sqrt(), torch.maximum(dx.abs(), dy.abs())
    masks = [
        distance <= radius,
        square <= radius,
        (distance <= radius) & (distance >= radius * 0.55),
        (square <= radius) & (torch.minimum(dx.abs(), dy.abs()) <= radius * 0.3),
        (dy <= radius) & (dy >= 2 * dx.abs() - radius),
        (dx.abs() + dy.abs() <= radius) | ((dx - dy).abs() <= 0.5),
    ]
    mask = torch.stack(masks, 1)[torch.arange(rows), kind].float().unsqueeze(1)
    level = 0.4 + 0.6 * torch.rand(rows, 1, 1, 1, generator=rng)
    return level * mask + noise * torch.randn(mask.shape, generator=rng), mask, kind


@functools.cache
def source_text(module: str) -> str:
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
    return path.read_text(encoding="utf-8")


@functools.cache
def characters(module: str) -> Tensor:
    """The characters of a module's source, as indices below VOCABULARY."""
    codes = torch.tensor([ord(c) for c in source_text(module)])
    printable = torch.where((codes >= 32) & (codes < 127), codes - 31, 0)
    return torch.where(codes == 10, VOCABULARY - 1, printable)


@functools.cache
def character_tags(module: str) -> Tensor:
    """What each character belongs to: blank, name, keyword, number, string, comment, operator."""
    text = source_text(module)
    starts = [0, *(i + 1 for i, c in enumerate(text) if c == "\n")]
    tags = torch.zeros(len(text), dtype=torch.int64)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        begin = starts[token.start[0] - 1] + token.start[1]
        tags[begin : begin + len(token.string)] = _tag(token)
    return tags


def _tag(token: tokenize.TokenInfo) -> int:
    if token.type == tokenize.NAME:
        return 2 if keyword.iskeyword(token.string) else 1
    kinds = {tokenize.NUMBER: 3, tokenize.STRING: 4, tokenize.COMMENT: 5, tokenize.OP: 6}
    return kinds.get(token.type, 0)


def windows(sequence: Tensor, length: int, rows: int, rng: torch.Generator) -> Tensor:
    """[rows] random first positions of windows of `length` in `sequence`."""
    return torch.randint(len(sequence) - length, (rows,), generator=rng)


def cut(sequence: Tensor, starts: Tensor, length: int) -> Tensor:
    """[len(starts), length]: the windows of `sequence` that begin at `starts`."""
    return sequence[starts.unsqueeze(1) + torch.arange(length)]


def ratings(rows: int, rank: int, noise: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """[rows, 2] of (user < 120, item < 100) and ratings of a low-rank matrix, std about 1."""
    users = torch.randn(120, rank, generator=rng)
    items = torch.randn(100, rank, generator=rng)
    pairs = torch.stack(
        [torch.randint(120, (rows,), generator=rng), torch.randint(100, (rows,), generator=rng)], 1
    )
    clean = (users[pairs[:, 0]] * items[pairs[:, 1]]).sum(1) / math.sqrt(rank)
    return pairs, clean + noise * torch.randn(rows, generator=rng)
