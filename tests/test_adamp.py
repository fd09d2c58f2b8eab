"""AdamP and SGDP: the authors' trajectories, every decision, and bits that depend on nothing."""

import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    ADAMP,
    COMPUTE_UNIT,
    FLOATS,
    SGDP,
    UNIT,
    Case,
    allowed_error,
    as_wide,
    assert_same_bits,
    assert_within,
    examples,
    parametrize_cases,
    parametrize_dtypes,
    parametrize_kernel_dtypes,
    states_of,
    values,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import AdamP, backend
from pyoptim.optimizer import FusedOptimizer

GOLDEN = Path(__file__).parent / "golden"
GOLDENS = ("adamp_default", "adamp_wd", "sgdp_plain", "sgdp_momentum_wd")
CASES = [Case(row, name) for row in (ADAMP, SGDP) for name in row.options]
KERNEL_CASES = [Case(row, name) for row in (ADAMP, SGDP) for name in row.kernels]
DECISIONS = ("channel", "layer", "none")
parametrize_golden = pytest.mark.parametrize("golden", GOLDENS)
parametrize_decisions = pytest.mark.parametrize("decision", DECISIONS)
WITH_REFERENCE = ("reference", *(("cpu",) if backend.native() is not None else ()))
parametrize_backends = pytest.mark.parametrize("name", WITH_REFERENCE)


# -- the authors' trajectories ---------------------------------------------------------------------


def read(golden: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / f"{golden}.json").read_text())
    return content


