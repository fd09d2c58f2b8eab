"""Hyper-parameters prepared on the device are those that the host prepares."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from guarded import int64, prepared
from torch import Tensor

from pyoptim.kernels import engine

# numpy's, about logarithms of the zeros behind the last row in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
CPU = torch.device("cpu")
RAW = {
    "sgd": [[0.1, 0.9, 0.3, 0.01, 1.0, 0.0], [0.2, 0.0, 0.0, 0.0, 0.0, 1.0]],
    "adam": [
        [1e-3, 0.9, 0.999, 1e-8, 0.01, 0.0, 0.0, 0.0],
        [2e-3, 0.8, 0.95, 1e-6, 0.1, 1.0, 1.0, 1.0],
    ],
    "rmsprop": [[0.01, 0.99, 1e-8, 0.1, 0.9, 1.0, 0.0], [0.02, 0.9, 1e-3, 0.0, 0.0, 0.0, 1.0]],
    "adagrad": [[0.1, 0.2, 0.01, 1e-10, 0.0], [0.3, 0.0, 0.0, 1e-3, 1.0]],
    "expectigrad": [[1e-3, 0.9, 1e-8, 1.0, 0.0], [0.1, 0.0, 1e-3, 0.0, 1.0]],
    "ascent": [[0.25, 0.0, 0.0, 0.0], [2.0, 1.0, 0.01, 1.0]],
    "line_trial": [
        [0.5, 2.0, 0.9, 0.999, 1e-8, 0.1, 1.0, 0.0, 1.0, 0.0, 1.0],
        [0.3, 1.0, 0.8, 0.99, 1e-6, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0],
    ],
    "line_step": [
        [0.5, 2.0, 0.9, 0.999, 1e-8, 0.1, 2.0, 0.0, 1.0, 1.0, 1.0],
        [0.3, 1.0, 0.8, 0.99, 1e-6, 0.2, 0.0, 1.0, 0.0, 0.0, 0.0],
    ],
}
parametrize_rules = pytest.mark.parametrize("rule", RAW)
parametrize_doubles = pytest.mark.parametrize("is_double", [False, True], ids=["fp32", "fp64"])


def padded(groups: Sequence[Sequence[float]]) -> bytes:
    table = np.zeros((len(groups), 12))
    for g, values in enumerate(groups):
        table[g, : len(values)] = values
    return table.tobytes()


def prepare(
    rule: str,
    counters: Sequence[Tensor | None],
    groups: Sequence[int],
    is_double: bool = False,
    sources: dict[tuple[int, int], Tensor] | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Returns the blocks; before, every byte of them was 0xaa."""
    address, source_is_double = np.zeros((2, 12), np.int64), np.zeros((2, 12), np.uint8)
    for place, tensor in (sources or {}).items():
        address[place] = tensor.data_ptr()
        source_is_double[place] = tensor.dtype == torch.float64
    hypers = torch.full((len(groups) * 96,), 0xAA, dtype=torch.uint8)
    engine.prepare(
        rule,
        is_double,
        CPU,
        padded(RAW[rule]),
        address.tobytes(),
        source_is_double.tobytes(),
        int64([0 if c is None else c.data_ptr() for c in counters]),
        bytes([c is not None and c.dtype == torch.float64 for c in counters]),
        np.array(groups, np.int32).tobytes(),
        found_inf,
        hypers,
        {},
    )
    return hypers


def fields_of(hypers: Tensor, row: int, rule: str, is_double: bool) -> Tensor:
    fields = hypers.view(torch.float64 if is_double else torch.float32).view(
        -1, 96 // (4 << is_double)
    )
    return fields[row, : engine.RULES[rule].N_FIELDS]


