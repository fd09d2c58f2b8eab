"""SAM and ASAM: trajectories, restoration, the forms of a step, AMP, BatchNorm, checkpoints."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    FLOATS,
    HALVES,
    allowed_error,
    as_wide,
    assert_same_bits,
    assert_within,
    give_grads,
    parameters,
    parametrize_dtypes,
    values,
)
from processes import in_two_processes
from torch import Tensor, distributed, nn
from torch.nn import Parameter

import pyoptim
from pyoptim import SAM, frozen_batch_norm, plan

GOLDEN = Path(__file__).parent / "golden"
SHAPES = [(3,), (0,), (), (17, 5), (65, 67)]
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch_sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "torch_adam": (torch.optim.Adam, {"lr": 0.05}),
    "torch_fused_adamw": (torch.optim.AdamW, {"lr": 0.05, "fused": True}),
    "sgd": (pyoptim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (pyoptim.AdamW, {"lr": 0.05, "amsgrad": True}),
    "rmsprop": (pyoptim.RMSprop, {"lr": 0.05, "momentum": 0.5, "centered": True}),
}
KINDS: dict[str, dict[str, Any]] = {
    "sam": {"rho": 0.3},
    "asam": {"rho": 2.0, "adaptive": True},
    "asam_eta": {"rho": 0.5, "adaptive": True, "eta": 0.01},
}
parametrize_bases = pytest.mark.parametrize("base", BASES)
parametrize_kinds = pytest.mark.parametrize("kind", KINDS)


def make(params: Any, base: str = "sgd", kind: str = "sam", **more: Any) -> SAM:
    cls, options = BASES[base]
    return SAM(params, cls, **{**KINDS[kind], **options, **more})


# -- golden trajectories ---------------------------------------------------------------------------


class Problem:
    """The regression that the golden files were made with."""

    def __init__(self, name: str) -> None:
        self.file = json.loads((GOLDEN / f"{name}.json").read_text())
        self.x, self.y = (self.tensor(self.file[k]) for k in ("X", "Y"))
        self.params = [Parameter(self.tensor(p)) for p in self.file["params_init"]]
        self.is_transposed = self.params[0].shape[0] == 2  # as in nn.Linear

    @staticmethod
    def tensor(numbers: Any) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64)

    def loss(self) -> Tensor:
        weight = self.params[0].t() if self.is_transposed else self.params[0]
        return 0.5 * ((self.x @ weight + self.params[1]).tanh() - self.y).square().sum(1).mean()

    def backward(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss

    def check(self, step: dict[str, Any], name: str, rtol: float = 1e-12) -> None:
        expected = [self.tensor(p) for p in step[name]]
        actual = [p.grad if name.startswith("grads") else p.detach() for p in self.params]
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("library", [pyoptim, torch.optim], ids=["pyoptim", "torch"])
@pytest.mark.parametrize("name", ["sam_sgd", "sam_adamw"])
def test_the_reference_implementations_trajectory_is_reproduced(name: str, library: Any) -> None:
    problem = Problem(name)
    file = problem.file
    optimizer = SAM(
        problem.params,
        getattr(library, file["base"]),
        rho=file["rho"],
        adaptive=file["adaptive"],
        **file["base_hyper"],
    )
    for step in file["steps"]:
        assert float(problem.backward().detach()) == pytest.approx(step["loss"], rel=1e-12)
        problem.check(step, "grads1")
        optimizer.first_step(zero_grad=True)
        problem.check(step, "params_perturbed")
        assert float(problem.backward().detach()) == pytest.approx(
            step["loss_perturbed"], rel=1e-12
        )
        problem.check(step, "grads2")
        optimizer.second_step(zero_grad=True)
        problem.check(step, "params_after")


def test_the_asam_authors_trajectory_is_reproduced() -> None:
    """They add 1e-16 to the norm, we 1e-12 as davda54: norms of 0.1 and more allow for 1e-11."""
    problem = Problem("asam_samsung_sgd")
    file = problem.file
    weight, bias = problem.params
    optimizer = SAM(
        [{"params": [weight]}, {"params": [bias], "adaptive": False}],
        pyoptim.SGD,
        rho=file["rho"],
        adaptive=True,
        eta=file["eta"],
        **file["base_hyper"],
    )
    for step in file["steps"]:
        problem.backward()
        optimizer.first_step(zero_grad=True)
        problem.check(step, "params_perturbed", 1e-11)
        problem.backward()
        problem.check(step, "grads2", 1e-11)
        optimizer.second_step(zero_grad=True)
        problem.check(step, "params_after", 1e-11)


# -- plain PyTorch ---------------------------------------------------------------------------------


def size(param: Tensor, group: dict[str, Any]) -> Tensor | float:
    return param.abs() + group["eta"] if group["adaptive"] else 1.0


def plainly_perturbed(params: Sequence[Tensor], grads: Sequence[Any], groups: Any) -> list[Tensor]:
    """The perturbed weights in the dtype of `params`; one group per parameter."""
    triples = [t for t in zip(params, grads, groups, strict=True) if t[1] is not None]
    norm = torch.stack([(size(p, group) * g).norm() for p, g, group in triples]).norm()
    return [
        p if g is None else p + size(p, group) ** 2 * g * (group["rho"] / (norm + 1e-12))
        for p, g, group in zip(params, grads, groups, strict=True)
    ]


def plain_step(params: list[Parameter], base: Any, group: dict[str, Any], loss: Any) -> None:
    before = [p.detach().clone() for p in params]
    grads = torch.autograd.grad(loss(params), params)
    moved = plainly_perturbed(before, grads, [group] * len(params))
    grads = torch.autograd.grad(loss([m.requires_grad_() for m in moved]), moved)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    base.step()


def bowl(params: Sequence[Tensor]) -> Tensor:
    """A loss with gradients that depend on every parameter."""
    whole = sum((p * p).sum() for p in params)
    return whole.sqrt() + sum((p.sin() * (i + 1)).sum() for i, p in enumerate(params))


@parametrize_kinds
@parametrize_bases
def test_many_steps_equal_plain_pytorch(base: str, kind: str) -> None:
    ours = parameters(SHAPES, torch.float64)
    plain = [Parameter(p.detach().clone()) for p in ours]
    optimizer = make(ours, base, kind)
    cls, options = BASES[base]
    expected = cls(plain, **options)
    group = {"adaptive": False, "eta": 0.0, **KINDS[kind]}
    for _ in range(4):
        optimizer.step(lambda: bowl(ours))
        plain_step(plain, expected, group, bowl)
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@parametrize_kinds
@parametrize_dtypes(FLOATS)
def test_the_perturbation_is_within_rounding(dtype: torch.dtype, kind: str, backend: str) -> None:
    params = parameters(SHAPES, dtype)
    optimizer = make(params, kind=kind, backend=backend)
    give_grads(params, 1)
    before = [as_wide(p) for p in params]
    groups = optimizer.param_groups * len(params)
    truth = plainly_perturbed(before, [as_wide(p.grad) for p in params], groups)
    optimizer.first_step()
    for i, (p, t, b) in enumerate(zip(params, truth, before, strict=True)):
        assert_within(p, t, allowed_error(dtype, t, b), f"{dtype} {kind} tensor {i}")
        assert i in (1, 2) or not torch.equal(as_wide(p), b)


@parametrize_kinds
@parametrize_dtypes(FLOATS)
def test_the_reference_gives_the_bits_of_the_kernels(dtype: torch.dtype, kind: str) -> None:
    """With an exact norm: 3, 4 and 12 make 13, and the adaptive ones differ in no rounding."""
    results = []
    for backend in ("cpu", "reference"):
        params = [Parameter(torch.tensor([1.5, -0.25, 2.0, -0.0], dtype=dtype))]
        optimizer = make(params, kind=kind, backend=backend)
        params[0].grad = torch.tensor([3.0, 4.0, 12.0, 0.0], dtype=dtype)
        optimizer.first_step()
        results.append([params[0].detach().clone()])
    assert_same_bits(*results)


@parametrize_kinds
def test_every_layout_is_perturbed_and_restored(kind: str) -> None:
    params = [
        Parameter(values((6, 5), torch.float32, 0).t()),
        Parameter(values((2, 3, 4, 5), torch.float32, 1).to(memory_format=torch.channels_last)),
        Parameter(values((7, 6), torch.float32, 2)[:, 1:4]),
        Parameter(values((9,), torch.float32, 3)[1:]),
    ]
    plain = [Parameter(p.detach().contiguous().clone()) for p in params]
    optimizers = [make(own, kind=kind) for own in (params, plain)]
    before = [p.detach().clone() for p in params]
    for seed in range(2):
        give_grads(plain, seed)
        for p, q in zip(params, plain, strict=True):
            p.grad = q.grad.clone()
        params[1].grad = params[1].grad.contiguous()
        params[0].grad = params[0].grad.t().contiguous().t()
        for optimizer in optimizers:
            optimizer.first_step()
        for p, q in zip(params, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        for optimizer in optimizers:
            optimizer.restore()
        assert_same_bits(params, before)


def test_groups_have_their_own_rho_and_share_one_norm() -> None:
    params = parameters([(5,), (7,), (9,), (3,)], torch.float64)
    own: list[dict[str, Any]] = [
        {"rho": 0.5},
        {"adaptive": True},
        {"adaptive": True, "eta": 0.5, "rho": 3},
        {"rho": 0},
    ]
    groups = [{"params": [p], **options} for p, options in zip(params, own, strict=True)]
    optimizer = SAM(groups, pyoptim.SGD, rho=0.1, lr=0.1)
    assert [g["rho"] for g in optimizer.param_groups] == [0.5, 0.1, 3, 0]
    give_grads(params, 0)
    before = [p.detach().clone() for p in params]
    truth = plainly_perturbed(before, [p.grad for p in params], optimizer.param_groups)
    optimizer.first_step()
    torch.testing.assert_close([p.detach() for p in params], truth, rtol=1e-14, atol=1e-15)
    assert torch.equal(params[3], before[3])
    assert not torch.equal(params[1], before[1])


def test_maximize_perturbs_to_the_smallest_objective() -> None:
    results = []
    for sign in (1.0, -1.0):
        params = parameters([(40,)], torch.float64)
        optimizer = make(params, maximize=sign < 0)
        for _ in range(2):
            optimizer.step(lambda p=params, s=sign: s * bowl(p))
        results.append(params)
    assert_same_bits(*results)


@parametrize_kinds
def test_complex_numbers_are_pairs_of_real_ones(kind: str) -> None:
    params = parameters([(5, 3)], torch.complex128)
    pairs = [Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
    optimizers = [make(own, kind=kind) for own in (params, pairs)]
    give_grads(params, 0)
    pairs[0].grad = torch.view_as_real(params[0].grad).clone()
    params[0].grad = params[0].grad.conj().resolve_conj().conj()  # lazily conjugated
    for optimizer in optimizers:
        optimizer.first_step()
    assert_same_bits([torch.view_as_real(p.detach()) for p in params], pairs)


def test_adaptive_norms_do_not_overflow_half_precision() -> None:
    """300 * 300 is infinite in float16; N = 90000*2**0.5, so that each weight moves by rho/2**0.5
    times itself."""
    param = Parameter(torch.tensor([300.0, -300.0], dtype=torch.float16))
    optimizer = make([param], kind="asam", rho=0.5)
    param.grad = torch.full_like(param, 300.0)
    optimizer.first_step()
    moved = [300 + 300 * 0.5 / 2**0.5, -300 + 300 * 0.5 / 2**0.5]
    torch.testing.assert_close(param.tolist(), moved, rtol=2.0**-11, atol=0.0)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@parametrize_kinds
def test_a_sparse_gradient_perturbs_like_its_dense_one(kind: str, backend: str | None) -> None:
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(10, 3, sparse=sparse)
        optimizer = SAM(table.parameters(), pyoptim.SGD, lr=0.1, backend=backend, **KINDS[kind])
        table(torch.tensor([1, 4, 4])).square().sum().backward()
        optimizer.first_step(zero_grad=True)
        perturbed = table.weight.detach().clone()
        table(torch.tensor([1, 4, 5])).square().sum().backward()
        optimizer.second_step()
        results.append([perturbed, table.weight.detach()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


# -- saving and restoring --------------------------------------------------------------------------


@parametrize_kinds
@parametrize_dtypes(FLOATS)
def test_weights_come_back_in_every_bit_and_in_place(dtype: torch.dtype, kind: str) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = [torch.nan, torch.inf, -torch.inf, -0.0, tiny, -tiny, torch.finfo(dtype).max, 0.0]
    params = parameters(SHAPES, dtype)
    params.append(Parameter(torch.tensor(special, dtype=dtype)))
    optimizer = make(params, kind=kind)
    before = [p.detach().clone() for p in params]
    where = [p.data_ptr() for p in params]
    for seed in range(2):
        give_grads(params, seed)
        params[-1].grad.fill_(1.0)
        optimizer.first_step()
        # A NaN weight makes ASAM's norm NaN, which perturbs nothing.
        assert torch.equal(params[3], before[3]) == (kind != "sam")
        optimizer.restore()
        assert_same_bits(params, before)
    assert [p.data_ptr() for p in params] == where


def test_a_parameter_without_a_second_gradient_is_restored() -> None:
    params = parameters([(5,), (7,)], torch.float32)
    optimizer = make(params, "adamw")
    before = params[1].detach().clone()
    give_grads(params, 0)
    optimizer.first_step(zero_grad=True)
    assert not torch.equal(params[1], before)
    params[0].grad = torch.ones_like(params[0])
    optimizer.second_step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state


def test_a_parameter_with_a_second_gradient_only_is_stepped() -> None:
    params = parameters([(5,), (7,)], torch.float32)
    optimizer = make(params, "sgd")
    expected = [Parameter(p.detach().clone()) for p in params]
    params[0].grad = torch.ones_like(params[0])
    optimizer.first_step(zero_grad=True)
    assert torch.equal(params[1], expected[1])
    give_grads(params, 1)
    give_grads(expected, 1)
    optimizer.second_step()
    pyoptim.SGD(expected, **BASES["sgd"][1]).step()
    assert_same_bits(params, expected)


def test_parameters_over_one_memory_are_restored() -> None:
    room = values((9,), torch.float32, 0)
    before = room.clone()
    params = [Parameter(room[:6]), Parameter(room[3:])]
    optimizer = make(params)
    give_grads(params, 0)
    optimizer.first_step()
    assert not torch.equal(room[3:6], before[3:6])
    optimizer.restore()
    assert torch.equal(room, before)


def test_a_parameter_listed_twice_is_restored() -> None:
    param = parameters([(5,)], torch.float32)[0]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = make([param, param])
    before = param.detach().clone()
    give_grads([param], 0)
    optimizer.first_step()
    assert not torch.equal(param, before)
    optimizer.restore()
    assert torch.equal(param, before)


def test_weights_survive_a_change_of_their_dtype() -> None:
    """The copies of the weights are kept between steps; float32 ones cannot hold float64."""
    module = nn.Linear(3, 2)
    optimizer = make(module.parameters())
    give_grads(list(module.parameters()), 0)
    optimizer.first_step()
    optimizer.restore()
    module.double()
    params = list(module.parameters())
    with torch.no_grad():
        params[0].add_(2.0**-50)
    before = [p.detach().clone() for p in params]
    give_grads(params, 0)
    optimizer.first_step()
    optimizer.restore()
    assert_same_bits(params, before)


def test_autograd_notices_both_writes() -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = make(params)
    for _ in range(2):
        give_grads(params, 0)
        version = params[0]._version
        optimizer.first_step()
        assert params[0]._version > version
        version = params[0]._version
        optimizer.restore()
        assert params[0]._version > version


def test_the_second_ascent_walks_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters([(5,), (7,)], torch.float32)
    optimizer = make(params)
    give_grads(params, 0)
    optimizer.first_step()
    optimizer.restore()
    monkeypatch.setattr(plan, "_step_rows", lambda *_: pytest.fail("took the general path"))
    before = params[0].detach().clone()
    give_grads(params, 1)
    optimizer.first_step()
    assert not torch.equal(params[0], before)


# -- gradients that are zero or not finite ---------------------------------------------------------


@parametrize_kinds
@parametrize_dtypes(FLOATS)
def test_zero_gradients_perturb_nothing(dtype: torch.dtype, kind: str) -> None:
    params = parameters([(5,), (0,)], dtype)
    optimizer = make(params, kind=kind)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.first_step()
    assert_same_bits(params, before)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@parametrize_kinds
@parametrize_dtypes(FLOATS)
def test_gradients_that_are_not_finite_perturb_nothing(
    dtype: torch.dtype, kind: str, bad: float
) -> None:
    params = parameters([(5,), (7,)], dtype)
    optimizer = make(params, kind=kind)
    before = [p.detach().clone() for p in params]
    give_grads(params, 0)
    params[1].grad[3] = bad
    optimizer.first_step()
    assert_same_bits(params, before)


def test_without_gradients_nothing_is_perturbed() -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = make(params)
    before = params[0].detach().clone()
    optimizer.first_step()
    optimizer.second_step()
    assert torch.equal(params[0], before)


def test_a_first_step_that_raises_has_changed_nothing() -> None:
    params = parameters([(5,), (7,)], torch.float32)
    optimizer = make(params)
    before = [p.detach().clone() for p in params]
    give_grads(params, 0)
    params[1] = optimizer.param_groups[0]["params"][1] = Parameter(torch.ones(2, 2).expand(2, 2))
    params[1].data = torch.ones(1, 2).expand(2, 2)  # its elements lie over each other
    params[1].grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.first_step()
    assert torch.equal(params[0], before[0])
    with pytest.raises(RuntimeError, match=r"without first_step\(\)"):
        optimizer.second_step()


# -- the forms of a step ---------------------------------------------------------------------------


def steps_by_hand(params: list[Parameter], optimizer: SAM, n: int) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        bowl(params).backward()
        optimizer.first_step(zero_grad=True)
        bowl(params).backward()
        optimizer.second_step()


def one_call(params: list[Parameter], optimizer: SAM) -> Any:
    return optimizer.step(lambda: bowl(params))


def one_call_after_zeroing(params: list[Parameter], optimizer: SAM) -> Any:
    optimizer.zero_grad(set_to_none=False)
    return optimizer.step(lambda: bowl(params))


def classic(params: list[Parameter], optimizer: SAM) -> Any:
    def closure() -> Tensor:
        loss = bowl(params)
        loss.backward()
        return loss

    optimizer.zero_grad()
    bowl(params).backward()
    return optimizer.step(closure)


def classic_with_zeroed_gradients(params: list[Parameter], optimizer: SAM) -> None:
    for p in params:
        if p.grad is not None:
            p.grad.zero_()
    bowl(params).backward()
    calls: list[None] = []
    optimizer.step(lambda: calls.append(bowl(params).backward()))
    assert len(calls) == 1  # the first pass was not made again


def closure_with_backward(params: list[Parameter], optimizer: SAM) -> Any:
    """As torch.optim.LBFGS takes it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bowl(params)
        loss.backward()
        return loss

    return optimizer.step(closure)


