"""Hashed columns: the documented ids whatever Arrow type or chunks hold the values; nothing is collected for them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysgd.data.columns import Columns
from raysgd.data.dataset import ArrowDataset, open_dataset
from raysgd.data.encode import Encoder
from raysgd.data.loader import Loader
from raysgd.data.moments import merge, shard_statistics
from raysgd.data.sampler import Sampler
from raysgd.errors import InputError
from raysgd.learn import hashing
from raysgd.learn.parameters import Range

BITS = 20
VALUES = ["UA", "Hawaiian", "", "UA", "日本", "exactly8", "nine chars"]


def encoder(names: tuple[str, ...] = ("c",), nulls: str = "refuse") -> Encoder:
    return Encoder(Columns((), names), "number", nulls, np.empty(0), np.empty(0), (), (), BITS)


def ids_of(values: list[Any], name: str = "c") -> list[int]:
    """One value at a time."""
    seed = hashing.column_seed(name)
    found = []
    for value in values:
        if value is None:
            h = np.array([hashing.hash_missing(seed)])
        elif isinstance(value, str):
            data = np.frombuffer(value.encode(), np.uint8)
            h = hashing.hash_strings(data, np.array([0, len(data)]), seed)
        else:
            h = hashing.hash_integers(np.array([int(value)]), seed)
        found.append(int(hashing.ids(h, BITS)[0]))
    return found


def codes(column: Any, nulls: str = "refuse") -> list[int]:
    batch, unseen = encoder(nulls=nulls).apply(pa.table({"c": column}), with_label=False)
    assert unseen == 0
    assert batch.codes.dtype == np.int32
    return batch.codes[:, 0].tolist()


@pytest.mark.parametrize(
    "column",
    [
        pa.array(VALUES),
        pa.array(VALUES, pa.large_string()),
        pa.array(VALUES).dictionary_encode(),
        pa.array(VALUES).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.large_string())),
        pa.chunked_array([VALUES[:3], [], VALUES[3:]]),
        pa.chunked_array([pa.array(VALUES[:4]).dictionary_encode(), pa.array(VALUES[4:]).dictionary_encode()]),
        pa.array(["left out", *VALUES])[1:],
        pa.array(["left out", *VALUES]).dictionary_encode()[1:],
        pa.array(VALUES).cast(pa.string_view()),
    ],
    ids=["string", "large", "dictionary", "int8", "chunks", "dictionaries", "slice", "dictionary-slice", "view"],
)
def test_strings_hash_alike_however_arrow_holds_them(column: Any) -> None:
    assert codes(column) == ids_of(VALUES)


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int64(), pa.uint64()])
def test_integers_hash_by_value(kind: pa.DataType) -> None:
    values = [3, 0, 100, 3]
    assert codes(pa.array(values, kind)) == ids_of(values)
    assert codes(pa.array(values, kind).dictionary_encode()) == ids_of(values)


def test_booleans_are_zero_and_one() -> None:
    assert codes(pa.array([True, False])) == ids_of([1, 0])
    assert codes(pa.array([True, None]), "impute") == ids_of([1, None])


def test_missing_values_are_a_category_where_they_are_imputed() -> None:
    values = ["a", None, "b", None]
    for column in (pa.array(values), pa.array(values).dictionary_encode()):
        assert codes(column, "impute") == ids_of(values)
        with pytest.raises(InputError, match="2 missing values"):
            codes(column)
        batch, _ = encoder(nulls="drop").apply(pa.table({"c": column}), with_label=False)
        assert batch.codes[:, 0].tolist() == [*ids_of(["a"]), 2**BITS, *ids_of(["b"]), 2**BITS]
        assert batch.weight is not None
        assert batch.weight.tolist() == [1, 0, 1, 0]
    null_in_dictionary = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["a", None]))
    assert codes(null_in_dictionary, "impute") == ids_of(["a", None, "a"])
    assert codes(pa.array([5, None]), "impute") == ids_of([5, None])


def test_columns_hash_apart() -> None:
    table = pa.table({"c": VALUES, "d": VALUES})
    batch, _ = encoder(("c", "d")).apply(table, with_label=False)
    assert batch.codes[:, 1].tolist() == ids_of(VALUES, "d")
    assert not set(batch.codes[:, 0].tolist()) & set(batch.codes[:, 1].tolist())


def test_integers_beyond_int64_are_refused() -> None:
    with pytest.raises(InputError, match="'c' cannot be read as categories"):
        codes(pa.array([2**63], pa.uint64()))


def test_the_encoder_keeps_no_vocabulary(tmp_path: Path) -> None:
    """Statistics and encoder stay small whatever the number of values; the loader serves the hashed codes."""
    n = 20_000
    table = pa.table({"user": [f"user {i}" for i in range(n)], "x": np.arange(n) * 1.0, "y": np.arange(n) % 2})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=5_000)
    dataset = open_dataset(ArrowDataset(str(tmp_path), label="y"))
    found = [shard_statistics(dataset, s.index, vocabularies=False) for s in dataset.shards]
    assert max(len(pickle.dumps(s)) for s in found) < 2_000
    fitted = Encoder.fit(merge(found), dataset.schema, "class", hash_bits=BITS)
    assert len(json.dumps(fitted.to_json())) < 1_000
    again = Encoder.from_json(json.loads(json.dumps(fitted.to_json())))
    assert (again.inputs, again.hash_bits) == (fitted.inputs, BITS)
    assert (again.inputs.n_codes, again.inputs.categories) == (2**BITS, (2**BITS,))
    assert (
        "hash_bits"
        not in Encoder.fit(
            merge([shard_statistics(dataset, s.index) for s in dataset.shards]), dataset.schema, "class"
        ).to_json()
    )
    expected = np.array(ids_of([f"user {i}" for i in range(n)], "user"), np.int32)
    sampler = Sampler(dataset.shard_rows, 500, 2, seed=0, window_rows=6_000)
    with Loader(dataset, again, sampler, Range(0, 2)) as loader:
        batch = loader.batch(3, 1)
        assert batch is not None
        assert np.array_equal(batch.codes[:, 0], expected[sampler.row_ids(3, 1)])
