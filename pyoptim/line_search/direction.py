"""What a line search does to parameters and moments, in plain PyTorch.

`ReferenceDirection` is the text that the kernels behind `FusedDirection` are held to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyoptim.arithmetic import sqrt
from pyoptim.rows import HALF_DTYPES, local_grad, local_of, new_counter, shards

Group = Mapping[str, Any]
BASES = ("adam", "amsgrad", "rmsprop", "adagrad", "sgd")
CORRECTED = ("adam", "amsgrad")  # whose moments are divided by 1 - beta^t
_DTYPES = (torch.float64, torch.float32, *HALF_DTYPES)
_CHUNK = 16384  # below torch's grain size: no thread count changes the order of a sum


def state_names(group: Group) -> tuple[str, ...]:
    """Returns the keys of the moments that a group's base keeps for each parameter."""
    base = group["base"]
    if base == "sgd":
        return ("momentum_buffer",) if group["momentum"] != 0 else ()
    first = ("exp_avg",) if group["betas"][0] != 0 else ()
    if base == "adagrad":
        return (*first, "sum")
    return (*first, "exp_avg_sq", *(("max_exp_avg_sq",) if base == "amsgrad" else ()))


@dataclass
class _Row:
    """One parameter with a gradient; `param`, `grad` and `states` are local shards."""

    key: Tensor
    param: Tensor
    grad: Tensor
    group: Group
    place: str
    entry: dict[str, Any] = field(default_factory=dict)
    factor: float | Tensor = 1.0
    # What `undo` puts back; None for state that there was not.
    former: dict[str, Tensor | None] | None = None
    saved: Tensor | None = None

    @property
    def compute(self) -> torch.dtype:
        return torch.float32 if self.param.dtype in HALF_DTYPES else self.param.dtype

    @property
    def step(self) -> float:
        return float(self.entry["step"]) + float(self.group.get("bias_offset", 0))

    def state(self, name: str) -> Tensor:
        return local_of(self.entry[name])

    def gradient(self) -> Tensor:
        g = self.grad.to(self.compute)
        if isinstance(self.factor, Tensor):
            return g * self.factor.to(g.device, g.dtype)
        return g if self.factor == 1.0 else g * self.factor

    def weight(self) -> Tensor:
        """Where the step starts: the float32 master copy, if there is one, or the saved weight."""
        master = self.entry.get("master_param")
        start = local_of(master) if master is not None else self.saved
        return (self.param if start is None else start).to(self.compute)

    def correction(self, which: int) -> float:
        is_corrected = self.group["base"] in CORRECTED
        return 1.0 - float(self.group["betas"][which]) ** self.step if is_corrected else 1.0

    def denominator(self) -> Tensor | float:
        """1/D."""
        base, eps = self.group["base"], self.group["eps"]
        if base == "sgd":
            return 1.0
        names = {"adagrad": "sum", "amsgrad": "max_exp_avg_sq"}
        v = self.state(names.get(base, "exp_avg_sq")).to(self.compute)
        root: Tensor = sqrt(v) * (1 / self.correction(1) ** 0.5)
        return root + float(eps)

    def momentum(self) -> Tensor:
        """m, before bias correction."""
        name = "momentum_buffer" if self.group["base"] == "sgd" else "exp_avg"
        has_momentum = name in state_names(self.group)
        return self.state(name).to(self.compute) if has_momentum else self.gradient()

    def momentum_correction(self) -> float:
        return self.correction(0) if "exp_avg" in state_names(self.group) else 1.0

    def direction(self) -> Tensor:
        """d, along which the trials go."""
        if self.group["use_mv"]:
            return self.momentum() / self.momentum_correction() / self.denominator()
        return self.gradient() / self.denominator()

    def point(self, eta: float) -> Tensor:
        return self.weight() - float(eta * self.group["lr_scale"]) * self.direction()


