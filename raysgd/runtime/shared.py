"""The transport of one node: parameters and gradients in shared memory, doorbells instead of messages.

    worker's slots (2 rings x nodes)                     server's board
    step | rows | loss | present | read.. | verdict..    newest | sequence | writing | frozen | diverged
    gradient (n_params,)                                 params of sequence s at s % 2 (3 where staleness is allowed)

    worker: gradient into ring t % 2, step word last, ring the servers ──▶ server: scan, ServerShard.push
    worker: params of version t + 1                  ◀── ring the workers ── server: params first, newest word last

The state machines are those of every other transport, so the bytes are too. A slot of step t is written again at
t + 2, when every shard has taken step t. Under BSP parameters are read in place: version t is written over at t + 2,
which takes this worker's own push of t + 1. Where staleness is allowed they are copied, and copied again if the server
announced in ``writing`` that it took that buffer meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysgd import failpoints
from raysgd.learn.batch import Float32
from raysgd.learn.parameters import Range
from raysgd.protocol.messages import Gone, Halted, Pulled, Push, PushReply, Reply, Request, Verdict
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.tree import Partial
from raysgd.runtime.board import DIVERGED, FROZEN, NEWEST, SEQUENCE, WRITING, Board, BoardAddress, aligned
from raysgd.runtime.process import wake_on_time
from raysgd.runtime.segment import Address, Doorbell, Ringer, Segment

#: seconds after which a waiting process looks at the shared state although no bell rang
RESCAN_S = 0.02

#: times in a row that parameters are copied while the server is faster, before something else is looked at
COPIES = 100

#: waits in vain, one after the other, after which other shards are asked for their part of a norm once more
ASK_AFTER = 16

VERDICTS = tuple(Verdict)

#: words of a slot before those of each shard
STEP, ROWS, LOSS, PRESENT, BY_SHARD = range(5)


def never() -> bool:
    """Nobody has asked to stop."""
    return False


@dataclass(frozen=True, slots=True)
class SlotsAddress:
    """What a server needs to read one worker's gradients."""

    segment: Address
    bell: bytes
    nodes: tuple[Range, ...]
    incarnations: tuple[tuple[int, ...], ...]
    n_params: int
    n_shards: int


class Slots:
    """A worker's gradients of the last two steps, one for each node of its run.

    ``words[at(ring, k) + STEP]`` is written last; that of shard s at BY_SHARD + s is the version it read, and at
    BY_SHARD + n_shards + s its verdict: 8 * step + the index among VERDICTS.
    """

    def __init__(self, segment: Segment, n_nodes: int, n_params: int, n_shards: int) -> None:
        self.segment = segment
        self._n_nodes, self._stride = n_nodes, BY_SHARD + 2 * n_shards
        count = 2 * n_nodes * self._stride
        self.words, self.doubles = segment.longs(count), segment.doubles(count)
        first = self._head_bytes(n_nodes, n_shards)
        self.gradient = [
            [segment.floats(first + (r * n_nodes + k) * aligned(n_params), n_params) for k in range(n_nodes)]
            for r in range(2)
        ]

    def at(self, ring: int, k: int) -> int:
        """Where the words of a slot begin."""
        return (ring * self._n_nodes + k) * self._stride

    @staticmethod
    def _head_bytes(n_nodes: int, n_shards: int) -> int:
        return aligned(2 * 2 * n_nodes * (BY_SHARD + 2 * n_shards))

    @classmethod
    def create(cls, n_nodes: int, n_params: int, n_shards: int) -> Slots:
        size = cls._head_bytes(n_nodes, n_shards) + 2 * n_nodes * aligned(n_params)
        slots = cls(Segment.create(size), n_nodes, n_params, n_shards)
        for i in range(len(slots.words)):
            slots.words[i] = -1
        return slots


