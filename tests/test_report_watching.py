"""How a run stands, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysgd.report import status, summary
from raysgd.report.metrics_log import MetricsLog, epoch_loss, read
from raysgd.report.status import Status
from raysgd.report.watching import GIVEN_UP_S, SILENT_S, follow, look, silent
from raysgd.storage import Storage


class Clock:
    """A wall clock that stands until it is moved."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path)


def line(storage: Storage, clock: Clock, step: int, loss: float = 0.5) -> None:
    MetricsLog(storage, clock).train(
        step=step, epoch=1, rows=32 * step, loss=loss, learning_rate=0.1, rows_per_s=3200.0
    )


def test_before_anything_is_written(storage: Storage) -> None:
    facts = look(storage)
    assert (facts["state"], facts["step"], facts["silent_s"]) == ("never started", 0, None)
    assert summary.standing(facts).splitlines()[0].split() == ["state", "never", "started"]


def test_a_run_that_goes_on(storage: Storage, clock: Clock) -> None:
    status.write(storage, Status("running", step=20, total_steps=100, digest="ab"), clock)
    line(storage, clock, 40)
    MetricsLog(storage, clock).validation(step=40, epoch=1, metrics={"loss": 0.6})
    clock.time += 5
    facts = look(storage, clock)
    assert (facts["step"], facts["checkpoint_step"], facts["silent_s"]) == (40, 20, 5.0)
    assert (facts["train_loss"], facts["valid_loss"]) == (0.5, 0.6)
    assert facts["seconds_left"] == 60 * 32 / 3200.0
    assert not silent(facts)
    text = summary.standing(facts)
    assert "last news" in text
    assert "0:00:05 ago" in text


def test_a_run_that_fell_silent(storage: Storage, clock: Clock) -> None:
    status.write(storage, Status("running", total_steps=100), clock)
    clock.time += SILENT_S + 1
    facts = look(storage, clock)
    assert silent(facts)
    assert "no news for 0:01:01: the driver may be dead" in summary.watched({**facts, "silent": True})
    status.write(storage, Status("interrupted", total_steps=100), clock)
    clock.time += SILENT_S + 1
    assert not silent(look(storage, clock))


def test_what_cannot_be_read_is_not_known(storage: Storage, clock: Clock) -> None:
    storage.write_atomic("status.json", b"{")
    storage.write_atomic("metrics.jsonl", b'{"kind": "train", "step": 3, "epoch": 1, "time": 7}\n{"kin')
    facts = look(storage, clock)
    assert (facts["state"], facts["step"], facts["silent_s"]) == ("never started", 3, None)


def test_changes_are_followed_to_the_end(storage: Storage, clock: Clock) -> None:
    status.write(storage, Status("running", total_steps=100), clock)
    ahead: list[Any] = [
        lambda: line(storage, clock, 40),
        lambda: None,
        lambda: status.write(storage, Status("failed", step=40, total_steps=100, message="no"), clock),
    ]

    def sleep(seconds: float) -> None:
        assert seconds == 2.5
        ahead.pop(0)()

    found = list(follow(storage, 2.5, clock, sleep))
    assert [(f["state"], f["step"]) for f in found] == [("running", 0), ("running", 40), ("failed", 40)]
    assert found[-1]["exit_code"] == 1
    assert summary.watched({**found[-1], "silent": False}) == "failed · 40/100 steps · loss 0.5 · no"


def test_silence_is_told_once(storage: Storage, clock: Clock) -> None:
    status.write(storage, Status("running", total_steps=100), clock)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        clock.time += 50
        if len(naps) == 5:
            status.write(storage, Status("succeeded", step=100, total_steps=100), clock)

    found = list(follow(storage, 1.0, clock, sleep))
    assert [silent(f) for f in found] == [False, True, False]


def test_after_long_silence_nobody_follows_any_more(storage: Storage, clock: Clock) -> None:
    status.write(storage, Status("running", total_steps=100), clock)

    def sleep(_: float) -> None:
        clock.time += 60
        assert clock.time < 1_000_000 + GIVEN_UP_S + 120

    found = list(follow(storage, 1.0, clock, sleep))
    assert [silent(f) for f in found] == [False, True]
    assert found[-1]["exit_code"] is None


def test_the_last_line_alone_tells_neither_loss_nor_speed(storage: Storage, clock: Clock) -> None:
    """It may be of one step: the loss is the epoch's, as the run tells it, the speed that of the newest lines."""
    log = MetricsLog(storage, clock)
    for step, epoch, loss, speed in ((10, 1, 9.0, 2e6), (20, 2, 0.5, 2e6), (21, 2, 0.6, 1e5)):
        log.train(step=step, epoch=epoch, rows=100 * step, loss=loss, learning_rate=0.1, rows_per_s=speed)
    facts = look(storage)
    assert facts["train_loss"] == epoch_loss(read(storage)) == pytest.approx((10 * 0.5 + 0.6) / 11)
    assert facts["rows_per_s"] == pytest.approx(2_100 / (2_000 / 2e6 + 100 / 1e5))


def test_numbers_have_separators() -> None:
    assert [summary.value(v) for v in (248_295.3, 24_829.5, 2_482.95, 0.57478, 1e20)] == [
        "248,295", "24,830", "2,482.9", "0.57478", "1e+20",
    ]  # fmt: skip
