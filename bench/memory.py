"""Memory of an optimizer: bytes of state, and the most that one step allocates beyond it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# Value defined by proc(5): resets the peak resident set size to the current one.
_RESET_PEAK = "5"


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors, as `state_dict` shows them."""
    states = optimizer.state_dict()["state"].values()
    tensors = (value for state in states for value in state.values())
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Growth of the resident set while `call` runs; None where the system does not tell.

    Freed memory that the allocator still holds would hide temporaries, so it is handed back first.
    """
    try:
        _trim_heap()
        _CLEAR_REFS.write_text(_RESET_PEAK)
        before = _resident_peak()
    except (OSError, AttributeError):
        return None
    call()
    return max(0, _resident_peak() - before)


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _trim_heap() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def _resident_peak() -> int:
    match = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.M)
    if match is None:
        raise OSError("no VmHWM in /proc/self/status")
    return int(match[1]) * 1024
