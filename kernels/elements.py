"""Elements of arrays and the arithmetic on them, bit for bit as in csrc/core/dtype.hpp.

bfloat16 travels as uint16: Triton's interpreter rounds it wrongly, and adds its bit patterns.
"""

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """The value of loaded elements in the type the arithmetic runs in; exact."""
    if x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def narrow(x, ELEMENT: tl.constexpr):
    """Rounds to nearest even; a NaN becomes a quiet NaN."""
    if ELEMENT == tl.uint16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    else:
        return x.to(ELEMENT)


@triton.jit
def divide(a, b):
    """The correctly rounded quotient: `/` is approximate in float32, div_rn refuses float64."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(x):
    """The correctly rounded root: tl.sqrt is approximate in float32, sqrt_rn refuses float64."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def max_keep_nan(a, b):
    larger = tl.where(b <= a, a, b)  # b where b is NaN
    return tl.where(a != a, a, larger)


@triton.jit
def float64_of(bits):
    """The float64 whose bits an integer argument holds: Triton passes Python floats as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)
