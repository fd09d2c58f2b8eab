"""From the files of `generate` to labelled points: windows, labels, soft targets."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyoptim.arc import MAX_CYCLES, features

RAISE, KEEP, LOWER = range(3)


@dataclass(frozen=True)
class Points:
    """Labelled points, [points] or [points, ...] each.

    Args:
        windows: [points, 300, 3], what the controller sees.
        cycles: finished cycles in the window, 1 to 3.
        losses: [points, 3], validation loss at the end of the raise, keep and lower branch; inf
            where it is not finite.
        repeats: validation loss of the followed branch when it was trained again.
        followed: which branch that was.
        labels: the best branch, corrected by the repeat (section 3.3).
        raw_labels: the best branch.
        soft: [points, 3], the probability that each branch is the best, given the noise.
        runs: number of the run, unique over all files.
        tasks, families, optimizers: names.
        lrs: rate of the last cycle; rounds: cycles before it.
    """

    windows: Tensor
    cycles: Tensor
    losses: Tensor
    repeats: Tensor
    followed: Tensor
    labels: Tensor
    raw_labels: Tensor
    soft: Tensor
    runs: Tensor
    tasks: np.ndarray
    families: np.ndarray
    optimizers: np.ndarray
    lrs: Tensor
    rounds: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, where: Tensor) -> Points:
        """The points at a mask or at indices."""
        parts = vars(self).items()
        return Points(
            **{k: v[where.numpy() if isinstance(v, np.ndarray) else where] for k, v in parts}
        )


def order(losses: Sequence[float]) -> list[int]:
    """Branches from best to worst; one that is not finite is the worst, equals keep their order."""
    return sorted(range(3), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)


def label(losses: Sequence[float]) -> int:
    """The best branch; "lower" if none survived."""
    return order(losses)[0] if any(map(math.isfinite, losses)) else LOWER


def corrected_label(losses: Sequence[float], followed: int, repeat: float) -> int:
    """The best branch, or "keep" if the repeat in its place changes the order of the three."""
    again = list(losses)
    again[followed] = repeat
    if not any(map(math.isfinite, losses)) or order(again) == order(losses):
        return label(losses)
    return KEEP


def noise_scale(final: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """Standard deviation of one branch's loss in each round of a run, [rounds].

    Half from the run's median difference between a followed branch and its repeat, half from the
    round's own difference. The median of |a - b| is 0.954 standard deviations of a.
    """
    gaps = np.abs(np.where(np.isfinite(final - repeats), final - repeats, np.inf))
    typical = np.median(gaps) / 0.954
    return np.sqrt((typical**2 + gaps**2 / 2) / 2)


def soft_target(losses: Sequence[float], sigma: float) -> list[float]:
    """softmax(-loss/sigma); all on one branch without noise, equal shares without information."""
    if not any(map(math.isfinite, losses)):
        return [0.0, 0.0, 1.0]
    best = min(x for x in losses if math.isfinite(x))
    if not math.isfinite(sigma):
        return [float(math.isfinite(x)) / sum(map(math.isfinite, losses)) for x in losses]
    gaps = [(x - best) / max(sigma, 1e-12) if math.isfinite(x) else math.inf for x in losses]
    weights = [math.exp(-gap) for gap in gaps]
    return [w / sum(weights) for w in weights]


def read_cohort(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return ast.literal_eval(str(arrays.pop("meta"))), arrays


def points_of_run(arrays: dict[str, np.ndarray], run: int) -> Iterator[dict[str, Any]]:
    """The points of one run whose history is finite, and whose loss was not yet blown up by it."""
    train, valid = arrays["train_losses"][run], arrays["val_losses"][run]
    lrs, followed = arrays["lrs"][run], arrays["followed"][run].astype(int)
    final, repeats = arrays["branch_losses"][run, :, :, -1], valid[1:, -1]
    sigmas = noise_scale(final[np.arange(len(final)), followed], repeats)
    for i in range(len(final)):
        past = slice(max(0, i + 1 - MAX_CYCLES), i + 1)
        if not (np.isfinite(train[past]).all() and np.isfinite(valid[past]).all()):
            return
        losses, chosen = final[i].tolist(), int(followed[i])
        averaged = list(losses)
        averaged[chosen] = (losses[chosen] + float(repeats[i])) / 2
        yield {
            "windows": features(train[past].ravel(), valid[past].ravel(), lrs[past]),
            "cycles": len(lrs[past]),
            "losses": [x if math.isfinite(x) else math.inf for x in losses],
            "repeats": float(repeats[i]),
            "followed": chosen,
            "labels": corrected_label(losses, chosen, float(repeats[i])),
            "raw_labels": label(losses),
            "soft": soft_target(averaged, float(sigmas[i])),
            "lrs": float(lrs[i]),
            "rounds": i,
        }


def load_points(folder: Path) -> Points:
    """All points of the finished cohorts in `folder`.

    Raises: FileNotFoundError if there are none.
    """
    rows: list[dict[str, Any]] = []
    runs = 0
    paths = sorted(folder.glob("cohort-*.npz"))
    if not paths:
        raise FileNotFoundError(
            f"no cohort-*.npz in {folder}; make them: python -m pyoptim.bench.arc generate "
            f"--folder {folder}"
        )
    for path in paths:
        meta, arrays = read_cohort(path)
        for run in range(len(arrays["lrs"])):
            names = {"tasks": meta["task"], "families": meta["family"]}
            names["optimizers"] = meta["optimizer"]
            rows += [{**row, **names, "runs": runs} for row in points_of_run(arrays, run)]
            runs += 1
    return _stacked(rows)


def _stacked(rows: list[dict[str, Any]]) -> Points:
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    parts: dict[str, Any] = {"windows": torch.stack(columns.pop("windows"))}
    for name, values in columns.items():
        parts[name] = np.array(values) if isinstance(values[0], str) else torch.tensor(values)
    return Points(**parts)
