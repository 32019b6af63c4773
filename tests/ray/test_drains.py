"""Nodes that are announced to go, and go: what was on them has moved by then, nothing is lost, and nothing is charged.

Four Ray nodes on this machine, each test takes one away; where a run has shown what it should, it is interrupted, and
its checkpoint has the bytes of one process.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
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

pytestmark = pytest.mark.skipif(site() is None, reason="nodes are told apart on x86-64 Linux only")

#: every step of every worker takes this long at least
PACE = {"RAYSGD_FAILPOINTS": "worker.compute:sleep=0.004"}

#: seconds that a loaded machine may take for what takes two
LONG = 90.0

SETTINGS: dict[str, Any] = {
    "train__epochs": 100_000,
    "optimizer__learning_rate__decay_rate": 0.999,
    "run__log_every": 10,
    "run__checkpoint_every": 10**6,
    "run__failure_config__max_failures": 0,
    "scaling__placement_timeout_s": 90,
}


@dataclass(frozen=True)
class Nodes:
    """A cluster: the raylet's pid of each living node by its id, the head's first."""

    address: str
    raylets: dict[str, int]

    def actors(self, kind: str) -> dict[int, str]:
        """The living actors of this class, and where they are."""
        found = {}
        for node, raylet in self.raylets.items():
            for pid in descendants(raylet):
                try:
                    title = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                if title.startswith(f"ray::{kind}".encode()):
                    found[pid] = node
        return found

    def announce(self, node: str, seconds: int = 600) -> None:
        """What a cluster launcher does when a spot instance gets its notice."""
        gcs = ray._raylet.GcsClient(address=self.address)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = gcs.drain_node(node, reason, "spot", int(time.time() + seconds) * 1000)
        assert accepted, why

    def kill(self, node: str) -> None:
        os.kill(self.raylets.pop(node), signal.SIGKILL)

    def elsewhere(self, kind: str) -> str:
        """A living node other than the head that has such an actor."""
        return next(node for node in self.actors(kind).values() if node != next(iter(self.raylets)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("drains") / "table")


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[Nodes]:
    with ray_nodes(place, 4, 2, 2, 2, environment=PACE) as nodes:
        yield Nodes(address_of(nodes), raylets_of(nodes))


class Run:
    """A run on the cluster that goes on until it is ended."""

    def __init__(self, cluster: Nodes, place: Path, name: str, **scaling: Any) -> None:
        self.place, self.path = place, place / "runs" / name
        sets = {**SETTINGS, **{f"scaling__{key}": value for key, value in scaling.items()}}
        words = [word for key, value in sets.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
        command = ["train", str(place / "run.toml"), "--name", name, "--address", cluster.address, *words]
        self.process = Marked(raysgd_command(*command), place)

    def step(self) -> int:
        assert self.process.process.poll() is None, self.process.text
        return step_of(self.path)

    def goes_on(self, steps: int = 30) -> int:
        """Wait for more steps; how far it is then."""
        goal = self.step() + steps
        wait_for(f"step {goal}", lambda: self.step() >= goal, LONG)
        return self.step()

    def says(self, pattern: str) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            assert self.process.process.poll() is None, self.process.text
            return re.search(pattern, self.process.text)

        said: re.Match[str] = wait_for(pattern, found, LONG)
        return said

    def ends_well(self) -> None:
        """Interrupted, it leaves the bytes of one process, and a ledger that holds."""
        self.process.process.send_signal(signal.SIGINT)
        assert self.process.wait(LONG) == 130, self.process.text
        status = status_of(self.path)
        step = int(status["step"])
        assert step > 0
        assert status["digest"] == one_process_digests(spec_of(self.place, **SETTINGS), [step])[step]
        found = audit(Storage.open(self.path))
        assert (found.problems, found.steps) == ((), step)


HOLD = """
import sys, time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=2, scheduling_strategy=NodeAffinitySchedulingStrategy(sys.argv[2], soft=False))
class Other:
    def there(self): return True
other = Other.remote()
ray.get(other.there.remote())
print("held", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def other_job(cluster: Nodes, place: Path) -> Iterator[Marked]:
    """Somebody else holds two of the head's four CPUs, until it is terminated."""
    other = Marked([sys.executable, "-c", HOLD, cluster.address, next(iter(cluster.raylets))], place)
    try:
        wait_for("the other job", lambda: "held" in other.text, LONG)
        yield other
    finally:
        other.end()


@pytest.fixture
def start(cluster: Nodes, place: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(name: str, **scaling: Any) -> Run:
        runs.append(Run(cluster, place, name, **scaling))
        runs[0].goes_on()
        return runs[0]

    yield begin
    for run in runs:
        run.process.end()


def test_workers_hand_over_before_their_node_goes(cluster: Nodes, start: Callable[..., Run]) -> None:
    """Three workers on three nodes, none may be lost: another is there before the one goes whose node must."""
    run = start("workers", num_workers=3, num_servers=1, server_cpus=3)
    assert list(cluster.actors("Server").values()) == [next(iter(cluster.raylets))]
    before = cluster.actors("Worker")
    assert len(set(before.values())) == 3
    node = cluster.elsewhere("Worker")
    cluster.announce(node)
    run.says(r"the node of worker \d will go: it hands over at step [1-9]")
    run.says(r"worker 3 joined at step [1-9]")
    assert set(before) < set(cluster.actors("Worker"))
    run.goes_on()
    cluster.kill(node)
    run.says(r"worker \d is lost at step [1-9]")
    run.goes_on()
    assert len(cluster.actors("Worker")) == 3
    run.ends_well()


def test_servers_move_before_their_node_goes(cluster: Nodes, start: Callable[..., Run]) -> None:
    """One of two servers is on the node: all begin anew on the others, at the very step at which they stood."""
    run = start("servers", num_workers=2, num_servers=2, server_cpus=1)
    node, before = cluster.elsewhere("Server"), run.goes_on()
    cluster.announce(node)
    told = run.says(r"the node of server \d will go: no step is lost; all go back to step ([\d,]+), and on from there")
    assert int(told[1].replace(",", "")) >= before
    run.goes_on()
    assert node not in {**cluster.actors("Server"), **cluster.actors("Worker")}.values()
    cluster.kill(node)
    run.goes_on(200)
    run.ends_well()
    assert "is lost at step" not in run.process.text


def test_where_no_room_is_left_servers_go_with_their_node(
    cluster: Nodes, other_job: Marked, start: Callable[..., Run]
) -> None:
    """They stay as long as they can, with a checkpoint now and then; the loss was announced, and costs the steps since
    the last of them."""
    cpus = 2 + 2 * (len(cluster.raylets) - 1)  # two of the head's four are held
    run = start("stays", num_workers=cpus - 2, num_servers=2, server_cpus=1)
    node = cluster.elsewhere("Server")
    cluster.announce(node)
    run.says(r"the node of worker \d will go: it hands over at step [1-9]")
    saved = wait_for("a checkpoint", lambda: status_of(run.path)["step"], LONG)
    cluster.kill(node)
    other_job.end()
    told = run.says(r"server \d was lost with its state: .*; all go back to step ([\d,]+), and on from there")
    assert int(told[1].replace(",", "")) >= saved
    run.goes_on()
    run.ends_well()
