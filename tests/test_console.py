"""What commands share: one BLAS thread, progress in lines, a status that tells how the command ended."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raysgd.console import standing
from raysgd.errors import InputError, Interrupted, RunError
from raysgd.report.counting import Lines, counting

ROOT = Path(__file__).resolve().parent.parent

THREADS = """
import os, sys
from raysgd.cli import main
assert "numpy" not in sys.modules
assert main(["evaluate", "/no/run", "--data", "x"]) == 2
assert "numpy" in sys.modules
print(os.environ["OPENBLAS_NUM_THREADS"], os.environ["OMP_NUM_THREADS"])
"""


def test_a_command_computes_with_one_thread_as_workers_do() -> None:
    """With more, an MLP's scores differ in the last bits; numpy reads this when it is loaded."""
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == (["1", "1"], 0), done.stderr


def test_lines_come_every_five_seconds() -> None:
    stream, now = io.StringIO(), [0.0]
    lines = Lines(stream, lambda: now[0])
    for second, done in ((1, 10), (6, 1_000), (8, 1_500), (11.5, 2_000)):
        now[0] = second
        lines.tell("writing rows", done, 2_000)
    assert stream.getvalue().splitlines() == ["writing rows: 1,000 of 2,000", "writing rows: 2,000 of 2,000"]
    with counting(stream, quiet=True, clock=lambda: 99.0) as told:
        told("more", 1, 2)
    assert "more" not in stream.getvalue()


def read(directory: Path) -> tuple[str, int | None, str]:
    found = json.loads((directory / "status.json").read_text())
    return found["state"], found["exit_code"], found["message"]


def fail(directory: Path, error: BaseException) -> None:
    with standing(str(directory)):
        assert read(directory) == ("running", None, "")
        raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InputError("no rows"), ("failed", 2, "no rows")),
        (RunError("a task was lost"), ("failed", 1, "a task was lost")),
        (OSError("disk full"), ("failed", 1, "OSError('disk full')")),
        (KeyboardInterrupt(), ("interrupted", 130, "interrupted; the same command starts over")),
    ],
)
def test_the_status_says_how_it_ended(tmp_path: Path, error: BaseException, expected: tuple[str, int, str]) -> None:
    with pytest.raises(type(error)):
        fail(tmp_path, error)
    assert read(tmp_path) == expected
    with standing(str(tmp_path)) as details:
        details["rows"] = 3
    assert read(tmp_path) == ("succeeded", 0, "")
    assert json.loads((tmp_path / "status.json").read_text())["details"] == {"rows": 3}


def test_sigterm_is_an_end_too(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as ended, standing(str(tmp_path)):
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.exit_code == 143
    assert read(tmp_path)[:2] == ("interrupted", 143)
    assert signal.getsignal(signal.SIGTERM) is before
