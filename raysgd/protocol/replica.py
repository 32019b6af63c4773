"""A copy of a server shard on another node: what the shard tells it, and until when a step is kept from everybody else.

    primary: pushes ─▶ sum ─▶ t+1 sealed ─▶ Sealed(sum, record) ──▶ replica: the same update ─▶ t+1, the same bytes
             t+1 told to workers and driver ◀─────────────────────── has t+1 ◀──┘

A step is told when both hold it: then no worker, no other shard and no ledger knows of one that could be lost with the
primary. So a replica that takes its place stands where the others believe it to be, or one step further. The same holds
of every push where staleness is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raysgd.learn.batch import Float32, Float64, Int64
from raysgd.protocol.generation import Generation
from raysgd.protocol.messages import Push

if TYPE_CHECKING:
    from raysgd.protocol.gate import Commit
    from raysgd.protocol.tally import Tally


class Message(Protocol):
    """From a shard to its replica. number: messages are counted from the replica's own count on"""

    @property
    def number(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class Sealed:
    """From a shard to its replica: a step that it sealed.

    gradient: the sum of the step's gradients over the shard, (len(shard),) float32; None: the step has no rows
    commit: its record
    factor: what the norm's limit scaled the gradient by;  square_sums: the shard's part of that norm, for whom it lacks
    """

    shard: int
    gradient: Float32 | None
    commit: Commit
    factor: np.float32 | None = None
    square_sums: Float64 | None = None

    @property
    def number(self) -> int:
        return self.commit.step


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """From a shard to its replica, where staleness is allowed: a push that it applied. number: of those since the copy
    was made, from the replica's own count on"""

    shard: int
    number: int
    push: Push


@dataclass(frozen=True, slots=True)
class Followed:
    """From a replica to its primary: it holds all before the message of this number, ``version``."""

    shard: int
    version: int


@dataclass(frozen=True, slots=True)
class Copy:
    """What a replica or a successor begins with: generations, and the records that the driver was not told of yet.

    tally: what is in the newest, and those records, where staleness is allowed
    last_norms: the step before the newest, and the shard's part of its gradient's norm
    """

    newest: Generation
    previous: Generation | None
    commits: list[Commit]
    tally: Tally | None = None
    last_norms: tuple[int, Float64] | None = None

    def arguments(self) -> dict[str, Any]:
        """What a shard takes that begins with it."""
        if self.tally is not None:
            return {"generation": self.newest, "tally": self.tally}
        return {
            "generation": self.newest,
            "previous": self.previous,
            "commits": self.commits,
            "last_norms": self.last_norms,
        }


class Copied:
    """A primary's knowledge of its replica.

    version: the number of the message that it awaits next; under BSP the newest version that it said it holds
    clocks: steps of each virtual worker that it holds, where staleness is allowed

    Under BSP at most one step is unconfirmed: the next takes pushes of workers that were told of it.
    """

    def __init__(self, version: int, clocks: Int64 | None = None) -> None:
        self.version, self.clocks = version, clocks
        self.unconfirmed: dict[int, Message] = {}
        #: what the replica must be told; whoever carries messages takes it from here
        self.outbox: list[Message] = []

    @property
    def next(self) -> int:
        """The number of the next message."""
        return self.version + len(self.unconfirmed)

    def say(self, message: Message) -> None:
        """A step was sealed, or a push applied: the replica must have it.

        It can have it already from a primary that died before it was told so; under BSP a step is always the same.
        """
        if message.number < self.version:
            return
        assert message.number == self.next
        self.unconfirmed[message.number] = message
        self.outbox.append(message)

    def say_again(self) -> None:
        """They may have been lost on their way: the replica passes over what it has."""
        self.outbox += [message for message in self.unconfirmed.values() if message not in self.outbox]

    def confirm(self, version: int) -> bool:
        """The replica awaits the message of this number; whether that is news."""
        if version <= self.version:
            return False
        for number in range(self.version, version):
            message = self.unconfirmed.pop(number, None)  # None: a primary that died had said it
            if isinstance(message, Applied):
                assert self.clocks is not None
                self.clocks[message.push.node.slice] += 1
        self.version = version
        return True
