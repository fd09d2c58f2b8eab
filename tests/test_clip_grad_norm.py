"""clip_grad_norm_ in place of torch's."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import COMPUTE_UNIT, FLOATS, TINY, UNIT, assert_same_bits, parametrize_dtypes, values
from test_norms import placed
from torch import Tensor, distributed
from torch.nn import Parameter

import pyoptim
from pyoptim import backend, clip_grad_norm_, reductions
from pyoptim.norms import clip_factor

SHAPES = ((30, 40), (), (7,), (3, 5, 2, 2), (20_000,))
NORMS = (2.0, 1.0, math.inf)
DTYPES = (*FLOATS, torch.complex64, torch.complex128)
parametrize_norms = pytest.mark.parametrize("norm_type", NORMS)


def params_with(grads: Sequence[Tensor]) -> list[Parameter]:
    params = [Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def params_of(dtype: torch.dtype, engine: str = "cpu", shapes: Any = SHAPES) -> list[Parameter]:
    return params_with([placed(values(s, dtype, i), engine) for i, s in enumerate(shapes)])


def grads_of(params: Sequence[Tensor]) -> list[Tensor]:
    grads = [p.grad for p in params]
    assert all(grad is not None for grad in grads)
    return [grad.clone() for grad in grads if grad is not None]


# -- values ----------------------------------------------------------------------------------------


@parametrize_norms
@parametrize_dtypes(DTYPES)
def test_gradients_and_norm_are_torchs(engine: str, dtype: torch.dtype, norm_type: float) -> None:
    """torch's norm and factor are numbers of the gradients' dtype, ours are float64.

    Its norm of n terms may be off by n roundings of the type it adds in and by one of its own
    dtype; norm, factor and product are rounded once more each.
    """
    ours, torchs = params_of(dtype, engine), params_of(dtype, engine)
    found = clip_grad_norm_(ours, 3.0, norm_type, backend=engine)
    expected = torch.nn.utils.clip_grad_norm_(torchs, 3.0, norm_type)
    n_terms = sum(p.numel() for p in ours)
    rtol = n_terms * COMPUTE_UNIT[dtype] + 8 * UNIT[dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=0)
    for a, b in zip(grads_of(ours), grads_of(torchs), strict=True):
        atol = 2 * TINY.get(dtype, 0.0)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m: f"{norm_type}: {m}")


@parametrize_norms
@parametrize_dtypes(FLOATS)
def test_gradients_are_scaled_in_the_arithmetic_of_their_dtype(
    engine: str, dtype: torch.dtype, norm_type: float
) -> None:
    """To the bit: the float64 factor, rounded to the type of the arithmetic, one product."""
    params = params_of(dtype, engine)
    before = grads_of(params)
    norm = pyoptim.total_norm(before, norm_type, backend=engine).item()
    clip_grad_norm_(params, 0.7, norm_type, backend=engine)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.tensor(0.7 / (norm + 1e-6), dtype=compute).to(before[0].device)
    assert_same_bits(grads_of(params), [(g.to(compute) * factor).to(dtype) for g in before])


def test_a_norm_within_the_limit_changes_no_bit(engine: str) -> None:
    special = [-0.0, 2.0**-149, 1.0, -2.5]
    params = params_with([placed(torch.tensor(special), engine)])
    assert clip_grad_norm_(params, 10.0, backend=engine).item() == pytest.approx(7.25**0.5)
    assert_same_bits(grads_of(params), [placed(torch.tensor(special), engine)])


def test_unusual_layouts_are_clipped_too(engine: str) -> None:
    """As the same values in one piece."""
    wide = placed(values((4, 6, 5, 8), torch.float32, 1), engine)
    buffer = placed(values((500,), torch.float32, 2), engine)
    grads = [
        wide.contiguous(memory_format=torch.channels_last),
        wide.clone().transpose(0, 2),
        placed(values((30, 20), torch.float32, 3), engine)[::2, ::3],
        buffer[1:100],
        buffer[100:101],
        placed(values((40,), torch.complex64, 5), engine).conj(),
        placed(torch.zeros(0), engine),
    ]
    plain = [g.resolve_conj().contiguous().clone() for g in grads]
    found = clip_grad_norm_(params_with(grads), 1.0, backend=engine)
    expected = clip_grad_norm_(params_with(plain), 1.0, backend=engine)
    torch.testing.assert_close(found, expected, rtol=2.0**-24, atol=0)
    for a, b in zip(grads, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-23, atol=0)
    assert buffer[0] == values((500,), torch.float32, 2)[0]
    assert torch.equal(buffer[101:].cpu(), values((500,), torch.float32, 2)[101:])


def test_gradients_of_several_dtypes_have_one_norm(engine: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    grads = [placed(values((50,), d, i), engine) for i, d in enumerate(dtypes)]
    before = torch.cat([g.double() for g in grads])
    norm = clip_grad_norm_(params_with(grads), 0.25, backend=engine)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(before.norm().item(), rel=1e-14)
    for i, grad in enumerate(grads):
        expected = before[50 * i : 50 * (i + 1)] * 0.25 / norm
        torch.testing.assert_close(
            grad.double(), expected, rtol=1e-5 + 2 * UNIT[grad.dtype], atol=2 * TINY[grad.dtype]
        )


def test_gradients_with_common_memory_are_scaled_as_often_as_given(engine: str) -> None:
    """As torch does."""
    ours, torchs = (placed(values((60_000,), torch.float32, 1), engine) for _ in range(2))
    clip_grad_norm_(params_with([ours, ours, ours[100:500]]), 1.0, backend=engine)
    torch.nn.utils.clip_grad_norm_(params_with([torchs, torchs, torchs[100:500]]), 1.0)
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=0)
    [param] = params_with([placed(torch.tensor([3.0, 4.0]), engine)])
    assert clip_grad_norm_([param, param], 1.0, backend=engine).item() == pytest.approx(50**0.5)
    assert param.grad is not None
    assert param.grad.tolist() == pytest.approx([3 / 50, 4 / 50], rel=1e-5)


def test_only_gradients_without_common_memory_are_scaled_side_by_side(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A race would show too rarely to test for its results."""
    kernel = reductions._ENGINES[engine]
    scale, calls = kernel._scale, []

    def counted(self: Any, spans: Any, factor: Any) -> None:
        calls.append(len(spans.ends(True)))
        scale(self, spans, factor)

    monkeypatch.setattr(kernel, "_scale", counted)
    flat = placed(torch.ones(100), engine)
    clip_grad_norm_(params_with([flat[50:], flat[:50], flat[:0]]), 1.0, backend=engine)
    clip_grad_norm_(params_with([flat[50:], flat[:51]]), 1.0, backend=engine)
    assert calls == [3, 1, 1]


