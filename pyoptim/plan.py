"""Parameter groups -> rows: what a step updates together, checked before anything is changed.

The fast path of a step is `pyoptim._C.Plan`, which re-reads and re-checks the tensors it was made
for. This module is the general path: it makes those plans, and it runs every step that no plan can
(first steps, gradients laid out unlike their parameter, sparse gradients, DTensors, shared memory,
the reference).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyoptim import backend

if TYPE_CHECKING:
    from pyoptim.optimizer import FusedOptimizer

HALF_DTYPES = (torch.bfloat16, torch.float16)
PARAM_DTYPES = (
    *(torch.float64, torch.float32, *HALF_DTYPES),
    *(torch.complex128, torch.complex64, torch.complex32),
)
# float32 holds every integer below 2^24; a counter that reaches it goes on in float64.
FLOAT32_STEPS = 2**24
_IMPORTED_IN = os.getpid()


@dataclass
class Row:
    """One parameter with a gradient, and where its step happens."""

    key: Tensor  # as in param_groups and optimizer.state
    param: Tensor  # key, or its local shard
    grad: Tensor
    group: int
    backend: str  # "cpu", "reference" or "sparse"
    place: str  # what error messages call it
    states: list[Tensor] = field(default_factory=list)
    step: Tensor | None = None
    first: bool = False  # its momentum buffer is new


def general_step(optimizer: FusedOptimizer, inv_scale: float) -> None:
    """Updates every parameter that has a gradient, or raises and changes nothing.

    Args:
        optimizer: supplies groups, state, rule and reference.
        inv_scale: 1/loss scale; gradients are multiplied by it and written back first, unless 1.0.
    """
    mine = object()
    if optimizer.__dict__.setdefault("_stepping", mine) is not mine:
        raise RuntimeError("step() of this optimizer is already running in another thread")
    optimizer._plan = None
    try:
        with _threads_that_exist():
            optimizer._plan = _step_rows(optimizer, inv_scale)
    finally:
        del optimizer.__dict__["_stepping"]


@contextmanager
def _threads_that_exist() -> Iterator[None]:
    """In a forked child torch's operators would wait for ever for threads of the parent."""
    if os.getpid() == _IMPORTED_IN:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _step_rows(optimizer: FusedOptimizer, inv_scale: float) -> Any:
    """Makes the step; returns a plan for steps like this one, or None."""
    hypers = _read_hypers(optimizer)
    rows = _ready_rows(optimizer, inv_scale)
    # Rows that share memory see each other's result, in order, as in torch's for-loop.
    if _share_memory(rows, inv_scale):
        for row in rows:
            _run(optimizer, [row], hypers, inv_scale)
        return None
    return _make_plan(optimizer, rows) if _run(optimizer, rows, hypers, inv_scale) else None


def _read_hypers(optimizer: FusedOptimizer) -> list[list[float]]:
    """The rule's hyper-parameters by group; none where autograd needs them as they are."""
    native = backend.native()
    return [
        native.read_hypers(optimizer.rule, group)
        if native is not None and not group.get("differentiable")
        else []
        for group in optimizer.param_groups
    ]


def _ready_rows(optimizer: FusedOptimizer, inv_scale: float) -> list[Row]:
    """Rows with state, checked; all that can refuse the step happens here, and is undone."""
    rows = [_checked_row(optimizer, g, i, p) for g, i, p in _params_with_grad(optimizer)]
    created = _Created(optimizer)
    try:
        # State made under inference_mode would be of no use to a step outside it.
        with torch.inference_mode(False), torch.no_grad():
            for row in rows:
                created.fill(row)
        _bump_versions(rows, with_grads=inv_scale != 1.0)
    except BaseException:
        created.undo()
        raise
    return rows


def _bump_versions(rows: list[Row], with_grads: bool) -> None:
    """Lets autograd notice what the kernels write behind its back."""
    written = [row.key for row in rows]
    written += [row.param for row in rows if row.param is not row.key]
    if with_grads:
        written += [row.grad for row in rows]
    # Inference tensors have no version, and autograd never saves them.
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


def _params_with_grad(optimizer: FusedOptimizer) -> Iterator[tuple[int, int, Tensor]]:
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            if param.grad is not None:
                yield g, i, param


