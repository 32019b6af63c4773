"""Failpoints: what the variable may say, what is done where, and that nothing is done when it says nothing."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raysgd import failpoints
from raysgd.errors import InputError, RunError
from raysgd.learn.batch import Batch, Inputs, Target
from raysgd.learn.models import LinearRegression
from raysgd.learn.parameters import Range
from raysgd.protocol.client import Compute
from raysgd.protocol.compute import subtree_sums

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    failpoints.arm("")


def run(variable: str | None, code: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process of its own, with the variable set."""
    environment = os.environ | ({} if variable is None else {failpoints.VARIABLE: variable})
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


REACH = """
from raysgd import failpoints
for step in range(3):
    failpoints.reach("storage.sync")
    print(step, flush=True)
"""


@pytest.mark.parametrize(
    ("variable", "code", "lines"),
    [
        (None, 0, 3),
        ("", 0, 3),
        ("storage.sync:kill", -signal.SIGKILL, 0),
        ("storage.sync@3:kill", -signal.SIGKILL, 2),
        ("storage.sync@4:kill", 0, 3),
        ("storage.write:kill", 0, 3),
        ("storage.sync@2:raise", 1, 1),
        (" storage.write:kill , storage.sync@2:sleep=0, storage.sync@3:kill ,", -signal.SIGKILL, 2),
    ],
)
def test_the_environment_arms(variable: str | None, code: int, lines: int) -> None:
    done = run(variable, REACH)
    assert (done.returncode, len(done.stdout.splitlines())) == (code, lines), done.stderr


def test_a_bad_variable_is_bad_input_before_anything_is_written(tmp_path: Path) -> None:
    code = f"from raysgd.storage import Storage\nStorage.open({str(tmp_path)!r}).write_atomic('a', b'1')"
    done = run("storage.snyc:kill", code)
    assert done.returncode == 1
    assert "InputError: RAYSGD_FAILPOINTS names no failpoint: 'storage.snyc'; allowed are storage.create" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = run(
        "storage.sync", f"import sys\nfrom raysgd.cli import main\nsys.exit(main(['digest', {str(tmp_path)!r}]))"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("raysgd: RAYSGD_FAILPOINTS must be NAME:ACTION or NAME@N:ACTION, the action one of")


@pytest.mark.parametrize(
    "entry",
    [
        "storage.sync",
        "storage.sync:",
        "storage.sync:die",
        "storage.sync:kill=1",
        "storage.sync:sleep",
        "storage.sync:sleep=",
        "storage.sync:sleep=-1",
        "storage.sync:sleep=1.2.3",
        "storage.sync:sleep=inf",
        f"storage.sync:sleep={'9' * 400}",
        "storage.sync@:kill",
        "storage.sync@-1:kill",
        "storage.sync@1.5:kill",
        "storage.sync @1:kill",
        "@1:kill",
        ":kill",
        "kill",
    ],
)
def test_an_entry_that_is_none_is_told(entry: str) -> None:
    with pytest.raises(InputError) as caught:
        failpoints.arm(entry)
    allowed = "must be NAME:ACTION or NAME@N:ACTION, the action one of kill, raise, enospc, sleep=SECONDS"
    assert caught.value.problems == (f"RAYSGD_FAILPOINTS {allowed}: got {entry!r}",)
    assert failpoints.armed == {}


def test_every_violation_is_told_and_what_was_armed_stays() -> None:
    failpoints.arm("storage.sync:raise")
    with pytest.raises(InputError) as caught:
        failpoints.arm("storage.sync:die,storage.write:kill,nowhere:kill")
    assert [problem.split()[1] for problem in caught.value.problems] == ["must", "names"]
    with pytest.raises(RunError):
        failpoints.reach("storage.sync")


def test_raise_names_the_failpoint() -> None:
    failpoints.arm("storage.sync@2:raise")
    failpoints.reach("storage.sync")
    failpoints.reach("storage.write")
    with pytest.raises(RunError, match=r"failpoint storage\.sync was reached \(2\)"):
        failpoints.reach("storage.sync")
    failpoints.reach("storage.sync")


def test_a_full_disk_looks_like_one() -> None:
    failpoints.arm("storage.write:enospc")
    for _ in range(2):
        with pytest.raises(OSError, match=r"failpoint storage\.write") as caught:
            failpoints.reach("storage.write")
        assert caught.value.errno == errno.ENOSPC


def test_where_a_step_is_known_it_is_what_counts() -> None:
    failpoints.arm("storage.sync@7:raise")
    for step in (0, 1, 6, 8):
        failpoints.reach("storage.sync", step)
    for _ in range(2):
        with pytest.raises(RunError, match=r"\(7\)"):
            failpoints.reach("storage.sync", 7)


def test_sleep_waits_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    failpoints.arm("storage.sync:sleep=0.25,storage.sync@2:sleep=3")
    failpoints.reach("storage.sync")
    failpoints.reach("storage.sync")
    assert waits == [0.25, 0.25, 3.0]


def test_off_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "_obey", None)  # whoever calls it fails
    failpoints.reach("storage.sync")
    failpoints.arm("storage.write:kill")
    with pytest.raises(TypeError):
        failpoints.reach("storage.sync")


def test_the_table_names_what_the_source_reaches() -> None:
    """No failpoint is misspelt, none is documented that is nowhere."""
    calls = [
        node.args[0]
        for file in sorted((ROOT / "raysgd").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "reach"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "failpoints"
    ]
    names = [argument.value for argument in calls if isinstance(argument, ast.Constant)]
    assert len(names) == len(calls), "a failpoint's name is written where it is reached"
    assert set(names) == set(failpoints.NAMES)


def test_a_name_that_is_none_is_our_own_mistake() -> None:
    failpoints.arm("storage.sync:kill")
    with pytest.raises(AssertionError, match=r"add it to failpoints\.NAMES"):
        failpoints.reach("storage.snyc")


def test_a_failpoint_of_each_virtual_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reached once for each, with the step: what makes compute as long as a test or a bench wants it."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    learner = LinearRegression().bind(Inputs(1, ()), Target())
    rows = Batch(np.ones((2, 1), np.float32), np.zeros((2, 0), np.int32), np.ones(2, np.float32))
    compute = Compute(7, learner.initial(0), (Range(0, 4), Range(4, 6)))
    failpoints.arm("worker.virtual@7:sleep=3,worker.virtual@8:sleep=4")
    slow = subtree_sums(learner, compute, lambda _step, _v: rows)
    assert waits == [3.0] * 6
    failpoints.arm("")
    quick = subtree_sums(learner, compute, lambda _step, _v: rows)
    assert [(s.loss, s.rows, s.gradient.tolist()) for s in slow] == [
        (q.loss, q.rows, q.gradient.tolist()) for q in quick
    ]
