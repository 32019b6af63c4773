"""What disturbs a run while it goes on: a thread beside it that waits for a step and then kills, stops or adds."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray_runs import step_of, wait_for

from raysgd.report.progress import Silent
from raysgd.runtime.gang import Gang
from raysgd.runtime.guard import descendants


class Said(Silent):
    """Keeps what people would be told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def first_dies(monkeypatch: pytest.MonkeyPatch, order: str, workers: str = "") -> None:
    """Of the workers, or servers, the one that is asked for first carries out ``order`` (a failpoint of the kind's).

    workers: what all workers carry out, such as to sleep
    """
    kind, options, asked = order.partition(".")[0], Gang._options, []

    def made_to_die(self: Gang, cpus: float, bundle: Any) -> dict[str, Any]:
        made = options(self, cpus, bundle)
        is_worker = cpus == self.scaling.worker_cpus
        orders = [workers] if workers and is_worker else []
        if is_worker == (kind == "worker") and cpus:  # a spare asks for none
            asked.append(cpus)
            orders += [order] if len(asked) == 1 else []
        made["runtime_env"]["env_vars"] = {**made["runtime_env"]["env_vars"], "RAYSGD_FAILPOINTS": ",".join(orders)}
        return made

    monkeypatch.setattr(Gang, "_options", made_to_die)
    monkeypatch.setattr("raysgd.runtime.crew.SPARE_AFTER_S", 0.0)


def actors(kind: str) -> list[int]:
    """The living actors of this class, below this process."""
    return living(kind, os.getpid())


def living(kind: str, above: int) -> list[int]:
    """The living actors of this class, below a process."""
    found = []
    for pid in descendants(above):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if title.startswith(f"ray::{kind}".encode()) and state != "Z":
            found.append(pid)
    return sorted(found)


class Disturber(threading.Thread):
    """Does something to a run while it goes on; what went wrong is raised at the end."""

    def __init__(self, run: Path, what: Callable[[Callable[[int], None]], None]) -> None:
        super().__init__()
        self.run_directory, self.what, self.error = run, what, None

    def run(self) -> None:
        try:
            self.what(self.until)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            self.error = error

    def until(self, step: int) -> None:
        """Wait until the run has come to ``step``."""
        wait_for(f"step {step}", lambda: step_of(self.run_directory) >= step)