def _checked_row(optimizer: FusedOptimizer, g: int, index: int, key: Tensor) -> Row:
    group = optimizer.param_groups[g]
    names = group.get("param_names")
    place = f"parameter {index} of group {g}" + (f" ({names[index]})" if names else "")
    row = Row(key, _local(key), _local_grad(key), g, "sparse", place)
    _check_pair(row)
    if row.grad.layout != torch.strided:
        optimizer._check_sparse(row, group)
        return row
    _check_mode(row, group)
    choice = optimizer.backend or backend.chosen()
    row.backend = "reference" if group.get("differentiable") else backend.select(choice, row.param)
    if row.backend == "cpu" and not _has_memory(row):
        if choice == "cpu":
            raise backend.BackendError(
                f"backend='cpu' cannot read the memory of {place} ({type(row.param).__name__}); "
                "use backend='auto' or 'reference'"
            )
        row.backend = "reference"
    return row


def _check_mode(row: Row, group: Mapping[str, Any]) -> None:
    """Raises where torch does for the parameter's device or the mode autograd is in."""
    device = row.param.device
    if group.get("capturable") and device.type in ("cpu", "meta"):
        raise AssertionError(
            f"capturable=True needs parameters on an accelerator, but {row.place} is on {device}; "
            "use capturable=False"
        )
    if row.param.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed: "
            f"{row.place}; step under torch.inference_mode() or clone() the tensor first"
        )
    if group.get("differentiable") and row.key.is_leaf and row.key.requires_grad:
        raise RuntimeError(
            f"a leaf Variable that requires grad is being used in an in-place operation: "
            f"{row.place}; with differentiable=True give the optimizer clones of the parameters"
        )


def _check_pair(row: Row) -> None:
    place, param, grad = row.place, row.param, row.grad
    if param.dtype not in PARAM_DTYPES:
        raise RuntimeError(
            f"{place} has dtype {param.dtype}; only float64, float32, bfloat16, float16 and "
            "complex parameters can be updated"
        )
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
    _check_writable(place, param)
    _check_memory(f"the gradient of {place}", grad)


def _check_writable(place: str, tensor: Tensor) -> None:
    _check_memory(place, tensor)
    if not tensor.is_meta and _overlaps_itself(tensor):
        raise RuntimeError(
            f"unsupported operation: more than one element of {place} "
            f"(shape {tuple(tensor.shape)}, strides {tensor.stride()}) refers to a single memory "
            "location. Please clone() the tensor first"
        )


def _check_memory(place: str, tensor: Tensor) -> None:
    """Raises if the storage was freed or shrunk under the tensor."""
    if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.is_meta:
        return
    try:
        held = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return  # a wrapper without memory of its own: the reference runs it through its operators
    if (tensor.storage_offset() + _reach(tensor) + 1) * tensor.element_size() > held:
        raise RuntimeError(
            f"the storage of {place} holds {held} bytes, fewer than its shape "
            f"{tuple(tensor.shape)} needs; restore the storage before step()"
        )


def _reach(tensor: Tensor) -> int:
    """Offset of the last element from the first, in elements."""
    if tensor.is_contiguous():
        return tensor.numel() - 1
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or tensor.is_contiguous():
        return False
    dims = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
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
    return len(set(offsets.tolist())) != offsets.numel()


def _has_memory(row: Row) -> bool:
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
    local = _local(grad)
    # A redistributed gradient may still be under way.
    return local.wait() if hasattr(local, "wait") else local


