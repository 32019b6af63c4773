"""Real processes are killed, stopped and added while a run goes on: the bytes and the curve are those of an undisturbed
run, and nobody waits for the dead.

The runs are long enough to be disturbed in the middle: a thread beside the trainer does it, as the loss curve grows.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disturbing import Disturber, Said, actors, first_dies
from ray_runs import ROOT, curve, one_process_digests, spec_of, status_of, step_of, wait_for, write_table

from raysgd.audit import audit
from raysgd.errors import Interrupted, RunError
from raysgd.report.progress import Silent
from raysgd.runtime.attempt import Attempt
from raysgd.runtime.gang import Gang
from raysgd.runtime.trainer import Result, Trainer
from raysgd.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")

EPOCHS = 400
END = 20 * EPOCHS

SETTINGS: dict[str, Any] = {
    "train__epochs": EPOCHS,
    "optimizer__learning_rate__decay_rate": 0.995,
    "run__log_every": 50,
    "run__checkpoint_every": 3500,
    "run__validate_every": 5000,
}


#: for the workers, see `paced`
PACE = "worker.compute:sleep=0.0001"

#: the actors of the run at hand
gangs: list[Gang] = []


def spare() -> int | None:
    """The pid of the server that holds the memory of the others, once it does."""
    return next((member.process.pid for gang in gangs for member in list(gang.spares.values())), None)


def servers() -> list[int]:
    """The pids of the servers, without that one."""
    return [member.process.pid for gang in gangs for member in gang.servers]


def one_after_the_other(seed: int) -> None:
    """Kill a server when there is a spare, and wait for its successor."""
    wait_for("the spare", spare)
    pid = random.Random(seed).choice(servers())
    os.kill(pid, signal.SIGKILL)
    wait_for("its successor", lambda: pid not in servers())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("kills") / "runs")


@pytest.fixture(autouse=True)
def paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step takes less than a good part of a millisecond: on a fast machine, too, there is time to disturb a run."""
    options = Gang._options

    def slow(self: Gang, cpus: float, bundle: Any) -> dict[str, Any]:
        made = options(self, cpus, bundle)
        gangs[:] = [self]
        if cpus == self.scaling.worker_cpus:
            made["runtime_env"]["env_vars"] = {**made["runtime_env"]["env_vars"], "RAYSGD_FAILPOINTS": PACE}
        return made

    monkeypatch.setattr(Gang, "_options", slow)


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
    """Train; the ledger of a run that ends well holds, too."""
    scaling = {"scaling__num_workers": workers, "scaling__num_servers": servers}
    said = Said()
    spec = spec_of(place, run__name=name, **SETTINGS, **scaling, **settings)
    result = Trainer.from_spec(spec, report=said).fit()
    found = audit(Storage.open(place / "runs" / name))
    assert (found.problems, found.steps, found.rows) == ((), END, True)
    return result, said.lines


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
        wait_for("a replacement that has joined", lambda: 3 in gangs[0].workers)  # the first were 0 to 2
        until(900)
        for pid in actors("Worker"):
            os.kill(pid, signal.SIGKILL)

    disturb("killed-worker", what)
    result, said = fit(place, "killed-worker", 3, 2)
    assert (result.step, result.digest) == (END, truth)
    assert curve(place / "runs" / "killed-worker") == undisturbed
    assert sum("is lost at step" in line for line in said) == 4, said
    assert status_of(place / "runs" / "killed-worker")["attempt"] == 1


