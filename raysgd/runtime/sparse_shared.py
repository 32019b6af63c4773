"""The transport of one node for sparse models: values gathered in place, gradients with their ids in slots.

    worker's slots (2 rings x nodes)                       server's board
    step | rows | loss | present | cuts.. | verdict..      newest | writing | frozen | diverged
    ids (capacity,) int32 | values (capacity,)             params (len(shard),): one copy, written in place

    worker: ids and values into ring t % 2, step word last, ring the servers ──▶ server: scan, SparseShard.push
    worker: gathers version t + 1, and looks whether     ◀── ring the workers ── server: writing, scatter, newest
            the server began to write t + 2 meanwhile

Under BSP nothing is written over while a worker that takes part reads it. Who needs a version that is being written
over (the successor of a lost worker) asks by an actor call: the server answers from its record.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysgd import failpoints
from raysgd.learn.batch import Float32, Int32
from raysgd.learn.parameters import Range
from raysgd.protocol.messages import Halted, PushReply, Verdict
from raysgd.protocol.sparse import (
    Sparse,
    SparsePartial,
    SparsePull,
    SparsePulled,
    SparsePush,
    SparseReply,
    SparseRequest,
)
from raysgd.protocol.sparse_shard import SparseShard
from raysgd.runtime.board import DIVERGED, FROZEN, NEWEST, WRITING, Board, BoardAddress, aligned
from raysgd.runtime.segment import Address, Doorbell, Ringer, Segment
from raysgd.runtime.shared import BY_SHARD, LOSS, PRESENT, RESCAN_S, ROWS, VERDICTS, never


@dataclass(frozen=True, slots=True)
class SparseSlotsAddress:
    """What a server needs to read one worker's gradients. capacity: coordinates of one gradient at most."""

    segment: Address
    bell: bytes
    nodes: tuple[Range, ...]
    incarnations: tuple[tuple[int, ...], ...]
    capacity: int
    n_shards: int


class SparseSlots:
    """A worker's gradients of the last two steps, one for each node of its run.

    ``words[at(ring, k)]`` is the step and written last; from BY_SHARD on where each shard's coordinates begin and
    the last one's end; then each shard's verdict: 8 * step + the index among VERDICTS.
    """

    def __init__(self, segment: Segment, n_nodes: int, capacity: int, n_shards: int) -> None:
        self.segment = segment
        self._n_nodes, self._stride, self._n_shards = n_nodes, BY_SHARD + 2 * n_shards + 1, n_shards
        count = 2 * n_nodes * self._stride
        self.words, self.doubles = segment.longs(count), segment.doubles(count)
        first, size = self._head_bytes(n_nodes, n_shards), aligned(capacity)
        arrays = [segment.floats(first + i * size, capacity) for i in range(4 * n_nodes)]
        self.values = [arrays[r * n_nodes : (r + 1) * n_nodes] for r in range(2)]
        self.ids: list[list[Int32]] = [
            [a.view(np.int32) for a in arrays[(2 + r) * n_nodes : (3 + r) * n_nodes]] for r in range(2)
        ]

    def at(self, ring: int, k: int) -> int:
        """Where the words of a slot begin."""
        return (ring * self._n_nodes + k) * self._stride

    def verdict_at(self, ring: int, k: int, shard: int) -> int:
        """Where a shard's verdict on a slot is."""
        return self.at(ring, k) + BY_SHARD + self._n_shards + 1 + shard

    @staticmethod
    def _head_bytes(n_nodes: int, n_shards: int) -> int:
        return aligned(2 * 2 * n_nodes * (BY_SHARD + 2 * n_shards + 1))

    @classmethod
    def create(cls, n_nodes: int, capacity: int, n_shards: int) -> SparseSlots:
        size = cls._head_bytes(n_nodes, n_shards) + 4 * n_nodes * aligned(capacity)
        slots = cls(Segment.create(size), n_nodes, capacity, n_shards)
        for i in range(len(slots.words)):
            slots.words[i] = -1
        return slots


