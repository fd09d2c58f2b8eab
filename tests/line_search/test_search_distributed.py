"""Line searches over DDP replicas, FSDP2 shards and DTensors, in two processes of this machine."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import KINDS, batches, loss_of, make_model
from processes import in_two_processes
from torch import distributed, nn
from torch.nn import Parameter

from pyoptim import SLS, SaLSa
from pyoptim.line_search import LineSearch

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this build of torch has no gloo",
)
if distributed.is_available():
    from torch.distributed.checkpoint import state_dict as checkpoint
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel


def whole(param: torch.Tensor) -> torch.Tensor:
    full: torch.Tensor = param.full_tensor() if isinstance(param, DTensor) else param
    return full.detach()


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(whole(a), whole(b), rtol=1e-8, atol=1e-10)


def assert_same_everywhere(model: nn.Module, optimizer: LineSearch) -> None:
    numbers = [float(v) for v in vars(optimizer._numbers).values()]
    mine = torch.cat([*(whole(p).flatten() for p in model.parameters()), torch.tensor(numbers)])
    everyones = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyones, mine)
    assert torch.equal(everyones[0], everyones[1])


def check_replicas(kind: str) -> None:
    """Each has half of the batch; losses are averaged, so that all decide as on the whole."""
    rank = distributed.get_rank()
    model, plain = make_model(), make_model()
    wrapped = DistributedDataParallel(model)
    optimizer = KINDS[kind](model.parameters())
    alone = KINDS[kind](plain.parameters(), process_group=False)
    for x, y in batches(12):
        half = (x[rank::2], y[rank::2])
        optimizer.step(loss_of(wrapped, half))
        alone.step(loss_of(plain, (x, y)))
    assert_same_everywhere(model, optimizer)
    assert_alike(model, plain)
    assert optimizer.n_trials == alone.n_trials >= 10


def check_shards(mesh: "DeviceMesh", max_grad_norm: float | None) -> None:
    model, plain = make_model(), make_model()
    fully_shard(model, mesh=mesh)
    optimizer = SaLSa(model.parameters(), max_grad_norm=max_grad_norm)
    alone = SaLSa(plain.parameters(), max_grad_norm=max_grad_norm, process_group=False)
    for batch in batches(12):
        expected = alone.step(loss_of(plain, batch))
        torch.testing.assert_close(optimizer.step(loss_of(model, batch)), expected)
        assert optimizer.last_search is not None
        assert alone.last_search is not None
        assert optimizer.last_search.slope == pytest.approx(alone.last_search.slope)
        assert optimizer.last_search.losses == pytest.approx(alone.last_search.losses)
    assert_same_everywhere(model, optimizer)
    assert_alike(model, plain)
    assert optimizer.n_searches < 12


def check_shards_beside_replicas(mesh: "DeviceMesh") -> None:
    torch.manual_seed(0)
    full = torch.randn(6, 4, dtype=torch.float64)
    bias = Parameter(torch.ones(4, dtype=torch.float64))
    sharded = Parameter(distribute_tensor(full, mesh, [Shard(0)]))
    twins = [Parameter(full.clone()), Parameter(bias.detach().clone())]
    optimizer, alone = SLS([sharded, bias]), SLS(twins, process_group=False)
    for _ in range(5):
        optimizer.step(lambda: sharded.square().sum().full_tensor() + (bias**4).sum())
        alone.step(lambda: twins[0].square().sum() + (twins[1] ** 4).sum())
        assert optimizer.last_search is not None
        assert alone.last_search is not None
        assert optimizer.last_search.slope == pytest.approx(alone.last_search.slope, rel=1e-12)
    torch.testing.assert_close(whole(sharded), twins[0].detach())
    torch.testing.assert_close(bias.detach(), twins[1].detach())


def check_checkpoint(mesh: "DeviceMesh") -> None:
    models: list[Any] = [make_model(), make_model()]
    for model in models:
        fully_shard(model, mesh=mesh)
    optimizers = [SaLSa(model.parameters()) for model in models]
    for batch in batches(5):
        optimizers[0].step(loss_of(models[0], batch))
    saved = copy.deepcopy(checkpoint.get_state_dict(models[0], optimizers[0]))
    checkpoint.set_state_dict(
        models[1], optimizers[1], model_state_dict=saved[0], optim_state_dict=saved[1]
    )
    assert vars(optimizers[0]._numbers) == vars(optimizers[1]._numbers)
    for batch in batches(5, 5):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(loss_of(model, batch))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(whole(a), whole(b))


def run_everything(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for kind in ("salsa", "sls", "adasls-amsgrad"):
        check_replicas(kind)
    check_shards(mesh, None)
    check_shards(mesh, 0.1)
    check_shards_beside_replicas(mesh)
    check_checkpoint(mesh)


def test_two_processes_take_the_decisions_of_one(tmp_path: Path) -> None:
    in_two_processes(run_everything, tmp_path)
