"""The relay of a node: to its workers a board for each server shard that is elsewhere, to those servers one worker.

    workers' slots ── scanned ──▶ Relay, one for each far shard ── one call a shard and step ──▶ servers elsewhere
    boards of this node ◀── version t + 1, written once for all workers ──────────── reply ───────────┘

A thread in a worker's actor. It decides nothing (:mod:`raysgd.protocol.relay` does) and holds nothing that the slots do
not hold. Gradients travel as arguments of the call: Ray moves the large ones through its object store before the
server's method begins, so a server never waits for one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import ray

from raysgd.errors import RunError
from raysgd.learn.parameters import Range
from raysgd.protocol.messages import Pull, Pulled, Push, PushReply, Reply, Request
from raysgd.protocol.relay import Relay, whole_nodes
from raysgd.protocol.tree import Partial
from raysgd.runtime.board import DIVERGED, FROZEN, NEWEST, SEQUENCE, Board, BoardAddress
from raysgd.runtime.segment import ASLEEP, Doorbell, Ringer, Segment
from raysgd.runtime.shared import BY_SHARD, LOSS, PRESENT, RESCAN_S, ROWS, VERDICTS, Slots, SlotsAddress
from raysgd.runtime.transport import ServerLostError

#: a call without an answer is said again after this long; servers answer within a second
TIMEOUT_S = 30.0

#: how long to leave a server alone that Ray cannot reach at the moment
PAUSE_S = 0.5

#: sends requests to one server: its replies, one for each in their order, when they come
Send: TypeAlias = Callable[[list[Request]], "Future[list[Reply]]"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a relay sent to other nodes and got from them, since it began.

    nodes: the cover of the tree that it passes on whole;  shards: the servers elsewhere
    pushes: gradients that were sent, each of one node of the tree and one shard, repeated ones included
    repeated: calls that were said again;  versions: pulled, counted once a shard
    """

    nodes: tuple[Range, ...]
    shards: tuple[int, ...]
    calls: int = 0
    pushes: int = 0
    pushed_bytes: int = 0
    versions: int = 0
    pulled_bytes: int = 0
    repeated: int = 0

    def describe(self) -> str:
        """One line for people.

        >>> Traffic((Range(4, 8),), (0,), 40, 40, 2_000_000, 41, 2_050_000).describe()
        'virtual workers [4,8) to server 0: 40 pushes (2,000,000 bytes), 41 versions pulled (2,050,000 bytes)'
        """
        joined = [[n.begin, n.end] for n in self.nodes[:1]]
        for before, node in pairwise(self.nodes):
            if node.begin == before.end:
                joined[-1][1] = node.end
            else:
                joined.append([node.begin, node.end])
        runs = " ".join(f"[{begin},{end})" for begin, end in joined)
        servers = f"server{'s' * (len(self.shards) > 1)} {', '.join(map(str, self.shards))}"
        again = f", {self.repeated} calls said again" if self.repeated else ""
        return (
            f"virtual workers {runs} to {servers}: {self.pushes:,} pushes ({self.pushed_bytes:,} bytes), "
            f"{self.versions:,} versions pulled ({self.pulled_bytes:,} bytes){again}"
        )


def actor_calls(server: Any) -> Send:
    """Requests to a server actor, arrays in the call itself."""
    return lambda requests: server.exchange.remote(requests).future()


class _Far:
    """One far shard: its state machine, its board on this node, and the calls that are on their way."""

    def __init__(self, shard: int, span: Range, send: Send, n_virtual: int) -> None:
        self.span, self.send = span, send
        self.relay = Relay(shard, n_virtual)
        self.board = Board.create(len(span))
        self.board.words[NEWEST] = self.board.words[DIVERGED] = -1
        self.board.words[ASLEEP] = 1  # for good: workers always ring, because the relay's thread never spins
        #: when each call without an answer was made, by its number
        self.calls: dict[int, float] = {}
        #: when to say everything again, after Ray could not reach the server
        self.again_at: float | None = None

    def show(self, pulled: Pulled) -> None:
        """Write a version to the board, over that of two steps before."""
        board, version = self.board, pulled.version
        # After a leap the other buffer holds no version that anyone may read.
        board.announce(version if board.words[NEWEST] == version - 1 else version + 1)
        np.copyto(board.at(version), pulled.params)
        board.words[SEQUENCE] = version
        board.words[NEWEST] = version


