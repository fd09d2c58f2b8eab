"""Schedules have the values of their equations, of torch's classes and of transformers' names."""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs

import pyoptim
from pyoptim import lr_scheduler as schedules

LR = 0.1
Make = Callable[[Optimizer], Any]


def optimizer(*lrs: float | torch.Tensor) -> Optimizer:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs or (LR,)]
    return pyoptim.SGD(groups, lr=LR)


def rates(make: Make, n: int, group: int = 0) -> list[float]:
    """The learning rates of n steps."""
    sgd = optimizer()
    scheduler = make(sgd)
    found = []
    for _ in range(n):
        found.append(float(sgd.param_groups[group]["lr"]))
        sgd.step()
        scheduler.step()
    return found


def values(formula: Callable[[int], float], n: int) -> list[float]:
    return [LR * formula(t) for t in range(n)]


EQUATIONS: dict[str, tuple[Make, Callable[[int], float]]] = {
    "linear": (
        lambda o: schedules.linear(o, 10, start_factor=1 / 3, end_factor=1e-3),
        lambda t: (1e-3 - 1 / 3) / 10 * min(t, 10) + 1 / 3,
    ),
    "polynomial": (lambda o: schedules.polynomial(o, 10), lambda t: max(0.0, 1 - t / 10) ** 2),
    "cosine": (
        lambda o: schedules.cosine(o, 10, min_lr=0.02),
        lambda t: 0.2 + 0.4 * (1 + math.cos(math.pi * min(t, 10) / 10)),
    ),
    "hard_restarts": (
        lambda o: schedules.cosine(o, 12, n_cycles=3),
        lambda t: 0.5 * (1 + math.cos(math.pi * (t % 4) / 4)) if t < 12 else 0.0,
    ),
    "cyclic_cosine": (
        lambda o: schedules.cyclic_cosine(o, 5),
        lambda t: 0.5 * (1 + math.cos(math.pi * t / 5)),
    ),
    "exponential": (lambda o: schedules.exponential(o, 0.8), lambda t: 0.8**t),
    "inverse_sqrt": (
        lambda o: schedules.inverse_sqrt(o, timescale=4),
        lambda t: math.sqrt(4 / (t + 4)),
    ),
    "warmup_stable_decay": (
        lambda o: schedules.warmup_stable_decay(o, 12, decay=4, warmup=4),
        lambda t: t / 4 if t < 4 else min(1.0, max(0.0, (12 - t) / 4)),
    ),
    "constant": (lambda o: schedules.constant(o, warmup=5), lambda t: min(1.0, t / 5)),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_schedule_has_the_values_of_its_equation(name: str) -> None:
    make, formula = EQUATIONS[name]
    assert rates(make, 25) == pytest.approx(values(formula, 25), rel=1e-14, abs=1e-17)


TORCHS: dict[str, tuple[Make, Make]] = {
    "linear": (
        lambda o: schedules.linear(o, 5, start_factor=1 / 3, end_factor=1e-3),
        lambda o: torchs.LinearLR(o, 1 / 3, 1e-3, 5),
    ),
    "polynomial": (
        lambda o: schedules.polynomial(o, 20, power=2),
        lambda o: torchs.PolynomialLR(o, 20, 2.0),
    ),
    "cyclic_cosine": (
        lambda o: schedules.cyclic_cosine(o, 7, min_lr=0.01),
        lambda o: torchs.CosineAnnealingLR(o, 7, 0.01),
    ),
    "restarts": (
        lambda o: schedules.cosine_with_restarts(o, 3, cycle_mult=2, min_lr=0.01),
        lambda o: torchs.CosineAnnealingWarmRestarts(o, 3, 2, 0.01),
    ),
    "equal_restarts": (
        lambda o: schedules.cosine_with_restarts(o, 4),
        lambda o: torchs.CosineAnnealingWarmRestarts(o, 4),
    ),
    "exponential": (
        lambda o: schedules.exponential(o, 0.9),
        lambda o: torchs.ExponentialLR(o, 0.9),
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_a_schedule_agrees_with_torchs_class(name: str) -> None:
    ours, theirs = TORCHS[name]
    # torch's are recursive: their error grows with every step.
    assert rates(ours, 30) == pytest.approx(rates(theirs, 30), rel=1e-11, abs=1e-15)


@given(
    first=st.integers(1, 9), mult=st.sampled_from([1, 1.5, 2, 3, 10]), steps=st.integers(1, 10**6)
)
def test_restarts_begin_where_the_cycles_add_up(first: int, mult: float, steps: int) -> None:
    schedule = schedules.cosine_with_restarts(optimizer(), first, cycle_mult=mult).lr_lambdas[0]
    start, length = 0.0, float(first)
    while start + length <= steps:
        start, length = start + length, length * mult
    expected = 0.5 * (1 + math.cos(math.pi * (steps - start) / length))
    assert schedule(steps) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_cycle_begins_at_the_initial_rate_exactly() -> None:
    starts = [3 * (2**n - 1) for n in range(15)]
    schedule = schedules.cosine_with_restarts(optimizer(), 3, cycle_mult=2).lr_lambdas[0]
    assert [schedule(t) for t in starts] == [1.0] * len(starts)


@pytest.mark.parametrize("name", ["linear", "polynomial", "cosine"])
def test_a_warmup_rises_from_zero_and_the_rest_follows(name: str) -> None:
    factory = getattr(schedules, name)
    found = rates(lambda o: factory(o, 14, warmup=4), 20)
    assert found[:4] == pytest.approx([0.0, LR / 4, LR / 2, 3 * LR / 4], rel=1e-15)
    assert found[4:] == pytest.approx(rates(lambda o: factory(o, 10), 16), rel=1e-14)


def test_lengths_in_epochs_are_stepped_per_batch() -> None:
    by_batch = rates(lambda o: schedules.cosine(o, 30, warmup=6), 35)
    by_epoch = rates(lambda o: schedules.cosine(o, 10, warmup=2, steps_per_epoch=3), 35)
    assert by_epoch == pytest.approx(by_batch, rel=1e-13, abs=1e-16)


def test_groups_keep_their_own_rates_down_to_a_common_floor() -> None:
    sgd = optimizer(0.1, 0.01)
    scheduler = schedules.cosine(sgd, 4, min_lr=0.001)
    seen = [[group["lr"] for group in sgd.param_groups]]
    for _ in range(4):
        sgd.step()
        scheduler.step()
        seen.append([group["lr"] for group in sgd.param_groups])
    assert seen[0] == [0.1, 0.01]
    assert seen[2] == pytest.approx([0.0505, 0.0055], rel=1e-14)
    assert seen[4] == pytest.approx([0.001, 0.001], rel=1e-14)


def test_a_learning_rate_that_is_a_tensor_stays_that_tensor() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64)
    sgd = optimizer(lr)
    scheduler = schedules.polynomial(sgd, 10, min_lr=0.01)
    sgd.step()
    scheduler.step()
    assert sgd.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.01 + 0.09 * 0.81, rel=1e-14)


@pytest.mark.parametrize("name", [*EQUATIONS, "restarts"])
def test_a_resumed_schedule_goes_on_as_if_never_stopped(name: str) -> None:
    make = EQUATIONS[name][0] if name in EQUATIONS else TORCHS[name][0]
    whole = rates(make, 12)
    sgd = optimizer()
    scheduler = make(sgd)
    for _ in range(5):
        sgd.step()
        scheduler.step()
    saved = torch.load(_saved(sgd.state_dict(), scheduler.state_dict()), weights_only=True)
    again = optimizer()
    resumed = make(again)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    found = []
    for _ in range(5, 12):
        found.append(again.param_groups[0]["lr"])
        again.step()
        resumed.step()
    assert found == whole[5:]


def _saved(*objects: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return file


# -- transformers' names ---------------------------------------------------------------------------


def _after(warmup: int, decay: Callable[[float], float]) -> Callable[[int], float]:
    """transformers' shape: warm-up over max(1, warmup), then decay of the progress to 1."""
    return lambda t: t / max(1, warmup) if t < warmup else decay((t - warmup) / max(1, 20 - warmup))


NAMED: dict[str, tuple[dict[str, Any], Callable[[int], Callable[[int], float]]]] = {
    "linear": ({}, lambda w: _after(w, lambda x: max(0.0, 1 - x))),
    "cosine": ({}, lambda w: _after(w, lambda x: 0.5 * (1 + math.cos(math.pi * x)))),
    "cosine_with_restarts": (
        {"num_cycles": 3},
        lambda w: _after(
            w, lambda x: 0.0 if x >= 1 else 0.5 * (1 + math.cos(math.pi * (3 * x % 1)))
        ),
    ),
    "cosine_with_min_lr": (
        {"min_lr": 0.01},
        lambda w: _after(w, lambda x: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * x))),
    ),
    "polynomial": (
        {"power": 2.0, "lr_end": 1e-3},
        lambda w: _after(w, lambda x: ((LR - 1e-3) * max(0.0, 1 - x) ** 2 + 1e-3) / LR),
    ),
    "constant_with_warmup": ({}, lambda w: _after(w, lambda x: 1.0)),
    "inverse_sqrt": (
        {},
        lambda w: (
            lambda t: t / w if t < w else 1 / math.sqrt((t - w + (w or 10000)) / (w or 10000))
        ),
    ),
}


