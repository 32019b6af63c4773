"""Windows over what workers tell with their signs of life: when one ends, and what is compared."""

from __future__ import annotations

import pytest

from raysgd.learn.parameters import Range
from raysgd.protocol.membership import Assignment
from raysgd.protocol.shares import Measured
from raysgd.runtime import rates
from raysgd.runtime.rates import Meter, Rates, Reading

DEAL = (Assignment(0, Range(0, 2), (5, 5)), Assignment(3, Range(2, 8), (7,) * 6))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(rates.time, "monotonic", lambda: now[0])
    return now


def told(steps: int, incarnation: int = 7) -> dict[int, Reading | None]:
    """After so many steps of 4 s each, in which worker 0 computes 3 s and worker 3 0.6 s."""
    each = {0: (5, 3.0), 3: (incarnation, 0.6)}
    return {w: Reading(i, steps, steps * s, steps * 4.0) for w, (i, s) in each.items()}


def test_a_window_has_its_steps_and_its_seconds(clock: list[float]) -> None:
    found = Rates()
    assert found.take(DEAL, told(0)) is None  # data is being decoded
    assert found.take(DEAL, told(1)) is None
    clock[0] += rates.WINDOW_S - 0.1
    assert found.take(DEAL, told(1 + rates.STEPS)) is None
    clock[0] += 0.2
    assert found.take(DEAL, told(rates.STEPS)) is None
    measured = found.take(DEAL, told(11))
    assert measured == Measured(clock[0], pytest.approx(4.0), {0: pytest.approx(1.5), 3: pytest.approx(0.1)})
    clock[0] += rates.WINDOW_S
    assert found.take(DEAL, told(12)) is None
    assert found.take(DEAL, told(21)) is not None


def test_who_tells_of_another_share_is_waited_for(clock: list[float]) -> None:
    found = Rates()
    found.take(DEAL, told(1))
    clock[0] += rates.WINDOW_S
    assert found.take(DEAL, told(11, incarnation=6)) is None
    assert found.take(DEAL, {**told(11), 3: None}) is None
    assert found.take((), told(11)) is None
    assert found.take(DEAL, told(11)) is not None


def test_a_new_deal_begins_a_new_window(clock: list[float]) -> None:
    found, again = Rates(), (DEAL[0], Assignment(3, Range(2, 8), (8,) * 6))
    found.take(DEAL, told(1))
    clock[0] += rates.WINDOW_S
    assert found.take(again, told(11, incarnation=8)) is None
    clock[0] += rates.WINDOW_S
    assert found.take(again, told(21, incarnation=8)) is not None


def test_a_meter_adds_up() -> None:
    meter = Meter(4)
    meter.step(0.5, 2.0)
    meter.step(0.25, 1.0)
    assert meter.reading == Reading(4, 2, 0.75, 3.0)
