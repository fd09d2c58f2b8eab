"""A step that reads its parameters from copies: every kernel, and SAM's second step by it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import (
    KERNEL_CASES,
    Case,
    assert_same_bits,
    examples,
    give_grads,
    parameters,
    parametrize_cases,
    parametrize_kernel_dtypes,
    states_of,
    values,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import SAM, backend, plan
from pyoptim.sam import _Ascent

NATIVE = backend.native()
# Empty, 0-d, around a vector of every instruction set, more than one prefetched stretch.
SHAPES = [(3,), (0,), (), (17, 5), (64,), (65, 67)]
ADAMW = next(c for c in KERNEL_CASES if str(c) == "adamw-plain")


def step_from(optimizer: Any, sources: list[Tensor | None]) -> None:
    optimizer._sources = sources
    try:
        optimizer.step()
    finally:
        del optimizer._sources


def moved_away(params: Sequence[Parameter], seed: int = 1) -> list[Tensor | None]:
    """Copies of all parameters but the first, which are then spoilt."""
    copies: list[Tensor | None] = [None, *(p.detach().clone() for p in params[1:])]
    with torch.no_grad():
        for i, p in enumerate(params[1:]):
            p.copy_(values(p.shape, p.dtype, 77 * seed + i))
    return copies


def both(case: Case, params: list[Parameter], **options: Any) -> tuple[Any, Any, list[Parameter]]:
    """Two optimizers in one state, that of a step just made."""
    wanted = [Parameter(p.detach().clone()) for p in params]
    actual, expected = case.ours(params, **options), case.ours(wanted, **options)
    for optimizer, own in ((actual, params), (expected, wanted)):
        give_grads(own, 0)
        optimizer.step()
        give_grads(own, 1)
    return actual, expected, wanted


def check(actual: Any, expected: Any, params: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert_same_bits(list(params), list(wanted), "params")
    assert_same_bits(states_of(actual), states_of(expected), "states")


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.native
@parametrize_cases(KERNEL_CASES)
@parametrize_kernel_dtypes
def test_every_kernel_reads_from_copies(
    case: Case, dtype: torch.dtype, state_dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(SHAPES, dtype)
    actual, expected, wanted = both(case, params, state_dtype=state_dtype, backend="cpu")
    monkeypatch.setattr(plan, "_step_rows", lambda *_: pytest.fail("took the general path"))
    former = NATIVE.active_isa()
    try:
        for seed, isa in enumerate(NATIVE.isas()):
            NATIVE.set_isa(isa)
            monkeypatch.undo()  # another instruction set needs another plan
            for optimizer in (actual, expected):
                optimizer.step()
            monkeypatch.setattr(plan, "_step_rows", lambda *_: pytest.fail("no plan"))
            sources = moved_away(params, seed)
            step_from(actual, sources)
            expected.step()
            check(actual, expected, params, wanted)
    finally:
        NATIVE.set_isa(former)


@parametrize_cases(KERNEL_CASES)
def test_without_a_plan_copies_are_read_too(case: Case) -> None:
    params = parameters(SHAPES, torch.float32)
    actual, expected, wanted = both(case, params)
    actual._plan = None
    step_from(actual, moved_away(params))
    expected.step()
    check(actual, expected, params, wanted)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_many_tasks_read_from_copies(n_threads: int) -> None:
    former = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        params = parameters([(5,), (100_003,), (300, 401), (7,)], torch.float32)
        actual, expected, wanted = both(ADAMW, params)
        step_from(actual, moved_away(params))
        expected.step()
        check(actual, expected, params, wanted)
    finally:
        torch.set_num_threads(former)


@given(
    n=st.integers(0, 40),
    shifts=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    clip=st.sampled_from([None, 0.1]),
)
@examples(25)
def test_the_place_of_a_copy_changes_no_bit(
    n: int, shifts: tuple[int, int], dtype: torch.dtype, clip: Any
) -> None:
    room = torch.zeros(2, n + 4, dtype=dtype)
    param = Parameter(room[0, shifts[0] : shifts[0] + n].copy_(values((n,), dtype, 3)))
    params = [Parameter(torch.ones(2, dtype=dtype)), param]
    actual, expected, wanted = both(ADAMW, params, max_grad_norm=clip)
    sources = moved_away(params)
    sources[1] = room[1, shifts[1] : shifts[1] + n].copy_(sources[1])
    step_from(actual, sources)
    expected.step()
    check(actual, expected, params, wanted)


def strided(params: list[Parameter]) -> None:
    params[3].data = params[3].detach().t().contiguous().t()


def with_gaps(params: list[Parameter]) -> None:
    params[4].data = values((128,), torch.float32, 9)[::2]


def other_grad(params: list[Parameter]) -> None:
    params[3].grad = params[3].grad.t().contiguous().t()


def over_the_parameter(params: list[Parameter]) -> None:
    params[4].grad = params[4].detach()


@pytest.mark.parametrize("change", [strided, with_gaps, other_grad, over_the_parameter])
@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_any_layout_gives_the_bits_of_restored_parameters(
    change: Callable[[list[Parameter]], None], kind: str
) -> None:
    params = parameters(SHAPES, torch.float32)
    actual, expected, wanted = both(ADAMW, params, backend=kind)
    for own in (params, wanted):
        with torch.no_grad():
            change(own)
    sources = moved_away(params)
    step_from(actual, sources)
    expected.step()
    check(actual, expected, params, wanted)


def test_copies_may_be_laid_out_otherwise() -> None:
    params = parameters(SHAPES, torch.float32)
    actual, expected, wanted = both(ADAMW, params)
    sources = moved_away(params)
    sources[3] = sources[3].t().contiguous().t()  # type: ignore[union-attr]
    step_from(actual, sources)
    expected.step()
    check(actual, expected, params, wanted)


def test_a_copy_of_another_dtype_is_converted() -> None:
    params = parameters([(3,), (9,)], torch.float32)
    actual, expected, wanted = both(ADAMW, params)
    sources = moved_away(params)
    sources[1] = sources[1].double()  # type: ignore[union-attr]
    step_from(actual, sources)
    expected.step()
    check(actual, expected, params, wanted)


def test_a_copy_of_another_shape_is_refused() -> None:
    params = parameters([(3,), (9,)], torch.float32)
    optimizer, _, _ = both(ADAMW, params)
    before = copy.deepcopy((params, states_of(optimizer)))
    with pytest.raises(RuntimeError, match=r"has shape \(9,\), the copy .* has \(1,\)"):
        step_from(optimizer, [None, torch.ones(1)])
    assert_same_bits([*params, *states_of(optimizer)], [*before[0], *before[1]])


def test_parameters_over_one_memory_see_each_other() -> None:
    def tied() -> list[Parameter]:
        whole = values((8,), torch.float32, 5)
        return [Parameter(whole[:5]), Parameter(whole[3:])]

    params, wanted = tied(), tied()
    actual, expected = ADAMW.ours(params), ADAMW.ours(wanted)
    give_grads(params, 1)
    give_grads(wanted, 1)
    sources: list[Any] = [p.detach().clone() for p in params]
    with torch.no_grad():
        params[0].zero_()
        params[1].zero_()
    step_from(actual, sources)
    expected.step()
    check(actual, expected, params, wanted)


# -- SAM -------------------------------------------------------------------------------------------


def sam(params: Any, base: Any = pyoptim.AdamW, **more: Any) -> SAM:
    return SAM(params, base, **{"rho": 0.3, "lr": 0.05, **more})


def perturbed(params: list[Parameter], optimizer: SAM, seed: int = 0) -> None:
    """Up to where the second gradients are there."""
    give_grads(params, 10 + 2 * seed)
    optimizer.first_step(zero_grad=True)
    give_grads(params, 11 + 2 * seed)


def restored_step(optimizer: SAM) -> None:
    """The second step in two passes: what the one pass is to equal."""
    optimizer.restore()
    optimizer.base_optimizer.step()


def no_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "_foreach_copy_"), (Tensor, "copy_")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("copied weights back"))


@pytest.mark.native
@pytest.mark.parametrize("base", [pyoptim.SGD, pyoptim.AdamW, pyoptim.Expectigrad])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_the_second_step_restores_nothing(
    base: Any, adaptive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, wanted = (parameters(SHAPES, torch.float32) for _ in range(2))
    actual, expected = (sam(p, base, adaptive=adaptive) for p in (params, wanted))
    for seed in range(3):
        perturbed(params, actual, seed)
        perturbed(wanted, expected, seed)
        with monkeypatch.context() as patch:
            no_copying(patch)
            actual.second_step()
        restored_step(expected)
        check(actual, expected, params, wanted)


def test_parameters_without_a_second_gradient_are_restored_beside_it() -> None:
    params, wanted = (parameters(SHAPES, torch.float32) for _ in range(2))
    actual, expected = sam(params), sam(wanted)
    for seed in range(3):
        perturbed(params, actual, seed)
        perturbed(wanted, expected, seed)
        params[seed].grad = wanted[seed].grad = None
        actual.second_step()
        restored_step(expected)
        check(actual, expected, params, wanted)


def test_a_base_step_that_raises_restores_the_weights() -> None:
    params = parameters(SHAPES, torch.float32)
    optimizer = sam(params)
    perturbed(params, optimizer)
    optimizer.second_step()
    before = copy.deepcopy((params, states_of(optimizer)))
    perturbed(params, optimizer)
    params[3].grad = torch.ones(5, 17).t().to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.second_step()
    assert_same_bits([*params, *states_of(optimizer)], [*before[0], *before[1]])
    assert "_sources" not in vars(optimizer.base_optimizer)
    perturbed(params, optimizer)  # and the next step is as any
    optimizer.second_step()


def test_a_changed_shape_is_refused() -> None:
    params = parameters([(3,), (9,)], torch.float32)
    optimizer = sam(params)
    perturbed(params, optimizer)
    params[1].data = torch.ones(4)
    params[1].grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="change no shape before second_step"):
        optimizer.second_step()


def test_weights_that_were_replaced_meanwhile_are_restored() -> None:
    params, wanted = (parameters(SHAPES, torch.float32) for _ in range(2))
    actual, expected = sam(params), sam(wanted)
    for seed in range(2):
        perturbed(params, actual, seed)
        perturbed(wanted, expected, seed)
        params[3].data = torch.zeros(5, 17).t()
        wanted[3].data = torch.zeros(5, 17).t()
        actual.second_step()
        restored_step(expected)
        check(actual, expected, params, wanted)


def test_a_group_that_joins_meanwhile_is_stepped() -> None:
    params, wanted = (parameters([(4,), (6,)], torch.float32) for _ in range(2))
    actual, expected = sam(params[:1]), sam(wanted[:1])
    for optimizer, own in ((actual, params), (expected, wanted)):
        perturbed(own[:1], optimizer)
        optimizer.add_param_group({"params": own[1:]})
        give_grads(own, 5)
    actual.second_step()
    restored_step(expected)
    check(actual, expected, params, wanted)


class Watching(pyoptim.AdamW):
    seen: Any = None

    def step(self, closure: Any = None) -> Any:
        self.seen = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        return super().step(closure)


def by_hook(optimizer: Any, seen: list[Tensor]) -> None:
    def note(own: Any, *_: Any) -> None:
        seen[:] = [p.detach().clone() for g in own.param_groups for p in g["params"]]

    optimizer.register_step_pre_hook(note)


def by_own_step(optimizer: Any, seen: list[Tensor]) -> None:
    step = optimizer.step

    def noting() -> None:
        seen[:] = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
        step()

    optimizer.step = noting


@pytest.mark.parametrize("watch", [by_hook, by_own_step])
def test_who_looks_at_the_weights_finds_them_restored(watch: Callable[..., None]) -> None:
    params = parameters([(4,), (6,)], torch.float32)
    optimizer = sam(params)
    seen: list[Tensor] = []
    watch(optimizer.base_optimizer, seen)
    for seed in range(2):
        before = [p.detach().clone() for p in params]
        perturbed(params, optimizer, seed)
        optimizer.second_step()
        assert_same_bits(seen, before)


def test_a_subclass_finds_the_weights_restored() -> None:
    params = parameters([(4,), (6,)], torch.float32)
    optimizer = sam(params, Watching)
    before = [p.detach().clone() for p in params]
    perturbed(params, optimizer)
    optimizer.second_step()
    assert_same_bits(optimizer.base_optimizer.seen, before)  # type: ignore[attr-defined]


@pytest.mark.native
def test_a_scheduler_of_the_base_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters([(4,), (6,)], torch.float32)
    optimizer = sam(params)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, 1)
    perturbed(params, optimizer)
    with monkeypatch.context() as patch:
        no_copying(patch)
        optimizer.second_step()
    scheduler.step()  # warns of a step that it has not seen
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


@pytest.mark.parametrize("is_skipped", [False, True], ids=["stepped", "skipped"])
def test_a_scaled_step_starts_from_restored_weights(is_skipped: bool) -> None:
    params, wanted = (parameters([(4,), (6,)], torch.float32) for _ in range(2))
    actual, expected = sam(params), sam(wanted)
    for seed in range(2):
        perturbed(params, actual, seed)
        perturbed(wanted, expected, seed)
        actual.grad_scale, actual.found_inf = None, torch.tensor(float(is_skipped))
        actual.second_step()
        if is_skipped:
            expected.restore()
        else:
            restored_step(expected)
        assert_same_bits(params, wanted)


def test_a_parameter_listed_twice_is_stepped_twice() -> None:
    params, wanted = (parameters([(4,), (6,)], torch.float32) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate"):
        actual, expected = (sam([p[0], p[1], p[0]]) for p in (params, wanted))
    for seed in range(2):
        perturbed(params, actual, seed)
        perturbed(wanted, expected, seed)
        actual.second_step()
        restored_step(expected)
        assert_same_bits(params, wanted)


def test_autograd_notices_the_second_step() -> None:
    params = parameters([(4,), (6,)], torch.float32)
    optimizer = sam(params)
    for seed in range(2):
        perturbed(params, optimizer, seed)
        versions = [p._version for p in params]
        optimizer.second_step()
        assert all(p._version > v for p, v in zip(params, versions, strict=True))


@pytest.mark.native
def test_steady_steps_walk_both_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters([(4,), (6,)], torch.float32)
    optimizer = sam([{"params": params[:1]}, {"params": params[1:], "adaptive": True}])
    perturbed(params, optimizer)
    optimizer.second_step()
    monkeypatch.setattr(plan, "_step_rows", lambda *_: pytest.fail("took the general path"))
    optimizer.param_groups[1]["rho"] = 0.7
    optimizer.param_groups[1]["eta"] = 0.1
    perturbed(params, optimizer, 1)
    optimizer.second_step()


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 3])
def test_large_rows_are_written_past_the_caches_alike(dtype: torch.dtype, shift: int) -> None:
    """From 256 Ki elements on, what is written and not read goes past the caches, vector by vector;
    rows of odd sizes let tasks begin anywhere."""
    sizes = (262_144 + 5, 7)
    rooms = [torch.empty(n + shift, dtype=dtype) for n in sizes]
    params = [
        Parameter(room[shift:].copy_(values((n,), dtype, n)))
        for room, n in zip(rooms, sizes, strict=True)
    ]
    wanted = [Parameter(p.detach().clone()) for p in params]
    actual, base = sam(params), pyoptim.AdamW(wanted, lr=0.05, backend="reference")
    former = NATIVE.active_isa()
    try:
        for seed, isa in enumerate(NATIVE.isas()):
            NATIVE.set_isa(isa)
            give_grads(wanted, 10 + 2 * seed)
            moved = plainly_perturbed(wanted)
            perturbed(params, actual, seed)
            assert_same_bits(params, moved, isa)
            actual.second_step()
            give_grads(wanted, 11 + 2 * seed)
            base.step()
            check(actual, base, params, wanted)
    finally:
        NATIVE.set_isa(former)


def plainly_perturbed(params: Sequence[Tensor]) -> list[Tensor]:
    norm = float(pyoptim.total_norm([p.grad for p in params if p.grad is not None]))
    group = {"scale": 1.0 / (norm + 1e-12) * 0.3, "adaptive": False, "maximize": False}
    wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    pairs = [(p.detach().to(wide), p.grad.to(wide)) for p in params if p.grad is not None]
    moved = [_Ascent.reference(p, g, {}, group)[0] for p, g in pairs]
    return [m.to(p.dtype) for m, p in zip(moved, params, strict=True)]
