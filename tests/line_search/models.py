"""Small models, mini-batches and ways to compare optimizers, for the tests of line searches."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyoptim import SLS, AdaSLS, SaLSa
from pyoptim.line_search import LineSearch

KINDS: dict[str, Callable[..., LineSearch]] = {
    "salsa": SaLSa,
    "salsa-every": lambda params, **more: SaLSa(params, search_interval=1, **more),
    "salsa-sgd": lambda params, **more: SaLSa(params, base="sgd", momentum=0.5, **more),
    "release": lambda params, **more: SaLSa(params, variant="release", **more),
    "paper": lambda params, **more: SaLSa(params, variant="paper", **more),
    "repaired": lambda params, **more: SaLSa(params, variant="repaired", **more),
    "sls": SLS,
    "goldstein": lambda params, **more: SLS(params, line_search_fn="goldstein", **more),
    "adasls": AdaSLS,
    "adasls-amsgrad": lambda params, **more: AdaSLS(
        params, base_opt="amsgrad", momentum=0.9, **more
    ),
}


def make_model(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
    return nn.Sequential(*layers).to(dtype)


def batches(n: int, first: int = 0, dtype: torch.dtype = torch.float64) -> Iterator[Any]:
    """Mini-batches that a linear rule labels."""
    rule = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(first, first + n):
        generator = torch.Generator().manual_seed(100 + i)
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        yield x.to(dtype), (x @ rule).argmax(1)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        logits = model(batch[0])
        is_half = logits.dtype in (torch.bfloat16, torch.float16)
        return cross_entropy(logits.float() if is_half else logits, batch[1])

    return loss


def train(model: nn.Module, optimizer: LineSearch, n: int, first: int = 0) -> list[float]:
    dtype = next(model.parameters()).dtype
    return [
        float(optimizer.step(loss_of(model, batch))) for batch in batches(n, first, dtype=dtype)
    ]


class Recorder:
    """A closure that notes the losses it returns, and may change or refuse some."""

    def __init__(self, closure: Callable[[], Tensor]) -> None:
        self.closure = closure
        self.losses: list[float] = []
        self.answers: dict[int, Any] = {}  # by number of the call: a loss or an exception

    def __call__(self) -> Tensor:
        number = len(self.losses)
        loss = self.closure()
        self.losses.append(float(loss.detach()))
        answer = self.answers.get(number)
        if isinstance(answer, BaseException):
            raise answer
        return loss if answer is None else loss * 0 + answer
