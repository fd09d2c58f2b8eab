"""The benchmark of CW-ERM: its tasks, its measures, and that it goes on where it was."""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyoptim.coreset import cwerm
from pyoptim.demo import Data

PACKAGE = "pyoptim.bench" if find_spec("pyoptim.bench") else "bench"
bench: Any = import_module(f"{PACKAGE}.bench_cwerm")
tasks: Any = import_module(f"{PACKAGE}.cwerm_tasks")


@pytest.fixture(autouse=True)
def one_thread(process_settings: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def data() -> Data:
    """Every image has its own number in its first pixel."""
    labels = torch.arange(1320) % 10
    images = torch.randn(1320, 8, 8, generator=torch.Generator().manual_seed(0)) / 100
    images[:, 1:] += labels[:, None, None] / 5
    images[:, 0, 0] = torch.arange(1320.0)
    return Data("numbers", images[:1200, None], labels[:1200], images[1200:, None], labels[1200:])


def numbers(x: Tensor) -> list[int]:
    return x[:, 0, 0, 0].long().tolist()


@pytest.mark.parametrize("setting", tasks.SETTINGS)
def test_no_image_is_in_two_parts_of_a_task(data: Data, setting: str) -> None:
    task = tasks.make_task(data, setting, 0, 600)
    parts = [numbers(p.tensors[0]) for p in (task.train, task.meta, task.validation, task.test)]
    together = [number for part in parts for number in part]
    assert len(together) == len(set(together))
    assert len(parts[2]) == 100
    for part, y in ((parts[0], task.true), (parts[1], task.meta.tensors[1])):
        assert y.tolist() == [number % 10 for number in part]
    # Trusted are equally many of each class.
    assert len(set(task.meta.tensors[1].bincount().tolist())) == 1


def test_noise_is_uniform_over_two_fifths_of_the_labels(data: Data) -> None:
    shares = []
    for seed in range(5):
        task = tasks.make_task(data, "noise", seed, 600)
        assert len(task.labels) == 600
        shares.append((task.labels != task.true).double().mean())
    # 0.36 expected: a tenth of the drawn labels are right; 4 deviations of 3000 draws are 0.035.
    assert abs(sum(shares) / 5 - 0.36) < 0.035


def test_imbalance_is_a_hundredfold() -> None:
    labels = torch.arange(20_000) % 10
    sizes = labels[tasks._is_kept(labels, 3000)].bincount()
    assert abs(int(sizes.sum()) - 3000) < 10
    assert abs(float(sizes[0] / sizes[9]) - 100) < 5
    assert (sizes[:-1] / sizes[1:]).sub(100 ** (1 / 9)).abs().max() < 0.1
    few = labels[tasks._is_kept(labels, 10**6)].bincount()  # no more than there are
    assert few[0] == 2000
    assert few[9] == 20


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (40,), generator=generator).double()
    is_positive = torch.rand(40, generator=generator) < 0.4
    pairs = scores[is_positive][:, None] - scores[~is_positive]
    expected = ((pairs > 0).double() + (pairs == 0).double() / 2).mean()
    assert bench.auc(scores, is_positive) == pytest.approx(float(expected))


def test_a_run_goes_on_where_it_was_and_reports(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "find_data", lambda folder: data)
    monkeypatch.setattr(cwerm, "HEAD_STEPS", 10)
    out = tmp_path / "cwerm.json"
    options = ["--out", str(out), "--samples", "300", "--epochs", "1", "--fractions", "0.1"]
    options += ["--features", "pixels", "--settings", "noise"]
    few = ["--methods", "erm", "cw-erm"]
    assert bench.main([*options, "--seeds", "1", *few]) == 0
    first = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in first] == ["erm", "cw-erm"]
    assert bench.main([*options, "--seeds", "1"]) == 0
    content = json.loads(out.read_text())
    assert content["rows"][:2] == first
    assert {row["method"] for row in content["rows"]} == set(bench.TITLES)
    assert len(content["rows"]) == len(bench.TITLES)
    for row in content["rows"]:
        assert 0 <= row["accuracy"] <= 100
        assert ("weights" in row) == (row["method"] not in ("erm", "random", "moderate"))
    for kind in ("accuracy", "minutes"):
        assert (tmp_path / f"cwerm-{kind}.png").stat().st_size > 1000
    assert "| CW-ERM (10 %) | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="use another --out"):
        bench.main([*options, "--validate"])


def test_the_table_has_means_deviations_and_the_cost_ratio() -> None:
    def row(method: str, seed: int, accuracy: float, **seconds: float) -> dict[str, Any]:
        has_weights = method != "erm"
        return {
            "setting": "noise",
            "seed": seed,
            "method": method,
            "fraction": 0.05 if method == "cw-erm" else None,
            "accuracy": accuracy,
            "seconds": seconds,
            **({"weights": [1.2, 0.6], "auc": 0.9} if has_weights else {}),
        }

    rows = [row("w-erm", 0, 82.0, reweight=60.0)]
    rows += [
        row("cw-erm", s, a, features=1.0, reweight=5.0, train=6.0)
        for s, a in ((0, 80.0), (1, 84.0))
    ]
    rows += [row("erm", 0, 81.0, train=6.0)]
    lines = bench.table(rows, "noise").splitlines()[2:]
    assert lines[0] == "| ERM | 1 | 81.00 | 0.100 | - | - | - | - |"
    assert lines[1].startswith("| W-ERM | 1 | 82.00 | 1.000 | 60.00 | 1.0 |")
    expected = "| CW-ERM (5 %) | 2 | 82.00 ± 2.83 | 0.200 ± 0.000 | 6.00 ± 0.00 | 10.0 |"
    assert lines[2] == f"{expected} 1.20 : 0.60 | 0.900 ± 0.000 |"
