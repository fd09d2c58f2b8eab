"""Any memory layout of parameter, gradient and state; and whatever users do to them between steps.

Layouts are compared with the same values in contiguous tensors, bit for bit. What users do is done
to torch's for-loop too.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    CPU_KERNEL_CASES,
    KERNEL_CASES,
    KERNEL_DTYPES,
    TORCH_CASES,
    TORCH_KERNEL_CASES,
    Case,
    as_wide,
    assert_same_bits,
    assert_within,
    examples,
    parametrize_cases,
    same_bits,
    states_of,
    values,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import pyoptim
from pyoptim import backend
from pyoptim.optimizer import FusedOptimizer

SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
parametrize_access = pytest.mark.parametrize("access", ["libtorch symbols", "dlpack"])


def use_access(access: str) -> None:
    native = backend.native()
    if native is None or native.access_path() == access:
        return
    if access == "libtorch symbols":
        pytest.skip("libtorch's symbols are not in use here")
    native.use_symbols(0)


# -- layouts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a tensor of some shape lies in a larger buffer."""

    order: tuple[int, ...]  # dimensions, outermost in memory first
    steps: tuple[int, ...]  # per dimension: 1 takes every element, 2 every other
    gaps: tuple[int, ...]  # per dimension: unused places at its end
    expanded: tuple[bool, ...] = ()  # per dimension: stride 0
    lone_stride: int = 0  # added to the stride of dimensions of size 1
    offset: int = 0  # elements before the first
    odd_bytes: int = 0  # bytes before those: misaligned memory

    def strides(self, shape: Sequence[int]) -> list[int]:
        strides, reach = [0] * len(shape), 1
        for d in reversed(self.order):
            if self.expanded and self.expanded[d]:
                continue
            strides[d] = reach * self.steps[d]
            reach *= max(1, shape[d]) * self.steps[d] + self.gaps[d]
            if shape[d] == 1:
                strides[d] += self.lone_stride
        return strides


def layouts(n_dims: int, may_expand: bool = False) -> st.SearchStrategy[Layout]:
    def each(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
        return st.tuples(*[values] * n_dims)

    return st.builds(
        Layout,
        order=st.permutations(range(n_dims)).map(tuple),
        steps=each(st.sampled_from([1, 1, 2, 3])),
        gaps=each(st.sampled_from([0, 0, 1, 2])),
        expanded=each(st.booleans()) if may_expand else st.just(()),
        lone_stride=st.sampled_from([0, 1, 5]),
        offset=st.integers(0, 9),
        odd_bytes=st.sampled_from([0, 0, 1, 2, 3]),
    )


@dataclass
class Placed:
    """A tensor inside a buffer whose every other byte is known."""

    buffer: bytearray
    layout: Layout
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def view(self) -> Tensor:
        flat = torch.frombuffer(self.buffer, dtype=self.dtype, offset=self.layout.odd_bytes)
        return flat.as_strided(self.shape, self.layout.strides(self.shape), self.layout.offset)

    def bytes_with(self, value: Tensor) -> bytes:
        """What the buffer would hold if only the view's elements were `value`."""
        other = replace_buffer(self)
        other.view.copy_(value)
        return bytes(other.buffer)


def replace_buffer(placed: Placed) -> Placed:
    return replace(placed, buffer=bytearray(placed.buffer))


def place(value: Tensor, layout: Layout) -> Placed:
    strides = layout.strides(value.shape)
    reach = sum((max(1, n) - 1) * s for n, s in zip(value.shape, strides, strict=True))
    n_bytes = (layout.offset + reach + 2) * value.element_size() + layout.odd_bytes
    n_bytes += -(n_bytes - layout.odd_bytes) % value.element_size()
    placed = Placed(bytearray(b"\x3c" * n_bytes), layout, tuple(value.shape), value.dtype)
    if value.numel():
        once = [
            slice(1) if layout.expanded and layout.expanded[d] else slice(None)
            for d in range(value.dim())
        ]
        placed.view[tuple(once)].copy_(value[tuple(once)])
    return placed


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple) | st.sampled_from([(33,), (17, 5)])


@dataclass(frozen=True)
class Scene:
    """One parameter, two gradients and two states, each in a layout of its own."""

    shape: tuple[int, ...]
    param: Layout
    grads: tuple[Layout, Layout]
    states: tuple[Layout, ...] | None  # None: as the optimizer makes them


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    shape = draw(shapes)
    n = len(shape)
    grad = draw(layouts(n, may_expand=True))
    other = draw(st.just(grad) | layouts(n, may_expand=True))
    states = draw(st.none() | st.tuples(*[layouts(n)] * 3))
    return Scene(
        shape, draw(st.just(replace(grad, expanded=())) | layouts(n)), (grad, other), states
    )


