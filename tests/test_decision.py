"""AdamP's and SGDP's decisions are those of their sums, however near these are to the limit.

The sums of rows are exact: the kernels add them up by blocks first, and exactly where that cannot
tell. `pyoptim.row_sums` has the exact ones. The sums of the whole tensor are made by blocks.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import ADAMP, SGDP, assert_same_bits, examples, parametrize_dtypes, values
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import backend, projection

pytestmark = pytest.mark.native
# What is projected keeps its weights, what is not loses a tenth of them, and the step itself is
# nothing beside them, however large the gradient.
OPTIONS = {"lr": 1e-30, "weight_decay": 1e29, "wd_ratio": 0.0}
RULES = {"adamp": (ADAMP, OPTIONS), "sgdp": (SGDP, OPTIONS)}
ROUGH = (torch.float32, torch.bfloat16, torch.float16)
EPS, DELTA = 1e-8, 0.1
SIZES = (2, 7, 32, 33, 255, 1024, 1025, 2049, 5000, 16385, 40000)
# 2**-24 is what one addition in float32 may be off by, relative to what is added.
UNIT = 2.0**-24


def rounded(x: float, dtype: torch.dtype) -> float:
    """As the kernels hold an option."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return float(torch.tensor(x, dtype=wide))


def is_orthogonal(sums: Tensor, size: int, delta: float) -> bool:
    """The decision of rules/projection.hpp, operation by operation."""
    across, grad, weight = sums.tolist()
    least = rounded(EPS, torch.float32) * rounded(EPS, torch.float32)
    grad, weight = (least if square < least else square for square in (grad, weight))
    return across * across * size < delta * delta * (weight * grad)


