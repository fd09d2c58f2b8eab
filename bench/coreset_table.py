"""CW-ERM's table on Fashion-MNIST: `python -m pyoptim.bench.coreset_table --out FOLDER`.

Five ways to train a small convolutional network on labels of which 40 % are wrong ("noise") or on
classes whose sizes fall by a factor of 100 ("imbalance"): ERM, weighted ERM with Meta-Weight-Net on
everything, a random and a moderate coreset of 1 %, and CW-ERM. Writes results.json after every
training, table.md, accuracy.png and minutes.png. An interrupted run goes on where it was, also in
the middle of a training; finished rows are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pyoptim
from pyoptim import coreset
from pyoptim.coreset import CWERM, Training
from pyoptim.demo import DEBIAN_FOLDER, Data, load_fashion_mnist

SETTINGS = ("noise", "imbalance")
NOISE, IMBALANCE = 0.4, 100.0
CLASSES = 10
# Trusted samples per class, taken out of the training set: as Meta-Weight-Net's official code.
META_PER_CLASS = {"noise": 100, "imbalance": 10}
TITLES = {
    "erm": "ERM",
    "w-erm": "W-ERM (everything)",
    "random": "random coreset",
    "moderate": "moderate coreset",
    "cw-erm": "CW-ERM",
}


@dataclass(frozen=True)
class Scale:
    """How much is computed; results of different scales are not mixed."""

    samples: int = 60_000
    epochs: int = 10
    coreset_epochs: int = 60
    fraction: float = 0.01
    features: str = "autoencoder"
    readout: str = "average"
    same_class: bool = True
    # Of the reweighting on the coreset; W-ERM keeps the official code's: lr 0.1, meta lr 1e-3,
    # weights divided by n, no warm-up. With those, weights learnt on 200 samples stayed between
    # 0.96 and 1.02 of their mean; with meta lr 1e-2, V grew with the loss and went to 1. Seen in
    # short single runs.
    meta_lr: float = 2e-3
    normalize: str = "sum"
    coreset_lr: float = 0.01
    warmup: float = 0.33

    def meta_options(self, samples: int) -> dict[str, Any]:
        """Arguments of the MetaReweighter on a coreset."""

        def make_adam(params: Any) -> pyoptim.Adam:
            return pyoptim.Adam(params, lr=self.meta_lr, weight_decay=1e-4)

        steps = self.coreset_epochs * -(-samples // Training.batch_size)
        warmup = round(self.warmup * steps)
        return {"meta_optimizer": make_adam, "normalize": self.normalize, "warmup": warmup}

    def make_coreset_sgd(self, params: Any) -> pyoptim.SGD:
        """The paper's optimizer, with the lr of the reweighting stage."""
        return pyoptim.SGD(params, lr=self.coreset_lr, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Task:
    """One training set, its trusted samples, and the test set."""

    train: TensorDataset
    labels: Tensor
    meta: TensorDataset
    test: TensorDataset


# -- data ------------------------------------------------------------------------------------------


def make_task(data: Data, setting: str, seed: int, samples: int) -> Task:
    """Splits off the meta set, then spoils the rest: wrong labels, or classes with few samples."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train_labels), generator=generator)
    labels = data.train_labels[order]
    rank = torch.zeros_like(labels)  # the how-manieth of its class
    for c in range(CLASSES):
        rank[labels == c] = torch.arange(int((labels == c).sum()))
    is_meta = rank < META_PER_CLASS[setting]
    kept = (~is_meta).nonzero().squeeze(1)[:samples]
    if setting == "imbalance":
        kept = kept[_is_in_tail(labels[kept])]
    train_labels = labels[kept]
    if setting == "noise":
        is_drawn = torch.rand(len(kept), generator=generator) < NOISE
        drawn = torch.randint(CLASSES, (len(kept),), generator=generator)
        train_labels = torch.where(is_drawn, drawn, train_labels)
    return Task(
        TensorDataset(data.train_images[order[kept]], train_labels),
        train_labels,
        TensorDataset(data.train_images[order[is_meta]], labels[is_meta]),
        TensorDataset(data.test_images, data.test_labels),
    )


def _is_in_tail(labels: Tensor) -> Tensor:
    """Keeps n * IMBALANCE^(-c/9) of class c, the first ones."""
    largest = int(labels.bincount(minlength=CLASSES).max())
    is_kept = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(CLASSES):
        size = max(1, round(largest * IMBALANCE ** (-c / (CLASSES - 1))))
        is_kept[(labels == c).nonzero().squeeze(1)[:size]] = True
    return is_kept


def make_network(channels: int = 1, classes: int = CLASSES) -> nn.Module:
    """Three convolutions with BatchNorm, images of any size to their classes."""
    layers: list[nn.Module] = []
    for i, o, stride in ((channels, 16, 2), (16, 32, 2), (32, 64, 1)):
        layers += [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, classes))


class AutoEncoder(nn.Module):
    """784 - 256 - 64 - 256 - 784; it sees no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 64)
        )
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 784))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.encoder(x))
        return out


