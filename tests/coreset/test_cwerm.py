"""Features, broadcast and CW-ERM: values on small data, interruptions, errors."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyoptim
from pyoptim import coreset
from pyoptim.coreset import CWERM, Training, broadcast_weights, cwerm, extract_features
from pyoptim.coreset import training as module


@pytest.fixture(autouse=True)
def one_thread(process_settings: None) -> None:
    """The tensors are small: more threads would only wait for one another."""
    torch.set_num_threads(1)


# -- features --------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.relu(self.body(x)))
        return out


def data(n: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.arange(n) % 3


class Map(Dataset[Any]):
    """A data set that is no TensorDataset."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], int(self.y[i])


def test_features_are_those_of_evaluation_mode_whatever_the_batches() -> None:
    model, (x, y) = Network(), data()
    model(x)  # running statistics of its own
    model.body[1].eval()
    modes = [part.training for part in model.modules()]
    model.eval()
    with torch.no_grad():
        before_relu = model.body(x)
        before_head = before_relu.relu()
        outputs = model.head(before_head)
    for part, mode in zip(model.modules(), modes, strict=True):
        part.training = mode
    for source in (x, TensorDataset(x, y), Map(x, y), DataLoader(Map(x, y), 5), [(x[:9], y[:9])]):
        for size in (1, 7, 100):
            found = extract_features(
                model, source, layer="head", take="input", batch_size=size, progress=False
            )
            n = len(found.features)
            torch.testing.assert_close(found.features, before_head[:n])
            torch.testing.assert_close(found.outputs, outputs[:n])
            if source is not x:
                assert found.labels is not None
                assert found.labels.tolist() == y[:n].tolist()
    # Not what the layer after it makes of it in place; nor what it makes of its input in place.
    taken = extract_features(model, x, layer=model.body, progress=False).features
    torch.testing.assert_close(taken, before_relu)
    given = extract_features(model, x, layer="relu", take="input", progress=False).features
    torch.testing.assert_close(given, before_relu)
    assert [part.training for part in model.modules()] == modes
    assert not model.relu._forward_hooks
    assert not model.relu._forward_pre_hooks


def test_modes_and_hooks_are_restored_after_an_error() -> None:
    model = Network()
    model.body.eval()
    modes = [part.training for part in model.modules()]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        extract_features(model, torch.zeros(3, 5), layer="head", progress=False)
    assert [part.training for part in model.modules()] == modes
    assert not model.head._forward_hooks


