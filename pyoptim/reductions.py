"""The engines of `pyoptim.norms`: tensors of one device, and who reduces and scales them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyoptim import backend as backends
from pyoptim.rows import HALF_DTYPES

# A parameter and eta: what a gradient is multiplied by is abs(parameter) + eta.
Weight = tuple[Tensor, float]

# What the engines compute, by norm_type; numbered as reduce::Kind.
KINDS = {2.0: 0, 1.0: 1, math.inf: 2}


class Batch:
    """Tensors of one device, on plain PyTorch; subclasses put an engine in its place.

    Args:
        tensors: what is summed up.
        indexes: where they stand among all tensors.
        originals: what is scaled: `tensors`, some of which may be copies of them.
        spans: `_C.Spans` of `tensors`, for engines.
    """

    is_plain = True

    def __init__(
        self,
        tensors: Sequence[Tensor],
        indexes: Sequence[int],
        originals: Sequence[Tensor],
        spans: Any = None,
    ) -> None:
        self.tensors, self.indexes, self.originals = tensors, indexes, originals
        self.device = tensors[0].device
        self.spans = spans

    @property
    def has_float64(self) -> bool:
        return any(t.dtype in (torch.float64, torch.complex128) for t in self.originals)

    def norms(self, norm_type: float, per_tensor: bool) -> Tensor:
        """Returns float64 [number of tensors, or 1]."""
        norms = torch.stack([_plain_norm(t, norm_type) for t in self.tensors])
        return norms if per_tensor else _norm_of_norms(norms, norm_type).reshape(1)

    def factor(
        self, norm: Tensor, max_norm: float, inv_scale: float, grad_scale: Tensor | None
    ) -> float | Tensor:
        """Returns the clip factor for a norm on any device, as reduce::clip_factor."""
        if self.device.type == "cpu":
            scale = inv_scale if grad_scale is None else (1.0 / grad_scale.double()).item()
            factor = max_norm / (norm.item() * scale + 1e-6)
            return 1.0 if factor > 1.0 else factor
        norm = norm.to(self.device).reshape(1)
        if grad_scale is None:
            norm = norm * inv_scale
        else:
            norm = norm * grad_scale.to(self.device).reshape(1).double().reciprocal()
        return (max_norm / (norm + 1e-6)).clamp(max=1.0)

    def scale(self, factor: float | Tensor) -> None:
        """Multiplies the originals in place."""
        _scale_plainly(self.originals, factor)


class _SpanBatch(Batch):
    """Tensors that kernels read where they are."""

    is_plain = False

    @property
    def has_float64(self) -> bool:
        if self.originals is self.tensors:
            return bool(self.spans.has_float64)
        return super().has_float64

    def norms(self, norm_type: float, per_tensor: bool) -> Tensor:
        n = len(self.tensors) if per_tensor else 1
        partials = torch.empty(self.spans.n_chunks, dtype=torch.float64, device=self.device)
        results = torch.empty(n, dtype=torch.float64, device=self.device)
        self._norms(KINDS[norm_type], per_tensor, partials, results)
        return results

    def scale(self, factor: float | Tensor) -> None:
        pairs = list(zip(self.originals, self.tensors, strict=True))
        in_place = [tensor for original, tensor in pairs if original is tensor]
        # First what torch may refuse, such as memory in which elements overlap.
        _scale_plainly([o for o, t in pairs if o is not t], factor)
        is_whole = len(in_place) == len(pairs)
        spans = self.spans if is_whole else _spans(in_place, True)
        spans.bump_versions()
        if isinstance(factor, float) and factor == 1.0:
            return
        # torch scales a gradient that is given twice twice; side by side the kernels would race.
        parts = [_spans([t], True) for t in in_place] if spans.share_memory() else [spans]
        for part in parts:
            self._scale(part, factor)

    def _norms(self, kind: int, per_tensor: bool, partials: Tensor, results: Tensor) -> None:
        raise NotImplementedError

    def _scale(self, spans: Any, factor: float | Tensor) -> None:
        raise NotImplementedError


class _Cpu(_SpanBatch):
    def _norms(self, kind: int, per_tensor: bool, partials: Tensor, results: Tensor) -> None:
        self.spans.norms(kind, per_tensor, partials, results, None)

    def _scale(self, spans: Any, factor: float | Tensor) -> None:
        spans.scale(factor, None, None)


class _Cuda(_SpanBatch):
    """Also the emulator's engine, for tensors of the CPU."""

    def _norms(self, kind: int, per_tensor: bool, partials: Tensor, results: Tensor) -> None:
        self.spans.norms(kind, per_tensor, partials, results, _queue("cuda", self.device))

    def factor(
        self, norm: Tensor, max_norm: float, inv_scale: float, grad_scale: Tensor | None
    ) -> Tensor:
        norm, grad_scale, factor = _factor_tensors(self.device, norm, grad_scale)
        queue = _queue("cuda", self.device)
        _native().clip(norm, max_norm, inv_scale, grad_scale, factor, queue)
        return factor

    def _scale(self, spans: Any, factor: float | Tensor) -> None:
        spans.scale(1.0, factor, _queue("cuda", self.device))


