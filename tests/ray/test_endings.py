"""However a run ends, it leaves no process and the truth in its directory, and the same command brings it to its end.

Each run that is disturbed is a process of its own with a local cluster of its own; it is continued in this process,
by the same arguments, on the cluster that the tests share.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray_runs import (
    Marked,
    curve,
    one_process_digests,
    raysgd_command,
    spec_of,
    status_of,
    step_of,
    wait_for,
    write_table,
)

from raysgd import checkpoint, cli, storage
from raysgd.audit import Ledger, audit
from raysgd.errors import DivergedError
from raysgd.report.curve import Curve
from raysgd.report.metrics_log import MetricsLog
from raysgd.runtime.attempt import Attempt
from raysgd.storage import Storage

EPOCHS = 100
END = 20 * EPOCHS

#: long enough to be disturbed in the middle: some seconds of small steps
SETTINGS = [
    f"train.epochs={EPOCHS}",
    "optimizer.learning_rate.decay_rate=0.99",
    "scaling.num_workers=2",
    "scaling.num_servers=2",
    "run.log_every=50",
    "run.checkpoint_every=300",
    "run.validate_every=900",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("endings") / "runs")


def arguments(place: Path, name: str, *more: str) -> list[str]:
    sets = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    return ["train", str(place / "run.toml"), "--name", name, "-q", *sets]


@pytest.fixture(scope="module")
def undisturbed(place: Path, ray_cluster: None) -> Path:  # noqa: ARG001
    """The directory of a run of the same settings that nothing disturbed; its bytes are those of one process."""
    assert cli.main(arguments(place, "undisturbed")) == 0
    run = place / "runs" / "undisturbed"
    spec = spec_of(place, train__epochs=EPOCHS, optimizer__learning_rate__decay_rate=0.99)
    assert status_of(run)["digest"] == one_process_digests(spec, [END])[END]
    return run


#: no step takes less than this: on a fast machine, too, there is a middle in which to disturb a run
SLOW = "worker.compute:sleep=0.004"


class Disturbed:
    """A run in mid-course as a process, slow, and what must hold after its end."""

    def __init__(self, place: Path, name: str, *settings: str, pace: str = SLOW, **how: Any) -> None:
        self.place, self.name, self.run = place, name, place / "runs" / name
        how["environment"] = {"RAYSGD_FAILPOINTS": pace, **how.get("environment", {})}
        self.process = Marked(raysgd_command(*arguments(place, name, *settings)), place, **how)

    def until_mid_segment(self) -> None:
        """Wait until there is a checkpoint and the run has gone on from it."""
        wait_for(f"a step beyond the first checkpoint\n{self.process.text}", self._beyond)

    def _beyond(self) -> bool:
        code = self.process.process.poll()
        assert code is None, f"ended with {code} before anything was done to it:\n{self.process.text}"
        saved = self.saved()
        return bool(saved) and step_of(self.run) > saved[-1]

    def saved(self) -> list[int]:
        return checkpoint.steps(Storage.open(self.run))

    def ended(self, state: str, code: int | None) -> dict[str, Any]:
        """No process is left, and status.json says how and where the run stands; returns it."""
        self.process.gone()
        status = status_of(self.run)
        assert (status["state"], status["exit_code"]) == (state, code), status
        last = checkpoint.load(Storage.open(self.run), "last")
        assert not last.skipped
        assert 0 < last.step < END
        assert (status["step"], status["digest"]) == (last.step, last.digest())
        return status

    def continues(self, undisturbed: Path) -> None:
        """The same command goes on to the bytes and to the curve of the run that was not disturbed."""
        before = status_of(self.run)
        assert cli.main(arguments(self.place, self.name)) == 0
        status = status_of(self.run)
        assert (status["state"], status["attempt"]) == ("succeeded", before["attempt"] + 1)
        assert status["digest"] == status_of(undisturbed)["digest"]
        assert curve(self.run) == curve(undisturbed)


@pytest.fixture
def disturbed(place: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Starts the run that is named as the test; at the end nothing of it is left."""
    started: list[Disturbed] = []

    def start(*settings: str, **how: Any) -> Disturbed:
        started.append(Disturbed(place, request.node.name.replace("[", "-").replace("]", ""), *settings, **how))
        return started[0]

    yield start
    for run in started:
        run.process.end()


