"""SAM and ASAM: any optimizer, stepping by the gradient of the worst point nearby."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pyoptim import backend, norms
from pyoptim.arithmetic import signed
from pyoptim.norms import _eager as eager
from pyoptim.optimizer import FusedOptimizer
from pyoptim.rows import HALF_DTYPES, Row

Group = dict[str, Any]
OWN_OPTIONS = ("rho", "adaptive", "eta")


class SAM(Optimizer):
    """Sharpness-aware minimization around any optimizer, as davda54's `SAM`.

        N = norm(T*grad) over all groups;  p = p + rho/(N + 1e-12) * T*T*grad    (first_step)
        p as it was; one step of the base optimizer with the gradient found there    (second_step)

    with T = 1, or T = abs(p) + eta if adaptive (ASAM). Three ways to make a step:

    *One call*, when no gradient is left from a backward pass of yours: the closure computes and
    returns the loss, SAM runs both backward passes. (A closure that runs backward itself may be
    called this way too; it is called twice.) Returns the first loss, that at p.

        loss = optimizer.step(lambda: loss_fn(model(x), y))

    *Classic*, when there are gradients of your own first backward pass: the closure runs forward
    and backward once more. Returns its loss. Gradients that a former step of this optimizer has
    used, or that its zero_grad() has zeroed, do not count: that is what tells the two forms apart.

        loss_fn(model(x), y).backward()
        optimizer.step(closure)

    *By hand*, with gradients accumulated over as many backward passes as you like:

        loss_fn(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        with pyoptim.frozen_batch_norm():
            loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    step(closure) keeps BatchNorm's running statistics out of the second pass by itself. With
    `torch.amp.GradScaler` the last line is `scaler.step(optimizer)`, both losses go through
    `scaler.scale`, and nothing is unscaled before the first step, whose direction does not depend
    on the scale. An overflow in either pass skips the step of the base optimizer.

    Under DistributedDataParallel gradients of the first pass made under `model.no_sync()` give each
    replica a perturbation of its own (m-sharpness, as in the paper); without, all have the same.

    Args:
        params: tensors, named tensors or groups, whose own rho, adaptive and eta go before these.
        base_optimizer: the class of the optimizer, of pyoptim, torch or any other; it is given
            params and base_kwargs, and shares `param_groups` and `state` with this object.
        rho: radius of the neighbourhood, at least 0; ASAM's is about ten times SAM's.
        adaptive: scale the neighbourhood by the size of each weight.
        eta: added to that size, at least 0; 0.01 in the authors' ASAM, which has adaptive=False for
            parameters that are no weights.
        base_kwargs: options of the base optimizer. `max_grad_norm` of pyoptim's clips the second
            gradient (the first one's length has no effect); `backend` runs both steps.

    State: that of the base optimizer only. The saved weights, of the size of the parameters, stay
    allocated between steps but are never in a checkpoint. ASAM's norm needs another copy, in
    float32 or wider, for a moment.
    Raises: ValueError for an option out of range; TypeError for a base_optimizer that is no class.
    Source: Foret et al., arXiv:2010.01412, Algorithm 1; ASAM: Kwon et al., arXiv:2102.11600.
    Differs: from davda54's in that weights are restored in place, also those without a second
    gradient; `maximize` of a group perturbs downwards; complex numbers count as pairs of real ones;
    a gradient that is not finite makes no perturbation, so that the base optimizer's step is one of
    its own.
    """

    base_optimizer: Optimizer
    # GradScaler then calls step() also after an overflow: the weights must come back.
    _step_supports_amp_scaling = True
    # GradScaler sets both, and deletes them.
    grad_scale: Tensor | None
    found_inf: Tensor | None = None
    _saved: list[tuple[Tensor, Tensor]] | None = None  # (parameter, its weights) after first_step
    _norm: Tensor | None = None

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 0.0,
        **base_kwargs: Any,
    ) -> None:
        if isinstance(base_optimizer, Optimizer) or not callable(base_optimizer):
            raise TypeError(
                f"base_optimizer must be the class of an optimizer, such as pyoptim.SGD, got "
                f"{base_optimizer!r}; give its options to SAM as keyword arguments"
            )
        own = {"rho": rho, "adaptive": adaptive, "eta": eta}
        _check_options(own)
        super().__init__(params, own)
        for group in self.param_groups:
            _check_options(group)
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.defaults = {**self.base_optimizer.defaults, **own}

    # -- what is shared with the base optimizer ----------------------------------------------------

    def _of_base(self, name: str) -> Any:
        # torch's constructor runs before there is a base optimizer.
        base = self.__dict__.get("base_optimizer")
        return self.__dict__[f"_given_{name}"] if base is None else getattr(base, name)

    def _set_of_base(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base_optimizer")
        if base is None:
            self.__dict__[f"_given_{name}"] = value
        else:
            setattr(base, name, value)

    @property
    def param_groups(self) -> list[Group]:
        groups: list[Group] = self._of_base("param_groups")
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self._set_of_base("param_groups", groups)

    @property
    def state(self) -> Any:
        return self._of_base("state")

    @state.setter
    def state(self, state: Any) -> None:
        self._set_of_base("state", state)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group to both optimizers; rho, adaptive and eta default to the constructor's."""
        if "base_optimizer" not in self.__dict__:
            super().add_param_group(param_group)
            return
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        for name in OWN_OPTIONS:
            param_group.setdefault(name, self.defaults[name])
        _check_options(param_group)
        self.base_optimizer.add_param_group(param_group)

    # -- stepping ----------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Saves the weights of every parameter with a gradient, and perturbs them.

        Args:
            zero_grad: call zero_grad() afterwards.

        Raises:
            RuntimeError: the former first_step() awaits its second_step(), or a gradient cannot be
                used; nothing has been changed.
        """
        self._check_idle("first_step()")
        for group in self.param_groups:
            _check_options(group)
        choice = self._backend or backend.chosen()
        norm = norms.total_norm(_weighted_grads(self.param_groups), backend=choice)
        self._saved = self._ascent.climb(_ascent_groups(self.param_groups, norm, choice), choice)
        self._norm = norm
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and makes a step of the base optimizer with the gradients of now.

        Args:
            zero_grad: call zero_grad() afterwards.

        Raises:
            RuntimeError: there was no first_step(), or the base optimizer cannot make the step; the
                weights are as they were before the first step.
        """
        if self._saved is None:
            raise RuntimeError("second_step() without first_step(): there is nothing to step from")
        self.restore()
        self._base_step()
        self._remember_used_grads()
        if zero_grad:
            self.zero_grad()
        # torch's schedulers warn unless they see a step().
        self._opt_called = True

    @torch.no_grad()
    def restore(self) -> None:
        """Takes a first step back, exactly and in place; for a second pass that failed."""
        saved, self._saved = self._saved, None
        if not saved:
            return
        if self._ascent.is_one_pass:
            params, weights = (list(tensors) for tensors in zip(*saved, strict=True))
            torch._foreach_copy_(params, weights)
            return
        # Parameters over one memory were perturbed one after the other.
        for param, weight in reversed(saved):
            param.copy_(weight)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes a whole step; see the class for the forms that the closure may have.

        Args:
            closure: computes the loss, with or without its backward pass; called once if there are
                new gradients, else twice. None after first_step() means second_step().

        Returns:
            The loss that the first call of the closure returned.

        Raises:
            RuntimeError: no closure and no first_step(), or a closure that gave no gradient; the
                weights are as they were.
        """
        if closure is None:
            if self._saved is None:
                raise RuntimeError(
                    "SAM needs two gradients per step: call step(closure) with a closure that "
                    "returns the loss, or first_step(), backward() and second_step()"
                )
            return self.second_step()
        self._check_idle("step(closure)")
        if self._has_new_grads():
            self.first_step(zero_grad=True)
            return self._finish(closure, may_run_backward=False)
        self.zero_grad()
        loss = self._evaluate(closure, may_run_backward=True)
        self.first_step(zero_grad=True)
        self._finish(closure, may_run_backward=True)
        return loss

    def _finish(self, closure: Callable[[], Any], may_run_backward: bool) -> Any:
        try:
            with frozen_batch_norm():
                loss = self._evaluate(closure, may_run_backward)
        except BaseException:
            self.restore()
            raise
        self.second_step()
        return loss

    def _evaluate(self, closure: Callable[[], Any], may_run_backward: bool) -> Any:
        """Calls the closure, and backward unless it has; there are no gradients before."""
        with torch.enable_grad():
            loss = closure()
            has_grads = any(p.grad is not None for p in self._params())
            is_open = isinstance(loss, Tensor) and loss.requires_grad
            if has_grads or (not may_run_backward and not is_open):
                return loss
            if not may_run_backward:
                raise RuntimeError(
                    "step(closure) found gradients of an earlier backward(), but the closure only "
                    "computed the loss; call backward() in the closure too, or call zero_grad() "
                    "before step() and let SAM run both backward passes"
                )
            if not is_open:
                raise RuntimeError(
                    f"the closure returned {loss!r} and gave no parameter a gradient; return the "
                    "loss, a tensor that requires grad, or call its backward() in the closure"
                )
            loss.backward()
        return loss

    def _base_step(self) -> None:
        base = self.base_optimizer
        if self.found_inf is None:
            base.step()
            return
        scale, found_inf = getattr(self, "grad_scale", None), self.found_inf
        if self._norm is not None:
            is_lost = ~self._norm.isfinite().to(found_inf.device, non_blocking=True)
            # torch's fused steps skip for exactly 1.
            found_inf = ((found_inf != 0) | is_lost).to(found_inf.dtype)
        if getattr(base, "_step_supports_amp_scaling", False):
            vars(base).update(grad_scale=scale, found_inf=found_inf)
            try:
                base.step()
            finally:
                del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
        elif float(found_inf) == 0:
            self._unscale(scale)
            base.step()

    @torch.no_grad()
    def _unscale(self, scale: Tensor | None) -> None:
        if scale is None:  # GradScaler.unscale_ was called
            return
        inv_scale = float(scale.double().reciprocal().float())
        for param in self._params():
            if param.grad is not None:
                param.grad.mul_(inv_scale)

    @property
    def _ascent(self) -> _Ascent:
        if "_own_ascent" not in self.__dict__:
            self._own_ascent = _Ascent()
        return self._own_ascent

    @property
    def _backend(self) -> str | None:
        base = self.base_optimizer
        return base.backend if isinstance(base, FusedOptimizer) else None

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _check_idle(self, what: str) -> None:
        if self._saved is not None:
            raise RuntimeError(
                f"{what} between first_step() and second_step(), while the weights are perturbed; "
                "call second_step(), or restore() to take the first step back"
            )

    # -- gradients that are left from a former step ------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters."""
        super().zero_grad(set_to_none)
        self._remember_used_grads()

    def _remember_used_grads(self) -> None:
        """By weak references: their memory is wanted for the next gradients."""
        self._used = {
            id(p): (weakref.ref(p.grad), p.grad._version)
            for p in self._params()
            if p.grad is not None
        }

    def _has_new_grads(self) -> bool:
        used = self.__dict__.get("_used", {})
        for param in self._params():
            reference, version = used.get(id(param), (lambda: None, 0))
            grad = param.grad
            if grad is not None and not (reference() is grad and grad._version == version):
                return True
        return False

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns that of the base optimizer, whose groups hold rho, adaptive and eta too."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state_dict of SAM, of the base optimizer alone, or of davda54's SAM.

        The last holds no state of the base optimizer, which starts anew. Options that the groups in
        `state_dict` lack stay as they are.

        Raises:
            RuntimeError: called between first_step() and second_step().
        """
        self._check_idle("load_state_dict()")
        entries = {
            index: {name: value for name, value in entry.items() if name != "old_p"}
            for index, entry in state_dict["state"].items()
        }
        groups = [dict(group) for group in state_dict["param_groups"]]
        for loaded, group in zip(groups, self.param_groups, strict=False):
            for name in OWN_OPTIONS:
                loaded.setdefault(name, group[name])
        state = {index: entry for index, entry in entries.items() if entry}
        self.base_optimizer.load_state_dict({**state_dict, "state": state, "param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        self._check_idle("pickling or copying the optimizer")
        return {"defaults": self.defaults, "base_optimizer": self.base_optimizer}


@contextmanager
def frozen_batch_norm(module: Module | None = None) -> Iterator[None]:
    """Keeps running statistics (BatchNorm's, also InstanceNorm's) as they are.

    Modules in training mode normalize by their batch as ever, but the running mean and variance and
    the count that they update are copies, which are dropped at the end.

    Args:
        module: the model; None is every module that is called meanwhile, which torch.compile warns
            of, as it needs a hook.
    """
    seen: dict[int, Module] = {}
    kept: list[tuple[Module, dict[str, Tensor | None]]] = []

    def freeze(module: Module) -> None:
        # All parts with the first call: in compiled code theirs pass no hook.
        for part in module.modules():
            if id(part) not in seen:
                seen[id(part)] = part
                _swap_statistics(part, kept)

    def before_forward(module: Module, _: object) -> None:
        if id(module) not in seen:
            eager(freeze)(module)

    handle = None if module is not None else register_module_forward_pre_hook(before_forward)
    if module is not None:
        freeze(module)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        for part, buffers in kept:
            part._buffers.update(buffers)


def _swap_statistics(module: Module, kept: list[tuple[Module, dict[str, Tensor | None]]]) -> None:
    own = module._buffers
    if own.get("running_mean") is None:
        return
    names = [n for n in ("running_mean", "running_var", "num_batches_tracked") if n in own]
    kept.append((module, {name: own[name] for name in names}))
    for name in names:
        buffer = own[name]
        own[name] = None if buffer is None else buffer.clone()


class _Ascent(FusedOptimizer):
    """The rule `ascent` over the parameters of a SAM. It has neither hooks nor a user."""

    rule = "ascent"
    counts_steps = False

    def __init__(self) -> None:
        self._configure(None, None, None)
        placeholder = {"params": [torch.empty(0)], "scale": 0.0, "adaptive": False, "eta": 0.0}
        super().__init__([placeholder], {"maximize": False})

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("old_p",)

    @staticmethod
    def reference(
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        step: float = 1,
        first: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        g = signed(grad, group)
        if group["adaptive"]:
            size = param.abs() + group["eta"]
            g = (size * size) * g
        scale = torch.as_tensor(group["scale"], dtype=torch.float64, device=param.device)
        return torch.where(scale != 0, param + scale * g, param), {"old_p": param}

    def _check_sparse(self, row: Row, group: Mapping[str, Any]) -> None:
        """Sparse gradients are allowed: the base optimizer says what it takes."""

    def _sparse_step(self, row: Row, group: Mapping[str, Any]) -> None:
        row.grad = row.grad.to_dense()
        self._reference_step(row, group)

    def climb(self, groups: list[Group], choice: str) -> list[tuple[Tensor, Tensor]]:
        """Perturbs all parameters with a gradient; returns them with their saved weights."""
        self.param_groups, self.backend = groups, choice
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        for param in params:
            self._drop_unlike(param)
        self._update()
        return [(param, self.state[param]["old_p"]) for param in params]

    def _drop_unlike(self, param: Tensor) -> None:
        """Forgets a copy that could not hold the weights, after `model.half()` and the like."""
        old = self.state.get(param, {}).get("old_p")
        if old is None:
            return
        if old.dtype != param.dtype or old.shape != param.shape or old.device != param.device:
            del self.state[param]
            self._counters.pop(param, None)

    @property
    def is_one_pass(self) -> bool:
        """Whether no two parameters of the last ascent share memory."""
        return self._plan is not None


def _ascent_groups(groups: Sequence[Group], norm: Tensor, choice: str) -> list[Group]:
    """Groups of the ascent: one per group and device, since each device needs the scale."""
    made = []
    seen: set[int] = set()
    for group in groups:
        by_device: dict[torch.device, list[Tensor]] = {}
        for param in group["params"]:
            if id(param) not in seen:  # the second visit would save what the first has perturbed
                by_device.setdefault(param.device, []).append(param)
            seen.add(id(param))
        scale = group["rho"] / (norm + 1e-12)
        scale = torch.where(norm.isfinite(), scale, torch.zeros_like(scale))
        for device, params in by_device.items():
            options = {name: group[name] for name in ("adaptive", "eta")}
            options["maximize"] = bool(group.get("maximize"))
            made.append({"params": params, **_scale_on(device, params, scale, choice), **options})
    return made


def _scale_on(device: torch.device, params: list[Tensor], scale: Tensor, choice: str) -> Group:
    """The scale as the kernels of a GPU engine read it, without waiting, or as a number."""
    with_grad = [p for p in params if p.grad is not None]
    engine = backend.select(choice, with_grad[0]) if with_grad else "cpu"
    is_live = engine in backend.GPU_ENGINES
    if is_live or device.type != "cpu":
        return {"scale": scale.to(device, non_blocking=True), "capturable": is_live}
    return {"scale": float(scale), "capturable": False}


def _weighted_grads(groups: Sequence[Group]) -> list[Tensor]:
    """The gradients, times T in an array of their own where a group is adaptive."""
    return [
        _weighted(p, p.grad, group["eta"]) if group["adaptive"] else _values(p.grad)
        for group in groups
        for p in group["params"]
        if p.grad is not None
    ]


def _weighted(param: Tensor, grad: Tensor, eta: float) -> Tensor:
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    if param.is_complex():
        param, grad = (torch.view_as_real(t.resolve_conj()) for t in (param, grad))
    if param.dtype in HALF_DTYPES:
        param, grad = param.float(), grad.float()
    return param.abs().add_(eta).mul_(grad)


def _values(grad: Tensor) -> Tensor:
    """What the norm is of; a sparse gradient may list an element more than once."""
    return grad.coalesce().values() if grad.layout == torch.sparse_coo else grad


def _check_options(group: Mapping[str, Any]) -> None:
    for name in ("rho", "eta"):
        value = group[name]
        if not (value >= 0.0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
