"""Data on which a search for neighbours can go wrong, and what it has to find."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def normal(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator).to(dtype)


def _integers(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (n, d), generator=generator).float()


def _clusters() -> Pair:
    centers = normal(8, 24, 0) * 1e4
    y = centers[torch.arange(140) % 8] + normal(140, 24, 1) * 1e-2
    return centers[torch.arange(30) % 8] + normal(30, 24, 2) * 1e-2, y


def _last_bits(scale: float) -> Pair:
    """Every row of y is the same but for its last bits."""
    base, ulps = normal(1, 48, 3), (normal(60, 48, 4) * 4).round()
    y = base * (1 + ulps * 2.0**-23) * scale
    x = normal(20, 48, 5) * scale
    x[:10] = y[:10] + scale * 1e-6
    return x, y


def _outlier() -> Pair:
    x, y = normal(40, 20, 6), normal(150, 20, 7)
    y[7] *= 1e8
    x[3] *= 1e12
    return x, y


def _infinite() -> Pair:
    x, y = normal(20, 12, 8), normal(140, 12, 9)
    y[0, 3], y[9] = torch.inf, -torch.inf
    x[4, 2] = torch.inf
    return x, y


def _huge() -> Pair:
    return normal(20, 9, 10) * 1e25, normal(50, 9, 11) * 1e25


# x and y by name: shifted data, large norms, ties, values that no product of float32 can hold.
HARD: dict[str, Callable[[], Pair]] = {
    "offset": lambda: (normal(40, 40, 1) + 1e3, normal(150, 40, 2) + 1e3),
    "far clusters": _clusters,
    "last bits": lambda: _last_bits(1.0),
    "last bits of tiny numbers": lambda: _last_bits(1e-25),
    "outliers": _outlier,
    "ties": lambda: (_integers(40, 3, 1), _integers(200, 3, 2)),
    "equal rows": lambda: (normal(20, 5, 1), torch.full((200, 5), 0.3)),
    "infinite": _infinite,
    "huge": _huge,
    # Every value of the filter is positive, and a tile lacks one column: it would be the nearest.
    "amid": lambda: (normal(20, 24, 1) * 0.05, normal(127, 24, 2)),
    "zeros": lambda: (torch.zeros(5, 40), torch.zeros(130, 40)),
    "many magnitudes": lambda: (
        normal(30, 20, 1) * 2.0 ** (normal(30, 20, 2) * 30).round(),
        normal(140, 20, 3) * 2.0 ** (normal(140, 20, 4) * 30).round(),
    ),
}