FORMS = [
    one_call,
    one_call_after_zeroing,
    classic,
    classic_with_zeroed_gradients,
    closure_with_backward,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_a_step_is_the_same_step(form: Callable[..., Any]) -> None:
    params = parameters([(5, 3), (70,)], torch.float32)
    expected = [Parameter(p.detach().clone()) for p in params]
    optimizer, by_hand = make(params), make(expected)
    for _ in range(3):
        form(params, optimizer)
    steps_by_hand(expected, by_hand, 3)
    assert_same_bits(params, expected)


def test_forms_may_follow_each_other() -> None:
    params = parameters([(5, 3)], torch.float32)
    expected = [Parameter(p.detach().clone()) for p in params]
    optimizer, by_hand = make(params), make(expected)
    for form in [*FORMS, *reversed(FORMS)]:
        form(params, optimizer)
    steps_by_hand(expected, by_hand, 2 * len(FORMS))
    assert_same_bits(params, expected)


def test_the_one_call_returns_the_loss_before_the_perturbation() -> None:
    params = parameters([(5, 3)], torch.float32)
    expected = bowl(params).detach()
    losses = []
    optimizer = make(params)
    loss = optimizer.step(lambda: losses.append(bowl(params)) or losses[-1])
    assert len(losses) == 2
    assert loss is losses[0]
    assert torch.equal(loss, expected)
    assert not torch.equal(losses[1], expected)


def test_the_classic_form_returns_the_closures_loss() -> None:
    params = parameters([(5, 3)], torch.float32)
    before = bowl(params).detach()
    loss = classic(params, make(params))
    assert loss > before


def test_gradients_accumulate_over_both_passes() -> None:
    params = parameters([(5, 3)], torch.float64)
    expected = [Parameter(p.detach().clone()) for p in params]
    optimizer, whole = make(params), make(expected)
    for step in (optimizer.first_step, optimizer.second_step):
        for factor in (0.25, 0.5, 0.25):
            (factor * bowl(params)).backward()
        step(zero_grad=True)
    whole.step(lambda: bowl(expected))
    torch.testing.assert_close(params, expected, rtol=1e-14, atol=1e-14)


def test_used_gradients_are_not_kept_alive() -> None:
    params = parameters([(5, 3)], torch.float32)
    optimizer = make(params)
    optimizer.step(lambda: bowl(params))
    reference, _ = optimizer._used[id(params[0])]
    assert reference() is params[0].grad
    params[0].grad = None
    assert reference() is None


@pytest.mark.parametrize("form", [one_call, classic], ids=lambda form: form.__name__)
def test_a_closure_that_raises_leaves_the_weights_as_they_were(form: Callable[..., Any]) -> None:
    params = parameters([(5, 3)], torch.float32)
    optimizer = make(params)
    calls = []

    class Weak(Exception):
        pass

    def failing() -> Tensor:
        calls.append(None)
        if len(calls) == (2 if form is one_call else 1):
            assert not torch.equal(params[0], before)
            raise Weak
        return bowl(params)

    before = params[0].detach().clone()
    if form is classic:
        bowl(params).backward()
    with pytest.raises(Weak):
        optimizer.step(failing)
    assert torch.equal(params[0], before)
    optimizer.zero_grad()
    one_call(params, optimizer)
    assert not torch.equal(params[0], before)


def test_a_second_pass_may_reach_no_parameter() -> None:
    params = parameters([(5, 3)], torch.float32)
    optimizer = make(params)
    before = params[0].detach().clone()
    bowl(params).backward()
    optimizer.step(lambda: None)
    assert torch.equal(params[0], before)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho must be a number of at least 0, got -0.1"),
        ({"rho": float("nan")}, "rho must be a number of at least 0, got nan"),
        ({"eta": -1}, "eta must be a number of at least 0, got -1"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    params = parameters([(5,)], torch.float32)
    with pytest.raises(ValueError, match=message):
        SAM(params, pyoptim.SGD, lr=0.1, **options)
    with pytest.raises(ValueError, match=message):
        SAM([{"params": params, **options}], pyoptim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=message):
        SAM([{"params": params, "rho": 0.1, "eta": 0.1}], pyoptim.SGD, lr=0.1, **options)
    optimizer = SAM(params, pyoptim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters([(5,)], torch.float32), **options})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.first_step()


def test_an_instance_in_the_place_of_the_class_is_refused() -> None:
    params = parameters([(5,)], torch.float32)
    with pytest.raises(TypeError, match="base_optimizer must be the class of an optimizer"):
        SAM(params, pyoptim.SGD(params, lr=0.1))  # type: ignore[arg-type]


def test_steps_out_of_order_are_refused() -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = make(params)
    with pytest.raises(RuntimeError, match=r"second_step\(\) without first_step\(\)"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match=r"call step\(closure\) with a closure"):
        optimizer.step()
    give_grads(params, 0)
    before = params[0].detach().clone()
    optimizer.first_step()
    for call in (
        optimizer.first_step,
        lambda: optimizer.step(lambda: bowl(params)),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: copy.deepcopy(optimizer),
    ):
        with pytest.raises(RuntimeError, match=r"between first_step\(\) and second_step\(\)"):
            call()
    optimizer.restore()
    assert torch.equal(params[0], before)
    with pytest.raises(RuntimeError, match=r"second_step\(\) without first_step\(\)"):
        optimizer.second_step()


@pytest.mark.parametrize("result", [None, 1.5, torch.ones(())], ids=["none", "float", "detached"])
def test_a_closure_without_a_gradient_is_refused(result: Any) -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = make(params)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="gave no parameter a gradient"):
        optimizer.step(lambda: result)
    assert torch.equal(params[0], before)


