"""The one fixed tree along which gradients are summed, whoever computed the leaves.

Float addition is not associative, so the sum over the V virtual workers of a step always runs along the same
binary tree. A node over n leaves splits at the largest power of two below n:

    V = 5          [0,5)
                  /     \\
              [0,4)      [4,5)
             /     \\
         [0,2)     [2,4)        a leaf is one virtual worker's own gradient

A worker that carries a contiguous run of leaves pushes the maximal whole subtrees inside its run: at most
2 ceil(log2 V) vectors, a single one where the run is a subtree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from raysgd.learn.batch import Float32, Int64
from raysgd.learn.parameters import Range
from raysgd.learn.tree import left_leaves


@dataclass(frozen=True, slots=True)
class Partial:
    """What a leaf or a subtree contributes to a step: sums over its rows.

    gradient: (n,) float32, or None where no row contributed (absent: skipped, never added as zeros)
    loss: weighted sum of the rows' losses, float64;  rows: how many rows
    """

    gradient: Float32 | None
    loss: float
    rows: int


EMPTY = Partial(None, 0.0, 0)

#: pairs of terms to add, one after the other: each sum is the next term, the last one the total
Order: TypeAlias = tuple[tuple[int, int], ...]


def split(node: Range) -> tuple[Range, Range]:
    """The two children of a node over at least two leaves.

    >>> split(Range(0, 7))
    (Range(begin=0, end=4), Range(begin=4, end=7))
    """
    middle = node.begin + left_leaves(len(node))
    return Range(node.begin, middle), Range(middle, node.end)


@lru_cache(maxsize=65_536)
def cover(run: Range, n_leaves: int) -> tuple[Range, ...]:
    """The maximal nodes of the tree over ``n_leaves`` leaves that lie inside ``run``, left to right.

    >>> cover(Range(3, 8), 8)
    (Range(begin=3, end=4), Range(begin=4, end=8))
    """

    def inside(node: Range) -> tuple[Range, ...]:
        if run.begin <= node.begin and node.end <= run.end:
            return (node,)
        if node.end <= run.begin or run.end <= node.begin:
            return ()
        left, right = split(node)
        return inside(left) + inside(right)

    return inside(Range(0, n_leaves))


def pieces(run: Range, n_leaves: int, clocks: Sequence[Int64]) -> tuple[Range, ...]:
    """The nodes that a successor pushes for ``run``: its cover, cut where any shard's ``clocks`` (n_leaves,) differ.

    A shard takes a node for all its leaves or for none; where the dead left some leaves ahead of others those are
    pushed apart.

    >>> pieces(Range(0, 4), 4, [np.array([5, 5, 6, 6])]), pieces(Range(0, 4), 4, [np.array([5, 5, 5, 5])])
    ((Range(begin=0, end=2), Range(begin=2, end=4)), (Range(begin=0, end=4),))
    """
    cuts = [v for v in range(run.begin + 1, run.end) if any(c[v] != c[v - 1] for c in clocks)]
    edges = [run.begin, *cuts, run.end]
    return tuple(node for a, b in pairwise(edges) for node in cover(Range(a, b), n_leaves))


def is_node(node: Range, n_leaves: int) -> bool:
    """Whether ``node`` is a node of the tree over ``n_leaves`` leaves."""
    return 0 <= node.begin < node.end <= n_leaves and cover(node, n_leaves) == (node,)


def add(left: Partial, right: Partial) -> Partial:
    """left + right; where one has no gradient the other's is passed on untouched (-0.0 + 0 would change bits).

    What overflows warns, unless the caller has numpy ignore it: the shard refuses what is not finite.
    """
    gradient = left.gradient if right.gradient is None else right.gradient
    if left.gradient is not None and right.gradient is not None:
        gradient = np.add(left.gradient, right.gradient)
    return Partial(gradient, left.loss + right.loss, left.rows + right.rows)


def sum_leaves(node: Range, leaf: Callable[[int, Float32], Partial], memory: Sequence[Float32]) -> Partial:
    """The sum of the leaves below ``node`` along the tree.

    leaf: (leaf, where its gradient may be written) -> what it contributes
    memory: ``depth(n) + 1`` vectors, n the leaves of ``node``; the gradient of the sum is in one of them, in the first
    unless leaves are absent

    What overflows warns, unless the caller has numpy ignore it: the shard refuses what is not finite.
    """
    free = list(memory)
    sums: list[Partial] = []  # a stack; the gradient of each is in the vector at the same place of ``free``
    for v, count in zip(range(node.begin, node.end), merges(len(node)), strict=True):
        sums.append(leaf(v, free[len(sums)]))
        for _ in range(count):
            right, left = sums.pop(), sums.pop()
            at = len(sums)
            if left.gradient is not None and right.gradient is not None:
                np.add(left.gradient, right.gradient, out=left.gradient)
            elif right.gradient is not None:  # passed on untouched; its vector is now the left one
                free[at], free[at + 1] = free[at + 1], free[at]
            gradient = right.gradient if left.gradient is None else left.gradient
            sums.append(Partial(gradient, left.loss + right.loss, left.rows + right.rows))
    return sums[0]


@lru_cache(maxsize=4096)
def merges(n_leaves: int) -> tuple[int, ...]:
    """How many sums are complete after each leaf, left to right: each adds up the two newest terms.

    >>> merges(5)
    (0, 1, 0, 2, 1)
    """
    if n_leaves == 1:
        return (0,)
    left = left_leaves(n_leaves)
    right = merges(n_leaves - left)
    return (*merges(left), *right[:-1], right[-1] + 1)


def depth(n_leaves: int) -> int:
    """ceil(log2 n): how many additions lie between a leaf and the root at most.

    >>> [depth(n) for n in (1, 2, 3, 4, 5, 8)]
    [0, 1, 2, 2, 3, 3]
    """
    return (n_leaves - 1).bit_length()


class TreeSum:
    """The parts of one step as they arrive, in any order, and their sum along the fixed tree.

    root: the node that is summed; default: that over all leaves
    """

    def __init__(self, n_leaves: int, root: Range | None = None) -> None:
        self.root = root or Range(0, n_leaves)
        #: disjoint nodes of the tree: no part is an ancestor of another
        self.parts: dict[Range, Partial] = {}

    def offer(self, node: Range, partial: Partial) -> bool:
        """Take a node's sum; False where it, or an ancestor of it, is already here.

        Accepting a node drops its descendants: whoever sent it summed the same leaves again.
        """
        if any(p.begin <= node.begin and node.end <= p.end for p in self.parts):
            return False
        inside = [p for p in self.parts if node.begin <= p.begin and p.end <= node.end]
        for p in inside:
            del self.parts[p]
        self.parts[node] = partial
        return True

    @property
    def complete(self) -> bool:
        return sum(len(p) for p in self.parts) == len(self.root)

    def total(self, block: slice = slice(None)) -> Partial:
        """The sum over all leaves of the root, of the coordinates in ``block``; only when complete.

        Element by element, so summing block by block gives the same bits. The gradient may be one of the parts:
        not to be written to.
        """
        assert self.complete, sorted(self.parts)
        order = additions(self.root, tuple(sorted(self.parts)))
        terms = [_block(self.parts[node], block) for node in sorted(self.parts)]
        for left, right in order:
            terms.append(add(terms[left], terms[right]))
        return terms[-1]


def add_up(terms: list[float], order: Order) -> float:
    """The sum of numbers as ``order`` says; ``terms`` grows by the sums on the way.

    >>> add_up([1.0, 2.0, 4.0], ((1, 2), (0, 3)))
    7.0
    """
    for left, right in order:
        terms.append(terms[left] + terms[right])
    return terms[-1]


@lru_cache(maxsize=65_536)
def additions(root: Range, parts: tuple[Range, ...]) -> Order:
    """Which two terms to add, one pair after the other, so that the disjoint nodes ``parts`` of the tree over ``root``
    are summed along it: the parts are the first terms, each sum is the next; the last term is the total.

    >>> additions(Range(0, 8), (Range(0, 4), Range(4, 6), Range(6, 8)))
    ((1, 2), (0, 3))
    """
    number = {part: i for i, part in enumerate(parts)}
    pairs: list[tuple[int, int]] = []

    def term(node: Range) -> int:
        if node in number:
            return number[node]
        left, right = split(node)
        pairs.append((term(left), term(right)))
        return len(parts) + len(pairs) - 1

    term(root)
    return tuple(pairs)


def _block(part: Partial, block: slice) -> Partial:
    if part.gradient is None or block == slice(None):
        return part
    return Partial(part.gradient[block], part.loss, part.rows)
