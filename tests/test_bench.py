"""The benchmarks count, compare and report correctly; how fast anything is, is not tested here."""

import json
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

import pyoptim

# Installed as pyoptim.bench; in a source tree that is not installed it is the top-level folder.
PACKAGE = "pyoptim.bench" if find_spec("pyoptim.bench") else "bench"
traffic = import_module(f"{PACKAGE}.bytes")
cli = import_module(f"{PACKAGE}.cli")
goals = import_module(f"{PACKAGE}.goals")
implementations = import_module(f"{PACKAGE}.implementations")
memory = import_module(f"{PACKAGE}.memory")
probe = import_module(f"{PACKAGE}.probe")
report = import_module(f"{PACKAGE}.report")
results = import_module(f"{PACKAGE}.results")
runner = import_module(f"{PACKAGE}.runner")
timing = import_module(f"{PACKAGE}.timing")
workloads = import_module(f"{PACKAGE}.workloads")

DtypeSet = traffic.DtypeSet
FLOAT32 = DtypeSet.parse("float32")
FOR_LOOP = implementations.IMPLEMENTATIONS["torch-for-loop"]
DTYPES = ("float32", "bfloat16+float32", "bfloat16", "float64")

# Counted by hand: parameter read and written, gradient read, each state read and written.
BYTES = {
    "sgd": (12, 6, 6, 24),
    "sgd-momentum": (20, 14, 10, 40),
    "adam": (28, 22, 14, 56),
    "adam-amsgrad": (36, 30, 18, 72),
    "adamw": (28, 22, 14, 56),
    "rmsprop": (20, 14, 10, 40),
    "rmsprop-momentum": (28, 22, 14, 56),
    "rmsprop-centered": (28, 22, 14, 56),
    "rmsprop-centered-momentum": (36, 30, 18, 72),
    "adagrad": (20, 14, 10, 40),
    "expectigrad": (36, 30, 18, 72),
    "expectigrad-dense": (28, 22, 14, 56),
    "adamp": (28, 22, 14, 56),
    "adamp-channel": (28, 22, 14, 56),
    "adamp-layer": (28, 22, 14, 56),
    "sgdp": (20, 14, 10, 40),
    "sgdp-channel": (20, 14, 10, 40),
}
OF_TORCH = [
    name for name, (cls, _) in implementations.OPTIMIZERS.items() if hasattr(torch.optim, cls)
]


@pytest.mark.parametrize("optimizer", traffic.COSTS)
def test_bytes_per_element_are_those_counted_by_hand(optimizer):
    sets = [DtypeSet.parse(name) for name in DTYPES]
    assert (
        tuple(traffic.bytes_per_element(optimizer, dtypes) for dtypes in sets) == BYTES[optimizer]
    )


def states_kept(implementation, optimizer):
    params = workloads.make_params(workloads.parse("1x16"), FLOAT32)
    made = implementations.make_optimizer(implementation, optimizer, FLOAT32, params)
    made.step()
    return {name for name, value in made.state[params[0]].items() if value.numel() == 16}


@pytest.mark.parametrize("optimizer", OF_TORCH)
def test_counted_states_are_those_torch_keeps(optimizer):
    assert states_kept(FOR_LOOP, optimizer) == set(traffic.COSTS[optimizer].states)


@pytest.mark.parametrize("optimizer", traffic.COSTS)
def test_counted_states_are_those_pyoptim_keeps(optimizer):
    reference = implementations.IMPLEMENTATIONS["reference"]
    assert states_kept(reference, optimizer) == set(traffic.COSTS[optimizer].states)


@pytest.mark.parametrize("text", ["int32", "nonsense", "float32+float32+float32", "save", ""])
def test_dtype_set_refuses_what_is_not_a_floating_dtype(text):
    with pytest.raises(ValueError, match="floating dtypes"):
        DtypeSet.parse(text)


@pytest.mark.parametrize("text", ["float32", "bfloat16+float32", "float64"])
def test_dtype_set_prints_as_it_is_written(text):
    assert str(DtypeSet.parse(text)) == text


