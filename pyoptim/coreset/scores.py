"""Selections by one score per sample: random, uncertainty, EL2N, GraNd, forgetting events."""

from __future__ import annotations

import torch
from torch import Tensor

from pyoptim.coreset.selection import (
    Selection,
    check_choice,
    check_labels,
    matrix,
    pick_in_scope,
    resolve_budget,
    top,
    vector,
)

UNCERTAINTIES = ("least_confidence", "entropy", "margin")
KEEPS = ("highest", "lowest")


def random(
    data: Tensor,
    labels: Tensor | None = None,
    *,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    generator: torch.Generator | None = None,
) -> Selection:
    """A uniformly random subset, without replacement.

    Args:
        data: [n, ...]; only n is used.
        labels: [n], integers; needed for scope="class".
        fraction: share of the samples, in (0, 1]; or
        budget: number of samples.
        scope: "global", or "class": every class in proportion to its size, and at least once where
            the budget allows.
        generator: a generator on the CPU; None is torch's default one.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    if not isinstance(data, Tensor) or data.dim() == 0 or len(data) == 0:
        raise ValueError(f"data must be a tensor [n, ...] and not empty, got {data!r}")
    count = resolve_budget(len(data), fraction, budget)

    def pick(members: Tensor, k: int) -> Tensor:
        return torch.randperm(len(members), generator=generator)[:k].to(members.device)

    return Selection(pick_in_scope(len(data), count, labels, scope, data.device, pick))


def by_score(
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    keep: str = "highest",
) -> Selection:
    """The samples with the highest (or lowest) scores; among equal ones the first.

    Args:
        scores: [n]; infinities are allowed, NaN is not.
        labels, fraction, budget, scope: as for `random`.
        keep: "highest" or "lowest".

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    scores = vector("scores", scores, allow_inf=True)
    check_choice("keep", keep, KEEPS)
    count = resolve_budget(len(scores), fraction, budget)

    def pick(members: Tensor, k: int) -> Tensor:
        return top(scores[members], k, largest=keep == "highest")

    return Selection(pick_in_scope(len(scores), count, labels, scope, scores.device, pick))


def uncertainty_scores(logits: Tensor, kind: str = "least_confidence") -> Tensor:
    """How uncertain each prediction is; [n], float64, larger is less certain.

        least_confidence: 1 - max p;  entropy: -sum p log p;  margin: 1 - (p of the first - second)

    Args:
        logits: [n, classes], before the softmax; at least 2 classes for "margin".
        kind: "least_confidence", "entropy" or "margin".

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: Settles, Active learning literature survey (2009), section 3.1.
    """
    check_choice("kind", kind, UNCERTAINTIES)
    log_p = matrix("logits", logits).double().log_softmax(1)
    if kind == "least_confidence":
        return -log_p.amax(1).expm1()  # 1 - p without cancelling for p near 1
    if kind == "entropy":
        return -(log_p.exp() * log_p).sum(1)
    if log_p.shape[1] < 2:
        raise ValueError(f"a margin needs two classes, got logits of shape {tuple(log_p.shape)}")
    first, second = log_p.topk(2, dim=1).values.unbind(1)
    return -first.expm1() + second.exp()


def uncertainty(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    kind: str = "least_confidence",
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
) -> Selection:
    """The samples with the least certain predictions, the same ones in either scope's order.

    Args:
        logits, kind: as for `uncertainty_scores`.
        labels, fraction, budget, scope: as for `random`.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    scores = uncertainty_scores(logits, kind)
    return by_score(scores, labels, fraction=fraction, budget=budget, scope=scope)


def error_vectors(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(logits) - onehot(labels), the gradient of cross-entropy; float64, as logits' shape.

    Args:
        logits: [n, classes] or [runs, n, classes].
        labels: [n], integers in 0..classes-1.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    log_p = matrix("logits", logits, runs=True).double().log_softmax(-1)
    n, num_classes = log_p.shape[-2:]
    check_labels("labels", labels, n, num_classes)
    index = labels.to(log_p.device, torch.int64)[:, None].expand(*log_p.shape[:-1], 1)
    # expm1: p - 1 cancels for samples that are fitted well.
    return log_p.exp().scatter(-1, index, log_p.gather(-1, index).expm1())


def el2n_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """||softmax(logits) - onehot(label)||, averaged over runs; [n], float64.

    Args, raises: as for `error_vectors`; runs are networks trained for a few epochs from different
    seeds (the source takes 10).

    Source: Paul, Ganguli and Dziugaite, arXiv:2107.07075, definition 2.3.
    """
    return _mean_over_runs(error_vectors(logits, labels).norm(dim=-1))


def grand_scores(features: Tensor, logits: Tensor, labels: Tensor, *, bias: bool = True) -> Tensor:
    """Norm of the loss gradient of the last layer, averaged over runs; [n], float64.

    The gradient is the outer product of e = softmax - onehot and [h, 1], so its norm is
    ||e|| * sqrt(||h||^2 + 1), without the n x classes x (d + 1) matrix.

    Args:
        features: inputs h of the last layer; [n, d], or [runs, n, d] if the logits have runs.
        logits, labels: as for `el2n_scores`.
        bias: whether the last layer has one (the 1 in the formula).

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: Paul, Ganguli and Dziugaite, arXiv:2107.07075, definition 2.1, for the last layer.
    """
    errors = error_vectors(logits, labels)
    inputs = matrix("features", features, rows=errors.shape[-2], runs=errors.dim() == 3)
    if errors.shape[:-1] != inputs.shape[:-1]:
        raise ValueError(
            f"features must have the runs and samples of the logits, {tuple(errors.shape[:-1])}; "
            f"got {tuple(inputs.shape[:-1])}"
        )
    square = inputs.double().square().sum(-1) + float(bias)
    return _mean_over_runs(errors.norm(dim=-1) * square.sqrt())


def _mean_over_runs(scores: Tensor) -> Tensor:
    return scores.mean(0) if scores.dim() == 2 else scores


def el2n(
    logits: Tensor,
    labels: Tensor,
    *,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    keep: str = "highest",
) -> Selection:
    """The samples with the highest `el2n_scores`, the hard ones, or the lowest.

    Args:
        logits, labels: as for `el2n_scores`.
        fraction, budget, scope, keep: as for `by_score`.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    scores = el2n_scores(logits, labels)
    return by_score(scores, labels, fraction=fraction, budget=budget, scope=scope, keep=keep)


