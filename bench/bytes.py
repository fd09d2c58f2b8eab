"""Compulsory traffic and arithmetic of one optimizer step, per element.

Each input is read once and each output is written once: the gradient is read, the parameter and
every state are read and written. Nothing that an implementation moves on top of that is counted,
so an effective bandwidth computed from these numbers can only flatter the memory, not the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

READ = 1
READ_WRITE = 2


@dataclass(frozen=True)
class Cost:
    """Arrays and arithmetic of one rule.

    Args:
        states: names of the states with one value per element, as torch spells them.
        operations: additions, multiplications, divisions and square roots per element at the
            options which the benchmark uses; anything that depends only on the step is free.
        is_state_wide: pyoptim keeps no state below float32, whatever the parameter is.
    """

    states: tuple[str, ...]
    operations: int
    is_state_wide: bool = False


COSTS: dict[str, Cost] = {
    "sgd": Cost((), 2),
    "sgd-momentum": Cost(("momentum_buffer",), 4),
    "adam": Cost(("exp_avg", "exp_avg_sq"), 13),
    "adam-amsgrad": Cost(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), 14),
    "adamw": Cost(("exp_avg", "exp_avg_sq"), 14),
    "rmsprop": Cost(("square_avg",), 9),
    "rmsprop-momentum": Cost(("square_avg", "momentum_buffer"), 11),
    "rmsprop-centered": Cost(("square_avg", "grad_avg"), 14),
    "rmsprop-centered-momentum": Cost(("square_avg", "momentum_buffer", "grad_avg"), 16),
    "adagrad": Cost(("sum",), 7),
    "expectigrad": Cost(("sum", "counter", "momentum"), 12, is_state_wide=True),
    "expectigrad-dense": Cost(("sum", "momentum"), 11, is_state_wide=True),
    "adamp": Cost(("exp_avg", "exp_avg_sq"), 22),
    "adamp-channel": Cost(("exp_avg", "exp_avg_sq"), 26),
    "adamp-layer": Cost(("exp_avg", "exp_avg_sq"), 30),
    "sgdp": Cost(("momentum",), 14),
    "sgdp-channel": Cost(("momentum",), 18),
}


@dataclass(frozen=True)
class DtypeSet:
    """Dtype of parameter and gradient, and of the states; written `param` or `param+state`."""

    param: torch.dtype
    state: torch.dtype

    @classmethod
    def parse(cls, text: str) -> DtypeSet:
        """Read `float32`, `bfloat16`, `bfloat16+float32`, ...

        Raises: ValueError for a name that is not one of torch's floating dtypes.
        """
        names = text.split("+")
        dtypes = [getattr(torch, name, None) for name in names]
        if len(names) > 2 or not all(_is_floating(dtype) for dtype in dtypes):
            raise ValueError(
                f"dtypes: {text!r} is not PARAM or PARAM+STATE with torch's floating dtypes, "
                "for example float32 or bfloat16+float32"
            )
        return cls(dtypes[0], dtypes[-1])  # type: ignore[arg-type]

    def __str__(self) -> str:
        param, state = (str(dtype).removeprefix("torch.") for dtype in (self.param, self.state))
        return param if param == state else f"{param}+{state}"

    @property
    def has_own_state_dtype(self) -> bool:
        return self.param != self.state


def _is_floating(dtype: object) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def bytes_per_element(optimizer: str, dtypes: DtypeSet) -> int:
    """Bytes which one element of `optimizer` must move in one step."""
    param_and_grad = (READ_WRITE + READ) * dtypes.param.itemsize
    return param_and_grad + READ_WRITE * dtypes.state.itemsize * len(COSTS[optimizer].states)
