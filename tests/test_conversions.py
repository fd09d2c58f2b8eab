"""bfloat16 and float16 to float32 and back: exact for every bit pattern, nearest even between them.

SGD makes three conversions visible. With momentum and float32 state its buffer is the gradient that
it loaded: loading. With lr = 0 it stores the parameter it loaded: both ways. With lr = momentum
= 1, gradient and parameter 0 it stores minus the float32 buffer: rounding.
"""

import pytest
import torch
from cases import (
    CPU_KERNEL_CASES,
    HALVES,
    Case,
    assert_same_bits,
    parametrize_cases,
    parametrize_dtypes,
)
from torch import Tensor
from torch.nn import Parameter

import pyoptim
from pyoptim import backend

pytestmark = pytest.mark.native
NATIVE = backend.native()
PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
LARGEST = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF}
ISAS = NATIVE.isas() if NATIVE else ["baseline"]
# How the patterns are cut into tensors: one long vector body; or only tails, shorter than any
# vector of halves.
CUTS = [pytest.param(isa, 65536, id=f"{isa}-body") for isa in ISAS]
CUTS.append(pytest.param(ISAS[-1], 7, id=f"{ISAS[-1]}-tail"))


def every_pattern(dtype: torch.dtype) -> Tensor:
    return PATTERNS.view(dtype).clone()


def exact(halves: Tensor) -> Tensor:
    """The float64 value of every pattern, from the definition of the format."""
    exponent_bits, fraction_bits = (8, 7) if halves.dtype == torch.bfloat16 else (5, 10)
    bits = halves.view(torch.int16).to(torch.int64) & 0xFFFF
    bias = 2 ** (exponent_bits - 1) - 1
    fraction = (bits & (2**fraction_bits - 1)).double() / 2**fraction_bits
    exponent = (bits >> fraction_bits) & (2**exponent_bits - 1)
    normal = torch.ldexp(1 + fraction, (exponent - bias).double())
    magnitude = torch.where(exponent == 0, torch.ldexp(fraction, torch.tensor(1.0 - bias)), normal)
    special = torch.where(fraction == 0, torch.inf, torch.nan)
    magnitude = torch.where(exponent == 2**exponent_bits - 1, special, magnitude)
    return torch.where(bits >> 15 == 1, -magnitude, magnitude)


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """|x| rounded to nearest, ties to even, by looking it up between its neighbours."""
    halves = torch.arange(LARGEST[dtype] + 1, dtype=torch.int32).to(torch.int16).view(dtype)
    grid = exact(halves)
    overflow = 2 * grid[-1] - grid[-2]  # the number that would come next stands for infinity
    grid = torch.cat([grid, overflow[None]])
    x = x.abs().double()
    above = torch.searchsorted(grid, x).clamp(max=len(grid) - 1)
    below = (above - 1).clamp(min=0)
    up, down = grid[above] - x, x - grid[below]
    chosen = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    result = torch.where(chosen == len(grid) - 1, torch.inf, grid[chosen])
    return torch.where(x.isnan(), torch.nan, result)


def pieces(whole: Tensor, length: int) -> list[Parameter]:
    return [Parameter(piece) for piece in whole.split(length)]


@parametrize_dtypes(HALVES)
@pytest.mark.parametrize(("isa", "length"), CUTS)
def test_every_pattern_is_stored_as_it_was_loaded(
    dtype: torch.dtype, isa: str, length: int
) -> None:
    NATIVE.set_isa(isa)
    whole = every_pattern(dtype)
    params = pieces(whole.clone(), length)
    for p in params:
        p.grad = torch.ones_like(p)
    pyoptim.SGD(params, lr=0).step()
    assert_same_bits([torch.cat([p.detach() for p in params])], [whole])


@parametrize_dtypes(HALVES)
@pytest.mark.parametrize(("isa", "length"), CUTS)
def test_every_pattern_is_loaded_exactly(dtype: torch.dtype, isa: str, length: int) -> None:
    NATIVE.set_isa(isa)
    whole = every_pattern(dtype)
    params = pieces(torch.zeros_like(whole), length)
    for p, g in zip(params, whole.split(length), strict=True):
        p.grad = g
    optimizer = pyoptim.SGD(params, lr=0, momentum=0.5, state_dtype=torch.float32)
    optimizer.step()
    loaded = torch.cat([optimizer.state[p]["momentum_buffer"] for p in params])
    assert loaded.dtype == torch.float32
    assert_same_bits([loaded.double()], [exact(whole)])


def float32_between(dtype: torch.dtype) -> Tensor:
    """What a rounding can get wrong: every half, every midpoint, their neighbours, random bits."""
    grid = exact(torch.arange(LARGEST[dtype] + 1, dtype=torch.int32).to(torch.int16).view(dtype))
    beyond = 2 * grid[-1] - grid[-2]
    middle = (torch.cat([grid, beyond[None]])[1:] + grid) / 2
    points = torch.cat([grid, middle, beyond[None]]).float()
    random = torch.randint(-(2**31), 2**31, (2**16,)).to(torch.int32).view(torch.float32)
    special = torch.tensor([torch.inf, torch.nan, 3.4e38, 1e-45, 1e-40])
    up, down = (torch.nextafter(points, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    return torch.cat([points, up, down, random, special, -special])


@parametrize_dtypes(HALVES)
@pytest.mark.parametrize("isa", ISAS)
def test_what_lies_between_is_rounded_to_nearest_even(dtype: torch.dtype, isa: str) -> None:
    NATIVE.set_isa(isa)
    x = float32_between(dtype)
    param = Parameter(torch.zeros(x.shape, dtype=dtype))
    param.grad = torch.zeros_like(param)
    optimizer = pyoptim.SGD([param], lr=1, momentum=1, state_dtype=torch.float32)
    optimizer.state[param]["momentum_buffer"] = x.clone()
    optimizer.step()
    assert_same_bits([exact(param.detach()).abs()], [nearest(x, dtype)])
    negative = exact(param.detach()) < 0
    assert torch.equal(negative, (x > 0) & (nearest(x, dtype) > 0))


@parametrize_cases(CPU_KERNEL_CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_flushing_denormals_does_not_change_float16(case: Case, isa: str) -> None:
    """float16 subnormals are normal float32 numbers, and no rule makes smaller ones out of them."""
    NATIVE.set_isa(isa)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    results = []
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        param = Parameter(
            torch.linspace(-6e-5, 6e-5, 2049).to(torch.float16)
        )  # subnormal below 6.1e-5
        optimizer = case.ours([param])
        for scale in (1.0, -0.5):
            param.grad = param.detach().flip(0) * scale
            optimizer.step()
        torch.set_flush_denormal(False)
        results.append([param, *(s for s in optimizer.state[param].values())])
    assert_same_bits(results[1], results[0])
