"""Training loops of CW-ERM: weighted ERM, and learning weights; both resume at the last epoch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyoptim.coreset.progress import track
from pyoptim.coreset.selection import check_choice
from pyoptim.reweight import MetaReweighter
from pyoptim.sgd import SGD

READOUTS = ("average", "last")
# Options whose values can be compared with those of a saved run.
PLAIN = (int, float, str, bool, type(None))

MakeModel = Callable[[], nn.Module]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer, int], LRScheduler]


def default_optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
    """The paper's: SGD, lr 0.1, momentum 0.9, weight decay 5e-4."""
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Args:
        make_model: returns a fresh network; called after seeding.
        make_optimizer: from parameters to an optimizer; the default is the paper's SGD.
        make_scheduler: (optimizer, epochs) to an lr scheduler, which steps after each epoch; the
            default is a cosine from the first lr to 0.
        epochs: passes over the data.
        batch_size: the largest batch; an epoch is cut into batches of equal size, give or take one.
        loss_fn: (outputs, targets) -> [b] losses; None is cross-entropy per sample.
        augment: applied to the inputs of every training batch; None leaves them.
        num_workers: processes that load batches of a data set that is no TensorDataset.
        seed: of initialization, order of the data, dropout and augmentation.
        progress: whether to show a bar.
    """

    make_model: MakeModel
    make_optimizer: MakeOptimizer = default_optimizer
    make_scheduler: MakeScheduler = CosineAnnealingLR
    epochs: int = 100
    batch_size: int = 100
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    augment: Callable[[Any], Any] | None = None
    num_workers: int = 0
    seed: int = 0
    progress: bool = True

    def numbers(self) -> dict[str, int]:
        """What must be equal for a run to be continued."""
        return {"epochs": self.epochs, "batch_size": self.batch_size, "seed": self.seed}

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def train_weighted(
    data: Dataset[Any],
    training: Training,
    *,
    weights: Tensor | None = None,
    indices: Tensor | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Trains a fresh network on (1/b) sum_i w_i loss_i per batch.

    Args:
        data: n samples (x, y), by index.
        training: how.
        weights: [n]; None is 1 for all.
        indices: [k]; train on these samples only. None is all.
        checkpoint: file that holds the state after each epoch; an existing one is continued, with
            the same result as without the interruption.

    Raises:
        ValueError: weights are not [n] or not finite; there is no sample.
    """
    order = _indices(data, indices)
    if weights is not None:
        _check_weights(weights, len(order) if indices is None else _size(data))
    identity = {"samples": _checksum(order), "weights": _checksum(weights)}
    with _running(training, checkpoint, identity) as run:
        for _ in run.epochs("training"):
            for at, x, y in run.batches(data, order):
                losses = run.losses(*run.augmented(x, y))
                own = None if weights is None else weights[at].to(losses.device, losses.dtype)
                loss = losses.mean() if own is None else (own * losses).mean()
                run.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                run.optimizer.step()
    return run.model


