"""SGDP: SGD whose step loses its part along the weights, as in csrc/rules/sgdp.hpp."""

import triton
import triton.language as tl

N_HYPERS = 10
N_FIELDS = 8
N_STATES = (1, 1, 1)
READS_GRAD = (False, True, False)
PROJECTS_BUFFER = (True, False, False)


@triton.jit
def prepare(raw, step, first):
    lr, momentum, dampening, eps, weight_decay, delta, wd_ratio, _n, _project, maximize = raw
    sign = tl.where(maximize != 0, -1.0, 1.0)
    less = lr * weight_decay / (1.0 - momentum)
    decay, projected_decay = 1.0 - less, 1.0 - less * wd_ratio
    return sign, momentum, 1.0 - dampening, eps, lr, decay, projected_decay, delta


@triton.jit
def projection(hyper):
    """(eps, step_size, decay, projected_decay, delta)."""
    return hyper[3], hyper[4], hyper[5], hyper[6], hyper[7]


@triton.jit
def average(g, states, hyper):
    return (hyper[1] * states[0] + hyper[2] * (hyper[0] * g),)


@triton.jit
def direction(g, states, hyper, V: tl.constexpr):
    if V == 1:
        return hyper[0] * g + hyper[1] * states[0]
    else:
        return states[0]