def test_a_classic_step_whose_closure_lacks_backward_is_refused() -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = make(params)
    before = params[0].detach().clone()
    give_grads(params, 0)
    with pytest.raises(RuntimeError, match=r"call backward\(\) in the closure too"):
        optimizer.step(lambda: bowl(params))
    assert torch.equal(params[0], before)


# -- torch's optimizer contract --------------------------------------------------------------------


@parametrize_bases
def test_a_checkpoint_in_the_middle_goes_on_as_if_nothing_had_been(base: str) -> None:
    params = parameters([(5, 3), (7,)], torch.float32)
    optimizer = make(params, base, "asam_eta")
    for _ in range(2):
        one_call(params, optimizer)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert all("old_p" not in entry for entry in saved["state"].values())
    again = [Parameter(p.detach().clone()) for p in params]
    resumed = make(again, base, rho=9.0)
    resumed.load_state_dict(saved)
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    assert resumed.state is resumed.base_optimizer.state
    assert [resumed.param_groups[0][n] for n in ("rho", "adaptive", "eta")] == [0.5, True, 0.01]
    for _ in range(3):
        one_call(params, optimizer)
        one_call(again, resumed)
    assert_same_bits(params, again)


def test_a_checkpoint_of_davda54s_sam_loads() -> None:
    params = parameters([(5,), (7,)], torch.float32)
    optimizer = make(params, "adamw")
    groups = [{"lr": 0.25, "rho": 0.125, "adaptive": True, "params": [0, 1]}]
    own = optimizer.state_dict()["param_groups"][0]
    theirs = {
        "state": {0: {"old_p": torch.ones(5)}, 1: {"old_p": torch.ones(7)}},
        "param_groups": [{**{k: v for k, v in own.items() if k != "eta"}, **groups[0]}],
    }
    optimizer.load_state_dict(theirs)
    assert not optimizer.state
    group = optimizer.param_groups[0]
    assert [group[n] for n in ("lr", "rho", "adaptive", "eta")] == [0.25, 0.125, True, 0.0]
    one_call(params, optimizer)
    assert "exp_avg" in optimizer.state[params[0]]