class SparseSharedMemory:
    """The worker's side: a :class:`~raysgd.runtime.transport.Transport` for servers of the same node.

    One object serves one assignment: a new one gets fresh memory.
    capacity: coordinates of one gradient at most;  call: sends requests to a shard by an actor call
    """

    def __init__(
        self,
        boards: Sequence[BoardAddress],
        nodes: tuple[Range, ...],
        incarnations: tuple[tuple[int, ...], ...],
        spans: tuple[Range, ...],
        capacity: int,
        call: Callable[[int, SparsePull], SparseReply],
        *,
        timeout_s: float = 30.0,
    ) -> None:
        self.nodes, self.spans, self.timeout_s, self._call = nodes, spans, timeout_s, call
        self.stopped = never
        self._index = {node: k for k, node in enumerate(nodes)}
        self._boards = [Board.attach(address) for address in boards]
        self._bells = [address.bell for address in boards]
        self._slots = SparseSlots.create(len(nodes), capacity, len(spans))
        self._bell = Doorbell(self._slots.segment.words)
        self._ringer = Ringer()
        #: by shard: the pull that is not answered
        self._pulls: dict[int, SparsePull] = {}
        #: the pushes laid out last
        self._pushes: list[SparsePush] = []
        self.address = SparseSlotsAddress(
            self._slots.segment.address, self._bell.name, nodes, incarnations, capacity, len(spans)
        )

    def outputs(self, step: int) -> list[Float32]:
        """Where the sums of the nodes are best computed: (capacity,) each."""
        return self._slots.values[step % 2]

    def exchange(self, requests: Sequence[SparseRequest], wait: bool = True) -> list[SparseReply] | None:
        """Lay the pushes out, ring, and return what is answered; ``wait``: until something is."""
        pushes = []
        for request in requests:
            if isinstance(request, SparsePush):
                pushes.append(request)
            else:
                self._pulls[request.shard] = request
        if pushes:
            self._lay(pushes)
        replies = self._replies()
        deadline = time.monotonic() + self.timeout_s
        while wait and not replies:
            if time.monotonic() > deadline:
                return None
            if not self._bell.wait(RESCAN_S, self._answered):
                if self.stopped():
                    break
                replies += self._refusals()
            replies += self._replies()
        return replies

    def close(self) -> None:
        self._bell.close()
        self._ringer.close()
        self._slots.segment.close()

    def _lay(self, pushes: list[SparsePush]) -> None:
        """The pushes of a step: those of a node for all shards come together, in the order of the shards."""
        words, n_shards, end = self._slots.words, len(self.spans), 0
        for push in pushes:
            k, ring, vector = self._index[push.node], push.step % 2, push.partial.vector
            at = self._slots.at(ring, k)
            if words[at] == push.step:
                continue  # said before: the slot still holds it
            cut = at + BY_SHARD + push.shard
            begin = words[cut] if push.shard else 0
            end = begin + (0 if vector is None else len(vector.ids))
            if vector is not None:
                self._slots.ids[ring][k][begin:end] = vector.ids
                values = self._slots.values[ring][k]
                if vector.values.base is not values:
                    values[begin:end] = vector.values
            words[cut], words[cut + 1] = begin, end
            if push.shard == n_shards - 1:
                words[at + ROWS] = push.partial.rows
                self._slots.doubles[at + LOSS] = push.partial.loss
                words[at + PRESENT] = vector is not None
                words[at] = push.step  # last: from here on servers may read
        self._pushes = pushes
        for bell, board in zip(self._bells, self._boards, strict=True):
            self._ringer.ring(bell, board.words)

    def _answered(self) -> bool:
        for shard, pull in self._pulls.items():
            words = self._boards[shard].words
            if words[NEWEST] >= pull.version or words[FROZEN] or words[DIVERGED] >= 0:
                return True
        return False

    def _replies(self) -> list[SparseReply]:
        found = [(shard, self._pull(shard, pull)) for shard, pull in self._pulls.items()]
        for shard, reply in found:
            if reply is not None:
                del self._pulls[shard]
        return [reply for _, reply in found if reply is not None]

    def _pull(self, shard: int, pull: SparsePull) -> SparseReply | None:
        board, version = self._boards[shard], pull.version
        words = board.words
        newest = words[NEWEST]
        if newest < version:
            if not words[FROZEN] and words[DIVERGED] < 0:
                return None
            diverged = words[DIVERGED]
            return Halted(shard, version, diverged if diverged >= 0 else None)
        if newest == version and words[WRITING] <= version:
            begin = self.spans[shard].begin
            values = board.params[0].take(pull.ids - np.int32(begin) if begin else pull.ids, mode="clip")
            if words[WRITING] <= version:
                return SparsePulled(shard, version, values, pull.token)
        return self._call(shard, pull)

    def _refusals(self) -> list[SparseReply]:
        """What the servers refused for good: looked at only when a wait was in vain."""
        replies: list[SparseReply] = []
        for push in self._pushes:
            at = self._slots.verdict_at(push.step % 2, self._index[push.node], push.shard)
            step, verdict = divmod(self._slots.words[at], 8)
            if step == push.step and VERDICTS[verdict] in (Verdict.FENCED, Verdict.MALFORMED):
                replies.append(PushReply(push.shard, push.step, push.node, VERDICTS[verdict]))
        return replies


