"""A process that outlives a killed driver by a moment and takes along what its local Ray cluster would leave.

The raylet and the actors die with the driver, but Ray's agents hang for minutes in a report to a server that is dead.
The guard looks who they are while they start, then the driver tells it; when the driver's end of the pipe closes
without a goodbye, they are killed.
Run as a script, so that it starts in a few milliseconds. Linux only.
"""

from __future__ import annotations

import itertools
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

GOODBYE = b"goodbye\n"

#: what is started in the block has it in its environment; programs that give themselves a title write over that
MARK = "RAYSGD_GUARDED"

#: seconds between two looks while processes start
LOOK_S = 0.05


@contextmanager
def guarded() -> Iterator[Callable[[], None]]:
    """What comes to descend from this process in the block goes with it, if that is killed.

    Until what is given is called the guard looks itself who they are, again and again: while Ray starts, more come.
    From then on it is those of that moment. A block that ends before takes along what it started.
    """
    if sys.platform != "linux":
        yield lambda: None
        return
    before = descendants(os.getpid())
    os.environ[MARK] = secrets.token_hex(8)
    # A session of its own: Ctrl-C on the terminal does not reach it.
    command = [sys.executable, "-IS", __file__, os.environ[MARK], *map(str, (os.getpid(), *before))]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert guard.stdin is not None
    said, goodbye = guard.stdin, b""

    def settled() -> None:
        nonlocal goodbye
        charges = descendants(os.getpid()) - before - {guard.pid}
        said.write("".join(f"{pid} {_started(pid)}\n" for pid in charges).encode())
        said.flush()
        goodbye = GOODBYE

    try:
        yield settled
    finally:
        os.environ.pop(MARK, None)
        with suppress(BrokenPipeError):
            said.write(goodbye)
            said.close()
        guard.wait()


def descendants(pid: int) -> set[int]:
    """The living children of a process, their children, and so on."""
    parents = {int(p.name): stat_field(int(p.name), 1) for p in Path("/proc").glob("[0-9]*")}
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent is not None and int(parent) in new}
        found |= new
    return found


def follow(word: str, parent: int, before: set[int], lines: IO[bytes]) -> None:
    """Look who comes to descend from ``parent`` until the first of the lines is there, or none will be; then watch.

    word: marks what is so new that no look has seen it, and which has lost its parents since
    """
    charges: dict[int, str | None] = {}
    told = False
    while not told:
        told = bool(select.select([lines], [], [], LOOK_S)[0])
        # Once more when it is told: a driver that was interrupted is still there.
        charges |= {pid: _started(pid) for pid in descendants(parent) - before - {os.getpid()}}
    if first := lines.readline():
        watch(itertools.chain([first], lines))
    else:
        take_along([(pid, started) for pid, started in charges.items() if started is not None], word)


def watch(lines: Iterable[bytes]) -> None:
    """Take ``pid start`` lines until a goodbye, or until they end: then kill those that are still the same."""
    charges = []
    for line in lines:
        if line == GOODBYE:
            return
        fields = line.decode().split()
        charges.append((int(fields[0]), fields[1]))
    take_along(charges)


def take_along(charges: Sequence[tuple[int, str]], word: str = "") -> None:
    """Kill the processes that are still the same, and what the raylets among them were just starting.

    A worker that has not begun yet does not know whom to die with, and waits for a raylet that is dead. It is told from
    others by its environment; the second look finds what was being forked during the first.

    word: of the guard: what has it as its mark is killed, too
    """
    for pid, started in charges:
        _kill(pid, started)
    marks = {f"RAY_RAYLET_PID={pid}" for pid, _ in charges} | ({f"{MARK}={word}"} if word else set())
    for pause in (0.0, 0.5):
        time.sleep(pause)
        for pid in bearing(marks):
            _kill(pid, _started(pid))


def bearing(marks: set[str]) -> list[int]:
    """The living processes, but for this one, whose environment has one of these."""
    encoded = {mark.encode() for mark in marks}
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or somebody else's
            if encoded.intersection((directory / "environ").read_bytes().split(b"\0")):
                found.append(int(directory.name))
    return [pid for pid in found if pid != os.getpid()]


def _kill(pid: int, started: str | None) -> None:
    with suppress(ProcessLookupError):
        if started is not None and _started(pid) == started:
            os.kill(pid, signal.SIGKILL)


def _started(pid: int) -> str | None:
    """When the process was started: tells it from a later one of the same pid."""
    return stat_field(pid, 19)


def stat_field(pid: int, index: int) -> str | None:
    """A field of /proc/PID/stat, counted from the state, which follows the name in parentheses; None: it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[index]
    except (FileNotFoundError, ProcessLookupError):
        return None


if __name__ == "__main__":
    driver, *others = map(int, sys.argv[2:])
    follow(sys.argv[1], driver, set(others), sys.stdin.buffer)
