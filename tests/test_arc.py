"""ARC as a scheduler: what it shows the network, what it does with the answer, and the guard."""

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_two_processes
from torch import nn

import pyoptim
from pyoptim import arc
from pyoptim.lr_scheduler import ARC

RAISE, KEEP, LOWER = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


class Says:
    """A controller that answers what it is told and remembers what it was shown."""

    def __init__(self, *answers: tuple[float, ...]) -> None:
        self.answers = list(answers)
        self.seen: list[tuple[list[float], list[float], list[float]]] = []

    def __call__(self, train: list[float], val: list[float], lrs: list[float]) -> tuple[float, ...]:
        self.seen.append((train, val, lrs))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def sgd(*lrs: Any) -> pyoptim.SGD:
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": lr} for lr in lrs or (0.1,)]
    return pyoptim.SGD(groups, lr=0.1)


def run(
    scheduler: ARC, epochs: int, loss: Callable[[int], float] = lambda i: 1.0 / (i + 1)
) -> None:
    """Two steps per epoch; the validation loss is the first of them."""
    for _ in range(epochs):
        epoch = scheduler.last_epoch
        for i in (2 * epoch, 2 * epoch + 1):
            scheduler.record(loss(i))
        scheduler.step(loss(2 * epoch))


def lr_of(scheduler: ARC, group: int = 0) -> float:
    return float(scheduler.optimizer.param_groups[group]["lr"])


@pytest.mark.parametrize(
    ("margins", "answer", "factor"),
    [
        (None, RAISE, 1.618),
        (None, KEEP, 1.0),
        (None, LOWER, 0.618),
        (None, (0.2, 0.3, 0.5), 0.618),
        (None, (0.4, 0.35, 0.25), 1.618),
        ((0.5, 0.2), (0.8, 0.0, 0.2), 1.618),
        ((0.5, 0.2), (0.7, 0.0, 0.3), 1.0),
        ((0.5, 0.2), (0.3, 0.0, 0.7), 0.618),
        ((0.5, 0.2), (0.45, 0.0, 0.55), 1.0),
        ((0.0, 0.0), (0.3, 0.5, 0.2), 1.618),
        ((0.0, 0.0), (0.3, 0.4, 0.3), 1.0),
    ],
)
def test_the_answer_multiplies_the_rate(margins: Any, answer: Any, factor: float) -> None:
    scheduler = ARC(sgd(), 2, weights=Says(answer), margins=margins)
    run(scheduler, 1)
    assert lr_of(scheduler) == 0.1
    assert scheduler.decisions == []
    run(scheduler, 1)
    assert lr_of(scheduler) == 0.1 * factor
    assert scheduler.get_last_lr() == [0.1 * factor]
    assert [d.epoch for d in scheduler.decisions] == [2]
    assert scheduler.decisions[0].probabilities == pytest.approx(answer)


def test_the_network_sees_the_last_three_cycles() -> None:
    says = Says(RAISE)
    scheduler = ARC(sgd(), 2, weights=says)
    run(scheduler, 10)
    losses = [1.0 / (i + 1) for i in range(20)]
    rates = [0.1 * 1.618**n for n in range(5)]
    for n, seen in enumerate(says.seen):
        first = max(0, n - 2)
        train = losses[4 * first : 4 * n + 4]
        assert seen == (train, train[::2], pytest.approx(rates[first : n + 1]))


def test_losses_may_be_tensors_and_validation_may_be_missing() -> None:
    by_tensor, by_number = Says(KEEP), Says(KEEP)
    for says, kind in ((by_tensor, torch.tensor), (by_number, float)):
        scheduler = ARC(sgd(), 1, weights=says)
        loss = torch.tensor(3.0)
        for value in (3.0, 2.5, 0.125):
            loss.fill_(value)
            scheduler.record(loss if kind is torch.tensor else value)
        scheduler.step()
    assert by_tensor.seen == by_number.seen == [([3.0, 2.5, 0.125], [], [0.1])]


