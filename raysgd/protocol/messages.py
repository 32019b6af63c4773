"""What workers and server shards say to each other. Plain data: nothing here decides.

Every message may be lost, repeated, or arrive late; the receivers are written for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from raysgd.learn.batch import Float32, Float64
from raysgd.learn.parameters import Range
from raysgd.protocol.tree import Partial


class Verdict(Enum):
    """What became of a push."""

    ACCEPTED = "accepted"
    #: it, or a node above it, was here already, or its step is committed: nothing to do
    DUPLICATE = "duplicate"
    #: one of its incarnations is not the current one: the sender no longer carries those virtual workers
    FENCED = "fenced"
    #: it is not for the step that the consistency admits now
    EARLY = "early"
    #: the shard takes no more pushes: the run is being stopped
    FROZEN = "frozen"
    #: not a node of the tree, or the wrong shape or type
    MALFORMED = "malformed"
    #: computed from an older version than the consistency admits
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Push:
    """A subtree's gradient sum over the coordinates of one shard.

    node: virtual workers [begin, end);  incarnations: one for each of them
    partial.gradient: (len(shard),) float32, or None where the node has no rows in this step
    read: this shard's version that it was computed from
    """

    shard: int
    step: int
    node: Range
    incarnations: tuple[int, ...]
    partial: Partial
    read: int


@dataclass(frozen=True, slots=True)
class PushReply:
    shard: int
    step: int
    node: Range
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Pull:
    """Ask one shard for its parameters at exactly this version (= steps committed); where staleness is allowed, at this
    version or a newer one."""

    shard: int
    version: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """params: (len(shard),) float32, not written to before the next version is pulled.

    version: steps that are in it from *every* virtual worker
    """

    shard: int
    version: int
    params: Float32


@dataclass(frozen=True, slots=True)
class NotYet:
    """The version asked for is not sealed on this shard yet: ask again."""

    shard: int
    version: int


@dataclass(frozen=True, slots=True)
class Gone:
    """The version asked for is older than the two generations that the shard keeps."""

    shard: int
    version: int
    oldest: int


@dataclass(frozen=True, slots=True)
class Halted:
    """No newer version will come. ``diverged`` is the step whose result was not finite, or None (frozen)."""

    shard: int
    version: int
    diverged: int | None


@dataclass(frozen=True, slots=True)
class Norms:
    """From one server shard to another: sums of squares of the step's mean gradient.

    square_sums: one for each of the shard's blocks, float64
    asks: whether the sender waits for the receiver's, which it should have had
    """

    shard: int
    to: int
    step: int
    square_sums: Float64
    asks: bool = False


Request: TypeAlias = Push | Pull
Reply: TypeAlias = PushReply | Pulled | NotYet | Gone | Halted
