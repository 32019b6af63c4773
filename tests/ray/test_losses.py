"""Real processes are killed, stopped and added while a run goes on: the bytes and the curve are those of an undisturbed
run, and nobody waits for the dead.

The runs are long enough to be disturbed in the middle: a thread beside the trainer does it, as the loss curve grows.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_runs import curve, one_process_digests, spec_of, status_of, wait_for, write_table

from raysgd.errors import RunError
from raysgd.report.progress import Silent
from raysgd.runtime.guard import descendants
from raysgd.runtime.trainer import Result, Trainer

pytestmark = pytest.mark.usefixtures("ray_cluster")

EPOCHS = 200
END = 20 * EPOCHS

SETTINGS: dict[str, Any] = {
    "train__epochs": EPOCHS,
    "optimizer__learning_rate__decay_rate": 0.99,
    "run__log_every": 50,
    "run__checkpoint_every": 1500,
    "run__validate_every": 1900,
}


class Said(Silent):
    """Keeps what people would be told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("losses") / "runs")


@pytest.fixture(scope="module")
def truth(place: Path) -> str:
    return one_process_digests(spec_of(place, **SETTINGS), [END])[END]


@pytest.fixture(scope="module")
def undisturbed(place: Path, truth: str) -> list[dict[str, Any]]:
    """The curve of a run that nothing disturbed."""
    result, _ = fit(place, "undisturbed", 2, 2)
    assert result.digest == truth
    return curve(place / "runs" / "undisturbed")


def fit(place: Path, name: str, workers: Any, servers: int, **settings: Any) -> tuple[Result, list[str]]:
    scaling = {"scaling__num_workers": workers, "scaling__num_servers": servers}
    said = Said()
    spec = spec_of(place, run__name=name, **SETTINGS, **scaling, **settings)
    return Trainer.from_spec(spec, report=said).fit(), said.lines


def actors(kind: str) -> list[int]:
    """The living actors of this class, below this process."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if title.startswith(f"ray::{kind}".encode()) and state != "Z":
            found.append(pid)
    return sorted(found)


def step_of(run: Path) -> int:
    """Steps in the run's loss curve."""
    lines = run / "metrics.jsonl"
    return int(curve(run)[-1]["step"]) if lines.exists() and lines.stat().st_size else 0


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


@pytest.fixture
def disturb(place: Path) -> Iterator[Callable[[str, Any], None]]:
    """Starts a disturber of the run that is named."""
    threads = []

    def start(name: str, what: Any) -> None:
        threads.append(Disturber(place / "runs" / name, what))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
        if thread.error is not None:
            raise thread.error


def test_a_killed_worker_is_replaced(place: Path, undisturbed: Any, truth: str, disturb: Any) -> None:
    def what(until: Callable[[int], None]) -> None:
        until(300)
        os.kill(actors("Worker")[0], signal.SIGKILL)
        until(600)
        wait_for("a replacement", lambda: len(actors("Worker")) == 3)
        until(900)
        for pid in actors("Worker"):
            os.kill(pid, signal.SIGKILL)

    disturb("killed-worker", what)
    result, said = fit(place, "killed-worker", 3, 2)
    assert (result.step, result.digest) == (END, truth)
    assert curve(place / "runs" / "killed-worker") == undisturbed
    assert sum("is lost at step" in line for line in said) == 4, said
    assert status_of(place / "runs" / "killed-worker")["attempt"] == 1
