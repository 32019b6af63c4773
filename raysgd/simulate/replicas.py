"""Copies of server shards on other nodes: what travels to them, what befalls them, and how one replaces it.

A replica is told of every step; it may die, and the driver then lets its primary go on alone, until the next deal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from raysgd.protocol.replica import Followed
from raysgd.simulate import servers

if TYPE_CHECKING:
    from raysgd.simulate.simulation import Simulation


@dataclass(frozen=True, slots=True)
class Replica:
    """A shard that follows. number: of its process, which messages name: those of others are not for it"""

    shard: Any
    number: int


@dataclass(frozen=True, slots=True)
class Between:
    """A message between a primary and its replica, to or from this process of it."""

    number: int
    content: Any

    @property
    def shard(self) -> int:
        shard: int = self.content.shard
        return shard

    @property
    def version(self) -> int:
        number: int = self.content.version if isinstance(self.content, Followed) else self.content.number
        return number


def fill(sim: Simulation) -> None:
    """Nobody trains at the moment: give a replica to each shard that lacks one."""
    for index, shard in enumerate(sim.shards):
        if sim.faults.replicas and sim.replicas[index] is None:
            copy = shard.copy()
            sim.wake_readers(index)  # it waits no longer for one that is dead
            sim.replica_number += 1
            follower = sim.make_shard(index, **copy.arguments())
            sim.replicas[index] = Replica(follower, sim.replica_number)
            shard.copied_to(follower.sequence)


def tell(sim: Simulation, index: int) -> None:
    """Carry what a shard has to say to its replica."""
    replica, copied = sim.replicas[index], sim.shards[index].copied
    if copied is not None:
        if replica is not None:
            for sealed in copied.outbox:
                sim.network.send(index, Between(replica.number, sealed))
        copied.outbox.clear()


def say_again(sim: Simulation) -> None:
    for index, shard in enumerate(sim.shards):
        if shard.copied is not None and index not in sim.down:
            shard.copied.say_again()
            tell(sim, index)


def receive(sim: Simulation, index: int, message: Between) -> None:
    replica = sim.replicas[index]
    if replica is None or replica.number != message.number:
        return
    if not isinstance(message.content, Followed):
        version = replica.shard.follow(message.content)
        sim.network.send(index, Between(replica.number, Followed(index, version)))
    elif index not in sim.down:
        copied = sim.shards[index].copied
        if copied is not None and copied.confirm(message.content.version):
            sim.wake_readers(index)


def strike(sim: Simulation) -> None:
    """A replica dies; after a while the driver lets the primary go on alone."""
    with_one = [i for i, replica in enumerate(sim.replicas) if replica is not None]
    if with_one:
        index = sim.random.choice(with_one)
        sim.outcome.faults["replica_kill"] += 1
        sim.replicas[index] = None
        sim.later(sim.random.randrange(60), partial(alone, sim, index))


def alone(sim: Simulation, index: int) -> None:
    if index not in sim.down and sim.replicas[index] is None:
        sim.shards[index].copied = None
        sim.wake_readers(index)


def promote(sim: Simulation, index: int) -> bool:
    """Put the replica in its dead primary's place; False where there is none."""
    replica = sim.replicas[index]
    if replica is None:
        return False
    sim.outcome.faults["promotion"] += 1
    sim.replicas[index] = None
    servers.replace(sim, index, replica.shard)
    del sim.down[index]
    return True
