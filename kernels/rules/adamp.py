"""AdamP: Adam whose step loses its part along the weights, as in csrc/rules/adamp.hpp."""

import triton
import triton.language as tl

from pyoptim.kernels.elements import divide, sqrt

N_HYPERS = 9
N_FIELDS = 11
N_STATES = (2, 2)
READS_GRAD = (False, True)
PROJECTS_BUFFER = (False, False)


@triton.jit
def prepare(raw, step, first):
    lr, beta1, beta2, eps, weight_decay, delta, wd_ratio, _nesterov, maximize = raw
    sign = tl.where(maximize != 0, -1.0, 1.0)
    # The interpreter has no pow.
    beta1_to_t = tl.exp2(step * tl.log2(beta1))
    beta2_to_t = tl.exp2(step * tl.log2(beta2))
    correction2 = 1.0 / tl.sqrt(1.0 - beta2_to_t)
    step_size = lr / (1.0 - beta1_to_t)
    less = lr * weight_decay
    averages = sign, beta1, 1.0 - beta1, beta2, 1.0 - beta2, correction2
    others = eps, step_size, 1.0 - less, 1.0 - less * wd_ratio, delta
    return averages + others


@triton.jit
def projection(hyper):
    """(eps, step_size, decay, projected_decay, delta)."""
    return hyper[6], hyper[7], hyper[8], hyper[9], hyper[10]


@triton.jit
def average(g, states, hyper):
    g = hyper[0] * g
    m = states[0] + hyper[2] * (g - states[0])
    v = hyper[3] * states[1] + (hyper[4] * g) * g
    return (m, v)


@triton.jit
def direction(g, states, hyper, V: tl.constexpr):
    denom = sqrt(states[1]) * hyper[5] + hyper[6]
    m = states[0]
    if V == 1:
        m = hyper[1] * m + hyper[2] * (hyper[0] * g)
    return divide(m, denom)
