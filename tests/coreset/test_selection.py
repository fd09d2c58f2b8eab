"""Selections against plain loops in float64: random, moderate, scores, k-center, herding."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyoptim import coreset
from pyoptim.coreset import ForgettingCounter, Selection
from pyoptim.coreset.selection import class_shares

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def one_thread(process_settings: None) -> None:
    """The tensors are small: more threads would only wait for one another."""
    torch.set_num_threads(1)


def make(n: int, d: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Features, labels (every class where n allows) and logits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(classes, (n,), generator=generator)
    labels[: min(n, classes)] = torch.arange(min(n, classes))
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return x, labels, logits


sizes = st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
fractions = st.floats(0.02, 1.0)


def official_moderate(x: np.ndarray, y: np.ndarray, rate: float) -> np.ndarray:
    """The rank window, written as the method is described, with NumPy's median."""
    distances = np.empty(len(x))
    for c in np.unique(y):
        center = np.median(x[y == c], axis=0)
        distances[y == c] = np.sqrt(((x[y == c].astype(np.float64) - center) ** 2).sum(1))
    order = np.argsort(distances, kind="stable")
    low, high = round(len(x) * (0.5 - rate / 2)), round(len(x) * (0.5 + rate / 2))
    return np.sort(order[low:high])


# -- moderate --------------------------------------------------------------------------------------


@given(sizes, fractions)
def test_moderate_is_the_official_rank_window(size: Any, fraction: float) -> None:
    n, d, classes, seed = size
    x, labels, _ = make(n, d, classes, seed)
    expected = official_moderate(x.numpy(), labels.numpy(), fraction)
    if len(expected) == 0 or round(n * fraction) == 0:
        with pytest.raises(ValueError, match=r"budget=1"):
            coreset.moderate(x, labels, fraction=fraction)
        return
    chosen = coreset.moderate(x, labels, fraction=fraction)
    assert chosen.indices.tolist() == expected.tolist()
    assert chosen.weights is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moderate_takes_the_dtype_of_the_features_for_its_centers(dtype: torch.dtype) -> None:
    x, labels, _ = make(101, 5, 3, dtype=dtype)
    expected = torch.zeros(101, dtype=torch.float64)
    for c in range(3):
        rows = x[labels == c]
        center = torch.from_numpy(np.median(rows.double().numpy(), axis=0)).to(dtype)
        expected[labels == c] = (rows.double() - center.double()).norm(dim=1)
    torch.testing.assert_close(coreset.moderate_scores(x, labels), expected, rtol=1e-12, atol=1e-12)


@given(sizes, fractions, st.sampled_from(("global", "class")))
def test_closest_keeps_the_distances_nearest_to_their_median(
    size: Any, fraction: float, scope: str
) -> None:
    n, d, classes, seed = size
    x, labels, _ = make(n, d, classes, seed)
    if round(n * fraction) == 0:
        return
    chosen = coreset.moderate(x, labels, fraction=fraction, rule="closest", scope=scope).indices
    distances = coreset.moderate_scores(x, labels)
    groups = [torch.arange(n)] if scope == "global" else members(labels)
    kept = set(chosen.tolist())
    for rows in groups:
        gaps = (distances[rows] - np.median(distances[rows].numpy())).abs()
        inside = [g for g, r in zip(gaps.tolist(), rows.tolist(), strict=True) if r in kept]
        outside = [g for g, r in zip(gaps.tolist(), rows.tolist(), strict=True) if r not in kept]
        assert not inside or not outside or max(inside) <= min(outside)
    assert len(chosen) == round(n * fraction)


def test_moderate_of_one_class_scope_keeps_the_middle_ranks_of_each_class() -> None:
    x = torch.tensor([[-5.0], [-4.0], [-3.0], [-2.0], [0.0], [2.0], [3.0], [4.0], [5.0]])
    x = torch.cat([x, x[:3] * 100])
    labels = torch.tensor([7] * 9 + [-1] * 3)
    # Distances of label 7 to 0: 5 4 3 2 0 2 3 4 5, the middle three ranks of nine are 3, 3 and 4.
    chosen = coreset.moderate(x, labels, budget=4, scope="class").indices
    assert chosen.tolist() == [1, 2, 6, 9]


