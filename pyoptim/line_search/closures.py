"""The closure of one step: its forms, its gradients, and its trials on the same random numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook

Closure = Callable[..., Any]
KEYWORDS = ("backward", "backwards")
# Buffers up to this size are saved whether or not they are seen to change.
_SMALL = 2**16


class Evaluation:
    """Calls a closure, or one for each micro-batch, once with gradients and then without.

    Args:
        closure: computes and returns the loss; with a parameter `backward` (or `backwards`) it also
            runs its backward pass when that is True. Or a sequence of closures of the first kind,
            whose losses are averaged.
        params: all parameters of the optimizer.

    Raises: TypeError for anything else.
    """

    def __init__(self, closure: Closure | Sequence[Closure], params: list[Tensor]) -> None:
        # A function first: to ask whether something is a Sequence takes longer.
        self._parts = [closure] if callable(closure) else _listed(closure)
        if not self._parts or not all(map(callable, self._parts)):
            raise TypeError(
                f"closure must be a function that returns the loss, or a non-empty list of them, "
                f"one for each micro-batch; got {closure!r}"
            )
        self._keyword = _keyword(self._parts[0])
        if len(self._parts) > 1 and any(map(_keyword, self._parts)):
            raise TypeError(
                "closures of micro-batches must not take `backward`: give them without, or one "
                "closure that takes it and accumulates itself"
            )
        self._params = params

    def with_gradients(self, scale: Callable[[Tensor], Any] | None = None) -> Tensor:
        """Returns the loss, detached; the gradients are in the parameters, which had none.

        Args:
            scale: what multiplies the loss before its backward pass, such as GradScaler.scale.
        """
        if torch.is_grad_enabled():  # as nearly always; a context takes microseconds
            losses = [self._backward(part, scale) for part in self._parts]
        else:
            with torch.enable_grad():
                losses = [self._backward(part, scale) for part in self._parts]
        if all(p.grad is None for p in self._params):
            raise RuntimeError(
                "the closure gave no parameter of this optimizer a gradient; return a loss "
                "that depends on them"
            )
        return _mean(losses)

    def _backward(self, part: Closure, scale: Callable[[Tensor], Any] | None) -> Tensor:
        n = len(self._parts)
        if self._keyword:
            return _checked(part(**{self._keyword: True})).detach()
        loss = _checked(part())
        # A closure that runs backward itself whenever gradients are enabled is welcome too.
        if n == 1 and any(p.grad is not None for p in self._params):
            return loss.detach()
        if not loss.requires_grad:
            raise RuntimeError(
                "the loss that the closure returned does not require grad; return it as computed, "
                "without detach() or torch.no_grad()"
            )
        share = loss if n == 1 else loss / n
        (share if scale is None else scale(share)).backward()
        return loss.detach()

    def trial(self) -> Tensor:
        """Returns the loss at the parameters of now; no gradient is computed."""
        arguments = {self._keyword: False} if self._keyword else {}
        # Under an autocast context around step() it would hold casts of other weights.
        torch.clear_autocast_cache()
        try:
            with torch.no_grad():
                losses = [_checked(part(**arguments)) for part in self._parts]
        except RuntimeError as error:
            if not self._keyword and "does not require grad" in str(error):
                error.add_note(
                    "Trials run without gradients: the closure must only compute and return the "
                    "loss, or take a parameter `backward` and obey it."
                )
            raise
        finally:
            torch.clear_autocast_cache()
        return _mean(losses)


def _listed(closures: Any) -> list[Closure]:
    return list(closures) if isinstance(closures, Sequence) else [closures]


def _keyword(closure: Closure) -> str | None:
    """The parameter that says whether to run backward, if the closure has one."""
    code = getattr(closure, "__code__", None)
    if code is not None:
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return next((name for name in KEYWORDS if name in names), None)
    try:
        parameters = inspect.signature(closure).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in KEYWORDS if name in parameters), None)


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the closure returned {loss!r}, a {type(loss).__name__}; return the loss itself, a "
            "tensor with one element (no .item())"
        )
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(
            f"the closure returned a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}; "
            "return one real number, such as the mean"
        )
    whole: Tensor = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
    return whole


def _mean(losses: list[Tensor]) -> Tensor:
    if len(losses) == 1:
        return losses[0]
    return torch.stack([loss.reshape(()).double() for loss in losses]).mean()


class RandomState:
    """The generators that a closure draws from: torch's own of the CPU and the devices in use.

    Made before the first evaluation, which leaves the generators where the user is to find them.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self._devices = sorted(devices | {torch.device("cpu")}, key=str)
        self._before = self._read()
        self._after = self._before

    def mark_end(self) -> None:
        """Remembers where the first evaluation has left the generators."""
        self._after = self._read()

    def rewind(self) -> None:
        """Goes to where the first evaluation began."""
        self._write(self._before)

    def advance(self) -> None:
        """Goes to where the first evaluation ended."""
        self._write(self._after)

    def _read(self) -> list[Tensor | None]:
        return [_random_state(device) for device in self._devices]

    def _write(self, states: list[Tensor | None]) -> None:
        for device, state in zip(self._devices, states, strict=True):
            if state is not None:
                _random_module(device).set_rng_state(state, *_index(device))


