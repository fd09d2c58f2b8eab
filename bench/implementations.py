"""The implementations that are compared, as one table: torch's own three, compiled, pyoptim's."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .bytes import COSTS, DtypeSet

Optimizer = torch.optim.Optimizer
# Before a capture: the state exists, and so does what the libraries allocate once.
WARM_UP_STEPS = 3

# What COSTS counts must be what runs: one row here per row there.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {}),
    "sgd-momentum": ("SGD", {"momentum": 0.9}),
    "adam": ("Adam", {}),
    "adam-amsgrad": ("Adam", {"amsgrad": True}),
    "adamw": ("AdamW", {}),
    "rmsprop": ("RMSprop", {}),
    "rmsprop-momentum": ("RMSprop", {"momentum": 0.9}),
    "rmsprop-centered": ("RMSprop", {"centered": True}),
    "rmsprop-centered-momentum": ("RMSprop", {"centered": True, "momentum": 0.9}),
    "adagrad": ("Adagrad", {}),
    "expectigrad": ("Expectigrad", {}),
    "expectigrad-dense": ("Expectigrad", {"sparse_counter": False}),
    # With fixed gradients hardly any step is projected; with this delta every one is, by rows, and
    # with the next one, where nothing moves, most are as a whole.
    "adamp": ("AdamP", {}),
    "adamp-channel": ("AdamP", {"delta": 1e6}),
    "adamp-layer": ("AdamP", {"delta": 2.0, "lr": 0.0}),
    "sgdp": ("SGDP", {"lr": 1e-3, "momentum": 0.9}),
    "sgdp-channel": ("SGDP", {"lr": 1e-3, "momentum": 0.9, "delta": 1e6}),
}
# What a projection costs is seen beside the optimizer without it.
WITHOUT_PROJECTION = {
    "adamp": "adamw",
    "adamp-channel": "adamw",
    "adamp-layer": "adamw",
    "sgdp": "sgd-momentum",
    "sgdp-channel": "sgd-momentum",
}


@dataclass(frozen=True)
class Implementation:
    """One way to run an optimizer.

    Args:
        package: module that holds the optimizer classes.
        options: constructor arguments that select the implementation.
        is_compiled: the step goes through torch.compile.
        is_graph: the step is captured in a CUDA graph once and replayed.
        device: the only device it runs on; None: on every one.
        has_state_dtype: states can have another dtype than the parameter.
        instead: rows of OPTIMIZERS that it runs in the place of others, the only ones it can.
    """

    name: str
    package: str
    options: dict[str, Any] = field(default_factory=dict)
    is_compiled: bool = False
    is_graph: bool = False
    device: str | None = None
    has_state_dtype: bool = False
    instead: dict[str, str] = field(default_factory=dict)

    def runs(self, optimizer: str) -> tuple[str, dict[str, Any]]:
        """Returns the class and the options that run for a row of OPTIMIZERS."""
        return OPTIMIZERS[self.instead.get(optimizer, optimizer)]


IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        Implementation("torch-for-loop", "torch.optim", {"foreach": False}),
        Implementation("torch-foreach", "torch.optim", {"foreach": True}),
        Implementation("torch-fused", "torch.optim", {"fused": True}),
        Implementation("torch-compiled", "torch.optim", {"foreach": True}, is_compiled=True),
        Implementation(
            "torch-fused-graph",
            "torch.optim",
            {"fused": True, "capturable": True},
            is_graph=True,
            device="cuda",
        ),
        Implementation(
            "pyoptim", "pyoptim", {"backend": "cpu"}, device="cpu", has_state_dtype=True
        ),
        Implementation(
            "pyoptim-cuda", "pyoptim", {"backend": "cuda"}, device="cuda", has_state_dtype=True
        ),
        Implementation(
            "pyoptim-triton", "pyoptim", {"backend": "triton"}, device="cuda", has_state_dtype=True
        ),
        Implementation(
            "pyoptim-cuda-graph",
            "pyoptim",
            {"backend": "cuda", "capturable": True},
            is_graph=True,
            device="cuda",
            has_state_dtype=True,
        ),
        Implementation(
            "without-projection",
            "pyoptim",
            {"backend": "cpu"},
            device="cpu",
            has_state_dtype=True,
            instead=WITHOUT_PROJECTION,
        ),
        Implementation("authors-expectigrad", "expectigrad.pytorch"),
        Implementation("authors-adamp", "adamp"),
        Implementation("reference", "pyoptim", {"backend": "reference"}, has_state_dtype=True),
    )
}
DEFAULT_IMPLEMENTATIONS = ("torch-for-loop", "torch-foreach", "torch-fused", "pyoptim")
DEFAULT_ON_CUDA = (*DEFAULT_IMPLEMENTATIONS[:3], "pyoptim-cuda", "pyoptim-triton")


def why_not(
    implementation: Implementation, optimizer: str, dtypes: DtypeSet, device: str = "cpu"
) -> str | None:
    """The reason why a combination cannot be measured here, or None if it can."""
    if implementation.device not in (None, device):
        return f"{implementation.name} steps {implementation.device} tensors only"
    if implementation.instead and optimizer not in implementation.instead:
        return f"{optimizer} projects nothing"
    class_name, _ = implementation.runs(optimizer)
    try:
        package = importlib.import_module(implementation.package)
    except ImportError as error:
        return f"cannot import {implementation.package}: {error}"
    found = getattr(package, class_name, None)
    if found is None:
        return f"{implementation.package} has no {class_name}"
    if "fused" in implementation.options and "fused" not in inspect.signature(found).parameters:
        return f"torch.optim.{class_name} has no fused implementation"
    is_half_sgd = class_name == "SGD" and dtypes.param.itemsize == 2
    if "fused" in implementation.options and is_half_sgd and device == "cpu":
        # It would also ruin the parameters for everyone measured beside it.
        return f"torch's fused SGD computes wrong values in {dtypes} on the CPU (torch 2.13)"
    if dtypes.has_own_state_dtype and not implementation.has_state_dtype:
        return f"{implementation.package} keeps states in the parameter's dtype, so not in {dtypes}"
    is_too_narrow = COSTS[optimizer].is_state_wide and dtypes.state.itemsize < 4
    if is_too_narrow and implementation.has_state_dtype:
        param = DtypeSet(dtypes.param, dtypes.param)
        return f"pyoptim.{class_name} keeps states in float32; measure it in {param}+float32"
    if implementation.is_compiled:
        return _why_no_compile()
    return _why_no_backend(package, implementation.options.get("backend"))


def make_optimizer(
    implementation: Implementation,
    optimizer: str,
    dtypes: DtypeSet,
    params: list[torch.Tensor],
) -> Optimizer:
    """An optimizer of its own over shared parameters and gradients."""
    class_name, options = implementation.runs(optimizer)
    options = options | implementation.options
    if dtypes.has_own_state_dtype:
        options["state_dtype"] = dtypes.state
    found = getattr(importlib.import_module(implementation.package), class_name)
    if implementation.is_graph and "capturable" not in inspect.signature(found).parameters:
        del options["capturable"]  # nothing of its step depends on a counter
    return found(params, **options)  # type: ignore[no-any-return]


def make_step(implementation: Implementation, optimizer: Optimizer) -> Callable[[], object]:
    """What one step calls; compiled as torch's tutorial on compiled optimizers writes it."""
    if implementation.is_graph:
        for _ in range(WARM_UP_STEPS):
            optimizer.step()
        return capture(optimizer.step)
    if not implementation.is_compiled:
        return optimizer.step

    @torch.compile(fullgraph=False)
    def compiled_step() -> None:
        optimizer.step()

    return compiled_step


def capture(step: Callable[[], object]) -> Callable[[], object]:
    """Returns what replays a graph of one step, which must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Let a step be compiled from nothing, so that compile time is not that of a cache."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    previous = os.environ.get(variable)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[variable] = folder
        torch.compiler.reset()
        try:
            yield
        finally:
            torch.compiler.reset()
            os.environ.pop(variable)
            if previous is not None:
                os.environ[variable] = previous


def _why_no_compile() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        return f"torch.compile needs a C++ compiler; neither {compiler} nor clang++ was found"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "torch.compile needs Python.h; install the Python development package"
    return None


def _why_no_backend(package: ModuleType, backend: str | None) -> str | None:
    if backend is None:
        return None
    status = importlib.import_module(f"{package.__name__}.backend").status()
    reason = status[backend]
    return f"pyoptim's backend {backend!r} cannot run here: {reason}" if reason else None
