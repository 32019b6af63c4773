"""``replicas = 1``: servers are lost with their memory, and nothing is computed twice; on two Ray nodes."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disturbing import living
from ray_runs import (
    ROOT,
    Marked,
    address_of,
    one_process_digests,
    ray_nodes,
    raylets_of,
    spec_of,
    wait_for,
    write_table,
)

from raysgd.audit import audit
from raysgd.errors import InputError
from raysgd.report.progress import Silent
from raysgd.runtime.segment import site
from raysgd.runtime.trainer import Trainer
from raysgd.storage import Storage

pytestmark = pytest.mark.skipif(site() is None, reason="memory is shared on x86-64 Linux only")

EPOCHS = 80
END = 20 * EPOCHS

SETTINGS: dict[str, Any] = {
    "train__epochs": EPOCHS,
    "optimizer__learning_rate__decay_rate": 0.99,
    "run__log_every": 20,
    "run__checkpoint_every": END,
    "run__validate_every": END,
    "run__failure_config__max_failures": -1,
}

SCALING: dict[str, Any] = {
    "scaling__num_workers": 3,
    "scaling__num_servers": 2,
    "scaling__replicas": 1,
    "scaling__server_cpus": 0.5,
    "scaling__placement_timeout_s": 90,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("replicas") / "table")


@pytest.fixture(scope="module")
def truth(place: Path) -> str:
    return one_process_digests(spec_of(place, **SETTINGS), [END])[END]


@pytest.fixture
def cluster(place: Path) -> Iterator[Marked]:
    """A head of 5 logical CPUs and a node of 3; no step takes less than two milliseconds."""
    with ray_nodes(place, 5, 3, environment={"RAYSGD_FAILPOINTS": "worker.compute:sleep=0.002"}) as nodes:
        yield nodes


class Run:
    """A run on the two nodes, as a process of its own."""

    def __init__(self, cluster: Marked, place: Path, name: str, **settings: Any) -> None:
        self.place, self.name = place, name
        case = {"name": name, "settings": {**SETTINGS, **SCALING, **settings}, "spares": False}
        drive = str(ROOT / "tests" / "ray" / "drive.py")
        self.process = Marked([sys.executable, drive, address_of(cluster), str(place), json.dumps([case])], place)

    def said(self, sentence: str, times: int) -> None:
        def found() -> bool:
            assert self.process.process.poll() is None, self.process.text
            return self.process.text.count(sentence) >= times

        wait_for(f"{sentence!r}, {times} times\n{self.process.text}", found, 90)

    def ends(self, truth: str | None) -> str:
        """It ends well, with these bytes (None: any), and nothing was computed again; all that it said."""
        try:
            assert self.process.wait(200) == 0, self.process.text
        finally:
            self.process.end()
        text, _, end = self.process.text.partition('{"case"')
        result = json.loads('{"case"' + end.splitlines()[0])
        assert (result.get("step"), result.get("digest")) == (END, truth or result.get("digest")), text
        assert "all go back" not in text
        found = audit(Storage.open(self.place / "runs" / self.name))
        assert (found.problems, found.steps, found.rows) == ((), END, True)
        return text


def under_four_kills(cluster: Marked, run: Run, truth: str | None) -> None:
    """The run ends well although four servers are killed, each when all shards have a replica again."""
    choose = random.Random(3)
    for kills in range(4):
        run.said("has a replica on another node", 2 + kills)
        os.kill(choose.choice(living("Server", cluster.process.pid)), signal.SIGKILL)
    text = run.ends(truth)
    assert text.count("its replica on another node takes its place") + text.count("; another is asked for") == 4, text
    assert "takes its place" in text


@pytest.mark.parametrize(
    "settings",
    [{"train__clip_norm": 0.5}, {"model__type": "hashed_logistic_regression", "model__hash_bits": 12}],
    ids=["dense", "hashed"],
)
def test_killed_servers_are_replaced_by_what_follows_them(
    cluster: Marked, place: Path, settings: dict[str, Any]
) -> None:
    """Four of them, primaries or replicas as chance has it."""
    truth = one_process_digests(spec_of(place, **SETTINGS, **settings), [END])[END]
    under_four_kills(cluster, Run(cluster, place, f"killed-{len(settings)}", **settings), truth)


def test_with_staleness_no_push_is_lost(cluster: Marked, place: Path) -> None:
    """As above: what a dead server knew alone is computed again, everything else counts once."""
    under_four_kills(cluster, Run(cluster, place, "stale", train__staleness=float("inf")), None)


def test_a_node_is_lost_without_a_step(cluster: Marked, place: Path, truth: str) -> None:
    run = Run(cluster, place, "node")
    run.said("has a replica on another node", 2)
    wait_for("some steps", (place / "runs" / "node" / "metrics.jsonl").exists)
    os.kill(list(raylets_of(cluster).values())[1], signal.SIGKILL)
    text = run.ends(truth)
    assert "is lost at step" in text


@pytest.mark.usefixtures("ray_cluster")
def test_one_node_is_refused(place: Path) -> None:
    spec = spec_of(place, run__name="alone", scaling__replicas=1, scaling__server_cpus=0.25)
    with pytest.raises(InputError, match="another node, and the cluster has one node"):
        Trainer.from_spec(spec, report=Silent()).fit()
