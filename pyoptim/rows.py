"""Rows of a step: parameters with their gradients and state, checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyoptim import backend, gpu

if TYPE_CHECKING:
    from pyoptim.optimizer import FusedOptimizer

HALF_DTYPES = (torch.bfloat16, torch.float16)
PARAM_DTYPES = (
    *(torch.float64, torch.float32, *HALF_DTYPES),
    *(torch.complex128, torch.complex64, torch.complex32),
)
# float32 holds every integer below 2^24; a counter that reaches it goes on in float64.
FLOAT32_STEPS = 2**24


@dataclass
class Row:
    """One parameter with a gradient, and where its step happens."""

    key: Tensor  # as in param_groups and optimizer.state
    param: Tensor  # key, or its local shard
    grad: Tensor
    group: int
    backend: str  # an engine of backend.ENGINES, "reference" or "sparse"
    place: str  # what error messages call it
    states: list[Tensor] = field(default_factory=list)
    step: Tensor | None = None  # its step counter
    first: bool = False  # its momentum buffer is new
    is_live: bool = False  # kernels read and advance the counter, on the device
    source: Tensor | None = None  # a copy of param, which is read in its place
    saved: Tensor | None = None  # takes what param was, where a rule saves it
    master: Tensor | None = None  # float32, of which a half-precision param is the rounding

    @property
    def has_kernel(self) -> bool:
        """Whether an engine has code for these dtypes."""
        is_half = self.param.dtype in HALF_DTYPES
        dtypes = {self.param.dtype, *((torch.float32,) if is_half else ())}
        of_states = {state.dtype for state in self.states}
        has_engine = self.backend in backend.ENGINES
        if self.master is not None:
            has_engine = has_engine and is_half and self.master.dtype == torch.float32
        return has_engine and len(of_states) <= 1 and of_states <= dtypes

    @property
    def written(self) -> tuple[Tensor, ...]:
        """What a step writes: the parameter, its states, its master."""
        return (self.param, *self.states, *(() if self.master is None else (self.master,)))


def checked_rows(optimizer: FusedOptimizer, has_scaler: bool) -> list[Row]:
    """Every parameter that has a gradient, in order.

    Args:
        has_scaler: a GradScaler may take the step back on the device.

    Raises:
        RuntimeError, AssertionError, BackendError: one of them cannot be stepped.
    """
    return [
        _checked_row(optimizer, g, i, p, grad, has_scaler)
        for g, i, p, grad in _params_with_grad(optimizer)
    ]


def fill_states(
    optimizer: FusedOptimizer, rows: list[Row], with_grads: bool, with_counters: bool = False
) -> None:
    """Gives the rows their states, new ones where there are none, and tells autograd of the step.

    Args:
        with_grads: the gradients will be written too.
        with_counters: whoever makes the step learns from a counter whether a buffer is new.

    Raises:
        RuntimeError: a state cannot be used; the optimizer is as it was.
    """
    created = _Created(optimizer)
    try:
        # State made under inference_mode would be of no use to a step outside it.
        with torch.inference_mode(False), torch.no_grad():
            for row in rows:
                created.fill(row, with_counters)
        _bump_versions(rows, with_grads)
    except BaseException:
        created.undo()
        raise


def _bump_versions(rows: list[Row], with_grads: bool) -> None:
    """Lets autograd notice what the kernels write behind its back."""
    written = [row.key for row in rows]
    written += [row.param for row in rows if row.param is not row.key]
    if with_grads:
        written += [row.grad for row in rows]
    # Inference tensors have no version, and autograd never saves them.
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


def _params_with_grad(optimizer: FusedOptimizer) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    held = None if optimizer._grads is None else iter(optimizer._grads)
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            grad = param.grad if held is None else next(held)
            if grad is not None:
                yield g, i, param, grad


def _checked_row(
    optimizer: FusedOptimizer, g: int, index: int, key: Tensor, grad: Tensor, has_scaler: bool
) -> Row:
    group = optimizer.param_groups[g]
    names = group.get("param_names")
    place = f"parameter {index} of group {g}" + (f" ({names[index]})" if names else "")
    row = Row(key, local_of(key), local_grad(key, grad), g, "sparse", place)
    _check_pair(row)
    if row.grad.layout != torch.strided:
        optimizer._check_sparse(row, group)
        return row
    optimizer._check_row(row, group)
    choice = optimizer.backend or backend.chosen()
    is_recorded = bool(group.get("differentiable"))
    is_plain = is_recorded or optimizer._needs_reference(row)
    row.backend = "reference" if is_plain else backend.select(choice, row.param)
    # torch's compiler writes capturable=True into groups that did not ask for it.
    is_capturable = bool(group.get("capturable") and optimizer.defaults.get("capturable"))
    _check_mode(row, group, is_capturable)
    if row.backend in backend.ENGINES and not _has_memory(row):
        if choice == row.backend:
            raise backend.BackendError(
                f"backend={choice!r} cannot read the memory of {place} "
                f"({type(row.param).__name__}); use backend='auto' or 'reference'"
            )
        row.backend = "reference"
    row.is_live = is_live(optimizer, row, has_scaler)
    if optimizer.counts_steps and not row.is_live and row.param.is_cuda:
        gpu.Memory.check_not_capturing()
    return row


def is_live(optimizer: FusedOptimizer, row: Row, has_scaler: bool) -> bool:
    """Whether kernels must read this row's step count and hyper-parameters on the device."""
    if row.backend not in backend.GPU_ENGINES:
        return False
    group = optimizer.param_groups[row.group]
    if group.get("capturable") or _waits_for_device(group):
        return True
    if not (optimizer.counts_steps or optimizer.state_names(group)):
        return False
    step = optimizer.state.get(row.key, {}).get("step")
    is_counted_there = isinstance(step, Tensor) and step.device.type != "cpu"
    return has_scaler or is_counted_there or row.key in optimizer._counters


