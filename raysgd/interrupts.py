"""Ctrl-C and SIGTERM: heard where they can be answered, held off where half of a thing must not be left.

Only the main thread hears signals; in any other these blocks do nothing. Ray's core turns what a signal handler raises
into a plain KeyboardInterrupt, so the handler of SIGTERM notes that it was told.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from raysgd.errors import Interrupted

#: exit codes, as shells count them
CTRL_C, TERMINATED = 130, 143

#: what a person or a scheduler sends
ASKED = (signal.SIGINT, signal.SIGTERM)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _handled(handlers: Mapping[int, Any]) -> Iterator[None]:
    """For the duration of the block, these signals go to these handlers."""
    before: dict[int, Any] = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: by Interrupted, with exit code 143 (Ctrl-C: 130)."""
    if not _is_main():
        yield
        return
    code = CTRL_C

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal code
        code = TERMINATED
        raise Interrupted(code)

    with _handled({signal.SIGTERM: interrupt}):
        try:
            yield
        except KeyboardInterrupt as error:
            raise Interrupted(getattr(error, "exit_code", code)) from None


@contextmanager
def heard_at_last() -> Iterator[None]:
    """A signal in the block is heard at once, and where nothing came of that, at its end.

    Python passes over what is raised while a process is forked or an object is deleted; Ray's start forks a lot.
    """
    if not _is_main():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in ASKED}
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        before[number](number, frame)

    with _handled({number: hear for number, handler in before.items() if callable(handler)}):
        yield
    for number in heard:
        before[number](number, None)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Neither Ctrl-C nor SIGTERM is heard in the block: it cleans up after one."""
    if not _is_main():
        yield
        return
    with _handled(dict.fromkeys(ASKED, signal.SIG_IGN)):
        yield


@contextmanager
def held_off() -> Iterator[None]:
    """The first signal in the block is heard at its end, so that what belongs together is done whole; a second at once.

    For a few milliseconds of work, without waiting for anybody.
    """
    if not _is_main():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in ASKED}
    held: list[int] = []
    over = False

    def hear(number: int, frame: FrameType | None) -> None:
        handler = before[number]
        assert callable(handler)
        handler(number, frame)

    def hold(number: int, frame: FrameType | None) -> None:
        if held or over:
            hear(number, frame)
        held.append(number)

    try:
        with _handled({number: hold for number, handler in before.items() if callable(handler)}):
            yield
    finally:
        over = True
        for number in held:
            hear(number, None)
