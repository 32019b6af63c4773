"""``raysgd up-check`` on two machines: what is wrong with them is told in one line, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from machines import Machine, Site, installation, made_site, needs_machines
from ray_runs import ROOT, write_table

from raysgd.runtime.look import ANSWER_S
from raysgd.runtime.token import ASK_S

needs_machines()

TOKEN = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Two:
    """Two machines with Ray and token authentication, and a directory that both see."""

    head: Machine
    other: Machine
    shared: Path

    def check(self, storage: object = None, settings: str = "") -> tuple[int, list[dict[str, str]]]:
        """The exit code of an up-check on the head, and what is not well."""
        words = f"{settings} raysgd up-check --json --address auto --storage-path {storage or self.shared / 'runs'}"
        done = self.head.run(words)
        report: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        return done.returncode, [check for check in report["checks"] if check["level"] != "ok"]


def install(site: Site, name: str, script: Path) -> Machine:
    machine = site.add(name)
    machine.must(f"mkdir ~/raysgd ~/.ray && cp -r {ROOT}/raysgd ~/raysgd/ && bash {script}")
    machine.must("echo 'export PATH=$HOME/raysgd-env/bin:$PATH RAY_AUTH_MODE=token' >> ~/.bashrc")
    machine.must(f"umask 077; echo -n {TOKEN} > ~/.ray/auth_token")
    return machine


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    shared = write_table(tmp_path_factory.mktemp("shared") / "s")
    (shared / "install.sh").write_text(installation())
    for site in made_site(tmp_path_factory.mktemp("machines") / "m"):
        head, other = (install(site, name, shared / "install.sh") for name in ("head", "other"))
        common = "--num-cpus=1 --object-store-memory=100000000"
        head.must(f"ray start --head --port=6379 --include-dashboard=false {common}")
        other.must(f"ray start --address={head.address}:6379 {common}")
        yield Two(head, other, shared)


def test_nothing_is_wrong(two: Two) -> None:
    done = two.head.run(f"raysgd up-check --address auto --storage-path {two.shared}/runs")
    assert done.returncode == 0, done.stdout
    assert f"ok      nodes: 2: {two.head.address} (head), {two.other.address}" in done.stdout
    assert "ok      authentication: by token" in done.stdout
    assert not (two.shared / "runs").exists(), "what was written to the storage is gone"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("RAY_AUTH_TOKEN=abcdef", "refuses the token of this process: put the token of its head"),
        ("RAY_AUTH_MODE=disabled", "asks for a token, and this process gives none: put the token of its head"),
    ],
)
@pytest.mark.parametrize("command", ["up-check", "train run.toml"])
def test_a_token_that_is_wrong_or_missing(two: Two, settings: str, said: str, command: str) -> None:
    done = two.head.run(f"cd {two.shared}; {settings} raysgd {command} --address auto")
    assert done.returncode == 1, done.stdout
    assert f"raysgd: the Ray cluster at {two.head.address}:6379 {said}" in done.stdout
    assert len(done.stdout.splitlines()) < 8, done.stdout


def test_a_node_with_another_version(two: Two) -> None:
    two.other.must("echo '# changed' >> ~/raysgd/raysgd/errors.py")
    code, wrong = two.check()
    two.other.must(f"cp {ROOT}/raysgd/errors.py ~/raysgd/raysgd/errors.py")
    assert (code, [check["what"] for check in wrong]) == (1, ["version of raysgd"])
    assert wrong[0]["found"].endswith(f"on {two.other.address}")


def test_a_node_without_the_package(two: Two) -> None:
    two.other.must("mv ~/raysgd ~/away")
    code, wrong = two.check()
    two.other.must("mv ~/away ~/raysgd")
    assert (code, [check["what"] for check in wrong]) == (1, ["version of raysgd"]), wrong
    assert f"not installed on {two.other.address}" in wrong[0]["found"]


def test_storage_that_only_the_head_sees(two: Two) -> None:
    """/run is each machine's own: without the directory on the other, then with another one of that name."""
    two.head.must("mkdir /run/runs")
    code, wrong = two.check("/run/runs")
    assert (code, [check["what"] for check in wrong]) == (1, ["storage"])
    assert f"cannot be written on {two.other.address}: there is no such directory" in wrong[0]["found"]
    two.other.must("mkdir /run/runs")
    code, wrong = two.check("/run/runs")
    assert (code, [check["what"] for check in wrong]) == (1, ["storage"])
    assert wrong[0]["found"] == f"/run/runs is another directory on {two.other.address} than here"
    assert "mount the same directory at the same place on every node" in wrong[0]["remedy"]


def test_a_full_shared_memory(two: Two) -> None:
    two.other.must("head -c 2G /dev/zero > /dev/shm/filler 2>/dev/null || test -s /dev/shm/filler")
    code, wrong = two.check()
    two.other.must("rm /dev/shm/filler")
    assert (code, [check["what"] for check in wrong]) == (1, ["/dev/shm"])
    assert wrong[0]["found"].startswith(f"full on {two.other.address}: 0 MB free")


def test_it_is_told_within_thirty_seconds() -> None:
    """What is waited for at the longest; the rest is the start of processes."""
    assert ANSWER_S + ASK_S < 30