def _waits_for_device(group: Mapping[str, Any]) -> bool:
    """Whether a hyper-parameter is a tensor that the host would have to wait for."""
    for name, value in group.items():
        values = value if isinstance(value, tuple) else (value,)
        if name != "params" and any(isinstance(v, Tensor) and not v.is_cpu for v in values):
            return True
    return False


def _check_mode(row: Row, group: Mapping[str, Any], is_capturable: bool) -> None:
    """Raises where torch does for the parameter's device or the mode autograd is in."""
    device, is_on_gpu = row.param.device, row.backend in backend.GPU_ENGINES
    if is_capturable and device.type in ("cpu", "meta") and not is_on_gpu:
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


def is_dtensor(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor" or hasattr(tensor, "_local_tensor")


def local_of(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that this process holds, or the tensor itself."""
    local: Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return local


def shards(tensor: Tensor) -> int:
    """Into how many pieces a DTensor is cut; 1 for any other."""
    if not is_dtensor(tensor):
        return 1
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return math.prod(mesh.size(i) for i, p in enumerate(placements) if not p.is_replicate())


def local_grad(key: Tensor, grad: Tensor) -> Tensor:
    """The part of a gradient that lies in this process as that of its parameter does."""
    if is_dtensor(key) and is_dtensor(grad) and grad.placements != key.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=key.placements)  # type: ignore[attr-defined]
    local = local_of(grad)
    # A redistributed gradient may still be under way.
    return local.wait() if hasattr(local, "wait") else local


class _Created:
    """State made for rows that have none, to be taken back if the step cannot happen."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._undo: list[Callable[[], object]] = []
        self._new_buffers: set[int] = set()  # of which state entries, by id

    def fill(self, row: Row, with_counter: bool) -> None:
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
        self._find_master(row, entry)
        # A parameter listed twice finds the buffer that its first row was just given.
        row.first = id(entry) in self._new_buffers
        if optimizer.counts_steps or not names:
            return
        if row.is_live or with_counter or row.key in optimizer._counters:
            self._fill_hidden_counter(row)

    def _fill_state(self, row: Row, entry: dict[str, Any], name: str) -> None:
        if not isinstance(entry.get(name), Tensor):
            if name == "momentum_buffer":
                self._new_buffers.add(id(entry))
            self._put(entry, name, self._optimizer._new_state(name, row.key))
        elif entry[name].layout != torch.strided:  # left by a sparse step
            self._put(entry, name, entry[name].to_dense())
        self._check_state(row, name, entry[name])
        row.states.append(local_of(entry[name]))

    def _find_master(self, row: Row, entry: Mapping[str, Any]) -> None:
        master = self._optimizer._master_of(entry)
        if master is not None:
            self._check_state(row, "master_param", master)
            row.master = local_of(master)

    def _fill_hidden_counter(self, row: Row) -> None:
        """Tells kernels whether the buffer is new, for rules whose state has no counter."""
        counters = self._optimizer._counters
        if row.key not in counters or row.first:
            self._put(counters, row.key, _live_counter(0.0 if row.first else 1.0, row.param))
        row.step = counters[row.key]
        if not row.is_live:
            row.first = float(row.step) == 0

    def _fill_step(self, row: Row, entry: dict[str, Any]) -> None:
        step = entry.get("step", 0.0)
        if row.is_live:
            if not _is_live_counter(step, row.param):
                self._put(entry, "step", _live_counter(float(step), row.param))
            row.step = entry["step"]
            return
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

    def _put(self, entry: dict[Any, Any], name: Any, value: Tensor) -> None:
        if gpu.is_capturing(value.device):
            raise RuntimeError(
                "step() would make new state inside a CUDA graph, which every replay would make "
                "anew; make at least one step before the capture"
            )
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
        of_param, of_state = row.param.dtype, local_of(state).dtype
        if of_state not in PARAM_DTYPES or of_state.is_complex != of_param.is_complex:
            raise RuntimeError(f"{place} is {of_state}, its parameter is {of_param}")
        if local_of(state).shape != row.param.shape:
            raise RuntimeError(f"{place} is sharded differently from its parameter")
        _check_writable(place, local_of(state))

    def undo(self) -> None:
        for take_back in reversed(self._undo):
            take_back()


def new_counter(value: float) -> Tensor:
    """Returns a step counter as torch keeps it, in float64 where float32 would stand still."""
    is_double = value + 1 >= FLOAT32_STEPS or torch.get_default_dtype() == torch.float64
    return torch.tensor(value, dtype=torch.float64 if is_double else torch.float32)


def _live_counter(value: float, param: Tensor) -> Tensor:
    dtype = torch.float64 if value + 1 >= FLOAT32_STEPS else torch.float32
    return torch.full((), value, dtype=dtype, device=param.device)


def _is_live_counter(step: object, param: Tensor) -> bool:
    return (
        isinstance(step, Tensor)
        and step.device == param.device
        and step.numel() == 1
        and step.dtype in (torch.float32, torch.float64)
    )


def share_memory(rows: list[Row], writes_grads: bool = False) -> bool:
    """Whether a tensor that one row writes overlaps one that another row reads or writes."""
    written_end, written_owner, read_end, read_owner = 0, -1, 0, -1
    for start, stop, owner, is_written in sorted(_spans(rows, writes_grads)):
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
        for tensor in row.written:
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


def overlap(a: Tensor, b: Tensor) -> bool:
    first, second = _span(a), _span(b)
    return bool(first and second and first[0] < second[1] and second[0] < first[1])


def find_sources(optimizer: FusedOptimizer, rows: list[Row]) -> None:
    """Tells the rows which copies of their parameters the kernels are to read.

    Raises:
        RuntimeError: a parameter has another shape than its copy.
    """
    if optimizer._sources is None:
        return
    params = (p for group in optimizer.param_groups for p in group["params"])
    sources = {id(p): s for p, s in zip(params, optimizer._sources, strict=True)}
    for row in rows:
        source = sources[id(row.key)]
        if source is None:
            continue
        if source.shape != row.key.shape:
            raise RuntimeError(
                f"{row.place} has shape {tuple(row.key.shape)}, the copy that it is to be read "
                f"from has {tuple(source.shape)}; change no shape between first_step() and "
                "second_step()"
            )
        row.source = local_of(source)


def restore_unread(rows: list[Row], are_shared: bool) -> None:
    """Copies back what no kernel is to read: it then is as if there had been no copy.

    Args:
        are_shared: the rows share memory, and each sees what those before it have written.
    """
    for row in rows:
        if row.source is None:
            continue
        if are_shared or not _is_readable(row, row.source):
            row.param.copy_(row.source)
            row.source = None


def _is_readable(row: Row, source: Tensor) -> bool:
    param = row.param
    return (
        row.has_kernel
        and (source.dtype, source.device) == (param.dtype, param.device)
        and source.shape == param.shape
        # Such a gradient changes with the parameter.
        and not overlap(row.grad, param)
    )


def is_lazy(tensor: Tensor) -> bool:
    """The memory, which is all that the kernels see, is not the values."""
    return tensor.is_conj() or tensor.is_neg()