def test_a_class_of_one_sample_is_its_own_center() -> None:
    x, labels = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]), torch.tensor([0, 0, 5])
    for center in ("median", "mean"):
        distances = coreset.moderate_scores(x, labels, center=center).tolist()
        assert distances == pytest.approx([2**0.5, 2**0.5, 0.0], rel=1e-15)


def members(labels: Tensor) -> list[Tensor]:
    return [(labels == c).nonzero().squeeze(1) for c in labels.unique()]


# -- scores ----------------------------------------------------------------------------------------


def test_uncertainty_scores_are_the_formulas_and_do_not_cancel() -> None:
    logits = make(50, 1, 4)[2]
    p = logits.softmax(1).numpy()
    ranked = np.sort(p, axis=1)[:, ::-1]
    for kind, expected in (
        ("least_confidence", 1 - ranked[:, 0]),
        ("entropy", -(p * np.log(p)).sum(1)),
        ("margin", 1 - (ranked[:, 0] - ranked[:, 1])),
    ):
        scores = coreset.uncertainty_scores(logits, kind)
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-13, atol=1e-15)
    sure = torch.tensor([[60.0, 0.0]], dtype=torch.float64)  # p = 1 - 8.8e-27, rounds to 1
    exact = math.exp(-60) / (1 + math.exp(-60))
    assert coreset.uncertainty_scores(sure).item() == pytest.approx(exact, rel=1e-14)
    doubled = coreset.uncertainty_scores(sure, "margin").item()
    assert doubled == pytest.approx(2 * exact, rel=1e-14)


