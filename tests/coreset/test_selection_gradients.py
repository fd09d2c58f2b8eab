"""CRAIG, facility location, GLISTER and GradMatch against explicit gradients and plain greedy."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyoptim import coreset
from pyoptim.coreset import gradients as module
from pyoptim.coreset.gradients import LastLayerGradients, nonnegative_least_squares
from pyoptim.coreset.selection import class_shares

sizes = st.tuples(st.integers(2, 24), st.integers(1, 5), st.integers(2, 4), st.integers(0, 99))

# On a line, two samples in the middle have equal sums of distances.
planes = st.tuples(st.integers(2, 24), st.integers(2, 5), st.integers(2, 4), st.integers(0, 99))


@pytest.fixture(autouse=True)
def one_thread(process_settings: None) -> None:
    """The tensors are small: more threads would only wait for one another."""
    torch.set_num_threads(1)


def make(n: int, d: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=generator)
    return x, labels, torch.randn(n, classes, generator=generator, dtype=torch.float64)


def explicit(x: Tensor, logits: Tensor, labels: Tensor, bias: bool = True) -> Tensor:
    """[n, classes * d]: the gradients of the last layer, by autograd."""
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    rows = []
    for h, z, y in zip(x, logits, labels, strict=True):
        w = torch.zeros(len(z), len(h), dtype=x.dtype, requires_grad=True)
        loss = torch.nn.functional.cross_entropy((w @ h + z)[None], y[None])
        rows.append(torch.autograd.grad(loss, w)[0].flatten())
    return torch.stack(rows)


def members(labels: Tensor) -> list[Tensor]:
    return [(labels == c).nonzero().squeeze(1) for c in labels.unique()]


def groups_of(labels: Tensor, scope: str, count: int) -> list[tuple[Tensor, int]]:
    if scope == "global":
        return [(torch.arange(len(labels)), count)]
    rows = members(labels)
    shares = class_shares([len(r) for r in rows], count)
    return [(r, k) for r, k in zip(rows, shares, strict=True) if k]


@pytest.mark.parametrize("bias", [True, False])
def test_factors_give_the_products_and_distances_of_explicit_gradients(bias: bool) -> None:
    x, labels, logits = make(30, 4, 3)
    full = explicit(x, logits, labels, bias)
    factors = LastLayerGradients.of(x, logits, labels, bias)
    rows = torch.tensor([3, 0, 29])
    torch.testing.assert_close(factors.products(rows), full @ full[rows].T)
    torch.testing.assert_close(factors.sum().flatten(), full.sum(0))
    direction = torch.randn(3, full.shape[1] // 3, dtype=torch.float64)
    torch.testing.assert_close(factors.along(direction), full @ direction.flatten())
    distances = (full[:, None] - full[rows]).norm(dim=2)
    torch.testing.assert_close(factors.distances(rows), distances, rtol=1e-7, atol=1e-7)
    assert factors.distances(rows)[rows, range(3)].tolist() == [0.0, 0.0, 0.0]


# -- facility location and CRAIG -------------------------------------------------------------------


def plain_facility(distances: Tensor, k: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        costs = {
            j: float(distances[:, [*chosen, j]].min(1).values.sum())
            for j in range(len(distances))
            if j not in chosen
        }
        chosen.append(min(costs, key=lambda j: costs[j]))
    return chosen


def check_facility(
    chosen: coreset.Selection, distances: Tensor, groups: list[tuple[Tensor, int]]
) -> None:
    expected: dict[int, int] = {}
    for rows, k in groups:
        own = distances[rows][:, rows]
        picked = sorted(plain_facility(own, k))
        owners = own[:, picked].argmin(1)
        owners[picked] = torch.arange(k)
        for at, j in enumerate(picked):
            expected[int(rows[j])] = int((owners == at).sum())
    assert chosen.indices.tolist() == sorted(expected)
    assert chosen.weights is not None
    assert chosen.weights.tolist() == [expected[i] for i in sorted(expected)]


@settings(max_examples=25)
@given(planes, st.sampled_from(("global", "class")), st.booleans(), st.data())
def test_lazy_greedy_is_plain_greedy_on_features(
    size: Any, scope: str, is_cached: bool, data: Any
) -> None:
    x, labels, _ = make(*size)
    k = data.draw(st.integers(1, len(x)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LAZY_BATCH", 2)
        patch.setattr(module, "CACHE_BYTES", 1 << 28 if is_cached else 0)
        patch.setattr(module, "_BLOCK_NUMBERS", 50)
        chosen = coreset.facility_location(x, labels, budget=k, scope=scope)
    distances = (x[:, None] - x).norm(dim=2)
    groups = groups_of(labels, scope, k)
    check_facility(chosen, distances, groups)
    assert chosen.weights is not None
    assert chosen.weights.sum() == sum(len(rows) for rows, _ in groups)


@settings(max_examples=15)
@given(planes, st.sampled_from(("global", "class")), st.data())
def test_craig_is_facility_location_on_explicit_gradients(size: Any, scope: str, data: Any) -> None:
    x, labels, logits = make(*size)
    k = data.draw(st.integers(1, len(x)))
    full = explicit(x, logits, labels)
    chosen = coreset.craig(x, labels, logits=logits, budget=k, scope=scope)
    check_facility(chosen, (full[:, None] - full).norm(dim=2), groups_of(labels, scope, k))


def test_repeated_samples_are_selected_in_order_of_the_samples() -> None:
    x = torch.tensor([[0.0], [5.0], [5.0], [0.0], [0.0]])
    chosen = coreset.facility_location(x, budget=3)
    assert chosen.indices.tolist() == [0, 1, 2]
    assert chosen.weights is not None
    assert chosen.weights.tolist() == [3.0, 1.0, 1.0]


def test_stochastic_greedy_comes_close_to_greedy_and_follows_its_generator() -> None:
    x, _, _ = make(400, 4, 2)
    distances = torch.cdist(x, x)

    def cost(seed: int, **options: Any) -> tuple[float, list[int]]:
        generator = torch.Generator().manual_seed(seed)
        indices = coreset.facility_location(x, budget=20, generator=generator, **options).indices
        return float(distances[:, indices].min(1).values.sum()), indices.tolist()

    greedy, _ = cost(0)
    drawn = coreset.random(x, budget=20, generator=torch.Generator().manual_seed(0)).indices
    random = float(distances[:, drawn].min(1).values.sum())
    close, first = cost(1, greedy="stochastic", epsilon=0.05)
    assert greedy < close < greedy + 0.3 * (random - greedy)
    assert cost(1, greedy="stochastic", epsilon=0.05)[1] == first
    assert cost(2, greedy="stochastic", epsilon=0.05)[1] != first
    everything = math.exp(-20)  # (n/k) * 20 candidates: all of them, so greedy itself
    assert cost(3, greedy="stochastic", epsilon=everything)[0] == pytest.approx(greedy, rel=1e-12)


# -- GLISTER ---------------------------------------------------------------------------------------


def plain_glister(
    train: tuple[Tensor, Tensor, Tensor],
    val: tuple[Tensor, Tensor, Tensor],
    groups: list[tuple[Tensor, int]],
    step_size: float,
    per_gradient: int,
) -> list[int]:
    """With explicit gradients, and the validation gradient by autograd at the moved layer."""
    full = explicit(train[0], train[2], train[1])
    inputs = torch.cat([val[0], torch.ones(len(val[0]), 1, dtype=torch.float64)], 1)
    moved = torch.zeros(val[2].shape[1], inputs.shape[1], dtype=torch.float64)
    left = {number: k for number, (_, k) in enumerate(groups)}
    group_of = {int(i): number for number, (rows, _) in enumerate(groups) for i in rows}
    chosen: list[int] = []
    while sum(left.values()):
        layer = moved.clone().requires_grad_()
        logits = val[2] + inputs @ layer.T
        loss = torch.nn.functional.cross_entropy(logits, val[1], reduction="sum")
        gains = full @ torch.autograd.grad(loss, layer)[0].flatten()
        for _ in range(min(per_gradient, sum(left.values()))):
            open_ = [i for i in group_of if i not in chosen and left[group_of[i]]]
            best = max(open_, key=lambda i: float(gains[i]))
            chosen.append(best)
            left[group_of[best]] -= 1
            moved = moved - step_size * full[best].reshape(moved.shape)
    return sorted(chosen)


@pytest.mark.parametrize("scope", ["global", "class"])
@pytest.mark.parametrize("per_gradient", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_glister_moves_the_validation_gradient_after_every_round(
    seed: int, per_gradient: int, scope: str
) -> None:
    train, val = make(40, 3, 3, seed), make(11, 3, 3, seed + 1000)
    groups = groups_of(train[1], scope, 13)

    def glister(step_size: float) -> list[int]:
        return coreset.glister(
            train[0],
            train[1],
            logits=train[2],
            val_features=val[0],
            val_logits=val[2],
            val_labels=val[1],
            budget=13,
            scope=scope,
            step_size=step_size,
            per_gradient=per_gradient,
        ).indices.tolist()

    assert glister(0.3) == plain_glister(train, val, groups, 0.3, per_gradient)
    assert glister(0.3) != glister(1e-9)


def test_glister_names_wrong_arguments() -> None:
    x, labels, logits = make(10, 3, 2)
    given = {"logits": logits, "val_features": x, "val_logits": logits, "val_labels": labels}
    for wrong, message in (
        ({"step_size": 0.0}, "step_size must be above 0 and finite, got 0.0"),
        ({"per_gradient": 0}, "per_gradient must be an int of at least 1, got 0"),
        ({"val_features": x[:, :2]}, "features and val_features must have equally many columns"),
        ({"val_labels": labels[:5]}, r"labels must have shape \(10,\), got \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            coreset.glister(x, labels, budget=2, **{**given, **wrong})


# -- GradMatch -------------------------------------------------------------------------------------


def plain_weights(rows: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Non-negative ridge regression by trying every set of positive weights."""
    best, best_cost = torch.zeros(len(rows), dtype=torch.float64), float(target @ target)
    for size in range(1, len(rows) + 1):
        for some in itertools.combinations(range(len(rows)), size):
            own = rows[list(some)]
            gram = own @ own.T + ridge * torch.eye(size, dtype=torch.float64)
            weights = torch.linalg.solve(gram, own @ target)
            cost = (weights @ own - target).square().sum() + ridge * weights.square().sum()
            if (weights >= 0).all() and cost < best_cost:
                best_cost = float(cost)
                best = torch.zeros(len(rows), dtype=torch.float64)
                best[list(some)] = weights
    return best


