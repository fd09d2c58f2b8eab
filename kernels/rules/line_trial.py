"""A trial point of a line search and its term of the slope, as in csrc/rules/line_trial.hpp.

Its states are never written; `update` gives them back as they were, for engines that write them all
the same.
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
    fields = line_search.prepare(raw, step, first)
    no_decay = fields[0]
    return (fields[0], no_decay, *fields[2:])


@triton.jit
def point(p, g, states, hyper, V: tl.constexpr):
    """Returns (new param, a, b): the term of the slope is the product of a and b in float64."""
    g = hyper[0] * g
    d = direction(g, average(g, states, hyper, V), hyper, V)
    return moved(p, d, hyper), g, hyper[9] * d


@triton.jit
def update(p, g, states, hyper, V: tl.constexpr):
    p, _, _ = point(p, g, states, hyper, V)
    return p, states
