"""Named failpoints: places at which a test can have this process die, fail, find the disk full, or wait.

    RAYSGD_FAILPOINTS="checkpoint.rename:kill"                 whenever it is reached
    RAYSGD_FAILPOINTS="storage.fsync@3:enospc"                 the third time that this process reaches it
    RAYSGD_FAILPOINTS="storage.put:sleep=0.5,checkpoint.prune:raise"

name: one of ``NAMES``
@n: where the place knows a step, at step n alone; elsewhere the n-th time alone, counted from 1
action: ``kill`` (SIGKILL of this process), ``raise`` (a RunError that names the failpoint), ``enospc`` (the OSError of
a full disk), ``sleep=SECONDS``

The variable is read when this module is imported; what is wrong with it is an InputError. Off, a failpoint costs one
look at ``armed``: in a hot loop write ``if failpoints.armed: failpoints.reach(...)``.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from math import isfinite

from raysgd.errors import InputError, RunError

VARIABLE = "RAYSGD_FAILPOINTS"

#: Every failpoint, and how things stand when it is reached.
NAMES = {
    "storage.create": "write_atomic, locally: nothing is written yet",
    "storage.write": "the temporary file is there, empty",
    "storage.fsync": "its bytes are written, not synced",
    "storage.replace": "it is synced, and does not have its name yet",
    "storage.rename": "rename_dir, locally: the directory still has its old name",
    "storage.sync": "a file or a directory got another name or went, which a power cut may still undo",
    "storage.append": "append, locally: the second half of the last line is not written yet",
    "storage.delete": "delete_dir, locally: the directory is still there",
    "storage.empty": "it is out of sight, its files are still there",
    "storage.put": "write_atomic elsewhere: nothing is sent yet",
    "storage.close": "the bytes are sent, the file is not closed",
    "storage.remove": "delete_dir or delete_file elsewhere: it is still there",
    "checkpoint.begin": "save: what was left over is gone, nothing is written yet",
    "checkpoint.rename": "save, locally: all files are written, the checkpoint does not count yet",
    "checkpoint.replaced": "save: the checkpoint counts; the older one of the same step is still there",
    "checkpoint.prune": "prune: a checkpoint that is no longer wanted is still there",
    "worker.start": "the actor of a worker is being made",
    "prepare.scatter": "the rows of a piece are about to be sent to their files",
    "prepare.gather": "a prepared file is about to be written",
    "worker.compute": "a worker is about to compute a step",
    "worker.virtual": "it is about to compute the gradient of one of its virtual workers",
    "worker.computed": "its sums lie where the servers read them; no server has been told",
    "worker.pushed": "the servers were told; it waits for the next version",
    "worker.score": "a worker is about to score validation rows, at a version",
    "server.snapshot": "a server is about to copy its state at a version, for a checkpoint",
    "server.sealed": "a server has sealed the record of a step, of a hashed model; nothing of it is written yet",
    "server.applied": "a server has written the next version; nobody has been told",
    "server.published": "the node has been told of the next version, the driver has not read the commit",
}

ACTIONS = "kill, raise, enospc, sleep=SECONDS"

_ORDER = re.compile(r"([^\s:@]+)(?:@([0-9]{1,18}))?:(kill|raise|enospc|sleep=([0-9.]+))")


@dataclass(frozen=True)
class Order:
    """What to do at a failpoint. ``at``: the step or the count at which alone it is done; ``seconds``: to sleep."""

    action: str
    at: int | None = None
    seconds: float = 0.0


#: What is asked for, by name; empty: all failpoints are off.
armed: dict[str, list[Order]] = {}

#: How often an armed failpoint was reached.
_reached: Counter[str] = Counter()


def reach(name: str, step: int | None = None) -> None:
    """Do what is asked for at this failpoint, which is nothing unless the environment says so."""
    if armed:
        _obey(name, step)


def arm(text: str) -> None:
    """Obey ``text`` instead of what was asked for before, counting anew; "" turns all failpoints off."""
    orders = parsed(text)
    armed.clear()
    _reached.clear()
    armed.update(orders)


def parsed(text: str) -> dict[str, list[Order]]:
    """The orders by name. Raises InputError with every entry that is none.

    >>> parsed("checkpoint.rename@3:kill")
    {'checkpoint.rename': [Order(action='kill', at=3, seconds=0.0)]}
    """
    found: dict[str, list[Order]] = {}
    problems: list[str] = []
    for entry in (part.strip() for part in text.split(",") if part.strip()):
        match = _ORDER.fullmatch(entry)
        seconds = 0.0 if match is None else _seconds(match[4])
        if match is None or seconds is None:
            problems.append(
                f"{VARIABLE} must be NAME:ACTION or NAME@N:ACTION, the action one of {ACTIONS}: got {entry!r}"
            )
        elif match[1] not in NAMES:
            problems.append(f"{VARIABLE} names no failpoint: {match[1]!r}; allowed are {', '.join(NAMES)}")
        else:
            at = None if match[2] is None else int(match[2])
            found.setdefault(match[1], []).append(Order(match[3].partition("=")[0], at, seconds))
    if problems:
        raise InputError(problems)
    return found


def _seconds(text: str | None) -> float | None:
    """The seconds to sleep, 0 where none are given, None where the text is no number."""
    if text is None:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if isfinite(seconds) else None


def _obey(name: str, step: int | None) -> None:
    assert name in NAMES, f"{name} is no failpoint: add it to failpoints.NAMES"
    _reached[name] += 1
    now = _reached[name] if step is None else step
    for order in armed.get(name, ()):
        if order.at in (None, now):
            _act(name, order, now)


def _act(name: str, order: Order, now: int) -> None:
    if order.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif order.action == "raise":
        raise RunError(f"failpoint {name} was reached ({now}), and {VARIABLE} says raise")
    elif order.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"failpoint {name}")
    else:
        time.sleep(order.seconds)


arm(os.environ.get(VARIABLE, ""))
