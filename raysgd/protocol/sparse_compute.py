"""From the rows of a step to the coordinates they touch, and to the gradient sums at these.

    codes of the leaves of a node ─▶ unique, inverse ─▶ ids (m,), codes as positions among them
    values (m,) at these ids      ─▶ value_and_grad on the compact vector, leaf by leaf, summed along the tree

A leaf's arithmetic at a coordinate follows its own rows alone: which other leaves share the compact vector adds zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raysgd.learn.batch import Batch, Float32, Int32
from raysgd.learn.compact import Index, merge_inverse, unique_inverse
from raysgd.learn.models.hashed import BoundHashed
from raysgd.learn.parameters import Range
from raysgd.protocol.compute import leaf
from raysgd.protocol.sparse import Sparse, SparsePartial
from raysgd.protocol.tree import Partial, depth, sum_leaves


@dataclass(frozen=True, slots=True)
class Node:
    """The rows below one node. ids: (m,) the coordinates they touch;  leaves: their batches, codes being positions."""

    ids: Int32
    leaves: dict[int, Batch]


@dataclass(frozen=True, slots=True)
class Touched:
    """The rows of one step of a worker. ids: (m,) int32, ascending: the coordinates that all nodes touch together.

    place: for each node where its ids stand among ids; None where they are the same
    """

    step: int
    ids: Int32
    nodes: tuple[Node, ...]
    place: tuple[Index | None, ...]


def touch(
    learner: BoundHashed, step: int, nodes: Sequence[Range], batch: Callable[[int, int], Batch | None]
) -> Touched:
    """The rows of a step; ``batch(step, v)`` gives virtual worker v's."""
    found = tuple(_node(learner, {v: batch(step, v) for v in range(n.begin, n.end)}) for n in nodes)
    if len(found) == 1:
        return Touched(step, found[0].ids, found, (None,))
    ids, inverse = merge_inverse([node.ids for node in found])
    cuts = np.cumsum([len(node.ids) for node in found])[:-1]
    return Touched(step, ids, found, tuple(np.split(inverse, cuts)))


def sparse_sums(
    learner: BoundHashed,
    touched: Touched,
    values: Float32,
    nodes: Sequence[Range],
    outputs: Sequence[Float32] | None = None,
) -> list[SparsePartial]:
    """The gradient sum below each node at ``values`` (m,) of ``touched.ids``.

    outputs: for each node, memory to whose begin its sum is best written; None: fresh memory
    """
    with np.errstate(over="ignore", invalid="ignore"):  # the shard refuses what is not finite
        sums = []
        for k, (node, place, span) in enumerate(zip(touched.nodes, touched.place, nodes, strict=True)):
            size = len(node.ids)
            out = np.empty(size, np.float32) if outputs is None else outputs[k][:size]
            sums.append(_sum(learner, node, values if place is None else values.take(place), span, out))
        return sums


def _node(learner: BoundHashed, batches: dict[int, Batch | None]) -> Node:
    rows = {v: batch for v, batch in batches.items() if batch is not None and len(batch)}
    if not rows:
        return Node(np.empty(0, np.int32), {})
    unique, inverse = unique_inverse(np.concatenate([batch.codes.ravel() for batch in rows.values()]))
    if len(unique) and unique[-1] == learner.inputs.n_codes:  # of rows that do not count; its position is behind all
        unique = unique[:-1]
    leaves, begin = {}, 0
    for v, batch in rows.items():
        codes = inverse[begin : begin + batch.codes.size].reshape(batch.codes.shape)
        begin += batch.codes.size
        leaves[v] = Batch(batch.numeric, codes, batch.label, batch.weight)  # type: ignore[arg-type]
    return Node(learner.coordinates(unique), leaves)


def _sum(learner: BoundHashed, node: Node, values: Float32, span: Range, out: Float32) -> SparsePartial:
    """The sum below ``span`` with its gradient in ``out`` (m,)."""

    def of(v: int, memory: Float32) -> Partial:
        return leaf(learner, values, node.leaves.get(v), memory)

    total = sum_leaves(span, of, [out, *(np.empty_like(out) for _ in range(depth(len(span))))])
    if total.gradient is None:
        return SparsePartial(None, total.loss, total.rows)
    if total.gradient is not out:
        np.copyto(out, total.gradient)  # absent leaves left it elsewhere
    return SparsePartial(Sparse(node.ids, out), total.loss, total.rows)