def test_workloads_have_the_sizes_in_their_titles():
    sizes = {name: (len(w.shapes), w.numel) for name, w in workloads.WORKLOADS.items()}
    assert sizes == {
        "large": (1, 50_000_000),
        "transformer": (150, 24_637_440),
        "small": (1000, 1_024_000),
        "tiny": (1000, 16_000),
        "one": (1, 1),
    }


def test_workload_can_be_given_as_count_and_numel():
    assert workloads.parse("3x70").shapes == ((70,),) * 3
    with pytest.raises(ValueError, match="COUNTxNUMEL"):
        workloads.parse("0x70")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("optimizer", traffic.COSTS)
def test_loop_moves_the_bytes_of_the_optimizer(optimizer, dtypes):
    dtypes, workload = DtypeSet.parse(dtypes), workloads.parse("2x50")
    arrays = probe.make_arrays(optimizer, dtypes, workload)
    moved = sum(part.nbytes() for part in arrays)
    assert moved == 100 * traffic.bytes_per_element(optimizer, dtypes)


@pytest.mark.native
@pytest.mark.parametrize("dtypes", ["float32", "float64"])
def test_loop_reads_and_writes_every_element(dtypes):
    arrays = probe.make_arrays("adamw", DtypeSet.parse(dtypes), workloads.parse("1x1003"))
    before = [array.clone() for array in arrays[0].read_write]
    probe.run(probe.load_stream(), arrays, 1)
    assert all((new != old).all() for new, old in zip(arrays[0].read_write, before, strict=True))


def test_summary_has_median_minimum_and_quartiles():
    assert timing.summarize([5.0, 1.0, 4.0, 2.0, 3.0]) == timing.Summary(3.0, 1.0, 2.0, 4.0)
    assert timing.summarize([7.0]) == timing.Summary(7.0, 7.0, 7.0, 7.0)


def test_pairwise_ratio_is_the_median_of_ratios_not_the_ratio_of_medians():
    # ratios 2, 3, 1; the medians would give 4 / 2
    assert timing.pairwise([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]).median == 2.0
    assert timing.pairwise([10.0, 2.0, 30.0], [1.0, 2.0, 10.0]).median == 3.0


def test_pairwise_ratio_refuses_series_of_different_length():
    with pytest.raises(ValueError, match="zip"):
        timing.pairwise([1.0, 2.0], [1.0])


def test_interleave_times_every_variant_in_every_repetition():
    calls = []
    variants = [timing.Variant(name, lambda name=name: calls.append(name)) for name in "abc"]
    assert timing.interleave(variants, reps=5, seconds=60.0) == 5
    assert [len(variant.wall) for variant in variants] == [5, 5, 5]
    rounds = [calls[at : at + 3] for at in range(0, 15, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1, "the order is not random"


def test_interleave_stops_when_time_is_up_but_not_before_enough_repetitions():
    variant = timing.Variant("a", lambda: None)
    assert timing.interleave([variant], reps=100, seconds=0.0) == timing.MIN_REPS


def test_interleave_runs_before_each_step_and_restores_the_threads():
    calls, threads = [], torch.get_num_threads()
    variant = timing.Variant(
        "a",
        lambda: calls.append("step"),
        threads=threads + 1,
        before=lambda: calls.append("before"),
        warm_steps=1,
        steps_per_sample=2,
    )
    timing.interleave([variant], reps=1, seconds=60.0)
    assert calls == ["step", *["before", "step"] * 2]
    assert torch.get_num_threads() == threads


def test_fresh_gradients_have_the_same_values_in_other_tensors():
    params = workloads.make_params(workloads.parse("3x5"), FLOAT32)
    before = [param.grad for param in params]
    runner._backward(params)()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, before, strict=True))
    assert not any(p.grad is grad for p, grad in zip(params, before, strict=True))


def test_peak_memory_sees_what_is_freed_again():
    peak = memory.peak_bytes(lambda: torch.ones(16_000_000).sum())
    if peak is None:
        pytest.skip("this system does not tell the peak resident set")
    assert 60e6 < peak < 80e6


