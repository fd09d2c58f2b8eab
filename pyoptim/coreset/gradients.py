"""Selections by gradients of the last layer: CRAIG, facility location, GLISTER, GradMatch.

The gradient of the cross-entropy in the last layer is the outer product of e = softmax - onehot and
[h, 1], so <g_i, g_j> = <e_i, e_j> * (<h_i, h_j> + 1): classes + d numbers per sample instead of
classes * (d + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyoptim.coreset.progress import track
from pyoptim.coreset.scores import error_vectors
from pyoptim.coreset.selection import (
    Selection,
    check_choice,
    check_scope,
    class_numbers,
    class_shares,
    matrix,
    resolve_budget,
    top,
)

GREEDY = ("lazy", "stochastic")
# A distance matrix of a class up to this size is kept; beyond, columns are computed when asked for.
CACHE_BYTES = 1 << 28
_BLOCK_NUMBERS = 1 << 21  # float64 numbers of a block of columns
_LAZY_BATCH = 32  # stale bounds that are renewed together


class LastLayerGradients:
    """Gradients of n samples in the last layer, as factors; float64.

    Attributes:
        errors: [n, classes]; softmax - onehot.
        inputs: [n, d] or, with a bias, [n, d + 1], the last column 1.
    """

    def __init__(self, errors: Tensor, inputs: Tensor) -> None:
        self.errors, self.inputs = errors, inputs

    @classmethod
    def of(cls, features: Tensor, logits: Tensor, labels: Tensor, bias: bool) -> LastLayerGradients:
        """From the inputs [n, d] of the last layer, its outputs [n, classes] and the labels [n]."""
        if isinstance(logits, Tensor) and logits.dim() != 2:
            raise ValueError(f"logits must be [n, classes], got shape {tuple(logits.shape)}")
        errors = error_vectors(logits, labels)
        inputs = matrix("features", features, rows=len(errors)).double()
        if bias:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        return cls(errors, inputs)

    def __len__(self) -> int:
        return len(self.errors)

    def __getitem__(self, rows: Tensor) -> LastLayerGradients:
        return LastLayerGradients(self.errors[rows], self.inputs[rows])

    def products(self, rows: Tensor) -> Tensor:
        """[n, len(rows)]: inner products of all gradients with those of `rows`."""
        own = self.errors[rows], self.inputs[rows]
        return (self.errors @ own[0].T).mul_(self.inputs @ own[1].T)

    def sum(self) -> Tensor:
        """[classes, d]: the sum of all gradients."""
        return self.errors.T @ self.inputs

    def along(self, direction: Tensor) -> Tensor:
        """[n]: inner products of all gradients with one of [classes, d]."""
        return (self.inputs @ direction.T).mul_(self.errors).sum(1)

    def distances(self, rows: Tensor) -> Tensor:
        """[n, len(rows)]: Euclidean distances of all gradients to those of `rows`."""
        square = self.errors.square().sum(1) * self.inputs.square().sum(1)
        result = self.products(rows).mul_(-2.0).add_(square[:, None]).add_(square[rows])
        return _zero_self(result.clamp_(min=0.0).sqrt_(), rows)


class _Points:
    """Rows of a matrix, with the distances that facility location asks for."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.double()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor) -> _Points:
        return _Points(self.x[rows])

    def distances(self, rows: Tensor) -> Tensor:
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(self.x, self.x[rows], compute_mode=exact)


def _zero_self(distances: Tensor, rows: Tensor) -> Tensor:
    distances[rows, torch.arange(len(rows), device=rows.device)] = 0.0
    return distances


# -- facility location -----------------------------------------------------------------------------


