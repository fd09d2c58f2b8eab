"""The ARC controller: its window, its networks and weight files, and the pipeline that makes it."""

import dataclasses
import functools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import pyoptim
from pyoptim import arc
from pyoptim.arc import ConvLSTM, SummaryNet, features, load, save, summary
from pyoptim.bench.arc import (
    choose,
    cli,
    compare,
    comparison,
    generate,
    points,
    results,
    rivals,
    schedules,
    train,
)
from pyoptim.bench.arc.generate import Cohort, Stack
from pyoptim.bench.arc.layers import GRU, Attention, BatchNorm, Conv, Embedding, Linear, create
from pyoptim.bench.arc.tasks import TASKS, Problem
from pyoptim.bench.arc.unseen import FASHION, LSTM, UNSEEN, solids, words


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks are slower on several threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


losses = st.floats(-1e6, 1e6, allow_subnormal=False)


def expected_window(
    train_losses: list[float], val_losses: list[float], lrs: list[float]
) -> list[list[float]]:
    """The specification in plain loops: OpenCV's two resizes, z-scores, left padding."""

    def z_score(x: list[float]) -> list[float]:
        x = [v - x[0] for v in x]  # a constant is 0, not a rounding error
        mean = math.fsum(x) / len(x)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x))
        return [(v - mean) / max(deviation, 1e-7) for v in x]

    def linear(x: list[float], points: int) -> list[float]:
        result = []
        for i in range(points):
            at = min(max((i + 0.5) * len(x) / points - 0.5, 0.0), len(x) - 1.0)
            low = math.floor(at)
            high = min(low + 1, len(x) - 1)
            result.append(x[low] + (at - low) * (x[high] - x[low]))
        return result

    count = 100 * len(lrs)
    pad = 300 - count
    first = [0.0] * pad + z_score(linear(train_losses, count))
    standard = z_score(val_losses) if val_losses else [0.0]
    second = [0.0] * pad + [standard[i * len(standard) // count] for i in range(count)]
    third = [1.0] * pad + [lrs[i // 100] / lrs[0] for i in range(count)]
    return [list(row) for row in zip(first, second, third, strict=True)]


@given(
    st.lists(losses, min_size=1, max_size=700),
    st.lists(losses, max_size=30),
    st.lists(st.floats(1e-8, 1e2), min_size=1, max_size=3),
)
def test_window_is_that_of_the_specification(
    train_losses: list[float], val_losses: list[float], lrs: list[float]
) -> None:
    window = features(train_losses, val_losses, lrs)
    expected = torch.tensor(expected_window(train_losses, val_losses, lrs), dtype=torch.float64)
    # float32 rounds to 2**-24 of the value; a spread at rounding level amplifies that of the mean.
    size = max(map(abs, train_losses + val_losses))
    spread = min(
        (float(np.std(x)) for x in (train_losses, val_losses) if x and np.std(x) > 0), default=1.0
    )
    slack = 1e-12 * size / max(spread, 1e-7)
    assert window.shape == (300, 3)
    assert window.dtype == torch.float32
    torch.testing.assert_close(window.double(), expected, rtol=2e-7, atol=1e-7 + slack)


def test_resize_is_linear_between_cell_centres_and_does_not_smooth() -> None:
    up = arc._resized(torch.tensor([0.0, 1, 2, 3], dtype=torch.float64), 8)
    assert up.tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    # Every other value is a spike: an average over four cells would see all of them.
    down = arc._resized(torch.tensor([0.0, 0, 9, 0, 0, 9, 0, 0], dtype=torch.float64), 2)
    assert down.tolist() == [4.5, 4.5]


@given(st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
def test_window_does_not_depend_on_the_unit_of_the_loss(scale: float, shift: float) -> None:
    curve = [math.exp(-i / 20) + 0.1 * math.sin(i) for i in range(60)]
    other = [scale * v + shift for v in curve]
    slack = 1e-5 + 1e-9 * abs(shift) / scale
    torch.testing.assert_close(
        features(other, other[::20], [0.1]), features(curve, curve[::20], [0.1]), rtol=0, atol=slack
    )


def test_window_of_constant_losses_is_zero_and_of_huge_ones_finite() -> None:
    assert torch.equal(features([2.5] * 7, [1e-9] * 3, [0.1])[:, :2], torch.zeros(300, 2))
    huge = features([1e308, -1e308, 3e307], [1e300, 2e300], [1e-3, 1e3])
    assert huge.isfinite().all()
    assert abs(huge[-200:, 0].double().std(correction=0) - 1) < 1e-6


def test_missing_validation_is_zeros() -> None:
    window = features([3.0, 2, 1], None, [0.1])
    assert torch.equal(window, features([3.0, 2, 1], [], [0.1]))
    assert torch.equal(window[:, 1], torch.zeros(300))
    assert not window[-100:, 0].eq(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_window_reads_tensors_of_any_float_and_stride(dtype: torch.dtype) -> None:
    wide = torch.arange(24, dtype=dtype).reshape(12, 2).requires_grad_()
    window = features(wide[:, 1], wide[:4, 0], torch.tensor([0.5, 0.25], dtype=dtype))
    assert torch.equal(window, features(list(range(1, 25, 2)), [0, 2, 4, 6], [0.5, 0.25]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1.0], [0.1]), r"train_losses .*\(0,\)"),
        (([[1.0]], None, [0.1]), r"train_losses .*\(1, 1\)"),
        (([1.0, math.nan], None, [0.1]), r"train_losses\[1\] is nan"),
        (([1.0], [2.0, 1.0, math.inf], [0.1]), r"val_losses\[2\] is inf"),
        (([1.0], None, []), "lrs"),
        (([1.0], None, [0.1] * 4), "lrs must be one to 3"),
        (([1.0], None, [0.1, 0.0]), "positive"),
        (([1.0], None, [-0.1]), "positive"),
        (([1.0], None, [math.inf]), r"lrs\[0\] is inf"),
    ],
)
def test_window_names_what_it_cannot_use(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features(*arguments)


def random_windows(cycles: int, count: int = 5) -> torch.Tensor:
    draw = random.Random(cycles)
    return torch.stack(
        [
            features(
                [draw.gauss(-i / 50, 1) for i in range(draw.choice([40, 300, 1001]))],
                [draw.random() for _ in range(4 * cycles)],
                [draw.choice([0.1, 0.1618]) for _ in range(cycles)],
            )
            for _ in range(count)
        ]
    )


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_summary_has_the_numbers_that_it_documents(cycles: int) -> None:
    windows = random_windows(cycles)
    for window, row in zip(windows.double().numpy(), summary(windows, cycles).numpy(), strict=True):
        loss, valid, rate = window[-100 * cycles :].T

        def fit(x: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray]:
            t = np.linspace(-1, 1, len(x))
            coefficients = np.polyfit(t, x, degree)
            return coefficients[::-1], x - np.polyval(coefficients, t)

        bend, rest = fit(loss, 2)
        (_, last_slope), line_rest = fit(loss[-100:], 1)
        last_noise = fit(loss[-100:], 2)[1].std()
        first_noise = fit(loss[:100], 2)[1].std()
        neighbours = (line_rest[1:] * line_rest[:-1]).mean() / (line_rest**2).mean()
        former = rate[-101] if cycles > 1 else rate[0]
        expected = [
            *(fit(loss, 1)[0][1], fit(loss[-50:], 1)[0][1], rest.std()),
            *(fit(valid, 1)[0][1], valid[-1], valid[-1] - valid.min(), cycles),
            *(math.log(rate[-1] / former), math.log(rate[-1]), bend[2], neighbours),
            *(last_slope, last_noise, fit(valid[-100:], 1)[0][1]),
            math.log((last_noise + 1e-3) / (first_noise + 1e-3)),
            *(last_slope / (last_noise + 0.05), bend[1] / (rest.std() + 0.05)),
            *(loss[-100:].mean(), valid[-100:].mean(), loss[-10:].mean() - loss.min()),
        ]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)


def test_paper_network_has_the_sizes_of_the_paper() -> None:
    net = ConvLSTM()
    sizes = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in [
            ("conv1", net.conv[0]),
            ("conv2", net.conv[3]),
            ("lstm", net.lstm),
            ("dense1", net.dense[0]),
            ("dense2", net.dense[2]),
        ]
    }
    # 256 more per LSTM than Keras counts: a second bias vector of four gates of 64.
    two = 2 * (33024 + 256)
    assert sizes == {"conv1": 512, "conv2": 10304, "lstm": two, "dense1": 2080, "dense2": 99}
    steps = net.conv(torch.zeros(1, 3, 300))
    assert steps.shape == (1, 64, 72)


CONTROLLERS: list[Callable[[], arc.Controller]] = [
    ConvLSTM,
    lambda: SummaryNet(0),
    lambda: SummaryNet(16, 3),
    lambda: SummaryNet(16, 3, sees_lr=True),
]


@pytest.mark.parametrize("make", CONTROLLERS, ids=["conv_lstm", "logistic", "perceptrons", "rate"])
def test_saved_controller_decides_the_same(make: Callable[[], arc.Controller], tmp_path) -> None:
    torch.manual_seed(1)
    controller = make().eval()
    digest = save(controller, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", digest)
    case = ([3.0, 1, 2, 0.5], [1.0, 0.5], [0.1, 0.2])
    decided = controller.probabilities(*case)
    assert again.probabilities(*case) == decided
    sees = getattr(controller, "sees_lr", False)
    placed = controller.probabilities(*case, usual_lr=1e-3)
    assert again.probabilities(*case, usual_lr=1e-3) == placed
    assert (placed != decided) == sees
    assert sum(decided) == pytest.approx(1, abs=1e-6)
    assert len(set(decided)) == 3
    assert save(again, tmp_path / "b.safetensors") == digest


def test_a_rate_counts_from_the_usual_one_and_not_at_all_without() -> None:
    lrs = torch.tensor([1e-3, 0.5, 1e-3, 1e-3])
    usual = torch.tensor([1e-2, 5e-3, math.nan, 0.0])
    expected = torch.tensor([[-1.0, 1], [2, 1], [0, 0], [0, 0]])
    torch.testing.assert_close(arc.placed(lrs, usual), expected)
    torch.manual_seed(0)
    controller, curve = SummaryNet(8, 2, sees_lr=True), [3.0, 1, 2, 0.5]
    unknown = [controller.probabilities(curve, None, [lr]) for lr in (1e-5, 1e5)]
    assert unknown[0] == unknown[1]
    scaled = [controller.probabilities(curve, None, [lr], lr / 20) for lr in (1e-5, 1e5)]
    assert scaled[0] == pytest.approx(scaled[1])
    assert scaled[0] != pytest.approx(unknown[0])
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="usual_lr must be"):
            controller.probabilities(curve, None, [0.1], bad)


def test_a_weight_file_of_an_earlier_version_loads(tmp_path: Path) -> None:
    class Earlier(SummaryNet):
        def options(self) -> dict:
            return {"hidden": self.hidden, "members": self.members}

    save(Earlier(4, 2), tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert isinstance(again, SummaryNet)
    assert not again.sees_lr
    # One whose sizes do not fit what it says is refused.
    save(Earlier(4, 2, sees_lr=True), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="not a weight file of a controller"):
        load(tmp_path / "b.safetensors")


def test_damaged_weight_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = save(SummaryNet(4), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or another version"):
        load(path, digest)
    for bad in (b"", b"\0" * 20, content[:-4], b"\x02" + b"\0" * 7 + b"{}", b"\xff" * 40):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="not a weight file of a controller"):
            load(path)
    with pytest.raises(FileNotFoundError, match="no controller 'nothing'"):
        load("nothing")


def test_weight_file_is_a_safetensors_file(tmp_path: Path) -> None:
    net = SummaryNet(4, 2)
    save(net, tmp_path / "a.safetensors", note="why")
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"]["note"] == "why"
    entry = header["weights.0"]
    begin, end = entry["data_offsets"]
    values = np.frombuffer(content[8 + length :][begin:end], "<f4").reshape(entry["shape"])
    assert np.array_equal(values, net.weights[0].detach().numpy())
    assert end <= len(content) - 8 - length


# --- stacked layers -------------------------------------------------------------------------------


def weights_of(replicas, name: str, replica: int) -> torch.Tensor:
    return replicas.params[name].detach()[replica]


def test_stacked_layers_are_torch_layers_side_by_side() -> None:
    rng = torch.Generator().manual_seed(0)
    linear, conv, gru = Linear("l", 3, 5), Conv("c", 2, 4), GRU("g", 3, 5)
    conv1, embedding = Conv("d", 3, 4, 5, dims=1), Embedding("e", 7, 3)
    r = create([linear, conv, gru, conv1, embedding], 2, rng)
    x, images = torch.randn(2, 6, 4, 3), torch.randn(2, 6, 2, 5, 5)
    tokens = torch.randint(7, (2, 6, 4))
    outputs = {
        "l": linear(r, x),
        "c": conv(r, images, stride=2),
        "g": gru(r, x),
        "d": conv1(r, x.transpose(2, 3)),
        "e": embedding(r, tokens),
    }
    for b in range(2):
        w = {name: p.detach()[b] for name, p in r.params.items()}
        module = torch.nn.GRU(3, 5, batch_first=True)
        module.load_state_dict(
            {
                "weight_ih_l0": w["g.in.w"].T,
                "weight_hh_l0": w["g.rec.w"].T,
                "bias_ih_l0": w["g.in.b"][0],
                "bias_hh_l0": w["g.rec.b"][0],
            }
        )
        expected = {
            "l": x[b] @ w["l.w"] + w["l.b"],
            "c": F.conv2d(images[b], w["c.w"], w["c.b"], stride=2, padding=1),
            "g": module(x[b])[0],
            "d": F.conv1d(x[b].transpose(1, 2), w["d.w"], w["d.b"], padding=2),
            "e": w["e.w"][tokens[b]],
        }
        for name, value in expected.items():
            torch.testing.assert_close(outputs[name][b], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dim", [-1, 2])
def test_stacked_batch_norm_is_torch_batch_norm(dim: int) -> None:
    layer = BatchNorm("n", 4, dim)
    r = create([layer], 2, torch.Generator())
    shape = (2, 600, 4) if dim == -1 else (2, 100, 4, 2, 3)
    modules = [(torch.nn.BatchNorm1d if dim == -1 else torch.nn.BatchNorm2d)(4) for _ in range(2)]
    for r.training in (True, True, False):
        x = 2 * torch.randn(shape) + 1
        y = layer(r, x)
        # torch's running variance is that of 600 values times 600/599.
        rtol = 1e-5 if r.training else 1e-3
        for b, module in enumerate(modules):
            torch.testing.assert_close(y[b], module.train(r.training)(x[b]), rtol=rtol, atol=1e-5)


def test_stacked_attention_is_causal_and_attends() -> None:
    layer = Attention("a", 8, 2)
    r = create([layer], 2, torch.Generator().manual_seed(3))
    x = torch.randn(2, 3, 6, 8)
    changed = x.clone()
    changed[:, :, 3] += 1 + torch.randn(8)
    difference = (layer(r, changed) - layer(r, x)).abs().amax((0, 1, 3))
    assert difference[:3].eq(0).all()
    assert difference[3:].gt(1e-4).all()


# --- tasks ----------------------------------------------------------------------------------------


def tiny(task: str, optimizer: str = "adam", rates: tuple[float, ...] = (1e-2, 3e-3)) -> Cohort:
    return Cohort(7, task, optimizer, 0.0, epochs=2, steps=4, batch=16, rates=rates)


def problem_of(task: str) -> Problem:
    return TASKS[task].build(random.Random(5), torch.Generator().manual_seed(5))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_learnt_and_validated(task: str) -> None:
    problem = problem_of(task)
    rng = torch.Generator().manual_seed(0)
    stack = Stack(tiny(task), create(problem.layers, 2, rng))
    stack.set_rates([1e-2, 0.0])
    before = stack.validate(problem)
    rows = torch.arange(16).expand(2, 16)
    batch = tuple(t[rows] for t in problem.train)
    steps = torch.stack([stack.step(problem, batch) for _ in range(30)])
    assert before.isfinite().all()
    assert steps[-5:, 0].mean() < 0.9 * steps[0, 0]
    # At rate zero the weights stay; only batch normalisation adapts to the data.
    if not stack.replicas.buffers:
        torch.testing.assert_close(stack.validate(problem)[1], before[1], rtol=1e-6, atol=0)


def test_at_least_twelve_tasks_and_every_family_is_held_out_once() -> None:
    assert len(TASKS) >= 12
    held = [family for fold in train.FOLDS for family in fold]
    assert sorted(held) == sorted({task.family for task in TASKS.values()})


def test_replicas_never_see_each_other() -> None:
    problem = problem_of("digits-mlp")

    def trained(rates: list[float]) -> torch.Tensor:
        rng = torch.Generator().manual_seed(1)
        torch.manual_seed(1)
        stack = Stack(tiny("digits-mlp"), create(problem.layers, 2, rng))
        stack.set_rates(rates)
        return generate.train_cycle(stack, problem, tiny("digits-mlp"), rng)[0]

    calm, wild = trained([1e-2, 1e-2]), trained([1e-2, math.inf])
    assert torch.equal(wild[0], calm[0])
    assert not wild[1].isfinite().all()


# --- branching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", generate.OPTIMIZERS)
def test_a_branch_starts_from_the_whole_state_of_its_run(optimizer: str) -> None:
    cohort = tiny("digits-resnet", optimizer)
    problem = problem_of("digits-resnet")
    rng = torch.Generator().manual_seed(2)
    main = Stack(cohort, create(problem.layers, 2, rng))
    branches = Stack(cohort, create(problem.layers, 4, rng))
    main.set_rates(cohort.rates)
    generate.train_cycle(main, problem, cohort, rng)
    kept = {name: p.detach().clone() for name, p in main.replicas.params.items()}
    branches.load(main, [1, 0, 1, 0])
    branches.set_rates([cohort.rates[1], cohort.rates[0]] * 2)
    torch.testing.assert_close(
        branches.validate(problem), main.validate(problem)[[1, 0, 1, 0]], rtol=1e-6, atol=0
    )
    rows = torch.randint(len(problem.train[0]), (1, 16)).expand(4, 16)
    batch = tuple(t[rows] for t in problem.train)
    branches.step(problem, batch)
    assert all(torch.equal(p, kept[name]) for name, p in main.replicas.params.items())
    main.step(problem, tuple(t[:2] for t in batch))
    for name, param in main.replicas.params.items():
        torch.testing.assert_close(
            branches.replicas.params[name], param[[1, 0, 1, 0]], rtol=1e-4, atol=1e-6
        )
        assert not torch.equal(param, kept[name])


def test_cohorts_are_the_same_everywhere_and_spread() -> None:
    cohorts = [generate.draw_cohort(i) for i in range(200)]
    assert cohorts == [generate.draw_cohort(i) for i in range(200)]
    assert {c.epochs for c in cohorts} == set(range(1, 11))
    assert {c.optimizer for c in cohorts} == set(generate.OPTIMIZERS)
    rates = [rate for c in cohorts if c.optimizer == "adam" for rate in c.rates]
    assert min(rates) < 3e-5
    assert max(rates) > 3e-2


def test_run_follows_its_branches_and_repeats_them() -> None:
    cohort = tiny("wine-mlp", "sgd", rates=(0.3, 0.01, 1e30))
    record = generate.run_cohort(cohort)
    again = generate.run_cohort(cohort)
    assert all(np.array_equal(record[k], again[k], equal_nan=True) for k in generate.FIELDS)
    assert record["train_losses"].shape == (3, 11, 8)
    assert record["val_losses"].shape == (3, 11, 2)
    assert record["branch_losses"].shape == (3, 10, 3, 2)
    factors = np.array(generate.FACTORS)[record["followed"]]
    np.testing.assert_allclose(record["lrs"][:, 1:], record["lrs"][:, :-1] * factors, rtol=1e-6)
    assert np.isfinite(record["branch_losses"][:2]).all()
    assert not np.isfinite(record["val_losses"][2, 1:]).any()


def test_dead_branch_is_never_followed_and_the_worst_seldom() -> None:
    draw = random.Random(0)
    taken = [generate.follow([3.0, 1.0, 2.0], draw) for _ in range(2000)]
    assert 0.05 < taken.count(0) / 2000 < 0.15
    assert abs(taken.count(1) - taken.count(2)) < 200
    assert {generate.follow([math.nan, 1.0, 2.0], draw) for _ in range(50)} == {1, 2}
    assert {generate.follow([math.inf, math.nan, 2.0], draw) for _ in range(50)} == {2}
    assert generate.follow([math.nan] * 3, draw) == 2


def test_generation_resumes_and_never_shows_half_a_file(tmp_path: Path, capsys) -> None:
    cohorts = [dataclasses.replace(tiny("wine-mlp"), index=i, epochs=1) for i in range(2)]
    generate.write_cohort(tmp_path, cohorts[0])
    first = generate.cohort_path(tmp_path, cohorts[0])
    stamp = first.stat().st_mtime_ns
    (tmp_path / "cohort-00001.123.part").write_bytes(b"half")
    generate.generate(tmp_path, cohorts, workers=1)
    assert "1 of 2 cohorts are there" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == stamp
    assert len(points.load_points(tmp_path)) == 2 * 2 * 10
    meta, arrays = points.read_cohort(generate.cohort_path(tmp_path, cohorts[1]))
    assert meta["task"] == "wine-mlp"
    assert meta["family"] == "tabular"
    made = generate.run_cohort(cohorts[1])
    assert all(np.array_equal(arrays[name], made[name]) for name in generate.FIELDS)


# --- labels ---------------------------------------------------------------------------------------

inf, nan = math.inf, math.nan


@pytest.mark.parametrize(
    ("branches", "followed", "repeat", "raw", "corrected"),
    [
        # The paper's example: 0.113, 0.112, 0.111, lowered; 0.109 confirms, 0.115 does not.
        ([0.113, 0.112, 0.111], 2, 0.109, 2, 2),
        ([0.113, 0.112, 0.111], 2, 0.115, 2, 1),
        ([0.113, 0.112, 0.111], 1, 0.114, 2, 1),  # the order of the others counts too
        ([1.0, 2.0, 3.0], 0, 1.9, 0, 0),
        ([nan, 2.0, 3.0], 1, 2.5, 1, 1),  # not finite is the worst
        ([nan, 2.0, 3.0], 1, nan, 1, 1),
        ([inf, nan, 3.0], 2, 4.0, 2, 2),
        ([nan, nan, nan], 2, nan, 2, 2),
        ([nan, inf, nan], 2, 1.0, 2, 2),
    ],
)
def test_label_is_the_best_branch_unless_the_repeat_disagrees(
    branches: list[float], followed: int, repeat: float, raw: int, corrected: int
) -> None:
    assert points.label(branches) == raw
    assert points.corrected_label(branches, followed, repeat) == corrected


def test_soft_target_is_as_sure_as_the_noise_allows() -> None:
    assert points.soft_target([1.0, 2.0, 3.0], 1e-9) == [1, 0, 0]
    assert points.soft_target([1.0, 2.0, nan], 1e9) == pytest.approx([0.5, 0.5, 0])
    assert points.soft_target([2.0, 1.0, 3.0], 1.0) == pytest.approx(
        torch.tensor([-2.0, -1, -3]).softmax(0).tolist()
    )
    assert points.soft_target([nan] * 3, 1.0) == [0, 0, 1]
    assert points.soft_target([1.0, nan, 1.5], inf) == [0.5, 0, 0.5]


def test_noise_scale_is_the_deviation_of_one_loss() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(5, 0.3, (2, 4000))
    assert np.mean(points.noise_scale(a, b)) == pytest.approx(0.3, rel=0.05)


def run_arrays() -> dict[str, np.ndarray]:
    """A run of hand-made numbers: rate 0.1, raised every time, three epochs of four steps."""
    rng = np.random.default_rng(1)
    return {
        "train_losses": rng.random((1, 11, 12), np.float32),
        "val_losses": rng.random((1, 11, 3), np.float32),
        "lrs": 0.1 * 1.618 ** np.arange(11)[None],
        "branch_losses": rng.random((1, 10, 3, 3), np.float32),
        "followed": np.zeros((1, 10)),
    }


def test_point_has_the_last_three_cycles_and_the_next_branches() -> None:
    arrays = run_arrays()
    made = list(points.points_of_run(arrays, 0))
    assert [p["cycles"] for p in made] == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    train_losses, valid = arrays["train_losses"][0, 3:6], arrays["val_losses"][0, 3:6]
    window = features(train_losses.ravel(), valid.ravel(), arrays["lrs"][0, 3:6])
    assert torch.equal(made[5]["windows"], window)
    assert made[5]["losses"] == arrays["branch_losses"][0, 5, :, 2].tolist()
    assert made[5]["repeats"] == arrays["val_losses"][0, 6, 2]
    assert made[5]["lrs"] == pytest.approx(0.1 * 1.618**5)


def test_run_ends_where_its_history_is_not_finite_and_divergence_stays_in() -> None:
    arrays = run_arrays()
    arrays["branch_losses"][0, 3, 0, 2] = nan
    arrays["train_losses"][0, 5, 7] = nan
    made = list(points.points_of_run(arrays, 0))
    assert len(made) == 5
    assert made[3]["losses"][0] == inf
    assert made[3]["soft"][0] == 0
    assert all(p["windows"].isfinite().all() for p in made)


# --- training and judging -------------------------------------------------------------------------


def made_points(count: int = 400) -> points.Points:
    """Curves that say what is best: falling raises, flat and noisy keeps, rising lowers."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=count)
    slopes = np.array([-1.0, 0.0, 1.0])[labels]
    curves = slopes[:, None] * np.linspace(0, 4, 60) + 0.5 * rng.standard_normal((count, 60))
    windows = torch.stack([features(c, c[9::10], [0.1]) for c in curves])
    label = torch.from_numpy(labels)
    losses = 1.0 - F.one_hot(label, 3).double()
    families = [f for fold in train.FOLDS for f in fold]
    runs = torch.arange(count) // 10
    return points.Points(
        windows=windows,
        cycles=torch.ones(count, dtype=torch.int64),
        losses=losses,
        repeats=losses[:, 0],
        followed=torch.zeros(count, dtype=torch.int64),
        labels=label,
        raw_labels=label,
        soft=F.one_hot(label, 3).double(),
        runs=runs,
        tasks=np.array(["made"] * count),
        families=np.array([families[int(r) % len(families)] for r in runs]),
        optimizers=np.array(["adam"] * count),
        lrs=torch.full((count,), 0.1),
        rounds=torch.arange(count) % 10,
    )


def test_score_is_that_of_the_paper() -> None:
    some = made_points(9)
    some = dataclasses.replace(some, labels=torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2]))
    predicted = torch.tensor([0, 0, 1, 2, 1, 0, 2, 0, 1])
    result = train.score(some, predicted)
    assert result.confusion.tolist() == [[2, 1, 1], [1, 1, 1], [1, 0, 1]]
    assert result.accuracy == pytest.approx(4 / 9)
    assert result.opposite == pytest.approx(2 / 9)
    # Table 2: (3*2 + 1*1 + 3*1) / (6 + 1 + 3 + 1 + 1 + 1 + 3 + 0 + 3)
    assert result.weighted_accuracy == pytest.approx(10 / 19)


def test_regret_is_the_share_of_the_gap_that_is_lost() -> None:
    losses = torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 2, 3], [1, 4, inf], [2, 2, 2], [inf] * 3])
    taken = train.regrets(losses, torch.tensor([0, 1, 2, 2, 1, 0]))
    assert taken.tolist() == [0, 0.5, 1, 1, 0, 1]
    assert train.regrets(losses[-1:], torch.tensor([2])).tolist() == [0]


def test_inputs_of_mixed_cycles_stay_in_order() -> None:
    windows = torch.cat([random_windows(c, 2) for c in (3, 1, 2, 1)])
    cycles = torch.tensor([3, 3, 1, 1, 2, 2, 1, 1])
    read = train.inputs(SummaryNet(0), windows, cycles)
    alone = [summary(w[None], int(c)) for w, c in zip(windows, cycles, strict=True)]
    torch.testing.assert_close(read, torch.cat(alone))
    places = torch.randn(len(windows), 2)
    with_places = train.inputs(SummaryNet(0, sees_lr=True), windows, cycles, places)
    torch.testing.assert_close(with_places, torch.cat([read, places], 1))


QUICK = train.Fit(epochs=8, batch=64, lr=1e-2)


@pytest.mark.parametrize("hidden", [0, 8])
def test_summary_net_learns_curves_of_held_out_families(hidden: int) -> None:
    some, recipe = made_points(), train.Recipe(QUICK, hidden, 2)

    def learn(given: points.Points, seed: int) -> train.Predict:
        return functools.partial(train.decide, recipe.controller(given, seed))

    taken = train.cross_validate(some, learn, seed=0)
    for decisions in taken.values():
        assert train.score(some, decisions).accuracy > 0.9


def test_a_network_that_sees_the_rate_uses_it_and_can_do_without() -> None:
    """Curves that say half of what is best; how far the rate is above the usual one the rest."""
    some = made_points()
    large = some.runs % 2 == 0
    names = np.array(["adam", "momentum"] * 200)
    usual = torch.tensor([generate.usual_lr(name) for name in names])
    assert usual[:2].tolist() == pytest.approx([1e-3, 1e-2])
    lrs = torch.where(large, 1000 * usual, 30 * usual)
    torch.testing.assert_close(
        train.places(dataclasses.replace(some, lrs=lrs, optimizers=names)),
        torch.stack([torch.where(large, 3, math.log10(30)), torch.ones(400)], 1),
        check_dtype=False,
    )
    flat = some.labels == points.KEEP
    labels = torch.where(flat & large, points.LOWER, some.labels)
    some = dataclasses.replace(
        some, lrs=lrs, optimizers=names, labels=labels, losses=1.0 - F.one_hot(labels, 3).double()
    )
    controller = train.Recipe(QUICK, 8, 2, sees_lr=True).controller(some, seed=0)
    assert train.score(some, train.decide(controller, some)).accuracy > 0.9
    hidden = train.score(some, train.decide(controller, some, with_rate=False))
    assert 0.75 < hidden.accuracy < 0.88
    # Without the rate it is unsure of a flat curve.
    with torch.no_grad():
        read = train.inputs(controller, some.windows[flat], some.cycles[flat])
        keep = controller(read).softmax(1)[:, points.KEEP]
    assert 0.4 < keep.mean() < 0.6


@pytest.mark.parametrize("fit", [QUICK, dataclasses.replace(QUICK, pairwise=True)])
def test_paper_network_learns_simple_curves(fit: train.Fit) -> None:
    some = made_points(300)
    net = train.fit_conv_lstm(some, dataclasses.replace(fit, epochs=4, lr=3e-3), seed=0)
    result = train.score(some, train.decide(net, some))
    assert result.accuracy > 0.6
    assert result.opposite == 0


def test_cross_validation_never_shows_a_held_out_family() -> None:
    some = made_points(120)
    seen: list[set[str]] = []

    def spy(given: points.Points, seed: int) -> train.Predict:
        seen.append(set(given.families))
        return lambda held, _: torch.full((len(held),), len(seen) - 1)

    taken = train.cross_validate(some, spy, seed=0)[True]
    assert (taken >= 0).all()
    for family, fold in zip(some.families, taken.tolist(), strict=True):
        assert family not in seen[fold]
        assert family in train.FOLDS[fold]


def test_optimizers_are_those_of_pyoptim() -> None:
    assert {cls for cls, _ in generate.OPTIMIZERS.values()} == {
        pyoptim.Adam,
        pyoptim.RMSprop,
        pyoptim.SGD,
    }


def test_caution_takes_from_raise_alone() -> None:
    some = made_points(100)
    calm, careful = (
        train.Recipe(QUICK, 4, 2, caution).controller(some, seed=0) for caution in (0.0, 2.0)
    )
    assert isinstance(calm, SummaryNet)
    assert isinstance(careful, SummaryNet)
    numbers = train.inputs(calm, some.windows, some.cycles)
    taken = calm.each(numbers) - careful.each(numbers)
    torch.testing.assert_close(taken, torch.tensor([2.0, 0, 0]).expand_as(taken))


# --- whole trainings ------------------------------------------------------------------------------


def rates_of(policy: schedules.Policy, start: float, epochs: int, loss: float = 1.0) -> list[float]:
    return [start] + [policy.next_rate([loss], loss) for _ in range(epochs - 1)]


def test_rival_schedules_are_those_of_the_paper() -> None:
    assert rates_of(schedules.constant(0.1, 7), 0.1, 7) == [0.1] * 7
    falling = rates_of(schedules.exponential(0.1, 7), 0.1, 7)
    assert falling == pytest.approx([0.1 * 0.9**i for i in range(7)])
    # Three cosines in 28 epochs, of 4, 8 and 16.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    oracle = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4, T_mult=2)
    expected = []
    for _ in range(28):
        expected += oracle.get_last_lr()
        optimizer.step()
        oracle.step()
    assert rates_of(schedules.CyclicCosine(0.1, 28), 0.1, 28) == pytest.approx(expected)
    stalled = rates_of(schedules.Plateau(0.1, 28), 0.1, 12)
    assert stalled[:4] == [0.1] * 4
    assert stalled[4] == pytest.approx(0.01)


def test_a_controlled_training_is_that_of_the_scheduler() -> None:
    seen: list[tuple] = []

    def judge(*window: list[float]) -> tuple[float, float, float]:
        seen.append(window)
        return (1.0, 0.0, 0.0) if len(seen) < 5 else (0.0, 1.0, 0.0)

    policy = schedules.controlled(judge, "sgd", final_decay=0.5)(0.1, 20)
    rates = [0.1] + [policy.next_rate([10.5 - i, 10.25 - i], 10 - i) for i in range(11)]
    peak = 0.1 * 1.618**4
    raised = [0.1 * 1.618**n for n in range(5) for _ in range(2)]
    assert rates == pytest.approx([*raised, peak * 10 / 11, peak * 9 / 11])
    train_losses = [10.5, 10.25, 9.5, 9.25, 8.5, 8.25, 7.5, 7.25]
    assert seen[1] == (train_losses, [10, 9, 8, 7], rates[:4:2])


@pytest.mark.parametrize("name", generate.OPTIMIZERS)
def test_a_controlled_training_has_the_usual_rate_of_its_optimizer(name: str) -> None:
    told: list[float | None] = []

    class Spy(SummaryNet):
        def probabilities(self, train_losses, val_losses, lrs, usual_lr=None):
            told.append(usual_lr)
            return (0.0, 1.0, 0.0)

    policy = schedules.controlled(Spy(0), name)(0.1, 10)
    policy.next_rate([1.0], 1.0)
    expected = {"adam": 1e-3, "rmsprop": 1e-3, "sgd": 0.1, "momentum": 0.01}[name]
    assert told == [pytest.approx(expected)]


def test_policies_start_alike_and_differ_by_their_rates_alone() -> None:
    problem = problem_of("wine-mlp")
    cohort = dataclasses.replace(tiny("wine-mlp", "sgd", (0.1, 0.01)), epochs=4)
    policies = {"constant": schedules.constant, "again": schedules.constant}
    policies["falling"] = schedules.exponential
    done = compare.simulate(problem, cohort, policies, 2, problem.losses)
    assert done.metric.shape == (3, 2, 2, 4)
    torch.testing.assert_close(done.metric, done.loss)
    torch.testing.assert_close(done.metric[0], done.metric[1])
    torch.testing.assert_close(done.metric[0, ..., 0], done.metric[2, ..., 0])
    assert (done.metric[0, ..., -1] != done.metric[2, ..., -1]).all()
    assert done.lrs[2, 0, 1].tolist() == pytest.approx([0.1, 0.09, 0.081, 0.0729])
    assert (done.metric[0, :, 0] != done.metric[0, :, 1]).all()


def test_convergence_threshold_is_the_worst_of_the_best() -> None:
    metric = torch.tensor([[[1.0, 5, 3]], [[4.0, 4, 2]], [[0.0, nan, 4.5]]])
    # The best are 5, 4 and 4.5: the threshold is 4.
    for sign in (1, -1):
        up = sign > 0
        assert compare.threshold_of(sign * metric, up) == 4 * sign
        steps = compare.steps_to(4.0 * sign, sign * metric, 10, higher_is_better=up)
        assert steps.tolist() == [[20], [10], [30]]
        never = compare.steps_to(4.6 * sign, sign * metric, 10, higher_is_better=up)
        assert never.tolist() == [[20], [math.inf], [math.inf]]


class Plain:
    """Plain SGD as an optimizer that finds its own rate."""

    def __init__(self, params: list[torch.Tensor], steps: int) -> None:
        self.optimizer = torch.optim.SGD(params, lr=0.1)

    def step(self, loss: Callable[[], torch.Tensor]) -> None:
        self.optimizer.zero_grad()
        loss().backward()
        self.optimizer.step()

    def rate(self) -> float:
        return 0.1


def test_a_training_alone_has_the_start_and_the_order_of_the_others() -> None:
    problem = problem_of("wine-mlp")
    cohort = dataclasses.replace(tiny("wine-mlp", "sgd", (0.1,)), epochs=3)
    stacked = compare.simulate(problem, cohort, {"c": schedules.constant}, 2, problem.losses)
    alone = compare.simulate_alone(problem, cohort, Plain, 2, problem.losses)
    for ours, theirs in zip(vars(alone).values(), vars(stacked).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_ranks_share_the_better_place() -> None:
    assert compare.ranks([3.0, 1.0, 3.0, 2.0], higher_is_better=True) == [1, 4, 1, 3]
    assert compare.ranks([3.0, 1.0, 3.0, 2.0], higher_is_better=False) == [3, 1, 3, 2]


def test_share_lost_is_zero_for_the_best_and_one_for_the_dead() -> None:
    # Four policies, two start rates, one seed, one epoch.
    metric = torch.tensor([[1.0, 5.0], [2.0, 3.0], [3.0, 3.0], [nan, nan]]).reshape(4, 2, 1, 1)
    shares = choose.shares_lost(compare.Outcome(metric, metric, metric))
    assert shares.tolist() == [[0, 0.5], [0.25, 0], [0.5, 0], [1, 1]]


def test_proxy_tasks_are_held_out_from_their_controllers(tmp_path: Path, monkeypatch) -> None:
    some = made_points(200)
    seen: list[set[str]] = []

    class Spy:
        def controller(self, given: points.Points, seed: int) -> arc.Controller:
            seen.append(set(given.families))
            return SummaryNet(0)

    monkeypatch.setitem(choose.RECIPES, "a spy", Spy())
    controllers = choose.fold_controllers(some, "a spy", 0, tmp_path)
    choose.fold_controllers(some, "a spy", 0, tmp_path)
    assert len(seen) == len(train.FOLDS)
    assert [set(some.families) - known for known in seen] == [set(f) for f in train.FOLDS]
    cohort = dataclasses.replace(choose.proxies(["wine-mlp"])[0], epochs=2, steps=3)
    outcome = choose.closed_loop(cohort, {"spy": controllers})
    assert outcome.metric.shape == (5, 3, choose.SEEDS, 2)


def test_rules_are_judged_on_families_that_the_controller_has_not_seen(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(choose, "EPOCHS", 10)
    monkeypatch.setattr(choose, "RULE_STEPS", 2)
    monkeypatch.setattr(choose, "RULE_DRAWS", 2)
    monkeypatch.setattr(
        results,
        "RULES",
        {
            "bold": choose.Rule({"margins": None}),
            "never": choose.Rule({"margins": (0.999, 0.999)}, "other"),
        },
    )
    asked: list[tuple[str, int, int]] = []

    class Raises(SummaryNet):
        def __init__(self, recipe: str, seed: int, members: int) -> None:
            super().__init__(0, members)
            self.of = (recipe, seed, members)

        def probabilities(self, *window) -> tuple[float, float, float]:
            asked.append(self.of)
            return (0.9, 0.05, 0.05)

    def folds(some: points.Points, recipe: str, seed: int, folder: Path) -> list[Raises]:
        return [Raises(recipe, seed, members) for members in (1, 2, 3, 4)]

    monkeypatch.setattr(results, "fold_controllers", folds)
    kept = results.Results(tmp_path / "r.json")
    results.judge_rules(made_points(200), "any", ["wine-mlp"], 2, tmp_path, kept)
    counts = [row[2] + row[5] for row in kept.sections["leans"]["all"]["rows"]]
    assert sum(counts) == 200
    fold = 1 + next(i for i, f in enumerate(train.FOLDS) if "tabular" in f)
    assert set(asked) == {(name, seed, fold) for name in ("any", "other") for seed in (0, 1)}
    row, other = kept.sections["rules"].values()
    assert row["optimizer"] != other["optimizer"]
    best = row["best"]
    assert list(best) == [*schedules.RIVALS, "bold", "never"]
    assert best["bold"] != best["constant"]
    assert "| never |" in results.markdown(kept)
    assert "1/2 wine-mlp, adam" in capsys.readouterr().out


def test_rules_table_counts_places_and_losses() -> None:
    # One task, one rate, two seeds.
    best = {"constant": [[1.0, 1.2]], "cyclic cosine": [[2.0, 2.0]], "exponential": [[3.0, 3.0]]}
    best |= {"good": [[0.5, 0.7]], "bad": [[1.25, 1.27]], "third": [[2.5, 2.5]]}
    table = results.markdown(in_memory("rules", {"best": best}))
    assert "| good | 0 | 0 | 100 | 0 |" in table
    assert "| bad | 27 | 27 | 100 | 100 |" in table
    assert "| third | 79 | 79 | 0 | 100 |" in table


def in_memory(section: str, row: dict) -> results.Results:
    kept = results.Results(Path("unused"))
    kept.sections[section] = {"row": row}
    return kept


def test_stacked_lstm_is_torch_lstm() -> None:
    layer = LSTM("l", 3, 4)
    r = create([layer], 1, torch.Generator().manual_seed(0))
    w = {name: p.detach()[0] for name, p in r.params.items()}
    module = torch.nn.LSTM(3, 4, batch_first=True)
    bias = w["l.in.b"][0].clone()
    bias[4:8] += 1  # the layer's forget gate starts open
    module.load_state_dict(
        {
            "weight_ih_l0": w["l.in.w"].T,
            "weight_hh_l0": w["l.rec.w"].T,
            "bias_ih_l0": bias,
            "bias_hh_l0": w["l.rec.b"][0],
        }
    )
    x = torch.randn(1, 5, 6, 3)
    torch.testing.assert_close(layer(r, x)[0], module(x[0])[0], rtol=1e-5, atol=1e-6)


def test_solids_are_told_apart_by_their_surface() -> None:
    clouds, kinds = solids(600, 24, torch.Generator().manual_seed(0))
    assert clouds.shape == (600, 24, 3)
    assert set(kinds.tolist()) == set(range(6))
    spread = clouds.norm(dim=2).std(1)
    means = torch.stack([spread[kinds == k].mean() for k in range(6)])
    assert means.argmin() == 0  # a sphere, though stretched


def test_comparison_resumes_counts_places_and_draws(tmp_path: Path, monkeypatch, capsys) -> None:
    small = dataclasses.replace(UNSEEN["photo-coordinates"], epochs=10, steps=2, batch=8)
    monkeypatch.setitem(UNSEEN, "photo-coordinates", small)
    monkeypatch.setattr(comparison.rivals, "available", lambda: {"prodigy": Plain})
    path = tmp_path / "r.json"
    options = ["compare", "--results", str(path), "--tasks", "photo-coordinates", "--seeds", "2"]
    assert cli.main([*options, "--plot"]) == 0
    printed = capsys.readouterr().out
    assert "6/6 photo-coordinates, prodigy" in printed
    assert "photo-coordinates, PSNR, dB:" in printed
    assert "of 3 cells among the paper's four" in printed
    assert {p.name for p in tmp_path.iterdir()} == {
        *("r.json", "r.md", "arc-unseen.png", "arc-unseen-rates.png")
    }
    before = path.read_bytes()
    monkeypatch.setattr(comparison, "_row", None)  # nothing is made again
    assert cli.main(options) == 0
    assert path.read_bytes() == before


def test_goal_counts_cells_that_are_second_or_below_the_constant_rate() -> None:
    kept = results.Results(Path("unused"))

    def row(policy: str, values: list[list[float]]) -> dict:
        metric = [[[v] for v in seeds] for seeds in values]
        return {"task": "fashion-mixer", "policy": policy, "metric": metric, "lrs": metric}

    kept.sections["unseen"] = {
        "a": row("constant", [[70.0, 72.0], [60.0, 60.0], [50.0, 50.0]]),
        "b": row("exponential", [[75.0, 75.0], [70.0, 70.0], [40.0, 40.0]]),
        "c": row("prodigy", [[80.0, 80.0]]),
        "d": row("arc", [[69.5, 70.5], [62.0, 62.0], [49.0, 49.0]]),
    }
    assert comparison.goal(kept) == (
        "arc: best or second in 2 of 3 cells among the paper's four, in 0 among all; more than a "
        "standard deviation of the constant rate's runs below their mean in 1 cells, and in 3 of 6 "
        "single runs."
    )
    table = comparison.markdown(kept)
    row = "| 71.00 ± 1.00 | 75.00 ± 0.00 | 70.00 ± 0.50 | **80.00 ± 0.00** |"
    assert f"| fashion-mixer | 0.01 {row}" in table
    assert "| 0.01 | arc | 70.00 ± 0.50 | 70.00 ± 0.50 | 40 ± 0 | 4 | 3 |" in table
    assert "| 0.0001 | prodigy | 80.00 ± 0.00 | 80.00 ± 0.00 | 40 ± 0 | 1 |  |" in table


def test_rivals_are_used_where_they_are_installed(monkeypatch, capsys) -> None:
    class SaLSa(torch.optim.SGD):
        def __init__(self, params: list[torch.Tensor]) -> None:
            super().__init__(params, lr=0.1)

        def step(self, closure: Callable[[], torch.Tensor]) -> None:
            self.zero_grad()
            closure().backward()
            super().step()

    monkeypatch.setattr(pyoptim, "SaLSa", SaLSa, raising=False)
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    assert list(rivals.available()) == ["salsa"]
    assert "pip install prodigyopt" in capsys.readouterr().out
    param = torch.tensor([2.0], requires_grad=True)
    trainer = rivals.available()["salsa"]([param], 10)
    trainer.step(lambda: param.square().sum())
    assert (param.item(), trainer.rate()) == (pytest.approx(1.6), 0.1)


@pytest.mark.parametrize("name", UNSEEN)
def test_unseen_task_trains_and_has_its_metric(name: str) -> None:
    if name == "fashion-mixer" and not FASHION.is_dir():
        pytest.skip(f"no Fashion-MNIST in {FASHION}")
    task = UNSEEN[name]
    problem = task.build()
    cohort = Cohort(0, name, task.optimizer, 0.0, 2, 15, task.batch, (0.0, task.rates[1]))
    policies = {"constant": schedules.constant}
    done = compare.simulate(problem, cohort, policies, 1, task.metric(problem))
    still, moving = done.metric[0, :, 0, -1].tolist()
    assert (moving > still) if task.higher_is_better else (moving < still)
    assert max(task.rates) / min(task.rates) == pytest.approx(100)
    if name == "words-lstm":
        assert still == pytest.approx(math.exp(float(done.loss[0, 0, 0, -1])), rel=1e-5)
        assert still == pytest.approx(600, rel=0.15)


def test_words_are_numbered_by_frequency() -> None:
    counts = torch.bincount(words(50))
    assert len(counts) == 50
    assert (counts[1:-1] >= counts[2:]).all()


def test_results_are_kept_and_not_made_again(tmp_path: Path) -> None:
    path, made = tmp_path / "r.json", []

    def make() -> dict:
        made.append(1)
        return {"value": len(made)}

    for _ in range(2):
        assert results.Results(path).once("section", "key", make) == {"value": 1}
    assert len(made) == 1


def test_command_makes_judges_and_ships(tmp_path: Path, monkeypatch, capsys) -> None:
    """The whole pipeline in small: two cohorts of different folds."""
    monkeypatch.setattr(
        generate,
        "draw_cohort",
        lambda i: dataclasses.replace(
            tiny(["wine-mlp", "friedman-mlp"][i % 2]), index=i, epochs=1, batch=8
        ),
    )
    monkeypatch.setattr(choose, "draw_cohort", generate.draw_cohort)
    monkeypatch.setattr(choose, "EPOCHS", 2)
    monkeypatch.setattr(cli, "PROXIES", ["wine-mlp"])
    monkeypatch.setattr(cli, "LOOP_RECIPES", ["logistic"])
    monkeypatch.setattr(cli, "SHIPPED", {"default": "logistic", "left out": "logistic"})
    monkeypatch.setattr(choose, "FOLDS", (("tabular",), ("regression",)))
    monkeypatch.setattr(train, "FOLDS", (("tabular",), ("regression",)))
    options = [*("--folder", tmp_path / "data", "--cohorts", 2, "--results", tmp_path / "r.json")]
    options += ["--weights", tmp_path / "weights", "--candidates", "always keep", "logistic"]
    options += ["--names", "default"]
    assert cli.main(["all", *map(str, options)]) == 0
    printed = capsys.readouterr().out
    assert "| always keep |" in printed
    assert "| small rate |" in printed
    digest = printed.split('"default": "')[1][:64]
    shipped = load(tmp_path / "weights" / "arc-default.safetensors", digest)
    assert isinstance(shipped, SummaryNet)
    assert len(list((tmp_path / "weights").iterdir())) == 1
    rows = json.loads((tmp_path / "r.json").read_text())
    row = rows["points"]["logistic | 0"]
    assert sum(map(sum, row["validation"]["confusion"])) == rows["data"]["all"]["points"] == 40


# --- what ships -----------------------------------------------------------------------------------


def falling(cycles: int) -> tuple[list[float], list[float]]:
    draw = random.Random(0)
    curve = [2 - 0.1 * i / 100 + 0.002 * draw.random() for i in range(100 * cycles)]
    return curve, curve[24::25]


def rising(cycles: int) -> tuple[list[float], list[float]]:
    draw = random.Random(0)
    curve = [1 + 2 * (i / 100) ** 2 + 0.3 * draw.random() for i in range(100 * cycles)]
    return curve, curve[24::25]


@pytest.mark.parametrize("name", arc.WEIGHTS)
def test_shipped_controller_is_small_and_sane(name: str) -> None:
    controller = load(name)
    path = Path(arc.__file__).parent / "weights" / f"arc-{name}.safetensors"
    assert path.stat().st_size < 500_000
    assert sum(p.numel() for p in controller.parameters()) < 80_000
    for cycles in (1, 2, 3):
        rates = [1e-5] * cycles
        for train_losses, valid in (falling(cycles), (falling(cycles)[0], None)):
            up, keep, down = controller.probabilities(train_losses, valid, rates)
            assert up > 0.5 > keep + down
        for train_losses, valid in (rising(cycles), (rising(cycles)[0], None)):
            up, keep, down = controller.probabilities(train_losses, valid, rates)
            assert up < min(0.2, keep, down)
            # The paper's network cannot tell whether keeping or lowering is better.
            assert down > keep or name == "conv-lstm"


def test_default_controller_ships() -> None:
    assert {"default", "conv-lstm"} <= set(arc.WEIGHTS)
