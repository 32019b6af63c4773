"""A node of two is killed, frozen, added and taken away, and its workers die, while a run goes on: same bytes.

The head has 5 logical CPUs, the other node 2; both are processes of their own, and so are the drivers.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from disturbing import living
from ray_runs import (
    Marked,
    address_of,
    one_process_digests,
    ray_nodes,
    raylets_of,
    raysgd_command,
    spec_of,
    status_of,
    step_of,
    wait_for,
    write_table,
)

from raysgd.audit import audit
from raysgd.runtime.guard import descendants
from raysgd.runtime.segment import site
from raysgd.storage import Storage

pytestmark = pytest.mark.skipif(site() is None, reason="memory is shared on x86-64 Linux only")

#: far more than are trained: a run goes on until its test has seen enough, and is told to end
EPOCHS = 10_000

#: no step takes less: on a fast machine, too, there is time to disturb a run
PACE = "worker.compute:sleep=0.005"

SETTINGS = {
    "train.epochs": EPOCHS,
    "optimizer.learning_rate.decay_rate": 0.99,
    "run.log_every": 20,
    "run.checkpoint_every": 500,
    "run.validate_every": 1000,
    "scaling.placement_timeout_s": 90,
}

#: one server, which fits on the head alone, and two workers on each node
SERVER_ON_HEAD = {"scaling.num_workers": 4, "scaling.num_servers": 1, "scaling.server_cpus": 3}

#: a server and workers on each node; all of them fit on the head, too
SERVER_ON_EACH = {"scaling.num_workers": 3, "scaling.num_servers": 2, "scaling.server_cpus": 1}


@dataclass
class Nodes:
    """Two nodes, of which the second comes and goes."""

    started: Marked
    #: of second nodes that were lost
    lost: list[int] = field(default_factory=list)

    @property
    def address(self) -> str:
        return address_of(self.started)

    def second(self) -> int:
        """The raylet of the second node; one is added where the last was lost."""
        if not self._second():
            self.started.process.send_signal(signal.SIGUSR1)
        return int(wait_for("a second node", self._second, 90)[0])

    def _second(self) -> list[int]:
        return [pid for pid in list(raylets_of(self.started).values())[1:] if pid not in self.lost]

    def lose(self) -> None:
        """Kill the second node's raylet."""
        self.lost.append(self.second())
        os.kill(self.lost[-1], signal.SIGKILL)

    def actors(self, kind: str, above: int | None = None) -> list[int]:
        """The living actors of a kind, of all nodes or of the one whose raylet is given."""
        return living(kind, self.started.process.pid if above is None else above)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("lost") / "table")


@pytest.fixture(scope="module")
def nodes(place: Path) -> Iterator[Nodes]:
    with ray_nodes(place, 5, 2, environment={"RAYSGD_FAILPOINTS": PACE}) as started:
        yield Nodes(started)


@dataclass
class Run:
    """A driver in mid-run, and what must hold when it is told to end."""

    nodes: Nodes
    place: Path
    name: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.nodes.second()
        sets = [w for k, v in (SETTINGS | self.settings).items() for w in ("--set", f"{k}={v}")]
        words = ["train", str(self.place / "run.toml"), "--name", self.name, "--address", self.nodes.address, *sets]
        self.driver = Marked(raysgd_command(*words), self.place)
        self.directory = self.place / "runs" / self.name

    def until(self, step: int) -> None:
        def there() -> bool:
            assert self.driver.process.poll() is None, self.driver.text
            return step_of(self.directory) >= step

        wait_for(f"step {step}", there, 120)

    def goes_on(self) -> None:
        """Some steps are trained from here."""
        self.until(step_of(self.directory) + 60)

    def workers(self, count: int, above: int | None = None) -> list[int]:
        """So many workers, when they are there and train."""

        def there() -> list[int]:
            found = self.nodes.actors("Worker", above)
            return found if len(found) == count else []

        found: list[int] = wait_for(f"{count} workers\n{self.driver.text}", there, 90)
        return found

    def joined(self, times: int) -> None:
        def there() -> bool:
            assert self.driver.process.poll() is None, self.driver.text
            return self.driver.text.count("joined at step") >= times

        wait_for(f"{times} joins", there, 120)

    def ended(self) -> str:
        """Told to end: the bytes are those of one process at that step, and the ledger holds; returns what was said."""
        self.driver.process.send_signal(signal.SIGINT)
        assert self.driver.wait() == 130, self.driver.text
        status = status_of(self.directory)
        assert (status["state"], status["attempt"]) == ("interrupted", 1), status
        rate = SETTINGS["optimizer.learning_rate.decay_rate"]
        spec = spec_of(self.place, train__epochs=EPOCHS, optimizer__learning_rate__decay_rate=rate)
        step = status["step"]
        assert status["digest"] == one_process_digests(spec, [step])[step]
        found = audit(Storage.open(self.directory))
        assert (found.problems, found.steps) == ((), step)
        wait_for("the end of all actors", lambda: not self.nodes.actors("Server") + self.nodes.actors("Worker"), 20)
        return self.driver.text


@pytest.fixture
def run(nodes: Nodes, place: Path) -> Iterator[Callable[[str, dict[str, Any]], Run]]:
    started: list[Run] = []

    def start(name: str, settings: dict[str, Any]) -> Run:
        started.append(Run(nodes, place, name, settings))
        return started[-1]

    yield start
    for each in started:
        each.driver.end()


def test_workers_beyond_the_network_and_their_node(nodes: Nodes, run: Any) -> None:
    """One after the other both workers of the second node, of which one relays; then the node; then another comes."""
    going, second = run("workers", SERVER_ON_HEAD), nodes.second()
    going.until(100)
    first, relaying = going.workers(2, above=second)
    for times, pid in ((1, first), (2, relaying)):
        os.kill(pid, signal.SIGKILL)
        going.joined(times)
        going.goes_on()
    nodes.lose()
    going.goes_on()
    going.workers(2)
    another = nodes.second()
    going.joined(4)
    going.workers(2, above=another)
    going.goes_on()
    said = going.ended()
    assert "all go back" not in said, said
    assert status_of(going.directory)["attempt"] == 1


def test_a_node_that_is_lost_with_a_server(nodes: Nodes, run: Any) -> None:
    """Without a copy elsewhere all go back to the checkpoint, and it is said how far."""
    going = run("server", SERVER_ON_EACH)
    going.until(620)
    assert len(nodes.actors("Server", above=nodes.second())) >= 1
    nodes.lose()
    said = re.compile(r"server \d was lost with its state.*; all go back to step 500, and on from there")
    wait_for("a return to the checkpoint", lambda: said.search(going.driver.text), 90)
    going.until(1000)
    going.ended()


def test_a_node_that_freezes_and_thaws(nodes: Nodes, run: Any) -> None:
    """All its processes stand still for longer than silence is borne: what they push afterwards counts for nothing."""
    going, second = run("frozen", SERVER_ON_HEAD), nodes.second()
    going.until(100)
    there = going.workers(2, above=second)
    frozen = [second, *(descendants(second) - {second})]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_for("two losses", lambda: len(re.findall(r"worker \d is killed: it hung", going.driver.text)) == 2, 90)
        going.goes_on()
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    wait_for("the end of those who were frozen", lambda: not set(there) & set(nodes.actors("Worker")), 30)
    going.goes_on()
    going.ended()