@dataclass
class _Facility:
    """Greedy minimization of sum_i min_{j in S} distance(i, j) over one set of samples."""

    points: LastLayerGradients | _Points
    device: torch.device
    matrix: Tensor | None = None
    nearest: Tensor = field(init=False)  # [n]: distance to the selection

    def __post_init__(self) -> None:
        n = len(self.points)
        if 8 * n * n <= CACHE_BYTES:
            self.matrix = self.points.distances(torch.arange(n, device=self.device))

    def columns(self, rows: Tensor) -> Tensor:
        return self.points.distances(rows) if self.matrix is None else self.matrix[:, rows]

    def blocks(self) -> tuple[Tensor, ...]:
        n = len(self.points)
        every = torch.arange(n, device=self.device)
        return torch.split(every, max(1, _BLOCK_NUMBERS // n))

    def totals(self, rows: Tensor) -> Tensor:
        """[len(rows)]: sums of distances; the smallest is what greedy takes first."""
        return self.columns(rows).sum(0)

    def gains(self, rows: Tensor) -> Tensor:
        """[len(rows)]: by how much each would lower the sum."""
        return (self.nearest[:, None] - self.columns(rows)).clamp_(min=0.0).sum(0)

    def add(self, row: int) -> None:
        column = self.columns(torch.tensor([row], device=self.device)).squeeze(1)
        self.nearest = torch.minimum(self.nearest, column) if hasattr(self, "nearest") else column


def _lazy_greedy(facility: _Facility, k: int, progress: bool) -> list[int]:
    """Gains only fall, so an old gain is a bound: only the largest have to be renewed."""
    chosen = [int(torch.cat([facility.totals(b) for b in facility.blocks()]).argmin())]
    facility.add(chosen[0])
    if k == 1:
        return chosen
    bounds = torch.cat([facility.gains(block) for block in facility.blocks()])
    bounds[chosen[0]] = -1.0
    for _ in track(range(k - 1), "facility location", progress):
        is_fresh = torch.zeros_like(bounds, dtype=torch.bool)
        best = int(bounds.argmax())
        while not bool(is_fresh[best]):
            stale = top(bounds.masked_fill(is_fresh, -2.0), min(_LAZY_BATCH, len(bounds)))
            stale = stale[bounds[stale] >= 0.0]
            bounds[stale] = facility.gains(stale)
            is_fresh[stale] = True
            best = int(bounds.argmax())
        chosen.append(best)
        bounds[best] = -1.0
        facility.add(best)
    return chosen


def _stochastic_greedy(
    facility: _Facility, k: int, epsilon: float, generator: torch.Generator | None, progress: bool
) -> list[int]:
    """Looks at a random sample of (n/k) log(1/epsilon) candidates each time."""
    n = len(facility.points)
    is_free = torch.ones(n, dtype=torch.bool)
    size = max(1, math.ceil(n / k * math.log(1.0 / epsilon)))
    chosen: list[int] = []
    for _ in track(range(k), "facility location", progress):
        free = is_free.nonzero().squeeze(1)
        drawn = free[torch.randperm(len(free), generator=generator)[:size]].sort().values
        drawn = drawn.to(facility.device)
        at = facility.gains(drawn).argmax() if chosen else facility.totals(drawn).argmin()
        best = int(drawn[int(at)])
        chosen.append(best)
        is_free[best] = False
        facility.add(best)
    return chosen


def _facility_location(
    points: LastLayerGradients | _Points,
    device: torch.device,
    k: int,
    greedy: str,
    epsilon: float,
    generator: torch.Generator | None,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """(indices, cluster sizes), ascending."""
    facility = _Facility(points, device)
    if greedy == "lazy":
        chosen = _lazy_greedy(facility, k, progress)
    else:
        chosen = _stochastic_greedy(facility, k, epsilon, generator, progress)
    indices = torch.tensor(chosen, device=device).sort().values
    sizes = torch.zeros(k, dtype=torch.float64, device=device)
    owner = _owners(facility, indices)
    return indices, sizes.index_add_(0, owner, sizes.new_ones(len(owner)))


def _owners(facility: _Facility, indices: Tensor) -> Tensor:
    """[n]: which of the selected is nearest; the selected own themselves, else the first."""
    n = len(facility.points)
    best = torch.full((n,), float("inf"), dtype=torch.float64, device=indices.device)
    owner = torch.zeros(n, dtype=torch.int64, device=indices.device)
    step = max(1, _BLOCK_NUMBERS // n)
    for start in range(0, len(indices), step):
        values, at = facility.columns(indices[start : start + step]).min(1)
        owner = torch.where(values < best, at + start, owner)
        best = torch.minimum(best, values)
    owner[indices] = torch.arange(len(indices), device=indices.device)
    return owner


def _check_greedy(greedy: str, epsilon: float) -> None:
    check_choice("greedy", greedy, GREEDY)
    if not 0.0 < epsilon < 1.0:
        raise ValueError(f"epsilon must be above 0 and below 1, got {epsilon!r}")


def facility_location(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    greedy: str = "lazy",
    epsilon: float = 0.01,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Selection:
    """Greedily minimizes the sum of Euclidean distances of all samples to their nearest selected.

    Args:
        features: [n, ...], floating point, finite.
        labels: [n], integers; needed for scope="class".
        fraction: share of the samples, in (0, 1]; or
        budget: number of samples.
        scope: "global", or "class": within each class, shares in proportion to its size.
        greedy: "lazy" gives what plain greedy gives, and renews only the largest of the old
            gains; "stochastic" looks at (n/k) log(1/epsilon) random candidates each time.
        epsilon: for "stochastic": how far the expected value may fall below greedy's guarantee.
        generator: for "stochastic", on the CPU; None is torch's default one.
        progress: whether to show a bar.

    Returns: weights are cluster sizes, the number of samples nearest to each; they add up to n.

    Time: n^2 distances at least once ("lazy"); a distance matrix up to 256 MiB is kept. Computed in
    float64; of equal gains the first sample is taken.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: Minoux (1978) for "lazy"; Mirzasoleiman et al., arXiv:1409.7938, for "stochastic".
    """
    _check_greedy(greedy, epsilon)
    x = matrix("features", features)
    count = resolve_budget(len(x), fraction, budget)
    groups = _groups(len(x), count, labels, scope, x.device)
    points = _Points(x)

    def pick(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return _facility_location(points[rows], x.device, k, greedy, epsilon, generator, progress)

    return _select_weighted(groups, pick)


def craig(
    features: Tensor,
    labels: Tensor,
    *,
    logits: Tensor,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "class",
    greedy: str = "lazy",
    epsilon: float = 0.01,
    bias: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Selection:
    """CRAIG: facility location on the distances between gradients of the last layer.

    Args:
        features: [n, d], inputs of the last layer.
        labels: [n], integers in 0..classes-1.
        logits: [n, classes], outputs of the last layer.
        bias: whether the last layer has one.
        scope: "class" as in the source, or "global".
        fraction, budget, greedy, epsilon, generator, progress: as for `facility_location`.

    Returns: weights are cluster sizes, which add up to n: the step sizes of the selected samples.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: Mirzasoleiman, Bilmes and Leskovec, arXiv:1906.01827, algorithm 1 and section 3.4.
    """
    _check_greedy(greedy, epsilon)
    gradients = LastLayerGradients.of(features, logits, labels, bias)
    count = resolve_budget(len(gradients), fraction, budget)
    device = gradients.errors.device
    groups = _groups(len(gradients), count, labels, scope, device)

    def pick(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        own = gradients[rows]
        return _facility_location(own, device, k, greedy, epsilon, generator, progress)

    return _select_weighted(groups, pick)


def _groups(
    n: int, count: int, labels: Tensor | None, scope: str, device: torch.device
) -> list[tuple[Tensor, int]]:
    """(samples, how many of them) for everything, or for each class with a share."""
    check_scope(scope, labels)
    if labels is not None:
        numbers, num_classes = class_numbers(labels, n, device)
    if scope == "global":
        return [(torch.arange(n, device=device), count)]
    members = [(numbers == c).nonzero().squeeze(1) for c in range(num_classes)]
    shares = class_shares([len(m) for m in members], count)
    return [(m, k) for m, k in zip(members, shares, strict=True) if k]


def _select_weighted(
    groups: list[tuple[Tensor, int]], pick: Callable[[Tensor, int], tuple[Tensor, Tensor]]
) -> Selection:
    picked = [(rows, *pick(rows, k)) for rows, k in groups]
    indices = torch.cat([rows[at] for rows, at, _ in picked])
    weights = torch.cat([weight for _, _, weight in picked])
    order = indices.argsort()
    return Selection(indices[order], weights[order])


# -- GLISTER ---------------------------------------------------------------------------------------


def glister(
    features: Tensor,
    labels: Tensor,
    *,
    logits: Tensor,
    val_features: Tensor,
    val_logits: Tensor,
    val_labels: Tensor,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    step_size: float = 0.01,
    per_gradient: int = 1,
    bias: bool = True,
    progress: bool = False,
) -> Selection:
    """GLISTER: repeatedly takes the sample whose gradient step lowers the validation loss most.

    The gain of a sample is <its gradient, gradient of the validation loss>, both of the last layer.
    After each round the last layer moves by -step_size * (the gradients just taken), and the
    validation gradient is computed anew there.

    Args:
        features, logits, labels: [n, d], [n, classes], [n]: inputs and outputs of the last layer.
        val_features, val_logits, val_labels: the same of m samples for validation.
        fraction: share of the samples, in (0, 1]; or
        budget: number of samples.
        scope: "global", or "class": no class gets more than its share by size.
        step_size: learning rate of the virtual steps.
        per_gradient: samples taken per validation gradient; 1 is plain greedy.
        bias: whether the last layer has one.
        progress: whether to show a bar.

    Computed in float64; of equal gains the first sample is taken.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: Killamsetty et al., arXiv:2012.10630, algorithm 2 and its Taylor approximation, eq. 8.
    """
    if not (step_size > 0.0 and math.isfinite(step_size)):
        raise ValueError(f"step_size must be above 0 and finite, got {step_size!r}")
    if isinstance(per_gradient, bool) or not isinstance(per_gradient, int) or per_gradient < 1:
        raise ValueError(f"per_gradient must be an int of at least 1, got {per_gradient!r}")
    train = LastLayerGradients.of(features, logits, labels, bias)
    val = LastLayerGradients.of(val_features, val_logits, val_labels, bias)
    for name, of_train, of_val in (
        ("logits", train.errors, val.errors),
        ("features", train.inputs, val.inputs),
    ):
        if of_train.shape[1] != of_val.shape[1]:
            raise ValueError(
                f"{name} and val_{name} must have equally many columns, got shapes "
                f"{tuple(of_train.shape)} and {tuple(of_val.shape)}"
            )
    count = resolve_budget(len(train), fraction, budget)
    groups = _groups(len(train), count, labels, scope, train.errors.device)
    moving = _MovingValidation(val, matrix("val_logits", val_logits).double(), val_labels)
    return Selection(_glister(train, moving, groups, step_size, per_gradient, progress))


class _MovingValidation:
    """Validation data whose last layer moves: only its outputs have to be known."""

    def __init__(self, gradients: LastLayerGradients, logits: Tensor, labels: Tensor) -> None:
        self.inputs, self.logits, self.labels = gradients.inputs, logits, labels

    def gradient(self) -> Tensor:
        """[classes, d]: the gradient of the summed loss."""
        return error_vectors(self.logits, self.labels).T @ self.inputs

    def move(self, taken: LastLayerGradients, step_size: float) -> None:
        """Steps the last layer against the summed gradients of what was taken."""
        self.logits = self.logits - step_size * (self.inputs @ taken.inputs.T) @ taken.errors


def _glister(
    train: LastLayerGradients,
    val: _MovingValidation,
    groups: list[tuple[Tensor, int]],
    step_size: float,
    per_gradient: int,
    progress: bool,
) -> Tensor:
    quota = _Quota(groups, len(train), train.errors.device)
    count = sum(share for _, share in groups)
    chosen: list[int] = []
    for _ in track(range(-(-count // per_gradient)), "GLISTER", progress):
        gains = train.along(val.gradient())
        taken = [quota.take(gains) for _ in range(min(per_gradient, count - len(chosen)))]
        chosen += taken
        val.move(train[torch.tensor(taken, device=gains.device)], step_size)
    return torch.tensor(chosen, device=train.errors.device).sort().values


class _Quota:
    """Which samples may still be taken: not those taken, nor those of a group with its share."""

    def __init__(self, groups: list[tuple[Tensor, int]], n: int, device: torch.device) -> None:
        self.is_closed = torch.ones(n, dtype=torch.bool, device=device)
        self.group_of = torch.zeros(n, dtype=torch.int64, device=device)
        self.left = [share for _, share in groups]
        for number, (rows, _) in enumerate(groups):
            self.is_closed[rows] = False
            self.group_of[rows] = number

    def take(self, gains: Tensor) -> int:
        best = int(gains.masked_fill(self.is_closed, -float("inf")).argmax())
        group = int(self.group_of[best])
        self.is_closed[best] = True
        self.left[group] -= 1
        if self.left[group] == 0:
            self.is_closed |= self.group_of == group
        return best


# -- GradMatch -------------------------------------------------------------------------------------


def gradmatch(
    features: Tensor,
    labels: Tensor,
    *,
    logits: Tensor,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "class",
    ridge: float = 0.5,
    bias: bool = True,
    progress: bool = False,
) -> Selection:
    """GradMatch: weighted samples whose gradients add up to that of all, by matching pursuit.

        min_{w >= 0} ||sum_{j in S} w_j g_j - sum_i g_i||^2 + ridge * ||w||^2

    Repeatedly takes the sample most aligned with what is left of the sum, then solves for all
    weights again.

    Args:
        features: [n, d], inputs of the last layer.
        labels: [n], integers in 0..classes-1.
        logits: [n, classes], outputs of the last layer.
        fraction: share of the samples, in (0, 1]; or
        budget: number of samples.
        scope: "class": the sum of each class is matched by samples of it, shares in proportion to
            its size; or "global".
        ridge: weight of the penalty, at least 0.
        bias: whether the last layer has one.
        progress: whether to show a bar.

    Returns: weights are at least 0. There are fewer samples than asked for where no further one
    could lower the distance: what is left is 0, or points away from all gradients.

    Computed in float64; of equally aligned samples the first is taken. Time per class: k steps of
    one pass over the factors and one solution of up to k unknowns.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: Killamsetty et al., arXiv:2103.00123, algorithms 1 and 2. Differs: the weights are kept
    non-negative by non-negative least squares, as in the authors' code.
    """
    if not (ridge >= 0.0 and math.isfinite(ridge)):
        raise ValueError(f"ridge must be at least 0 and finite, got {ridge!r}")
    gradients = LastLayerGradients.of(features, logits, labels, bias)
    count = resolve_budget(len(gradients), fraction, budget)
    groups = _groups(len(gradients), count, labels, scope, gradients.errors.device)

    def pick(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return _matching_pursuit(gradients[rows], k, ridge, progress)

    return _select_weighted(groups, pick)


def _matching_pursuit(
    gradients: LastLayerGradients, k: int, ridge: float, progress: bool
) -> tuple[Tensor, Tensor]:
    target = gradients.sum()
    aligned = gradients.along(target)
    # Rounding leaves this much of a sum that is matched exactly.
    tolerance = 1e-12 * float(aligned.abs().max())
    chosen: list[int] = []
    weights = target.new_zeros(0)
    gram, goal = target.new_zeros(0, 0), target.new_zeros(0)
    left = aligned
    for _ in track(range(k), "GradMatch", progress):
        left = left.clone()
        left[chosen] = -float("inf")
        best = int(left.argmax())
        if float(left[best]) <= tolerance:
            break
        chosen.append(best)
        rows = torch.tensor(chosen, device=target.device)
        gram, goal = _bordered(gram, gradients[rows], ridge), aligned[rows]
        weights = nonnegative_least_squares(gram, goal, torch.cat([weights, weights.new_zeros(1)]))
        taken = gradients[rows]
        left = gradients.along(target - (taken.errors * weights[:, None]).T @ taken.inputs)
    return torch.tensor(chosen, dtype=torch.int64, device=target.device), weights


def _bordered(gram: Tensor, taken: LastLayerGradients, ridge: float) -> Tensor:
    """The Gram matrix of the taken, from that of all but the last."""
    last = torch.tensor([len(taken) - 1], device=gram.device)
    column = taken.products(last)
    column[-1] += ridge
    return torch.cat([torch.cat([gram, column[:-1]], 1), column.T], 0)


def nonnegative_least_squares(gram: Tensor, goal: Tensor, start: Tensor) -> Tensor:
    """The w >= 0 with the smallest w'Gw/2 - goal'w.

    Args:
        gram: [k, k], float64, symmetric, positive definite.
        goal: [k].
        start: [k], at least 0; its positive entries are the first guess of the positive ones.

    Source: Lawson and Hanson (1974), chapter 23; Bro and de Jong (1997) for the Gram form.
    """
    weights, positive = start.clone(), start > 0
    tolerance = 1e-12 * float(goal.abs().max())
    if bool(positive.any()):
        weights = _within(gram, goal, weights, positive)
    for _ in range(3 * len(goal)):  # each round lowers the objective; the bound is the usual one
        slope = (goal - gram @ weights).masked_fill(positive, -float("inf"))
        best = int(slope.argmax())
        if float(slope[best]) <= tolerance:
            break
        positive[best] = True
        weights = _within(gram, goal, weights, positive)
    return weights


def _within(gram: Tensor, goal: Tensor, weights: Tensor, positive: Tensor) -> Tensor:
    """Solves for the positive weights; takes out of `positive` those that would fall below 0."""
    while True:
        at = positive.nonzero().squeeze(1)
        solved = torch.zeros_like(weights)
        if len(at):
            solved[at] = torch.linalg.solve(gram[at][:, at], goal[at])
        falls = positive & (solved <= 0)
        if not bool(falls.any()):
            return solved
        ratio = weights[falls] / (weights[falls] - solved[falls])
        weights = weights + float(ratio.min()) * (solved - weights)
        positive &= ~(falls & (weights <= 1e-14 * weights.abs().max()))
        weights = weights.masked_fill(~positive, 0.0)