class _Triton(_SpanBatch):
    """Also the interpreter's engine, for tensors of the CPU."""

    def _norms(self, kind: int, per_tensor: bool, partials: Tensor, results: Tensor) -> None:
        kernels = _triton()
        for dtype, addresses, numels, first, weights, etas in self.spans.packed():
            of_dtype = (addresses, numels, dtype, first, partials, weights, etas)
            kernels.partials(kind, self.device, *of_dtype)
        kernels.norms(kind, partials, self.spans.ends(per_tensor), results)

    def factor(
        self, norm: Tensor, max_norm: float, inv_scale: float, grad_scale: Tensor | None
    ) -> Tensor:
        norm, grad_scale, factor = _factor_tensors(self.device, norm, grad_scale)
        _triton().clip(norm, max_norm, inv_scale, grad_scale, factor)
        return factor

    def _scale(self, spans: Any, factor: float | Tensor) -> None:
        for dtype, addresses, numels, *_ in spans.packed():
            _triton().scale(self.device, addresses, numels, dtype, 1.0, factor)


_ENGINES: dict[str, type[_SpanBatch]] = {"cpu": _Cpu, "cuda": _Cuda, "triton": _Triton}


def batches(
    tensors: list[Tensor],
    norm_type: float,
    choice: str,
    weights: Sequence[Weight | None] | None = None,
) -> list[Batch]:
    """Sorts tensors by device, each with the engine that takes them.

    Args:
        choice: a backend's name or "auto"; a plain batch is made where "auto" finds no engine.
        weights: with norm_type 2, what each tensor is multiplied by for the norm, or None.

    Raises: BackendError when the backend that was asked for by name cannot take the tensors.
    """
    if not tensors:
        return []
    if choice not in ("auto", "reference") and norm_type not in KINDS:
        raise backends.BackendError(
            f"backend={choice!r} has no kernel for norm_type={norm_type}; "
            "use 1, 2 or inf, or backend='auto'"
        )
    everything = range(len(tensors))
    if choice != "reference" and norm_type in KINDS and backends.native() is not None:
        spans = _spans(tensors, KINDS[norm_type] == 0, weights)
        if not spans.unfit:
            return [_engine(choice, tensors[0])(tensors, everything, tensors, spans)]
    by_device: dict[torch.device, list[int]] = {}
    for i in everything:
        by_device.setdefault(tensors[i].device, []).append(i)
    if weights is not None:
        pairs = zip(tensors, weights, strict=True)
        tensors = [t if w is None else weighted(t, w) for t, w in pairs]
    return [_sorted_out(tensors, of_one, norm_type, choice) for of_one in by_device.values()]


def weighted(grad: Tensor, weight: Weight) -> Tensor:
    """The gradient times the size of its weight, in the type that kernels compute it in."""
    param, eta = weight
    grad = grad if grad.layout == torch.strided else grad.to_dense()
    if param.is_complex():
        param, grad = (torch.view_as_real(t.resolve_conj()) for t in (param, grad))
    if param.dtype in HALF_DTYPES:
        param, grad = param.float(), grad.float()
    return param.abs().add_(eta).mul_(grad)


def total(parts: Sequence[Batch], norm_type: float) -> Tensor:
    """Returns the norm over all batches, 0-dim float64 on the device of the first."""
    norms = [part.norms(norm_type, False) for part in parts]
    if len(norms) == 1:
        return norms[0].reshape(())
    return _norm_of_norms(torch.cat([n.to(norms[0].device) for n in norms]), norm_type)


def clip(parts: Sequence[Batch], norm: Tensor, max_norm: float) -> Tensor:
    """Scales the tensors; returns the norm, float64 when any of them is, else float32."""
    for part in parts:
        part.scale(part.factor(norm, max_norm, 1.0, None))
    return norm if any(part.has_float64 for part in parts) else norm.to(torch.float32)


