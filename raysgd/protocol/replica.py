"""A copy of a server shard on another node: what the shard tells it, and until when a step is kept from everybody else.

    primary: pushes ─▶ sum ─▶ t+1 sealed ─▶ Sealed(sum, record) ──▶ replica: the same update ─▶ t+1, the same bytes
             t+1 told to workers and driver ◀─────────────────────── has t+1 ◀──┘

A step is told when both hold it: then no worker, no other shard and no ledger knows of one that could be lost with the
primary. So a replica that takes its place stands where the others believe it to be, or one step further.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raysgd.learn.batch import Float32, Float64
from raysgd.protocol.generation import Generation

if TYPE_CHECKING:
    from raysgd.protocol.gate import Commit


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
    def step(self) -> int:
        return self.commit.step


@dataclass(frozen=True, slots=True)
class Followed:
    """From a replica to its primary: it holds ``version``."""

    shard: int
    version: int


@dataclass(frozen=True, slots=True)
class Copy:
    """What a replica begins with: copies of the generations, and the records that the driver was not told of yet."""

    newest: Generation
    previous: Generation | None
    commits: list[Commit]


class Copied:
    """A primary's knowledge of its replica. ``version``: the newest that the replica said it holds

    At most one step is unconfirmed: the next takes pushes of workers that were told of it.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self.unconfirmed: Sealed | None = None
        #: what the replica must be told; whoever carries messages takes it from here
        self.outbox: list[Sealed] = []

    def say(self, sealed: Sealed) -> None:
        """A step was sealed: the replica must have it."""
        assert self.unconfirmed is None or self.unconfirmed.step < sealed.step
        self.unconfirmed = sealed
        self.outbox.append(sealed)

    def say_again(self) -> None:
        """It may have been lost on its way: the replica passes over what it has."""
        if self.unconfirmed is not None and self.unconfirmed not in self.outbox:
            self.outbox.append(self.unconfirmed)

    def confirm(self, version: int) -> bool:
        """The replica holds ``version``; whether that is news."""
        if version <= self.version:
            return False
        self.version = version
        if self.unconfirmed is not None and self.unconfirmed.step < version:
            self.unconfirmed = None
        return True
