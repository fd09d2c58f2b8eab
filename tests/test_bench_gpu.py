"""The GPU's benchmarks and checks decide correctly; no GPU takes part, so no result is a GPU's."""

import itertools
import json
import math
import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import DeviceType

import pyoptim

PACKAGE = "pyoptim.bench" if find_spec("pyoptim.bench") else "bench"
cli = import_module(f"{PACKAGE}.cli")
goals = import_module(f"{PACKAGE}.goals")
implementations = import_module(f"{PACKAGE}.implementations")
results = import_module(f"{PACKAGE}.results")
cpu_runner = import_module(f"{PACKAGE}.runner")
workloads = import_module(f"{PACKAGE}.workloads")
traffic = import_module(f"{PACKAGE}.bytes")
asynchronous = import_module(f"{PACKAGE}.gpu.asynchronous")
neighbours = import_module(f"{PACKAGE}.gpu.coreset")
compare = import_module(f"{PACKAGE}.gpu.compare")
devices = import_module(f"{PACKAGE}.gpu.device")
gpu_goals = import_module(f"{PACKAGE}.gpu.goals")
graphs = import_module(f"{PACKAGE}.gpu.graphs")
line_search = import_module(f"{PACKAGE}.gpu.line_search")
plan = import_module(f"{PACKAGE}.gpu.plan")
runner = import_module(f"{PACKAGE}.gpu.runner")
scenarios = import_module(f"{PACKAGE}.gpu.scenarios")
session = import_module(f"{PACKAGE}.gpu.session")
timing = import_module(f"{PACKAGE}.gpu.timing")
tune = import_module(f"{PACKAGE}.gpu.tune")

FLOAT32 = traffic.DtypeSet.parse("float32")
SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"
US = 1e-6


@dataclass
class SimulatedDevice:
    """A host and a device with clocks of their own, and a queue of bounded length between them."""

    torch_device = torch.device("cpu")
    cache_bytes = 1000
    copy_bytes = 4096
    queue: int = 1024
    host: float = 0.0
    pending: list[float] = field(default_factory=list)  # when each launch will be done

    def enqueue(self, host: float, device: float) -> None:
        """A launch that takes the host `host` and the device `device` seconds."""
        self.host += host
        if len(self.pending) >= self.queue:
            self.host = max(self.host, self.pending[-self.queue])
        self.pending.append(max(self.host, self._free_at()) + device)

    def step(self, host: float, device: float):
        return lambda: self.enqueue(host, device)

    def _free_at(self) -> float:
        return self.pending[-1] if self.pending else 0.0

    def now(self) -> float:
        return self.host

    def synchronize(self) -> None:
        self.host = max(self.host, self._free_at())

    def occupy(self, seconds: float) -> None:
        self.enqueue(0.0, seconds)

    def mark(self) -> float:
        return max(self.host, self._free_at())

    def is_reached(self, mark: float) -> bool:
        return self.host >= mark

    def seconds(self, start: float, end: float) -> float:
        return end - start


@dataclass
class HostDevice(SimulatedDevice):
    """Runs on the CPU, at once; its clocks tick once per reading."""

    free_bytes: int = 2**33

    def now(self) -> float:
        self.host += 1e-3
        return self.host

    def mark(self) -> float:
        return self.now()

    def occupy(self, seconds: float) -> None:
        self.host += seconds

    def available_bytes(self) -> int:
        return self.free_bytes

    def peak_bytes(self, call) -> int:
        call()
        return 12

    def launches(self, call) -> int:
        call()
        return 3

    def release(self) -> None:
        pass


# -- clocks ----------------------------------------------------------------------------------------


def sampled(device, steps, launches=1):
    variant = timing.GpuVariant("a", steps, launches)
    timing.choose_steps_per_sample(device, variant)
    timing.take_sample(device, variant)
    return variant


@pytest.mark.parametrize(
    ("host", "busy"), [(100 * US, 10 * US), (10 * US, 1000 * US)], ids=["host", "device"]
)
def test_host_device_and_wall_time_are_told_apart(host, busy):
    device = SimulatedDevice()
    variant = sampled(device, [device.step(host, busy)])
    assert variant.host == [pytest.approx(host)]
    assert variant.device == [pytest.approx(busy)]
    first_launch = host / variant.steps_per_sample
    assert variant.wall == [pytest.approx(max(host, busy), abs=first_launch + busy)]


