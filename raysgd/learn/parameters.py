"""Named arrays over one flat float32 vector, and how that vector is cut into server shards.

flat   [ w w w w w w | b | h h h h h h h h h h | c c ]
        weights       bias  hidden/weights      ...
shards [ 0 ........ block boundary | 1 ............. ]
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from raysgd.learn.batch import Float32


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """The half-open range [begin, end) of a flat vector, or of virtual workers."""

    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def __hash__(self) -> int:  # nodes of the tree are looked up many times a step
        return self.begin * 1_000_003 + self.end

    @property
    def slice(self) -> slice:
        return slice(self.begin, self.end)


@dataclass(frozen=True, slots=True)
class Array:
    """One named array of a model. ``penalized`` says whether L2 applies to it (never to biases)."""

    name: str
    shape: tuple[int, ...]
    penalized: bool = True

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each named array lies in the flat vector: one after the other, in the order given.

    >>> layout = Layout((Array("weights", (2, 3)), Array("bias", (3,), penalized=False)))
    >>> layout.n_params, layout.ranges()["bias"]
    (9, Range(begin=6, end=9))
    """

    arrays: tuple[Array, ...]

    @property
    def n_params(self) -> int:
        return sum(a.size for a in self.arrays)

    def ranges(self) -> dict[str, Range]:
        ranges: dict[str, Range] = {}
        begin = 0
        for array in self.arrays:
            ranges[array.name] = Range(begin, begin + array.size)
            begin += array.size
        return ranges

    def views(self, flat: Float32) -> dict[str, Float32]:
        """Each named array as a view of ``flat`` (n_params,), in its own shape."""
        assert flat.shape == (self.n_params,), (flat.shape, self.n_params)
        ranges = self.ranges()
        return {a.name: flat[ranges[a.name].slice].reshape(a.shape) for a in self.arrays}

    def unpenalized(self) -> tuple[Range, ...]:
        """The ranges of the flat vector that L2 does not apply to."""
        ranges = self.ranges()
        return tuple(ranges[array.name] for array in self.arrays if not array.penalized)

    def penalized(self, shard: Range) -> npt.NDArray[np.bool_]:
        """(len(shard),) bool: the coordinates of ``shard`` that L2 applies to."""
        mask = np.zeros(self.n_params, np.bool_)
        ranges = self.ranges()
        for array in self.arrays:
            mask[ranges[array.name].slice] = array.penalized
        return mask[shard.slice]


def block_width(n_params: int) -> int:
    """Coordinates per block: a power of two that depends on ``n_params`` alone, at most 65,536.

    Shards begin on block boundaries, so anything that is summed block by block cannot depend on how many
    shards there are. At least 64 blocks where there are that many coordinates.
    """
    width = 1
    while width < 65_536 and width * 2 * 64 <= n_params:
        width *= 2
    return width


def even_split(n_params: int, parts: int) -> tuple[Range, ...]:
    """``[0, n_params)`` as ``parts`` ranges that begin on block boundaries and differ by at most one block.

    Raises ValueError where there are fewer blocks than parts.

    >>> even_split(10, 3)
    (Range(begin=0, end=3), Range(begin=3, end=6), Range(begin=6, end=10))
    """
    width = block_width(n_params)
    blocks = -(-n_params // width)
    if not 1 <= parts <= blocks:
        raise ValueError(f"num_servers must be in [1, {blocks}] for {n_params} parameters, got {parts}")
    cuts = [min(n_params, width * (i * blocks // parts)) for i in range(parts + 1)]
    return tuple(Range(a, b) for a, b in pairwise(cuts))
