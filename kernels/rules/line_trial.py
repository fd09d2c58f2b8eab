"""A trial point of a line search and its term of the slope, as in csrc/rules/line_trial.hpp.

Its states are never written, and its steps not counted.
"""

import triton
import triton.language as tl

from pyoptim.kernels.rules import line_search
from pyoptim.kernels.rules.line_search import average, direction, moved

N_HYPERS = line_search.N_HYPERS
N_FIELDS = line_search.N_FIELDS
N_STATES = line_search.N_STATES
WRITES_STATES = False


@triton.jit
def prepare(raw, step, first):
    sign, _, beta1, one_minus_beta1, beta2, one_minus_beta2, correction2, eps, size, scale, by_m = (
        line_search.prepare(raw, step, first)
    )
    no_decay = 1.0 + 0.0 * step
    return (
        sign,
        no_decay,
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        correction2,
        eps,
        size,
        scale,
        by_m,
    )


@triton.jit
def point(p, g, states, hyper, V: tl.constexpr):
    """Returns (new param, a, b): the term of the slope is the product of a and b in float64."""
    g = hyper[0] * g
    d = direction(g, average(g, states, hyper, V), hyper, V)
    return moved(p, d, hyper), g, hyper[9] * d