class _Created:
    """State made for rows that have none, to be taken back if the step cannot happen."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._undo: list[Callable[[], object]] = []
        self._new_buffers: set[int] = set()  # of which state entries, by id

    def fill(self, row: Row) -> None:
        """Gives the row its state and step counter, new ones where the optimizer has none."""
        optimizer = self._optimizer
        names = optimizer.state_names(optimizer.param_groups[row.group])
        if row.backend == "sparse" and "momentum_buffer" in names:
            return  # torch's own code makes the buffer, sparse as the gradient
        if not names and not optimizer.counts_steps:
            return
        if row.key not in optimizer.state:
            self._undo.append(lambda: optimizer.state.pop(row.key, None))
        entry = optimizer.state[row.key]
        if optimizer.counts_steps:
            self._fill_step(row, entry)
        for name in names:
            self._fill_state(row, entry, name)
        # A parameter listed twice finds the buffer that its first row was just given.
        row.first = id(entry) in self._new_buffers

    def _fill_state(self, row: Row, entry: dict[str, Any], name: str) -> None:
        if not isinstance(entry.get(name), Tensor):
            if name == "momentum_buffer":
                self._new_buffers.add(id(entry))
            self._put(entry, name, self._optimizer._new_state(name, row.key))
        elif entry[name].layout != torch.strided:  # left by a sparse step
            self._put(entry, name, entry[name].to_dense())
        self._check_state(row, name, entry[name])
        row.states.append(_local(entry[name]))

    def _fill_step(self, row: Row, entry: dict[str, Any]) -> None:
        step = entry.get("step", 0.0)
        if isinstance(step, Tensor) and step.requires_grad:
            raise RuntimeError(
                "`requires_grad` is not supported for `step` in differentiable mode: " + row.place
            )
        value = float(step)
        is_counter = isinstance(step, Tensor) and step.is_cpu and step.dim() == 0
        is_exact = isinstance(step, Tensor) and (
            step.dtype == torch.float64
            or (step.dtype == torch.float32 and value + 1 < FLOAT32_STEPS)
        )
        if not (is_counter and is_exact) and not self._is_recorded(row, step):
            self._put(entry, "step", new_counter(value))
        row.step = entry["step"]

    def _is_recorded(self, row: Row, step: object) -> bool:
        """A differentiable step records its counter, which must then stay the user's tensor."""
        group = self._optimizer.param_groups[row.group]
        return isinstance(step, Tensor) and bool(group.get("differentiable"))

    def _put(self, entry: dict[str, Any], name: str, value: Tensor) -> None:
        if name in entry:
            former = entry[name]
            self._undo.append(lambda: entry.__setitem__(name, former))
        else:
            self._undo.append(lambda: entry.pop(name, None))
        entry[name] = value

    @staticmethod
    def _check_state(row: Row, name: str, state: Tensor) -> None:
        place = f"state {name!r} of {row.place}"
        if state.shape != row.key.shape or state.device != row.key.device:
            raise RuntimeError(
                f"{place} has shape {tuple(state.shape)} on {state.device}, its parameter has "
                f"shape {tuple(row.key.shape)} on {row.key.device}; load a matching state_dict"
            )
        of_param, of_state = row.param.dtype, _local(state).dtype
        if of_state not in PARAM_DTYPES or of_state.is_complex != of_param.is_complex:
            raise RuntimeError(f"{place} is {of_state}, its parameter is {of_param}")
        if _local(state).shape != row.param.shape:
            raise RuntimeError(f"{place} is sharded differently from its parameter")
        _check_writable(place, _local(state))

    def undo(self) -> None:
        for take_back in reversed(self._undo):
            take_back()


def new_counter(value: float) -> Tensor:
    """Returns a step counter as torch keeps it, in float64 where float32 would stand still."""
    is_double = value + 1 >= FLOAT32_STEPS or torch.get_default_dtype() == torch.float64
    return torch.tensor(value, dtype=torch.float64 if is_double else torch.float32)


def _share_memory(rows: list[Row], inv_scale: float = 1.0) -> bool:
    """Whether a tensor that one row writes overlaps one that another row reads or writes."""
    written_end, written_owner, read_end, read_owner = 0, -1, 0, -1
    for start, stop, owner, is_written in sorted(_spans(rows, inv_scale != 1.0)):
        if start < written_end and owner != written_owner:
            return True
        if is_written and start < read_end and owner != read_owner:
            return True
        if is_written and stop > written_end:
            written_end, written_owner = stop, owner
        elif not is_written:
            is_alone = start >= read_end or owner == read_owner
            read_end, read_owner = max(stop, read_end), owner if is_alone else -1
    return False


def _spans(rows: list[Row], writes_grads: bool) -> Iterator[tuple[int, int, int, bool]]:
    for n, row in enumerate(rows):
        for tensor in (row.param, *row.states):
            if span := _span(tensor):
                yield *span, n, True
        is_resting = row.grad is row.param
        if not is_resting and (span := _span(row.grad)):
            yield *span, n, writes_grads


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """First byte of the tensor's memory and the one after its last, if it has any."""
    if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.is_meta:
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:
        return None  # a wrapper without memory of its own
    return start, start + (_reach(tensor) + 1) * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, second = _span(a), _span(b)
    return bool(first and second and first[0] < second[1] and second[0] < first[1])


def _run(
    optimizer: FusedOptimizer, rows: list[Row], hypers: list[list[float]], inv_scale: float
) -> bool:
    """Updates the rows; says whether all of them went straight through the kernels."""
    fused = [row for row in rows if row.backend == "cpu" and _has_kernel(row)]
    staged = [_Staged(row, with_grad=inv_scale != 1.0) for row in fused]
    if staged:
        _run_fused(optimizer.rule, staged, hypers, inv_scale)
    done = {id(row) for row in fused}
    for row in rows:
        if id(row) not in done:
            optimizer._plain_step(row, inv_scale)
    return len(staged) == len(rows) and not any(s.is_copied for s in staged)


def _has_kernel(row: Row) -> bool:
    dtypes = {row.param.dtype, *((torch.float32,) if row.param.dtype in HALF_DTYPES else ())}
    of_states = {state.dtype for state in row.states}
    return len(of_states) <= 1 and of_states <= dtypes


