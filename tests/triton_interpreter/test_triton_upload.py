"""Pinned memory for tables: none is allocated while a graph is captured."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyoptim.kernels import launcher


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what a CUDA machine would pin; a CPU has nothing to pin with."""
    sizes: list[int] = []
    empty = torch.empty

    def empty_pinned(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        sizes.append(size)
        return empty(size, dtype=dtype)

    def pin(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor.clone()

    monkeypatch.setattr(launcher.torch, "empty", empty_pinned)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return sizes


def test_a_capture_takes_what_a_step_before_it_left(allocations: list[int]) -> None:
    cache: dict[Any, Any] = {}
    source = torch.arange(5)
    assert launcher._pinned(cache, "rows", source, False).equal(source)
    assert allocations == [40, 40]
    first = launcher._pinned(cache, "rows", source + 1, True)
    assert first.equal(source + 1)
    assert allocations == [40, 40]
    # The graph owns what it took: the next step leaves another.
    launcher._pinned(cache, "rows", source, False)
    second = launcher._pinned(cache, "rows", source[:3], True)
    assert second.equal(source[:3])
    assert first.equal(source + 1)
    assert allocations == [40] * 4


def test_a_spare_that_is_too_small_is_replaced(allocations: list[int]) -> None:
    cache: dict[Any, Any] = {}
    launcher._pinned(cache, "rows", torch.arange(2), False)
    launcher._pinned(cache, "rows", torch.arange(6), False)
    allocations.clear()
    assert launcher._pinned(cache, "rows", torch.arange(6), True).equal(torch.arange(6))
    assert allocations == []
    launcher._pinned(cache, "rows", torch.arange(2), False)
    assert launcher._pinned(cache, "rows", torch.arange(6), True).equal(torch.arange(6))
    assert allocations == [16, 16, 48]