# -- NaN and infinity ------------------------------------------------------------------------------


@parametrize_norms
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
def test_what_is_not_finite_spreads_as_in_torch(
    engine: str, special: float, norm_type: float
) -> None:
    ours, torchs = params_of(torch.float32, engine), params_of(torch.float32, engine)
    for params in (ours, torchs):
        grad = params[0].grad
        assert grad is not None
        grad[2, 3] = special
    found = clip_grad_norm_(ours, 1.0, norm_type, backend=engine)
    expected = torch.nn.utils.clip_grad_norm_(torchs, 1.0, norm_type)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    for a, b in zip(grads_of(ours), grads_of(torchs), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


@parametrize_norms
@pytest.mark.parametrize("special", [math.nan, math.inf], ids=["nan", "inf"])
def test_error_if_nonfinite_raises_and_changes_nothing(
    engine: str, special: float, norm_type: float
) -> None:
    params = params_of(torch.bfloat16, engine)
    grad = params[-1].grad
    assert grad is not None
    grad[-1] = special
    before = grads_of(params)
    with pytest.raises(RuntimeError, match="from `parameters` is non-finite"):
        clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True, backend=engine)
    assert_same_bits(grads_of(params), before)
    assert grad._version == 1
    clip_grad_norm_(params[:-1], 1.0, norm_type, error_if_nonfinite=True, backend=engine)


# -- what is given and returned --------------------------------------------------------------------


