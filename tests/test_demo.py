"""The demo trains on real images, and says clearly what is wrong with a damaged data set."""

import gzip
import struct

import pytest
import torch

from pyoptim import demo

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

SIZES = {"train": 70, "t10k": 20}


@pytest.fixture(autouse=True)
def _one_thread():
    """Parallel regions of microseconds wait for whole time slices on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _write_idx(path, magic, *sizes, missing=0):
    count = torch.Size(sizes).numel()
    values = bytes(i * 37 % 251 % (10 if len(sizes) == 1 else 256) for i in range(count))
    header = struct.pack(f">{1 + len(sizes)}I", magic, *sizes)
    path.write_bytes(gzip.compress(header + values[: count - missing]))


@pytest.fixture
def folder(tmp_path):
    """The four files of Fashion-MNIST with a few invented images."""
    for part, count in SIZES.items():
        _write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", demo.IMAGES_MAGIC, count, 28, 28)
        _write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", demo.LABELS_MAGIC, count)
    return tmp_path


def _fails_naming(path, folder, capsys):
    assert demo.main(["--data", str(folder), "--quick"]) == 1
    error = capsys.readouterr().err
    assert str(path) in error
    return error


def _run(tmp_path, capsys, *options):
    picture = tmp_path / "picture.png"
    status = demo.main(["--output", str(picture), "--steps", "4", "--quick", *options])
    assert picture.read_bytes().startswith(b"\x89PNG")
    return status, capsys.readouterr().out


def test_demo_trains_on_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.delenv("PYOPTIM_DATA", raising=False)
    status, output = _run(tmp_path, capsys)
    assert status == 0
    assert "handwritten digits: 1437 images" in output
    assert all(name in output for name in demo.IMPLEMENTATIONS)
    assert "all losses agree" in output


@pytest.mark.skipif(not demo.DEBIAN_FOLDER.is_dir(), reason="no Fashion-MNIST on this machine")
def test_demo_trains_on_fashion_mnist(tmp_path, capsys):
    status, output = _run(tmp_path, capsys, "--data", str(demo.DEBIAN_FOLDER))
    assert status == 0
    assert "Fashion-MNIST: 60000 images" in output


def test_demo_reads_the_folder_from_the_environment(folder, capsys, monkeypatch):
    monkeypatch.setenv("PYOPTIM_DATA", str(folder))
    status, output = _run(folder, capsys)
    assert status == 0
    assert "Fashion-MNIST: 70 images" in output


def test_images_keep_shape_and_values_and_are_normalized(folder):
    data = demo.load_fashion_mnist(folder)
    assert data.train_images.shape == (70, 1, 28, 28)
    assert data.test_labels.tolist()[:3] == [0, 7, 4]
    deviation, mean = torch.std_mean(data.train_images)
    torch.testing.assert_close(mean, torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation, torch.tensor(1.0), atol=1e-5, rtol=0)


def test_missing_file_is_named(folder, capsys):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.unlink()
    assert "no such file" in _fails_naming(path, folder, capsys)


def test_truncated_gzip_file_is_named(folder, capsys):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert "damaged" in _fails_naming(path, folder, capsys)


def test_file_that_is_not_gzip_is_named(folder, capsys):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(b"not compressed")
    assert "damaged" in _fails_naming(path, folder, capsys)


def test_corrupted_gzip_file_is_named(folder, capsys):
    path = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert "damaged" in _fails_naming(path, folder, capsys)


def test_wrong_magic_number_is_named(folder, capsys):
    path = folder / "train-labels-idx1-ubyte.gz"
    _write_idx(path, 0x802, 70)
    assert "magic number 0x802, expected 0x801" in _fails_naming(path, folder, capsys)


def test_too_few_pixels_are_named(folder, capsys):
    path = folder / "t10k-images-idx3-ubyte.gz"
    _write_idx(path, demo.IMAGES_MAGIC, 20, 28, 28, missing=1)
    assert "15679 bytes of data, expected 15680" in _fails_naming(path, folder, capsys)


def test_header_that_is_cut_is_named(folder, capsys):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x03"))
    assert "too short" in _fails_naming(path, folder, capsys)


def test_other_number_of_labels_than_images_is_named(folder, capsys):
    _write_idx(folder / "t10k-labels-idx1-ubyte.gz", demo.LABELS_MAGIC, 19)
    path = folder / "t10k-images-idx3-ubyte.gz"
    assert "20 images, but 19 labels" in _fails_naming(path, folder, capsys)


def test_missing_matplotlib_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.main(["--quick"]) == 1
    assert "pip install 'pyoptim-kernels[demo]'" in capsys.readouterr().err


def _trainings(*losses):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    return [
        demo.Training(name, model, optimizer, list(series), [1.0])
        for name, series in zip(demo.IMPLEMENTATIONS, losses, strict=False)
    ]


@pytest.mark.parametrize("value", [1.0 + 2 * demo.TOLERANCE, float("nan"), float("inf")])
def test_disagreeing_losses_fail_the_demo(value, capsys):
    assert demo.report_agreement(_trainings([2.0, 1.0], [2.0, value])) == 1
    assert "torch foreach" in capsys.readouterr().err


def test_agreeing_losses_pass():
    assert demo.report_agreement(_trainings([2.0, 1.0], [2.0, 1.0 + demo.TOLERANCE / 2])) == 0


def test_only_losses_after_the_compared_steps_may_differ():
    same = [1.0] * (demo.COMPARED_STEPS - 1)
    assert demo.report_agreement(_trainings([*same, 1.0, 1.0], [*same, 1.0, 2.0])) == 0
    assert demo.report_agreement(_trainings([*same, 1.0, 1.0], [*same, 2.0, 1.0])) == 1


def test_tolerance_notices_a_missing_weight_decay(monkeypatch):
    """What TOLERANCE is for: an implementation that forgets lr * weight_decay = 1e-5 is caught."""
    without_decay = {
        demo.BASELINE: demo.IMPLEMENTATIONS[demo.BASELINE],
        demo.OURS: lambda params: torch.optim.AdamW(params, lr=demo.LEARNING_RATE, weight_decay=0),
    }
    monkeypatch.setattr(demo, "IMPLEMENTATIONS", without_decay)
    trainings = demo.train(demo.load_digits(), steps=50, seconds=60.0)
    assert demo.loss_difference(trainings[1], trainings[0]) > demo.TOLERANCE
