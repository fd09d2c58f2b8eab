"""`python -m pyoptim demo`: one network trained four times, side by side, on real images.

AdamW as torch's for-loop, foreach and fused implementations and as pyoptim's: same initial weights,
same batches, one step of each in turn. The losses must agree; the time in the optimizer may not.
"""

from __future__ import annotations

import argparse
import gzip
import os
import statistics
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

import pyoptim

PROGRAM = "python -m pyoptim demo"
INSTALL = "pip install 'pyoptim-kernels[demo]'"
# Where Debian's package dataset-fashion-mnist puts the files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801

BATCH = 64
LEARNING_RATE = 1e-3
# Implementations differ in the order of roundings only. The network is smooth (SiLU, average
# pooling), so a difference of 6e-8 in a weight stays of that size for a while: after 100 steps the
# losses of fused and for-loop differed by 3e-7 at most, after 150 by 1e-6, and on one processor
# by 2e-4 in the last of 300, where a loss jumps. So the first 100 are compared. The bound is 300
# times their difference; leaving out the weight decay alone goes past it within 50 steps.
TOLERANCE, COMPARED_STEPS = 1e-4, 100

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

BASELINE, OURS = "torch for-loop", "pyoptim"
IMPLEMENTATIONS: dict[str, MakeOptimizer] = {
    BASELINE: lambda params: torch.optim.AdamW(params, lr=LEARNING_RATE, foreach=False),
    "torch foreach": lambda params: torch.optim.AdamW(params, lr=LEARNING_RATE, foreach=True),
    "torch fused": lambda params: torch.optim.AdamW(params, lr=LEARNING_RATE, fused=True),
    OURS: lambda params: pyoptim.AdamW(params, lr=LEARNING_RATE),
}
COLORS = dict(zip(IMPLEMENTATIONS, ("#999999", "#E69F00", "#56B4E9", "#D55E00"), strict=True))


class DemoError(Exception):
    """Something that the user can put right; shown without a traceback."""


@dataclass(frozen=True)
class Data:
    """Images [n, 1, side, side], float32, mean 0 and deviation 1 over the training set."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def normalized(
        cls, name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
    ) -> Data:
        images = train[0].float()
        deviation, mean = torch.std_mean(images)

        def scale(images: Tensor) -> Tensor:
            return ((images.float() - mean) / deviation).unsqueeze(1)

        return cls(name, scale(train[0]), train[1].long(), scale(test[0]), test[1].long())


@dataclass
class Training:
    """One of the four trainings, and what it measured."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    total_seconds: float = 0.0
    accuracy: float = 0.0

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        before = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.optimizer_seconds.append(end - before)
        self.total_seconds += end - start
        self.losses.append(loss.item())

    @property
    def milliseconds(self) -> float:
        """Median of the optimizer's steps but the first, which creates the state."""
        return statistics.median(self.optimizer_seconds[1:] or self.optimizer_seconds) * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 only if all trainings agree."""
    arguments = _parser().parse_args(argv)
    try:
        if find_spec("matplotlib") is None:
            raise DemoError(f"the plot needs matplotlib; install it with: {INSTALL}")
        data = find_data(arguments.data)
        steps = arguments.steps or (8 if arguments.quick else 300)
        trainings = train(data, steps, arguments.seconds)
        evaluate(trainings, data, limit=200 if arguments.quick else len(data.test_labels))
        print(f"\n{table(trainings)}\n")
        plot(trainings, data.name, arguments.output)
        print(f"plot: {arguments.output}")
    except (DemoError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return report_agreement(trainings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("PYOPTIM_DATA"),
        metavar="DIR",
        help="folder with the four .gz files of Fashion-MNIST (default: $PYOPTIM_DATA, then "
        f"{DEBIAN_FOLDER}; without them scikit-learn's handwritten digits)",
    )
    parser.add_argument("--output", type=Path, default=Path("demo.png"), metavar="PNG")
    parser.add_argument("--steps", type=_count, help="training steps (default 300)")
    parser.add_argument(
        "--seconds", type=float, default=80.0, help="stop training after this long (default 80)"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return count


def find_data(folder: Path | str | None) -> Data:
    """Fashion-MNIST from `folder` or Debian's place; digits where neither is there.

    Raises: DemoError for a folder that was asked for and has no usable files.
    """
    if folder:
        return load_fashion_mnist(Path(folder))
    if DEBIAN_FOLDER.is_dir():
        return load_fashion_mnist(DEBIAN_FOLDER)
    return load_digits()


def load_fashion_mnist(folder: Path) -> Data:
    """The training and test set from the four .gz files.

    Raises: DemoError naming the file that is missing or damaged.
    """
    train, test = (_load_pair(folder, part) for part in ("train", "t10k"))
    return Data.normalized("Fashion-MNIST", train, test)


def load_digits() -> Data:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels; every fifth one is for testing."""
    if find_spec("sklearn") is None:
        raise DemoError(
            "found neither Fashion-MNIST (give its folder with --data) nor scikit-learn, which "
            f"brings handwritten digits; install it with: {INSTALL}"
        )
    from sklearn import datasets

    digits = datasets.load_digits()
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
    is_test = torch.arange(len(labels)) % 5 == 0
    train, test = (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])
    return Data.normalized("handwritten digits", train, test)


