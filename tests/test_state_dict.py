"""state_dict: torch's layout, and training that continues in or from every implementation."""

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from dropin import (
    HAS_FUSED,
    NAMES,
    OPTIONS,
    OURS,
    TORCHS,
    assert_same,
    assert_unchanged,
    make_params,
    run,
    same_bits,
    set_grads,
    snapshot,
)
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.optim import Optimizer

import pyoptim

IMPLEMENTATIONS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
FLAGS = ("foreach", "fused", "capturable", "differentiable")
each_option = pytest.mark.parametrize("option", OPTIONS)
WITH_IMPLEMENTATION = [
    pytest.param(option, how, id=f"{option}-{how}")
    for option, (name, _) in OPTIONS.items()
    for how in IMPLEMENTATIONS
    if how != "fused" or name in HAS_FUSED
]


def flags_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{k: group.get(k) for k in FLAGS} for group in optimizer.param_groups]


def saved(optimizer: Optimizer) -> dict[str, Any]:
    """What a program would find on disk."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_option
@pytest.mark.parametrize("is_stepped", [False, True], ids=["new", "stepped"])
def test_keys_shapes_and_types_are_torchs(option: str, is_stepped: bool) -> None:
    name, kwargs = OPTIONS[option]
    params, expected = make_params(), make_params()
    ours, theirs = OURS[name](params, **kwargs), TORCHS[name](expected, **kwargs, foreach=False)
    if is_stepped:
        run(ours, params, [0])
        run(theirs, expected, [0])
    mine, torchs = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == [{**g, "foreach": None} for g in torchs["param_groups"]]
    assert mine["state"].keys() == torchs["state"].keys()
    for index, entry in torchs["state"].items():
        assert list(mine["state"][index]) == list(entry)
        for key, value in entry.items():
            own = mine["state"][index][key]
            assert (own.shape, own.dtype, own.device) == (value.shape, value.dtype, value.device)
            assert key != "step" or (own.dim() == 0 and own.dtype == torch.float32)


@pytest.mark.parametrize(("option", "how"), WITH_IMPLEMENTATION)
@pytest.mark.parametrize("is_from_torch", [True, False], ids=["from-torch", "to-torch"])
def test_training_continues_across_implementations(
    option: str, how: str, is_from_torch: bool
) -> None:
    name, kwargs = OPTIONS[option]
    params, expected = make_params(), make_params()
    theirs = TORCHS[name](expected, **kwargs, **IMPLEMENTATIONS[how])
    run(theirs, expected, range(6))

    classes = (TORCHS[name], OURS[name]) if is_from_torch else (OURS[name], TORCHS[name])
    flags = ({**IMPLEMENTATIONS[how]}, {})
    first = classes[0](params, **kwargs, **flags[not is_from_torch])
    run(first, params, range(3))
    second = classes[1](params, lr=123.0, **flags[is_from_torch])
    flags_before = flags_of(second)
    second.load_state_dict(saved(first))
    if is_from_torch:
        assert flags_of(second) == flags_before
    run(second, params, range(3, 6))
    assert_same(params, expected)


@each_option
def test_load_into_a_running_optimizer_replaces_everything(option: str) -> None:
    name, kwargs = OPTIONS[option]
    params, expected = make_params(), make_params()
    ours, source = OURS[name](params, **kwargs), OURS[name](expected, **kwargs)
    run(source, expected, range(3))
    run(ours, params, range(5, 9))
    with torch.no_grad():
        for param, value in zip(params, expected, strict=True):
            param.copy_(value)
    ours.load_state_dict(saved(source))
    run(ours, params, range(3, 5))
    run(source, expected, range(3, 5))
    assert_same(params, expected, rtol=0, atol=0)


def test_the_former_state_is_freed_by_a_load() -> None:
    params = make_params()
    optimizer = pyoptim.AdamW(params)
    run(optimizer, params, range(3))
    former = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert former() is None


@pytest.mark.parametrize("is_old", [False, True], ids=["saved-by-Adam", "older-than-the-option"])
def test_adamw_stays_decoupled_whatever_it_loads(is_old: bool) -> None:
    results = []
    for module in (pyoptim, torch.optim):
        params = make_params()
        adam = module.Adam(params, lr=0.1, weight_decay=0.1)
        run(adam, params, [0])
        loaded = adam.state_dict()
        if is_old:
            del loaded["param_groups"][0]["decoupled_weight_decay"]
        optimizer = module.AdamW(params)
        optimizer.load_state_dict(loaded)
        run(optimizer, params, [1])
        assert optimizer.param_groups[0]["decoupled_weight_decay"]
        results.append(params)
    assert_same(*results)


def test_flags_that_the_class_does_not_have_are_not_brought_in() -> None:
    optimizer = pyoptim.SGD(make_params())
    loaded = optimizer.state_dict()
    loaded["param_groups"][0].update(capturable=True, fused=True, foreach=True, lr=0.5)
    optimizer.load_state_dict(loaded)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["fused"] is None
    assert optimizer.param_groups[0]["foreach"] is None
    assert "capturable" not in optimizer.param_groups[0]


# -- dtypes, layouts, counters ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["load_state_dict", "deepcopy", "torch.save"])
@each_option
def test_float32_state_of_half_parameters_survives(
    option: str, way: str, dtype: torch.dtype
) -> None:
    name, kwargs = OPTIONS[option]
    params = make_params(dtype=dtype)
    optimizer = OURS[name](params, **kwargs, state_dtype=torch.float32)
    run(optimizer, params, range(3))
    twins = copy.deepcopy(params)
    twin = OURS[name](twins, **kwargs, state_dtype=torch.float32)
    if way == "deepcopy":
        twin = copy.deepcopy(optimizer)
        twins = twin.param_groups[0]["params"]
    else:
        twin.load_state_dict(saved(optimizer) if way == "torch.save" else optimizer.state_dict())
    for param, other in zip(params, twins, strict=True):
        for key, value in optimizer.state[param].items():
            assert value.dtype == torch.float32
            assert same_bits(twin.state[other][key], value)
    run(twin, twins, [3])
    if way != "load_state_dict":  # which shares the tensors, as torch's does
        run(optimizer, params, [3])
        assert_same(twins, params, rtol=0, atol=0)


def test_state_follows_the_parameters_dtype_without_state_dtype() -> None:
    source = pyoptim.AdamW(wide := make_params(dtype=torch.float32))
    run(source, wide, [0])
    params = make_params(dtype=torch.bfloat16)
    optimizer = pyoptim.AdamW(params)
    optimizer.load_state_dict(saved(source))
    entry = optimizer.state[params[0]]
    assert entry["exp_avg"].dtype == torch.bfloat16
    assert entry["step"].dtype == torch.float32


@each_option
def test_state_with_other_strides_than_its_parameter(option: str) -> None:
    name, kwargs = OPTIONS[option]
    params, expected = make_params(), make_params()
    ours, theirs = OURS[name](params, **kwargs), TORCHS[name](expected, **kwargs, foreach=False)
    run(ours, params, range(2))
    run(theirs, expected, range(2))
    loaded = saved(ours)
    for key, value in loaded["state"].get(0, {}).items():
        if key != "step":
            strided = value.t().contiguous().t()
            assert strided.stride() != value.stride()
            loaded["state"][0][key] = strided
    ours.load_state_dict(loaded)
    run(ours, params, range(2, 5))
    run(theirs, expected, range(2, 5))
    assert_same(params, expected)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "SGD"])
def test_the_counter_is_exact_beyond_two_to_the_24(name: str) -> None:
    params = make_params([(3,)])
    optimizer = OURS[name](params)
    run(optimizer, params, [0])
    loaded = optimizer.state_dict()
    loaded["state"][0]["step"] = torch.tensor(2.0**24 - 3)
    optimizer.load_state_dict(loaded)
    for n in range(6):
        run(optimizer, params, [n])
        assert float(optimizer.state[params[0]]["step"]) == 2**24 - 2 + n
        again = OURS[name](params)
        again.load_state_dict(saved(optimizer))
        assert float(again.state[params[0]]["step"]) == 2**24 - 2 + n
    assert optimizer.state[params[0]]["step"].dtype == torch.float64
    run(again, params, [9])
    assert float(again.state[params[0]]["step"]) == 2**24 + 4


@pytest.mark.parametrize(
    "step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0).bfloat16()]
)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "SGD"])
def test_older_forms_of_the_counter(name: str, step: Any) -> None:
    params, expected = make_params([(3,)]), make_params([(3,)])
    ours, theirs = OURS[name](params), TORCHS[name](expected)
    run(ours, params, range(3))
    run(theirs, expected, range(3))
    loaded = ours.state_dict()
    loaded["state"][0]["step"] = step
    ours.load_state_dict(loaded)
    run(ours, params, range(3, 5))
    run(theirs, expected, range(3, 5))
    assert_same(params, expected)
    ours.state[params[0]]["step"] = step  # and put there by hand
    theirs.state[expected[0]]["step"] = torch.tensor(3.0)
    run(ours, params, [5])
    run(theirs, expected, [5])
    assert_same(params, expected)
    counter = ours.state[params[0]]["step"]
    assert (counter.dtype, counter.shape, float(counter)) == (torch.float32, (), 4.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_counter_does_not_follow_a_narrow_default_dtype(dtype: torch.dtype) -> None:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        params = make_params([(3,)], torch.float32)
        optimizer = pyoptim.AdamW(params)
        run(optimizer, params, range(300))
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert optimizer.state[params[0]]["step"].dtype == expected  # as torch's
        assert float(optimizer.state[params[0]]["step"]) == 300
    finally:
        torch.set_default_dtype(former)


# -- malformed checkpoints -------------------------------------------------------------------------


def without_state(d: dict[str, Any]) -> dict[str, Any]:
    return {"param_groups": d["param_groups"]}


def with_too_few_params(d: dict[str, Any]) -> dict[str, Any]:
    return {**d, "param_groups": [{**d["param_groups"][0], "params": [0]}]}


def with_two_groups(d: dict[str, Any]) -> dict[str, Any]:
    return {**d, "param_groups": d["param_groups"] * 2}


def with_a_bad_step(d: dict[str, Any]) -> dict[str, Any]:
    return {**d, "state": {**d["state"], 2: {**d["state"][2], "step": torch.ones(2)}}}


def without_a_step(d: dict[str, Any]) -> dict[str, Any]:
    return {**d, "state": {**d["state"], 2: {"exp_avg": torch.ones(())}}}


MALFORMED = (without_state, with_too_few_params, with_two_groups, with_a_bad_step, without_a_step)


@pytest.mark.parametrize("spoil", MALFORMED)
def test_a_malformed_checkpoint_leaves_the_optimizer_as_it_was(spoil: Any) -> None:
    params, expected = make_params(), make_params()
    ours, theirs = pyoptim.AdamW(params), torch.optim.AdamW(expected)
    run(ours, params, range(2))
    run(theirs, expected, range(2))
    before, flags = snapshot(ours), flags_of(ours)
    loaded = copy.deepcopy(ours.state_dict())
    loaded["param_groups"][0].update(lr=9.0, fused=True)
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        ours.load_state_dict(spoil(loaded))
    assert_unchanged(ours, before)
    assert flags_of(ours) == flags
    assert ours.param_groups[0]["lr"] == 1e-3
    assert not ours._optimizer_load_state_dict_pre_hooks
    assert not ours._optimizer_load_state_dict_post_hooks
    run(ours, params, range(2, 4))
    run(theirs, expected, range(2, 4))
    assert_same(params, expected)


def test_state_of_another_shape_is_refused_at_step_and_nothing_moves() -> None:
    params = make_params()
    optimizer = pyoptim.AdamW(params)
    run(optimizer, params, [0])
    loaded = saved(optimizer)
    loaded["state"][2]["exp_avg"] = torch.ones(7, dtype=torch.float64)
    optimizer.load_state_dict(loaded)
    set_grads(params, 1)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"state 'exp_avg' of parameter 2 .* has shape \(7,\)"):
        optimizer.step()
    assert_unchanged(optimizer, before)


# -- distributed checkpoint, on one process --------------------------------------------------------


@each_option
def test_distributed_checkpoint_functions(option: str) -> None:
    name, kwargs = OPTIONS[option]
    results = []
    for cls in (OURS[name], TORCHS[name]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
        optimizer = cls(model.parameters(), **kwargs)
        run(optimizer, model.parameters(), range(3))
        state = copy.deepcopy(checkpoint.get_optimizer_state_dict(model, optimizer))
        fresh = cls(model.parameters(), **kwargs)
        checkpoint.set_optimizer_state_dict(model, fresh, state)
        run(fresh, model.parameters(), range(3, 5))
        results.append((state, list(model.parameters())))
    assert_same(results[0][1], results[1][1])
    assert results[0][0]["state"].keys() == results[1][0]["state"].keys()