def tensors(nested: Sequence[Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(x, dtype=dtype) for x in nested]


def new_optimizer(record: dict[str, Any], params: list[Parameter], **options: Any) -> Any:
    is_adam = record["optimizer"].startswith("adamp")
    return (pyoptim.AdamP if is_adam else pyoptim.SGDP)(params, **options)


def follow(optimizer: Any, record: dict[str, Any], tolerance: float, first_step: int = 0) -> None:
    """Steps with the recorded gradients and compares everything after each."""
    params = optimizer.param_groups[0]["params"]
    for step in record["steps"][first_step:]:
        for p, grad in zip(params, tensors(step["grads"], params[0].dtype), strict=True):
            p.grad = grad
        optimizer.step()
        for p, truth, state in zip(
            params, tensors(step["params_after"]), step["state_after"], strict=True
        ):
            check(p, truth, tolerance)
            assert optimizer.state[p].keys() == state.keys()
            for name, value in state.items():
                check(optimizer.state[p][name], torch.tensor(value, dtype=torch.float64), tolerance)


def check(actual: Tensor, truth: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(as_wide(actual), truth, rtol=tolerance, atol=tolerance)


@parametrize_golden
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"]
)
@parametrize_backends
def test_the_authors_trajectories(
    golden: str, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    record = read(golden)
    params = [Parameter(t) for t in tensors(record["params_init"], dtype)]
    follow(new_optimizer(record, params, **record["hyper"], backend=name), record, tolerance)


def test_the_recorded_trajectories_take_every_branch() -> None:
    for golden in GOLDENS:
        record = read(golden)
        params = tensors(record["params_init"])
        for step in record["steps"]:
            grads = tensors(step["grads"])
            taken = [decide(p, g) for p, g in zip(params, grads, strict=True)]
            assert taken == [branch.removesuffix("(1d)") for branch in step["branches"]]
            assert set(taken) == set(DECISIONS)
            params = tensors(step["params_after"])


def authors_state_dict(record: dict[str, Any], after: int) -> dict[str, Any]:
    """What state_dict() of the authors' package returns after a step."""
    state = {
        i: {k: v if k == "step" else torch.tensor(v, dtype=torch.float64) for k, v in entry.items()}
        for i, entry in enumerate(record["steps"][after]["state_after"])
    }
    group = {**record["hyper"], "params": list(range(len(state)))}
    return {"state": state, "param_groups": [group]}


@parametrize_golden
@parametrize_backends
def test_training_goes_on_from_the_authors_state_dict(golden: str, name: str) -> None:
    record = read(golden)
    params = [Parameter(t) for t in tensors(record["steps"][2]["params_after"])]
    optimizer = new_optimizer(record, params, lr=7, delta=3, wd_ratio=2, backend=name)
    optimizer.load_state_dict(authors_state_dict(record, 2))
    follow(optimizer, record, 1e-12, first_step=3)


# -- every option ----------------------------------------------------------------------------------


def decide(w: Tensor, g: Tensor, delta: float = 0.1, eps: float = 1e-8) -> str:
    """The paper's test in float64, one row at a time."""
    if w.dim() < 2:
        return "none"
    w, g = as_wide(w), as_wide(g)
    for name, rows in (("channel", list(zip(w, g, strict=True))), ("layer", [(w, g)])):
        cosines = [(a * b).sum().abs() / (max(a.norm(), eps) * max(b.norm(), eps)) for a, b in rows]
        if all(c < delta / a.numel() ** 0.5 for c, (a, _) in zip(cosines, rows, strict=True)):
            return name
    return "none"


def without_radial_part(u: Tensor, w: Tensor, decision: str, eps: float) -> Tensor:
    if decision == "none":
        return u
    if decision == "layer":
        return u - w * (w * u).sum() / (w.norm() + eps) ** 2
    return torch.stack([without_radial_part(a, b, "layer", eps) for a, b in zip(u, w, strict=True)])


class Plain:
    """The update as the papers' algorithms write it, in float64, one tensor at a time."""

    def __init__(self, param: Tensor, case: Case) -> None:
        self.w, self.t = as_wide(param), 0
        self.options = case.ours([param]).param_groups[0]
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.is_adam = case.row is ADAMP

    def step(self, grad: Tensor) -> str:
        o, g = self.options, as_wide(grad)
        self.t += 1
        decision = decide(self.w, g, o["delta"], o["eps"])
        g = -g if o["maximize"] else g
        u, rate = self._adam(g, o) if self.is_adam else self._sgd(g, o)
        u = without_radial_part(u, self.w, decision, o["eps"])
        if not self.is_adam and o["project_buffer"] and not o["nesterov"]:
            self.m = u
        ratio = 1.0 if decision == "none" else o["wd_ratio"]
        full = o["lr"] * o["weight_decay"] / (1.0 if self.is_adam else 1 - o["momentum"])
        self.w = self.w * (1 - full * ratio) - rate * u
        return decision

    def _adam(self, g: Tensor, o: dict[str, Any]) -> tuple[Tensor, float]:
        b1, b2 = o["betas"]
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g.square()
        numerator = b1 * self.m + (1 - b1) * g if o["nesterov"] else self.m
        denom = self.v.sqrt() / (1 - b2**self.t) ** 0.5 + o["eps"]
        return numerator / denom, o["lr"] / (1 - b1**self.t)

    def _sgd(self, g: Tensor, o: dict[str, Any]) -> tuple[Tensor, float]:
        self.m = o["momentum"] * self.m + (1 - o["dampening"]) * g
        return (g + o["momentum"] * self.m if o["nesterov"] else self.m), o["lr"]


def grad_for(w: Tensor, decision: str, seed: int) -> Tensor:
    """A gradient that leads to the decision: its rows are at right angles to those of w, all of
    them, on the average, or not."""
    g = values(w.shape, torch.float64, seed)
    wide = as_wide(w)
    if w.dim() < 2 or w.numel() == 0:
        return g.to(w.dtype)
    rows, others = wide.flatten(1), g.flatten(1)
    squares = (rows * rows).sum(1, keepdim=True)
    others = others - rows * (others * rows).sum(1, keepdim=True) / squares
    if decision == "layer":
        sides = torch.linspace(-1.0, 1.0, len(rows), dtype=torch.float64)[:, None]
        others = others + 3.0 * (sides - (sides * squares).sum() / squares.sum()) * rows
    if decision == "none":
        others = others + 3.0 * rows
    return others.reshape(w.shape).to(w.dtype)


def feed(params: Sequence[Tensor], decision: str, seed: int) -> None:
    for i, p in enumerate(params):
        p.grad = grad_for(p, decision, 1000 * seed + i)


def parameters_of(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Parameter]:
    return [Parameter(values(shape, dtype, 70 + i)) for i, shape in enumerate(shapes)]


# A convolution's, a matrix of odd sizes, one row, one column, rows longer than a chunk of the sums,
# a vector, a number, nothing.
SHAPES = ((4, 3, 2, 3), (7, 67), (1, 9), (5, 1), (2, 16387), (67,), (), (0, 3), (3, 0))


@parametrize_decisions
@parametrize_cases(CASES)
@parametrize_backends
def test_every_option_is_the_papers_update(case: Case, name: str, decision: str) -> None:
    params = parameters_of(SHAPES[:-3], torch.float64)
    plain = [Plain(p, case) for p in params]
    optimizer = case.ours(params, backend=name)
    for t in range(3):
        feed(params, decision, t)
        decided = [m.step(p.grad) for m, p in zip(plain, params, strict=True)]
        optimizer.step()
        expected = decision if case.options.get("delta", 0.1) < 1 else "channel"
        assert set(decided[:2]) == {expected}
        for p, model in zip(params, plain, strict=True):
            check(p, model.w, 1e-12)
            for state, truth in zip(states_of_one(optimizer, p), (model.m, model.v), strict=False):
                check(state, truth, 1e-12)


def states_of_one(optimizer: FusedOptimizer, p: Tensor) -> list[Tensor]:
    return [optimizer.state[p][n] for n in optimizer.state_names(optimizer.param_groups[0])]


@pytest.mark.native
@parametrize_decisions
@parametrize_cases(KERNEL_CASES)
@parametrize_kernel_dtypes
def test_each_step_is_the_reference_in_float64(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None, decision: str
) -> None:
    params = parameters_of(SHAPES, dtype)
    optimizer = case.ours(params, state_dtype=state_dtype, backend="cpu")
    group = optimizer.param_groups[0]
    for t in range(3):
        feed(params, decision, t)
        olds = []
        for p in params:
            entry = optimizer.state.get(p, {})
            state = {n: as_wide(entry.get(n, torch.zeros_like(p))) for n in case.state_names}
            olds.append((as_wide(p), state))
        optimizer.step()
        for p, (old, state) in zip(params, olds, strict=True):
            truth, new_state = case.row.ours.reference(old, as_wide(p.grad), state, group, t + 1.0)
            _, unprojected = case.row.ours.reference(
                old, as_wide(p.grad), state, {**group, "delta": 0.0}, t + 1.0
            )
            held = optimizer.state[p]
            of_state = held[case.state_names[0]].dtype
            assert_within(p, truth, allowed(dtype, of_state, truth, old), f"step {t}, {p.shape}")
            for n in case.state_names:
                # What is left of a projected buffer may be less than what it was made of. What was
                # taken away is a multiple of weights that are known as they were stored.
                error = allowed(
                    of_state, of_state, new_state[n], state[n].abs() + as_wide(p.grad).abs()
                )
                if p.numel():
                    taken = (new_state[n] - unprojected[n]).abs().max()
                    error = error + 2 * UNIT[dtype] * taken
                assert_within(held[n], new_state[n], error, f"step {t}, {p.shape}, {n}")


def allowed(dtype: torch.dtype, of_state: torch.dtype, truth: Tensor, old: Tensor) -> Tensor:
    """As for other rules, with the roundings of the projection; the direction is that of rounded
    averages, and a result that differs by up to a step may have been stored before."""
    step = (truth - old).abs().max() if truth.numel() else truth.abs().sum()
    of_direction = 4 * UNIT[of_state] * step if UNIT[of_state] > COMPUTE_UNIT[of_state] else 0.0
    arithmetic = allowed_error(dtype, truth, old, stores=2, arithmetic=2)
    return arithmetic + UNIT[dtype] * step + of_direction


# -- bits ------------------------------------------------------------------------------------------

# More than a task, so that they are cut where there are threads enough.
LARGE = ((900, 131), (3, 30009), (1, 70001), (35001, 2))


def run(
    case: Case, shapes: Sequence[Sequence[int]], decision: str, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Parameters and states after two steps."""
    params = parameters_of(shapes, dtype)
    optimizer = case.ours(params, backend="cpu")
    for t in range(2):
        feed(params, decision, t)
        optimizer.step()
    return [*params, *states_of(optimizer)]


@pytest.mark.native
@parametrize_decisions
@parametrize_cases(KERNEL_CASES)
def test_result_does_not_depend_on_threads(case: Case, decision: str) -> None:
    """With 2 every tensor is one task; with 4 and 8 more and more of them are cut."""
    torch.set_num_threads(1)
    alone = run(case, [*SHAPES, *LARGE], decision)
    for threads in (2, 4, 8):
        torch.set_num_threads(threads)
        assert_same_bits(run(case, [*SHAPES, *LARGE], decision), alone, f"{threads} threads")


@pytest.mark.native
@parametrize_decisions
@parametrize_dtypes(FLOATS)
@parametrize_cases(KERNEL_CASES)
def test_result_does_not_depend_on_the_instruction_set(
    case: Case, dtype: torch.dtype, decision: str
) -> None:
    native = backend.native()
    assert native is not None
    results = {}
    for isa in native.isas():
        native.set_isa(isa)
        results[isa] = run(case, SHAPES, decision, dtype)
    for isa, result in results.items():
        assert_same_bits(result, results["baseline"], isa)


def misplaced(t: Tensor, offset: int) -> Tensor:
    """The same values and strides, `offset` elements into a larger memory."""
    room = torch.zeros(t.numel() + offset, dtype=t.dtype)
    return room[offset:].as_strided(t.shape, t.stride(), offset).copy_(t)


@pytest.mark.native
@parametrize_decisions
@parametrize_cases(KERNEL_CASES)
def test_result_does_not_depend_on_alignment(case: Case, decision: str) -> None:
    plain = parameters_of(SHAPES, torch.float32)
    moved = [Parameter(misplaced(p.detach(), i % 3 + 1)) for i, p in enumerate(plain)]
    optimizers = [case.ours(ps, backend="cpu") for ps in (plain, moved)]
    for t in range(2):
        feed(plain, decision, t)
        for i, (p, q) in enumerate(zip(plain, moved, strict=True)):
            q.grad = misplaced(p.grad, i % 5 + 1)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(moved, plain)
    assert_same_bits(states_of(optimizers[1]), states_of(optimizers[0]))


LAYOUTS = {
    "transposed": ((35, 67), (1, 0)),
    "last_first": ((9, 4, 5), (1, 2, 0)),
    "middle": ((6, 7, 11), (1, 0, 2)),
    "channels_last": ((6, 5, 3, 2), (0, 2, 3, 1)),
}


def laid_out(t: Tensor, order: Sequence[int]) -> Tensor:
    """The same values, dense, with dimensions in memory in this order."""
    back = sorted(range(t.dim()), key=order.__getitem__)
    return t.permute(list(order)).contiguous().permute(back)


@pytest.mark.native
@parametrize_decisions
@parametrize_cases(KERNEL_CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_those_of_dimension_0_in_every_layout(
    case: Case, layout: str, decision: str
) -> None:
    """Their elements may be added up in another order; where nothing is projected, or each row
    lies in its order, not a bit may differ."""
    shape, order = LAYOUTS[layout]
    plain = Parameter(values(shape, torch.float32, 5))
    other = Parameter(laid_out(plain.detach(), order))
    assert other.stride() != plain.stride()
    optimizers = [case.ours([p], backend="cpu") for p in (plain, other)]
    for t in range(3):
        feed([plain], decision, t)
        other.grad = laid_out(plain.grad, order)
        for optimizer in optimizers:
            optimizer.step()
    is_same_order = layout in ("transposed", "middle") and decision == "channel"
    if decision == "none" or is_same_order:
        assert_same_bits([other], [plain])
        assert_same_bits(states_of(optimizers[1]), states_of(optimizers[0]))
    else:
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
        assert not torch.equal(plain, values(shape, torch.float32, 5))


@parametrize_decisions
@parametrize_cases(KERNEL_CASES)
@parametrize_backends
def test_training_goes_on_bit_for_bit_from_a_checkpoint(
    case: Case, name: str, decision: str
) -> None:
    params = parameters_of(SHAPES, torch.float32)
    optimizer = case.ours(params, backend=name)
    feed(params, decision, 0)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save((params, optimizer.state_dict()), buffer)
    buffer.seek(0)
    others, saved = torch.load(buffer)
    resumed = case.ours(others, backend=name)
    resumed.load_state_dict(saved)
    for ps, o in ((params, optimizer), (others, resumed)):
        feed(ps, decision, 1)
        o.step()
    assert_same_bits(others, params)
    assert_same_bits(states_of(resumed), states_of(optimizer))


# -- decisions -------------------------------------------------------------------------------------


def moves(case: Case, p: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The first step's change of p as it is, and where nothing is ever projected."""
    changes = []
    for more in ({}, {"delta": 0.0}):
        mine = Parameter(p.detach().clone())
        mine.grad = p.grad.clone()
        case.ours([mine], **{"eps": 1e-12, "weight_decay": 0.01, **options, **more}).step()
        changes.append(as_wide(mine) - as_wide(p))
    return changes[0], changes[1]


@parametrize_cases(KERNEL_CASES)
@parametrize_backends
def test_one_row_that_fails_is_enough_for_the_whole_tensor(case: Case, name: str) -> None:
    """Whichever row it is; then only the tensor as one row may pass."""
    for row in (0, 1, 39, 40):
        p = Parameter(values((41, 300), torch.float64, 3))
        p.grad = grad_for(p, "channel", 4)
        step, unprojected = moves(case, p, backend=name)
        assert not torch.equal(step, unprojected)
        p.grad[row] += 50 * p.detach()[row]
        assert decide(p, p.grad, case.options.get("delta", 0.1)) == "none"
        step, unprojected = moves(case, p, backend=name)
        assert torch.equal(step, unprojected)


@parametrize_cases(KERNEL_CASES)
@parametrize_backends
@parametrize_decisions
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["param", "grad"])
def test_nothing_is_projected_where_a_number_is_not_finite(
    case: Case, name: str, decision: str, bad: float, where: str
) -> None:
    p = Parameter(values((7, 30), torch.float32, 3))
    p.grad = grad_for(p, decision, 4)
    (p.data if where == "param" else p.grad)[6, 29] = bad
    step, unprojected = moves(case, p, backend=name)
    assert_same_bits([step], [unprojected])
    assert step[:6].isfinite().all()
    assert (step != 0)[:6].all()


@parametrize_cases(KERNEL_CASES)
@parametrize_backends
def test_a_row_without_a_gradient_counts_as_at_right_angles(case: Case, name: str) -> None:
    p = Parameter(values((5, 40), torch.float64, 3))
    p.grad = grad_for(p, "channel", 4)
    p.grad[2] = 0
    p.data[3] = 0
    assert decide(p, p.grad) == "channel"
    step, unprojected = moves(case, p, backend=name)
    assert not torch.equal(step, unprojected)
    radial = (step * as_wide(p)).sum(1) / as_wide(p).norm(dim=1).square().clamp(min=1)
    decay = 0.01 * case.options.get("wd_ratio", 0.1)
    rate = case.options["lr"] / (1 - case.options.get("momentum", 0.0))
    assert ((radial + rate * decay * (p.detach().norm(dim=1) > 0)).abs() < 1e-9).all()


@parametrize_decisions
@pytest.mark.parametrize("row", [ADAMP, SGDP])
@pytest.mark.native
def test_a_decay_that_takes_the_whole_weight_is_exact(row: Any, decision: str) -> None:
    """Nothing of the weight is left in the plain result, from which it could be found again."""
    found = []
    for name in ("cpu", "reference"):
        params = parameters_of([(7, 5), (3, 4, 5)], torch.float64)
        optimizer = row.ours(params, lr=0.5, weight_decay=2.0, backend=name)
        feed(params, decision, 3)
        assert {decide(p, p.grad) for p in params} == {decision}
        optimizer.step()
        found.append(params)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.native
def test_a_repaired_result_that_overflows_is_no_nan(sign: float) -> None:
    w = torch.full((2, 4), 3.2e38)
    w[1] = -3.2e38
    # At right angles to w as a whole, in no row; its sign, the direction, is not.
    g = sign * torch.tensor([[3.0, -1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]) + 0.0
    g[0, 0] += 0.5 * sign
    g[1, 0] += 0.5 * sign
    param = Parameter(w.clone())
    assert decide(w, g) == "layer"
    param.grad = g
    AdamP([param], lr=3e37, backend="cpu").step()
    assert param.isinf().any()
    assert not param.isnan().any()


@parametrize_backends
def test_vectors_and_numbers_are_never_projected(name: str) -> None:
    for row in (ADAMP, SGDP):
        for shape in ((30,), ()):
            for dtype in (torch.float64, torch.complex128):
                p = Parameter(values(shape, dtype, 3))
                p.grad = p.detach() * (1j if dtype.is_complex else 0)
                options = {"delta": 1e9, "backend": name}
                step, unprojected = moves(Case(row, "plain"), p, **options)
                assert torch.equal(step, unprojected)


@parametrize_cases(KERNEL_CASES)
@parametrize_backends
def test_complex_numbers_are_pairs(case: Case, name: str) -> None:
    pairs = Parameter(values((5, 6, 2), torch.float64, 3))
    numbers = Parameter(torch.view_as_complex(pairs.detach().clone()))
    optimizers = [case.ours([p], backend=name) for p in (pairs, numbers)]
    for t, decision in enumerate(DECISIONS):
        feed([pairs], decision, t)
        numbers.grad = torch.view_as_complex(pairs.grad)
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits([torch.view_as_real(numbers)], [pairs])


@parametrize_cases(KERNEL_CASES)
@parametrize_backends
def test_a_step_at_right_angles_keeps_the_norm_to_second_order(case: Case, name: str) -> None:
    """The paper's equation 15: |p'|^2 = |p|^2 + |step|^2, without decay."""
    p = Parameter(values((8, 50), torch.float64, 3))
    before = as_wide(p)
    p.grad = grad_for(p, "channel", 4)
    case.ours([p], backend=name, weight_decay=0.0, eps=1e-12).step()
    after = as_wide(p)
    grown = after.square().sum(1) - before.square().sum(1)
    torch.testing.assert_close(grown, (after - before).square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.native
@examples(25)
@given(data=st.data())
def test_any_shape_layout_and_decision_is_the_reference(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    shape = data.draw(st.lists(st.integers(0, 12), min_size=0, max_size=3))
    shape += data.draw(st.lists(st.sampled_from([1, 2, 1030]), max_size=1))
    order = data.draw(st.permutations(range(len(shape))))
    decision = data.draw(st.sampled_from(DECISIONS))
    p = Parameter(laid_out(values(shape, torch.float64, 3), order))
    q = Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    for t in range(2):
        feed([q], decision, t)
        p.grad = laid_out(q.grad, order)
        for param, name in ((p, "cpu"), (q, "reference")):
            optimizer = case.ours([param], backend=name)
            optimizer.step()
    check(p, as_wide(q), 1e-11)


@parametrize_cases(KERNEL_CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.native
def test_a_scale_invariant_network_trains_as_the_reference(
    case: Case, layout: torch.memory_format
) -> None:
    """Weights before a normalisation have gradients at right angles to them, filter by filter."""
    x = values((8, 3, 6, 6), torch.float64, 1).to(memory_format=layout)
    results = {}
    for name in ("cpu", "reference"):
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 3, bias=False), torch.nn.BatchNorm2d(6), torch.nn.Conv2d(6, 4, 3)
        ).to(torch.float64, memory_format=layout)
        optimizer = case.ours(model.parameters(), lr=0.01, backend=name)
        decisions = []
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().add(x.mean()).log().mean().backward()
            w = model[0].weight
            decisions.append(decide(w, w.grad, optimizer.param_groups[0]["delta"]))
            optimizer.step()
        assert decisions == ["channel"] * 5
        assert model[0].weight.is_contiguous(memory_format=layout)
        results[name] = [*model.parameters(), *states_of(optimizer)]
    for mine, reference in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


# -- factors ---------------------------------------------------------------------------------------


@pytest.mark.native
@parametrize_decisions
@parametrize_cases(KERNEL_CASES)
def test_clipping_decides_and_steps_as_a_clipped_gradient_does(case: Case, decision: str) -> None:
    shapes = SHAPES[:2]
    plain, clipped = parameters_of(shapes, torch.float64), parameters_of(shapes, torch.float64)
    optimizers = [
        case.ours(plain, backend="cpu"),
        case.ours(clipped, backend="cpu", max_grad_norm=0.5),
    ]
    for t in range(2):
        for params in (plain, clipped):
            feed(params, decision, t)
        # A second gradient would be that of parameters that differ in their last bits.
        for p, q in zip(plain, clipped, strict=True):
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(plain, 0.5)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(plain, clipped, strict=True):
        check(q, as_wide(p), 1e-9)


@pytest.mark.native
@parametrize_decisions
@parametrize_cases(KERNEL_CASES)
def test_unscaling_writes_the_gradients_back_before_the_decision(case: Case, decision: str) -> None:
    plain = parameters_of([*SHAPES, LARGE[0]], torch.float32)
    scaled = copy.deepcopy(plain)
    optimizers = [case.ours(params, backend="cpu") for params in (plain, scaled)]
    optimizers[1].grad_scale, optimizers[1].found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for t in range(2):
        feed(plain, decision, t)
        for p, q in zip(plain, scaled, strict=True):
            q.grad = p.grad * 8
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits([q.grad for q in scaled], [p.grad for p in plain])
    assert_same_bits(scaled, plain)
    before = [p.detach().clone() for p in scaled]
    optimizers[1].found_inf = torch.tensor(1.0)
    optimizers[1].step()
    assert_same_bits(scaled, before)


# -- what is wrong is said -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "delta", "wd_ratio"])
@pytest.mark.parametrize("value", [-0.1, torch.nan])
@pytest.mark.parametrize("row", [ADAMP, SGDP], ids=["adamp", "sgdp"])
def test_options_out_of_range_raise(row: Any, name: str, value: float) -> None:
    params = [Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=f"^{name} must be at least 0, got {value}"):
        row.ours(params, **{"lr": 0.1, name: value})
    optimizer = row.ours(params, lr=0.1)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1))], name: value})
    assert len(optimizer.param_groups) == 1


def test_decay_rates_out_of_range_raise() -> None:
    params = [Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"betas\[1\] must be in \[0, 1\), got 1.0"):
        AdamP(params, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
        pyoptim.SGDP(params, lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match="lr must have 1 element"):
        pyoptim.SGDP(params, lr=torch.ones(2))


def test_float16_keeps_its_averages_in_float32() -> None:
    """The second one would underflow, and the direction be divided by eps alone."""
    p = Parameter(torch.zeros(4, 3, dtype=torch.float16))
    p.grad = torch.full_like(p, 1e-3)
    optimizer = AdamP([p], lr=0.01)
    optimizer.step()
    assert {s.dtype for s in states_of(optimizer)} == {torch.float32}
    assert ((as_wide(p) + 0.01).abs() < 1e-4).all()
