"""Search, selection and broadcast over rows spread over the processes of torch.distributed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from pyoptim.coreset.broadcast import (
    average_of_nearest,
    check_covered,
    check_neighbors,
    checked_coreset,
)
from pyoptim.coreset.centers import CenterDistances, center_distances, class_medians
from pyoptim.coreset.distance import nearest
from pyoptim.coreset.greedy import pick_farthest
from pyoptim.coreset.matrices import as_tensor, check_matrix
from pyoptim.coreset.methods import METHODS, select
from pyoptim.coreset.moderate import select_middle
from pyoptim.coreset.scores import by_score, el2n_scores, grand_scores, uncertainty_scores
from pyoptim.coreset.selection import (
    Selection,
    check_choice,
    check_labels,
    matrix,
    resolve_budget,
    vector,
)

# Numbers that a process holds of all samples at a time, for the medians.
_GATHERED_NUMBERS = 1 << 24
# Arguments that every process holds in full.
_REPLICATED = ("val_features", "val_logits", "val_labels", "initial")


def select_sharded(
    data: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = "moderate",
    group: ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Selection:
    """`select` over the shards of all processes, with the result that one process would have.

    Every process calls it with its own rows; together, in the order of ranks, they are the data.

    Args:
        data: [n of this process, ...], as for `select`; at least one row in each process.
        labels: [n of this process], integers; in all processes or in none.
        method: a name in `METHODS`.
        group: the processes; None is the default group.
        generator: for methods that draw; in the same state in all processes. None: the first
            process draws a seed from torch's default one.
        options: as for the method; tensors with one row per sample (`logits`) are this process's
            rows, validation data and `initial` (numbers among all samples) are the same everywhere.

    Returns: indices among all samples, and weights; the same on every process.

    What travels: one score per sample ("uncertainty", "el2n", "grand", "forgetting"); blocks of
    columns ("moderate"); one row and one number per pick ("k_center_greedy" with scope="global");
    else all rows, to every process.

    Raises:
        ValueError: an argument is not as described, on any process: all of them raise.
    """
    check_choice("method", method, tuple(METHODS))
    if not isinstance(data, Tensor):
        raise TypeError(f"data must be a tensor, got {type(data).__name__}")
    shards = _Shards(group, data.device)
    shards.agree("method and labels", (method, labels is not None))
    x = shards.checked(lambda: _local(method, data, labels, options))
    all_labels = None if labels is None else shards.gather(labels.to(data.device))
    if "generator" in inspect.signature(METHODS[method]).parameters:
        options["generator"] = shards.same_generator() if generator is None else generator
    if method in _SCORES:
        return by_score(shards.gather(x), all_labels, **_without(options, *_LOCAL_OPTIONS))
    if method == "moderate" and all_labels is not None:
        return _moderate(shards, x, all_labels, **options)
    if method == "k_center_greedy" and options.get("scope", "global") == "global":
        return _k_center(shards, x, all_labels, **options)
    if method == "random":
        x = x.new_empty(len(x), 1)  # only the number of rows matters
    for name, value in options.items():
        if isinstance(value, Tensor) and name not in _REPLICATED:
            options[name] = shards.gather(value)
    return select(shards.gather(x), all_labels, method=method, **options)


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


# -- one score per sample --------------------------------------------------------------------------

# (data, labels, options) of this process -> scores of its samples.
_SCORES: dict[str, Callable[..., Tensor]] = {
    "uncertainty": lambda x, y, o: uncertainty_scores(x, o.get("kind", "least_confidence")),
    "el2n": lambda x, y, o: el2n_scores(x, y),
    "grand": lambda x, y, o: grand_scores(x, o["logits"], y, bias=o.get("bias", True)),
    "forgetting": lambda x, y, o: vector("scores", x, allow_inf=True),
}
_LOCAL_OPTIONS = ("kind", "logits", "bias")


def _local(method: str, data: Tensor, labels: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The checked rows of this process, or their scores."""
    if labels is not None:
        check_labels("labels", labels, len(data))
    if method in _SCORES:
        return _SCORES[method](data, labels, options)
    logits = options.get("logits")
    if logits is not None:
        matrix("logits", logits, rows=len(data))
    return data if method == "random" else matrix("features", data)


# -- moderate --------------------------------------------------------------------------------------


def _moderate(
    shards: _Shards, x: Tensor, labels: Tensor, *, center: str = "median", **options: Any
) -> Selection:
    if center != "median":
        return select(shards.gather(x), labels, center=center, **options)
    numbers = torch.unique(labels, return_inverse=True)[1]
    centers = _class_medians(shards, x, numbers)
    start = shards.start(len(x))
    own = center_distances(x, numbers[start : start + len(x)], centers)
    return select_middle(shards.gather(own), labels, **options)


