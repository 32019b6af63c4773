"""Signs of life. An actor is hung if it answers nothing for a while *and* gains no CPU time: one that computes, or has
numpy hold the interpreter's lock, is busy and left alone.

    beat unanswered ──1 s──▶ note its CPU time ──3 s──▶ the same CPU time still? hung
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

#: seconds of silence after which an actor's CPU time is noted, and after which it must have grown
SUSPECT_S, SILENT_S = 1.0, 3.0

#: seconds of silence after which one is hung of whom nobody can tell the CPU time
UNKNOWN_S = 15.0

#: the most seconds of silence that count between two looks: who was stopped himself has heard nobody
LONGEST_LOOK_S = 0.5


class Pulse:
    """The signs of life of one actor.

    silent_s: seconds without an answer, as far as somebody listened;  told: the newest answer
    """

    def __init__(self) -> None:
        self.silent_s = 0.0
        self.told: Any = None
        self._beat: Any = None
        self._seen = time.monotonic()
        #: CPU time when silence began to be suspicious
        self._ticks: int | None = None
        self._noted = False

    def look(self, beat: Callable[[], Any], cpu_ticks: Callable[[], int | None]) -> bool:
        """Whether the actor is hung. beat: sends a call;  cpu_ticks: its CPU time, None where nobody can tell

        Raises what Ray raises where the actor is dead.
        """
        now = time.monotonic()
        waited, self._seen = min(now - self._seen, LONGEST_LOOK_S), now
        if self._beat is not None and ray.wait([self._beat], timeout=0)[0]:
            answered, self._beat = self._beat, None
            self.told = ray.get(answered)
            self.silent_s, self._noted = 0.0, False
        elif self._beat is not None:
            self.silent_s += waited
        if self._beat is None:
            self._beat = beat()
        if self.silent_s >= SUSPECT_S and not self._noted:
            self._ticks, self._noted = cpu_ticks(), True
        if self.silent_s < SILENT_S:
            return False
        ticks = cpu_ticks()
        if ticks is None or self._ticks is None:
            return self.silent_s >= UNKNOWN_S
        if ticks > self._ticks:  # busy: it is watched further
            self.silent_s, self._ticks = SUSPECT_S, ticks
            return False
        return True