@pytest.mark.parametrize(
    ("what", "method"),
    [(Curve, "extend"), (Curve, "_add"), (Ledger, "take"), (Ledger, "_append"), (MetricsLog, "train")],
)
def test_interrupted_amid_its_books(
    what: type, method: str, place: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two things that belong together: the curve and the ledger tell of the same steps, each once."""
    run, whole = place / "runs" / f"books-{what.__name__}{method}", getattr(what, method)

    def interrupting(self: Any, *given: Any, **named: Any) -> Any:
        done = whole(self, *given, **named)
        if step_of(run) >= 250:
            monkeypatch.undo()  # once
            signal.raise_signal(signal.SIGINT)
        return done

    monkeypatch.setattr(what, method, interrupting)
    assert cli.main(arguments(place, run.name)) == 130
    stopped = status_of(run)["step"]
    assert 250 <= stopped < END
    assert audit(Storage.open(run)).problems == ()
    assert cli.main(arguments(place, run.name)) == 0
    assert status_of(run)["digest"] == status_of(undisturbed)["digest"]
    found = audit(Storage.open(run))
    assert (found.problems, found.steps, found.rows) == ((), END, True)
    assert curve(run) == curve(undisturbed)


def test_killed_driver(disturbed: Any, undisturbed: Path, place: Path) -> None:
    run = disturbed()
    run.until_mid_segment()
    run.process.process.kill()
    assert run.process.wait() == -signal.SIGKILL
    status = run.ended("running", None)
    assert status["step"] % 300 == 0
    # Once the same command as a process of its own, too.
    again = Disturbed(place, run.name, pace="")
    try:
        assert again.process.wait() == 0, again.process.text
        again.process.gone()
    finally:
        again.process.end()
    assert status_of(run.run)["digest"] == status_of(undisturbed)["digest"]
    assert curve(run.run) == curve(undisturbed)


def test_killed_while_it_writes_a_checkpoint(disturbed: Any, undisturbed: Path) -> None:
    """The second one is written and does not count yet, while workers train on."""
    run = disturbed(pace=f"{SLOW},checkpoint.rename@2:kill")
    assert run.process.wait() == -signal.SIGKILL, run.process.text
    assert run.ended("running", None)["step"] == 300
    run.continues(undisturbed)


def test_killed_for_memory(disturbed: Any) -> None:
    """Ray finds the memory too full for any actor: they are tried again, and the error says what is wrong."""
    run = disturbed("run.failure_config.max_failures=1", environment={"RAY_memory_usage_threshold": "0.000001"})
    assert run.process.wait() == 1, run.process.text
    run.process.gone()
    status = status_of(run.run)
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "its node ran out of memory" in status["message"], status
    assert "losses without progress: 2, 1 are borne" in status["message"]


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "alone"])
def test_interrupted(
    disturbed: Any, undisturbed: Path, place: Path, capsys: pytest.CaptureFixture[str], whole_group: bool
) -> None:
    """Ctrl-C, which a terminal sends to the whole process group; and a second command on the same run before it."""
    run = disturbed()
    run.until_mid_segment()
    if whole_group:
        assert cli.main(arguments(place, run.name)) == 2
        assert "in use" in capsys.readouterr().err
        os.killpg(run.process.process.pid, signal.SIGINT)
    else:
        run.process.process.send_signal(signal.SIGINT)
    assert run.process.wait() == 130, run.process.text
    run.ended("interrupted", 130)
    run.continues(undisturbed)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("step", [900, END])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_at_a_boundary(
    undisturbed: Path, place: Path, monkeypatch: pytest.MonkeyPatch, step: int, when: str
) -> None:
    """Ctrl-C where all steps to a validation are done: the same command validates, and then goes on."""
    name, validate = f"boundary-{when}-{step}", Attempt.validate

    def interrupted(attempt: Attempt) -> None:
        if attempt.step != step or when == "after":
            validate(attempt)
        if attempt.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Attempt, "validate", interrupted)
        assert cli.main(arguments(place, name)) == 130
    run = place / "runs" / name
    assert checkpoint.steps(Storage.open(run))[-1] == step
    assert cli.main(arguments(place, name)) == 0
    assert status_of(run)["digest"] == status_of(undisturbed)["digest"]
    assert curve(run) == curve(undisturbed)
    assert checkpoint.load(Storage.open(run), step).manifest["metrics"]["valid_loss"] is not None
    assert cli.main(arguments(place, name)) == 0
    assert status_of(run)["attempt"] == (1 if (when, step) == ("after", END) else 2)


@pytest.mark.parametrize("first", ["gcs_server", "raylet"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_at_the_start(disturbed: Any, number: signal.Signals, code: int, first: str) -> None:
    """While Ray starts there is no run to save yet; nothing is left all the same."""
    run = disturbed()
    wait_for(f"Ray's {first}", lambda: any(c.split(" ")[0].endswith(first) for c in run.process.living().values()))
    os.killpg(run.process.process.pid, number)
    assert run.process.wait() == code, run.process.text
    run.process.gone()
    status = status_of(run.run)
    assert (status["state"], status["exit_code"]) == ("interrupted", code)
    assert run.saved() == []


def test_killed_at_the_start(disturbed: Any) -> None:
    """Ray's agents have just begun: they would wait for a raylet that is dead."""
    run = disturbed()
    wait_for("an agent of Ray's", lambda: any("gent" in c for c in run.process.living().values()))
    run.process.process.kill()
    assert run.process.wait() == -signal.SIGKILL, run.process.text
    run.process.gone()


def test_terminated(disturbed: Any, undisturbed: Path, tmp_path: Path) -> None:
    """SIGTERM; with Ray's authentication as it comes, and a home directory in which nothing may be left."""
    run = disturbed(environment={"HOME": str(tmp_path)}, without=("RAY_AUTH_MODE",))
    run.until_mid_segment()
    run.process.process.terminate()
    assert run.process.wait() == 143, run.process.text
    run.ended("interrupted", 143)
    assert not (tmp_path / ".ray").exists()
    run.continues(undisturbed)


def test_moved_away(disturbed: Any, undisturbed: Path) -> None:
    """Whoever lost the directory ends and makes no other; where it lies now, the run can go on."""
    run = disturbed()
    run.until_mid_segment()
    away = run.run.with_name("away")
    run.run.rename(away)
    assert run.process.wait() == 1, run.process.text
    run.process.gone()
    assert run.process.text.count("was moved or deleted while this process wrote there") == 1, run.process.text
    assert not run.run.exists()
    away.rename(run.run)
    run.continues(undisturbed)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("late", "writer"), [("metrics.jsonl", "_append_local"), ("status.json", "_replace_local")])
