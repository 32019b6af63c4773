"""What a run directory says to who comes to it: which attempt is next, where to go back to, what is left to write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysgd import checkpoint, config
from raysgd.audit import NAME as LEDGER
from raysgd.audit import Ledger
from raysgd.data.moments import shard_statistics
from raysgd.plan import Plan, open_tables, plan_from_statistics
from raysgd.protocol.generation import Generation
from raysgd.report import metrics_log, status
from raysgd.report.metrics_log import MetricsLog
from raysgd.report.status import Status
from raysgd.resume import Beginning, beginning, close_books, complete, curve_from, forget_diverging
from raysgd.storage import Storage

CONFIG = """
[data]
path = "train.parquet"
label = "y"
[model]
type = "linear_regression"
[train]
batch_size = 32
[run]
log_every = 3
"""


class Run:
    """A run of four steps in a directory of its own, as far as a test writes it."""

    def __init__(self, place: Path) -> None:
        x = np.arange(128.0)
        pq.write_table(pa.table({"x": x, "y": x + 1}), place / "train.parquet", row_group_size=32)
        (place / "run.toml").write_text(CONFIG)
        self.spec = config.load(place / "run.toml")
        self.tables = open_tables(self.spec)
        found = [shard_statistics(self.tables.train, s.index) for s in self.tables.train.shards]
        self.plan, _ = plan_from_statistics(self.spec, self.tables, found)
        self.storage = Storage.open(place / "runs" / "run")

    def save(self, step: int, **facts: Any) -> str:
        first = self.plan.initial()
        facts = {**self.plan.facts(), "attempt": 1, **facts}
        found = Generation(step, first.params, first.state)
        return checkpoint.save(self.storage, found, self.plan.learner.layout, facts).digest()

    def begin(self) -> Beginning:
        return beginning(self.storage, self.spec, self.tables, fresh=False)

    def lines(self) -> list[tuple[str, int]]:
        return [(line["kind"], line["step"]) for line in metrics_log.read(self.storage)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def in_status(run: Run) -> None:
    status.write(run.storage, Status("running", attempt=3))


def in_the_manifest(run: Run) -> None:
    run.save(2, attempt=3)


def in_the_ledger(run: Run) -> None:
    ledger = Ledger(run.storage, 3, 0, 1)
    ledger.midway(2)
    ledger.flush()


@pytest.mark.parametrize("told", [in_status, in_the_manifest, in_the_ledger])
def test_no_attempt_has_the_number_of_another(run: Run, told: Callable[[Run], None]) -> None:
    """Whatever of the three is lost."""
    assert run.begin().attempt == 1
    told(run)
    assert run.begin().attempt == 4


def test_a_status_that_counts_below_one_is_none(run: Run) -> None:
    status.write(run.storage, Status("running", attempt=-3))
    assert status.read(run.storage) is None
    run.save(2)
    assert run.begin().attempt == 2


def test_a_damaged_ledger_counts_no_attempts(run: Run) -> None:
    run.storage.write_atomic(LEDGER, b"{}\n")
    assert run.begin().attempt == 1


@pytest.mark.parametrize(
    ("untrained", "losses", "kept"),
    [
        (0.25, {2: 9e73, 3: None}, []),
        (0.25, {2: None}, []),
        (0.25, {2: 0.1, 3: 9e73}, [2]),
        (None, {2: 9e73, 3: 1.0}, [2, 3]),
        (0.25, {2: "not validated"}, [2]),
    ],
)
def test_where_a_run_that_diverges_goes_back_to(
    run: Run, untrained: float | None, losses: dict[int, Any], kept: list[int]
) -> None:
    """To the best of its checkpoints, and to the beginning where that was better than all of them."""
    with MetricsLog(run.storage) as log:
        log.validation(step=0, epoch=0, metrics={"loss": float("nan") if untrained is None else untrained})
    for step, loss in losses.items():
        run.save(step, metrics={} if loss == "not validated" else {"valid_loss": loss})
    forget_diverging(run.storage)
    assert checkpoint.steps(run.storage) == kept


def ended_at(run: Run, step: int, plan: Plan) -> Beginning:
    """A run whose driver wrote all of this and was killed."""
    with MetricsLog(run.storage) as log:
        for at in range(3, step + 1, 3):
            log.train(step=at, epoch=1, rows=32 * at, loss=1.0, learning_rate=0.1, rows_per_s=1e6)
    run.save(step, attempt=2, curve={"loss": 16.0, "rows": 32, "rate": 0.1})
    status.write(run.storage, Status("running", step=3, attempt=2, total_steps=4, digest="before"))
    begin = run.begin()
    assert complete(begin, plan)
    return begin


def test_the_books_of_a_run_that_was_killed_at_its_end_are_closed(run: Run) -> None:
    begin = ended_at(run, 4, run.plan)
    assert run.lines() == [("train", 3)]
    close_books(run.storage, begin, run.plan)
    assert run.lines() == [("train", 3), ("train", 4)]
    last = metrics_log.read(run.storage)[-1]
    assert (last["loss"], last["rows"], last["rows_per_s"], last.get("interim")) == (0.5, 128, None, None)
    found = status.read(run.storage)
    assert found is not None
    assert (found.state, found.exit_code, found.step, found.total_steps, found.attempt) == ("succeeded", 0, 4, 4, 2)
    assert begin.checkpoint is not None
    assert found.digest == begin.checkpoint.digest()
    before = {name: os.stat(run.storage.path(name)).st_ino for name in ("metrics.jsonl", "status.json")}
    close_books(run.storage, begin, run.plan)  # nothing is owed any more
    assert {name: os.stat(run.storage.path(name)).st_ino for name in before} == before


def test_a_line_that_was_written_is_not_written_again(run: Run) -> None:
    begin = ended_at(run, 4, run.plan)
    with MetricsLog(run.storage) as log:
        curve_from(log, begin, run.plan).flush()
    close_books(run.storage, begin, run.plan)
    assert run.lines() == [("train", 3), ("train", 4)]


def test_a_run_that_was_stopped_has_stopped(run: Run) -> None:
    spec = replace(run.spec, run=replace(run.spec.run, stop_after_steps=2))
    plan = replace(run.plan, spec=spec)
    close_books(run.storage, ended_at(run, 2, plan), plan)
    assert json.loads(run.storage.read("status.json"))["state"] == "stopped"
    assert [line.get("interim") for line in metrics_log.read(run.storage)] == [True]
