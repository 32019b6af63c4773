"""How fast the workers compute: told with their signs of life, and compared over windows of a few seconds.

    a worker's loop ─▶ Meter ─▶ the answer to ``beat`` ─▶ Rates ─▶ Measured, for the membership

A window begins after the first step of a deal, in which data is decoded, and ends when ``WINDOW_S`` seconds are over
and every carrier has done ``STEPS`` steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from raysgd.protocol.membership import Assignment
from raysgd.protocol.shares import Measured

#: seconds and steps that a window has at least
WINDOW_S, STEPS = 2.0, 5


class Reading(NamedTuple):
    """What a worker did since it was given its share. ``incarnation``: which share;  times in seconds."""

    incarnation: int
    steps: int = 0
    compute_s: float = 0.0
    #: computing and waiting
    loop_s: float = 0.0


class Meter:
    """Kept by a worker's loop; read by another thread, whole."""

    def __init__(self, incarnation: int) -> None:
        self.reading = Reading(incarnation)

    def step(self, compute_s: float, loop_s: float) -> None:
        """One more step: for so long was computed, and so long it took with the waiting before."""
        incarnation, steps, computed, looped = self.reading
        self.reading = Reading(incarnation, steps + 1, computed + compute_s, looped + loop_s)


class Rates:
    """Compares the carriers of one deal."""

    def __init__(self) -> None:
        self._began = 0.0
        #: what the carriers had done when the window began, and under which deal
        self._base: dict[int, Reading] = {}
        self._deal: tuple[Assignment, ...] = ()

    def take(self, deal: tuple[Assignment, ...], told: Mapping[int, Reading | None]) -> Measured | None:
        """What was measured, where a window has ended. told: by worker, the newest that it told"""
        now = time.monotonic()
        readings = {a.worker: r for a in deal if (r := told.get(a.worker)) and r.incarnation == a.incarnations[0]}
        if len(readings) < len(deal) or min((r.steps for r in readings.values()), default=0) < 1:
            return None
        if deal is not self._deal:
            self._began, self._base, self._deal = now, readings, deal
            return None
        done = {w: r.steps - self._base[w].steps for w, r in readings.items()}
        if now < self._began + WINDOW_S or min(done.values()) < STEPS:
            return None
        each = {a.worker: (readings[a.worker].compute_s - self._base[a.worker].compute_s) / len(a.run) for a in deal}
        step_s = max((r.loop_s - self._base[w].loop_s) / done[w] for w, r in readings.items())
        self._began, self._base = now, readings
        return Measured(now, step_s, {w: seconds / done[w] for w, seconds in each.items()})
