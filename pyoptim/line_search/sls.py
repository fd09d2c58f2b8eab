"""SLS and AdaSLS: stochastic Armijo and Goldstein line searches, for SGD and adaptive methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import Module
from torch.optim.optimizer import ParamsT

from pyoptim.line_search.base import LineSearch, Search, check_choice, check_number

# What is stepped with where no trial was accepted.
_FALLBACK = 1e-6


@dataclass(frozen=True)
class Settings:
    """The constants of a search; `stretch` is Goldstein's."""

    growth: float
    init_step_size: float
    c: float
    shrink: float
    reset_option: int
    max_step_size: float | None = None
    stretch: float | None = None
    max_trials: int = 100


@dataclass
class Numbers:
    """What a checkpoint holds."""

    step_size: float
    step: int = 0
    n_searches: int = 0
    n_trials: int = 0


def _settings(
    n_batches_per_epoch: float,
    init_step_size: float,
    c: float,
    beta_b: float,
    gamma: float,
    reset_option: int,
    **more: Any,
) -> Settings:
    check_number("n_batches_per_epoch", n_batches_per_epoch, 0.0, open_end=True)
    check_number("init_step_size", init_step_size, 0.0, open_end=True)
    check_number("c", c, 0.0)
    check_number("beta_b", beta_b, 0.0, 1.0, open_end=True)
    check_number("gamma", gamma, 1.0)
    check_choice("reset_option", reset_option, (0, 1, 2))
    growth = gamma ** (1.0 / n_batches_per_epoch)
    return Settings(growth, init_step_size, c, beta_b, reset_option, **more)


class _Stochastic(LineSearch):
    """A search at every step, by the losses of that step alone."""

    _numbers: Numbers
    _settings: Settings

    def _is_due(self) -> bool:
        return True

    def _first_trial(self) -> float:
        last, own = self._numbers.step_size, self._settings
        size = {0: last, 1: last * own.growth, 2: own.init_step_size}[own.reset_option]
        return size if own.max_step_size is None else min(size, own.max_step_size)

    def _judge(self, step_size: float, loss: float, slope: float, trial: float) -> float | None:
        # In the order of the official code, so that rounding decides the same.
        if trial - (loss - step_size * self._settings.c * slope) <= 0:
            return None
        return step_size * self._settings.shrink


class SLS(_Stochastic):
    """Stochastic line search: SGD whose step size meets the Armijo condition on each mini-batch.

        loss(p - eta*g) <= loss(p) - c*eta*|g|^2;  until then eta = beta_b*eta

    Every step searches, from eta*gamma^(1/n_batches_per_epoch) on.

    Args:
        params: tensors, named tensors or groups; floating-point; a group may have `lr_scale`, its
            learning rate relative to the others.
        n_batches_per_epoch: steps in which eta could grow by gamma.
        init_step_size: the first eta.
        c: part of the promised decrease that is demanded.
        beta_b: factor after a rejection.
        gamma: growth of eta per epoch.
        beta_f: Goldstein's factor after a step that was too short.
        reset_option: where a search starts: 0 at the last eta, 1 at that times
            gamma^(1/n_batches_per_epoch), 2 at init_step_size.
        eta_max: the largest eta of the Goldstein search.
        bound_step_size: whether eta_max holds.
        line_search_fn: "armijo", or "goldstein", which also demands
            loss(p - eta*g) >= loss(p) - (1-c)*eta*|g|^2 and else tries eta*beta_f.
        weight_decay: decoupled, p = (1 - eta*weight_decay)*p.
        state_dtype, backend, max_grad_norm, master_weights, module, process_group: as `SaLSa`.

    State: `step` per parameter; the numbers of the search are in the state_dict's groups.
    Raises: ValueError for an option out of range.
    Source: Vaswani et al., arXiv:1905.09997, Algorithm 1. Differs from the official code in that
    all groups share one search, and that losses and gradients that are not finite, random numbers,
    buffers and processes are treated as in `SaLSa`. As there, a step whose 100 trials were all
    rejected is made with 1e-6. With a gradient of zero nothing moves.
    """

    def __init__(
        self,
        params: ParamsT,
        n_batches_per_epoch: float = 500,
        init_step_size: float = 1.0,
        c: float = 0.1,
        beta_b: float = 0.9,
        gamma: float = 2.0,
        beta_f: float = 2.0,
        reset_option: int = 1,
        eta_max: float = 10.0,
        bound_step_size: bool = True,
        line_search_fn: Literal["armijo", "goldstein"] = "armijo",
        *,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = True,
        module: Module | None = None,
        process_group: Any = None,
    ) -> None:
        check_choice("line_search_fn", line_search_fn, ("armijo", "goldstein"))
        check_number("beta_f", beta_f, 1.0, open_end=True)
        check_number("eta_max", eta_max, 0.0, open_end=True)
        is_goldstein = line_search_fn == "goldstein"
        settings = _settings(
            *(n_batches_per_epoch, init_step_size, c, beta_b, gamma, reset_option),
            max_step_size=eta_max if is_goldstein and bound_step_size else None,
            stretch=beta_f if is_goldstein else None,
        )
        options = {"base": "sgd", "betas": (0.0, 0.0), "eps": 0.0, "momentum": 0.0, "use_mv": False}
        self._prepare(
            params,
            {**options, "weight_decay": weight_decay},
            settings,
            Numbers(init_step_size),
            state_dtype=state_dtype,
            backend=backend,
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            module=module,
            process_group=process_group,
        )

    def _is_searchable(self, loss: float, slope: float) -> bool:
        return slope >= 1e-16  # a norm of 1e-8

    def _judge(self, step_size: float, loss: float, slope: float, trial: float) -> float | None:
        shorter, own = super()._judge(step_size, loss, slope, trial), self._settings
        if shorter is not None or own.stretch is None:
            return shorter
        if trial - (loss - step_size * (1 - own.c) * slope) >= 0:
            return None
        longer = step_size * own.stretch
        if own.max_step_size is not None:
            longer = min(longer, own.max_step_size)
        return longer if longer > step_size else None

    def _settle(self, search: Search, next_size: float) -> tuple[str, float]:
        self._numbers.step_size = next_size
        if search.result == "flat":
            return "trial", 0.0
        has_decay = any(group["weight_decay"] != 0 for group in self.param_groups)
        size = _FALLBACK if search.result == "failed" else next_size
        return "finish" if has_decay else "trial", size


