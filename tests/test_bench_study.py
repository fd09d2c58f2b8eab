"""The study of optimizers and schedules: its data, its choices, resuming, tables."""

import ast
import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pyoptim
from pyoptim.bench.arc.results import Results
from pyoptim.bench.study import choices, cli, data, folder, report, runner, tasks, train
from pyoptim.bench.study.choices import Length
from pyoptim.bench.study.data import IGNORED, PARTS, TEST, TRAIN, VALID, Data
from pyoptim.bench.study.train import Job


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_table(steps: int) -> Data:
    """Learnt in a few steps: the target is the sign of the first column."""
    x = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0))
    parts = [(rows, (rows[:, 0] > 0).float()) for rows in x]
    return Data("tiny table", *parts, inputs=3, outputs=1, batch=-(-40 // steps))


def tiny_tags(steps: int) -> Data:
    line = [("def", "O"), ("f", "B-FUNCTION"), ("(", "O"), ("x", "B-PARAMETER"), (")", "O")]
    return data.sentences("tiny tags", dict.fromkeys(PARTS, [line] * 12), 6, batch=-(-12 // steps))


def tiny_images(steps: int) -> Data:
    labels = torch.arange(20) % 2
    images = labels.float().reshape(-1, 1, 1, 1).expand(20, 1, 8, 8) * torch.eye(8)
    return Data("tiny images", *[(images, labels)] * 3, inputs=1, outputs=2, batch=-(-20 // steps))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three tasks, on data of a few rows, for two epochs of two steps."""
    made = {"tabular": tiny_table, "tagging": tiny_tags, "images": tiny_images}
    for name, make in made.items():
        small = dataclasses.replace(tasks.TASKS[name], default=make, epochs=2, steps=2)
        monkeypatch.setitem(tasks.TASKS, name, small)
    monkeypatch.setattr(train, "load", lambda task, root: tasks.TASKS[task].load(root))
    monkeypatch.setattr(runner, "load", lambda task, root: tasks.TASKS[task].load(root))


# -- data of this machine --------------------------------------------------------------------------

SOURCE = '''
import os.path, re as regex
from a.b import c

class Box(dict):
    def fill(self, size, *rest):
        """Takes a while, for sure."""
        for item in rest:
            self.fill(size + item)
        return os.path.join(size, regex)

size = Box().fill(1)
'''


def test_a_function_is_described_by_numbers_without_its_loops() -> None:
    ((numbers, loops),) = data.functions_of(ast.parse(SOURCE))
    assert len(numbers) == 33
    assert loops is True
    # self, size; no defaults, no decorator; docstring, for, return; *rest; method; the name.
    assert numbers[:9] == [2, 0, 0, 3, 1, 0, 1, 4, 0]
    counts = dict(zip(data.COUNTED, numbers[9:], strict=True))
    assert (counts[ast.Return], counts[ast.Call], counts[ast.BinOp], counts[ast.If]) == (1, 2, 1, 0)
    assert not set(data.LOOPS) & set(data.COUNTED)
    ((_, straight),) = data.functions_of(ast.parse("def f(): return [x for x in y]"))
    assert straight is False


def test_names_are_tagged_by_what_the_module_says_about_them() -> None:
    def tags(line: list[tuple[str, str]]) -> str:
        return " ".join(f"{word}/{tag}" if tag != "O" else word for word, tag in line)

    assert [tags(line) for line in data.tagged_lines(SOURCE)] == [
        "import os/B-MODULE ./I-MODULE path/I-MODULE , re/B-MODULE as regex/B-MODULE",
        "from a/B-MODULE ./I-MODULE b/I-MODULE import c",
        "class Box/B-CLASS ( dict/B-CLASS ) :",
        "def fill/B-FUNCTION ( self , size/B-PARAMETER , * rest/B-PARAMETER ) :",
        "for item in rest/B-PARAMETER :",
        "self . fill/B-FUNCTION ( size/B-PARAMETER + item )",
        "return os/B-MODULE . path . join ( size/B-PARAMETER , regex/B-MODULE )",
        "size = Box/B-CLASS ( ) . fill/B-FUNCTION ( 0 )",
    ]


def test_words_are_numbered_by_what_the_training_part_has_seen() -> None:
    seen, new = [("Rome", "B-LOC"), ("is", "O"), ("is", "O")], [("Oslo", "B-LOC")] * 5
    rare = [*seen[:2], ("Bern", "O")]
    made = data.sentences("", {TRAIN: [seen, rare], VALID: [new], TEST: [seen]}, 4, batch=1)
    assert made.outputs == 3
    assert made.train[1].tolist() == [[1, 0, 0, IGNORED]] * 2
    assert made.valid[1].tolist() == [[1, 1, 1, 1]]  # cut
    assert (made.train[0][:, 3] == 0).all()
    assert made.train[0][1, 2, 0] == 1  # seen once
    assert made.train[0][0, 0, 0] > 1
    word, _, shape = made.valid[0][0, 0].tolist()
    assert (word, shape) == (1, made.train[0][0, 0, 2])  # unknown, but capitalised as Rome
    assert made.train[0].max() == made.inputs - 1


def test_parts_are_disjoint_and_all_are_used() -> None:
    counts = {part: sum(data.part_of(str(i)) == part for i in range(2000)) for part in PARTS}
    assert 1300 < counts[TRAIN] < 1500
    assert 150 < counts[VALID] < 250
    assert 350 < counts[TEST] < 450


def test_columns_are_scaled_by_the_training_part() -> None:
    x = {TRAIN: torch.tensor([[0.0, 5], [2, 5]]), VALID: torch.ones(1, 2), TEST: torch.ones(1, 2)}
    y = {part: torch.ones(len(x[part])) for part in PARTS}
    made = data.table("", x, y, batch=2)
    torch.testing.assert_close(made.train[0][:, 0], torch.tensor([-0.5, 0.5]) * math.sqrt(2))
    assert made.train[0][:, 1].tolist() == [0, 0]  # a constant column
    assert made.valid[0][0, 0] == 0


def test_pictures_are_cut_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.arange(100.0).reshape(-1, 1, 1, 1), torch.arange(100)
    found = data.demo.Data("some", images, labels, images[:7], labels[:7])
    monkeypatch.setattr(data.demo, "find_data", lambda _: found)
    monkeypatch.setattr(data, "TRAIN_IMAGES", 50)
    made = data.pictures(12)
    assert [len(p[1]) for p in (made.train, made.valid, made.test)] == [50, 20, 7]
    assert not set(made.train[1].tolist()) & set(made.valid[1].tolist())
    assert (made.batch, made.steps) == (5, 10)
    assert torch.equal(made.train[0].flatten().long(), made.train[1])


# -- the paper's data ------------------------------------------------------------------------------


def write_credit_card(root: Path, rows: int = 20, field: str = "1") -> None:
    (root / "credit-card").mkdir(parents=True)
    for name in ("train.csv", "test.csv"):
        with (root / "credit-card" / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["limit_bal", folder.TARGET, "sex:1"])
            writer.writerows([[10 * i, i % 2, field] for i in range(rows)])


def test_credit_card_files_are_read(tmp_path: Path) -> None:
    write_credit_card(tmp_path)
    made = tasks.TASKS["tabular"].load(tmp_path)
    assert [len(p[1]) for p in (made.train, made.valid, made.test)] == [18, 2, 20]
    assert (made.inputs, made.outputs, made.batch) == (2, 1, 2000)
    assert made.test[1].tolist() == [0, 1] * 10
    assert tasks.TASKS["tabular"].network(made)(made.test[0]).shape == (20,)


CONLL = """-DOCSTART- -X- -X- O

EU NNP I-NP I-ORG
rejects VBZ I-VP O

Peter NNP I-NP B-PER
Blackburn NNP I-NP I-PER
"""


@pytest.mark.parametrize("names", [0, 1], ids=["eng", "txt"])
def test_conll_files_are_read(names: int, tmp_path: Path) -> None:
    (tmp_path / "conll2003").mkdir()
    for part in PARTS:
        (tmp_path / "conll2003" / folder.CONLL_FILES[part][names]).write_text(CONLL)
    made = tasks.TASKS["tagging"].load(tmp_path)
    assert (made.outputs, made.batch, len(made.train[1])) == (5, 150, 2)
    tags = [[t for t in line if t != IGNORED] for line in made.train[1].tolist()]
    assert tags == [[2, 0], [3, 4]]  # I-ORG, which begins an entity; B-PER, I-PER
    assert tasks.entities(tags[0]) == {(0, 1, 0)}
    assert tasks.TASKS["tagging"].network(made)(made.train[0]).shape == (2, 50, 5)


def test_skin_images_are_read(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "ham10000/HAM10000_images_part_1").mkdir(parents=True)
    lines = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for i in range(30):
        lines.append(f"HAM_{i // 2},ISIC_{i},{('nv', 'mel')[i % 2]},histo,50,male,back")
        path = tmp_path / f"ham10000/HAM10000_images_part_1/ISIC_{i}.jpg"
        image.new("RGB", (90, 68), (8 * i, 0, 255 - 8 * i)).save(path)
    (tmp_path / "ham10000/HAM10000_metadata.csv").write_text("\n".join(lines))
    made = tasks.TASKS["images"].load(tmp_path)
    assert (made.inputs, made.outputs, made.batch) == (3, 2, 80)
    sizes = [len(p[1]) for p in (made.train, made.valid, made.test)]
    assert sum(sizes) == 30
    assert all(size > 0 and size % 2 == 0 for size in sizes)  # both images of a lesion
    torch.testing.assert_close(made.train[0].mean((0, 2, 3))[[0, 2]], torch.zeros(2))
    assert tasks.TASKS["images"].network(made)(made.train[0]).shape == (sizes[0], 2)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_missing_file_is_named_and_where_to_get_it(
    task: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "study.json"
    code = cli.main(["--data", str(tmp_path), "--tasks", task, "--out", str(out)])
    message = capsys.readouterr().err
    assert code == 1
    assert str(tmp_path) in message
    for source in ("imodels/credit-card", "clips.uantwerpen.be", "DVN/DBW86T"):
        assert source in message
    assert not out.exists()


@pytest.mark.parametrize("field", ["", "male", "1,2"])
def test_a_table_with_a_field_that_is_no_number_is_refused(field: str, tmp_path: Path) -> None:
    write_credit_card(tmp_path, field=field)
    with pytest.raises(folder.FolderError, match=r"train\.csv: not all fields are numbers"):
        folder.credit_card(tmp_path)


def test_a_table_without_the_target_is_refused(tmp_path: Path) -> None:
    write_credit_card(tmp_path)
    path = tmp_path / "credit-card" / "test.csv"
    path.write_text(path.read_text().replace(folder.TARGET, "target"))
    with pytest.raises(folder.FolderError, match=r"test\.csv: no rows with the columns default"):
        folder.credit_card(tmp_path)


def test_a_line_without_a_tag_is_named(tmp_path: Path) -> None:
    (tmp_path / "conll2003").mkdir()
    (tmp_path / "conll2003/eng.train").write_text(CONLL.replace(" I-ORG", " ORG"))
    with pytest.raises(folder.FolderError, match=r"eng\.train, line 3: no word and tag"):
        folder.conll2003(tmp_path)


# -- metrics ---------------------------------------------------------------------------------------


def test_entities_are_whole_and_of_one_kind() -> None:
    # O B0 I0 I0 B0 B1 I0 I1: I0 after kind 1 begins an entity, as I1 after it.
    assert tasks.entities([0, 1, 2, 2, 1, 3, 2, 4]) == {
        *((1, 4, 0), (4, 5, 0), (5, 6, 1), (6, 7, 0), (7, 8, 1)),
    }
    assert tasks.entities([]) == set()


@given(st.lists(st.integers(0, 4), max_size=9))
def test_entities_cover_what_is_not_outside(tags: list[int]) -> None:
    covered = {i for first, end, _ in tasks.entities(tags) for i in range(first, end)}
    assert covered == {i for i, tag in enumerate(tags) if tag > 0}
    begun = {first for first, _, _ in tasks.entities(tags)}
    assert begun >= {i for i, tag in enumerate(tags) if tag % 2 == 1}


def test_f1_counts_entities_that_are_right_in_all_words() -> None:
    targets = torch.tensor([[1, 2, 0, IGNORED], [3, 0, 1, 0]])
    guesses = torch.tensor([[1, 0, 0, 3], [3, 0, 1, 0]])  # the first entity is too short
    outputs = torch.nn.functional.one_hot(guesses, 5).float()
    assert tasks.entity_f1(outputs, targets) == pytest.approx(2 * 2 / (3 + 3))
    nothing = torch.zeros(1, 4, 5)
    nothing[..., 0] = 1
    assert tasks.entity_f1(nothing, targets[:1]) == 0
    assert tasks.entity_f1(nothing, torch.zeros(1, 4, dtype=torch.int64)) == 1


def test_accuracies() -> None:
    assert tasks.accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75
    logits = torch.tensor([-1.0, 2, 3, -4])
    assert tasks.binary_accuracy(logits, torch.tensor([0.0, 1, 0, 0])) == 0.75


# -- schedules -------------------------------------------------------------------------------------


def rates(schedule: str, length: Length) -> list[float]:
    """What every step is done with, from a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    control, found = choices.SCHEDULES[schedule](optimizer, length), []
    for step in range(1, length.total + 1):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        control.after_step(step, torch.tensor(1.0))
        if step in length.marks():
            control.at_mark(1.0)
    return found


def test_the_table_moves_per_epoch_as_section_4_says() -> None:
    length = Length(epochs=5, steps=3, per_epoch=True)
    t = [step // 3 for step in range(15)]
    line = [(1e-3 - 1 / 3) * e / 5 + 1 / 3 for e in t]  # equation 3
    assert rates("linear", length) == pytest.approx(line)
    assert rates("polynomial", length) == pytest.approx([(1 - e / 5) ** 2 for e in t])
    cosine = [0.5 * (1 + math.cos(math.pi * e / 5)) for e in t]  # equation 5, T = 5
    assert rates("cosine", length) == pytest.approx(cosine)


def test_the_others_move_per_step_and_restart_once() -> None:
    length = Length(epochs=2, steps=6, per_epoch=False)
    t = range(12)
    assert rates("linear", length) == pytest.approx([1 - s / 12 for s in t])
    assert rates("polynomial", length) == pytest.approx([(1 - s / 12) ** 2 for s in t])
    cosine = [0.5 * (1 + math.cos(math.pi * (s % 6) / 6)) for s in t]
    assert rates("cosine", length) == pytest.approx(cosine)
    assert rates("none", length) == [1.0] * 12


def test_arc_decides_at_every_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def judge(train: list[float], valid: list[float], lrs: list[float]) -> tuple[float, ...]:
        seen.append((len(train), len(valid)))
        return (1.0, 0.0, 0.0)

    arc = pyoptim.lr_scheduler.ARC
    monkeypatch.setattr(
        choices.lr_scheduler,
        "ARC",
        lambda o, epochs, interval: arc(o, interval, epochs, weights=judge),
    )
    found = rates("ARC", Length(epochs=4, steps=5, per_epoch=False))
    assert found == pytest.approx([1.618 ** (step // 2) for step in range(20)])
    assert seen[:4] == [(2, 1), (4, 2), (6, 3), (6, 3)]


def test_arc_ends_with_a_decay_over_three_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    arc = pyoptim.lr_scheduler.ARC
    monkeypatch.setattr(
        choices.lr_scheduler,
        "ARC",
        lambda o, epochs, interval: arc(o, interval, epochs, weights=lambda *_: (0.0, 1.0, 0.0)),
    )
    found = rates("ARC", Length(epochs=4, steps=5, per_epoch=False))
    assert found[:14] == [1.0] * 14
    assert found[14:] == sorted(found[14:], reverse=True)
    assert 0.0 < found[-1] < found[14] < 1.0


@given(st.integers(1, 300), st.integers(1, 9))
def test_a_training_ends_with_a_mark(steps: int, epochs: int) -> None:
    length = Length(epochs, steps, False)
    marks = length.marks()
    assert marks[-1] == length.total
    assert len(marks) == min(length.total, choices.MARKS)
    assert marks[0] >= 1


# -- trainings -------------------------------------------------------------------------------------


def job(optimizer: str, schedule: str = "none", seed: int = 0, rate: float | None = 1e-2) -> Job:
    return Job("tabular", optimizer, schedule, seed, rate, None)


@pytest.mark.usefixtures("tiny")
def test_a_seed_fixes_start_and_batches_for_all() -> None:
    task, found = tasks.TASKS["tabular"], tiny_table(2)
    first = [
        train.train(job(name, seed=s), task, found)[1].train_loss[0]
        for name, s in (("AdamW", 0), ("Adagrad", 0), ("AdamW", 1))
    ]
    assert first[0] == first[1] != first[2]
    again = train.run(job("AdamW")), train.run(job("AdamW"))
    for row in again:
        del row["seconds"], row["seconds of loading"]
    assert again[0] == again[1]


def test_every_epoch_has_all_rows_in_an_order_of_the_seed() -> None:
    x = torch.arange(40.0)
    found = dataclasses.replace(tiny_table(3), train=(x, x))
    first, again, other = (
        [batch[0] for batch in train.batches(found, epochs=2, seed=seed)] for seed in (0, 0, 1)
    )
    assert [len(batch) for batch in first] == [14, 14, 12] * 2
    epochs = torch.cat(first).split(40)
    assert all(torch.equal(epoch.sort().values, x) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_row_has_the_curve_and_the_test_metric(name: str) -> None:
    row = train.run(Job(name, "AdamW", "linear", 0, 3e-3, None))
    json.dumps(row, allow_nan=False)
    curve = row["curve"]
    assert curve["epoch"] == [0.5, 1.0, 1.5, 2.0]
    assert all(len(series) == 4 for series in curve.values())
    assert 0 <= row["test"] <= 1
    expected = (
        [1 / 3, 1 / 3, 1 / 6 + 5e-4, 1 / 6 + 5e-4] if name == "tabular" else [1, 0.75, 0.5, 0.25]
    )
    assert curve["rate"] == pytest.approx([3e-3 * factor for factor in expected], rel=1e-4)


@pytest.mark.usefixtures("tiny")
def test_the_metric_is_that_of_the_whole_part_in_eval_mode() -> None:
    task, found = tasks.TASKS["images"], tiny_images(2)
    network = task.network(found)
    metric, loss = train.evaluate(task, network, found.test)
    assert network.training
    network.eval()
    with torch.no_grad():
        outputs = network(found.test[0])
    assert metric == tasks.accuracy(outputs, found.test[1])
    assert loss == pytest.approx(task.loss(outputs, found.test[1]).item())


@pytest.mark.usefixtures("tiny")
def test_a_training_that_diverges_is_a_row() -> None:
    row = train.run(job("SGD-momentum", rate=1e30))
    assert row["test loss"] is None
    json.dumps(row, allow_nan=False)


class Searching(torch.optim.SGD):
    """As SaLSa is called: gets a closure that only computes the loss."""

    calls = 0

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, lr=0.25)

    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        loss = closure()
        assert loss.requires_grad
        self.zero_grad()
        loss.backward()
        super().step()
        Searching.calls += 1
        return loss


@pytest.fixture
def searching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyoptim, "SaLSa", Searching, raising=False)
    monkeypatch.setitem(choices.OPTIMIZERS, "SaLSa", choices.Optimizer("SaLSa", {}, None))


@pytest.mark.usefixtures("tiny", "searching")
def test_an_optimizer_without_a_rate_is_given_the_closure() -> None:
    Searching.calls = 0
    row = train.run(job("SaLSa", rate=None))
    assert Searching.calls == 4
    assert row["curve"]["rate"] == [0.25] * 4
    assert row["rate"] is None
    assert choices.schedules_of("SaLSa", ["linear", "ARC"]) == ["none"]


def test_every_optimizer_of_the_study_can_be_made() -> None:
    for choice in choices.OPTIMIZERS.values():
        made = choice.make([torch.zeros(3, requires_grad=True)], 0.5 if choice.rate else None)
        assert isinstance(made, torch.optim.Optimizer)
    assert choices.OPTIMIZERS["AdamW"].make([torch.zeros(1)], 0.5).defaults["betas"] == (0.9, 0.99)


def tuned(monkeypatch: pytest.MonkeyPatch, metric: dict[float, float]) -> train.Row:
    """What is chosen when trainings end with these metrics, by rate; others end with 0."""

    def fake(job: Job, task: Any, found: Any) -> tuple[None, train.Curve]:
        assert job.rate is not None
        return None, train.Curve(metric=[metric.get(job.rate, 0.0)], loss=[job.rate])

    monkeypatch.setattr(train, "train", fake)
    return train.tune("tabular", "AdamW", None)


@pytest.mark.usefixtures("tiny")
def test_the_best_rate_on_the_validation_part_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tuned(monkeypatch, {1e-3: 0.9, 3.16e-3: 0.8})
    assert (inside["rate"], list(inside["tried"])) == (1e-3, ["0.00032", "0.001", "0.0032"])
    beyond = tuned(monkeypatch, {3.16e-3: 0.5, 1e-2: 0.6, 3.16e-2: 0.4})
    assert (beyond["rate"], len(beyond["tried"])) == (1e-2, 5)
    equals = tuned(monkeypatch, {1e-3: 0.9, 3.16e-4: 0.9, 3.16e-3: 0.9, 1e-4: 0.8})
    assert equals["rate"] == 3.16e-4  # the smaller loss
    endless = tuned(monkeypatch, {10 ** (p / 2): 0.1 * p + 1 for p in range(-9, 9)})
    assert len(endless["tried"]) <= train.MOST_RATES


# -- resuming --------------------------------------------------------------------------------------


def study(path: Path, optimizers: list[str], seeds: int = 1, **others: Any) -> list[str]:
    """Runs it on the tiny table; the trainings that the file has now."""
    given = {"tasks": ["tabular"], "schedules": ["none", "linear"], "workers": 1, "root": None}
    results = Results(path)
    runner.study(optimizers=optimizers, seeds=seeds, results=results, **{**given, **others})
    return list(json.loads(path.read_text())["runs"])


@pytest.mark.usefixtures("tiny", "searching")
def test_only_what_is_missing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = tmp_path / "study.json", []
    whole = runner.run
    monkeypatch.setattr(runner, "run", lambda job: (made.append(job.key), whole(job))[1])
    first = study(path, ["AdamW"])
    assert made == first == ["tabular | AdamW | none | 0", "tabular | AdamW | linear | 0"]
    before = json.loads(path.read_text())
    made.clear()
    assert set(study(path, ["AdamW", "SaLSa"])) == {*first, "tabular | SaLSa | none | 0"}
    assert made == ["tabular | SaLSa | none | 0"]
    after = json.loads(path.read_text())
    for key in first:
        assert after["runs"][key] == before["runs"][key]
    assert after["rates"] == before["rates"]
    made.clear()
    study(path, ["AdamW"], seeds=2)
    assert made == ["tabular | AdamW | none | 1", "tabular | AdamW | linear | 1"]


@pytest.mark.usefixtures("tiny")
def test_what_is_chosen_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.json"
    study(path, ["AdamW"])
    before = json.loads(path.read_text())
    monkeypatch.setattr(runner, "run", lambda job: {"test": 0.5, "seconds": 0.0})
    study(path, ["AdamW"], schedules=["linear"], again=True)
    after = json.loads(path.read_text())
    assert after["runs"]["tabular | AdamW | linear | 0"]["test"] == 0.5
    assert (
        after["runs"]["tabular | AdamW | none | 0"] == before["runs"]["tabular | AdamW | none | 0"]
    )
    assert after["rates"] == before["rates"]


@pytest.mark.usefixtures("tiny")
def test_what_was_done_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "study.json", runner.run

    def interrupted(job: Job) -> train.Row:
        if job.schedule == "linear":
            raise KeyboardInterrupt
        return whole(job)

    monkeypatch.setattr(runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(path, ["AdamW"])
    assert list(json.loads(path.read_text())["runs"]) == ["tabular | AdamW | none | 0"]


@pytest.mark.usefixtures("tiny")
def test_results_of_other_data_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "study.json"
    study(path, ["AdamW"])
    content = path.read_text()
    longer = dataclasses.replace(tasks.TASKS["tabular"], epochs=3)
    monkeypatch.setitem(tasks.TASKS, "tabular", longer)
    with pytest.raises(runner.SettingsError, match="choose another file with --out"):
        study(path, ["AdamW", "Adagrad"])
    assert path.read_text() == content


def test_workers_return_what_each_was_asked() -> None:
    asked = [([("a", i)],) for i in range(3)]
    found = dict(runner._map(2, dict, asked))
    assert found == {i: {"a": i} for i in range(3)}


# -- tables ----------------------------------------------------------------------------------------


def sections() -> dict[str, dict[str, Any]]:
    """Two seeds of two optimizers on two tasks; AdamW has no polynomial, SaLSa its own rate."""
    scores = {
        "tabular | AdamW | linear": (0.7, 0.9),
        "tabular | SaLSa | none": (0.75, 0.75),
        "images | AdamW | linear": (0.6, 0.6),
        "images | SaLSa | none": (0.7, 0.7),
    }
    curve = {"epoch": [1.0, 2.0], "metric": [0.5, 0.6]}
    runs = {
        f"{key} | {seed}": {"rate": 0.01 if "AdamW" in key else None, "test": test, "curve": curve}
        for key, tests in scores.items()
        for seed, test in enumerate(tests)
    }
    settings = {"data": "some", "examples": [1000, 20, 30], "batch": 4, "epochs": 2}
    settings |= {"steps per epoch": 250, "most frequent": 0.5678}
    return {"settings": {"tabular": settings, "images": settings}, "runs": runs}


def test_tables_put_the_papers_figures_beside_ours() -> None:
    text = report.report(sections())
    lines = text.splitlines()
    assert "**Tabular classification: accuracy on the test part**" in lines
    assert "1,000 examples to train, 20 to choose, 30 to test; 2 epochs of 250 steps" in text
    assert "accuracy of 0.568" in text
    row = "| AdamW | 0.01 | - | 0.800 ± 0.100 | 0.781 | - | 0.781 | - | 0.781 | - |"
    assert lines.count(row) == 1
    assert "| AdamW | 0.01 | - | 0.600 ± 0.000 | 0.747 | - | 0.732 | - | 0.756 | - |" in lines
    assert "| SaLSa | own | 0.750 ± 0.000 | - | - | - | - | - | - | - |" in lines
    assert "| AdamW | - | 1.5 | - | - | - |" in lines  # first, then second
    assert "sequence tagging" not in text.lower()
    assert report.report({}) == "no results"


def test_the_papers_table_is_that_of_the_paper() -> None:
    for task in tasks.TASKS.values():
        assert set(task.figures) == {"AdamW", "RMSprop", "Adagrad"}
    assert tasks.TASKS["tabular"].figures["Adagrad"] == (0.635, 0.768, 0.669)
    assert tasks.TASKS["tagging"].figures["AdamW"] == (0.905, 0.904, 0.900)
    assert tasks.TASKS["images"].figures["RMSprop"] == (0.710, 0.703, 0.706)


# -- all together ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_the_command_runs_resumes_and_reports(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    out, document = tmp_path / "study.json", tmp_path / "study.md"
    document.write_text("before\n<!-- bench:begin -->\n<!-- bench:end -->\nafter\n")
    arguments = ["--optimizers", "AdamW", "AdamP", "--workers", "1", "--out", str(out)]
    assert cli.main([*arguments, "--seeds", "2", "--write", str(document)]) == 0
    shown = capsys.readouterr().out
    assert "60 of 60" in shown
    assert (tmp_path / "study-tagging.png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads(out.read_text())
    assert len(content["runs"]) == 2 * 5 * 3 * 2
    assert len(content["rates"]) == 2 * 3
    assert content["machine"]["0"]["versions"]["torch"] == torch.__version__
    text = document.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert report.report(content) in text
    before = out.read_text()
    assert cli.main([*arguments, "--seeds", "1"]) == 0
    assert "30 of 30 trainings are there" in capsys.readouterr().out
    assert cli.main(["--report", "--out", str(out)]) == 0
    assert out.read_text() == before


def test_a_document_without_markers_is_refused(tmp_path: Path, capsys: Any) -> None:
    document = tmp_path / "x.md"
    document.write_text("nothing")
    out = tmp_path / "study.json"
    out.write_text(json.dumps(sections()))
    assert cli.main(["--report", "--out", str(out), "--write", str(document)]) == 1
    assert "needs one <!-- bench:begin -->" in capsys.readouterr().err
    assert document.read_text() == "nothing"