@pytest.mark.parametrize(
    ("interval", "epochs", "expected"),
    [("auto", None, 3), ("auto", 30, 3), ("auto", 98, 9), ("auto", 4, 1), (5, 98, 5)],
)
def test_the_interval_makes_about_ten_decisions(interval: Any, epochs: Any, expected: int) -> None:
    assert ARC(sgd(), interval, epochs, weights=Says(KEEP)).interval == expected


def test_a_training_of_known_length_ends_on_a_line_to_zero() -> None:
    says = Says(*[RAISE] * 4, KEEP)
    scheduler = ARC(sgd(0.1, 0.02), epochs=10, final_decay=0.4, weights=says)
    rates = [lr_of(scheduler)]
    for _ in range(9):
        run(scheduler, 1)
        rates.append(lr_of(scheduler))
        assert lr_of(scheduler, 1) == pytest.approx(rates[-1] / 5)
    peak = 0.1 * 1.618**4
    falling = [peak * left / 5 for left in (5, 5, 4, 3, 2, 1)]
    assert rates == pytest.approx([0.1 * 1.618**n for n in range(4)] + falling)
    assert [d.action for d in scheduler.decisions] == ["raise"] * 4 + ["keep"] + ["decay"] * 4
    assert [d.epoch for d in scheduler.decisions] == list(range(1, 10))
    assert len(says.seen) == 5
    run(scheduler, 1)  # the end: nothing is left to go down, the network is asked again
    assert lr_of(scheduler) == pytest.approx(rates[-1])
    assert scheduler.decisions[-1].action == "keep"


def test_the_decay_waits_as_long_as_the_network_raises() -> None:
    says = Says(*[RAISE] * 7, LOWER)
    scheduler = ARC(sgd(), epochs=10, final_decay=0.4, weights=says)
    run(scheduler, 9)
    found = [(d.epoch, d.action) for d in scheduler.decisions[5:]]
    assert found == [(6, "raise"), (7, "raise"), (8, "lower"), (8, "decay"), (9, "decay")]
    assert lr_of(scheduler) == pytest.approx(0.1 * 1.618**7 * 0.618 / 3)


@pytest.mark.parametrize("options", [{"interval": 1}, {"epochs": 10, "final_decay": 0.0}])
def test_without_a_known_length_or_a_share_nothing_decays(options: dict[str, Any]) -> None:
    scheduler = ARC(sgd(), weights=Says(KEEP), **options)
    run(scheduler, 12)
    assert {d.action for d in scheduler.decisions} == {"keep"}
    assert lr_of(scheduler) == 0.1


def test_the_guard_watches_the_decay_too() -> None:
    scheduler = ARC(sgd(), epochs=10, final_decay=0.5, weights=Says(KEEP))
    run(scheduler, 6)
    run(scheduler, 1, lambda i: math.nan)
    found = [(d.epoch, d.action, d.guard) for d in scheduler.decisions[5:]]
    assert found == [(6, "decay", None), (7, "lower", "not finite"), (7, "decay", None)]
    assert lr_of(scheduler) == pytest.approx(0.1 * 3 / 6 * 0.618)


def test_groups_keep_their_ratio_and_a_tensor_stays_that_tensor() -> None:
    lr = torch.tensor(0.02)
    scheduler = ARC(sgd(0.1, lr), 1, weights=Says(RAISE))
    run(scheduler, 2)
    assert lr_of(scheduler) == pytest.approx(0.1 * 1.618**2)
    assert scheduler.optimizer.param_groups[1]["lr"] is lr
    assert lr.item() == pytest.approx(0.02 * 1.618**2)


@pytest.mark.parametrize(
    ("answer", "bounds", "expected"),
    [
        (RAISE, {"max_lr": 0.12}, (0.12, 0.012)),
        (LOWER, {"min_lr": 0.009}, (0.09, 0.009)),
        (RAISE, {"max_lr": 0.1}, (0.1, 0.01)),
    ],
)
def test_a_move_ends_at_the_bounds_for_all_groups_alike(
    answer: Any, bounds: dict[str, float], expected: tuple[float, float]
) -> None:
    scheduler = ARC(sgd(0.1, 0.01), 1, weights=Says(answer), **bounds)
    run(scheduler, 1)
    assert (lr_of(scheduler, 0), lr_of(scheduler, 1)) == pytest.approx(expected, rel=1e-12)
    assert scheduler.decisions[0].factor == pytest.approx(expected[0] / 0.1)
    assert scheduler.decisions[0].lrs == pytest.approx(expected, rel=1e-12)