def test_device_time_is_taken_only_while_the_queue_is_full():
    device = SimulatedDevice()
    variant = timing.GpuVariant("a", [device.step(100 * US, 10 * US)], steps_per_sample=20)
    variant.enqueue_seconds = 0.0  # far too little: the first try comes too late
    assert timing._device_seconds(device, variant) == pytest.approx(10 * US)
    assert variant.enqueue_seconds == pytest.approx(20 * 100 * US)


def test_device_time_is_unknown_where_the_queue_is_too_short():
    device = SimulatedDevice(queue=4)
    variant = timing.GpuVariant("a", [device.step(100 * US, 10 * US)], steps_per_sample=20)
    assert timing._device_seconds(device, variant) is None


def test_step_with_more_launches_than_the_queue_holds_has_no_device_time():
    device = SimulatedDevice()
    variant = sampled(device, [device.step(50 * US, 50 * US)], launches=timing.QUEUE + 1)
    assert variant.device == [None]
    assert variant.wall[0] > 0


def test_samples_never_fill_the_queue():
    device = SimulatedDevice()
    variant = timing.GpuVariant("a", [device.step(1 * US, 1 * US)], launches=300)
    timing.choose_steps_per_sample(device, variant)
    assert variant.steps_per_sample * 300 <= timing.QUEUE
    assert variant.host_steps * 300 <= timing.QUEUE // 2


def test_sets_of_parameters_take_turns():
    calls = []
    variant = timing.GpuVariant("a", [lambda n=n: calls.append(n) for n in range(3)])
    variant.steps_per_sample = 4
    variant.run_sample()
    variant.run_sample()
    assert calls == [0, 1, 2, 0, 1, 2, 0, 1]


def test_unknown_times_are_left_out_of_ratios():
    assert timing.pairwise_known([2.0, None, 6.0, 8.0], [1.0, 1.0, None, 2.0]) is None
    found = timing.pairwise_known([2.0, None, 6.0, 8.0], [1.0, 1.0, 2.0, 2.0])
    assert found.median == 3.0
    assert timing.summarize_known([None, None]) is None


# -- running cases ---------------------------------------------------------------------------------

ON_HOST = ("torch-for-loop", "torch-foreach", "torch-fused", "reference")


def run_case(optimizer="adamw", workload="3x70", names=ON_HOST, device=None, dtypes="float32"):
    case = cpu_runner.Case(
        optimizer,
        traffic.DtypeSet.parse(dtypes),
        workloads.parse(workload),
        1,
        device="cuda",
    )
    settings = cpu_runner.Settings(names, reps=3, seconds=60.0)
    return runner.run_case(case, settings, device or HostDevice())


def test_every_implementation_gets_a_row_beside_the_copy():
    rows, skipped = run_case()
    assert skipped == []
    assert [row["implementation"] for row in rows] == [*ON_HOST, "loop"]
    row = rows[0]
    assert row["launches_per_step"] == 3
    assert row["temporary_bytes"] == 12
    assert row["state_bytes"] == 3 * (2 * 70 * 4 + 4)
    assert set(row["speedup_over"]) == set(row["host_speedup_over"]) == set(ON_HOST[1:])
    assert row["host_ns_per_tensor"] == pytest.approx(row["host_seconds"]["median"] / 3 * 1e9)
    assert {row["device"] for row in rows} == {"cuda"}


def test_share_is_that_of_a_copy_of_as_many_bytes():
    device = SimulatedDevice()
    case = cpu_runner.Case("sgd", FLOAT32, workloads.parse("1x1000"), 1, device="cuda")
    # The copy moves 2 * 4096 bytes in 2 us; the step's 12 000 in 6 us are 12/6 of 8.192/2.
    step = timing.GpuVariant("a", [], wall=[6 * US] * 3, device=[6 * US] * 3)
    roof = timing.GpuVariant("loop", [], wall=[9.0] * 3, device=[2 * US] * 3)
    found = runner.share_of_copy(case, step, roof, device)
    assert found.median == pytest.approx((12000 / 6) / (2 * 4096 / 2))
    row = runner._roof_row(case, roof, device)
    assert row["gb_per_second"] == pytest.approx(2 * 4096 / (2 * US) * 1e-9)


def test_small_parameters_are_rotated_until_the_cache_is_too_small():
    def sets(numel):
        case = cpu_runner.Case("sgd", FLOAT32, workloads.parse(f"1x{numel}"), 1, device="cuda")
        return runner.n_sets(case, SimulatedDevice())

    assert [sets(n) for n in (1, 50, 100, 1000)] == [runner.MAX_SETS, 4, 2, 1]
    rows, _ = run_case(workload="1x50", optimizer="sgd", names=["torch-foreach"])
    assert rows[0]["rotated_sets"] == 4


