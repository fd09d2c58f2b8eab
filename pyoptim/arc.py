"""What the ARC learning-rate controller sees, and the networks that decide.

A *cycle* is a few epochs at one learning rate. After each, a controller looks at the last one to
three and says how likely it is that raising, keeping or lowering the rate is best for the next. A
controller may also see how large that rate is for the optimizer; the paper's sees how it changed.

Source: "To Raise or Not To Raise: The Autonomous Learning Rate Question", section 3. Differs: the
training loss is resized by linear interpolation before it is standardised, as the authors' own
code does at inference; the resize is written here, without OpenCV.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

FACTORS = (1.618, 1.0, 0.618)
"""What a decision multiplies the learning rate by: raise, keep, lower."""

LENGTH = 300
"""Points of a window: 100 per cycle, the newest at the end."""

MAX_CYCLES = 3

USUAL_LRS = {
    **dict.fromkeys(("Adam", "AdamW", "AdamP", "NAdam", "RAdam", "Adamax", "RMSprop"), 1e-3),
    **dict.fromkeys(("SGD", "SGDP"), 0.1),
}
"""Usual learning rates of optimizers without momentum of their own, by the name of the class."""


def usual_lr(optimizer: Optimizer) -> float | None:
    """A usual learning rate for an optimizer: what controllers compare the actual one with.

    By the class, or the nearest of its bases that `USUAL_LRS` has; times (1 - momentum)/(1 -
    dampening) of the first group that has a learning rate, so that SGD with momentum 0.9 has 0.01.
    Wrappers that keep the optimizer in `base_optimizer` (`pyoptim.SAM`) or `optimizer` (accelerate,
    Lightning) have that of the optimizer inside.

    Returns: None for every other optimizer, line searches among them.
    """
    inner = getattr(optimizer, "base_optimizer", None) or getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        return usual_lr(inner)
    names = (cls.__name__ for cls in type(optimizer).__mro__)
    usual = next((USUAL_LRS[name] for name in names if name in USUAL_LRS), None)
    groups = [group for group in optimizer.param_groups if float(group["lr"]) > 0.0]
    if usual is None or not groups:
        return usual
    momentum, dampening = (float(groups[0].get(key) or 0.0) for key in ("momentum", "dampening"))
    if not (0.0 <= momentum < 1.0 and dampening < 1.0):
        return None
    return usual * (1.0 - momentum) / (1.0 - dampening if momentum else 1.0)


def placed(lrs: Tensor, usual_lrs: Tensor) -> Tensor:
    """How large learning rates are: [N] and [N], nan where unknown, to [N, 2], float32.

    The decades above the usual one, and 1; 0 and 0 where that is unknown.
    """
    decades = (lrs.double() / usual_lrs.double()).log10()
    known = decades.isfinite()
    return torch.stack([decades.where(known, 0.0), known.double()], 1).float()


def features(
    train_losses: Sequence[float] | Tensor,
    val_losses: Sequence[float] | Tensor | None,
    lrs: Sequence[float] | Tensor,
) -> Tensor:
    """The window that a controller decides on.

    Args:
        train_losses: the loss of every step of the last k cycles, oldest first; any positive
            number of them.
        val_losses: the validation loss of every epoch of these cycles; None or empty if there is
            no validation.
        lrs: the learning rate of each of these cycles; k = len(lrs) is 1, 2 or 3.

    Returns: [300, 3], float32, on the CPU: training loss, validation loss, learning rate. Each is
        resized to 100*k points and padded on the left to 300 with 0, 0 and 1. The losses have mean
        0 and standard deviation 1 (the training loss after the resize, which is linear; the
        validation loss before, which is to the nearest), the learning rates are divided by the
        first. No validation is all zeros.
    Raises: ValueError for an argument that is empty, too long, not one-dimensional, not finite, or
        a rate that is not positive.
    Source: ARC, section 3.2.
    """
    train = _series("train_losses", train_losses)
    rates = _series("lrs", lrs)
    if len(rates) > MAX_CYCLES or bool((rates <= 0).any()):
        raise ValueError(
            f"lrs must be one to {MAX_CYCLES} positive learning rates, one for each of the last "
            f"cycles, not {rates.tolist()}"
        )
    points = LENGTH // MAX_CYCLES * len(rates)
    window = torch.zeros(LENGTH, 3, dtype=torch.float64)
    window[:, 2] = 1
    train, least = _scaled(train)
    window[-points:, 0] = _standardized(_resized(train, points), least)
    if val_losses is not None and len(val_losses) > 0:
        valid = _standardized(*_scaled(_series("val_losses", val_losses)))
        window[-points:, 1] = _repeated(valid, points)
    window[-points:, 2] = _repeated(rates / rates[0], points)
    return window.float()


def _series(name: str, values: Sequence[float] | Tensor) -> Tensor:
    series = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if series.ndim != 1 or len(series) == 0:
        raise ValueError(
            f"{name} must be a non-empty sequence of numbers, not of shape {tuple(series.shape)}"
        )
    bad = (~series.isfinite()).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{name}[{int(bad[0])}] is {float(series[bad[0]])}: only finite values can be judged; "
            "a training whose loss is not finite needs its last good state back, and a lower rate"
        )
    return series


def _scaled(x: Tensor) -> tuple[Tensor, float]:
    """x within -1 to 1, and the smallest deviation that counts: squares of 1e155 would overflow."""
    scale = x.abs().max().clamp_min(1)
    return x / scale, 1e-7 / float(scale)


def _standardized(x: Tensor, least: float) -> Tensor:
    """Mean 0, standard deviation 1; less where the deviation is below `least`."""
    centred = x - x.mean()
    return centred / centred.square().mean().sqrt().clamp_min(least)


def _resized(x: Tensor, points: int) -> Tensor:
    """Linear interpolation between the centres of cells, without smoothing: batch noise stays."""
    position = ((torch.arange(points, dtype=torch.float64) + 0.5) * len(x) / points - 0.5).clamp(
        0, len(x) - 1
    )
    left = position.long()
    right = (left + 1).clamp_max(len(x) - 1)
    return torch.lerp(x[left], x[right], position - left)


def _repeated(x: Tensor, points: int) -> Tensor:
    """The nearest value below: point i takes x[i*len(x) // points]."""
    return x[torch.arange(points) * len(x) // points]


def _trend(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, curvature and residual standard deviation of [N, points] over time -1 to 1, [N] each.

    The parabola of least squares in t and t*t - mean(t*t), which are orthogonal on an even grid.
    """
    t = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)
    bend = t.square() - t.square().mean()
    centred = x - x.mean(1, keepdim=True)
    slope, curvature = centred @ t / t.square().sum(), centred @ bend / bend.square().sum()
    residual = centred - slope[:, None] * t - curvature[:, None] * bend
    return slope, curvature, residual.square().mean(1).sqrt()


def summary(windows: Tensor, cycles: int) -> Tensor:
    """Twenty numbers that describe windows of the same number of cycles.

    Args:
        windows: [N, 300, 3], from `features`.
        cycles: finished cycles in each of them, 1 to 3.

    Returns: [N, 20], float32. Slopes are per half of the stretch that they are fitted to.
        0-2: of the standardised training loss: slope over the window, slope over the last 50
        points, residual around a parabola. 3-5: of the validation loss: slope, last, last - least.
        6: cycles. 7, 8: log of the last and of the total change of the rate. 9: curvature of the
        training loss. 10-12: of the training loss in the last cycle: correlation of neighbouring
        residuals, slope, residual. 13: slope of the validation loss in the last cycle. 14: log of
        the residual in the last cycle over that in the first. 15, 16: slope over residual, in the
        last cycle and in the window. 17, 18: mean of both losses in the last cycle. 19: mean of
        the last 10 training losses less the least of the window.
    """
    past = windows[:, -LENGTH // MAX_CYCLES * cycles :].double()
    train, valid, rate = past.unbind(2)
    last, first = train[:, -100:], train[:, :100]
    slope, curvature, noise = _trend(train)
    last_slope, _, last_noise = _trend(last)
    columns = [
        *(slope, _trend(train[:, -50:])[0], noise),
        *(_trend(valid)[0], valid[:, -1], valid[:, -1] - valid.amin(1)),
        torch.full_like(slope, cycles),
        *((rate[:, -1] / rate[:, max(0, 100 * cycles - 101)]).log(), rate[:, -1].log()),
        *(curvature, _neighbour_correlation(last), last_slope, last_noise),
        _trend(valid[:, -100:])[0],
        ((last_noise + 1e-3) / (_trend(first)[2] + 1e-3)).log(),
        *(last_slope / (last_noise + 0.05), slope / (noise + 0.05)),
        *(last.mean(1), valid[:, -100:].mean(1), train[:, -10:].mean(1) - train.amin(1)),
    ]
    return torch.stack(columns, 1).float()


def _neighbour_correlation(x: Tensor) -> Tensor:
    """Correlation of neighbours in [N, points] after the straight line is taken out, [N]."""
    t = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)
    centred = x - x.mean(1, keepdim=True)
    residual = centred - (centred @ t / t.square().sum())[:, None] * t
    return (residual[:, 1:] * residual[:, :-1]).mean(1) / (residual.square().mean(1) + 1e-6)


class Controller(nn.Module):
    """Decides on a learning rate; `forward` takes a batch of `inputs` to logits [N, 3]."""

    architecture: str

    def inputs(self, windows: Tensor, cycles: int, places: Tensor | None = None) -> Tensor:
        """What the network reads of windows [N, 300, 3] of `cycles` cycles.

        Args:
            places: [N, 2] of `placed`; None where no usual learning rate is known. Networks that do
                not see the rate leave it out.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The arguments of the constructor, as stored in a weight file."""
        return {}

    @torch.no_grad()
    def probabilities(
        self,
        train_losses: Sequence[float] | Tensor,
        val_losses: Sequence[float] | Tensor | None,
        lrs: Sequence[float] | Tensor,
        usual_lr: float | None = None,
    ) -> tuple[float, float, float]:
        """The probabilities that raising, keeping and lowering the rate is best, in this order.

        Args:
            usual_lr: a usual learning rate for the optimizer, see the function of this name; None
                where it is unknown. Without effect on a network that does not see the rate itself.

        Other Args, Raises: as `features`, and ValueError for a usual_lr that is not positive and
        finite; `FACTORS` has what each decision multiplies the rate by.
        """
        window = features(train_losses, val_losses, lrs)
        if usual_lr is not None and not 0.0 < usual_lr < math.inf:
            raise ValueError(f"usual_lr must be positive and finite, or None, got {usual_lr}")
        usual = torch.tensor([math.nan if usual_lr is None else usual_lr], dtype=torch.float64)
        place = placed(_series("lrs", lrs)[-1:], usual)
        # The weights' dtype and device are the caller's choice; the answer is small.
        weight = next(self.parameters())
        logits = self(self.inputs(window[None], len(lrs), place).to(weight))
        up, keep, down = logits[0].double().softmax(0).tolist()
        return up, keep, down


class ConvLSTM(Controller):
    """The network of the paper: two convolutions, two LSTMs, two dense layers; 79 555 numbers.

    Keras counts 79 043: its LSTM has one bias vector, torch's has two.

    Source: ARC, Figure 2.
    """

    architecture = "conv_lstm"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv1d(3, 32, 5), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(32, 64, 5), nn.ReLU(), nn.MaxPool1d(2)),
        )
        self.lstm = nn.LSTM(64, 64, num_layers=2, batch_first=True)
        self.dense = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))

    def inputs(self, windows: Tensor, cycles: int, places: Tensor | None = None) -> Tensor:
        return windows

    def forward(self, windows: Tensor) -> Tensor:
        steps = self.conv(windows.transpose(1, 2)).transpose(1, 2)
        logits: Tensor = self.dense(self.lstm(steps)[0][:, -1])
        return logits


class SummaryNet(Controller):
    """Means the answers of `members` small perceptrons on the twenty numbers of `summary`.

    Args:
        hidden: width of the one hidden layer of each member; 0 makes it a logistic model.
        members: networks of the same shape, each [20, hidden] and [hidden, 3].
        sees_lr: read the two numbers of `placed` too, [22, hidden].
    """

    architecture = "summary"
    CURVES = 20
    """Numbers of `summary`."""
    LIMIT = 5.0
    """Standardised inputs are clamped to this: no curve is further out than those learnt from."""

    def __init__(self, hidden: int, members: int = 1, sees_lr: bool = False) -> None:
        super().__init__()
        self.hidden, self.members, self.sees_lr = hidden, members, sees_lr
        n_inputs = self.CURVES + 2 * sees_lr
        self.mean = nn.Parameter(torch.zeros(n_inputs), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(n_inputs), requires_grad=False)
        sizes = (n_inputs, hidden, 3) if hidden else (n_inputs, 3)
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList(
            torch.randn(members, a, b) * math.sqrt(1 / a) for a, b in pairs
        )
        self.biases = nn.ParameterList(torch.zeros(members, 1, b) for _, b in pairs)

    def options(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "members": self.members, "sees_lr": self.sees_lr}

    def inputs(self, windows: Tensor, cycles: int, places: Tensor | None = None) -> Tensor:
        numbers = summary(windows, cycles)
        if not self.sees_lr:
            return numbers
        return torch.cat(
            [numbers, windows.new_zeros(len(windows), 2) if places is None else places], 1
        )

    def each(self, numbers: Tensor) -> Tensor:
        """[N, 20 or 22] of `inputs` to the logits of every member, [members, N, 3]."""
        scaled = ((numbers - self.mean) / self.scale).clamp(-self.LIMIT, self.LIMIT)
        x = scaled.expand(self.members, *scaled.shape)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = F.silu(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])

    def forward(self, numbers: Tensor) -> Tensor:
        return self.each(numbers).softmax(2).mean(0).log()


ARCHITECTURES: dict[str, type[Controller]] = {c.architecture: c for c in (ConvLSTM, SummaryNet)}

WEIGHTS: dict[str, str] = {
    "default": "7a863c3154869064a6876faa76432c92a37b21ce2ced14a6b43a40cdada4e98d",
    "conv-lstm": "d598cb8d09ab98014bd1787ce47cc7f8e097352cda8af683a31b4cf39373fde5",
}
"""Names that `load` knows, with the SHA-256 of the files in pyoptim/weights."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16}
_FOLDER = Path(__file__).parent / "weights"


def load(name_or_path: str | Path = "default", sha256: str | None = None) -> Controller:
    """A trained controller, ready to decide.

    Args:
        name_or_path: one of `WEIGHTS`, which come with the package, or a file that `save` wrote.
        sha256: checksum that a file given by path must have; None does not check it.

    Raises: ValueError for a file that is not what it should be; FileNotFoundError if there is none.
    """
    name = str(name_or_path)
    if name in WEIGHTS:
        path, sha256 = _FOLDER / f"arc-{name}.safetensors", WEIGHTS[name]
    elif not (path := Path(name_or_path)).is_file():
        raise FileNotFoundError(
            f"no controller {name!r}: give one of {', '.join(WEIGHTS)} or a path to a weight file"
        )
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise ValueError(
            f"{path} has SHA-256 {found}, not {sha256}: it is damaged or another version; "
            "install pyoptim again, or fetch the file again"
        )
    try:
        return _decoded(content)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a weight file of a controller: {error}") from error


def save(controller: Controller, path: str | Path, note: str = "") -> str:
    """Writes a controller as a safetensors file, float32; returns its SHA-256."""
    state = {name: value.detach().float() for name, value in controller.state_dict().items()}
    options = json.dumps(controller.options())
    header: dict[str, Any] = {
        "__metadata__": {"arc": controller.architecture, "options": options, "note": note}
    }
    begin = 0
    for name, value in state.items():
        end = begin + 4 * value.numel()
        offsets = [begin, end]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(bytes(value.flatten().view(torch.uint8).tolist()) for value in state.values())
    content = len(text).to_bytes(8, "little") + text + body
    Path(path).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _decoded(content: bytes) -> Controller:
    length = int.from_bytes(content[:8], "little")
    header: Mapping[str, Any] = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    controller = ARCHITECTURES[metadata["arc"]](**json.loads(metadata["options"]))
    body = memoryview(content)[8 + length :]
    state = {name: _tensor(body, entry) for name, entry in header.items() if name != "__metadata__"}
    controller.load_state_dict(state)
    return controller.float().eval()


def _tensor(body: memoryview, entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    data = torch.frombuffer(bytearray(body[begin:end]), dtype=_DTYPES[entry["dtype"]])
    return data.reshape(entry["shape"])
