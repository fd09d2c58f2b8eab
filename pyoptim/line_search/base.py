"""LineSearch: a step that tries step sizes on its own mini-batch."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, distributed
from torch._compile import _disable_dynamo
from torch.nn import Module
from torch.optim import Optimizer

from pyoptim import backend, norms
from pyoptim.line_search.closures import Buffers, Closure, Evaluation, RandomState
from pyoptim.line_search.direction import ReferenceDirection, state_names
from pyoptim.line_search.fused import FusedDirection
from pyoptim.norms import _outside_graphs as outside_graphs
from pyoptim.optimizer import FusedOptimizer
from pyoptim.rows import HALF_DTYPES

Result = Literal["accepted", "failed", "flat", "unusable"]


class Direction(Protocol):
    """What a line search needs of parameters and moments; see `direction.ReferenceDirection`."""

    def start(self, eta: float, grad_factor: float | Tensor = 1.0) -> Tensor: ...
    def trial(self, eta: float) -> None: ...
    def finish(self, eta: float) -> None: ...
    def accept(self) -> None: ...
    def restore(self) -> None: ...
    def undo(self) -> None: ...
    def plain(self, eta: float, grad_factor: float | Tensor = 1.0) -> None: ...


@dataclass(frozen=True)
class Search:
    """What a search did, for logging.

    Args:
        step: number of the step, from 1.
        result: "accepted"; "failed" after `max_trials` rejections; "flat" where the rule had
            nothing to search for, such as gradients of zero; "unusable" where loss or gradients
            were not finite, so that no step was made.
        loss: before the step, averaged over processes.
        slope: the decrease of the loss along the direction that the gradient promises per unit of
            step size.
        step_sizes: that were tried.
        losses: of these trials.
        step_size: that the step was made with.
    """

    step: int
    result: Result
    loss: float
    slope: float
    step_sizes: tuple[float, ...]
    losses: tuple[float, ...]
    step_size: float = 0.0


class LineSearch(FusedOptimizer):
    """Base of the line searches: closures, random numbers, buffers, processes, checkpoints.

    A subclass keeps its numbers in `_numbers`, a dataclass of all that a checkpoint must hold, with
    at least `step`, `step_size`, `n_searches` and `n_trials`, and its constants in `_settings`,
    with at least `max_trials`. It says when to search, what to try, what to accept, how to move.
    """

    rule = "line_search"
    _numbers: Any
    _settings: Any
    # Multiplies the steps that are made, not the trials.
    rate_factor: float = 1.0
    # The last search, None before the first.
    last_search: Search | None = None
    _module: Module | None = None
    _process_group: Any = None
    # Half-precision parameters with master copies, and their versions after the last step.
    _halves: Sequence[Tensor] = ()
    _written: dict[Tensor, int]
    _is_in_trial = False
    _has_warned = False

    # -- what a subclass says ----------------------------------------------------------------------

    def _is_due(self) -> bool:
        """Whether the next step is to search."""
        raise NotImplementedError

    def _plain_step_size(self) -> float:
        """The step size of a step without a search."""
        return float(self._numbers.step_size)

    def _count(self, is_search: bool) -> None:
        """Counts the step, and does to the numbers what is done at every step."""
        self._numbers.step += 1

    def _first_trial(self) -> float:
        raise NotImplementedError

    def _is_searchable(self, loss: float, slope: float) -> bool:
        """Whether there is anything to search for; called once, before the first judgement."""
        return True

    def _judge(self, step_size: float, loss: float, slope: float, trial: float) -> float | None:
        """Returns None to accept the trial, or the next step size to try."""
        raise NotImplementedError

    def _settle(self, search: Search, next_size: float) -> tuple[str, float]:
        """Takes the result of a search into the numbers.

        Args:
            next_size: what would be tried next after a failure.

        Returns:
            How to move ("finish": the momentum step, "trial": along the trials' direction) and the
            step size.
        """
        raise NotImplementedError

    # -- construction ------------------------------------------------------------------------------

    def _prepare(
        self,
        params: Any,
        options: dict[str, Any],
        settings: Any,
        numbers: Any,
        *,
        state_dtype: torch.dtype | None,
        backend: str | None,
        max_grad_norm: float | None,
        master_weights: bool,
        module: Module | None,
        process_group: Any,
    ) -> None:
        self._configure(state_dtype, backend, max_grad_norm)
        self._settings, self._numbers = settings, numbers
        self._module, self._process_group = module, process_group
        self._written = {}
        Optimizer.__init__(
            self, params, {**options, "lr_scale": 1.0, "master_weights": master_weights}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its own `lr_scale`, `weight_decay`, `betas` and `eps` go before ours.

        Raises: ValueError for `lr`, which the search chooses, or an option out of range.
        """
        if isinstance(param_group, dict):
            if "lr" in param_group:
                raise ValueError(
                    f"{type(self).__name__} chooses the learning rate; give the group a relative "
                    "one, lr_scale"
                )
            _check_options({**self.defaults, **param_group})
            for name in ("base", "momentum"):
                if param_group.get(name, self.defaults[name]) != self.defaults[name]:
                    raise ValueError(f"{name} must be the same for all groups")
        super().add_param_group(param_group)
        self._show_rates(self._numbers.step_size)

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return state_names(group)

    @property
    def step_size(self) -> float:
        """The step size of now; set it to start the next search elsewhere."""
        return float(self._numbers.step_size)

    @step_size.setter
    def step_size(self, value: float) -> None:
        check_number("step_size", value, 0.0, open_end=True)
        self._numbers.step_size = float(value)
        self._show_rates(value)

    @property
    def n_searches(self) -> int:
        """Steps with a search so far."""
        return int(self._numbers.n_searches)

    @property
    def n_trials(self) -> int:
        """Trial evaluations so far: forward passes that a plain optimizer would not have made."""
        return int(self._numbers.n_trials)

    # -- stepping ----------------------------------------------------------------------------------

    @outside_graphs
    def step(
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        grad_scaler: Any = None,
    ) -> Any:
        """Makes a step, with a search if one is due.

        Args:
            closure: computes the loss of a mini-batch and returns it, a tensor with one element;
                `backward` is run here. It is called once per step and once per trial, on trials
                with gradients disabled and the same random numbers. A closure with a parameter
                `backward` (or `backwards`) is called with it and runs its backward pass itself when
                it is True. A list of closures, one per micro-batch, accumulates the gradients of
                their mean.
            grad_scaler: a torch.amp.GradScaler; it scales the loss, unscales the gradients, and
                skips the step after an overflow. Call its `update()` afterwards.

        Returns:
            The loss before the step, detached.

        Raises:
            TypeError, ValueError, RuntimeError: the closure, the loss or a gradient cannot be used.
                Whatever a trial raises passes through. Weights, moments, step counts and random
                numbers are as before.
        """
        is_own = type(self).step is LineSearch.step  # torch has wrapped any other
        if is_own and self._has_observers():
            return self._make_observed_step(closure, grad_scaler)
        return self._make_step(closure, grad_scaler)

    # torch would wrap step() in what costs 10 us and is of use only to hooks and profilers.
    step.hooked = True  # type: ignore[attr-defined]

    def _make_step(self, closure: Closure | Sequence[Closure] | None, grad_scaler: Any) -> Any:
        if closure is None:
            self._step_without_closure()
            return None
        self._notice_foreign_rates()
        evaluation = Evaluation(closure, self._params())
        self.zero_grad()
        if self._is_due():
            return self._searched_step(evaluation, grad_scaler)
        loss = evaluation.with_gradients(_scale(grad_scaler))
        if self._has_overflow(grad_scaler):
            return loss
        factor = self._grad_factor()
        if self._halves:
            self._fill_masters(may_be_new=False)
        numbers = vars(self._numbers).copy()  # for a tenth of the time of dataclasses.replace
        try:
            self._count(False)
            step_size = self._plain_step_size()
            self._direction.plain(step_size * self._damping, factor)
        except BaseException:
            vars(self._numbers).update(numbers)
            raise
        self._end(step_size)
        return loss

    _make_observed_step = Optimizer.profile_hook_step(_make_step)

    def _searched_step(self, evaluation: Evaluation, grad_scaler: Any) -> Tensor:
        random = RandomState({p.device for p in self._params()})
        buffers = Buffers(self._module)
        with buffers.watched():
            loss = evaluation.with_gradients(_scale(grad_scaler))
        random.mark_end()
        if self._has_overflow(grad_scaler):
            return loss
        factor, direction, numbers = self._grad_factor(), self._direction, self._numbers
        self._fill_masters(may_be_new=True)
        self._numbers = dataclasses.replace(numbers)
        grads = [p.grad for p in self._params()]
        try:
            self._count(True)
            step_size = self._first_trial()
            slope = direction.start(step_size, factor)
        except BaseException:
            self._numbers = numbers
            raise
        try:
            evaluate = self._replayed(evaluation, random, buffers, grads)
            search, next_size = self._search(direction, step_size, loss, slope, evaluate)
            if search.result == "unusable":
                direction.undo()
                self._numbers = numbers
            else:
                search = self._move(direction, search, next_size)
        except BaseException:
            direction.undo()
            self._numbers = numbers
            random.rewind()
            raise
        self._numbers.n_searches += 1
        self._numbers.n_trials += len(search.losses)
        self.last_search = search
        self._end(search.step_size)
        return loss

    def _search(
        self,
        direction: Direction,
        step_size: float,
        loss: Tensor,
        slope: Tensor,
        evaluate: Callable[[], Tensor],
    ) -> tuple[Search, float]:
        """Tries step sizes; returns what came out, and what would be tried next."""
        # The loss before, the slope and the first trial come to the host together.
        start, steepness, trial = self._read(loss, slope, evaluate())
        tried, losses = [step_size], [trial]
        step = int(self._numbers.step)

        def ended(result: Result) -> Search:
            return Search(step, result, start, steepness, tuple(tried), tuple(losses))

        if not (math.isfinite(start) and math.isfinite(steepness)):
            return ended("unusable"), step_size
        if not self._is_searchable(start, steepness):
            return ended("flat"), step_size
        while True:
            next_size = self._judge(step_size, start, steepness, trial)
            if next_size is None:
                return ended("accepted"), step_size
            if len(losses) == self._settings.max_trials:
                return ended("failed"), next_size
            step_size = next_size
            direction.trial(step_size)
            (trial,) = self._read(evaluate())
            tried.append(step_size)
            losses.append(trial)

    def _move(self, direction: Direction, search: Search, next_size: float) -> Search:
        way, step_size = self._settle(search, next_size)
        rate = step_size * (self._damping if way == "finish" else self.rate_factor)
        if way == "finish":
            direction.finish(rate)
            return dataclasses.replace(search, step_size=step_size)
        if rate == 0.0:
            direction.restore()
        elif rate != search.step_sizes[-1]:
            direction.trial(rate)
        direction.accept()
        return dataclasses.replace(search, step_size=step_size)

    def _replayed(
        self,
        evaluation: Evaluation,
        random: RandomState,
        buffers: Buffers,
        grads: list[Tensor | None],
    ) -> Callable[[], Tensor]:
        """Returns what evaluates a trial; it leaves random numbers and buffers as they were."""

        def evaluate() -> Tensor:
            random.rewind()
            self._is_in_trial = True
            try:
                loss = evaluation.trial()
            finally:
                self._is_in_trial = False
                random.advance()
                buffers.restore()
            if any(p.grad is not g for p, g in zip(self._params(), grads, strict=True)):
                self._put_back(grads)
                raise RuntimeError(
                    "the closure replaced gradients in a trial; call zero_grad() outside of it"
                )
            return loss

        return evaluate

    def _put_back(self, grads: list[Tensor | None]) -> None:
        for param, grad in zip(self._params(), grads, strict=True):
            param.grad = grad

    def _step_without_closure(self) -> None:
        """What torch's distributed checkpoints call, with all rates at 0, to make state."""
        if any(float(group["lr"]) != 0.0 for group in self.param_groups):
            raise TypeError(
                f"{type(self).__name__}.step() needs a closure that computes and returns the loss: "
                "optimizer.step(lambda: loss_fn(model(x), y))"
            )
        self._fill_masters(may_be_new=True)
        self._direction.plain(0.0)

    @property
    def _damping(self) -> float:
        """What multiplies a momentum step: SGD's buffer is a sum, of which we want the mean."""
        group = self.param_groups[0]
        is_sum = group["base"] == "sgd" and group["momentum"] != 0
        return self.rate_factor * (1.0 - group["momentum"] if is_sum else 1.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients; without effect when a closure calls it in a trial."""
        if not self._is_in_trial:
            super().zero_grad(set_to_none)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _direction(self) -> Direction:
        choice = self.backend or backend.chosen()
        kept = self.__dict__.setdefault("_directions", {})
        if choice not in kept:
            is_plain = choice == "reference" or backend.native() is None
            kept[choice] = (ReferenceDirection if is_plain else FusedDirection)(self)
        direction: Direction = kept[choice]
        return direction

    # -- numbers on the host -----------------------------------------------------------------------

    @torch.no_grad()
    def _read(self, *values: Tensor) -> list[float]:
        """Averages over processes and waits for the device, once."""
        device = values[-1].device
        wide = [v.detach().reshape(()).to(device, torch.float64, non_blocking=True) for v in values]
        numbers = torch.stack(wide)
        group = self._group()
        if group is not None:
            distributed.all_reduce(numbers, group=group)
            numbers /= distributed.get_world_size(group)
        result: list[float] = numbers.tolist()
        return result

    def _group(self) -> Any:
        """The processes that take part, None for this one alone."""
        if self._process_group is False or not distributed.is_available():
            return None
        if not distributed.is_initialized():
            return None
        group = self._process_group or distributed.group.WORLD
        return group if distributed.get_world_size(group) > 1 else None

    def _grad_factor(self) -> float | Tensor:
        """Clips the norm of all gradients together; does not wait for the device."""
        if self.max_grad_norm is None:
            return 1.0
        grads = [p.grad for p in self._params() if p.grad is not None]
        choice = self.backend or backend.chosen()
        factors = norms.clip_factor(grads, self.max_grad_norm, choice=choice)
        factor = factors[grads[0].device]
        return factor.reshape(()) if isinstance(factor, Tensor) else factor

    def _has_overflow(self, grad_scaler: Any) -> bool:
        if grad_scaler is None:
            return False
        grad_scaler.unscale_(self)
        found = grad_scaler._found_inf_per_device(self).values()
        return any(value.item() != 0 for value in found)

    # -- rates in param_groups ---------------------------------------------------------------------

    def _end(self, step_size: float) -> None:
        self._show_rates(step_size)
        for param in self._halves:
            self._written[param] = param._version

    def _show_rates(self, step_size: float) -> None:
        for group in self.param_groups:
            group["lr"] = step_size * self.rate_factor * group["lr_scale"]
        self._shown = [group["lr"] for group in self.param_groups]

    def _notice_foreign_rates(self) -> None:
        if self._has_warned or [group["lr"] for group in self.param_groups] == self._shown:
            return
        self._has_warned = True
        warnings.warn(
            f"something else, perhaps a scheduler, wrote 'lr' of a group of {type(self).__name__}; "
            "this has no effect, since the search chooses the rate. Set rate_factor to scale the "
            "steps, lr_scale of a group for its relative rate, or step_size to start elsewhere",
            stacklevel=5,
        )

    # -- master copies -----------------------------------------------------------------------------

    @torch.no_grad()
    def _fill_masters(self, may_be_new: bool) -> None:
        """Makes float32 copies of half-precision parameters, anew where someone else wrote one.

        Args:
            may_be_new: look through all parameters, which takes time.
        """
        if may_be_new:
            groups = [group for group in self.param_groups if group["master_weights"]]
            params = (p for group in groups for p in group["params"])
            self._halves = [p for p in params if p.dtype in HALF_DTYPES]
        for param in self._halves:
            master = self.state[param].get("master_param") if param in self.state else None
            if master is None and param.grad is not None:
                self.state[param]["master_param"] = param.detach().float()
            elif master is not None and self._written.get(param) not in (None, param._version):
                master.copy_(param)

    # -- state -------------------------------------------------------------------------------------

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state_dict, with the numbers of the search in every group."""
        state = super().state_dict()
        numbers = {**dataclasses.asdict(self._numbers), "rate_factor": self.rate_factor}
        for group in state["param_groups"]:
            group["line_search"] = dict(numbers)
        return state

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, or nothing if that raises.

        Raises: ValueError for a state_dict without the numbers of this kind of search.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        found = [group.pop("line_search", None) for group in groups]
        names = {field.name for field in dataclasses.fields(self._numbers)} | {"rate_factor"}
        if not found or not isinstance(found[0], dict) or found[0].keys() != names:
            raise ValueError(
                f"state_dict is not that of a {type(self).__name__}: its groups lack the numbers "
                f"of the search ({', '.join(sorted(names))})"
            )
        numbers = dict(found[0])
        super().load_state_dict({**state_dict, "param_groups": groups})
        self.rate_factor = numbers.pop("rate_factor")
        self._numbers = type(self._numbers)(**numbers)
        self._forget()

    def _restore_precision(
        self, entry: dict[str, Any], param: Tensor, source: Mapping[str, Any]
    ) -> None:
        super()._restore_precision(entry, param, source)
        if "master_param" in source:
            entry["master_param"] = source["master_param"].to(
                device=param.device, dtype=torch.float32, copy=True
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out `module` and `process_group`: a copy finds its own, as if none were given."""
        names = ("_numbers", "_settings", "rate_factor", "last_search")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """What belongs to the former state."""
        self.__dict__.pop("_directions", None)
        self._halves, self._written = (), {}
        self._shown = [group["lr"] for group in self.param_groups]


def _scale(grad_scaler: Any) -> Callable[[Tensor], Any] | None:
    return None if grad_scaler is None else grad_scaler.scale


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, open_end: bool = False
) -> None:
    is_number = isinstance(value, int | float)
    if not is_number or not (low < value < high if open_end else low <= value < high):
        bound = f"{'above' if open_end else 'at least'} {low}"
        bound += f" and below {high}" if high < math.inf else " and finite"
        raise ValueError(f"{name} must be a number {bound}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_options(group: Mapping[str, Any]) -> None:
    for i, beta in enumerate(group["betas"]):
        check_number(f"betas[{i}]", beta, 0.0, 1.0)
    check_number("momentum", group["momentum"], 0.0, 1.0)
    for name in ("eps", "weight_decay", "lr_scale"):
        check_number(name, group[name], 0.0)
