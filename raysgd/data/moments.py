"""Statistics of the training data: per shard, merged along one fixed tree.

    n, mean, M2 = sum (x - mean)^2      per numeric coordinate, in float64
    a + b:  d = mean_b - mean_a,  mean = mean_a + d n_b / n,  M2 = M2_a + M2_b + d^2 n_a n_b / n

Addition of floats is not associative, so the order of the merges is fixed: a node over n shards splits at the largest
power of two below n. Whoever computed which shard, the result has the same bytes.

Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from raysgd.data.columns import Columns, is_number
from raysgd.data.dataset import Dataset
from raysgd.data.values import (
    EXACT_INTEGER,
    FLOAT32_MAX,
    Numbers,
    categories,
    class_values,
    coordinate_blocks,
    distinct,
    missing,
    numbers,
    single_array,
)
from raysgd.errors import InputError
from raysgd.learn.batch import Float64, Int64
from raysgd.learn.tree import tree_reduce

#: A label with more distinct values than this is a number, not a class.
MAX_CLASSES = 10_000
MAX_LISTED = 20

ClassValue = bool | int | float | str


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of each coordinate: (k,) int64, float64, float64."""

    n: Int64
    mean: Float64
    m2: Float64

    @classmethod
    def of(cls, values: Numbers) -> Moments:
        """The moments of (n_rows, k) numbers, NaN being missing."""
        parts = [_block_moments(block) for _, block in coordinate_blocks(values)]
        if not parts:
            return cls(np.empty(0, np.int64), np.empty(0), np.empty(0))
        return cls.join(parts)

    @classmethod
    def join(cls, parts: Sequence[Moments]) -> Moments:
        """The coordinates of several moments side by side."""
        empty = cls(np.empty(0, np.int64), np.empty(0), np.empty(0))
        parts = [empty, *parts]
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("n", "mean", "m2")))

    def __add__(self, other: Moments) -> Moments:
        n = self.n + other.n
        share = other.n / np.maximum(n, 1)
        d = other.mean - self.mean
        mean = np.where(self.n == 0, other.mean, np.where(other.n == 0, self.mean, self.mean + d * share))
        return Moments(n, mean, self.m2 + other.m2 + d * d * (self.n * share) * ((self.n > 0) & (other.n > 0)))

    @property
    def variance(self) -> Float64:
        """(k,) population variance; 0 where nothing was seen."""
        return self.m2 / np.maximum(self.n, 1)


def _block_moments(block: Float64) -> Moments:
    absent = missing(block)
    if absent is None:
        n = np.full(block.shape[1], len(block), np.int64)
    else:
        block = np.where(absent, 0.0, block)
        n = len(block) - absent.sum(axis=0, dtype=np.int64)
    mean = block.sum(axis=0) / np.maximum(n, 1)
    deviation = block - mean
    if absent is not None:
        deviation[absent] = 0.0
    return Moments(n, mean, (deviation * deviation).sum(axis=0))


@dataclass(frozen=True)
class Statistics:
    """What is known of the training data.

    rows:         rows read, those dropped included
    dropped:      rows left out by the null policy: they weigh 0
    numeric:      moments of each numeric coordinate, over the rows not dropped
    vocabularies: per categorical column its distinct values, sorted; none where categories are hashed
    label:        moments of a number label, else None
    classes:      label value -> rows; None where there are more than ``MAX_CLASSES``
    weight_sum:   sum of the weights of the rows not dropped; their number where every row weighs 1
    nulls:        column -> missing values (NaN included), columns with any
    """

    rows: int
    dropped: int
    numeric: Moments
    vocabularies: tuple[pa.Array, ...]
    label: Moments | None
    classes: dict[ClassValue, int] | None
    weight_sum: float
    nulls: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.rows + other.rows,
            self.dropped + other.dropped,
            self.numeric + other.numeric,
            tuple(_union(a, b) for a, b in zip(self.vocabularies, other.vocabularies, strict=True)),
            None if self.label is None or other.label is None else self.label + other.label,
            _added(self.classes, other.classes),
            self.weight_sum + other.weight_sum,
            dict(Counter(self.nulls) + Counter(other.nulls)),
        )

    @property
    def mean_weight(self) -> float:
        """Weight of a row on average, dropped rows counting 0: a step of B rows weighs B times this."""
        return self.weight_sum / self.rows

    def describe(self) -> list[str]:
        """Lines that report what was imputed or dropped; none where nothing was."""
        lines = [f"{count:,} missing values in column {name!r}" for name, count in sorted(self.nulls.items())]
        return lines + ([f"{self.dropped:,} of {self.rows:,} rows dropped"] if self.dropped else [])


