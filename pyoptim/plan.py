"""Parameter groups -> rows: what a step updates together, checked in full before anything is changed.

The fast path of a step is `pyoptim._C.Plan`, which re-reads and re-checks the tensors it was made for. This module is
the general path: it makes those plans, and it runs every step that no plan can (first steps, gradients laid out unlike
their parameter, sparse gradients, DTensors, shared memory, the reference).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyoptim import backend

if TYPE_CHECKING:
    from pyoptim.optimizer import FusedOptimizer

HALF_DTYPES = (torch.bfloat16, torch.float16)
# float32 holds every integer below 2^24; a counter that reaches it goes on in float64.
FLOAT32_STEPS = 2**24


@dataclass
class Row:
    """One parameter with a gradient, and where its step happens."""

    key: Tensor  # as in param_groups and optimizer.state
    param: Tensor  # key, or its local shard
    grad: Tensor
    group: int
    backend: str  # "cpu", "reference" or "sparse"
    states: list[Tensor] = field(default_factory=list)
    step: Tensor | None = None
    first: bool = False  # its momentum buffer is new


def general_step(optimizer: FusedOptimizer, inv_scale: float) -> None:
    """Updates every parameter that has a gradient, or raises and changes nothing.

    Args:
        optimizer: supplies groups, state, rule and reference.
        inv_scale: factor by which gradients are multiplied, and written back, first (1/loss scale); 1.0 leaves them.
    """
    rows = [_checked_row(optimizer, g, i, p) for g, i, p in _params_with_grad(optimizer)]
    created = _Created(optimizer)
    try:
        for row in rows:
            created.fill(row)
        with torch.no_grad():
            torch.autograd.graph.increment_version([row.key for row in rows])
    except BaseException:
        created.undo()
        raise
    # Rows that share memory see each other's result, in order, as in torch's for-loop.
    batches = [[row] for row in rows] if _share_memory(rows) else [rows]
    for batch in batches:
        _run(optimizer, batch, inv_scale)
    optimizer._plan = _make_plan(optimizer, rows) if len(batches) == 1 else None


def _params_with_grad(optimizer: FusedOptimizer) -> Iterator[tuple[int, int, Tensor]]:
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            if param.grad is not None:
                yield g, i, param


def _checked_row(optimizer: FusedOptimizer, g: int, index: int, key: Tensor) -> Row:
    group = optimizer.param_groups[g]
    place = f"parameter {index} of group {g}"
    param, grad = _local(key), _local_grad(key)
    if grad.layout != torch.strided:
        optimizer._check_sparse(group, grad)
        return Row(key, param, grad, g, "sparse")
    _check_pair(place, param, grad)
    if group.get("capturable") and param.device.type in ("cpu", "meta"):
        raise AssertionError(
            f"capturable=True needs parameters on an accelerator, but {place} is on {param.device}; "
            "use capturable=False"
        )
    choice = optimizer.backend or backend.chosen()
    name = "reference" if group.get("differentiable") else backend.select(choice, param)
    row = Row(key, param, grad.resolve_conj().resolve_neg(), g, name)
    if name == "cpu" and not _has_kernel(row):
        if choice == "cpu":
            raise backend.BackendError(
                f"backend='cpu' has no kernel for {place} (dtype {param.dtype}, {type(param).__name__}); "
                "use float64, float32, bfloat16 or float16, or backend='reference'"
            )
        row.backend = "reference"
    return row


def _check_pair(place: str, param: Tensor, grad: Tensor) -> None:
    if not (param.is_floating_point() or param.is_complex()):
        raise RuntimeError(f"{place} has dtype {param.dtype}; only floating-point and complex parameters can be updated")
    for name, of_param, of_grad in (
        ("shape", tuple(param.shape), tuple(grad.shape)),
        ("dtype", param.dtype, grad.dtype),
        ("device", param.device, grad.device),
    ):
        if of_param != of_grad:
            raise RuntimeError(
                f"{place} has {name} {of_param} but its gradient has {name} {of_grad}; "
                f"give the gradient the {name} of its parameter"
            )
    if param.device.type == "meta":
        return
    _check_memory(f"{place}", param)
    _check_memory(f"the gradient of {place}", grad)
    if _overlaps_itself(param):
        raise RuntimeError(
            f"unsupported operation: more than one element of {place} (shape {tuple(param.shape)}, strides "
            f"{param.stride()}) refers to a single memory location. Please clone() the tensor first"
        )


def _check_memory(place: str, tensor: Tensor) -> None:
    """Raises if the storage was freed or shrunk under the tensor."""
    if tensor.numel() == 0 or tensor.is_quantized:
        return
    try:
        held = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return  # a wrapper without memory of its own: the reference runs it through its operators
    last = tensor.storage_offset() + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if (last + 1) * tensor.element_size() > held:
        raise RuntimeError(
            f"the storage of {place} holds {held} bytes, fewer than its shape {tuple(tensor.shape)} needs; "
            "restore the storage before step()"
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    dims = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    if tensor.numel() == 0:
        return False
    reach = 0  # largest offset that the dimensions so far can address
    for stride, size in dims:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    offsets = torch.zeros(1, dtype=torch.int64)
    for stride, size in dims:
        offsets = (offsets[:, None] + stride * torch.arange(size)).flatten()
    return bool(offsets.unique().numel() != offsets.numel())


def _has_kernel(row: Row) -> bool:
    dtype = torch.empty(0, dtype=row.param.dtype).real.dtype if row.param.is_complex() else row.param.dtype
    if dtype not in (torch.float64, torch.float32, *HALF_DTYPES):
        return False
    native = backend.native()
    return native is not None and native.has_memory(row.param) and native.has_memory(row.grad)


def _is_dtensor(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor" or hasattr(tensor, "_local_tensor")


def _local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that this process holds, or the tensor itself."""
    local: Tensor = tensor._local_tensor if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return local