def _run_fused(
    rule: str, staged: list[_Staged], hypers: list[list[float]], inv_scale: float
) -> None:
    native = backend.native()
    assert native is not None
    with torch.no_grad():
        fields = [s.fields() for s in staged]
        native.run_rows(rule, fields, hypers, inv_scale)
        for s in staged:
            s.write_back()


class _Staged:
    """A row whose tensors share one dense layout: copies where the originals do not."""

    def __init__(self, row: Row, with_grad: bool) -> None:
        self._row = row
        self._with_grad = with_grad
        self._written: list[tuple[Tensor, Tensor]] = []  # (original, its copy)
        self.is_copied = False

    def fields(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None, int, bool]:
        native, row, param = backend.native(), self._row, self._row.param
        assert native is not None
        if native.layout_facts(param) != (True, True) or _is_lazy(param):
            param = self._copy(param, torch.empty_like(param).copy_(param), written=True)
        grad = self._like(row.grad, param, written=self._with_grad)
        states = tuple(self._like(state, param, written=True) for state in row.states)
        return param, grad, states, row.step, row.group, row.first

    def _like(self, tensor: Tensor, param: Tensor, written: bool) -> Tensor:
        native = backend.native()
        assert native is not None
        is_plain = native.same_layout(tensor, param) and native.layout_facts(tensor)[1]
        if is_plain and not (_is_lazy(tensor) or self._is_shared(tensor)):
            return tensor
        return self._copy(
            tensor, torch.empty_like(param, dtype=tensor.dtype).copy_(tensor), written
        )

    def _is_shared(self, tensor: Tensor) -> bool:
        """A gradient over the parameter's own memory is read before the parameter is written."""
        row = self._row
        return tensor is row.grad and any(_overlap(tensor, t) for t in (row.param, *row.states))

    def _copy(self, original: Tensor, copy: Tensor, written: bool) -> Tensor:
        self.is_copied = True
        if written:
            self._written.append((original, copy))
        return copy

    def write_back(self) -> None:
        for original, copy in self._written:
            original.copy_(copy)


def _is_lazy(tensor: Tensor) -> bool:
    """The memory, which is all that the kernels see, is not the values."""
    return tensor.is_conj() or tensor.is_neg()


def _make_plan(optimizer: FusedOptimizer, rows: list[Row]) -> Any:
    """Returns a `_C.Plan` for steps like this one, or None if it cannot run them."""
    native = backend.native()
    if native is None or any(row.param is not row.key or row.key.is_inference() for row in rows):
        return None
    by_key = {id(row.key): row for row in rows}
    resting = _resting_rows(optimizer, by_key)
    if not _share_memory([*rows, *resting]):
        by_key.update((id(row.key), row) for row in resting)
    fields = [
        _plan_fields(optimizer, g, param, by_key.get(id(param)))
        for g, group in enumerate(optimizer.param_groups)
        for param in group["params"]
    ]
    guards = ["capturable", "differentiable"]
    return native.Plan(optimizer.rule, optimizer.param_groups, optimizer.state, fields, guards)


def _resting_rows(optimizer: FusedOptimizer, seen: Mapping[int, Row]) -> list[Row]:
    """Parameters without a gradient this time, whose state is ready for a step that has one.

    Without them a plan would not outlive a step when gradients come and go (mixtures of experts).
    """
    return [
        row
        for g, group in enumerate(optimizer.param_groups)
        if not (group.get("capturable") or group.get("differentiable"))
        for param in group["params"]
        if id(param) not in seen
        for row in [_resting_row(optimizer, g, param)]
        if row is not None
    ]


def _resting_row(optimizer: FusedOptimizer, g: int, param: Tensor) -> Row | None:
    native = backend.native()
    assert native is not None
    entry = optimizer.state.get(param, {})
    names = optimizer.state_names(optimizer.param_groups[g])
    states = [entry.get(name) for name in names]
    step = entry.get("step")
    row = Row(param, param, param, g, "cpu", "", [s for s in states if isinstance(s, Tensor)], step)
    is_ready = (
        len(row.states) == len(names)
        and (isinstance(step, Tensor) or not optimizer.counts_steps)
        and not (param.is_inference() or _is_dtensor(param))
        and param.layout == torch.strided
        and param.is_cpu
        and _has_kernel(row)
        and native.layout_facts(param) == (True, True)
        and not any(_is_lazy(t) for t in (param, *row.states))
        and all(native.same_layout(s, param) and native.layout_facts(s)[1] for s in row.states)
    )
    return row if is_ready else None


def _plan_fields(
    optimizer: FusedOptimizer, g: int, param: Tensor, row: Row | None
) -> tuple[Any, ...]:
    if row is None:
        return g, param, None, (), False, False
    return g, param, optimizer.state.get(param), tuple(row.states), False, True