def test_a_checkpoint_of_the_base_optimizer_alone_loads() -> None:
    params = parameters([(5,)], torch.float32)
    plain = torch.optim.AdamW(params, lr=0.5)
    give_grads(params, 0)
    plain.step()
    optimizer = make(params, "adamw", "asam_eta")
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert [group[n] for n in ("lr", "rho", "adaptive", "eta")] == [0.5, 0.5, True, 0.01]
    assert_same_bits([optimizer.state[params[0]]["exp_avg"]], [plain.state[params[0]]["exp_avg"]])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_by_itself(duplicate: Callable[[Any], Any]) -> None:
    params = parameters([(5, 3), (7,)], torch.float32)
    optimizer = make(params, "adamw", "asam")
    one_call(params, optimizer)
    twin = duplicate(optimizer)
    twins = twin.param_groups[0]["params"]
    assert twin.param_groups is twin.base_optimizer.param_groups
    for _ in range(2):
        one_call(params, optimizer)
        one_call(twins, twin)
    assert_same_bits(params, twins)


def test_schedulers_work_without_warnings() -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = make(params)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps_by_hand(params, optimizer, 1)
        scheduler.step()
        one_call(params, optimizer)
        scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.025


def test_lr_may_be_a_tensor() -> None:
    params = parameters([(5,)], torch.float32)
    expected = [Parameter(p.detach().clone()) for p in params]
    lr = torch.tensor(0.5)
    optimizer, plain = make(params, lr=lr), make(expected, lr=0.5)
    one_call(params, optimizer)
    one_call(expected, plain)
    lr.fill_(0.25)
    plain.param_groups[0]["lr"] = 0.25
    one_call(params, optimizer)
    one_call(expected, plain)
    assert_same_bits(params, expected)


