"""What the two rules of a line search share, as in csrc/rules/line_search.hpp."""

import triton
import triton.language as tl

from pyoptim.kernels.elements import divide, max_keep_nan, sqrt

N_HYPERS = 11
N_FIELDS = 11
N_STATES = (0, 1, 1, 2, 2, 3)


@triton.jit
def prepare(raw, step, first):
    (
        lr,
        lr_scale,
        beta1,
        beta2,
        eps,
        weight_decay,
        _preconditioner,
        accumulates,
        corrects,
        bias_offset,
        by_momentum,
    ) = raw
    exponent = step + bias_offset
    # The interpreter has no pow; 0 to any power is exp2(-inf).
    beta1_to_t = tl.exp2(exponent * tl.log2(beta1))
    beta2_to_t = tl.exp2(exponent * tl.log2(beta2))
    is_unbiased1 = (corrects != 0) & (by_momentum != 0)
    unbias1 = tl.where(is_unbiased1, 1.0 / (1.0 - beta1_to_t), 1.0)
    unbias2 = tl.where(corrects != 0, 1.0 / tl.sqrt(1.0 - beta2_to_t), 1.0)
    sign = 1.0 + 0.0 * step
    decay = 1.0 - lr * weight_decay
    one_minus_beta1 = 1.0 - beta1
    one_minus_beta2 = tl.where(accumulates != 0, 1.0, 1.0 - beta2)
    kept = tl.where(accumulates != 0, 1.0, beta2)
    step_size = lr * unbias1
    slope_scale = lr_scale * unbias1
    by_m = tl.where(by_momentum != 0, 1.0, 0.0)
    return (
        sign,
        decay,
        beta1,
        one_minus_beta1,
        kept,
        one_minus_beta2,
        unbias2,
        eps,
        step_size,
        slope_scale,
        by_m,
    )


@triton.jit
def average(g, states, hyper, V: tl.constexpr):
    """The moments after this step."""
    _, _, beta1, one_minus_beta1, beta2, one_minus_beta2, _, _, _, _, _ = hyper
    new = ()
    if V == 1:
        new = (beta1 * states[0] + g,)
    elif V > 1:
        MOMENTUM: tl.constexpr = V % 2
        if MOMENTUM:
            new += (states[0] + one_minus_beta1 * (g - states[0]),)
        v = beta2 * states[MOMENTUM] + (one_minus_beta2 * g) * g
        new += (v,)
        if V > 3:
            new += (max_keep_nan(states[MOMENTUM + 1], v),)
    return new


@triton.jit
def direction(g, states, hyper, V: tl.constexpr):
    """The direction, without the correction of m, from averages of this step."""
    _, _, _, _, _, _, correction2, eps, _, _, by_momentum = hyper
    if V % 2 == 1:
        g = tl.where(by_momentum != 0, states[0], g)
    if V < 2:
        return g
    else:
        LAST: tl.constexpr = 0 if V == 2 else 2 if V == 5 else 1
        return divide(g, sqrt(states[LAST]) * correction2 + eps)


@triton.jit
def moved(p, d, hyper):
    """A step size of 0 leaves what is not finite out of it."""
    step_size = hyper[8]
    return tl.where(step_size != 0, p - step_size * d, p)
