"""AdamP and SGDP on a GPU engine decide and write as the CPU engine, for rows of every length."""

import pytest
import torch
from cases import ADAMP, SGDP, Case, assert_same_bits, parametrize_cases
from projected import SHAPES, Shape, Training

# Rows of a thread, of a part of a warp, of a block and of several; rows in pieces.
FEW = (Shape((9,)), Shape((1, 50)), Shape((9, 5)), Shape((2, 132)), Shape((4, 30), (1, 0)))
LARGE = (
    Shape((3, 16385)),
    Shape((2, 20000), (1, 0)),
    Shape((1, 70000)),
    Shape((2, 300_001)),
    Shape((100_000, 8)),
    Shape((1000, 4608)),
    Shape((4096, 1024)),
    Shape((64, 32, 56, 56), (0, 2, 3, 1)),
)
CASES = [
    *(Case(row, name) for row in (ADAMP, SGDP) for name in row.kernels),
    *(Case(row, "large_decay") for row in (ADAMP, SGDP)),
]


@parametrize_cases(CASES)
def test_every_decision_equals_the_cpu(case: Case, engine: str, device: torch.device) -> None:
    shapes = (*SHAPES, *LARGE) if device.type == "cuda" else FEW
    actual = Training(case, shapes=shapes, backend=engine, device=device)
    expected = Training(case, shapes=shapes)
    for _ in range(2 if device.type == "cuda" else 1):
        actual.optimizer.step()
        expected.optimizer.step()
    assert_same_bits([x.cpu() for x in actual.arrays()], expected.arrays())
    actual.check_guards()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="graphs, streams and devices need a CUDA device"
)
@parametrize_cases([Case(ADAMP, "weight_decay")])
def test_a_captured_step_equals_steps(case: Case, engine: str, device: torch.device) -> None:
    """The decisions are made anew in every replay."""
    captured, stepped = (
        Training(case, shapes=(*SHAPES, *LARGE), backend=engine, device=device) for _ in range(2)
    )
    for training in (captured, stepped):
        for group in training.optimizer.param_groups:
            group["capturable"] = True
        for p in training.params:
            entry = training.optimizer.state[p]
            entry["step"] = entry["step"].to(device)
        training.optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    for _ in range(3):
        graph.replay()
        stepped.optimizer.step()
    assert_same_bits(captured.arrays(), stepped.arrays())
