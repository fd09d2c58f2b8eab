"""The way of every kernel to the device, and of its tables."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

NUM_WARPS = 4
# No fused multiply-add: the bits of every other engine.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

# What calls without a cache keep: spare memory, and tables that a graph has captured, which may be
# replayed as long as we live.
_without_cache: dict[Any, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launches on torch's current stream. The one place, so that a test can compile instead.

    Args:
        constants: of the kernel, and options of the compiler in place of OPTIONS.
    """
    kernel[grid](*args, **{**OPTIONS, **constants})


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def upload(
    cache: dict[Any, Any] | None,
    name: str,
    device: torch.device,
    key: object,
    make: Callable[[], Array],
) -> Tensor:
    """Returns the table that `make` gives, on `device`, to be read by kernels of this stream.

    Args:
        cache: where the table stays, under `name`, until `key` or the stream changes; or None.
        key: equal as long as `make` would give the same.
    """
    stream, is_capturing = _stream(device)
    kept = cache.get(name) if cache is not None else None
    # A table that a graph fills has no values before the first replay.
    if kept is not None and not is_capturing and kept[:2] == (key, stream):
        kept_table: Tensor = kept[2]
        return kept_table
    source = torch.from_numpy(make())
    if device.type != "cuda":
        table = source
    else:
        # Pinned, because another copy would wait for the device; torch reuses the memory only when
        # the copy is done.
        source = _pinned(_without_cache if cache is None else cache, name, source, is_capturing)
        table = source.to(device, non_blocking=True)
    if is_capturing:
        # Every replay copies again.
        kept_for_ever = (_without_cache if cache is None else cache).setdefault("captured", [])
        kept_for_ever.append((source, table))
    elif cache is not None:
        cache[name] = (key, stream, table)
    return table


def _pinned(cache: dict[Any, Any], name: str, source: Tensor, is_capturing: bool) -> Tensor:
    """A copy of `source` in pinned memory.

    CUDA may refuse to allocate it while a graph is captured: a step before the capture leaves as
    much as it needed itself.
    """
    spare = cache.get((name, "spare"))
    if is_capturing and spare is not None and spare.numel() >= source.nbytes:
        del cache[name, "spare"]
        pinned: Tensor = spare[: source.nbytes].view(source.dtype)
        return pinned.copy_(source)
    if not is_capturing and (spare is None or spare.numel() < source.nbytes):
        cache[name, "spare"] = torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=True)
    return source.pin_memory()


def _stream(device: torch.device) -> tuple[int, bool]:
    if device.type != "cuda":
        return 0, False
    stream = torch.cuda.current_stream(device).cuda_stream
    return stream, torch.cuda.is_current_stream_capturing()


def bits_of(x: float) -> int:
    """The bits of a float64 as an integer: Triton passes Python floats as float32."""
    bits: int = struct.unpack("=q", struct.pack("=d", x))[0]
    return bits


def cut(numels: Array, chunk: int) -> tuple[Array, Array]:
    """Returns, for every chunk of arrays of these lengths, its array and its number therein."""
    counts = -(-numels // chunk)
    array = np.repeat(np.arange(len(numels)), counts)
    first = np.cumsum(counts) - counts
    return array, np.arange(len(array)) - first[array]
