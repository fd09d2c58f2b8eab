"""What every selection takes and returns: budgets, classes, checked inputs, sorted indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SCOPES = ("global", "class")

# (indices of the candidates, how many) -> which of them, as positions in the first argument.
Pick = Callable[[Tensor, int], Tensor]


class Selection(NamedTuple):
    """A chosen subset of n samples.

    Attributes:
        indices: [k], int64, ascending, without repetition.
        weights: [k], float64, in the order of `indices`; None where the method defines none.
    """

    indices: Tensor
    weights: Tensor | None = None


def resolve_budget(n: int, fraction: float | None, budget: int | None) -> int:
    """How many of n samples to take: `budget`, or `fraction` of n, rounded half to even.

    Raises:
        ValueError: neither or both are given, or what is given selects none or more than there are.
        TypeError: `budget` is not an int.
    """
    if (fraction is None) == (budget is None):
        raise ValueError(
            f"give either fraction or budget, got fraction={fraction!r} and budget={budget!r}"
        )
    if budget is not None:
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(f"budget must be an int, got {budget!r}; for a share use fraction=")
        if not 1 <= budget <= n:
            raise ValueError(f"budget must be between 1 and the {n} samples, got {budget}")
        return budget
    if fraction is None or not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction!r}")
    count = round(n * fraction)
    if count == 0:
        raise ValueError(f"fraction={fraction!r} of {n} samples rounds to none; use budget=1")
    return count


def matrix(name: str, value: Tensor, rows: int | None = None, runs: bool = False) -> Tensor:
    """`value` as [n, d] (or [runs, n, d]), checked; further dimensions are flattened into d.

    Raises:
        TypeError: not a tensor of floating-point numbers.
        ValueError: no samples, another number of them than `rows`, or NaN or inf.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    wanted = "[n, ...] or [runs, n, classes]" if runs else "[n, ...]"
    if value.dim() < 2 or value.numel() == 0:
        raise ValueError(f"{name} must be {wanted} and not empty, got shape {tuple(value.shape)}")
    value = value.detach()
    if not (runs and value.dim() == 3):
        value = value.flatten(1)
    if rows is not None and value.shape[-2] != rows:
        raise ValueError(f"{name} has {value.shape[-2]} rows, but there are {rows} samples")
    refuse_nonfinite(name, value)
    return value


def refuse_nonfinite(name: str, value: Tensor) -> None:
    """Raises ValueError with the first row that holds NaN or inf."""
    if bool(torch.isfinite(value.sum(dtype=torch.float64))):
        return  # one pass without a mask; an overflow of finite values falls through to the mask
    bad = ~value.isfinite().all(-1)
    if bool(bad.any()):
        row = bad.nonzero()[0].tolist()
        raise ValueError(f"{name} holds NaN or inf, first in row {row[-1]}; remove such samples")


def vector(name: str, value: Tensor, allow_inf: bool = False) -> Tensor:
    """Scores as [n], float64, checked: not empty, no NaN, and no infinity unless allowed."""
    if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() == 0:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor [n] and not empty, got {shape}")
    value = value.detach().double()
    bad = value.isnan() if allow_inf else ~value.isfinite()
    if bool(bad.any()):
        what = "NaN" if allow_inf else "NaN or inf"
        raise ValueError(f"{name} holds {what}, first at index {int(bad.nonzero()[0])}")
    return value


def class_numbers(labels: Tensor, n: int, device: torch.device) -> tuple[Tensor, int]:
    """Labels as [n] int64 in 0..C-1 without gaps, in the order of the labels' values; and C.

    Raises:
        TypeError: labels are not integers.
        ValueError: they are not [n].
    """
    check_labels("labels", labels, n)
    values, inverse = torch.unique(labels.to(device), return_inverse=True)
    return inverse, len(values)


def check_labels(name: str, labels: Tensor, n: int, num_classes: int | None = None) -> None:
    """Raises TypeError or ValueError unless labels are [n] integers, in 0..num_classes-1."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}; use {name}.long()")
    if labels.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), got {tuple(labels.shape)}")
    if num_classes is not None:
        bad = (labels < 0) | (labels >= num_classes)
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} must be in 0..{num_classes - 1}, one per column of the logits; "
                f"{name}[{at}] is {int(labels[at])}"
            )


def class_shares(sizes: list[int], count: int) -> list[int]:
    """Divides `count` over classes in proportion to `sizes`, by largest remainder.

    Classes that would get nothing take one from the class with most, as long as one has two: a
    small class without a representative has no neighbour of its own in a broadcast. Ties go to the
    class that comes first.
    """
    n = sum(sizes)
    shares = [count * size // n for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda c: -(count * sizes[c] % n))
    for c in by_remainder[: count - sum(shares)]:
        shares[c] += 1
    for c, share in enumerate(shares):
        richest = max(range(len(shares)), key=lambda other: shares[other])
        if share == 0 and shares[richest] > 1:
            shares[richest] -= 1
            shares[c] = 1
    return shares


def check_scope(scope: str, labels: Tensor | None) -> None:
    """Raises ValueError for an unknown scope, or for scope="class" without labels."""
    check_choice("scope", scope, SCOPES)
    if scope == "class" and labels is None:
        raise ValueError('scope="class" needs labels; pass them, or use scope="global"')


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def pick_in_scope(
    n: int, count: int, labels: Tensor | None, scope: str, device: torch.device, pick: Pick
) -> Tensor:
    """`count` indices, ascending: picked from all n samples, or a share of it from each class."""
    check_scope(scope, labels)
    if labels is not None:  # wrong labels are an error whether they are used or not
        numbers, num_classes = class_numbers(labels, n, device)
    if scope == "global":
        return pick(torch.arange(n, device=device), count).sort().values
    members = [(numbers == c).nonzero().squeeze(1) for c in range(num_classes)]
    shares = class_shares([len(m) for m in members], count)
    picked = [m[pick(m, k)] for m, k in zip(members, shares, strict=True) if k]
    return torch.cat(picked).sort().values


def top(scores: Tensor, count: int, largest: bool = True) -> Tensor:
    """Positions of the `count` largest (smallest) scores; among equal ones the first positions."""
    return scores.sort(descending=largest, stable=True).indices[:count]