def test_implementation_that_raises_is_reported_and_the_others_are_measured(monkeypatch):
    def make(implementation, *arguments):
        if implementation.name == "torch-foreach":
            raise RuntimeError("out of memory\nand a long explanation")
        return original(implementation, *arguments)

    original = implementations.make_optimizer
    monkeypatch.setattr(implementations, "make_optimizer", make)
    rows, skipped = run_case()
    assert [row["implementation"] for row in rows][:2] == ["torch-for-loop", "torch-fused"]
    (failure,) = skipped
    assert failure["reason"] == "RuntimeError: out of memory"
    assert failure["failed"]


@pytest.mark.parametrize("name", ["pyoptim-cuda", "pyoptim-triton", "pyoptim-cuda-graph"])
def test_gpu_engines_are_not_measured_on_the_cpu(name):
    chosen = implementations.IMPLEMENTATIONS[name]
    assert "cuda tensors only" in implementations.why_not(chosen, "adamw", FLOAT32, "cpu")


def test_cpu_engine_is_not_measured_on_a_gpu():
    chosen = implementations.IMPLEMENTATIONS["pyoptim"]
    assert "cpu tensors only" in implementations.why_not(chosen, "adamw", FLOAT32, "cuda")


def test_case_that_does_not_fit_is_skipped_with_the_reason():
    rows, skipped = run_case(workload="1x1000000", device=HostDevice(free_bytes=10**7))
    assert rows == []
    assert "GB" in skipped[0]["reason"]


def test_work_on_the_device_is_counted_without_ranges_around_it():
    def event(name, device=DeviceType.CUDA, is_range=False):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=is_range)

    events = [
        event("update_kernel"),
        event("Memcpy HtoD"),
        event("Memset"),
        event("Optimizer.step#AdamW.step"),
        event("mine", is_range=True),
        event("aten::add", DeviceType.CPU),
    ]
    assert devices.count_device_work(events) == 3


# -- sessions, plans and goals ---------------------------------------------------------------------


def test_what_there_is_no_time_for_is_listed(tmp_path):
    cases = list(plan.cases(is_quick=True))
    found = results.Results.start("x", "cuda")
    ran = []

    def run(case, settings):
        ran.append(case)
        return [], []

    session.measure(found, cases, run, lambda case: [], session.Limits(3, 0.0), tmp_path / "a.json")
    assert ran == []
    assert found.skipped[0]["implementation"] == f"all of {cases[0]}"
    assert len(found.skipped) == len(cases)
    session.measure(
        found, cases, run, lambda case: [], session.Limits(3, 60.0), tmp_path / "a.json"
    )
    assert ran == cases


def test_only_a_failure_of_pyoptim_fails_the_run():
    found = results.Results()
    found.skipped = [
        {"implementation": "torch-fused", "failed": True},
        {"implementation": "pyoptim-cuda", "reason": "not built"},
    ]
    assert not session.has_failed(found)
    found.skipped.append({"implementation": "pyoptim-triton", "failed": True})
    assert session.has_failed(found)


def test_plan_names_every_optimizer_and_no_case_twice():
    cases = list(plan.cases(is_quick=False))
    keys = [str(case) for case in cases]
    assert len(keys) == len(set(keys))
    assert {case.optimizer for case in cases} == set(implementations.OPTIMIZERS)
    sizes = {case.workload.numel for case in cases}
    assert {10**6, 16 * 10**6, 64 * 10**6, 2 * 10**8, 10**9} <= sizes


def test_goals_are_about_cases_of_the_plan():
    planned = {(c.optimizer, c.workload.name, str(c.dtypes)) for c in plan.cases(is_quick=False)}
    for goal in gpu_goals.GPU_GOALS:
        for name in goal.workloads or ():
            dtypes = goal.dtypes or "float32"
            assert any((o, name, dtypes) in planned for o in goal.optimizers), (goal.title, name)


@pytest.mark.parametrize(
    ("name", "tensors", "total"), [("gpt-124m", 150, 124.4e6), ("gpt-1b", 294, 1.02e9)]
)
def test_large_transformers_have_the_sizes_in_their_titles(name, tensors, total):
    workload = workloads.parse(name)
    assert len(workload.shapes) == tensors
    assert workload.numel == pytest.approx(total, rel=0.01)
    assert workload.title.startswith(f"{tensors} tensors")


