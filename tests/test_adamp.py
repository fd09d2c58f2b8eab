"""AdamP and SGDP: the authors' trajectories, every decision, and bits that depend on nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    ADAMP,
    COMPUTE_UNIT,
    SGDP,
    UNIT,
    Case,
    allowed_error,
    as_wide,
    assert_within,
    parametrize_cases,
    parametrize_kernel_dtypes,
    values,
)
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import backend
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
            held = optimizer.state[p]
            of_state = held[case.state_names[0]].dtype
            assert_within(p, truth, allowed(dtype, of_state, truth, old), f"step {t}, {p.shape}")
            for n in case.state_names:
                assert_within(
                    held[n],
                    new_state[n],
                    # What is left of a projected buffer may be less than what it was made of.
                    allowed(
                        of_state, of_state, new_state[n], state[n].abs() + as_wide(p.grad).abs()
                    ),
                    f"step {t}, {p.shape}, {n}",
                )


def allowed(dtype: torch.dtype, of_state: torch.dtype, truth: Tensor, old: Tensor) -> Tensor:
    """As for other rules, with the roundings of the projection and a result that is stored twice;
    the direction is that of rounded averages."""
    step = (truth - old).abs().max() if truth.numel() else truth.abs().sum()
    of_direction = 4 * UNIT[of_state] * step if UNIT[of_state] > COMPUTE_UNIT[of_state] else 0.0
    return allowed_error(dtype, truth, old, stores=2, arithmetic=2) + of_direction
