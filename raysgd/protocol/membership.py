"""Who carries which virtual worker: a state machine over joins and losses, and the incarnations that fence the past.

    joined | stillborn | left | silent | draining | measured | committed
        ──Membership.handle──▶ Assign | Start | Kill | Wait | Fail

Pure: events in, decisions out; the driver carries them out. :class:`Assign` means: raise the incarnations at every
server shard, await that, read the clocks, and start each worker where those of its run stand. Nothing else is needed to
go on exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from raysgd.learn.batch import Int64
from raysgd.learn.parameters import Range
from raysgd.protocol.shares import Measured, Pace, runs_of, shared
from raysgd.protocol.tree import pieces

#: seconds before a replacement that follows the second loss without progress; doubled at each further one
BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 30.0

#: workers that hang in one step before the step is to blame
HANGS_IN_ONE_STEP = 3


@dataclass(frozen=True, slots=True)
class Assignment:
    """A contiguous run of virtual workers, carried by one worker, with one incarnation for each of them."""

    worker: int
    run: Range
    incarnations: tuple[int, ...]

    def incarnations_of(self, node: Range) -> tuple[int, ...]:
        """The incarnations of the virtual workers of ``node``, which lies inside the run."""
        begin = self.run.begin
        return self.incarnations[node.begin - begin : node.end - begin]


@dataclass(frozen=True, slots=True)
class Share:
    """What a worker is to carry: its assignment, the nodes that it pushes sums of, and the version it begins at."""

    assignment: Assignment
    nodes: tuple[Range, ...]
    start: int

    @classmethod
    def at(cls, assignment: Assignment, n_virtual: int, clocks: Sequence[Int64]) -> Share:
        """From the clocks (n_virtual,) of every server shard, read after the fence: the least that it must push."""
        run = assignment.run
        start = min(int(c[run.slice].min()) for c in clocks)
        return cls(assignment, pieces(run, n_virtual, clocks), start)


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker is up and can carry virtual workers. node: the name of its node, None where it is unknown."""

    worker: int
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """A worker's process is dead: known, not suspected. why: for people.

    charged: against the budget of losses; not, where several are lost at once and another one was
    """

    worker: int
    why: str
    charged: bool = True


@dataclass(frozen=True, slots=True)
class Stillborn:
    """A worker that was asked for died while it started. why: for people, names it"""

    why: str


