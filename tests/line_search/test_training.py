"""Line searches in real training: checkpoints, groups, schedulers, mixed precision."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from dropin import assert_unchanged, same_bits, snapshot
from models import KINDS, Recorder, batches, loss_of, make_model, train
from torch import Tensor, nn
from torch.nn import Parameter

import pyoptim
from pyoptim import SLS, AdaSLS, SaLSa
from pyoptim.line_search import Search

parametrize_kinds = pytest.mark.parametrize("kind", KINDS)


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize_kinds
def test_resuming_is_exact(kind: str, dtype: torch.dtype) -> None:
    """The released code resumes with a step size of 1."""
    whole, half = make_model(dtype, 0.3), make_model(dtype, 0.3)
    optimizer = KINDS[kind](whole.parameters())
    first = KINDS[kind](half.parameters())
    torch.manual_seed(3)
    expected = train(whole, optimizer, 24)
    torch.manual_seed(3)
    train(half, first, 13)
    state = torch.get_rng_state()
    second = make_model(dtype, 0.3)
    resumed = KINDS[kind](second.parameters())
    saved = through_file({"model": half.state_dict(), "optimizer": first.state_dict()})
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.step_size == first.step_size
    torch.set_rng_state(state)
    assert train(second, resumed, 11, first=13) == expected[13:]
    assert all(map(same_bits, second.parameters(), whole.parameters()))
    assert vars(resumed._numbers) == vars(optimizer._numbers)
    for p, q in zip(second.parameters(), whole.parameters(), strict=True):
        for name, value in resumed.state[p].items():
            assert same_bits(value, optimizer.state[q][name]), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@parametrize_kinds
def test_copies_go_the_same_way(kind: str, copied: Any) -> None:
    model = make_model()
    optimizer = KINDS[kind](model.parameters(), max_grad_norm=5.0, module=model)
    train(model, optimizer, 12)
    twin_model, twin = copied((model, optimizer))
    twin.param_groups[0]["params"] = list(twin_model.parameters())
    twin.state = type(twin.state)(
        dict,
        {
            q: copy.deepcopy(optimizer.state[p])
            for p, q in zip(model.parameters(), twin_model.parameters(), strict=True)
            if p in optimizer.state
        },
    )
    assert train(twin_model, twin, 8, first=12) == train(model, optimizer, 8, first=12)
    assert twin.last_search == optimizer.last_search


def test_a_state_dict_is_a_snapshot() -> None:
    model = make_model()
    optimizer = SaLSa(model.parameters())
    train(model, optimizer, 5)
    saved = optimizer.state_dict()
    step_size = saved["param_groups"][0]["line_search"]["step_size"]
    train(model, optimizer, 5)
    assert saved["param_groups"][0]["line_search"]["step_size"] == step_size != optimizer.step_size


@pytest.mark.parametrize("other", [torch.optim.Adam, SLS])
def test_other_state_dicts_are_refused(other: Any) -> None:
    model = make_model()
    optimizer = SaLSa(model.parameters())
    train(model, optimizer, 5)
    before, numbers = snapshot(optimizer), dict(vars(optimizer._numbers))
    with pytest.raises(ValueError, match="state_dict is not that of a SaLSa"):
        optimizer.load_state_dict(other(model.parameters()).state_dict())
    bad = optimizer.state_dict()
    bad["param_groups"][0]["params"] = [0]
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(bad)
    assert_unchanged(optimizer, before)
    assert vars(optimizer._numbers) == numbers


# -- groups, rates, schedulers ---------------------------------------------------------------------


def test_relative_rates_and_the_rates_shown() -> None:
    model = make_model()
    first, last = model[0], model[3]
    groups = [
        {"params": first.parameters()},
        {"params": last.parameters(), "lr_scale": 0.0, "weight_decay": 0.5},
    ]
    optimizer = SaLSa(groups)
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.0]
    weights = [p.detach().clone() for p in last.parameters()]
    train(model, optimizer, 12)
    assert [g["lr"] for g in optimizer.param_groups] == [optimizer.step_size, 0.0]
    assert all(map(torch.equal, weights, last.parameters()))
    # A tenth of the rate for the gradients of tenfold parameters: the same training.
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "lr_scale": 0.5})
    assert optimizer.param_groups[2]["lr"] == 0.5 * optimizer.step_size


def test_a_group_may_not_have_a_rate_of_its_own() -> None:
    with pytest.raises(ValueError, match="give the group a relative one, lr_scale"):
        SaLSa([{"params": [Parameter(torch.ones(1))], "lr": 0.1}])
    with pytest.raises(ValueError, match="base must be the same for all groups"):
        SaLSa([{"params": [Parameter(torch.ones(1))], "base": "sgd"}])


def test_a_scheduler_has_no_effect_and_is_told() -> None:
    one, two = make_model(), make_model()
    plain, scheduled = SaLSa(one.parameters()), SaLSa(two.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(scheduled, 0.5)
    messages = []
    for batch in batches(6):
        plain.step(loss_of(one, batch))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduled.step(loss_of(two, batch))
            scheduler.step()
        messages += [str(w.message) for w in caught]
    assert len(messages) == 1
    assert "the search chooses the rate" in messages[0]
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@parametrize_kinds
def test_a_rate_factor_scales_steps_but_not_trials(kind: str) -> None:
    one, two = make_model(), make_model()
    plain, scaled = KINDS[kind](one.parameters()), KINDS[kind](two.parameters())
    scaled.rate_factor = 0.25
    before = [p.detach().clone() for p in one.parameters()]
    (batch,) = batches(1)
    plain.step(loss_of(one, batch))
    scaled.step(loss_of(two, batch))
    assert plain.last_search is not None
    assert scaled.last_search is not None
    assert scaled.last_search.losses == plain.last_search.losses
    assert scaled.param_groups[0]["lr"] == 0.25 * plain.param_groups[0]["lr"]
    for w, p, q in zip(before, one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(q - w, 0.25 * (p - w))


def test_the_step_size_can_be_set() -> None:
    optimizer = SaLSa(make_model().parameters())
    optimizer.step_size = 0.01
    assert optimizer.param_groups[0]["lr"] == 0.01
    with pytest.raises(ValueError, match="step_size must be a number above 0"):
        optimizer.step_size = float("nan")


def test_a_largest_step_size() -> None:
    model = make_model()
    optimizer = SaLSa(model.parameters(), max_step_size=1e-3, init_step_size=1e-3)
    train(model, optimizer, 30)
    assert optimizer.step_size <= 1e-3
    assert optimizer.last_search is not None
    assert max(optimizer.last_search.step_sizes) == 1e-3


@pytest.mark.parametrize(
    ("cls", "name", "values"),
    [
        (SaLSa, "base", ["adagrad", None]),
        (SaLSa, "variant", ["best"]),
        (SaLSa, "c", [-0.1, float("nan")]),
        (SaLSa, "betas", [(1.0, 0.9), (0.9, -0.1)]),
        (SaLSa, "beta3", [1.0, -0.1]),
        (SaLSa, "shrink", [0.0, 1.0]),
        (SaLSa, "growth", [0.9, float("inf")]),
        (SaLSa, "init_step_size", [0.0, float("inf")]),
        (SaLSa, "eps", [-1.0]),
        (SaLSa, "weight_decay", [-0.1]),
        (SaLSa, "max_trials", [0]),
        (SaLSa, "search_interval", [0, "often"]),
        (SaLSa, "max_step_size", [0.0]),
        (SaLSa, "momentum", [1.0]),
        (SaLSa, "max_grad_norm", [-1.0]),
        (SaLSa, "state_dtype", [torch.float64]),
        (SLS, "line_search_fn", ["wolfe"]),
        (SLS, "reset_option", [3]),
        (SLS, "n_batches_per_epoch", [0]),
        (SLS, "beta_b", [1.0]),
        (SLS, "gamma", [0.5]),
        (SLS, "beta_f", [1.0]),
        (SLS, "eta_max", [0.0]),
        (AdaSLS, "base_opt", ["scalar"]),
        (AdaSLS, "eta_max", [-1.0]),
        (AdaSLS, "momentum", [1.0]),
        (AdaSLS, "beta", [1.0]),
    ],
)
def test_options_out_of_range(cls: Any, name: str, values: list[Any]) -> None:
    named = {"momentum": "momentum|betas", "beta": "betas"}.get(name, name)
    for value in values:
        with pytest.raises(ValueError, match=f"({named}).*must be"):
            cls([Parameter(torch.ones(1))], **{name: value})


# -- logging ---------------------------------------------------------------------------------------


def test_what_a_search_did_is_there_for_logging() -> None:
    model = make_model()
    optimizer = SaLSa(model.parameters())
    (batch,) = batches(1)
    closure = Recorder(loss_of(model, batch))
    assert optimizer.last_search is None
    optimizer.step(closure)
    search = optimizer.last_search
    assert isinstance(search, Search)
    assert search.losses == tuple(closure.losses[1:])
    assert search.loss == closure.losses[0]
    assert search.step_size == search.step_sizes[-1] == optimizer.step_size
    assert search.slope > 0
    assert (search.step, search.result) == (1, "accepted")
    assert (optimizer.n_searches, optimizer.n_trials) == (1, len(search.losses))


def test_searches_become_rare() -> None:
    model = make_model()
    optimizer = SaLSa(model.parameters())
    train(model, optimizer, 150)
    before = optimizer.n_searches
    train(model, optimizer, 100, first=150)
    assert optimizer.n_searches - before < 25


def test_hooks_see_the_step() -> None:
    model = make_model()
    optimizer = SaLSa(model.parameters())
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda own, args, kwargs: seen.append(own.n_searches))
    optimizer.register_step_post_hook(lambda own, args, kwargs: seen.append(own.n_searches))
    train(model, optimizer, 2)
    assert seen == [0, 1, 1, 2]


# -- mixed precision -------------------------------------------------------------------------------


def autocast_loss(model: nn.Module, batch: Any) -> Any:
    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, batch)()

    return loss


@pytest.mark.parametrize("is_outside", [False, True])
def test_autocast_in_the_closure_and_around_the_step(is_outside: bool) -> None:
    """Around it, casts of the weights before the step would be kept for the trials."""
    model = make_model(torch.float32)
    optimizer = SaLSa(model.parameters(), search_interval=1)
    for batch in batches(10, dtype=torch.float32):
        closure = Recorder(loss_of(model, batch) if is_outside else autocast_loss(model, batch))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_outside):
            optimizer.step(closure)
        assert closure.losses[1] != closure.losses[0]
    assert optimizer.step_size < 1


@pytest.mark.parametrize("cls", [torch.amp.GradScaler, pyoptim.GradScaler])
def test_grad_scaler(cls: Any) -> None:
    one, two = make_model(torch.float32), make_model(torch.float32)
    plain, scaled = SaLSa(one.parameters()), SaLSa(two.parameters())
    scaler = cls("cpu", init_scale=2.0**10, growth_interval=3)
    for batch in batches(12, dtype=torch.float32):
        expected = plain.step(loss_of(one, batch))
        assert torch.equal(scaled.step(loss_of(two, batch), grad_scaler=scaler), expected)
        scaler.update()
    assert scaler.get_scale() == 2.0**14
    assert scaled.n_searches < 12
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize("n_before", [0, 10])
def test_an_overflow_skips_the_step(n_before: int) -> None:
    model = make_model(torch.float32)
    optimizer = SaLSa(model.parameters(), search_interval=100)
    train(model, optimizer, n_before)
    before, numbers = snapshot(optimizer), dict(vars(optimizer._numbers))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    (batch,) = batches(1, dtype=torch.float32)
    closure = Recorder(lambda: 1000 * loss_of(model, batch)())
    optimizer.step(closure, grad_scaler=scaler)
    scaler.update()
    assert len(closure.losses) == 1
    assert scaler.get_scale() == 2.0**126
    assert_unchanged(optimizer, before)
    assert vars(optimizer._numbers) == numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["salsa", "sls", "adasls", "salsa-sgd"])
def test_half_precision_parameters_have_float32_master_copies(
    kind: str, dtype: torch.dtype
) -> None:
    model = make_model(dtype)
    optimizer = KINDS[kind](model.parameters(), state_dtype=torch.float32)
    losses = train(model, optimizer, 60)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    for param in model.parameters():
        entry = optimizer.state[param]
        assert all(t.dtype == torch.float32 for t in entry.values())
        assert same_bits(param.detach(), entry["master_param"].to(dtype))


def test_weights_that_someone_else_wrote_go_before_their_master_copies() -> None:
    model = make_model(torch.bfloat16)
    optimizer = SaLSa(model.parameters())
    train(model, optimizer, 3)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.5)
    train(model, optimizer, 1)
    assert all(float((p - 0.5).detach().abs().max()) < 0.2 for p in model.parameters())


def test_without_master_copies() -> None:
    model = make_model(torch.bfloat16)
    optimizer = SaLSa(model.parameters(), master_weights=False)
    train(model, optimizer, 10)
    assert all("master_param" not in entry for entry in optimizer.state.values())
