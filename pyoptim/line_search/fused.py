"""What a line search does to parameters and moments, in one fused pass each."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyoptim import backend
from pyoptim.factors import Factors
from pyoptim.gpu import index_of
from pyoptim.optimizer import FusedOptimizer
from pyoptim.plan import Staged, make_plan, run_staged, threads_that_exist
from pyoptim.rows import Row, checked_rows, fill_states, is_dtensor, share_memory

Group = dict[str, Any]
# How a base divides by its second moment (LineRule in csrc/rules/line_search.hpp).
_PRECONDITIONERS = {"sgd": 0, "adam": 1, "rmsprop": 1, "adagrad": 1, "amsgrad": 2}
_CORRECTED = ("adam", "amsgrad")


class _Unfit(Exception):
    """Something that no kernel can run; the reference has to make the step."""


@dataclass
class _Search:
    """From `start` until the step is made, or called off."""

    params: list[Tensor]  # all of the optimizer's
    grads: list[Tensor | None]  # those of `start`
    versions: list[int]  # of the gradients
    saved: list[Tensor | None]  # by `params`; None without gradient, or where there is a master
    factors: Factors
    former: list[tuple[Tensor, dict[str, Any] | None]]  # state that `start` has added to
    eta: float = 0.0  # of the trial point that the parameters are at; 0: they are as they were

    def pairs(self, state: Mapping[Tensor, Any]) -> list[tuple[Tensor, Tensor]]:
        """Every parameter that moves, and what it was."""
        found = []
        for param, grad, saved in zip(self.params, self.grads, self.saved, strict=True):
            if grad is not None:
                found.append((param, saved if saved is not None else state[param]["master_param"]))
        return found


class FusedDirection:
    """Trial points and steps of all parameters that have a gradient, in one pass each.

    As `ReferenceDirection`, with one difference in when things happen: the moments are written and
    the step is counted by what ends a search, `finish` or `accept`, not by `start`. Trials compute
    them anew from those of the step before, for no more bytes. A search can thus be called off
    (`undo`) without any copy of them. Per element of float32, with Adam, `start` moves 20 bytes,
    every further `trial` 16, `finish`, `accept` and `plain` 28.

    A search ends with one of `finish`, `accept` and `undo`, and the gradients must not be written
    before. The saved weights, of the size of the parameters, stay allocated between steps.

    On a GPU no call waits for the device, but where a gradient factor is a tensor on another one.

    What no kernel can run (sparse gradients, shards of DTensors, memory that parameters share, a
    search over several devices) is left to `ReferenceDirection`, the whole step of it.

    Args:
        optimizer: its `param_groups` and `state` are read at every call, and its `backend` and
            `state_dtype`, where it has them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._trial = _Trial(optimizer)
        self._step = _Step(optimizer)
        self._saved: dict[Tensor, Tensor] = {}
        self._saved_list: tuple[list[Tensor], list[Tensor | None]] = ([], [])
        self._search: _Search | None = None
        self._other: Any = None  # a ReferenceDirection, while it runs a search

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy starts anew: all that lasts is in the optimizer."""
        return FusedDirection, (self._optimizer,)

    # -- a search ----------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, eta: float, grad_factor: float | Tensor = 1.0) -> Tensor:
        """Saves the weights, writes the first trial point w - eta*r*d, and returns the slope.

        Args:
            eta: step size.
            grad_factor: multiplies every gradient, here and in the later calls of this search. A
                tensor on the parameters' device stays there; it may be written to afterwards.

        Returns:
            The sum of r*<g, d> over all rows, 0-dim float64, on the parameters' device. The same
            bits for any number of threads, any instruction set and any engine.

        Raises:
            RuntimeError: a gradient, a parameter or a state cannot be used, or the former search
                has no end; nothing has been changed.
            ValueError: eta or grad_factor is no number, or an option of a group is none.
        """
        self._check_idle("start()")
        eta = _finite("eta", eta)
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        factors = self._factors(grad_factor, grads)
        search = _Search(params, grads, _versions(grads), self._copies(params), factors, [])
        slope = torch.empty((), dtype=torch.float64, device=_device_of_sum(grads))
        self._trial.set_options(eta, as_trial=True)
        try:
            if not self._trial.run(factors, grads=grads, saved=search.saved, total=slope):
                self._start_anew(search, slope)
        except _Unfit as error:
            of_reference: Tensor = self._reference(str(error)).start(eta, grad_factor)
            return of_reference
        search.eta = eta
        self._search = search
        return slope

    @torch.no_grad()
    def trial(self, eta: float) -> None:
        """Writes another trial point, saved - eta*r*d."""
        if self._other is not None:
            self._other.trial(eta)
            return
        search, eta = self._searching("trial()"), _finite("eta", eta)
        self._trial.set_options(eta, as_trial=True)
        self._run(self._trial, search)
        search.eta = eta

    @torch.no_grad()
    def finish(self, eta: float) -> None:
        """Makes the step: moments, and saved*(1 - weight_decay*eta*r) - eta*r*D*m_hat."""
        if self._other is not None:
            self._take_other().finish(eta)
            return
        search = self._searching("finish()")
        self._step.set_options(_finite("eta", eta))
        self._run(self._step, search)
        self._search = None

    @torch.no_grad()
    def accept(self) -> None:
        """Ends the search where the parameters are: at the last trial point, or restored.

        Writes the moments and counts the step.
        """
        if self._other is not None:
            other = self._take_other()
            if hasattr(other, "accept"):
                other.accept()
            return
        search = self._searching("accept()")
        self._step.set_options(search.eta, as_trial=True)
        self._run(self._step, search)
        self._search = None

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the saved weights back, to the bit and in place. The search goes on.

        A parameter with a master copy becomes the rounding of that.
        """
        if self._other is not None:
            self._other.restore()
            return
        search = self._searching("restore()")
        _copy_back(search.pairs(self._optimizer.state))
        search.eta = 0.0

    @torch.no_grad()
    def undo(self) -> None:
        """Calls the search off: weights, moments and step counters are as before `start`.

        Does nothing when there is no search. Costs one copy of the parameters.
        """
        if self._other is not None:
            self._take_other().undo()
            return
        if self._search is None:
            return
        self.restore()
        self._put_back(self._search.former)
        self._search = None

    @torch.no_grad()
    def plain(self, eta: float, grad_factor: float | Tensor = 1.0) -> None:
        """Makes a step without a search: moments, and as `finish` from the weights of now.

        Args and raises: as `start`.
        """
        self._check_idle("plain()")
        eta, grads = _finite("eta", eta), []
        if isinstance(grad_factor, Tensor):
            grads = [p.grad for group in self._optimizer.param_groups for p in group["params"]]
        factors = self._factors(grad_factor, grads)
        self._step.set_options(eta)
        try:
            if not self._step.run(factors):
                self._step.run_anew(factors)
        except _Unfit as error:
            self._reference(str(error), for_search=False).plain(eta, grad_factor)

    # -- how ---------------------------------------------------------------------------------------

    def _start_anew(self, search: _Search, slope: Tensor) -> None:
        """As the plan, without one: makes state and copies where there are none."""
        state = self._optimizer.state
        former = [
            (p, dict(state[p]) if p in state else None)
            for p, grad in zip(search.params, search.grads, strict=True)
            if grad is not None
        ]
        self._step.set_options(0.0)
        try:
            self._step.fill(search.grads)
            self._make_copies(search)
            self._trial.run_anew(search.factors, search.grads, saved=search.saved, total=slope)
        except BaseException:
            self._put_back(former)
            raise
        search.former = former

    def _put_back(self, former: list[tuple[Tensor, dict[str, Any] | None]]) -> None:
        """Takes away state that was not there; none that was has been written."""
        state = self._optimizer.state
        for param, entry in former:
            if entry is None:
                state.pop(param, None)
            elif len(entry) != len(state[param]):
                state[param].clear()
                state[param].update(entry)

    def _run(self, own: _Pass, search: _Search) -> None:
        if _versions(search.grads) != search.versions:
            raise RuntimeError(
                "a gradient was written during a line search; let the closure leave gradients "
                "alone in trials (no zero_grad(set_to_none=False), no backward())"
            )
        sources, grads = search.saved, search.grads
        if own.run(search.factors, grads=grads, sources=sources):
            return
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        if not _are_same(params, search.params):
            raise RuntimeError("parameters were added or removed during a line search")
        try:
            own.run_anew(search.factors, grads, sources=sources)
        except _Unfit as error:
            raise RuntimeError(
                f"parameters or state changed during a line search: {error}"
            ) from None

    def _copies(self, params: list[Tensor]) -> list[Tensor | None]:
        """The kept copies of parameters, None where there is none."""
        known, copies = self._saved_list
        if not _are_same(known, params):
            self._saved = {p: self._saved[p] for p in params if p in self._saved}
            copies = [self._saved.get(p) for p in params]
            self._saved_list = params, copies
        return copies

    def _make_copies(self, search: _Search) -> None:
        """Room for the weights of every parameter with a gradient; a master needs none."""
        state = self._optimizer.state
        for i, (param, grad) in enumerate(zip(search.params, search.grads, strict=True)):
            copy, has_master = self._saved.get(param), "master_param" in state.get(param, {})
            if has_master:
                self._saved.pop(param, None)
            elif grad is not None and not _is_like(copy, param):
                self._saved[param] = torch.empty_like(param, memory_format=torch.preserve_format)
            search.saved[i] = self._saved.get(param)

    def _factors(self, factor: float | Tensor, grads: list[Tensor | None]) -> Factors:
        """The factor as a number, or where a GPU engine runs as a copy on each device."""
        if not isinstance(factor, Tensor):
            return Factors(clip=float(factor))
        if factor.numel() != 1:
            raise ValueError(f"grad_factor must be one number, got shape {tuple(factor.shape)}")
        devices = {grad.device for grad in grads if grad is not None}
        choice = getattr(self._optimizer, "backend", None) or backend.chosen()
        is_on_gpu = factor.is_cuda or choice in backend.GPU_ENGINES
        if not is_on_gpu or {d.type for d in devices} != {factor.device.type}:
            return Factors(clip=float(factor))
        return Factors(
            devices={
                index_of(d): (None, None, factor.detach().to(d, torch.float64, copy=True))
                for d in devices
            }
        )

    def _check_idle(self, what: str) -> None:
        if self._search is not None:
            raise RuntimeError(
                f"{what} during a line search; end it by finish(), accept() or undo() first"
            )
        self._other = None

    def _searching(self, what: str) -> _Search:
        if self._search is None:
            raise RuntimeError(f"{what} without start(): there is no line search")
        return self._search

    def _reference(self, why: str, for_search: bool = True) -> Any:
        choice = getattr(self._optimizer, "backend", None) or backend.chosen()
        if choice not in ("auto", "reference"):
            raise backend.BackendError(
                f"backend={choice!r} cannot run this line search: {why}; use backend='auto' or "
                "'reference'"
            )
        from pyoptim.line_search.direction import ReferenceDirection

        other = ReferenceDirection(self._optimizer)
        if for_search:
            self._other = other
        return other

    def _take_other(self) -> Any:
        other, self._other = self._other, None
        return other