def test_hooks_run_once_per_step() -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = make(params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: calls.append("base"))
    one_call(params, optimizer)
    assert calls == ["pre", "base", "post"]


def test_a_group_can_be_added() -> None:
    params = parameters([(5,), (7,)], torch.float32)
    optimizer = make(params[:1], kind="asam_eta")
    one_call(params[:1], optimizer)
    optimizer.add_param_group({"params": params[1:], "rho": 0.25})
    group = optimizer.base_optimizer.param_groups[1]
    assert [group[n] for n in ("rho", "adaptive", "eta", "lr")] == [0.25, True, 0.01, 0.1]
    before = params[1].detach().clone()
    one_call(params, optimizer)
    assert not torch.equal(params[1], before)


def test_named_parameters_are_named_in_both() -> None:
    module = nn.Linear(3, 2)
    optimizer = make(module.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert "rho: 0.3" in repr(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_the_second_gradient_is_clipped() -> None:
    params = parameters([(40,)], torch.float32)
    expected = [Parameter(p.detach().clone()) for p in params]
    optimizer = make(params, max_grad_norm=0.5)
    one_call(params, optimizer)
    by_hand = make(expected)
    bowl(expected).backward()
    by_hand.first_step(zero_grad=True)
    bowl(expected).backward()
    pyoptim.clip_grad_norm_(expected, 0.5)
    by_hand.second_step()
    assert_same_bits(params, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_backend_of_the_base_runs_the_ascent(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters([(5,)], torch.float32)
    optimizer = make(params, backend=backend)
    ran: list[str] = []
    step = type(optimizer._ascent)._reference_step
    monkeypatch.setattr(
        type(optimizer._ascent),
        "_reference_step",
        lambda self, row, group: ran.append(row.backend) or step(self, row, group),
    )
    give_grads(params, 0)
    optimizer.first_step()
    assert ran == (["reference"] if backend == "reference" else [])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = parameters([(300_000,), (5,)], torch.float32)
        optimizer = make(params, kind="asam")
        give_grads(params, 0)
        optimizer.first_step()
        results.append(params)
    assert_same_bits(*results)


# -- GradScaler ------------------------------------------------------------------------------------

SCALERS = {"torch": torch.amp.GradScaler, "pyoptim": pyoptim.GradScaler}
parametrize_scalers = pytest.mark.parametrize("scaler_of", SCALERS)


def scaled_step(
    params: list[Parameter],
    optimizer: SAM,
    scaler: Any,
    factors: tuple[float, float] = (1.0, 1.0),
    unscale: bool = False,
) -> None:
    scaler.scale(factors[0] * bowl(params)).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(factors[1] * bowl(params)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("unscale", [False, True], ids=["fused", "unscaled_before"])
@parametrize_scalers
@parametrize_bases
def test_scaled_steps_equal_unscaled_ones(base: str, scaler_of: str, unscale: bool) -> None:
    """But for the 1e-12 that is added to a norm 1024 times as large."""
    params = parameters([(5, 3), (70,)], torch.float32)
    expected = [Parameter(p.detach().clone()) for p in params]
    optimizer, plain = make(params, base, "asam"), make(expected, base, "asam")
    scaler = SCALERS[scaler_of]("cpu", init_scale=1024.0)
    for _ in range(3):
        scaled_step(params, optimizer, scaler, unscale=unscale)
    for _ in range(3):
        one_call(expected, plain)
    torch.testing.assert_close(params, expected, rtol=2e-6, atol=1e-7)
    assert optimizer.found_inf is None
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("factors", [(torch.inf, 1.0), (1.0, torch.inf), (torch.nan, torch.nan)])
@pytest.mark.parametrize("at_once", [True, False], ids=["first_step", "third_step"])
@parametrize_scalers
@parametrize_bases
def test_an_overflow_in_either_pass_leaves_no_trace(
    base: str, scaler_of: str, at_once: bool, factors: tuple[float, float]
) -> None:
    params = parameters([(5, 3), (70,)], torch.float32)
    optimizer = make(params, base)
    scaler = SCALERS[scaler_of]("cpu", init_scale=1024.0)
    if not at_once:
        for _ in range(2):
            scaled_step(params, optimizer, scaler)
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict())
    scaled_step(params, optimizer, scaler, factors)
    assert_same_bits(params, before)
    # A base may have made its state, all of it zero, or counted as torch's fused step does not.
    after = optimizer.state_dict()["state"]
    for index, entry in after.items():
        former = state["state"].get(index, {})
        for name, value in entry.items():
            assert torch.equal(value, former.get(name, torch.zeros_like(value))), (index, name)
    if factors[1] != 1.0:
        assert scaler.get_scale() == 512.0
    twin = make([Parameter(b) for b in before], base)
    twin.load_state_dict(state)
    scaled_step(twin.param_groups[0]["params"], twin, SCALERS[scaler_of]("cpu", init_scale=512.0))
    scaled_step(params, optimizer, SCALERS[scaler_of]("cpu", init_scale=512.0))
    assert_same_bits(params, twin.param_groups[0]["params"])


def test_a_disabled_scaler_steps() -> None:
    params = parameters([(5, 3)], torch.float32)
    expected = [Parameter(p.detach().clone()) for p in params]
    optimizer, plain = make(params), make(expected)
    scaled_step(params, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    one_call(expected, plain)
    assert_same_bits(params, expected)


@parametrize_dtypes(HALVES)
def test_half_precision_trains(dtype: torch.dtype) -> None:
    params = parameters([(40,)], dtype)
    optimizer = make(params, "adamw", "asam", state_dtype=torch.float32)
    losses = [float(one_call(params, optimizer).detach()) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


# -- BatchNorm -------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 4, 3),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.LazyBatchNorm1d(momentum=None),
        nn.Linear(16, 2),
    )


def buffers_of(model: nn.Module) -> list[Tensor]:
    return [b.detach().clone() for b in model.buffers()]


X = values((8, 3, 6), torch.float32, 5)


@pytest.mark.parametrize("form", ["one_call", "classic", "by_hand"])
def test_running_statistics_are_those_of_the_first_pass(form: str) -> None:
    model, once = network(), network()
    once(X)
    model(X)
    for m in (model, once):
        for norm in m:
            if hasattr(norm, "reset_running_stats"):
                norm.reset_running_stats()
    optimizer = make(model.parameters())
    buffers = list(model.buffers())

    def backward() -> None:
        model(X).square().sum().backward()

    for _ in range(2):
        once(X)
        optimizer.zero_grad()
        if form == "one_call":
            optimizer.step(lambda: model(X).square().sum())
        elif form == "classic":
            backward()
            optimizer.step(backward)
        else:
            backward()
            optimizer.first_step(zero_grad=True)
            with frozen_batch_norm():
                backward()
            optimizer.second_step()
        assert_same_bits(buffers_of(model), buffers_of(once))
        assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
        once.load_state_dict(model.state_dict())


def test_frozen_statistics_do_not_change_the_output() -> None:
    model = network()
    with torch.no_grad():
        expected = model(X)
        buffers = buffers_of(model)
        with frozen_batch_norm():
            assert torch.equal(model(X), expected)
            model(X)
        assert_same_bits(buffers_of(model), buffers)
        model.eval()
        expected = model(X)
        with frozen_batch_norm():
            assert torch.equal(model(X), expected)
        model.train()
        model(X)
    assert not torch.equal(buffers_of(model)[0], buffers[0])


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # about the hook
@pytest.mark.parametrize("is_named", [False, True], ids=["any_module", "named_module"])
def test_statistics_of_a_compiled_model_are_frozen(is_named: bool) -> None:
    torch._dynamo.reset()
    model, once = network(), network()
    model(X)
    once(X)
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = make(model.parameters())
    for _ in range(2):
        once(X)
        if is_named:
            optimizer.zero_grad()
            compiled(X).square().sum().backward()
            optimizer.first_step(zero_grad=True)
            with frozen_batch_norm(compiled):
                compiled(X).square().sum().backward()
            optimizer.second_step()
        else:
            optimizer.step(lambda: compiled(X).square().sum())
        assert_same_bits(buffers_of(model), buffers_of(once))
        once.load_state_dict(model.state_dict())


def test_only_the_named_module_is_frozen() -> None:
    model, other = network(), network()
    for m in (model, other):
        m(X)
    before = buffers_of(model)
    with frozen_batch_norm(model):
        model(X)
        other(X)
    assert_same_bits(buffers_of(model), before)
    assert int(other[1].num_batches_tracked) == 2


def test_statistics_thaw_after_an_exception() -> None:
    model = network()
    model(X)
    buffers = list(model.buffers())
    with pytest.raises(RuntimeError, match="elements"), frozen_batch_norm():
        model(X[:, :, :4])  # the last layer is made for more features
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    model(X)
    assert int(model[1].num_batches_tracked) == 2


# -- several processes -----------------------------------------------------------------------------

ASAM = {"rho": 0.5, "adaptive": True, "eta": 0.1, "lr": 0.1, "momentum": 0.9}


def linear_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def train_replica(rank: int, folder: Path) -> None:
    """Two processes with half of the batch each walk as one process with all of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inputs = values((8, 4), torch.float64, 1)
    for how in ("ddp", "fsdp", "no_sync"):
        plain, model = linear_layers(), linear_layers()
        if how == "fsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        ddp = nn.parallel.DistributedDataParallel(model) if how != "fsdp" else model
        ours, expected = (SAM(m.parameters(), pyoptim.SGD, **ASAM) for m in (model, plain))

        def loss(model: nn.Module = ddp) -> Tensor:
            return model(inputs[4 * rank : 4 * rank + 4]).square().mean()

        for _ in range(3):
            expected.step(lambda m=plain: m(inputs).square().mean())
            if how == "no_sync":
                ours.zero_grad()
                with ddp.no_sync():
                    loss().backward()
                ours.first_step(zero_grad=True)
                loss().backward()
                ours.second_step()
            else:
                ours.step(loss)
        params = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
        is_same = all(
            torch.allclose(p, q, rtol=1e-12, atol=1e-14)
            for p, q in zip(params, plain.parameters(), strict=True)
        )
        assert is_same == (how != "no_sync"), how  # there each replica climbs by itself
        torch.save(params, folder / f"{how}{rank}")


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this build of torch has no gloo",
)
def test_two_processes_keep_the_same_weights(tmp_path: Path) -> None:
    in_two_processes(train_replica, tmp_path)
    for how in ("ddp", "fsdp", "no_sync"):
        assert_same_bits(*(torch.load(tmp_path / f"{how}{rank}") for rank in range(2)), how)
