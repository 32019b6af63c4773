"""Which pushes count at a server shard, dense or sparse: malformed? fenced? timely? And what was committed.

push ─▶ malformed? ─▶ fenced? ─▶ duplicate? frozen? early? stale? ─▶ the pending sum ─ complete ─▶ the shard's business
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from raysgd.learn.batch import Int64
from raysgd.learn.parameters import Range
from raysgd.protocol.clock import Clocks
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.messages import Halted, Norms, NotYet, Verdict
from raysgd.protocol.replica import Copied
from raysgd.protocol.tree import is_node

#: messages that a replica may lack before its primary takes nothing more, or as many as two steps have at most
BACKLOG = 16

#: records that a replica keeps: of what its primary may not have told the driver yet
KEPT_COMMITS = 8192


class Commit(NamedTuple):
    """The record of one sealed step. parts: (node, incarnations, rows) as they were accepted.

    A tuple, because thousands a second go to the driver: as such they pickle in half the time.

    staleness: the most steps that the version lagged which a part was computed from
    steps: that it covers, where ``step`` is not a round's number but its first step
    """

    step: int
    loss: float
    rows: int
    rate: float
    parts: tuple[tuple[Range, tuple[int, ...], int], ...]
    staleness: int = 0
    steps: int = 1


class Tagged(Protocol):
    """What a push says of itself, whatever it carries."""

    @property
    def step(self) -> int: ...

    @property
    def node(self) -> Range: ...

    @property
    def incarnations(self) -> tuple[int, ...]: ...

    @property
    def partial(self) -> Any: ...

    @property
    def read(self) -> int: ...


class Sum(Protocol):
    """The parts of one step as they arrive: :class:`~raysgd.protocol.tree.TreeSum` or its sparse sibling."""

    @property
    def parts(self) -> Mapping[Range, Any]: ...

    def offer(self, node: Range, partial: Any) -> bool: ...


S = TypeVar("S", bound=Sum)


class Gate(Generic[S]):
    """The judgement that all shards share; what they do with a complete step is their own."""

    def __init__(self, index: int, n_virtual: int, pending: S, step: int, consistency: Consistency | None) -> None:
        self.index = index
        self.n_virtual = n_virtual
        self.consistency = consistency or Consistency()
        self.clocks = Clocks(n_virtual, start=step)
        #: the incarnation that may push for each virtual worker; only ever raised
        self.incarnations = [0] * n_virtual
        #: raised by every fence: what was known of incarnations before must be looked at again
        self.fences = 0
        self.frozen = False
        #: the step whose result was not finite and so was never sealed
        self.diverged: int | None = None
        self.commits: list[Commit] = []
        #: what other shards must be told; whoever carries messages takes it from here
        self.outbox: list[Norms] = []
        #: what is known of this shard's replica, where it has one
        self.copied: Copied | None = None
        self._pending = pending
        self._pending_incarnations: dict[Range, tuple[int, ...]] = {}

    @property
    def version(self) -> int:
        """The newest sealed version."""
        raise NotImplementedError

    @property
    def told(self) -> int:
        """The newest version that anybody may know of: where there is a replica, it holds that too."""
        return self.version if self.copied is None else min(self.version, self.copied.version)

    @property
    def told_clocks(self) -> Int64:
        """(n_virtual,) steps committed of each virtual worker that anybody may know of."""
        steps: Int64 = self.clocks.steps.copy()
        return steps if self.copied is None else np.minimum(steps, self.told)

    @property
    def held_clocks(self) -> Int64:
        """(n_virtual,) where whoever carries virtual workers from now on is to begin."""
        return self.told_clocks

    @property
    def backlogged(self) -> bool:
        """Whether the replica lacks so much that nothing more should be taken for now."""
        return self.copied is not None and len(self.copied.unconfirmed) >= max(BACKLOG, 2 * self.n_virtual)

    def fence(self, run: Range, incarnation: int) -> int:
        """From now on only ``incarnation`` may push for ``run``; returns the step where a successor begins."""
        self.fences += 1
        for v in range(run.begin, run.end):
            self.incarnations[v] = max(self.incarnations[v], incarnation)
        return self.clocks.of(run)

    def freeze(self) -> int:
        """Take no more pushes; returns the newest version that may be told. The minimum over shards is committed."""
        self.frozen = True
        return self.told

    def drain(self, since: int) -> list[Commit]:
        """The commits of steps >= ``since`` that may be told; older ones are forgotten."""
        self.commits = [c for c in self.commits if c.step >= since]
        told = self.told
        return [c for c in self.commits if c.step < told]

    def _forget_commits(self) -> None:
        """As a replica, which is not asked for them, keep those alone that its primary may not have told."""
        if len(self.commits) > 2 * KEPT_COMMITS:
            del self.commits[:-KEPT_COMMITS]

    def _later(self, version: int) -> NotYet | Halted:
        """The answer to a pull of a version that is not sealed."""
        if self.frozen or self.diverged is not None:
            return Halted(self.index, version, self.diverged)
        return NotYet(self.index, version)

    def _shaped(self, push: Any) -> bool:
        """Whether a push's gradient has the right shape and type."""
        raise NotImplementedError

    def _judge(self, push: Tagged) -> Verdict:
        """What becomes of a push."""
        known = is_node(push.node, self.n_virtual) and len(push.incarnations) == len(push.node)
        if not known or not self._shaped(push):
            return Verdict.MALFORMED
        if not self._current(push):
            return Verdict.FENCED
        return self._timely(push)

    def _current(self, push: Tagged) -> bool:
        """The fence: every incarnation named is the one that holds now."""
        return tuple(self.incarnations[push.node.slice]) == push.incarnations

    def _timely(self, push: Tagged) -> Verdict:
        """Whether the step at hand is the push's, and the node is not here yet; then it is pending."""
        if push.step < self.version:
            return Verdict.DUPLICATE
        if self.frozen or self.diverged is not None:
            return Verdict.FROZEN
        if push.step > self.version:
            return Verdict.EARLY
        if not self.consistency.admits(push.step, push.read):
            return Verdict.STALE
        if not self._pending.offer(push.node, push.partial):
            return Verdict.DUPLICATE
        self._pending_incarnations[push.node] = push.incarnations
        return Verdict.ACCEPTED