def test_a_full_disk_amid_its_books(
    undisturbed: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    late: str,
    writer: str,
) -> None:
    """Neither a line of the curve nor the status is worth the run: they are written later, with a warning."""
    run, write, count = place / "runs" / f"full-{late}", getattr(storage, writer), Counter[str]()

    def full(path: Path, *given: Any) -> None:
        count[path.name] += 1
        if path.name == late and count[late] in (2, 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *given)

    monkeypatch.setattr(storage, writer, full)
    assert cli.main([word for word in arguments(place, run.name) if word != "-q"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"warning: {run}/{late} could not be written: No space left on device; make room there") == 1
    assert (status_of(run)["state"], status_of(run)["digest"]) == ("succeeded", status_of(undisturbed)["digest"])
    assert curve(run) == curve(undisturbed)


@pytest.mark.parametrize("kind", ["Worker", "Server"])
def test_killed_actor(disturbed: Any, undisturbed: Path, kind: str) -> None:
    """Where no loss may be borne; where it may, see test_kills.py."""
    run = disturbed("run.failure_config.max_failures=0")
    run.until_mid_segment()
    actors = [pid for pid, command in run.process.living().items() if command.startswith(f"ray::{kind}")]
    assert len(actors) == 2, run.process.living()
    os.kill(max(actors), signal.SIGKILL)
    assert run.process.wait() == 1, run.process.text
    status = run.ended("failed", 1)
    assert f"{kind.lower()} " in status["message"]
    assert "was lost" in status["message"]
    assert "none is borne" in status["message"]
    assert status["message"].splitlines()[0] in run.process.text
    run.continues(undisturbed)


def test_killed_raylet(disturbed: Any, undisturbed: Path) -> None:
    """Ray's own process on the node dies of SIGKILL: actors and driver go too, and no shared memory is left."""
    files = set(os.listdir("/dev/shm"))
    run = disturbed()
    run.until_mid_segment()
    [raylet] = [pid for pid, c in run.process.living().items() if c.split(" ")[0].endswith("/raylet")]
    os.kill(raylet, signal.SIGKILL)
    assert run.process.wait() != 0, run.process.text
    run.process.gone()
    assert {f for f in set(os.listdir("/dev/shm")) - files if "raysgd" in f} == set()
    assert 0 < run.saved()[-1] < END
    run.continues(undisturbed)


def test_killed_gcs(disturbed: Any, undisturbed: Path) -> None:
    """The process that knows Ray's actors dies alone: they go on, the driver does not, and says why."""
    run = disturbed()
    run.until_mid_segment()
    [gcs] = [pid for pid, c in run.process.living().items() if c.split(" ")[0].endswith("/gcs_server")]
    os.kill(gcs, signal.SIGKILL)
    assert run.process.wait(60) == 1, run.process.text
    status = run.ended("failed", 1)
    assert status["message"].startswith("the local Ray cluster died (gcs_server)"), status
    assert status["message"] in run.process.text
    run.continues(undisturbed)


@pytest.mark.usefixtures("ray_cluster")
def test_diverged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate far too large: the step that could not be applied is named, what was good before it is kept."""
    settings = {
        "model__type": "linear_regression",
        "optimizer__momentum": 0.0,
        "optimizer__learning_rate": 30.0,
        "run__checkpoint_every": 1,
        "run__validate_every": 1,
        "run__num_to_keep": 3,
    }
    spec = spec_of(place, **settings)
    with np.errstate(all="ignore"):
        with pytest.raises(DivergedError) as diverged:
            one_process_digests(spec, [40])
        step = diverged.value.step
        assert step > 3
        truth = one_process_digests(spec, [step])
    words = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    sets = [word for setting in (*words, "scaling.num_servers=2") for word in ("--set", setting)]
    assert cli.main(["train", str(place / "run.toml"), "--name", "diverged", "-q", *sets]) == 1
    assert f"step {step} diverged" in capsys.readouterr().err
    run = place / "runs" / "diverged"
    status = status_of(run)
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 1, step)
    last = checkpoint.load(Storage.open(run), "last")
    assert (last.step, last.digest(), last.skipped) == (step, truth[step], ())
    assert curve(run)[-1]["step"] == step
