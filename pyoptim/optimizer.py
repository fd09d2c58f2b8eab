"""FusedOptimizer: the contract of torch.optim around one rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from pyoptim import backend, ops
from pyoptim.factors import Factors, step_factors
from pyoptim.gpu import Memory
from pyoptim.plan import fill_lists, general_step
from pyoptim.rows import HALF_DTYPES, Row, new_counter

# Which implementation runs is this process's choice, never a checkpoint's.
IMPLEMENTATION_FLAGS = ("foreach", "fused", "capturable", "differentiable")
Reference = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class FusedOptimizer(Optimizer):
    """Base of pyoptim's optimizers: one rule, run by the engine that fits.

    A subclass names its rule, lists its state, and gives the plain-PyTorch `reference` of one
    tensor's update.
    """

    rule: ClassVar[str]
    counts_steps: ClassVar[bool] = True
    # GradScaler then hands over grad_scale and found_inf instead of unscaling in a pass of its own.
    _step_supports_amp_scaling = True

    state_dtype: torch.dtype | None
    backend: str | None
    max_grad_norm: float | None = None
    # GradScaler sets both, and deletes them; it multiplies by a grad_scale that is there before.
    grad_scale: Tensor | None
    found_inf: Tensor | None = None
    # What SAM sets for one step: a copy of each parameter that is read in its place, or None.
    _sources: list[Tensor | None] | None = None
    # What a line search sets: gradients in the place of the parameters' own, or None.
    _grads: list[Tensor | None] | None = None
    _plan: Any = None
    _plan_epoch: int = -1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # torch's compiler skips the constructors of torch.optim; it would trace ours, and fail.
        if "__init__" in cls.__dict__:
            cls.__init__ = _disable_dynamo(cls.__init__)  # type: ignore[method-assign]

    def _configure(
        self,
        state_dtype: torch.dtype | None,
        backend_name: str | None,
        max_grad_norm: float | None,
    ) -> None:
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype must be None or torch.float32, got {state_dtype!r}")
        if max_grad_norm is not None and not float(max_grad_norm) >= 0.0:
            raise ValueError(f"max_grad_norm must be None or at least 0, got {max_grad_norm!r}")
        self.state_dtype = state_dtype
        self.max_grad_norm = max_grad_norm
        self.backend = None if backend_name is None else backend.check_choice(backend_name)

    # -- what a subclass says ----------------------------------------------------------------------

    @staticmethod
    def state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the keys of the state that the options of `group` need, in the rule's order."""
        raise NotImplementedError

    @staticmethod
    def reference(
        param: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        step: float = 1,
        first: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns (new param, new state) of one update in plain PyTorch; changes nothing.

        Args:
            param, grad: real tensors of one shape; the arithmetic runs in their dtype (use float64
                for the truth).
            state: the tensors that `state_names(group)` lists, shape of param.
            group: hyper-parameters under torch's names, as in `param_groups`.
            step: number of this step, from 1.
            first: whether the momentum buffer is new.
        """
        raise NotImplementedError

    def _master_of(self, entry: Mapping[str, Any]) -> Tensor | None:
        """The float32 copy of a half-precision parameter in its state, which steps start from."""
        return None

    def _new_state(self, name: str, param: Tensor) -> Tensor:
        return torch.zeros_like(
            param, dtype=self._dtype_of_state(param), memory_format=torch.preserve_format
        )

    def _check_sparse(self, row: Row, group: Mapping[str, Any]) -> None:
        raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def _check_row(self, row: Row, group: Mapping[str, Any]) -> None:
        """Raises if the optimizer cannot step a row with a dense gradient."""

    def _needs_reference(self, row: Row) -> bool:
        """Whether no kernel can step the row."""
        return False

    def _sparse_step(self, row: Row, group: Mapping[str, Any]) -> None:
        raise NotImplementedError

    # -- stepping ----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with grad enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient, a parameter or a state tensor cannot be used; nothing has been
                changed.
            BackendError: `backend=` names one that cannot run this; nothing has been changed.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._compiled_step(closure)
        if self._is_observed():
            return self._observed_step() if closure is None else self._observed_step(closure)
        return self._unobserved_step(closure)

    # torch would wrap step() in hook and profiler handling that costs 7 to 9 us; it is paid only
    # when either is in use.
    step.hooked = True  # type: ignore[attr-defined]

    def _compiled_step(self, closure: Callable[[], Any] | None) -> Any:
        """Called in the place of step() by code that torch.compile compiles."""
        if not self._is_graphable():
            return self._uncompiled_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            is_done = self._graph_step()
        if not is_done:
            self._uncompiled_step(None)
        return loss

    def _is_graphable(self) -> bool:
        return (
            backend.native() is not None
            and self.found_inf is None
            and self.max_grad_norm is None
            and self._sources is None
            and (self.backend or backend.chosen()) != "reference"
            and not self._has_hooks()
        )

    def _has_hooks(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )

    def _reads_from_copies(self) -> bool:
        """Whether nothing but the engines looks at the parameters during step().

        Code of others, which could, is in hooks, in subclasses, and in what stands in the place of
        step(); the wrapper that torch's schedulers put there only calls it.
        """
        step = vars(self).get("step")
        if hasattr(step, "_wrapped_by_lr_sched"):
            step = getattr(step, "__wrapped__", step)
        is_own = step in (None, FusedOptimizer.step)
        return is_own and type(self).step is FusedOptimizer.step and not self._has_hooks()

    def _graph_step(self) -> bool:
        """Puts the step into the graph that is being compiled; False when it cannot."""
        lists: tuple[list[Tensor], ...] = ([], [], [], [])
        group_sizes, n_states, hypers, tensors = [], [], [], []
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            states: list[Tensor] = []
            steps: list[Tensor] = []
            if not self._init_group(group, params, grads, states, steps):
                return False
            for whole, part in zip(lists, (params, grads, states, steps), strict=True):
                whole.extend(part)
            group_sizes.append(len(params))
            n_states.append(len(self.state_names(group)))
            numbers, others = ops.flat_hypers(ops.HYPER_NAMES[self.rule], group)
            hypers.extend(numbers)
            tensors.extend(others)
        engine = self.backend or backend.chosen()
        torch.ops.pyoptim.step_(self.rule, *lists, group_sizes, n_states, hypers, tensors, engine)
        return True

    def _init_group(self, group: Any, *lists: Any, **_: Any) -> Any:
        """Fills (params, grads, states, steps), and the state; False when kernels cannot run it.

        torch's compiler knows the method by its name: it calls it instead of tracing it, and turns
        the tensors in the lists into inputs of the graph.
        """
        return fill_lists(self, group, *lists)

    @_disable_dynamo
    def _uncompiled_step(self, closure: Callable[[], Any] | None) -> Any:
        """Breaks the graph that is being compiled."""
        return self.step(closure)

    def _is_observed(self) -> bool:
        # A subclass's own step(), which then calls this one, has been wrapped by torch.
        return self._has_observers() and type(self).step is FusedOptimizer.step

    def _has_observers(self) -> bool:
        return bool(
            self._has_hooks()
            or profiler._is_profiler_enabled
            or torch._C._autograd._profiler_enabled()
        )

    def _unobserved_step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    _observed_step = Optimizer.profile_hook_step(_unobserved_step)

    def _update(self) -> None:
        plan = self._plan if self._plan_epoch == backend.current_epoch() else None
        if plan is not None:
            if self.max_grad_norm is None and self.found_inf is None:
                is_done = plan.step(self.param_groups, self.state, self._sources)
            else:
                is_done = self._scaled_step(plan)
            if is_done:
                return
        self._plan_epoch = backend.current_epoch()
        general_step(self)

    def _scaled_step(self, plan: Any) -> bool:
        """Says whether the step was made, or is to be skipped."""
        groups = self.param_groups
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        factors = step_factors(self, grads, plan.is_on_gpu, plan.devices)
        if factors is None:
            return True
        inv_scale, clip = factors.inv_scale, factors.clip
        made: bool = plan.scaled_step(
            groups, self.state, inv_scale, clip, factors.devices, self._sources
        )
        return made

    @property
    def _memory(self) -> Memory:
        """What the GPU engines keep between steps."""
        memory: Memory = self.__dict__.setdefault("_gpu_memory", Memory())
        return memory

    @property
    def _counters(self) -> dict[Tensor, Tensor]:
        """Step counters on the device, by parameter, of rules whose state has none."""
        counters: dict[Tensor, Tensor] = self.__dict__.setdefault("_hidden_counters", {})
        return counters

    def _plain_step(self, row: Row, factors: Factors) -> None:
        """One row without a kernel: the reference, or torch's own code for a sparse gradient."""
        group, known = self.param_groups[row.group], factors.on_host(row.grad.device)
        if known is None:
            return
        inv_scale, clip = known
        with torch.set_grad_enabled(bool(group.get("differentiable"))):
            if inv_scale != 1.0:
                row.grad.mul_(inv_scale)
            if clip != 1.0:
                row.grad = row.grad * clip if row.backend == "sparse" else _clipped(row.grad, clip)
            if row.backend == "sparse":
                self._sparse_step(row, group)
            else:
                self._reference_step(row, group)

    def _reference_step(self, row: Row, group: Mapping[str, Any]) -> None:
        step = 1.0
        if row.step is not None:
            row.step += 1
            step = float(row.step)
        names = self.state_names(group)
        param, grad, *states = (_as_real(t) for t in (row.param, row.grad, *row.states))
        compute = torch.float32 if param.dtype in HALF_DTYPES else param.dtype
        # Copies, because autograd may need the old values after they have been overwritten
        # (differentiable=True).
        old = {n: state.to(compute, copy=True) for n, state in zip(names, states, strict=True)}
        new_param, new_states = self.reference(
            param.to(compute, copy=True), grad.to(compute), old, group, step, row.first
        )
        for name, state in zip(names, row.states, strict=True):
            _assign(state, new_states[name])
        _assign(row.param, new_param)

    # -- state -------------------------------------------------------------------------------------

    def _dtype_of_state(self, param: Tensor) -> torch.dtype:
        return self.state_dtype if self.state_dtype and param.dtype in HALF_DTYPES else param.dtype

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Returns the state as torch's optimizers do, for any of them to load."""
        # torch 2.13's compiler writes capturable=True into every group that compiled code looks at.
        for group in self.param_groups:
            if not self.defaults.get("capturable") and all(p.is_cpu for p in group["params"]):
                group.pop("capturable", None)
                if "capturable" in self.defaults:
                    group["capturable"] = False
        state: dict[str, Any] = super().state_dict()
        return state

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this optimizer or of any torch implementation of it, or nothing.

        As torch.optim, with three differences: the implementation flags stay those of this
        optimizer, `state_dtype` holds for the loaded state, and step counters keep their exact
        value. When anything raises, the optimizer is as before.
        """
        former = self.state, self.param_groups
        loaded: dict[str, Any] = {}

        def keep_source(_: Optimizer, source: dict[str, Any]) -> None:
            loaded.update(source)

        def restore(_: Optimizer) -> None:
            for group, own in zip(self.param_groups, former[1], strict=True):
                _restore_flags(group, own)
            for entry, param, source in self._entries_with_source(loaded):
                self._restore_precision(entry, param, source)

        hooks = (
            self.register_load_state_dict_pre_hook(keep_source),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups = former
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _entries_with_source(
        self, loaded: Mapping[str, Any]
    ) -> Iterator[tuple[dict[str, Any], Tensor, Any]]:
        saved = (i for group in loaded["param_groups"] for i in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for index, param in zip(saved, params, strict=True):
            if index in loaded["state"]:
                yield self.state[param], param, loaded["state"][index]

    def _restore_precision(
        self, entry: dict[str, Any], param: Tensor, source: Mapping[str, Any]
    ) -> None:
        if "step" in source:
            entry["step"] = new_counter(float(source["step"]))
        dtype = self._dtype_of_state(param)
        if dtype == param.dtype:
            return
        for name, value in source.items():
            if name != "step" and isinstance(value, Tensor) and value.is_floating_point():
                entry[name] = value.to(dtype=dtype, device=param.device)

    def __getstate__(self) -> dict[str, Any]:
        own = ("state_dtype", "backend", "max_grad_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = None  # it holds the former state
        self._counters.clear()
        super().__setstate__(state)


def _clipped(grad: Tensor, clip: float) -> Tensor:
    """The gradient times `clip`, in the type that the arithmetic runs in."""
    return (grad.float() if grad.dtype in HALF_DTYPES else grad) * clip


def _as_real(tensor: Tensor) -> Tensor:
    """The values as a real tensor; a view of `tensor` unless it is lazily conjugated or negated."""
    tensor = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _assign(target: Tensor, real: Tensor) -> None:
    target.copy_(torch.view_as_complex(real.contiguous()) if target.is_complex() else real)


def _restore_flags(group: dict[str, Any], own: Mapping[str, Any]) -> None:
    for name in IMPLEMENTATION_FLAGS:
        group.pop(name, None)
        if name in own:
            group[name] = own[name]
