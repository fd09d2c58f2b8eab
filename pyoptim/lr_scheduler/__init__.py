"""Learning-rate control: schedules as functions of the step, and ARC, a trained controller."""

from pyoptim.lr_scheduler.arc import ARC, Decision
from pyoptim.lr_scheduler.named import get_scheduler
from pyoptim.lr_scheduler.schedules import (
    constant,
    cosine,
    cosine_with_restarts,
    cyclic_cosine,
    exponential,
    inverse_sqrt,
    linear,
    polynomial,
    warmup_stable_decay,
)

__all__ = [
    "ARC",
    "Decision",
    "constant",
    "cosine",
    "cosine_with_restarts",
    "cyclic_cosine",
    "exponential",
    "get_scheduler",
    "inverse_sqrt",
    "linear",
    "polynomial",
    "warmup_stable_decay",
]