@settings(max_examples=15)
@given(sizes, st.sampled_from(("global", "class")), st.sampled_from((1e-6, 0.5)), st.data())
def test_gradmatch_is_matching_pursuit_with_the_best_nonnegative_weights(
    size: Any, scope: str, ridge: float, data: Any
) -> None:
    x, labels, logits = make(*size)
    k = data.draw(st.integers(1, min(6, len(x))))
    full = explicit(x, logits, labels)
    chosen = coreset.gradmatch(x, labels, logits=logits, budget=k, scope=scope, ridge=ridge)
    expected: dict[int, float] = {}
    for rows, share in groups_of(labels, scope, k):
        own, target = full[rows], full[rows].sum(0)
        taken: list[int] = []
        weights = torch.zeros(0, dtype=torch.float64)
        for _ in range(share):
            left = own @ (target - weights @ own[taken])
            left[taken] = -math.inf
            if left.max() <= 1e-12 * (own @ target).abs().max():
                break
            taken.append(int(left.argmax()))
            weights = plain_weights(own[taken], target, ridge)
        expected |= {int(rows[i]): float(w) for i, w in zip(taken, weights, strict=True)}
    assert chosen.indices.tolist() == sorted(expected)
    wanted = torch.tensor([expected[i] for i in sorted(expected)], dtype=torch.float64)
    torch.testing.assert_close(chosen.weights, wanted, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_nonnegative_least_squares_finds_the_best_of_all_sets(
    k: int, seed: int, is_warm: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, 7, generator=generator, dtype=torch.float64)
    target = torch.randn(7, generator=generator, dtype=torch.float64)
    start = torch.rand(k, generator=generator, dtype=torch.float64) * float(is_warm)
    found = nonnegative_least_squares(rows @ rows.T, rows @ target, start)
    torch.testing.assert_close(found, plain_weights(rows, target, 0.0), rtol=1e-9, atol=1e-9)


def test_gradmatch_takes_fewer_where_nothing_is_left_to_match() -> None:
    x, labels = torch.ones(6, 2, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    logits = torch.tensor([[1.0, 2.0]] * 6, dtype=torch.float64)
    chosen = coreset.gradmatch(x, labels, logits=logits, budget=4, ridge=0.0)
    assert chosen.indices.tolist() == [0]  # six times the first is the sum of all
    assert chosen.weights is not None
    assert chosen.weights.tolist() == pytest.approx([6.0])
    with pytest.raises(ValueError, match="ridge must be at least 0 and finite, got -1"):
        coreset.gradmatch(x, labels, logits=logits, budget=4, ridge=-1.0)


def test_gradmatch_comes_closer_to_the_full_gradient_than_random_samples() -> None:
    x, labels, logits = make(300, 6, 3)
    full = explicit(x, logits, labels)
    chosen = coreset.gradmatch(x, labels, logits=logits, budget=30)
    assert chosen.weights is not None
    gap = (chosen.weights @ full[chosen.indices] - full.sum(0)).norm()
    drawn = coreset.random(x, budget=30, generator=torch.Generator().manual_seed(0)).indices
    random_gap = (10 * full[drawn].sum(0) - full.sum(0)).norm()
    assert gap < 0.2 * random_gap