def test_state_bytes_counts_all_state_tensors():
    params = workloads.make_params(workloads.parse("2x100"), FLOAT32)
    made = implementations.make_optimizer(FOR_LOOP, "adamw", FLOAT32, params)
    made.step()
    assert memory.state_bytes(made) == 2 * (2 * 400 + 4)


def test_what_cannot_be_measured_has_a_reason():
    fused = implementations.IMPLEMENTATIONS["torch-fused"]
    mixed = DtypeSet.parse("bfloat16+float32")
    assert "no fused" in implementations.why_not(fused, "rmsprop", FLOAT32)
    assert "parameter's dtype" in implementations.why_not(fused, "adamw", mixed)
    assert implementations.why_not(fused, "adamw", FLOAT32) is None
    reference = implementations.IMPLEMENTATIONS["reference"]
    narrow = implementations.why_not(reference, "expectigrad", DtypeSet.parse("bfloat16"))
    assert "measure it in bfloat16+float32" in narrow
    assert implementations.why_not(reference, "expectigrad", mixed) is None
    assert "no Expectigrad" in implementations.why_not(FOR_LOOP, "expectigrad", FLOAT32)


def test_what_a_projection_costs_is_measured_beside_the_optimizer_without_it():
    without = implementations.IMPLEMENTATIONS["without-projection"]
    params = workloads.make_params(workloads.parse("matrices"), FLOAT32)[:1]
    assert type(params[0].shape) is torch.Size
    assert params[0].shape == (32, 32)
    made = implementations.make_optimizer(without, "adamp-channel", FLOAT32, params)
    assert type(made) is pyoptim.AdamW
    made = implementations.make_optimizer(without, "sgdp", FLOAT32, params)
    assert type(made) is pyoptim.SGD
    assert made.param_groups[0]["momentum"] == 0.9
    assert implementations.why_not(without, "adamw", FLOAT32) == "adamw projects nothing"


def test_case_that_does_not_fit_in_memory_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    case = runner.Case("adamw", FLOAT32, workloads.parse("1x1000"), 1)
    rows, skipped = runner.run_case(case, runner.Settings())
    assert rows == []
    assert "GB" in skipped[0]["reason"]


def test_readme_section_is_replaced_and_the_rest_is_kept():
    text = f"head\n{report.BEGIN}\nold\n{report.END}\ntail\n"
    assert report.replace_section(text, "new") == f"head\n{report.BEGIN}\nnew\n{report.END}\ntail\n"


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        report.BEGIN,
        report.END + report.BEGIN,
        report.BEGIN + report.END + report.BEGIN,
    ],
    ids=["none", "no end", "reversed", "twice"],
)
def test_readme_without_one_pair_of_markers_is_refused(text):
    with pytest.raises(ValueError, match="bench:begin"):
        report.replace_section(text, "new")


def test_markdown_table_aligns_numbers_to_the_right():
    table = report.markdown_table(["a", "b"], [["x", "1"]])
    assert table == "| a | b |\n| --- | ---: |\n| x | 1 |"


