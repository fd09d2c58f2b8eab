"""SGD: stochastic gradient descent with optional momentum, as in csrc/rules/sgd.hpp."""

import triton
import triton.language as tl

N_HYPERS = 6
N_FIELDS = 7
N_STATES = (0, 1)


@triton.jit
def prepare(raw, step, first):
    lr, momentum, dampening, weight_decay, nesterov, maximize = raw
    sign = tl.where(maximize != 0, -1.0, 1.0)
    is_nesterov = tl.where(nesterov != 0, 1.0, 0.0)
    is_first = tl.where(first, 1.0, 0.0)
    return sign, weight_decay, momentum, 1.0 - dampening, is_nesterov, is_first, lr


@triton.jit
def update(p, g, states, hyper, V: tl.constexpr):
    sign, weight_decay, momentum, undamped, nesterov, first, lr = hyper
    g = sign * g
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    if V == 0:
        return p - lr * g, ()
    else:
        # The first step copies the gradient: dampening starts with the second.
        b = tl.where(first != 0, g, momentum * states[0] + undamped * g)
        g = tl.where(nesterov != 0, g + momentum * b, b)
        return p - lr * g, (b,)
