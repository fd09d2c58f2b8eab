"""Progress bars: tqdm's where it is installed, else a line on stderr from time to time."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")

INTERVAL = 5.0  # seconds between two lines without tqdm


def track(
    items: Iterable[T], title: str, show: bool = True, total: int | None = None
) -> Iterator[T]:
    """Yields the items, and shows on stderr how far it has come.

    Args:
        title: what is being done.
        show: False yields the items and shows nothing.
        total: number of items; None asks len(items), where that is known.
    """
    if not show:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    if find_spec("tqdm") is not None:
        tqdm = importlib.import_module("tqdm.auto").tqdm
        yield from tqdm(items, desc=title, total=total)
        return
    yield from _lines(items, title, total)


def _lines(items: Iterable[T], title: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    done, shown = 0, -1
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= INTERVAL:
            last, shown = now, done
            _write(title, done, total, now - start)
    if shown != done:
        _write(title, done, total, time.monotonic() - start)


def _write(title: str, done: int, total: int | None, seconds: float) -> None:
    of_total = "" if total is None else f" of {total}"
    print(f"{title}: {done}{of_total}, {seconds:.0f} s", file=sys.stderr, flush=True)