def _half_wave(x: float, waves: float = 0.5) -> float:
    return 0.5 * (1 + math.cos(2 * math.pi * waves * x))


def _from_above_zero(w: int) -> Callable[[int], float]:
    def factor(t: int) -> float:
        if t < w:
            return 0.3 + 0.7 * t / (w - 1)
        return 0.2 + 0.8 * _half_wave(min(1.0, (t - w + 1) / (20 - w)))

    return factor


def _stable(w: int, rise: Callable, fall: Callable) -> Callable[[int], float]:
    """Warm-up, then constant until 15, then down in 5, in a range that ends at a tenth."""

    def factor(t: int) -> float:
        share = rise(t / w) if t < w else fall(min(1.0, max(0.0, (t - 15) / 5)))
        return 0.1 + 0.9 * share

    return factor


MORE: dict[str, tuple[str, dict[str, Any], Callable[[int], Callable[[int], float]]]] = {
    "waves": (
        "cosine",
        {"num_cycles": 1.25},
        lambda w: _after(w, lambda x: _half_wave(x, 1.25)),
    ),
    "floor by share": (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.25, "num_cycles": 1.0},
        lambda w: lambda t: _after(w, lambda x: 0.25 + 0.75 * _half_wave(x, 1.0))(t),
    ),
    "warm-up from above zero": (
        "cosine_warmup_with_min_lr",
        {"min_lr_rate": 0.2, "warmup_lr_rate": 0.3},
        _from_above_zero,
    ),
    "warm-up from one step": (
        "cosine_warmup_with_min_lr",
        {"min_lr": 0.0},
        lambda w: lambda t: (t + 1) / w if t < w else _half_wave(min(1.0, (t - w + 1) / (20 - w))),
    ),
    "stable": (
        "warmup_stable_decay",
        {"num_decay_steps": 5, "min_lr_ratio": 0.1},
        lambda w: _stable(w, lambda x: x, _half_wave),
    ),
    "stable with roots": (
        "warmup_stable_decay",
        {
            "num_decay_steps": 5,
            "min_lr_ratio": 0.1,
            "warmup_type": "1-sqrt",
            "decay_type": "1-sqrt",
        },
        lambda w: _stable(w, lambda x: 1 - math.sqrt(1 - x), lambda x: 1 - math.sqrt(x)),
    ),
    "stable along a line": (
        "warmup_stable_decay",
        {
            "num_decay_steps": 5,
            "min_lr_ratio": 0.1,
            "warmup_type": "cosine",
            "decay_type": "linear",
        },
        lambda w: _stable(w, lambda x: 1 - _half_wave(x), lambda x: 1 - x),
    ),
}