def gpu_row(**changes):
    rows, _ = run_case()
    return rows[0] | {"implementation": "pyoptim-cuda", "workload": "small"} | changes


def test_goals_read_the_rows_of_the_cuda_engine():
    ours = gpu_row(launches_per_step=4, host_speedup_over={"torch-fused": {"median": 12.0}})
    found = results.Results(rows=[ours, ours | {"device": "cpu", "launches_per_step": 9}])
    by_title = {
        goal.title: goals.values(goal, found.of_device("cuda")) for goal in gpu_goals.GPU_GOALS
    }
    assert by_title["small: launches"] == {"adamw": 4}
    assert by_title["small: host time over fused"] == {"adamw": 12.0}
    launches = next(goal for goal in gpu_goals.GPU_GOALS if goal.title == "small: launches")
    assert goals._verdict(launches, {"adamw": 4}) == "no: adamw"
    assert goals._verdict(launches, {"adamw": 3}) == "yes"


@pytest.fixture
def gpu_file(tmp_path):
    found = results.Results.start("a command", "cuda")
    rows, _ = run_case(names=ON_HOST)
    found.rows = rows = [row | {"workload": "small"} for row in rows]
    rows[0]["implementation"] = "pyoptim-cuda"
    found.runs[0]["machine"]["gpu"] = {"name": "Test GPU", "memory_bytes": 2**34}
    found.skipped = [rows[0] | {"implementation": "pyoptim-triton", "reason": "not there"}]
    found.save(tmp_path / "gpu.json")
    return tmp_path / "gpu.json"


def test_reports_are_made_from_a_gpus_result(gpu_file, capsys):
    assert cli.main(["--table", str(gpu_file)]) == 0
    table = capsys.readouterr().out
    assert "Test GPU, 16 GiB" in table
    assert "| adamw, float32 | pyoptim-cuda |" in table
    assert "pyoptim-triton: not there" in table
    assert cli.main(["--goals", str(gpu_file)]) == 0
    goals_table = capsys.readouterr().out
    assert "small: launches | <= 3 | adamw 3.00 (not measured:" in goals_table
    assert "2 threads over 1" not in goals_table


