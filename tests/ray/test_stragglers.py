"""One of three workers is far slower than the others: its share moves, back when it is no longer so, and the bytes are
those of one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from disturbing import Said
from ray_runs import one_process_digests, spec_of, wait_for, write_table

from raysgd.audit import audit
from raysgd.protocol import shares
from raysgd.runtime import rates
from raysgd.runtime.gang import Gang
from raysgd.runtime.trainer import Result, Trainer
from raysgd.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")

#: seconds for the rows of one virtual worker: a step of three workers takes 15 ms at least, also on a busy machine
PACE_S = 0.005


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("stragglers") / "runs")


class Run:
    """A run of three workers whose first takes ``first_s`` seconds for each virtual worker."""

    def __init__(self, place: Path, name: str, epochs: int, first_s: float, patch: pytest.MonkeyPatch) -> None:
        self.place, self.said, self.gangs = place, Said(), list[Gang]()
        options, asked = Gang._options, []

        def paced(gang: Gang, cpus: float, bundle: Any) -> dict[str, Any]:
            made = options(gang, cpus, bundle)
            if cpus == gang.scaling.worker_cpus:
                asked.append(cpus)
                order = {"RAYSGD_FAILPOINTS": f"worker.virtual:sleep={first_s if len(asked) == 1 else PACE_S}"}
                made["runtime_env"]["env_vars"] = {**made["runtime_env"]["env_vars"], **order}
            self.gangs = [gang]
            return made

        patch.setattr(Gang, "_options", paced)
        patch.setattr(rates, "WINDOW_S", 0.5)
        settings = {"train__epochs": epochs, "run__log_every": 10, "run__checkpoint_every": 10**6}
        settings |= {"scaling__num_workers": 3, "scaling__num_servers": 1, "run__name": name}
        self.spec = spec_of(place, **settings)
        self.end = 20 * epochs

    def fit(self) -> Result:
        """Train; the bytes and the ledger hold."""
        result = Trainer.from_spec(self.spec, report=self.said).fit()
        assert (result.step, result.digest) == (self.end, one_process_digests(self.spec, [self.end])[self.end])
        found = audit(Storage.open(self.place / "runs" / str(self.spec.run.name)))
        assert (found.problems, found.steps, found.rows) == ((), self.end, True)
        return result

    @property
    def moves(self) -> list[str]:
        return [line for line in self.said.lines if "shares move" in line]


def test_the_share_of_a_slow_worker_moves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times slower, so that the others take all; with an even deal the run would take 80 s."""
    monkeypatch.setattr(shares, "REST_S", 1e6)
    run = Run(place, "slow", 20, 20 * PACE_S, monkeypatch)
    run.fit()
    assert len(run.moves) == 1, run.said.lines
    assert "worker 0 is" in run.moves[0]
    assert "times slower than the others and carries 0 of 8 virtual workers" in run.moves[0]


def test_it_comes_back_when_the_worker_is_as_fast_as_before(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowed from outside, as by a quota of CPU time: it runs for 5 ms of 100, until its share has moved."""
    monkeypatch.setattr(shares, "REST_S", 2.0)
    monkeypatch.setattr(shares, "QUIET_S", 1.0)
    run, errors = Run(place, "recovers", 45, PACE_S, monkeypatch), list[BaseException]()
    monkeypatch.setattr(rates, "WINDOW_S", 1.0)

    def disturb() -> None:
        try:
            wait_for("the workers", lambda: run.gangs and len(run.gangs[0].workers) == 3)
            pid = run.gangs[0].workers[0].process.pid
            wait_for("some steps", (place / "runs" / "recovers" / "metrics.jsonl").exists)
            while not any("worker 0 is" in line for line in run.moves):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.095)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.005)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            errors.append(error)

    thread = threading.Thread(target=disturb)
    thread.start()
    run.fit()
    thread.join(10)
    assert not thread.is_alive()
    assert errors == []
    slow = ["worker 0 is" in line for line in run.moves]  # on a busy machine others may seem slow, too
    assert True in slow, run.moves
    assert False in slow[slow.index(True) :], run.moves
