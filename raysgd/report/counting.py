"""How far a command is that goes through a table: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import Progress

from raysgd.report.progress import PLAIN_INTERVAL_S


@contextmanager
def counting(
    stream: TextIO, quiet: bool = False, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str, int, int], None]]:
    """Something to call with (what is done, how much of it is done, how much there is)."""
    console = Console(file=stream)
    if quiet:
        yield lambda _what, _done, _total: None
    elif console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
    else:
        yield Lines(stream, clock).tell


class Lines:
    """A line every few seconds; none for what is done sooner."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream, self._clock = stream, clock
        self._spoken = clock()

    def tell(self, what: str, done: int, total: int) -> None:
        now = self._clock()
        if now - self._spoken >= PLAIN_INTERVAL_S:
            self._spoken = now
            print(f"{what}: {done:,} of {total:,}", file=self._stream, flush=True)