@parametrize_dtypes(DTYPES)
@pytest.mark.parametrize("choice", [pytest.param("cpu", marks=pytest.mark.native), "reference"])
def test_the_norm_is_a_scalar_of_float32_unless_gradients_are_float64(
    choice: str, dtype: torch.dtype
) -> None:
    wide = dtype in (torch.float64, torch.complex128)
    for norm_type in NORMS:
        norm = clip_grad_norm_(params_of(dtype), 1.0, norm_type, backend=choice)
        assert norm.dtype == (torch.float64 if wide else torch.float32)
        assert (norm.shape, norm.requires_grad) == ((), False)


def test_a_tensor_an_iterator_and_a_generator_are_taken() -> None:
    given: list[Any] = [params_of(torch.float32) for _ in range(4)]
    norms = [
        clip_grad_norm_(given[0], 1.0),
        clip_grad_norm_(iter(given[1]), 1.0),
        clip_grad_norm_((p for p in given[2]), 1.0),
        clip_grad_norm_(tuple(given[3]), 1.0),
    ]
    assert len({norm.item() for norm in norms}) == 1
    for params in given[1:]:
        assert_same_bits(grads_of(params), grads_of(given[0]))
    lone = params_with([torch.tensor([3.0, 4.0])])[0]
    assert clip_grad_norm_(lone, 1.0).item() == 5.0
    module = torch.nn.Linear(2, 1)
    module(torch.ones(2)).sum().backward()
    assert clip_grad_norm_(module.parameters(), 1.0).item() == pytest.approx(3**0.5)


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_without_gradients_the_norm_is_zero(choice: str) -> None:
    for params in ([], [Parameter(torch.ones(2))]):
        norm = clip_grad_norm_(params, 1.0, error_if_nonfinite=True, backend=choice)
        assert_same_bits([norm], [torch.nn.utils.clip_grad_norm_(params, 1.0)])
    skipped = [*params_with([torch.tensor([3.0, 4.0])]), Parameter(torch.ones(2))]
    assert clip_grad_norm_(skipped, 1.0, backend=choice).item() == 5.0


def test_an_empty_generator_warns_as_in_torch() -> None:
    with pytest.warns(UserWarning, match="`parameters` is an empty generator") as warned:
        clip_grad_norm_((p for p in []), 1.0)
    assert warned[0].filename == __file__


def test_autograd_notices_that_gradients_were_scaled(engine: str) -> None:
    grad = placed(torch.tensor([3.0, 4.0]), engine)
    weight = placed(torch.ones(2), engine).requires_grad_()
    product = (grad * weight).sum()  # its backward needs grad as it is now
    clip_grad_norm_(params_with([grad]), 1.0, backend=engine)
    assert grad._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_gradients_that_require_grad_are_scaled(engine: str) -> None:
    param = Parameter(placed(torch.tensor([1.0, 2.0]), engine))
    [param.grad] = torch.autograd.grad((param**3).sum(), param, create_graph=True)
    assert param.grad.requires_grad
    clip_grad_norm_(param, 1.0, backend=engine)
    assert param.grad.norm().item() == pytest.approx(1.0, rel=1e-6)


def test_inference_tensors_are_scaled_in_inference_mode_only(engine: str) -> None:
    with torch.inference_mode():
        [param] = params_with([placed(torch.tensor([3.0, 4.0]), engine)])
    with pytest.raises(RuntimeError, match="outside InferenceMode is not allowed"):
        clip_grad_norm_([param], 1.0, backend=engine)
    assert param.grad is not None
    assert param.grad.tolist() == [3.0, 4.0]
    with torch.inference_mode():
        clip_grad_norm_([param], 1.0, backend=engine)
    assert param.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


def test_a_gradient_whose_elements_overlap_raises_and_changes_nothing(engine: str) -> None:
    params = params_with([placed(torch.ones(4), engine), placed(torch.ones(1), engine).expand(3)])
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        clip_grad_norm_(params, 1.0, backend=engine)
    assert grads_of(params)[0].tolist() == [1.0] * 4


# -- what torch does -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [3.0, 0.5, -math.inf])
def test_other_norms_are_torchs(norm_type: float) -> None:
    ours, torchs = params_of(torch.bfloat16), params_of(torch.bfloat16)
    found = clip_grad_norm_(ours, 0.5, norm_type)
    assert_same_bits([found], [torch.nn.utils.clip_grad_norm_(torchs, 0.5, norm_type)])
    assert_same_bits(grads_of(ours), grads_of(torchs))


