"""Which engines a process can test, and where their tensors are.

Without a GPU the CUDA engine's kernels run in the emulator, on tensors of the CPU. Triton's run in
its interpreter, which needs a process of its own: tests/test_triton.py starts it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pyoptim import backend

sys.path.append(str(Path(__file__).parent / "emulator"))

HAS_GPU = torch.cuda.is_available()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_ENGINES = ("cuda", "triton") if HAS_GPU else ("triton",) if IS_INTERPRETED else ("cuda",)
GPU = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


@contextmanager
def running(engine: str) -> Iterator[str]:
    """Has the engine update tensors of the CPU, or of `GPU`."""
    is_emulated = engine == "cuda" and not HAS_GPU
    if is_emulated:
        from emulated import build

        reason = backend.load_cuda_engine(build())
        assert reason is None, reason
    reason = backend.status()[engine]
    assert reason is None, reason
    try:
        yield engine
    finally:
        if is_emulated:
            backend.load_cuda_engine(None)
