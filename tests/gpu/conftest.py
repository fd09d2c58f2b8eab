"""The GPU engines in whole optimizers: on a GPU where there is one, else without.

Without a GPU the CUDA engine's kernels run in the emulator, on tensors of the CPU. Triton's run in
its interpreter, which needs a process of its own: tests/test_triton.py starts it.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pyoptim import backend

sys.path.append(str(Path(__file__).parents[1] / "emulator"))

HAS_GPU = torch.cuda.is_available()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


ENGINES = ("cuda", "triton") if HAS_GPU else ("triton",) if IS_INTERPRETED else ("cuda",)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


@pytest.fixture(scope="session")
def emulator() -> str:
    from emulated import build

    return str(build())


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an engine that can update tensors of `device`."""
    name: str = request.param
    is_emulated = name == "cuda" and not HAS_GPU
    if is_emulated:
        reason = backend.load_cuda_engine(request.getfixturevalue("emulator"))
        assert reason is None, reason
    assert backend.status()[name] is None, backend.status()[name]
    yield name
    if is_emulated:
        backend.load_cuda_engine(None)
