"""Two Ray nodes on this machine: the bytes are those of one process, and what goes between the nodes is counted.

The cluster and the drivers are processes of their own: this one is connected to the cluster of the other tests.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray_runs import (
    ROOT,
    Marked,
    address_of,
    one_process_digests,
    ray_nodes,
    raysgd_command,
    spec_of,
    status_of,
    wait_for,
    write_table,
)

from raysgd.learn.parameters import Range
from raysgd.protocol.tree import cover
from raysgd.runtime.guard import descendants
from raysgd.runtime.segment import site

pytestmark = pytest.mark.skipif(site() is None, reason="memory is shared on x86-64 Linux only")

END = 40

#: two hidden layers of 300: shards of more than 100 KB, which Ray moves through its object store
MLP = {"model__type": "mlp", "model__hidden": [300, 300], "optimizer__learning_rate__initial": 0.05}


def scaling(workers: int, servers: int, server_cpus: float) -> dict[str, Any]:
    """The head has 5 logical CPUs, the other node 2: what asks for more than 2 must be on the head."""
    names = {"num_workers": workers, "num_servers": servers, "server_cpus": server_cpus, "placement_timeout_s": 90}
    return {f"scaling__{name}": value for name, value in names.items()}


#: by name: the settings, and for each relay what it passes on, and to which servers
CASES: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "stopped": (scaling(4, 1, 3) | {"run__stop_after_steps": 23}, {"[4,8)": [0]}),
    "resumed": (scaling(3, 2, 1), {}),
    "unaligned": (scaling(3, 2, 0.5) | {"train__clip_norm": 0.1}, {"[0,5)": [0, 1], "[5,8)": [0, 1]}),
    "large": (scaling(2, 2, 0.5) | MLP, {"[0,4)": [0, 1], "[4,8)": [0, 1]}),
    "large-calls": (scaling(2, 2, 0.5) | MLP, {}),
}

#: 7 CPUs, as many as there are, but not where the actors fit
MISFIT = scaling(1, 1, 3) | {"scaling__worker_cpus": 4, "scaling__placement_timeout_s": 4}

TRAFFIC = re.compile(
    r"between nodes: virtual workers (?P<run>\[\d+,\d+\)) to servers? (?P<shards>[\d, ]+): "
    r"(?P<pushes>[\d,]+) pushes \(.*\), (?P<versions>[\d,]+) versions pulled"
)


@dataclass(frozen=True)
class Nodes:
    """A cluster of two nodes, and the process that started them."""

    address: str
    pid: int

    def actors(self, name: str) -> list[int]:
        """The living actors of this class."""
        found = []
        for pid in descendants(self.pid):
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(f"ray::{name}".encode()):
                found.append(pid)
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("nodes") / "table")


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[Nodes]:
    """Two nodes; when they are stopped nothing of them is left."""
    with ray_nodes(place, 5, 2) as nodes:
        yield Nodes(address_of(nodes), nodes.process.pid)


@pytest.fixture(scope="module")
def results(cluster: Nodes, place: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """What each case came to, one after the other on the same two nodes."""
    cases = [
        {"name": "stopped" if name == "resumed" else name, "settings": settings, "calls": name == "large-calls"}
        for name, (settings, _) in CASES.items()
    ]
    cases.append({"name": "misfit", "settings": MISFIT})
    drive = str(ROOT / "tests" / "ray" / "drive.py")
    driver = Marked([sys.executable, drive, cluster.address, str(place), json.dumps(cases)], place)
    try:
        assert driver.wait(400) == 0, driver.text
        came = [json.loads(line) for line in driver.text.splitlines() if line.startswith("{")]
        yield dict(zip([*CASES, "misfit"], came, strict=True))
    finally:
        driver.end()


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_one_process(results: dict[str, dict[str, Any]], place: Path, name: str) -> None:
    settings = {k: v for k, v in CASES[name][0].items() if not k.startswith(("scaling", "run"))}
    result, end = results[name], CASES[name][0].get("run__stop_after_steps", END)
    assert result["step"] == end
    assert result["digest"] == one_process_digests(spec_of(place, **settings), [end])[end]


@pytest.mark.parametrize("name", [name for name, (_, relayed) in CASES.items() if relayed])
def test_between_nodes_go_the_cover_and_one_pull(results: dict[str, dict[str, Any]], name: str) -> None:
    """One vector a shard and step where the node's run is aligned; each version once a shard."""
    result, expected = results[name], CASES[name][1]
    found = [line for said in result["said"] if (line := TRAFFIC.match(said))]
    assert found, result["said"]
    runs = {line["run"] for line in found}
    assert runs <= set(expected), "the workers were not placed as on two nodes of 5 and 2 CPUs"
    for line in found:
        begin, end = map(int, line["run"].strip("[)").split(","))
        shards = [int(s) for s in line["shards"].split(",")]
        assert set(shards) <= set(expected[line["run"]])
        pushes, versions = int(line["pushes"].replace(",", "")), int(line["versions"].replace(",", ""))
        assert pushes == result["step"] * len(shards) * len(cover(Range(begin, end), 8))
        assert versions == (result["step"] + 1) * len(shards)


