"""The pipeline of the ARC controller: generate, judge, rules, ship, compare."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from . import comparison, generate, results
from .points import load_points
from .tasks import TASKS
from .train import CANDIDATES
from .unseen import UNSEEN

# Cheap enough for whole trainings of every controller; all families but language and tagging.
PROXIES = [
    *("digits-mlp", "cancer-mlp", "mixture-mlp", "friedman-mlp", "text-origin"),
    *("digits-autoencoder", "digits-siamese", "digits-adversarial", "rating-factors"),
    *("shapes-multitask", "wine-mlp", "char-mlp"),
]
LOOP_RECIPES = [
    *("logistic", "perceptrons", "perceptrons, soft", "perceptrons, half soft"),
    "perceptrons, half soft, caution 1",
]
# Name of the weights to their recipe: the outcome of `judge`, see docs/arc-model-card.md.
SHIPPED = {"default": "perceptrons, half soft, rate", "conv-lstm": "conv-lstm"}


def _generate(options: argparse.Namespace) -> None:
    cohorts = [generate.draw_cohort(i) for i in range(options.cohorts)]
    generate.generate(options.folder, cohorts, options.workers)


def _judge(options: argparse.Namespace) -> None:
    points, kept = load_points(options.folder), results.Results(options.results)
    kept.once("data", "all", lambda: results.describe(points))
    folds = options.folder / "folds"
    results.judge_in_closed_loop(points, LOOP_RECIPES, PROXIES, folds, kept)
    results.judge_on_points(points, options.candidates, options.seeds, folds, kept)
    print(results.markdown(kept))


def _rules(options: argparse.Namespace) -> None:
    points, kept = load_points(options.folder), results.Results(options.results)
    recipe = SHIPPED["default"]
    results.judge_rules(points, recipe, PROXIES, options.seeds, options.folder / "folds", kept)
    print(results.markdown(kept))


def _ship(options: argparse.Namespace) -> None:
    points = load_points(options.folder)
    note = f"{len(points)} points of {len(TASKS)} tasks"
    chosen = {name: SHIPPED[name] for name in options.names}
    for name, digest in results.ship(points, chosen, options.weights, note).items():
        print(f'"{name}": "{digest}",')


def _compare(options: argparse.Namespace) -> None:
    kept = results.Results(options.results)
    comparison.run(options.tasks, options.controllers, kept, options.seeds)
    text = comparison.markdown(kept)
    options.results.with_suffix(".md").write_text(text + "\n")
    print(text)
    if options.plot:
        for path in comparison.draw(kept, options.results.parent):
            print(path)


def _all(options: argparse.Namespace) -> None:
    for step in (_generate, _judge, _ship):
        step(options)


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="python -m pyoptim.bench.arc", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--folder", type=Path, default=Path("arc-data"), help="the data")
    data.add_argument("--cohorts", type=int, default=126, help="files of 60 points each")
    data.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    data.add_argument("--results", type=Path, default=Path("arc-controllers.json"))
    data.add_argument("--seeds", type=int, default=1)
    data.add_argument(
        "--candidates", nargs="+", metavar="NAME", default=list(CANDIDATES), choices=CANDIDATES
    )
    data.add_argument("--weights", type=Path, default=Path("weights"), help="where weights go")
    data.add_argument(
        "--names", nargs="+", default=list(SHIPPED), choices=SHIPPED, help="weights to ship"
    )
    steps = {
        "generate": (_generate, "train and branch; continues where it was stopped"),
        "judge": (_judge, "train controllers, judge them on families that they have not seen"),
        "rules": (_rules, "ways of following the answers, on families not seen"),
        "ship": (_ship, "train the chosen controllers on all data, write their weights"),
        "all": (_all, "generate, judge and ship"),
    }
    for name, (step, text) in steps.items():
        commands.add_parser(name, help=text, parents=[data]).set_defaults(run=step)
    compare = commands.add_parser("compare", help="shipped controllers and rivals, unseen tasks")
    compare.add_argument("--results", type=Path, default=Path("arc-unseen.json"))
    compare.add_argument("--tasks", nargs="+", default=list(UNSEEN), choices=UNSEEN)
    compare.add_argument("--controllers", nargs="+", default=["default"], help="ARC's networks")
    compare.add_argument("--seeds", type=int, default=comparison.SEEDS)
    compare.add_argument("--plot", action="store_true", help="draws curves beside the results")
    compare.set_defaults(run=_compare)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command on one thread: the networks are too small for more."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.run(options)
    return 0
