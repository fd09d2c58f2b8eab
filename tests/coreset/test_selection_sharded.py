"""Search, selection and broadcast over rows that two processes share, against one with all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_two_processes
from torch import Tensor, distributed

from pyoptim import coreset

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this build of torch has no gloo",
)
N, SPLIT = 61, 23


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(N, 5, generator=generator)
    x[40:45] = x[3]  # repeated rows in both shards
    labels = torch.randint(3, (N,), generator=generator)
    return x, labels, torch.randn(N, 3, generator=generator)


def calls() -> list[tuple[str, dict[str, Any]]]:
    """(method, options); every method, some of them in several ways."""
    return [
        *((name, {"budget": 13}) for name in coreset.METHODS),
        ("moderate", {"fraction": 0.2}),
        ("moderate", {"budget": 13, "scope": "class", "rule": "closest"}),
        ("moderate", {"budget": 13, "center": "mean"}),
        ("k_center_greedy", {"budget": 13, "scope": "class"}),
        ("k_center_greedy", {"budget": 50, "initial": torch.tensor([2, 30])}),
        ("uncertainty", {"budget": 13, "scope": "class", "kind": "margin"}),
        ("el2n", {"budget": 13, "keep": "lowest"}),
        ("grand", {"budget": 13, "bias": False}),
        ("facility_location", {"budget": 13, "greedy": "stochastic"}),
    ]


def arguments(
    method: str, options: dict[str, Any], rows: slice
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    x, labels, logits = data()
    options = {**options, "method": method}
    if method in ("grand", "craig", "glister", "gradmatch"):
        options["logits"] = logits[rows]
    if method == "glister":
        options |= {"val_features": x[:9], "val_logits": logits[:9], "val_labels": labels[:9]}
    if method in ("random", "k_center_greedy", "facility_location", "craig"):
        options["generator"] = torch.Generator().manual_seed(8)
    first = {"uncertainty": logits, "el2n": logits, "forgetting": x[:, 0]}.get(method, x)
    return (first[rows], labels[rows]), options


# The rows of y in the first process; the second has the rest of the 30.
Y_SPLITS = (11, 0, 30)


def searches() -> list[dict[str, Any]]:
    return [
        *({"k": k, "metric": metric} for k in (1, 5) for metric in ("sqeuclidean", "cosine", "ip")),
        {"k": 3, "same_class": (torch.arange(N) % 3, torch.arange(30) % 3)},
        {"k": 2, "dtype": torch.bfloat16},
        {"k": 1, "dtype": torch.float64, "backend": "reference"},
    ]


def rows_to_search(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = data()[0]
    y = torch.cat(
        [x[3:4], x[40:41], torch.randn(28, 5, generator=torch.Generator().manual_seed(1))]
    )
    y[20] = y[1]  # ties across processes
    return x.to(dtype), y.to(dtype)


def search_own(rank: int, rows: slice, split: int, **options: Any) -> tuple[Tensor, Tensor]:
    x, y = rows_to_search(options.pop("dtype", torch.float32))
    own = slice(0, split) if rank == 0 else slice(split, 30)
    if "same_class" in options:
        x_labels, y_labels = options["same_class"]
        options["same_class"] = x_labels[rows], y_labels[own]
    return coreset.nearest_sharded(x[rows], y[own], **options)


def failed_searches(rank: int, rows: slice) -> list[str]:
    x, y = rows_to_search()
    x[50], own = float("nan"), slice(0, 11) if rank == 0 else slice(11, 30)
    bad = y.clone()
    bad[17] = float("nan")
    messages = []
    for a, b, k in ((x, y, 1), (x[:45], bad, 1), (x[:45], y, 31), (x[:45], y[:, : 4 + rank], 1)):
        try:
            coreset.nearest_sharded(a[rows], b[own], k)
        except ValueError as error:
            messages.append(str(error))
    return messages


def run_rank(rank: int, folder: Path) -> None:
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, N)
    nearest = [search_own(rank, rows, s, **options) for options in searches() for s in Y_SPLITS]
    torch.save((nearest, failed_searches(rank, rows)), f"{folder}/nearest-{rank}.pt")
    found: list[Any] = []
    for method, options in calls():
        given, named = arguments(method, options, rows)
        found.append(tuple(coreset.select_sharded(*given, **named)))
    found.append(tuple(coreset.select_sharded(data()[0][rows], method="random", budget=7)))
    torch.save([run(rank, rows) for run in SEARCHES.values()], f"{folder}/search-{rank}.pt")
    for wrong in (errors_of_one, errors_of_shapes, errors_of_all, *ERRORS):
        try:
            wrong(rank, rows)
        except ValueError as error:
            found.append(str(error))
    torch.save(found, f"{folder}/{rank}.pt")


def errors_of_one(rank: int, rows: slice) -> None:
    x, labels, _ = data()
    x[50] = float("nan")  # a row of process 1
    coreset.select_sharded(x[rows], labels[rows], budget=3)


def errors_of_shapes(rank: int, rows: slice) -> None:
    x, labels, _ = data()
    coreset.select_sharded(x[rows, : 4 + rank], labels[rows], budget=3)


def errors_of_all(rank: int, rows: slice) -> None:
    x, labels, _ = data()
    coreset.select_sharded(x[rows], labels[rows], budget=N + 1)


# -- search and broadcast --------------------------------------------------------------------------


def near(rank: int | None, rows: slice, is_empty: bool = False, **options: Any) -> Tensor:
    """[n, 2k]: distances and indices; of one process with all rows for rank=None."""
    x, labels, _ = data()
    y = torch.cat([x[5:20], x[38:47], -x[:9]])  # repeated rows on both sides of a cut
    of_y = torch.cat([labels[5:20], labels[38:47], labels[:9]])
    cut = 0 if is_empty else 20
    own = slice(None) if rank is None else slice(0, cut) if rank == 0 else slice(cut, None)
    if options.pop("is_by_class", False):
        options["same_class"] = (labels[rows], of_y[own])
    search = coreset.nearest if rank is None else coreset.nearest_sharded
    distances, indices = search(x[rows], y[own], **options)
    return torch.cat([t.double().reshape(len(t), -1) for t in (distances, indices)], 1)


def spread(rank: int | None, rows: slice, **options: Any) -> Tensor:
    """[n, 1]: broadcast weights."""
    x, labels, _ = data()
    indices = torch.tensor([60, 2, 41, 3, 17, 23, 22, 9, 55, 0])
    weights = torch.rand(10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    run = coreset.broadcast_weights if rank is None else coreset.broadcast_weights_sharded
    return run(x[rows], indices, weights, labels=labels[rows], **options)[:, None]


SEARCHES: dict[str, Any] = {
    "k=1": near,
    "k=4": lambda rank, rows: near(rank, rows, k=4, metric="cosine"),
    "same_class": lambda rank, rows: near(rank, rows, k=2, is_by_class=True),
    "no rows in a process": lambda rank, rows: near(rank, rows, k=3, is_empty=True),
    "broadcast": spread,
    "broadcast, same_class": lambda rank, rows: spread(rank, rows, same_class=True, neighbors=3),
}


def errors_of_search(rank: int, rows: slice) -> None:
    x = data()[0]
    x[50] = float("nan")  # a row of process 1
    coreset.nearest_sharded(x[rows], x[:5])


def errors_of_arguments(rank: int, rows: slice) -> None:
    coreset.nearest_sharded(data()[0][rows], data()[0][:5], k=1 + rank)


def errors_of_classes(rank: int, rows: slice) -> None:
    x, labels, _ = data()
    weights = torch.ones(2)
    at = (labels != labels[0]).nonzero().squeeze(1)[:2]
    coreset.broadcast_weights_sharded(x[rows], at, weights, labels=labels[rows], same_class=True)


def errors_of_indices(rank: int, rows: slice) -> None:
    coreset.broadcast_weights_sharded(data()[0][rows], torch.tensor([N]), torch.ones(1))


ERRORS = (errors_of_search, errors_of_arguments, errors_of_classes, errors_of_indices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    in_two_processes(run_rank, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[list[Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_find_the_rows_that_one_does(folder: Path) -> None:
    ranks = [torch.load(folder / f"nearest-{rank}.pt")[0] for rank in range(2)]
    for number, options in enumerate(searches()):
        x, y = rows_to_search(options.pop("dtype", torch.float32))
        expected = coreset.nearest(x, y, **options)
        for at in range(number * len(Y_SPLITS), (number + 1) * len(Y_SPLITS)):
            for part in range(2):
                found = torch.cat([rank[at][part] for rank in ranks])
                assert torch.equal(found, expected[part])


def test_a_search_that_fails_in_one_process_raises_in_all(folder: Path) -> None:
    for rank in range(2):
        x_nan, y_nan, too_many, widths = torch.load(folder / f"nearest-{rank}.pt")[1]
        assert x_nan.startswith("process 1: x[27] holds a NaN")
        assert "y[17] holds a NaN" in y_nan
        assert "k=31 but y has 30 rows" in too_many
        assert "((4,)" in widths
        assert "((5,)" in widths


@pytest.mark.parametrize("number", range(len(SEARCHES)), ids=list(SEARCHES))
def test_two_processes_find_what_one_does(number: int, folder: Path) -> None:
    expected = list(SEARCHES.values())[number](None, slice(0, N))
    parts = [torch.load(folder / f"search-{rank}.pt")[number] for rank in range(2)]
    assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("number", range(len(calls())), ids=[name for name, _ in calls()])
def test_two_processes_select_what_one_does(number: int, results: list[list[Any]]) -> None:
    given, named = arguments(*calls()[number], slice(0, N))
    expected = coreset.select(*given, **named)
    for indices, weights in (result[number] for result in results):
        assert indices.tolist() == expected.indices.tolist()
        if expected.weights is None:
            assert weights is None
        else:
            torch.testing.assert_close(weights, expected.weights)


def test_processes_without_a_generator_draw_the_same(results: list[list[Any]]) -> None:
    drawn = [result[len(calls())][0].tolist() for result in results]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 7


def test_an_error_of_one_process_is_raised_in_all(results: list[list[Any]]) -> None:
    for result in results:
        alone, shapes, everywhere, search, arguments, classes, indices = result[len(calls()) + 1 :]
        assert alone.startswith("process 1: features holds NaN or inf, first in row 27")
        assert "rows of (shape, dtype) ((4,)" in shapes
        assert "((5,)" in shapes
        assert everywhere == f"budget must be between 1 and the {N} samples, got {N + 1}"
        assert search.startswith("process 1: x[27] holds a NaN")
        assert "process 0 has (1, False), but process 1 has (2, False)" in arguments
        assert "the coreset has no sample of label" in classes
        assert indices.endswith(f"indices must be in 0..{N - 1}, got [{N}]")


def test_without_process_group_the_error_says_what_to_do() -> None:
    if distributed.is_initialized():
        pytest.fail("another test has left its process group behind")
    with pytest.raises(RuntimeError, match=r"init_process_group\(\)"):
        coreset.select_sharded(*data()[:2], budget=3)
