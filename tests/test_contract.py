"""What users of torch.optim rely on: signatures, groups, hooks, closures, schedulers, copies."""

import copy
import gc
import inspect
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin import (
    CLOSE,
    NAMES,
    OPTIONS,
    OURS,
    TORCHS,
    assert_same,
    assert_unchanged,
    make_params,
    run,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim import optimizer as torch_optimizer

import pyoptim

each_class = pytest.mark.parametrize("name", NAMES)
each_option = pytest.mark.parametrize("option", OPTIONS)


def pair(option: str, **more: Any) -> tuple[Optimizer, list[Parameter], Optimizer, list[Parameter]]:
    name, kwargs = OPTIONS[option]
    kwargs = {**kwargs, **more}
    params, expected = make_params(), make_params()
    theirs = TORCHS[name](expected, **copy.deepcopy(kwargs), foreach=False)
    return OURS[name](params, **kwargs), params, theirs, expected


# -- construction ----------------------------------------------------------------------------------


@each_class
def test_signature_is_torchs_with_options_added(name: str) -> None:
    ours = list(inspect.signature(OURS[name].__init__).parameters.values())
    theirs = list(inspect.signature(TORCHS[name].__init__).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    added = [(p.name, p.kind, p.default) for p in ours[len(theirs) :]]
    assert added == [
        (n, inspect.Parameter.KEYWORD_ONLY, None)
        for n in ("state_dtype", "backend", "max_grad_norm")
    ]


@each_class
def test_is_an_instance_of_torchs_class(name: str) -> None:
    optimizer = OURS[name](make_params())
    assert isinstance(optimizer, TORCHS[name])
    assert type(optimizer).__name__ == name


@each_class
def test_groups_and_defaults_have_torchs_keys_and_values(name: str) -> None:
    ours, theirs = OURS[name](make_params()), TORCHS[name](make_params())
    assert ours.defaults == theirs.defaults
    for group, expected in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert list(group) == list(expected)
    assert repr(ours) == repr(theirs)


@each_class
def test_state_dtype_other_than_float32_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"state_dtype must be None or torch\.float32"):
        OURS[name](make_params(), state_dtype=torch.bfloat16)


def test_named_parameters_and_groups_of_them() -> None:
    model, twin = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
    twin.load_state_dict(model.state_dict())
    optimizers = []
    for cls, module in ((pyoptim.AdamW, model), (torch.optim.AdamW, twin)):
        weight, bias = module.named_parameters()
        optimizers.append(
            cls([{"params": [weight], "lr": 0.1}, {"params": [bias], "betas": (0.5, 0.6)}])
        )
    assert optimizers[0].param_groups[0]["param_names"] == ["weight"]
    for optimizer, module in zip(optimizers, (model, twin), strict=True):
        run(optimizer, module.parameters(), range(3))
    assert_same(model.parameters(), twin.parameters())
    assert optimizers[0].state_dict()["param_groups"] == optimizers[1].state_dict()["param_groups"]


def test_options_edited_between_steps_take_effect() -> None:
    ours, params, theirs, expected = pair("adam")
    for step, edit in enumerate(
        (
            {},
            {"lr": 0.5},
            {"weight_decay": 0.3},
            {"amsgrad": True},
            {"betas": (0.1, 0.2)},
            {"maximize": True},
        )
    ):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(edit)
            if edit == {"amsgrad": True}:  # torch wants the state to be there already
                for entry in optimizer.state.values():
                    entry["max_exp_avg_sq"] = torch.zeros_like(entry["exp_avg"])
        run(ours, params, [step])
        run(theirs, expected, [step])
        assert_same(params, expected)


def test_a_parameter_listed_twice_moves_as_in_torchs_for_loop() -> None:
    for option, (name, kwargs) in OPTIONS.items():
        results = []
        for cls in (OURS[name], TORCHS[name]):
            one, other = make_params([(5,), (6,)])
            with pytest.warns(UserWarning, match="duplicate parameters"):
                optimizer = cls([one, other, one], **kwargs)
            run(optimizer, [one, other], range(3))
            results.append([one, other])
        assert_same(*results, **CLOSE), option


# -- hyper-parameters as tensors -------------------------------------------------------------------


@each_option
def test_lr_as_a_tensor_is_read_at_every_step(option: str) -> None:
    ours, params, theirs, expected = pair(option, lr=torch.tensor(0.1, dtype=torch.float64))
    for step, change in enumerate(
        (lambda lr: lr, lambda lr: lr.mul_(0.5), lambda lr: torch.tensor([0.3]).double())
    ):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = change(optimizer.param_groups[0]["lr"])
        run(ours, params, [step])
        run(theirs, expected, [step])
        assert_same(params, expected)


@pytest.mark.parametrize("option", ["adam-amsgrad", "adamw"])
def test_betas_as_tensors_are_read_at_every_step(option: str) -> None:
    betas = (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))
    ours, params = pair(option, betas=copy.deepcopy(betas))[:2]
    theirs, expected = pair(option, betas=(0.9, 0.99))[2:]
    run(ours, params, [0, 1])
    run(theirs, expected, [0, 1])
    assert_same(params, expected)
    ours.param_groups[0]["betas"][1].fill_(0.5)
    theirs.param_groups[0]["betas"] = (0.9, 0.5)
    run(ours, params, [2])
    run(theirs, expected, [2])
    assert_same(params, expected)