def grand(
    features: Tensor,
    labels: Tensor,
    *,
    logits: Tensor,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    keep: str = "highest",
    bias: bool = True,
) -> Selection:
    """The samples with the highest (or lowest) `grand_scores`.

    Args:
        features, logits, labels, bias: as for `grand_scores`.
        fraction, budget, scope, keep: as for `by_score`.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    scores = grand_scores(features, logits, labels, bias=bias)
    return by_score(scores, labels, fraction=fraction, budget=budget, scope=scope, keep=keep)


class ForgettingCounter:
    """Counts, while a network trains, how often each sample turns from right to wrong.

    Args:
        n: number of samples.
        device: where the counts are kept.

    Attributes:
        events: [n], int64: right at one presentation and wrong at the next.
        is_learned: [n], bool: right at least once.

    Source: Toneva et al., arXiv:1812.05159, section 3.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n!r}")
        self.events = torch.zeros(n, dtype=torch.int64, device=device)
        self.is_learned = torch.zeros(n, dtype=torch.bool, device=device)
        self._was_right = torch.zeros(n, dtype=torch.bool, device=device)

    @torch.no_grad()
    def update(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Notes the predictions of one batch, made before or during its training step.

        Args:
            indices: [b], int64, the samples of the batch, none of them twice.
            logits: [b, classes].
            labels: [b], integers.

        Raises:
            ValueError, TypeError: an argument is not as described; nothing is counted then.
        """
        n = len(self.events)
        check_labels("indices", indices, len(logits), None)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n:
            raise ValueError(f"indices must be in 0..{n - 1}, got {indices.tolist()}")
        if len(torch.unique(indices)) != len(indices):
            raise ValueError("indices name a sample twice; its two presentations have no order")
        check_labels("labels", labels, len(logits))
        rows = indices.to(self.events.device, torch.int64)
        right = (logits.argmax(1) == labels.to(logits.device)).to(self.events.device)
        self.events[rows] += self._was_right[rows] & ~right
        self.is_learned[rows] |= right
        self._was_right[rows] = right

    def scores(self) -> Tensor:
        """[n], float64: the events; inf for samples that were never right, as in the source."""
        return self.events.double().masked_fill(~self.is_learned, float("inf"))

    def state_dict(self) -> dict[str, Tensor]:
        """All counts, for a checkpoint."""
        return {
            "events": self.events.clone(),
            "is_learned": self.is_learned.clone(),
            "was_right": self._was_right.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the counts of `state_dict` back.

        Raises:
            ValueError: they are of another number of samples.
        """
        if any(state[name].shape != self.events.shape for name in self.state_dict()):
            shape = tuple(state["events"].shape)
            raise ValueError(
                f"the state is of {shape} samples, this counter has {len(self.events)}"
            )
        self.events.copy_(state["events"])
        self.is_learned.copy_(state["is_learned"])
        self._was_right.copy_(state["was_right"])


def forgetting(
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    keep: str = "highest",
) -> Selection:
    """The samples that are forgotten most often; samples that were never learned come first.

    Args:
        scores: `ForgettingCounter.scores()`.
        labels, fraction, budget, scope, keep: as for `by_score`.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    return by_score(scores, labels, fraction=fraction, budget=budget, scope=scope, keep=keep)
