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

from pyoptim import kernels

BACKENDS = ("cuda", "triton", "cpu", "reference")
CHOICES = ("auto", *BACKENDS)
# In the order in which _C numbers them.
ENGINES = ("cpu", "cuda", "triton")
GPU_ENGINES = ("cuda", "triton")
CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here."""


def native() -> ModuleType | None:
    """Returns the compiled module `pyoptim._C`, or None when this installation has none."""
    return _native


def status() -> dict[str, str | None]:
    """Returns, for every backend, None when it can run here and otherwise the reason why not."""
    return {
        "cuda": _why_no_cuda(),
        "triton": _why_no_triton(),
        "cpu": _native_missing,
        "reference": None,
    }


def _why_no_cuda() -> str | None:
    """Loads the CUDA engine when it is first asked for: a process that forks must not have."""
    if _native is None:
        return _native_missing
    if _native.cuda_is_loaded():
        return None
    if not CUDA_LIBRARY.exists():
        return _why_not_built("cuda", "this installation has no CUDA engine")
    if not torch.cuda.is_available():
        return "torch has no CUDA device here"
    return _native.load_cuda(str(CUDA_LIBRARY)) or None


def _why_no_triton() -> str | None:
    return _native_missing if _native is None else kernels.triton_status()


def load_cuda_engine(path: str | Path | None) -> str | None:
    """Puts the CUDA engine in the library at `path` to use, or none; returns why it cannot be used.

    The emulator's library updates tensors of the CPU.
    """
    assert _native is not None
    reason: str = _native.load_cuda("" if path is None else str(path))
    _choice.epoch += 1
    return reason or None


def device_type(name: str) -> str:
    """Returns the type of the devices whose tensors an engine updates."""
    if name == "cuda":
        return "cpu" if _native is not None and _native.is_emulated() else "cuda"
    return kernels.device_type() if name == "triton" else "cpu"


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
    if choice in ENGINES and device != device_type(choice):
        wanted = {"cpu": "the CPU", "cuda": "a CUDA device"}[device_type(choice)]
        raise BackendError(
            f"backend={choice!r} cannot update a parameter on device {param.device}; "
            f"use backend='auto' or move the parameter to {wanted}"
        )
    if choice != "auto":
        return choice
    if device == "cpu" and _native is not None:
        return "cpu"
    if device == "cuda":
        return _select_cuda()
    if device not in ("cpu", "meta"):
        _say_once(f"no kernels for device {device!r}; the plain-PyTorch reference runs")
    return "reference"


def _select_cuda() -> str:
    reasons = {"cuda": _why_no_cuda()}
    if reasons["cuda"] is None:
        return "cuda"
    reasons["triton"] = _why_no_triton()
    if reasons["triton"] is None:
        _say_once(f"the Triton engine runs, not the CUDA one: {reasons['cuda']}")
        return "triton"
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    _say_once(f"no kernels for device 'cuda'; the plain-PyTorch reference runs ({why})")
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
        return None, _why_not_built("cpu", str(error))
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


def _why_not_built(part: str, otherwise: str) -> str:
    """What the build recorded about "cpu" or "cuda"."""
    try:
        built: dict[str, Any] = json.loads(
            Path(__file__).with_name("_build_info.json").read_text()
        )[part]
    except (OSError, ValueError, KeyError):
        built = {}
    return str(built.get("reason") or otherwise)


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