def make_features(task: Task, kind: str, seed: int) -> Tensor:
    """[n, 784] pixels, or [n, 64] codes of an auto-encoder trained for three epochs."""
    images = task.train.tensors[0]
    if kind == "pixels":
        return images.flatten(1)
    training = Training(
        AutoEncoder,
        lambda params: pyoptim.Adam(params, lr=1e-3),
        epochs=3,
        loss_fn=lambda out, target: (out - target.flatten(1)).square().mean(1),
        seed=seed,
        progress=False,
    )
    model = coreset.train_weighted(TensorDataset(images, images), training)
    features = coreset.extract_features(model, images, layer="encoder", progress=False)
    return features.features


# -- methods ---------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Share of right predictions in evaluation mode, in percent."""
    model.eval()
    images, labels = test.tensors
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return 100.0 * right / len(labels)


def train(task: Task, method: str, scale: Scale, seed: int, work: Path) -> dict[str, Any]:
    """Trains by one method; returns its accuracy, seconds per stage, and what else is of interest.

    Seconds do not count what an interrupted run had spent, except for CW-ERM's stages.
    """
    full = Training(make_network, epochs=scale.epochs, seed=seed, progress=False)
    small = replace(full, epochs=scale.coreset_epochs)
    seconds: dict[str, float] = {}
    extra: dict[str, Any] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        seconds[name] = time.perf_counter() - start
        return result

    if method == "erm":
        file = work / "erm.pt"
        model = timed("train", lambda: coreset.train_weighted(task.train, full, checkpoint=file))
    elif method == "w-erm":
        learn = lambda: coreset.learn_weights(  # noqa: E731
            task.train,
            task.labels,
            full,
            meta=task.meta,
            checkpoint=work / "w-erm.pt",
        )
        _, model = timed("reweight", learn)
    elif method == "cw-erm":
        features = timed("features", lambda: make_features(task, scale.features, seed))
        pipeline = CWERM(
            full,
            replace(small, make_optimizer=scale.make_coreset_sgd),
            fraction=scale.fraction,
            meta_options=scale.meta_options(round(scale.fraction * len(task.labels))),
            readout=scale.readout,
            same_class=scale.same_class,
            directory=work / "cw-erm",
        )
        result = pipeline.fit(task.train, features, task.labels, task.meta)
        seconds.update(result.seconds)
        model, extra["weights"] = result.model, _quantiles(result.weights)
    else:
        model = _train_on_coreset(task, method, scale, small, work, timed)
    return {"accuracy": accuracy(model, task.test), "seconds": seconds, **extra}


def _train_on_coreset(
    task: Task,
    method: str,
    scale: Scale,
    training: Training,
    work: Path,
    timed: Callable[[str, Callable[[], Any]], Any],
) -> nn.Module:
    options: dict[str, Any] = {"scope": "class", "fraction": scale.fraction}
    data = task.train.tensors[0]
    if method == "moderate":
        data = timed("features", lambda: make_features(task, scale.features, training.seed))
    else:
        options["generator"] = torch.Generator().manual_seed(training.seed)
    chosen = timed("select", lambda: coreset.select(data, task.labels, method=method, **options))
    file = work / f"{method}.pt"
    model: nn.Module = timed(
        "train",
        lambda: coreset.train_weighted(
            task.train, training, indices=chosen.indices, checkpoint=file
        ),
    )
    return model


def _quantiles(weights: Tensor) -> list[float]:
    """Minimum, quartiles and maximum."""
    return weights.quantile(torch.linspace(0, 1, 5, dtype=weights.dtype)).tolist()


