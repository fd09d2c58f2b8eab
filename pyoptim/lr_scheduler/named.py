"""Schedules by the names, arguments and values of `transformers.get_scheduler`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyoptim.lr_scheduler import schedules


def _linear(optimizer: Optimizer, warmup: int, total: int) -> LRScheduler:
    return schedules.linear(optimizer, total, warmup=warmup)


def _cosine(optimizer: Optimizer, warmup: int, total: int) -> LRScheduler:
    return schedules.cosine(optimizer, total, warmup=warmup)


def _cosine_with_restarts(
    optimizer: Optimizer, warmup: int, total: int, num_cycles: int = 1
) -> LRScheduler:
    return schedules.cosine(optimizer, total, warmup=warmup, n_cycles=num_cycles)


def _cosine_with_min_lr(
    optimizer: Optimizer, warmup: int, total: int, min_lr: float = 0.0
) -> LRScheduler:
    return schedules.cosine(optimizer, total, warmup=warmup, min_lr=min_lr)


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
    optimizer: Optimizer, warmup: int, total: int, num_decay_steps: int = 0, min_lr: float = 0.0
) -> LRScheduler:
    if num_decay_steps <= 0:
        raise ValueError(
            "scheduler_specific_kwargs['num_decay_steps'] must be given for "
            f"'warmup_stable_decay', above 0, got {num_decay_steps}"
        )
    return schedules.warmup_stable_decay(
        optimizer, total, warmup=warmup, decay=num_decay_steps, min_lr=min_lr
    )


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
    "polynomial": (_polynomial, True, True),
    "constant": (_constant, False, False),
    "constant_with_warmup": (_constant_with_warmup, True, False),
    "inverse_sqrt": (_inverse_sqrt, True, False),
    "warmup_stable_decay": (_warmup_stable_decay, True, True),
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
        name: "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
            "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay" or
            "reduce_lr_on_plateau".
        optimizer: whose learning rates are set.
        num_warmup_steps: batches of a linear rise from 0; needed by all but "constant" and
            "reduce_lr_on_plateau".
        num_training_steps: batches in all, warm-up included; needed by names that end.
        scheduler_specific_kwargs: `num_cycles` of "cosine_with_restarts", `min_lr` of
            "cosine_with_min_lr" and "warmup_stable_decay", `lr_end` and `power` of "polynomial",
            `timescale` of "inverse_sqrt", `num_decay_steps` of "warmup_stable_decay", any option of
            torch's ReduceLROnPlateau.

    Raises: ValueError for an unknown name, a missing or bad number; TypeError for an option that
    the schedule does not have.
    Differs from transformers: after `num_training_steps` the cosine stays at its end.
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