def test_features_name_what_is_wrong() -> None:
    model, (x, y) = Network(), data()
    shuffling = DataLoader(TensorDataset(x, y), shuffle=True)
    twice = nn.Sequential(nn.Linear(4, 4))
    twice.append(twice[0])
    for call, message in (
        (lambda: extract_features(model, x, layer="tail"), "one of 'body'.*got 'tail'"),
        (lambda: extract_features(model, x, layer=nn.Linear(1, 1)), "not a part of the model"),
        (lambda: extract_features(model, x[:0]), "not empty"),
        (lambda: extract_features(model, []), "data is empty"),
        (lambda: extract_features(model, x, batch_size=0), "batch_size must be an int of at least"),
        (lambda: extract_features(model, shuffling), "shuffles"),
        (lambda: extract_features(twice, x, layer=twice[0]), "called 2 times"),
        (lambda: extract_features(model, x, take="both"), "take must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_progress_is_shown_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pyoptim.coreset.progress.find_spec", lambda name: None)
    extract_features(Network(), data()[0], batch_size=5)
    assert "features: 5 of 5" in capsys.readouterr().err


def test_progress_is_tqdm_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Fake:
        @staticmethod
        def tqdm(items: Any, desc: str, total: int) -> Iterator[Any]:
            seen.append((desc, total))
            yield from items

    monkeypatch.setattr("pyoptim.coreset.progress.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "tqdm", Fake)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "tqdm.auto", Fake)  # type: ignore[arg-type]
    extract_features(Network(), data()[0], batch_size=5)
    assert seen == [("features", 5)]


# -- broadcast -------------------------------------------------------------------------------------


@given(
    st.integers(1, 30),
    st.integers(1, 4),
    st.integers(0, 99),
    st.booleans(),
    st.integers(1, 5),
    st.data(),
)
def test_broadcast_gives_the_mean_weight_of_the_nearest(
    n: int, d: int, seed: int, same_class: bool, neighbors: int, given_data: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (n, d), generator=generator).double()  # ties happen
    labels = 7 * torch.randint(3, (n,), generator=generator) - 5
    indices = given_data.draw(st.permutations(range(n)))[: given_data.draw(st.integers(1, n))]
    covered = set(labels[indices].tolist()) == set(labels.tolist())
    weights = torch.rand(len(indices), generator=generator)
    at = torch.tensor(indices)
    options = {"labels": labels, "same_class": same_class, "neighbors": neighbors}
    if same_class and not covered:
        with pytest.raises(ValueError, match="the coreset has no sample of label"):
            broadcast_weights(x, at, weights, **options)
        return
    found = broadcast_weights(x, at, weights, **options)
    for i in range(n):
        allowed = [j for j, c in enumerate(indices) if not same_class or labels[c] == labels[i]]
        allowed.sort(key=lambda j: float((x[i] - x[indices[j]]).square().sum()))
        expected = float(weights[allowed[:neighbors]].double().mean())
        assert float(found[i]) == pytest.approx(expected, rel=3e-7)  # five roundings
    assert found.dtype == weights.dtype


def test_broadcast_names_what_is_wrong() -> None:
    x, labels = data()
    weights = torch.ones(2)
    at = torch.tensor([0, 1])
    for options, message in (
        ({"indices": at[:0], "weights": weights[:0]}, "indices is empty"),
        ({"indices": at + 22}, r"indices must be in 0\.\.22"),
        ({"weights": weights[:1]}, r"one per index, shape \(2,\); got \(1,\)"),
        ({"weights": weights * float("nan")}, "weights holds NaN or inf, first at 0"),
        ({"same_class": True, "labels": None}, "same_class=True needs labels"),
        ({"same_class": True}, "no sample of label 2"),
        ({"features": x / 0}, "features holds NaN or inf"),
        ({"neighbors": 0}, "neighbors must be an int of at least 1, got 0"),
    ):
        given = {"features": x, "indices": at, "weights": weights, "labels": labels, **options}
        with pytest.raises(ValueError, match=message):
            broadcast_weights(**given)


# -- training --------------------------------------------------------------------------------------


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def plan(**options: Any) -> Training:
    return Training(
        **{"make_model": make_model, "epochs": 4, "batch_size": 8, "progress": False, **options}
    )


def state(model: nn.Module) -> Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


def test_weighted_training_is_the_loop_written_out() -> None:
    x, y = data()
    weights = torch.rand(23, generator=torch.Generator().manual_seed(2))
    model = coreset.train_weighted(TensorDataset(x, y), plan(seed=5), weights=weights)
    torch.manual_seed(5)
    plain = make_model()
    optimizer = pyoptim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        for at in torch.randperm(23, generator=generator).tensor_split(3):
            losses = F.cross_entropy(plain(x[at]), y[at], reduction="none")
            optimizer.zero_grad()
            (weights[at] * losses).mean().backward()
            optimizer.step()
        scheduler.step()
    assert torch.equal(state(model), state(plain))


def test_weight_zero_is_leaving_out_and_the_kind_of_data_set_does_not_matter() -> None:
    x, y = data()
    weights = torch.ones(23)
    weights[7] = 0
    changed = x.clone()
    changed[7] += 100
    no_norm = plan(make_model=lambda: nn.Linear(4, 3))
    models = [
        coreset.train_weighted(source, no_norm, weights=weights)
        for source in (TensorDataset(x, y), TensorDataset(changed, y), Map(x, y))
    ]
    # The loader of a Map draws a seed for its workers, but a linear layer draws nothing.
    assert torch.equal(state(models[0]), state(models[1]))
    assert torch.equal(state(models[0]), state(models[2]))
    assert not torch.equal(
        state(models[0]), state(coreset.train_weighted(TensorDataset(x, y), no_norm))
    )


def test_training_leaves_the_random_state_of_the_caller() -> None:
    x, y = data()
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    coreset.train_weighted(TensorDataset(x, y), plan())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("readout", ["average", "last"])
def test_learnt_weights_are_those_that_the_samples_had(readout: str) -> None:
    x, y = data()
    rows = torch.tensor([3, 1, 20, 8, 9, 14, 0, 5, 17, 2])
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(module.MetaReweighter):
        def step(self, x: Any, y: Any, meta_x: Any = None, meta_y: Any = None) -> Any:
            done = super().step(x, y, meta_x, meta_y)
            seen.append((x, done.weights * len(y)))
            return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MetaReweighter", Spy)
        weights, model = coreset.learn_weights(
            TensorDataset(x, y), y, plan(epochs=3), indices=rows, readout=readout
        )
    assert weights.shape == (10,)
    if readout == "average":  # of the second half: epochs 1 and 2, two batches each
        for i, row in enumerate(rows):
            own = [w[j] for b, w in seen[2:] for j in range(len(b)) if torch.equal(b[j], x[row])]
            assert len(own) == 2
            assert weights[i] == pytest.approx(float(sum(own) / 2), rel=1e-6)
    assert (weights > 0).all()
    assert (weights < 1).all()
    assert model.training


def test_meta_batches_without_a_meta_set_have_all_classes_equally_often() -> None:
    x = torch.arange(50.0)[:, None].expand(50, 4)
    y = torch.tensor([0] * 44 + [1] * 6)
    draw = module._MetaBatches(None, TensorDataset(x, y), y, torch.arange(50), plan(batch_size=50))
    generator = torch.Generator().manual_seed(0)
    drawn = [draw.next(generator) for _ in range(40)]
    labels = torch.cat([labels for _, labels in drawn])
    assert abs(labels.double().mean() - 0.5) < 0.05  # 2000 draws: 4.5 deviations
    assert all(torch.equal(y[inputs[:, 0].long()], labels) for inputs, labels in drawn)
    assert set(torch.cat([inputs[:, 0] for inputs, _ in drawn]).tolist()) == set(range(50))


# -- the pipeline ----------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Counting:
    """A model factory whose networks raise at a forward pass, counted over all networks."""

    def __init__(self, at: int | None) -> None:
        self.left = at

    def __call__(self) -> nn.Module:
        model = make_model()
        model.register_forward_pre_hook(self.count)
        return model

    def count(self, *_: Any) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Interrupted


def pipeline(directory: Path | None, at: int | None = None, **options: Any) -> CWERM:
    plans = plan(make_model=Counting(at)), plan(make_model=Counting(at), epochs=3)
    return CWERM(*plans, **{"budget": 9, **options}, directory=directory)


def test_a_run_is_its_four_stages() -> None:
    x, y = data()
    source = TensorDataset(x, y)
    whole = pipeline(None, neighbors=2).fit(source, x, y, meta=source)
    steps = pipeline(None, neighbors=2)
    selection = steps.select(x, y)
    assert selection.indices.tolist() == (
        coreset.moderate(x, y, budget=9, scope="class").indices.tolist()
    )
    learnt = steps.reweight(x, y, selection.indices, source)
    weights = steps.broadcast(x, y, selection.indices, learnt)
    raw = broadcast_weights(x, selection.indices, learnt, labels=y, same_class=True, neighbors=2)
    torch.testing.assert_close(weights, raw / raw.mean())
    assert weights.mean() == pytest.approx(1.0)
    model = steps.train(source, weights)
    assert torch.equal(state(model), state(whole.model))
    assert torch.equal(weights, whole.weights)
    assert whole.selection.weights is not None
    assert torch.equal(learnt, whole.selection.weights)
    on_data = pipeline(None, reweight_on="data").reweight(source, y, selection.indices, source)
    assert torch.equal(learnt, on_data)  # here features and data are the same
    assert set(whole.seconds) == {"select", "reweight", "broadcast", "train"}


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return 3 * F.one_hot(y, 4).float() + 0.6 * torch.randn(n, 4, generator=generator), y


def test_the_default_head_learns_low_weights_for_wrong_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scale and offset of the features do not matter to it; its network sees no data."""
    monkeypatch.setattr(cwerm, "HEAD_STEPS", 400)
    x, true = blobs(400, 0)
    is_wrong = torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.4
    y = torch.where(is_wrong, (true + 1) % 3, true)
    meta_x, meta_y = blobs(60, 2)
    made = CWERM(plan(batch_size=100), fraction=0.5, method="random", neighbors=3)
    scaled, meta = 1000 * x + 7, TensorDataset(1000 * meta_x + 7, meta_y)
    chosen = made.select(scaled, y).indices
    learnt = made.reweight(scaled, y, chosen, meta)
    wrong = is_wrong[chosen]
    assert learnt[wrong].mean() < 0.5 * learnt[~wrong].mean()
    weights = made.broadcast(scaled, y, chosen, learnt)
    assert weights[is_wrong].mean() < 0.5 * weights[~is_wrong].mean()


def test_the_head_is_principal_components_and_a_linear_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 7, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.tensor([9.0, 7, 5, 3, 1, 0.1, 0], dtype=torch.float64)
    )
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    head = coreset.LinearHead.of(x + 4, classes=3, dims=4)
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers go on
    values, vectors = torch.linalg.eigh(torch.cov((x + 4).T, correction=0))
    largest = vectors[:, -4:].flip(1) / values[-4:].flip(0).sqrt()
    signs = (head.components.double() * largest).sum(0).sign()
    torch.testing.assert_close(head.components.double() * signs, largest, rtol=1e-4, atol=1e-5)
    whitened = ((x + 4).float() - head.mean) @ head.components
    torch.testing.assert_close(whitened.T.cov(correction=0), torch.eye(4), rtol=1e-4, atol=1e-4)
    logits = head((x + 4).view(300, 1, 7))
    torch.testing.assert_close(logits, head.linear(whitened))
    assert coreset.LinearHead.of(x, classes=3, dims=50).components.shape == (7, 6)  # one is 0
    assert coreset.LinearHead.of(torch.ones(5, 3), 2, 2)(torch.ones(5, 3)).isfinite().all()
    assert coreset.LinearHead.of(x[:1], 2, 2)(x).isfinite().all()
    with pytest.raises(ValueError, match="dims must be an int of at least 1, got 0"):
        coreset.LinearHead.of(x, 3, 0)


def test_an_interrupted_head_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cwerm, "HEAD_STEPS", 20)
    x, y = data()

    def fit(directory: Path | None, at: int | None = None) -> Any:
        made = CWERM(plan(make_model=Counting(at)), budget=9, directory=directory)
        return made.fit(TensorDataset(x, y), x, y, meta=TensorDataset(x, y))

    expected = fit(None)
    with monkeypatch.context() as patch:
        patch.setattr(coreset.LinearHead, "forward", lambda *_: Counting(0).count())
        with pytest.raises(Interrupted):
            fit(tmp_path)
    with pytest.raises(Interrupted):
        fit(tmp_path, 3)
    assert torch.equal(state(fit(tmp_path).model), state(expected.model))


@pytest.mark.parametrize("at", [1, 5, 14])
def test_an_interrupted_run_ends_as_if_it_had_not_been(at: int, tmp_path: Path) -> None:
    x, y = data()
    source = TensorDataset(x, y)
    expected = pipeline(None).fit(source, x, y)
    with pytest.raises(Interrupted):
        pipeline(tmp_path, at).fit(source, x, y)
    resumed = pipeline(tmp_path).fit(source, x, y)
    assert torch.equal(state(resumed.model), state(expected.model))
    assert torch.equal(resumed.weights, expected.weights)
    again = pipeline(tmp_path, 0).fit(source, x, y)  # runs no forward pass
    assert torch.equal(state(again.model), state(expected.model))
    assert again.seconds["reweight"] == resumed.seconds["reweight"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    x, y = data()
    source = TensorDataset(x, y)
    pipeline(tmp_path).fit(source, x, y)
    for other, features, message in (
        (pipeline(tmp_path, same_class=False), x, "with same_class='True', this one has 'False'"),
        (pipeline(tmp_path, budget=10), x, "budget"),
        (pipeline(tmp_path), x + 1, "features"),
    ):
        with pytest.raises(ValueError, match=message):
            other.fit(source, features, y)
    with pytest.raises(ValueError, match="weights"):
        pipeline(tmp_path).train(source, torch.ones(23))


def test_the_random_methods_of_a_pipeline_follow_its_seed() -> None:
    x, y = data()
    picks = [pipeline(None, method="random").select(x, y).indices.tolist() for _ in range(2)]
    assert picks[0] == picks[1]


def test_the_pipeline_names_what_is_wrong() -> None:
    x, y = data()
    source = TensorDataset(x, y)
    for options, message in (
        ({"method": "best"}, "method must be one of"),
        ({"readout": "first"}, "readout must be one of 'average', 'last'"),
        ({"scale": "sum"}, "scale must be one of"),
        ({"reweight_on": "labels"}, "reweight_on must be one of 'features', 'data'"),
        ({"neighbors": 0}, "neighbors must be an int of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(None, **options)
    with pytest.raises(ValueError, match="data has 23 samples, features 22"):
        pipeline(None).fit(source, x[:22], y[:22])
    with pytest.raises(ValueError, match="epochs must be an int of at least 1, got 0"):
        plan(epochs=0)
    with pytest.raises(ValueError, match=r"one per sample, \(23,\); got \(4,\)"):
        coreset.train_weighted(source, plan(), weights=torch.ones(4))
    with pytest.raises(ValueError, match="all learnt weights are 0"):
        pipeline(None).broadcast(x, y, torch.arange(9), torch.zeros(9))
    with pytest.raises(ValueError, match="meta is empty"):
        pipeline(None).reweight(x, y, torch.arange(9), TensorDataset(x[:0], y[:0]))
    with pytest.raises(ValueError, match=r"inputs of shape \(2, 2\), but the features have \(4,\)"):
        pipeline(None).fit(source, x, y, TensorDataset(x.view(-1, 2, 2), y))
    with pytest.raises(TypeError, match="learns from a tensor of features, got TensorDataset"):
        pipeline(None).reweight(source, y, torch.arange(9))
    with pytest.raises(TypeError, match="learns from a Dataset, got Tensor"):
        pipeline(None, reweight_on="data").reweight(x, y, torch.arange(9))
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1"):
        CWERM(plan()).reweight(x, y - 1, torch.arange(9))


def test_weights_of_mislabelled_samples_fall() -> None:
    """The point of it all: two blobs, a third of the labels wrong, a trusted meta set."""
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(600) % 3
    x = 3 * F.one_hot(true, 4).float() + 0.6 * torch.randn(600, 4, generator=generator)
    is_wrong = torch.rand(600, generator=generator) < 0.33
    y = torch.where(is_wrong, (true + 1) % 3, true)
    meta_x = 3 * F.one_hot(true[:60], 4).float() + 0.6 * torch.randn(60, 4, generator=generator)
    training = plan(make_model=lambda: nn.Linear(4, 3), epochs=5, batch_size=50)
    reweighting = plan(make_model=lambda: nn.Linear(4, 3), epochs=150, batch_size=50)
    # Both labels of a blob must be in the coreset: 0.3 is enough for every class to hold some.
    made = CWERM(training, reweighting, method="random", fraction=0.3)
    result = made.fit(TensorDataset(x, y), x, y, meta=TensorDataset(meta_x, true[:60]))
    assert result.weights[is_wrong].mean() < 0.7 * result.weights[~is_wrong].mean()