def test_a_rate_of_zero_is_kept() -> None:
    scheduler = ARC(sgd(0.0), 1, weights=Says(RAISE))
    run(scheduler, 2)
    assert lr_of(scheduler) == 0.0
    assert scheduler.decisions[1].action == "keep"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["train", "val"])
def test_a_loss_that_is_not_finite_lowers(bad: float, where: str) -> None:
    says = Says(RAISE)
    scheduler = ARC(sgd(), 1, weights=says)
    scheduler.record(bad if where == "train" else 1.0)
    scheduler.step(bad if where == "val" else 1.0)
    assert scheduler.decisions[0].guard == "not finite"
    assert lr_of(scheduler) == 0.1 * 0.618
    assert says.seen == []
    # The bad cycle is not shown later.
    run(scheduler, 1)
    assert says.seen == [([1 / 3, 1 / 4], [1 / 3], [0.1 * 0.618])]
    assert scheduler.decisions[1].guard is None


def test_without_guard_a_loss_that_is_not_finite_keeps_the_rate() -> None:
    scheduler = ARC(sgd(), 1, weights=Says(RAISE), guard=False)
    scheduler.record(math.nan)
    scheduler.step()
    assert lr_of(scheduler) == 0.1


@pytest.mark.parametrize(
    ("first", "later", "diverged"),
    [(1.0, 2.9, False), (1.0, 3.1, True), (-1.0, 0.9, False), (-1.0, 1.1, True)],
)
def test_a_loss_far_above_its_start_lowers(first: float, later: float, diverged: bool) -> None:
    scheduler = ARC(sgd(), 1, weights=Says(KEEP))
    for loss in (first, later):
        scheduler.record(loss)
        scheduler.step()
    assert scheduler.decisions[1].guard == ("diverged" if diverged else None)
    assert lr_of(scheduler) == (0.1 * 0.618 if diverged else 0.1)


def trained(restore: bool) -> tuple[nn.Linear, pyoptim.Adam, ARC]:
    model = nn.Linear(2, 1)
    adam = pyoptim.Adam(model.parameters(), lr=0.1)
    scheduler = ARC(adam, 1, weights=Says(RAISE), restore=model if restore else None)
    return model, adam, scheduler


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()


def test_the_guard_restores_model_and_optimizer_and_lowers() -> None:
    model, adam, scheduler = trained(restore=True)
    train_step(model, adam)
    scheduler.record(1.0)
    scheduler.step()
    good = copy.deepcopy((model.state_dict(), adam.state_dict()["state"]))
    raised = lr_of(scheduler)
    train_step(model, adam)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    scheduler.record(math.nan)
    scheduler.step()
    torch.testing.assert_close(model.state_dict(), good[0], rtol=0, atol=0)
    torch.testing.assert_close(adam.state_dict()["state"], good[1], rtol=0, atol=0)
    assert scheduler.decisions[1].restored
    # What was kept had the rate from before the raise.
    assert lr_of(scheduler) == pytest.approx(min(0.1, raised) * 0.618)
    train_step(model, adam)
    assert model.weight.isfinite().all()


def test_the_first_cycle_can_be_undone_too() -> None:
    model, adam, scheduler = trained(restore=True)
    start = copy.deepcopy(model.state_dict())
    train_step(model, adam)
    scheduler.record(math.inf)
    scheduler.step()
    torch.testing.assert_close(model.state_dict(), start, rtol=0, atol=0)
    assert adam.state_dict()["state"] == {}


def test_without_restore_weights_are_left_alone() -> None:
    model, adam, scheduler = trained(restore=False)
    train_step(model, adam)
    before = copy.deepcopy(model.state_dict())
    scheduler.record(math.nan)
    scheduler.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not scheduler.decisions[0].restored


