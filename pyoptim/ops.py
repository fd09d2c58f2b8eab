"""torch.library ops around the engines, so that a compiled graph can hold an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyoptim import backend, reductions
from pyoptim.factors import Factors
from pyoptim.gpu import Memory
from pyoptim.plan import Staged, run_staged
from pyoptim.rows import Row

# By rule, in its kernels' order; "betas.0" is the first of betas.
HYPER_NAMES: dict[str, tuple[str, ...]] = {
    rule: native.rule_info(rule)["hyper_names"]
    for native in [backend.native()]
    if native is not None
    for rule in native.rules()
}


@torch.library.custom_op("pyoptim::step_", mutates_args=("params", "states", "steps"))
def step_(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    steps: Sequence[Tensor],
    group_sizes: Sequence[int],
    n_states: Sequence[int],
    hypers: Sequence[float],
    tensors: Sequence[Tensor],
    engine: str,
) -> None:
    """One update of every parameter, in place.

    Args:
        rule: one of `HYPER_NAMES`.
        params: floating-point tensors, no two of which share memory; those of one group follow each
            other.
        grads: of the dtype and shape of each parameter.
        states: those of the first parameter, in the rule's order, then those of the second ...
        steps: float32 step counters [], one per parameter, or none at all.
        group_sizes: number of parameters of each group.
        n_states: state tensors per parameter of each group.
        hypers: of each group in turn, in the order of `HYPER_NAMES[rule]`; NaN stands for the next
            of `tensors`.
        tensors: hyper-parameters that are tensors.
        engine: "auto", "cpu", "cuda" or "triton". A GPU's kernels read tensors and counters that
            are on the device there.

    Raises:
        BackendError: the engine cannot update a parameter.
        ValueError: the lists do not belong together, or the tensors of a parameter have no kernel.
    """
    groups = _groups(rule, len(group_sizes), hypers, tensors)
    rows = _rows(params, grads, states, steps, group_sizes, n_states, engine)
    if any(not tensor.is_cpu for tensor in tensors):
        for row in rows:
            row.is_live = row.backend in backend.GPU_ENGINES
    run_staged(rule, groups, [Staged(row, False) for row in rows], Factors(), _MEMORY)


@torch.library.custom_op("pyoptim::clip_grads_", mutates_args=("grads",))
def clip_grads_(grads: Sequence[Tensor], max_norm: float, norm_type: float, engine: str) -> Tensor:
    """Scales tensors in place so that their common norm is at most `max_norm`.

    Args:
        grads: one or more floating-point or complex tensors of one device.
        norm_type: 2, 1 or inf.
        engine: a backend's name or "auto".

    Returns: the norm before, 0-dim; float64 when any tensor is, else float32.
    """
    batches = reductions.batches(list(grads), norm_type, engine)
    norm = reductions.clip(batches, reductions.total(batches, norm_type), max_norm)
    return norm.clone()  # an op may not return what it was given


@clip_grads_.register_fake
def _(grads: Sequence[Tensor], max_norm: float, norm_type: float, engine: str) -> Tensor:
    wide = (torch.float64, torch.complex128)
    dtype = torch.float64 if any(g.dtype in wide for g in grads) else torch.float32
    return torch.empty((), dtype=dtype, device=grads[0].device)


class _Fresh(Memory):
    """Steps of several optimizers may run at once, on several streams: none may find the
    workspace of another. torch's allocator knows the streams."""

    def workspace(self, slot: int, n_bytes: int, device: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.device(device))


_MEMORY = _Fresh()


def _rows(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    steps: Sequence[Tensor],
    group_sizes: Sequence[int],
    n_states: Sequence[int],
    engine: str,
) -> list[Row]:
    of_rows = [g for g, size in enumerate(group_sizes) for _ in range(size)]
    counts = [n_states[g] for g in of_rows]
    lengths = (len(params), len(grads), len(of_rows), len(steps) or len(params))
    if len(set(lengths)) != 1 or sum(counts) != len(states) or len(n_states) != len(group_sizes):
        raise ValueError(
            f"pyoptim::step_: {lengths[0]} params, {lengths[1]} grads, {len(states)} states, "
            f"{len(steps)} steps do not fit group_sizes {list(group_sizes)} with n_states "
            f"{list(n_states)}"
        )
    rows, left = [], iter(states)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = Row(param, param, grad, of_rows[i], backend.select(engine, param), f"params[{i}]")
        row.states = [next(left) for _ in range(counts[i])]
        row.step = steps[i] if steps else None
        is_counted_there = row.step is not None and row.step.device.type != "cpu"
        row.is_live = row.backend in backend.GPU_ENGINES and is_counted_there
        if not row.has_kernel:
            dtypes = [param.dtype, *(state.dtype for state in row.states)]
            raise ValueError(f"pyoptim::step_: no kernel updates params[{i}] of dtypes {dtypes}")
        rows.append(row)
    return rows


def _groups(
    rule: str, n_groups: int, hypers: Sequence[float], tensors: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """The inverse of `flat_hypers`."""
    if rule not in HYPER_NAMES:
        raise ValueError(f"pyoptim::step_: rule {rule!r} is not one of {sorted(HYPER_NAMES)}")
    names = HYPER_NAMES[rule]
    if len(hypers) != n_groups * len(names):
        raise ValueError(
            f"pyoptim::step_: {len(hypers)} hypers for {n_groups} groups of rule {rule!r}, which "
            f"has {len(names)}"
        )
    left = iter(tensors)
    values = [next(left) if value != value and tensors else value for value in hypers]
    groups = []
    for g in range(n_groups):
        group: dict[str, Any] = {}
        for name, value in zip(names, values[g * len(names) :], strict=False):
            key, _, index = name.partition(".")
            group[key] = (*group.get(key, ()), value) if index else value
        groups.append(group)
    return groups


def flat_hypers(names: Sequence[str], group: Mapping[str, Any]) -> tuple[list[float], list[Tensor]]:
    """Returns the hyper-parameters of `group` as `step_` takes them."""
    hypers, tensors = [], []
    for name in names:
        key, _, index = name.partition(".")
        value = group[key][int(index)] if index else group[key]
        if isinstance(value, Tensor):
            tensors.append(value)
            value = torch.nan
        hypers.append(float(value))
    return hypers, tensors
