"""ARC: a small trained network raises, keeps or lowers the learning rate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyoptim import arc

ACTIONS = ("raise", "keep", "lower")  # as arc.FACTORS
RAISE, KEEP, LOWER = range(3)
# Without a known end: an end-of-cycle every so many epochs, as in the authors' framework.
DEFAULT_INTERVAL = 3
# As many decisions in a training of known length (paper, section 5).
DECISIONS_PER_TRAINING = 10
# How sure the network has to be to raise and to lower: chosen on held-out families, see the model
# card.
MARGINS = (0.4, 0.4)
# Share of a training of known length in which the rate falls to zero, chosen in the same way.
FINAL_DECAY = 0.3
# The loss has diverged when its mean over a cycle rose by so many times the first cycle's.
DIVERGED = 2.0


# Training losses of every step, validation losses of every epoch and learning rates of every cycle
# that is looked back at -> probabilities of raise, keep and lower.
Judge = Callable[[list[float], list[float], list[float]], Sequence[float]]


@dataclass
class Decision:
    """One decision, for logs.

    Attributes:
        epoch: epochs finished when it was made.
        action: "raise", "keep" or "lower"; "decay" in the last part of a training of known length.
        probabilities: of raise, keep and lower, or None when the network was not asked.
        guard: what the guard saw: "not finite", "diverged", or None.
        restored: whether the last good state was put back.
        factor: what every learning rate was multiplied by, after the bounds.
        lrs: the new learning rate of every group.
    """

    epoch: int
    action: str
    probabilities: tuple[float, ...] | None
    guard: str | None
    restored: bool
    factor: float
    lrs: list[float]


class ARC(LRScheduler):
    """Autonomous learning-rate control from training signals alone.

    Every `interval` epochs (one cycle) the losses and learning rates of the last three cycles go
    through a small network whose answer multiplies every learning rate by 1.618, 1 or 0.618. In the
    last part of a training of known length the rate falls along a line to zero instead.

        scheduler = ARC(optimizer, epochs=30)
        for epoch in range(30):
            for batch in batches:
                loss = ...
                optimizer.step()
                scheduler.record(loss.detach())
            scheduler.step(val_loss)  # or scheduler.step() without validation data

    It rescues a badly chosen learning rate; it does not beat a tuned schedule.

    Args:
        optimizer: whose learning rates are set; ratios between its groups are kept.
        interval: epochs of a cycle; "auto" makes ten cycles of `epochs`, or takes 3 without it.
        epochs: length of the training, for `interval="auto"` and `final_decay`.
        weights: "default", the name of another network inside the package (`pyoptim.arc.WEIGHTS`),
            a path to a file that `pyoptim.arc.save` made, or a function of training losses,
            validation losses and learning rates (as `pyoptim.arc.Controller.probabilities`) that
            gives the probabilities of raise, keep and lower, or a `pyoptim.arc.Controller`.
        usual_lr: a usual learning rate for the optimizer, with which a network that sees the rate
            itself compares that of the first group that has one. "auto": `pyoptim.arc.usual_lr`
            of the optimizer. None: unknown, the network sees only how the rate changed.
        margins: two numbers. The rate is raised when the probability of "raise" exceeds that of
            "lower" by more than the first, lowered when it falls short by more than the second,
            else kept. None: the likeliest of the three is done, as in the paper.
        final_decay: share of `epochs`, at the end, in which the network is not asked and every
            epoch's rate is a step down a line to zero. It waits as long as the network raises;
            without `epochs` there is none. 0: none, as in the paper.
        min_lr, max_lr: bounds of every group's learning rate; a move that would cross one is
            shortened for all groups alike.
        guard: when a loss of the cycle is not finite, or the mean training loss has risen above
            three times that of the first cycle, do not ask the network but lower. Without it, a
            loss that is not finite keeps the learning rate.
        restore: what the guard puts back to the end of the last good cycle: a module or any objects
            with `state_dict` and `load_state_dict`; the optimizer is always among them. None:
            nothing is put back. The copies are kept in memory, beside the objects' own tensors,
            not in `state_dict`.
        steps_per_epoch: for callers that call `step` once per batch: every so many calls are an
            epoch. None: every call is one.
        last_epoch: as in torch; only -1, since a resumed ARC needs its `load_state_dict`.

    Attributes: `decisions`, a list of `Decision`. Every process of a `torch.distributed` group
    takes the decision of rank 0, and has to call `step` equally often.
    Raises: ValueError for an argument out of range, in `record` for a loss of more than one
    element, in `step` at the end of a cycle in which nothing was recorded.
    Source: "To Raise or Not To Raise: The Autonomous Learning Rate Question"; see `pyoptim.arc`.
    Differs: margins, final decay, guard, bounds, groups, resuming.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        interval: int | str = "auto",
        epochs: int | None = None,
        *,
        weights: str | Path | arc.Controller | Judge = "default",
        usual_lr: float | str | None = "auto",
        margins: tuple[float, float] | None = MARGINS,
        final_decay: float = FINAL_DECAY,
        min_lr: float = 0.0,
        max_lr: float = math.inf,
        guard: bool = True,
        restore: Any = None,
        steps_per_epoch: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        self.interval = _interval(interval, epochs)
        if not 0.0 <= min_lr <= max_lr:
            raise ValueError(f"min_lr <= max_lr must be at least 0, got {min_lr} and {max_lr}")
        if steps_per_epoch is not None and not steps_per_epoch >= 1:
            raise ValueError(f"steps_per_epoch must be at least 1 or None, got {steps_per_epoch}")
        if last_epoch != -1:
            raise ValueError(f"last_epoch must be -1, got {last_epoch}; resume by load_state_dict")
        if margins is not None and not _are_margins(margins):
            raise ValueError(
                f"margins must be two numbers, at least 0 and below 1, or None, got {margins}"
            )
        if usual_lr is not None and usual_lr != "auto" and not _is_rate(usual_lr):
            raise ValueError(
                f'usual_lr must be "auto", None or a positive finite number, got {usual_lr!r}'
            )
        if not 0.0 <= final_decay < 1.0:
            raise ValueError(f"final_decay must be at least 0 and below 1, got {final_decay}")
        self.min_lr, self.max_lr = min_lr, max_lr
        self.margins = margins
        self._decay = _epochs_of_decay(epochs, final_decay)
        self.guard = guard
        self.steps_per_epoch = steps_per_epoch or 1
        self.decisions: list[Decision] = []
        self.usual_lr = usual_lr
        self._network, self._judge = _network_or_judge(weights)
        self._kept = _Kept(optimizer, restore)
        self._cycles: list[_Cycle] = []  # the last three that are finished
        self._cycle = _Cycle()
        self._first_mean: float | None = None
        self._n_calls = 0
        super().__init__(optimizer)

    def _initial_step(self) -> None:
        self._step_count = 1
        self.last_epoch = 0
        self._last_lr = self.get_lr()

    def get_lr(self) -> list[float | Tensor]:
        lrs = (group["lr"] for group in self.optimizer.param_groups)
        return [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    def record(self, train_loss: float | Tensor) -> None:
        """Takes the training loss of one step; a tensor is not waited for."""
        if isinstance(train_loss, Tensor):
            if train_loss.numel() != 1:
                shape = tuple(train_loss.shape)
                raise ValueError(f"train_loss must have 1 element, got a tensor of shape {shape}")
            train_loss = train_loss.detach().reshape(()).clone()
        self._cycle.train.append(train_loss)

    def step(self, val_loss: float | Tensor | None = None) -> None:
        """Ends an epoch, and with it perhaps a cycle, which makes a decision.

        Args:
            val_loss: validation loss of the epoch, lower being better; None where there is none.
        """
        self._step_count += 1
        self._n_calls += 1
        if self._n_calls % self.steps_per_epoch:
            return
        if (self.last_epoch + 1) % self.interval == 0 and not self._cycle.train:
            raise ValueError(
                "record(train_loss) was not called in this cycle; call it after every training step"
            )
        self.last_epoch += 1
        if val_loss is not None:
            self._cycle.val.append(float(val_loss))
        if self.last_epoch % self.interval == 0:
            self._end_cycle()
        if self._is_decaying():
            left = self._decay.stop - self.last_epoch
            self._log("decay", self._move(left / (left + 1)))
        self._last_lr = self.get_lr()

    def _end_cycle(self) -> None:
        was_decaying = self._is_decaying()
        cycle = self._cycle.finished(self._lr())
        trouble = self._trouble(cycle) if self.guard else None
        window = [*self._cycles, cycle][-arc.MAX_CYCLES :]
        trouble, chosen, probabilities = _same_on_all_ranks(
            (trouble, *self._choose(window, trouble))
        )
        restored = trouble is not None and self._kept.put_back()
        if trouble is None:
            self._cycles = window
            self._first_mean = cycle.mean() if self._first_mean is None else self._first_mean
            self._kept.keep()
        self._cycle = _Cycle()
        if trouble is not None or not was_decaying:
            factor = self._move(arc.FACTORS[chosen])
            self._log(ACTIONS[chosen], factor, probabilities, trouble, restored)

    def _is_decaying(self) -> bool:
        """Whether the final decay is on: it waits as long as the network raises."""
        raised = bool(self.decisions) and self.decisions[-1].action == ACTIONS[RAISE]
        return self.last_epoch in self._decay and not raised

    def _log(
        self,
        action: str,
        factor: float,
        probabilities: tuple[float, ...] | None = None,
        guard: str | None = None,
        restored: bool = False,
    ) -> None:
        lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.decisions.append(
            Decision(self.last_epoch, action, probabilities, guard, restored, factor, lrs)
        )

    def _lr(self) -> float:
        """The learning rate that stands for all: of the first group that has one."""
        lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        return next((lr for lr in lrs if lr > 0.0), 0.0)

    def _trouble(self, cycle: _Cycle) -> str | None:
        if not all(map(math.isfinite, (*cycle.train, *cycle.val))):
            return "not finite"
        first = self._first_mean
        if first is not None and cycle.mean() > first + DIVERGED * abs(first):
            return "diverged"
        return None

    def _choose(
        self, cycles: list[_Cycle], trouble: str | None
    ) -> tuple[int, tuple[float, ...] | None]:
        if trouble is not None:
            return LOWER, None
        if self._is_decaying():
            return KEEP, None
        lrs = [cycle.lr for cycle in cycles]
        train = [loss for cycle in cycles for loss in cycle.train]
        val = [loss for cycle in cycles for loss in cycle.val]
        if not (all(lr > 0.0 for lr in lrs) and all(map(math.isfinite, (*train, *val)))):
            return KEEP, None  # nothing to multiply, or nothing to judge by
        probabilities = tuple(self._answer(train, val, lrs))
        return self._action(probabilities), probabilities

    def _answer(self, train: list[float], val: list[float], lrs: list[float]) -> Sequence[float]:
        if self._judge is not None:
            return self._judge(train, val, lrs)
        assert self._network is not None
        is_auto = self.usual_lr == "auto"
        usual = arc.usual_lr(self.optimizer) if is_auto else cast("float | None", self.usual_lr)
        return self._network.probabilities(train, val, lrs, usual)

    def _action(self, probabilities: tuple[float, ...]) -> int:
        if self.margins is None:
            return max(range(len(ACTIONS)), key=probabilities.__getitem__)
        lean = probabilities[RAISE] - probabilities[LOWER]
        to_raise, to_lower = self.margins
        return RAISE if lean > to_raise else LOWER if lean < -to_lower else KEEP

    def _move(self, factor: float) -> float:
        """Multiplies every learning rate; returns the factor that the bounds leave."""
        groups = self.optimizer.param_groups
        lrs = [float(group["lr"]) for group in groups if float(group["lr"]) > 0.0]
        if lrs:
            factor = max(min(factor, self.max_lr / max(lrs)), self.min_lr / min(lrs))
        for group in groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(factor)
            else:
                group["lr"] *= factor
        return factor

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer, the network and the copies of the last good state."""
        return {
            "last_epoch": self.last_epoch,
            "n_calls": self._n_calls,
            "step_count": self._step_count,
            "base_lrs": copy.deepcopy(self.base_lrs),
            "cycles": [asdict(cycle) for cycle in self._cycles],
            "cycle": asdict(_Cycle(_floats(self._cycle.train), list(self._cycle.val))),
            "first_mean": self._first_mean,
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave; the optimizer's own holds the learning rates.

        To be called after the model and the optimizer were loaded: what they are now is what the
        guard restores.

        Raises: KeyError naming what is missing, before anything is changed.
        """
        state = dict(state_dict)
        cycles = [_Cycle(**cycle) for cycle in state["cycles"]]
        cycle = _Cycle(**copy.deepcopy(state["cycle"]))
        decisions = [Decision(**decision) for decision in state["decisions"]]
        first_mean, base_lrs = state["first_mean"], copy.deepcopy(state["base_lrs"])
        counts = state["last_epoch"], state["n_calls"], state["step_count"]
        self._cycles, self._cycle, self.decisions = cycles, cycle, decisions
        self._first_mean, self.base_lrs = first_mean, base_lrs
        self.last_epoch, self._n_calls, self._step_count = counts
        self._last_lr = self.get_lr()
        self._kept.keep()


@dataclass
class _Cycle:
    """What was seen in one cycle."""

    train: list[Any]  # of every step; numbers once the cycle is finished
    val: list[float]
    lr: float

    def __init__(
        self, train: list[Any] | None = None, val: list[float] | None = None, lr: float = 0.0
    ) -> None:
        self.train, self.val, self.lr = train or [], val or [], lr

    def finished(self, lr: float) -> _Cycle:
        return _Cycle(_floats(self.train), self.val, lr)

    def mean(self) -> float:
        return math.fsum(self.train) / len(self.train)


def _floats(losses: list[float | Tensor]) -> list[float]:
    """Waits for each device once, not for each loss."""
    by_device: dict[torch.device, list[int]] = {}
    found = list(losses)
    for i, loss in enumerate(losses):
        if isinstance(loss, Tensor):
            by_device.setdefault(loss.device, []).append(i)
    for places in by_device.values():
        values = torch.stack([losses[i].double() for i in places]).tolist()  # type: ignore[union-attr]
        for i, value in zip(places, values, strict=True):
            found[i] = value
    return [float(loss) for loss in found]


class _Kept:
    """Copies of the last good state of what the guard restores."""

    def __init__(self, optimizer: Optimizer, restore: Any) -> None:
        self._objects: list[Any] = []
        self._copies: list[Any] | None = None
        self._optimizer = optimizer
        if restore is None:
            return
        is_one = hasattr(restore, "state_dict") or not isinstance(restore, Iterable)
        self._objects = [restore] if is_one else list(restore)
        for item in self._objects:
            if not (hasattr(item, "state_dict") and hasattr(item, "load_state_dict")):
                raise ValueError(
                    "restore must be objects with state_dict and load_state_dict, got "
                    f"{type(item).__name__}"
                )
        if not any(item is optimizer for item in self._objects):
            self._objects.append(optimizer)
        self.keep()

    def keep(self) -> None:
        if self._objects:
            self._copies = [copy.deepcopy(item.state_dict()) for item in self._objects]

    def put_back(self) -> bool:
        """False when there is nothing to put back. Never raises a learning rate."""
        if self._copies is None:
            return False
        groups = self._optimizer.param_groups
        lrs = [float(group["lr"]) for group in groups]
        for item, kept in zip(self._objects, self._copies, strict=True):
            item.load_state_dict(copy.deepcopy(kept))
        for group, lr in zip(self._optimizer.param_groups, lrs, strict=True):
            lower = min(lr, float(group["lr"]))
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lower)
            else:
                group["lr"] = lower
        return True