def test_weight_decay_as_a_tensor() -> None:
    decay = torch.tensor(0.25, dtype=torch.float64)
    ours, params = pair("sgd", weight_decay=decay)[:2]
    theirs, expected = pair("sgd", weight_decay=0.25)[2:]
    run(ours, params, [0])
    run(theirs, expected, [0])
    decay.fill_(0.5)
    theirs.param_groups[0]["weight_decay"] = 0.5
    run(ours, params, [1])
    run(theirs, expected, [1])
    assert_same(params, expected)


# -- schedulers ------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[3],
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.3),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("option", ["sgd-momentum", "adamw", "rmsprop-full"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_schedulers_drive_it_as_they_drive_torchs(
    scheduler: str, option: str, as_tensor: bool
) -> None:
    more = {"lr": torch.tensor(0.1, dtype=torch.float64)} if as_tensor else {}
    ours, params, theirs, expected = pair(option, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "lr_scheduler.step() before optimizer.step()"
        for optimizer, own in ((ours, params), (theirs, expected)):
            schedule = SCHEDULERS[scheduler](optimizer)
            for step in range(7):
                run(optimizer, own, [step])
                is_plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
                schedule.step(1.0) if is_plateau else schedule.step()
    assert_same(params, expected)
    assert float(ours.param_groups[0]["lr"]) == float(theirs.param_groups[0]["lr"])
    if scheduler == "OneCycleLR":
        key = "betas" if option == "adamw" else "momentum"
        assert ours.param_groups[0][key] == theirs.param_groups[0][key]
        assert ours.param_groups[0][key] != OPTIONS[option][1].get(key)


def test_averaged_model_and_swalr() -> None:
    results = []
    for cls in (pyoptim.SGD, torch.optim.SGD):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).double()
        optimizer = cls(model.parameters(), lr=0.1, momentum=0.9)
        averaged = swa_utils.AveragedModel(model)
        schedule = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for step in range(4):
            run(optimizer, model.parameters(), [step])
            averaged.update_parameters(model)
            schedule.step()
        results.append(list(averaged.module.parameters()))
    assert_same(*results)


# -- hooks, closures, profiler ---------------------------------------------------------------------


def test_hooks_run_in_torchs_order_and_may_change_the_arguments() -> None:
    seen: list[str] = []
    calls: list[int] = []

    def give_closure(_: Optimizer, args: Any, kwargs: Any) -> Any:
        seen.append("pre")
        return (args[0], lambda: calls.append(1) or 7.0), kwargs

    optimizer = pyoptim.AdamW(make_params())
    params = optimizer.param_groups[0]["params"]
    handles = [
        optimizer.register_step_pre_hook(give_closure),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    set_grads(params, 0)
    assert optimizer.step() == 7.0
    assert seen == ["global pre", "pre", "post", "global post"]
    assert calls == [1]
    for handle in handles:
        handle.remove()
    assert optimizer.step() is None
    assert len(seen) == 4


def test_a_hook_sees_the_arguments_step_was_called_with() -> None:
    seen = []
    optimizer = pyoptim.SGD(make_params())
    optimizer.register_step_pre_hook(lambda _, args, kwargs: seen.append((args[1:], kwargs)))
    closure = lambda: None  # noqa: E731
    optimizer.step()
    optimizer.step(closure)
    assert seen == [((), {}), ((closure,), {})]


def test_a_pre_hook_that_returns_nonsense_raises_and_nothing_moves() -> None:
    optimizer = pyoptim.AdamW(make_params())
    set_grads(optimizer.param_groups[0]["params"], 0)
    optimizer.register_step_pre_hook(lambda *_: 3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_state_dict_hooks() -> None:
    optimizer = pyoptim.AdamW(make_params())
    run(optimizer, optimizer.param_groups[0]["params"], [0])
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, s: {**s, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, s: {**s, "param_groups": [{**s["param_groups"][0], "lr": 0.5}]}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["save", 0.5]


@each_class
def test_closure_runs_once_with_grad_enabled_and_its_loss_is_returned(name: str) -> None:
    results = []
    for cls in (OURS[name], TORCHS[name]):
        params = make_params()
        optimizer = cls(params, lr=0.1)
        calls = []

        def closure(
            params: list[Parameter] = params, optimizer: Any = optimizer, calls: Any = calls
        ) -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [optimizer.step(closure) for _ in range(3)]
        assert calls == [True] * 3
        results.append([*params, *losses])
    assert_same(*results)


@each_class
def test_an_exception_in_the_closure_changes_nothing(name: str) -> None:
    optimizer = OURS[name](make_params())
    set_grads(optimizer.param_groups[0]["params"], 0)
    before = snapshot(optimizer)

    def fail() -> None:
        raise KeyError("closure")

    with pytest.raises(KeyError, match="closure"):
        optimizer.step(fail)
    assert_unchanged(optimizer, before)


@each_class
def test_the_profiler_shows_the_step(name: str) -> None:
    optimizer = OURS[name](make_params())
    set_grads(optimizer.param_groups[0]["params"], 0)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    events = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{name}.step" in events
    assert f"Optimizer.zero_grad#{name}.zero_grad" in events


def test_zero_grad_both_ways() -> None:
    params = make_params()
    optimizer = pyoptim.AdamW(params)
    set_grads(params, 0)
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, grads, strict=True))
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


# -- subclasses, copies, life time -----------------------------------------------------------------


class Counting(pyoptim.AdamW):
    calls = 0

    def step(self, closure: Any = None) -> Any:
        type(self).calls += 1
        return super().step(closure)


def test_a_subclass_may_override_step_and_hooks_run_once() -> None:
    params, expected = make_params(), make_params()
    optimizer = Counting(params, lr=0.1)
    hooked: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: hooked.append(1))
    run(optimizer, params, range(3))
    run(torch.optim.AdamW(expected, lr=0.1), expected, range(3))
    assert_same(params, expected)
    assert Counting.calls == len(hooked) == 3


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@each_option
def test_a_copy_continues_as_the_original(option: str, way: str) -> None:
    name, kwargs = OPTIONS[option]
    params = make_params(dtype=torch.bfloat16)
    optimizer = OURS[name](params, **kwargs, state_dtype=torch.float32, backend="cpu")
    run(optimizer, params, range(3))
    twin = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    twins = twin.param_groups[0]["params"]
    assert (twin.state_dtype, twin.backend) == (torch.float32, "cpu")
    run(optimizer, params, range(3, 5))
    run(twin, twins, range(3, 5))
    assert_same(twins, params, rtol=0, atol=0)
    assert not any(a is b for a, b in zip(twins, params, strict=True))


def test_an_optimizer_in_a_cycle_is_collected() -> None:
    (param,) = make_params([(5,)])
    param.owner = optimizer = pyoptim.AdamW([param])
    run(optimizer, [param], range(3))
    assert optimizer._plan is not None
    alive = weakref.ref(optimizer), weakref.ref(param)
    del optimizer, param
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


@each_class
def test_step_inside_backward(name: str) -> None:
    """As in torch's tutorial: each parameter is stepped as soon as its gradient is there."""
    results = []
    for cls in (OURS[name], TORCHS[name]):
        params = make_params()
        optimizers = {p: cls([p], lr=0.1) for p in params}

        def update(p: Tensor, optimizers: dict[Tensor, Optimizer] = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in params:
            p.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            sum((p**2).sum() for p in params).backward()
        assert all(p.grad is None for p in params)
        results.append(params)
    assert_same(*results)


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    (param,) = make_params([(5,)])
    optimizer = pyoptim.AdamW([param])
    for step in range(3):  # the general path, then the plan
        set_grads([param], step)
        loss = (param * param).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# -- parameters that change under the optimizer ----------------------------------------------------


@each_class
def test_swap_tensors(name: str) -> None:
    params, expected = make_params(), make_params()
    ours, theirs = OURS[name](params, lr=0.1), TORCHS[name](expected, lr=0.1, foreach=False)
    run(ours, params, range(2))
    run(theirs, expected, range(2))
    for group in (params, expected):
        group[0].grad = None
        torch.utils.swap_tensors(group[0], Parameter(torch.arange(12.0).double().view(3, 4)))
    run(ours, params, range(2, 4))
    run(theirs, expected, range(2, 4))
    assert_same(params, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@each_option
def test_module_changes_dtype_between_steps(option: str, dtype: torch.dtype) -> None:
    """torch refuses most of these; ours goes on with the state it has."""
    name, kwargs = OPTIONS[option]
    module = torch.nn.ParameterList(make_params(dtype=torch.float32))
    optimizer = OURS[name](module.parameters(), **kwargs)
    run(optimizer, module, range(2))
    truth = torch.nn.ParameterList(p.detach().clone() for p in module.double())
    module.to(dtype)
    expected = TORCHS[name](truth.parameters(), **kwargs, foreach=False)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, module, [2])
    run(expected, truth, [2])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    assert [p.dtype for p in module] == [dtype] * 3
    assert_same([p.double() for p in module], truth, rtol=tolerance, atol=tolerance)


@each_option
def test_gradients_that_come_and_go_keep_their_own_step_count(option: str) -> None:
    ours, params, theirs, expected = pair(option)
    for step in range(9):
        for optimizer, own in ((ours, params), (theirs, expected)):
            set_grads(own, step)
            own[step % 3].grad = None
            optimizer.step()
    assert_same(params, expected)


def test_gradients_that_come_and_go_do_not_undo_the_plan() -> None:
    params = make_params()
    optimizer = pyoptim.AdamW(params)
    run(optimizer, params, [0])
    plan = optimizer._plan
    for step in range(1, 4):
        set_grads(params, step)
        params[step % 3].grad = None
        optimizer.step()
    assert plan is not None
    assert optimizer._plan is plan
    params[0].grad = None
    optimizer._plan = None  # a plan made while one parameter rests has room for it too
    optimizer.step()
    plan = optimizer._plan
    run(optimizer, params, [4])
    assert optimizer._plan is plan


def test_no_plan_is_made_of_a_step_that_needed_copies() -> None:
    (param,) = make_params([(3, 4)])
    optimizer = pyoptim.SGD([param])
    for _ in range(2):
        param.grad = torch.ones(4, 3, dtype=torch.float64).t()
        optimizer.step()
        assert optimizer._plan is None
    param.grad = torch.ones(3, 4, dtype=torch.float64)
    optimizer.step()
    assert optimizer._plan is not None


def test_resting_parameters_that_share_memory_are_not_planned_together() -> None:
    results = []
    for cls in (pyoptim.SGD, torch.optim.SGD):
        whole = torch.ones(6, dtype=torch.float64)
        params = [Parameter(whole[:4]), Parameter(whole[2:])]
        optimizer = cls(params, lr=0.1, momentum=0.9)
        for step in range(6):
            set_grads(params, step)
            if step < 3:
                params[step % 2].grad = None
            optimizer.step()
        assert cls is torch.optim.SGD or optimizer._plan is None
        results.append([whole])
    assert_same(*results)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["one-for-both", "the-other-parameter", "partly-the-other"])
def test_gradients_over_the_memory_of_others_are_taken_in_order(kind: str, scale: float) -> None:
    """As in torch's for-loop, which unscales and steps one parameter after the other."""
    results = []
    for cls in (pyoptim.SGD, torch.optim.SGD):
        base = torch.arange(8.0).double()
        params = [Parameter(base[2:7]), *make_params([(5,)])]
        optimizer = cls(params, lr=0.1, momentum=0.9)
        for step in range(3):
            set_grads(params, step)
            params[1].grad = {
                "one-for-both": params[0].grad,
                "the-other-parameter": params[0].detach(),
                "partly-the-other": base[:5],
            }[kind]
            if cls is pyoptim.SGD:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
                optimizer.step()
                assert (optimizer._plan is None) == (kind != "one-for-both" or scale != 1.0)
                continue
            for p in params:
                p.grad.mul_(1 / scale)
                only = cls([p], lr=0.1, momentum=0.9)
                only.state = optimizer.state
                only.step()
        results.append([base, *params])
    assert_same(*results)


def test_inference_tensors_as_parameters() -> None:
    with torch.inference_mode():
        param, expected = torch.ones(3), torch.ones(3)
        ours, theirs = pyoptim.AdamW([param]), torch.optim.AdamW([expected], foreach=False)
        for step in range(3):
            set_grads([param], step)
            set_grads([expected], step)
            ours.step()
            theirs.step()
        assert_same([param], [expected], rtol=1e-6, atol=0)
    before = snapshot(ours)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside"):
        ours.step()
    assert_unchanged(ours, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_step_under_inference_mode_leaves_ordinary_state_behind(backend: str) -> None:
    params, expected = make_params(), make_params()
    ours, theirs = pyoptim.AdamW(params, backend=backend), torch.optim.AdamW(expected)
    set_grads(params, 0)
    with torch.inference_mode():
        ours.step()
    run(theirs, expected, [0])
    run(ours, params, [1, 2])
    run(theirs, expected, [1, 2])
    assert_same(params, expected)


# -- differentiable and capturable -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_capturable_on_the_cpu_raises_at_step_and_nothing_moves(name: str) -> None:
    params = make_params()
    optimizer = OURS[name](params, capturable=True)
    set_grads(params, 0)
    before = snapshot(optimizer)
    with pytest.raises(AssertionError, match="capturable=True"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.param_groups[0]["capturable"] = False
    optimizer.step()
    optimizer.param_groups[0]["capturable"] = True  # the plan notices
    with pytest.raises(AssertionError, match="capturable=True"):
        optimizer.step()


def differentiable_step(
    cls: Any, kwargs: dict[str, Any], state: dict[str, Tensor], param: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """One step on clones: a function that autograd can check."""
    leaf = param
    param = param.clone()
    param.grad = grad
    optimizer = cls([param], differentiable=True, **kwargs)
    optimizer.state[param].update(
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    )
    optimizer.step()
    states = [
        v for v in optimizer.state[param].values() if isinstance(v, Tensor) and v.requires_grad
    ]
    del leaf
    return (param, *states)


DIFFERENTIABLE = {
    "sgd": ("SGD", {"lr": 0.9}, ()),
    "sgd-momentum": (
        "SGD",
        {"lr": 0.9, "momentum": 0.5, "weight_decay": 0.1},
        ("momentum_buffer",),
    ),
    "sgd-nesterov": ("SGD", {"lr": 0.9, "momentum": 0.5, "nesterov": True}, ("momentum_buffer",)),
    "adam": ("Adam", {"lr": 0.9, "weight_decay": 0.1}, ("exp_avg", "exp_avg_sq")),
    "adam-amsgrad": ("Adam", {"amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    "adamw": ("AdamW", {"lr": 0.9}, ("exp_avg", "exp_avg_sq")),
    "rmsprop": ("RMSprop", {"lr": 0.9, "maximize": True}, ("square_avg",)),
    "rmsprop-full": (
        "RMSprop",
        {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
        ("square_avg", "momentum_buffer", "grad_avg"),
    ),
    "adagrad": ("Adagrad", {"lr": 0.9, "lr_decay": 0.1}, ("sum",)),
}


def state_for(name: str, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """Second moments well above the first, so that no square root is near zero."""
    state = {} if name == "SGD" else {"step": torch.tensor(10.0)}
    for n, key in enumerate(keys):
        low = 2.0 if key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum") else 0.1
        value = low + torch.rand(4, dtype=torch.float64, generator=torch.manual_seed(n))
        state[key] = value.requires_grad_()
    return state


@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_differentiable_passes_gradcheck_and_equals_torch(case: str) -> None:
    name, kwargs, keys = DIFFERENTIABLE[case]
    state = state_for(name, keys)
    param = torch.rand(4, dtype=torch.float64, requires_grad=True)
    grad = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def function(param: Tensor, grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = {**state, **dict(zip(keys, values, strict=True))}
        return differentiable_step(OURS[name], kwargs, given, param, grad)

    values = [state[key] for key in keys]
    assert gradcheck(function, (param, grad, *values))
    mine = differentiable_step(OURS[name], kwargs, state, param, grad)
    theirs = differentiable_step(TORCHS[name], kwargs, state, param, grad)
    # torch corrects the bias in float32: 1 - 0.999**10 then has an error of 1e-5.
    assert_same(mine, theirs, rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("option", ["lr", "weight_decay", "betas"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_differentiates_with_respect_to_hyper_parameters(name: str, option: str) -> None:
    given = [torch.tensor(0.5 + 0.2 * i, dtype=torch.float64, requires_grad=True) for i in (0, 1)]
    state = {k: v.detach() for k, v in state_for(name, ("exp_avg", "exp_avg_sq")).items()}
    param, grad = torch.rand(2, 4, dtype=torch.float64)

    def function(first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        value = (first, second) if option == "betas" else first + 0 * second
        return differentiable_step(OURS[name], {option: value}, state, param, grad)

    assert gradcheck(function, tuple(given))


def test_differentiates_with_respect_to_lr_of_sgd_rmsprop_adagrad() -> None:
    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    param, grad = torch.rand(2, 4, dtype=torch.float64)
    for name, keys in (("SGD", ()), ("RMSprop", ("square_avg",)), ("Adagrad", ("sum",))):
        state = {k: v.detach() for k, v in state_for(name, keys).items()}
        step = lambda lr, n=name, s=state: differentiable_step(  # noqa: E731
            OURS[n], {"lr": lr}, s, param, grad
        )[0]
        assert gradcheck(step, (lr,))


def test_differentiable_refuses_leaves_and_nothing_moves() -> None:
    params = make_params()
    optimizer = pyoptim.Adam(params, differentiable=True)
    set_grads(params, 0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_differentiable_refuses_a_counter_that_requires_grad() -> None:
    for cls in (pyoptim.Adam, torch.optim.Adam):
        param = torch.ones(3)
        param.grad = torch.ones(3)
        optimizer = cls([param], differentiable=True)
        optimizer.step()
        optimizer.state[param]["step"].requires_grad_()
        with pytest.raises(RuntimeError, match="`requires_grad` is not supported for `step`"):
            optimizer.step()
