"""Expectigrad: the gradient over the root mean of its squares, as in csrc/rules/expectigrad.hpp."""

import triton
import triton.language as tl

from pyoptim.kernels.elements import divide, sqrt

N_HYPERS = 5
N_FIELDS = 6
N_STATES = (1, 2, 2, 3)


@triton.jit
def prepare(raw, step, first):
    lr, beta, eps, _sparse_counter, maximize = raw
    sign = tl.where(maximize != 0, -1.0, 1.0)
    # The interpreter has no pow.
    beta_to_t = tl.exp2(step * tl.log2(beta))
    return sign, beta, 1.0 - beta, eps, 1.0 / tl.sqrt(step), lr / (1.0 - beta_to_t)


@triton.jit
def update(p, g, states, hyper, V: tl.constexpr):
    sign, beta, one_minus_beta, eps, root_scale, step_size = hyper
    g = sign * g
    square = g * g
    s = states[0] + square
    new_states = (s,)
    if V >= 2:  # a sparse counter
        n = states[1] + tl.where(square > 0, 1.0, 0.0).to(s.dtype)
        root = sqrt(tl.where(n > 0, divide(s, n), 0.0))
        new_states += (n,)
    else:
        root = sqrt(s) * root_scale
    d = divide(g, eps + root)
    if V % 2 == 1:  # momentum, the last state
        d = beta * states[V // 2 + 1] + one_minus_beta * d
        new_states += (d,)
    return p - step_size * d, new_states
