"""The worker's half: what to pull, compute, push, and say again.

    ┌─▶ pull, until every shard's version is new enough ──▶ compute step t ──▶ push to every shard ─┐
    └──────────────────────────────────── t <- t + 1 ◀──────────────────────────────────────────────┘

A pushed gradient is kept, and pushed again when asked, until the shard has said that it counts, or has answered with a
version that it is in. Under BSP the next step needs version t + 1 from every shard, which is that answer; where
staleness is allowed the next step begins at once if what was pulled before is new enough, and the newest answer is
taken when it comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from raysgd.learn.batch import Float32
from raysgd.learn.parameters import Range
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.membership import Assignment
from raysgd.protocol.messages import Gone, Halted, NotYet, Pull, Pulled, Push, PushReply, Reply, Request, Verdict
from raysgd.protocol.tree import Partial, cover

#: steps whose pushes may be unanswered when the next is computed: a worker has memory for the gradients of two
UNANSWERED = 1


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute, for each node, the sum of its leaves' gradients at ``params`` (n_params,) for ``step``."""

    step: int
    params: Float32
    nodes: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The loop has ended. ``reason``: reached | fenced | frozen | diverged | gone | malformed | stale."""

    reason: str
    step: int


Instruction: TypeAlias = Request | Compute | Done


class Client:
    """Drives one worker from ``start`` until version ``until`` is committed on every shard.

    ``spans`` are the server shards' ranges of the flat vector. ``begin`` starts it; ``handle`` takes every reply;
    ``computed`` takes the result of a :class:`Compute`; ``retry`` says again whatever is unanswered.

    nodes: what it pushes sums of; default: the cover of the assignment's run
    """

    def __init__(
        self,
        assignment: Assignment,
        n_virtual: int,
        spans: tuple[Range, ...],
        *,
        start: int,
        until: int,
        consistency: Consistency | None = None,
        nodes: tuple[Range, ...] | None = None,
    ) -> None:
        self.assignment = assignment
        self.spans = spans
        self.nodes = cover(assignment.run, n_virtual) if nodes is None else nodes
        self._incarnations = [assignment.incarnations_of(node) for node in self.nodes]
        self.consistency = consistency or Consistency()
        self.step = start
        self.until = until
        self.done: Done | None = None
        #: (n_params,) what was pulled last, shard by shard
        self.params: Float32 = np.empty(spans[-1].end, np.float32)
        #: for each shard the version in ``params``, and the version that an unanswered pull asks for
        self._read = [-1] * len(spans)
        self._asked: list[int | None] = [None] * len(spans)
        self._computing = False
        #: by shard, step and node: pushes that are not known to count
        self._kept: dict[tuple[int, int, Range], Push] = {}

    def begin(self) -> list[Instruction]:
        return self._pulls()

    def handle(self, reply: Reply) -> list[Instruction]:
        """Take one reply; stale and repeated ones change nothing."""
        if self.done is not None:
            return []
        if isinstance(reply, Pulled):
            return self._pulled(reply)
        if isinstance(reply, PushReply):
            return self._pushed(reply)
        if self._asked[reply.shard] != reply.version:
            return []
        if isinstance(reply, NotYet):
            self._asked[reply.shard] = self._wanted
            return [Pull(reply.shard, self._wanted)]
        if isinstance(reply, Halted):
            reason, step = ("frozen", self.step) if reply.diverged is None else ("diverged", reply.diverged)
            return self._end(reason, step)
        assert isinstance(reply, Gone), reply
        return self._end("gone", self.step)

    def computed(self, step: int, sums: list[Partial]) -> list[Instruction]:
        """Take the sums of ``nodes`` for ``step``: push them, and ask for the next version."""
        if self.done is not None or step != self.step:
            return []
        pushes: list[Instruction] = []
        for shard, span in enumerate(self.spans):
            for node, incarnations, s in zip(self.nodes, self._incarnations, sums, strict=True):
                gradient = s.gradient
                if gradient is not None and len(self.spans) > 1:
                    gradient = gradient[span.slice]
                push = Push(shard, step, node, incarnations, Partial(gradient, s.loss, s.rows), self._read[shard])
                self._kept[shard, step, node] = push
                pushes.append(push)
        self.step += 1
        self._computing = False
        return pushes + self._pulls() + self._go()

    def retry(self) -> list[Instruction]:
        """Say again what has not been answered; safe at any time, because shards drop duplicates."""
        if self.done is not None:
            return []
        pulls: list[Instruction] = [Pull(shard, v) for shard, v in enumerate(self._asked) if v is not None]
        return [*self._kept.values(), *pulls]

    @property
    def _wanted(self) -> int:
        """The version that is needed next: at the end exactly the last, for what comes after."""
        return self.until if self.step >= self.until else self.consistency.oldest(self.step)

    def _pulls(self) -> list[Instruction]:
        """Ask every shard that is not asked already, for the newest it has from the version that is needed on."""
        wanted = self._wanted
        pulls: list[Instruction] = []
        for shard, asked in enumerate(self._asked):
            if asked is None:
                self._asked[shard] = wanted
                pulls.append(Pull(shard, wanted))
        return pulls

    def _go(self) -> list[Instruction]:
        """Compute, or end, if all that it takes is there."""
        if self._computing or min(self._read) < self._wanted:
            return []
        if self.step >= self.until:
            return self._end("reached", self.step)
        if any(step < self.step - UNANSWERED for _, step, _ in self._kept):
            return []
        self._computing = True
        return [Compute(self.step, self.params, self.nodes)]

    def _pulled(self, reply: Pulled) -> list[Instruction]:
        shard, version = reply.shard, reply.version
        if self._asked[shard] is None or version < self._read[shard]:
            return []
        if self.consistency.exact and version != self._asked[shard]:
            return []
        self._asked[shard] = None
        self._read[shard] = version
        if len(self.spans) > 1:
            self.params[self.spans[shard].slice] = reply.params
        elif self.consistency.exact:
            self.params = reply.params
        else:
            self.params[...] = reply.params  # what is being computed takes the newest there is
        for key in [k for k in self._kept if k[0] == shard and k[1] < version]:
            del self._kept[key]
        if version < self._wanted:
            return self._pulls()
        return self._go()

    def _pushed(self, reply: PushReply) -> list[Instruction]:
        key = (reply.shard, reply.step, reply.node)
        if key not in self._kept:
            return []
        if reply.verdict in (Verdict.FENCED, Verdict.MALFORMED, Verdict.STALE):
            return self._end(reply.verdict.value, reply.step)
        if self.consistency.exact or reply.verdict is Verdict.FROZEN:
            return []  # says no more than the pull's own answer will
        if reply.verdict is Verdict.EARLY:
            return [self._kept[key]]  # overtook one of the step before
        del self._kept[key]
        return self._go()

    def _end(self, reason: str, step: int) -> list[Instruction]:
        self.done = Done(reason, step)
        return [self.done]
