"""The ascent of SAM and ASAM, which saves the weight, as in csrc/rules/ascent.hpp."""

import triton
import triton.language as tl

N_HYPERS = 4
N_FIELDS = 3
N_STATES = (1, 1)


@triton.jit
def prepare(raw, step, first):
    scale, _adaptive, eta, maximize = raw
    return tl.where(maximize != 0, -1.0, 1.0), scale, eta


@triton.jit
def update(p, g, states, hyper, V: tl.constexpr):
    sign, scale, eta = hyper
    g = sign * g
    if V == 1:
        size = tl.where(p < 0, -p, p) + eta
        g = (size * size) * g
    return tl.where(scale != 0, p + scale * g, p), (p,)
