"""Backends: who can run a step here, who runs it, and why not the others."""

import importlib
import json
import os
import warnings
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")
CHOICES = ("auto", *BACKENDS)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here."""


def native() -> ModuleType | None:
    """Returns the compiled module `pyoptim._C`, or None when this installation has none."""
    return _native


def status() -> dict[str, str | None]:
    """Returns, for every backend, None when it can run here and otherwise the reason why not."""
    no_gpu_engine = "this version of pyoptim has no GPU engine"
    return {
        "cuda": no_gpu_engine,
        "triton": no_gpu_engine,
        "cpu": _native_missing,
        "reference": None,
    }


def check_choice(name: str) -> str:
    """Returns `name` if it is "auto" or a backend that can run here.

    Raises:
        ValueError: `name` is not a backend.
        BackendError: the backend cannot run here; the message says why.
    """
    if name not in CHOICES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, CHOICES))}, got {name!r}")
    reason = None if name == "auto" else status()[name]
    if reason is not None:
        raise BackendError(f"backend={name!r} cannot run here: {reason}; use backend='auto'")
    return name


class use_backend:
    """Chooses the backend of every optimizer that was not given `backend=` itself.

    Takes effect at once, for the whole process; as a context manager it restores the former choice
    at the end.

    Args:
        name: "auto" (the fastest that can run), "cpu", "cuda", "triton" or "reference".

    Raises:
        ValueError: `name` is not a backend.
        BackendError: the backend cannot run here.
    """

    def __init__(self, name: str) -> None:
        self._former = _choice.name
        _choice.set(check_choice(name))

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _choice.set(self._former)


def chosen() -> str:
    """Returns the name last given to `use_backend`; "auto" at first."""
    return _choice.name


class _Choice:
    def __init__(self) -> None:
        self.name = "auto"
        self.epoch = 0  # plans made under an earlier choice are stale

    def set(self, name: str) -> None:
        self.name = name
        self.epoch += 1


_choice = _Choice()


def current_epoch() -> int:
    return _choice.epoch


def select(choice: str, param: Tensor) -> str:
    """Returns the backend that updates `param` when `choice` was asked for.

    Raises:
        BackendError: `choice` names a backend that cannot update tensors of this device.
    """
    device = param.device.type
    if choice == "cpu" and device != "cpu":
        raise BackendError(
            f"backend='cpu' cannot update a parameter on device {param.device}; "
            "use backend='auto' or move the parameter to the CPU"
        )
    if choice != "auto":
        return choice
    if device == "cpu" and _native is not None:
        return "cpu"
    if device not in ("cpu", "meta"):
        _say_once(f"no kernels for device {device!r} yet; the plain-PyTorch reference runs")
    return "reference"


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _warn(message)


def _warn(message: str) -> None:
    """Warns on one line: without a source file there is no second line to show."""
    warnings.warn_explicit(message, RuntimeWarning, filename="pyoptim", lineno=0)


def _load_native() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("pyoptim._C")
    except ImportError as error:
        return None, _why_no_module(error)
    if not module.find_dlpack_api(Tensor):
        return (
            None,
            "this torch has no DLPack exchange table; pyoptim's kernels need torch >= 2.10",
        )
    if os.environ.get("PYOPTIM_ACCESS", "symbols") != "dlpack":
        _use_symbols_if_sound(module)
    if isa := os.environ.get("PYOPTIM_ISA"):
        module.set_isa(isa)
    return module, None


def _why_no_module(error: ImportError) -> str:
    try:
        built: dict[str, Any] = json.loads(
            Path(__file__).with_name("_build_info.json").read_text()
        )["cpu"]
    except (OSError, ValueError, KeyError):
        built = {}
    return str(built.get("reason") or error)


def _use_symbols_if_sound(module: ModuleType) -> None:
    """Lets `module` read tensors through libtorch's symbols if they answer as torch does.

    Several of them are mangled C++ names, and the plan reads three places of torch's objects
    itself. No torch release promises to keep either; otherwise the slower DLPack table serves,
    which is stable.
    """
    if not module.symbols_found():
        return
    samples = _self_test_samples()
    offset = int(module.find_tensor_offset(samples[0], _tensor_capsule(samples[0])))
    if offset == 0 or any(
        module.find_tensor_offset(t, _tensor_capsule(t)) != offset for t in samples
    ):
        return
    metadata = int(module.probe_symbols(samples[0], offset)[-1])
    if metadata == 0 or not all(_symbols_agree(module, t, offset, metadata) for t in samples):
        return
    module.set_metadata(metadata)
    module.use_symbols(offset)


def _tensor_capsule(tensor: Tensor) -> Any:
    return torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor)


def _self_test_samples() -> list[Tensor]:
    plain = torch.arange(24.0).reshape(2, 3, 4)
    param = torch.nn.Parameter(plain.transpose(0, 1).to(torch.bfloat16))
    param.grad = torch.ones_like(param)
    lone = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    conj = torch.ones(3, dtype=torch.complex64).conj()
    return [plain, param, lone, conj, conj.imag, plain.half()[:, 1:], torch.ones(())]


def _symbols_agree(module: ModuleType, tensor: Tensor, offset: int, metadata: int) -> bool:
    seen, seen_grad, is_neg, is_conj, storage, shape_at = module.probe_symbols(tensor, offset)
    version = tensor._version
    module.bump_by_symbol(tensor, offset)
    grad = tensor.grad if tensor.is_leaf else None
    return (
        seen == _described(tensor)
        and seen_grad == (None if grad is None else _described(grad))
        and (is_neg, is_conj) == (tensor.is_neg(), tensor.is_conj())
        and (storage, shape_at) == (tensor.untyped_storage().data_ptr(), metadata)
        and tensor._version == version + 1
    )


def _described(tensor: Tensor) -> tuple[int, list[int], list[int], str, bool, bool]:
    real = torch.view_as_real(tensor.resolve_conj()).dtype if tensor.is_complex() else tensor.dtype
    name = str(real).removeprefix("torch.")
    return (
        tensor.data_ptr(),
        list(tensor.shape),
        list(tensor.stride()),
        name,
        tensor.is_complex(),
        tensor.is_cpu,
    )


_native, _native_missing = _load_native()
if _native is None:
    _warn(f"the plain-PyTorch reference runs, without compiled kernels: {_native_missing}")
