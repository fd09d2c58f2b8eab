"""CW-ERM's table on real data: `python -m pyoptim.bench.bench_cwerm --out FILE.json`.

A small convolutional network learns Fashion-MNIST with 40 % of the labels drawn at random ("noise")
or with class sizes that fall by a factor of 100 ("imbalance"): by plain training (ERM), weighted
with Meta-Weight-Net on everything (W-ERM), on a random or moderate coreset only, and with CW-ERM.
The file is written after every training and an interrupted run goes on there; beside it two
pictures are drawn. Times are those of the CPU, so a busy machine does not count.

The choices of CW-ERM were made with `--validate`, which measures on training images that are held
out; the test images are for the table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pyoptim import coreset
from pyoptim.coreset import CWERM, Training
from pyoptim.demo import find_data, load_digits

from . import machine
from .cwerm_tasks import SETTINGS, Task, make_features, make_network, make_task
from .report import markdown_table

PROGRAM = "python -m pyoptim.bench.bench_cwerm"
TITLES = {
    "erm": "ERM",
    "w-erm": "W-ERM",
    "random": "random coreset only",
    "moderate": "moderate coreset only",
    "cw-erm": "CW-ERM",
    "cw-erm-random": "CW-ERM, random coreset",
    "cw-erm-network": "CW-ERM, weights learnt by the network",
}
ON_EVERYTHING = ("erm", "w-erm")
COLORS = {
    "features": "#999999",
    "select": "#56B4E9",
    "reweight": "#D55E00",
    "broadcast": "#009E73",
    "train": "#0072B2",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is computed, and by which settings; a file holds results of one scale."""

    data: str = "Fashion-MNIST"
    samples: int = 10_000
    epochs: int = 10
    features: str = "autoencoder"
    neighbors: int = 1
    on_validation: bool = False


Features = dict[Task, tuple[tuple[Tensor, Tensor], float]]  # of a task: features and CPU seconds


# -- one training ----------------------------------------------------------------------------------