@pytest.mark.parametrize("scope", ["global", "class"])
def test_uncertainty_takes_the_least_certain_in_either_scope(scope: str) -> None:
    logits = torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.1, 0.0], [0.0, 9.0], [0.0, 2.0], [0.0, 3.0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    chosen = coreset.uncertainty(logits, labels, budget=2, scope=scope)
    assert chosen.indices.tolist() == ([1, 2] if scope == "global" else [2, 4])


@settings(max_examples=10)
@given(sizes)
def test_el2n_and_grand_are_norms_of_explicit_gradients(size: Any) -> None:
    n, d, classes, seed = size
    x, labels, logits = make(n, d, classes, seed)
    by_bias, by_weight = [], []
    for i in range(n):
        w = torch.zeros(classes, d, dtype=torch.float64, requires_grad=True)
        bias = logits[i].clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy((w @ x[i] + bias)[None], labels[i : i + 1])
        of_weight, of_bias = torch.autograd.grad(loss, (w, bias))
        by_weight.append(of_weight.norm())
        by_bias.append(of_bias.norm())
    bare, bias_only = torch.stack(by_weight), torch.stack(by_bias)
    torch.testing.assert_close(coreset.el2n_scores(logits, labels), bias_only)
    torch.testing.assert_close(coreset.grand_scores(x, logits, labels, bias=False), bare)
    torch.testing.assert_close(coreset.grand_scores(x, logits, labels), bare.hypot(bias_only))


def test_scores_of_several_runs_are_averaged() -> None:
    x, labels, logits = make(20, 3, 4)
    runs, inputs = torch.stack([logits, 2 * logits]), torch.stack([x, 3 * x])
    el2n = [coreset.el2n_scores(run, labels) for run in runs]
    grand = [coreset.grand_scores(h, run, labels) for h, run in zip(inputs, runs, strict=True)]
    torch.testing.assert_close(coreset.el2n_scores(runs, labels), (el2n[0] + el2n[1]) / 2)
    torch.testing.assert_close(
        coreset.grand_scores(inputs, runs, labels), (grand[0] + grand[1]) / 2
    )


@pytest.mark.parametrize("keep", ["highest", "lowest"])
def test_equal_scores_are_taken_in_order_of_the_samples(keep: str) -> None:
    scores = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    chosen = coreset.by_score(scores, budget=2, keep=keep).indices.tolist()
    assert chosen == ([0, 2] if keep == "highest" else [1, 3])


def test_el2n_and_grand_keep_the_highest_scores_or_the_lowest() -> None:
    x, labels, logits = make(30, 3, 4)
    for score, chosen in (
        (coreset.el2n_scores(logits, labels), lambda keep: coreset.el2n(logits, labels, **keep)),
        (
            coreset.grand_scores(x, logits, labels),
            lambda keep: coreset.grand(x, labels, logits=logits, **keep),
        ),
    ):
        order = score.argsort().tolist()
        assert chosen({"budget": 7}).indices.tolist() == sorted(order[-7:])
        assert chosen({"budget": 7, "keep": "lowest"}).indices.tolist() == sorted(order[:7])


def test_forgetting_counts_turns_from_right_to_wrong() -> None:
    generator = torch.Generator().manual_seed(3)
    history = torch.rand(12, 9, generator=generator) < 0.5  # [epoch, sample]: right?
    history[:, 8] = False
    counter = ForgettingCounter(9)
    for right in history:
        order = torch.randperm(9, generator=generator)
        labels = torch.randint(3, (9,), generator=generator)
        predicted = torch.where(right, labels, (labels + 1) % 3)
        for at in order.split(4):
            logits = torch.nn.functional.one_hot(predicted[at], 3).double()
            counter.update(at, logits, labels[at])
    for i in range(9):
        turns = sum(a and not b for a, b in zip(history[:, i], history[1:, i], strict=False))
        assert counter.scores()[i] == (turns if history[:, i].any() else math.inf)
    assert 8 in coreset.forgetting(counter.scores(), budget=1).indices
    copy = ForgettingCounter(9)
    copy.load_state_dict(counter.state_dict())
    assert torch.equal(copy.scores(), counter.scores())


# -- random, k-center, herding ---------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), fractions)
def test_class_shares_are_proportional_and_leave_no_class_out(
    members: list[int], fraction: float
) -> None:
    count = max(1, round(sum(members) * fraction))
    shares = class_shares(members, count)
    assert sum(shares) == count
    assert all(0 <= share <= size for share, size in zip(shares, members, strict=True))
    if count >= len(members):
        assert min(shares) >= 1
    exact = [count * size / sum(members) for size in members]
    missing = sum(value < 1 for value in exact)
    assert all(abs(a - b) < 1 + missing for a, b in zip(shares, exact, strict=True))


def test_random_follows_its_generator_and_its_scope() -> None:
    x, labels, _ = make(200, 2, 3)

    def draw(seed: int, **options: Any) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return coreset.random(x, labels, generator=generator, **options).indices.tolist()

    assert draw(1, fraction=0.1) == draw(1, fraction=0.1) != draw(2, fraction=0.1)
    assert draw(1, budget=200) == list(range(200))
    counts = labels[draw(1, budget=20, scope="class")].bincount().tolist()
    assert counts == class_shares(labels.bincount().tolist(), 20)
    drawn = torch.tensor([draw(seed, budget=20) for seed in range(300)]).flatten().bincount()
    assert 10 <= drawn.min() <= drawn.max() <= 55  # 30 expected; 5 deviations of sqrt(27)


def plain_k_center(x: Tensor, k: int, centers: list[int]) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < k:
        best, farthest = -1, -1.0
        for i in range(len(x)):
            if i in centers:
                continue
            distance = min(float((x[i] - x[c]).square().sum()) for c in centers)
            if distance > farthest:
                best, farthest = i, distance
        centers = [*centers, best]
        chosen.append(best)
    return chosen


@given(sizes, st.data())
def test_k_center_takes_the_farthest_each_time(size: Any, data: Any) -> None:
    n, d, _, seed = size
    # Integers: distances are exact, ties and repeated rows are frequent.
    x = torch.randint(-2, 3, (n, d), generator=torch.Generator().manual_seed(seed)).double()
    initial = data.draw(st.lists(st.integers(0, n - 1), max_size=3, unique=True))
    if len(initial) == n:
        return
    k = data.draw(st.integers(1, n - len(initial)))
    chosen = coreset.k_center_greedy(
        x,
        budget=k,
        initial=torch.tensor(initial, dtype=torch.int64) if initial else None,
        generator=torch.Generator().manual_seed(seed),
    ).indices.tolist()
    if initial:
        expected = plain_k_center(x, k, initial)
    else:
        first = int(torch.randint(n, (), generator=torch.Generator().manual_seed(seed)))
        expected = [first, *plain_k_center(x, k - 1, [first])]
    assert chosen == sorted(expected)
    assert not set(chosen) & set(initial)


def test_k_center_of_class_scope_stays_within_classes() -> None:
    x, labels, _ = make(60, 3, 3)
    chosen = coreset.k_center_greedy(
        x, labels, budget=12, scope="class", initial=torch.tensor([0, 1, 2])
    ).indices
    expected = []
    shares = class_shares(labels.bincount().tolist(), 12)
    for c, rows in enumerate(members(labels)):
        start = rows.tolist().index(c)  # sample c is the first of class c
        expected += rows[plain_k_center(x[rows], shares[c], [start])].tolist()
    assert chosen.tolist() == sorted(expected)


def plain_herding(x: Tensor, k: int) -> list[int]:
    mean, chosen = x.mean(0), []
    for t in range(1, k + 1):
        gaps = {
            i: float((mean - (x[[*chosen, i]].sum(0)) / t).square().sum())
            for i in range(len(x))
            if i not in chosen
        }
        chosen.append(min(gaps, key=lambda i: gaps[i]))
    return chosen


@given(sizes, fractions, st.sampled_from(("global", "class")))
def test_herding_brings_the_mean_closest_each_time(size: Any, fraction: float, scope: str) -> None:
    n, d, classes, seed = size
    x, labels, _ = make(n, d, classes, seed)
    k = max(1, round(n * fraction))
    chosen = coreset.herding(x, labels, budget=k, scope=scope).indices.tolist()
    if scope == "global":
        assert chosen == sorted(plain_herding(x, k))
        return
    groups, expected = members(labels), []
    for rows, share in zip(groups, class_shares([len(g) for g in groups], k), strict=True):
        expected += rows[plain_herding(x[rows], share)].tolist()
    assert chosen == sorted(expected)


def test_herding_beats_random_at_matching_the_mean() -> None:
    x, _, _ = make(500, 8, 1)
    gap = (x[coreset.herding(x, budget=20, scope="global").indices].mean(0) - x.mean(0)).norm()
    drawn = x[coreset.random(x, budget=20, generator=torch.Generator().manual_seed(0)).indices]
    assert gap < 0.2 * (drawn.mean(0) - x.mean(0)).norm()


# -- all of them -----------------------------------------------------------------------------------


def _caller(name: str, first: str, has_logits: bool = False) -> Callable[..., Selection]:
    def call(x: Tensor, labels: Tensor, logits: Tensor, **options: Any) -> Selection:
        if has_logits:
            options["logits"] = logits
        if name == "glister":
            options |= {"val_features": x, "val_logits": logits, "val_labels": labels}
        data = {"features": x, "logits": logits, "scores": x[:, 0]}[first]
        return coreset.select(data, labels, method=name, **options)

    return call


OF_FEATURES = ("random", "moderate", "k_center_greedy", "herding", "facility_location")
CALLS = {name: _caller(name, "features") for name in OF_FEATURES}
CALLS |= {name: _caller(name, "logits") for name in ("uncertainty", "el2n")}
CALLS["forgetting"] = _caller("forgetting", "scores")
CALLS |= {name: _caller(name, "features", True) for name in ("grand", "craig", "glister")}
CALLS["gradmatch"] = _caller("gradmatch", "features", True)


def test_every_method_is_called_here() -> None:
    assert set(CALLS) == set(coreset.METHODS)


@pytest.mark.parametrize("scope", ["global", "class"])
@pytest.mark.parametrize("method", CALLS)
def test_indices_are_sorted_int64_and_of_the_budget(method: str, scope: str) -> None:
    x, labels, logits = make(97, 5, 4)
    torch.manual_seed(1)
    chosen = CALLS[method](x, labels, logits, budget=23, scope=scope)
    indices = chosen.indices
    assert indices.dtype == torch.int64
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert len(indices) == 23 or (method == "gradmatch" and 0 < len(indices) < 23)
    if scope == "class" and method != "gradmatch":
        shares = class_shares(labels.bincount().tolist(), 23)
        assert labels[indices].bincount().tolist() == shares
    if chosen.weights is not None:
        assert chosen.weights.shape == indices.shape
        assert chosen.weights.dtype == torch.float64
    torch.manual_seed(1)
    assert torch.equal(CALLS[method](x, labels, logits, budget=23, scope=scope).indices, indices)


@pytest.mark.parametrize("method", CALLS)
def test_the_layout_of_the_data_does_not_matter(method: str) -> None:
    x, labels, logits = make(64, 6, 3)
    spread = torch.empty(64, 13, dtype=torch.float64)[:, 1:13:2]
    spread.copy_(x)
    picks = []
    for data, threads in ((x, 1), (spread, 2), (x.view(64, 2, 3), 2)):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        if data.dim() == 2 or method != "forgetting":
            picks.append(CALLS[method](data, labels, logits, fraction=0.25).indices.tolist())
    assert all(pick == picks[0] for pick in picks)


@pytest.mark.parametrize("method", CALLS)
def test_wrong_arguments_are_named(method: str) -> None:
    x, labels, logits = make(20, 3, 4)
    call = CALLS[method]
    for options, message in (
        ({}, "either fraction or budget"),
        ({"fraction": 0.5, "budget": 3}, "either fraction or budget"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
        ({"fraction": float("nan")}, "fraction must be above 0"),
        ({"fraction": 0.01}, "rounds to none; use budget=1"),
        ({"budget": 0}, "budget must be between 1 and the 20 samples, got 0"),
        ({"budget": 21}, "got 21"),
        ({"budget": 3, "scope": "classes"}, "scope must be one of 'global', 'class'"),
    ):
        with pytest.raises(ValueError, match=message):
            call(x, labels, logits, **options)
    with pytest.raises(TypeError, match=r"budget must be an int, got 2\.5"):
        call(x, labels, logits, budget=2.5)
    with pytest.raises(TypeError, match="labels must be integers"):
        call(x, labels.double(), logits, budget=3)
    with pytest.raises(ValueError, match=r"labels must have shape \(20,\), got \(19,\)"):
        call(x, labels[:19], logits, budget=3)


@pytest.mark.parametrize("method", [name for name in CALLS if name != "random"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_are_refused_and_located(method: str, value: float) -> None:
    x, labels, logits = make(20, 3, 4)
    x[7, 0] = logits[7, 0] = value
    if method == "forgetting" and value == float("inf"):
        assert 7 in CALLS[method](x, labels, logits, budget=1).indices
        return
    with pytest.raises(ValueError, match=r"holds NaN.* first (in row|at index) 7"):
        CALLS[method](x, labels, logits, budget=3)


@pytest.mark.parametrize("method", [n for n in CALLS if n not in ("forgetting", "random")])
def test_empty_and_integer_data_are_refused(method: str) -> None:
    x, labels, logits = make(20, 3, 4)
    with pytest.raises(ValueError, match="not empty"):
        CALLS[method](x[:0], labels[:0], logits[:0], budget=1)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        CALLS[method](x.long(), labels, logits.long(), budget=1)


def test_labels_outside_the_logits_are_located() -> None:
    x, labels, logits = make(20, 3, 4)
    labels[5] = 4
    with pytest.raises(ValueError, match=r"labels must be in 0..3.*labels\[5\] is 4"):
        coreset.el2n(logits, labels, budget=3)
    with pytest.raises(ValueError, match=r'scope="class" needs labels'):
        coreset.k_center_greedy(x, budget=3, scope="class")
    with pytest.raises(ValueError, match="method must be one of 'random'"):
        coreset.select(x, labels, method="unknown", budget=3)
    with pytest.raises(ValueError, match="twice"):
        ForgettingCounter(4).update(torch.tensor([1, 1]), logits[:2], labels[:2])
    with pytest.raises(ValueError, match="18 samples are wanted, but 3 of the 20 are initial"):
        coreset.k_center_greedy(x, budget=18, initial=torch.tensor([0, 1, 2]))
