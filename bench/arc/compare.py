"""Whole trainings under every policy, start rate and seed, in one stack of networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    rng = torch.Generator().manual_seed(base_seed)
    torch.manual_seed(base_seed)  # dropout
    shape = (len(policies), len(cohort.rates), seeds)
    seed_of = torch.arange(seeds).repeat(shape[0] * shape[1])
    stack = Stack(cohort, _repeated(create(problem.layers, seeds, rng), seed_of))
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
        valid, measured = stack.validate(problem), _measured(stack, problem, metric)
        history.append((measured, valid, torch.tensor(rates)))
        rates = [
            policy.next_rate(losses, loss)
            for policy, losses, loss in zip(running, train.tolist(), valid.tolist(), strict=True)
        ]
    return Outcome(*(torch.stack(x, 1).reshape(*shape, -1) for x in zip(*history, strict=True)))


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


def _measured(stack: Stack, problem: Problem, metric: Metric) -> Tensor:
    stack.replicas.training = False
    batch = tuple(t.expand(stack.replicas.count, *t.shape) for t in problem.valid)
    with torch.no_grad():
        values = metric(stack.replicas, batch)
    stack.replicas.training = True
    return values


def best_so_far(metric: Tensor, higher_is_better: bool) -> Tensor:
    """Running best over the last dim; values that are not finite never count."""
    worst = -torch.inf if higher_is_better else torch.inf
    clean = metric.where(metric.isfinite(), worst)
    return (clean.cummax(-1) if higher_is_better else clean.cummin(-1)).values


def steps_to_threshold(metric: Tensor, steps_per_epoch: int, higher_is_better: bool) -> Tensor:
    """Steps until the worst of all best values is reached, [policies, seeds], in one cell.

    Args:
        metric: [policies, seeds, epochs] of one task and start rate.
    Source: ARC, section 4.
    """
    best = best_so_far(metric, higher_is_better)
    final = best[..., -1]
    threshold = final.amin() if higher_is_better else final.amax()
    reached = best >= threshold if higher_is_better else best <= threshold
    return (reached.int().argmax(-1) + 1) * steps_per_epoch


def ranks(values: Sequence[float], higher_is_better: bool) -> list[int]:
    """Place of each value, 1 for the best; equals share the better place."""
    return [1 + sum(b > a if higher_is_better else b < a for b in values) for a in values]
