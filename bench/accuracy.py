"""Accuracy per epoch of SAM, AdamP and Expectigrad, as in a student report that compared them.

    python -m pyoptim.bench.accuracy                  # Fashion-MNIST, 100 epochs, some minutes
    python -m pyoptim.bench.accuracy --data digits    # scikit-learn's digits

The report: Do, Tran, Le, Tran, "Toi uu hoa va ung dung" (University of Information Technology, Ho
Chi Minh City), table II: MNIST, 784 - 784 - 10 units, batch 128, learning rate 0.001, 100 epochs
over the 10,000 images of the test set, as its text says. Here the first 10,000 training images are
learnt, and the accuracy is that on the 10,000 test images. Dense layers start as Keras' do
(Glorot's uniform weights, no bias); the hidden layer is rectified; pixels are between 0 and 1: of
these the report says nothing. All trainings start from the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyoptim
from pyoptim.demo import DEBIAN_FOLDER, Data, load_digits, load_fashion_mnist

from . import machine
from .report import markdown_table

BATCH, LEARNING_RATE, EPOCHS, EVERY = 128, 1e-3, 100, 10
TRAIN_IMAGES = 10_000  # of the set that the report trained on
MakeOptimizer = Callable[[list[nn.Parameter]], Any]
Curves = dict[str, dict[int, float]]  # by optimizer: accuracy by epoch

# Table II of the report, by epoch.
REPORTED: dict[str, list[float]] = {
    "SAM": [0.41, 0.56, 0.63, 0.69, 0.74, 0.78, 0.79, 0.81, 0.81, 0.81],
    "AdamP": [0.11, 0.20, 0.32, 0.43, 0.50, 0.54, 0.58, 0.62, 0.64, 0.69],
    "Expectigrad": [0.89, 0.90, 0.90, 0.90, 0.90, 0.90, 0.90, 0.90, 0.90, 0.90],
}
# SGD, which is SAM's base, shows what of SAM's curve is due to the step length. Those that this
# version of pyoptim lacks are left out, and named.
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SAM": lambda params: pyoptim.SAM(params, pyoptim.SGD, lr=LEARNING_RATE),
    "AdamP": lambda params: _class("AdamP")(params, lr=LEARNING_RATE),
    "Expectigrad": lambda params: pyoptim.Expectigrad(params, lr=LEARNING_RATE),
    "SGD": lambda params: pyoptim.SGD(params, lr=LEARNING_RATE),
}
COLORS = {"SAM": "#D55E00", "AdamP": "#0072B2", "Expectigrad": "#009E73", "SGD": "#999999"}


def _class(name: str) -> Any:
    return getattr(pyoptim, name)


@dataclass
class Training:
    """One training, and its accuracy on the test images after each epoch of `epochs`."""

    name: str
    model: nn.Module
    optimizer: Any
    epochs: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> None:
        if isinstance(self.optimizer, pyoptim.SAM):
            self.optimizer.step(lambda: self.loss(images, labels))
            return
        self.optimizer.zero_grad()
        self.loss(images, labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(images), labels)

    @torch.no_grad()
    def evaluate(self, epoch: int, images: Tensor, labels: Tensor) -> None:
        self.epochs.append(epoch)
        right = self.model(images).argmax(1) == labels
        self.accuracies.append(right.double().mean().item())


def pixels(data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images as rows of numbers from 0 to 1, each with its labels."""
    low, high = data.train_images.min(), data.train_images.max()
    train, test = (
        ((images - low) / (high - low)).flatten(1)
        for images in (data.train_images, data.test_images)
    )
    n = min(TRAIN_IMAGES, len(train))
    return train[:n], data.train_labels[:n], test, data.test_labels