@dataclass(frozen=True, slots=True)
class Violation:
    """What cannot be used of one column in one shard.

    where: the shard;  subject, what: the same words in every shard;  count: how many values, None: not counted
    such: the rest of the sentence here: an example, the remedy

    >>> print(Violation("a.parquet, row group 3", "column 'x' has", "infinite values", 2, "; write finite numbers"))
    a.parquet, row group 3: column 'x' has 2 infinite values; write finite numbers
    """

    where: str
    subject: str
    what: str
    count: int | None
    such: str

    def __str__(self) -> str:
        return f"{self.where}: {self.told(self.count)}{self.such}"

    def told(self, count: int | None) -> str:
        """The subject, how many, and what."""
        return f"{self.subject} {'' if count is None else f'{count:,} '}{self.what}"


def _told_once(violations: Sequence[Violation]) -> list[str]:
    """One sentence for each thing that cannot be used: where it is in several shards with how much, and the first."""
    alike: dict[tuple[str, str], list[Violation]] = {}
    for violation in violations:
        alike.setdefault((violation.subject, violation.what), []).append(violation)
    sentences = []
    for first, *others in alike.values():
        if not others:
            sentences.append(str(first))
            continue
        counts = [v.count for v in (first, *others) if v.count is not None]
        places = f"in {1 + len(others):,} row groups, first in {first.where}"
        sentences.append(f"{first.told(sum(counts) if counts else None)} {places}{first.such}")
    return sentences


@dataclass(frozen=True)
class ShardStatistics:
    """The statistics of one shard, and what of it cannot be used."""

    index: int
    values: Statistics
    violations: tuple[Violation, ...] = ()


def shard_statistics(dataset: Dataset, index: int, *, vocabularies: bool = True) -> ShardStatistics:
    """Read one shard and count what is in it. Cheap to pickle.

    vocabularies: False where categories are hashed: none is collected, and the result does not grow with them

    Violations name file, row group and column: missing values where nulls are refused, infinite ones, numbers beyond
    float32 or integers beyond 2^53, negative weights.
    """
    columns, table = dataset.schema, dataset.read(index, as_dictionary=True)
    findings = _Findings(dataset.where(index))
    keep = kept_rows(table, columns) if dataset.nulls == "drop" else None
    dropped = 0 if keep is None else int(len(keep) - keep.sum())
    nulls: dict[str, int] = {}
    if keep is not None:
        nulls = null_counts(table, columns)
        table = table.filter(pa.array(keep))
    for name, count in null_counts(table, columns).items():
        nulls[name] = count
        if dataset.nulls == "refuse" or name in (columns.label, columns.weight):
            findings.add(_has(name), "missing values (null or NaN)", f"; {_null_remedy(name, columns)}", count)
    moments = [_numeric(table.column(name), name, width, findings) for name, width in columns.numeric]
    collected = columns.categorical if vocabularies else ()
    found = tuple(_vocabulary(table.column(name), name, findings) for name in collected)
    label, classes = _label(table, columns, findings)
    weight = _weight_sum(table, columns, findings)
    statistics = Statistics(len(table) + dropped, dropped, Moments.join(moments), found, label, classes, weight, nulls)
    return ShardStatistics(index, statistics, tuple(findings.found))