def _local_grad(key: Tensor) -> Tensor:
    grad = key.grad
    assert grad is not None
    if _is_dtensor(key) and _is_dtensor(grad) and grad.placements != key.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=key.placements)  # type: ignore[attr-defined]
    return _local(grad)


class _Created:
    """State made for rows that have none, to be taken back if the step cannot happen."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._undo: list[Callable[[], object]] = []

    def fill(self, row: Row) -> None:
        """Gives the row its state tensors and step counter, new ones where the optimizer has none."""
        if row.backend == "sparse":
            return  # torch's own sparse code keeps its own state
        optimizer = self._optimizer
        names = optimizer.state_names(optimizer.param_groups[row.group])
        if not names and not optimizer.counts_steps:
            return
        if row.key not in optimizer.state:
            self._undo.append(lambda: optimizer.state.pop(row.key, None))
        entry = optimizer.state[row.key]
        if optimizer.counts_steps:
            self._fill_step(row, entry)
        for name in names:
            if not isinstance(entry.get(name), Tensor):
                row.first = row.first or name == "momentum_buffer"
                self._put(entry, name, optimizer._new_state(name, row.key))
            elif entry[name].layout != torch.strided:  # left by a sparse step
                self._put(entry, name, entry[name].to_dense())
            self._check_state(row, name, entry[name])
            row.states.append(_local(entry[name]))

    def _fill_step(self, row: Row, entry: dict[str, Any]) -> None:
        step = entry.get("step", 0.0)
        value = float(step)
        is_counter = isinstance(step, Tensor) and step.is_cpu and step.dim() == 0
        is_exact = isinstance(step, Tensor) and (
            step.dtype == torch.float64 or (step.dtype == torch.float32 and value + 1 < FLOAT32_STEPS)
        )
        if not (is_counter and is_exact) and not self._is_recorded(row, step):
            self._put(entry, "step", new_counter(value))
        row.step = entry["step"]

    def _is_recorded(self, row: Row, step: object) -> bool:
        """A differentiable step records its counter, which must then stay the user's tensor."""
        return isinstance(step, Tensor) and bool(self._optimizer.param_groups[row.group].get("differentiable"))

    def _put(self, entry: dict[str, Any], name: str, value: Tensor) -> None:
        if name in entry:
            former = entry[name]
            self._undo.append(lambda: entry.__setitem__(name, former))
        else:
            self._undo.append(lambda: entry.pop(name, None))
        entry[name] = value

    @staticmethod
    def _check_state(row: Row, name: str, state: Tensor) -> None:
        if state.shape != row.key.shape or state.device != row.key.device:
            raise RuntimeError(
                f"state {name!r} has shape {tuple(state.shape)} on {state.device}, its parameter has shape "
                f"{tuple(row.key.shape)} on {row.key.device}; load a matching state_dict"
            )
        if state.is_complex() != row.key.is_complex():
            raise RuntimeError(f"state {name!r} is {state.dtype}, its parameter is {row.key.dtype}")
        if state.device.type != "meta":
            _check_memory(f"state {name!r}", _local(state))

    def undo(self) -> None:
        for take_back in reversed(self._undo):
            take_back()


def new_counter(value: float) -> Tensor:
    """Returns a step counter as torch keeps it, float32 on the CPU, or float64 where float32 would stand still."""
    is_double = value + 1 >= FLOAT32_STEPS or torch.get_default_dtype() == torch.float64
    return torch.tensor(value, dtype=torch.float64 if is_double else torch.float32)