def _random_state(device: torch.device) -> Tensor | None:
    module = _random_module(device)
    if not hasattr(module, "get_rng_state"):
        return None
    state: Tensor = module.get_rng_state(*_index(device))
    return state


def _random_module(device: torch.device) -> ModuleType:
    module: ModuleType = torch if device.type == "cpu" else getattr(torch, device.type, torch)
    return module


def _index(device: torch.device) -> tuple[int, ...]:
    return () if device.index is None or device.type in ("cpu", "mps") else (device.index,)


class Buffers:
    """Buffers of modules, such as BatchNorm's statistics, which trials must not move.

    Args:
        module: whose buffers; None is all modules that are called in the first evaluation.
    """

    def __init__(self, module: Module | None) -> None:
        self._modules: dict[int, Module] = {}
        self._versions: dict[tuple[int, str], tuple[Tensor, int]] = {}
        self._saved: list[tuple[Module, str, Tensor, Tensor]] = []
        self._module = module

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the first evaluation: notes the modules, and saves their buffers at the end."""
        handle = None
        if self._module is None:
            handle = register_module_forward_pre_hook(lambda module, _: self._note(module))
        else:
            self._note(self._module)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
        self._save()

    def _note(self, module: Module) -> None:
        if id(module) in self._modules:
            return
        for part in module.modules():
            if id(part) not in self._modules:
                self._modules[id(part)] = part
                for name, buffer in part._buffers.items():
                    if buffer is not None and not buffer.is_inference():
                        self._versions[id(part), name] = buffer, buffer._version

    def _save(self) -> None:
        for part in self._modules.values():
            for name, buffer in part._buffers.items():
                if buffer is not None and self._may_change(part, name, buffer):
                    self._saved.append((part, name, buffer, buffer.clone()))

    def _may_change(self, part: Module, name: str, buffer: Tensor) -> bool:
        # torch does not count what batch_norm writes into its statistics, hence the size.
        if buffer.numel() <= _SMALL:
            return True
        former, version = self._versions.get((id(part), name), (None, -1))
        return former is not buffer or buffer._version != version

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes what a trial has done to them, in place.

        Also lets go of whole weights that FSDP2 keeps after a forward pass without a backward pass:
        the next one would see them, not the shards of then.
        """
        for part in self._modules.values():
            reshard: Callable[[], None] | None = getattr(part, "reshard", None)
            if reshard is not None and hasattr(part, "unshard"):
                reshard()
        if not self._saved:
            return
        for part, name, buffer, _ in self._saved:
            part._buffers[name] = buffer
        torch._foreach_copy_([s[2] for s in self._saved], [s[3] for s in self._saved])