def _interval(interval: int | str, epochs: int | None) -> int:
    if epochs is not None and not epochs >= 1:
        raise ValueError(f"epochs must be at least 1 or None, got {epochs}")
    if interval == "auto":
        return DEFAULT_INTERVAL if epochs is None else max(1, epochs // DECISIONS_PER_TRAINING)
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f'interval must be "auto" or a whole number above 0, got {interval!r}')
    return interval


def _is_rate(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0.0 < value < math.inf


def _network_or_judge(
    weights: str | Path | arc.Controller | Judge,
) -> tuple[arc.Controller | None, Judge | None]:
    if isinstance(weights, arc.Controller):
        return weights, None
    return (None, weights) if callable(weights) else (arc.load(weights), None)


def _are_margins(margins: Any) -> bool:
    if not isinstance(margins, Sequence) or len(margins) != 2:
        return False
    return all(isinstance(m, int | float) and 0.0 <= m < 1.0 for m in margins)


def _epochs_of_decay(epochs: int | None, share: float) -> range:
    """The numbers of finished epochs after which the rate is taken down a step."""
    if epochs is None:
        return range(0)
    return range(epochs - min(round(share * epochs), epochs - 1), epochs)


def _same_on_all_ranks(choice: tuple[Any, ...]) -> tuple[Any, ...]:
    """The choice of rank 0: losses differ between ranks, learning rates must not."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return choice
    shared = [choice]
    distributed.broadcast_object_list(shared, src=0)
    return shared[0]