@dataclass
class Run:
    """One method on one task: its accuracy, CPU seconds of its stages, and the weights it gave."""

    task: Task
    scale: Scale
    seed: int
    fraction: float
    features_of: Features
    seconds: dict[str, float] = field(default_factory=dict)
    weights: Tensor | None = None

    def timed(self, name: str, run: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = run()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start
        return result

    @property
    def training(self) -> Training:
        """The paper's SGD with a cosine; every epoch sees all images."""
        side = self.task.images.shape[-1]
        epochs = self.scale.epochs
        return Training(lambda: make_network(side), epochs=epochs, seed=self.seed, progress=False)

    @property
    def on_coreset(self) -> Training:
        """Half as many steps as ERM, as the minutes of the paper's table suggest."""
        training = self.training
        epochs = max(1, round(0.5 * training.epochs / self.fraction))
        return replace(training, epochs=epochs)

    def erm(self) -> nn.Module:
        return self.timed("train", lambda: coreset.train_weighted(self.task.train, self.training))

    def w_erm(self) -> nn.Module:
        """Meta-Weight-Net as its official code for noisy labels has it, on everything."""
        task = self.task
        self.weights, model = self.timed(
            "reweight",
            lambda: coreset.learn_weights(task.train, task.labels, self.training, meta=task.meta),
        )
        return model

    def coreset_only(self, method: str) -> nn.Module:
        x = self.task.images
        if method == "moderate":
            x = self._features()[0]
        options: dict[str, Any] = {"scope": "class", "fraction": self.fraction}
        if method == "random":
            options["generator"] = torch.Generator().manual_seed(self.seed)
        labels = self.task.labels
        chosen = self.timed("select", lambda: coreset.select(x, labels, method=method, **options))
        return self.timed(
            "train",
            lambda: coreset.train_weighted(
                self.task.train, self.on_coreset, indices=chosen.indices
            ),
        )

    def cw_erm(self, method: str = "moderate", reweight_on: str = "features") -> nn.Module:
        task = self.task
        features, trusted = self._features()
        pipeline = CWERM(
            self.training,
            # As long as the head's: by the network itself, from the paper's settings.
            None if reweight_on == "features" else self._network_on_coreset(),
            reweight_on=reweight_on,
            fraction=self.fraction,
            method=method,
            neighbors=self.scale.neighbors,
        )
        at = self.timed("select", lambda: pipeline.select(features, task.labels)).indices
        source, meta = task.train, task.meta
        if reweight_on == "features":
            source, meta = features, TensorDataset(trusted, task.meta.tensors[1])
        learnt = self.timed("reweight", lambda: pipeline.reweight(source, task.labels, at, meta))
        self.weights = self.timed(
            "broadcast", lambda: pipeline.broadcast(features, task.labels, at, learnt)
        )
        return self.timed("train", lambda: pipeline.train(task.train, self.weights))

    def _network_on_coreset(self) -> Training:
        """A fifth of W-ERM's meta steps."""
        training = self.training
        return replace(training, epochs=max(2, round(0.2 * training.epochs / self.fraction)))

    def _features(self) -> tuple[Tensor, Tensor]:
        """Made once per task, and counted for every method that needs them."""
        if self.task not in self.features_of:
            made = self.timed(
                "features", lambda: make_features(self.task, self.scale.features, self.seed)
            )
            self.features_of[self.task] = (made, self.seconds["features"])
        made, self.seconds["features"] = self.features_of[self.task]
        return made

    def row(self, method: str) -> Row:
        """Trains, measures, and says what the weights were."""
        model = {
            "erm": self.erm,
            "w-erm": self.w_erm,
            "random": lambda: self.coreset_only("random"),
            "moderate": lambda: self.coreset_only("moderate"),
            "cw-erm": self.cw_erm,
            "cw-erm-random": lambda: self.cw_erm("random"),
            "cw-erm-network": lambda: self.cw_erm(reweight_on="data"),
        }[method]()
        measured = self.task.validation if self.scale.on_validation else self.task.test
        return {
            "accuracy": accuracy(model, measured),
            "seconds": self.seconds,
            **({} if self.weights is None else describe_weights(self.weights, self.task)),
        }


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of right predictions in evaluation mode, in percent."""
    model.eval()
    images, labels = data.tensors
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return 100.0 * right / len(labels)


def describe_weights(weights: Tensor, task: Task) -> Row:
    """Means over right and wrong labels, or over the largest and the smallest class, of mean 1."""
    weights = weights / weights.mean()
    is_right = task.true == task.labels
    if bool(is_right.all()):
        largest, smallest = task.true == 0, task.true == task.true.max()
        return {"weights": [float(weights[largest].mean()), float(weights[smallest].mean())]}
    means = [float(weights[is_right].mean()), float(weights[~is_right].mean())]
    return {"weights": means, "auc": auc(weights, is_right)}


def auc(scores: Tensor, is_positive: Tensor) -> float:
    """How often a positive sample has the higher score than a negative one; ties count half."""
    values, numbers = torch.unique(scores, return_inverse=True)
    positive = torch.bincount(numbers[is_positive], minlength=len(values)).double()
    negative = torch.bincount(numbers[~is_positive], minlength=len(values)).double()
    below = negative.cumsum(0) - negative
    wins = (positive * (below + negative / 2)).sum()
    return float(wins / (positive.sum() * negative.sum()))


# -- all of them -----------------------------------------------------------------------------------


def load(path: Path, scale: Scale) -> list[Row]:
    """The rows that the file has.

    Raises: SystemExit where they are of another scale.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["scale"] != asdict(scale):
        raise SystemExit(f"{path} holds results of {content['scale']}; use another --out")
    return list(content["rows"])


def save(path: Path, scale: Scale, rows: Sequence[Row], command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command,
        "versions": machine.describe_versions(),
        "machine": machine.describe_machine(),
        "scale": asdict(scale),
        "rows": rows,
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def keys(arguments: argparse.Namespace) -> Iterator[Row]:
    """All that is asked for, seed by seed, so that an early end leaves whole seeds."""
    for seed in range(arguments.seeds):
        for setting in arguments.settings:
            for method in arguments.methods:
                for fraction in [None] if method in ON_EVERYTHING else arguments.fractions:
                    yield {
                        "setting": setting,
                        "seed": seed,
                        "method": method,
                        "fraction": fraction,
                    }


def measure(arguments: argparse.Namespace, scale: Scale, command: str) -> list[Row]:
    """Runs what the file does not hold yet."""
    rows = load(arguments.out, scale)
    wanted = list(keys(arguments))
    data = load_digits() if arguments.data == "digits" else find_data(arguments.data)
    tasks: dict[tuple[str, int], Task] = {}
    features_of: Features = {}
    for done, key in enumerate(wanted, 1):
        if any(all(row[name] == value for name, value in key.items()) for row in rows):
            continue
        name = (key["setting"], key["seed"])
        if name not in tasks:  # only the last one is kept
            tasks, features_of = {name: make_task(data, *name, scale.samples)}, {}
        run = Run(tasks[name], scale, key["seed"], key["fraction"] or 1.0, features_of)
        rows.append({**key, **run.row(key["method"])})
        save(arguments.out, scale, rows, command)
        row = rows[-1]
        print(
            f"[{done}/{len(wanted)}] {key['setting']}, seed {key['seed']}, {_title(row)}: "
            f"{row['accuracy']:.2f} %, {sum(row['seconds'].values()):.1f} s",
            file=sys.stderr,
            flush=True,
        )
    return rows


# -- report ----------------------------------------------------------------------------------------


def _title(row: Row) -> str:
    share = "" if row["fraction"] is None else f" ({100 * row['fraction']:g} %)"
    return TITLES[row["method"]] + share


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def grouped(rows: Sequence[Row], setting: str) -> dict[str, list[Row]]:
    """Rows of all seeds, by title, in the order of `TITLES`."""
    order = list(TITLES)
    own = sorted(
        (row for row in rows if row["setting"] == setting),
        key=lambda row: (row["fraction"] or 0.0, order.index(row["method"]), row["seed"]),
    )
    groups: dict[str, list[Row]] = {}
    for row in own:
        groups.setdefault(_title(row), []).append(row)
    return groups


def table(rows: Sequence[Row], setting: str) -> str:
    """One line per method and fraction, with the ratios that the goals are about."""
    groups = grouped(rows, setting)
    weighed = statistics.mean([_reweighting(row) for row in groups.get("W-ERM", [])] or [0.0])
    lines = []
    for title, own in groups.items():
        seconds = [sum(row["seconds"].values()) for row in own]
        costs = [_reweighting(row) for row in own]
        has_weights = "weights" in own[0]
        lines.append(
            [
                title,
                str(len(own)),
                spread([row["accuracy"] for row in own], 2),
                spread([s / 60 for s in seconds], 3),
                spread(costs, 2) if has_weights else "-",
                f"{weighed / statistics.mean(costs):.1f}" if has_weights and weighed else "-",
                *_weights_of(own),
            ]
        )
    of_weights = ["weight of right : wrong labels", "AUC"]
    if setting == "imbalance":
        of_weights = ["weight of largest : smallest class", "AUC"]
    head = ["method", "seeds", "accuracy %", "CPU min", "reweighting s", "W-ERM's / this"]
    return markdown_table(head + of_weights, lines)


def _reweighting(row: Row) -> float:
    """Seconds of what only the weights need: features, selection, reweighting and broadcast."""
    return float(sum(s for stage, s in row["seconds"].items() if stage != "train"))


def _weights_of(rows: Sequence[Row]) -> list[str]:
    if "weights" not in rows[0]:
        return ["-", "-"]
    first, second = (statistics.mean(row["weights"][i] for row in rows) for i in range(2))
    areas = [row["auc"] for row in rows if "auc" in row]
    return [f"{first:.2f} : {second:.2f}", spread(areas, 3) if areas else "-"]


def plot(rows: Sequence[Row], path: Path) -> None:
    """NAME-accuracy.png, every seed as a dot; NAME-minutes.png, the stages stacked."""
    from matplotlib.figure import Figure

    settings = [s for s in SETTINGS if any(row["setting"] == s for row in rows)]
    for kind, draw in (("accuracy", _dots), ("minutes", _bars)):
        figure = Figure(figsize=(5.5 * len(settings), 4.5), layout="constrained")
        panels = figure.subplots(1, len(settings), squeeze=False)[0]
        for setting, axes in zip(settings, panels, strict=True):
            groups = grouped(rows, setting)
            draw(axes, groups)
            axes.set_yticks(range(len(groups)), list(groups))
            axes.invert_yaxis()
            axes.set_title(setting)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path.with_name(f"{path.stem}-{kind}.png"), dpi=130)


def _dots(axes: Any, groups: dict[str, list[Row]]) -> None:
    for at, own in enumerate(groups.values()):
        values = [row["accuracy"] for row in own]
        axes.plot(values, [at] * len(values), "o", color="#0072B2", alpha=0.5)
        axes.plot(statistics.mean(values), at, "|", color="black", markersize=18)
    axes.set_xlabel("accuracy %, and its mean")
    axes.grid(axis="x", alpha=0.3)


def _bars(axes: Any, groups: dict[str, list[Row]]) -> None:
    for at, own in enumerate(groups.values()):
        left = 0.0
        for stage, color in COLORS.items():
            width = statistics.mean(row["seconds"].get(stage, 0.0) for row in own) / 60
            axes.barh(at, width, left=left, color=color, label=stage if at == 0 else None)
            left += width
    axes.set_xlabel("CPU minutes, mean")
    axes.legend(frameon=False, fontsize="small")


# -- command line ----------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Scale]:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("cwerm.json"), help="also to go on")
    parser.add_argument("--data", help='folder of the four .gz files, or "digits"')
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--methods", nargs="+", choices=tuple(TITLES), default=tuple(TITLES))
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.05])
    parser.add_argument("--validate", action="store_true", help="on held-out training images")
    default = Scale()
    for name in ("samples", "epochs", "neighbors"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--features", choices=("autoencoder", "pixels"), default=default.features)
    found = parser.parse_args(argv)
    if found.seeds < 1 or not all(0 < fraction <= 1 for fraction in found.fractions):
        parser.error("--seeds must be at least 1, and --fractions above 0 and at most 1")
    data = "digits" if found.data == "digits" else default.data
    scale = Scale(
        data, found.samples, found.epochs, found.features, found.neighbors, found.validate
    )
    return found, scale


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, prints the tables, and draws the pictures."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments, scale = parse(argv)
    torch.set_num_threads(1)  # CPU time of several threads would count their waiting
    rows = measure(arguments, scale, shlex.join([*PROGRAM.split(), *argv]))
    plot(rows, arguments.out)
    for setting in arguments.settings:
        print(f"{setting}\n\n{table(rows, setting)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