def _share_memory(rows: list[Row]) -> bool:
    """Whether a tensor that one row writes overlaps one that another row writes."""
    spans = sorted(
        span for n, row in enumerate(rows) for tensor in (row.param, *row.states) for span in _span(n, tensor)
    )
    end, owner = 0, -1
    for start, stop, row_number in spans:
        if start < end and owner != row_number:
            return True
        if stop > end:
            end, owner = stop, row_number
    return False


def _span(row_number: int, tensor: Tensor) -> Iterator[tuple[int, int, int]]:
    if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.device.type == "meta":
        return
    try:
        start = tensor.data_ptr()
    except RuntimeError:
        return  # a wrapper without memory of its own
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    yield start, start + (reach + 1) * tensor.element_size(), row_number


def _run(optimizer: FusedOptimizer, rows: list[Row], inv_scale: float) -> None:
    fused = [row for row in rows if row.backend == "cpu" and _state_has_kernel(row)]
    if fused:
        _run_fused(optimizer, fused, inv_scale)
    done = {id(row) for row in fused}
    for row in rows:
        if id(row) not in done:
            optimizer._plain_step(row, inv_scale)


def _state_has_kernel(row: Row) -> bool:
    dtypes = {torch.float32} if row.param.dtype in HALF_DTYPES else set()
    return len({state.dtype for state in row.states}) <= 1 and all(
        state.dtype in dtypes | {row.param.dtype} for state in row.states
    )


def _run_fused(optimizer: FusedOptimizer, rows: list[Row], inv_scale: float) -> None:
    native = backend.native()
    assert native is not None
    staged = [_Staged(row, with_grad=inv_scale != 1.0) for row in rows]
    hypers = [native.read_hypers(optimizer.rule, group) for group in optimizer.param_groups]
    with torch.no_grad():
        fields = [s.fields() for s in staged]
        native.run_rows(optimizer.rule, fields, hypers, inv_scale)
        for s in staged:
            s.write_back()


class _Staged:
    """A row whose tensors share one dense layout: themselves where they do, copies where they do not."""

    def __init__(self, row: Row, with_grad: bool) -> None:
        self._row = row
        self._with_grad = with_grad
        self._copies: list[tuple[Tensor, Tensor]] = []

    def fields(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None, int, bool]:
        native, row = backend.native(), self._row
        assert native is not None
        dense, aligned = native.layout_facts(row.param)
        param = row.param if dense and aligned else self._copy(row.param, row.param.clone(), written=True)
        grad = self._like(row.grad, param, written=self._with_grad)
        states = tuple(self._like(state, param, written=True) for state in row.states)
        return param, grad, states, row.step, row.group, row.first

    def _like(self, tensor: Tensor, param: Tensor, written: bool) -> Tensor:
        native = backend.native()
        assert native is not None
        if native.same_layout(tensor, param) and native.layout_facts(tensor)[1] and not self._is_shared(tensor):
            return tensor
        return self._copy(tensor, torch.empty_like(param, dtype=tensor.dtype).copy_(tensor), written)

    def _is_shared(self, tensor: Tensor) -> bool:
        """A gradient over the parameter's own memory is read before the parameter is written."""
        return tensor is self._row.grad and any(
            _share_memory([_alone(tensor), _alone(other)]) for other in (self._row.param, *self._row.states)
        )

    def _copy(self, original: Tensor, copy: Tensor, written: bool) -> Tensor:
        if written:
            self._copies.append((original, copy))
        return copy

    def write_back(self) -> None:
        for original, copy in self._copies:
            original.copy_(copy)


def _alone(tensor: Tensor) -> Row:
    return Row(tensor, tensor, tensor, 0, "cpu")


def _make_plan(optimizer: FusedOptimizer, rows: list[Row]) -> Any:
    """Returns a `_C.Plan` for the next steps, or None when this step's rows are not all of the plain kind."""
    native = backend.native()
    if native is None or any(row.backend != "cpu" or row.param is not row.key for row in rows):
        return None
    by_key = {id(row.key): row for row in rows}
    fields = [
        _plan_fields(optimizer, g, param, by_key.get(id(param)))
        for g, group in enumerate(optimizer.param_groups)
        for param in group["params"]
    ]
    guards = ["capturable", "differentiable"]
    return native.Plan(optimizer.rule, optimizer.param_groups, optimizer.state, fields, guards)


def _plan_fields(optimizer: FusedOptimizer, g: int, param: Tensor, row: Row | None) -> tuple[Any, ...]:
    if row is None:
        return g, param, None, (), False, False
    return g, param, optimizer.state.get(param), tuple(row.states), False, True
