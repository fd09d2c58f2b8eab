"""Runs a function in two processes of this machine that form one gloo group."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, multiprocessing


def in_two_processes(function: Callable[[int, Path], None], folder: Path) -> None:
    """Calls `function(rank, folder)` in both, on one thread each; raises what one of them does."""
    multiprocessing.spawn(_run, (function, folder), nprocs=2)


def _run(rank: int, function: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    function(rank, folder)
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A gloo thread may still hold the last tensor of a collective. If it asks for the interpreter
    # lock after Python began to finalize, Python ends that thread, and C++ then aborts the process.
    os._exit(0)