def states_in_midrun(case: Case, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
    state = {n: values(shape, dtype, 20 + i) for i, n in enumerate(case.state_names)}
    for name in set(state) & set(SQUARES):
        square = state[name].real ** 2 + 9
        state[name] = torch.complex(square, square) if dtype.is_complex else square
    return state


@parametrize_access
@given(
    case=st.sampled_from(KERNEL_CASES),
    dtypes=st.sampled_from([*KERNEL_DTYPES, (torch.complex64, None)]),
    several=st.lists(scenes(), min_size=1, max_size=3),
)
@examples(150)
def test_layouts_do_not_change_the_result(
    access: str,
    case: Case,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    several: list[Scene],
) -> None:
    use_access(access)
    dtype, state_dtype = dtypes
    placed = [place(values(s.shape, dtype, i), s.param) for i, s in enumerate(several)]
    params = [Parameter(p.view) for p in placed]
    plain = [Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    optimizer, expected = (case.ours(ps, state_dtype=state_dtype) for ps in (params, plain))
    for p, q, scene in zip(params, plain, several, strict=True):
        if scene.states is None:
            continue
        for (name, value), layout in zip(
            states_in_midrun(case, scene.shape, state_dtype or dtype).items(),
            scene.states,
            strict=False,  # a case has at most as many states as the scene has layouts
        ):
            optimizer.state[p][name] = place(value, layout).view
            expected.state[q][name] = value.contiguous()
    for t in range(3):
        grads = [
            place(values(s.shape, dtype, 10 * t + i), s.grads[t == 2])
            for i, s in enumerate(several)
        ]
        for p, q, g in zip(params, plain, grads, strict=True):
            p.grad, q.grad = g.view, g.view.clone(memory_format=torch.contiguous_format)
        untouched = [bytes(g.buffer) for g in grads]
        before, versions = [replace_buffer(p) for p in placed], [p._version for p in params]
        optimizer.step()
        expected.step()
        assert_same_bits(params, plain, f"step {t}")
        assert_same_bits(states_of(optimizer), states_of(expected), f"state, step {t}")
        assert [bytes(g.buffer) for g in grads] == untouched, "a gradient was written"
        for p, old, new in zip(placed, before, plain, strict=True):
            assert bytes(p.buffer) == old.bytes_with(new.detach()), "memory beside a parameter"
        assert all(p._version > v for p, v in zip(params, versions, strict=True))


@parametrize_access
@parametrize_cases(CPU_KERNEL_CASES)
@pytest.mark.parametrize("bit", ["neg", "conj"])
def test_lazy_negation_and_conjugation_are_resolved(access: str, case: Case, bit: str) -> None:
    """Bits of a tensor that its memory does not show; the second step meets them in the plan."""
    use_access(access)
    dtype = torch.complex64 if bit == "conj" else torch.float32
    results = []
    for is_lazy in (True, False):
        param = Parameter(values((9,), dtype, 1))
        optimizer = case.ours([param])
        for t in range(3):
            grad = values((9,), dtype, 2 + t)
            if t > 0:
                grad = grad.conj() if bit == "conj" else torch._neg_view(grad)
                assert (grad.is_conj(), grad.is_neg()) == (bit == "conj", bit == "neg")
            param.grad = grad if is_lazy else grad.resolve_conj().resolve_neg()
            optimizer.step()
        results.append([param, *states_of(optimizer)])
    assert_same_bits(*results)


@parametrize_cases(TORCH_KERNEL_CASES)
def test_a_channels_last_network_trains_as_with_torch(case: Case) -> None:
    x, results = torch.randn(4, 3, 9, 9, dtype=torch.float64), []
    for make in (case.ours, case.torchs):
        torch.manual_seed(1)
        conv = torch.nn.Conv2d(3, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
        optimizer = make(conv.parameters(), lr=0.01)
        for t in range(4):
            optimizer.zero_grad()
            conv(x).square().mean().backward()
            if t % 2:  # contiguous, unlike the weight
                conv.weight.grad = conv.weight.grad.contiguous()
            optimizer.step()
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        results.append([*conv.parameters(), *states_of(optimizer)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


# -- versions --------------------------------------------------------------------------------------


@parametrize_access
@parametrize_cases(CPU_KERNEL_CASES)
@pytest.mark.parametrize("steps_before", [0, 1, 2], ids=["first", "second", "third"])
def test_a_step_between_forward_and_backward_raises(
    access: str, case: Case, steps_before: int
) -> None:
    use_access(access)
    w = Parameter(torch.ones(5))
    w.grad = torch.ones(5)
    optimizer = case.ours([w])
    for _ in range(steps_before):
        optimizer.step()
    loss = w.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@parametrize_cases(CPU_KERNEL_CASES)
def test_only_what_was_stepped_counts_as_written(case: Case) -> None:
    stepped, left = Parameter(torch.ones(5)), Parameter(torch.ones(5))
    optimizer = case.ours([stepped, left])
    for _ in range(2):
        stepped.grad = torch.ones(5)
        versions = stepped._version, left._version, stepped.grad._version
        optimizer.step()
        assert stepped._version > versions[0]
        assert (left._version, stepped.grad._version) == versions[1:]


# -- shared memory ---------------------------------------------------------------------------------


@parametrize_access
@parametrize_cases(CPU_KERNEL_CASES)
@pytest.mark.parametrize("shift", [0, 1, 7])
def test_a_gradient_over_its_parameters_memory_is_read_first(
    access: str, case: Case, shift: int
) -> None:
    use_access(access)
    results = []
    for shared in (True, False):
        base = values((67,), torch.float32, 3)
        param = Parameter(base[shift:60])
        optimizer = case.ours([param], lr=0.01)
        for t in range(3):
            if t == 1:  # so that the plan of an ordinary step meets shared memory
                param.grad = values(param.shape, torch.float32, 4)
            else:
                grad = base[: param.numel()]
                param.grad = grad if shared else grad.clone()
            optimizer.step()
        results.append([param.detach().clone(), *states_of(optimizer)])
    assert_same_bits(*results)


@parametrize_cases(TORCH_CASES)
@pytest.mark.parametrize("shift", [0, 3, 40])
def test_parameters_over_one_memory_are_updated_in_order(case: Case, shift: int) -> None:
    """As in torch's for-loop: the second parameter sees the first one's result."""
    results = []
    for make in (case.ours, case.torchs):
        base = values((80,), torch.float64, 3)
        params = [Parameter(base[:40]), Parameter(base[shift : shift + 40])]
        optimizer = make(params)
        for t in range(3):
            for i, p in enumerate(params):
                p.grad = values(p.shape, p.dtype, 10 * t + i)
            optimizer.step()
        results.append([base, *states_of(optimizer)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@parametrize_cases(TORCH_KERNEL_CASES)
def test_a_gradient_over_another_parameters_memory_is_read_in_order(case: Case) -> None:
    """One task of the engine each, on two threads: neither may read what the other writes."""
    n = 64 * 1024
    torch.set_num_threads(2)
    results = []
    for make in (case.ours, case.torchs):
        params = [Parameter(values((n,), torch.float64, i)) for i in range(2)]
        optimizer = make(params, lr=0.01)
        for t in range(4):
            params[0].grad = values((n,), torch.float64, 10 + t)
            params[1].grad = params[0].detach()
            optimizer.step()
        results.append([*params, *states_of(optimizer)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def expanded() -> Tensor:
    return torch.ones(1, 3).expand(4, 3)


def windows() -> Tensor:
    return torch.arange(6.0).as_strided((4, 3), (1, 1))


@parametrize_access
@parametrize_cases(CPU_KERNEL_CASES)
@pytest.mark.parametrize("make", [expanded, windows])
@pytest.mark.parametrize("between_steps", [False, True], ids=["at_first", "between_steps"])
def test_a_parameter_that_overlaps_itself_is_refused(
    access: str, case: Case, make: Callable[[], Tensor], between_steps: bool
) -> None:
    use_access(access)
    good, bad = Parameter(torch.ones(5)), Parameter(torch.ones(4, 3))
    good.grad, bad.grad = torch.ones(5), torch.ones(4, 3)
    optimizer = case.ours([good, bad])
    if between_steps:
        optimizer.step()
        optimizer.step()
    bad.data = make()
    tensors = [good, bad, *states_of(optimizer)]
    copies = [t.detach().clone() for t in tensors]
    keys = {p: set(e) for p, e in optimizer.state.items()}
    counts = [float(e["step"]) for e in optimizer.state.values() if "step" in e]
    with pytest.raises(RuntimeError, match="more than one element of"):
        optimizer.step()
    assert_same_bits(tensors, copies)
    assert {p: set(e) for p, e in optimizer.state.items()} == keys
    assert [float(e["step"]) for e in optimizer.state.values() if "step" in e] == counts


# -- what users do between steps -------------------------------------------------------------------

SHAPES = ((4, 3), (4, 3), (5,))


class World:
    """An optimizer, its parameters, and every way in which users change them."""

    def __init__(self, case: Case, is_ours: bool) -> None:
        self.case, self.is_ours = case, is_ours
        self.params = [Parameter(values(s, torch.float64, i)) for i, s in enumerate(SHAPES)]
        self.optimizer: Optimizer = (case.ours if is_ours else case.torchs)(self.params)

    def entry(self, i: int) -> dict[str, Any]:
        return self.optimizer.state.get(self.params[i % len(self.params)], {})

    def param(self, i: int) -> Parameter:
        return self.params[i % len(self.params)]

    def restart(self, p: Tensor) -> None:
        """torch's Adagrad has no state for parameters that it did not see at construction."""
        if self.case.row.ours is pyoptim.Adagrad:
            start = self.optimizer.defaults["initial_accumulator_value"]
            self.optimizer.state[p] = {"step": torch.tensor(0.0), "sum": torch.full_like(p, start)}

    def step(self, seed: int) -> None:
        for i, p in enumerate(self.params):
            p.grad = values(p.shape, p.dtype, 100 + 7 * seed + i)
        self.optimizer.step()

    def step_again(self) -> None:
        self.optimizer.step()

    def accumulate(self, seed: int) -> None:
        for p in self.params:
            if p.grad is not None:
                p.grad.add_(values(p.shape, p.dtype, 300 + seed))
        self.optimizer.step()

    def step_without(self, i: int) -> None:
        self.param(i).grad = None
        self.optimizer.step()

    def swap_grads(self) -> None:
        a, b = self.params[0], self.params[1]
        if a.shape == b.shape:
            a.grad, b.grad = b.grad, a.grad
        self.optimizer.step()

    def new_data(self, i: int, transposed: bool) -> None:
        p = self.param(i)
        fresh = values(p.shape, p.dtype, 400 + i)
        p.data = fresh.t().contiguous().t() if transposed and p.dim() == 2 else fresh

    def in_place(self, i: int) -> None:
        with torch.no_grad():
            self.param(i).mul_(0.5)

    def replace_state(self, i: int, transposed: bool) -> None:
        for name, old in self.entry(i).items():
            if isinstance(old, Tensor) and name != "step":
                fresh = old * (2.0 if name in SQUARES else 0.5)
                is_matrix = transposed and fresh.dim() == 2
                self.entry(i)[name] = fresh.t().contiguous().t() if is_matrix else fresh

    def move_state(self, i: int) -> None:
        for name, old in self.entry(i).items():
            if isinstance(old, Tensor):
                old.data = old.data * 2 if name in SQUARES else old.data.clone()

    def copy_entry(self, i: int) -> None:
        """As when a state_dict is assigned by hand."""
        p = self.param(i)
        if p in self.optimizer.state:
            copies = {
                k: v.clone() if isinstance(v, Tensor) else v
                for k, v in self.optimizer.state[p].items()
            }
            self.optimizer.state[p] = copies

    def set_step(self, i: int, count: int) -> None:
        if "step" in self.entry(i):
            self.entry(i)["step"] = torch.tensor(float(count))

    def drop_entry(self, i: int) -> None:
        self.optimizer.state.pop(self.param(i), None)
        self.restart(self.param(i))

    def clear_state(self) -> None:
        self.optimizer.state.clear()
        for p in self.params:
            self.restart(p)

    def replace_param(self, i: int, grow: bool) -> None:
        """As Gaussian splatting densifies: a new parameter takes over a changed state."""
        i %= len(self.params)
        old = self.params[i]

        def longer(t: Tensor) -> Tensor:
            return torch.cat([t, t[:1]]) if grow else t.clone()

        new = Parameter(longer(old.detach()))
        entry = self.optimizer.state.pop(old, None)
        if entry is not None:
            for name, value in entry.items():
                if isinstance(value, Tensor) and name != "step":
                    entry[name] = longer(value)
            self.optimizer.state[new] = entry
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        self.params[i] = new

    def put_param(self, i: int) -> None:
        """The same within the list that param_groups holds."""
        i %= len(self.params)
        old, new = self.params[i], Parameter(self.params[i].detach() + 1)
        for group in self.optimizer.param_groups:
            for j, p in enumerate(group["params"]):
                if p is old:
                    group["params"][j] = new
        self.optimizer.state.pop(old, None)
        self.restart(new)
        self.params[i] = new

    def add_group(self, lr: float) -> None:
        p = Parameter(values((3, 2), torch.float64, 600 + len(self.params)))
        self.params.append(p)
        self.optimizer.add_param_group({"params": [p], "lr": lr})
        self.restart(p)

    def remove_group(self) -> None:
        if len(self.optimizer.param_groups) > 1:
            gone = self.optimizer.param_groups.pop()["params"]
            self.params = [p for p in self.params if all(p is not g for g in gone)]

    def edit(self, group: int, name: str, value: Any) -> None:
        groups = self.optimizer.param_groups
        groups[group % len(groups)][name] = value
        if not self.is_ours:
            self.fill_missing()

    def fill_missing(self) -> None:
        """torch raises KeyError where an option needs state that is not there: zeros, as ours."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                entry = self.optimizer.state.get(p)
                for name in self.case.row.ours.state_names(group) if entry else ():
                    if self.case.row.ours is not pyoptim.SGD:
                        entry.setdefault(name, torch.zeros_like(p))

    def edit_list(self, group: int) -> None:
        """Takes the last parameter of a group out of it, and puts it first."""
        groups = self.optimizer.param_groups
        params = groups[group % len(groups)]["params"]
        params.insert(0, params.pop())


EDITS: dict[type[FusedOptimizer], list[tuple[str, list[Any]]]] = {
    pyoptim.SGD: [
        ("momentum", [0, 0.5, 0.9]),
        ("nesterov", [False, True]),
        ("dampening", [0, 0.3]),
    ],
    pyoptim.Adam: [
        ("amsgrad", [False, True]),
        ("betas", [(0.5, 0.9), (0.0, 0.99)]),
        ("eps", [1e-3, 1e-8]),
    ],
    pyoptim.RMSprop: [
        ("momentum", [0, 0.5]),
        ("centered", [False, True]),
        ("alpha", [0.5, 0.99]),
    ],
    pyoptim.Adagrad: [("lr_decay", [0, 0.5]), ("eps", [1e-3, 1e-10])],
}
EDITS[pyoptim.AdamW] = EDITS[pyoptim.Adam]
COMMON_EDITS = [
    ("lr", [0.0, 0.01, 0.1]),
    ("weight_decay", [0, 0.1]),
    ("maximize", [False, True]),
    ("foreach", [None, False]),
]

index = st.integers(0, 3)
flag = st.booleans()


def actions(cls: type[FusedOptimizer]) -> st.SearchStrategy[tuple[Any, ...]]:
    edits = [
        st.tuples(st.just("edit"), index, st.just(name), st.sampled_from(choices))
        for name, choices in [*EDITS[cls], *COMMON_EDITS]
    ]
    return st.one_of(
        st.tuples(st.just("step"), index),
        st.tuples(st.just("step_again")),
        st.tuples(st.just("accumulate"), index),
        st.tuples(st.just("step_without"), index),
        st.tuples(st.just("swap_grads")),
        st.tuples(st.just("new_data"), index, flag),
        st.tuples(st.just("in_place"), index),
        st.tuples(st.just("replace_state"), index, flag),
        st.tuples(st.just("move_state"), index),
        st.tuples(st.just("copy_entry"), index),
        st.tuples(st.just("set_step"), index, st.sampled_from([0, 10, 5000])),
        st.tuples(st.just("drop_entry"), index),
        st.tuples(st.just("clear_state")),
        st.tuples(st.just("replace_param"), index, flag),
        st.tuples(st.just("put_param"), index),
        st.tuples(st.just("add_group"), st.sampled_from([0.01, 0.1])),
        st.tuples(st.just("remove_group")),
        st.tuples(st.just("edit_list"), index),
        *edits,
    )


@parametrize_access
@pytest.mark.parametrize("name", EDITS, ids=lambda cls: cls.__name__)
@given(data=st.data())
@examples(50)
def test_whatever_users_do_torchs_for_loop_agrees(
    access: str, name: type[FusedOptimizer], data: st.DataObject
) -> None:
    use_access(access)
    case = data.draw(st.sampled_from([c for c in CASES if c.row.ours is name]))
    script = data.draw(st.lists(actions(name), min_size=1, max_size=12))
    ours, torchs = World(case, is_ours=True), World(case, is_ours=False)
    for number, (action, *arguments) in enumerate([("step", 0), ("step", 1), *script, ("step", 2)]):
        for world in (ours, torchs):
            getattr(world, action)(*arguments)
        compare(ours, torchs, f"after {action} (number {number})")


def compare(ours: World, torchs: World, when: str) -> None:
    for p, q in zip(ours.params, torchs.params, strict=True):
        close(p, q, f"parameter {when}")
        mine, theirs = ours.optimizer.state.get(p, {}), torchs.optimizer.state.get(q, {})
        for key, value in theirs.items():
            if value is not None and key in mine:
                close(mine[key], value, f"{key} {when}")
        assert {k for k, v in theirs.items() if v is not None} >= set(mine), when


def close(mine: Tensor, theirs: Tensor, what: str) -> None:
    # Both run in float64: a few hundred roundings of 2^-53 apart, and a difference in meaning is
    # far more.
    truth = as_wide(theirs)
    assert mine.shape == theirs.shape, what
    assert_within(mine, truth, 1e-9 * (truth.abs() + 1e-3), what)


def moved_in_storage(state: Tensor) -> None:
    state.data = state.data.as_strided(state.shape, state.stride(), state.numel())


def transposed_in_place(state: Tensor) -> None:
    state.t_()


def of_another_dtype(state: Tensor) -> None:
    """At the same address, as when the allocator gives freed memory out again."""
    memory = (ctypes.c_byte * (8 * state.numel())).from_address(state.data_ptr())
    state.former = state.data  # keeps the memory
    wide = torch.frombuffer(memory, dtype=torch.float64)
    state.data = wide.view(state.shape).fill_(9.0)


CHANGES = (moved_in_storage, transposed_in_place, of_another_dtype)


@parametrize_access
@parametrize_cases([c for c in CPU_KERNEL_CASES if c.state_names])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_state_changed_within_its_memory_is_noticed(
    access: str, case: Case, change: Callable[[Tensor], None]
) -> None:
    """The same object, the same storage or address: only its offset, strides or dtype differ."""
    use_access(access)
    results = []
    for is_in_place in (True, False):
        param = Parameter(values((4, 4), torch.float32, 1))
        optimizer = case.ours([param])
        entry = optimizer.state[param]
        for name in case.state_names:  # over memory with room for the changes
            entry[name] = (values((8, 4), torch.float32, 2).abs() + 4)[:4]
        for t in range(3):
            param.grad = values((4, 4), torch.float32, 3 + t)
            if t == 2:
                change(entry[case.state_names[0]])
                if not is_in_place:
                    entry[case.state_names[0]] = entry[case.state_names[0]].clone()
            optimizer.step()
        results.append([param, *states_of(optimizer)])
    assert_same_bits(*results)


@parametrize_access
@parametrize_cases([c for c in CPU_KERNEL_CASES if c.state_names])
def test_state_that_shrinks_within_its_memory_is_refused(access: str, case: Case) -> None:
    use_access(access)
    param = Parameter(values((9,), torch.float32, 1))
    optimizer = case.ours([param])
    for t in range(2):
        param.grad = values((9,), torch.float32, 2 + t)
        optimizer.step()
    state = optimizer.state[param][case.state_names[0]]
    state.data = state.data[:5]
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="has shape"):
        optimizer.step()
    assert_same_bits([param], [before])


def test_adagrad_makes_the_state_that_torch_only_makes_at_construction() -> None:
    results = []
    for is_lazy in (True, False):
        params = [Parameter(values((5,), torch.float64, i)) for i in range(2)]
        optimizer = pyoptim.Adagrad(params[: 1 if is_lazy else 2], initial_accumulator_value=0.5)
        if is_lazy:
            optimizer.state.clear()
            optimizer.add_param_group({"params": [params[1]]})
        for t in range(3):
            for p in params:
                p.grad = values(p.shape, p.dtype, 10 + t)
            optimizer.step()
        results.append([*params, *states_of(optimizer)])
    assert_same_bits(*results)


def test_two_bits_are_told_apart() -> None:
    """The comparison that this suite rests on."""
    one, next_one = torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert same_bits(one, torch.tensor(1.0))
    assert not same_bits(one, next_one)
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same_bits(one, one.double())
    assert not same_bits(one, torch.tensor(torch.nan))
    assert same_bits(torch.tensor(torch.nan), -torch.tensor(torch.nan))
