"""A process that outlives a killed driver by a moment and takes along what its local Ray cluster would leave.

The raylet and the actors die with the driver, but Ray's agents hang for minutes in a report to a server that is dead.
The driver tells the guard who they are; when the driver's end of the pipe closes without a goodbye, they are killed.
Run as a script, so that it starts in a few milliseconds. Linux only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

GOODBYE = b"goodbye\n"


@contextmanager
def guarded() -> Iterator[None]:
    """For the duration of the block, the processes that descend from this one now go with it, however it ends."""
    if sys.platform != "linux":
        yield
        return
    # A session of its own: Ctrl-C on the terminal does not reach it.
    guard = subprocess.Popen([sys.executable, "-IS", __file__], stdin=subprocess.PIPE, start_new_session=True)
    assert guard.stdin is not None
    charges = descendants(os.getpid()) - {guard.pid}
    guard.stdin.write("".join(f"{pid} {_started(pid)}\n" for pid in charges).encode())
    guard.stdin.flush()
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            guard.stdin.write(GOODBYE)
            guard.stdin.close()
        guard.wait()


def descendants(pid: int) -> set[int]:
    """The living children of a process, their children, and so on."""
    parents = {int(p.name): stat_field(int(p.name), 1) for p in Path("/proc").glob("[0-9]*")}
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent is not None and int(parent) in new}
        found |= new
    return found


def watch(lines: Iterable[bytes]) -> None:
    """Take ``pid start`` lines until a goodbye, or until they end: then kill those that are still the same."""
    charges = []
    for line in lines:
        if line == GOODBYE:
            return
        fields = line.decode().split()
        charges.append((int(fields[0]), fields[1]))
    take_along(charges)


def take_along(charges: Sequence[tuple[int, str]]) -> None:
    """Kill the processes that are still the same, and what the raylets among them were just starting.

    A worker that has not begun yet does not know whom to die with, and waits for a raylet that is dead. It is told from
    others by its environment; the second look finds what was being forked during the first.
    """
    for pid, started in charges:
        _kill(pid, started)
    for pause in (0.0, 0.5):
        time.sleep(pause)
        for pid in started_by({pid for pid, _ in charges}):
            _kill(pid, _started(pid))


def started_by(raylets: set[int]) -> list[int]:
    """The living processes of which the environment says that one of these raylets started them."""
    marks = {f"RAY_RAYLET_PID={pid}".encode() for pid in raylets}
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or somebody else's
            if marks.intersection((directory / "environ").read_bytes().split(b"\0")):
                found.append(int(directory.name))
    return found


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
    watch(sys.stdin.buffer)