def halved(x: Tensor) -> Tensor:
    """The upper half of dimension 0, a power of two, is added to the lower until one is left."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def sum_by_blocks(a: Tensor, b: Tensor) -> Tensor:
    """As rules/projection.hpp has it: 16 rounds of 16 columns, 64 such blocks to a chunk."""
    products = a * b
    padded = torch.zeros(-(-len(products) // 16384) * 16384, dtype=products.dtype)
    padded[: len(products)] = products
    chunks = padded.view(-1, 64, 16, 16)
    columns = torch.zeros_like(chunks[:, :, 0])
    for r in range(16):
        columns = columns + chunks[:, :, r]
    of_chunks = halved(halved(columns.double().permute(1, 2, 0)))
    partials = torch.zeros(1024, dtype=torch.float64)
    partials[: len(of_chunks)] = of_chunks
    return halved(partials)


def decide(p: Tensor, g: Tensor, delta: float) -> bool:
    """Whether the step of a matrix is projected, every row or the whole."""
    delta = rounded(delta, p.dtype)
    rows = pyoptim.row_sums(g, p, backend="cpu")
    if len(p) > 1 and all(is_orthogonal(row, p[0].numel(), delta) for row in rows):
        return True
    w, g = (x.reshape(-1).to(torch.promote_types(x.dtype, torch.float32)) for x in (p, g))
    whole = torch.stack([sum_by_blocks(a, b) for a, b in ((g, w), (g, g), (w, w))])
    return is_orthogonal(whole, p.numel(), delta)


def step(rule: str, p: Tensor, g: Tensor, delta: float) -> Tensor:
    row, options = RULES[rule]
    param = Parameter(p.clone())
    param.grad = g.clone()
    row.ours([param], delta=delta, eps=EPS, backend="cpu", **options).step()
    return param.detach()


def check(p: Tensor, g: Tensor, delta: float = DELTA, rules: Sequence[str] = ("sgdp",)) -> bool:
    """Compares the decision with that of the sums, which it returns."""
    expected = decide(p, g, delta)
    for rule in rules:
        found, unprojected = (step(rule, p, g, d) for d in (delta, 0.0))
        # NaN compares as any other bits.
        is_projected = not _same(found, unprojected)
        assert is_projected == expected, f"{rule}: {tuple(p.shape)}, {p.dtype}"
    return expected


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def turned(p: Tensor, g: Tensor, cosine: float) -> Tensor:
    """A gradient at this cosine to p, as near as its dtype allows.

    Some elements make up for the rounding of the others, each for what its predecessor has left.
    """
    w, across = p.double(), g.double()
    across = across - w * (w @ across) / (w @ w)
    across = across / across.norm()
    made = (across * math.sqrt(1 - cosine**2) + cosine * w / w.norm()) * g.double().norm()
    made = made.to(p.dtype)
    last = w.abs().argsort(descending=True)[: min(5, (len(w) - 1) // 2)].tolist()
    made[last] = 0
    for i in last:
        missing = cosine * w.norm() * made.double().norm() - w @ made.double()
        changed = (missing / w[i]).to(p.dtype)
        if changed.isfinite():
            made[i] = changed
    return made


NEAR = (0.0, 1e-12, 1e-9, 1e-7, 3e-7, 1e-6, 1e-4, 0.5)


@st.composite
def near_the_limit(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    dtype = draw(st.sampled_from(ROUGH))
    size = draw(st.sampled_from(SIZES))
    n_rows = draw(st.sampled_from([1, 1, 2, 3]))
    seed = draw(st.integers(0, 10_000))
    # float16 has less range, and a product of scales out of float32's takes the exact way.
    scales = [2.0 ** draw(st.integers(-8, 8) if dtype == torch.float16 else st.integers(-60, 60))]
    scales.append(
        2.0 ** draw(st.integers(-8, 8) if dtype == torch.float16 else st.integers(-60, 60))
    )
    is_whole = draw(st.booleans())
    p = (values((n_rows, size), torch.float64, seed) * scales[0]).to(dtype)
    g = (values((n_rows, size), torch.float64, seed + 1) * scales[1]).to(dtype)
    near = draw(st.sampled_from(NEAR)) * draw(st.sampled_from([1.0, -1.0]))
    side = draw(st.sampled_from([1.0, -1.0]))
    parts = [(p.view(-1), g.view(-1))] if is_whole else list(zip(p, g, strict=True))
    for of_p, of_g in parts:
        if float(of_p.double() @ of_p.double()) == 0:
            continue
        limit = rounded(DELTA, dtype) / math.sqrt(len(of_p))
        of_g.copy_(turned(of_p, of_g, side * limit * (1 + near)))
    return p, g


@examples(150)
@given(near_the_limit())
def test_the_decision_near_the_limit_is_that_of_the_sums(pair: tuple[Tensor, Tensor]) -> None:
    check(*pair)


def test_what_is_made_near_the_limit_falls_on_both_sides() -> None:
    """And it is as near as it says: or the test above would have nothing to find."""
    for dtype in (torch.float32, torch.bfloat16):
        for size in (255, 1024, 5000):
            p, g = values((2, size), dtype, 1), values((2, size), dtype, 2)
            limit = rounded(DELTA, dtype) / math.sqrt(size)
            found = []
            for near in (-1e-7, 1e-7):
                near_g = torch.stack(
                    [turned(w, x, limit * (1 + near)) for w, x in zip(p, g, strict=True)]
                )
                for across, grad, weight in pyoptim.row_sums(near_g, p).tolist():
                    relative = across / math.sqrt(grad * weight) / limit - 1
                    assert abs(relative - near) < 5e-8
                found.append(check(p, near_g, rules=("sgdp", "adamp")))
            assert found == [True, False]


@pytest.mark.parametrize("is_right", [True, False])
def test_what_blocks_lose_is_allowed_for(is_right: bool) -> None:
    """Every term between the first and the last of a column is lost in float32, all of one sign: 14
    roundings of nearly the largest size. The limit is between the exact cosine and what is left of
    it. A second, larger row is nearer to a right angle than its limit, not than the tensor's."""
    native: Any = backend.native()
    lost = 0.98 * UNIT
    block = torch.full((16, 16), math.sqrt(lost))
    # Exactly: 14 lost terms, or none beside an overshoot of as much.
    block[0], block[-1] = 1.0, math.sqrt(1.0 + (14 * lost if is_right else 0.0))
    signs = torch.ones(16, 16)
    signs[-1] = -1.0
    large, turns = torch.full((256,), 100.0), torch.tensor([1.0, -1.0]).repeat(128)
    p = torch.stack([block.reshape(-1), large]).repeat(1, 64)
    g = torch.stack([(block * signs).reshape(-1), large * turns]).repeat(1, 64)
    g[1, 0] *= 1 + (2.0**-10 if is_right else 2.0**-8)
    of_chain, of_large = (
        abs(across) / math.sqrt(grad * weight)
        for across, grad, weight in pyoptim.row_sums(g, p).tolist()
    )
    limit = of_large / 0.85
    assert (of_chain < 0.8 * limit) if is_right else (of_chain > 1.4 * limit)
    assert limit < 5 * UNIT
    for isa in native.isas():
        native.set_isa(isa)
        found = check(p, g, limit * math.sqrt(p.shape[1]), rules=("sgdp", "adamp"))
        assert found == is_right