def test_a_resumed_run_decides_as_if_never_stopped() -> None:
    def curve(i: int) -> float:
        return math.exp(-0.1 * i) + 0.05 * math.sin(7 * i)

    def likely(*window: list[float]) -> tuple[float, ...]:
        return tuple(abs(sum(math.sin(50 * x) for x in values)) for values in window)

    options: dict[str, Any] = {
        "interval": 2,
        "epochs": 11,
        "weights": likely,
        "margins": (0.99, 0.0),
    }
    whole = ARC(sgd(), **options)
    run(whole, 11, curve)
    assert {d.action for d in whole.decisions} >= {"raise", "lower", "decay"}
    for stop in (3, 6, 9):
        first = ARC(sgd(), **options)
        run(first, stop, curve)
        first.record(
            torch.tensor(curve(2 * stop), dtype=torch.float64)
        )  # in the middle of an epoch
        file = io.BytesIO()
        torch.save((first.state_dict(), first.optimizer.state_dict()), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        second = ARC(sgd(), **options)
        second.optimizer.load_state_dict(saved[1])
        second.load_state_dict(saved[0])
        second.record(curve(2 * stop + 1))
        second.step(curve(2 * stop))
        run(second, 11 - stop - 1, curve)
        assert second.decisions == whole.decisions
        assert lr_of(second) == lr_of(whole)


def test_a_bad_state_dict_changes_nothing() -> None:
    scheduler = ARC(sgd(), 1, weights=Says(RAISE))
    run(scheduler, 2)
    before = scheduler.state_dict()
    with pytest.raises(KeyError, match="first_mean"):
        scheduler.load_state_dict({k: v for k, v in before.items() if k != "first_mean"})
    assert scheduler.state_dict() == before


def test_a_caller_per_batch_counts_epochs() -> None:
    scheduler = ARC(sgd(), 1, weights=Says(RAISE), steps_per_epoch=4)
    for i in range(8):
        scheduler.record(1.0 / (i + 1))
        scheduler.step()
    assert [d.epoch for d in scheduler.decisions] == [1, 2]


def test_a_cycle_without_losses_is_an_error_that_changes_nothing() -> None:
    scheduler = ARC(sgd(), 1, weights=Says(RAISE))
    with pytest.raises(ValueError, match=r"record\(train_loss\) was not called"):
        scheduler.step(1.0)
    assert scheduler.last_epoch == 0
    scheduler.record(1.0)
    scheduler.step(1.0)
    assert scheduler.last_epoch == 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "interval": ({"interval": 0}, "interval must be"),
    "bool": ({"interval": True}, "interval must be"),
    "word": ({"interval": "often"}, "interval must be"),
    "epochs": ({"epochs": 0}, "epochs must be"),
    "margins": ({"margins": (0.1, 1.0)}, "margins must be"),
    "one margin": ({"margins": 0.3}, "margins must be"),
    "decay": ({"final_decay": 1.0}, "final_decay must be"),
    "bounds": ({"min_lr": 1.0, "max_lr": 0.5}, "min_lr <= max_lr"),
    "usual_lr": ({"usual_lr": 0.0}, "usual_lr must be"),
    "usual_lr nan": ({"usual_lr": math.nan}, "usual_lr must be"),
    "usual_lr word": ({"usual_lr": "often"}, "usual_lr must be"),
    "steps": ({"steps_per_epoch": 0}, "steps_per_epoch must be"),
    "last_epoch": ({"last_epoch": 3}, "last_epoch must be -1"),
    "restore": ({"restore": [3]}, "restore must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        ARC(sgd(), **{"weights": Says(KEEP), **options})


def test_a_loss_of_several_elements_is_refused() -> None:
    scheduler = ARC(sgd(), weights=Says(KEEP))
    with pytest.raises(ValueError, match="train_loss must have 1 element"):
        scheduler.record(torch.ones(2))


def test_no_warning_about_the_order_of_steps(recwarn: pytest.WarningsRecorder) -> None:
    model, adam, scheduler = trained(restore=False)
    for _ in range(2):
        train_step(model, adam)
        scheduler.record(1.0)
        scheduler.step()
    assert [str(w.message) for w in recwarn] == []


def _decide(rank: int, folder: Path) -> None:
    scheduler = ARC(sgd(), 1, weights=Says(RAISE if rank == 0 else LOWER))
    for loss in (1.0, 1.0 if rank == 0 else math.nan):
        scheduler.record(loss)
        scheduler.step()
    torch.save((lr_of(scheduler), scheduler.decisions[1].guard), folder / str(rank))


def test_processes_take_the_decision_of_the_first(tmp_path: Path) -> None:
    in_two_processes(_decide, tmp_path)
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    assert found[0] == found[1] == (pytest.approx(0.1 * 1.618**2), None)


# --- how large a rate is --------------------------------------------------------------------------


def one_weight() -> list[torch.Tensor]:
    return [torch.zeros(2, requires_grad=True)]


class Mine(torch.optim.AdamW):
    """An optimizer of the user's own on one of torch's."""


class Prepared(torch.optim.Optimizer):
    """As accelerate and Lightning wrap an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups


USUAL: dict[str, tuple[Callable[[], torch.optim.Optimizer], float | None]] = {
    **{
        f"{module.__name__}.{name}": (
            lambda m=module, n=name: getattr(m, n)(one_weight(), lr=3.0),
            usual,
        )
        for module, names in {
            torch.optim: ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "SGD"),
            pyoptim: ("Adam", "AdamW", "AdamP", "RMSprop", "SGD", "SGDP"),
        }.items()
        for name in names
        for usual in (0.1 if name in ("SGD", "SGDP") else 1e-3,)
    },
    "momentum": (lambda: pyoptim.SGD(one_weight(), lr=3.0, momentum=0.9), 0.01),
    "torch's momentum": (lambda: torch.optim.SGD(one_weight(), lr=3.0, momentum=0.5), 0.05),
    "dampened": (lambda: torch.optim.SGD(one_weight(), 0.1, momentum=0.9, dampening=0.9), 0.1),
    "dampening alone": (lambda: torch.optim.SGD(one_weight(), 0.1, dampening=0.5), 0.1),
    "RMSprop, momentum": (lambda: pyoptim.RMSprop(one_weight(), momentum=0.9), 1e-4),
    "no friction": (lambda: torch.optim.SGD(one_weight(), 0.1, momentum=1.0), None),
    "only dampening": (lambda: torch.optim.SGD(one_weight(), 0.1, 0.9, dampening=1.0), None),
    "subclass": (lambda: Mine(one_weight()), 1e-3),
    "SAM": (lambda: pyoptim.SAM(one_weight(), pyoptim.SGD, lr=0.1, momentum=0.9), 0.01),
    "SAM of Adam": (lambda: pyoptim.SAM(one_weight(), torch.optim.Adam, lr=0.1), 1e-3),
    "prepared": (lambda: Prepared(pyoptim.SAM(one_weight(), pyoptim.RMSprop, lr=0.1)), 1e-3),
    "SaLSa": (lambda: pyoptim.SaLSa(one_weight()), None),
    "Adagrad": (lambda: pyoptim.Adagrad(one_weight()), None),
    "Expectigrad": (lambda: pyoptim.Expectigrad(one_weight()), None),
    "Rprop": (lambda: torch.optim.Rprop(one_weight()), None),
    "groups": (
        lambda: pyoptim.SGD(
            [
                {"params": one_weight(), "lr": 0.0, "momentum": 0.5},
                {"params": one_weight(), "lr": torch.tensor(0.1), "momentum": 0.9},
                {"params": one_weight(), "lr": 0.1},
            ]
        ),
        0.01,
    ),
}


@pytest.mark.parametrize("name", USUAL)
def test_the_usual_rate_is_that_of_the_optimizer(name: str) -> None:
    make, expected = USUAL[name]
    usual = arc.usual_lr(make())
    assert usual == (None if expected is None else pytest.approx(expected, rel=1e-12))


class Spy(arc.SummaryNet):
    """Remembers the rates that it was told."""

    def __init__(self) -> None:
        super().__init__(0, sees_lr=True)
        self.told: list[tuple[float, float | None]] = []

    def probabilities(self, train: Any, val: Any, lrs: Any, usual_lr: Any = None) -> Any:
        self.told.append((lrs[-1], usual_lr))
        return super().probabilities(train, val, lrs, usual_lr)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 0.01), ({"usual_lr": None}, None), ({"usual_lr": 3.0}, 3.0)]
)
def test_a_network_is_told_the_usual_rate(options: dict[str, Any], expected: float | None) -> None:
    spy = Spy()
    optimizer = pyoptim.SGD(
        [{"params": one_weight(), "lr": 0.0}, {"params": one_weight(), "lr": 0.2}], momentum=0.9
    )
    run(ARC(optimizer, 1, weights=spy, **options), 1)
    assert spy.told == [(0.2, None if expected is None else pytest.approx(expected))]


def noisy(i: int) -> float:
    return 1.0 + 0.1 * math.sin(7 * i) - 0.001 * i


def answers(optimizer: torch.optim.Optimizer, **options: Any) -> torch.Tensor:
    """The probabilities of four decisions on a noisy curve, [4, 3]."""
    scheduler = ARC(optimizer, 2, margins=(0.9, 0.9), **options)
    for epoch in range(8):
        for i in range(10 * epoch, 10 * epoch + 10):
            scheduler.record(noisy(i))
        scheduler.step(noisy(10 * epoch))
    return torch.tensor([decision.probabilities for decision in scheduler.decisions])


def test_an_unknown_optimizer_is_judged_by_changes_alone() -> None:
    for unknown in (
        lambda lr: answers(pyoptim.Adagrad(one_weight(), lr=lr)),
        lambda lr: answers(pyoptim.SGD(one_weight(), lr=lr), usual_lr=None),
    ):
        assert torch.equal(unknown(1e-3), unknown(1e3))


def test_the_same_place_gives_the_same_answer_and_another_another() -> None:
    adam = answers(pyoptim.Adam(one_weight(), lr=0.01))
    torch.testing.assert_close(answers(torch.optim.SGD(one_weight(), lr=1.0)), adam)
    lean = adam[:, 0] - adam[:, 2]
    for lr, sign in ((1e-5, 1), (0.3, -1)):
        other = answers(pyoptim.Adam(one_weight(), lr=lr))
        assert (sign * (other[:, 0] - other[:, 2] - lean) > 0).all()


def test_the_default_decides_without_validation_and_survives_what_is_not_finite() -> None:
    scheduler = ARC(pyoptim.Adam(one_weight(), lr=10.0), 1)
    for value in (1.0, 2.0, math.nan, 2.5):
        for _ in range(5):
            scheduler.record(value)
        scheduler.step()
    assert [d.guard for d in scheduler.decisions] == [None, None, "not finite", None]
    assert lr_of(scheduler) < 10.0
    for decision in scheduler.decisions[:2]:
        assert all(math.isfinite(p) for p in decision.probabilities or (math.nan,))


def test_a_state_of_an_earlier_version_loads() -> None:
    decision = {"epoch": 1, "action": "raise", "probabilities": RAISE, "guard": None}
    state = {
        "last_epoch": 1,
        "n_calls": 1,
        "step_count": 2,
        "base_lrs": [0.1],
        "cycles": [{"train": [1.0, 0.5], "val": [1.0], "lr": 0.1}],
        "cycle": {"train": [], "val": [], "lr": 0.0},
        "first_mean": 0.75,
        "decisions": [decision | {"restored": False, "factor": 1.618, "lrs": [0.1618]}],
    }
    scheduler = ARC(sgd(0.1618), 1)
    scheduler.load_state_dict(state)
    run(scheduler, 1)
    assert [d.epoch for d in scheduler.decisions] == [1, 2]


@pytest.mark.parametrize("weights", ["default", "conv-lstm"])
def test_the_controllers_of_the_package_decide(weights: str) -> None:
    scheduler = ARC(sgd(1e-5), 1, weights=weights)
    run(scheduler, 3, lambda i: 2.0 - 1e-4 * i)  # far too slow
    for decision in scheduler.decisions:
        assert sum(decision.probabilities or ()) == pytest.approx(1.0)
        assert decision.action == "raise"
