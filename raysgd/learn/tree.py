"""The one shape of every sum whose bits must not depend on who computed what.

A node over n leaves splits at the largest power of two below n: n = 5 is ((0 1)(2 3)) 4. Gradients, losses and
statistics are all added along it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def left_leaves(n_leaves: int) -> int:
    """How many of a node's ``n_leaves`` >= 2 leaves are in its left half: the largest power of two below.

    >>> [left_leaves(n) for n in (2, 3, 4, 5, 8, 9)]
    [1, 2, 2, 4, 4, 8]
    """
    assert n_leaves >= 2, n_leaves
    return 1 << (n_leaves - 1).bit_length() - 1


def tree_reduce(leaves: Sequence[T], add: Callable[[T, T], T]) -> T:
    """Add one or more leaves in pairs along the tree.

    >>> tree_reduce(["a", "b", "c", "d", "e"], lambda x, y: f"({x}{y})")
    '(((ab)(cd))e)'
    """
    if len(leaves) == 1:
        return leaves[0]
    half = left_leaves(len(leaves))
    return add(tree_reduce(leaves[:half], add), tree_reduce(leaves[half:], add))
