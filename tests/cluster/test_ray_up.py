"""clusters/local.yaml on three machines: ``ray up``, ``ray submit`` and ``ray job submit`` while a machine is lost,
``ray down``; the trained bytes are those of one process."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from machines import Machine, Site, installation, made_site, needs_machines
from ray_runs import ROOT, one_process_digests, spec_of, status_of, step_of, wait_for, write_table

from raysgd.audit import audit
from raysgd.storage import Storage

needs_machines()

EPOCHS = 40
END = 20 * EPOCHS

#: ``ray up`` returns when the head is there: the run waits for the others. The server stays on the head.
SETS = f"--set train.epochs={EPOCHS} --set scaling.placement_timeout_s=120 "
SETS += "--set scaling.server_resources={raysgd_stays=0.001}"

#: every step takes a hundredth of a second: there is time to lose a machine
PACE = "worker.compute:sleep=0.01"


@dataclass(frozen=True)
class Cluster:
    """The user's seat with the cluster file, three machines on which Ray runs, and the directory that all see."""

    site: Site
    file: Path
    shared: Path

    @property
    def head(self) -> Machine:
        return self.site.machines["head"]

    def begin(self, command: str) -> subprocess.Popen[str]:
        """Begin ``command`` at the user's seat."""
        return self.site.begin(f"cd {ROOT}; {command}")


def cluster_file(site: Site, shared: Path) -> dict[str, Any]:
    """clusters/local.yaml as a user edits it; ``pip install`` is done without a package index."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())
    head, *others = site.machines.values()
    config["provider"] |= {"head_ip": head.address, "worker_ips": [m.address for m in others]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(site.key)}
    (shared / "install.sh").write_text(installation(f"RAYSGD_FAILPOINTS={PACE}"))
    kept = [c for c in config["setup_commands"] if "-m venv" not in c and "pip install" not in c]
    assert len(kept) == len(config["setup_commands"]) - 2
    config["setup_commands"] = [f"bash {shared}/install.sh", *kept]
    config["head_start_ray_commands"][-1] += " --num-cpus=2 --object-store-memory=150000000"
    config["worker_start_ray_commands"][-1] += " --num-cpus=1 --object-store-memory=150000000"
    return config


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from made_site(tmp_path_factory.mktemp("machines") / "m")


@pytest.fixture(scope="module")
def cluster(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    shared = write_table(tmp_path_factory.mktemp("shared") / "s")
    for name in ("head", "one", "two"):
        site.add(name)
    (shared / "cluster.yaml").write_text(yaml.safe_dump(cluster_file(site, shared)))
    (site.home / "raysgd").symlink_to(ROOT)
    (shared / "install.sh").chmod(0o755)
    site.must(f"bash {shared}/install.sh && echo 'export PATH=$HOME/raysgd-env/bin:$PATH' >> ~/.bashrc")
    site.must("ray get-auth-token --generate && chmod 600 ~/.ray/auth_token")
    made = Cluster(site, shared / "cluster.yaml", shared)
    site.must(f"cd {ROOT} && ray up -y {made.file}", timeout=180)
    yield made
    site.must(f"cd {ROOT} && ray down -y {made.file}", timeout=120)
    # Those of other machines end themselves, when they have missed the head for a minute or two.
    wait_for("the end of Ray on the head", lambda: is_idle(made.head), timeout=30)


def is_idle(machine: Machine) -> bool:
    return machine.run("pgrep -f 'raylet|gcs_server|ray::'").returncode == 1


@pytest.fixture(scope="module")
def truth(cluster: Cluster) -> str:
    return one_process_digests(spec_of(cluster.shared, train__epochs=EPOCHS), [END])[END]


def test_ray_exec_checks_the_cluster(cluster: Cluster) -> None:
    """As the file says to check it; the other machines may still be on their way."""
    check = f"raysgd up-check --address auto --storage-path {cluster.shared}/runs"
    said = cluster.site.must(f"cd {ROOT} && ray exec {cluster.file} '{check}'")
    assert "ok      authentication: by token" in said
    assert f"{cluster.head.address} (head)" in said
    assert "error" not in said


def test_ray_submit_while_a_machine_is_lost(cluster: Cluster, truth: str) -> None:
    """One file goes to the head; the package is what ``setup_commands`` installed there."""
    arguments = f"{cluster.shared}/run.toml --address auto --num-workers 3 {SETS}"
    running = cluster.begin(f"ray submit {cluster.file} jobs/train.py -- {arguments} --name submitted")
    lose(cluster, "two", "submitted", running)
    judge(cluster, "submitted", running, truth)


def test_ray_job_submit_while_a_machine_is_lost(cluster: Cluster, truth: str) -> None:
    """By the tunnel to the job server, which listens on the head's loopback, with the token."""
    cluster.begin(f"ray dashboard {cluster.file}")
    wait_for("the tunnel", lambda: cluster.site.run("curl -so /dev/null http://127.0.0.1:8265").returncode == 0)
    client = "RAY_AUTH_MODE=token RAY_ADDRESS=http://127.0.0.1:8265 ray job submit --working-dir ."
    arguments = f"{cluster.shared}/run.toml --num-workers 2 {SETS}"
    running = cluster.begin(f"{client} -- python jobs/train.py {arguments} --name job")
    lose(cluster, "one", "job", running)
    judge(cluster, "job", running, truth)


def lose(cluster: Cluster, machine: str, name: str, running: subprocess.Popen[str]) -> None:
    """The machine is gone when the run has come to a tenth of its way."""

    def reached() -> bool:
        assert running.poll() is None, running.communicate()[0]
        return step_of(cluster.shared / "runs" / name) > END / 10

    wait_for("a tenth of the run", reached, timeout=120)
    cluster.site.machines[machine].lose()


def judge(cluster: Cluster, name: str, running: subprocess.Popen[str], truth: str) -> None:
    """The run ended well, knew of the loss, and its bytes and rows are those of one process."""
    said, _ = running.communicate(timeout=180)
    assert running.returncode == 0, said
    assert "is lost at step" in said, said
    run = cluster.shared / "runs" / name
    assert (status_of(run)["state"], status_of(run)["digest"]) == ("succeeded", truth)
    found = audit(Storage.open(run))
    assert (found.problems, found.steps, found.rows) == ((), END, True)