class SharedMemory:
    """The worker's side: a :class:`~raysgd.runtime.transport.Transport` for servers of the same node.

    One object serves one assignment: a new one gets fresh memory.
    exact: whether each step is computed from exactly one version (BSP)
    """

    def __init__(
        self,
        boards: Sequence[BoardAddress],
        nodes: tuple[Range, ...],
        incarnations: tuple[tuple[int, ...], ...],
        spans: tuple[Range, ...],
        *,
        exact: bool = True,
        timeout_s: float = 30.0,
    ) -> None:
        self.nodes, self.spans, self.exact, self.timeout_s = nodes, spans, exact, timeout_s
        self.stopped = never
        self._index = {node: k for k, node in enumerate(nodes)}
        self._boards = [Board.attach(address) for address in boards]
        self._bells = [address.bell for address in boards]
        n_params = spans[-1].end
        self._slots = Slots.create(len(nodes), n_params, len(spans))
        self._bell = Doorbell(self._slots.segment.words)
        self._ringer = Ringer()
        self._copy = np.empty(0 if exact else n_params, np.float32)
        #: by shard: the version that an unanswered pull asks for
        self._pulls: dict[int, int] = {}
        #: pushes that no server has judged
        self._pushes: list[Push] = []
        self.address = SlotsAddress(
            self._slots.segment.address, self._bell.name, nodes, incarnations, n_params, len(spans)
        )

    def outputs(self, step: int) -> list[Float32]:
        """Where the sums of the nodes are best computed: (n_params,) each."""
        return self._slots.gradient[step % 2]

    def exchange(self, requests: Sequence[Request], wait: bool = True) -> list[Reply] | None:
        """Lay the pushes out, ring, and return what is answered; ``wait``: until something is."""
        pushes = []
        for request in requests:
            if isinstance(request, Push):
                pushes.append(request)
            else:
                self._pulls[request.shard] = request.version
        if pushes:
            self._lay(pushes)
        replies = self._replies()
        deadline = 0.0
        while wait and not replies:
            now = time.monotonic()
            deadline = deadline or now + self.timeout_s
            if now > deadline:
                return None
            if not self._bell.wait(RESCAN_S, self._answered):
                replies += self._refusals()
            replies += self._replies()
            if not replies and self.stopped():
                break
        return replies

    def close(self) -> None:
        self._bell.close()
        self._ringer.close()
        self._slots.segment.close()

    def _lay(self, pushes: list[Push]) -> None:
        words, n_shards = self._slots.words, len(self.spans)
        for push in pushes:
            k, ring = self._index[push.node], push.step % 2
            at = self._slots.at(ring, k)
            if words[at] == push.step:
                continue  # said before: the slot still holds it
            slot, gradient = self._slots.gradient[ring][k], push.partial.gradient
            if gradient is not None and gradient is not slot and gradient.base is not slot:
                slot[self.spans[push.shard].slice] = gradient
            words[at + BY_SHARD + push.shard] = push.read
            if push.shard == n_shards - 1:
                words[at + ROWS] = push.partial.rows
                self._slots.doubles[at + LOSS] = push.partial.loss
                words[at + PRESENT] = gradient is not None
                words[at] = push.step  # last: from here on servers may read
        # What is said again is answered again, once.
        again = {(p.shard, p.step, p.node) for p in pushes}
        known = [] if self.exact else [p for p in self._pushes if (p.shard, p.step, p.node) not in again]
        self._pushes = known + pushes
        for bell, board in zip(self._bells, self._boards, strict=True):
            self._ringer.ring(bell, board.words)

    def _answered(self) -> bool:
        """Whether a pull can be answered, or a push was judged that must be told of."""
        for shard, version in self._pulls.items():
            words = self._boards[shard].words
            if words[NEWEST] >= version or words[FROZEN] or words[DIVERGED] >= 0:
                return True
        return not self.exact and any(self._verdict(push) is not None for push in self._pushes)

    def _replies(self) -> list[Reply]:
        replies: list[Reply] = []
        for shard, version in list(self._pulls.items()):
            reply = self._pull(shard, version)
            if reply is not None:
                del self._pulls[shard]
                replies.append(reply)
        if not self.exact:
            replies += self._judged()
        return replies

    def _pull(self, shard: int, version: int) -> Reply | None:
        board = self._boards[shard]
        words = board.words
        newest = words[NEWEST]
        if newest < version:
            if not words[FROZEN] and words[DIVERGED] < 0:
                return None
            diverged = words[DIVERGED]
            return Halted(shard, version, diverged if diverged >= 0 else None)
        if not self.exact:
            out = self._copy[self.spans[shard].slice]
            for _ in range(COPIES):
                if (read := board.copy(out)) is not None:
                    return Pulled(shard, read, out)
            return None  # the server may have died after it announced that it writes there
        if words[WRITING] > version + 1:
            return Gone(shard, version, oldest=newest - 1)
        return Pulled(shard, version, board.at(version))

    def _verdict(self, push: Push) -> Verdict | None:
        at = self._slots.at(push.step % 2, self._index[push.node])
        step, verdict = divmod(self._slots.words[at + BY_SHARD + len(self.spans) + push.shard], 8)
        return VERDICTS[verdict] if step == push.step else None

    def _judged(self) -> list[Reply]:
        """Replies to the pushes that were judged since."""
        replies: list[Reply] = []
        waiting = []
        for push in self._pushes:
            verdict = self._verdict(push)  # once: it may come at any moment
            if verdict is None:
                waiting.append(push)
            else:
                replies.append(PushReply(push.shard, push.step, push.node, verdict))
        self._pushes = waiting
        return replies

    def _refusals(self) -> list[Reply]:
        """What the servers refused for good: under BSP looked at only when a wait was in vain."""
        if not self.exact:
            return []
        verdicts = [(push, self._verdict(push)) for push in self._pushes]
        return [
            PushReply(push.shard, push.step, push.node, verdict)
            for push, verdict in verdicts
            if verdict in (Verdict.FENCED, Verdict.MALFORMED, Verdict.STALE)
        ]


