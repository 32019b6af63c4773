"""The worker's half for a model of which a step touches few coordinates.

    ┌─▶ touch: which coordinates does step t touch? ─▶ pull them at version t from every shard ──all here─┐
    └── t <- t + 1 ◀── push to every shard ◀── compute step t ◀───────────────────────────────────────────┘

As :class:`~raysgd.protocol.client.Client`: pushes are kept until version t + 1 has been pulled from every shard, which
is also their acknowledgement. The touched coordinates of the next step are found while the servers still work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from raysgd.learn.batch import Float32, Int32
from raysgd.learn.parameters import Range
from raysgd.protocol.client import Done
from raysgd.protocol.membership import Assignment
from raysgd.protocol.messages import Halted, NotYet, PushReply, Verdict
from raysgd.protocol.sparse import SparsePartial, SparsePull, SparsePulled, SparsePush, SparseReply, SparseRequest
from raysgd.protocol.tree import cover

_NONE: Int32 = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Touch:
    """Find the coordinates that the rows of ``step`` touch, below all ``nodes`` together."""

    step: int
    nodes: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class SparseCompute:
    """Compute each node's gradient sum at ``values`` (m,) float32 of the touched coordinates, in their order."""

    step: int
    values: Float32
    nodes: tuple[Range, ...]


SparseInstruction: TypeAlias = SparseRequest | Touch | SparseCompute | Done


class SparseClient:
    """Drives one worker from ``start`` until version ``until`` is committed on every shard; bulk-synchronous.

    ``begin`` starts it; ``touched``, ``handle`` and ``computed`` take what its instructions bring; ``retry`` says again
    whatever is unanswered. Pushes come before the next :class:`Touch`: carry them out first.
    """

    def __init__(
        self, assignment: Assignment, n_virtual: int, spans: tuple[Range, ...], *, start: int, until: int
    ) -> None:
        self.assignment = assignment
        self.spans = spans
        self.nodes = cover(assignment.run, n_virtual)
        self.step = start
        self.until = until
        self.done: Done | None = None
        #: (m,) the touched coordinates of ``step``; None until they are known
        self.ids: Int32 | None = None
        #: (m,) their values at version ``step``, whole once ``_missing`` is empty
        self.values: Float32 = np.empty(0, np.float32)
        #: where each shard's coordinates begin among ids
        self._cuts: list[int] = []
        #: shards whose version ``step`` has not arrived
        self._missing: set[int] = set()
        #: pushes of step - 1, kept until every shard has answered with version ``step``
        self._kept: dict[int, list[SparsePush]] = {}

    def begin(self) -> list[SparseInstruction]:
        self._missing = set(range(len(self.spans)))
        if self.step >= self.until:  # only the acknowledgement is left
            return self._pull(_NONE)
        self.ids = None
        return [Touch(self.step, self.nodes)]

    def touched(self, step: int, ids: Int32) -> list[SparseInstruction]:
        """Take the touched coordinates of ``step``, (m,) int32 ascending: pull them."""
        if self.done is not None or step != self.step or self.ids is not None:
            return []
        return self._pull(ids)

    def handle(self, reply: SparseReply) -> list[SparseInstruction]:
        """Take one reply; stale and repeated ones change nothing."""
        if self.done is not None:
            return []
        if isinstance(reply, PushReply):
            # A frozen or early push says no more than the pull's own answer will.
            refused = reply.verdict in (Verdict.FENCED, Verdict.MALFORMED) and reply.step == self.step - 1
            return self._end(reply.verdict.value, reply.step) if refused else []
        if reply.shard not in self._missing or reply.version != self.step or self.ids is None:
            return []
        if isinstance(reply, SparsePulled):
            return self._pulled(reply) if reply.token == 0 else []  # or else late, and not asked for by a client
        if isinstance(reply, NotYet):
            return [self._ask(reply.shard)]
        if isinstance(reply, Halted):
            reason, step = ("frozen", self.step) if reply.diverged is None else ("diverged", reply.diverged)
            return self._end(reason, step)
        return self._end("gone", self.step)

    def computed(self, step: int, sums: list[SparsePartial]) -> list[SparseInstruction]:
        """Take the sums of ``nodes`` for ``step``: push them, and look for what the next step touches."""
        if self.done is not None or step != self.step or self._missing:
            return []
        self._kept = {
            shard: [self._push(shard, span, node, s) for node, s in zip(self.nodes, sums, strict=True)]
            for shard, span in enumerate(self.spans)
        }
        self.step += 1
        pushes = [push for kept in self._kept.values() for push in kept]
        return [*pushes, *self.begin()]

    def retry(self) -> list[SparseInstruction]:
        """Say again what has not been answered; safe at any time, because shards drop duplicates."""
        if self.done is not None or self.ids is None:
            return []
        missing = sorted(self._missing)
        pushes = (push for shard in missing for push in self._kept.get(shard, []))
        return [*pushes, *(self._ask(shard) for shard in missing)]

    def _pull(self, ids: Int32) -> list[SparseInstruction]:
        self.ids, self.values = ids, np.empty(len(ids), np.float32)
        self._cuts = np.searchsorted(ids, [span.begin for span in self.spans] + [self.spans[-1].end]).tolist()
        return [self._ask(shard) for shard in sorted(self._missing)]

    def _ask(self, shard: int) -> SparsePull:
        assert self.ids is not None
        return SparsePull(shard, self.step, self.ids[self._cuts[shard] : self._cuts[shard + 1]])

    def _push(self, shard: int, span: Range, node: Range, s: SparsePartial) -> SparsePush:
        vector = None if s.vector is None else s.vector.cut(span)
        return SparsePush(
            shard, self.step, node, self.assignment.incarnations_of(node), SparsePartial(vector, s.loss, s.rows)
        )

    def _pulled(self, reply: SparsePulled) -> list[SparseInstruction]:
        self._missing.discard(reply.shard)
        self.values[self._cuts[reply.shard] : self._cuts[reply.shard + 1]] = reply.values
        if self._missing:
            return []
        self._kept = {}
        if self.step >= self.until:
            return self._end("reached", self.step)
        return [SparseCompute(self.step, self.values, self.nodes)]

    def _end(self, reason: str, step: int) -> list[SparseInstruction]:
        self.done = Done(reason, step)
        return [self.done]
