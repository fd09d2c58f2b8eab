"""Norms, clipping by the norm, and row sums, the same to the bit on every engine.

The engines add float64 terms in one fixed order (csrc/reduce/order.hpp), whatever the number of
threads, the instruction set or the device. Where no engine can run, or backend="reference" was
asked for, plain PyTorch adds in float64 in an order of its own: its norms differ from the engines'
by a few units in the last place of float64.
"""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from pyoptim import backend as backends
from pyoptim import reductions

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def _eager(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Runs without autograd and, in compiled code, between two graphs."""
    return _outside_graphs(torch.no_grad()(function))


def _outside_graphs(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Runs, in compiled code, between two graphs.

    `torch._disable_dynamo` alone would import the compiler at the first call of eager code.
    """
    between_graphs = torch._disable_dynamo(function)  # type: ignore[attr-defined]

    @functools.wraps(function)
    def call(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        run = between_graphs if torch.compiler.is_dynamo_compiling() else function
        result: _Result = run(*args, **kwargs)
        return result

    return call


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scales gradients in place so that their common norm is at most `max_norm`.

    A drop-in for `torch.nn.utils.clip_grad_norm_`: one pass over all gradients for the norm and one
    that scales them, by the factor max_norm / (norm + 1e-6) where that is below 1. Norm and factor
    stay on the device; nothing waits for it, unless gradients lie on the CPU as well.

    Sparse gradients, DTensors, devices without an engine and other values of `norm_type` are left
    to torch's function.

    Args:
        parameters: a tensor, or tensors, whose `.grad` is scaled; those without one are skipped.
        max_norm: the largest norm allowed.
        norm_type: 2, 1 or inf have kernels; any other is computed by torch.
        error_if_nonfinite: raise, before anything is changed, when the norm is NaN or infinite.
            This waits for the device.
        foreach: passed on where torch's function runs, otherwise without effect.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None is what
            `pyoptim.use_backend` chose.

    Returns:
        The norm before clipping, a 0-dim tensor on the first gradient's device: float64 when any
        gradient is float64, else float32. (torch rounds it to bfloat16 for bfloat16 gradients, and
        their factor too.)

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
        ValueError: `backend` is not a backend.
        BackendError: a backend was asked for by name and cannot take these gradients.
    """
    max_norm, norm_type = float(max_norm), float(norm_type)
    if torch.compiler.is_dynamo_compiling() and norm_type in reductions.KINDS:
        grads = [p.grad for p in _as_list(parameters) if p.grad is not None]
        if grads and not error_if_nonfinite:
            choice = backends.chosen() if backend is None else backend
            norm: Tensor = torch.ops.pyoptim.clip_grads_(grads, max_norm, norm_type, choice)
            return norm
    return _clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite, foreach, backend)


@_eager
def _clip_grad_norm(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    backend: str | None,
) -> Tensor:
    params = _as_list(parameters)
    choice = _checked(backend)
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    batches = reductions.batches(grads, norm_type, choice)
    if choice == "auto" and any(batch.is_plain for batch in batches):
        return torch.nn.utils.clip_grad_norm_(
            params, max_norm, norm_type, error_if_nonfinite, foreach
        )
    norm = reductions.total(batches, norm_type)
    if error_if_nonfinite and not math.isfinite(norm.item()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite "
            f"({norm.item()}), so it cannot be clipped. To disable this error and scale the "
            "gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    return reductions.clip(batches, norm, max_norm)


@_eager
def total_norm(
    tensors: Tensor | Iterable[Tensor], norm_type: float = 2.0, *, backend: str | None = None
) -> Tensor:
    """The norm of all elements of all tensors as one vector.

    Args:
        tensors: any floating-point or complex tensors; any shapes, memory layouts and devices.
        norm_type: 2, 1 or inf have kernels; any other is computed by torch in float64.
        backend: as in `clip_grad_norm_`.

    Returns:
        0-dim float64 tensor on the first tensor's device; 0 without tensors. No gradient flows
        through it.

    Raises: TypeError for what is not a floating-point tensor; BackendError as `clip_grad_norm_`.
    """
    given = _floating(_as_list(tensors))
    if not given:
        return torch.zeros((), dtype=torch.float64)
    norm_type = float(norm_type)
    return reductions.total(reductions.batches(given, norm_type, _checked(backend)), norm_type)


@_eager
def tensor_norms(
    tensors: Tensor | Iterable[Tensor], norm_type: float = 2.0, *, backend: str | None = None
) -> Tensor:
    """The norm of each tensor.

    Args and exceptions are those of `total_norm`.

    Returns:
        float64 tensor [number of tensors] on the first tensor's device.
    """
    given = _floating(_as_list(tensors))
    norm_type = float(norm_type)
    batches = reductions.batches(given, norm_type, _checked(backend))
    if len(batches) == 1:
        return batches[0].norms(norm_type, True)
    device = given[0].device if given else None
    results = torch.zeros(len(given), dtype=torch.float64, device=device)
    for batch in batches:
        results[batch.indexes] = batch.norms(norm_type, True).to(results.device)
    return results


@_eager
def row_sums(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """The products a.b, a.a and b.b of every row, a row being all elements of one index of dim 0.

    Elements of a row are added in the order in which they lie in memory. Complex numbers count as
    two elements, so that a.b is the real part of the inner product.

    Args:
        a: floating-point or complex tensor of any shape; 0-dim is one row of one element.
        b: a tensor of the shape, dtype and device of `a`.
        backend: as in `clip_grad_norm_`.

    Returns:
        float64 tensor [rows, 3] on the device of `a`.

    Raises: ValueError when shape, dtype or device differ; TypeError for other dtypes.
    """
    for name in ("shape", "dtype", "device"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(
                f"row_sums: a has {name} {getattr(a, name)} but b has {getattr(b, name)}; "
                f"give tensors of one {name}"
            )
    _floating([a, b])
    return reductions.row_sums(a, b, _checked(backend))


@_eager
def clip_factor(
    grads: list[Tensor],
    max_norm: float,
    inv_scale: float = 1.0,
    grad_scale: Tensor | None = None,
    choice: str = "auto",
) -> dict[torch.device, float | Tensor]:
    """The factor by which optimizers multiply gradients to bring their 2-norm to `max_norm`.

    The norm is that of unscaled gradients, over all devices.

    Args:
        grads: gradients as they are, still multiplied by the loss scale.
        inv_scale: 1 / loss scale.
        grad_scale: the loss scale, 1 element, in place of `inv_scale`.
        choice: a backend's name or "auto".

    Returns:
        Per device of a gradient, a number for the CPU's engine and a float64 tensor [1] for others.
    """
    batches = reductions.batches(grads, 2.0, choice)
    if not batches:
        return {}
    norm = reductions.total(batches, 2.0)
    return {b.device: b.factor(norm, max_norm, inv_scale, grad_scale) for b in batches}


def _checked(backend: str | None) -> str:
    return backends.chosen() if backend is None else backends.check_choice(backend)


def _as_list(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    given = list(tensors)
    if not given and isinstance(tensors, types.GeneratorType):
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=6
        )
    return given


def _floating(tensors: list[Tensor]) -> list[Tensor]:
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensor {i} is a {type(tensor).__name__}; give torch.Tensor objects")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(
                f"tensor {i} has dtype {tensor.dtype}; norms need a floating-point or complex dtype"
            )
    return tensors