class SharedServer:
    """The server's side: a thread that waits at a doorbell, scans the slots and feeds the state machine.

    ``lock`` guards the shard: actor calls take it too. ``on_advance`` is called, under it, when a version is sealed,
    the shard stops, or it has something to say to the others.
    """

    def __init__(self, shard: ServerShard, board: Board, lock: Any, on_advance: Callable[[], None]) -> None:
        self.shard, self.board, self.lock, self.on_advance = shard, board, lock, on_advance
        self._bell = Doorbell(board.words, naps=True)
        self._ringer = Ringer()
        self._workers: list[tuple[SlotsAddress, Slots]] = []
        #: the nodes and incarnations of all slots together, and whether pushes of all of them stand as a whole step
        self._nodes: list[Range] = []
        self._incarnations: list[tuple[int, ...]] = []
        self._stands: tuple[int, bool] = (-1, False)
        #: by ring: the words of each slot and where they begin
        self._heads: tuple[list[tuple[memoryview[int], int]], ...] = ([], [])
        #: where, in a slot's words, this shard's verdict is
        self._verdict_at = 0
        self._closed = False
        #: the first step whose commit is not recorded on the board
        self._recorded = 0
        board.announce(shard.sequence if shard.has_previous else shard.sequence + 1)
        self.publish()
        self._thread = threading.Thread(target=self._serve, name="raysgd-shared-server", daemon=True)
        self._thread.start()

    @property
    def address(self) -> BoardAddress:
        return self.board.address(self._bell.name)

    def attach(self, address: SlotsAddress, span: Range) -> None:
        """From now on read this worker's slots."""
        slots = Slots(Segment.attach(address.segment), len(address.nodes), address.n_params, address.n_shards)
        slots.gradient = [[g[span.slice] for g in ring] for ring in slots.gradient]
        with self.lock:
            self._workers.append((address, slots))
            self._nodes += address.nodes
            self._incarnations += address.incarnations
            self._stands = (-1, False)
            self._verdict_at = BY_SHARD + address.n_shards + self.shard.index
            for ring, heads in enumerate(self._heads):
                heads += [(slots.words, slots.at(ring, k)) for k in range(len(address.nodes))]

    def forget_workers(self) -> None:
        """Read nobody's slots any more, until others are attached."""
        with self.lock:
            self._workers, self._nodes, self._incarnations = [], [], []
            self._stands, self._heads = (-1, False), ([], [])

    def publish(self) -> None:
        """Tell the node how the shard stands: the newest version last. The caller holds the lock."""
        words, shard = self.board.words, self.shard
        if self.board.pushes is None:
            self._recorded = self.board.record(shard.commits, self._recorded)
        words[FROZEN] = shard.frozen
        words[DIVERGED] = -1 if shard.diverged is None else shard.diverged
        told = shard.told
        untold = shard.version - told if self.board.pushes is None else 0
        words[SEQUENCE] = shard.sequence - untold  # a step that the replica lacks is not told yet
        words[NEWEST] = told
        for address, slots in self._workers:
            self._ringer.ring(address.bell, slots.segment.words)

    def wake(self) -> None:
        """Have the slots looked at: what was no time for is taken now."""
        self._ringer.ring(self._bell.name, self.board.words)

    def close(self) -> None:
        self._closed = True
        self.wake()
        self._thread.join()
        self._bell.close()
        self._ringer.close()

    def _serve(self) -> None:
        wake_on_time()
        vain = 0
        while not self._closed:
            vain = 0 if self._bell.wait(RESCAN_S, self._something) else vain + 1
            with self.lock:
                self._scan()
                if vain % ASK_AFTER == ASK_AFTER - 1:
                    self.shard.ask_norms()
                    if self.shard.outbox:
                        self.on_advance()

    def _something(self) -> bool:
        """Whether the slots are worth a scan: all of a step are there, or one where they are taken one by one."""
        if self._closed:
            return True
        if self._whole_step():
            return self._all_here()
        if self.shard.backlogged:
            return False
        return any(words[at] >= 0 and not self._is_judged(words, at) for heads in self._heads for words, at in heads)

    def _scan(self) -> None:
        shard = self.shard
        before = (shard.version, shard.sequence, shard.diverged)
        said = len(shard.outbox)
        if self._whole_step():
            if self._all_here() and not self._take_all():
                self._take_each()
        else:
            self._take_each()
        if (shard.version, shard.sequence, shard.diverged) != before:
            if failpoints.armed:
                failpoints.reach("server.applied", shard.version)
            self.publish()
            if failpoints.armed:
                failpoints.reach("server.published", shard.version)
            self.on_advance()
        elif len(shard.outbox) > said:
            self.on_advance()

    def _whole_step(self) -> bool:
        """Whether all slots together are what a step takes; looked at again after every fence."""
        fences, stands = self._stands
        if fences != self.shard.fences:
            fences, stands = self.shard.fences, self.shard.stands(self._nodes, self._incarnations)
            self._stands = (fences, stands)
        return stands

    def _all_here(self) -> bool:
        version = self.shard.version
        judged = 8 * version
        for words, at in self._heads[version % 2]:
            if words[at] != version or words[at + self._verdict_at] >= judged:
                return False
        return True

    def _take_all(self) -> bool:
        """Offer a whole step at once; False where the shard wants it one by one."""
        version = self.shard.version
        ring = version % 2
        sums = [self._partial(slots, ring, k) for a, slots in self._workers for k in range(len(a.nodes))]
        if not self.shard.push_all(self._nodes, self._incarnations, sums):
            return False
        for words, at in self._heads[ring]:
            words[at + self._verdict_at] = 8 * version  # VERDICTS[0]: accepted
        return True

    def _take_each(self) -> None:
        """Offer every slot that was not judged yet, a worker's older step before its newer one."""
        for address, slots in self._workers:
            for ring in sorted((0, 1), key=lambda r: slots.words[slots.at(r, 0)]):
                for k in range(len(address.nodes)):
                    at = slots.at(ring, k)
                    if self.shard.backlogged:
                        return
                    if slots.words[at] >= 0 and not self._is_judged(slots.words, at):
                        self._offer(address, slots, ring, k)

    def _is_judged(self, words: memoryview[int], at: int) -> bool:
        return words[at + self._verdict_at] // 8 == words[at]

    @staticmethod
    def _partial(slots: Slots, ring: int, k: int) -> Partial:
        at, words = slots.at(ring, k), slots.words
        gradient = slots.gradient[ring][k] if words[at + PRESENT] else None
        return Partial(gradient, slots.doubles[at + LOSS], words[at + ROWS])

    def _offer(self, address: SlotsAddress, slots: Slots, ring: int, k: int) -> None:
        at, words, index = slots.at(ring, k), slots.words, self.shard.index
        step, read = words[at], words[at + BY_SHARD + index]
        sums = self._partial(slots, ring, k)
        reply = self.shard.push(Push(index, step, address.nodes[k], address.incarnations[k], sums, read))
        if reply.verdict is not Verdict.EARLY:  # that one is looked at again
            words[at + self._verdict_at] = 8 * step + VERDICTS.index(reply.verdict)
