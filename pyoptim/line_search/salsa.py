"""SaLSa: Adam or SGD whose step size is found by a smoothed Armijo line search."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import Module
from torch.optim.optimizer import ParamsT

from pyoptim.line_search.base import LineSearch, Search, check_choice, check_number


@dataclass(frozen=True)
class Settings:
    """The constants of a variant, and where its algorithm differs.

    Args:
        n_always: steps that search, whatever the interval, at the beginning.
        search_interval: steps from one search to the next; None is "auto".
        max_interval: the upper bound of "auto".
        interval_growth: the interval grows by this factor after a search that rejected at most one
            step size, and halves after any other; None is equation (11).
        grows_always: the step size grows at every step.
        grows_unsearched: steps without a search are made with growth*step_size.
        leaves_trial: steps with a search have no momentum.
        min_loss: below it there is no search; None is exactly 0.
        is_official: no search where the averaged slope is below 1e-8; what the last of
            `max_trials` rejections has left is used and kept.
        interpolates: a rejected trial that is far off is followed by the minimum of a parabola.
    """

    c: float = 0.5
    beta3: float = 0.9
    shrink: float = 0.8
    growth: float = 1.1
    init_step_size: float = 1.0
    max_trials: int = 100
    n_always: int = 9
    betas: tuple[float, float] = (0.9, 0.999)
    bias_offset: int = 0
    search_interval: int | None = None
    max_interval: int = 10
    max_step_size: float | None = None
    interval_growth: float | None = None
    grows_always: bool = False
    grows_unsearched: bool = True
    leaves_trial: bool = False
    min_loss: float | None = None
    is_official: bool = True
    interpolates: float = 1.0


VARIANTS = {
    "default": Settings(
        c=0.3,
        max_interval=32,
        interval_growth=1.5,
        grows_unsearched=False,
        is_official=False,
        interpolates=0.1,
    ),
    "release": Settings(bias_offset=1, leaves_trial=True, min_loss=1e-8),
    "paper": Settings(
        c=0.3,
        beta3=0.99,
        shrink=0.9,
        growth=2 ** (1 / 500),
        init_step_size=0.1,
        max_trials=200,
        n_always=10,
        grows_always=True,
        grows_unsearched=False,
    ),
    "repaired": Settings(),
}


@dataclass
class Numbers:
    """What a checkpoint holds.

    Args:
        fast, slow: averages of the step size, equation (8).
        interval: from this search to the next, of the variant "default".
        since: steps since the last search.
        decrease, slope: h and s of equations (5) and (7).
    """

    step_size: float
    fast: float = 1e-8
    slow: float = 1e-8
    interval: float = 1.0
    step: int = 0
    since: int = 100
    decrease: float = 0.0
    slope: float = 0.0
    n_searches: int = 0
    n_trials: int = 0


class SaLSa(LineSearch):
    """SaLSa: Adam (or SGD) without a learning rate.

    Some steps search for their step size eta along d = g/(sqrt(v_hat) + eps) (SGD: d = g), on the
    mini-batch of the step, until the loss has decreased enough, averaged over searches:

        h = beta3*h + (1-beta3)*(loss(p) - loss(p - eta*d));  s = beta3*s + (1-beta3)*<g, d>
        accept eta if h >= c*eta*s, else eta = shrink*eta;  the next search begins at growth*eta

    The step that is then made has momentum, as all steps in between with the last eta:

        p = (1 - eta*weight_decay)*p - eta*m_hat/(sqrt(v_hat) + eps)

    `step(closure)` runs the backward pass itself: the closure computes the loss and returns it.

        optimizer = pyoptim.SaLSa(model.parameters())
        for x, y in batches:
            loss = optimizer.step(lambda: loss_fn(model(x), y))

    Args:
        params: tensors, named tensors or groups; floating-point; any shape and strides. A group may
            have `weight_decay`, `betas`, `eps`, and `lr_scale`, its rate relative to the others.
        base: "adam", or "sgd", whose momentum is an average: eta times
            (1-momentum)*sum(momentum^i*g_i).
        variant: "default"; "paper", the class behind the published figures; "release", what the
            authors' package does; "repaired", the release with the paper's momentum in the step.
            All but "default" reproduce their originals; see docs/line-search.md for what differs.
        c: part of the promised decrease that is demanded; larger is more careful.
        betas: decay rates of the averages of the gradient and of its square.
        beta3: decay rate of the averages of the test; 0 is the plain Armijo condition.
        shrink: factor after a rejection.
        growth: factor before the first trial of a search ("paper": at every step).
        init_step_size: eta before the first search.
        eps: added to the root.
        weight_decay: decoupled, per unit of eta*lr_scale.
        max_trials: rejections after which a search fails: the step is made with shrink times the
            eta before the search.
        search_interval: steps from one search to the next; "auto" lets them become rare.
        use_mv: search along m_hat in the place of g. The authors recommend it; it diverges.
        max_step_size: a bound of eta; None has none.
        momentum: of base "sgd"; 0 keeps no buffer.
        state_dtype: torch.float32 keeps the moments of half-precision parameters in float32.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None follows `use_backend`.
        max_grad_norm: clip the 2-norm of all gradients together to this before the search; None
            does not clip. The gradients are not written.
        master_weights: keep half-precision parameters in float32 as well, of which they are the
            rounding; without, steps below their resolution are lost.
        module: the model, whose buffers trials must not move. None is every module that the closure
            calls, found by a hook in steps with a search, which torch.compile dislikes.
        process_group: over which losses and slopes are averaged before they are compared; None is
            all processes if torch.distributed runs, False this one alone.

    `c` to `init_step_size` and `max_trials` of None are the variant's own.

    Attributes for logging: `step_size`, `last_search` (a `line_search.Search`), `n_searches`,
    `n_trials`, `interval`, and `lr` of every group, which is written after each step. To scale
    steps, but not trials, set `rate_factor`.

    State per param: step (0-dim), exp_avg, exp_avg_sq (Adam) or momentum_buffer, and master_param
    (float32) of half-precision parameters. The numbers of the search are in the state_dict's
    groups, key "line_search".
    Raises: ValueError for an option out of range; BackendError if `backend` cannot run here.
    Source: Kenneweg et al., arXiv:2407.20650 (No learning rates needed: introducing SALSA), and the
    authors' code.
    """

    _numbers: Numbers
    _settings: Settings

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
        check_choice("base", base, ("adam", "sgd"))
        settings = _settings_of(
            variant,
            c=c,
            betas=betas,
            beta3=beta3,
            shrink=shrink,
            growth=growth,
            init_step_size=init_step_size,
            max_trials=max_trials,
            max_step_size=max_step_size,
            search_interval=None if search_interval == "auto" else search_interval,
        )
        self._prepare(
            params,
            _options(settings, base, eps, weight_decay, momentum, use_mv),
            settings,
            Numbers(settings.init_step_size),
            state_dtype=state_dtype,
            backend=backend,
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            module=module,
            process_group=process_group,
        )

    # -- when --------------------------------------------------------------------------------------

    @property
    def interval(self) -> float:
        """Steps from the last search to the next; L of equation (11) if the variant follows it."""
        own, n = self._settings, self._numbers
        if own.search_interval is not None:
            return own.search_interval
        if own.interval_growth is not None:
            return n.interval
        ratio = n.fast / n.slow
        ratio = 1 / ratio if ratio < 1 else ratio
        return min(float(own.max_interval), 1 / ((ratio - 1) + 1e-8))

    def _is_due(self) -> bool:
        n = self._numbers
        return n.step + 1 <= self._settings.n_always or n.since + 1 >= self.interval

    def _count(self, is_search: bool) -> None:
        n = self._numbers
        n.step += 1
        n.since = 0 if is_search else n.since + 1
        if self._settings.grows_always:
            n.step_size = self._grown()
        if self._settings.leaves_trial:
            self._decay_first()

    @torch.no_grad()
    def _decay_first(self) -> None:
        for group in self.param_groups:
            rate = group["decay_first"] * group["lr_scale"] * self._numbers.step_size
            if rate != 0.0:
                for param in group["params"]:
                    param.mul_(1 - rate)

    # -- how far -----------------------------------------------------------------------------------

    def _grown(self) -> float:
        size, bound = self._numbers.step_size * self._settings.growth, self._settings.max_step_size
        return size if bound is None else min(size, bound)

    def _first_trial(self) -> float:
        return self._numbers.step_size if self._settings.grows_always else self._grown()

    def _plain_step_size(self) -> float:
        return self._grown() if self._settings.grows_unsearched else self._numbers.step_size

    def _is_searchable(self, loss: float, slope: float) -> bool:
        own, n = self._settings, self._numbers
        if own.grows_always and self.param_groups[0]["base"] == "sgd":
            slope = math.sqrt(slope)  # as the authors' code, against their equation
        n.slope = own.beta3 * n.slope + (1 - own.beta3) * slope
        if not own.is_official:
            return slope > 0
        is_enough = loss != 0 if own.min_loss is None else loss >= own.min_loss
        return is_enough and n.slope >= 1e-8

    def _judge(self, step_size: float, loss: float, slope: float, trial: float) -> float | None:
        own, n = self._settings, self._numbers
        decrease = loss - trial
        if decrease == 0:
            return None
        smoothed = own.beta3 * n.decrease + (1 - own.beta3) * decrease
        if smoothed >= step_size * own.c * n.slope:
            n.decrease = smoothed
            return None
        if n.step > own.n_always:
            return step_size * own.shrink
        if own.interpolates < 1.0 and math.isfinite(decrease):
            # The parabola through the loss before, its slope, and this loss.
            promised = slope * step_size
            ratio = promised / (2 * (promised - decrease)) if promised > decrease else own.shrink
            return step_size * max(own.interpolates, min(own.shrink, ratio))
        return step_size * min(own.shrink, own.interpolates)

    def _settle(self, search: Search, next_size: float) -> tuple[str, float]:
        own, n = self._settings, self._numbers
        if not own.is_official and search.result == "failed":
            next_size = n.step_size * own.shrink
        if not own.is_official and search.result == "flat":
            return "finish", n.step_size
        if own.interval_growth is not None:
            is_confirmed = search.result == "accepted" and len(search.losses) <= 2
            factor = own.interval_growth if is_confirmed else 0.5
            n.interval = min(max(1.0, n.interval * factor), own.max_interval)
        n.step_size = next_size
        n.slow = 0.99 * n.slow + 0.01 * n.step_size
        n.fast = 0.9 * n.fast + 0.1 * n.step_size
        if own.leaves_trial and search.result != "flat":
            return "trial", search.step_sizes[-1]
        return "finish", n.step_size


def _options(
    settings: Settings, base: str, eps: float, weight_decay: float, momentum: float, use_mv: bool
) -> dict[str, Any]:
    """Of every group."""
    return {
        "base": base,
        "betas": settings.betas,
        "eps": eps,
        # The released code decays before the trials, and by the last step size.
        "weight_decay": 0.0 if settings.leaves_trial else weight_decay,
        "decay_first": weight_decay if settings.leaves_trial else 0.0,
        "momentum": momentum,
        "use_mv": use_mv,
        "bias_offset": settings.bias_offset,
    }


def _settings_of(variant: str, **given: Any) -> Settings:
    """The variant's own where what is given is None.

    Raises: ValueError for a setting out of range.
    """
    check_choice("variant", variant, tuple(VARIANTS))
    own = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(VARIANTS[variant], **own)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    check_number("c", settings.c, 0.0)
    check_number("beta3", settings.beta3, 0.0, 1.0)
    check_number("shrink", settings.shrink, 0.0, 1.0, open_end=True)
    check_number("growth", settings.growth, 1.0)
    check_number("init_step_size", settings.init_step_size, 0.0, open_end=True)
    check_number("max_trials", settings.max_trials, 1)
    if settings.search_interval is not None:
        check_number("search_interval", settings.search_interval, 1)
    if settings.max_step_size is not None:
        check_number("max_step_size", settings.max_step_size, 0.0, open_end=True)