class _Pass(FusedOptimizer):
    """A rule over parameters and state of another optimizer. It has neither hooks nor a user."""

    def __init__(self, origin: Optimizer) -> None:
        self._configure(None, None, None)
        super().__init__([torch.empty(0)], {})
        self._origin = origin

    _plan_choice: str | None = None

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        base, has_first = group["base"], bool(group["reads_first"])
        if base == "sgd":
            return ("momentum_buffer",) if has_first else ()
        first = ("exp_avg",) if has_first else ()
        second = ("sum",) if base == "adagrad" else ("exp_avg_sq",)
        return (*first, *second, *(("max_exp_avg_sq",) if base == "amsgrad" else ()))

    def _master_of(self, entry: Mapping[str, Any]) -> Tensor | None:
        return entry.get("master_param")

    def _check_sparse(self, row: Row, group: Mapping[str, Any]) -> None:
        raise _Unfit(f"{row.place} has a sparse gradient")

    def set_options(self, eta: float, as_trial: bool = False) -> None:
        """Takes over groups and state of the optimizer.

        Args:
            as_trial: along the direction of the trials, without weight decay.

        Raises: ValueError for a base that has no kernel.
        """
        groups = self._origin.param_groups
        self.state = self._origin.state
        self.backend = getattr(self._origin, "backend", None)
        self.state_dtype = getattr(self._origin, "state_dtype", None)
        if len(groups) != len(self.param_groups):
            fixed = {"capturable": False, "differentiable": False}
            self.param_groups = [dict(fixed) for _ in groups]
        for own, group in zip(self.param_groups, groups, strict=True):
            own["params"] = group["params"]
            own.update(_options(group, eta, as_trial))
            own["reads_first"] = self._reads_first(own)

    def _reads_first(self, group: Mapping[str, Any]) -> bool:
        raise NotImplementedError

    def run(
        self,
        factors: Factors,
        grads: list[Tensor | None] | None = None,
        sources: list[Tensor | None] | None = None,
        saved: list[Tensor | None] | None = None,
        total: Tensor | None = None,
    ) -> bool:
        """Makes the pass by the plan of the last one; False, and nothing happened, if it cannot.

        Args:
            factors: what multiplies the gradients.
            grads: in the place of the parameters' own, by parameter.
            sources: copies that parameters are read from.
            saved: takes what the parameters were, if `total` takes the sum of the terms.
        """
        if self._plan is None or self._plan_epoch != backend.current_epoch():
            return False
        if self._plan_choice != self.backend:
            return False
        made: bool = self._plan.scaled_step(
            *(self.param_groups, self.state, 1.0, factors.clip, factors.devices),
            *(sources, grads, saved, total),
        )
        return made

    def fill(self, grads: list[Tensor | None] | None) -> list[Row]:
        """Returns the rows of a pass, with their state, which is made where there is none.

        Raises:
            _Unfit: they need the reference.
            RuntimeError: they cannot be stepped at all; nothing has been changed.
        """
        native = backend.native()
        self._grads = grads
        try:
            rows = checked_rows(self, False)
        finally:
            del self._grads
        for row in rows:
            _check_fit(row)
        assert native is not None
        for group in self.param_groups:
            native.read_hypers(self.rule, group)
        fill_states(self, rows, with_grads=False)
        if not all(row.has_kernel for row in rows):
            raise _Unfit("no kernel has their dtypes")
        if share_memory(rows):
            raise _Unfit("parameters or their state share memory")
        return rows

    def run_anew(
        self,
        factors: Factors,
        grads: list[Tensor | None] | None = None,
        sources: list[Tensor | None] | None = None,
        saved: list[Tensor | None] | None = None,
        total: Tensor | None = None,
    ) -> None:
        """As `run`, and makes the plan for passes like this one."""
        self._plan = None
        with threads_that_exist():
            rows = self.fill(grads)
            params = [p for group in self.param_groups for p in group["params"]]
            places = {id(p): i for i, p in enumerate(params)}
            for row in rows:
                i = places[id(row.key)]
                row.source = _copy_of(row, sources[i] if sources else None)
                row.saved = saved[i] if saved else None
            if total is not None and {row.param.device for row in rows} - {total.device}:
                raise _Unfit("its parameters lie on several devices")
            staged = [Staged(row, with_grad=False) for row in rows]
            run_staged(self.rule, self.param_groups, staged, factors, self._memory, total)
            if not any(s.is_copied for s in staged):
                self._plan = make_plan(self, rows)
                self._plan_epoch, self._plan_choice = backend.current_epoch(), self.backend


