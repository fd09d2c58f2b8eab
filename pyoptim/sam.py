"""SAM and ASAM: any optimizer, stepping by the gradient of the worst point nearby."""

from __future__ import annotations

import math
import operator
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

from pyoptim import backend, reductions
from pyoptim.arithmetic import signed
from pyoptim.norms import _eager as eager
from pyoptim.norms import _outside_graphs as outside_graphs
from pyoptim.optimizer import FusedOptimizer
from pyoptim.rows import Row

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

    In functions that torch.compile compiles, both steps run between two graphs. On a GPU engine
    neither waits for the device.

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
    allocated between steps but are never in a checkpoint. No other copy is made: the norm is one
    pass over gradients (ASAM's over weights too), the ascent a second, and a base optimizer of
    pyoptim reads the saved weights itself.
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
    # After first_step all parameters, and the weights that those with a gradient had.
    _saved: tuple[list[Tensor], list[Tensor | None]] | None = None
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

    @eager
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
        params = [p for group in self.param_groups for p in group["params"]]
        norm = _norm(self.param_groups, choice)
        self._saved = params, self._ascent.climb(self.param_groups, params, norm, choice)
        self._norm = norm
        if zero_grad:
            self.zero_grad()

    @outside_graphs
    def second_step(self, zero_grad: bool = False) -> None:
        """Makes a step of the base optimizer from the saved weights with the gradients of now.

        An optimizer of pyoptim reads them where they were saved. Others find them restored, as do
        hooks, a step that a GradScaler may skip, and parameters that no kernel updates.

        Args:
            zero_grad: call zero_grad() afterwards.

        Raises:
            RuntimeError: there was no first_step(), or the base optimizer cannot make the step; the
                weights are as they were before the first step.
        """
        if self._saved is None:
            raise RuntimeError("second_step() without first_step(): there is nothing to step from")
        if not self._step_from_saved():
            self.restore()
            self._base_step()
        self._remember_used_grads()
        if zero_grad:
            self.zero_grad()
        # torch's schedulers warn unless they see a step().
        self._opt_called = True

    @eager
    def restore(self) -> None:
        """Takes a first step back, exactly and in place; for a second pass that failed."""
        saved, self._saved = self._saved, None
        pairs = [(p, w) for p, w in zip(*saved, strict=True) if w is not None] if saved else []
        for param, weight in pairs:
            if param.shape != weight.shape:
                raise RuntimeError(
                    f"a parameter has shape {tuple(param.shape)} and had {tuple(weight.shape)} in "
                    "first_step(); change no shape before second_step()"
                )
        if self._ascent.is_one_pass:
            _copy_back(pairs)
            return
        # Parameters over one memory were perturbed one after the other.
        for param, weight in reversed(pairs):
            param.copy_(weight)

    @torch.no_grad()
    def _step_from_saved(self) -> bool:
        """Steps without a restoring pass; False, and nothing has changed, where it takes one."""
        base = self.base_optimizer
        if not isinstance(base, FusedOptimizer) or not base._reads_from_copies():
            return False
        is_plain = self._ascent.is_one_pass and self.found_inf is None
        if not is_plain or self._saved is None:
            return False
        params, weights = self._saved
        if not _are_same(params, list(self._params())):
            return False
        is_idle = [p.grad is None for p in params]
        if any(is_idle):
            pairs = [(p, w) for p, w, idle in zip(params, weights, is_idle, strict=True) if idle]
            _copy_back([(p, w) for p, w in pairs if w is not None])
            weights = [None if i else w for i, w in zip(is_idle, weights, strict=True)]
        base._sources = weights
        try:
            base.step()
        except BaseException:
            self.restore()
            raise
        finally:
            del base._sources
        self._saved = None
        return True

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

    @outside_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters."""
        super().zero_grad(set_to_none)
        self._remember_used_grads()

    def _remember_used_grads(self) -> None:
        """By weak references: their memory is wanted for the next gradients."""
        grads = ((p, p.grad) for group in self.param_groups for p in group["params"])
        self._used = {id(p): (weakref.ref(g), g._version) for p, g in grads if g is not None}

    @outside_graphs
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

    # The groups of the SAM that `param_groups` were made from, the parameters, and their copies.
    _origins: Sequence[Group] = ()
    _params: Sequence[Tensor] = ()
    _copies: Sequence[Tensor | None] = ()
    _sizes: Sequence[int] = ()  # of the groups

    def _check_sparse(self, row: Row, group: Mapping[str, Any]) -> None:
        """Sparse gradients are allowed: the base optimizer says what it takes."""

    def _sparse_step(self, row: Row, group: Mapping[str, Any]) -> None:
        row.grad = row.grad.to_dense()
        self._reference_step(row, group)

    def climb(
        self, groups: Sequence[Group], params: list[Tensor], norm: Tensor, choice: str
    ) -> list[Tensor | None]:
        """Perturbs all parameters with a gradient; returns their saved weights, by `params`.

        Args:
            groups: of the SAM.
            params: all of theirs.
            choice: a backend's name or "auto".
        """
        if self._is_made_for(groups, params, choice):
            self._set_options(norm)
            if self._plan.step(self.param_groups, self.state):
                return self._copies_of(params)
        self._make_groups(groups, choice)
        self._set_options(norm)
        for param in params:
            if param.grad is not None:
                self._drop_unlike(param)
        self._update()
        self._params = params
        self._copies = [self.state.get(p, {}).get("old_p") for p in params]
        return self._copies_of(params)

    def _is_made_for(self, groups: Sequence[Group], params: list[Tensor], choice: str) -> bool:
        return (
            self._plan is not None
            and self._plan_epoch == backend.current_epoch()
            and choice == self.backend
            and _are_same(self._origins, groups)
            and [len(group["params"]) for group in groups] == self._sizes
            and _are_same(self._params, params)
        )

    def _make_groups(self, groups: Sequence[Group], choice: str) -> None:
        """One per group and device, since each device needs the scale."""
        self.backend, self._origins = choice, list(groups)
        self._sizes = [len(group["params"]) for group in groups]
        self.param_groups = []
        seen: set[int] = set()
        for n, group in enumerate(groups):
            by_device: dict[torch.device, list[Tensor]] = {}
            for param in group["params"]:
                if id(param) not in seen:  # the second visit would save what the first perturbed
                    by_device.setdefault(param.device, []).append(param)
                seen.add(id(param))
            for device, params in by_device.items():
                is_live = _engine_of(params, choice) in backend.GPU_ENGINES
                own = {"params": params, "capturable": is_live, "origin": n, "device": device}
                self.param_groups.append(own)

    def _set_options(self, norm: Tensor) -> None:
        for group in self.param_groups:
            origin = self._origins[group["origin"]]
            is_on_host = group["device"].type == "cpu" and not group["capturable"]
            scale = _scale_on_host if is_on_host else _scale_on_device
            group["scale"] = scale(origin["rho"], norm, group["device"])
            group["adaptive"], group["eta"] = origin["adaptive"], origin["eta"]
            group["maximize"] = bool(origin.get("maximize"))

    def _copies_of(self, params: list[Tensor]) -> list[Tensor | None]:
        pairs = zip(params, self._copies, strict=True)
        return [copy if p.grad is not None else None for p, copy in pairs]

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


def _engine_of(params: list[Tensor], choice: str) -> str:
    """Who perturbs parameters of one device."""
    with_grad = [p for p in params if p.grad is not None]
    return backend.select(choice, with_grad[0]) if with_grad else "reference"


def _scale_on_host(rho: float, norm: Tensor, _: torch.device) -> float:
    length = float(norm)
    # Rounded twice, as torch does when a tensor divides a number.
    return 1.0 / (length + 1e-12) * float(rho) if math.isfinite(length) else 0.0


def _scale_on_device(rho: float, norm: Tensor, device: torch.device) -> Tensor:
    """As a kernel reads it, without waiting."""
    scale = rho / (norm + 1e-12)
    scale = torch.where(norm.isfinite(), scale, torch.zeros_like(scale))
    return scale.to(device, non_blocking=True)


def _are_same(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two lists hold the same objects; == would ask the tensors."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _copy_back(pairs: list[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        params, weights = (list(tensors) for tensors in zip(*pairs, strict=True))
        torch._foreach_copy_(params, weights)


def _norm(groups: Sequence[Group], choice: str) -> Tensor:
    """That of T*grad over all groups, 0-dim float64 on the device of the first gradient."""
    pairs = [
        (p.grad, (p, float(group["eta"])) if group["adaptive"] else None)
        for group in groups
        for p in group["params"]
        if p.grad is not None
    ]
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    grads = [g if g.layout is torch.strided or weight else _values(g) for g, weight in pairs]
    weights = [weight for _, weight in pairs] if any(g["adaptive"] for g in groups) else None
    parts = reductions.batches(grads, 2.0, choice, weights)
    return reductions.total(parts, 2.0)


def _values(grad: Tensor) -> Tensor:
    """What the norm is of; a sparse gradient may list an element more than once."""
    return grad.coalesce().values() if grad.layout == torch.sparse_coo else grad


def _check_options(group: Mapping[str, Any]) -> None:
    for name in ("rho", "eta"):
        value = group[name]
        if not (value >= 0.0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