def _load_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images_path = folder / f"{part}-images-idx3-ubyte.gz"
    images = read_idx(images_path, IMAGES_MAGIC)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", LABELS_MAGIC)
    if len(images) != len(labels):
        raise DemoError(f"{images_path}: {len(images)} images, but {len(labels)} labels beside it")
    return images, labels


def read_idx(path: Path, magic: int) -> Tensor:
    """A gzipped IDX file of bytes as a uint8 tensor.

    Raises: DemoError unless magic number, sizes and length agree.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DemoError(f"{path}: no such file") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DemoError(f"{path}: damaged gzip file: {error}") from error
    # The last byte of the magic number is the number of dimensions.
    header = struct.Struct(f">{1 + (magic & 0xFF)}I")
    if len(content) < header.size:
        raise DemoError(f"{path}: {len(content)} bytes are too short for an IDX header")
    found, *sizes = header.unpack_from(content)
    if found != magic:
        raise DemoError(f"{path}: magic number {found:#x}, expected {magic:#x}")
    if len(content) - header.size != prod(sizes) or not content[header.size :]:
        raise DemoError(
            f"{path}: {len(content) - header.size} bytes of data, expected {prod(sizes)} "
            f"for sizes {tuple(sizes)}"
        )
    return torch.frombuffer(bytearray(content[header.size :]), dtype=torch.uint8).reshape(sizes)


def make_model(side: int) -> nn.Module:
    """A small CNN for `side` x `side` pixels: 18 tensors, 1.0 M parameters for 28 x 28."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.SiLU()]

    features: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
        features += [*block(inputs, outputs), nn.AvgPool2d(2)]
    features += [*block(128, 256), nn.Flatten()]
    hidden = [nn.Linear(256 * (side // 8) ** 2, 256), nn.LayerNorm(256), nn.SiLU()]
    return nn.Sequential(*features, *hidden, nn.Linear(256, 10))


def train(data: Data, steps: int, seconds: float) -> list[Training]:
    """Train all implementations in step on the same batches; stops early after `seconds`."""
    trainings = [_start(name, data) for name in IMPLEMENTATIONS]
    params = list(trainings[0].model.parameters())
    print(
        f"{data.name}: {len(data.train_labels)} images; {sum(p.numel() for p in params):,} "
        f"parameters in {len(params)} tensors; AdamW; {torch.get_num_threads()} threads"
    )
    batches = torch.Generator().manual_seed(1)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        batch = torch.randint(len(data.train_labels), (BATCH,), generator=batches)
        images, labels = data.train_images[batch], data.train_labels[batch]
        # Another one goes first each time: what runs after the pause has colder caches.
        first = step % len(trainings)
        for training in trainings[first:] + trainings[:first]:
            training.step(images, labels)
        elapsed = time.perf_counter() - started
        is_last = step == steps or elapsed > seconds
        if is_last or step % max(1, steps // 20) == 0:
            _progress(step, steps, trainings[0].losses[-1], elapsed, seconds)
        if is_last:
            break
    return trainings


def _start(name: str, data: Data) -> Training:
    torch.manual_seed(0)
    model = make_model(data.train_images.shape[-1])
    return Training(name, model, IMPLEMENTATIONS[name](list(model.parameters())))


def _progress(step: int, steps: int, loss: float, elapsed: float, seconds: float) -> None:
    left = min(elapsed / step * (steps - step), max(0.0, seconds - elapsed))
    print(
        f"step {step:4}/{steps}  loss {loss:.4f}  {elapsed:4.0f} s, {left:3.0f} s left", flush=True
    )


@torch.no_grad()
def evaluate(trainings: list[Training], data: Data, limit: int) -> None:
    """Fraction of the first `limit` test images that each model names correctly."""
    images, labels = data.test_images[:limit], data.test_labels[:limit]
    for training in trainings:
        training.model.eval()
        answers = [training.model(part).argmax(1) for part in torch.split(images, 500)]
        training.accuracy = (torch.cat(answers) == labels).double().mean().item()


def loss_difference(training: Training, baseline: Training) -> float:
    """Largest difference between the two losses of a compared step; NaN if either has one."""
    losses = [t.losses[:COMPARED_STEPS] for t in (training, baseline)]
    pairs = torch.tensor(losses, dtype=torch.float64)
    return (pairs[0] - pairs[1]).abs().max().item()


def table(trainings: list[Training]) -> str:
    """One line per implementation."""
    baseline = trainings[0]
    lines = [
        f"{'AdamW':<15}{'final loss':>11}{'accuracy':>10}{'loss diff.':>12}{'total s':>9}"
        f"{'optimizer s':>13}{'ms per step':>13}{'speed-up':>10}"
    ]
    for training in trainings:
        lines.append(
            f"{training.name:<15}{training.losses[-1]:>11.5f}{training.accuracy:>10.1%}"
            f"{loss_difference(training, baseline):>12.1e}{training.total_seconds:>9.1f}"
            f"{sum(training.optimizer_seconds):>13.2f}{training.milliseconds:>13.3f}"
            f"{baseline.milliseconds / training.milliseconds:>9.1f}x"
        )
    note = (
        f"loss diff.: the largest of {COMPARED_STEPS} steps; ms per step: median time in "
        "optimizer.step(); speed-up: of that, over torch for-loop"
    )
    return "\n".join([*lines, note])


def report_agreement(trainings: list[Training]) -> int:
    """Say whether the compared losses stayed within TOLERANCE of the for-loop's.

    Returns: the exit status.
    """
    worst = {t.name: loss_difference(t, trainings[0]) for t in trainings[1:]}
    # `not <=` rather than `>`, so that NaN is a failure.
    failed = [name for name, difference in worst.items() if not difference <= TOLERANCE]
    if failed:
        print(
            f"demo: the losses of {', '.join(failed)} differ from those of {BASELINE} "
            f"by more than {TOLERANCE:g}",
            file=sys.stderr,
        )
        return 1
    n_steps = min(COMPARED_STEPS, len(trainings[0].losses))
    print(f"all losses agree within {TOLERANCE:g} at every one of the first {n_steps} steps")
    return 0


def plot(trainings: list[Training], data_name: str, path: Path) -> None:
    """Left the losses, on top of each other; right the time in the optimizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for width, training in zip((7, 5, 3, 1), trainings, strict=True):
        left.plot(
            training.losses, color=COLORS[training.name], linewidth=width, label=training.name
        )
    left.set(xlabel="step", ylabel="training loss", title=f"{data_name}: losses overlap", ylim=0)
    left.legend(frameon=False)
    names = [training.name for training in trainings]
    times = [training.milliseconds for training in trainings]
    labels = [name.replace(" ", "\n") for name in names]
    bars = right.bar(labels, times, color=[COLORS[name] for name in names])
    right.bar_label(bars, [f"{t:.2f} ms\n{times[0] / t:.1f}x" for t in times], padding=2)
    right.set(
        ylabel="ms per step", title="Time in the optimizer, median", ylim=(0, 1.2 * max(times))
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
