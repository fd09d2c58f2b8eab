"""The last pass of a step of a line search, as in csrc/rules/line_step.hpp."""

import triton
import triton.language as tl

from pyoptim.kernels.rules import line_search
from pyoptim.kernels.rules.line_search import average, direction, moved

N_HYPERS = line_search.N_HYPERS
N_FIELDS = line_search.N_FIELDS
N_STATES = line_search.N_STATES
prepare = line_search.prepare


@triton.jit
def update(p, g, states, hyper, V: tl.constexpr):
    g = hyper[0] * g
    states = average(g, states, hyper, V)
    return moved(p * hyper[1], direction(g, states, hyper, V), hyper), states
