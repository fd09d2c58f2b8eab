"""Threads and processes: optimizers side by side, one optimizer stepped twice, fork."""

import multiprocessing
import threading
from typing import Any

import pytest
import torch
from dropin import OURS, assert_same, run, set_grads
from torch.nn import Parameter

import pyoptim

LARGE = (1 << 20) + 3  # from here on a step releases the GIL
STEPS = 4


def large_params(seed: int) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(n, generator=generator)) for n in (LARGE, 7)]


def train(cls: Any, seed: int) -> list[Parameter]:
    params = large_params(seed)
    run(cls(params, lr=0.1), params, range(STEPS))
    return params


def in_threads(*jobs: Any) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_two_optimizers_in_two_threads() -> None:
    results: dict[int, list[Parameter]] = {}
    in_threads(*(lambda n=n: results.update({n: train(pyoptim.AdamW, n)}) for n in range(2)))
    for n in range(2):
        assert_same(results[n], train(pyoptim.AdamW, n), rtol=0, atol=0)


@pytest.mark.parametrize("is_first", [True, False], ids=["general-path", "plan"])
def test_one_optimizer_in_two_threads_raises_or_takes_turns(is_first: bool) -> None:
    """Every step that did not raise happened once and as a whole."""
    params = [Parameter(torch.zeros(LARGE))]
    optimizer = pyoptim.SGD(params, lr=1.0)
    params[0].grad = -torch.ones(LARGE)
    done, errors = [], []

    def step_often() -> None:
        for _ in range(30):
            try:
                if is_first:
                    optimizer._plan = None
                optimizer.step()
                done.append(1)
            except RuntimeError as error:
                errors.append(str(error))

    in_threads(step_often, step_often)
    assert params[0].unique().tolist() == [len(done)]
    assert len(done) + len(errors) == 60
    assert all("already running in another thread" in error for error in errors)
    optimizer.step()  # and none is left behind
    assert params[0].unique().tolist() == [len(done) + 1]


def test_a_step_during_the_general_path_raises_even_if_a_plan_could_make_it() -> None:
    params = [Parameter(torch.ones(3))]
    optimizer = pyoptim.SGD(params)
    run(optimizer, params, range(2))
    reference, errors = type(optimizer).reference, []

    def step_again(*args: Any) -> Any:
        with pytest.raises(RuntimeError, match="already running") as raised:
            optimizer.step()
        errors.append(raised)
        return reference(*args)

    optimizer.reference = step_again
    with pyoptim.use_backend("reference"):
        optimizer.step()
    assert len(errors) == 1


def step_in_child(optimizer: Any, queue: Any) -> None:
    optimizer.step()
    queue.put([p.detach().numpy() for p in optimizer.param_groups[0]["params"]])


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this platform has no fork"
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("steps_before", [0, 2], ids=["general-path", "plan"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_child_forked_from_a_threaded_parent_can_step(name: str, steps_before: int) -> None:
    """torch's own operators may hang there, so the child calls nothing but step()."""
    torch.set_num_threads(2)
    params = large_params(1)
    optimizer = OURS[name](params, lr=0.1)
    run(optimizer, params, range(steps_before))
    set_grads(params, 9)
    train(OURS[name], 2)  # starts the threads that the child will not have
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=step_in_child, args=(optimizer, queue), daemon=True)
    child.start()
    try:
        got = queue.get(timeout=30)
    finally:
        child.kill()
    optimizer.step()
    assert_same(map(torch.from_numpy, got), params, rtol=0, atol=0)
