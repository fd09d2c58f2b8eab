"""What every test starts from: a fixed seed, and process-wide settings put back afterwards."""

import os
from collections.abc import Iterator

import pytest
import torch
from engines import GPU_ENGINES, running
from hypothesis import HealthCheck, settings

import pyoptim
from pyoptim import backend

# The same examples in every run; HYPOTHESIS_PROFILE=explore looks for new ones, many of them.
settings.register_profile(
    "default",
    max_examples=40,
    deadline=None,  # a shared machine stalls for longer than any useful limit
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore", settings.get_profile("default"), derandomize=False, max_examples=2000
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

NATIVE = backend.native()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "native: needs the compiled kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Of several workers none is to be left alone with a long test at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if NATIVE is not None:
        return
    skip = pytest.mark.skip(reason=f"pyoptim._C is missing: {backend.status()['cpu']}")
    for item in items:
        if item.get_closest_marker("native"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def process_settings() -> Iterator[None]:
    """Seeds torch, and restores threads, instruction set, way to tensors, backend and dtype."""
    torch.manual_seed(0)
    threads, dtype, choice = torch.get_num_threads(), torch.get_default_dtype(), backend.chosen()
    isa = NATIVE and NATIVE.active_isa()
    symbols = NATIVE and NATIVE.access_path() == "libtorch symbols"
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_flush_denormal(False)
    pyoptim.use_backend(choice)
    if NATIVE:
        NATIVE.set_isa(isa)
        if symbols and NATIVE.access_path() != "libtorch symbols":
            backend._use_symbols_if_sound(NATIVE)


@pytest.fixture(params=("cpu", *GPU_ENGINES))
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an engine, able to run."""
    if NATIVE is None:
        pytest.skip(f"pyoptim._C is missing: {backend.status()['cpu']}")
    with running(request.param) as name:
        yield name
