"""Adagrad: the gradient over the root of the sum of its squares, as in csrc/rules/adagrad.hpp."""

import triton
import triton.language as tl

from pyoptim.kernels.elements import divide, sqrt

N_HYPERS = 5
N_FIELDS = 4
N_STATES = (1,)


@triton.jit
def prepare(raw, step, first):
    lr, lr_decay, weight_decay, eps, maximize = raw
    sign = tl.where(maximize != 0, -1.0, 1.0)
    return sign, weight_decay, eps, lr / (1.0 + (step - 1.0) * lr_decay)


@triton.jit
def update(p, g, states, hyper, V: tl.constexpr):
    sign, weight_decay, eps, lr = hyper
    g = sign * g
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    s = states[0] + g * g
    return p - lr * divide(g, sqrt(s) + eps), (s,)