@parametrize_rules
@parametrize_doubles
def test_prepared_values_are_those_of_the_host(rule: str, is_double: bool) -> None:
    """In float64 the corrections of Adam, Expectigrad and line searches may lie apart: the last bit
    of beta^t, widened by the subtraction from 1, which is at least 1 - beta = 0.001 here."""
    steps = [1.0, 2.0, 5.0, 1000.0]
    counts = rule not in ("sgd", "ascent")
    counters = [torch.tensor(s - 1) if counts else None for s in steps]
    groups = [0, 1, 0, 1]
    hypers = prepare(rule, counters, groups, is_double)
    for row, (step, group) in enumerate(zip(steps, groups, strict=True)):
        fields = fields_of(hypers, row, rule, is_double)
        expected = torch.tensor(
            prepared(rule, RAW[rule][group], step if counts else 1.0), dtype=fields.dtype
        )
        if is_double:
            has_powers = rule in ("adam", "expectigrad", "line_trial", "line_step")
            tolerance = 8 * 2.0**-53 / 0.001 if has_powers else 0.0
            torch.testing.assert_close(fields, expected, rtol=tolerance, atol=0.0)
        else:
            assert torch.equal(fields, expected)
    assert (hypers.view(-1, 96)[:, (8 if is_double else 4) * len(fields) :] == 0xAA).all()


def test_counters_count_in_their_own_dtype() -> None:
    counters = [torch.tensor(6.0), torch.tensor(2.0**24, dtype=torch.float64), None]
    hypers = prepare("adam", counters, [0, 0, 0])
    assert counters[0].item() == 7.0
    assert counters[1].item() == 2.0**24 + 1
    expected = prepared("adam", RAW["adam"][0], 1.0)
    assert torch.equal(fields_of(hypers, 2, "adam", False), torch.tensor(expected))


def test_a_first_count_is_noticed() -> None:
    counters = [torch.tensor(0.0), torch.tensor(1.0), None]
    hypers = prepare("sgd", counters, [0, 0, 0])
    assert [fields_of(hypers, i, "sgd", False)[5].item() for i in range(3)] == [1.0, 0.0, 0.0]


def test_tensors_take_the_place_of_numbers() -> None:
    lr, beta2 = torch.tensor(0.25), torch.tensor(0.75, dtype=torch.float64)
    counters = [torch.tensor(2.0), torch.tensor(2.0)]
    hypers = prepare("adam", counters, [0, 1], sources={(1, 0): lr, (0, 2): beta2})
    first, second = ([*RAW["adam"][g]] for g in (0, 1))
    first[2], second[0] = 0.75, 0.25
    for row, raw in enumerate((first, second)):
        expected = torch.tensor(prepared("adam", raw, 3.0))
        assert torch.equal(fields_of(hypers, row, "adam", False), expected)


@pytest.mark.parametrize("found", [1.0, float("nan")])
def test_nothing_is_counted_when_an_infinity_was_found(found: float) -> None:
    counters = [torch.tensor(6.0), torch.tensor(6.0, dtype=torch.float64)]
    hypers = prepare("adam", counters, [0, 0], found_inf=torch.tensor([found]))
    assert [c.item() for c in counters] == [6.0, 6.0]
    assert (hypers == 0xAA).all()


def test_more_rows_than_a_program_holds_are_prepared() -> None:
    n = engine.PREPARE_BLOCK + 3
    counters = [torch.tensor(float(i)) for i in range(n)]
    hypers = prepare("adagrad", counters, [i % 2 for i in range(n)])
    for i in (0, 1, n - 4, n - 3, n - 1):
        expected = torch.tensor(prepared("adagrad", RAW["adagrad"][i % 2], i + 1.0))
        assert torch.equal(fields_of(hypers, i, "adagrad", False), expected)
    assert [c.item() for c in counters] == [i + 1.0 for i in range(n)]


def test_corrections_in_float32_are_those_of_pow(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp2(t * log2(beta)) is off in its last bits, pow in its very last: after the rounding to
    float32 no more than one in ten thousand may differ, and by one unit in the last place."""
    monkeypatch.setattr(engine, "PREPARE_BLOCK", 4096)
    steps = [float(s) for s in (*range(1, 3000), *range(10_000, 1_000_000, 997))]
    counters = [torch.tensor(s - 1) for s in steps]
    hypers = prepare("adam", counters, [0] * len(steps)).view(torch.float32).view(-1, 24)
    expected = torch.tensor([prepared("adam", RAW["adam"][0], s) for s in steps])
    distance = (hypers[:, :9].view(torch.int32) - expected.view(torch.int32)).abs()
    assert distance.max() <= 1
    assert int((distance != 0).sum()) <= len(steps) / 10_000
