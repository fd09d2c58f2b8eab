"""The general path of a step: it makes the plans of the fast path, and runs what no plan can.

The fast path is `pyoptim._C.Plan`, which re-reads and re-checks the tensors it was made for. Here
run first steps, gradients laid out unlike their parameter, sparse gradients, DTensors, shared
memory, the reference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyoptim import backend
from pyoptim.factors import Factors, step_factors
from pyoptim.gpu import Memory, index_of
from pyoptim.rows import (
    Row,
    checked_rows,
    fill_states,
    find_sources,
    is_dtensor,
    is_lazy,
    is_live,
    overlap,
    restore_unread,
    share_memory,
)

if TYPE_CHECKING:
    from pyoptim.optimizer import FusedOptimizer

_IMPORTED_IN = os.getpid()


def general_step(optimizer: FusedOptimizer) -> None:
    """Updates every parameter that has a gradient, or raises and changes nothing."""
    mine = object()
    if optimizer.__dict__.setdefault("_stepping", mine) is not mine:
        raise RuntimeError("step() of this optimizer is already running in another thread")
    optimizer._plan = None
    try:
        with threads_that_exist():
            optimizer._plan = _step_rows(optimizer)
    finally:
        del optimizer.__dict__["_stepping"]


@contextmanager
def threads_that_exist() -> Iterator[None]:
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


def _step_rows(optimizer: FusedOptimizer) -> Any:
    """Makes the step; returns a plan for steps like this one, or None."""
    _check_hypers(optimizer)
    rows = checked_rows(optimizer, getattr(optimizer, "found_inf", None) is not None)
    is_on_gpu = all(row.backend in backend.GPU_ENGINES for row in rows)
    devices = {index_of(row.param.device) for row in rows}
    factors = step_factors(optimizer, [row.grad for row in rows], is_on_gpu, devices)
    if factors is None:
        return None
    find_sources(optimizer, rows)
    fill_states(optimizer, rows, with_grads=factors.writes_grads)
    are_shared = share_memory(rows, factors.writes_grads)
    with torch.no_grad():
        restore_unread(rows, are_shared)
    # Rows that share memory see each other's result, in order, as in torch's for-loop.
    if are_shared:
        for row in rows:
            _run(optimizer, [row], factors)
        return None
    return make_plan(optimizer, rows) if _run(optimizer, rows, factors) else None


def fill_lists(
    optimizer: FusedOptimizer,
    group: Mapping[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
) -> bool:
    """Makes the state of one group and lists its tensors for `ops.step_`; False if kernels cannot.

    Raises:
        RuntimeError, AssertionError, BackendError: as a step.
    """
    of_group = [g for g, own in enumerate(optimizer.param_groups) if own is group]
    rows = [row for row in checked_rows(optimizer, False) if row.group in of_group]
    if group.get("differentiable") or any(row.param is not row.key for row in rows):
        return False
    fill_states(optimizer, rows, with_grads=False, with_counters=True)
    if share_memory(rows) or not all(row.has_kernel for row in rows):
        return False
    for row in rows:
        params.append(row.param)
        grads.append(row.grad)
        states.extend(row.states)
        steps.extend([] if row.step is None else [row.step])
    return True


def _check_hypers(optimizer: FusedOptimizer) -> None:
    """Raises if a group lacks a hyper-parameter, or one is not a number."""
    native = backend.native()
    for group in optimizer.param_groups:
        # Autograd needs those of a differentiable step as they are.
        if native is not None and not group.get("differentiable"):
            native.read_hypers(optimizer.rule, group)


def _run(optimizer: FusedOptimizer, rows: list[Row], factors: Factors) -> bool:
    """Updates the rows; says whether all of them went straight through the kernels."""
    fused = [row for row in rows if row.has_kernel]
    staged = [Staged(row, factors.writes_grads) for row in fused]
    if staged:
        run_staged(optimizer.rule, optimizer.param_groups, staged, factors, optimizer._memory)
    done = {id(row) for row in fused}
    for row in rows:
        if id(row) not in done:
            optimizer._plain_step(row, factors)
    return len(staged) == len(rows) and not any(s.is_copied for s in staged)


def run_staged(
    rule: str,
    groups: list[dict[str, Any]],
    staged: list[Staged],
    factors: Factors,
    memory: Memory,
    total: Tensor | None = None,
) -> None:
    """Updates rows that have a kernel; no two of them share memory.

    Args:
        total: takes the sum of a rule's terms, 0-dim float64 on the one device of the rows; every
            row is then saved.
    """
    native = backend.native()
    assert native is not None
    with torch.no_grad():
        fields = [s.fields() for s in staged]
        inv_scale, clip = factors.inv_scale, factors.clip
        native.run_rows(rule, groups, fields, inv_scale, clip, factors.devices, memory, total)
        for s in staged:
            s.write_back()


class Staged:
    """A row whose tensors share one dense layout: copies where the originals do not."""

    def __init__(self, row: Row, with_grad: bool) -> None:
        self.row = row
        self._with_grad = with_grad
        self._written: list[tuple[Tensor, Tensor]] = []  # (original, its copy)
        self.is_copied = False

    def fields(self) -> tuple[Any, ...]:
        native, row, param, source = backend.native(), self.row, self.row.param, self.row.source
        saved = row.saved
        assert native is not None
        if native.layout_facts(param) != (True, True) or is_lazy(param):
            values = param if source is None else source
            param = self._copy(param, torch.empty_like(param).copy_(values), written=True)
            source = None
        grad = self._like(row.grad, param, written=self._with_grad)
        states = tuple(self._like(tensor, param, written=True) for tensor in row.written[1:])
        if source is not None:
            source = self._like(source, param, written=False)
        if saved is not None:
            saved = self._like(saved, param, written=True)
        return param, grad, states, *_common_fields(row, row.first), source, saved

    def _like(self, tensor: Tensor, param: Tensor, written: bool) -> Tensor:
        native = backend.native()
        assert native is not None
        is_plain = native.same_layout(tensor, param) and native.layout_facts(tensor)[1]
        if is_plain and not (is_lazy(tensor) or self._is_shared(tensor)):
            return tensor
        return self._copy(
            tensor, torch.empty_like(param, dtype=tensor.dtype).copy_(tensor), written
        )

    def _is_shared(self, tensor: Tensor) -> bool:
        """A gradient over the parameter's own memory is read before the parameter is written."""
        row = self.row
        return tensor is row.grad and any(overlap(tensor, t) for t in row.written)

    def _copy(self, original: Tensor, copy: Tensor, written: bool) -> Tensor:
        self.is_copied = True
        if written:
            self._written.append((original, copy))
        return copy

    def write_back(self) -> None:
        for original, copy in self._written:
            original.copy_(copy)


