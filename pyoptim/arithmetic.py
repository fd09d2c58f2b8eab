"""Arithmetic of the plain-PyTorch references, one rounding per operation as in the kernels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def signed(grad: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The gradient of what is minimised."""
    return -grad if group["maximize"] else grad


def decayed(grad: Tensor, param: Tensor, weight_decay: Any) -> Tensor:
    """The gradient with the L2 penalty; untouched without one, since 0*inf would be NaN."""
    return grad + weight_decay * param if weight_decay != 0 else grad


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root: torch's own for float32 on the CPU is 1 ulp off for a fifth of all values."""
    return x.double().sqrt().float() if x.dtype == torch.float32 else x.sqrt()
