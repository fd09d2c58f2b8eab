"""The benchmark of line searches measures what is the same."""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import give_grads, parameters

from pyoptim.line_search.fused import FusedDirection

PACKAGE = "pyoptim.bench" if find_spec("pyoptim.bench") else "bench"
bench: Any = import_module(f"{PACKAGE}.bench_line_search")
pytestmark = pytest.mark.native


def test_the_released_program_makes_the_same_trials() -> None:
    shapes = [(9,), (20, 3)]
    ours, theirs = (parameters(shapes, torch.float64) for _ in range(2))
    owner = bench.Owner(ours)
    owner.param_groups[0]["bias_offset"] = 1
    direction, released = FusedDirection(owner), bench.ReleasedSaLSa(theirs)
    for seed in range(3):
        give_grads(ours, seed)
        give_grads(theirs, seed)
        slope = direction.start(bench.ETA)
        direction.trial(bench.ETA * 0.8)
        direction.accept()
        norm = released.searched_step(2)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0.0)
        assert norm == pytest.approx(slope.item(), rel=1e-6)


def test_a_row_has_what_the_table_shows(tmp_path: Path) -> None:
    out = tmp_path / "line-search.json"
    arguments = ["--workloads", "3x40", "--reps", "3", "--seconds", "0", "--out", str(out)]
    threads = torch.get_num_threads()
    assert bench.main(arguments) == 0
    assert bench.main(arguments) == 0
    assert torch.get_num_threads() == threads
    _, run = json.loads(out.read_text())
    row = run["rows"][0]
    for name, of_one in row["seconds"].items():
        assert of_one["min"] > 0, name
    assert set(row["over_loop"]) == {"start", "trial", "finish", "plain"}
    assert "finish, 3 x 40 elements" in bench.table([row])
