"""torch's own list of optimizer configurations and of refused arguments, run against pyoptim."""

import copy
import warnings
from typing import Any

import pytest
import torch
from dropin import NAMES, OURS, TORCHS, assert_same, make_params, run, set_grads
from torch.nn import Parameter

database = pytest.importorskip(
    "torch.testing._internal.common_optimizers",
    reason="torch's optimizer database needs expecttest: pip install 'pyoptim-kernels[test]'",
    exc_type=ImportError,
)
INFOS = {i.optim_cls.__name__: i for i in database.optim_db if i.optim_cls.__name__ in NAMES}
INPUTS = [
    pytest.param(name, given.kwargs, id=f"{name}-{given.desc}")
    for name in NAMES
    for given in INFOS[name].optim_inputs_func(device="cpu")
]
# One duplicate is only a warning in torch; it has a test of its own in test_contract.py.
ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}")
    for name in NAMES
    for error in INFOS[name].optim_error_inputs_func("cpu", torch.float32)
    if error.error_type is not UserWarning
]
FLAGS = ({}, {"foreach": False}, {"foreach": True}, {"fused": True}, {"differentiable": True})


def test_the_database_has_all_five_optimizers() -> None:
    assert set(INFOS) == set(NAMES)
    assert len(INPUTS) >= 30
    assert len(ERRORS) >= 30


@pytest.mark.parametrize(("name", "kwargs"), INPUTS)
def test_follows_torchs_for_loop(name: str, kwargs: dict[str, Any]) -> None:
    params, expected = make_params(), make_params()
    ours = OURS[name](params, **copy.deepcopy(kwargs))
    theirs = TORCHS[name](expected, **copy.deepcopy(kwargs), foreach=False)
    for _ in range(2):  # the second half after the first, with a group more
        run(ours, params, range(3))
        run(theirs, expected, range(3))
        assert_same(params, expected)
        params += (more := make_params([(2, 3)], seed=1))
        expected += (more_expected := make_params([(2, 3)], seed=1))
        ours.add_param_group({"params": more, "lr": 0.05})
        theirs.add_param_group({"params": more_expected, "lr": 0.05})


@pytest.mark.parametrize(("name", "kwargs"), INPUTS)
def test_goes_downhill_on_a_regression(name: str, kwargs: dict[str, Any]) -> None:
    """As torch's test_forloop_goes_right_direction."""
    weight, bias = make_params([(10, 5), (10,)], torch.float32)
    inputs = make_params([(5,)], torch.float32)[0].detach()
    optimizer = OURS[name]([weight, bias], **kwargs)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (weight.mv(inputs) + bias).pow(2).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert (losses[-1] > losses[0]) == bool(kwargs.get("maximize", False))


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_refuses_what_torch_refuses_with_its_words(name: str, error: Any) -> None:
    def attempt(cls: Any) -> str:
        given = copy.deepcopy(error.optimizer_error_input)
        params = given.params or [Parameter(torch.ones(2))]
        with pytest.raises(error.error_type, match=error.error_regex) as raised:
            cls(params, **given.kwargs)
        assert raised.type is error.error_type
        return str(raised.value)

    assert error.error_on is database.OptimizerErrorEnum.CONSTRUCTION_ERROR
    assert attempt(OURS[name]) == attempt(TORCHS[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: str(flags) if flags else "default")
def test_implementation_flags_are_accepted_as_torch_accepts_them(
    name: str, flags: dict[str, bool]
) -> None:
    if name == "RMSprop" and "fused" in flags:
        with pytest.raises(TypeError, match="unexpected keyword argument 'fused'"):
            OURS[name](make_params(), **flags)
        return
    params, expected = make_params(), make_params()
    if flags.get("differentiable"):
        params, expected = ([p.detach() for p in ps] for ps in (params, expected))
    ours, theirs = OURS[name](params, **flags), TORCHS[name](expected, **flags)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_grads(params, 0)
        ours.step()
    set_grads(expected, 0)
    theirs.step()
    # torch's differentiable Adam corrects the bias in the float32 of the step counter.
    assert_same(
        params, expected, **({"rtol": 1e-6, "atol": 1e-7} if "differentiable" in flags else {})
    )
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("other", ["foreach", "differentiable"])
def test_impossible_pairs_of_flags_are_refused(name: str, other: str) -> None:
    def attempt(cls: Any) -> str:
        with pytest.raises(RuntimeError) as raised:
            cls([Parameter(torch.ones(2))], **{"fused": True, other: True})
        return str(raised.value)

    assert attempt(OURS[name]) == attempt(TORCHS[name])
