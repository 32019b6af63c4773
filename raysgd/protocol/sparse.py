"""Gradients that have few coordinates: their messages, and their sum along the fixed tree.

A coordinate that is absent counts as +0.0. No part has a -0.0 at a coordinate that another part may lack
(:mod:`raysgd.learn.models.hashed`), so adding it changes no bit, and it does not matter who summed what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from raysgd.learn.batch import Float32, Int32
from raysgd.learn.compact import merge_inverse
from raysgd.learn.parameters import Range
from raysgd.protocol.messages import Gone, Halted, NotYet, PushReply
from raysgd.protocol.tree import Partial, TreeSum


@dataclass(frozen=True, slots=True)
class Sparse:
    """Some coordinates of a vector. ids: (m,) int32, ascending, each once;  values: (m,) float32."""

    ids: Int32
    values: Float32

    @property
    def nbytes(self) -> int:
        return int(self.ids.nbytes + self.values.nbytes)

    def cut(self, span: Range) -> Sparse:
        """The coordinates within ``span``, as views."""
        begin, end = np.searchsorted(self.ids, (span.begin, span.end))
        return Sparse(self.ids[begin:end], self.values[begin:end])

    def well_formed(self, span: Range) -> bool:
        """Whether this is a part of a gradient over the coordinates of ``span``."""
        ids, values = self.ids, self.values
        if ids.dtype != np.int32 or values.dtype != np.float32 or ids.ndim != 1 or ids.shape != values.shape:
            return False
        return not len(ids) or bool(span.begin <= ids[0] and ids[-1] < span.end and (ids[1:] > ids[:-1]).all())


@dataclass(frozen=True, slots=True)
class SparsePartial:
    """What a subtree contributes to a step: sums over its rows.

    vector: the coordinates that its rows touch, None where it has no row;  loss: float64;  rows: how many
    """

    vector: Sparse | None
    loss: float
    rows: int


@dataclass(frozen=True, slots=True)
class SparsePush:
    """A subtree's gradient sum at the coordinates of one shard. incarnations: one for each virtual worker of node."""

    shard: int
    step: int
    node: Range
    incarnations: tuple[int, ...]
    partial: SparsePartial

    @property
    def read(self) -> int:
        """The version that it was computed from: bulk-synchronous, so its step's."""
        return self.step


@dataclass(frozen=True, slots=True)
class SparsePull:
    """Ask one shard for the values of ``ids`` (m,) int32, ascending, at exactly this version.

    token: comes back with the values, where a version is asked for other ids than those of its step
    """

    shard: int
    version: int
    ids: Int32
    token: int = 0


@dataclass(frozen=True, slots=True)
class SparsePulled:
    """values: (m,) float32, of the ids asked for under this token."""

    shard: int
    version: int
    values: Float32
    token: int = 0


SparseRequest: TypeAlias = SparsePush | SparsePull
SparseReply: TypeAlias = PushReply | SparsePulled | NotYet | Gone | Halted


class SparseSum:
    """The parts of one step as they arrive, in any order; :class:`~raysgd.protocol.tree.TreeSum` for sparse ones."""

    def __init__(self, n_leaves: int) -> None:
        self._tree = TreeSum(n_leaves)
        self._vectors: dict[Range, Sparse] = {}

    @property
    def parts(self) -> dict[Range, Partial]:
        """The nodes that are here: rows and loss of each."""
        return self._tree.parts

    def offer(self, node: Range, partial: SparsePartial) -> bool:
        """Take a node's sum; False where it, or an ancestor of it, is already here."""
        if not self._tree.offer(node, Partial(None, partial.loss, partial.rows)):
            return False
        self._vectors.pop(node, None)
        if partial.vector is not None:
            self._vectors[node] = partial.vector
        return True

    @property
    def complete(self) -> bool:
        return self._tree.complete

    def total(self) -> Partial:
        """Loss and rows over all leaves; only when complete."""
        return self._tree.total()

    def gradient(self) -> Sparse:
        """The sum over all leaves at the union of the coordinates, sorted; may be a part, not to be written to."""
        found = [(node, self._vectors[node]) for node in sorted(self.parts) if node in self._vectors]
        if len(found) <= 1:
            return found[0][1] if found else Sparse(np.empty(0, np.int32), np.empty(0, np.float32))
        union, place = merge_inverse([vector.ids for _, vector in found])
        dense, begin = TreeSum(len(self._tree.root)), 0
        gradients: dict[Range, Float32] = {}
        for node, vector in found:
            gradients[node] = np.zeros(len(union), np.float32)
            gradients[node][place[begin : begin + len(vector.ids)]] = vector.values
            begin += len(vector.ids)
        for node in self.parts:
            dense.offer(node, Partial(gradients.get(node), 0.0, 0))
        total = dense.total().gradient
        assert total is not None
        return Sparse(union, total)