def test_a_gpus_result_is_not_put_into_the_readme_of_the_cpu(gpu_file, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    assert cli.main(["--table", str(gpu_file), "--write-readme", str(readme)]) == 1
    assert "CPU results only" in capsys.readouterr().err


def test_pictures_of_a_gpu_have_names_of_their_own(gpu_file):
    pytest.importorskip("matplotlib")
    assert cli.main(["--plot", str(gpu_file)]) == 0
    written = {path.name for path in gpu_file.parent.glob("*.png")}
    assert written == {"roofline-gpu.png", "bars-gpu.png"}


def test_results_from_before_there_was_a_gpu_are_of_the_cpu(tmp_path):
    rows, _ = run_case(names=["torch-foreach"])
    old = {key: value for key, value in rows[0].items() if key != "device"}
    content = {"schema": 1, "runs": [{"command": "x"}], "rows": [old, rows[0]], "skipped": []}
    (tmp_path / "old.json").write_text(json.dumps(content))
    found = results.load([tmp_path / "old.json"])
    assert [row["device"] for row in found.rows] == ["cpu", "cuda"]
    assert len(found.of_device("cpu").runs) == 1


def test_command_line_measures_on_the_device(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "CudaDevice", HostDevice)
    out = tmp_path / "out.json"
    options = ["--device", "cuda", "--workloads", "3x70,2x50", "--optimizers", "adamw,sgd"]
    options += ["--implementations", "torch-foreach,pyoptim-cuda", "--reps", "3"]
    assert cli.main([*options, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    measured = {
        (row["workload"], row["optimizer"])
        for row in content["rows"]
        if row["implementation"] == "torch-foreach"
    }
    assert measured == {(w, o) for w in ("3x70", "2x50") for o in ("adamw", "sgd")}
    assert content["runs"][0]["device"] == "cuda"
    assert "pyoptim-cuda steps cuda tensors only" in capsys.readouterr().out
    assert cli.main([*options, "--threads", "2"]) == 1
    assert "--threads is about the CPU" in capsys.readouterr().err


def test_graphs_are_measured_where_the_host_is_the_limit():
    arguments = cli._parser().parse_args(["--device", "cuda", "--compile"])
    cases = {case.workload.name: case for case in cli._cuda_cases(arguments)}
    names = cli._cuda_implementations(arguments, cases["small"])
    assert set(plan.GRAPHS) < set(names)
    assert names[-1] == "torch-compiled"
    assert not set(plan.GRAPHS) & set(cli._cuda_implementations(arguments, cases["1x200000000"]))


def test_without_a_gpu_the_reason_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["--device", "cuda"]) == 1
    assert "torch finds no CUDA device" in capsys.readouterr().err
    for module in (compare, graphs, asynchronous, line_search, tune):
        assert module.main([]) == 2
        assert "torch finds no CUDA device" in capsys.readouterr().err


# -- comparing -------------------------------------------------------------------------------------


def task(optimizer="AdamW", dtypes="float32", backend="cpu", steps=3):
    return compare.Task(optimizer, dtypes, "cpu", backend, "reference", steps, True)


@pytest.mark.native
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16+float32", "float64"])
@pytest.mark.parametrize("optimizer", scenarios.OPTIONS)
def test_comparison_finds_cpu_and_reference_equal(optimizer, dtypes):
    findings = compare.compare_task(task(optimizer, dtypes))
    assert {"plain", "groups", "scaler"} <= {finding.scenario for finding in findings}
    for finding in findings:
        assert finding.elements > 1000
        accepted = {"equal", "close"} if finding.may_differ else {"equal"}
        assert finding.verdict(is_equality_required=True) in accepted, finding


def off_by(ulps, at):
    """A `run` whose CPU result differs from the reference's in one element."""

    def run(asked, scenario, options, device, backend):
        found = original(asked, scenario, options, device, backend)
        if backend == "cpu":
            name = next(name for name in found if name.startswith(at))
            values = found[name].view(-1).view(torch.int32)
            values[-1] += ulps
        return found

    original = compare.run
    return run


@pytest.mark.native
@pytest.mark.parametrize("what", ["param 4", "grad 4", "exp_avg 4", "step 4"])
def test_comparison_finds_one_wrong_bit(monkeypatch, what):
    monkeypatch.setattr(compare, "run", off_by(1, what))
    finding = compare.compare_task(task())[0]
    assert finding.differing == len(scenarios.OPTIONS["AdamW"])
    assert finding.max_ulp == 1
    assert what in finding.example
    assert finding.verdict(is_equality_required=True) == "DIFFERS"
    assert finding.verdict(is_equality_required=False) == "close"


@pytest.mark.native
def test_what_is_far_off_is_not_close(monkeypatch):
    monkeypatch.setattr(compare, "run", off_by(1 << 20, "param 4"))
    finding = compare.compare_task(task())[0]
    assert finding.max_ulp == 1 << 20
    assert finding.verdict(is_equality_required=False) == "DIFFERS"


@pytest.mark.parametrize(("may_differ", "verdict"), [(True, "close"), (False, "DIFFERS")])
def test_difference_that_is_allowed_is_close(may_differ, verdict):
    finding = compare.Finding("AdamW", "float64", "plain", may_differ, differing=1, max_ulp=1)
    assert finding.verdict(is_equality_required=True) == verdict


def test_only_powers_and_norms_of_the_reference_may_differ_and_only_in_float64():
    allowed = {
        (scenario, dtypes, has_reference)
        for scenario in scenarios.SCENARIOS
        for dtypes in scenarios.DTYPES
        for has_reference in (False, True)
        if scenarios.may_differ(scenario, "AdamW", dtypes, has_reference)
    }
    powers = {
        (name, "float64", side) for name in ("scaler", "capturable") for side in (True, False)
    }
    assert allowed == powers | {("clip", "float64", True)}


def test_engines_may_not_differ_where_rows_are_added_up():
    for optimizer in ("AdamP", "SGDP"):
        assert scenarios.may_differ("plain", optimizer, "float32", has_reference=True)
        assert not scenarios.may_differ("plain", optimizer, "float32", has_reference=False)


def test_write_beside_a_tensor_is_found():
    model = scenarios.make_model(torch.float32, "cpu", is_small=True)
    assert model.is_guard_intact()
    storage, _, end = model.memory[-1]
    storage[end] = 0.0
    assert not model.is_guard_intact()


def test_tensors_are_misaligned_and_hold_special_values():
    model = scenarios.make_model(torch.bfloat16, "cpu", is_small=False)
    model.give_grads(0, has_specials=True)
    assert len({p.storage_offset() % 8 for p in model.params}) == 7
    assert any(not p.is_contiguous() for p in model.params)
    assert any(p.grad.storage_offset() != p.storage_offset() for p in model.params)
    special = next(p.grad for p in model.params if tuple(p.shape) == scenarios.SPECIAL_SHAPE)
    assert special.isnan().sum() == 1
    assert special.isinf().sum() == 2
    tiny = torch.finfo(torch.bfloat16).tiny
    assert ((special != 0) & (special.abs() < tiny)).sum() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_distances_count_the_numbers_between(dtype):
    values = torch.tensor([1.0, -1.0, 0.0, math.inf], dtype=dtype)
    up = torch.nextafter(values, torch.tensor(math.inf, dtype=dtype))
    distance = compare._ordered(compare.bits(up)) - compare._ordered(compare.bits(values))
    assert distance.tolist() == [1, 1, 1, 0]
    zeros = compare.bits(torch.tensor([0.0, -0.0], dtype=dtype))
    assert zeros[0] != zeros[1]
    assert compare._ordered(zeros).tolist() == [0, 0]


def test_nans_of_any_payload_are_equal():
    payloads = torch.tensor([0x7FC00000, 0x7FC00001, -0x3FFFFF], dtype=torch.int32)
    nans = payloads.view(torch.float32)
    assert nans.isnan().all()
    assert len(set(compare.bits(nans).tolist())) == 1


@pytest.mark.native
def test_refusal_of_a_backend_is_a_failure(monkeypatch):
    def refuse(*arguments):
        raise pyoptim.BackendError("cannot")

    monkeypatch.setattr(compare, "run", refuse)
    findings = compare.compare_task(task())
    assert {finding.verdict(False) for finding in findings} == {"FAILED"}
    assert "BackendError: cannot" in findings[0].error


@pytest.mark.native
def test_comparison_writes_a_table_and_a_record(tmp_path, capsys, monkeypatch):
    out = tmp_path / "found.json"
    options = ["--device", "cpu", "--backend", "cpu", "--against", "reference", "--small"]
    options += ["--steps", "2", "--optimizers", "SGD", "--dtypes", "float32", "--out", str(out)]
    assert compare.main(options) == 0
    assert "| SGD, float32 | plain |" in capsys.readouterr().out
    assert {f["verdict"] for f in json.loads(out.read_text())["findings"]} == {"equal"}
    monkeypatch.setattr(compare, "run", off_by(1, "param 4"))
    assert compare.main(options) == 1
    assert "DIFFERS" in capsys.readouterr().out


# -- graphs ----------------------------------------------------------------------------------------


@pytest.mark.native
@pytest.mark.parametrize("optimizer", scenarios.OPTIONS)
def test_replays_that_follow_the_learning_rate_are_equal(optimizer):
    found = graphs.check("cpu", optimizer, "float32", {}, "cpu", capture=lambda step: step)
    assert found.verdict == "equal", found


@pytest.mark.native
def test_replays_with_the_captured_learning_rate_are_found():
    def capture(step):
        group = step.__self__.param_groups[0]
        group["lr"] = group["lr"].clone()  # later edits of the tensor are not seen
        return step

    found = graphs.check("cpu", "AdamW", "float32", {}, "cpu", capture=capture)
    assert found.verdict == "DIFFERS"
    assert found.detail.startswith("param 0: 1 of 1")


@pytest.mark.native
def test_replays_that_read_old_gradients_are_found():
    def capture(step):
        params = step.__self__.param_groups[0]["params"]
        recorded = [p.grad.clone() for p in params]

        def replay():
            for param, grad in zip(params, recorded, strict=True):
                param.grad.copy_(grad)
            step()

        return replay

    found = graphs.check("cpu", "SGD", "float32", {}, "cpu", capture=capture)
    assert found.verdict == "DIFFERS"


def test_step_that_cannot_be_captured_is_a_failure():
    def capture(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    found = graphs.check("reference", "SGD", "float32", {}, "cpu", capture=capture)
    assert found.verdict == "FAILED"
    assert "not permitted" in found.detail


# -- never waiting ---------------------------------------------------------------------------------


class FakeWatch:
    """Counts what the fake steps below do."""

    def __init__(self):
        self.is_forbidden, self.made = False, 0

    @contextmanager
    def forbids_waiting(self):
        self.is_forbidden = True
        try:
            yield
        finally:
            self.is_forbidden = False

    def allocations(self):
        return self.made

    def wait(self):
        if self.is_forbidden:
            raise RuntimeError("called a synchronizing CUDA operation")

    def allocate(self):
        self.made += 1


def test_step_that_waits_is_found():
    watch = FakeWatch()
    assert asynchronous.check_waiting("a", lambda: None, watch).has_passed
    found = asynchronous.check_waiting("a", watch.wait, watch)
    assert not found.has_passed
    assert "synchronizing" in found.detail


def test_step_that_allocates_once_warm_is_found():
    watch = FakeWatch()
    assert asynchronous.check_allocations("a", lambda: None, watch).has_passed
    found = asynchronous.check_allocations("a", watch.allocate, watch)
    assert not found.has_passed
    assert found.detail == "5 allocations in 5 steps"


@pytest.mark.parametrize(("host", "has_passed"), [(20 * US, True), (700 * US, False)])
def test_host_that_is_not_far_ahead_is_found(host, has_passed):
    device = SimulatedDevice()
    found = asynchronous.check_host_time("a", device.step(host, 700 * US), device)
    assert found.has_passed is has_passed


@pytest.mark.native
@pytest.mark.parametrize("optimizer", scenarios.OPTIONS)
def test_every_way_of_stepping_can_be_made(optimizer):
    device = HostDevice()
    found = list(asynchronous.checks("cpu", optimizer, FakeWatch(), device, large="1x100"))
    claims = [check.claim for check in found if check.has_passed]
    assert {check.detail for check in found[:-1]} == {""}
    ways = [name for name, _ in asynchronous.steppers("cpu", optimizer, device.torch_device)]
    assert claims.count("does not wait") == len(ways) >= 2
    assert claims.count("allocates nothing") == len(ways) - (asynchronous.CLIP_BEFORE in ways)


@pytest.mark.native
def test_passes_of_a_line_search_are_measured_beside_a_copy():
    device = HostDevice()
    row = line_search.measure("cpu", workloads.parse("3x40"), device, reps=9)
    assert set(row["seconds"]) == {"start", "trial", "finish", "plain", "copy"}
    # The clock ticks once per reading: a pass takes as long as a copy of 8 bytes per element.
    assert row["over_copy"]["trial"]["median"] == pytest.approx(8 / 16, rel=0.5)
    found = line_search.check_search("cpu", device, FakeWatch())
    assert found.has_passed, found.detail
    assert "finish, cpu, 3 x 40 elements" in line_search.table([row], [found])


# -- tuning ----------------------------------------------------------------------------------------


def test_sweep_applies_each_setting_before_its_samples(monkeypatch):
    applied = []
    case = cpu_runner.Case("adamw", FLOAT32, workloads.parse("3x70"), 1, device="cuda")
    chosen = tune.settings(("chunk", "rows"), ([1, 2], [0, 64]))
    assert len(chosen) == 4
    monkeypatch.setattr(tune, "take_sample", take_sample_and_note(applied))
    rows = tune.sweep(case, "reference", chosen, applied.append, HostDevice(), reps=3)
    assert [row["setting"] for row in rows] == chosen
    samples = [
        (before, after)
        for before, after in itertools.pairwise(applied)
        if isinstance(after, str) and after != "loop"
    ]
    assert len(samples) == 3 * 4
    assert all(str(before) == after for before, after in samples)
    assert "chunk=2 rows=64" in tune.table(rows)


def take_sample_and_note(applied):
    def take_sample(device, variant):
        applied.append(variant.name)
        timing.take_sample(device, variant)

    return take_sample


# -- the script ------------------------------------------------------------------------------------

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def run_script(script, *arguments, **more):
    env = {**os.environ, **more}
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, env=env, timeout=60
    )


# -- nearest neighbours ----------------------------------------------------------------------------


def test_searches_are_measured_beside_each_other(monkeypatch):
    monkeypatch.setattr(neighbours.torch, "mm", lambda a, b: None)  # bfloat16 is slow here
    case = neighbours.Case.parse("40x30x8", "float32")
    methods = ["pyoptim-cpu", "addmm+argmin", "flash-kmeans"]
    rows = neighbours.measure(case, methods, 2, HostDevice())
    assert [row["method"] for row in rows] == methods
    ours, theirs, absent = rows
    assert ours["wrong"] == theirs["wrong"] == 0
    assert ours["speedup_over"].keys() == {"addmm+argmin"}
    assert ours["share_of_limit"]["median"] > 0
    assert "flash_kmeans" in absent["reason"]
    steps = neighbours.measure_steps(case, ("cpu", "cuda"), 2, HostDevice())
    assert steps[0]["share_of_copy"]["median"] > 0
    assert "BackendError" in steps[1]["reason"]
    assert len(neighbours.table(rows + steps).splitlines()) == 2 + 5


def test_goals_of_searches_that_are_not_met_are_named():
    shape = {"n": 9, "m": 9, "d": 256, "dtype": "float32", "seconds": {}}
    good = {"median": 0.7}
    ours = {"method": "pyoptim-cuda", **shape, "wrong": 0, "share_of_limit": good}
    assert neighbours.unmet_goals([ours | {"speedup_over": {"cdist+argmin": {"median": 2}}}]) == []
    bad = ours | {"wrong": 1, "share_of_limit": {"median": 0.5}}
    bad["speedup_over"] = {"cdist+argmin": {"median": 0.5}, "pyoptim-triton": {"median": 0.5}}
    assert len(neighbours.unmet_goals([bad])) == 3
    assert len(neighbours.unmet_goals([bad | {"d": 64}])) == 2
    step = {"method": "k-center step, cuda", **shape, "share_of_copy": {"median": 0.5}}
    assert len(neighbours.unmet_goals([step])) == 1
    assert neighbours.unmet_goals([{**shape, "method": "x", "reason": "no"}]) == []


@needs_bash
def test_whole_run_takes_less_than_nine_minutes_at_most(tmp_path):
    found = run_script(SCRIPT, "--dry-run", str(tmp_path / "out"))
    assert found.returncode == 0, found.stderr
    limits = {
        line.split(" ")[0]: int(line.split("at most ")[1].split(" ")[0])
        for line in found.stdout.splitlines()
        if "at most" in line
    }
    side_by_side = {"tests", "compare-cuda", "compare-triton", "memcheck", "racecheck", "graphs"}
    assert side_by_side < set(limits)
    alone = sum(limit for stage, limit in limits.items() if stage not in side_by_side)
    assert alone + max(limits[stage] for stage in side_by_side) <= 540
    assert not (tmp_path / "out").exists()


@needs_bash
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "bench,typo"], "unknown stage 'typo'"),
        (["--seconds", "soon"], "not a whole number"),
        (["--seconds"], "needs a value"),
        (["--fast"], "unknown option --fast"),
        (["a", "b"], "one OUT only"),
    ],
    ids=["stage", "seconds", "no value", "option", "two folders"],
)
def test_script_refuses_what_it_does_not_understand(arguments, message):
    found = run_script(SCRIPT, *arguments)
    assert found.returncode == 2
    assert message in found.stderr


