"""SAM's benchmark compares what is the same, and the comparison of accuracies can be trusted."""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyoptim
from pyoptim.demo import Data

PACKAGE = "pyoptim.bench" if find_spec("pyoptim.bench") else "bench"
bench_sam: Any = import_module(f"{PACKAGE}.bench_sam")
accuracy: Any = import_module(f"{PACKAGE}.accuracy")
workloads: Any = import_module(f"{PACKAGE}.workloads")


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_the_official_form_makes_the_same_steps(adaptive: bool) -> None:
    def params() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        made = torch.randn(2, 30, dtype=torch.float64, generator=generator)
        return [row.clone().requires_grad_() for row in made]

    ours, theirs = params(), params()
    options = {"lr": 0.1, "momentum": 0.9}
    sam = pyoptim.SAM(ours, pyoptim.SGD, rho=0.3, adaptive=adaptive, **options)
    official = bench_sam.UnfusedSAM(torch.optim.SGD(theirs, **options), 0.3, adaptive)
    for _ in range(3):
        for optimizer, own in ((sam, ours), (official, theirs)):
            for step in (optimizer.first_step, optimizer.second_step):
                for p in own:
                    p.grad = p.detach().sin()
                step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0.0)


def test_a_row_has_what_the_table_shows(tmp_path: Path) -> None:
    out = tmp_path / "sam.json"
    arguments = ["--workloads", "3x40", "--bases", "adamw", "--reps", "3", "--seconds", "0"]
    threads = torch.get_num_threads()
    assert bench_sam.main([*arguments, "--out", str(out)]) == 0
    assert bench_sam.main([*arguments, "--adaptive", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    first, second = json.loads(out.read_text())
    assert [run["rows"][0]["adaptive"] for run in (first, second)] == [False, True]
    row = first["rows"][0]
    for name, of_one in row["seconds"].items():
        assert of_one["min"] > 0, name
    assert "adamw, 3 x 40 elements" in bench_sam.table([row])


@pytest.fixture
def data() -> Data:
    """Two easy classes of 2 x 2 pixels."""
    labels = torch.arange(300) % 2
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(300, 2, 2, generator=generator)
    images = noise + 2 * labels[:, None, None] * torch.eye(2)
    train = images[:200], labels[:200]
    return Data.normalized("two classes", train, (images[200:], labels[200:]))


def test_pixels_are_between_0_and_1(data: Data) -> None:
    images, labels, test_images, _ = accuracy.pixels(data)
    assert images.shape == (200, 4)
    assert len(labels) == 200
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert test_images.shape == (100, 4)


def test_trainings_do_not_influence_each_other(data: Data) -> None:
    together = accuracy.train(data, 2, 1e9, ["SAM", "Expectigrad"], every=1)
    alone = accuracy.train(data, 2, 1e9, ["Expectigrad"], every=1)
    assert together[1].epochs == alone[0].epochs == [1, 2]
    for p, q in zip(together[1].model.parameters(), alone[0].model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_accuracy_is_that_of_the_test_images(data: Data) -> None:
    class Right(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([1 - x[:, 0], x[:, 0]], 1)

    training = accuracy.Training("", Right(), None)
    images = torch.tensor([[0.9], [0.1], [0.8], [0.7]])
    training.evaluate(1, images, torch.tensor([1, 0, 1, 0]))
    assert training.accuracies == [0.75]


def test_a_training_ends_when_its_time_is_over(data: Data) -> None:
    trainings = accuracy.train(data, 100, 0.0, ["SGD"])
    assert trainings[0].epochs == [1]


def test_curves_of_other_optimizers_stay_in_the_file(data: Data, tmp_path: Path) -> None:
    out, settings = tmp_path / "accuracy.json", {"data": "x", "seed": 0}
    sgd, sam = (accuracy.train(data, 1, 1e9, [name], every=1) for name in ("SGD", "SAM"))
    accuracy.save(sgd, settings, out)
    assert list(accuracy.save(sam, settings, out)) == ["SAM", "SGD"]
    assert list(accuracy.save(sam, {**settings, "seed": 1}, out)) == ["SAM"]


def test_the_table_puts_the_reports_figures_beside_ours() -> None:
    curves = {"SAM": {10: 0.5, 15: 0.6}, "SGD": {10: 0.4}}
    lines = accuracy.table(curves).splitlines()
    assert lines[0] == "| epoch | SAM | SAM, report | SGD |"
    assert lines[2:] == ["| 10 | 0.500 | 0.41 | 0.400 |", "| 15 | 0.600 | - | - |"]


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"\['Sam'\] are none of SAM, AdamP"):
        accuracy.main(["--data", "digits", "--optimizers", "Sam"])
