"""Whole trainings under every policy, start rate and seed, in one stack of networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .generate import Cohort, Stack, epoch_order
from .layers import Replicas, create
from .schedules import MakePolicy
from .tasks import Batch, Problem

Metric = Callable[[Replicas, Batch], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What every training did.

    Args:
        metric, loss, lrs: [policies, rates, seeds, epochs]: on the validation data at the end of
            each epoch, and the rate that it was trained with.
    """

    metric: Tensor
    loss: Tensor
    lrs: Tensor


def simulate(
    problem: Problem,
    cohort: Cohort,
    policies: Mapping[str, MakePolicy],
    seeds: int,
    metric: Metric,
    base_seed: int = 0,
) -> Outcome:
    """Trains `cohort.epochs` epochs under each policy, from each of `cohort.rates`.

    A seed fixes start and order of the data, for all policies and rates alike.
    """
    starts, rng = _starts(problem, seeds, base_seed)
    shape = (len(policies), len(cohort.rates), seeds)
    seed_of = torch.arange(seeds).repeat(shape[0] * shape[1])
    stack = Stack(cohort, _repeated(starts, seed_of))
    running = [
        make(rate, cohort.epochs)
        for make in policies.values()
        for rate in cohort.rates
        for _ in range(seeds)
    ]
    rates = [rate for _ in policies for rate in cohort.rates for _ in range(seeds)]
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(cohort.epochs):
        stack.set_rates(rates)
        train = _epoch(stack, problem, cohort, seed_of, rng)
        valid, measured = (
            _measured(stack.replicas, problem, of) for of in (problem.losses, metric)
        )
        history.append((measured, valid, torch.tensor(rates)))
        rates = [
            policy.next_rate(losses, loss)
            for policy, losses, loss in zip(running, train.tolist(), valid.tolist(), strict=True)
        ]
    return Outcome(*(torch.stack(x, 1).reshape(*shape, -1) for x in zip(*history, strict=True)))


class Trainer(Protocol):
    """Trains one network with an optimizer that finds its own rate."""

    def step(self, loss: Callable[[], Tensor]) -> None:
        """One step on the batch that `loss` computes the loss of."""

    def rate(self) -> float:
        """The learning rate of the last step."""


MakeTrainer = Callable[[list[Tensor], int], Trainer]
"""(leaves that require grad, steps of the training) to a fresh trainer."""


def simulate_alone(
    problem: Problem,
    cohort: Cohort,
    make: MakeTrainer,
    seeds: int,
    metric: Metric,
    base_seed: int = 0,
) -> Outcome:
    """As `simulate`, from the same starts in the same order, but one network at a time.

    There is no initial rate: the outcome is [1, 1, seeds, epochs].
    """
    starts, rng = _starts(problem, seeds, base_seed)
    networks = [_repeated(starts, torch.tensor([seed])) for seed in range(seeds)]
    total = cohort.epochs * cohort.steps
    trainers = [make(list(network.params.values()), total) for network in networks]
    needed = cohort.steps * cohort.batch
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(cohort.epochs):
        order = epoch_order(seeds, len(problem.train[0]), needed, rng)
        for seed, (network, trainer) in enumerate(zip(networks, trainers, strict=True)):
            for rows in order[seed : seed + 1].split(cohort.batch, 1):
                batch = tuple(t[rows] for t in problem.train)
                trainer.step(lambda r=network, b=batch: problem.losses(r, b)[0])
        measured, valid = (
            torch.cat([_measured(network, problem, of) for network in networks])
            for of in (metric, problem.losses)
        )
        history.append((measured, valid, torch.tensor([t.rate() for t in trainers])))
    return Outcome(
        *(torch.stack(x, 1).reshape(1, 1, seeds, -1) for x in zip(*history, strict=True))
    )


def _starts(problem: Problem, seeds: int, base_seed: int) -> tuple[Replicas, torch.Generator]:
    """A network per seed, and the generator of the order of the data."""
    rng = torch.Generator().manual_seed(base_seed)
    torch.manual_seed(base_seed)  # dropout
    return create(problem.layers, seeds, rng), rng


def _repeated(replicas: Replicas, which: Tensor) -> Replicas:
    params = {}
    for name, value in replicas.params.items():
        params[name] = value.detach()[which].requires_grad_()
        params[name].grad = torch.zeros_like(params[name])
    return Replicas(params, {name: value[which] for name, value in replicas.buffers.items()})


def _epoch(
    stack: Stack, problem: Problem, cohort: Cohort, seed_of: Tensor, rng: torch.Generator
) -> Tensor:
    """One epoch; training losses [B, steps]."""
    seeds = int(seed_of.max()) + 1
    needed = cohort.steps * cohort.batch
    order = epoch_order(seeds, len(problem.train[0]), needed, rng)[seed_of]
    losses = [
        stack.step(problem, tuple(t[rows] for t in problem.train))
        for rows in order.split(cohort.batch, 1)
    ]
    return torch.stack(losses, 1)


def _measured(replicas: Replicas, problem: Problem, metric: Metric) -> Tensor:
    replicas.training = False
    batch = tuple(t.expand(replicas.count, *t.shape) for t in problem.valid)
    with torch.no_grad():
        values = metric(replicas, batch)
    replicas.training = True
    return values


def best_so_far(metric: Tensor, higher_is_better: bool) -> Tensor:
    """Running best over the last dim; values that are not finite never count."""
    worst = -torch.inf if higher_is_better else torch.inf
    clean = metric.where(metric.isfinite(), worst)
    return (clean.cummax(-1) if higher_is_better else clean.cummin(-1)).values


def threshold_of(metric: Tensor, higher_is_better: bool) -> float:
    """The worst of the best values of all runs: where the paper says that a run has converged.

    Args:
        metric: [policies, seeds, epochs] of the schedules compared, in one task from one rate.
    Source: ARC, section 4.
    """
    final = best_so_far(metric, higher_is_better)[..., -1]
    return float(final.amin() if higher_is_better else final.amax())


def steps_to(
    threshold: float, metric: Tensor, steps_per_epoch: int, higher_is_better: bool
) -> Tensor:
    """Steps until `threshold` is reached, inf where it never is: [..., epochs] to [...]."""
    best = best_so_far(metric, higher_is_better)
    reached = best >= threshold if higher_is_better else best <= threshold
    steps = (reached.int().argmax(-1) + 1.0) * steps_per_epoch
    return steps.where(reached.any(-1), torch.inf)


def ranks(values: Sequence[float], higher_is_better: bool) -> list[int]:
    """Place of each value, 1 for the best; equals share the better place."""
    return [1 + sum(b > a if higher_is_better else b < a for b in values) for a in values]
