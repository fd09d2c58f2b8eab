"""Meta-Weight-Net: a small network learns the weights of training samples from a meta set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Optimizer

from pyoptim.adam import Adam
from pyoptim.sam import SAM

NORMALIZATIONS = ("n", "sum")
META_GRADIENTS = ("forward", "double_backward")
# In torch's errors for operators, out= functions and autograd.Functions without forward mode.
NO_FORWARD_MODE = ("forward AD", "forward mode AD")

Losses = Callable[[Any, Any], Tensor]
Params = dict[str, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class MetaWeightNet(nn.Module):
    """V(loss; Theta): the weight of a sample, between 0 and 1, from its loss.

        Linear(1, hidden) -> ReLU -> Linear(hidden, 1) -> sigmoid

    Args:
        hidden: width; 100 gives the 301 parameters of the source.

    Shape: losses [n] to weights [n].

    Source: Shu et al., arXiv:1902.07379, section 3.3.
    """

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"hidden must be an int of at least 1, got {hidden!r}")
        self.hidden = nn.Linear(1, hidden)
        self.output = nn.Linear(hidden, 1)

    def forward(self, losses: Tensor) -> Tensor:
        return torch.sigmoid(self.output(F.relu(self.hidden(losses[:, None])))).squeeze(1)


class MetaStep(NamedTuple):
    """What one step of `MetaReweighter` saw.

    Attributes:
        loss: 0-dim; the weighted training loss that was differentiated.
        losses: [n]; of each sample, before the step.
        weights: [n]; as they multiply the losses: divided by n or by their sum.
        meta_loss: 0-dim; at the virtual parameters; None in a step without a meta update.
    """

    loss: Tensor
    losses: Tensor
    weights: Tensor
    meta_loss: Tensor | None


class MetaReweighter:
    """Trains a network on weighted losses, and the weight network on a meta set, in turn.

        l_j = loss_j(theta),  w_j = V(l_j; Theta),  T = sum_j w_j l_j / n
        theta' = theta - lr * dT/dtheta                              (virtual, plain SGD)
        Theta steps along d(mean meta loss at theta')/dTheta         (meta step)
        theta steps along d(sum_j V(l_j; Theta) l_j / n)/dtheta      (with the new Theta)

    The meta-gradient is exact and needs no second backward pass through the network: with
    c = dT/dl, a vector of n numbers, theta' = theta - lr * sum_j c_j(Theta) dl_j/dtheta, hence

        d(meta loss)/dTheta = -d/dTheta sum_j c_j(Theta) a_j,   a_j = <lr * g_meta, dl_j/dtheta>

    where g_meta is the meta gradient at theta' and a is one forward-mode derivative (JVP) of the
    losses. It works with any module whose operations have forward-mode derivatives in torch.

    Args:
        model: any module; `model(x)`, `model(*x)` for a tuple, `model(**x)` for a mapping.
        optimizer: any optimizer over parameters of the model; those that are in none of its groups,
            or have requires_grad=False, stay constant. The virtual step takes the lr of each group.
        weight_net: a module from losses [n] to weights [n]; None makes a `MetaWeightNet` on the
            device and in the dtype of the model's parameters.
        meta_optimizer: over the parameters of weight_net, or a function that makes one from them;
            None is Adam(lr=1e-3, weight_decay=1e-4), as the source's code for noisy labels. That is
            made for tens of thousands of steps: with a thousand, weights hardly leave their start.
        loss_fn: (outputs, targets) -> [n] losses; None is cross-entropy per sample.
        normalize: "n": weights are divided by the number of samples; "sum": by their sum.
        detach: whether V sees losses that count as constants in the virtual step (the source's
            code for noisy labels); False adds V's own derivative there (for class imbalance).
        interval: a meta step in every `interval`-th step.
        warmup: steps before the first meta step. As long as the network knows nothing, weights of
            large losses rise, and those of wrong labels with them.
        virtual_lr: lr of the virtual step; None is that of the optimizer's groups.
        meta_gradient: "forward", or "double_backward", the plain form, slower and with more memory.
        use_closure: whether the optimizer's step gets a closure, which computes the weighted loss
            again with the same weights and runs its backward pass; None: for `pyoptim.SAM` and
            where `step` cannot be called without one (torch's LBFGS).

    BatchNorm and other buffers: the training batch updates them once per step; what the other
    passes do to them is dropped. Dropout draws the same masks in all passes over the training
    batch. A step that raises before its updates leaves buffers as they were.

    Raises:
        ValueError, TypeError: an argument is not as described.

    Source: Shu et al., arXiv:1902.07379, algorithm 1, equations 3 to 5. Differs: forward-mode
    meta-gradient; one forward pass over the training batch serves the virtual and the real step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight_net: nn.Module | None = None,
        meta_optimizer: Optimizer | MakeOptimizer | None = None,
        loss_fn: Losses | None = None,
        normalize: str = "n",
        detach: bool = True,
        interval: int = 1,
        warmup: int = 0,
        virtual_lr: float | None = None,
        meta_gradient: str = "forward",
        use_closure: bool | None = None,
    ) -> None:
        _check_choice("normalize", normalize, NORMALIZATIONS)
        _check_choice("meta_gradient", meta_gradient, META_GRADIENTS)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be an int of at least 1, got {interval!r}")
        if virtual_lr is not None and not virtual_lr > 0:
            raise ValueError(f"virtual_lr must be above 0, got {virtual_lr!r}")
        self.model, self.optimizer = model, optimizer
        self.loss_fn = _cross_entropy if loss_fn is None else loss_fn
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"warmup must be an int of at least 0, got {warmup!r}")
        self.normalize, self.detach = normalize, detach
        self.interval, self.warmup = interval, warmup
        self.virtual_lr, self.meta_gradient = virtual_lr, meta_gradient
        trained = self._trained()
        first = next(iter(trained.values()))
        if weight_net is None:
            weight_net = MetaWeightNet().to(first.device, first.dtype)
        self.weight_net = weight_net
        if not isinstance(meta_optimizer, Optimizer):
            make = _default_meta_optimizer if meta_optimizer is None else meta_optimizer
            meta_optimizer = make(weight_net.parameters())
        self.meta_optimizer = meta_optimizer
        self.use_closure = _needs_closure(optimizer) if use_closure is None else use_closure
        self.steps = 0

    # -- one step ----------------------------------------------------------------------------------

    def step(self, x: Any, y: Any, meta_x: Any = None, meta_y: Any = None) -> MetaStep:
        """One training step, with a meta step first if it is due (`needs_meta_batch`).

        Args:
            x, y: inputs and targets of the training batch.
            meta_x, meta_y: those of the meta batch; not looked at where no meta step is due.

        Raises:
            ValueError: the loss is not one number per sample; a meta batch is missing; the meta
                loss is not finite.
            RuntimeError: an operation of the model has no forward-mode derivative.
        """
        is_meta = self.needs_meta_batch
        if is_meta and meta_y is None:
            raise ValueError(
                "this step includes a meta step (see needs_meta_batch); pass meta_x and meta_y"
            )
        with _restored_on_error(self.model), torch.enable_grad():
            before = _Snapshot(self.model, x) if is_meta else None
            losses = self._checked(self.loss_fn(_call(self.model, x), y), y)
            meta_loss = None
            if before is not None:
                meta_loss, grads = self._meta_gradient(before, losses, x, y, meta_x, meta_y)
                self._meta_update(grads)
            weights = self.weights(losses)
            loss = weights @ losses
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        self._step_optimizer(weights, x, y)
        self.steps += 1
        return MetaStep(loss.detach(), losses.detach(), weights, meta_loss)

    @property
    def needs_meta_batch(self) -> bool:
        """Whether the next step includes a meta step."""
        since = self.steps - self.warmup
        return since >= 0 and since % self.interval == 0

    @torch.no_grad()
    def weights(self, losses: Tensor) -> Tensor:
        """[n]: what multiplies each loss: V of it, divided by n or by the sum of all."""
        return self._normalized(self.weight_net(losses.detach()))

    def meta_gradients(self, x: Any, y: Any, meta_x: Any, meta_y: Any) -> list[Tensor]:
        """The meta-gradient for each parameter of weight_net; changes nothing.

        Args, raises: as for `step`.
        """
        with _kept_buffers(self.model), torch.enable_grad():
            before = _Snapshot(self.model, x)
            losses = self._checked(self.loss_fn(_call(self.model, x), y), y)
            return self._meta_gradient(before, losses, x, y, meta_x, meta_y)[1]

    # -- its parts ---------------------------------------------------------------------------------

    def _trained(self) -> dict[str, nn.Parameter]:
        """Parameters of the model that the optimizer has, by name."""
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        named = self.model.named_parameters()
        trained = {name: p for name, p in named if id(p) in owned and p.requires_grad}
        if not trained:
            raise ValueError("the optimizer has no parameter of the model that requires a gradient")
        return trained

    def _rates(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """The lr of the virtual step, by name."""
        groups = self.optimizer.param_groups
        of_param = {id(p): group["lr"] for group in groups for p in group["params"]}
        chosen = self.virtual_lr
        return {n: of_param[id(p)] if chosen is None else chosen for n, p in trained.items()}

    def _checked(self, losses: Tensor, y: Any) -> Tensor:
        n = len(y) if isinstance(y, Tensor) and y.dim() else None
        if not isinstance(losses, Tensor) or losses.dim() != 1 or n not in (None, len(losses)):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss_fn must return one loss per sample, shape ({'n' if n is None else n},); "
                f'got {got}. Use reduction="none"'
            )
        if len(losses) == 0:
            raise ValueError("the batch is empty; a step needs at least one sample")
        return losses

    def _normalized(self, weights: Tensor) -> Tensor:
        if weights.dim() != 1:
            raise ValueError(f"weight_net must map [n] to [n], got shape {tuple(weights.shape)}")
        if self.normalize == "n":
            return weights / len(weights)
        total = weights.sum()
        return weights / (total + (total == 0))  # all weights 0: the loss is 0, as in the source

    def _slopes(self, losses: Tensor, create_graph: bool) -> Tensor:
        """c = dT/dl, [n]: the factors of the samples' gradients in the virtual step."""
        leaf = losses.detach().requires_grad_()
        if self.detach:
            return self._normalized(self.weight_net(leaf.detach()))
        total = self._normalized(self.weight_net(leaf)) @ leaf
        return torch.autograd.grad(total, leaf, create_graph=create_graph)[0]

    def _meta_gradient(
        self, before: _Snapshot, losses: Tensor, x: Any, y: Any, meta_x: Any, meta_y: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """(meta loss, its gradient for each parameter of the weight network)."""
        if self.meta_gradient == "double_backward":
            return self._by_double_backward(before, x, y, meta_x, meta_y)
        trained = self._trained()
        rates = self._rates(trained)
        slopes = self._slopes(losses, create_graph=True)
        grads = torch.autograd.grad(
            losses, list(trained.values()), slopes.detach(), retain_graph=True, allow_unused=True
        )
        moved = {
            name: (p if g is None else torch.add(p, -rates[name] * g)).detach().requires_grad_()
            for (name, p), g in zip(trained.items(), grads, strict=True)
        }
        meta_loss = self._meta_loss(before, moved, meta_x, meta_y)
        meta_grads = torch.autograd.grad(meta_loss, list(moved.values()), allow_unused=True)
        direction = {
            name: torch.zeros_like(p) if g is None else rates[name] * g
            for (name, p), g in zip(trained.items(), meta_grads, strict=True)
        }
        along = self._derivative(before, trained, direction, x, y)
        return meta_loss.detach(), self._net_gradient(-(slopes @ along))

    def _derivative(
        self, before: _Snapshot, trained: Mapping[str, Tensor], direction: Params, x: Any, y: Any
    ) -> Tensor:
        """a, [n]: the derivatives of the losses along a direction of the parameters."""
        try:
            with torch.no_grad(), before.random_state(), forward_ad.dual_level():
                params = {n: _dual(p.detach(), direction[n]) for n, p in trained.items()}
                losses = self.loss_fn(before.call(self.model, params, x), y)
                value, along = forward_ad.unpack_dual(losses)  # type: ignore[no-untyped-call]
                return torch.zeros_like(value) if along is None else along
        except (NotImplementedError, RuntimeError) as error:
            if not any(words in str(error) for words in NO_FORWARD_MODE):
                raise
            raise RuntimeError(
                "an operation of the model has no forward-mode derivative in torch; use "
                f'meta_gradient="double_backward" ({error})'
            ) from error

    def _by_double_backward(
        self, before: _Snapshot, x: Any, y: Any, meta_x: Any, meta_y: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """The meta-gradient as it is written down: through the graph of the virtual step."""
        trained = self._trained()
        rates = self._rates(trained)
        with before.random_state():
            losses = self.loss_fn(before.call(self.model, dict(trained), x), y)
        seen = losses.detach() if self.detach else losses
        total = self._normalized(self.weight_net(seen)) @ losses
        grads = torch.autograd.grad(
            total, list(trained.values()), create_graph=True, allow_unused=True
        )
        moved = {
            name: p if g is None else p - rates[name] * g
            for (name, p), g in zip(trained.items(), grads, strict=True)
        }
        meta_loss = self._meta_loss(before, moved, meta_x, meta_y)
        return meta_loss.detach(), self._net_gradient(meta_loss)

    def _meta_loss(self, before: _Snapshot, params: Params, meta_x: Any, meta_y: Any) -> Tensor:
        outputs = before.call(self.model, params, meta_x)
        loss = self._checked(self.loss_fn(outputs, meta_y), meta_y).mean()
        # One such loss would make the weight network, and all weights from then on, NaN.
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the meta loss is {loss.item()}: the meta batch holds NaN or inf, or the training "
                "losses are not finite; no parameter has been changed. Look for such samples, or "
                "lower the learning rate"
            )
        return loss

    def _step_optimizer(self, weights: Tensor, x: Any, y: Any) -> None:
        """The real step, after its backward pass."""
        if not self.use_closure:
            self.optimizer.step()
            return

        def closure(backward: bool = True) -> Tensor:
            loss = weights @ self._checked(self.loss_fn(_call(self.model, x), y), y)
            if backward and torch.is_grad_enabled():
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        self.optimizer.step(closure)  # type: ignore[arg-type]

    def _net_gradient(self, value: Tensor) -> list[Tensor]:
        params = [p for p in self.weight_net.parameters() if p.requires_grad]
        return list(torch.autograd.grad(value, params, materialize_grads=True))

    def _meta_update(self, grads: list[Tensor]) -> None:
        params = [p for p in self.weight_net.parameters() if p.requires_grad]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        self.meta_optimizer.step()
        self.meta_optimizer.zero_grad()

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The weight network, its optimizer and the count; not the model and its optimizer."""
        return {
            "weight_net": self.weight_net.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self.weight_net.load_state_dict(state["weight_net"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        self.steps = int(state["steps"])


class _Snapshot:
    """Buffers and random state before a forward pass, to make the same pass again elsewhere."""

    def __init__(self, model: nn.Module, x: Any) -> None:
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.cpu_state = torch.get_rng_state()
        self.devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
        self.states = [torch.cuda.get_rng_state(device) for device in self.devices]

    def call(self, model: nn.Module, params: Params, x: Any) -> Any:
        """model(x) with these parameters; what the pass does to buffers is dropped."""
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        args, kwargs = _arguments(x)
        return functional_call(model, {**params, **buffers}, args, kwargs)

    @contextmanager
    def random_state(self) -> Iterator[None]:
        """Draws what the pass drew; the generators go on afterwards as if nothing had happened."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu_state)
            for device, state in zip(self.devices, self.states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, tuple):
        return x, {}
    if isinstance(x, Mapping):
        return (), dict(x)
    return (x,), {}


def _call(model: nn.Module, x: Any) -> Any:
    args, kwargs = _arguments(x)
    return model(*args, **kwargs)


def _dual(value: Tensor, direction: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, direction)  # type: ignore[no-untyped-call]
    return dual


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    is_required = closure is not None and closure.default is inspect.Parameter.empty
    return isinstance(optimizer, SAM) or is_required


def _default_meta_optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
    return Adam(params, lr=1e-3, weight_decay=1e-4)


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        _put_back(saved)


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    except BaseException:
        _put_back(saved)
        raise


@torch.no_grad()
def _put_back(saved: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in saved:
        buffer.copy_(value)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
