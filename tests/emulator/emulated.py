"""Builds the CUDA engine for the emulator, and calls its table of functions from Python."""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulator"
LIBRARY = "libpyoptim_cuda.so"
# In the order of RuleId.
RULES = re.findall(r"^ +X\((\w+)\)", (ROOT / "csrc/rules/all.hpp").read_text(), re.MULTILINE)
HEADERS = ("core", "cuda", "emulator", "reduce", "rules")
# UBSan's check of alignment finds the accesses that only a GPU would refuse.
FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
    *("-ffp-contract=off", "-fsanitize=alignment", "-fno-sanitize-recover=alignment"),
    *("-Wno-unknown-pragmas", "-DPYOPTIM_EMULATOR", "-x", "c++"),
)


# -- building --------------------------------------------------------------------------------------


def units() -> dict[str, tuple[str, ...]]:
    """Object name -> source and its own flags."""
    found: dict[str, tuple[str, ...]] = {
        n: (f"cuda/{n}.cu",) for n in ("engine", "project", "reduce")
    }
    found["emulator"] = ("emulator/emulator.cpp",)
    for rule in RULES:
        found[f"update_{rule}"] = ("cuda/update.cu", f"-DPYOPTIM_RULE={rule}")
    return found


def build() -> Path:
    """Returns the emulated library, made again where it is older than its sources.

    Raises:
        RuntimeError: there is no compiler, or it refuses the sources.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / "lock"):  # tests run in several processes
        return _build()


def _build() -> Path:
    sources = ROOT / "csrc"
    headers = [path for name in HEADERS for path in (sources / name).glob("*.hpp")]
    newest = max(path.stat().st_mtime for path in (*headers, Path(__file__)))
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(_compile, FOLDER / f"{name}.o", sources, unit, newest, ())
            for name, unit in units().items()
        ]
        objects = [job.result() for job in jobs]
    library = FOLDER / LIBRARY
    if _is_older(library, max(path.stat().st_mtime for path in objects)):
        link(objects, library)
    return library


def build_with(folder: Path, file: str, old: str, new: str, unit: str) -> Path:
    """Returns a library whose `unit` was made with `new` in place of `old`, which stands once in
    the `file` of csrc; the rest is `build`'s."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    text = (sources / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} has {old!r} in {text.count(old)} places, not in 1")
    (sources / file).write_text(text.replace(old, new))
    build()
    changed = _compile(folder / f"{unit}.o", sources, units()[unit], 0.0, ("-O0", "-Wno-error"))
    return link([changed, *(FOLDER / f"{n}.o" for n in units() if n != unit)], folder / LIBRARY)


def build_kernels(folder: Path, source: Path) -> Path:
    """Returns a library of the kernels in `source` and the emulator."""
    build()
    own = _compile(folder / "own.o", source.parent, (source.name, f"-I{ROOT / 'csrc'}"), 0.0, ())
    return link([own, FOLDER / "emulator.o"], folder / LIBRARY)


def link(objects: Sequence[Path], to: Path) -> Path:
    _run(["-shared", "-pthread", "-fsanitize=alignment", *map(str, objects)], to)
    return to


def _is_older(path: Path, time: float) -> bool:
    return not path.exists() or path.stat().st_mtime < time


def _compile(
    to: Path, sources: Path, unit: Sequence[str], newest: float, more_flags: Sequence[str]
) -> Path:
    source, *own = unit
    if _is_older(to, max(newest, (sources / source).stat().st_mtime)):
        flags = [*FLAGS, *more_flags, *own, f"-I{sources}"]
        _run([*flags, "-c", str(sources / source)], to)
    return to


