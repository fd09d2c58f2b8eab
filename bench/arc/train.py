"""Trains the controllers and judges them on task families that they have not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import pyoptim
from pyoptim.arc import Controller, ConvLSTM, SummaryNet, placed

from .generate import usual_lr
from .points import KEEP, LOWER, RAISE, Points

# Rows are predicted, columns actual: raise, keep, lower. Table 2 of the paper, absolute values.
REWARDS = torch.tensor([[3.0, 1.0, 3.0], [1.0, 1.0, 1.0], [3.0, 1.0, 3.0]])

# Share of the points of a batch whose rate is not shown, as for an optimizer that is not known.
UNKNOWN = 0.5

# Whole families are held out together, so that no fold's tasks share data, shape or loss.
FOLDS = (
    ("image", "adversarial", "factorisation"),
    ("tabular", "tagging", "multitask"),
    ("regression", "segmentation", "text"),
    ("language", "reconstruction", "metric"),
)


@dataclass(frozen=True)
class Score:
    """How well predictions fit the labels of some points.

    Args:
        confusion: [3, 3] counts, predicted by actual: raise, keep, lower.
        regret: mean share of the gap between the worst and the best branch that is lost by
            following the prediction; 1 for a branch that is not finite.
    """

    confusion: Tensor
    regret: float

    @property
    def accuracy(self) -> float:
        return float(self.confusion.trace() / self.confusion.sum())

    @property
    def weighted_accuracy(self) -> float:
        """Equation (1) of the paper."""
        weighted = self.confusion * REWARDS
        return float(weighted.trace() / weighted.sum())

    @property
    def opposite(self) -> float:
        """Share of raises that should have been lowers, and the other way around."""
        wrong = self.confusion[RAISE, LOWER] + self.confusion[LOWER, RAISE]
        return float(wrong / self.confusion.sum())


def score(points: Points, predicted: Tensor) -> Score:
    """Judges `predicted`, [points] of branch numbers."""
    confusion = torch.bincount(predicted * 3 + points.labels, minlength=9).reshape(3, 3).double()
    return Score(confusion, float(regrets(points.losses, predicted).mean()))


def regrets(losses: Tensor, predicted: Tensor) -> Tensor:
    """See `Score`, [points]; 0 for the best of equals and for "lower" if no branch is finite."""
    finite = losses.isfinite()
    best = losses.amin(1)
    worst = losses.where(finite, -math.inf).amax(1)
    taken = losses.gather(1, predicted[:, None]).squeeze(1)
    share = (taken - best) / (worst - best).clamp_min(1e-30)
    share = torch.where(taken == best, 0.0, torch.where(taken.isfinite(), share, 1.0))
    return torch.where(finite.any(1), share, (predicted != LOWER).double())


def blanked(windows: Tensor) -> Tensor:
    """The windows as they are in a training without validation."""
    return windows * windows.new_tensor([1, 0, 1])


def places(points: Points) -> Tensor:
    """How large the rates are for their optimizers, [points, 2] of `pyoptim.arc.placed`."""
    usual = {name: usual_lr(name) for name in np.unique(points.optimizers)}
    return placed(points.lrs, torch.tensor([usual[name] for name in points.optimizers]))


def inputs(
    controller: Controller, windows: Tensor, cycles: Tensor, places: Tensor | None = None
) -> Tensor:
    """What the controller reads of windows of any number of cycles, [points, ...]."""
    parts = [(cycles == c).nonzero().flatten() for c in (1, 2, 3)]
    read = [
        controller.inputs(windows[where], c, None if places is None else places[where])
        for c, where in enumerate(parts, 1)
    ]
    return torch.cat(read)[torch.cat(parts).argsort()]


def targets(points: Points, soft: float) -> Tensor:
    """[points, 3]: the corrected labels mixed with a share `soft` of the soft targets."""
    return torch.lerp(F.one_hot(points.labels, 3).float(), points.soft.float(), soft)


@dataclass(frozen=True)
class Fit:
    """How a controller is trained."""

    soft: float = 0.0  # share of the soft targets in what is learnt
    pairwise: bool = False  # half of the loss is the official script's raise-or-lower part
    epochs: int = 40
    batch: int = 512
    lr: float = 3e-3
    weight_decay: float = 1e-3


def fit_summary(
    points: Points, hidden: int, members: int, fit: Fit, seed: int, sees_lr: bool = False
) -> SummaryNet:
    """Trains a `SummaryNet` on points with and without their validation loss.

    Every member sees its own draw of the runs (a bootstrap), so that they differ. How large the
    rate is is blanked for half of each batch, so that the network can do without.
    """
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = SummaryNet(hidden, members, sees_lr)
    place = places(points) if sees_lr else None
    both = [inputs(net, w, points.cycles, place) for w in (points.windows, blanked(points.windows))]
    numbers, wanted = torch.cat(both), targets(points, fit.soft).repeat(2, 1)
    curves = slice(SummaryNet.CURVES)  # decades are of order 1, and 0 where they are unknown
    net.mean[curves].copy_(numbers[:, curves].mean(0))
    net.scale[curves].copy_(numbers[:, curves].std(0).clamp_min(1e-3))
    shares = torch.ones(members, int(points.runs.max()) + 1)
    if members > 1:
        shares = torch.poisson(shares, generator=rng)
    weights = shares[:, points.runs].repeat(1, 2)

    def loss(rows: Tensor) -> Tensor:
        read = numbers[rows]
        if sees_lr:
            read[torch.rand(len(rows), generator=rng) < UNKNOWN, SummaryNet.CURVES :] = 0
        each = -(wanted[rows] * net.each(read).log_softmax(2)).sum(2)
        return (each * weights[:, rows]).mean(1).sum()

    _minimize(net, loss, len(numbers), fit, rng)
    return net.eval()


def fit_conv_lstm(points: Points, fit: Fit, seed: int) -> ConvLSTM:
    """Trains the paper's network; each batch blanks the validation loss of half of its points."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = ConvLSTM()
    wanted = targets(points, fit.soft)

    def loss(rows: Tensor) -> Tensor:
        windows = points.windows[rows]
        blank = torch.rand(len(rows), 1, 1, generator=rng) < 0.5
        logits = net(torch.where(blank, blanked(windows), windows))
        entropy = F.cross_entropy(logits, wanted[rows])
        if not fit.pairwise:
            return entropy
        return (entropy + raise_or_lower(logits, points.labels[rows])) / 2

    _minimize(net, loss, len(points), fit, rng)
    return net.eval()


