"""The step of a line search: closures, random numbers, buffers, failures, odd losses."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dropin import assert_unchanged, same_bits, snapshot
from models import KINDS, Recorder, batches, loss_of, make_model, train
from torch import Tensor, nn
from torch.nn import Parameter

import pyoptim
from pyoptim import SLS, SaLSa
from pyoptim.line_search import LineSearch
from pyoptim.line_search.closures import Buffers

parametrize_kinds = pytest.mark.parametrize("kind", KINDS)


def numbers_of(optimizer: LineSearch) -> dict[str, Any]:
    return dict(vars(optimizer._numbers))


@parametrize_kinds
def test_every_kind_trains(kind: str) -> None:
    model = make_model()
    losses = train(model, KINDS[kind](model.parameters()), 60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# -- forms of the closure --------------------------------------------------------------------------


def with_keyword(name: str, loss: Callable[[], Tensor]) -> Callable[..., Tensor]:
    def backward_if(flag: bool) -> Tensor:
        value = loss()
        assert torch.is_grad_enabled() == flag
        if flag:
            value.backward()
        return value

    def backward(backward: bool) -> Tensor:
        return backward_if(backward)

    def backwards(backwards: bool = False) -> Tensor:
        return backward_if(backwards)

    def by_mode() -> Tensor:
        return backward_if(torch.is_grad_enabled())

    class Callable_:
        def __call__(self, *, backward: bool) -> Tensor:
            return backward_if(backward)

    return {
        "backward": backward,
        "backwards": backwards,
        "mode": by_mode,
        "object": Callable_(),
    }[name]


@pytest.mark.parametrize("form", ["backward", "backwards", "mode", "object"])
def test_closures_that_run_backward_give_the_same_steps(form: str) -> None:
    one, two = make_model(), make_model()
    plain, other = SaLSa(one.parameters()), SaLSa(two.parameters())
    for batch in batches(15):
        expected = plain.step(loss_of(one, batch))
        assert torch.equal(other.step(with_keyword(form, loss_of(two, batch))), expected)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_micro_batches_give_the_steps_of_the_whole_batch() -> None:
    one, two = make_model(), make_model()
    whole, parts = SaLSa(one.parameters()), SaLSa(two.parameters())
    for x, y in batches(15):
        expected = whole.step(loss_of(one, (x, y)))
        closures = [loss_of(two, (x[i::4], y[i::4])) for i in range(4)]
        torch.testing.assert_close(parts.step(closures), expected)
    assert parts.n_trials == whole.n_trials > 9
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (lambda loss: loss.item(), TypeError, r"a float; return the loss itself"),
        (lambda loss: None, TypeError, "returned None"),
        (lambda loss: loss.expand(3), ValueError, r"shape \(3,\).*return one real number"),
        (lambda loss: loss.detach(), RuntimeError, "does not require grad"),
        (lambda loss: loss.to(torch.complex128), ValueError, "return one real number"),
        (lambda loss: torch.ones((), requires_grad=True) * 2, RuntimeError, "gave no parameter"),
    ],
)
def test_a_closure_that_returns_no_loss(result: Any, error: Any, match: str) -> None:
    model = make_model()
    optimizer = SaLSa(model.parameters())
    (batch,) = batches(1)
    before = snapshot(optimizer)
    with pytest.raises(error, match=match):
        optimizer.step(lambda: result(loss_of(model, batch)()))
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("closure", [3, [], [lambda: None, 3], "closure"])
def test_what_is_no_closure(closure: Any) -> None:
    with pytest.raises(TypeError, match="closure must be a function"):
        SaLSa(make_model().parameters()).step(closure)


def test_closures_of_micro_batches_do_not_run_backward() -> None:
    def closure(backward: bool) -> Tensor:
        raise AssertionError

    with pytest.raises(TypeError, match="micro-batches must not take `backward`"):
        SaLSa(make_model().parameters()).step([closure, closure])


def test_a_step_without_a_closure() -> None:
    optimizer = SaLSa(make_model().parameters())
    with pytest.raises(TypeError, match="needs a closure"):
        optimizer.step()


def test_a_closure_that_always_runs_backward_is_told() -> None:
    model = make_model()
    optimizer = SaLSa(model.parameters())
    (batch,) = batches(1)
    before = snapshot(optimizer)

    def closure() -> Tensor:
        loss = loss_of(model, batch)()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError) as caught:
        optimizer.step(closure)
    assert "take a parameter `backward`" in str(caught.value.__notes__)
    assert_unchanged(optimizer, before)


def test_closures_may_zero_gradients_by_habit() -> None:
    one, two = make_model(), make_model()
    plain, other = SaLSa(one.parameters()), SaLSa(two.parameters())
    for batch in batches(12):
        plain.step(loss_of(one, batch))

        def closure(batch: Any = batch) -> Tensor:
            other.zero_grad()
            return loss_of(two, batch)()

        other.step(closure)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_gradients_that_a_trial_takes_away() -> None:
    model = make_model()
    optimizer = SaLSa(model.parameters())
    (batch,) = batches(1)
    before = snapshot(optimizer)

    def closure() -> Tensor:
        model.zero_grad()
        return loss_of(model, batch)()

    with pytest.raises(RuntimeError, match="call zero_grad"):
        optimizer.step(closure)
    assert_unchanged(optimizer, before)


# -- random numbers and buffers --------------------------------------------------------------------


def test_trials_draw_the_same_numbers_and_the_stream_advances_once() -> None:
    model = make_model(dropout=0.5)
    optimizer = SaLSa(model.parameters(), search_interval=1)
    draws: list[float] = []

    def closure(batch: Any) -> Tensor:
        draws.append(float(torch.rand(())))
        return loss_of(model, batch)()

    seen = []
    for batch in batches(5):
        start = torch.get_rng_state()
        loss_of(model, batch)()
        torch.rand(())
        expected = torch.get_rng_state()
        torch.set_rng_state(start)
        draws.clear()
        optimizer.step(lambda batch=batch: closure(batch))
        assert len(draws) >= 2
        assert len(set(draws)) == 1
        assert torch.equal(torch.get_rng_state(), expected)
        seen.append(draws[0])
    assert len(set(seen)) == 5


def test_other_random_numbers_are_left_alone() -> None:
    model = make_model()
    optimizer = SaLSa(model.parameters())
    np.random.seed(5)
    random.seed(5)
    train(model, optimizer, 5)
    assert random.random() == random.Random(5).random()
    assert np.random.rand() == np.random.RandomState(5).rand()


class Counting(nn.Module):
    """Has buffers of each kind: written in place, replaced, and large."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.ones(4, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
        self.register_buffer("in_place", torch.zeros(n))
        self.register_buffer("replaced", torch.zeros(n), persistent=False)
        self.register_buffer("missing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.replaced = self.replaced + 1
        return (self.norm(x) * self.weight).square().mean()


@pytest.mark.parametrize("is_given", [True, False])
@pytest.mark.parametrize("n", [3, 70_000])
def test_trials_do_not_move_buffers(n: int, is_given: bool) -> None:
    model, twin = Counting(n), Counting(n)
    optimizer = SaLSa(model.parameters(), search_interval=1, module=model if is_given else None)
    for step in range(3):
        x = torch.randn(8, 4, dtype=torch.float64)
        address = model.in_place.data_ptr()
        optimizer.step(lambda x=x: model(x))
        twin.load_state_dict(
            model.state_dict()
            | {name: twin.get_buffer(name) for name in ("norm.running_mean", "norm.running_var")},
            strict=False,
        )
        twin(x)
        assert model.in_place[0] == model.replaced[0] == step + 1
        assert model.in_place.data_ptr() == address
        assert int(model.norm.num_batches_tracked) == step + 1
        assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
        assert torch.equal(model.norm.running_var, twin.norm.running_var)
    assert optimizer.n_trials >= 3


def test_no_hook_is_left() -> None:
    hooks = nn.modules.module._global_forward_pre_hooks
    before = len(hooks)
    watched = Buffers(None).watched()
    watched.__enter__()
    assert len(hooks) == before + 1
    assert not watched.__exit__(KeyError, KeyError(), None)
    assert len(hooks) == before


# -- trials that fail ------------------------------------------------------------------------------


@parametrize_kinds
@pytest.mark.parametrize("n_before", [0, 12])
def test_a_closure_that_raises_in_a_trial(kind: str, n_before: int) -> None:
    model = make_model(dropout=0.5)
    optimizer = KINDS[kind](model.parameters())
    if kind == "salsa":
        n_before = min(n_before, 3)  # so that the next step searches
    elif kind in ("release", "paper", "repaired", "salsa-sgd"):
        n_before = min(n_before, 8)
    train(model, optimizer, n_before)
    before, numbers = snapshot(optimizer), numbers_of(optimizer)
    (batch,) = batches(1, 50)
    start = torch.get_rng_state()
    closure = Recorder(loss_of(model, batch))
    closure.answers[1] = KeyError("trial")
    with pytest.raises(KeyError, match="trial"):
        optimizer.step(closure)
    assert_unchanged(optimizer, before)
    assert numbers_of(optimizer) == numbers
    assert torch.equal(torch.get_rng_state(), start)
    closure.answers.clear()
    optimizer.step(closure)
    assert optimizer.n_searches == n_before + 1


@pytest.mark.parametrize("kind", ["salsa", "release", "paper"])
def test_a_step_without_a_search_that_raises(kind: str) -> None:
    model = make_model()
    optimizer = KINDS[kind](model.parameters(), search_interval=1000)
    train(model, optimizer, 12)
    last = list(model.parameters())[-1]
    whole = optimizer.state[last]["exp_avg_sq"]
    optimizer.state[last]["exp_avg_sq"] = whole[:-1].clone()
    before, numbers = snapshot(optimizer), numbers_of(optimizer)
    with pytest.raises(RuntimeError, match="exp_avg_sq"):
        train(model, optimizer, 1)
    assert_unchanged(optimizer, before)
    assert numbers_of(optimizer) == numbers
    optimizer.state[last]["exp_avg_sq"] = whole
    train(model, optimizer, 1)
    assert optimizer._numbers.step == 13


def test_a_twin_that_never_failed_goes_the_same_way() -> None:
    one, two = make_model(dropout=0.5), make_model(dropout=0.5)
    whole, failing = SaLSa(one.parameters()), SaLSa(two.parameters())
    for batch in batches(6):
        start = torch.get_rng_state()
        whole.step(loss_of(one, batch))
        torch.set_rng_state(start)
        closure = Recorder(loss_of(two, batch))
        closure.answers[1] = KeyError()
        with pytest.raises(KeyError):
            failing.step(closure)
        closure.answers.clear()
        failing.step(closure)
    assert all(map(same_bits, one.parameters(), two.parameters()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@parametrize_kinds
def test_a_trial_loss_that_is_not_finite_is_rejected(kind: str, bad: float) -> None:
    model = make_model()
    optimizer = KINDS[kind](model.parameters())
    (batch,) = batches(1)
    closure = Recorder(loss_of(model, batch))
    closure.answers = {1: bad, 2: bad}
    optimizer.step(closure)
    search = optimizer.last_search
    assert search is not None
    assert search.result == "accepted"
    assert len(search.losses) == len(closure.losses) - 1 >= 3
    assert np.isfinite(search.step_size)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@parametrize_kinds
def test_a_loss_that_is_not_finite_makes_no_step(kind: str, bad: float) -> None:
    """The official code goes on for 101 evaluations, and its step size collapses."""
    model = make_model()
    optimizer = KINDS[kind](model.parameters())
    train(model, optimizer, 3)
    before, step_size = snapshot(optimizer), optimizer.step_size
    (batch,) = batches(1)
    closure = Recorder(loss_of(model, batch))
    closure.answers[0] = bad
    optimizer.step(closure)
    assert len(closure.losses) == 2
    assert optimizer.last_search is not None
    assert optimizer.last_search.result == "unusable"
    assert_unchanged(optimizer, before)
    assert optimizer.step_size == step_size
    train(model, optimizer, 3)
    assert optimizer.step_size > 1e-3 * step_size


@pytest.mark.parametrize("kind", ["salsa", "repaired", "sls", "adasls"])
def test_when_every_trial_is_rejected(kind: str) -> None:
    model = make_model()
    optimizer = KINDS[kind](model.parameters())
    train(model, optimizer, 3)
    step_size, losses = optimizer.step_size, []
    weights = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        """Rises at once, whichever way."""
        losses.append(0.0)
        value = sum(p.square().sum() for p in model.parameters())
        return value if len(losses) == 1 else value.detach() * 0 + 1e6 + value

    optimizer.step(closure)
    search = optimizer.last_search
    assert search is not None
    assert search.result == "failed"
    assert len(losses) == len(search.losses) + 1 == optimizer._settings.max_trials + 1
    change = max(
        float((p - w).detach().abs().max())
        for p, w in zip(model.parameters(), weights, strict=True)
    )
    if kind == "salsa":
        assert optimizer.step_size == pytest.approx(step_size * optimizer._settings.shrink)
    if kind in ("sls", "adasls"):
        assert 0 < change < 1e-4
    assert change < 2 * step_size


# -- losses that are odd ---------------------------------------------------------------------------


class Quadratic:
    def __init__(self, offset: float, start: float = 1.0) -> None:
        self.param = Parameter(torch.full((4,), start, dtype=torch.float64))
        self.offset = offset

    def __call__(self) -> Tensor:
        return self.param.square().sum() + self.offset


@pytest.mark.parametrize("offset", [0.0, -4.0, -50.0, 1e-9])
@pytest.mark.parametrize("kind", ["salsa", "salsa-every", "repaired", "sls", "adasls", "goldstein"])
def test_zero_and_negative_losses(kind: str, offset: float) -> None:
    """The released code never searches below 1e-8, and its step size grows without bound."""
    problem = Quadratic(offset)
    optimizer = KINDS[kind]([problem.param])
    for _ in range(150):
        optimizer.step(problem)
    assert float(problem.param.detach().abs().max()) < 0.1
    assert optimizer.step_size < 2.5


@parametrize_kinds
def test_gradients_of_zero(kind: str) -> None:
    problem = Quadratic(1.0, start=0.0)
    optimizer = KINDS[kind]([problem.param])
    for _ in range(20):
        optimizer.step(problem)
    assert torch.equal(problem.param.detach(), torch.zeros(4).double())
    if kind in ("salsa", "salsa-every", "salsa-sgd"):
        assert optimizer.step_size == 1.0
        assert optimizer.last_search is not None
        assert optimizer.last_search.result == "flat"


@pytest.mark.parametrize("kind", ["salsa", "sls", "adasls"])
def test_parameters_without_gradients_empty_and_scalar(kind: str) -> None:
    params = [Parameter(torch.ones(shape)) for shape in ((3,), (0, 2), (), (2, 2))]
    optimizer = KINDS[kind](params)
    for step in range(12):
        used = params[:3] if step < 6 else params
        optimizer.step(lambda used=used: sum(p.square().sum() for p in used))
    assert float(params[2].detach().abs()) < 1
    assert float(params[3].detach().abs().max()) < 1
    assert optimizer.state[params[3]]["step"] == 6


def test_one_loss_of_one_element_is_a_scalar() -> None:
    param = Parameter(torch.ones(3))
    optimizer = SaLSa([param])
    assert optimizer.step(lambda: param.square().sum().reshape(1, 1)).numel() == 1


# -- waiting for the device ------------------------------------------------------------------------


class Still:
    """A direction that does nothing, so that what is counted is the search's own."""

    def start(self, eta: float, grad_factor: Any = 1.0) -> Tensor:
        return torch.tensor(1.0, dtype=torch.float64)

    def trial(self, eta: float) -> None: ...
    def finish(self, eta: float) -> None: ...
    def accept(self) -> None: ...
    def restore(self) -> None: ...
    def undo(self) -> None: ...
    def plain(self, eta: float, grad_factor: Any = 1.0) -> None: ...


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        plain = getattr(Tensor, name)

        def counting(self: Tensor, *, name: str = name, plain: Any = plain) -> Any:
            found.append(name)
            return plain(self)

        monkeypatch.setattr(Tensor, name, counting)
    return found


def test_one_wait_per_trial_and_none_without_a_search(
    waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaLSa, "_direction", Still())
    param = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SaLSa([param], search_interval=4)
    values = iter([5.0, 6.0, 6.0, 4.0])
    optimizer.step(lambda: param.sum() * 0 + next(values))
    assert len(waits) == optimizer.n_trials == 3
    optimizer._numbers.step = 100
    for _ in range(3):
        waits.clear()
        optimizer.step(lambda: param.sum())
        assert not waits
    assert optimizer.n_searches == 1


# -- Goldstein -------------------------------------------------------------------------------------


def test_goldstein_lengthens_steps_that_are_too_short() -> None:
    problem = Quadratic(0.0)
    optimizer = SLS([problem.param], init_step_size=1e-3, line_search_fn="goldstein", c=0.25)
    optimizer.step(problem)
    search = optimizer.last_search
    assert search is not None
    # On |x|^2, (1 - c) of the promised decrease or less is where eta >= c.
    assert search.step_size >= 0.25
    assert search.step_sizes[1] == pytest.approx(2 * search.step_sizes[0])


def test_goldstein_stops_at_eta_max() -> None:
    problem = Quadratic(0.0)
    options: dict[str, Any] = {"line_search_fn": "goldstein", "c": 0.25, "eta_max": 0.01}
    optimizer = SLS([problem.param], init_step_size=1e-3, **options)
    optimizer.step(problem)
    assert optimizer.step_size == 0.01


# -- numbers ---------------------------------------------------------------------------------------


def test_steps_are_the_same_with_any_number_of_threads() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        param = Parameter(torch.linspace(-1, 1, 100_003))
        optimizer = SaLSa([param], backend="reference")
        for _ in range(4):
            optimizer.step(lambda param=param: param[::1000].square().sum())
        results.append((param.detach(), numbers_of(optimizer)))
    assert same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("kind", ["salsa", "adasls-amsgrad"])
def test_clipping_inside_is_clipping_outside(kind: str) -> None:
    one, two = make_model(), make_model()
    inside = KINDS[kind](one.parameters(), max_grad_norm=0.1)
    outside = KINDS[kind](two.parameters())
    for batch in batches(15):

        def closure(backward: bool, batch: Any = batch) -> Tensor:
            loss = loss_of(two, batch)()
            if backward:
                loss.backward()
                pyoptim.clip_grad_norm_(two.parameters(), 0.1)
            return loss

        inside.step(loss_of(one, batch))
        outside.step(closure)
    assert inside.n_trials == outside.n_trials
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
