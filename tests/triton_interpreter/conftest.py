"""Tests of the Triton kernels on CPU tensors; `tests/test_triton.py` runs them in a process whose
environment has TRITON_INTERPRET=1, which counts only before the kernels are imported."""

import os

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if IS_INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreted block costs the same whatever its size: small ones make more of them."""
    from pyoptim.kernels import engine

    monkeypatch.setattr(engine, "BLOCK", 64)
    monkeypatch.setattr(engine, "CHUNK", 128)
