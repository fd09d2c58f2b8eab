"""What only a CUDA device shows: graphs, streams, several devices, no waiting."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import KERNEL_CASES, Case, assert_same_bits, parameters, parametrize_cases, states_of
from test_gpu_live import MAX_NORM, scalar, scaled_step
from test_gpu_step import DAMPED, on
from torch import Tensor
from torch.nn import Parameter

import pyoptim

if not torch.cuda.is_available():
    pytest.skip("graphs, streams and devices need a CUDA device", allow_module_level=True)

SHAPES = [(5, 3), (4097,), ()]


def fill_grads(params: list[Parameter], step: int) -> None:
    """The same gradient tensors with new values: a graph has recorded their addresses."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        new = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        p.grad = new if p.grad is None else p.grad.copy_(new)


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def run(
    optimizer: Any, params: list[Parameter], steps: int, capture_at: int | None
) -> list[Tensor]:
    graph = None
    for step in range(steps):
        fill_grads(params, step)
        if step == capture_at:
            graph = captured(optimizer.step)
        graph.replay() if graph else optimizer.step()
    return [*params, *states_of(optimizer)]


@pytest.mark.parametrize("max_grad_norm", [None, MAX_NORM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@parametrize_cases([*KERNEL_CASES, DAMPED])
def test_a_replayed_graph_equals_steps(
    case: Case, dtype: torch.dtype, max_grad_norm: float | None, engine: str, device: torch.device
) -> None:
    results = []
    for capture_at in (None, 2):
        params = on(device, parameters(SHAPES, dtype))
        optimizer = case.ours(params, backend=engine, max_grad_norm=max_grad_norm)
        optimizer.param_groups[0]["capturable"] = True
        results.append(run(optimizer, params, 6, capture_at))
    assert_same_bits(*results)


def test_lr_changes_under_a_graph(engine: str, device: torch.device) -> None:
    results = []
    for is_captured in (False, True):
        params = on(device, parameters(SHAPES, torch.float32))
        lr = scalar(0.1, device)
        optimizer = pyoptim.AdamW(params, lr=lr, capturable=True, backend=engine)
        graph = None
        for step in range(6):
            fill_grads(params, step)
            lr.fill_(0.1 / (step + 1))
            if is_captured and step == 2:
                graph = captured(optimizer.step)
            graph.replay() if graph else optimizer.step()
        results.append([*params, *states_of(optimizer)])
    assert_same_bits(*results)


def test_a_scaler_skips_inside_a_graph(engine: str, device: torch.device) -> None:
    params = on(device, parameters(SHAPES, torch.float32))
    optimizer = pyoptim.AdamW(params, capturable=True, backend=engine)
    optimizer.grad_scale, optimizer.found_inf = scalar(4.0, device), scalar(0.0, device)
    fill_grads(params, 0)
    optimizer.step()
    graph = captured(optimizer.step)
    counter = optimizer.state[params[0]]["step"]
    before = [t.clone() for t in (*params, *states_of(optimizer), counter)]
    optimizer.found_inf.fill_(1.0)
    graph.replay()
    assert_same_bits([*params, *states_of(optimizer), counter], before)
    optimizer.found_inf.fill_(0.0)
    graph.replay()
    assert float(counter) == float(before[-1]) + 1


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_state_cannot_be_made_inside_a_graph(name: str, engine: str, device: torch.device) -> None:
    params = on(device, parameters(SHAPES, torch.float32))
    options = {"momentum": 0.9} if name == "SGD" else {"capturable": True}
    optimizer = getattr(pyoptim, name)(params, lr=0.1, backend=engine, **options)
    fill_grads(params, 0)
    with pytest.raises(RuntimeError, match="at least one step before the capture"):
        captured(optimizer.step)


def test_a_host_counter_is_refused_inside_a_graph(engine: str, device: torch.device) -> None:
    params = on(device, parameters(SHAPES, torch.float32))
    optimizer = pyoptim.AdamW(params, backend=engine)
    fill_grads(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable"):
        captured(optimizer.step)


@pytest.mark.parametrize("how", ["plain", "scaled", "clipped", "capturable", "tensor_lr"])
@parametrize_cases([*KERNEL_CASES])
def test_a_step_never_waits(case: Case, how: str, engine: str, device: torch.device) -> None:
    params = on(device, parameters(SHAPES, torch.float32))
    options: dict[str, Any] = {"max_grad_norm": MAX_NORM} if how == "clipped" else {}
    optimizer = case.ours(params, backend=engine, **options)
    if how == "capturable":
        optimizer.param_groups[0]["capturable"] = True
    if how == "tensor_lr":
        optimizer.param_groups[0]["lr"] = scalar(0.1, device)
    found_inf, scale = scalar(0.0, device), scalar(2.0, device)
    for step in range(4):
        fill_grads(params, step)
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        try:
            if how == "scaled":
                optimizer.grad_scale, optimizer.found_inf = scale, found_inf
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)


def test_a_side_stream_is_followed(engine: str, device: torch.device) -> None:
    """The step waits for gradients of its stream that take long to come."""
    size = 1 << 20
    param = Parameter(torch.zeros(size, device=device))
    param.grad = torch.zeros(size, device=device)
    optimizer = pyoptim.SGD([param], lr=1.0, backend=engine)
    optimizer.step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        param.grad.fill_(1.0)
        optimizer.step()
    stream.synchronize()
    assert float(param.detach().min()) == float(param.detach().max()) == -1.0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_parameters_on_two_devices(engine: str) -> None:
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    wanted = parameters([(5, 3), (70,)], torch.float32)
    params = [on(d, [p])[0] for d, p in zip(devices, wanted, strict=True)]
    actual = pyoptim.AdamW(params, backend=engine, max_grad_norm=MAX_NORM)
    expected = pyoptim.AdamW(wanted, backend="cpu", max_grad_norm=MAX_NORM)
    for step in range(3):
        fill_grads(wanted, step)
        for p, q in zip(wanted, params, strict=True):
            q.grad = p.grad.to(q.device)
        scaled_step(actual, 2.0, False, devices[0])
        scaled_step(expected, 2.0, False, torch.device("cpu"))
        assert_same_bits([p.cpu() for p in params], wanted)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_a_replayed_graph_equals_steps_of_sam(
    adaptive: bool, engine: str, device: torch.device
) -> None:
    results = []
    for capture_at in (None, 2):
        params = on(device, parameters(SHAPES, torch.float32))
        options: dict[str, Any] = {"rho": 0.3, "adaptive": adaptive, "capturable": True}
        optimizer = pyoptim.SAM(params, pyoptim.AdamW, backend=engine, **options)

        def both_steps(optimizer: Any = optimizer) -> None:
            optimizer.first_step()
            optimizer.second_step()

        graph = None
        for step in range(5):
            fill_grads(params, step)
            if step == capture_at:
                graph = captured(both_steps)
            graph.replay() if graph else both_steps()
        results.append([*params, *states_of(optimizer)])
    assert_same_bits(*results)


def test_a_large_tensor_is_indexed_in_64_bits(engine: str, device: torch.device) -> None:
    numel = 2**31 + 9
    if torch.cuda.mem_get_info(device)[0] < 3 * 2 * numel:
        pytest.skip("needs 13 GB of free GPU memory")
    param = Parameter(torch.ones(numel, dtype=torch.bfloat16, device=device))
    param.grad = torch.ones(numel, dtype=torch.bfloat16, device=device)
    pyoptim.SGD([param], lr=0.5, backend=engine).step()
    assert float(param.detach().min()) == float(param.detach().max()) == 0.5


def test_auto_prefers_the_cuda_engine(device: torch.device) -> None:
    from pyoptim import backend

    statuses = backend.status()
    wanted = next((n for n in ("cuda", "triton") if statuses[n] is None), "reference")
    assert backend.select("auto", torch.ones(1, device=device)) == wanted