class _Trial(_Pass):
    rule: ClassVar[str] = "line_trial"

    def _reads_first(self, group: Mapping[str, Any]) -> bool:
        return bool(group["by_momentum"])


class _Step(_Pass):
    rule: ClassVar[str] = "line_step"

    def _reads_first(self, group: Mapping[str, Any]) -> bool:
        return bool(group["beta1"] != 0)


def _options(group: Group, eta: float, as_trial: bool) -> Group:
    """The hyper-parameters of LineRule (csrc/rules/line_search.hpp)."""
    base = group["base"]
    if base not in _PRECONDITIONERS:
        raise ValueError(f"base must be one of {sorted(_PRECONDITIONERS)}, got {base!r}")
    beta1, beta2 = (group["momentum"], 0.0) if base == "sgd" else group["betas"]
    by_momentum = beta1 != 0 and (not as_trial or bool(group["use_mv"]))
    return {
        "base": base,
        "lr": eta * group["lr_scale"],
        "lr_scale": group["lr_scale"],
        "beta1": beta1,
        "beta2": beta2,
        "eps": 0.0 if base == "sgd" else group["eps"],
        "weight_decay": 0.0 if as_trial else group["weight_decay"],
        "preconditioner": _PRECONDITIONERS[base],
        "accumulates": base == "adagrad",
        "corrects": base in _CORRECTED,
        "bias_offset": group.get("bias_offset", 0),
        "by_momentum": by_momentum,
    }