def raise_or_lower(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy between raise and lower, over the points that are labelled so."""
    clear = labels != KEEP
    up = (logits[:, RAISE] - logits[:, LOWER]).sigmoid().clamp(1e-4, 1 - 1e-4)
    each = F.binary_cross_entropy(up, (labels == RAISE).float(), reduction="none")
    return (each * clear).sum() / clear.sum().clamp_min(1)


def _minimize(
    net: Controller,
    loss: Callable[[Tensor], Tensor],
    rows: int,
    fit: Fit,
    rng: torch.Generator,
) -> None:
    """Adam with decoupled decay, the rate falling to zero along a cosine."""
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = pyoptim.AdamW(trained, lr=fit.lr, weight_decay=fit.weight_decay)
    steps = fit.epochs * -(-rows // fit.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(fit.epochs):
        for batch in torch.randperm(rows, generator=rng).split(fit.batch):
            optimizer.zero_grad()
            loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(trained, 5.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def decide(
    controller: Controller, points: Points, with_validation: bool = True, with_rate: bool = True
) -> Tensor:
    """The branch that the controller takes at each point, [points]."""
    windows = points.windows if with_validation else blanked(points.windows)
    read = inputs(controller, windows, points.cycles, places(points) if with_rate else None)
    return torch.cat([controller(part).argmax(1) for part in read.split(1024)])


@torch.no_grad()
def leans(points: Points, controllers: Sequence[Controller]) -> Tensor:
    """Probability of "raise" less that of "lower" at each point, by the fold that holds it out."""
    lean = torch.zeros(len(points))
    for held, controller in zip(held_out(points), controllers, strict=True):
        part = points.select(held)
        read = inputs(controller, part.windows, part.cycles, places(part))
        up, _, down = controller(read).softmax(1).unbind(1)
        lean[held] = (up - down).float()
    return lean


Predict = Callable[[Points, bool], Tensor]
"""(points, with validation) to the branch taken at each."""

Train = Callable[[Points, int], Predict]
"""(points, seed) to what was learnt from them."""


def constant(branch: int) -> Train:
    return lambda _, __: lambda points, ___: torch.full((len(points),), branch)


@dataclass(frozen=True)
class Recipe:
    """A controller to be trained: the paper's network, or a `SummaryNet` of some width.

    Args:
        sees_lr: a `SummaryNet` that sees how large the rate is.
        caution: taken off the logit of "raise" once it is trained. The data is full of rates that
            are far too small, and a wrong raise costs more than a wrong keep.
    """

    fit: Fit
    hidden: int | None = None  # None is the paper's network
    members: int = 1
    caution: float = 0.0
    sees_lr: bool = False

    def controller(self, points: Points, seed: int) -> Controller:
        if self.hidden is None:
            net = fit_conv_lstm(points, self.fit, seed)
            net.dense[2].bias.data[RAISE] -= self.caution
            return net
        nets = fit_summary(points, self.hidden, self.members, self.fit, seed, self.sees_lr)
        nets.biases[-1].data[..., RAISE] -= self.caution
        return nets


def numbers_of(points: Points, columns: int, with_validation: bool = True) -> np.ndarray:
    """The first `columns` numbers of `summary`, [points, columns]; the specification's are nine."""
    windows = points.windows if with_validation else blanked(points.windows)
    return inputs(SummaryNet(0), windows, points.cycles)[:, :columns].numpy()


def sklearn_model(make: Callable[[int], Any], columns: int) -> Train:
    """A classifier of scikit-learn, trained on points with and without validation."""

    def train(points: Points, seed: int) -> Predict:
        model = make(seed)
        rows = [numbers_of(points, columns, valid) for valid in (True, False)]
        model.fit(np.concatenate(rows), np.tile(points.labels.numpy(), 2))
        return lambda held, valid: torch.from_numpy(model.predict(numbers_of(held, columns, valid)))

    return train


def _trees(seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        max_iter=120, learning_rate=0.06, max_leaf_nodes=12, min_samples_leaf=60, random_state=seed
    )


def _logistic(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, random_state=seed))


