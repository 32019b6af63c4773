"""The server actor: a shell around :class:`ServerShard` that waits where the state machine may not.

Pushes come by actor calls from other nodes and through shared memory from this one; both feed the same state machine.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import ray

from raysgd import failpoints
from raysgd.errors import RunError
from raysgd.learn.batch import Int64
from raysgd.learn.parameters import Range
from raysgd.protocol.gate import Commit
from raysgd.protocol.generation import Generation
from raysgd.protocol.kept import Kept
from raysgd.protocol.messages import Norms, NotYet, Pull, Push, Reply, Request
from raysgd.protocol.replica import Copy, Message
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.sparse import SparsePush
from raysgd.protocol.sparse_shard import SparseCopy, SparseShard
from raysgd.protocol.tally import Tally
from raysgd.runtime.board import Board, BoardAddress
from raysgd.runtime.calls import untold
from raysgd.runtime.place import here
from raysgd.runtime.process import Process, die_with_parent
from raysgd.runtime.shared import SharedServer
from raysgd.runtime.sparse_shared import SparseSharedServer

#: a node's name, and where a server's parameters are shared there
Place: TypeAlias = tuple[str | None, BoardAddress | None]

#: seconds to leave a replica alone that Ray cannot reach at the moment
PAUSE_S = 0.5

#: a pull of a version that is not sealed yet is answered after this long at the latest; the worker asks again
LONG_POLL_S = 1.0


class Server:
    """One server shard, from :meth:`begin` on."""

    shard: Any  # a ServerShard, or a SparseShard

    def __init__(self) -> None:
        die_with_parent()
        self.lock = threading.Lock()
        self.changed = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        #: pulls by actor calls that wait for a version; under the lock
        self.waiting = 0
        self.shared: SharedServer | SparseSharedServer | None = None
        self.servers: Sequence[Any] = ()
        #: boards of other servers of this node, mapped while those live, so that this one can succeed them
        self.held: dict[BoardAddress, Board] = {}
        #: the actor that follows this one on another node; whether this one follows another
        self.replica: Any = None
        self.follows = False
        #: messages to the replica that it has not answered
        self.sent = 0

    async def begin(self, make: Callable[..., ServerShard | SparseShard], span: Range, kept: Kept) -> Place:
        """Build the state machine, here because arrays that come through Ray are read-only.

        kept: where the node can see it

        Returns the node's name, and where workers of the same node find the parameters.
        """
        self.loop, self.span = asyncio.get_running_loop(), span
        if here() is None:
            self.shard = make()
            return None, None
        board = Board.create(len(span), kept)
        given: dict[str, Any] = {"state": board.state} if kept.slots else {}
        if board.pushes is not None:
            given["on_seal"] = board.pushes.seal
        if board.sealed is not None:
            given["on_seal"] = board.sealed.seal
        if kept.norms:
            given["on_norms"] = board.norms
        self.shard = make(buffers=board.params, on_write=board.announce, **given)
        if board.pushes is not None:
            board.pushes.begin(self.shard.sequence, self.shard.tally())
        serve = SparseSharedServer if isinstance(self.shard, SparseShard) else SharedServer
        self.shared = serve(self.shard, board, self.lock, self._advanced_in_thread)
        return here(), self.shared.address

    async def hold(self, addresses: Sequence[BoardAddress]) -> None:
        """Keep the memory of these servers of this node from going with them."""
        self.held = {address: self.held.get(address) or Board.attach(address) for address in addresses}

    async def succeed(self, address: BoardAddress, make: Callable[..., ServerShard], span: Range, since: int) -> Place:
        """Take the place of a server that is dead: copy what its memory holds. Raises RunError where it is not held, or
        does not tell of all steps from ``since`` on."""
        if address not in self.held:
            raise RunError("the memory of the server that died is not held here")
        board = self.held.pop(address)
        make = partial(make, **board.survives(since).arguments())
        return await self.begin(make, span, address.kept)

    # -- replicas

    async def copy(self) -> Copy | SparseCopy:
        """All that a replica begins with; from here on this server goes on alone."""
        with self.lock:
            copy: Copy | SparseCopy = self.shard.copy()
            self.replica = None
            self._publish()
        return copy

    async def follow_from(
        self, copy: Copy | SparseCopy, make: Callable[..., ServerShard], span: Range, kept: Kept
    ) -> Place:
        """Become the replica of the server whose copy this is."""
        self.follows = True
        return await self.begin(partial(make, **copy.arguments()), span, kept)

    async def followed_by(self, replica: Any, sequence: int) -> None:
        """From now on a step is told to others when this replica, which counts ``sequence``, has it, too."""
        with self.lock:
            self.replica, self.sent = replica, 0
            self.shard.copied_to(sequence)

    async def alone(self) -> None:
        """The replica is dead: go on without."""
        with self.lock:
            self.replica = self.shard.copied = None
            self._publish()

    @untold
    async def follow(self, sealed: Message | None) -> int:
        """As a replica, take over a step, or a push (None: nothing); what it counts then. Who was promoted follows
        nobody."""
        if not self.follows:
            return -1
        with self.lock:
            sequence: int = self.shard.sequence if sealed is None else self.shard.follow(sealed)
        return sequence

    async def promote(self) -> Place:
        """Take the primary's place: from here on nobody is followed."""
        assert self.shared is not None
        self.follows = False
        with self.lock:
            self._publish()
        return here(), self.shared.address

    def _ship(self) -> None:
        """Tell the replica what it must have. The caller holds the lock."""
        copied, replica = self.shard.copied, self.replica
        if copied is None or replica is None:
            return
        assert self.loop is not None
        # By way of the loop: where the answer is there at once, a callback would run here, and the lock is taken.
        later, answered = self.loop.call_soon_threadsafe, partial(self._followed, replica)
        self.sent += len(copied.outbox)
        for sealed in copied.outbox:
            replica.follow.remote(sealed).future().add_done_callback(partial(later, answered))
        copied.outbox.clear()

    def _followed(self, replica: Any, future: Any) -> None:
        """The replica has answered, or cannot be reached; one that is dead is the driver's business."""
        error = future.exception()
        with self.lock:
            copied = self.shard.copied
            if replica is not self.replica or copied is None:
                return
            self.sent -= 1
            if error is None:
                backlogged = self.shard.backlogged
                if copied.confirm(future.result()):
                    self._publish()
                if backlogged and self.shared is not None:
                    self.shared.wake()
            lost = error is None or isinstance(error, ray.exceptions.ActorUnavailableError)
            if lost and copied.unconfirmed and not self.sent and self.loop is not None:
                self.loop.call_later(PAUSE_S, self._ship_again, replica)

    def _ship_again(self, replica: Any) -> None:
        with self.lock:
            if replica is self.replica and self.shard.copied is not None and not self.sent:
                self.shard.copied.say_again()
                self._ship()

    @untold
    async def beat(self) -> None:
        """A sign of life."""

    async def process(self) -> Process:
        return Process.this()

    async def cpu_ticks(self, process: Process) -> int | None:
        """CPU time of a process of this node."""
        return process.cpu_ticks()

    async def kill(self, process: Process) -> bool:
        """Make the death of a process of this node true; whether it is."""
        return process.kill()

    async def site(self) -> str | None:
        """The name of this node."""
        return here()

    async def regroup(self) -> None:
        """Forget the workers whose slots are read: others are attached next."""
        if self.shared is not None:
            self.shared.forget_workers()

    async def clocks(self) -> Int64:
        """(n_virtual,) steps committed of each virtual worker."""
        with self.lock:
            found: Int64 = self.shard.told_clocks
        return found

    async def held_clocks(self) -> Int64:
        """(n_virtual,) where whoever carries virtual workers from now on is to begin."""
        with self.lock:
            found: Int64 = self.shard.held_clocks
        return found

    async def meet(self, servers: Sequence[Any]) -> None:
        """Get to know all servers, by shard: where the gradient's norm is limited they tell each other theirs."""
        self.servers = servers

    async def norms(self, norms: Norms) -> None:
        """Take another shard's sums of squares."""
        with self.lock:
            standing = self._standing()
            self.shard.norms(norms)
            self._tell()
            if self._standing() != standing:
                self._publish()

    async def attach(self, slots: Any) -> None:
        """Take the pushes of a worker of this node from its memory."""
        assert self.shared is not None
        self.shared.attach(slots, self.span)

    async def exchange(self, requests: Sequence[Request]) -> list[Reply]:
        """Pushes are judged at once; a pull waits until its version is sealed or the poll runs out."""
        replies: list[Reply] = []
        for request in requests:
            if isinstance(request, Push | SparsePush):
                await self._room()
                replies.append(self._push(request))
            else:
                replies.append(await self._pull(request))
        return replies

    async def fence(self, run: Range, incarnation: int) -> int:
        with self.lock:
            begin: int = self.shard.fence(run, incarnation)
        return begin

    async def freeze(self) -> int:
        with self.lock:
            version: int = self.shard.freeze()
            self._publish()
        return version

    async def snapshot(self, version: int, part: Range) -> Generation:
        """A copy of these coordinates of the shard at a version."""
        failpoints.reach("server.snapshot", version)
        with self.lock:
            found: Generation = self.shard.snapshot(version, part)
        return found

    async def tally(self) -> tuple[int, Tally]:
        """What is in the arrays where staleness is allowed, and how many pushes were applied: more say that it is of
        yesterday."""
        with self.lock:
            return self.shard.sequence, self.shard.tally()

    async def cut(self, part: Range) -> Generation:
        """A copy of these coordinates as they are now."""
        failpoints.reach("server.snapshot", self.shard.version)
        with self.lock:
            found: Generation = self.shard.cut(part)
        return found

    @untold
    async def commits(self, since: int) -> list[Commit]:
        with self.lock:
            commits: list[Commit] = self.shard.drain(since)
        return commits

    async def _room(self) -> None:
        """Wait until the replica has caught up, or is given up."""
        while self.shard.backlogged:
            changed = self.changed
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), PAUSE_S)

    def _push(self, push: Push) -> Reply:
        with self.lock:
            standing = self._standing()
            reply: Reply = self.shard.push(push)
            self._tell()
            if self._standing() != standing:
                self._publish()
        return reply

    def _standing(self) -> tuple[int, int, int | None]:
        return self.shard.version, self.shard.sequence, self.shard.diverged

    def _tell(self) -> None:
        """Carry what the shard has to say to the others. The caller holds the lock."""
        for norms in self.shard.outbox:
            self.servers[norms.to].norms.remote(norms)
        self.shard.outbox.clear()
        self._ship()

    def _publish(self) -> None:
        if self.shared is not None:
            self.shared.publish()
        self._wake()

    def _advanced_in_thread(self) -> None:
        self._tell()
        self._wake_from_thread()

    def _wake_from_thread(self) -> None:
        if self.loop is not None and self.waiting:
            self.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def _pull(self, pull: Pull) -> Reply:
        deadline = asyncio.get_running_loop().time() + LONG_POLL_S
        with self.lock:
            self.waiting += 1  # from here on each new version wakes this loop
        try:
            while True:
                changed = self.changed
                with self.lock:
                    reply: Reply = self.shard.pull(pull)
                left = deadline - asyncio.get_running_loop().time()
                if not isinstance(reply, NotYet) or left <= 0:
                    return reply
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), left)
        finally:
            with self.lock:
                self.waiting -= 1


ServerActor = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=1000)(Server)