def _class_medians(shards: _Shards, x: Tensor, numbers: Tensor) -> Tensor:
    width = max(1, _GATHERED_NUMBERS // len(numbers))
    parts = [class_medians(shards.gather(block), numbers) for block in torch.split(x, width, 1)]
    return torch.cat(parts, 1).to(x.dtype)


# -- k-center --------------------------------------------------------------------------------------


def _k_center(
    shards: _Shards,
    x: Tensor,
    labels: Tensor | None,
    *,
    generator: torch.Generator,
    fraction: float | None = None,
    budget: int | None = None,
    scope: str = "global",
    initial: Tensor | None = None,
    progress: bool = False,
) -> Selection:
    n = sum(shards.sizes(len(x)))
    count = resolve_budget(n, fraction, budget)
    distances = _ShardedDistances(shards, x)
    return pick_farthest(distances, n, count, initial, generator, progress, x.device)


class _ShardedDistances:
    """`CenterDistances` by row numbers among all samples."""

    def __init__(self, shards: _Shards, x: Tensor) -> None:
        self.shards, self.x = shards, x
        self.starts = [0]
        for size in shards.sizes(len(x)):
            self.starts.append(self.starts[-1] + size)
        self.own = CenterDistances(x)

    def add(self, row: int) -> tuple[int, float]:
        owner = next(r for r in range(self.shards.world) if row < self.starts[r + 1])
        center = torch.empty(self.x.shape[1], dtype=torch.float64, device=self.x.device)
        if owner == self.shards.rank:
            center.copy_(self.x[row - self.starts[owner]])
        self.shards.broadcast(center, owner)
        farthest, sqdist = self.own.add(center)
        found = torch.tensor([[sqdist, float(farthest)]], dtype=torch.float64, device=self.x.device)
        of_ranks = self.shards.gather(found, [1] * self.shards.world)
        best = int(of_ranks[:, 0].argmax())  # the first rank, and so the lowest number, on ties
        return self.starts[best] + int(of_ranks[best, 1]), float(of_ranks[best, 0])


# -- search and broadcast --------------------------------------------------------------------------


def nearest_sharded(
    x: Tensor,
    y: Tensor,
    k: int = 1,
    *,
    same_class: tuple[Tensor, Tensor] | None = None,
    metric: str = "sqeuclidean",
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`nearest` of this process's rows of `x` among the rows of `y` of all processes.

    Every process calls it with its own rows; the results are those of one process with all rows.

    Args:
        x: [n of this process, d], as for `nearest`.
        y: [m of this process, d]; together, in the order of ranks, they are searched. May be empty
            in some processes.
        k, metric, backend: as for `nearest`; the same everywhere.
        same_class: labels of this process's rows of `x` and of `y`; in all processes or in none.
        group: the processes; None is the default group.

    Returns: (distances, indices) for this process's rows of `x`; indices count all rows of `y`.

    What travels: `y`, one process's rows at a time; all of it at once with `same_class`.

    Raises:
        ValueError: an argument is not as described, on any process: all of them raise.
        RuntimeError: torch.distributed is not initialized.
    """
    shards = _Shards(group, y.device)
    shards.agree("k and whether there is same_class", (k, same_class is not None))
    own = shards.checked(lambda: check_matrix(as_tensor(y, "y"), "y"))
    parts: Iterator[Tensor] = iter(())
    if same_class is not None:
        pair = same_class
        of_y = shards.checked(lambda: _labels_of(pair, len(y)))
        same_class = pair[0], shards.gather(of_y.to(own.device))
        own = shards.gather(own)
    else:
        parts = shards.broadcast_each(own)
    indices = torch.empty(0)

    def search() -> Tensor:
        nonlocal indices
        rows = own if same_class is not None else parts
        try:
            distances, indices = nearest(
                x, rows, k, same_class=same_class, metric=metric, backend=backend
            )
        finally:
            for _ in parts:  # the other processes wait for the rest
                pass
        return distances

    return shards.checked(search), indices


def _labels_of(same_class: tuple[Tensor, Tensor], m: int) -> Tensor:
    if isinstance(same_class, Tensor) or len(same_class) != 2:
        raise TypeError("same_class must be a pair: labels of the rows of x, labels of those of y")
    check_labels("same_class: labels of y", same_class[1], m)
    return same_class[1].long()


def broadcast_weights_sharded(
    features: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    labels: Tensor | None = None,
    same_class: bool = False,
    neighbors: int = 1,
    group: ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """`broadcast_weights` for the samples of this process, from a coreset of all processes'.

    Args:
        features: [n of this process, ...]; at least one row in each process.
        indices: [k], integers; numbers among the samples of all processes, as from
            `select_sharded`; the same on every process, as are the weights.
        weights: [k].
        labels: [n of this process], integers; needed for same_class.
        same_class, neighbors, options: as for `broadcast_weights`.
        group: the processes; None is the default group.

    Returns: [n of this process].

    What travels: the rows of the coreset, to every process.

    Raises:
        ValueError: an argument is not as described, on any process: all of them raise.
    """
    shards = _Shards(group, features.device)
    shards.agree("same_class and the coreset", (same_class, len(indices)))
    x = shards.checked(lambda: _local("broadcast", features, labels, {}))
    start, n = shards.start(len(x)), sum(shards.sizes(len(x)))
    chosen = shards.checked(lambda: checked_coreset(indices, weights, n)[0]).to(x.device)
    is_own = (chosen >= start) & (chosen < start + len(x))
    own = chosen[is_own] - start
    order = shards.gather(is_own.nonzero().squeeze(1)).argsort()  # of ranks to that of `indices`
    coreset = shards.gather(x[own])[order]
    classes: tuple[Tensor, Tensor] | None = None
    if same_class:
        of_own = shards.checked(lambda: _labels_of_all(labels, x.device))
        classes = (of_own, shards.gather(of_own[own])[order])

    def average() -> Tensor:
        check_neighbors(neighbors)
        if classes is not None:
            check_covered(*classes)
        return average_of_nearest(x, coreset, weights, classes, neighbors, **options)

    return shards.checked(average)


def _labels_of_all(labels: Tensor | None, device: torch.device) -> Tensor:
    if labels is None:
        raise ValueError("same_class=True needs labels")
    return labels.to(device, torch.int64)


# -- processes -------------------------------------------------------------------------------------


class _Shards:
    """Collectives over rows that are not equally many in all processes."""

    def __init__(self, group: ProcessGroup | None, device: torch.device) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "torch.distributed is not initialized; call torch.distributed.init_process_group() "
                "first, or use select() in a single process"
            )
        self.group, self.device = group, device  # NCCL takes tensors of GPUs only
        self.rank = distributed.get_rank(group)
        self.world = distributed.get_world_size(group)

    def checked(self, run: Callable[[], Tensor]) -> Tensor:
        """The result of a local computation; an error of any process is raised in all of them."""
        result, error, shape = None, None, None
        try:
            result = run()
            shape = (tuple(result.shape[1:]), str(result.dtype))
        except Exception as raised:
            error = raised
        states: list[Any] = [None] * self.world
        distributed.all_gather_object(states, (shape, error and str(error)), group=self.group)
        for rank, (other, message) in enumerate(states):
            if message is not None:
                raise ValueError(f"process {rank}: {message}") from error
            if other != states[0][0]:
                raise ValueError(
                    f"the data have rows of (shape, dtype) {states[0][0]} in process 0, but "
                    f"{other} in process {rank}"
                )
        assert result is not None
        return result

    def agree(self, what: str, value: Any) -> None:
        """Raises ValueError in all processes unless they have the same value."""
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value, group=self.group)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"{what}: process 0 has {values[0]!r}, but process {rank} has {other!r}; "
                    "all processes must be called alike"
                )

    def sizes(self, n: int) -> list[int]:
        own = torch.tensor([n], device=self.device)
        counts = [torch.empty_like(own) for _ in range(self.world)]
        distributed.all_gather(counts, own, group=self.group)
        return [int(count) for count in counts]

    def start(self, n: int) -> int:
        return sum(self.sizes(n)[: self.rank])

    def gather(self, rows: Tensor, sizes: list[int] | None = None) -> Tensor:
        """The rows of all processes, in the order of ranks; `sizes` where they are known."""
        sizes = self.sizes(len(rows)) if sizes is None else sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def broadcast_each(self, rows: Tensor) -> Iterator[Tensor]:
        """Yields the rows of one process after the other."""
        for rank, size in enumerate(self.sizes(len(rows))):
            part = rows.contiguous() if rank == self.rank else rows.new_empty(size, rows.shape[1])
            self.broadcast(part, rank)
            yield part

    def broadcast(self, tensor: Tensor, rank: int) -> None:
        distributed.broadcast(tensor, group_src=rank, group=self.group)

    def same_generator(self) -> torch.Generator:
        seed = torch.zeros(1, dtype=torch.int64)
        if self.rank == 0:
            seed = torch.randint(2**62, (1,))
        seed = seed.to(self.device)
        self.broadcast(seed, 0)
        return torch.Generator().manual_seed(int(seed))
