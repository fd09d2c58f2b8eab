"""The examples of docs/line-search.md run."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from models import batches, make_model
from torch.nn.functional import cross_entropy

import pyoptim

PAGE = Path(__file__).parents[2] / "docs" / "line-search.md"


class Writer:
    """In the place of torch.utils.tensorboard's, which needs another package."""

    written: ClassVar[list[tuple[str, float, int]]] = []

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        self.written.append((name, float(value), step))


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 7
    model = make_model(torch.float32)
    data = list(batches(12, dtype=torch.float32))
    names: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "batches": data,
        "loss_fn": cross_entropy,
        "device_type": "cpu",
        "x": data[0][0],
        "y": data[0][1],
        "step": 40,
        "n_steps": 100,
        "body": model[0].parameters(),
        "head": model[3].parameters(),
    }
    for block in blocks:
        exec(block, names)
        if block.startswith("optimizer = pyoptim.SaLSa([") or "rate_factor" in block:
            names["optimizer"].step(lambda: cross_entropy(model(data[0][0]), data[0][1]))
    assert isinstance(names["optimizer"], pyoptim.SaLSa)
    assert names["optimizer"].rate_factor == 1.0
    assert {name for name, *_ in Writer.written} == {
        *("loss", "step size", "trials", "loss of the last trial")
    }
    assert sum(name == "loss" for name, *_ in Writer.written) == 12