def test_servers_are_spread_and_runs_lie_side_by_side(results: dict[str, dict[str, Any]]) -> None:
    """With a server and workers on each node both nodes relay, to one server each."""
    found = [line for said in results["large"]["said"] if (line := TRAFFIC.match(said))]
    assert sorted(line["run"] for line in found) == ["[0,4)", "[4,8)"]
    assert sorted(line["shards"] for line in found) == ["0", "1"]


def test_where_the_object_stores_are_full(cluster: Nodes, place: Path) -> None:
    """Both nodes' stores hold as much as they can, and more goes to disk all the time: sums wait, none is lost."""
    filler = Marked([sys.executable, str(ROOT / "tests" / "ray" / "fill_stores.py"), cluster.address], place)
    settings, _ = CASES["large"]
    case = {"name": "full", "settings": settings}
    drive = str(ROOT / "tests" / "ray" / "drive.py")
    driver = None
    try:
        wait_for("full stores", lambda: "full" in filler.text or filler.process.poll() is not None, 120)
        assert filler.process.poll() is None, filler.text
        driver = Marked([sys.executable, drive, cluster.address, str(place), json.dumps([case])], place)
        assert driver.wait(200) == 0, driver.text
        assert filler.process.poll() is None, filler.text
        [result] = [json.loads(line) for line in driver.text.splitlines() if line.startswith("{")]
    finally:
        for each in (filler, driver):
            if each is not None:
                each.end()
    assert any(TRAFFIC.match(line) for line in result["said"]), result["said"]
    one = one_process_digests(spec_of(place, **MLP), [END])[END]
    assert (result["step"], result["digest"]) == (END, one)


def test_actors_that_fit_on_no_nodes_are_refused(results: dict[str, dict[str, Any]]) -> None:
    assert "not on nodes where all actors fit: a worker asks for 4 CPUs, a server for 3" in results["misfit"]["error"]


def test_a_dead_server_is_named(cluster: Nodes, place: Path) -> None:
    """Killed while workers of both nodes train: the run ends with its name, and its actors with it."""
    sets = {"train.epochs": 2000, "scaling.num_workers": 4, "scaling.server_cpus": 3, "run.log_every": 20}
    sets["run.failure_config.max_failures"] = 0
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    run = Marked(
        raysgd_command("train", str(place / "run.toml"), "--name", "dead", "--address", cluster.address, "-q", *words),
        place,
    )
    try:
        lines = place / "runs" / "dead" / "metrics.jsonl"
        wait_for("some steps", lambda: lines.exists() and lines.read_text().count("\n") > 3)
        [server] = cluster.actors("Server")
        os.kill(server, signal.SIGKILL)
        assert run.wait(60) == 1, run.text
        assert "server 0" in run.text
        assert status_of(place / "runs" / "dead")["state"] == "failed"
        wait_for("the end of all actors", lambda: not cluster.actors("Server") + cluster.actors("Worker"), 20)
    finally:
        run.end()