class AdaSLS(_Stochastic):
    """Stochastic line search along the direction of an adaptive method.

        loss(p - eta*D*g) <= loss(p) - c*eta*<g, D*g>;  until then eta = beta_b*eta
        p = p - eta*D*m_hat,  D = 1/(sqrt(v_hat) + eps)

    Every step searches, from eta*gamma^(1/n_batches_per_epoch) on.

    Args:
        params, n_batches_per_epoch, init_step_size, c, beta_b, gamma, reset_option: as `SLS`.
        base_opt: whose v is used: "adagrad" (sum of squares), "rmsprop", "adam" (bias-corrected) or
            "amsgrad" (largest so far).
        beta: decay rate of v.
        momentum: decay rate of m in the step; the trials have none.
        eps: added to the root.
        eta_max: the largest eta tried; None has no bound.
        weight_decay: decoupled, p = (1 - eta*weight_decay)*p.
        state_dtype, backend, max_grad_norm, master_weights, module, process_group: as `SaLSa`.

    State per param: step, exp_avg (with momentum), exp_avg_sq or sum, max_exp_avg_sq (amsgrad).
    Raises: ValueError for an option out of range.
    Source: Vaswani et al., arXiv:2006.06835. Differs from the official code as `SLS`; as there,
    1e-6 is used and kept after 100 rejections.
    """

    def __init__(
        self,
        params: ParamsT,
        n_batches_per_epoch: float = 500,
        init_step_size: float = 1.0,
        c: float = 0.1,
        beta_b: float = 0.9,
        gamma: float = 2.0,
        base_opt: Literal["adagrad", "rmsprop", "adam", "amsgrad"] = "adagrad",
        beta: float = 0.99,
        momentum: float = 0.0,
        reset_option: int = 1,
        eps: float = 1e-8,
        eta_max: float | None = None,
        *,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = True,
        module: Module | None = None,
        process_group: Any = None,
    ) -> None:
        check_choice("base_opt", base_opt, ("adagrad", "rmsprop", "adam", "amsgrad"))
        if eta_max is not None:
            check_number("eta_max", eta_max, 0.0, open_end=True)
        settings = _settings(
            *(n_batches_per_epoch, init_step_size, c, beta_b, gamma, reset_option),
            max_step_size=eta_max,
        )
        options = {"base": base_opt, "betas": (momentum, beta), "eps": eps, "momentum": 0.0}
        self._prepare(
            params,
            {**options, "weight_decay": weight_decay, "use_mv": False},
            settings,
            Numbers(init_step_size),
            state_dtype=state_dtype,
            backend=backend,
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            module=module,
            process_group=process_group,
        )

    def _settle(self, search: Search, next_size: float) -> tuple[str, float]:
        size = _FALLBACK if search.result == "failed" else next_size
        self._numbers.step_size = size
        is_plain = all(
            group["betas"][0] == 0 and group["weight_decay"] == 0 for group in self.param_groups
        )
        return "trial" if is_plain else "finish", size