class SparseSharedServer:
    """The server's side: a thread that waits at a doorbell, scans the slots and feeds the state machine.

    ``lock`` guards the shard: actor calls take it too. ``on_advance`` is called, under it, when a version is sealed or
    the shard stops.
    """

    def __init__(self, shard: SparseShard, board: Board, lock: Any, on_advance: Callable[[], None]) -> None:
        self.shard, self.board, self.lock, self.on_advance = shard, board, lock, on_advance
        self._bell = Doorbell(board.words)
        self._ringer = Ringer()
        self._workers: list[tuple[SparseSlotsAddress, SparseSlots]] = []
        self._closed = False
        #: the first step whose commit is not recorded on the board
        self._recorded = 0
        self.publish()
        self._thread = threading.Thread(target=self._serve, name="raysgd-shared-server", daemon=True)
        self._thread.start()

    @property
    def address(self) -> BoardAddress:
        return self.board.address(self._bell.name)

    def attach(self, address: SparseSlotsAddress, span: Range) -> None:  # noqa: ARG002 - as SharedServer's
        """From now on read this worker's slots."""
        segment = Segment.attach(address.segment)
        slots = SparseSlots(segment, len(address.nodes), address.capacity, address.n_shards)
        with self.lock:
            self._workers.append((address, slots))

    def forget_workers(self) -> None:
        """Read nobody's slots any more, until others are attached."""
        with self.lock:
            self._workers = []

    def publish(self) -> None:
        """Tell the node how the shard stands: the newest version last. The caller holds the lock."""
        words, shard = self.board.words, self.shard
        self._recorded = self.board.record(shard.commits, self._recorded)
        words[FROZEN] = shard.frozen
        words[DIVERGED] = -1 if shard.diverged is None else shard.diverged
        words[NEWEST] = shard.told
        for address, slots in self._workers:
            self._ringer.ring(address.bell, slots.segment.words)

    def wake(self) -> None:
        """Have the slots looked at."""
        self._ringer.ring(self._bell.name, self.board.words)

    def close(self) -> None:
        self._closed = True
        self.wake()
        self._thread.join()
        self._bell.close()
        self._ringer.close()

    def _serve(self) -> None:
        while not self._closed:
            self._bell.wait(RESCAN_S, self._something)
            with self.lock:
                self._scan()

    def _something(self) -> bool:
        return self._closed or any(True for _ in self._unjudged())

    def _unjudged(self) -> list[tuple[SparseSlotsAddress, SparseSlots, int]]:
        """The slots that hold a push of the step at hand and have no verdict on it."""
        version, index = self.shard.version, self.shard.index
        ring = version % 2
        return [
            (address, slots, k)
            for address, slots in self._workers
            for k in range(len(address.nodes))
            if slots.words[slots.at(ring, k)] == version
            and slots.words[slots.verdict_at(ring, k, index)] // 8 != version
        ]

    def _scan(self) -> None:
        shard = self.shard
        before = (shard.version, shard.diverged)
        for address, slots, k in self._unjudged():
            self._offer(address, slots, k, before[0])
        if (shard.version, shard.diverged) != before:
            if failpoints.armed:
                failpoints.reach("server.applied", shard.version)
            self.publish()
            if failpoints.armed:
                failpoints.reach("server.published", shard.version)
            self.on_advance()

    def _offer(self, address: SparseSlotsAddress, slots: SparseSlots, k: int, step: int) -> None:
        ring, index, words = step % 2, self.shard.index, slots.words
        at = slots.at(ring, k)
        vector = None
        if words[at + PRESENT]:
            cut = slice(words[at + BY_SHARD + index], words[at + BY_SHARD + index + 1])
            vector = Sparse(slots.ids[ring][k][cut], slots.values[ring][k][cut])
        partial = SparsePartial(vector, slots.doubles[at + LOSS], words[at + ROWS])
        reply = self.shard.push(SparsePush(index, step, address.nodes[k], address.incarnations[k], partial))
        words[slots.verdict_at(ring, k, index)] = 8 * step + VERDICTS.index(reply.verdict)