def test_meta_tensors_are_left_to_torch() -> None:
    params = params_with([torch.ones(3, device="meta"), torch.ones(2, device="meta")])
    norm = clip_grad_norm_(params, 1.0, foreach=False)
    assert (norm.device.type, norm.shape) == ("meta", ())


def test_sparse_gradients_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def torchs(*args: Any) -> Tensor:
        given.append(args)
        return torch.tensor(7.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", torchs)
    params = params_with([torch.ones(2), torch.eye(2).to_sparse()])
    assert clip_grad_norm_(params, 2.0, 1.0, True, False).item() == 7.0
    assert given == [(params, 2.0, 1.0, True, False)]


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this build of torch has no gloo",
)
def test_dtensor_gradients_are_left_to_torch(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = params_of(torch.float32, shapes=((6, 4), (5,)))
        ours, torchs = (
            params_with([distribute_tensor(g, mesh, [Shard(0)]) for g in grads_of(plain)])
            for _ in range(2)
        )
        norms = [clip_grad_norm_(ours, 0.5), torch.nn.utils.clip_grad_norm_(torchs, 0.5)]
        assert all(isinstance(norm, DTensor) for norm in norms)
        assert_same_bits(*([norm.full_tensor()] for norm in norms))  # type: ignore[attr-defined]
        for a, b in zip(grads_of(ours), grads_of(torchs), strict=True):
            assert_same_bits([a.full_tensor()], [b.full_tensor()])  # type: ignore[attr-defined]
        truth = torch.cat([g.flatten() for g in grads_of(plain)]).double().norm()
        [factor] = clip_factor(
            [distribute_tensor(g, mesh, [Shard(0)]) for g in grads_of(plain)], 0.5
        ).values()
        assert float(factor) == pytest.approx(0.5 / (truth.item() + 1e-6), rel=1e-12)
    finally:
        distributed.destroy_process_group()


@pytest.mark.native
def test_a_backend_asked_for_by_name_does_it_or_raises() -> None:
    dense, sparse = torch.ones(2), torch.eye(2).to_sparse()
    with pytest.raises(pyoptim.BackendError, match="backend='cpu' cannot read a Tensor of layout"):
        clip_grad_norm_(params_with([dense, sparse]), 0.5, backend="cpu")
    with pytest.raises(pyoptim.BackendError, match=r"no kernel for norm_type=3\.0"):
        clip_grad_norm_(params_with([dense]), 0.5, 3.0, backend="cpu")
    with pytest.raises(ValueError, match="backend must be one of"):
        clip_grad_norm_(params_with([dense]), 0.5, backend="gpu")
    assert dense.tolist() == [1.0, 1.0]
    with pyoptim.use_backend("reference"):
        assert reductions.batches([dense], 2.0, backend.chosen())[0].is_plain


@pytest.mark.native
@parametrize_norms
@parametrize_dtypes(FLOATS)
def test_the_reference_differs_by_the_last_place_of_the_norm_only(
    dtype: torch.dtype, norm_type: float
) -> None:
    """Which may move a gradient by one rounding of its dtype."""
    ours, plain = params_of(dtype), params_of(dtype)
    found = clip_grad_norm_(ours, 0.5, norm_type)
    expected = clip_grad_norm_(plain, 0.5, norm_type, backend="reference")
    torch.testing.assert_close(found, expected, rtol=2.0**-23, atol=0)
    for a, b in zip(grads_of(ours), grads_of(plain), strict=True):
        rtol = 2 * UNIT[dtype] + 64 * UNIT[torch.float64]
        torch.testing.assert_close(a, b, rtol=rtol, atol=2 * TINY[dtype])


def test_it_can_be_called_in_compiled_code() -> None:
    param = params_with([torch.tensor([3.0, 4.0])])[0]
    compiled = torch.compile(lambda p: clip_grad_norm_(p, 1.0) * 2, backend="eager")
    assert compiled(param).item() == 10.0
    assert param.grad is not None
    assert param.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
