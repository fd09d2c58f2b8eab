"""Arrays with guard zones around them, and the rules' prepared hyper-parameters in plain Python."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GUARD = 16  # elements, a multiple of every vector
SENTINEL = 77.0
NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}


class Guarded:
    """A copy of `values` whose first element is aligned to 16 bytes, or is not."""

    def __init__(self, values: Tensor, is_aligned: bool) -> None:
        start = GUARD if is_aligned else GUARD + 1
        self.memory = torch.full((start + values.numel() + GUARD,), SENTINEL, dtype=values.dtype)
        self.values = self.memory[start : start + values.numel()]
        self.values.copy_(values.flatten())
        # The address of no element is still an address.
        self.address = self.memory.data_ptr() + start * values.element_size()
        assert (self.address % 16 == 0) == is_aligned

    def is_intact(self) -> bool:
        """Whether the guard zones are as they were."""
        start = self.values.storage_offset()
        around = torch.cat([self.memory[:start], self.memory[start + self.values.numel() :]])
        return bool((around == SENTINEL).all())


def int64(values: Sequence[int]) -> bytes:
    return np.array(values, np.int64).tobytes()


def prepared(
    rule: str, raw: Sequence[float], step: float = 1.0, first: bool = False
) -> list[float]:
    """The fields of the C++ Hyper struct of `rule`, from the formulas in csrc/rules."""
    if rule == "sgd":
        lr, momentum, dampening, weight_decay, nesterov, maximize = raw
        sign = -1.0 if maximize else 1.0
        return [sign, weight_decay, momentum, 1 - dampening, nesterov != 0, first, lr]
    if rule == "adam":
        lr, beta1, beta2, eps, weight_decay, decoupled, _, maximize = raw
        return [
            -1.0 if maximize else 1.0,
            0.0 if decoupled else weight_decay,
            1.0 - lr * weight_decay if decoupled else 1.0,
            *(1.0 - beta1, beta2, 1.0 - beta2),
            1.0 / math.sqrt(1.0 - math.pow(beta2, step)),
            eps,
            lr / (1.0 - math.pow(beta1, step)),
        ]
    if rule == "rmsprop":
        lr, alpha, eps, weight_decay, momentum, _, maximize = raw
        return [-1.0 if maximize else 1.0, weight_decay, alpha, 1.0 - alpha, momentum, eps, lr]
    if rule == "expectigrad":
        lr, beta, eps, _, maximize = raw
        step_size = lr / (1.0 - math.pow(beta, step))
        return [
            *(-1.0 if maximize else 1.0, beta, 1.0 - beta, eps, 1.0 / math.sqrt(step), step_size)
        ]
    if rule == "ascent":
        scale, _, eta, maximize = raw
        return [-1.0 if maximize else 1.0, scale, eta]
    if rule == "adamp":
        lr, beta1, beta2, eps, weight_decay, delta, wd_ratio, _, maximize = raw
        return [
            *(-1.0 if maximize else 1.0, beta1, 1.0 - beta1, beta2, 1.0 - beta2),
            *(1.0 / math.sqrt(1.0 - math.pow(beta2, step)), eps),
            lr / (1.0 - math.pow(beta1, step)),
            *(1.0 - lr * weight_decay, 1.0 - lr * weight_decay * wd_ratio, delta),
        ]
    if rule == "sgdp":
        lr, momentum, dampening, eps, weight_decay, delta, wd_ratio, _, _, maximize = raw
        decay = lr * weight_decay / (1.0 - momentum)
        return [
            *(-1.0 if maximize else 1.0, momentum, 1.0 - dampening, eps, lr),
            *(1.0 - decay, 1.0 - decay * wd_ratio, delta),
        ]
    if rule in ("line_trial", "line_step"):
        lr, lr_scale, beta1, beta2, eps, weight_decay, _, accumulates, corrects, offset, by_m = raw
        t = step + offset
        unbias1 = 1.0 / (1.0 - math.pow(beta1, t)) if corrects and by_m else 1.0
        return [
            *(1.0, 1.0 if rule == "line_trial" else 1.0 - lr * weight_decay, beta1, 1.0 - beta1),
            *((1.0, 1.0) if accumulates else (beta2, 1.0 - beta2)),
            1.0 / math.sqrt(1.0 - math.pow(beta2, t)) if corrects else 1.0,
            *(eps, lr * unbias1, lr_scale * unbias1, 1.0 if by_m else 0.0),
        ]
    lr, lr_decay, weight_decay, eps, maximize = raw
    return [-1.0 if maximize else 1.0, weight_decay, eps, lr / (1.0 + (step - 1.0) * lr_decay)]


def block(fields: Sequence[float], is_double: bool) -> bytes:
    """One HyperBlock."""
    return np.array(fields, np.float64 if is_double else np.float32).tobytes().ljust(96, b"\0")
