"""What a killed process would leave behind goes with it; what it says goodbye to stays. No Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import Marked, wait_for

from raysgd.runtime.guard import GOODBYE, descendants, watch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard reads /proc")

#: starts a child and a grandchild that would live on, and waits to be killed
PROGRAM = """
import subprocess, time
from raysgd.runtime.guard import guarded
child = subprocess.Popen(["sh", "-c", "sleep 1000 & echo; wait"], stdout=subprocess.PIPE)
child.stdout.readline()
with guarded():
    print("guarded", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def line_of(pid: int, later: int = 0) -> bytes:
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return f"{pid} {started + later}\n".encode()


def test_children_of_a_killed_process_go_with_it(tmp_path: Path) -> None:
    run = Marked([sys.executable, "-c", PROGRAM], tmp_path)
    try:
        wait_for("the guard", lambda: "guarded" in run.text)
        assert sum("sleep 1000" in command for command in run.living().values()) >= 2
        run.process.kill()
        run.wait()
        run.gone()
    finally:
        run.end()


def test_after_a_goodbye_nothing_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    assert sleeper.pid in descendants(os.getpid())
    watch([line_of(sleeper.pid), GOODBYE])
    assert sleeper.poll() is None


def test_another_process_of_the_same_pid_is_spared(sleeper: subprocess.Popen[bytes]) -> None:
    watch([line_of(sleeper.pid, later=1)])
    assert sleeper.poll() is None
    watch([line_of(sleeper.pid)])
    assert sleeper.wait(10) == -9


def test_what_a_dead_raylet_was_starting_goes_too(sleeper: subprocess.Popen[bytes]) -> None:
    """Told by the environment that Ray gives its workers; that of another raylet stays."""
    mine, other = (
        subprocess.Popen(["sleep", "1000"], env={"RAY_RAYLET_PID": str(pid), "PATH": os.environ["PATH"]})
        for pid in (sleeper.pid, sleeper.pid + 1)
    )
    try:
        wait_for("its program", lambda: Path(f"/proc/{mine.pid}/cmdline").read_bytes().startswith(b"sleep"))
        watch([line_of(sleeper.pid)])
        assert (sleeper.wait(10), mine.wait(10)) == (-9, -9)
        assert other.poll() is None
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()