def learn_weights(
    data: Dataset[Any],
    labels: Tensor,
    training: Training,
    *,
    indices: Tensor | None = None,
    meta: Dataset[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    readout: str = "average",
    checkpoint: Path | None = None,
) -> tuple[Tensor, nn.Module]:
    """Meta-Weight-Net on some samples: their weights, and the network trained along the way.

    Args:
        data: n samples (x, y), by index.
        labels: [n], integers; used to balance the classes where `meta` is None.
        training: how.
        indices: [k]; the samples to weigh. None is all.
        meta: samples (x, y) that are trusted. None draws meta batches from the weighed samples
            themselves, each class equally often.
        options: arguments of `MetaReweighter` (normalize, detach, interval, virtual_lr ...).
        readout: "average": the mean of a sample's weights over the second half of the epochs;
            "last": V of its loss under the final network in evaluation mode. A network that has
            fitted a small coreset gives all samples the same small loss, and "last" then tells
            them apart no more.
        checkpoint: as for `train_weighted`.

    Returns: ([k] float64 weights in the order of `indices`, each as it multiplies a loss before the
    division by the batch size; the network).

    Raises:
        ValueError: an argument is not as described.
    """
    check_choice("readout", readout, READOUTS)
    order = _indices(data, indices)
    place = torch.full((_size(data),), -1)
    place[order] = torch.arange(len(order))
    draw = _MetaBatches(meta, data, labels[order.to(labels.device)].cpu(), order, training)
    identity = {"samples": _checksum(order), "options": plain(options or {})}
    with _running(training, checkpoint, identity, options or {}, len(order)) as run:
        for epoch in run.epochs("reweighting"):
            for at, x, y in run.batches(data, order):
                due = run.reweighter.needs_meta_batch
                meta_batch = run.augmented(*draw.next(run.generator)) if due else (None, None)
                step = run.reweighter.step(*run.augmented(x, y), *meta_batch)
                if 2 * epoch >= training.epochs - 1:
                    run.note(place[at], step.weights * len(at))
        weights = run.sums / run.counts
        if readout == "last":
            weights = run.final_weights(data, order)
    return weights, run.model


# -- data ------------------------------------------------------------------------------------------


def _size(data: Dataset[Any]) -> int:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(
            f"data must be a Dataset with a length, got {type(data).__name__}"
        ) from error


def _indices(data: Dataset[Any], indices: Tensor | None) -> Tensor:
    n = _size(data)
    order = torch.arange(n) if indices is None else indices.cpu().long()
    if len(order) == 0:
        raise ValueError("there is no sample to train on")
    if not 0 <= int(order.min()) <= int(order.max()) < n:
        raise ValueError(f"indices must be in 0..{n - 1}, got {order.tolist()}")
    return order


def _check_weights(weights: Tensor, n: int) -> None:
    if weights.shape != (n,):
        raise ValueError(f"weights must be one per sample, ({n},); got {tuple(weights.shape)}")
    if not bool(weights.isfinite().all()):
        raise ValueError(
            f"weights holds NaN or inf, first at {int((~weights.isfinite()).nonzero()[0])}"
        )


def _load(
    data: Dataset[Any], parts: tuple[Tensor, ...], num_workers: int = 0
) -> Iterator[tuple[Tensor, Any, Any]]:
    """(indices, x, y) of each part."""
    if isinstance(data, TensorDataset):
        for part in parts:
            x, y = (tensor[part.to(tensor.device)] for tensor in data.tensors[:2])
            yield part, x, y
        return
    loader = DataLoader(
        data, batch_sampler=[part.tolist() for part in parts], num_workers=num_workers
    )
    for part, (x, y, *_) in zip(parts, loader, strict=True):
        yield part, x, y


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _checksum(values: Tensor | None) -> float:
    """A number that changes with any value and with their order."""
    if values is None:
        return -1.0
    return float(values.double().cpu() @ torch.arange(1.0, len(values) + 1, dtype=torch.float64))


class _MetaBatches:
    """An endless supply of random meta batches; classes equally often, if from the data itself."""

    def __init__(
        self,
        meta: Dataset[Any] | None,
        data: Dataset[Any],
        labels: Tensor,
        order: Tensor,
        training: Training,
    ) -> None:
        self.data = data if meta is None else meta
        if meta is not None and _size(meta) == 0:
            raise ValueError(
                "meta is empty; give trusted samples, or None to draw from the coreset"
            )
        self.size = min(training.batch_size, _size(self.data))
        self.members = None
        if meta is None:
            self.members = [order[labels == label] for label in set(labels.tolist())]

    def next(self, generator: torch.Generator) -> tuple[Any, Any]:
        if self.members is None:
            n = _size(self.data)
            at = torch.randperm(n, generator=generator)[: self.size]
        else:
            classes = torch.randint(len(self.members), (self.size,), generator=generator)
            within = torch.rand(self.size, generator=generator)
            rows = [self.members[int(c)] for c in classes]
            at = torch.stack([r[int(u * len(r))] for r, u in zip(rows, within, strict=True)])
        _, x, y = next(_load(self.data, (at,)))
        return x, y


# -- one run, with its checkpoint ------------------------------------------------------------------


@contextmanager
def _running(
    training: Training,
    checkpoint: Path | None,
    identity: dict[str, Any],
    options: Mapping[str, Any] | None = None,
    k: int = 0,
) -> Iterator[_Run]:
    """A run with random numbers of its own, at its first epoch or after the last saved one."""
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        identity = {**identity, **training.numbers()}
        run = _Run(training, checkpoint, identity, options, k)
        if checkpoint is not None and checkpoint.exists():
            run.load(torch.load(checkpoint, map_location="cpu", weights_only=True))
        run.model.train()
        yield run


class _Run:
    """Network, optimizer and what else a run needs, and their state in a file."""

    def __init__(
        self,
        training: Training,
        checkpoint: Path | None,
        identity: dict[str, Any],
        options: Mapping[str, Any] | None,
        k: int,
    ) -> None:
        self.training, self.checkpoint, self.identity = training, checkpoint, identity
        self.generator = torch.Generator().manual_seed(training.seed)
        self.sums, self.counts = torch.zeros(k, dtype=torch.float64), torch.zeros(k)
        self.done = 0
        self.model = training.make_model()
        self.optimizer = training.make_optimizer(self.model.parameters())
        self.scheduler = training.make_scheduler(self.optimizer, training.epochs)
        self.device = next(self.model.parameters()).device
        if options is not None:
            options = {"loss_fn": training.loss_fn, **options}
            self.reweighter = MetaReweighter(self.model, self.optimizer, **options)
        self.is_meta = options is not None

    def epochs(self, title: str) -> Iterator[int]:
        left = range(self.done, self.training.epochs)
        for epoch in track(left, title, self.training.progress and len(left) > 0):
            yield epoch
            self.scheduler.step()
            self.done = epoch + 1
            self._save()

    def batches(self, data: Dataset[Any], order: Tensor) -> Iterator[tuple[Tensor, Any, Any]]:
        count = -(-len(order) // self.training.batch_size)
        shuffled = order[torch.randperm(len(order), generator=self.generator)]
        return _load(data, shuffled.tensor_split(count), self.training.num_workers)

    def augmented(self, x: Any, y: Any) -> tuple[Any, Any]:
        x, y = _moved(x, self.device), _moved(y, self.device)
        return (x if self.training.augment is None else self.training.augment(x)), y

    def losses(self, x: Any, y: Any) -> Tensor:
        outputs = self.model(x)
        if self.training.loss_fn is None:
            return F.cross_entropy(outputs, y, reduction="none")
        return self.training.loss_fn(outputs, y)

    def note(self, places: Tensor, weights: Tensor) -> None:
        self.sums.index_add_(0, places, weights.double().cpu())
        self.counts.index_add_(0, places, torch.ones(len(places)))

    @torch.no_grad()
    def final_weights(self, data: Dataset[Any], order: Tensor) -> Tensor:
        self.model.eval()
        parts = torch.split(order, self.training.batch_size)
        losses = [
            self.losses(_moved(x, self.device), _moved(y, self.device))
            for _, x, y in _load(data, parts)
        ]
        self.model.train()
        weights: Tensor = self.reweighter.weight_net(torch.cat(losses))
        return weights.double().cpu()

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        state["generator"] = self.generator.get_state()
        state["random_state"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["cuda_state"] = torch.cuda.get_rng_state(self.device)
        for name in ("identity", "sums", "counts", "done"):
            state[name] = getattr(self, name)
        save_atomically(state, self.checkpoint)

    def load(self, state: Mapping[str, Any]) -> None:
        for name, own in self.identity.items():
            if state["identity"].get(name) != own:
                raise ValueError(
                    f"{self.checkpoint} holds a run with {name}={state['identity'].get(name)!r}, "
                    f"this one has {own!r}; use another file or directory, or delete that one"
                )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random_state"])
        if "cuda_state" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_state"], self.device)
        self.sums, self.counts, self.done = state["sums"], state["counts"], int(state["done"])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {**parts, "reweighter": self.reweighter} if self.is_meta else parts


def plain(options: Mapping[str, Any]) -> str:
    """Options as text; tensors, networks and functions have names only."""
    return repr(sorted((k, v if isinstance(v, PLAIN) else "") for k, v in options.items()))


def save_atomically(state: Any, path: Path) -> None:
    """Writes a file wholly or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
