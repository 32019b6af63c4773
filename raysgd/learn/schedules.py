"""Learning rates as functions of the step, in float64.

A schedule is what the user writes: durations may be counted in epochs. ``resolve`` knows how many steps an
epoch has and gives a plain function, step -> rate, that pickles. Steps count from zero, over all epochs, and
advance by completed rounds, never by pushes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Protocol, TypeAlias, runtime_checkable

from raysgd.errors import InputError
from raysgd.learn.checks import count_problems, flag_problems, float32_problems, number_problems, shown

#: A number of steps, or epochs as text: ``100``, ``"1epoch"``, ``"0.5epoch"``, ``"3epochs"``.
Duration: TypeAlias = int | str

#: step -> learning rate
Rate: TypeAlias = Callable[[int], float]

_EPOCHS = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?|\.\d{1,18})\s*epochs?\s*", re.ASCII)


def duration_problems(name: str, value: object) -> list[str]:
    """Empty where ``value`` is a duration longer than nothing, else one sentence.

    >>> duration_problems("every", "2 weeks")
    ["every must be a number of steps >= 1 or epochs such as '1epoch' or '0.5epoch', got '2 weeks'"]
    """
    if isinstance(value, str):
        match = _EPOCHS.fullmatch(value)
        good = match is not None and Fraction(match[1]) > 0
    else:
        good = not count_problems(name, value)
    if good:
        return []
    return [f"{name} must be a number of steps >= 1 or epochs such as '1epoch' or '0.5epoch', got {shown(value)}"]


def steps_in(duration: Duration, steps_per_epoch: int) -> int:
    """``duration`` in steps: epochs are multiplied exactly, rounded half up, and last one step at least.

    Raises InputError where ``duration`` is malformed.

    >>> steps_in("0.5epoch", 5), steps_in("2epochs", 5), steps_in(7, 5), steps_in("0.01epoch", 5)
    (3, 10, 7, 1)
    """
    return max(1, math.floor(_exact_steps(duration, steps_per_epoch) + _HALF))


def next_multiple(duration: Duration, steps_per_epoch: int, after: int) -> int:
    """The first multiple of ``duration``, as a step, that is greater than ``after`` (>= -1).

    Parts of epochs add up: each multiple is rounded half up by itself, so the ends of epochs are among them.
    Raises InputError where ``duration`` is malformed.

    >>> [next_multiple("0.2epoch", 576, step) for step in (-1, 0, 115, 461, 576)]
    [0, 115, 230, 576, 691]
    """
    every = max(Fraction(1), _exact_steps(duration, steps_per_epoch))
    return math.floor(math.ceil((after + _HALF) / every) * every + _HALF)


_HALF = Fraction(1, 2)


def _exact_steps(duration: Duration, steps_per_epoch: int) -> Fraction:
    if problems := duration_problems("duration", duration):
        raise InputError(problems)
    if not isinstance(duration, str):
        return Fraction(int(duration))
    match = _EPOCHS.fullmatch(duration)
    assert match is not None
    return Fraction(match[1]) * steps_per_epoch


@runtime_checkable
class Schedule(Protocol):
    """A learning rate over the steps of a run."""

    def problems(self) -> list[str]:
        """Every violation, one sentence each, beginning with the field's name."""
        ...

    def resolve(self, steps_per_epoch: int, total_steps: int) -> Rate:
        """The rate as a picklable function of the step, for a run of this many steps."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same rate at every step.

    >>> Constant(0.1).resolve(10, 100)(99)
    0.1
    """

    rate: float

    def problems(self) -> list[str]:
        return float32_problems("rate", self.rate, above=0)

    def resolve(self, steps_per_epoch: int, total_steps: int) -> Rate:  # noqa: ARG002 - the protocol's signature
        return partial(_constant, float(self.rate))


@dataclass(frozen=True)
class ExponentialDecay:
    """``initial * decay_rate ** (t / every)``; with ``staircase``, t / every is rounded down.

    >>> rate = ExponentialDecay(0.1, decay_rate=0.5, every="1epoch").resolve(steps_per_epoch=10, total_steps=50)
    >>> rate(0), rate(10), rate(20)
    (0.1, 0.05, 0.025)
    """

    initial: float
    decay_rate: float
    every: Duration
    staircase: bool = False

    def problems(self) -> list[str]:
        return (
            float32_problems("initial", self.initial, above=0)
            + number_problems("decay_rate", self.decay_rate, above=0, at_most=1)
            + duration_problems("every", self.every)
            + flag_problems("staircase", self.staircase)
        )

    def resolve(self, steps_per_epoch: int, total_steps: int) -> Rate:  # noqa: ARG002 - the protocol's signature
        every = steps_in(self.every, steps_per_epoch)
        return partial(_exponential, float(self.initial), float(self.decay_rate), every, self.staircase)


@dataclass(frozen=True)
class StepDecay:
    """``initial * factor ** k``, k the number of durations in ``at`` that have passed (``t >= at[i]``).

    >>> rate = StepDecay(0.1, factor=0.5, at=("2epochs", 30)).resolve(steps_per_epoch=10, total_steps=50)
    >>> rate(19), rate(20), rate(30)
    (0.1, 0.05, 0.025)
    """

    initial: float
    factor: float
    at: tuple[Duration, ...]

    def problems(self) -> list[str]:
        found = float32_problems("initial", self.initial, above=0)
        found += number_problems("factor", self.factor, above=0, at_most=1)
        if isinstance(self.at, str) or not isinstance(self.at, Sequence) or len(self.at) == 0:
            return [*found, f"at must be a list of one or more durations such as ['2epochs', 500], got {self.at!r}"]
        return found + [p for i, duration in enumerate(self.at) for p in duration_problems(f"at[{i}]", duration)]

    def resolve(self, steps_per_epoch: int, total_steps: int) -> Rate:  # noqa: ARG002 - the protocol's signature
        at = tuple(steps_in(duration, steps_per_epoch) for duration in self.at)
        return partial(_step, float(self.initial), float(self.factor), at)


