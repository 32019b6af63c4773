"""Local steps, clipping and staleness on real Ray: the same bytes where promised, the loss of BSP elsewhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from disturbing import Disturber, Said, actors
from ray_runs import curve, one_process_digests, spec_of, status_of, wait_for, write_table

from raysgd import checkpoint as checkpoints
from raysgd import cli
from raysgd.audit import audit
from raysgd.report.progress import Silent
from raysgd.runtime import attempt, crew
from raysgd.runtime.trainer import Result, Trainer
from raysgd.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("modes") / "runs")


@pytest.fixture(params=["memory", "calls"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Shared memory, or actor calls as between nodes without relays."""
    if request.param == "calls":
        monkeypatch.setattr(crew, "same_node", lambda _site, _boards: None)
    return str(request.param)


def fit(place: Path, name: str, workers: int, servers: int, **settings: Any) -> Result:
    spec = spec_of(place, run__name=name, scaling__num_workers=workers, scaling__num_servers=servers, **settings)
    return Trainer.from_spec(spec, report=Silent(), fresh=True).fit()


@pytest.mark.parametrize("settings", [{"train__local_steps": 3}, {"train__clip_norm": 0.1}], ids=["local", "clip"])
def test_the_bytes_are_those_of_one_process(place: Path, way: str, settings: dict[str, Any]) -> None:
    [want] = one_process_digests(spec_of(place, **settings), [40]).values()
    for workers, servers in [(1, 2), (3, 3)]:
        result = fit(place, f"{way}-{next(iter(settings))}-{workers}", workers, servers, **settings)
        assert (result.step, result.digest) == (40, want)


@pytest.mark.parametrize("staleness", [2, inf])
def test_with_staleness_the_loss_is_that_of_bsp(place: Path, way: str, staleness: float) -> None:
    # Long enough to come to rest: before that the loss depends on how far old gradients have carried it, too.
    bsp = fit(place, "bsp", 1, 1, train__epochs=10)
    result = fit(place, f"{way}-{staleness}", 3, 2, train__staleness=staleness, train__epochs=10)
    assert result.step == 200
    assert result.metrics["valid_loss"] == pytest.approx(bsp.metrics["valid_loss"], abs=0.01)
    trained = [line for line in result.history if line["kind"] == "train"]
    assert trained[-1]["rows"] == 10 * 613


def test_local_steps_stop_and_go_on_at_the_end_of_a_round(place: Path) -> None:
    """stop_after_steps = 10 is inside a round of 4: the run stops at 12, and the rest is as if it had not."""
    settings: dict[str, Any] = {"train__local_steps": 4, "run__validate_every": 7, "run__checkpoint_every": 9}
    whole = fit(place, "whole", 2, 1, **settings)
    spec = spec_of(place, run__name="parts", scaling__num_workers=2, **settings)
    stopped = Trainer.from_spec(replace(spec, run=replace(spec.run, stop_after_steps=10)), report=Silent()).fit()
    assert (stopped.step, stopped.stopped) == (12, True)
    assert Trainer.from_spec(spec, report=Silent()).fit().digest == whole.digest
    assert curve(place / "runs" / "parts") == curve(place / "runs" / "whole")
    assert [line["step"] for line in whole.history if line["kind"] == "validation"] == [0, 8, 16, 24, 28, 36, 40]


def test_a_stale_run_that_is_interrupted_goes_on_from_where_it_stood(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two boundaries, workers apart: what is in each server beyond the step is in the checkpoint, too."""
    name = "stale"
    words = ["train", str(place / "run.toml"), "--name", name, "-q", "--set", "train.staleness=inf"]
    words += ["--set", "train.epochs=200", "--set", "scaling.num_workers=3", "--set", "scaling.num_servers=2"]
    words += ["--set", "run.validate_every=4000", "--set", "run.checkpoint_every=4000"]
    tick = attempt.Attempt._tick

    def interrupted(self: attempt.Attempt) -> None:
        tick(self)
        if self.crew.running and self.curve.step > 500:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(attempt.Attempt, "_tick", interrupted)
        assert cli.main(words) == 130
    run = place / "runs" / name
    stood = status_of(run)
    assert stood["state"] == "interrupted"
    assert 500 < stood["step"] < 4000
    saved = checkpoints.load(Storage.open(run))
    assert saved.step == stood["step"]
    assert cli.main(words) == 0
    assert (status_of(run)["state"], status_of(run)["step"]) == ("succeeded", 4000)
    found = audit(Storage.open(run))
    assert (found.problems, found.steps, found.attempts, found.rows) == ((), 4000, 2, True)


def test_a_stale_run_is_saved_by_time_and_goes_back_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a spare a lost server takes all back to the newest checkpoint, which lies between two boundaries."""
    monkeypatch.setattr("raysgd.runtime.crew.SPARE_AFTER_S", 1e9)
    name = "stale-by-time"
    settings: dict[str, Any] = {"train__epochs": 400, "run__checkpoint_every": 8000, "run__validate_every": 8000}
    settings |= {"run__checkpoint_seconds": 0.3, "train__staleness": inf}
    spec = spec_of(place, run__name=name, scaling__num_workers=3, scaling__num_servers=2, **settings)

    def what(_until: Callable[[int], None]) -> None:
        wait_for("a checkpoint", lambda: checkpoints.steps(Storage.open(place / "runs" / name)))
        os.kill(actors("Server")[0], signal.SIGKILL)

    disturber, said = Disturber(place / "runs" / name, what), Said()
    disturber.start()
    result = Trainer.from_spec(spec, report=said).fit()
    disturber.join(60)
    assert disturber.error is None
    assert result.step == 8000
    [back] = [line for line in said.lines if "all go back to step" in line]
    assert "all go back to step 0" not in back
    found = audit(Storage.open(place / "runs" / name))
    assert (found.problems, found.steps, found.rows) == ((), 8000, True)
