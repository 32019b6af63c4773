"""The network between two nodes is cut, for a moment and for good: same bytes, and who was cut off writes nothing.

Two namespaces, a Ray node in each; the driver and the server are in the first. Root only, `make test-cluster`.
"""

from __future__ import annotations

import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from disturbing import living
from network import Network, needs_network
from ray_runs import Marked, one_process_digests, raysgd_command, spec_of, status_of, step_of, wait_for, write_table

from raysgd.audit import audit
from raysgd.storage import Storage

needs_network()

RAY = [sys.executable, "-m", "ray.scripts.scripts"]

#: far more than are trained: a run goes on until its test has seen enough, and is told to end
EPOCHS = 10_000

SETTINGS: dict[str, Any] = {
    "train.epochs": EPOCHS,
    "optimizer.learning_rate.decay_rate": 0.99,
    "run.log_every": 20,
    "run.checkpoint_every": 500,
    "run.validate_every": 1000,
    "scaling.num_workers": 4,
    "scaling.server_cpus": 3,
    "scaling.placement_timeout_s": 90,
}

#: no step takes less: on a fast machine, too, there is time to disturb a run
PACE = {"RAYSGD_FAILPOINTS": "worker.compute:sleep=0.005"}

#: Ray believes after seconds, not after a minute, that a node is dead
SOON_DEAD = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class Nodes:
    """A head and another node, each in a namespace of its own."""

    place: Path
    environment: dict[str, str]
    network: Network = field(default_factory=Network)
    started: list[Marked] = field(default_factory=list)
    temp_dir: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="rs", dir="/tmp"))

    @property
    def address(self) -> str:
        return f"{self.network.address(1)}:6379"

    def start(self) -> None:
        self.network.create()
        options = [f"--temp-dir={self.temp_dir}", "--port=6379", "--include-dashboard=false"]
        self._start(["--head", *options], 5)
        wait_for("the head", lambda: "Ray runtime started" in self.started[0].text, 90)
        self._start([f"--address={self.address}"], 2)
        wait_for("the second node", lambda: "Ray runtime started" in self.started[1].text, 90)

    def _start(self, options: list[str], cpus: int) -> None:
        number = self.network.add()
        address = f"--node-ip-address={self.network.address(number)}"
        common = [address, "--block", f"--num-cpus={cpus}", "--object-store-memory=100000000"]
        command = [*self.network.inside(number), *RAY, "start", *options, *common]
        self.started.append(Marked(command, self.place, PACE | self.environment))

    def second_workers(self) -> list[int]:
        """The living workers of the second node."""
        return living("Worker", self.started[1].process.pid)

    def end(self) -> None:
        for each in reversed(self.started):
            each.end()
        self.network.remove()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("partition") / "table")


@pytest.fixture
def nodes(place: Path, request: pytest.FixtureRequest) -> Iterator[Nodes]:
    made = Nodes(place, getattr(request, "param", {}))
    try:
        made.start()
        yield made
    finally:
        made.end()


class Run:
    """A driver on the head."""

    def __init__(self, nodes: Nodes, name: str, **settings: Any) -> None:
        given = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
        sets = [w for k, v in given.items() for w in ("--set", f"{k}={v}")]
        self.nodes = nodes
        words = ["train", str(nodes.place / "run.toml"), "--name", name, "--address", nodes.address, *sets]
        self.driver = Marked([*nodes.network.inside(1), *raysgd_command(*words)], nodes.place)
        self.directory = nodes.place / "runs" / name

    def until(self, step: int) -> None:
        def there() -> bool:
            assert self.driver.process.poll() is None, self.driver.text
            return step_of(self.directory) >= step

        wait_for(f"step {step}", there, 120)

    def goes_on(self) -> None:
        self.until(step_of(self.directory) + 60)

    def ended(self) -> str:
        """Told to end: the bytes are those of one process at that step, and the ledger holds; returns what was said."""
        self.driver.process.send_signal(signal.SIGINT)
        assert self.driver.wait() == 130, self.driver.text
        status = status_of(self.directory)
        assert (status["state"], status["attempt"]) == ("interrupted", 1), status
        rate = SETTINGS["optimizer.learning_rate.decay_rate"]
        spec = spec_of(self.nodes.place, train__epochs=EPOCHS, optimizer__learning_rate__decay_rate=rate)
        step = status["step"]
        assert status["digest"] == one_process_digests(spec, [step])[step]
        found = audit(Storage.open(self.directory))
        assert (found.problems, found.steps) == ((), step)
        return self.driver.text


def test_a_blip(nodes: Nodes) -> None:
    """Two seconds without a network: the steps wait, nobody is thought dead."""
    run = Run(nodes, "blip")
    try:
        run.until(100)
        there = nodes.second_workers()
        assert len(there) == 2
        nodes.network.cut(2)
        time.sleep(2.0)
        nodes.network.heal(2)
        run.goes_on()
        assert nodes.second_workers() == there
        said = run.ended()
        assert not re.search("is lost|is killed|joined at step|all go back", said), said
    finally:
        run.driver.end()


@pytest.mark.parametrize("nodes", [{}, SOON_DEAD], ids=["ray-believes-in-it", "ray-gives-it-up"], indirect=True)
def test_a_cut_that_heals_late(nodes: Nodes) -> None:
    """The others go on without the node; who comes back with old sums is refused, and ends."""
    run = Run(nodes, "-".join(["cut", *nodes.environment][:2]))
    try:
        run.until(100)
        there = nodes.second_workers()
        assert len(there) == 2
        nodes.network.cut(2)
        lost = re.compile(r"worker \d is (?:killed: it hung|lost)")
        wait_for("two losses", lambda: len(lost.findall(run.driver.text)) == 2, 120)
        run.goes_on()
        assert nodes.second_workers() == there, "they were to outlive the cut"
        nodes.network.heal(2)
        wait_for("the end of those who were cut off", lambda: not set(there) & set(nodes.second_workers()), 90)
        run.goes_on()
        run.ended()
    finally:
        run.driver.end()


def test_a_server_that_is_cut_off(nodes: Nodes) -> None:
    """Without a copy elsewhere all go back to the checkpoint, on the node that is left; the old server is no rival."""
    run = Run(nodes, "server", scaling__num_workers=3, scaling__num_servers=2, scaling__server_cpus=1)
    try:
        run.until(620)
        assert len(living("Server", nodes.started[1].process.pid)) >= 1
        nodes.network.cut(2)
        said = re.compile(r"server \d was lost with its state.*; all go back to step 500, and on from there")
        wait_for("a return to the checkpoint", lambda: said.search(run.driver.text), 120)
        run.until(1000)
        nodes.network.heal(2)
        run.goes_on()
        run.ended()
    finally:
        run.driver.end()
