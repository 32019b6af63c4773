"""metrics.jsonl: lines come back, a resumed run drops what lies beyond, torn lines harm nobody."""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf, nan
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from raysgd.report import metrics_log
from raysgd.report.metrics_log import MetricsLog
from raysgd.storage import Storage


class Clock:
    """A wall clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def train(log: MetricsLog, step: int, loss: float = 0.5) -> dict[str, Any]:
    return log.train(step=step, epoch=1, rows=512 * step, loss=loss, learning_rate=0.1, rows_per_s=1e6)


def test_lines_come_back_with_the_documented_fields(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    with MetricsLog(storage, Clock()) as log:
        train(log, 1)
        log.validation(step=1, epoch=1, metrics={"loss": 0.4, "auc": 0.9, "rows": 7})
    assert metrics_log.read(storage) == [
        {
            "kind": "train",
            "step": 1,
            "epoch": 1,
            "rows": 512,
            "loss": 0.5,
            "learning_rate": 0.1,
            "rows_per_s": 1e6,
            "time": "1970-01-01T00:00:00.000Z",
        },
        {
            "kind": "validation",
            "step": 1,
            "epoch": 1,
            "loss": 0.4,
            "auc": 0.9,
            "rows": 7,
            "time": "1970-01-01T00:00:00.000Z",
        },
    ]
    assert len(storage.read("metrics.jsonl").splitlines()) == 2


def test_there_is_nothing_before_the_first_line(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "run")
    MetricsLog(storage).rewind(5)
    assert metrics_log.read(storage) == []
    assert not storage.exists()


def test_the_score_of_the_untrained_model_stays_where_a_run_continues(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    with MetricsLog(storage) as log:
        log.validation(step=0, epoch=0, metrics={"loss": 0.7})
        train(log, 1)
        log.rewind(1)
        assert [record["step"] for record in metrics_log.read(storage)] == [0, 1]
        log.rewind(0)
    assert metrics_log.read(storage) == []


@pytest.mark.parametrize("step", range(5))
def test_a_resumed_run_has_each_step_once(tmp_path: Path, step: int) -> None:
    storage = Storage.open(tmp_path)
    with MetricsLog(storage) as log:
        for i in range(1, 5):
            train(log, i)
    with MetricsLog(storage) as log:
        log.rewind(step)
        for i in range(step + 1, 5):
            train(log, i, loss=0.25)
    found = [(record["step"], record["loss"]) for record in metrics_log.read(storage)]
    assert found == [(i, 0.5 if i <= step else 0.25) for i in range(1, 5)]


def test_a_torn_line_is_passed_over_and_gone_after_a_rewind(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    with MetricsLog(storage) as log:
        train(log, 1)
    storage.append("metrics.jsonl", '{"kind": "train", "st')
    assert [record["step"] for record in metrics_log.read(storage)] == [1]
    with MetricsLog(storage) as log:
        log.rewind(1)
        train(log, 2)
    assert [json.loads(line)["step"] for line in storage.read("metrics.jsonl").splitlines()] == [1, 2]


@pytest.mark.parametrize("line", [b"[]\n", b"null\n", b'{"kind": "train"}\n', b'{"step": "1", "kind": 5}\n', b"\xff\n"])
def test_foreign_lines_are_passed_over(tmp_path: Path, line: bytes) -> None:
    storage = Storage.open(tmp_path)
    storage.write_atomic("metrics.jsonl", line)
    assert metrics_log.read(storage) == []


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    with MetricsLog(storage) as log:
        train(log, 1, loss=nan)
        train(log, 2, loss=inf)
    assert [record["loss"] for record in metrics_log.read(storage)] == [None, None]


def test_elsewhere_than_locally_lines_are_written_together(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    storage = Storage(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "bucket")
    clock = Clock()
    log = MetricsLog(storage, clock)
    train(log, 1)
    assert metrics_log.read(storage) == []
    clock.seconds = 11.0
    train(log, 2)
    assert len(metrics_log.read(storage)) == 2
    clock.seconds = 5.0  # the wall clock was set back
    train(log, 3)
    assert len(metrics_log.read(storage)) == 3
    train(log, 4)
    log.flush()
    assert [record["step"] for record in metrics_log.read(storage)] == [1, 2, 3, 4]


#: the disk is full at 300 bytes a file, and has room again before the block ends, if it does
FULL = """
import resource, sys
from raysgd.report.metrics_log import MetricsLog
from raysgd.storage import Storage
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
with MetricsLog(Storage.open(sys.argv[1]), say=print) as log:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, most))
    for step in range(1, 7):
        log.validation(step=step, epoch=1, metrics={"loss": 0.5})
    if sys.argv[2:]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
"""


@pytest.mark.parametrize("room", [True, False])
def test_lines_wait_while_nothing_can_be_written(tmp_path: Path, room: bool) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path), *(["room"] if room else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = f"{tmp_path}/metrics.jsonl could not be written: File too large; make room there"
    assert done.stdout == f"warning: {told}; the lines wait until then\n", done.stderr
    steps = [line["step"] for line in metrics_log.read(Storage.open(tmp_path))]
    if room:
        assert (done.returncode, steps) == (0, [1, 2, 3, 4, 5, 6])
    else:
        assert (done.returncode, steps) == (1, [1, 2, 3])
        assert done.stderr.splitlines()[-1] == f"raysgd.errors.SaveError: {told}"
