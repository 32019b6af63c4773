"""The rows of a minibatch as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]
Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model is fed: ``numeric`` columns of float32 and one code per categorical column.

    ``categories[j]`` is the number of distinct values of categorical column j. Codes of column j lie in
    ``[sum(categories[:j]), sum(categories[:j + 1]))``; the code ``n_codes`` stands for a value that
    training did not see and contributes zero.

    With ``hash_bits`` a code is a hash (:mod:`raysgd.learn.hashing`): all columns share ``[0, 2^hash_bits)``, no value
    is unseen, and the code ``n_codes`` stands in rows that do not count.
    """

    numeric: int
    categories: tuple[int, ...] = ()
    hash_bits: int = 0

    @property
    def n_codes(self) -> int:
        return 1 << self.hash_bits if self.hash_bits else sum(self.categories)


@dataclass(frozen=True, slots=True)
class Target:
    """What a model predicts: a number (``classes == 0``), or one of ``classes >= 2`` classes."""

    classes: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a table, encoded. All arrays are C-contiguous and have the same first dimension (rows).

    numeric: (n_rows, n_numeric) float32, zero mean and unit variance over the training data
    codes:   (n_rows, n_categorical) int32, see :class:`Inputs`
    label:   (n_rows,) float32 for a number, the class index as float32 for classes
    weight:  (n_rows,) float32, or None where every row weighs 1
    """

    numeric: Float32
    codes: Int32
    label: Float32
    weight: Float32 | None = None

    def __len__(self) -> int:
        return len(self.label)

    def slice(self, begin: int, end: int) -> Batch:
        """Rows [begin, end) as views."""
        weight = None if self.weight is None else self.weight[begin:end]
        return Batch(self.numeric[begin:end], self.codes[begin:end], self.label[begin:end], weight)

    def take(self, rows: npt.NDArray[np.intp]) -> Batch:
        """The rows at these positions, in this order, as fresh contiguous arrays."""
        weight = None if self.weight is None else self.weight.take(rows)
        return Batch(self.numeric.take(rows, axis=0), self.codes.take(rows, axis=0), self.label.take(rows), weight)

    def copy(self) -> Batch:
        weight = None if self.weight is None else self.weight.copy()
        return Batch(self.numeric.copy(), self.codes.copy(), self.label.copy(), weight)

    @property
    def nbytes(self) -> int:
        weight = 0 if self.weight is None else self.weight.nbytes
        return self.numeric.nbytes + self.codes.nbytes + self.label.nbytes + weight


def concatenate(parts: Sequence[Batch]) -> Batch:
    """The rows of several batches one after the other; a single part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    return Batch(
        np.concatenate([p.numeric for p in parts]),
        np.concatenate([p.codes for p in parts]),
        np.concatenate([p.label for p in parts]),
        joined_weights(parts),
    )


def joined_weights(parts: Sequence[Batch]) -> Float32 | None:
    """The weights of several batches one after the other, None where no row of any has one."""
    if all(p.weight is None for p in parts):
        return None
    return np.concatenate([np.ones(len(p), np.float32) if p.weight is None else p.weight for p in parts])