def make_model(n_pixels: int, seed: int) -> nn.Module:
    """As wide as the image, then 10 classes: 615,440 and 7,850 parameters for 28 x 28."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n_pixels, n_pixels), nn.ReLU(), nn.Linear(n_pixels, 10))
    for layer in (model[0], model[2]):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def train(
    data: Data,
    epochs: int,
    seconds: float,
    names: Sequence[str],
    seed: int = 0,
    every: int = EVERY,
) -> list[Training]:
    """Trains all side by side; ends early after an epoch at which `seconds` have passed."""
    images, labels, test_images, test_labels = pixels(data)
    trainings = []
    for name in names:
        model = make_model(images.shape[1], seed)
        trainings.append(Training(name, model, OPTIMIZERS[name](list(model.parameters()))))
    batches = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(images), generator=batches).split(BATCH):
            for training in trainings:
                training.step(images[batch], labels[batch])
        is_last = epoch == epochs or time.perf_counter() - started > seconds
        if epoch % every == 0 or is_last:
            for training in trainings:
                training.evaluate(epoch, test_images, test_labels)
        if is_last:
            break
    return trainings


def table(curves: Curves) -> str:
    """Ours beside the report's, one row per epoch at which anything was evaluated."""
    head = ["epoch"]
    for name in curves:
        head += [name, f"{name}, report"] if name in REPORTED else [name]
    rows = []
    for epoch in sorted({epoch for curve in curves.values() for epoch in curve}):
        row = [str(epoch)]
        for name, curve in curves.items():
            row.append(f"{curve[epoch]:.3f}" if epoch in curve else "-")
            row += [_reported(name, epoch)] if name in REPORTED else []
        rows.append(row)
    return markdown_table(head, rows)


def _reported(name: str, epoch: int) -> str:
    at, rest = divmod(epoch, EVERY)
    return f"{REPORTED[name][at - 1]:.2f}" if rest == 0 and at <= len(REPORTED[name]) else "-"


def plot(curves: Curves, data_name: str, path: Path) -> None:
    """Our accuracies as lines, the report's as dots of the same colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        color = COLORS[name]
        axes.plot(list(curve), list(curve.values()), color=color, marker=".", label=name)
        if name in REPORTED:
            epochs = [EVERY * (i + 1) for i in range(len(REPORTED[name]))]
            label = f"{name}, report (MNIST)"
            axes.plot(epochs, REPORTED[name], "o", mfc="none", color=color, label=label)
    axes.set(xlabel="epoch", ylabel="accuracy on the test images", title=data_name, ylim=(0, 1))
    axes.legend(frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    prog = "python -m pyoptim.bench.accuracy"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default=str(DEBIAN_FOLDER), help='folder of the set or "digits"')
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seconds", type=float, default=280.0, help="after which no epoch begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizers", help="comma-separated, of " + ", ".join(OPTIMIZERS))
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("accuracy.json"),
        help="beside it a .png is drawn; curves of other optimizers that it has stay",
    )
    arguments = parser.parse_args(argv)
    data = load_digits() if arguments.data == "digits" else load_fashion_mnist(Path(arguments.data))
    names = _available((arguments.optimizers or ",".join(OPTIMIZERS)).split(","))
    trainings = train(data, arguments.epochs, arguments.seconds, names, arguments.seed)
    settings = {"data": data.name, "batch": BATCH, "lr": LEARNING_RATE, "seed": arguments.seed}
    curves = save(trainings, settings, arguments.out)
    plot(curves, data.name, arguments.out.with_suffix(".png"))
    print(table(curves))
    if trainings[0].epochs[-1] < arguments.epochs:
        print(f"stopped after {trainings[0].epochs[-1]} epochs; --seconds allows more")
    return 0


def _available(names: Sequence[str]) -> list[str]:
    """Raises: SystemExit for a name that is not an optimizer of the comparison."""
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown:
        raise SystemExit(f"accuracy: {unknown} are none of {', '.join(OPTIMIZERS)}")
    for name in names:
        if not hasattr(pyoptim, name):
            print(f"this version of pyoptim has no {name}", file=sys.stderr)
    return [name for name in names if hasattr(pyoptim, name)]


def save(trainings: Sequence[Training], settings: dict[str, Any], path: Path) -> Curves:
    """Puts the curves into the file, beside those that were made there with the same settings."""
    former = json.loads(path.read_text()) if path.exists() else {}
    is_same = all(former.get(name) == value for name, value in settings.items())
    curves: dict[str, Any] = former.get("accuracies", {}) if is_same else {}
    curves |= {t.name: dict(zip(map(str, t.epochs), t.accuracies, strict=True)) for t in trainings}
    curves = {name: curves[name] for name in OPTIMIZERS if name in curves}
    versions = machine.describe_versions()
    content = {**settings, "versions": versions, "accuracies": curves, "reported": REPORTED}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return {name: {int(e): a for e, a in of_one.items()} for name, of_one in curves.items()}


if __name__ == "__main__":
    sys.exit(main())