@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize("case", MORE)
def test_an_option_has_the_values_of_transformers(case: str, warmup: int) -> None:
    name, options, formula = MORE[case]
    found = rates(lambda o: schedules.get_scheduler(name, o, warmup, 20, options), 21)
    assert found == pytest.approx(values(formula(warmup), 21), rel=1e-12, abs=1e-16)


@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize("name", NAMED)
def test_a_name_has_the_values_of_transformers(name: str, warmup: int) -> None:
    options, formula = NAMED[name]
    found = rates(lambda o: schedules.get_scheduler(name, o, warmup, 20, options), 21)
    assert found == pytest.approx(values(formula(warmup), 21), rel=1e-12, abs=1e-16)


def test_the_remaining_names_are_made_too() -> None:
    sgd = optimizer()
    assert rates(lambda o: schedules.get_scheduler("constant", o), 3) == [LR] * 3
    plateau = schedules.get_scheduler(
        "reduce_lr_on_plateau", sgd, scheduler_specific_kwargs={"patience": 0}
    )
    assert isinstance(plateau, torchs.ReduceLROnPlateau)
    assert plateau.patience == 0
    options = {"num_decay_steps": 3, "num_stable_steps": 5}
    stable = schedules.get_scheduler("warmup_stable_decay", sgd, 2, None, options)
    assert stable.lr_lambdas[0](7) == 1.0
    assert stable.lr_lambdas[0](10) == 0.0


