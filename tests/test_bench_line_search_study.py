"""The comparison of line searches: its tasks, that it resumes, its tables."""

import json
from pathlib import Path

import pytest
import torch

from pyoptim.bench.arc.results import Results
from pyoptim.bench.line_search import methods, overhead, report, runner, stacked, tasks, train
from pyoptim.bench.line_search.tasks import TASKS
from pyoptim.bench.study.data import Data

FEW = ("SaLSa", "SLS", "Adam, tuned, cosine")


def tiny_table() -> Data:
    x = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))
    part = (x, (x[:, 0] > 0).float())
    return Data("tiny", part, part, part, inputs=5, outputs=1, batch=16)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load", lambda name: tiny_table())
    monkeypatch.setattr(overhead, "load", lambda name: tiny_table())
    monkeypatch.setattr(stacked, "load", lambda name: tiny_table())


def run(results: Results, seeds: int = 1) -> None:
    runner.study(["table"], FEW, seeds, results, workers=1)


@pytest.mark.usefixtures("tiny")
def test_finished_rows_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Results(tmp_path / "rows.json"))
    monkeypatch.setattr(runner, "tune", None)
    run(Results(tmp_path / "rows.json"), seeds=2)
    assert "runs: 3 of 6 are there" in capsys.readouterr().out
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found["rates"]) == 1
    assert len(found["runs"]) == 6
    assert all(
        len(row["curve"]["loss"]) == len(row["curve"]["step"]) for row in found["runs"].values()
    )


@pytest.mark.usefixtures("tiny")
def test_tables_and_plot_show_every_method(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.json")
    run(results)
    results.once("overhead", "images | SaLSa | 0", lambda: overhead.measure("table", "SaLSa", 0))
    text = report.report(results.sections)
    assert all(f"| {name} |" in text for name in FEW)
    assert "beyond the same training" in text
    assert report.draw(results.sections, tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.usefixtures("tiny")
def test_stacked_trials_have_the_losses_of_one_by_one(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.json")
    row = results.once("stacked", "images | 3", lambda: stacked.measure("table", 3))
    assert row["share"] > 0
    assert "| images | 3 |" in report.report(results.sections)
    found = tiny_table()
    network = TASKS["table"].network(found)
    ways = (stacked.one_by_one, stacked.at_once)
    alone, together = (way(network, TASKS["table"], *found.train, 3)() for way in ways)
    assert together.shape == (3,)
    torch.testing.assert_close(alone, together)


def test_a_diverged_training_is_named() -> None:
    assert report._mean_and_deviation([0.5, 1e30]) == "diverged in 1 of 2"


def test_tuning_takes_the_lowest_validation_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load", lambda name: tiny_table())
    row = train.tune("table", "SGD, tuned")
    assert row["tried"][f"{row['rate']:g}"] == min(row["tried"].values())
    assert len(row["tried"]) == len(methods.SGD_RATES) >= 5


@pytest.mark.parametrize("name", ["text", "sequences"])
def test_a_text_task_has_a_loss_and_a_metric_of_its_network(name: str) -> None:
    task, found = TASKS[name], tasks.load(name)
    x, y = (part[:4] for part in found.train)
    outputs = task.network(found)(x)
    assert outputs.shape[:-1] == y.shape == (4, tasks.LENGTH)
    assert task.loss(outputs, y).isfinite()
    assert 0 <= task.metric(outputs, y) <= 1


def test_next_characters_are_those_one_place_later() -> None:
    x, y = tasks.next_characters().test
    assert torch.equal(x[:, 1:], y[:, :-1])
