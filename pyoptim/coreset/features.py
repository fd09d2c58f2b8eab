"""Features and outputs of any network for every sample of a data set, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from pyoptim.coreset.progress import track
from pyoptim.coreset.selection import check_choice

TAKES = ("output", "input")


class Features(NamedTuple):
    """What a network gives for n samples, in the order of the data.

    Attributes:
        features: [n, d]; of the chosen layer, flattened.
        outputs: [n, o]; of the network, flattened; None where it gives something else.
        labels: [n]; None where the data has none.
    """

    features: Tensor
    outputs: Tensor | None
    labels: Tensor | None


def extract_features(
    model: nn.Module,
    data: Tensor | Dataset[Any] | Iterable[Any],
    *,
    layer: nn.Module | str | None = None,
    take: str = "output",
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Features:
    """Runs the network over the data without gradients and collects a layer's output or input.

    Args:
        model: any network that takes the first element of a batch (or, if the batch is a tensor,
            the batch). It is put into evaluation mode, so that a sample's features do not depend on
            its batch, and every part of it is put back into its own mode afterwards.
        data: a tensor [n, ...]; a Dataset; or batches, as from a DataLoader that does not shuffle.
            A sample or batch is x, or (x, label, ...).
        layer: a part of the model, or its name as in `model.named_modules()`; None is the model.
        take: "output" of the layer, or its first "input": the features that a last linear layer
            sees are `layer="fc", take="input"`.
        batch_size: for a tensor or a Dataset.
        device: where batches are moved; None is that of the model's first parameter.
        progress: whether to show a bar.

    Returns: everything on the CPU, in the dtype that the network gives.

    Raises:
        ValueError: no data; a DataLoader that shuffles; an unknown layer; a layer that is not
            called exactly once per forward pass.
        TypeError: the layer gives or takes something that is not a tensor.
    """
    check_choice("take", take, TAKES)
    part = _find_layer(model, layer)
    where = _device_of(model) if device is None else torch.device(device)
    batches = _batches(data, batch_size)
    collected = _Collected()
    with _evaluation(model), _seen(part, take) as values, torch.no_grad():
        for batch in track(batches, "features", progress, _length(batches)):
            inputs, labels = _split(batch)
            values.clear()
            outputs = model(_moved(inputs, where))
            collected.add(_only(values, part, take), outputs, labels)
    return collected.result()


class _Collected:
    """Rows of all batches."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, features: Any, outputs: Any, labels: Any) -> None:
        self.features.append(_rows(features))
        if isinstance(outputs, Tensor) and outputs.dim():
            self.outputs.append(_rows(outputs))
        if labels is not None:
            self.labels.append(torch.as_tensor(labels).cpu())

    def result(self) -> Features:
        if not self.features:
            raise ValueError("data is empty; there is nothing to take features of")
        outputs, labels = (torch.cat(v) if v else None for v in (self.outputs, self.labels))
        return Features(torch.cat(self.features), outputs, labels)


def _rows(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() == 0:
        kind = type(value).__name__
        raise TypeError(f"features must be a tensor [batch, ...], got {kind}; choose another layer")
    rows: Tensor = value.detach().cpu()
    return rows[:, None] if rows.dim() == 1 else rows.flatten(1)


def _find_layer(model: nn.Module, layer: nn.Module | str | None) -> nn.Module:
    if layer is None:
        return model
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(layer, str):
        if layer not in modules:
            names = ", ".join(repr(name) for name in modules if name)
            raise ValueError(f"layer must name a part of the model, one of {names}; got {layer!r}")
        return modules[layer]
    if all(layer is not module for module in modules.values()):
        raise ValueError(f"layer is not a part of the model: {layer!r}")
    return layer


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _batches(data: Any, batch_size: int) -> Iterable[Any]:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
    if isinstance(data, Tensor):
        if data.dim() == 0 or len(data) == 0:
            raise ValueError(f"data must be [n, ...] and not empty, got shape {tuple(data.shape)}")
        parts: tuple[Tensor, ...] = torch.split(data, batch_size)
        return parts
    if isinstance(data, DataLoader):
        if isinstance(data.sampler, RandomSampler) or data.drop_last:
            raise ValueError(
                "the DataLoader shuffles or drops samples, so that features would not be in the "
                "order of the data; use shuffle=False and drop_last=False"
            )
        return data
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=batch_size)
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a tensor, Dataset or DataLoader, got {type(data).__name__}")
    return data


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # an iterator, or a loader of an iterable data set
        return None


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def _moved(inputs: Any, device: torch.device) -> Any:
    return inputs.to(device, non_blocking=True) if isinstance(inputs, Tensor) else inputs


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _seen(part: nn.Module, take: str) -> Iterator[list[Any]]:
    """A list of what the part has given or taken."""
    values: list[Any] = []

    def keep(value: Any) -> None:
        # Cloned: a later layer may change it in place (ReLU(inplace=True)).
        values.append(value.clone() if isinstance(value, Tensor) else value)

    if take == "output":
        handle = part.register_forward_hook(lambda module, args, output: keep(output))
    else:
        handle = part.register_forward_pre_hook(lambda module, args: keep(next(iter(args), None)))
    try:
        yield values
    finally:
        handle.remove()


def _only(values: list[Any], part: nn.Module, take: str) -> Any:
    if len(values) != 1:
        raise ValueError(
            f"the layer {type(part).__name__} was called {len(values)} times in one forward pass, "
            "so its features are not defined; choose a layer that is called once"
        )
    if take == "input" and values[0] is None:
        raise TypeError(f"the layer {type(part).__name__} takes no positional input")
    return values[0]
