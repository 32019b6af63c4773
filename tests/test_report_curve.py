"""Commits become lines at multiples of log_every, wherever a run began, and the means are those of the rows."""

from __future__ import annotations

import json
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import pytest

from raysgd.protocol.gate import Commit
from raysgd.report import metrics_log
from raysgd.report.curve import Curve
from raysgd.report.metrics_log import MetricsLog
from raysgd.storage import Storage

STEPS_PER_EPOCH = 4


def commit(step: int) -> Commit:
    rows = 2 if step % STEPS_PER_EPOCH == STEPS_PER_EPOCH - 1 else 8
    return Commit(step, loss=float(step * rows), rows=rows, rate=1.0 / (step + 1), parts=())


def curve(storage: Storage, step: int = 0, **changes: Any) -> Curve:
    ticks = count()
    options: dict[str, Any] = {"log_every": 3, "steps_per_epoch": STEPS_PER_EPOCH, "rows_per_epoch": 26} | changes
    return Curve(MetricsLog(storage), step=step, batch_size=8, clock=lambda: float(next(ticks)), **options)


def lines(storage: Storage) -> list[tuple[Any, ...]]:
    return [(r["step"], r["epoch"], r["rows"], r["loss"], r["learning_rate"]) for r in metrics_log.read(storage)]


def test_lines_end_at_multiples_and_hold_means_over_rows(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    c = curve(storage)
    c.extend([commit(s) for s in range(7)])
    assert lines(storage) == [
        (3, 1, 24, (0 + 8 + 16) / 24, 1 / 3),
        (6, 2, 42, (3 * 2 + 4 * 8 + 5 * 8) / 18, 1 / 6),
    ]
    c.flush()
    assert lines(storage)[2:] == [(7, 2, 50, 6.0, 1 / 7)]


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_continued_run_writes_the_lines_of_an_undisturbed_one(tmp_path: Path, stop: int) -> None:
    whole, parts = Storage.open(tmp_path / "whole"), Storage.open(tmp_path / "parts")
    curve(whole).extend([commit(s) for s in range(9)])
    first = curve(parts)
    first.extend([commit(s) for s in range(stop)])
    begun = first.open_line
    first.validation(stop, {"loss": 0.5}, interim=True)
    first.flush(interim=True)
    assert metrics_log.read(parts)[-1]["step"] == stop
    MetricsLog(parts).rewind(stop)
    curve(parts, step=stop, begun=json.loads(json.dumps(begun))).extend([commit(s) for s in range(stop, 9)])
    assert lines(parts) == lines(whole)


def test_an_open_line_that_is_not_finite_stays_so(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    c = curve(storage)
    c.extend([Commit(0, loss=inf, rows=8, rate=0.1, parts=())])
    assert c.open_line == {"loss": None, "rows": 8, "rate": 0.1}
    curve(storage, step=1, begun=c.open_line).extend([commit(1), commit(2)])
    assert [(r["step"], r["loss"]) for r in metrics_log.read(storage)] == [(3, None)]


def test_commits_seen_twice_count_once(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    c = curve(storage)
    c.extend([commit(0), commit(1)])
    c.extend([commit(0), commit(1), commit(2)])
    assert lines(storage) == [(3, 1, 24, 1.0, 1 / 3)]
    assert c.step == 3


def test_recent_is_over_the_last_steps_however_they_come(tmp_path: Path) -> None:
    """Not over the last bunch, which may be one short step: means over as many steps as a line has, here three."""
    c = curve(Storage.open(tmp_path), mean_weight=0.5)
    assert c.recent is None
    c.extend([commit(0), commit(1)])
    assert c.recent == {"loss": 1.0, "learning_rate": 0.5, "rows_per_s": 16.0}
    c.extend([commit(2)])
    assert c.recent == {"loss": 2.0, "learning_rate": 1 / 3, "rows_per_s": 12.0}
    c.extend([commit(3)])
    assert c.recent == {"loss": (8 + 16 + 6) / 18 / 0.5, "learning_rate": 1 / 4, "rows_per_s": 18 / 2.5}


def test_a_gap_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="commit 1 after -1"):
        curve(Storage.open(tmp_path)).extend([commit(1)])