class NodeRelay:
    """Stands in for the servers in ``far`` on this node, from :meth:`ask` on; ``boards``: where their parameters are.

    far: how to send to each server shard that is elsewhere;  spans: of all shards
    """

    def __init__(
        self, far: Mapping[int, Send], spans: Sequence[Range], n_virtual: int, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.n_virtual, self.timeout_s = n_virtual, timeout_s
        self.failure: RunError | None = None
        self._far = {shard: _Far(shard, spans[shard], send, n_virtual) for shard, send in far.items()}
        self._members: list[tuple[SlotsAddress, Slots]] = []
        self._answers: queue.SimpleQueue[tuple[_Far, int, list[Request], Future[list[Reply]]]] = queue.SimpleQueue()
        self._calls = self._pushes = self._pushed_bytes = self._versions = self._pulled_bytes = self._repeated = 0
        self._asleep = memoryview(bytearray(8)).cast("q")
        self._bell = Doorbell(self._asleep)
        self._ringer = Ringer()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="raysgd-relay", daemon=True)
        self._thread.start()

    @property
    def boards(self) -> dict[int, BoardAddress]:
        return {
            shard: BoardAddress(far.board.segment.address, self._bell.name, len(far.span))
            for shard, far in self._far.items()
        }

    def attach(self, address: SlotsAddress) -> None:
        """From now on read this worker's slots; whose virtual workers it took over is not read any more."""
        slots = Slots(Segment.attach(address.segment), len(address.nodes), address.n_params, address.n_shards)
        with self._lock:
            self._members = [m for m in self._members if not _succeeds(address, m[0])] + [(address, slots)]
            nodes = whole_nodes([node for a, _ in self._members for node in a.nodes], self.n_virtual)
            for far in self._far.values():
                far.relay.cover = nodes
        self._wake()

    def ask(self, version: int) -> None:
        """The workers begin at ``version``."""
        with self._lock:
            for far in self._far.values():
                self._send(far, far.relay.ask(version))

    def traffic(self) -> Traffic:
        with self._lock:
            nodes = next(iter(self._far.values())).relay.cover
            counts = (self._calls, self._pushes, self._pushed_bytes, self._versions, self._pulled_bytes, self._repeated)
            return Traffic(nodes, tuple(self._far), *counts)

    def check(self) -> None:
        """Raises RunError where the relay has ended: its boards then say that no newer version will come."""
        if self.failure is not None:
            raise self.failure
        if not self._thread.is_alive():
            raise RunError("the relay of this node failed; the log of its worker says why")

    def close(self) -> None:
        self._closed = True
        self._wake()
        self._thread.join()
        self._bell.close()
        self._ringer.close()
        for far in self._far.values():
            far.board.segment.close()

    def _serve(self) -> None:
        try:
            while not self._closed:
                # No spinning: the worker beside this thread computes.
                self._bell.wait(RESCAN_S, lambda: not self._answers.empty(), spin_s=0.0)
                with self._lock:
                    self._turn()
        except RunError as error:
            self.failure = error
        finally:
            self._stop()

    def _turn(self) -> None:
        """Take what has come, see what has become complete, say it, and say again what is overdue."""
        while not self._answers.empty():
            far, number, requests, future = self._answers.get()
            far.calls.pop(number, None)
            self._answered(far, requests, future)
        now = time.monotonic()
        for far in self._far.values():
            self._scan(far)
            self._send(far, far.relay.ready())
            overdue = any(now - began > self.timeout_s for began in far.calls.values())
            if overdue or (far.again_at is not None and now >= far.again_at):
                far.calls.clear()
                far.again_at = None
                self._repeated += 1
                self._send(far, far.relay.retry())

    def _send(self, far: _Far, requests: Sequence[Request]) -> None:
        """One call with all requests; the answer rings this thread's bell."""
        if not requests:
            return
        self._calls += 1
        gradients = [r.partial.gradient for r in requests if isinstance(r, Push)]
        self._pushes += len(gradients)
        self._pushed_bytes += sum(g.nbytes for g in gradients if g is not None)
        number, said = self._calls, list(requests)
        far.calls[number] = time.monotonic()
        far.send(said).add_done_callback(partial(self._came, far, number, said))

    def _came(self, far: _Far, number: int, requests: list[Request], future: Future[list[Reply]]) -> None:
        self._answers.put((far, number, requests, future))
        self._wake()

    def _wake(self) -> None:
        self._ringer.ring(self._bell.name, self._asleep)

    def _answered(self, far: _Far, requests: list[Request], future: Future[list[Reply]]) -> None:
        error = future.exception()
        if isinstance(error, ray.exceptions.ActorUnavailableError):
            far.again_at = time.monotonic() + PAUSE_S
            return
        if error is not None:
            raise ServerLostError(f"server {far.relay.index}, from another node: {error}") from error
        for request, reply in zip(requests, future.result(), strict=True):
            follows: list[Request] = []
            for said in far.relay.handle(request, reply):
                if isinstance(said, Push | Pull):
                    follows.append(said)
                elif isinstance(said, PushReply):
                    assert isinstance(request, Push)
                    self._refuse(far, said, request.incarnations)
                else:
                    self._publish(far, said if isinstance(said, Pulled) else None)
            self._send(far, follows)

    def _publish(self, far: _Far, pulled: Pulled | None) -> None:
        """Tell the node how the shard stands."""
        if pulled is not None:
            far.show(pulled)
            self._versions += 1
            self._pulled_bytes += pulled.params.nbytes
        far.board.words[DIVERGED] = -1 if far.relay.diverged is None else far.relay.diverged
        far.board.words[FROZEN] = far.relay.frozen
        self._ring_members()

    def _ring_members(self) -> None:
        for address, slots in self._members:
            self._ringer.ring(address.bell, slots.segment.words)

    def _refuse(self, far: _Far, reply: PushReply, incarnations: tuple[int, ...]) -> None:
        for address, slots in self._members:
            for k, node in enumerate(address.nodes):
                if node == reply.node and address.incarnations[k] == incarnations:
                    verdict_at = slots.at(reply.step % 2, k) + BY_SHARD + address.n_shards + far.relay.index
                    slots.words[verdict_at] = 8 * reply.step + VERDICTS.index(reply.verdict)

    def _scan(self, far: _Far) -> None:
        """Offer every slot of the shard's step at hand to its state machine."""
        relay, shard = far.relay, far.relay.index
        version, ring = relay.version, relay.version % 2
        if version < 0:
            return
        for address, slots in self._members:
            for k, node in enumerate(address.nodes):
                words, at = slots.words, slots.at(ring, k)
                verdict_at = at + BY_SHARD + address.n_shards + shard
                if words[at] != version or words[verdict_at] // 8 == version:
                    continue
                gradient = slots.gradient[ring][k][far.span.slice] if words[at + PRESENT] else None
                sums = Partial(gradient, slots.doubles[at + LOSS], words[at + ROWS])
                read = words[at + BY_SHARD + shard]
                reply = relay.push(Push(shard, version, node, address.incarnations[k], sums, read))
                words[verdict_at] = 8 * version + VERDICTS.index(reply.verdict)

    def _stop(self) -> None:
        """Leave nobody waiting for a version that will not come."""
        with self._lock:
            for far in self._far.values():
                far.board.words[FROZEN] = 1
            self._ring_members()


def _succeeds(new: SlotsAddress, old: SlotsAddress) -> bool:
    """Whether ``new`` carries a virtual worker of ``old`` under a newer incarnation."""
    carried = {v: i for n, ii in zip(old.nodes, old.incarnations, strict=True) for v, i in _leaves(n, ii)}
    return any(
        i > carried.get(v, i) for n, ii in zip(new.nodes, new.incarnations, strict=True) for v, i in _leaves(n, ii)
    )


def _leaves(node: Range, incarnations: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(range(node.begin, node.end), incarnations, strict=True))
