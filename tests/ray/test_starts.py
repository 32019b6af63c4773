"""Workers that die while they start, again and again: pauses that grow, and an error that names the last."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disturbing import Disturber, Said, actors
from ray_runs import one_process_digests, spec_of, status_of, wait_for, write_table

from raysgd.errors import RunError
from raysgd.runtime.gang import Gang
from raysgd.runtime.trainer import Trainer

pytestmark = pytest.mark.usefixtures("ray_cluster")

EPOCHS = 120
END = 20 * EPOCHS

#: so slow that replacements come while the run goes on, on a fast machine, too
PACE = "worker.compute:sleep=0.005"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return write_table(tmp_path / "runs")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], str]], None]:
    """Sets the failpoints of each worker that is asked for, by how many were asked for before it."""

    def set_failpoints(orders: Callable[[int], str]) -> None:
        options, asked = Gang._options, []

        def with_orders(self: Gang, cpus: float, bundle: Any) -> dict[str, Any]:
            made = options(self, cpus, bundle)
            if cpus == self.scaling.worker_cpus:
                words = {"RAYSGD_FAILPOINTS": f"{PACE},{orders(len(asked))}"}
                made["runtime_env"]["env_vars"] = {**made["runtime_env"]["env_vars"], **words}
                asked.append(cpus)
            return made

        monkeypatch.setattr(Gang, "_options", with_orders)

    return set_failpoints


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds before each worker that was asked for in the place of another."""
    ask, found = Gang.ask_workers, []

    def noted(self: Gang, count: int, after_s: float) -> None:
        found.append(after_s)
        ask(self, count, after_s)

    monkeypatch.setattr(Gang, "ask_workers", noted)
    return found


@pytest.fixture
def kill_at_300(place: Path) -> Iterator[Callable[[str, int], None]]:
    """Kills so many workers of the run that is named at step 300."""
    threads = []

    def start(name: str, count: int) -> None:
        def what(until: Callable[[int], None]) -> None:
            until(300)
            for pid in wait_for("workers", lambda: actors("Worker"))[:count]:
                os.kill(pid, signal.SIGKILL)

        threads.append(Disturber(place / "runs" / name, what))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(60)
        assert thread.error is None


def fit(place: Path, name: str, workers: int, **settings: Any) -> tuple[Any, list[str]]:
    said = Said()
    decay = {"optimizer__learning_rate__decay_rate": 0.99, "run__log_every": 20}
    spec = spec_of(place, run__name=name, train__epochs=EPOCHS, scaling__num_workers=workers, **decay, **settings)
    return Trainer.from_spec(spec, report=said).fit(), said.lines


def test_replacements_that_die_at_the_start(place: Path, starts: Any, pauses: list[float], kill_at_300: Any) -> None:
    """Two die, the third lives: the other worker goes on meanwhile, to the same bytes."""
    starts(lambda asked: {2: "worker.start:kill", 3: "worker.start:raise"}.get(asked, ""))
    kill_at_300("reborn", 1)
    result, said = fit(place, "reborn", 2)
    spec = spec_of(place, train__epochs=EPOCHS, optimizer__learning_rate__decay_rate=0.99)
    assert (result.step, result.digest) == (END, one_process_digests(spec, [END])[END])
    assert pauses == [0.0, 0.0, 1.0]
    died = [line for line in said if line.startswith("starting worker")]
    assert [line.split(":")[0] for line in died] == ["starting worker 2", "starting worker 3"], said
    assert "an actor died; another one is asked for" in died[0]
    assert "failpoint worker.start was reached" in died[1]
    assert any("worker 4 joined" in line for line in said), said


def test_where_all_die_at_the_start_the_run_ends(
    place: Path, starts: Any, pauses: list[float], kill_at_300: Any
) -> None:
    starts(lambda asked: "worker.start:kill" if asked >= 1 else "")
    kill_at_300("unborn", 1)
    with pytest.raises(RunError, match=r"starting worker 2: .*losses without progress: 3, 2 are borne"):
        fit(place, "unborn", 1, run__failure_config__max_failures=2)
    assert pauses == [0.0, 1.0]
    assert status_of(place / "runs" / "unborn")["state"] == "failed"


def test_where_none_starts_the_run_ends(place: Path, starts: Any) -> None:
    """Before there is any step: the whole gang is asked for again, after pauses, and not for ever."""
    starts(lambda _: "worker.start:raise")
    failed = r"starting worker 0: an actor failed: .*worker.start.*; losses without progress: 2, 1 are borne"
    with pytest.raises(RunError, match=failed):
        fit(place, "none", 1, run__failure_config__max_failures=1)
    assert status_of(place / "runs" / "none")["state"] == "failed"