@pytest.mark.parametrize(
    "order",
    [
        "worker.compute@700:kill",
        "worker.computed@700:kill",
        "worker.pushed@700:kill",
        "worker.score@5000:kill",
        "server.snapshot@7000:kill",
        "server.applied@5000:kill",
        "server.published@5000:kill",
    ],
)
def test_a_kill_at_every_point_of_a_step(
    place: Path, truth: str, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """One worker or server, wherever in a step, a validation, a checkpoint: nothing is lost, nothing counts twice."""
    first_dies(monkeypatch, order, PACE)
    name = order.replace("@", "-").replace(":", "-")
    result, said = fit(place, name, 3, 2)
    assert (result.step, result.digest) == (END, truth)
    assert curve(place / "runs" / name) == undisturbed
    lost = [line for line in said if "is lost at step" in line]
    assert len(lost) == 1, said
    assert lost[0].startswith(order.partition(".")[0])


def test_a_killed_server_is_succeeded_by_its_spare(place: Path, undisturbed: Any, truth: str, disturb: Any) -> None:
    def what(until: Callable[[int], None]) -> None:
        for step in (1000, 4000, 7500):
            until(step)
            wait_for("the spare", spare)
            os.kill(random.Random(step).choice(actors("Server")), signal.SIGKILL)

    disturb("killed-server", what)
    result, _ = fit(place, "killed-server", 3, 2)
    assert (result.step, result.digest) == (END, truth)
    assert curve(place / "runs" / "killed-server") == undisturbed


def test_without_a_spare_all_go_back_to_the_checkpoint(
    place: Path, undisturbed: Any, truth: str, disturb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysgd.runtime.crew.SPARE_AFTER_S", 1e9)

    def what(until: Callable[[int], None]) -> None:
        until(5000)
        os.kill(actors("Server")[0], signal.SIGKILL)

    disturb("rolled-back", what)
    result, said = fit(place, "rolled-back", 2, 2)
    assert (result.step, result.digest) == (END, truth)
    assert curve(place / "runs" / "rolled-back") == undisturbed
    assert any("all go back to step 3,500" in line for line in said), said


@pytest.mark.parametrize("kind", ["Worker", "Server"])
def test_a_hung_process_is_noticed_and_replaced(
    place: Path, undisturbed: Any, truth: str, disturb: Any, kind: str
) -> None:
    """Stopped for good; one that is stopped for two seconds is left alone."""
    stopped: list[int] = []
    name = f"hung-{kind}"

    def what(until: Callable[[int], None]) -> None:
        until(300)
        victim = actors(kind)[0]
        os.kill(victim, signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(victim, signal.SIGCONT)
        until(1200)
        assert victim in actors(kind)
        if kind == "Server":
            wait_for("the spare", spare)
        stopped.append(actors(kind)[0])
        os.kill(stopped[0], signal.SIGSTOP)
        wait_for("its end", lambda: stopped[0] not in actors(kind), 6.0)

    disturb(name, what)
    result, _ = fit(place, name, 2, 2)
    assert (result.step, result.digest) == (END, truth)
    assert curve(place / "runs" / name) == undisturbed
    assert stopped


def test_workers_join_and_go(place: Path, undisturbed: Any, truth: str, disturb: Any) -> None:
    """Between one and four of them: those beyond the least come when the cluster has room."""
    most: list[int] = []

    def what(until: Callable[[int], None]) -> None:
        wait_for("four workers", lambda: len(actors("Worker")) == 4)
        most.append(len(actors("Worker")))
        until(1000)
        os.kill(actors("Worker")[0], signal.SIGKILL)

    disturb("elastic", what)
    result, _ = fit(place, "elastic", (1, 4), 2)
    assert (result.step, result.digest) == (END, truth)
    assert curve(place / "runs" / "elastic") == undisturbed
    assert most == [4]


def test_no_loss_is_borne_where_none_may_be(place: Path, disturb: Any) -> None:
    def what(until: Callable[[int], None]) -> None:
        until(300)
        os.kill(actors("Worker")[0], signal.SIGKILL)

    disturb("none-borne", what)
    with pytest.raises(RunError, match=r"worker \d was lost: .*losses without progress: 1, none is borne"):
        fit(place, "none-borne", 2, 1, run__failure_config__max_failures=0)
    assert status_of(place / "runs" / "none-borne")["state"] == "failed"


def short(place: Path, name: str, **settings: Any) -> tuple[Result, list[str]]:
    """2,000 steps with three workers and two servers; the ledger holds."""
    scaling = {"scaling__num_workers": 3, "scaling__num_servers": 2}
    said, settings = Said(), {**SETTINGS, "train__epochs": 100, **scaling, **settings}
    result = Trainer.from_spec(spec_of(place, run__name=name, **settings), report=said).fit()
    found = audit(Storage.open(place / "runs" / name))
    assert (result.step, found.problems, found.steps, found.rows) == (2000, (), 2000, True)
    return result, said.lines


@pytest.mark.parametrize(
    ("staleness", "order"), [(2, "server.applied@1200:kill"), (float("inf"), "server.published@1200:kill")]
)
def test_with_staleness_no_push_is_lost_or_doubled(
    place: Path, monkeypatch: pytest.MonkeyPatch, staleness: float, order: str
) -> None:
    """A server dies when pushes are applied and nobody knows, and when everybody does: its clocks say what counts."""
    first_dies(monkeypatch, order, "worker.compute:sleep=0.003")  # so that the server sees every version by itself
    _, said = short(place, f"stale-{staleness}-short", train__staleness=staleness)
    assert sum("its spare goes on from its memory" in line for line in said) == 1, said


def test_with_a_limited_norm_the_spare_knows_its_part(place: Path, disturb: Any) -> None:
    """One of two servers dies, perhaps with a step for which the other waits for the dead one's part of the norm."""

    def what(until: Callable[[int], None]) -> None:
        for step in (300, 700, 1100):
            until(step)
            one_after_the_other(step)

    settings = {**SETTINGS, "train__epochs": 100, "train__clip_norm": 0.1}
    [want] = one_process_digests(spec_of(place, **settings), [2000]).values()
    disturb("clipped", what)
    result, said = short(place, "clipped", train__clip_norm=0.1)
    assert result.digest == want
    assert sum("its spare goes on from its memory" in line for line in said) == 3, said


def test_with_staleness_no_row_is_lost(place: Path, disturb: Any) -> None:
    name = "stale"

    def what(until: Callable[[int], None]) -> None:
        until(300)
        os.kill(actors("Worker")[0], signal.SIGKILL)
        for step in (1000, 2000, 3000):
            until(step)
            one_after_the_other(step)

    disturb(name, what)
    result, said = fit(place, name, 3, 2, train__staleness=float("inf"))
    assert result.step == END
    assert sum("its spare goes on from its memory" in line for line in said) == 3, said
    assert not any("all go back" in line for line in said), said
    trained = [line for line in result.history if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(50, END + 1, 50))
    assert trained[-1]["rows"] == EPOCHS * 613


def test_flights_under_twenty_kills(flights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two and six workers, workers and servers killed at random: the bytes of one worker that nothing
    disturbed, and a ledger that holds.

    The next is killed when the run has gone on from the last: on a slow machine, too, the kills meet steps, and not
    only starts of processes.
    """
    settings = {"train__epochs": 16, "run__validate_every": "4epoch", "run__checkpoint_every": 250}
    settings |= {"run__failure_config__max_failures": -1, "scaling__server_cpus": 0.25}
    config = (ROOT / "jobs" / "flights.toml").read_text()
    (tmp_path / "run.toml").write_text(config.replace("../data/flights", str(flights)))
    one = spec_of(tmp_path, run__name="one", scaling__num_workers=1, **settings)
    want = Trainer.from_spec(one, report=Silent()).fit()
    monkeypatch.setitem(globals(), "PACE", "worker.compute:sleep=0.002")
    run, kills = tmp_path / str(one.run.storage_path) / "many", []

    def what(until: Callable[[int], None]) -> None:
        until(300)
        choose = random.Random(1)
        while len(kills) < 20:
            kind = choose.choice(["Worker", "Worker", "Worker", "Server"])
            os.kill(choose.choice(wait_for(kind, lambda kind=kind: actors(kind))), signal.SIGKILL)
            kills.append(kind)
            until(step_of(run) + choose.randint(50, 300))

    spec = spec_of(tmp_path, run__name="many", scaling__num_workers=(2, 6), scaling__num_servers=2, **settings)
    disturber, said = Disturber(run, what), Said()
    disturber.start()
    result = Trainer.from_spec(spec, report=said).fit()
    disturber.join()
    assert disturber.error is None
    assert (result.step, result.digest) == (want.step, want.digest)
    assert len(kills) == 20, (kills, said.lines)
    assert set(kills) == {"Worker", "Server"}
    found = audit(Storage.open(run))
    assert (found.problems, found.steps, found.rows) == ((), want.step, True)
    assert curve(run) == curve(tmp_path / str(one.run.storage_path) / "one")


def test_many_at_once_are_one_loss(place: Path, undisturbed: Any, truth: str, disturb: Any) -> None:
    """All four workers and a server: a budget of three is not used up, and the spare goes on from the memory."""

    def what(until: Callable[[int], None]) -> None:
        until(4000)
        wait_for("the spare", spare)
        for pid in (actors("Server")[0], *actors("Worker")):
            os.kill(pid, signal.SIGKILL)

    disturb("at-once", what)
    result, said = fit(place, "at-once", 4, 2)
    assert (result.step, result.digest) == (END, truth)
    assert curve(place / "runs" / "at-once") == undisturbed
    assert not any("all go back" in line for line in said), said


def test_a_spare_that_dies_is_replaced(place: Path, undisturbed: Any, truth: str, disturb: Any) -> None:
    def what(until: Callable[[int], None]) -> None:
        until(1000)
        first = wait_for("the spare", spare)
        os.kill(first, signal.SIGKILL)
        wait_for("another spare", lambda: spare() not in (None, first))
        os.kill(actors("Server")[0], signal.SIGKILL)

    disturb("spare", what)
    result, said = fit(place, "spare", 2, 2)
    assert (result.step, result.digest) == (END, truth)
    assert curve(place / "runs" / "spare") == undisturbed
    assert not any("all go back" in line for line in said), said


def test_an_interrupt_is_heard_while_a_server_is_dead(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that it would write cannot be written; it ends all the same, and the same command goes on."""
    train_to = Attempt._train_to

    def interrupted(self: Attempt, until: int) -> None:
        if until > 3500:
            os.kill(self.gang.servers[0].process.pid, signal.SIGKILL)
            raise KeyboardInterrupt
        train_to(self, until)

    with monkeypatch.context() as patched:
        patched.setattr(Attempt, "_train_to", interrupted)
        with pytest.raises(Interrupted, match="the same command continues from the checkpoint of step 3,500"):
            fit(place, "heard", 2, 2)
    assert status_of(place / "runs" / "heard")["state"] == "interrupted"


def test_sigterm_while_all_go_back(
    place: Path, undisturbed: Any, truth: str, disturb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's state is lost; while others are placed for the return the run is told to end, and is continued."""
    monkeypatch.setattr("raysgd.runtime.crew.SPARE_AFTER_S", 1e9)

    def what(until: Callable[[int], None]) -> None:
        until(5000)
        os.kill(actors("Server")[0], signal.SIGKILL)

    place_actors, placed = Gang.place, []

    def told(self: Gang) -> None:
        placed.append(self)
        if len(placed) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        place_actors(self)

    disturb("told", what)
    with monkeypatch.context() as patched:
        patched.setattr(Gang, "place", told)
        with pytest.raises(Interrupted, match="the same command continues from the checkpoint of step 3,500") as ended:
            fit(place, "told", 2, 2)
    assert ended.value.exit_code == 143
    assert status_of(place / "runs" / "told")["state"] == "interrupted"
    result, _ = fit(place, "told", 2, 2)
    assert (result.step, result.digest) == (END, truth)
    assert curve(place / "runs" / "told") == undisturbed


def test_a_worker_that_hangs_in_the_statistics_pass_is_noticed(
    place: Path, truth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_plan, stopped = Trainer._new_plan, []

    def when_stopped(self: Trainer, gang: Gang, tables: Any) -> Any:
        if not stopped:
            stopped.append(gang.workers[0].process.pid)
            os.kill(stopped[0], signal.SIGSTOP)
        return new_plan(self, gang, tables)

    monkeypatch.setattr(Trainer, "_new_plan", when_stopped)
    result, said = fit(place, "statistics", 2, 1)
    assert (result.step, result.digest) == (END, truth)
    assert any("worker 0 hung for" in line for line in said), said
    assert not Path(f"/proc/{stopped[0]}").exists()