@dataclass(frozen=True)
class InverseTimeDecay:
    """``initial / (1 + decay_rate * t / every)``; with ``staircase``, t / every is rounded down.

    The classical Robbins-Monro rate: its sum diverges and the sum of its squares converges.

    >>> rate = InverseTimeDecay(0.1, decay_rate=1.0, every="1epoch").resolve(steps_per_epoch=10, total_steps=50)
    >>> rate(0), rate(10), rate(30)
    (0.1, 0.05, 0.025)
    """

    initial: float
    decay_rate: float
    every: Duration
    staircase: bool = False

    def problems(self) -> list[str]:
        return (
            float32_problems("initial", self.initial, above=0)
            + number_problems("decay_rate", self.decay_rate, at_least=0)
            + duration_problems("every", self.every)
            + flag_problems("staircase", self.staircase)
        )

    def resolve(self, steps_per_epoch: int, total_steps: int) -> Rate:  # noqa: ARG002 - the protocol's signature
        every = steps_in(self.every, steps_per_epoch)
        return partial(_inverse_time, float(self.initial), float(self.decay_rate), every, self.staircase)


@dataclass(frozen=True)
class CosineDecay:
    """``final + (initial - final) * (1 + cos(pi * min(t / over, 1))) / 2``; ``over`` is the whole run if None.

    Source: Loshchilov, Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017 (no restarts).

    >>> rate = CosineDecay(0.1).resolve(steps_per_epoch=10, total_steps=50)
    >>> rate(0), round(rate(25), 12), rate(50)
    (0.1, 0.05, 0.0)
    """

    initial: float
    final: float = 0.0
    over: Duration | None = None

    def problems(self) -> list[str]:
        found = float32_problems("initial", self.initial, above=0)
        found += float32_problems("final", self.final, at_least=0)
        return found if self.over is None else found + duration_problems("over", self.over)

    def resolve(self, steps_per_epoch: int, total_steps: int) -> Rate:
        over = max(1, total_steps) if self.over is None else steps_in(self.over, steps_per_epoch)
        return partial(_cosine, float(self.initial), float(self.final), over)


@dataclass(frozen=True)
class WarmUp:
    """``schedule(t) * (t + 1) / over`` while ``t + 1 < over``, then ``schedule(t)``: t is never shifted.

    Source: Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017.

    >>> rate = WarmUp(0.1, over=4).resolve(steps_per_epoch=10, total_steps=50)
    >>> [round(rate(t), 12) for t in range(5)]
    [0.025, 0.05, 0.075, 0.1, 0.1]
    """

    schedule: float | Schedule
    over: Duration

    def problems(self) -> list[str]:
        return rate_problems("schedule", self.schedule) + duration_problems("over", self.over)

    def resolve(self, steps_per_epoch: int, total_steps: int) -> Rate:
        after = as_schedule(self.schedule).resolve(steps_per_epoch, total_steps)
        return partial(_warm_up, after, steps_in(self.over, steps_per_epoch))


@dataclass(frozen=True)
class Lowered:
    """A rate that was halved where training diverged: rate(t) / 2 for each of ``steps`` that is <= t.

    >>> [Lowered(lambda _step: 0.4, (2, 2, 5))(step) for step in (1, 2, 5)]
    [0.4, 0.1, 0.05]
    """

    rate: Rate
    steps: tuple[int, ...]

    def __call__(self, step: int) -> float:
        return math.ldexp(self.rate(step), -sum(begin <= step for begin in self.steps))


def as_schedule(rate: float | Schedule) -> Schedule:
    """A number as the constant schedule; a schedule as it is.

    >>> as_schedule(0.1)
    Constant(rate=0.1)
    """
    return rate if isinstance(rate, Schedule) else Constant(rate)


def rate_problems(name: str, rate: object) -> list[str]:
    """The problems of a learning rate that is a number or a schedule, each beginning with ``name``.

    >>> rate_problems("learning_rate", Constant(-1.0)), rate_problems("learning_rate", 0)
    (['learning_rate.rate must be > 0, got -1.0'], ['learning_rate must be > 0, got 0'])
    """
    if isinstance(rate, Schedule) and not isinstance(rate, type):
        return [f"{name}.{problem}" for problem in rate.problems()]
    return float32_problems(name, rate, above=0)


def _constant(rate: float, step: int) -> float:  # noqa: ARG001 - a function of the step like the others
    return rate


def _periods(step: int, every: int, staircase: bool) -> float:
    return float(step // every) if staircase else step / every


def _exponential(initial: float, decay_rate: float, every: int, staircase: bool, step: int) -> float:
    return initial * math.pow(decay_rate, _periods(step, every, staircase))


def _step(initial: float, factor: float, at: tuple[int, ...], step: int) -> float:
    return initial * math.pow(factor, sum(step >= boundary for boundary in at))


def _inverse_time(initial: float, decay_rate: float, every: int, staircase: bool, step: int) -> float:
    return initial / (1.0 + decay_rate * _periods(step, every, staircase))


def _cosine(initial: float, final: float, over: int, step: int) -> float:
    return final + (initial - final) * (1.0 + math.cos(math.pi * min(step / over, 1.0))) / 2.0


def _warm_up(after: Rate, over: int, step: int) -> float:
    return after(step) * min(1.0, (step + 1) / over)