class ReferenceDirection:
    """Trial points and steps of all parameters that have a gradient, in plain PyTorch.

        D = 1/(sqrt(v_hat) + eps), 1 for sgd;  d = D*g, with `use_mv` D*m_hat

    Moments are bias-corrected for adam and amsgrad only. Arithmetic runs in float32 for
    half-precision parameters, else in the parameters' dtype (float64 for the truth).

    Args:
        optimizer: `param_groups` and `state` are read at every call. A group has base, betas, eps,
            weight_decay, lr_scale (r), use_mv, for sgd momentum, and may have bias_offset, which is
            added to the step number in the bias correction. State that is missing is created:
            step, exp_avg, exp_avg_sq, max_exp_avg_sq, sum, momentum_buffer. Where there is a
            master_param (float32), steps start there and the parameter is its rounding.

    A search begins with `start` and ends with `finish`, `accept` or `undo`. The former moments are
    kept until then, the saved weights stay allocated between steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._copies: dict[int, Tensor] = {}  # saved weights by id of the parameter
        self._rows: list[_Row] = []
        self._eta = 0.0  # of the point where the parameters are

    @torch.no_grad()
    def start(self, eta: float, grad_factor: float | Tensor = 1.0) -> Tensor:
        """Updates the moments, saves the weights, and writes w - eta*r*d.

        Args:
            eta: the first trial's step size.
            grad_factor: multiplies every gradient, here and in the later calls; a tensor on the
                device or a float.

        Returns:
            The slope: the sum of r*<g, d> over all rows, 0-dim float64 on the device of the first
            parameter. The same for any number of threads. Rows of a sharded parameter count as
            often as it has shards: the mean over processes is the slope of the whole.

        Raises:
            RuntimeError: a gradient or a state cannot be used; nothing has been changed.
        """
        self._rows = self._checked(grad_factor)
        for row in self._rows:
            row.former = {name: _cloned(row.entry.get(name)) for name in _kept(row)}
            _advance(self._optimizer, row)
            row.saved = self._save(row)
        slopes = [_slope(row) for row in self._rows]
        self.trial(eta)
        if not slopes:
            return torch.zeros((), dtype=torch.float64)
        return torch.stack([slope.to(slopes[0].device) for slope in slopes]).sum()

    @torch.no_grad()
    def trial(self, eta: float) -> None:
        """Writes saved - eta*r*d."""
        for row in self._rows:
            _write(row, row.point(eta))
        self._eta = eta

    @torch.no_grad()
    def finish(self, eta: float) -> None:
        """Makes the step: saved*(1 - weight_decay*eta*r) - eta*r*D*m_hat."""
        for row in self._rows:
            _step(row, eta)
        self._rows = []

    @torch.no_grad()
    def accept(self) -> None:
        """Ends the search where the parameters are: at the last trial point, or restored."""
        for row in self._rows:
            master = row.entry.get("master_param")
            if master is not None and self._eta != 0.0:
                local_of(master).copy_(row.point(self._eta))
        self._rows = []

    @torch.no_grad()
    def plain(self, eta: float, grad_factor: float | Tensor = 1.0) -> None:
        """Makes a step without a search: moments, then as `finish` from the weights of now."""
        rows = self._checked(grad_factor)
        for row in rows:
            _advance(self._optimizer, row)
            _step(row, eta)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the saved weights back, to the bit and in place."""
        for row in self._rows:
            assert row.saved is not None
            _write(row, row.saved)
        self._eta = 0.0

    @torch.no_grad()
    def undo(self) -> None:
        """Puts back everything as it was before `start`: weights, moments and step counters."""
        self.restore()
        for row in self._rows:
            for name, value in (row.former or {}).items():
                if value is None:
                    row.entry.pop(name, None)
                else:
                    row.entry[name].copy_(value)
            if not row.entry:
                self._optimizer.state.pop(row.key, None)
        self._rows = []

    def _checked(self, grad_factor: float | Tensor) -> list[_Row]:
        rows = list(_rows(self._optimizer))
        for row in rows:
            _check(row, self._optimizer.state.get(row.key, {}))
        for row in rows:
            row.entry, row.factor = self._optimizer.state[row.key], grad_factor
        return rows

    def _save(self, row: _Row) -> Tensor:
        copy = self._copies.get(id(row.key))
        is_fit = copy is not None and (copy.shape, copy.dtype) == (row.param.shape, row.param.dtype)
        if copy is None or not is_fit or copy.device != row.param.device:
            self._copies[id(row.key)] = row.param.clone()
        else:
            copy.copy_(row.param)
        return self._copies[id(row.key)]


def _rows(optimizer: Optimizer) -> Iterator[_Row]:
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            if param.grad is not None:
                place = f"parameter {i} of group {g}"
                yield _Row(param, local_of(param), local_grad(param, param.grad), group, place)