def _check_fit(row: Row) -> None:
    if row.backend not in backend.ENGINES or row.param.is_complex():
        raise _Unfit(f"{row.place} has no kernel")
    if is_dtensor(row.key):
        raise _Unfit(f"{row.place} is a DTensor")


def _device_of_sum(grads: list[Tensor | None]) -> torch.device:
    """Where an engine could have all of these gradients."""
    device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
    return device if device.type == "cuda" else torch.device("cpu")


def _copy_of(row: Row, copy: Tensor | None) -> Tensor | None:
    if copy is not None and not _is_like(copy, row.param):
        raise RuntimeError(
            f"{row.place} has {row.param.dtype} and shape {tuple(row.param.shape)}, and had "
            f"{copy.dtype} and shape {tuple(copy.shape)} when the line search started"
        )
    return copy


def _is_like(copy: Tensor | None, param: Tensor) -> bool:
    return copy is not None and (copy.dtype, copy.device, copy.shape) == (
        param.dtype,
        param.device,
        param.shape,
    )


def _finite(name: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def _versions(grads: list[Tensor | None]) -> list[int]:
    return [g._version for g in grads if g is not None]


def _are_same(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two lists hold the same objects; == would ask the tensors."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _copy_back(pairs: list[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        params, weights = (list(tensors) for tensors in zip(*pairs, strict=True))
        torch._foreach_copy_(params, weights)
