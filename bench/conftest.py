"""Lets `pytest bench` collect bench_*.py, which the tests' own settings do not name."""

import pytest


def pytest_collect_file(file_path, parent):  # type: ignore[no-untyped-def]
    is_benchmark = file_path.name.startswith("bench_") and file_path.suffix == ".py"
    if is_benchmark and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None
