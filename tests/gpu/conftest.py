"""The GPU engines in whole optimizers: on a GPU where there is one, else without."""

from collections.abc import Iterator

import pytest
import torch
from engines import GPU, GPU_ENGINES, running


@pytest.fixture(scope="session")
def device() -> torch.device:
    return GPU


@pytest.fixture(params=GPU_ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an engine that can update tensors of `device`."""
    with running(request.param) as name:
        yield name
