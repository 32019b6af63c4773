"""Ray's autoscaler with fake nodes: a run grows with the cluster, loses a node it was given, gives the others back.

What can never be placed is refused with what the autoscaler could still add.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray_runs import Marked, one_process_digests, raysgd_command, spec_of, status_of, step_of, wait_for, write_table
from test_job_submit import RAY, free_ports

from raysgd.audit import audit
from raysgd.storage import Storage

EPOCHS = 60
END = 20 * EPOCHS

#: a step takes 32 ms with one worker, a third of that with three: there is time for nodes to come and to be lost
PACE = "worker.virtual:sleep=0.004"

HEAD_ID = "f" * 51 + "00000"


def cluster_file(port: int) -> dict[str, Any]:
    """A head with one CPU, and up to two nodes with one CPU each, which go after six idle seconds."""
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": HEAD_ID,
        "gcs_address": f"127.0.0.1:{port}",
    }
    kinds = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "spot": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    empty_lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    empty_lists += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    empty_lists += ("rsync_exclude", "rsync_filter")
    return {
        "cluster_name": "fake", "max_workers": 2, "idle_timeout_minutes": 0.1, "upscaling_speed": 1.0,
        "provider": provider, "available_node_types": kinds, "head_node_type": "ray.head.default",
        "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
        **{name: [] for name in empty_lists},
    }  # fmt: skip


@dataclass(frozen=True)
class Autoscaled:
    """A cluster that grows and shrinks, and the directory of a table."""

    address: str
    head: Marked
    place: Path

    def train(self, name: str, *words: str) -> Marked:
        arguments = [str(self.place / "run.toml"), "--address", self.address, "--name", name]
        cpus = ["--set", "scaling.worker_cpus=0.75", "--set", "scaling.server_cpus=0.25"]
        return Marked(raysgd_command("train", *arguments, *cpus, *words), self.place, {"RAY_AUTH_MODE": "disabled"})

    def nodes(self) -> list[str]:
        """The ends of the living nodes' ids: 00000 is the head."""
        from ray._raylet import GcsClient

        infos = GcsClient(address=self.address).get_all_node_info(timeout=10)
        return sorted(node.hex()[-5:] for node, info in infos.items() if info.state == 0)

    def lose(self, node: str) -> None:
        """The node's raylet is killed, and its actors with it."""
        pids = [p for p, c in raylets(self.head).items() if c.endswith(node)]
        assert len(pids) == 1, (node, raylets(self.head))
        os.kill(pids[0], signal.SIGKILL)


def raylets(head: Marked) -> dict[int, str]:
    """The node id of each raylet of the cluster, by pid."""
    found = {}
    for pid in head.living():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        if words[0].endswith("/raylet"):
            found[pid] = next(w.partition("=")[2] for w in words if w.startswith("--node_id="))
    return found


@pytest.fixture(scope="module")
def autoscaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Autoscaled]:
    place = write_table(tmp_path_factory.mktemp("autoscaled") / "data")
    temp_dir = tempfile.mkdtemp(prefix="rs", dir="/tmp")
    port, client = free_ports(2)
    (place / "fake.json").write_text(json.dumps(cluster_file(port)))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_AUTH_MODE": "disabled",
        "RAYSGD_FAILPOINTS": PACE,
    }
    options = [f"--port={port}", f"--ray-client-server-port={client}", f"--temp-dir={temp_dir}", "--num-cpus=1"]
    options += ["--include-dashboard=false", f"--autoscaling-config={place}/fake.json"]
    head = Marked([*RAY, "start", "--head", "--block", *options, "--object-store-memory=100000000"], place, environment)
    made = Autoscaled(f"127.0.0.1:{port}", head, place)
    try:
        wait_for("the head", lambda: "This command will now block" in head.text, timeout=90)
        yield made
    finally:
        head.end()
        shutil.rmtree(temp_dir, ignore_errors=True)


def test_a_run_grows_loses_a_node_and_gives_back(autoscaled: Autoscaled) -> None:
    truth = one_process_digests(spec_of(autoscaled.place, train__epochs=EPOCHS), [END])[END]
    assert autoscaled.nodes() == ["00000"]
    run = autoscaled.train("elastic", "--num-workers", "1-3", "--set", f"train.epochs={EPOCHS}")
    try:
        wait_for("three workers", lambda: ended(run) or ": 3 workers" in run.text, timeout=120)
        given = autoscaled.nodes()
        assert len(given) == 3, (given, run.text)
        there = autoscaled.place / "runs" / "elastic"
        begun = step_of(there)
        wait_for("steps of three workers", lambda: ended(run) or step_of(there) > begun + 150)
        autoscaled.lose(given[-1])
        wait_for("the loss", lambda: ended(run) or "is lost at step" in run.text, timeout=60)
        assert run.wait(180) == 0, run.text
    finally:
        run.end()
    status = status_of(autoscaled.place / "runs" / "elastic")
    assert (status["state"], status["digest"]) == ("succeeded", truth)
    found = audit(Storage.open(autoscaled.place / "runs" / "elastic"))
    assert (found.problems, found.steps, found.rows) == ((), END, True)
    # Six idle seconds are over many times during the run: the node that was not lost stayed.
    assert len(re.findall(r"worker \d+ is lost", run.text)) == 1, run.text
    wait_for("the idle nodes' end", lambda: autoscaled.nodes() == ["00000"], timeout=60)


def ended(run: Marked) -> bool:
    """Fails where the run is over already."""
    assert run.process.poll() is None, run.text
    return False


def test_a_fixed_number_of_workers_waits_for_nodes(autoscaled: Autoscaled) -> None:
    run = autoscaled.train("fixed", "--num-workers", "3", "--set", "run.stop_after_steps=3")
    try:
        assert run.wait(120) == 0, run.text
    finally:
        run.end()
    assert "the run asks for 2.5 CPUs (3 workers, 1 server); an autoscaler can add" in run.text
    assert "spot (1 CPU): waiting" in run.text


def test_what_can_never_be_placed_is_refused(autoscaled: Autoscaled) -> None:
    """At once, not when an autoscaler would have had its time."""
    run = autoscaled.train("never", "--num-workers", "5")
    try:
        assert run.wait(60) == 2, run.text
    finally:
        run.end()
    assert "the run asks for 4 CPUs (5 workers, 1 server) and the Ray cluster has " in run.text
    assert "4 CPU are asked for: the cluster has " in run.text
    assert re.search("an autoscaler can add [12] nodes?: spot|the autoscaler can add no more nodes", run.text), run.text
    assert "lower scaling.num_workers" in run.text
