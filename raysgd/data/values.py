"""The values of Arrow columns as numpy arrays and as canonical categories, missing ones marked.

numbers     bool, integer, float, decimal, fixed-size lists of them -> (n_rows, width), NaN where missing
categories  string, integer, boolean, dictionaries of them          -> string, int64 or bool, null where missing
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from raysgd.data.columns import is_string, value_type
from raysgd.learn import hashing
from raysgd.learn.batch import Float64

#: Integers up to here are exact in float64.
EXACT_INTEGER = 2**53
FLOAT32_MAX = float(np.finfo(np.float32).max)
#: Elements converted to float64 at a time: 8 MiB.
BLOCK = 2**20

Numbers = npt.NDArray[np.generic]


def single_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array, dictionaries decoded."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # no chunks, or more than one array can hold
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array.dictionary_decode() if types.is_dictionary(array.type) else array


def numbers(column: pa.ChunkedArray | pa.Array, width: int = 1) -> Numbers:
    """(n_rows, width) numbers in a numpy type that holds them exactly or as float64; NaN where a value is missing.

    column: numbers, or fixed-size lists of ``width`` numbers
    """
    array = single_array(column)
    absent = None
    if types.is_fixed_size_list(array.type):
        absent = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
        array = array.values.slice(array.offset * width, len(array) * width)
    if types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    elif types.is_decimal(array.type):
        array = array.cast(pa.float64())
    elif array.null_count and types.is_integer(array.type):
        array = array.cast(pa.float64(), safe=False)
    values: Numbers = array.to_numpy(zero_copy_only=False).reshape(-1, width)
    if absent is not None:
        values = values.astype(np.float64)
        values[absent] = np.nan
    return values


def missing(values: Numbers) -> npt.NDArray[np.bool_] | None:
    """(n_rows, width) True where a value of :func:`numbers` is missing; None where none is."""
    if values.dtype.kind != "f":
        return None
    mask: npt.NDArray[np.bool_] = np.isnan(values)
    return mask if mask.any() else None


def row_blocks(values: Numbers) -> Iterator[slice]:
    """Slices of rows that hold at most ``BLOCK`` elements each."""
    step = max(1, BLOCK // max(1, values.shape[1]))
    for begin in range(0, len(values), step):
        yield slice(begin, begin + step)


def coordinate_blocks(values: Numbers) -> Iterator[tuple[slice, Float64]]:
    """Groups of coordinates, each as (n_rows, k) float64: small pieces of a wide column."""
    step = max(1, min(64, BLOCK // max(1, len(values))))
    for begin in range(0, values.shape[1], step):
        part = slice(begin, begin + step)
        yield part, np.ascontiguousarray(values[:, part], np.float64)


def categories(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column's values as string, int64 or bool, so that equal values of different files are equal.

    Raises ArrowInvalid where an unsigned integer exceeds int64.
    """
    array = single_array(column)
    return array.cast(category_type(array.type))


def category_hashes(array: pa.Array, seed: np.uint64) -> hashing.UInt64:
    """(n,) uint64: the hash of each value of :func:`categories`, of the missing ones too.

    Raises ArrowInvalid where an unsigned integer exceeds int64.
    """
    values = categories(array)
    absent = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    if types.is_string(values.type) and len(values):
        _, offsets, data = values.buffers()
        ends = np.frombuffer(offsets, np.int32, len(values) + 1, 4 * values.offset).astype(np.int64)
        text = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
        hashes = hashing.hash_strings(text, ends, seed)
    else:
        filled = values if types.is_int64(values.type) else values.cast(pa.int64())
        hashes = hashing.hash_integers(filled.fill_null(0).to_numpy(zero_copy_only=False), seed)
    if absent is not None:
        hashes[absent] = hashing.hash_missing(seed)
    return hashes


def category_type(kind: pa.DataType) -> pa.DataType:
    """The canonical type of the categories of a column.

    >>> category_type(pa.dictionary(pa.int8(), pa.large_string())), category_type(pa.int16())
    (DataType(string), DataType(int64))
    """
    kind = value_type(kind)
    if is_string(kind):
        return pa.string()
    return pa.int64() if types.is_integer(kind) else pa.bool_()


def class_values(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A label column's values as string, int64, bool or float64: what names a class."""
    array = single_array(column)
    if types.is_floating(array.type) or types.is_decimal(array.type):
        return pc.add(array.cast(pa.float64()), 0.0)  # -0.0 is 0.0
    return array.cast(category_type(array.type))


def distinct(values: pa.Array) -> pa.Array:
    """The distinct values that are not null, sorted by value (strings by their UTF-8 bytes)."""
    found = pc.drop_null(pc.unique(values))
    if types.is_boolean(found.type):  # Arrow has no order for booleans in every version
        return pa.array(sorted(found.to_pylist()), found.type)
    return found.take(pc.sort_indices(found))


def indexed_dictionary(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, npt.NDArray[np.intp]]:
    """A dictionary column as (its distinct values, (n_rows,) positions among them; -1 where null)."""
    array = column.unify_dictionaries().combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    indices = array.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return array.dictionary, indices
