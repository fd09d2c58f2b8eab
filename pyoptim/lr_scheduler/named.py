"""Schedules by the names, arguments and values of `transformers.get_scheduler`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pyoptim.lr_scheduler import schedules


@dataclass(kw_only=True)
class _Waves(schedules.Schedule):
    """`waves` whole cosines between the warm-up and `total`; a half of one falls to the floor."""

    total: float
    waves: float

    def decay(self, t: float) -> float:
        return _wave(self.waves, min(1.0, t / (self.total - self.warmup)))


@dataclass(kw_only=True)
class _ShiftedWaves:
    """As `_Waves` one step later; the warm-up is a line that starts above zero."""

    warmup: int
    total: int
    waves: float
    floor: float
    start: float | None

    def __call__(self, step: int) -> float:
        if step >= self.warmup:
            progress = min(1.0, (step - self.warmup + 1) / max(1, self.total - self.warmup))
            return self.floor + (1.0 - self.floor) * _wave(self.waves, progress)
        if self.start is None:
            return (step + 1) / self.warmup
        return self.start + (1.0 - self.start) * step / max(1, self.warmup - 1)


@dataclass(kw_only=True)
class _StableDecay:
    """Rises from the floor, stays at 1, falls to the floor."""

    warmup: int
    stable: int
    decay: int
    rise: str
    fall: str
    floor: float
    waves: float

    def __call__(self, step: int) -> float:
        return self.floor + (1.0 - self.floor) * self._share(step)

    def _share(self, step: int) -> float:
        if step < self.warmup:
            return _SHAPES[self.rise](0.5, 1.0 - step / self.warmup)
        passed = step - self.warmup - self.stable
        if passed < 0:
            return 1.0
        return _SHAPES[self.fall](self.waves, passed / self.decay) if passed < self.decay else 0.0


def _wave(waves: float, progress: float) -> float:
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * waves * progress))


# (cosines, progress) to a value that falls from 1 to 0; a rise is a fall backwards.
_SHAPES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda waves, progress: 1.0 - progress,
    "cosine": _wave,
    "1-sqrt": lambda waves, progress: 1.0 - math.sqrt(progress),
}


def _linear(optimizer: Optimizer, warmup: int, total: int) -> LRScheduler:
    return schedules.linear(optimizer, total, warmup=warmup)


def _cosine(optimizer: Optimizer, warmup: int, total: int, num_cycles: float = 0.5) -> LRScheduler:
    return _waves(optimizer, warmup, total, num_cycles, [0.0] * len(optimizer.param_groups))


def _waves(
    optimizer: Optimizer, warmup: int, total: int, waves: float, floors: Sequence[float]
) -> LRScheduler:
    common = schedules.common(optimizer, warmup, None)
    schedules.check_total(total, warmup)
    return LambdaLR(
        optimizer, [_Waves(**common, total=total, waves=waves, floor=floor) for floor in floors]
    )


def _cosine_with_restarts(
    optimizer: Optimizer, warmup: int, total: int, num_cycles: int = 1
) -> LRScheduler:
    return schedules.cosine(optimizer, total, warmup=warmup, n_cycles=num_cycles)


def _cosine_with_min_lr(
    optimizer: Optimizer,
    warmup: int,
    total: int,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> LRScheduler:
    floors = _floors(optimizer, min_lr, min_lr_rate)
    return _waves(optimizer, warmup, total, num_cycles, floors)


def _cosine_warmup_with_min_lr(
    optimizer: Optimizer,
    warmup: int,
    total: int,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> LRScheduler:
    floors = _floors(optimizer, min_lr, min_lr_rate)
    schedules.common(optimizer, warmup, None)
    schedules.check_total(total, warmup)
    options: dict[str, Any] = {"warmup": warmup, "total": total, "waves": num_cycles}
    return LambdaLR(
        optimizer, [_ShiftedWaves(**options, start=warmup_lr_rate, floor=floor) for floor in floors]
    )


def _floors(optimizer: Optimizer, min_lr: float | None, min_lr_rate: float | None) -> list[float]:
    """The share of its initial rate that each group ends at."""
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError(
            "one of min_lr and min_lr_rate must be in scheduler_specific_kwargs, got "
            f"{min_lr} and {min_lr_rate}"
        )
    if min_lr is not None:
        return [schedules.floor_of(group, min_lr) for group in optimizer.param_groups]
    if not 0.0 <= min_lr_rate <= 1.0:  # type: ignore[operator]
        raise ValueError(f"min_lr_rate must be between 0 and 1, got {min_lr_rate}")
    return [float(min_lr_rate)] * len(optimizer.param_groups)  # type: ignore[arg-type]


def _polynomial(
    optimizer: Optimizer, warmup: int, total: int, lr_end: float = 1e-7, power: float = 1.0
) -> LRScheduler:
    return schedules.polynomial(optimizer, total, warmup=warmup, min_lr=lr_end, power=power)


def _constant_with_warmup(optimizer: Optimizer, warmup: int, total: int) -> LRScheduler:
    return schedules.constant(optimizer, warmup=warmup)


def _constant(optimizer: Optimizer, warmup: int, total: int) -> LRScheduler:
    return schedules.constant(optimizer)


def _inverse_sqrt(
    optimizer: Optimizer, warmup: int, total: int, timescale: float | None = None
) -> LRScheduler:
    return schedules.inverse_sqrt(optimizer, warmup=warmup, timescale=timescale)


def _warmup_stable_decay(
    optimizer: Optimizer,
    warmup: int,
    total: int,
    num_decay_steps: int = 0,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> LRScheduler:
    if num_decay_steps <= 0:
        raise ValueError(
            "scheduler_specific_kwargs['num_decay_steps'] must be given for "
            f"'warmup_stable_decay', above 0, got {num_decay_steps}"
        )
    if num_stable_steps is None:
        num_stable_steps = total - warmup - num_decay_steps
    if num_stable_steps < 0:
        raise ValueError(
            "num_training_steps must be at least num_warmup_steps + num_decay_steps, or "
            f"num_stable_steps given and at least 0; what is left is {num_stable_steps}"
        )
    for option, shape in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if shape not in _SHAPES:
            raise ValueError(f"{option} must be one of {', '.join(_SHAPES)}; got {shape!r}")
    if not 0.0 <= min_lr_ratio <= 1.0:
        raise ValueError(f"min_lr_ratio must be between 0 and 1, got {min_lr_ratio}")
    schedules.common(optimizer, warmup, None)
    lengths = {"warmup": warmup, "stable": num_stable_steps, "decay": num_decay_steps}
    shapes = {"rise": warmup_type, "fall": decay_type}
    schedule = _StableDecay(**lengths, **shapes, floor=min_lr_ratio, waves=num_cycles)  # type: ignore[arg-type]
    return LambdaLR(optimizer, schedule)


def _reduce_on_plateau(
    optimizer: Optimizer, warmup: int, total: int, **options: Any
) -> LRScheduler:
    return ReduceLROnPlateau(optimizer, **options)


# name: (factory, needs a warm-up, needs a total)
_FACTORIES: dict[str, tuple[Callable[..., LRScheduler], bool, bool]] = {
    "linear": (_linear, True, True),
    "cosine": (_cosine, True, True),
    "cosine_with_restarts": (_cosine_with_restarts, True, True),
    "cosine_with_min_lr": (_cosine_with_min_lr, True, True),
    "cosine_warmup_with_min_lr": (_cosine_warmup_with_min_lr, True, True),
    "polynomial": (_polynomial, True, True),
    "constant": (_constant, False, False),
    "constant_with_warmup": (_constant_with_warmup, True, False),
    "inverse_sqrt": (_inverse_sqrt, True, False),
    "warmup_stable_decay": (_warmup_stable_decay, True, False),
    "reduce_lr_on_plateau": (_reduce_on_plateau, False, False),
}


def get_scheduler(
    name: str,
    optimizer: Optimizer,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: Mapping[str, Any] | None = None,
) -> LRScheduler:
    """A schedule by name, as `transformers.get_scheduler`; call its `step` once per batch.

    Args:
        name: "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
            "cosine_warmup_with_min_lr", "polynomial", "constant", "constant_with_warmup",
            "inverse_sqrt", "warmup_stable_decay" or "reduce_lr_on_plateau".
        optimizer: whose learning rates are set.
        num_warmup_steps: batches of a linear rise from 0; needed by all but "constant" and
            "reduce_lr_on_plateau".
        num_training_steps: batches in all, warm-up included; needed by names that end.
        scheduler_specific_kwargs: `num_cycles` of the cosines (whole waves, a half of one by
            default; restarts of "cosine_with_restarts"), `min_lr` or `min_lr_rate` of
            "cosine_with_min_lr" and "cosine_warmup_with_min_lr", `warmup_lr_rate` of the latter,
            `lr_end` and `power` of "polynomial", `timescale` of "inverse_sqrt"; `num_decay_steps`,
            `num_stable_steps`, `warmup_type`, `decay_type` ("linear", "cosine", "1-sqrt"),
            `min_lr_ratio` and `num_cycles` of "warmup_stable_decay"; any option of torch's
            ReduceLROnPlateau.

    Raises: ValueError for an unknown name, a missing or bad number; TypeError for an option that
    the schedule does not have.
    Differs from transformers: after `num_training_steps` a cosine stays at its end; `min_lr` and
    `lr_end` are reached by every group, whatever its initial rate; no "greedy".
    """
    name = getattr(name, "value", name)  # transformers.SchedulerType
    if name not in _FACTORIES:
        raise ValueError(f"name must be one of {', '.join(sorted(_FACTORIES))}; got {name!r}")
    factory, needs_warmup, needs_total = _FACTORIES[name]
    if needs_warmup and num_warmup_steps is None:
        raise ValueError(f"num_warmup_steps must be given for {name!r}; 0 for no warm-up")
    if needs_total and num_training_steps is None:
        raise ValueError(f"num_training_steps must be given for {name!r}")
    options = scheduler_specific_kwargs or {}
    return factory(optimizer, num_warmup_steps or 0, num_training_steps or 0, **options)