def _run(arguments: Sequence[str], to: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    # Moved into place whole: another process may be building or using the same file.
    part = to.with_name(f"{to.name}.{os.getpid()}")
    try:
        result = subprocess.run(
            [compiler, *arguments, "-o", str(part)], capture_output=True, text=True
        )
    except OSError as error:
        raise RuntimeError(
            f"the emulator needs a C++ compiler, but {compiler!r} does not start: {error}; "
            "install g++ or set CXX"
        ) from None
    if result.returncode != 0:
        raise RuntimeError(f"{compiler} {' '.join(arguments)} failed:\n{result.stderr}")
    part.replace(to)


# -- the table of functions: csrc/cuda/api.hpp -----------------------------------------------------

MAX_STATES = 3
MAX_HYPERS = 12
HYPER_BYTES = 96
GUARD_BYTES = 64
KINDS = {2.0: 0, 1.0: 1, float("inf"): 2}
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Queue(Structure):
    _fields_ = (("device", c_int32), ("stream", c_uint64))


class GradFactors(Structure):
    _fields_ = (
        ("inv_scale", c_double),
        ("grad_scale", c_void_p),
        ("clip", c_double),
        ("clip_at", c_void_p),
        ("found_inf", c_void_p),
    )


class TableRow(Structure):
    _fields_ = (
        ("param", c_void_p),
        ("source", c_void_p),
        ("grad", c_void_p),
        ("state", c_void_p * MAX_STATES),
        ("saved", c_void_p),
        ("master", c_void_p),
        ("numel", c_int64),
        ("update", c_void_p),
        ("sum", c_void_p),
        ("unscale", c_void_p),
        ("project", c_void_p),
        ("n_rows", c_int64),
        ("inner", c_int64),
        ("hyper", c_int32),
    )


class Update(Structure):
    _fields_ = (
        ("rule", c_int32),
        ("variant", c_int32),
        ("dtypes", c_int32),
        ("rows", POINTER(POINTER(TableRow))),
        ("n_rows", c_int64),
        ("hypers", c_void_p),
        ("live_hypers", c_void_p),
        ("factors", GradFactors),
        ("workspace", c_void_p),
    )


class LiveGroup(Structure):
    _fields_ = (
        ("raw", c_double * MAX_HYPERS),
        ("source", c_void_p * MAX_HYPERS),
        ("is_double", c_bool * MAX_HYPERS),
    )


class LiveRow(Structure):
    _fields_ = (("counter", c_void_p), ("group", c_int32), ("is_double", c_bool))


class Prepare(Structure):
    _fields_ = (
        ("rule", c_int32),
        ("is_double", c_bool),
        ("groups", POINTER(LiveGroup)),
        ("n_groups", c_int64),
        ("rows", POINTER(LiveRow)),
        ("n_rows", c_int64),
        ("found_inf", c_void_p),
        ("hypers", c_void_p),
    )


class Span(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("numel", c_int64),
        ("dtype", c_int32),
        ("weight", c_void_p),
        ("eta", c_double),
    )


class Partials(Structure):
    _fields_ = (
        ("kind", c_int32),
        ("spans", POINTER(Span)),
        ("n_spans", c_int64),
        ("out", c_void_p),
    )


class Norms(Structure):
    _fields_ = (
        ("kind", c_int32),
        ("partials", c_void_p),
        ("ends", POINTER(c_int64)),
        ("n", c_int64),
        ("results", c_void_p),
    )


class Clip(Structure):
    _fields_ = (
        ("norm", c_void_p),
        ("max_norm", c_double),
        ("inv_scale", c_double),
        ("grad_scale", c_void_p),
        ("clip", c_void_p),
    )


class Scale(Structure):
    _fields_ = (
        ("spans", POINTER(Span)),
        ("n_spans", c_int64),
        ("factor", c_double),
        ("factor_at", c_void_p),
    )


class RowSums(Structure):
    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("dtype", c_int32),
        ("n_rows", c_int64),
        ("row_size", c_int64),
        ("inner", c_int64),
        ("sums", c_void_p),
    )


def _function(work: type[Structure]) -> Any:
    return ctypes.CFUNCTYPE(c_char_p, POINTER(Queue), POINTER(work))


class Api(Structure):
    _fields_ = (
        ("version", c_int32),
        ("is_emulated", c_bool),
        ("probe", ctypes.CFUNCTYPE(c_char_p, POINTER(c_int32))),
        ("workspace_bytes", ctypes.CFUNCTYPE(c_int64, POINTER(Update))),
        ("update", _function(Update)),
        ("prepare", _function(Prepare)),
        ("partials", _function(Partials)),
        ("norms", _function(Norms)),
        ("clip", _function(Clip)),
        ("scale", _function(Scale)),
        ("row_sums", _function(RowSums)),
        ("tune", ctypes.CFUNCTYPE(None, c_int64, c_int64)),
        ("launches", ctypes.CFUNCTYPE(c_int64)),
    )


@dataclass(frozen=True)
class Row:
    """One tensor to be updated; `hyper` is an index into the blocks of hyper-parameters, `source`
    a copy that is read in place of the parameter."""

    param: Tensor
    grad: Tensor
    states: tuple[Tensor, ...] = ()
    hyper: int = 0
    n_rows: int = 0
    inner: int = 0
    source: Tensor | None = None


@dataclass(frozen=True)
class Factors:
    """What multiplies gradients; a tensor stands for a value in device memory."""

    inv_scale: float = 1.0
    grad_scale: Tensor | None = None
    clip: float = 1.0
    clip_at: Tensor | None = None
    found_inf: Tensor | None = None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _array(kind: type[Structure], items: Sequence[Structure]) -> "ctypes.Array[Structure]":
    return (kind * max(len(items), 1))(*items)