def make_plan(optimizer: FusedOptimizer, rows: list[Row]) -> Any:
    """Returns a `_C.Plan` for steps like this one, or None if it cannot run them."""
    native = backend.native()
    if native is None or any(row.param is not row.key or row.key.is_inference() for row in rows):
        return None
    by_key = {id(row.key): row for row in rows}
    resting = _resting_rows(optimizer, by_key)
    if not share_memory([*rows, *resting]):
        by_key.update((id(row.key), row) for row in resting)
    fields: list[tuple[Any, ...]] = []
    for g, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            row, entry = by_key.get(id(param)), optimizer.state.get(param)
            if row is None:
                fields.append((param, (), None, g, False, 0, False, None, False))
            else:
                states = row.written[1:]
                fields.append((param, states, *_common_fields(row, False), entry, True))
    groups, state = optimizer.param_groups, optimizer.state
    guards = ["capturable", "differentiable"]
    return native.Plan(optimizer.rule, groups, state, fields, guards, optimizer._memory)


def _common_fields(row: Row, first: bool) -> tuple[Any, ...]:
    return row.step, row.group, first, backend.ENGINES.index(row.backend), row.is_live


def _resting_rows(optimizer: FusedOptimizer, seen: Mapping[int, Row]) -> list[Row]:
    """Parameters without a gradient this time, whose state is ready for a step that has one.

    Without them a plan would not outlive a step when gradients come and go (mixtures of experts).
    """
    return [
        row
        for g, group in enumerate(optimizer.param_groups)
        if not group.get("differentiable")
        for param in group["params"]
        if id(param) not in seen
        for row in [_resting_row(optimizer, g, param)]
        if row is not None
    ]


def _resting_row(optimizer: FusedOptimizer, g: int, param: Tensor) -> Row | None:
    native = backend.native()
    assert native is not None
    if param.is_inference() or is_dtensor(param) or param.layout != torch.strided:
        return None
    entry = optimizer.state.get(param, {})
    names = optimizer.state_names(optimizer.param_groups[g])
    states = [entry.get(name) for name in names]
    step = entry.get("step") if optimizer.counts_steps else optimizer._counters.get(param)
    try:
        engine = backend.select(optimizer.backend or backend.chosen(), param)
    except backend.BackendError:
        return None  # its first gradient raises it
    row = Row(
        param, param, param, g, engine, "", [s for s in states if isinstance(s, Tensor)], step
    )
    row.is_live = is_live(optimizer, row, False)
    row.master = optimizer._master_of(entry)
    written = row.written
    is_ready = (
        len(row.states) == len(names)
        and (isinstance(step, Tensor) or not optimizer.counts_steps)
        and row.has_kernel
        and native.has_memory(param)
        and native.layout_facts(param) == (True, True)
        and not any(is_lazy(t) for t in written)
        and all(native.same_layout(t, param) and native.layout_facts(t)[1] for t in written)
    )
    return row if is_ready else None
