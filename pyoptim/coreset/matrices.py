"""Feature matrices as the coreset functions take them: tensors, arrays, and chunks of either."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from pyoptim import backend as backends

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]
    Rows: TypeAlias = Tensor | Array | Iterable[Tensor | Array]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What a copied chunk may take by default.
CHUNK_BYTES = 2 << 20


def is_whole(data: Rows) -> bool:
    """Whether `data` is one tensor or array, not chunks of rows."""
    return isinstance(data, Tensor) or hasattr(data, "__array_interface__")


def as_tensor(data: Tensor | Array, name: str) -> Tensor:
    """Returns the values of a tensor or array without copying them.

    Raises: TypeError for anything else, and for other dtypes than those of `FLOATS`.
    """
    if not isinstance(data, Tensor):
        data = _from_array(data, name)
    if data.dtype not in FLOATS or data.layout != torch.strided:
        raise TypeError(
            f"{name} has dtype {data.dtype} and layout {data.layout}; give dense float32, float64, "
            f"bfloat16 or float16 values, for example {name}.float()"
        )
    return data.detach().resolve_neg()


def _from_array(data: Any, name: str) -> Tensor:
    if not hasattr(data, "__array_interface__"):
        raise TypeError(f"{name} is a {type(data).__name__}; give tensors or numpy arrays")
    if not data.dtype.isnative:
        raise TypeError(
            f"{name} has dtype {data.dtype}, whose byte order is not this machine's; "
            f"convert it: {name}.astype({name}.dtype.newbyteorder('='))"
        )
    with warnings.catch_warnings():
        # "The given NumPy array is not writable": it is only read, as a read-only memmap is.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.from_numpy(data)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} cannot be read as a tensor: {error}") from None


def check_matrix(tensor: Tensor, name: str) -> Tensor:
    """Returns `tensor` when it has two dimensions.

    Raises: ValueError when it has not.
    """
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give a matrix [rows, features]")
    return tensor


def chunks(data: Rows, name: str, chunk: int | None) -> Iterator[tuple[int, Tensor]]:
    """Yields (number of the first row, matrix the kernels can read) over `data`.

    What the kernels can read in place is one chunk; the rest is copied `chunk` rows at a time.
    """
    first = 0
    parts: Any = [data] if is_whole(data) else data
    for part in parts:
        tensor = check_matrix(as_tensor(part, name), name)
        for start, rows in _readable(tensor, chunk):
            yield first + start, rows
        first += len(tensor)


def _readable(tensor: Tensor, chunk: int | None) -> Iterator[tuple[int, Tensor]]:
    if chunk is None and _is_readable(tensor):
        yield 0, tensor
        return
    row_bytes = max(1, tensor.shape[1] * tensor.element_size())
    step = chunk or max(1, CHUNK_BYTES // row_bytes)
    for part in spans(len(tensor), step):
        yield part.start, row_major(tensor[part])


def spans(n: int, step: int) -> Iterator[slice]:
    """Yields the slices of at most `step` of n rows; one empty slice where there are none."""
    for start in range(0, max(n, 1), max(step, 1)):
        yield slice(start, min(start + max(step, 1), n))


def _is_readable(tensor: Tensor) -> bool:
    native = backends.native()
    if native is None or not tensor.is_cpu:
        return True
    return bool(native.coreset_has_row_layout(tensor))


def row_major(tensor: Tensor) -> Tensor:
    """Returns `tensor`, or a copy of it that the kernels can read."""
    return tensor if _is_readable(tensor) else tensor.contiguous()


def kernels_for(tensor: Tensor, backend: str | None) -> ModuleType | None:
    """Returns the module whose CPU kernels read `tensor`, or None where the reference runs.

    Raises:
        ValueError: `backend` is not a backend.
        BackendError: `backend` names an engine that has no kernel for this tensor.
    """
    choice = backends.chosen() if backend is None else backends.check_choice(backend)
    if choice == "reference":
        return None
    if tensor.is_cpu and choice not in backends.GPU_ENGINES:
        return backends.native()
    if backend in backends.ENGINES:
        raise backends.BackendError(
            f"backend={backend!r} has no coreset kernels for tensors on {tensor.device}; "
            "use backend='auto' or 'reference'"
        )
    return backends.native() if tensor.is_cpu else None


def check_no_nan(rows: Tensor, name: str, first: int = 0) -> None:
    """Raises ValueError with the number of the first row that holds a NaN."""
    bad = rows.isnan().any(dim=1)
    if bad.any():
        raise nan_error(name, first + int(bad.int().argmax()))


def nan_error(name: str, row: int) -> ValueError:
    return ValueError(
        f"{name}[{row}] holds a NaN, which is near to nothing; remove such rows, "
        f"for example {name}[~{name}.isnan().any(dim=1)]"
    )
