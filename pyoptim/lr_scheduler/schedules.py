"""Schedules: factories of `torch.optim.lr_scheduler.LambdaLR`.

Every schedule is a closed form of the number of steps, so that values do not drift as torch's
recursive classes do, a warm-up can start from 0, and a scheduler resumes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(kw_only=True)
class Schedule:
    """A factor of the initial learning rate over the number of calls of `step`.

    Holds plain numbers only: LambdaLR saves them in its `state_dict`.
    """

    warmup: float
    steps_per_epoch: int
    floor: float = 0.0  # factor that the decay ends at

    def __call__(self, step: int) -> float:
        t = step / self.steps_per_epoch
        if t < self.warmup:
            return t / self.warmup
        return self.floor + (1.0 - self.floor) * self.decay(t - self.warmup)

    def decay(self, t: float) -> float:
        """From 1 to 0, over the time since the warm-up."""
        return 1.0


@dataclass(kw_only=True)
class _Linear(Schedule):
    total: float
    start_factor: float
    end_factor: float

    def decay(self, t: float) -> float:
        passed = min(1.0, t / (self.total - self.warmup))
        return self.start_factor + (self.end_factor - self.start_factor) * passed


@dataclass(kw_only=True)
class _Polynomial(Schedule):
    total: float
    power: float

    def decay(self, t: float) -> float:
        return math.pow(max(0.0, 1.0 - t / (self.total - self.warmup)), self.power)


@dataclass(kw_only=True)
class _Cosine(Schedule):
    total: float
    n_cycles: int

    def decay(self, t: float) -> float:
        progress = t / (self.total - self.warmup)
        return 0.0 if progress >= 1.0 else _half_cosine(progress * self.n_cycles % 1.0)


@dataclass(kw_only=True)
class _Restarts(Schedule):
    first_cycle: float
    cycle_mult: float

    def decay(self, t: float) -> float:
        if self.cycle_mult == 1:
            return _half_cosine(t % self.first_cycle / self.first_cycle)
        n = self._n_finished(t)
        length = self.first_cycle * self.cycle_mult**n
        return _half_cosine((t - self._start(n)) / length)

    def _n_finished(self, t: float) -> int:
        growth = t / self.first_cycle * (self.cycle_mult - 1.0) + 1.0
        n = int(math.log(growth, self.cycle_mult))
        # The logarithm may be off by one where a cycle ends.
        while self._start(n + 1) <= t:
            n += 1
        while self._start(n) > t:
            n -= 1
        return n

    def _start(self, n: int) -> float:
        return self.first_cycle * (self.cycle_mult**n - 1.0) / (self.cycle_mult - 1.0)


@dataclass(kw_only=True)
class _CyclicCosine(Schedule):
    half_period: float

    def decay(self, t: float) -> float:
        return _half_cosine(t / self.half_period)


@dataclass(kw_only=True)
class _Exponential(Schedule):
    gamma: float

    def decay(self, t: float) -> float:
        return math.pow(self.gamma, t)


@dataclass(kw_only=True)
class _InverseRoot(Schedule):
    timescale: float

    def decay(self, t: float) -> float:
        return math.sqrt(self.timescale / (t + self.timescale))


@dataclass(kw_only=True)
class _StableDecay(Schedule):
    total: float
    n_decay: float

    def decay(self, t: float) -> float:
        left = self.total - self.warmup - t
        return min(1.0, max(0.0, left / self.n_decay))


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(
    optimizer: Optimizer,
    *,
    warmup: float = 0,
    steps_per_epoch: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """The initial learning rate, after an optional linear warm-up from 0."""
    shared = common(optimizer, warmup, steps_per_epoch)
    return LambdaLR(optimizer, Schedule(**shared), last_epoch)


def linear(
    optimizer: Optimizer,
    total: float,
    *,
    start_factor: float = 1.0,
    end_factor: float = 0.0,
    warmup: float = 0,
    steps_per_epoch: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """A straight line: lr_t = ((end_factor - start_factor) t/T + start_factor) lr_0.

    Args:
        optimizer: whose learning rates are set; the initial ones, lr_0, are those it has now.
        total: T, the length of warm-up and line together, in calls of `step`, or in epochs with
            `steps_per_epoch`; the rate stays at its last value after it.
        start_factor, end_factor: of the initial learning rate, not negative.
        warmup: length of a linear rise from 0 before the schedule, in the unit of `total`.
        steps_per_epoch: None: `step` counts in the unit of `total`; else `step` is called once per
            batch and lengths are in epochs of so many batches.
        last_epoch: as in torch: the last call of `step` when resuming, -1 to begin.

    Raises: TypeError for something else than an optimizer; ValueError for an argument out of range.
    Source: Joshi, Empirical Study of Neural Network Optimizers and Schedulers (2023), eq. (3).
    torch's LinearLR has other defaults: start_factor=1/3, end_factor=1.
    """
    shared = common(optimizer, warmup, steps_per_epoch)
    check_total(total, warmup)
    _check_not_negative("start_factor", start_factor)
    _check_not_negative("end_factor", end_factor)
    schedule = _Linear(**shared, total=total, start_factor=start_factor, end_factor=end_factor)
    return LambdaLR(optimizer, schedule, last_epoch)


def polynomial(
    optimizer: Optimizer,
    total: float,
    *,
    power: float = 2.0,
    min_lr: float = 0.0,
    warmup: float = 0,
    steps_per_epoch: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """Polynomial decay: lr_t = min_lr + (lr_0 - min_lr) (1 - t/T)^power.

    Args:
        power: above 0.
        min_lr: the learning rate at the end, the same for every group.
        The others as in `linear`.

    Raises: ValueError for a length or rate out of range.
    Source: Joshi (2023), eq. (4).
    """
    shared = common(optimizer, warmup, steps_per_epoch)
    check_total(total, warmup)
    _check_above_zero("power", power)
    return _scheduler(
        optimizer,
        lambda floor: _Polynomial(**shared, floor=floor, total=total, power=power),
        min_lr,
        last_epoch,
    )


def cosine(
    optimizer: Optimizer,
    total: float,
    *,
    n_cycles: int = 1,
    min_lr: float = 0.0,
    warmup: float = 0,
    steps_per_epoch: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """Cosine annealing: lr_t = min_lr + (lr_0 - min_lr)/2 (1 + cos(pi t/T)).

    Args:
        n_cycles: with more than 1, hard restarts: `total` is cut into so many equal cycles, each of
            which begins at the initial learning rate.
        The others as in `linear`; the rate stays at `min_lr` after `total`, where torch's
        CosineAnnealingLR rises again (see `cyclic_cosine`).

    Raises: ValueError for a length or rate out of range.
    Source: Joshi (2023), eq. (5); Loshchilov and Hutter, arXiv:1608.03983.
    """
    shared = common(optimizer, warmup, steps_per_epoch)
    check_total(total, warmup)
    if n_cycles < 1 or n_cycles != int(n_cycles):
        raise ValueError(f"n_cycles must be a whole number above 0, got {n_cycles}")
    return _scheduler(
        optimizer,
        lambda floor: _Cosine(**shared, floor=floor, total=total, n_cycles=int(n_cycles)),
        min_lr,
        last_epoch,
    )


def cosine_with_restarts(
    optimizer: Optimizer,
    first_cycle: float,
    *,
    cycle_mult: float = 1.0,
    min_lr: float = 0.0,
    warmup: float = 0,
    steps_per_epoch: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """Cosine annealing with warm restarts (SGDR): cycles of T_0, T_0 T_mult, T_0 T_mult^2 ...

    Args:
        first_cycle: T_0, length of the first cycle, in calls of `step`, or in epochs with
            `steps_per_epoch`.
        cycle_mult: T_mult, at least 1.
        The others as in `linear`.

    Raises: ValueError for a length or rate out of range.
    Source: Loshchilov and Hutter, arXiv:1608.03983, section 3.
    """
    shared = common(optimizer, warmup, steps_per_epoch)
    _check_above_zero("first_cycle", first_cycle)
    if not cycle_mult >= 1.0:
        raise ValueError(f"cycle_mult must be at least 1, got {cycle_mult}")
    return _scheduler(
        optimizer,
        lambda floor: _Restarts(
            **shared, floor=floor, first_cycle=first_cycle, cycle_mult=float(cycle_mult)
        ),
        min_lr,
        last_epoch,
    )


def cyclic_cosine(
    optimizer: Optimizer,
    half_period: float,
    *,
    min_lr: float = 0.0,
    warmup: float = 0,
    steps_per_epoch: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """The cosine of `cosine` without an end: down in `half_period`, up again in as long, and so on.

    Raises: ValueError for a length or rate out of range.
    """
    shared = common(optimizer, warmup, steps_per_epoch)
    _check_above_zero("half_period", half_period)
    return _scheduler(
        optimizer,
        lambda floor: _CyclicCosine(**shared, floor=floor, half_period=half_period),
        min_lr,
        last_epoch,
    )


def exponential(
    optimizer: Optimizer,
    gamma: float,
    *,
    min_lr: float = 0.0,
    warmup: float = 0,
    steps_per_epoch: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """Exponential decay: lr_t = min_lr + (lr_0 - min_lr) gamma^t.

    Args:
        gamma: factor per call of `step`, or per epoch with `steps_per_epoch`; in (0, 1].
        The others as in `linear`.

    Raises: ValueError for a length or rate out of range.
    """
    shared = common(optimizer, warmup, steps_per_epoch)
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}")
    return _scheduler(
        optimizer,
        lambda floor: _Exponential(**shared, floor=floor, gamma=gamma),
        min_lr,
        last_epoch,
    )


def inverse_sqrt(
    optimizer: Optimizer,
    *,
    timescale: float | None = None,
    warmup: float = 0,
    steps_per_epoch: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """Inverse square root: lr_t = lr_0 sqrt(s/(t + s)), t since the warm-up.

    Args:
        timescale: s; None: the length of the warm-up, or 10000 steps without one.
        The others as in `linear`.

    Raises: ValueError for a length out of range.
    """
    shared = common(optimizer, warmup, steps_per_epoch)
    if timescale is None:
        timescale = warmup or 10000 / shared["steps_per_epoch"]
    _check_above_zero("timescale", timescale)
    schedule = _InverseRoot(**shared, timescale=timescale)
    return LambdaLR(optimizer, schedule, last_epoch)


def warmup_stable_decay(
    optimizer: Optimizer,
    total: float,
    *,
    decay: float,
    min_lr: float = 0.0,
    warmup: float = 0,
    steps_per_epoch: int | None = None,
    last_epoch: int = -1,
) -> LambdaLR:
    """Warm-up, a constant rate, then linear decay over the last `decay` of `total`.

    Args: as in `linear`. Raises: ValueError for a length or rate out of range.
    Source: Hu et al. (MiniCPM), arXiv:2404.06395, section 4 (there with other shapes of decay).
    """
    shared = common(optimizer, warmup, steps_per_epoch)
    check_total(total, warmup)
    if not 0 < decay <= total - warmup:
        raise ValueError(
            f"decay must be above 0 and at most total - warmup = {total - warmup}, got {decay}"
        )
    return _scheduler(
        optimizer,
        lambda floor: _StableDecay(**shared, floor=floor, total=total, n_decay=decay),
        min_lr,
        last_epoch,
    )


def _scheduler(
    optimizer: Optimizer,
    schedule_at: Callable[[float], Callable[[int], float]],
    min_lr: float,
    last_epoch: int,
) -> LambdaLR:
    _check_not_negative("min_lr", min_lr)
    schedules = [schedule_at(floor_of(group, min_lr)) for group in optimizer.param_groups]
    return LambdaLR(optimizer, schedules, last_epoch)


def floor_of(group: dict[str, Any], min_lr: float) -> float:
    """`min_lr` as a share of the group's initial rate."""
    if min_lr == 0.0:
        return 0.0
    initial = group.get("initial_lr", group["lr"])
    initial = initial.item() if isinstance(initial, Tensor) else initial
    if not min_lr <= initial:
        raise ValueError(
            f"min_lr must be at most the initial lr of a group, {initial}, got {min_lr}"
        )
    return float(min_lr / initial)


def common(optimizer: object, warmup: float, steps_per_epoch: int | None) -> dict[str, Any]:
    """What every `Schedule` is made of, checked."""
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind}")
    _check_not_negative("warmup", warmup)
    if steps_per_epoch is not None and not steps_per_epoch >= 1:
        raise ValueError(f"steps_per_epoch must be at least 1 or None, got {steps_per_epoch}")
    return {"warmup": warmup, "steps_per_epoch": steps_per_epoch or 1}


def check_total(total: float, warmup: float) -> None:
    if not warmup < total < math.inf:
        raise ValueError(f"total must be a finite number above warmup = {warmup}, got {total}")


def _check_not_negative(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number that is not negative, got {value}")


def _check_above_zero(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