# -- results ---------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace, scale: Scale) -> list[dict[str, Any]]:
    """Runs what results.json does not hold yet, row by row."""
    file = arguments.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    data = load_fashion_mnist(arguments.data)
    for seed in range(arguments.seeds):
        for setting in arguments.settings:
            task = make_task(data, setting, seed, scale.samples)
            for method in arguments.methods:
                key = {"setting": setting, "seed": seed, "method": method, "scale": vars(scale)}
                if any(all(row[k] == v for k, v in key.items()) for row in rows):
                    continue
                # Named after the scale, so that no run goes on where another one was.
                of_scale = f"{zlib.crc32(repr(scale).encode()):08x}"
                work = arguments.out / "work" / f"{setting}-{seed}-{method}-{of_scale}"
                row = {**key, **train(task, method, scale, seed, work)}
                rows.append(row)
                _write(file, json.dumps(rows, indent=1))
                shutil.rmtree(work, ignore_errors=True)
                minutes = sum(row["seconds"].values()) / 60
                print(
                    f"{setting}, seed {seed}, {TITLES[method]}: {row['accuracy']:.2f} %, "
                    f"{minutes:.2f} min",
                    file=sys.stderr,
                    flush=True,
                )
    shutil.rmtree(arguments.out / "work", ignore_errors=True)
    return [row for row in rows if row["scale"] == vars(scale)]


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(rows: Sequence[dict[str, Any]], scale: Scale) -> str:
    """One line per setting and method, with the ratios that the goals are about."""
    lines = [
        f"{scale.samples} samples at most, {scale.epochs} epochs ({scale.coreset_epochs} on a "
        f"coreset), fraction {scale.fraction}, features: {scale.features}, readout: "
        f"{scale.readout}, same_class: {scale.same_class}, on the coreset: meta lr "
        f"{scale.meta_lr}, weights divided by {scale.normalize}, lr {scale.coreset_lr}, "
        f"warm-up {scale.warmup} of the steps; "
        f"torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads.",
        "",
        "| setting | method | seeds | accuracy % | minutes | x ERM | reweighting min |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for setting in SETTINGS:
        base = [_minutes(row) for row in rows if _is(row, setting, "erm")]
        for method, title in TITLES.items():
            own = [row for row in rows if _is(row, setting, method)]
            if not own:
                continue
            minutes = [_minutes(row) for row in own]
            ratio = f"{statistics.mean(minutes) / statistics.mean(base):.2f}" if base else "-"
            weighing = [r["seconds"]["reweight"] / 60 for r in own if "reweight" in r["seconds"]]
            lines.append(
                f"| {setting} | {title} | {len(own)} | {spread([r['accuracy'] for r in own], 2)} "
                f"| {spread(minutes, 2)} | {ratio} | {spread(weighing, 2) if weighing else '-'} |"
            )
    return "\n".join(lines)


def _is(row: dict[str, Any], setting: str, method: str) -> bool:
    return bool(row["setting"] == setting and row["method"] == method)


def _minutes(row: dict[str, Any]) -> float:
    return float(sum(row["seconds"].values())) / 60


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """accuracy.png: every seed as a dot; minutes.png: the stages stacked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = [s for s in SETTINGS if any(row["setting"] == s for row in rows)]
    figure, axes = pyplot.subplots(
        1, len(settings), figsize=(5 * len(settings), 3.5), squeeze=False
    )
    timing, panels = pyplot.subplots(
        1, len(settings), figsize=(5 * len(settings), 3.5), squeeze=False
    )
    for setting, axis, panel in zip(settings, axes[0], panels[0], strict=True):
        methods = [m for m in TITLES if any(_is(row, setting, m) for row in rows)]
        for at, method in enumerate(methods):
            own = [row for row in rows if _is(row, setting, method)]
            axis.plot([at] * len(own), [row["accuracy"] for row in own], "o", alpha=0.6)
            _stack(panel, at, [row["seconds"] for row in own])
        for one, label in ((axis, "accuracy %"), (panel, "minutes")):
            one.set_xticks(
                range(len(methods)), [TITLES[m] for m in methods], rotation=25, ha="right"
            )
            one.set_ylabel(label)
            one.set_title(setting)
        panel.legend(*_legend(panel), fontsize="small")
    for picture, name in ((figure, "accuracy"), (timing, "minutes")):
        picture.tight_layout()
        picture.savefig(out / f"{name}.png", dpi=120)
        pyplot.close(picture)


COLORS = {
    "features": "#999999",
    "select": "#56B4E9",
    "reweight": "#D55E00",
    "broadcast": "#009E73",
    "train": "#0072B2",
}


def _stack(panel: Any, at: int, runs: Sequence[dict[str, float]]) -> None:
    bottom = 0.0
    for stage, color in COLORS.items():
        height = statistics.mean(run.get(stage, 0.0) for run in runs) / 60
        panel.bar(at, height, bottom=bottom, color=color, label=stage)
        bottom += height


def _legend(panel: Any) -> tuple[list[Any], list[str]]:
    handles, labels = panel.get_legend_handles_labels()
    first = {label: handle for handle, label in zip(handles[::-1], labels[::-1], strict=True)}
    return list(first.values()), list(first)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Scale]:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pyoptim.bench.coreset_table", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results, also to go on")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="the four .gz files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--methods", nargs="+", choices=tuple(TITLES), default=tuple(TITLES))
    default = Scale()
    for name in ("samples", "epochs", "coreset-epochs"):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    for name in ("fraction", "meta-lr", "coreset-lr", "warmup"):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=value, help=f"default {value}")
    parser.add_argument("--normalize", choices=("n", "sum"), default=default.normalize)
    parser.add_argument("--features", choices=("autoencoder", "pixels"), default=default.features)
    parser.add_argument("--readout", choices=("average", "last"), default=default.readout)
    parser.add_argument("--any-class", action="store_true", help="neighbours of any label")
    found = parser.parse_args(argv)
    if found.seeds < 1 or not math.isfinite(found.fraction):
        parser.error("--seeds must be at least 1 and --fraction finite")
    return found, Scale(
        found.samples,
        found.epochs,
        found.coreset_epochs,
        found.fraction,
        found.features,
        found.readout,
        not found.any_class,
        found.meta_lr,
        found.normalize,
        found.coreset_lr,
        found.warmup,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, and writes the table and the pictures."""
    arguments, scale = parse(argv)
    rows = run(arguments, scale)
    text = table(rows, scale)
    _write(arguments.out / "table.md", text + "\n")
    plot(rows, arguments.out)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
