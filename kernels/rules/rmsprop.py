"""RMSprop: the gradient over the root of an average of its square, as in csrc/rules/rmsprop.hpp."""

import triton
import triton.language as tl

from pyoptim.kernels.elements import divide, sqrt

N_HYPERS = 7
N_FIELDS = 7
N_STATES = (1, 2, 2, 3)


@triton.jit
def prepare(raw, step, first):
    lr, alpha, eps, weight_decay, momentum, _centered, maximize = raw
    sign = tl.where(maximize != 0, -1.0, 1.0)
    return sign, weight_decay, alpha, 1.0 - alpha, momentum, eps, lr


@triton.jit
def update(p, g, states, hyper, V: tl.constexpr):
    sign, weight_decay, alpha, one_minus_alpha, momentum, eps, lr = hyper
    g = sign * g
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    square_avg = alpha * states[0] + (one_minus_alpha * g) * g
    new_states = (square_avg,)
    if V >= 2:  # centered; the momentum buffer, if any, lies before grad_avg
        grad_avg = states[V - 1]
        mean = grad_avg + one_minus_alpha * (g - grad_avg)
        d = divide(g, sqrt(square_avg - mean * mean) + eps)
    else:
        d = divide(g, sqrt(square_avg) + eps)
    if V % 2 == 1:
        d = momentum * states[1] + d
        new_states += (d,)
    if V >= 2:
        new_states += (mean,)
    return p - lr * d, new_states
