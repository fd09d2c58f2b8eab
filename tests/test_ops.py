"""The torch.library op around a step: what opcheck demands, its errors, whole compiled graphs."""

from typing import Any

import pytest
import torch
from cases import (
    CASES,
    CPU_KERNEL_CASES,
    Case,
    assert_same_bits,
    give_grads,
    parameters,
    parametrize_cases,
    states_of,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyoptim
from pyoptim import ops

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]
SHAPES = [(5, 3), (7,), (0,), ()]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def arguments(case: Case, **options: Any) -> list[Any]:
    """What `step_` takes for a first step of two groups."""
    params = [p.detach() for p in parameters(SHAPES, torch.float32)]
    optimizer = case.ours([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], **options)
    names = case.state_names
    hypers, tensors = [], []
    for group in optimizer.param_groups:
        numbers, others = ops.flat_hypers(ops.HYPER_NAMES[optimizer.rule], group)
        hypers += numbers
        tensors += others
    start = case.options.get("initial_accumulator_value", 0.0)
    states = [torch.full_like(p, start) for p in params for _ in names]
    steps = [torch.zeros(()) for _ in params] if names else []
    grads = [torch.randn_like(p) for p in params]
    sizes, counts = [1, len(params) - 1], [len(names)] * 2
    return [optimizer.rule, params, grads, states, steps, sizes, counts, hypers, tensors, "auto"]


@parametrize_cases(CPU_KERNEL_CASES)
def test_opcheck_passes(case: Case) -> None:
    results = torch.library.opcheck(torch.ops.pyoptim.step_.default, arguments(case))
    assert set(results.values()) == {"SUCCESS"}, results


@parametrize_cases(CASES)
def test_the_op_equals_a_step(case: Case) -> None:
    given = arguments(case)
    params = [Parameter(p.clone()) for p in given[1]]
    optimizer = case.ours([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}])
    for step in range(3):
        for p, g in zip(params, given[2], strict=True):
            p.grad = g.mul_(step + 1).clone()
        versions = [p._version for p in given[1]]
        torch.ops.pyoptim.step_(*given)
        optimizer.step()
        assert all(p._version > v for p, v in zip(given[1], versions, strict=True))
        states = [optimizer.state[p][name] for p in params for name in case.state_names]
        assert_same_bits([*given[1], *given[3]], [*params, *states], f"step {step}")


def test_the_op_takes_hyper_parameters_that_are_tensors() -> None:
    case = next(c for c in CASES if str(c) == "adamw-plain")
    expected, given = arguments(case), arguments(case)
    names = ops.HYPER_NAMES["adam"]
    place = len(names) + names.index("betas.1")
    given[2] = [g.clone() for g in expected[2]]
    given[8] = [torch.tensor(given[7][place], dtype=torch.float64)]
    given[7][place] = torch.nan
    torch.ops.pyoptim.step_(*expected)
    torch.ops.pyoptim.step_(*given)
    assert_same_bits(given[1], expected[1])


def test_the_op_copes_with_layouts_that_differ() -> None:
    case = next(c for c in CASES if str(c) == "adamw-plain")
    expected, given = arguments(case), arguments(case)
    given[2] = [g.clone() for g in expected[2]]
    given[2][0] = given[2][0].t().contiguous().t()
    given[3][1] = torch.zeros(3, 5).t()
    torch.ops.pyoptim.step_(*expected)
    torch.ops.pyoptim.step_(*given)
    assert_same_bits([*given[1], *given[3]], [*expected[1], *expected[3]])


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda rule: "lion", "rule 'lion' is not one of"),
        (2, lambda grads: grads[1:], "do not fit group_sizes"),
        (3, lambda states: states[1:], "do not fit group_sizes"),
        (4, lambda steps: steps[1:], "do not fit group_sizes"),
        (5, lambda sizes: [1, 1], "do not fit group_sizes"),
        (7, lambda hypers: hypers[1:], "hypers for 2 groups"),
        (9, lambda engine: "cuda", "cannot update a parameter on device cpu"),
        (1, lambda params: [p.long() for p in params], "no kernel updates"),
        (2, lambda grads: [g.double() for g in grads], "no kernel together"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    place: int, change: Any, message: str
) -> None:
    case = next(c for c in CASES if str(c) == "adamw-plain")
    given = arguments(case)
    before = [t.clone() for t in (*given[1], *given[3], *given[4])]
    bad = [*given]
    bad[place] = change(bad[place])
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.pyoptim.step_(*bad)
    assert_same_bits([*given[1], *given[3], *given[4]], before)


def trajectory(case: Case, compiler: str | None, steps: int = 4) -> list[Tensor]:
    params = parameters(SHAPES, torch.float32)
    optimizer = case.ours([{"params": params[:2]}, {"params": params[2:], "lr": 0.3}])
    step = (lambda: optimizer.step()) if compiler is None else compiled(optimizer, compiler)
    for number in range(steps):
        give_grads(params, number)
        step()
    give_grads(params, steps)
    optimizer.step()  # outside of what was compiled
    return [*params, *states_of(optimizer)]


