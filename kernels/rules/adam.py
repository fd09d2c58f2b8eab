"""Adam and AdamW: averages of the gradient and of its square, as in csrc/rules/adam.hpp."""

import triton
import triton.language as tl

from pyoptim.kernels.elements import divide, max_keep_nan, sqrt

N_HYPERS = 8
N_FIELDS = 9
N_STATES = (2, 3)


@triton.jit
def prepare(raw, step, first):
    lr, beta1, beta2, eps, weight_decay, decoupled, _amsgrad, maximize = raw
    sign = tl.where(maximize != 0, -1.0, 1.0)
    l2 = tl.where(decoupled != 0, 0.0, weight_decay)
    decay = tl.where(decoupled != 0, 1.0 - lr * weight_decay, 1.0)
    # The interpreter has no pow.
    beta1_to_t = tl.exp2(step * tl.log2(beta1))
    beta2_to_t = tl.exp2(step * tl.log2(beta2))
    correction2 = 1.0 / tl.sqrt(1.0 - beta2_to_t)
    step_size = lr / (1.0 - beta1_to_t)
    return sign, l2, decay, 1.0 - beta1, beta2, 1.0 - beta2, correction2, eps, step_size


@triton.jit
def update(p, g, states, hyper, V: tl.constexpr):
    sign, weight_decay, decay, one_minus_beta1, beta2, one_minus_beta2, correction2, eps, lr = hyper
    g = sign * g
    w = p * decay
    g = tl.where(weight_decay != 0, g + weight_decay * w, g)
    m = states[0] + one_minus_beta1 * (g - states[0])
    v = beta2 * states[1] + (one_minus_beta2 * g) * g
    if V == 0:
        return w - lr * divide(m, sqrt(v) * correction2 + eps), (m, v)
    else:
        largest = max_keep_nan(states[2], v)
        return w - lr * divide(m, sqrt(largest) * correction2 + eps), (m, v, largest)
