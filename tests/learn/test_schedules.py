"""Learning-rate schedules against their closed forms."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import pytest

from raysgd.errors import InputError
from raysgd.learn.schedules import (
    Constant,
    CosineDecay,
    ExponentialDecay,
    InverseTimeDecay,
    Schedule,
    StepDecay,
    WarmUp,
    as_schedule,
    duration_problems,
    next_multiple,
    steps_in,
)

EPOCH, TOTAL = 40, 200

CLOSED_FORMS = [
    (Constant(0.3), lambda _t: 0.3),
    (ExponentialDecay(0.1, 0.5, "1epoch"), lambda t: 0.1 * 0.5 ** (t / 40)),
    (ExponentialDecay(0.1, 0.5, "0.5epoch", staircase=True), lambda t: 0.1 * 0.5 ** (t // 20)),
    (ExponentialDecay(0.1, 0.9, 7), lambda t: 0.1 * math.exp(math.log(0.9) * t / 7)),
    (StepDecay(0.1, 0.2, ("1epoch", 90)), lambda t: 0.1 * (1 if t < 40 else 0.2 if t < 90 else 0.2**2)),
    (InverseTimeDecay(0.1, 2.0, "1epoch"), lambda t: 0.1 / (1 + 2 * t / 40)),
    (InverseTimeDecay(0.1, 2.0, 30, staircase=True), lambda t: 0.1 / (1 + 2 * (t // 30))),
    (CosineDecay(0.1), lambda t: 0.1 * math.cos(math.pi * t / 400) ** 2),
    (
        CosineDecay(0.1, final=0.02, over="2epochs"),
        lambda t: 0.02 + 0.08 * math.cos(math.pi * min(t, 80) / 160) ** 2,
    ),
    (WarmUp(0.1, 25), lambda t: 0.1 * min(1, (t + 1) / 25)),
    (
        WarmUp(ExponentialDecay(0.1, 0.5, "1epoch"), "0.25epoch"),
        lambda t: 0.1 * 0.5 ** (t / 40) * min(1, (t + 1) / 10),
    ),
]


@pytest.mark.parametrize(("schedule", "closed_form"), CLOSED_FORMS, ids=lambda x: getattr(x, "__name__", repr(x)))
def test_the_rate_is_the_closed_form_at_every_step_and_pickles(schedule, closed_form):
    assert isinstance(schedule, Schedule)
    assert schedule.problems() == []
    rate = pickle.loads(pickle.dumps(schedule.resolve(EPOCH, TOTAL)))
    for step in range(TOTAL + 1):
        got = rate(step)
        assert type(got) is float
        assert got == pytest.approx(closed_form(step), rel=1e-12, abs=1e-15)


def test_the_schedule_does_not_stop_where_a_run_stops_early():
    assert CosineDecay(0.1, final=0.01).resolve(10, 50)(80) == pytest.approx(0.01)


def test_a_warm_up_of_one_step_changes_nothing():
    assert WarmUp(0.1, 1).resolve(10, 50)(0) == 0.1


@pytest.mark.parametrize(
    ("duration", "steps"),
    [(1, 1), (250, 250), ("1epoch", 40), ("1 epoch", 40), ("3epochs", 120), ("0.5epoch", 20), (".1epochs", 4)],
)
def test_durations_in_steps(duration, steps):
    assert steps_in(duration, EPOCH) == steps


def test_durations_round_half_up_and_last_one_step_at_least():
    assert [steps_in("0.5epoch", n) for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert steps_in("0.1epoch", 10**17) == 10**16  # exactly: 0.1 is a decimal here, not a double
    assert steps_in("0.001epoch", 3) == 1


@pytest.mark.parametrize("duration", ["0.2epoch", "0.3epochs", "1epoch", "1.5epoch", "0.001epoch", 1, 7, 1000])
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 40, 577])
def test_multiples_are_exact_and_each_is_rounded(duration, steps_per_epoch):
    length = duration if isinstance(duration, int) else Fraction(duration.split("epoch")[0]) * steps_per_epoch
    end = 4 * max(length, steps_per_epoch)
    steps = {math.floor(k * length + Fraction(1, 2)) for k in range(4000 if length < 1 else 1 + int(end / length))}
    found, step = [], -1
    while (step := next_multiple(duration, steps_per_epoch, step)) <= end:
        found.append(step)
    assert found == (sorted(s for s in steps if s <= end) if length >= 1 else list(range(int(end) + 1)))


def test_fifths_of_an_epoch_end_with_the_epochs():
    due = [s for s in range(1, 2 * 577 + 1) if next_multiple("0.2epoch", 577, s - 1) == s]
    assert due == [115, 231, 346, 462, 577, 692, 808, 923, 1039, 1154]


@pytest.mark.parametrize(
    "duration",
    [
        0,
        -1,
        1.5,
        True,
        None,
        "",
        "epoch",
        "0epoch",
        "-1epoch",
        "1 week",
        "100",
        "1e3epochs",
        "nanepochs",
        "infepoch",
        "٣epochs",
    ],
)
def test_malformed_durations_are_refused(duration):
    expected = f"every must be a number of steps >= 1 or epochs such as '1epoch' or '0.5epoch', got {duration!r}"
    assert duration_problems("every", duration) == [expected]
    with pytest.raises(InputError, match="duration must be a number of steps"):
        steps_in(duration, EPOCH)


@pytest.mark.parametrize(
    ("schedule", "fields"),
    [
        (Constant(0), ["rate"]),
        (Constant("fast"), ["rate"]),
        (Constant(math.nan), ["rate"]),
        (ExponentialDecay(-1, 1.5, 0, "yes"), ["initial", "decay_rate", "every", "staircase"]),
        (StepDecay(math.inf, 0, ()), ["initial", "factor", "at"]),
        (StepDecay(0.1, 0.5, "1epoch"), ["at"]),
        (StepDecay(0.1, 0.5, (3, 0, "2 weeks")), ["at[1]", "at[2]"]),
        (InverseTimeDecay(True, -1, None, 1), ["initial", "decay_rate", "every", "staircase"]),
        (CosineDecay(0.1, -0.1, "soon"), ["final", "over"]),
        (WarmUp(-1, 0), ["schedule", "over"]),
        (WarmUp(Constant(-1), 5), ["schedule.rate"]),
    ],
)
def test_every_violation_is_named_by_its_field(schedule, fields):
    assert [problem.split(" ")[0] for problem in schedule.problems()] == fields


def test_as_schedule():
    cosine = CosineDecay(0.1)
    assert as_schedule(cosine) is cosine
    assert as_schedule(0.5) == Constant(0.5)