def row_sums(a: Tensor, b: Tensor, choice: str) -> Tensor:
    """Returns float64 [rows, 3]: a.b, a.a and b.b; see `pyoptim.norms.row_sums`."""
    a, b = _real(a), _real(b)
    engine = _engine(choice, a)
    native = backends.native()
    if engine.is_plain or native is None:
        return _plain_row_sums(a, b)
    if native.row_layout(a, b) is None:
        a, b = (t.clone(memory_format=torch.contiguous_format) for t in (a, b))
    layout = native.row_layout(a, b)
    if layout is None:
        _refuse(choice, a)
        return _plain_row_sums(a, b)
    sums = torch.empty(layout[0], 3, dtype=torch.float64, device=a.device)
    if engine is _Triton:
        _triton().row_sums(a, b, *layout, sums)
    else:
        native.row_sums(a, b, sums, _queue("cuda", a.device) if engine is _Cuda else None)
    return sums


def _sorted_out(tensors: list[Tensor], indexes: list[int], norm_type: float, choice: str) -> Batch:
    """A batch of tensors of one device, copied where an engine cannot read them in place."""
    originals = [tensors[i] for i in indexes]
    engine = _engine(choice, originals[0]) if norm_type in KINDS else Batch
    if not engine.is_plain:
        takes_complex = KINDS[norm_type] == 0
        dense = list(originals)
        for i in _spans(originals, takes_complex).unfit:
            dense[i] = _dense(originals[i], takes_complex)
        spans = _spans(dense, takes_complex)
        if not spans.unfit:
            return engine(dense, indexes, originals, spans)
        _refuse(choice, originals[spans.unfit[0]])
    return Batch(originals, indexes, originals)


def _dense(tensor: Tensor, takes_complex: bool) -> Tensor:
    """A contiguous copy with the same norms, if there can be one."""
    if tensor.layout != torch.strided:
        return tensor
    if tensor.is_complex() and not takes_complex:
        return torch.hypot(tensor.real.double(), tensor.imag.double())
    return tensor.clone(memory_format=torch.contiguous_format)


def _engine(choice: str, tensor: Tensor) -> type[Batch]:
    name = backends.select(choice, tensor)
    return Batch if backends.native() is None else _ENGINES.get(name, Batch)


def _refuse(choice: str, tensor: Tensor) -> None:
    if choice != "auto":
        raise backends.BackendError(
            f"backend={choice!r} cannot read a {type(tensor).__name__} of layout {tensor.layout} "
            f"and dtype {tensor.dtype}; use backend='auto' or 'reference'"
        )


def _native() -> Any:
    return backends.native()


def _spans(
    tensors: list[Tensor], may_be_complex: bool, weights: Sequence[Weight | None] | None = None
) -> Any:
    if weights is None:
        return _native().Spans(tensors, may_be_complex)
    params = [None if w is None else w[0] for w in weights]
    etas = [0.0 if w is None else w[1] for w in weights]
    return _native().Spans(tensors, may_be_complex, params, etas)


def _triton() -> Any:
    return importlib.import_module("pyoptim.kernels.reduce")


def _queue(engine: str, device: torch.device) -> tuple[int, int]:
    """Where the CUDA engine's work goes: torch's current stream. The emulator has none."""
    if device.type != "cuda":
        return 0, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _factor_tensors(
    device: torch.device, norm: Tensor, grad_scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Norm, loss scale and room for the clip factor on the device that computes it."""
    if grad_scale is not None:
        grad_scale = grad_scale.to(device, torch.float32)
    return norm.to(device), grad_scale, torch.empty(1, dtype=torch.float64, device=device)


# -- plain PyTorch ---------------------------------------------------------------------------------


def _plain_norm(tensor: Tensor, norm_type: float) -> Tensor:
    values = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor
    wide = torch.complex128 if values.is_complex() else torch.float64
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=values.device)
    norm: Any = torch.linalg.vector_norm(values, norm_type, dtype=wide)
    # A DTensor's norm is spread over its mesh.
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def _norm_of_norms(norms: Tensor, norm_type: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return norm


def _scale_plainly(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    by = factor if isinstance(factor, float) else factor.reshape(())
    for tensor in tensors:
        tensor.mul_(by)


def _real(tensor: Tensor) -> Tensor:
    """The values as they are in memory, complex numbers as pairs."""
    tensor = tensor.resolve_conj().resolve_neg()
    tensor = tensor if tensor.dim() else tensor.reshape(1)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _plain_row_sums(a: Tensor, b: Tensor) -> Tensor:
    x, y = (t.double().flatten(1) if t.dim() > 1 else t.double()[:, None] for t in (a, b))
    return torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)], dim=1)
