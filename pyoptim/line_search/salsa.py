"""SaLSa: Adam or SGD whose step size is found by a smoothed Armijo line search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import Module
from torch.optim.optimizer import ParamsT

from pyoptim.line_search.base import LineSearch, Search, check_number


@dataclass(frozen=True)
class Variant:
    """The constants of a variant, and where its algorithm differs."""

    c: float
    beta3: float
    shrink: float
    growth: float
    init_step_size: float
    max_trials: int
    n_always: int  # steps that always search, at the beginning
    betas: tuple[float, float] = (0.9, 0.999)
    bias_offset: int = 0
    max_interval: int = 10
    grows_always: bool = False  # at every step, and keeps it
    grows_unsearched: bool = True  # a step without a search is made with growth*step_size
    leaves_trial: bool = False  # no momentum in steps with a search
    min_loss: float | None = None  # below which it does not search
    is_official: bool = True  # 1e-8 as smallest slope and first averages; failures collapse


_RELEASE: dict[str, Any] = {
    **{"c": 0.5, "beta3": 0.9, "shrink": 0.8, "growth": 1.1, "init_step_size": 1.0},
    **{"max_trials": 100, "n_always": 9},
}
VARIANTS = {
    "default": Variant(**_RELEASE, is_official=False),
    "release": Variant(**_RELEASE, bias_offset=1, leaves_trial=True, min_loss=1e-8),
    "paper": Variant(
        *(0.3, 0.99, 0.9, 2 ** (1 / 500), 0.1, 200, 10), grows_always=True, grows_unsearched=False
    ),
    "repaired": Variant(**_RELEASE),
}


@dataclass
class Numbers:
    """What a checkpoint holds; `decrease` and `slope` are h and s of equations (5) and (7)."""

    step_size: float
    fast: float = 1e-8
    slow: float = 1e-8
    step: int = 0
    since: int = 100
    decrease: float = 0.0
    slope: float = 0.0
    n_searches: int = 0
    n_trials: int = 0


class SaLSa(LineSearch):
    def __init__(
        self,
        params: ParamsT,
        base: Literal["adam", "sgd"] = "adam",
        variant: Literal["default", "release", "paper", "repaired"] = "default",
        c: float | None = None,
        betas: tuple[float, float] | None = None,
        beta3: float | None = None,
        shrink: float | None = None,
        growth: float | None = None,
        init_step_size: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_trials: int | None = None,
        search_interval: int | Literal["auto"] = "auto",
        use_mv: bool = False,
        max_step_size: float | None = None,
        *,
        momentum: float = 0.0,
        state_dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = True,
        module: Module | None = None,
        process_group: Any = None,
    ) -> None:
        if base not in ("adam", "sgd"):
            raise ValueError(f"base must be 'adam' or 'sgd', got {base!r}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        own = VARIANTS[variant]
        self._variant = own
        self._c = own.c if c is None else c
        self._beta3 = own.beta3 if beta3 is None else beta3
        self._shrink = own.shrink if shrink is None else shrink
        self._growth = own.growth if growth is None else growth
        self._interval, self._max_step_size = search_interval, max_step_size
        first = own.init_step_size if init_step_size is None else init_step_size
        decay_first = weight_decay if own.leaves_trial else 0.0
        options = {
            "base": base,
            "betas": own.betas if betas is None else betas,
            "eps": eps,
            "weight_decay": 0.0 if own.leaves_trial else weight_decay,
            "decay_first": decay_first,
            "momentum": momentum,
            "use_mv": use_mv,
            "bias_offset": own.bias_offset,
        }
        self._prepare(
            params,
            options,
            Numbers(first),
            own.max_trials if max_trials is None else max_trials,
            state_dtype=state_dtype,
            backend=backend,
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            module=module,
            process_group=process_group,
        )

    @property
    def interval(self) -> float:
        """L of equation (11), in steps."""
        n = self._numbers
        ratio = n.fast / n.slow
        ratio = 1 / ratio if ratio < 1 else ratio
        return min(float(self._variant.max_interval), 1 / ((ratio - 1) + 1e-8))

    def _is_due(self) -> bool:
        n = self._numbers
        interval = self.interval if self._interval == "auto" else self._interval
        return n.step + 1 <= self._variant.n_always or n.since + 1 >= interval

    def _count(self, is_search: bool) -> None:
        n = self._numbers
        n.step += 1
        n.since = 0 if is_search else n.since + 1
        if self._variant.grows_always:
            n.step_size = self._capped(n.step_size * self._growth)
        if self._variant.leaves_trial:
            self._decay_first()

    @torch.no_grad()
    def _decay_first(self) -> None:
        for group in self.param_groups:
            rate = group["decay_first"] * group["lr_scale"] * self._numbers.step_size
            if rate != 0.0:
                for param in group["params"]:
                    param.mul_(1 - rate)

    def _capped(self, step_size: float) -> float:
        return step_size if self._max_step_size is None else min(step_size, self._max_step_size)

    def _first_trial(self) -> float:
        n = self._numbers
        return (
            n.step_size if self._variant.grows_always else self._capped(n.step_size * self._growth)
        )

    def _plain_step_size(self) -> float:
        n = self._numbers
        return self._first_trial() if self._variant.grows_unsearched else n.step_size

    def _is_searchable(self, loss: float, slope: float) -> bool:
        n, b = self._numbers, self._beta3
        if self.param_groups[0]["base"] == "sgd" and self._variant.grows_always:
            slope = math.sqrt(slope)
        n.slope = b * n.slope + (1 - b) * slope
        if not self._variant.is_official:
            return slope > 0
        is_enough = loss != 0 if self._variant.min_loss is None else loss >= self._variant.min_loss
        return is_enough and n.slope >= 1e-8

    def _judge(self, step_size: float, loss: float, slope: float, trial: float) -> float | None:
        n, b = self._numbers, self._beta3
        decrease = loss - trial
        if decrease == 0:
            return None
        smoothed = b * n.decrease + (1 - b) * decrease
        if smoothed >= step_size * self._c * n.slope:
            n.decrease = smoothed
            return None
        return step_size * self._shrink

    def _settle(self, search: Search, next_size: float) -> tuple[str, float]:
        n = self._numbers
        n.step_size = next_size
        n.slow = 0.99 * n.slow + 0.01 * n.step_size
        n.fast = 0.9 * n.fast + 0.1 * n.step_size
        if self._variant.leaves_trial and search.result != "flat":
            return "trial", search.step_sizes[-1]
        return "finish", n.step_size