class Emulator:
    """The engine's table of functions, and what the emulator adds to it."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.pyoptim_cuda_api.restype = POINTER(Api)
        self.library.pyoptim_emulator_last_stream.restype = c_uint64
        self.api: Api = self.library.pyoptim_cuda_api().contents

    def call(self, name: str, work: Structure, device: int = 0, stream: int = 0) -> None:
        """Raises RuntimeError with the engine's message."""
        queue = Queue(device, stream)
        message = getattr(self.api, name)(ctypes.byref(queue), ctypes.byref(work))
        if message is not None:
            raise RuntimeError(message.decode())

    def seed(self, value: int) -> None:
        self.library.pyoptim_emulator_seed(value)

    def launches_of(self, name: str, work: Structure) -> int:
        before = self.api.launches()
        self.call(name, work)
        return int(self.api.launches() - before)

    def update(
        self,
        rule: int,
        variant: int,
        dtypes: int,
        rows: Sequence[Row],
        hypers: Tensor,
        factors: Factors | None = None,
        is_live: bool = False,
        device: int = 0,
        stream: int = 0,
    ) -> int:
        """Updates the rows; returns the number of launches.

        Args:
            hypers: uint8 [n, 96]; with `is_live` one per row, in device memory.
        """
        f = factors or Factors()
        table = [self._table_row(row) for row in rows]
        pointers = (POINTER(TableRow) * max(len(rows), 1))(*map(ctypes.pointer, table))
        work = Update(
            *(rule, variant, dtypes, pointers, len(rows)),
            *(None if is_live else hypers.data_ptr(), hypers.data_ptr() if is_live else None),
            GradFactors(
                *(f.inv_scale, _address(f.grad_scale), f.clip),
                *(_address(f.clip_at), _address(f.found_inf)),
            ),
        )
        # What is left of an earlier step must not matter.
        n_bytes = self.api.workspace_bytes(ctypes.byref(work))
        workspace = torch.full((n_bytes + GUARD_BYTES,), 0xAA, dtype=torch.uint8)
        work.workspace = workspace.data_ptr() if n_bytes else None
        before = self.api.launches()
        self.call("update", work, device, stream)
        assert (workspace[n_bytes:] == 0xAA).all(), "memory beside the workspace was written"
        return int(self.api.launches() - before)

    @staticmethod
    def _table_row(row: Row) -> TableRow:
        states = (c_void_p * MAX_STATES)(*(state.data_ptr() for state in row.states))
        source = row.param if row.source is None else row.source
        return TableRow(
            *(row.param.data_ptr(), source.data_ptr()),
            *(row.grad.data_ptr(), states, row.param.numel()),
            *(None, None, None, row.n_rows, row.inner, row.hyper),
        )

    def prepare(
        self,
        rule: int,
        groups: Sequence[Sequence[float | Tensor]],
        rows: Sequence[tuple[Tensor | None, int]],
        is_double: bool = False,
        found_inf: Tensor | None = None,
        hypers: Tensor | None = None,
    ) -> Tensor:
        """Counts up and returns one block of hyper-parameters per row, uint8 [n, 96].

        Args:
            groups: values in the order of the rule's names; a tensor is read by the kernel.
            rows: step counter and group.
        """
        if hypers is None:
            hypers = torch.full((len(rows), HYPER_BYTES), 0xAA, dtype=torch.uint8)
        live_rows = [
            LiveRow(_address(counter), group, counter is not None and counter.dtype.itemsize == 8)
            for counter, group in rows
        ]
        work = Prepare(
            *(rule, is_double, _array(LiveGroup, [_live_group(g) for g in groups]), len(groups)),
            *(_array(LiveRow, live_rows), len(rows), _address(found_inf), hypers.data_ptr()),
        )
        self.call("prepare", work)
        return hypers

    def partials(self, kind: int, tensors: Sequence[Tensor], n_chunks: int) -> Tensor:
        out = torch.full((n_chunks,), torch.nan, dtype=torch.float64)
        self.call("partials", Partials(kind, _spans(tensors), len(tensors), out.data_ptr()))
        return out

    def norms(self, kind: int, partials: Tensor, ends: Sequence[int]) -> Tensor:
        results = torch.full((len(ends),), -1.0, dtype=torch.float64)
        array = (c_int64 * max(len(ends), 1))(*ends)
        work = Norms(kind, partials.data_ptr(), array, len(ends), results.data_ptr())
        self.call("norms", work)
        return results

    def clip(
        self,
        norm: Tensor,
        max_norm: float,
        inv_scale: float = 1.0,
        grad_scale: Tensor | None = None,
    ) -> Tensor:
        clip = torch.full((1,), -1.0, dtype=torch.float64)
        work = Clip(norm.data_ptr(), max_norm, inv_scale, _address(grad_scale), clip.data_ptr())
        self.call("clip", work)
        return clip

    def scale(
        self, tensors: Sequence[Tensor], factor: float, factor_at: Tensor | None = None
    ) -> None:
        self.call("scale", Scale(_spans(tensors), len(tensors), factor, _address(factor_at)))

    def row_sums(self, a: Tensor, b: Tensor, n_rows: int, row_size: int, inner: int) -> Tensor:
        sums = torch.full((n_rows, 3), torch.nan, dtype=torch.float64)
        work = RowSums(
            *(a.data_ptr(), b.data_ptr(), DTYPES[a.dtype], n_rows, row_size, inner),
            sums.data_ptr(),
        )
        self.call("row_sums", work)
        return sums


def _live_group(values: Sequence[float | Tensor]) -> LiveGroup:
    group = LiveGroup()
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            group.raw[i] = float("nan")
            group.source[i] = value.data_ptr()
            group.is_double[i] = value.dtype == torch.float64
        else:
            group.raw[i] = value
    return group


def _spans(tensors: Sequence[Tensor]) -> "ctypes.Array[Structure]":
    return _array(Span, [Span(t.data_ptr(), t.numel(), DTYPES[t.dtype]) for t in tensors])
