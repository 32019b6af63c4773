"""Turn a table into what models are fed: standardized numbers, category codes, labels. Fitted on training data alone.

numeric      (x - mean) * scale in float64, then float32; scale = 1 / standard deviation, 1 where that is 0
categorical  position in the sorted vocabulary, behind those of the columns before; unseen or missing: n_codes
             with hash_bits: the hash of the value, see raysgd/learn/hashing.py; missing is a value like any other
label        a class's position among the sorted classes, or the number itself
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from raysgd.data.columns import Columns, listing, matching, value_type
from raysgd.data.moments import MAX_CLASSES, ClassValue, Moments, Statistics
from raysgd.data.values import (
    Numbers,
    categories,
    category_hashes,
    category_type,
    class_values,
    indexed_dictionary,
    missing,
    numbers,
    row_blocks,
)
from raysgd.errors import InputError
from raysgd.learn import hashing
from raysgd.learn.batch import Batch, Float32, Float64, Inputs, Int32, Target

Kind = Literal["class", "number"]
BoolRows = npt.NDArray[np.bool_]
_VALUE_TYPES = {"string": pa.string(), "int64": pa.int64(), "bool": pa.bool_()}


@dataclass(frozen=True, eq=False)
class Encoder:
    """How rows become arrays; everything that prediction needs besides the parameters.

    columns:      the role of each column
    kind:         "class" or "number": what the model predicts
    nulls:        what a missing value does, see :class:`~raysgd.data.dataset.ArrowDataset`
    mean, scale:  (n_numeric,) float64
    vocabularies: per categorical column its values, sorted
    classes:      the sorted label values; empty for a number
    hash_bits:    categories are hashed to this many bits, 0: they have vocabularies

    >>> columns = Columns((("x", 1),), ("c",), "y")
    >>> vocabulary = pa.array(["a", "b"])
    >>> encoder = Encoder(columns, "class", "refuse", np.array([1.0]), np.array([0.5]), (vocabulary,), (False, True))
    >>> batch, unseen = encoder.apply(pa.table({"x": [3, 1], "c": ["b", "z"], "y": [True, False]}))
    >>> batch.numeric.tolist(), batch.codes.tolist(), batch.label.tolist(), unseen
    ([[1.0], [0.0]], [[1], [2]], [1.0, 0.0], 1)
    """

    columns: Columns
    kind: Kind
    nulls: str
    mean: Float64
    scale: Float64
    vocabularies: tuple[pa.Array, ...]
    classes: tuple[bool | int | str, ...]
    hash_bits: int = 0

    @classmethod
    def fit(
        cls, statistics: Statistics, columns: Columns, kind: Kind, nulls: str = "refuse", hash_bits: int = 0
    ) -> Encoder:
        """The encoder of the training data that ``statistics`` describe.

        Raises InputError where the label is not of this kind, or has one class only.
        """
        classes = _classes(statistics, columns) if kind == "class" else ()
        if kind == "number" and statistics.label is None:
            raise InputError(text_label(columns.label))
        mean = statistics.numeric.mean
        vocabularies = () if hash_bits else statistics.vocabularies
        return cls(columns, kind, nulls, mean, _scale(statistics.numeric), vocabularies, classes, hash_bits)

    @property
    def inputs(self) -> Inputs:
        """The shape of what a model is fed."""
        sizes = tuple(len(v) for v in self.vocabularies)
        if self.hash_bits:
            sizes = (1 << self.hash_bits,) * len(self.columns.categorical)
        return Inputs(self.columns.n_numeric, sizes, self.hash_bits)

    @property
    def target(self) -> Target:
        """What the model predicts."""
        return Target(len(self.classes))

    def apply(self, table: pa.Table | pa.RecordBatch, with_label: bool = True) -> tuple[Batch, int]:
        """Encode rows: (the batch, how many category values training had not seen or were missing).

        table:      has the columns of :attr:`columns`; others are not looked at
        with_label: False for prediction: labels are zeros and no row has a weight

        Raises InputError where a column is missing or of another type, a label is none of the classes, or a value
        cannot be used. Rows that ``nulls = "drop"`` leaves out stay in place as zeros of weight 0.
        """
        columns = self.columns if with_label else Columns(self.columns.numeric, self.columns.categorical)
        if problems := matching(table.schema, columns):
            raise InputError(problems)
        rows = _Rows(table, self.nulls)
        numeric = self._numeric(rows)
        codes, unseen = (self._hashes(rows), 0) if self.hash_bits else self._codes(rows)
        label = self._label(rows) if with_label and columns.label is not None else np.zeros(len(rows), np.float32)
        weight = None if columns.weight is None else rows.numbers_of(columns.weight, "weight")
        if weight is not None and (weight < 0).any():
            raise InputError(f"column {columns.weight!r} has negative weights; weights must be >= 0")
        # A dropped row touches no weight of a hashed model; vocabularies have a code to spare that changes nothing.
        nothing = self.inputs.n_codes if self.hash_bits else 0
        return rows.without_dropped(Batch(numeric, codes, label, weight), nothing), unseen

    def _numeric(self, rows: _Rows) -> Float32:
        out = np.empty((len(rows), self.columns.n_numeric), np.float32)
        begin = 0
        for name, width in self.columns.numeric:
            here = slice(begin, begin + width)
            values = numbers(rows.column(name), width)
            for block in row_blocks(values):
                standardize(values[block], self.mean[here], self.scale[here], out[block, here])
            self._finish_numeric(rows, name, values, out[:, here])
            begin += width
        return out

    def _finish_numeric(self, rows: _Rows, name: str, values: Numbers, out: Float32) -> None:
        if values.dtype.kind != "f" and np.isfinite(out).all():
            return
        absent = missing(values)
        if absent is not None:
            rows.miss(name, np.asarray(absent.any(axis=1), np.bool_))
            out[absent] = 0.0
        if not np.isfinite(out).all():
            raise InputError(f"column {name!r} has infinite values, or numbers too far from those of training")

    def _codes(self, rows: _Rows) -> tuple[Int32, int]:
        codes = np.empty((len(rows), len(self.columns.categorical)), np.int32)
        offset, unseen, n_codes = 0, 0, self.inputs.n_codes
        for j, (name, vocabulary) in enumerate(zip(self.columns.categorical, self.vocabularies, strict=True)):
            column = rows.column(name)
            index = position_in(column, vocabulary, name)
            if column.null_count:
                rows.miss(name, null_mask(column))
            absent = index < 0
            unseen += int(absent.sum())
            codes[:, j] = np.where(absent, n_codes, index + np.int32(offset))
            offset += len(vocabulary)
        return codes, unseen

    def _hashes(self, rows: _Rows) -> Int32:
        codes = np.empty((len(rows), len(self.columns.categorical)), np.int32)
        for j, name in enumerate(self.columns.categorical):
            column = rows.column(name)
            if column.null_count:
                rows.miss(name, null_mask(column))
            hashed_codes(column, name, self.hash_bits, codes[:, j])
        return codes

    def _label(self, rows: _Rows) -> Float32:
        name = self.columns.label
        assert name is not None
        if self.kind == "number":
            return rows.numbers_of(name, "label")
        column = rows.column(name)
        index = position_in(column, pa.array(self.classes), name, role="label")
        absent = null_mask(column)
        if absent.any():
            rows.miss(name, absent, required=True)
        unknown = (index < 0) & ~absent
        if unknown.any():
            values = column.filter(pa.array(unknown)).unique().to_pylist()
            found, known = listing(map(repr, values), 5), listing(map(repr, self.classes), 10)
            raise InputError(f"label {name!r} has values that training did not: {found}; its classes are {known}")
        return np.maximum(index, 0).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types; floats come back to the bit."""
        hashing = {"hash_bits": self.hash_bits} if self.hash_bits else {}
        return {
            **hashing,
            "columns": self.columns.to_json(),
            "kind": self.kind,
            "nulls": self.nulls,
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
            "vocabularies": [{"type": str(v.type), "values": v.to_pylist()} for v in self.vocabularies],
            "classes": list(self.classes),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Encoder:
        """The inverse of :meth:`to_json`."""
        return cls(
            Columns.from_json(state["columns"]),
            state["kind"],
            state["nulls"],
            np.array(state["mean"], np.float64),
            np.array(state["scale"], np.float64),
            tuple(pa.array(v["values"], _VALUE_TYPES[v["type"]]) for v in state["vocabularies"]),
            tuple(state["classes"]),
            int(state.get("hash_bits", 0)),
        )


class _Rows:
    """A table that is being encoded, and which of its rows miss a value."""

    def __init__(self, table: pa.Table | pa.RecordBatch, nulls: str) -> None:
        self._table = table
        self._nulls = nulls
        self._dropped: BoolRows | None = None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def column(self, name: str) -> pa.ChunkedArray | pa.Array:
        return self._table.column(name)

    def miss(self, name: str, absent: BoolRows, required: bool = False) -> None:
        """Column ``name`` has no value in these rows. ``required``: it cannot be imputed."""
        if self._nulls == "refuse" or (required and self._nulls == "impute"):
            allowed = '"drop"' if required else '"impute" or "drop"'
            raise InputError(
                f"column {name!r} has {int(absent.sum()):,} missing values (null or NaN): fill them or leave such rows "
                f"out; only training with nulls = {allowed} makes a model that takes them"
            )
        if self._nulls == "drop":
            self._dropped = absent if self._dropped is None else self._dropped | absent

    def numbers_of(self, name: str, role: str) -> Float32:
        """(n_rows,) a label or weight column as float32."""
        values = numbers(self.column(name))
        absent = missing(values)
        if absent is not None:
            self.miss(name, absent[:, 0], required=True)
            values = np.where(absent, 0.0, values)
        with np.errstate(over="ignore"):
            result = values[:, 0].astype(np.float32)
        if not np.isfinite(result).all():
            raise InputError(f"{role} column {name!r} has infinite values or numbers beyond float32")
        return result

    def without_dropped(self, batch: Batch, code: int) -> Batch:
        """Rows that miss a value as zeros of weight 0 with this code, where such rows are to be dropped."""
        if self._dropped is None or not self._dropped.any():
            return batch
        weight = np.ones(len(batch), np.float32) if batch.weight is None else batch.weight
        for array in (batch.numeric, batch.label, weight):
            array[self._dropped] = 0.0
        batch.codes[self._dropped] = code
        return Batch(batch.numeric, batch.codes, batch.label, weight)


def standardize(values: Numbers, mean: Float64, scale: Float64, out: Float32) -> None:
    """``out = (values - mean) * scale``, computed in float64. values, out: (n_rows, k); mean, scale: (k,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        block = np.subtract(values, mean, dtype=np.float64)
        block *= scale
        out[...] = block


def null_mask(column: pa.ChunkedArray | pa.Array) -> BoolRows:
    """(n_rows,) True where the column is null, or NaN."""
    mask: BoolRows = column.is_null(nan_is_null=types.is_floating(column.type)).to_numpy(zero_copy_only=False)
    return mask


def position_in(column: pa.ChunkedArray | pa.Array, values: pa.Array, name: str, role: str = "categorical") -> Int32:
    """(n_rows,) int32: where in ``values`` each row's value stands; -1 where it does not, or is null.

    Raises InputError where the column's type can hold none of them.
    """
    expected = category_type(values.type)
    try:
        if types.is_dictionary(column.type):
            dictionary, indices = indexed_dictionary(column)
            places = _places(categories(dictionary), values)
            return np.append(places, np.int32(-1))[indices]
        found = class_values(column) if role == "label" else categories(column)
        if found.type != expected and (types.is_floating(found.type) or types.is_boolean(found.type)):
            found = found.cast(expected, safe=False) if types.is_boolean(found.type) else found
            values = values.cast(found.type) if types.is_floating(found.type) else values
        return _places(found, values)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"{role} column {name!r} must hold {expected} as in training, got {value_type(column.type)}"
        ) from error


def hashed_codes(column: pa.ChunkedArray | pa.Array, name: str, bits: int, out: Int32) -> None:
    """The ids of a column's values into ``out`` (n_rows,); of a dictionary each value is hashed once a chunk.

    Raises InputError where an integer is beyond int64.
    """
    seed = hashing.column_seed(name)
    begin = 0
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        part = out[begin : begin + len(chunk)]
        try:
            repeats = types.is_string(chunk.type) or types.is_large_string(chunk.type)
            part[...] = _chunk_ids(chunk.dictionary_encode() if repeats else chunk, seed, bits)
        except pa.ArrowInvalid as error:
            raise InputError(f"categorical column {name!r} cannot be read as categories: {error}") from error
        begin += len(chunk)


def _chunk_ids(chunk: pa.Array, seed: np.uint64, bits: int) -> Int32:
    if not types.is_dictionary(chunk.type):
        return hashing.ids(category_hashes(chunk, seed), bits)
    values = hashing.ids(category_hashes(chunk.dictionary, seed), bits)
    indices = chunk.indices
    if chunk.null_count:
        missing_id = hashing.ids(np.array([hashing.hash_missing(seed)]), bits)
        values = np.concatenate([values, missing_id])
        indices = indices.cast(pa.int64()).fill_null(len(values) - 1)
    return np.asarray(values.take(indices.to_numpy(zero_copy_only=False)), np.int32)


def _places(found: pa.Array, values: pa.Array) -> Int32:
    if found.type != values.type:
        raise pa.ArrowInvalid(f"{found.type} against {values.type}")
    places: Int32 = pc.index_in(found, value_set=values).fill_null(-1).to_numpy(zero_copy_only=False)
    return places


def _scale(moments: Moments) -> Float64:
    variance = moments.variance
    # What rounding leaves of a constant column is not a variance.
    noise = (64 * np.finfo(np.float64).eps * moments.mean) ** 2
    constant = variance <= noise
    return np.asarray(1.0 / np.sqrt(np.where(constant, 1.0, variance)), np.float64)


def _classes(statistics: Statistics, columns: Columns) -> tuple[bool | int | str, ...]:
    counts = statistics.classes
    if counts is None:
        raise InputError(
            f"label {columns.label!r} has more than {MAX_CLASSES:,} distinct values: too many classes; "
            "is it a number to predict by regression?"
        )
    classes = [_class_name(value, columns) for value in counts]
    if len(classes) < 2:
        raise InputError(
            f"label {columns.label!r} must have at least two classes, got only {listing(map(repr, classes))}"
        )
    return tuple(classes)


def text_label(name: str | None) -> str:
    """The sentence about a label of strings where a number is to be predicted."""
    classifiers = "logistic_regression, softmax_regression or an mlp with another loss"
    return f"label {name!r} must hold numbers for this model, got strings: use {classifiers}"


def _class_name(value: ClassValue, columns: Columns) -> bool | int | str:
    if not isinstance(value, float):
        return value
    if value.is_integer():
        return int(value)
    raise InputError(
        f"label {columns.label!r} holds numbers such as {value!r}, which name no class: write classes as integers or "
        'strings, or predict the number (linear_regression, or loss = "squared" of an mlp)'
    )
