"""Norms and row sums: to the bit those of csrc/reduce/order.hpp, on every engine."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from cases import FLOATS, examples, parametrize_dtypes, values
from engines import GPU
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import pyoptim
from pyoptim import backend, reductions
from pyoptim.norms import clip_factor

Array = NDArray[np.float64]
LANES, CHUNK = 1024, 16 * 1024
NORMS = (2.0, 1.0, math.inf)
# Nothing; less than a vector; around vectors, lanes and chunks; more than one task of 64 Ki.
EDGES = (0, 1, 2, 3, 7, 8, 9, 33, 513, 1023, 1024, 1025, 2049, 16383, 16384, 16385, 70001)
# Sums over a tree are so exact that another tree often gives the same bits: many of them tell.
SIZES = (*EDGES, *range(1100, 3100, 100))

parametrize_norms = pytest.mark.parametrize("norm_type", NORMS)


def placed(tensor: Tensor, engine: str) -> Tensor:
    """On the device that the engine runs on; emulators and interpreters run on the CPU."""
    return tensor.to(GPU) if engine in backend.GPU_ENGINES else tensor


# -- the canonical order, once more ----------------------------------------------------------------


def _larger(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a), a, np.where(b <= a, a, b))


def fold(terms: Array, add: Callable[[Array, Array], Array] = np.add) -> float:
    lanes = np.zeros(LANES)
    for start in range(0, len(terms), LANES):
        row = terms[start : start + LANES]
        lanes[: len(row)] = add(lanes[: len(row)], row)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = add(lanes[:half], lanes[half:])
    return float(lanes[0])


def chunk_sums(terms: Array, add: Callable[[Array, Array], Array] = np.add) -> list[float]:
    return [fold(terms[i : i + CHUNK], add) for i in range(0, len(terms), CHUNK)]


def norm_of(arrays: Sequence[Array], norm_type: float) -> float:
    """The norm of float64 arrays, one partial result per chunk of each."""
    add = _larger if norm_type == math.inf else np.add
    with np.errstate(over="ignore", invalid="ignore"):
        terms = [x * x if norm_type == 2 else np.abs(x) for x in arrays]
        partials = [p for t in terms for p in chunk_sums(t, add)]
        result = fold(np.array(partials), add)
    return math.sqrt(result) if norm_type == 2 else result


def products_of(a: Array, b: Array) -> list[float]:
    return [fold(np.array(chunk_sums(terms))) for terms in (a * b, a * a, b * b)]


def in_memory_order(tensor: Tensor) -> Array:
    """The elements of a dense tensor as they lie in memory, in float64."""
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
    return flat.cpu().double().numpy()


def bits(value: float) -> str:
    return float(value).hex()


def assert_norms(
    tensors: Sequence[Tensor], arrays: Sequence[Array], norm_type: float, engine: str
) -> None:
    """Bit-equal norms; NaN is NaN."""
    each = pyoptim.tensor_norms(tensors, norm_type, backend=engine)
    total = pyoptim.total_norm(tensors, norm_type, backend=engine)
    assert (each.dtype, total.dtype) == (torch.float64, torch.float64)
    assert (each.shape, total.shape) == ((len(tensors),), ())
    assert [bits(x) for x in each.tolist()] == [bits(norm_of([x], norm_type)) for x in arrays]
    assert bits(total.item()) == bits(norm_of(arrays, norm_type))


def spread(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Values of many magnitudes, whose sums round at nearly every addition."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-9, 10, tuple(shape), generator=generator)
    return (values(shape, torch.float64, seed) * 2.0**exponents).to(dtype)


# -- norms -----------------------------------------------------------------------------------------


@parametrize_norms
@parametrize_dtypes(FLOATS)
def test_norms_are_those_of_the_canonical_order(
    engine: str, dtype: torch.dtype, norm_type: float
) -> None:
    tensors = [placed(spread((n,), dtype, n), engine) for n in SIZES]
    assert_norms(tensors, [in_memory_order(t) for t in tensors], norm_type, engine)


def _neighbours(terms: Array) -> float:
    """The canonical lanes under another tree."""
    lanes = np.pad(terms, (0, -len(terms) % LANES)).reshape(-1, LANES).cumsum(0)[-1]
    while len(lanes) > 1:
        lanes = lanes[0::2] + lanes[1::2]
    return float(lanes[0])


def _narrower(terms: Array) -> float:
    """The canonical tree over half as many lanes."""
    lanes = np.pad(terms, (0, -len(terms) % 512)).reshape(-1, 512).cumsum(0)[-1]
    return fold(lanes)


@pytest.mark.parametrize(
    "other",
    [_neighbours, _narrower, lambda terms: float(np.sum(terms)), math.fsum],
    ids=["neighbours", "512_lanes", "numpy", "exact"],
)
def test_the_values_can_tell_one_order_from_another(other: Callable[[Array], float]) -> None:
    """Sums of one chunk, as the test above compares them."""
    terms = [spread((n,), torch.float64, n).abs().numpy() for n in SIZES if 1024 < n <= CHUNK]
    assert [bits(other(t)) for t in terms] != [bits(fold(t)) for t in terms]
    assert [other(t) for t in terms] == pytest.approx([fold(t) for t in terms], rel=1e-14)


def test_the_values_can_tell_chunks_from_a_single_one() -> None:
    """Each row sum below is such a sum, of terms of both signs."""
    pairs = [[spread((40_000,), torch.float32, seed) for seed in (n, n + 1)] for n in range(9)]
    terms = [(a.double() * b.double()).numpy() for a, b in pairs]
    assert [bits(fold(t)) for t in terms] != [bits(fold(np.array(chunk_sums(t)))) for t in terms]


@pytest.mark.native
@parametrize_dtypes(FLOATS)
def test_norms_do_not_depend_on_threads_or_instruction_set(dtype: torch.dtype) -> None:
    native = backend.native()
    assert native is not None
    tensors = [spread((n,), dtype, n) for n in (*EDGES, 200_003)]
    arrays = [in_memory_order(t) for t in tensors]
    for isa in native.isas():
        native.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for norm_type in NORMS:
                assert_norms(tensors, arrays, norm_type, "cpu")


@pytest.mark.native
@given(
    sizes=st.lists(st.integers(0, 2600), min_size=1, max_size=6),
    offset=st.integers(0, 5),
    dtype=st.sampled_from(FLOATS),
    norm_type=st.sampled_from(NORMS),
    exponent=st.integers(-20, 14),
    special=st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan]),
)
@examples(60)
def test_norms_of_any_sizes_and_values(
    sizes: list[int],
    offset: int,
    dtype: torch.dtype,
    norm_type: float,
    exponent: int,
    special: float,
) -> None:
    tensors = []
    for i, n in enumerate(sizes):
        tensor = (values((n + offset,), torch.float64, i) * 2.0**exponent).to(dtype)[offset:]
        tensor[n // 2 : n // 2 + 1] = special
        tensors.append(tensor)
    assert_norms(tensors, [in_memory_order(t) for t in tensors], norm_type, "cpu")


@parametrize_norms
def test_norms_are_the_true_norms(engine: str, norm_type: float) -> None:
    """Exact sums as the truth; the terms are positive, so relative errors do not grow.

    Roundings: the product, 16 additions in a lane, 10 of the tree, 1 + 10 over 5 chunks, the root.
    """
    x = placed(values((70001,), torch.float64, 3), engine)
    terms = [abs(v) for v in x.tolist()]
    truth = {
        2.0: math.sqrt(math.fsum(v * v for v in terms)),
        1.0: math.fsum(terms),
        math.inf: max(terms),
    }[norm_type]
    assert pyoptim.total_norm(x, norm_type, backend=engine).item() == pytest.approx(
        truth, rel=40 * 2.0**-53, abs=0
    )


@parametrize_norms
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@parametrize_dtypes(FLOATS)
def test_nan_and_infinity_reach_the_norm(
    engine: str, dtype: torch.dtype, special: float, norm_type: float
) -> None:
    for n, at in ((1, 0), (40, 39), (17000, 3), (17000, 16999), (3000, 2100)):
        x = values((n,), dtype, 0)
        x[at] = special
        norm = pyoptim.total_norm([placed(x, engine), placed(x[:0], engine)], norm_type).item()
        assert bits(norm) == bits(abs(special)), (n, at)


def test_huge_and_tiny_values(engine: str) -> None:
    """Squares overflow and underflow in float64, as in torch."""
    huge = placed(torch.tensor([1e200, 1.0], dtype=torch.float64), engine)
    assert pyoptim.total_norm(huge, backend=engine).item() == math.inf
    assert pyoptim.total_norm(huge, 1.0, backend=engine).item() == 1e200
    tiny = placed(torch.tensor([2.0**-149, 2.0**-149]), engine)  # subnormal in float32
    assert pyoptim.total_norm(tiny, 1.0, backend=engine).item() == 2.0**-148
    assert pyoptim.total_norm(tiny, math.inf, backend=engine).item() == 2.0**-149
    large = placed(torch.full((4,), 3e38), engine)  # the square is no float32
    assert pyoptim.total_norm(large, backend=engine).item() == 2 * float(np.float32(3e38))


def test_dense_tensors_are_read_in_memory_order(engine: str) -> None:
    images = placed(values((4, 30, 9, 8), torch.float32, 1), engine)
    tensors = [
        images.contiguous(memory_format=torch.channels_last),
        placed(values((50, 70), torch.float32, 2), engine).t(),
        images.permute(1, 3, 0, 2),
        placed(torch.tensor(3.5), engine),
        images.flatten()[1:],
    ]
    for norm_type in NORMS:
        assert_norms(tensors, [in_memory_order(t) for t in tensors], norm_type, engine)


def test_tensors_with_gaps_are_copied_first(engine: str) -> None:
    x = placed(values((90, 70), torch.float32, 2), engine)
    tensors = [x[::2, ::3], x[:, 1:], x[:1].expand(5, 70), x]
    arrays = [in_memory_order(t.contiguous()) for t in tensors]
    for norm_type in NORMS:
        assert_norms(tensors, arrays, norm_type, engine)


@pytest.mark.native
def test_memory_that_is_not_aligned_to_its_elements() -> None:
    x = values((1500,), torch.float32, 2)
    moved = torch.frombuffer(bytearray(b"." + x.numpy().tobytes()), dtype=torch.float32, offset=1)
    assert moved.data_ptr() % 4 != 0
    native = backend.native()
    assert native is not None
    assert native.Spans([moved], True).unfit == [0]  # a GPU cannot read it in place
    assert_norms([moved], [in_memory_order(x)], 2.0, "cpu")


@pytest.mark.native
@pytest.mark.parametrize("access", ["libtorch symbols", "dlpack"])
def test_both_ways_to_tensors_give_the_same(access: str) -> None:
    native = backend.native()
    assert native is not None
    if access == "dlpack":
        native.use_symbols(0)
    if native.access_path() != access:
        pytest.skip("libtorch's symbols are not in use here")
    x = torch.nn.Parameter(values((2000,), torch.bfloat16, 2))
    assert_norms([x], [in_memory_order(x.detach())], 2.0, "cpu")
    a, b = x.detach().reshape(40, 50), values((40, 50), torch.bfloat16, 3)
    assert_row_sums(a, b, "cpu")
    x.grad = x.detach().clone()
    torch.nn.utils.clip_grad_norm_([expected := x.grad.clone().requires_grad_()], 1.0)
    version = x.grad._version
    pyoptim.clip_grad_norm_([x], 1e-3, backend="cpu")
    assert x.grad._version == version + 1
    assert not torch.equal(x.grad, expected)


@parametrize_norms
def test_complex_numbers(engine: str, norm_type: float) -> None:
    """Two elements for the 2-norm; their magnitudes otherwise."""
    z = placed(values((700, 3), torch.complex64, 4), engine)
    whole, lazy = z[:, :2].conj().contiguous(), z[:, :2].conj()
    wide = z[:, :2].cpu().numpy().astype(np.complex128)
    parts = np.ascontiguousarray(wide).view(np.float64).ravel()
    magnitudes = np.hypot(wide.real, wide.imag).ravel()
    array = parts if norm_type == 2 else magnitudes
    for tensor in (whole, lazy):
        found = pyoptim.total_norm(tensor, norm_type, backend=engine).item()
        # hypot is not correctly rounded: 1 ulp for each term.
        assert found == pytest.approx(norm_of([array], norm_type), rel=2.0**-52, abs=0)


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_nothing_has_norm_zero(choice: str) -> None:
    assert pyoptim.total_norm([], backend=choice).tolist() == 0.0
    assert pyoptim.tensor_norms([], backend=choice).tolist() == []
    empty = [torch.zeros(0), torch.zeros(3, 0)]
    for norm_type in NORMS:
        assert pyoptim.total_norm(empty, norm_type, backend=choice).tolist() == 0.0
        assert pyoptim.tensor_norms(empty, norm_type, backend=choice).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("norm_type", [*NORMS, 3.0, 0.5])
@parametrize_dtypes((*FLOATS, torch.complex64))
def test_the_reference_agrees(dtype: torch.dtype, norm_type: float) -> None:
    """Two float64 sums of 3000 positive terms, in whatever order: 3000 roundings at most."""
    tensors = [values((n,), dtype, n) for n in (5, 0, 2995)]
    for function in (pyoptim.total_norm, pyoptim.tensor_norms):
        found = function(tensors, norm_type)
        expected = function(tensors, norm_type, backend="reference")
        torch.testing.assert_close(found, expected, rtol=3000 * 2.0**-53, atol=0)


def test_a_norm_carries_no_gradient_and_changes_nothing() -> None:
    x = torch.ones(5, requires_grad=True)
    norms = [pyoptim.total_norm(x), pyoptim.tensor_norms([x]), pyoptim.row_sums(x, x)]
    assert not any(norm.requires_grad for norm in norms)
    assert x._version == 0
    with torch.inference_mode():
        assert pyoptim.total_norm(torch.ones(4)).item() == 2.0


def test_a_generator_and_a_lone_tensor_are_taken() -> None:
    assert pyoptim.total_norm(torch.ones(2, 2)).item() == 2.0
    assert pyoptim.tensor_norms(torch.full((n,), 2.0) for n in (1, 4)).tolist() == [2.0, 4.0]


def test_norms_over_several_batches() -> None:
    """As tensors of several devices are put together."""
    parts = [values((n,), torch.float32, n) for n in (900, 40)]
    for norm_type in (*NORMS, 3.0):
        batches = [reductions.batches([x], norm_type, "auto")[0] for x in parts]
        found = reductions.total(batches, norm_type)
        expected = torch.linalg.vector_norm(torch.cat(parts).double(), norm_type)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_tensors_that_no_kernel_reads() -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 3]]), torch.tensor([1.0, 2.0, 4.0]), (5,), check_invariants=True
    )
    assert pyoptim.total_norm([sparse]).item() == 5.0
    found = pyoptim.tensor_norms([sparse, torch.full((4,), 6.0)])
    assert found.tolist() == [5.0, 12.0]


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(TypeError, match=r"tensor 1 is a float; give torch\.Tensor"):
        pyoptim.total_norm([torch.ones(1), 2.0])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"tensor 0 has dtype torch\.int64"):
        pyoptim.tensor_norms([torch.ones(1, dtype=torch.int64)])
    with pytest.raises(ValueError, match="backend must be one of"):
        pyoptim.total_norm(torch.ones(1), backend="gpu")


@pytest.mark.native
def test_a_backend_that_was_asked_for_takes_the_tensors_or_raises() -> None:
    sparse = torch.eye(2).to_sparse()
    with pytest.raises(pyoptim.BackendError, match="'cpu' cannot read a Tensor of layout"):
        pyoptim.total_norm(sparse, backend="cpu")
    with pytest.raises(pyoptim.BackendError, match=r"no kernel for norm_type=3\.0"):
        pyoptim.total_norm(torch.ones(2), 3.0, backend="cpu")
    with pytest.raises(pyoptim.BackendError):
        pyoptim.total_norm(torch.ones(2, device="meta"), backend="cpu")


@pytest.mark.native
def test_native_spans_refuse_what_they_cannot_read() -> None:
    native = backend.native()
    assert native is not None
    spans = native.Spans([torch.ones(3), torch.ones(4, 4)[:, ::2], torch.ones(2, 2).t()], True)
    assert spans.unfit == [1]
    scratch = torch.empty(8, dtype=torch.float64)
    with pytest.raises(ValueError, match="unfit"):
        spans.norms(0, False, scratch, scratch, None)
    fit = native.Spans([torch.ones(3)], True)
    with pytest.raises(ValueError, match="results must be a dense float64 tensor"):
        fit.norms(0, False, scratch, torch.empty(1), None)
    with pytest.raises(ValueError, match="partials must be a dense float64 tensor of at least 1"):
        fit.norms(0, False, scratch[:0], scratch, None)
    with pytest.raises(TypeError, match=r"tensors\[1\] is a int"):
        native.Spans([torch.ones(1), 3], True)


# -- row sums --------------------------------------------------------------------------------------


def rows_in_memory_order(tensor: Tensor) -> list[Array]:
    """The elements of every row of a dense tensor by address."""
    outermost_first = sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)
    return list(tensor.permute(0, *outermost_first).flatten(1).cpu().double().numpy())


def assert_row_sums(a: Tensor, b: Tensor, engine: str) -> None:
    sums = pyoptim.row_sums(a, b, backend=engine)
    assert (sums.dtype, sums.shape) == (torch.float64, (len(a), 3))
    rows = zip(rows_in_memory_order(a), rows_in_memory_order(b), strict=True)
    assert sums.tolist() == [products_of(p, q) for p, q in rows]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "middle": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@parametrize_dtypes(FLOATS)
def test_row_sums_of_every_layout(engine: str, dtype: torch.dtype, layout: str) -> None:
    for shape in ((5, 3, 2, 7), (1, 4, 3, 2), (40, 10, 9, 12), (3, 1, 1, 1)):
        a, b = (LAYOUTS[layout](placed(values(shape, dtype, seed), engine)) for seed in (1, 2))
        assert_row_sums(a, b, engine)


def test_row_sums_of_long_rows(engine: str) -> None:
    for n in (CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77):
        a, b = (placed(spread((3, n), torch.float32, seed), engine) for seed in (1, 2))
        assert_row_sums(a, b, engine)
        assert_row_sums(*(x.t().contiguous().t() for x in (a, b)), engine)


@pytest.mark.native
def test_row_sums_do_not_depend_on_threads_or_instruction_set() -> None:
    native = backend.native()
    assert native is not None
    shapes = ((300, 130), (3, 40_000))
    pairs = [(spread(s, torch.float32, 1), spread(s, torch.float32, 2)) for s in shapes]
    for isa in native.isas():
        native.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for a, b in pairs:
                assert_row_sums(a, b, "cpu")


def test_row_sums_of_few_dimensions_and_of_nothing(engine: str) -> None:
    point = placed(torch.tensor(-3.0), engine)
    assert pyoptim.row_sums(point, -point, backend=engine).tolist() == [[-9.0, 9.0, 9.0]]
    line = placed(torch.tensor([2.0, math.nan, -math.inf]), engine)
    found = pyoptim.row_sums(line, line.nan_to_num(1.0, 0.0, 4.0), backend=engine)
    truth = [[4.0, 4.0, 4.0], [math.nan, math.nan, 1.0], [-math.inf, math.inf, 16.0]]
    torch.testing.assert_close(found.tolist(), truth, equal_nan=True, rtol=0, atol=0)
    for shape in ((0, 3), (2, 0), (0,)):
        empty = placed(torch.zeros(shape), engine)
        assert pyoptim.row_sums(empty, empty, backend=engine).tolist() == [[0.0] * 3] * shape[0]


def test_row_sums_of_unlike_layouts_and_of_complex_numbers(engine: str) -> None:
    a, b = (placed(values((6, 50), torch.float32, seed), engine) for seed in (1, 2))
    expected = pyoptim.row_sums(a, b, backend=engine)
    assert torch.equal(pyoptim.row_sums(a, b.t().contiguous().t(), backend=engine), expected)
    gapped = torch.cat([a, a], 1)[:, :50]
    assert torch.equal(pyoptim.row_sums(gapped, b, backend=engine), expected)
    z, w = (x.view(torch.complex64) for x in (a, b))
    assert torch.equal(pyoptim.row_sums(z, w, backend=engine), expected)
    assert torch.equal(
        pyoptim.row_sums(z.conj(), w.conj().resolve_conj(), backend=engine), expected
    )


def test_row_sums_of_the_reference_agree() -> None:
    a, b = (values((6, 5, 40), torch.float32, seed) for seed in (1, 2))
    expected = pyoptim.row_sums(a, b, backend="reference")
    torch.testing.assert_close(pyoptim.row_sums(a, b), expected, rtol=1e-13, atol=1e-13)
    point = torch.tensor(2.0)
    assert pyoptim.row_sums(point, point, backend="reference").tolist() == [[4.0, 4.0, 4.0]]


@pytest.mark.parametrize(
    ("b", "what"),
    [
        (torch.ones(3, 2), "shape"),
        (torch.ones(2, 3, dtype=torch.float64), "dtype"),
        (torch.ones(2, 3, device="meta"), "device"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_row_sums_need_tensors_alike(b: Tensor, what: str) -> None:
    with pytest.raises(ValueError, match=f"a has {what} .* but b has .*give tensors of one {what}"):
        pyoptim.row_sums(torch.ones(2, 3), b)


# -- clip factors ----------------------------------------------------------------------------------


def assert_clip_factors(choice: str) -> None:
    grads = [placed(values((n,), torch.float32, n), choice) for n in (2000, 7)]
    norm = pyoptim.total_norm(grads, backend=choice).item()
    loss_scale = placed(torch.tensor([3.0]), choice)
    for inv_scale, grad_scale, scale in (
        (1.0, None, 1.0),
        (0.1, None, 0.1),
        (1.0, loss_scale, 1 / 3),
    ):
        [(device, factor)] = clip_factor(grads, 0.5, inv_scale, grad_scale, choice).items()
        assert device == grads[0].device
        assert float(factor) == 0.5 / (norm * scale + 1e-6)
        assert isinstance(factor, Tensor if choice in backend.GPU_ENGINES else float)
    [loose] = clip_factor(grads, 1e9, choice=choice).values()
    assert float(loose) == 1.0
    grads[1][3] = math.nan
    [broken] = clip_factor(grads, 0.5, choice=choice).values()
    assert math.isnan(broken)
    grads[1][3] = math.inf
    [zero] = clip_factor(grads, 0.5, choice=choice).values()
    assert float(zero) == 0.0


def test_clip_factors_are_those_of_unscaled_gradients(engine: str) -> None:
    assert_clip_factors(engine)


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_clip_factors_without_an_engine_asked_for(choice: str) -> None:
    assert_clip_factors(choice)


def test_clip_factors_of_no_gradients() -> None:
    assert clip_factor([], 1.0) == {}