def compiled(optimizer: Any, compiler: str) -> Any:
    return torch.compile(lambda: optimizer.step(), backend=compiler, fullgraph=True)


@parametrize_cases(CPU_KERNEL_CASES)
def test_a_whole_graph_equals_steps(case: Case) -> None:
    assert_same_bits(trajectory(case, "eager"), trajectory(case, None))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_functionalised_graph_equals_steps(compiler: str) -> None:
    case = next(c for c in CASES if str(c) == "sgd-dampening")
    assert_same_bits(trajectory(case, compiler), trajectory(case, None))


def test_a_graph_is_compiled_once() -> None:
    params = parameters(SHAPES, torch.float32)
    optimizer = pyoptim.AdamW(params)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda: optimizer.step(), backend=counter, fullgraph=True)
    for number in range(5):
        give_grads(params, number)
        step()
    assert counter.frame_count == 1


def test_a_tensor_lr_changes_without_a_new_graph() -> None:
    results = []
    for is_compiled in (True, False):
        params = parameters(SHAPES, torch.float32)
        lr = torch.tensor(0.5)
        optimizer = pyoptim.AdamW(params, lr=lr if is_compiled else 0.5, foreach=False)
        counter = torch._dynamo.testing.CompileCounter()
        step = torch.compile(lambda o=optimizer: o.step(), backend=counter, fullgraph=True)
        for number in range(4):
            give_grads(params, number)
            lr.fill_(0.5 / (number + 1))
            if is_compiled:
                step()
            else:
                optimizer.param_groups[0]["lr"] = float(lr)
                optimizer.step()
        assert counter.frame_count == int(is_compiled)
        results.append(params)
    assert_same_bits(*results)


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {"backend": "reference"}], ids=str)
def test_what_no_graph_holds_breaks_it_and_is_right(options: dict[str, Any]) -> None:
    results = []
    for is_compiled in (True, False):
        params = parameters(SHAPES, torch.float32)
        optimizer = pyoptim.AdamW(params, **options)
        step = torch.compile(lambda o=optimizer: o.step(), backend="eager")
        for number in range(3):
            give_grads(params, number)
            step() if is_compiled else optimizer.step()
        results.append(params)
    assert_same_bits(*results)


def test_a_step_that_breaks_the_graph_still_returns_the_loss() -> None:
    """No graph holds parameters over common memory."""
    room = torch.arange(9.0)
    params = [Parameter(room[:6]), Parameter(room[3:])]
    optimizer = pyoptim.SGD(params, lr=0.1)
    give_grads(params, 0)
    step = torch.compile(lambda: optimizer.step(lambda: torch.ones(()) * 3), backend="eager")
    before = room.clone()
    assert step() == 3.0
    assert not torch.equal(room, before)


def test_a_global_hook_runs_in_compiled_code() -> None:
    params = parameters(SHAPES, torch.float32)
    optimizer, calls = pyoptim.SGD(params), []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(len(calls)))
    try:
        give_grads(params, 0)
        torch.compile(lambda: optimizer.step(), backend="eager")()
    finally:
        handle.remove()
    assert calls == [0]


def test_a_checkpoint_after_compiling_is_clean() -> None:
    params = parameters(SHAPES, torch.float32)
    optimizer = pyoptim.AdamW(params)

    def look_and_step() -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        torch._dynamo.graph_break()
        optimizer.step()

    step = torch.compile(look_and_step, backend="eager")
    give_grads(params, 0)
    step()
    assert optimizer.state_dict()["param_groups"][0]["capturable"] is False
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(optimizer.state_dict())
    give_grads(params, 1)
    theirs.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_passes_for_clipping(dtype: torch.dtype) -> None:
    grads = [p.detach() for p in parameters(SHAPES, dtype)]
    results = torch.library.opcheck(
        torch.ops.pyoptim.clip_grads_.default, (grads, 0.5, 2.0, "auto")
    )
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("norm_type", [2.0, 1.0, torch.inf])
def test_a_whole_graph_clips_and_steps(norm_type: float) -> None:
    results = []
    for is_compiled in (True, False):
        params = parameters(SHAPES[:2], torch.float32)
        optimizer = pyoptim.SGD(params, lr=0.1)

        def clip_and_step(params: Any = params, optimizer: Any = optimizer) -> Tensor:
            norm = pyoptim.clip_grad_norm_(params, 0.5, norm_type)
            optimizer.step()
            return norm

        run = torch.compile(clip_and_step, backend="aot_eager", fullgraph=True)
        norms = []
        for number in range(3):
            give_grads(params, number)
            norms.append(run() if is_compiled else clip_and_step())
        results.append([*params, *(p.grad for p in params), *norms])
    assert_same_bits(*results)
