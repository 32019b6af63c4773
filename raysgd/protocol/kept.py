"""What a server keeps where its node can see it, beside the size of its shard: enough for a successor to go on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kept:
    """buffers: of parameters;  slots: names of the optimizer's state, one array of each beside every buffer

    n_virtual: virtual workers whose clocks are told of each buffer; 0: a version tells them
    touched: coordinates that a step can touch, where one buffer is written in place; 0: a step writes all of the next
    norms: sums of squares of the shard's part of a step's gradient, that other shards wait for; 0: none does
    """

    buffers: int = 2
    slots: tuple[str, ...] = ()
    n_virtual: int = 0
    touched: int = 0
    norms: int = 0
