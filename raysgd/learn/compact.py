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


def unique_inverse(ids: Int32) -> tuple[Int32, Index]:
    """As ``np.unique(ids, return_inverse=True)``, several times as fast. ids: (n,) int32, none negative.

    Each id is sorted with its position in the bits below: numpy sorts numbers far faster than positions by them.

    >>> unique_inverse(np.array([9, 4, 9, 7], np.int32))
    (array([4, 7, 9], dtype=int32), array([2, 0, 2, 1]))
    """
    bits = len(ids).bit_length()
    packed = ids.astype(np.int64)
    packed <<= bits
    packed |= np.arange(len(ids))
    packed.sort()
    order = packed & ((1 << bits) - 1)
    packed >>= bits
    return _ranks(packed.astype(np.int32), order)


def merge_inverse(parts: Sequence[Int32]) -> tuple[Int32, Index]:
    """The distinct ids of some ascending arrays, and the position of each id of all of them, one after the other.

    >>> merge_inverse([np.array([4, 9], np.int32), np.array([7, 9], np.int32)])
    (array([4, 7, 9], dtype=int32), array([0, 2, 1, 2]))
    """
    ids = np.concatenate(parts)
    order = np.argsort(ids, kind="stable")  # of wider integers than 16 bits numpy merges the runs it finds
    return _ranks(ids.take(order), order)


def _ranks(ordered: Int32, order: Index) -> tuple[Int32, Index]:
    """The distinct ids and their inverse, from the ids in order and the positions they came from."""
    if not len(ordered):
        return ordered, order
    first = np.empty(len(ordered), np.bool_)
    first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    rank = np.cumsum(first, dtype=np.intp)
    rank -= 1
    inverse = np.empty(len(ordered), np.intp)
    inverse[order] = rank
    return ordered[first], inverse
