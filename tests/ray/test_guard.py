"""What a killed process would leave behind goes with it; what it says goodbye to stays. No Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import Marked, wait_for

from raysgd.runtime.guard import GOODBYE, descendants, watch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard reads /proc")

#: starts a child and a grandchild that would live on, and waits to be killed, or ends
PROGRAM = """
import subprocess, sys, time
from raysgd.runtime.guard import guarded
before = subprocess.Popen(["sleep", "1001"])
with guarded() as settled:
    child = subprocess.Popen(["sh", "-c", "sleep 1000 & echo; wait"], stdout=subprocess.PIPE)
    child.stdout.readline()
    if "settled" in sys.argv:
        settled()
    elif "ends" in sys.argv:
        sys.exit()
    print("guarded", flush=True)
    time.sleep(1000)
"""


def sleeping(run: Marked, seconds: int) -> int:
    return sum(f"sleep {seconds}" in command for command in run.living().values())


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def line_of(pid: int, later: int = 0) -> bytes:
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return f"{pid} {started + later}\n".encode()


@pytest.mark.parametrize("word", ["settled", "starting"])
def test_children_of_a_killed_process_go_with_it(tmp_path: Path, word: str) -> None:
    """Also while they are still being started; what was there before is none of the guard's business."""
    run = Marked([sys.executable, "-c", PROGRAM, word], tmp_path)
    try:
        wait_for("the guard", lambda: "guarded" in run.text)
        assert sleeping(run, 1000) >= 2
        if word == "starting":
            time.sleep(1.0)  # many looks of the guard
        run.process.kill()
        run.wait()
        wait_for("their end", lambda: len(run.living()) == 1, 10)
        assert sleeping(run, 1001) == 1
    finally:
        run.end()


def test_a_start_that_fails_takes_along_what_it_started(tmp_path: Path) -> None:
    run = Marked([sys.executable, "-c", PROGRAM, "ends"], tmp_path)
    try:
        assert run.wait() == 0, run.text
        wait_for("their end", lambda: len(run.living()) == 1, 10)
        assert sleeping(run, 1001) == 1
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
