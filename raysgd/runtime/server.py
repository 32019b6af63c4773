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
from raysgd.protocol.messages import Norms, NotYet, Pull, Push, Reply, Request
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.sparse import SparsePush
from raysgd.protocol.sparse_shard import SparseShard
from raysgd.runtime.board import Board, BoardAddress
from raysgd.runtime.calls import untold
from raysgd.runtime.place import here
from raysgd.runtime.process import Process, die_with_parent
from raysgd.runtime.shared import SharedServer
from raysgd.runtime.sparse_shared import SparseSharedServer

#: a node's name, and where a server's parameters are shared there
Place: TypeAlias = tuple[str | None, BoardAddress | None]

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

    async def begin(
        self, make: Callable[..., ServerShard | SparseShard], span: Range, buffers: int, slots: tuple[str, ...]
    ) -> Place:
        """Build the state machine, here because arrays that come through Ray are read-only.

        buffers: as many of parameters as it takes;  slots: of optimizer state that are kept with them

        Returns the node's name, and where workers of the same node find the parameters.
        """
        self.loop, self.span = asyncio.get_running_loop(), span
        if here() is None:
            self.shard = make()
            return None, None
        board = Board.create(len(span), buffers, slots)
        kept: dict[str, Any] = {"state": board.state} if slots else {}
        self.shard = make(buffers=board.params, on_write=partial(Board.announce, board), **kept)
        serve = SparseSharedServer if isinstance(self.shard, SparseShard) else SharedServer
        self.shared = serve(self.shard, board, self.lock, self._advanced_in_thread)
        return here(), self.shared.address

    async def hold(self, addresses: Sequence[BoardAddress]) -> None:
        """Keep the memory of these servers of this node from going with them."""
        self.held = {address: self.held.get(address) or Board.attach(address) for address in addresses}

    async def succeed(self, address: BoardAddress, make: Callable[..., ServerShard], span: Range) -> Place:
        """Take the place of a server that is dead: copy what its memory holds. Raises RunError where it is not held."""
        if address not in self.held:
            raise RunError("the memory of the server that died is not held here")
        board = self.held.pop(address)
        remains = board.survives()
        make = partial(make, generation=remains.newest, previous=remains.previous, commits=remains.commits)
        return await self.begin(make, span, address.buffers, address.slots)

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
            found: Int64 = self.shard.clocks.steps.copy()
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

    @untold
    async def commits(self, since: int) -> list[Commit]:
        with self.lock:
            commits: list[Commit] = self.shard.drain(since)
        return commits

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

    def _publish(self) -> None:
        if self.shared is not None:
            self.shared.publish()
        self._wake()

    def _advanced_in_thread(self) -> None:
        self._tell()
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
