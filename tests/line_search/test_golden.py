"""The official implementations' runs, and our repaired one's: same branches, same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import softplus

from pyoptim.line_search import SLS, AdaSLS, SaLSa

GOLDEN = Path(__file__).parents[1] / "golden"


class Problem:
    """The network, the data and the mini-batches of a golden file."""

    def __init__(self, name: str) -> None:
        self.file = json.loads((GOLDEN / f"{name}.json").read_text())
        self.x, self.y = (torch.tensor(self.file[k], dtype=torch.float64) for k in ("X", "y"))
        initial = (torch.tensor(p, dtype=torch.float64) for p in self.file["params_init"])
        self.params = [Parameter(p) for p in initial]
        self.losses: list[float] = []

    def loss(self, step: int) -> Tensor:
        first = (step - 1) * 8 % 40
        x, y = self.x[first : first + 8], self.y[first : first + 8]
        w1, b1, w2, b2 = self.params
        logits = torch.tanh(x @ w1 + b1) @ w2 + b2
        loss = (softplus(logits) - y * logits).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def check(self, optimizer: Any, keys: dict[str, str], rtol: float) -> None:
        for step in self.file["steps"]:
            self.losses.clear()
            optimizer.step(lambda number=step["step"]: self.loss(number))
            assert len(self.losses) == step["closure_calls"], step["step"]
            assert self.losses[0] == pytest.approx(step["loss"], rel=rtol, abs=1e-13)
            if "trial_losses" in step:
                assert self.losses[1:] == pytest.approx(step["trial_losses"], rel=rtol, abs=1e-13)
            assert optimizer.step_size == pytest.approx(step["step_size"], rel=rtol)
            for ours, theirs in keys.items():
                assert getattr(optimizer._numbers, ours) == pytest.approx(step[theirs], rel=rtol)
            expected = [torch.tensor(p, dtype=torch.float64) for p in step["params_after"]]
            actual = [p.detach() for p in self.params]
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-13)


OFFICIAL = {
    "decrease": "avg_decrease",
    "slope": "avg_gradient_norm",
    "fast": "ema_fast",
    "slow": "ema_slow",
    "since": "since_last_search",
}
SALSA: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "salsa_released_default": ({"variant": "release"}, OFFICIAL),
    "salsa_released_no_speedup": ({"variant": "release", "search_interval": 1}, OFFICIAL),
    "adamsls_paper_salsa": ({"variant": "paper", "search_interval": 1}, OFFICIAL),
    "adamsls_paper_salsa_speedup": ({"variant": "paper"}, OFFICIAL),
    "adamsls_old_sls": (
        {"variant": "paper", "search_interval": 1, "beta3": 0.0, "c": 0.1},
        OFFICIAL,
    ),
    "ours_salsa_recommended": ({"variant": "repaired"}, {"decrease": "h", "slope": "s"}),
}


parametrize_backends = pytest.mark.parametrize("backend", ["reference", "auto"])


@parametrize_backends
@pytest.mark.parametrize("name", SALSA)
def test_salsa_runs_are_reproduced(name: str, backend: str) -> None:
    options, keys = SALSA[name]
    problem = Problem(name)
    problem.check(SaLSa(problem.params, backend=backend, **options), keys, 1e-12)


@parametrize_backends
def test_the_sls_run_is_reproduced(backend: str) -> None:
    problem = Problem("sls_armijo")
    problem.check(SLS(problem.params, n_batches_per_epoch=5, backend=backend), {}, 1e-12)


@parametrize_backends
def test_the_adasls_run_is_reproduced(backend: str) -> None:
    problem = Problem("adasls_adam")
    options: dict[str, Any] = {"n_batches_per_epoch": 5, "base_opt": "adam", "momentum": 0.9}
    problem.check(AdaSLS(problem.params, **options, backend=backend), {}, 1e-12)
