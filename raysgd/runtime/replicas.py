"""The replicas of a gang: a server on another node for each shard, which follows it and can take its place.

placed: server and replica of a shard are a placement group of two bundles, never on one node
asked for ─▶ come ─▶ (everybody has stopped) copy of the shard ─▶ follows, step by step
primary lost ─▶ promoted; the bundle of the dead one is asked for the next replica
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from raysgd.errors import RunError
from raysgd.learn.parameters import Range
from raysgd.protocol.kept import Kept
from raysgd.runtime.calls import ActorLostError, call, first_line
from raysgd.runtime.gang import Gang, Member

#: seconds for a copy of a shard to get to another node
COPY_S = 120.0


class Replicas:
    """Those of ``gang``, from the reserved pairs of bundles to a place among the servers."""

    def __init__(self, gang: Gang) -> None:
        self.gang = gang
        #: by shard: replicas that have come and follow nobody yet
        self._ready: dict[int, Member] = {}

    def ask(self) -> None:
        """Ask Ray for a replica of every shard that has none; it comes when there is another node for it."""
        for index, bundle in enumerate(self.gang.replica_bundles):
            if index not in self.gang.replicas and index not in self.gang.replicas_asked:
                self.gang.ask_replica(index, bundle)

    def come(self, timeout: float = 0.0) -> bool:
        """Whether one has come that follows nobody yet: when everybody has stopped, :meth:`follow` is next."""
        for index, asked in list(self.gang.replicas_asked.items()):
            if index in self._ready:
                continue
            done, _ = ray.wait(asked.ready, num_returns=len(asked.ready), timeout=timeout)
            if len(done) < len(asked.ready):
                continue
            try:
                process, site = ray.get(asked.ready)
            except ray.exceptions.RayError:  # died while it started: the next one is asked for
                del self.gang.replicas_asked[index]
                continue
            self._ready[index] = Member(asked.actor, process, site)
        return bool(self._ready)

    def follow(self, makers: Sequence[Callable[..., Any]], spans: Sequence[Range], kept: Kept) -> list[int]:
        """Give those that have come a copy of their shard, while nobody trains; the shards that have a replica now.

        Raises ActorLostError where a primary is dead.
        """
        found = []
        for index, replica in list(self._ready.items()):
            primary, what = self.gang.servers[index].actor, f"copying server {index}"
            copy = primary.copy.remote()
            following = replica.actor.follow_from.remote(copy, makers[index], spans[index], kept)
            try:
                call([following], what, timeout=COPY_S)
                [sequence] = call([replica.actor.follow.remote(None)], what)
            except RunError:
                self.gang.call([primary.beat.remote()], f"server {index}")  # is it this one that is dead?
                self.gang.bury(replica)
            else:
                self.gang.call([primary.followed_by.remote(replica.actor, sequence)], f"server {index}")
                self.gang.replicas[index] = replica
                found.append(index)
            del self._ready[index], self.gang.replicas_asked[index]
        return found

    def rejoin(self, index: int, *, same: bool) -> None:
        """A successor has taken the primary's place on its node: the replica follows that one.

        same: whether the successor begins where the replica stands, as it does under BSP. Elsewhere pushes can be in it
        that only the dead could have told: another replica is asked for.
        """
        replica = self.gang.replicas.get(index)
        if replica is None:
            return
        if not same:
            self.lost(index)
            return
        try:
            [sequence] = call([replica.actor.follow.remote(None)], f"the replica of server {index}", timeout=10.0)
        except RunError:
            self.lost(index)
            return
        self.gang.call([self.gang.servers[index].actor.followed_by.remote(replica.actor, sequence)], f"server {index}")

    def promote(self, index: int) -> bool:
        """Put the replica in its dead primary's place; False where there is none."""
        gang, replica = self.gang, self.gang.replicas.pop(index, None)
        if replica is None:
            return False
        try:
            [gang.boards[index]] = call([replica.actor.promote.remote()], f"replacing server {index}", timeout=10.0)
        except RunError:
            gang.bury(replica)
            return False
        first, second = gang.server_bundles, gang.replica_bundles
        first[index], second[index] = second[index], first[index]  # the next replica: where the dead one was
        gang.servers[index] = replica
        gang.replaced[index] += 1
        gang.meet()
        return True

    def watch(self) -> dict[int, str]:
        """The shards whose replica was found dead or hung since, and how; their servers go on alone until another
        follows."""
        lost = {}
        for index, replica in list(self.gang.replicas.items()):
            try:
                why = f"it hung for {replica.pulse.silent_s:.1f} s" if self.gang.hung(replica) else None
            except ActorLostError as error:
                why = first_line(error)
            if why is not None:
                self.lost(index)
                lost[index] = why
        return lost

    def lost(self, index: int) -> None:
        """A replica is dead: make it true, and let its primary go on alone."""
        self.gang.bury(self.gang.replicas.pop(index))
        self.gang.call([self.gang.servers[index].actor.alone.remote()], f"server {index}")