class _Findings:
    """Violations of one shard."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: list[Violation] = []

    def add(self, subject: str, what: str, such: str, count: int | None = None) -> None:
        self.found.append(Violation(self.where, subject, what, count, such))


def _has(name: str) -> str:
    return f"column {name!r} has"


def _null_remedy(name: str, columns: Columns) -> str:
    if name in (columns.label, columns.weight):
        return 'set nulls = "drop" to leave such rows out'
    return 'set nulls = "impute" or "drop", or leave the column out'


def null_counts(table: pa.Table, columns: Columns) -> dict[str, int]:
    """Missing values of each column of ``table`` that has any; NaN is missing."""
    counts = {name: int(missing_rows(table.column(name), columns, name).sum()) for name in columns.names}
    return {name: count for name, count in counts.items() if count}


def missing_rows(column: pa.ChunkedArray, columns: Columns, name: str) -> npt.NDArray[np.bool_]:
    """(n_rows,) True where the column has no value: null or NaN, in any element of a list."""
    widths = dict(columns.numeric)
    if name in widths or (types.is_floating(column.type) and name not in columns.categorical):
        absent = missing(numbers(column, widths.get(name, 1))) if _may_miss(column) else None
        if absent is None:
            return np.zeros(len(column), np.bool_)
        return np.asarray(absent.any(axis=1), np.bool_)
    if column.null_count == 0:
        return np.zeros(len(column), np.bool_)
    mask: npt.NDArray[np.bool_] = column.is_null().to_numpy(zero_copy_only=False)
    return mask


def _may_miss(column: pa.ChunkedArray) -> bool:
    return column.null_count > 0 or not (types.is_integer(column.type) or types.is_boolean(column.type))


def kept_rows(table: pa.Table, columns: Columns) -> npt.NDArray[np.bool_]:
    """(n_rows,) True where no column that has a role misses its value."""
    keep = np.ones(len(table), np.bool_)
    for name in columns.names:
        keep &= ~missing_rows(table.column(name), columns, name)
    return keep


def _numeric(column: pa.ChunkedArray, name: str, width: int, findings: _Findings, *, feature: bool = True) -> Moments:
    values = numbers(column, width)
    usable = check_numbers(values, single_array(column), name, findings, feature=feature)
    if not usable:  # the run stops at these; moments of infinities would only warn
        return Moments(np.zeros(width, np.int64), np.zeros(width), np.zeros(width))
    return Moments.of(values)


def check_numbers(values: Numbers, array: pa.Array, name: str, findings: _Findings, *, feature: bool = False) -> bool:
    """Report values that float32 or float64 cannot hold; True where all are usable.

    array: as it was read;  feature: whether the column can be categorical instead
    """
    elements = array.flatten() if types.is_fixed_size_list(array.type) else array
    if types.is_integer(elements.type) and elements.type.bit_width == 64 and len(elements):
        bounds = pc.min_max(elements).as_py()
        if bounds["min"] is not None and max(-bounds["min"], bounds["max"]) > EXACT_INTEGER:
            far = max(bounds.values(), key=abs)
            remedy = "use it as categorical, or write smaller" if feature else "write smaller ones"
            findings.add(_has(name), "integers beyond 2^53", f", such as {far}; {remedy}")
            return False
    if values.dtype.kind != "f" or values.size == 0:
        return True
    with np.errstate(invalid="ignore"):
        size = np.abs(values)
    largest = float(np.fmax.reduce(size, axis=None))
    if np.isinf(largest):
        findings.add(_has(name), "infinite values", "; write finite numbers", int(np.isinf(size).sum()))
        return False
    if largest > FLOAT32_MAX:
        findings.add(_has(name), "numbers beyond float32 (3.4e38)", f", such as {largest:g}; scale it")
        return False
    return True


def _vocabulary(column: pa.ChunkedArray, name: str, findings: _Findings) -> pa.Array:
    try:
        return distinct(categories(column.unify_dictionaries().unique()))
    except pa.ArrowInvalid as error:
        findings.add(f"column {name!r}", "cannot be read as categories", f": {error}")
        return pa.array([], pa.int64())


def _label(table: pa.Table, columns: Columns, findings: _Findings) -> tuple[Moments | None, dict[Any, int] | None]:
    if columns.label is None:
        return None, None
    column = table.column(columns.label)
    moments = _numeric(column, columns.label, 1, findings, feature=False) if is_number(column.type) else None
    return moments, _class_counts(column)


def _class_counts(column: pa.ChunkedArray) -> dict[ClassValue, int] | None:
    try:
        values = pc.drop_null(class_values(column))
    except pa.ArrowInvalid:  # integers beyond int64
        return None
    if types.is_floating(values.type):
        values = values.filter(pc.invert(pc.is_nan(values)))
    counted = pc.value_counts(values)
    if len(counted) > MAX_CLASSES:
        return None
    pairs = zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True)
    return dict(sorted(pairs))


def _weight_sum(table: pa.Table, columns: Columns, findings: _Findings) -> float:
    if columns.weight is None:
        return float(len(table))
    values = numbers(table.column(columns.weight))
    if not check_numbers(values, single_array(table.column(columns.weight)), columns.weight, findings):
        return 0.0
    if (negative := int(np.less(values, 0).sum())) > 0:
        findings.add(_has(columns.weight), "negative weights", "; weights must be >= 0", negative)
    nothing = values.astype(np.float32) == 0  # as it will be used
    return float(np.nansum(np.where(nothing, 0, values), dtype=np.float64))


def _union(a: pa.Array, b: pa.Array) -> pa.Array:
    return a if a.equals(b) else distinct(pa.concat_arrays([a, b]))


def _added(a: dict[Any, int] | None, b: dict[Any, int] | None) -> dict[Any, int] | None:
    if a is None or b is None:
        return None
    total = Counter(a)
    total.update(b)
    return dict(sorted(total.items())) if len(total) <= MAX_CLASSES else None


def refuse(shards: Sequence[ShardStatistics]) -> None:
    """Raises InputError with what cannot be used of these shards: one sentence a column and fault, the first 20, and
    how many more."""
    if sentences := _told_once([violation for shard in shards for violation in shard.violations]):
        more = len(sentences) - MAX_LISTED
        raise InputError([*sentences[:MAX_LISTED], *([f"and {more} more"] if more > 0 else [])])


def merge(shards: Sequence[ShardStatistics]) -> Statistics:
    """The statistics of all shards, in whatever order they come: the same bytes whoever computed which.

    Raises InputError as :func:`refuse`, and where every row is dropped or all weights are 0.
    """
    ordered = sorted(shards, key=lambda s: s.index)
    assert [s.index for s in ordered] == list(range(len(ordered))), "every shard once"
    refuse(ordered)
    total = tree_reduce([s.values for s in ordered], Statistics.__add__)
    if total.dropped == total.rows:
        raise InputError(f'nulls = "drop" leaves no row: each of {total.rows:,} misses a value')
    if total.weight_sum <= 0:
        raise InputError("the weights must have a positive sum, got 0 (in float32, where 1e-46 is 0, too)")
    return total