BAD: dict[str, tuple[Make, str]] = {
    "total": (lambda o: schedules.linear(o, 5, warmup=5), "total must be .* above warmup = 5"),
    "infinite": (lambda o: schedules.cosine(o, math.inf), "total must be a finite"),
    "nan": (lambda o: schedules.cosine(o, math.nan), "total must be a finite"),
    "warmup": (lambda o: schedules.cosine(o, 5, warmup=-1), "warmup must be"),
    "power": (lambda o: schedules.polynomial(o, 5, power=0), "power must be"),
    "min_lr": (lambda o: schedules.cosine(o, 5, min_lr=-1), "min_lr must be"),
    "high_min_lr": (lambda o: schedules.cosine(o, 5, min_lr=1.0), "min_lr must be at most"),
    "cycle_mult": (lambda o: schedules.cosine_with_restarts(o, 5, cycle_mult=0.5), "cycle_mult"),
    "first_cycle": (lambda o: schedules.cosine_with_restarts(o, 0), "first_cycle must be"),
    "half_period": (lambda o: schedules.cyclic_cosine(o, 0), "half_period must be"),
    "gamma": (lambda o: schedules.exponential(o, 1.1), "gamma must be"),
    "n_cycles": (lambda o: schedules.cosine(o, 5, n_cycles=0), "n_cycles must be"),
    "factor": (lambda o: schedules.linear(o, 5, start_factor=-1), "start_factor must be"),
    "timescale": (lambda o: schedules.inverse_sqrt(o, timescale=0), "timescale must be"),
    "decay": (lambda o: schedules.warmup_stable_decay(o, 5, decay=6), "decay must be"),
    "epoch": (lambda o: schedules.linear(o, 5, steps_per_epoch=0), "steps_per_epoch must be"),
    "name": (lambda o: schedules.get_scheduler("cosin", o, 0, 5), "name must be one of .*cosine"),
    "no_warmup": (lambda o: schedules.get_scheduler("linear", o), "num_warmup_steps must be given"),
    "no_total": (lambda o: schedules.get_scheduler("linear", o, 0), "num_training_steps must be"),
    "no_decay": (
        lambda o: schedules.get_scheduler("warmup_stable_decay", o, 0, 5),
        "num_decay_steps",
    ),
    "no_room": (
        lambda o: schedules.get_scheduler("warmup_stable_decay", o, 3, 5, {"num_decay_steps": 3}),
        "num_training_steps must be at least",
    ),
    "no_min_lr": (
        lambda o: schedules.get_scheduler("cosine_with_min_lr", o, 0, 5),
        "one of min_lr and min_lr_rate",
    ),
    "shape": (
        lambda o: schedules.get_scheduler(
            "warmup_stable_decay", o, 0, 5, {"num_decay_steps": 3, "decay_type": "step"}
        ),
        "decay_type must be one of",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_and_nothing_is_changed(name: str) -> None:
    make, message = BAD[name]
    sgd = optimizer()
    with pytest.raises(ValueError, match=message):
        make(sgd)
    assert sgd.param_groups[0]["lr"] == LR
    assert "initial_lr" not in sgd.param_groups[0]


def test_something_else_than_an_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="optimizer must be"):
        schedules.linear(torch.zeros(1), 5)  # type: ignore[arg-type]