SLOW = Fit(epochs=8, batch=128, lr=1e-3)
HALF = Fit(soft=0.5)
RECIPES = {
    "logistic": Recipe(Fit(), hidden=0),
    "perceptrons": Recipe(Fit(), hidden=24, members=8),
    "perceptrons, soft": Recipe(Fit(soft=1.0), hidden=24, members=8),
    "perceptrons, half soft": Recipe(HALF, hidden=24, members=8),
    "perceptrons, half soft, rate": Recipe(HALF, hidden=24, members=8, sees_lr=True),
    "perceptrons, half soft, caution 1": Recipe(HALF, 24, 8, 1.0),
    "conv-lstm": Recipe(SLOW),
    "conv-lstm, official loss": Recipe(replace(SLOW, pairwise=True)),
    "conv-lstm, half soft": Recipe(replace(SLOW, soft=0.5)),
}
BASELINES: dict[str, Train] = {
    "always raise": constant(RAISE),
    "always keep": constant(KEEP),
    "logistic, 9 numbers": sklearn_model(_logistic, 9),
    "trees, 9 numbers": sklearn_model(_trees, 9),
    "trees, 20 numbers": sklearn_model(_trees, 20),
}
CANDIDATES = (*BASELINES, *RECIPES)


def held_out(points: Points) -> Iterator[Tensor]:
    """Masks of the points of each fold's families."""
    for fold in FOLDS:
        held = torch.from_numpy(np.isin(points.families, fold))
        yield held


def cross_validate(points: Points, train: Train, seed: int) -> dict[bool, Tensor]:
    """The decision at every point by a controller that never saw its family.

    Returns: by with-validation, [points].
    """
    taken = {valid: torch.full((len(points),), -1) for valid in (True, False)}
    for held in held_out(points):
        predict = train(points.select(~held), seed)
        for valid, decisions in taken.items():
            decisions[held] = predict(points.select(held), valid)
    return taken
