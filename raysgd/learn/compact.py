"""The distinct ids of a step, sorted, and each id's position among them: from 2^hash_bits weights to the few touched.

ids      9 4 9 7            coordinates of the whole vector
unique   4 7 9              what is pulled, in this order
inverse  2 0 2 1            where each id stands in what was pulled
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from raysgd.learn.batch import Int32

Index: TypeAlias = npt.NDArray[np.intp]

_LOW = np.int32(0xFFFF)


def unique_inverse(ids: Int32) -> tuple[Int32, Index]:
    """As ``np.unique(ids, return_inverse=True)``, three to five times as fast. ids: (n,) int32, none negative.

    Two stable passes over 16 bits each: numpy sorts 16-bit integers by counting.

    >>> unique_inverse(np.array([9, 4, 9, 7], np.int32))
    (array([4, 7, 9], dtype=int32), array([2, 0, 2, 1]))
    """
    low = (ids & _LOW).astype(np.uint16)
    order = np.argsort(low, kind="stable")
    high = (ids >> np.int32(16)).astype(np.uint16)
    return _ranks(ids, order.take(np.argsort(high.take(order), kind="stable")))


def merge_inverse(parts: Sequence[Int32]) -> tuple[Int32, Index]:
    """The distinct ids of some ascending arrays, and the position of each id of all of them, one after the other.

    >>> merge_inverse([np.array([4, 9], np.int32), np.array([7, 9], np.int32)])
    (array([4, 7, 9], dtype=int32), array([0, 2, 1, 2]))
    """
    ids = np.concatenate(parts)
    return _ranks(ids, np.argsort(ids, kind="stable"))  # of wider integers numpy merges the runs it finds


def _ranks(ids: Int32, order: Index) -> tuple[Int32, Index]:
    """The distinct ids and their inverse, from the order that sorts them."""
    if not len(ids):
        return ids.copy(), order
    ordered = ids.take(order)
    first = np.empty(len(ids), np.bool_)
    first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    rank = np.cumsum(first, dtype=np.intp)
    rank -= 1
    inverse = np.empty(len(ids), np.intp)
    inverse[order] = rank
    return ordered[first], inverse