@dataclass(frozen=True, slots=True)
class Silent:
    """A worker answers nothing and gains no CPU time. step: committed so far;  seconds: for how long"""

    worker: int
    step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Draining:
    """A worker's node will go: it hands over while it can, another is asked for at once, no failure is charged."""

    worker: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The run has reached ``step``: losses before it are forgotten."""

    step: int


@dataclass(frozen=True, slots=True)
class Assign:
    """From now on exactly these workers carry all virtual workers. why: for people, where shares move"""

    assignments: tuple[Assignment, ...]
    why: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """Ask the cluster for ``count`` more workers, not before ``after_s`` seconds from now."""

    count: int
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Kill:
    """Make a worker's death true; :class:`Left` follows."""

    worker: int
    why: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nobody can carry the virtual workers: wait for one to join. living: those that are being killed"""

    living: int


@dataclass(frozen=True, slots=True)
class Fail:
    """End the run. why: for people"""

    why: str


Event: TypeAlias = Joined | Stillborn | Left | Silent | Draining | Measured | Committed
Decision: TypeAlias = Assign | Start | Kill | Wait | Fail


def deal(n_virtual: int, n_workers: int, costs: Sequence[float] = ()) -> tuple[Range, ...]:
    """``n_virtual`` virtual workers as ``n_workers`` contiguous runs that differ by at most one.

    costs: of one virtual worker for each; where they differ, the last is to be done soonest, and a run may be empty

    >>> deal(8, 3)
    (Range(begin=0, end=2), Range(begin=2, end=5), Range(begin=5, end=8))
    """
    assert 1 <= n_workers <= n_virtual, (n_workers, n_virtual)
    return tuple(runs_of(shared(n_virtual, costs or [1.0] * n_workers)))


def backoff(failures: int) -> float:
    """Seconds before a replacement is started after so many losses without progress.

    >>> [backoff(n) for n in (0, 1, 2, 3, 4, 7, 5000)]
    [0.0, 0.0, 1.0, 2.0, 4.0, 30.0, 30.0]
    """
    return min(LONGEST_BACKOFF_S, BACKOFF_S * 2.0 ** min(failures - 2, 30)) if failures > 1 else 0.0


class Membership:
    """The living workers and the current incarnation of every virtual worker, which is only ever raised.

    n_virtual: virtual workers;  least, most: workers to begin with, and to carry them at once
    max_failures: losses without progress that are borne; -1: any number
    """

    def __init__(self, n_virtual: int, least: int = 1, most: int | None = None, max_failures: int = -1) -> None:
        self.n_virtual = n_virtual
        self.least, self.most = least, min(n_virtual, least if most is None else most)
        self.max_failures = max_failures
        self.incarnations = [0] * n_virtual
        #: by worker, in the order in which they are neighbours: its node
        self.living: dict[int, str | None] = {}
        self.assignments: tuple[Assignment, ...] = ()
        #: losses since the last progress
        self.failures = 0
        #: who is far slower than the others
        self.pace = Pace()
        #: workers that were asked for in vain since the last that came and carried something until a commit
        self._in_vain = 0
        self._proven: set[int] = set()
        self._draining: set[int] = set()
        self._killed: dict[int, str] = {}
        self._begun = False
        #: the furthest step that was reached
        self._step = 0
        #: the step in which a carrier hung last, and how many did
        self._hung_step, self._hung = 0, 0

    def handle(self, event: Event) -> list[Decision]:
        """Take one event; what concerns no living worker changes nothing."""
        if isinstance(event, Committed):
            return self._committed(event.step)
        if isinstance(event, Joined):
            return self._joined(event)
        if isinstance(event, Measured):
            return self._measured(event)
        if isinstance(event, Stillborn):
            self._in_vain += 1
            return self.charge(event.why) or [Start(1, self._pause())]
        if event.worker not in self.living:
            return []
        if isinstance(event, Left):
            return self._left(event)
        if isinstance(event, Silent):
            return self._silent(event)
        return self._drains(event.worker)

    def assign(self, worker: int, run: Range) -> Assignment:
        """Give ``run`` to ``worker`` under fresh incarnations.

        The caller raises them at every server shard, and awaits that, before the worker may push.
        """
        fresh = max(self.incarnations[run.slice]) + 1
        self.incarnations[run.slice] = [fresh] * len(run)
        return Assignment(worker, run, (fresh,) * len(run))

    def charge(self, why: str) -> list[Decision]:
        """Count a loss against the budget; Fail where it is used up."""
        self.failures += 1
        if 0 <= self.max_failures < self.failures:
            borne = f"{self.max_failures} are borne" if self.max_failures else "none is borne"
            return [Fail(f"{why}; losses without progress: {self.failures}, {borne} (run.failure_config.max_failures)")]
        return []

    def refence(self) -> list[Decision]:
        """The same workers once more, under fresh incarnations: after a server was replaced."""
        return self._deal(anew=True)

    def _joined(self, event: Joined) -> list[Decision]:
        if event.worker in self.living:
            return []
        self.living[event.worker] = event.node
        if not self._begun and len(self.living) < self.least:
            return []
        self._begun = True
        return self._deal()

    def _left(self, event: Left) -> list[Decision]:
        del self.living[event.worker]
        self.pace.forget(event.worker)
        why = self._killed.pop(event.worker, event.why)
        if event.worker in self._draining:  # announced: another was asked for then
            self._draining.remove(event.worker)
            self._proven.discard(event.worker)
            return self._deal()
        if event.charged and event.worker not in self._proven:
            self._in_vain += 1
        self._proven.discard(event.worker)
        if event.charged and (failed := self.charge(f"worker {event.worker} was lost: {why}")):
            return failed
        return [Start(1, self._pause()), *self._deal()]

    def _pause(self) -> float:
        """Others make progress while workers die as they start: that forgives the losses, and does not make haste."""
        return backoff(max(self.failures, self._in_vain))

    def _silent(self, event: Silent) -> list[Decision]:
        if event.worker in self._killed:
            return []
        why = f"it hung for {event.seconds:.1f} s in step {event.step}: no answer, and no CPU time"
        self._killed[event.worker] = why
        if any(a.worker == event.worker for a in self.assignments):  # a spare one hangs in no step
            if event.step != self._hung_step:
                self._hung_step, self._hung = event.step, 0
            self._hung += 1
            if self._hung >= HANGS_IN_ONE_STEP:
                return [Fail(f"step {event.step} hangs: {self._hung} workers in a row hung in it, last {event.worker}")]
        return [Kill(event.worker, why)]

    def _drains(self, worker: int) -> list[Decision]:
        if worker in self._draining:
            return []
        self._draining.add(worker)
        return [Start(1), *self._deal()]

    def _measured(self, event: Measured) -> list[Decision]:
        now = {a.worker: len(a.run) for a in self.assignments}
        if not now or event.seconds.keys() != now.keys() or min(event.seconds.values()) <= 0:
            return []  # of others than those who carry now
        seems = self.pace.seems(event)
        then = {worker: len(run) for worker, run in self._runs(seems)}
        if not then:  # all are being killed: those who come next are dealt to
            return []
        return self._deal(why=self.pace.describe(then)) if self.pace.moves(event, seems, now, then) else []

    def _committed(self, step: int) -> list[Decision]:
        if step > self._step:
            self.failures, self._step = 0, step
            carriers = {a.worker for a in self.assignments}
            if not carriers <= self._proven:
                self._in_vain = 0
                self._proven |= carriers
        return []

    def _deal(self, anew: bool = False, why: str = "") -> list[Decision]:
        """All virtual workers to those who stay; to those who go where nobody stays. To nobody who is being killed.

        Where the same workers would carry the same, nothing changes unless ``anew``.
        """
        if not self._begun:
            return []
        runs = self._runs(self.pace.slow)
        if runs == [(a.worker, a.run) for a in self.assignments] and not anew:
            return []
        self.assignments = tuple(self.assign(worker, run) for worker, run in runs)
        return [Assign(self.assignments, why) if runs else Wait(len(self.living))]

    def _runs(self, slow: Mapping[int, float]) -> list[tuple[int, Range]]:
        """Who would carry what, neighbours by node, if those were slow: less, or nothing at all."""
        able = [w for w in self.living if w not in self._killed]
        staying = [w for w in able if w not in self._draining] or able
        nodes = list(dict.fromkeys(self.living[w] for w in staying))
        staying.sort(key=lambda w: nodes.index(self.living[w]))
        chosen = sorted(staying, key=lambda w: slow.get(w, 1.0))[: self.most]
        carriers = [w for w in staying if w in chosen]
        if not carriers:
            return []
        runs = deal(self.n_virtual, len(carriers), [slow.get(w, 1.0) for w in carriers])
        return [(w, run) for w, run in zip(carriers, runs, strict=True) if len(run)]
