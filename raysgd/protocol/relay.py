"""A node's stand-in for a server shard that is elsewhere: what to pass on, and when.

    workers of the node ── push ─▶ parts of step t ── a node of the cover complete ─▶ push(its sum), pull(t+1) ─▶ shard
                        ◀─ version t+1, once for all of them ───────────────────────────────────────────────────┘

To the workers it looks like the shard: it takes pushes, and tells when it is frozen, diverged, or when they are fenced.
To the shard it looks like a worker that carries all their virtual workers. It judges nothing that the shard judges, and
holds nothing that the workers could not say again: a successor starts empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np

from raysgd.learn.parameters import Range
from raysgd.protocol.messages import Gone, Halted, NotYet, Pull, Pulled, Push, PushReply, Reply, Request, Verdict
from raysgd.protocol.tree import TreeSum, cover, is_node

#: requests go to the shard; Pulled is to be shown to the workers, Halted too; a PushReply is for who sent that push
Instruction: TypeAlias = Request | Pulled | Halted | PushReply


def whole_nodes(nodes: Iterable[Range], n_leaves: int) -> tuple[Range, ...]:
    """The maximal nodes of the tree over ``n_leaves`` leaves that ``nodes`` fill, left to right.

    >>> whole_nodes([Range(6, 8), Range(1, 2), Range(4, 6)], 8)
    (Range(begin=1, end=2), Range(begin=4, end=8))
    """
    runs: list[Range] = []
    for node in sorted(nodes):
        if runs and node.begin <= runs[-1].end:
            runs[-1] = Range(runs[-1].begin, max(runs[-1].end, node.end))
        else:
            runs.append(node)
    return tuple(node for run in runs for node in cover(run, n_leaves))


class Relay:
    """The state machine for one far shard on one node; ``cover``: the nodes of the tree that are passed on whole.

    A push that lies in none of them is passed on as it is, so the cover changes traffic, never the bytes.

    ``ask`` begins it; ``push`` takes what the workers say and ``ready`` says what follows; ``handle`` takes the shard's
    replies; ``retry`` says again whatever is unanswered. For bulk-synchronous training only.
    """

    def __init__(self, index: int, n_virtual: int) -> None:
        self.index, self.n_virtual = index, n_virtual
        self.cover: tuple[Range, ...] = ()
        #: the newest version that this node has seen; -1: none
        self.version = -1
        self.frozen = False
        #: the step whose result was not finite
        self.diverged: int | None = None
        #: the version that the shard is being asked for
        self._wanted: int | None = None
        #: the highest incarnation seen of each virtual worker: what is older is not worth a message
        self._seen = [0] * n_virtual
        #: pushes of step ``version``: disjoint nodes of the tree, each under the newest incarnations seen
        self._parts: dict[Range, Push] = {}
        #: what the shard was told of step ``version``, and under which incarnations
        self._said: dict[Range, tuple[int, ...]] = {}
        #: nodes of the cover that the shard refused: their parts speak for themselves until the step is over
        self._split: set[Range] = set()

    def ask(self, version: int) -> list[Request]:
        """A worker needs ``version``."""
        if version <= self.version or self._wanted is not None:
            return []
        self._wanted = version
        return [Pull(self.index, version)]

    def push(self, push: Push) -> PushReply:
        """Take a worker's push; ACCEPTED says that it will be passed on, no more."""
        verdict = self._judge(push)
        if verdict is Verdict.ACCEPTED:
            for node in [p for p in self._parts if _overlap(p, push.node)]:
                del self._parts[node]  # summed again in this one, or of an older incarnation
            self._parts[push.node] = push
            self._seen[push.node.slice] = push.incarnations
        return PushReply(self.index, push.step, push.node, verdict)

    def ready(self) -> list[Request]:
        """The sums that have become complete; behind the last of a step, the pull of the next version."""
        if self._stopped:
            return []
        asks: list[Request] = []
        for node, parts in self._complete():
            incarnations = _incarnations(parts)
            if self._said.get(node) != incarnations:
                self._said[node] = incarnations
                asks.append(self._sum(node, parts))
        if self._wanted is None and self._said and all(node in self._said for node in self._units()):
            asks += self.ask(self.version + 1)
        return asks

    def handle(self, request: Request, reply: Reply) -> list[Instruction]:
        """Take the shard's reply to ``request``; stale and repeated ones change nothing."""
        if isinstance(reply, PushReply):
            assert isinstance(request, Push), request
            refused = reply.verdict in (Verdict.FENCED, Verdict.MALFORMED, Verdict.STALE)
            return self._refused(request, reply) if refused and request.step == self.version else []
        if reply.version != self._wanted or self._stopped:
            return []
        if isinstance(reply, NotYet):
            return [Pull(self.index, reply.version)]
        if isinstance(reply, Gone):
            self._wanted = reply.oldest
            return [Pull(self.index, reply.oldest)]
        if isinstance(reply, Halted):
            self.frozen, self.diverged = reply.diverged is None, reply.diverged
        else:
            self.version, self._wanted = reply.version, None
            self._split.clear()
        self._parts.clear()
        self._said.clear()
        return [reply]

    def retry(self) -> list[Request]:
        """Say again what has not been answered; safe at any time, because shards drop duplicates."""
        if self._stopped:
            return []
        said = [self._sum(node, parts) for node, parts in self._complete() if node in self._said]
        return [*said, *([] if self._wanted is None else [Pull(self.index, self._wanted)])]

    @property
    def _stopped(self) -> bool:
        return self.frozen or self.diverged is not None

    def _judge(self, push: Push) -> Verdict:
        if not is_node(push.node, self.n_virtual) or len(push.incarnations) != len(push.node):
            return Verdict.MALFORMED
        if any(i < seen for i, seen in zip(push.incarnations, self._seen[push.node.slice], strict=True)):
            return Verdict.FENCED
        if push.step < self.version:
            return Verdict.DUPLICATE
        if self._stopped:
            return Verdict.FROZEN
        if push.step > self.version:
            return Verdict.EARLY
        above = next((p for p in self._parts.values() if _inside(push.node, p.node)), None)
        if above is None:
            return Verdict.ACCEPTED
        first = push.node.begin - above.node.begin
        same = above.incarnations[first : first + len(push.node)] == push.incarnations
        return Verdict.DUPLICATE if same else Verdict.ACCEPTED

    def _units(self) -> list[Range]:
        return [node for node in self.cover if node not in self._split]

    def _complete(self) -> Iterator[tuple[Range, list[Push]]]:
        """The nodes that can be passed on, with the parts they are made of, left to right."""
        units = self._units()
        for unit in units:
            parts = [self._parts[p] for p in sorted(self._parts) if _inside(p, unit)]
            if sum(len(p.node) for p in parts) == len(unit):
                yield unit, parts
        for node in sorted(self._parts):
            if not any(_inside(node, unit) for unit in units):
                yield node, [self._parts[node]]

    def _sum(self, node: Range, parts: list[Push]) -> Push:
        if len(parts) == 1:
            return parts[0]
        tree = TreeSum(self.n_virtual, node)
        tree.parts = {p.node: p.partial for p in parts}
        with np.errstate(over="ignore", invalid="ignore"):  # the shard refuses what is not finite
            return Push(self.index, self.version, node, _incarnations(parts), tree.total(), min(p.read for p in parts))

    def _refused(self, push: Push, reply: PushReply) -> list[Instruction]:
        """Somebody below the node no longer carries it. Where several do, each is asked about by itself."""
        part = self._parts.get(push.node)
        if part is not None:
            if part.incarnations != push.incarnations:
                return []  # its successor's part is here already
            del self._parts[push.node]
            return [reply]
        if push.node not in self.cover or self._said.get(push.node) != push.incarnations:
            return []
        self._split.add(push.node)
        return [*self.ready()]


def _inside(node: Range, other: Range) -> bool:
    return other.begin <= node.begin and node.end <= other.end


def _overlap(node: Range, other: Range) -> bool:
    return node.begin < other.end and other.begin < node.end


def _incarnations(parts: list[Push]) -> tuple[int, ...]:
    return tuple(i for p in parts for i in p.incarnations)
