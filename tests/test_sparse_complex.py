"""Sparse gradients where torch's class takes them, and complex parameters everywhere."""

from typing import Any

import pytest
import torch
from dropin import (
    OPTIONS,
    OURS,
    TORCHS,
    assert_same,
    assert_unchanged,
    make_params,
    run,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter

import pyoptim

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


def sparse_grad(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of a (6, 3) gradient as an embedding gives them: unsorted, one of them twice."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 3, dtype=torch.float64, generator=generator).to(dtype)
    return torch.sparse_coo_tensor(torch.tensor([[4, 1, seed % 6, 1]]), values, (6, 3))


SPARSE = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd-maximize": ("SGD", {"lr": 0.1, "maximize": True}),
    "sgd-momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "sgd-nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "adagrad-maximize": ("Adagrad", {"lr": 0.1, "maximize": True}),
}


@pytest.mark.parametrize("is_mixed", [False, True], ids=["alone", "with-dense"])
@pytest.mark.parametrize("case", SPARSE)
def test_sparse_gradients_move_as_in_torch(case: str, is_mixed: bool) -> None:
    name, kwargs = SPARSE[case]
    results = []
    for cls in (OURS[name], TORCHS[name]):
        params = make_params([(6, 3), (5,)][: 1 + is_mixed])
        optimizer = cls(params, **kwargs)
        for step in range(4):
            set_grads(params, step)
            params[0].grad = sparse_grad(step)
            optimizer.step()
        states = [s.to_dense() for p in params for s in optimizer.state.get(p, {}).values()]
        results.append([*params, *states])
    assert_same(*results)


def test_sparse_after_dense_after_sparse() -> None:
    """torch's SGD goes from a dense buffer to sparse gradients, not back; ours does both."""
    results = []
    for is_always_dense in (False, True):
        (param,) = make_params([(6, 3)])
        optimizer = pyoptim.SGD([param], lr=0.1, momentum=0.9)
        for step in range(5):
            grad = sparse_grad(step)
            param.grad = grad.to_dense() if step == 2 or is_always_dense else grad
            optimizer.step()
        results.append([param])
    assert_same(*results)


@pytest.mark.parametrize("case", ["sgd-momentum", "adagrad"])
def test_a_group_added_later_may_start_sparse(case: str) -> None:
    name, kwargs = SPARSE[case]
    results = []
    for cls in (OURS[name], TORCHS[name]):
        dense, late = make_params([(5,), (6, 3)])
        optimizer = cls([dense], **kwargs)
        run(optimizer, [dense], [0])
        optimizer.add_param_group({"params": [late]})
        for step in range(2):
            set_grads([dense], step)
            late.grad = sparse_grad(step)
            optimizer.step()
        results.append([dense, late])
    assert_same(*results)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("Adam", {}),
        ("AdamW", {}),
        ("RMSprop", {}),
        ("Adagrad", {"weight_decay": 0.1}),
        ("SGD", {"weight_decay": 0.1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_with_torchs_words_and_nothing_moves(name: str, kwargs: dict[str, Any]) -> None:
    def attempt(cls: Any, more: dict[str, Any]) -> tuple[type, str]:
        params = make_params([(5,), (6, 3)])
        optimizer = cls(params, **kwargs, **more)
        set_grads(params, 0)
        params[1].grad = sparse_grad(0)
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError) as raised:
            optimizer.step()
        if not more:
            assert_unchanged(optimizer, before)
        return raised.type, str(raised.value)

    (kind, words), (expected_kind, expected) = (
        attempt(OURS[name], {}),
        attempt(TORCHS[name], {"foreach": False}),
    )
    assert kind is expected_kind
    assert words.startswith(expected.rstrip("."))


def test_nesterov_with_a_dense_buffer_is_refused_before_anything_moves() -> None:
    params = make_params([(5,), (6, 3)])
    optimizer = pyoptim.SGD(params, momentum=0.9, nesterov=True)
    run(optimizer, params, [0])
    params[1].grad = sparse_grad(0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"add\(sparse, dense\) is not supported"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_with_a_loss_scale(name: str) -> None:
    results = []
    for cls in (OURS[name], TORCHS[name]):
        (param,) = make_params([(6, 3)], torch.float32)
        optimizer = cls([param], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        scaler.scale(torch.ones(()))
        for step in range(3):
            param.grad = sparse_grad(step, torch.float32) * 16
            scaler.step(optimizer)
            scaler.update()
        results.append([param, param.grad.to_dense()])
    assert_same(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_of_half_parameters_with_float32_state(name: str) -> None:
    params = make_params([(6, 3)], torch.bfloat16)
    kwargs = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = OURS[name](params, lr=0.1, state_dtype=torch.float32, **kwargs)
    expected = make_params([(6, 3)], torch.float32)
    theirs = TORCHS[name](expected, lr=0.1, **kwargs)
    with torch.no_grad():
        expected[0].copy_(params[0])
    for step in range(3):
        params[0].grad = sparse_grad(step, torch.bfloat16)
        expected[0].grad = params[0].grad.float()
        optimizer.step()
        theirs.step()
    assert_same([params[0].float()], expected, rtol=3e-2, atol=3e-2)


# -- complex ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("option", OPTIONS)
def test_complex_parameters_move_as_in_torch(option: str, backend: str, dtype: torch.dtype) -> None:
    name, kwargs = OPTIONS[option]
    params, expected = make_params(dtype=dtype), make_params(dtype=dtype)
    ours = OURS[name](params, **kwargs, backend=backend)
    theirs = TORCHS[name](expected, **kwargs, foreach=False)
    run(ours, params, range(4))
    run(theirs, expected, range(4))
    tolerance = 1e-4 if dtype == torch.complex64 else 1e-11
    assert_same(params, expected, rtol=tolerance, atol=tolerance)
    for p, q in zip(params, expected, strict=True):
        for key, value in theirs.state[q].items():
            torch.testing.assert_close(ours.state[p][key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("option", OPTIONS)
def test_lazily_conjugated_and_negated_gradients(option: str, backend: str) -> None:
    name, kwargs = OPTIONS[option]
    results = []
    for cls, more in ((OURS[name], {"backend": backend}), (TORCHS[name], {"foreach": False})):
        complex_one, real_one = make_params([(4, 5)], torch.complex128)[0], make_params([(4, 5)])[0]
        optimizer = cls([complex_one, real_one], **kwargs, **more)
        for step in range(4):
            source = make_params([(4, 5)], torch.complex128, seed=step)[0].detach()
            is_lazy = step != 2  # resolved once, so that a plan meets the lazy ones too
            complex_one.grad = source.conj() if is_lazy else source.conj().resolve_conj()
            real_one.grad = source.conj().imag if is_lazy else source.conj().imag.resolve_neg()
            assert complex_one.grad.is_conj() == real_one.grad.is_neg() == is_lazy
            if more != {"backend": backend}:  # torch's for-loop refuses most of the lazy ones
                complex_one.grad = complex_one.grad.resolve_conj()
            optimizer.step()
        results.append([complex_one, real_one])
    assert_same(*results)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_lazily_conjugated_parameter(backend: str) -> None:
    """torch's SGD takes one; its memory is not its value."""
    results = []
    for cls, more in ((pyoptim.SGD, {"backend": backend}), (torch.optim.SGD, {"foreach": False})):
        source = make_params([(4, 5)], torch.complex128)[0].detach()
        param = Parameter(source.conj())
        assert param.is_conj()
        optimizer = cls([param], lr=0.1, momentum=0.9, **more)
        run(optimizer, [param], range(3))
        results.append([source, param.resolve_conj()])
    assert_same(*results)
