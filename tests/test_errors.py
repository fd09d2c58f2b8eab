"""All or nothing: what cannot be updated raises torch's class of error, and nothing has moved."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin import (
    OPTIONS,
    OURS,
    assert_same,
    assert_unchanged,
    make_params,
    run,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import BackendError
from pyoptim import backend as backends

each_option = pytest.mark.parametrize("option", OPTIONS)


def give_grad(param: Parameter, grad: Tensor) -> None:
    """Past the checks of `param.grad = ...`, as bugs and `.data` tricks get there."""
    param.grad = torch.zeros_like(param)
    param.grad.data = grad


def wrong_shape(param: Parameter) -> str:
    give_grad(param, torch.ones(5, dtype=param.dtype))
    return r"has shape \(4,\) but its gradient has shape \(5,\)"


def same_numel(param: Parameter) -> str:
    give_grad(param, torch.ones(2, 2, dtype=param.dtype))
    return r"has shape \(4,\) but its gradient has shape \(2, 2\)"


def wrong_dtype(param: Parameter) -> str:
    param.grad_dtype = None
    param.grad = torch.ones(4, dtype=torch.bfloat16)
    return r"has dtype torch.float32 but its gradient has dtype torch.bfloat16"


def freed_grad(param: Parameter) -> str:
    param.grad = torch.ones_like(param)
    param.grad.untyped_storage().resize_(0)
    return "storage of the gradient of parameter 2 .* holds 0 bytes"


def shrunk_grad(param: Parameter) -> str:
    param.grad = torch.ones_like(param)
    param.grad.untyped_storage().resize_(8)
    return "storage of the gradient of parameter 2 .* holds 8 bytes"


def freed_param(param: Parameter) -> str:
    param.grad = torch.ones_like(param)
    param.data = torch.ones(4)
    param.untyped_storage().resize_(0)
    return "storage of parameter 2 .* holds 0 bytes"


def shrunk_param(param: Parameter) -> str:
    param.grad = torch.ones_like(param)
    param.data = torch.ones(4)
    param.untyped_storage().resize_(8)
    return "storage of parameter 2 .* holds 8 bytes"


def integer_param(param: Parameter) -> str:
    param.requires_grad_(False)
    param.grad = None
    param.data = torch.ones(4, dtype=torch.int64)
    param.grad = torch.ones(4, dtype=torch.int64)
    return "has dtype torch.int64; only"


def fp8_param(param: Parameter) -> str:
    param.grad = None
    param.data = torch.ones(4).to(torch.float8_e4m3fn)
    param.grad = torch.ones(4).to(torch.float8_e4m3fn)
    return "has dtype torch.float8_e4m3fn; only"


def overlapping_param(param: Parameter) -> str:
    param.data = torch.ones(1).expand(4)
    param.grad = torch.ones(4)
    return "more than one element of parameter 2 .* refers to a single memory location"


SPOILED: list[Callable[[Parameter], str]] = [
    wrong_shape,
    same_numel,
    wrong_dtype,
    freed_grad,
    shrunk_grad,
    freed_param,
    shrunk_param,
    integer_param,
    fp8_param,
    overlapping_param,
]


def readable(optimizer: Any, spoiled: Parameter) -> Any:
    """A snapshot of all but the spoiled parameter, whose memory may be gone."""
    groups, state = optimizer.param_groups, dict(optimizer.state)
    kept = [p for p in groups[0]["params"] if p is not spoiled]
    view = type("View", (), {})()
    view.param_groups, view.state = [{"params": kept}], state
    return view, snapshot(view)


@pytest.mark.parametrize("steps_before", [0, 2], ids=["general-path", "plan"])
@pytest.mark.parametrize("spoil", SPOILED)
@each_option
def test_a_bad_last_parameter_stops_the_step_before_anything_moves(
    option: str, spoil: Callable[[Parameter], str], steps_before: int
) -> None:
    native = backends.native()
    if spoil is shrunk_grad and steps_before and native and native.access_path() == "dlpack":
        pytest.skip("DLPack, through which the plan reads tensors here, hides the storage's size")
    name, kwargs = OPTIONS[option]
    params = make_params([(3, 4), (), (4,)], torch.float32)
    optimizer = OURS[name](params, **kwargs)
    run(optimizer, params, range(steps_before))
    set_grads(params, 9)
    words = spoil(params[2])
    view, before = readable(optimizer, params[2])
    keys = [list(entry) for entry in optimizer.state.values()]
    for _ in range(2):  # the refusal leaves nothing behind that a second attempt would trip over
        with pytest.raises(RuntimeError, match=words):
            optimizer.step()
        view.state = dict(optimizer.state)
        assert_unchanged(view, before)
        assert [list(entry) for entry in optimizer.state.values()] == keys
    params[2].grad = None
    optimizer.step()  # and it goes on without the bad one


@each_option
def test_the_message_names_the_parameter(option: str) -> None:
    name, kwargs = OPTIONS[option]
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    groups = [{"params": list(layer.named_parameters())} for layer in model]
    optimizer = OURS[name](groups, **kwargs)
    set_grads(model.parameters(), 0)
    give_grad(model[1].bias, torch.ones(3))
    with pytest.raises(RuntimeError, match=r"^parameter 1 of group 1 \(bias\) has shape"):
        optimizer.step()


BAD_STATE: dict[str, tuple[Tensor, str]] = {
    "shape": (torch.zeros(5), r"has shape \(5,\)"),
    "device": (torch.zeros(4, device="meta"), "on meta, its parameter"),
    "integer": (torch.zeros(4, dtype=torch.int64), "is torch.int64, its parameter is"),
    "complex": (torch.zeros(4, dtype=torch.complex64), "is torch.complex64, its parameter is"),
    "expanded": (torch.zeros(1).expand(4), "more than one element of state"),
}


@pytest.mark.parametrize("kind", BAD_STATE)
@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "sgd"])
def test_bad_state_stops_the_step_before_anything_moves(option: str, kind: str) -> None:
    name, kwargs = OPTIONS[option]
    params = make_params([(3, 4), (), (4,)], torch.float32)
    optimizer = OURS[name](params, **kwargs)
    run(optimizer, params, range(2))
    last = list(optimizer.state[params[2]])[-1]
    value, words = BAD_STATE[kind]
    optimizer.state[params[2]][last] = value
    set_grads(params, 2)
    view, before = readable(optimizer, params[2])
    with pytest.raises(
        RuntimeError, match=f"state '{last}' of parameter 2 of group 0.*{words}|{words}"
    ):
        optimizer.step()
    assert_unchanged(view, before)
    assert optimizer.state[params[2]][last] is value


@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "sgd"])
def test_state_made_for_a_step_that_fails_is_taken_back(option: str) -> None:
    name, kwargs = OPTIONS[option]
    params = make_params([(3, 4), (), (4,)])
    optimizer = OURS[name](params, **kwargs)
    run(optimizer, params[2:], [0])  # the others get their first gradient only now
    entry = optimizer.state[params[2]]
    if "step" in entry:
        entry["step"] = torch.tensor(1)  # to be replaced, as it is no float32
    set_grads(params, 1)
    key = list(entry)[-1]
    kept, entry[key] = entry[key], torch.zeros(5)
    before, objects = snapshot(optimizer), list(entry.values())
    with pytest.raises(RuntimeError, match=rf"state '{key}' of parameter 2"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert all(a is b for a, b in zip(entry.values(), objects, strict=True))
    entry[key] = kept
    optimizer.step()


@pytest.mark.parametrize("option", [o for o in OPTIONS if not o.startswith("sgd")])
def test_a_counter_of_two_elements_stops_the_step(option: str) -> None:
    name, kwargs = OPTIONS[option]
    params = make_params()
    optimizer = OURS[name](params, **kwargs)
    run(optimizer, params, [0])
    optimizer.state[params[2]]["step"] = torch.ones(2)
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, ValueError), match="element"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("option", ["lr", "betas"])
def test_a_missing_or_useless_option_stops_the_step(option: str) -> None:
    params = make_params()
    optimizer = pyoptim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    run(optimizer, params, [0])
    before = snapshot(optimizer)
    kept = optimizer.param_groups[1][option]
    for spoiled in ("nonsense", None, (1,)):
        optimizer.param_groups[1][option] = spoiled
        with pytest.raises((ValueError, TypeError, IndexError)):
            optimizer.step()
        assert_unchanged(optimizer, before)
    del optimizer.param_groups[1][option]
    with pytest.raises(KeyError, match=option):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.param_groups[1][option] = kept
    optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_useless_options_stop_the_first_step(backend: str) -> None:
    for name in OURS:
        params = make_params()
        optimizer = OURS[name](params, backend=backend)
        set_grads(params, 0)
        before = snapshot(optimizer)
        optimizer.param_groups[0]["lr"] = torch.ones(2)
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            optimizer.step()
        assert_unchanged(optimizer, before)


# -- choice of backend -----------------------------------------------------------------------------


def test_an_unknown_backend_is_a_value_error() -> None:
    for attempt in (
        lambda: pyoptim.use_backend("gpu"),
        lambda: pyoptim.SGD(make_params(), backend="gpu"),
    ):
        with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*, got 'gpu'"):
            attempt()


def test_a_backend_that_cannot_run_here_raises() -> None:
    missing = [name for name, why in backends.status().items() if why]
    for name in missing:
        for attempt in (
            lambda name=name: pyoptim.use_backend(name),
            lambda name=name: pyoptim.SGD(make_params(), backend=name),
        ):
            with pytest.raises(BackendError, match=f"backend='{name}' cannot run here: "):
                attempt()
    assert backends.chosen() == "auto"


def test_use_backend_restores_the_former_choice_also_after_an_error() -> None:
    pyoptim.use_backend("reference")
    try:
        with pytest.raises(KeyError, match="auto"), pyoptim.use_backend("auto"):
            raise KeyError(backends.chosen())
        assert backends.chosen() == "reference"
    finally:
        pyoptim.use_backend("auto")


@pytest.mark.native
def test_use_backend_reaches_optimizers_that_already_run() -> None:
    params = make_params()
    optimizer = pyoptim.AdamW(params)
    run(optimizer, params, range(2))
    assert optimizer._plan is not None
    calls = []
    optimizer.reference = lambda *args: calls.append(1) or pyoptim.AdamW.reference(*args)
    with pyoptim.use_backend("reference"):
        run(optimizer, params, [2])
    assert len(calls) == len(params)
    run(optimizer, params, [3, 4])
    assert len(calls) == len(params)
    assert optimizer._plan is not None


@pytest.mark.native
def test_an_explicit_backend_that_cannot_run_a_parameter_raises_before_anything_moves() -> None:
    params = [*make_params([(3,)], torch.float32), Parameter(torch.ones(3, device="meta"))]
    optimizer = pyoptim.AdamW(params, backend="cpu")
    params[0].grad = torch.ones(3)
    params[1].grad = torch.ones(3, device="meta")
    before = snapshot(optimizer)
    with pytest.raises(
        BackendError, match="backend='cpu' cannot update a parameter on device meta"
    ):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_meta_parameters_step_as_in_torch() -> None:
    """Shapes only: what a program that plans its memory does."""
    for name in OURS:
        param = Parameter(torch.ones(3, device="meta"))
        param.grad = torch.ones(3, device="meta")
        optimizer = OURS[name]([param])
        optimizer.step()
        optimizer.step()
        assert all(
            v.device.type == "meta" for k, v in optimizer.state[param].items() if k != "step"
        )


@pytest.mark.native
def test_backends_may_be_mixed_in_one_optimizer() -> None:
    """A subclass without strided memory, a sparse gradient and plain parameters in one step."""
    results = []
    for cls in (pyoptim.SGD, torch.optim.SGD):
        plain, sparse, meta = (*make_params([(3,), (4,)]), Parameter(torch.ones(3, device="meta")))
        optimizer = cls([plain, meta, sparse], lr=0.1, momentum=0.9)
        for step in range(3):
            set_grads([plain], step)
            meta.grad = torch.ones(3, device="meta")
            sparse.grad = torch.ones(4, dtype=torch.float64).to_sparse()
            optimizer.step()
        results.append([plain, sparse])
    torch.testing.assert_close(*results)


@pytest.mark.native
def test_a_subclass_without_memory_of_its_own_runs_through_its_operators() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    for name in OURS:
        plain, *halves = make_params([(3,)] * 3)
        wrapped = Parameter(two_tensor(halves[0].detach().clone(), halves[1].detach().clone()))
        params = [plain, *halves]
        ours, theirs = OURS[name]([wrapped, plain]), OURS[name](halves)
        for step in range(3):
            set_grads(params, step)
            wrapped.grad = two_tensor(halves[0].grad.clone(), halves[1].grad.clone())
            ours.step()
            theirs.step()
        assert_same([wrapped.a, wrapped.b], halves)

        explicit = OURS[name]([plain, wrapped], backend="cpu")
        before = plain.detach().clone()
        with pytest.raises(BackendError, match=r"memory of parameter 1 .*TwoTensor"):
            explicit.step()
        assert torch.equal(plain, before)


# -- without the compiled kernels ------------------------------------------------------------------

WITHOUT_KERNELS = """
import sys, warnings
sys.modules["pyoptim._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, pyoptim
assert any("without compiled kernels" in str(w.message) for w in caught), caught
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
optimizer = pyoptim.SGD([param], lr=0.5, momentum=0.9)
optimizer.step()
optimizer.step()
print(param.tolist())
try:
    pyoptim.SGD([param], backend="cpu")
except pyoptim.BackendError as error:
    print("refused:", error)
"""


def test_without_the_compiled_module_the_reference_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert eval(first) == pytest.approx([1 - 0.5 - 0.95] * 3)
    assert second.startswith("refused: backend='cpu' cannot run here")