def test_the_reference_adds_up_by_blocks() -> None:
    for size in SIZES:
        a, b = values((2, size), torch.float32, size), values((2, size), torch.float32, size + 1)
        found = projection._sum_by_blocks(a, b)
        expected = torch.stack([sum_by_blocks(x, y) for x, y in zip(a, b, strict=True)])
        assert (found - expected).abs().max() <= 1e-14 * (a * b).abs().sum(1).max()


SPECIAL = (0.0, 1.0, -3.0, 1e-45, -1e-38, 1e-30, 1e-20, 1e-8, 1e19, -1e20, 3e38, math.inf, math.nan)


@examples(150)
@given(data=st.data())
def test_no_number_misleads_the_decision(data: st.DataObject) -> None:
    """Subnormal, huge, infinite, NaN and zero, few or many of them; sums under- and overflow."""
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)))
    shape = data.draw(st.sampled_from([(1, 3), (1, 40), (2, 33), (3, 300), (1, 1025)]))
    delta = data.draw(st.sampled_from([0.1, 1e-3, 30.0]))
    tensors = []
    for seed in data.draw(st.tuples(st.integers(0, 99), st.integers(100, 199))):
        scale = data.draw(st.sampled_from([1.0, 0.0, 1e-45, 1e-38, 1e-25, 1e-15, 1e15, 1e25, 1e38]))
        x = (values(shape, torch.float64, seed) * scale).to(dtype)
        for value in data.draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
            x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = value
        tensors.append(x)
    p, g = tensors
    torch.set_flush_denormal(data.draw(st.booleans()))
    try:
        if torch.equal(*(step("sgdp", p, g, d).nan_to_num(7.0) for d in (math.inf, 0.0))):
            return  # nothing of the weights is left to see a decision by
        check(p, g, delta)
    finally:
        torch.set_flush_denormal(False)


@parametrize_dtypes(ROUGH)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("is_near", [True, False])
def test_a_repaired_step_is_the_same_where_threads_share_its_tensor(
    rule: str, dtype: torch.dtype, is_near: bool
) -> None:
    """With one thread all phases of a tensor are one task; with 8 each is several."""
    size = 100_000
    p = values((1, size), dtype, 1)
    limit = rounded(DELTA, dtype) / math.sqrt(size)
    g = turned(p[0], values((size,), dtype, 2), limit * (1 - 1e-9) if is_near else 0.0)[None]
    results = []
    for threads in (1, 8):
        torch.set_num_threads(threads)
        results.append(step(rule, p, g, DELTA))
    assert_same_bits(results[:1], results[1:])