def _check(row: _Row, entry: Mapping[str, Any]) -> None:
    param, grad = row.param, row.grad
    if param.dtype not in _DTYPES:
        raise RuntimeError(
            f"{row.place} has dtype {param.dtype}; line searches take float64, float32, bfloat16 "
            "and float16 parameters"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(f"{row.place} has a sparse gradient; line searches need dense ones")
    of_param = param.shape, param.dtype, param.device
    if of_param != (grad.shape, grad.dtype, grad.device):
        raise RuntimeError(
            f"the gradient of {row.place} has shape {tuple(grad.shape)}, {grad.dtype} on "
            f"{grad.device}; its parameter has {tuple(param.shape)}, {param.dtype} on "
            f"{param.device}"
        )
    for name in (*state_names(row.group), "master_param"):
        state = entry.get(name)
        if state is not None and local_of(state).shape != param.shape:
            raise RuntimeError(
                f"state {name!r} of {row.place} has shape {tuple(state.shape)}, its parameter "
                f"{tuple(row.key.shape)}; load a matching state_dict"
            )


def _kept(row: _Row) -> tuple[str, ...]:
    return ("step", *state_names(row.group))


def _advance(optimizer: Optimizer, row: _Row) -> None:
    """Counts the step and moves the moments, which are made where there are none."""
    entry, group = row.entry, row.group
    g = row.gradient()
    is_first = "momentum_buffer" not in entry
    entry["step"] = entry.get("step", new_counter(0.0)) + 1
    dtype = getattr(optimizer, "state_dtype", None)
    of_state = dtype if dtype is not None and row.param.dtype in HALF_DTYPES else row.param.dtype
    for name in state_names(group):
        if name not in entry:
            entry[name] = torch.zeros_like(row.key, dtype=of_state, requires_grad=False)
    new = _moved(group, {n: row.state(n).to(row.compute) for n in state_names(group)}, g, is_first)
    for name, value in new.items():
        row.state(name).copy_(value)


def _moved(group: Group, old: dict[str, Tensor], g: Tensor, is_first: bool) -> dict[str, Tensor]:
    """The moments after a step with gradient g."""
    new = {}
    if "momentum_buffer" in old:
        new["momentum_buffer"] = g if is_first else group["momentum"] * old["momentum_buffer"] + g
    if group["base"] == "sgd":
        return new
    beta1, beta2 = group["betas"]
    if "exp_avg" in old:
        new["exp_avg"] = old["exp_avg"] + (1 - beta1) * (g - old["exp_avg"])
    if "sum" in old:
        new["sum"] = old["sum"] + g * g
    if "exp_avg_sq" in old:
        new["exp_avg_sq"] = beta2 * old["exp_avg_sq"] + ((1 - beta2) * g) * g
    if "max_exp_avg_sq" in old:
        new["max_exp_avg_sq"] = torch.maximum(old["max_exp_avg_sq"], new["exp_avg_sq"])
    return new


def _step(row: _Row, eta: float) -> None:
    """The momentum step, from the saved weight or the one of now."""
    rate = eta * row.group["lr_scale"]
    w = row.weight() * (1 - rate * row.group["weight_decay"])
    w = w - (rate / row.momentum_correction()) * (row.momentum() / row.denominator())
    master = row.entry.get("master_param")
    if master is not None:
        local_of(master).copy_(w)
    _write(row, w)


def _write(row: _Row, value: Tensor) -> None:
    row.param.copy_(value)
    if row.param is not row.key:
        torch.autograd.graph.increment_version(row.key)


def _slope(row: _Row) -> Tensor:
    """r*<g, d>, in float64 and a fixed order."""
    products = (row.gradient().double() * row.direction().double()).flatten()
    whole = products.numel() // _CHUNK * _CHUNK
    tail = products[whole:].sum()
    if whole:
        # Two rows at least, or torch would split the sum among its threads.
        sums = products[:whole].view(-1, _CHUNK // 2).sum(1)
        tail = tail + sums.view(-1, 2).sum(1).cumsum(0)[-1]
    return tail * float(row.group["lr_scale"] * shards(row.key))


def _cloned(value: Any) -> Tensor | None:
    return value.clone() if isinstance(value, Tensor) else None
