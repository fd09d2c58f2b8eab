"""The emulated CUDA engine, built once and put back to its defaults after every test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated import Emulator, build


@pytest.fixture(scope="session")
def built() -> Emulator:
    """The library that PYOPTIM_EMULATOR_LIBRARY names, as the tests of the tests do, or ours."""
    path = os.environ.get("PYOPTIM_EMULATOR_LIBRARY")
    return Emulator(Path(path) if path else build())


@pytest.fixture
def emulator(built: Emulator) -> Iterator[Emulator]:
    yield built
    built.api.tune(0, 0)
    built.seed(0)
    built.library.pyoptim_emulator_fail_in(0)