@pytest.fixture
def copied_script(tmp_path):
    """The script beside a built package and a Python that fails for graphs only."""
    (tmp_path / "bench").mkdir()
    script = Path(shutil.copy(SCRIPT, tmp_path / "bench"))
    (tmp_path / "build" / "gpu-site" / "pyoptim").mkdir(parents=True)
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *graphs*) exit 3 ;; esac\n')
    python.chmod(0o755)
    return script, python


@needs_bash
def test_failing_stage_does_not_stop_the_later_ones(copied_script, tmp_path):
    script, python = copied_script
    stages = "tests,compare-cuda,graphs,asynchronous"
    found = run_script(script, "--stages", stages, str(tmp_path / "out"), PYTHON=str(python))
    assert found.returncode == 1
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["tests", "passed"],
        ["compare-cuda", "passed"],
        ["graphs", "failed"],
        ["asynchronous", "passed"],
    ]
    log = (tmp_path / "out" / "compare-cuda.log").read_text()
    assert "ran -m pyoptim.bench.gpu.compare --backend cuda --require equal" in log


@needs_bash
def test_run_without_failure_succeeds(copied_script, tmp_path):
    script, python = copied_script
    found = run_script(script, "--stages", "tests", str(tmp_path / "out"), PYTHON=str(python))
    assert found.returncode == 0, found.stdout


@needs_bash
def test_missing_sanitizer_is_skipped_and_said(copied_script, tmp_path):
    script, python = copied_script
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "timeout", "dirname", "tr", "head", "mkdir", "rm", "cat", "env"):
        (tools / tool).symlink_to(shutil.which(tool))
    found = run_script(
        script, "--stages", "memcheck", str(tmp_path / "out"), PYTHON=str(python), PATH=str(tools)
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "memcheck         skipped" in (tmp_path / "out" / "summary.txt").read_text()
    assert "does not have the tool" in (tmp_path / "out" / "memcheck.log").read_text()


@needs_bash
def test_stage_without_a_build_says_so(copied_script, tmp_path):
    script, python = copied_script
    shutil.rmtree(tmp_path / "build")
    found = run_script(script, "--stages", "bench", str(tmp_path / "out"), PYTHON=str(python))
    assert found.returncode == 1
    assert "run the stage 'build' first" in (tmp_path / "out" / "bench.log").read_text()
