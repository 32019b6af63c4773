"""``status.json``: how a run stands and, at the end, how it ended. Replaced whole at every change.

    {"state": "succeeded", "exit_code": 0, "step": 2880, "total_steps": 2880, "attempt": 1, "message": "",
     "started": "2026-01-31T12:00:00.000Z", "updated": ..., "digest": "5f0c...", "details": {}}

state: running, succeeded (the last step was reached), stopped (``stop_after_steps``), failed, interrupted
exit_code: null while it runs, else the code of the ``raysgd train`` that wrote it
attempt: 1 for the first start of the run, one more at each continuation
digest: of the newest checkpoint, or null; details: whatever else is worth knowing, as the workers that were lost
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from raysgd.report.metrics_log import utc
from raysgd.storage import Storage

NAME = "status.json"

State = Literal["running", "succeeded", "failed", "stopped", "interrupted"]

#: The types of fields that are not text.
_TYPES: dict[str, Any] = {
    "step": int,
    "total_steps": int | None,
    "attempt": int,
    "exit_code": int | None,
    "details": dict,
}

#: What ``raysgd train`` returns after each state, unless a Status says otherwise.
EXIT_CODES: dict[State, int | None] = {
    "running": None,
    "succeeded": 0,
    "stopped": 0,
    "failed": 1,
    "interrupted": 130,
}


@dataclass(frozen=True)
class Status:
    """How a run stands; the fields of ``status.json``.

    >>> Status("succeeded", step=10, total_steps=10).exit_code
    0
    """

    state: State
    step: int = 0
    total_steps: int | None = None
    attempt: int = 1
    exit_code: int | None = None
    message: str = ""
    started: str | None = None
    updated: str | None = None
    digest: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.state in get_args(State), self.state
        if self.exit_code is None:
            object.__setattr__(self, "exit_code", EXIT_CODES[self.state])

    def moved(self, state: State, **changes: Any) -> Status:
        """The status after a change of state, with that state's exit code unless ``changes`` has one."""
        return replace(self, **{"state": state, "exit_code": None, **changes})


def write(storage: Storage, status: Status, now: Callable[[], float] = time.time) -> Status:
    """Replaces ``status.json``; returns the status with the time of this change and, the first time, of the start.

    Raises SaveError where it cannot be written.
    """
    moment = utc(now())
    stamped = replace(status, started=status.started or moment, updated=moment)
    with storage.saving(NAME):
        storage.write_atomic(NAME, (json.dumps(asdict(stamped), indent=1, allow_nan=False) + "\n").encode())
    return stamped


def read(storage: Storage) -> Status | None:
    """The status that a run wrote last, or None where there is none, or none that can be read."""
    try:
        found = json.loads(storage.read(NAME))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("state") not in get_args(State):
        return None
    known = {f.name: found[f.name] for f in fields(Status) if f.name in found}
    fits = all(isinstance(value, _TYPES.get(key, str | None)) for key, value in known.items())
    fits = fits and known.get("attempt", 1) >= 1 and known.get("step", 0) >= 0
    return Status(**known) if fits else None
