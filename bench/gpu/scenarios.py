"""Tensors and ways to step them on which two engines, or two ways of running one, are compared."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pyoptim

Options = dict[str, Any]

# Together they reach every kernel and every branch of a rule.
OPTIONS: dict[str, tuple[Options, ...]] = {
    "SGD": (
        {},
        {"weight_decay": 0.2, "maximize": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2},
        {"momentum": 0.8, "nesterov": True, "maximize": True},
    ),
    "Adam": (
        {},
        {"weight_decay": 0.2, "maximize": True},
        {"weight_decay": 0.2, "decoupled_weight_decay": True},
        {"amsgrad": True, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2},
    ),
    "AdamW": ({}, {"weight_decay": 0.0, "maximize": True}, {"amsgrad": True, "weight_decay": 0.2}),
    "RMSprop": (
        {},
        {"weight_decay": 0.2, "maximize": True},
        {"momentum": 0.9},
        {"centered": True},
        {"momentum": 0.8, "centered": True, "alpha": 0.9, "eps": 1e-3},
    ),
    "Adagrad": (
        {},
        {"lr_decay": 0.1, "weight_decay": 0.2, "maximize": True},
        {"initial_accumulator_value": 0.5, "eps": 1e-3},
    ),
    "Expectigrad": (
        {"maximize": True},
        {"beta": 0},
        {"sparse_counter": False},
        {"beta": 0, "sparse_counter": False, "eps": 1e-3},
    ),
    # Of the matrices, a delta of 1e6 projects every row, one of 1 some whole tensors; a decay of
    # more than a half is written in a sweep of its own.
    "AdamP": (
        {},
        {"delta": 1e6, "weight_decay": 0.2},
        {"delta": 1.0, "nesterov": True, "maximize": True},
        {"delta": 1.0, "weight_decay": 12.0, "wd_ratio": 0.3},
    ),
    "SGDP": (
        {"momentum": 0.9},
        {"delta": 1e6, "momentum": 0.9, "weight_decay": 0.02},
        {"delta": 1.0, "momentum": 0.8, "nesterov": True, "maximize": True},
        {"delta": 1e6, "momentum": 0.9, "project_buffer": False, "dampening": 0.3},
    ),
}
DTYPES = (
    *("float32", "bfloat16", "float16", "bfloat16+float32", "float16+float32", "float64"),
)  # fmt: skip
LR = 0.05
# One vector and its neighbours, one block and its neighbours, several blocks; 0-d, empty, a matrix.
SHAPES: tuple[tuple[int, ...], ...] = (
    *((), (0,), (1,), (3,), (7, 5), (8,), (40,), (1023,), (1025,), (33, 65)),
    *((4096,), (16383,), (65537,)),
)
SMALL_SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (7, 5), (40,), (1025,))
SPECIAL_SHAPE = (40,)
# Among them subnormal numbers of every dtype.
SPECIALS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 6e4, -1e-320)
# Elements beside a tensor that nobody may write, and what they hold.
GUARD, MARK = 16, 777.0
SCALE, MAX_NORM = 1000.7, 0.7


@dataclass
class Model:
    """Parameters in guarded memory, and the gradients of each step."""

    params: list[Tensor]
    memory: list[tuple[Tensor, int, int]]  # storage, first element, end
    device: torch.device

    def give_grads(self, step: int, has_specials: bool, factor: float = 1.0) -> None:
        for index, param in enumerate(self.params):
            values = random_values(param.shape, param.dtype, 1000 * (step + 1) + index)
            if has_specials and tuple(param.shape) == SPECIAL_SHAPE:
                values[: len(SPECIALS)] = torch.tensor(SPECIALS, dtype=torch.float64)
                values = values.roll(step)
            grad = (values * factor).to(param.dtype)
            # Another alignment than the parameter's.
            param.grad = self.place(grad, (3 * index + step) % 5, param)

    def place(self, values: Tensor, offset: int, like: Tensor | None = None) -> Tensor:
        """A copy on the device that begins `offset` elements into its marked memory."""
        end = offset + values.numel()
        storage = torch.full((end + GUARD,), MARK, dtype=values.dtype, device=self.device)
        self.memory.append((storage, offset, end))
        strides = values.stride() if like is None else like.stride()
        view = storage[offset:end].as_strided(values.shape, strides, offset)
        view.copy_(values)
        return view

    def is_guard_intact(self) -> bool:
        beside = (part for base, a, b in self.memory for part in (base[:a], base[b:]))
        return all(bool((part == MARK).all()) for part in beside)


def random_values(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values, rounded to `dtype`, in float64 on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), dtype=torch.float64, generator=generator).to(dtype).double()


def make_model(dtype: torch.dtype, device: str, is_small: bool) -> Model:
    model = Model([], [], torch.device(device))
    for index, shape in enumerate(SMALL_SHAPES if is_small else SHAPES):
        values = random_values(shape, dtype, index).to(dtype)
        if len(shape) == 2 and index % 2:
            values = values.t().contiguous().t()  # dense in memory, in another order
        model.params.append(model.place(values, index % 7).requires_grad_())
    return model


Make = Callable[..., torch.optim.Optimizer]


def step_plainly(make: Make, model: Model, steps: int) -> torch.optim.Optimizer:
    optimizer = make(model.params)
    for step in range(steps):
        model.give_grads(step, has_specials=True)
        optimizer.step()
    return optimizer


def step_with_groups(make: Make, model: Model, steps: int) -> torch.optim.Optimizer:
    """Groups of their own learning rates, one of them added later; a gradient that is missing."""
    parts = [model.params[0::3], model.params[1::3], model.params[2::3]]
    groups = [{"params": part, "lr": LR / (1 + n)} for n, part in enumerate(parts)]
    optimizer = make(groups[:2])
    for step in range(steps):
        if step == 1:
            optimizer.add_param_group({**groups[2], "weight_decay": 0.1})
        model.give_grads(step, has_specials=True)
        model.params[step % len(model.params)].grad = None
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    return optimizer


def step_with_scaler(make: Make, model: Model, steps: int) -> torch.optim.Optimizer:
    """Unscaled within the step; the second gradients overflow, so that nothing may change."""
    optimizer = make(model.params)
    scaler = torch.amp.GradScaler(model.device.type, init_scale=SCALE, growth_interval=2)
    scaler.scale(torch.ones((), device=model.device))
    for step in range(steps):
        model.give_grads(step, has_specials=False, factor=scaler.get_scale())
        if step == 1:
            grad = model.params[-1].grad
            assert grad is not None
            grad.view(-1)[-1] = math.inf
        scaler.step(optimizer)
        scaler.update()
    return optimizer


def step_with_clipping_inside(make: Make, model: Model, steps: int) -> torch.optim.Optimizer:
    optimizer = make(model.params, max_grad_norm=MAX_NORM)
    for step in range(steps):
        model.give_grads(step, has_specials=False)
        optimizer.step()
    return optimizer


def step_with_clipping_before(make: Make, model: Model, steps: int) -> torch.optim.Optimizer:
    optimizer = make(model.params)
    for step in range(steps):
        model.give_grads(step, has_specials=False)
        pyoptim.clip_grad_norm_(model.params, MAX_NORM)  # type: ignore[attr-defined]
        optimizer.step()
    return optimizer


def step_capturable(make: Make, model: Model, steps: int) -> torch.optim.Optimizer:
    """On a GPU the counters and the learning rate are on the device; on the CPU they cannot be."""
    on_gpu = model.device.type == "cuda"
    lr = torch.tensor(LR, device=model.device) if on_gpu else float(torch.tensor(LR))
    optimizer = make(model.params, lr=lr, **({"capturable": True} if on_gpu else {}))
    for step in range(steps):
        model.give_grads(step, has_specials=True)
        optimizer.step()
    return optimizer


SCENARIOS: dict[str, Callable[[Make, Model, int], torch.optim.Optimizer]] = {
    "plain": step_plainly,
    "groups": step_with_groups,
    "scaler": step_with_scaler,
    "clip": step_with_clipping_inside,
    "clip_before": step_with_clipping_before,
    "capturable": step_capturable,
}
# In these the powers of the betas are computed on the device. Its pow() may differ from the CPU's
# in the last bit of float64, which a rounding to float32 hides but for one case in 10^8.
OF_DEVICE_POWERS = ("scaler", "capturable")


# Rules that add up rows.
PROJECTING = ("adamp", "sgdp")


def may_differ(scenario: str, optimizer: str, dtypes: str, has_reference: bool) -> bool:
    """Whether equal bits cannot be promised.

    Args:
        has_reference: one side is the reference, which adds up in an order of its own.
    """
    if has_reference and getattr(pyoptim, optimizer).rule in PROJECTING:
        return True
    allowed = (*OF_DEVICE_POWERS, "clip") if has_reference else OF_DEVICE_POWERS
    return scenario in allowed and dtypes == "float64"


def why_not(scenario: str, optimizer: str, device: str) -> str | None:
    """Why a scenario does not exist here, or None if it does."""
    accepted = inspect.signature(getattr(pyoptim, optimizer)).parameters
    if scenario == "clip" and "max_grad_norm" not in accepted:
        return f"pyoptim.{optimizer} has no max_grad_norm"
    if scenario == "clip_before" and not hasattr(pyoptim, "clip_grad_norm_"):
        return "pyoptim has no clip_grad_norm_"
    if scenario == "capturable" and "capturable" not in accepted:
        return f"pyoptim.{optimizer} has no capturable"
    if scenario == "capturable" and device == "cpu":
        return "capturable=True needs a GPU"
    return None
