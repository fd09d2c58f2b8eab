"""CW-ERM: weights are learnt on a coreset, given to all samples, and used to train on all."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from pyoptim.coreset.broadcast import broadcast_weights, check_neighbors
from pyoptim.coreset.head import LinearHead
from pyoptim.coreset.methods import METHODS, select
from pyoptim.coreset.selection import Selection, check_choice, check_labels, matrix
from pyoptim.coreset.training import (
    READOUTS,
    Training,
    learn_weights,
    plain,
    save_atomically,
    train_weighted,
)
from pyoptim.sgd import SGD

SCALES = ("mean", "none")
SOURCES = ("features", "data")


class CWERMResult(NamedTuple):
    """What `CWERM.fit` has made.

    Attributes:
        model: the network trained on all samples, in training mode.
        selection: the coreset; its weights are the learnt ones.
        weights: [n], float64; of all samples.
        seconds: of the stages "select", "reweight", "broadcast" and "train", also of earlier runs
            that were interrupted.
    """

    model: nn.Module
    selection: Selection
    weights: Tensor
    seconds: dict[str, float]


class CWERM:
    """The four stages as one object; each can also be called by itself.

        selection = pipeline.select(features, labels)
        coreset_weights = pipeline.reweight(features, labels, selection.indices, meta)
        weights = pipeline.broadcast(features, labels, selection.indices, coreset_weights)
        model = pipeline.train(data, weights)

    Args:
        training: how the final network is trained on all samples.
        reweighting: how the network of the reweighting stage is trained on the coreset. None: with
            reweight_on="features" a `LinearHead` for `HEAD_STEPS` steps, with "data" as `training`.
        reweight_on: what that network sees, "features" or the "data". The paper takes the data; but
            a network that can fit the coreset, wrong labels included, gives all its samples the
            same loss, from which no weight can be told.
        fraction, budget: size of the coreset; without either, the paper's fraction of 0.01.
        method: a name in `METHODS`; "moderate" in the paper.
        method_options: further arguments of the method. The paper leaves open whether classes are
            balanced; here the default is {"scope": "class"}, so that every class has neighbours of
            its own.
            Random methods draw from the seed of `training`.
        meta_options: arguments of `pyoptim.reweight.MetaReweighter`. With the default
            `reweighting` of features, no meta step is made in the first third of the steps.
        readout: how weights are read at the end, as for `learn_weights`; open in the paper.
        same_class: whether the neighbour must have the sample's label; open in the paper. Without
            it, weights cannot tell a wrong label from a right one on the same image.
        neighbors: of how many neighbours the weights are averaged; 1 in the paper.
        metric: of the nearest-neighbour search; open in the paper.
        scale: "mean": weights of all samples are divided by their mean, so that the learning rate
            keeps its meaning; "none": as learnt. Open in the paper.
        directory: where stages and epochs are saved. A second `fit` with the same settings and data
            continues there and gives the same result; with others it raises. None saves nothing.

    Raises:
        ValueError: an argument is not as described.

    Source: "Classification via coreset reweighting" (CW-ERM), algorithm 1, equations 2 and 3.
    """

    def __init__(
        self,
        training: Training,
        reweighting: Training | None = None,
        *,
        reweight_on: str = "features",
        fraction: float | None = None,
        budget: int | None = None,
        method: str = "moderate",
        method_options: Mapping[str, Any] | None = None,
        meta_options: Mapping[str, Any] | None = None,
        readout: str = "average",
        same_class: bool = True,
        neighbors: int = 1,
        metric: str = "sqeuclidean",
        scale: str = "mean",
        directory: str | Path | None = None,
    ) -> None:
        check_choice("method", method, tuple(METHODS))
        check_choice("readout", readout, READOUTS)
        check_choice("scale", scale, SCALES)
        check_choice("reweight_on", reweight_on, SOURCES)
        check_neighbors(neighbors)
        self.training, self.reweighting = training, reweighting
        self.reweight_on = reweight_on
        self.fraction = 0.01 if fraction is None and budget is None else fraction
        self.budget, self.method = budget, method
        self.method_options = {"scope": "class"} if method_options is None else dict(method_options)
        self.meta_options = dict(meta_options or {})
        self.readout, self.same_class, self.metric = readout, same_class, metric
        self.neighbors = neighbors
        self.scale = scale
        self.directory = None if directory is None else Path(directory)

    # -- stages ------------------------------------------------------------------------------------

    def select(self, features: Tensor, labels: Tensor) -> Selection:
        """Stage 1: the coreset. Features [n, ...], labels [n]."""
        options = {"fraction": self.fraction, "budget": self.budget, **self.method_options}
        known = inspect.signature(METHODS[self.method]).parameters
        if "generator" in known:
            options.setdefault("generator", torch.Generator().manual_seed(self.training.seed))
        if "progress" in known:
            options.setdefault("progress", self.training.progress)
        return select(features, labels, method=self.method, **options)

    def reweight(
        self,
        source: Tensor | Dataset[Any],
        labels: Tensor,
        indices: Tensor,
        meta: Dataset[Any] | None = None,
    ) -> Tensor:
        """Stage 2: weights [k] of the coreset.

        Args:
            source: with reweight_on="features" the features [n, ...], else the data of n samples.
            labels: [n], integers.
            indices: [k]; the coreset.
            meta: trusted samples (x, y), with x as the source has it; see `learn_weights`.

        Raises:
            ValueError, TypeError: an argument is not as described.
        """
        training, options = self._reweighting(source, labels, len(indices))
        if isinstance(source, Tensor):
            _check_meta(meta, source)
            source = TensorDataset(source, labels)
        weights, _ = learn_weights(
            source,
            labels,
            training,
            indices=indices,
            meta=meta,
            options=options,
            readout=self.readout,
            checkpoint=self._file("reweight-epoch"),
        )
        return weights

    def _reweighting(
        self, source: Tensor | Dataset[Any], labels: Tensor, k: int
    ) -> tuple[Training, dict[str, Any]]:
        """How the weights are learnt, and the options of the MetaReweighter."""
        if isinstance(source, Tensor) != (self.reweight_on == "features"):
            kind = {"features": "a tensor of features", "data": "a Dataset"}[self.reweight_on]
            raise TypeError(
                f"reweight_on={self.reweight_on!r} learns from {kind}, got {type(source).__name__}"
            )
        if self.reweighting is not None:
            return self.reweighting, self.meta_options
        if not isinstance(source, Tensor):
            return self.training, self.meta_options
        return head_training(source, labels, k, self.training, self.meta_options)

    def broadcast(
        self, features: Tensor, labels: Tensor, indices: Tensor, coreset_weights: Tensor
    ) -> Tensor:
        """Stage 3: weights [n] of all samples."""
        weights = broadcast_weights(
            features,
            indices,
            coreset_weights,
            labels=labels,
            same_class=self.same_class,
            neighbors=self.neighbors,
            metric=self.metric,
        )
        if self.scale == "none":
            return weights
        mean = weights.mean()
        if float(mean) <= 0.0:
            raise ValueError(
                'all learnt weights are 0, so they cannot be scaled to mean 1; use scale="none", a '
                "lower learning rate of the weight network, or another meta set"
            )
        return weights / mean

    def train(self, data: Dataset[Any], weights: Tensor) -> nn.Module:
        """Stage 4: a fresh network, trained on all samples with their weights [n]."""
        checkpoint = self._file("train-epoch")
        return train_weighted(data, self.training, weights=weights, checkpoint=checkpoint)

    # -- all of them -------------------------------------------------------------------------------

    def fit(
        self,
        data: Dataset[Any],
        features: Tensor,
        labels: Tensor,
        meta: Dataset[Any] | None = None,
    ) -> CWERMResult:
        """All stages; those that `directory` holds are not run again.

        Args:
            data: n samples (x, y), by index; a TensorDataset is the fastest.
            features: [n, ...]; see `extract_features`.
            labels: [n], integers, the y of the data.
            meta: trusted samples (x, y), where x are features like the others with
                reweight_on="features", else data; None draws from the coreset, see `learn_weights`.

        Raises:
            ValueError: an argument is not as described; `directory` holds a run with other settings
                or data.
        """
        n = len(matrix("features", features))
        check_labels("labels", labels, n)
        if len(data) != n:  # type: ignore[arg-type]
            raise ValueError(f"data has {len(data)} samples, features {n}")  # type: ignore[arg-type]
        self._check_directory(features, labels)
        source = features if self.reweight_on == "features" else data
        seconds: dict[str, float] = {}
        indices = self._stage("select", seconds, lambda: self.select(features, labels).indices)
        learnt = self._stage(
            "reweight", seconds, lambda: self.reweight(source, labels, indices, meta)
        )
        weights = self._stage(
            "broadcast", seconds, lambda: self.broadcast(features, labels, indices, learnt)
        )
        with self._timed("train", seconds):
            model = self.train(data, weights)  # if it was finished, this only loads the network
        return CWERMResult(model, Selection(indices, learnt), weights, seconds)

    def _stage(self, name: str, seconds: dict[str, float], run: Callable[[], Tensor]) -> Tensor:
        """The result of a stage, from its file or by running it."""
        file = self._file(name)
        if file is not None and file.exists():
            seconds[name] = self._spent(name)
            loaded: Tensor = torch.load(file, weights_only=True)
            return loaded
        with self._timed(name, seconds):
            result = run()
        if file is not None:
            save_atomically(result, file)
        return result

    @contextmanager
    def _timed(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        """Adds the time of what is inside, also if it is interrupted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds[name] = self._spent(name) + time.perf_counter() - start
            file = self._file(f"{name}-seconds")
            if file is not None:
                save_atomically(seconds[name], file)

    def _spent(self, name: str) -> float:
        file = self._file(f"{name}-seconds")
        if file is None or not file.exists():
            return 0.0
        return float(torch.load(file, weights_only=True))

    def _file(self, name: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{name}.pt"

    def _check_directory(self, features: Tensor, labels: Tensor) -> None:
        """Writes the settings, or compares with those that are there."""
        file = self._file("settings")
        if file is None:
            return
        own = self._settings(features, labels)
        if not file.exists():
            save_atomically(own, file)
            return
        other = torch.load(file, weights_only=True)
        for name in sorted({*own, *other}):
            if own.get(name) != other.get(name):
                raise ValueError(
                    f"{self.directory} holds a run with {name}={other.get(name)!r}, this one has "
                    f"{own.get(name)!r}; use another directory, or delete that one"
                )

    def _settings(self, features: Tensor, labels: Tensor) -> dict[str, Any]:
        names = ["fraction", "budget", "method", "reweight_on", "readout"]
        names += ["same_class", "neighbors", "metric", "scale"]
        settings: dict[str, Any] = {name: repr(getattr(self, name)) for name in names}
        for name in ("method_options", "meta_options"):
            settings[name] = plain(getattr(self, name))
        settings["training"] = repr(self.training.numbers())
        settings["reweighting"] = repr(self.reweighting and self.reweighting.numbers())
        settings["features"] = [*features.shape, float(features.double().sum())]
        settings["labels"] = int((labels.cpu().long() * torch.arange(1, len(labels) + 1)).sum())
        return settings


# -- the linear head -------------------------------------------------------------------------------

# Of the stage that learns weights on features; Fashion-MNIST with 40 % wrong labels, validation
# data, 2026-11. Components: a coreset of 600 gave 16 the weights that tell wrong labels best (area
# under the curve 0.95; 0.93 for 32, 0.90 for 64), one of 120 gave 6 (0.93) more than 12 (0.91).
HEAD_STEPS, HEAD_LR, HEAD_WARMUP = 1000, 0.1, 1 / 3
SAMPLES_PER_DIM, FEWEST_DIMS = 40, 6


def head_training(
    features: Tensor, labels: Tensor, k: int, like: Training, options: Mapping[str, Any]
) -> tuple[Training, dict[str, Any]]:
    """How a `LinearHead` learns the weights of k samples, and the options of its MetaReweighter.

    Args:
        features: [n, ...].
        labels: [n], integers, at least 0.
        k: size of the coreset.
        like: its batch size, seed and progress are taken over.
        options: they replace those that are made here.
    """
    classes = int(labels.max()) + 1
    check_labels("labels", labels, len(features), classes)
    dims = max(FEWEST_DIMS, k // SAMPLES_PER_DIM)
    batches = -(-k // like.batch_size)
    training = Training(
        # No weight decay: it keeps the fit from converging, and before that large losses gain
        # weight, and wrong labels with them.
        lambda: LinearHead.of(features, classes, dims, like.seed),
        lambda params: SGD(params, lr=HEAD_LR, momentum=0.9),
        epochs=max(2, -(-HEAD_STEPS // batches)),
        batch_size=like.batch_size,
        seed=like.seed,
        progress=like.progress,
    )
    warmup = round(HEAD_WARMUP * training.epochs * batches)
    return training, {"warmup": warmup, **options}


def _check_meta(meta: Dataset[Any] | None, features: Tensor) -> None:
    """Raises ValueError unless the trusted samples are features too."""
    if meta is None or len(meta) == 0:  # type: ignore[arg-type]
        return
    x = torch.as_tensor(meta[0][0])
    if x.shape != features.shape[1:]:
        raise ValueError(
            f"meta gives inputs of shape {tuple(x.shape)}, but the features have "
            f"{tuple(features.shape[1:])} each; give TensorDataset(features of the trusted "
            'samples, their labels), or use reweight_on="data"'
        )
