"""``ray job submit`` to a local Ray with its job server returns 0 exactly when the run succeeded."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray_runs import ROOT, Marked, one_process_digests, spec_of, status_of, step_of, wait_for, write_table

from raysgd import checkpoint
from raysgd.data.source import Preparation
from raysgd.encoding import encoded
from raysgd.prepared import prepare
from raysgd.storage import Storage

RAY = [sys.executable, "-m", "ray.scripts.scripts"]

#: what the actors of a job call themselves
ACTORS = ("ray::Worker", "ray::Server", "ray::JobSupervisor")

FREE = """
import ray
ray.init(logging_level="error", log_to_driver=False)
print(ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
"""


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]


@dataclass(frozen=True)
class JobServer:
    """A head with a job server, and a directory as a user would submit it: the package, the job, a TOML file."""

    address: str
    working_dir: Path
    storage: Path
    #: Ray's own processes, and all that they start
    head: Marked
    #: where Ray's programs join
    gcs: str

    def submit(
        self, *arguments: str, options: Sequence[str] = (), script: str = "train"
    ) -> subprocess.CompletedProcess[str]:
        job = ["--working-dir", ".", *options, "--", "python", f"jobs/{script}.py", *arguments]
        return self.ray("job", "submit", *job)

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The command ``ray`` with these words, as a user of this job server would give it."""
        environment = {**os.environ, "RAY_ADDRESS": self.address}
        return subprocess.run(
            [*RAY, *words], cwd=self.working_dir, env=environment, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip

    def of_jobs(self) -> list[str]:
        """The living drivers and actors of jobs."""
        return [c for c in self.head.living().values() if "jobs/train.py" in c or c.startswith(ACTORS)]

    def all_is_free(self) -> bool:
        """Whether no CPU of the cluster is taken, as one who joins it sees it."""
        environment = {**os.environ, "RAY_ADDRESS": self.gcs, "RAY_AUTH_MODE": "disabled"}
        words = [sys.executable, "-c", FREE]
        found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return found.stdout.strip() == "True"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    place = write_table(tmp_path_factory.mktemp("jobs") / "data")
    working_dir = place / "submitted"
    shutil.copytree(ROOT / "raysgd", working_dir / "raysgd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "jobs", working_dir / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    text = (place / "run.toml").read_text().replace('"train"', f'"{place}/train"')
    (working_dir / "jobs" / "run.toml").write_text(text.replace('"valid.parquet"', f'"{place}/valid.parquet"'))
    temp_dir = tempfile.mkdtemp(prefix="rs", dir="/tmp")
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = [f"--{name}={port}" for name, port in ports.items()]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    head = Marked(
        [*RAY, "start", "--head", "--block", "--num-cpus=3", f"--temp-dir={temp_dir}", *options,
         "--include-dashboard=true", "--object-store-memory=100000000"],
        place,
        {"PATH": path, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": ""},
    )  # fmt: skip
    address, gcs = f"http://127.0.0.1:{ports['dashboard-port']}", f"127.0.0.1:{ports['port']}"
    server = JobServer(address, working_dir, place / "runs", head, gcs)
    try:
        wait_for("the job server", lambda: _answers(server.address), timeout=90)
        yield server
    finally:
        head.end()
        shutil.rmtree(temp_dir, ignore_errors=True)


def _answers(address: str) -> bool:
    """Whether it takes jobs; it listens a while before it does."""
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(address).submit_job(entrypoint="true")
    except (ConnectionError, RuntimeError):
        return False
    return True


def test_success(jobs: JobServer) -> None:
    words = ["jobs/run.toml", "--storage-path", str(jobs.storage), "--num-workers", "2", "--name", "good"]
    done = jobs.submit(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    status = status_of(jobs.storage / "good")
    assert (status["state"], status["exit_code"]) == ("succeeded", 0)
    assert status["digest"] == one_process_digests(spec_of(jobs.working_dir.parent), [40])[40]


def test_failure(jobs: JobServer) -> None:
    """A run that diverges fails the job, and the run's own code says how."""
    words = ["jobs/run.toml", "--storage-path", str(jobs.storage), "--name", "bad"]
    sets = {"model.type": "linear_regression", "optimizer.momentum": 0.0, "optimizer.learning_rate": 30.0}
    done = jobs.submit(*words, *[word for key, value in sets.items() for word in ("--set", f"{key}={value}")])
    assert done.returncode == 1, done.stdout + done.stderr
    status = status_of(jobs.storage / "bad")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "diverged" in status["message"]
    assert status["message"] in done.stdout + done.stderr


def test_a_job_that_is_stopped(jobs: JobServer) -> None:
    """``ray job stop`` in mid-run: a checkpoint, nothing of the job ten seconds later; submitted again it goes on."""
    epochs, run = 100, jobs.storage / "stopped"
    slow = json.dumps({"env_vars": {"RAYSGD_FAILPOINTS": "worker.compute:sleep=0.004"}})
    words = ["jobs/run.toml", "--storage-path", str(jobs.storage), "--num-workers", "2", "--name", "stopped"]
    sets = ["--set", f"train.epochs={epochs}", "--set", "optimizer.learning_rate.decay_rate=0.99"]
    began = jobs.submit(*words, *sets, options=["--no-wait", "--submission-id", "stopped", "--runtime-env-json", slow])
    assert began.returncode == 0, began.stdout + began.stderr
    wait_for("some steps", lambda: step_of(run) > 100)
    stopped = jobs.ray("job", "stop", "stopped")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    wait_for("the end of the job's processes", lambda: not jobs.of_jobs(), 10)
    wait_for("free CPUs", jobs.all_is_free, 10)
    status = status_of(run)
    assert (status["state"], status["exit_code"]) == ("interrupted", 143), status
    assert 100 < status["step"] < 20 * epochs
    last = checkpoint.load(Storage.open(run), "last")
    assert (last.step, last.digest(), last.skipped) == (status["step"], status["digest"], ())
    again = jobs.submit(*words, *sets)
    assert again.returncode == 0, again.stdout + again.stderr
    spec = spec_of(jobs.working_dir.parent, train__epochs=epochs, optimizer__learning_rate__decay_rate=0.99)
    status = status_of(run)
    assert (status["state"], status["attempt"]) == ("succeeded", 2)
    assert status["digest"] == one_process_digests(spec, [20 * epochs])[20 * epochs]


def test_a_storage_path_inside_the_working_directory_is_refused(jobs: JobServer) -> None:
    """The TOML file says "runs", beside itself: that directory goes with the job."""
    done = jobs.submit("jobs/run.toml")
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    assert "run.storage_path must not lie in a Ray job's working directory" in printed
    assert "give an absolute path outside of it or a URI (--storage-path)" in printed


def test_arguments_that_no_launcher_quotes_arrive(jobs: JobServer) -> None:
    """Encoded words through Ray's own joining: a CSV file is prepared over tasks, to the bytes of one process."""
    place = jobs.working_dir.parent / "my $data"
    place.mkdir()
    (place / "a b.csv").write_text("x,late\n" + "".join(f"{i},{i % 2}\n" for i in range(2_000)))
    words = [str(place / "a b.csv"), "--output", str(place / "out"), "--num-workers", "2"]
    done = jobs.submit(*encoded(words), script="prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    prepare(Preparation(words[0]), str(place / "here"))
    found, expected = ({p.name: p.read_bytes() for p in (place / name).iterdir()} for name in ("out", "here"))
    assert found == expected
    bad = jobs.submit(*encoded([str(place / "no such file"), "--output", str(place / "bad")]), script="prepare")
    assert bad.returncode == 1
    assert "no such file does not exist" in bad.stdout + bad.stderr
    assert not (place / "bad").exists()
