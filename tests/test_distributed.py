"""DTensor, FSDP2, DDP and distributed checkpoints on processes of this machine."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dropin import NAMES, OPTIONS, OURS, TORCHS, assert_same, make_params, set_grads
from processes import in_two_processes
from projected import DECISIONS, Shape, weight_and_grad
from torch import distributed
from torch.nn import Parameter

import pyoptim

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this build of torch has no gloo",
)
if distributed.is_available():
    from torch.distributed.checkpoint import state_dict as checkpoint
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator["DeviceMesh"]:
    file = tmp_path_factory.mktemp("group") / "rendezvous"
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def sharded(params: list[Parameter], mesh: "DeviceMesh") -> list[Parameter]:
    return [Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]


def set_sharded_grads(params: list[Parameter], seed: int) -> None:
    plain = make_params([tuple(p.shape) for p in params])
    set_grads(plain, seed)
    for param, full in zip(params, plain, strict=True):
        param.grad = distribute_tensor(full.grad, param.device_mesh, param.placements)


def full(params: Any) -> list[torch.Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in params]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("option", OPTIONS)
def test_dtensor_parameters(option: str, backend: str, mesh: "DeviceMesh") -> None:
    name, kwargs = OPTIONS[option]
    expected = make_params([(6, 3), (5,)])
    params = sharded(expected, mesh)
    ours = OURS[name](params, **kwargs, backend=backend)
    theirs = TORCHS[name](expected, **kwargs, foreach=False)
    for step in range(3):
        versions = [(p._version, p._local_tensor._version) for p in params]
        set_sharded_grads(params, step)
        set_grads(expected, step)
        ours.step()
        theirs.step()
        for p, (outer, inner) in zip(params, versions, strict=True):
            assert p._version > outer
            assert p._local_tensor._version > inner
    assert_same(full(params), expected)
    for entry in ours.state.values():
        for key, value in entry.items():
            assert isinstance(value, DTensor) == (key != "step")


def check_gradients_placed_unlike_their_parameter(mesh: "DeviceMesh") -> None:
    expected = make_params([(6, 4)])
    params = sharded(expected, mesh)
    ours, theirs = pyoptim.AdamW(params), torch.optim.AdamW(expected)
    for step, placement in enumerate((Replicate(), Partial(), Shard(1))):
        set_grads(expected, step)
        grad = expected[0].grad
        if isinstance(placement, Partial):
            params[0].grad = DTensor.from_local(grad / mesh.size(), mesh, [placement])
        else:
            params[0].grad = distribute_tensor(grad, mesh, [placement])
        ours.step()
        theirs.step()
    assert_same(full(params), expected)


def check_state_sharded_unlike_its_parameter(mesh: "DeviceMesh") -> None:
    params = sharded(make_params([(6, 4)]), mesh)
    optimizer = pyoptim.AdamW(params)
    set_sharded_grads(params, 0)
    optimizer.step()
    before = full(params)[0].detach().clone()
    entry = optimizer.state[params[0]]
    entry["exp_avg"] = entry["exp_avg"].redistribute(mesh, [Replicate()])
    with pytest.raises(RuntimeError, match="sharded differently from its parameter"):
        optimizer.step()
    assert_same(full(params), [before], rtol=0, atol=0)


def test_gradients_placed_unlike_their_parameter(mesh: "DeviceMesh") -> None:
    check_gradients_placed_unlike_their_parameter(mesh)


def test_a_bad_dtensor_gradient_changes_nothing(mesh: "DeviceMesh") -> None:
    params = sharded(make_params([(6, 3), (5,)]), mesh)
    optimizer = pyoptim.AdamW(params)
    set_sharded_grads(params, 0)
    params[1].grad = None
    params[1].grad = distribute_tensor(torch.ones(5).double(), mesh, [Shard(0)])
    params[1].grad._local_tensor = torch.ones(4).double()
    before = [p.full_tensor().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 has shape \(5,\)"):
        optimizer.step()
    assert_same(full(params), before, rtol=0, atol=0)
    assert not optimizer.state


def test_deepcopy_of_an_optimizer_of_dtensors(mesh: "DeviceMesh") -> None:
    params = sharded(make_params([(6, 3)]), mesh)
    optimizer = pyoptim.AdamW(params)
    set_sharded_grads(params, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    for own, stepped in ((params, optimizer), (twins, twin)):
        set_sharded_grads(own, 1)
        stepped.step()
    assert_same(full(params), full(twins), rtol=0, atol=0)


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    return torch.nn.Sequential(*layers).double()


def train(model: torch.nn.Module, optimizer: Any, steps: range, rank: int = 0) -> None:
    for step in steps:
        inputs = torch.randn(8, 4, generator=torch.manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_fully_sharded_model_and_its_checkpoint(name: str, mesh: "DeviceMesh") -> None:
    kwargs = {"lr": 0.05, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    plain, model = make_model(), make_model()
    fully_shard(model, mesh=mesh)
    ours, theirs = (
        OURS[name](model.parameters(), **kwargs),
        TORCHS[name](plain.parameters(), **kwargs),
    )
    train(model, ours, range(3))
    train(plain, theirs, range(3))
    assert_same(full(model.parameters()), plain.parameters())

    saved = copy.deepcopy(checkpoint.get_state_dict(model, ours))
    second = make_model()
    fully_shard(second, mesh=mesh)
    resumed = OURS[name](second.parameters(), lr=9.0)
    checkpoint.set_state_dict(second, resumed, model_state_dict=saved[0], optim_state_dict=saved[1])
    train(second, resumed, range(3, 5))
    train(plain, theirs, range(3, 5))
    assert_same(full(second.parameters()), plain.parameters())


def test_distributed_data_parallel(mesh: "DeviceMesh") -> None:
    plain, model = make_model(), make_model()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    train(wrapped, pyoptim.AdamW(model.parameters(), lr=0.1), range(4))
    train(plain, torch.optim.AdamW(plain.parameters(), lr=0.1), range(4))
    assert_same(model.parameters(), plain.parameters())


def train_shard(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = make_model()
    fully_shard(model, mesh=mesh)
    train(model, pyoptim.AdamW(model.parameters(), lr=0.1), range(4))
    plain = make_model()
    train(plain, torch.optim.AdamW(plain.parameters(), lr=0.1), range(4))
    assert_same(full(model.parameters()), plain.parameters())
    check_gradients_placed_unlike_their_parameter(mesh)
    check_state_sharded_unlike_its_parameter(mesh)
    # The last layer has three rows: one process holds two of them, the other one.
    (folder / str(rank)).write_text(str([tuple(p.to_local().shape) for p in model.parameters()]))


def test_two_processes_with_a_shard_each(tmp_path: Path) -> None:
    in_two_processes(train_shard, tmp_path)
    shapes = [eval((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert shapes == [[(3, 4), (3,), (2, 6), (2,)], [(3, 4), (3,), (1, 6), (1,)]]


PROJECTING = {
    "adamp": (pyoptim.AdamP, {"lr": 0.1, "weight_decay": 0.1}),
    "sgdp": (pyoptim.SGDP, {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}),
}
# Even and uneven cuts, fewer rows than processes, complex numbers, a vector, a replica, nothing.
CUT = [
    *(((n, 4), Shard(0), torch.float64) for n in (6, 5, 2, 1)),
    *(((3, n), Shard(1), torch.float64) for n in (4, 5, 1)),
    ((4, 3, 2), Shard(2), torch.float32),
    ((3, 4), Shard(0), torch.complex128),
    ((5,), Shard(0), torch.float64),
    ((3,), Shard(0), torch.complex128),
    ((4, 3), Replicate(), torch.float64),
    ((0, 3), Shard(0), torch.float64),
]


def check_projections(name: str, decision: str, mesh: "DeviceMesh") -> None:
    """Sums over both processes decide and project as those of one process with all rows."""
    kind, options = PROJECTING[name]
    cut, whole = [], []
    for n, (sizes, placement, dtype) in enumerate(CUT):
        p, g = (t.contiguous() for t in weight_and_grad(Shape(sizes), decision, dtype, n))
        whole.append(Parameter(p.clone()))
        whole[-1].grad = g
        cut.append(Parameter(distribute_tensor(p, mesh, [placement])))
        cut[-1].grad = distribute_tensor(g, mesh, [placement])
    ours, alone = kind(cut, **options), kind(whole, **options, backend="reference")
    for _ in range(3):
        ours.step()
        alone.step()
    assert_same(full(cut), whole)
    states = zip(ours.state.values(), alone.state.values(), strict=True)
    for entry, expected in states:
        for key, value in entry.items():
            assert_same(full([value]), [expected[key]])


def check_cut_parameters_that_are_refused(name: str, mesh: "DeviceMesh") -> None:
    kind, options = PROJECTING[name]
    param = Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    optimizer = kind([param], **options, backend="cpu")
    with pytest.raises(pyoptim.BackendError, match="backend='cpu' cannot add over the processes"):
        optimizer.step()
    recorded = kind([param], **options, differentiable=True)
    with pytest.raises(RuntimeError, match="use differentiable=False"):
        recorded.step()
    sums = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]).requires_grad_()
    sums.grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    with pytest.raises(RuntimeError, match="whose values no process has"):
        kind([sums], **options).step()
    assert not optimizer.state
    assert not recorded.state


def project_shards(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name in PROJECTING:
        for decision in DECISIONS:
            check_projections(name, decision, mesh)
        check_cut_parameters_that_are_refused(name, mesh)
    for kind, options in PROJECTING.values():
        plain, model = make_model(), make_model()
        fully_shard(model, mesh=mesh)
        train(model, kind(model.parameters(), **options), range(4))
        train(plain, kind(plain.parameters(), **options), range(4))
        assert_same(full(model.parameters()), plain.parameters())


def test_projections_of_shards(tmp_path: Path) -> None:
    in_two_processes(project_shards, tmp_path)