@pytest.mark.parametrize(
    ("value", "text"), [(0.987, "0.99"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100")]
)
def test_ratios_show_two_or_three_digits(value, text):
    assert report.significant(value) == text


def _row(**changes):
    row = {
        "optimizer": "adamw",
        "dtypes": "float32",
        "workload": "large",
        "threads": 1,
        "grads": "hot",
        "implementation": "pyoptim",
        "share_of_loop": {"median": 0.97},
        "speedup_over": {"torch-fused": {"median": 1.02}, "torch-compiled": {"median": 0.9}},
        "ns_per_tensor": 90.0,
    }
    return row | changes


def _goal(title, optimizer="adamw"):
    return next(g for g in goals.GOALS if g.title == title and optimizer in g.optimizers)


def test_goal_reports_the_worst_row_of_each_optimizer():
    found = results.Results(rows=[_row(), _row(workload="small", speedup_over={})])
    goal = _goal("over the compiled step")
    assert goals.values(goal, found) == {"adamw": 0.9}
    assert goals._verdict(goal, {"adamw": 0.9}) == "no: adamw"


def test_goal_reads_only_rows_of_its_workload_threads_and_dtype():
    rows = [_row(workload="tiny"), _row(workload="tiny", threads=2, ns_per_tensor=500.0)]
    goal = _goal("tiny, hot: ns per tensor")
    assert goals.values(goal, results.Results(rows=rows)) == {"adamw": 90.0}
    assert goal.is_met(100.0)
    assert not goal.is_met(100.1)


def test_goal_without_rows_is_not_measured():
    assert goals._verdict(_goal("one: ns per step"), {}) == "not measured"
    assert goals.goals_table(results.Results()).count("not measured") == len(goals.GOALS)


def test_later_result_file_replaces_rows_of_an_earlier_one(tmp_path):
    first, second = results.Results.start("first"), results.Results.start("second")
    first.rows = [_row(ns_per_tensor=1.0), _row(workload="small")]
    second.rows = [_row(ns_per_tensor=2.0)]
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, content in zip(paths, (first, second), strict=True):
        content.save(path)
    merged = results.load(paths)
    assert [run["command"] for run in merged.runs] == ["first", "second"]
    assert [row["ns_per_tensor"] for row in merged.rows] == [2.0, 90.0]


def test_file_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="schema"):
        results.load([path])


@pytest.mark.parametrize("option", ["--optimizers", "--workloads", "--dtypes", "--implementations"])
def test_unknown_name_is_refused_with_what_is_known(option, capsys):
    with pytest.raises(SystemExit):
        cli.main([option, "unknown"])
    assert "'unknown' is" in capsys.readouterr().err


@pytest.fixture(scope="module")
def quick_result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    workload, optimizers = "20x16,one", "adamw,rmsprop"
    options = ["--quick", "--workloads", workload, "--optimizers", optimizers, "--reps", "3"]
    assert cli.main([*options, "--threads", "1,2", "--seconds", "4", "--out", str(path)]) == 0
    return path


def test_quick_run_measures_every_case(quick_result):
    content = json.loads(quick_result.read_text())
    cases = {(row["optimizer"], row["workload"], row["threads"]) for row in content["rows"]}
    assert len(cases) == 2 * 2 * 2
    assert {"torch-for-loop", "torch-foreach"} <= {row["implementation"] for row in content["rows"]}
    assert all(row["wall_seconds"]["median"] > 0 for row in content["rows"])
    assert all(
        (row["cpu_seconds"] is None) == (row["threads"] == 2)
        for row in content["rows"]
        if row["implementation"] != runner.ONE_THREAD
    )
    assert content["runs"][0]["machine"]["cores"] >= 1


@pytest.mark.native
def test_quick_run_compares_pyoptim_with_every_baseline(quick_result):
    found = results.load([quick_result])
    (row,) = found.find(
        implementation="pyoptim", optimizer="adamw", workload="20x16", threads=2, grads="hot"
    )
    names = {"torch-for-loop", "torch-foreach", "torch-fused", runner.ONE_THREAD}
    assert set(row["speedup_over"]) == names
    assert row["share_of_loop"]["median"] > 0


@pytest.mark.native
def test_reports_are_made_from_a_result(quick_result, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{report.BEGIN}\n{report.END}\nb\n")
    assert cli.main(["--table", str(quick_result)]) == 0
    assert cli.main(["--goals", str(quick_result)]) == 0
    output = capsys.readouterr().out
    assert "20 x 16 elements" in output
    assert "one: ns per step" in output
    assert cli.main(["--table", str(quick_result), "--write-readme", str(readme)]) == 0
    assert "Host cost" in readme.read_text()
    assert readme.read_text().endswith("\nb\n")


@pytest.mark.native
def test_pictures_are_drawn(quick_result):
    pytest.importorskip("matplotlib")
    assert cli.main(["--plot", str(quick_result)]) == 0
    for name in ("roofline.png", "bars.png"):
        assert (quick_result.parent / name).read_bytes().startswith(b"\x89PNG")


def test_readme_without_result_is_an_error(tmp_path, capsys):
    assert cli.main(["--write-readme", str(tmp_path / "README.md")]) == 1
    assert "needs --table" in capsys.readouterr().err
