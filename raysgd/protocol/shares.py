"""How many virtual workers each worker carries: all alike, unless one is far slower than the others.

    measured twice in a row ─▶ who is slow? ─▶ would a step take a third less? ─▶ deal by weights
    it rests for a while    ─▶ is it as fast as the others again, or untried? ─▶ deal evenly again

A move stops everybody for a moment and has windows of data decoded anew, so it must be worth it. Whoever is less than
``SLOW`` times slower than the others counts as one of them: where processes share cores, twice as slow comes and goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from raysgd.learn.parameters import Range

#: times slower than the others: from here on a worker is slow; below this one that was slow is so no longer
SLOW, RECOVERED = 3.0, 1.5

#: a move must leave this much of a step's time: away from a slow worker, and back to it
WORTH_IT, WORTH_TRYING = 2 / 3, 0.9

#: seconds between two moves, whatever is measured
QUIET_S = 10.0

#: seconds before a slow worker is dealt with as the others again; doubled each time that it is found slow
REST_S, LONGEST_REST_S = 30.0, 960.0


@dataclass(frozen=True, slots=True)
class Measured:
    """How fast the carriers of the newest deal were, over a while.

    at: seconds of a clock that never jumps;  step_s: seconds that a step took
    seconds: by worker: seconds of computing that one virtual worker's part of a step took
    """

    at: float
    step_s: float
    seconds: Mapping[int, float]


def shared(n_virtual: int, costs: Sequence[float]) -> list[int]:
    """How many virtual workers each worker carries so that the last is done soonest. costs: seconds of each for one

    >>> shared(8, [1.0, 1.0, 1.0]), shared(8, [1.0, 10.0, 1.0, 1.0]), shared(64, [1.0, 10.0, 1.0, 1.0])
    ([2, 3, 3], [3, 0, 3, 2], [21, 2, 21, 20])
    """
    n = len(costs)
    if len(set(costs)) == 1:
        return [b - a for a, b in pairwise(i * n_virtual // n for i in range(n + 1))]
    counts = [0] * n
    for _ in range(n_virtual):
        counts[min(range(n), key=lambda i: ((counts[i] + 1) * costs[i], counts[i], i))] += 1
    return counts


def runs_of(counts: Sequence[int]) -> list[Range]:
    """Contiguous runs of so many virtual workers.

    >>> runs_of([3, 0, 1])
    [Range(begin=0, end=3), Range(begin=3, end=3), Range(begin=3, end=4)]
    """
    return [Range(a, b) for a, b in pairwise(accumulate(counts, initial=0))]


@dataclass
class Pace:
    """Who is slow, by what was measured."""

    #: by slow worker: how many times slower than the others
    slow: dict[int, float] = field(default_factory=dict)
    #: by worker that was ever slow: how long it rests, and until when
    _rest: dict[int, tuple[float, float]] = field(default_factory=dict)
    #: who seemed slow when it was measured last
    _seemed: frozenset[int] = frozenset()
    _moved_at: float = float("-inf")

    def forget(self, worker: int) -> None:
        self.slow.pop(worker, None)
        self._rest.pop(worker, None)

    def describe(self, counts: Mapping[int, int]) -> str:
        """Who is slow, and carries how many virtual workers: for people."""
        told = [
            f"worker {w} is {times:.1f} times slower than the others and carries {counts.get(w, 0)}"
            for w, times in self.slow.items()
        ]
        return (
            f"{'; '.join(told)} of {sum(counts.values())} virtual workers" if told else "all workers carry alike again"
        )

    def seems(self, measured: Measured) -> dict[int, float]:
        """Who is slow by what was just measured, and how much."""
        unit = _typical(measured)
        found = {}
        for worker, seconds in measured.seconds.items():
            times = seconds / unit
            resting = worker in self.slow and measured.at < self._rest[worker][1]
            if times >= SLOW or (worker in self.slow and (resting or times >= RECOVERED)):
                found[worker] = max(times, RECOVERED)
        for worker, times in self.slow.items():  # those who carry nothing are not measured: they are tried
            if worker not in measured.seconds and measured.at < self._rest[worker][1]:
                found[worker] = times
        return found

    def moves(
        self, measured: Measured, seems: dict[int, float], now: Mapping[int, int], then: Mapping[int, int]
    ) -> bool:
        """Whether to deal as ``then`` (virtual workers by worker), because of who ``seems`` slow; it is noted if so.

        Not at the first sight, not soon after another move, and only for a good part of a step's time.
        """
        confirmed, self._seemed = frozenset(seems) == self._seemed, frozenset(seems)
        if not confirmed or then == now or measured.at < self._moved_at + QUIET_S:
            return False
        unit = _typical(measured)
        cost = {w: measured.seconds.get(w, unit * seems.get(w, 1.0)) for w in {*now, *then}}
        saved = max(n * cost[w] for w, n in now.items()) - max(n * cost[w] for w, n in then.items())
        back = seems.keys() < self.slow.keys()
        if measured.step_s - saved > (WORTH_TRYING if back else WORTH_IT) * measured.step_s:
            return False
        for worker in seems.keys() - self.slow.keys():
            rest = min(2 * self._rest[worker][0], LONGEST_REST_S) if worker in self._rest else REST_S
            self._rest[worker] = rest, measured.at + rest
        self.slow, self._moved_at = dict(seems), measured.at
        return True


def _typical(measured: Measured) -> float:
    """Seconds of the worker in the middle, of two the faster one."""
    ordered = sorted(measured.seconds.values())
    return ordered[(len(ordered) - 1) // 2]
