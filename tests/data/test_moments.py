"""Statistics: right, the same bytes whoever computed them, and a sentence for each value that cannot be used."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_tables import make_table
from hypothesis import given
from hypothesis import strategies as st

from raysgd.data.dataset import ArrowDataset, Dataset, open_dataset
from raysgd.data.moments import Moments, ShardStatistics, Statistics, merge, shard_statistics, tree_reduce
from raysgd.errors import InputError

Write = Callable[..., Path]


def statistics_of(dataset: Dataset) -> list[ShardStatistics]:
    return [shard_statistics(dataset, i) for i in range(len(dataset.shards))]


def opened(write: Write, table: pa.Table, rows: int = 100, **roles: object) -> Dataset:
    return open_dataset(ArrowDataset(str(write(table, rows=rows)), **{"label": "late", **roles}))  # type: ignore[arg-type]


def violations(dataset: Dataset) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        merge(statistics_of(dataset))
    return caught.value.problems


def test_merged_statistics_are_those_of_the_whole_table(write: Write) -> None:
    table = make_table(1037)
    dataset = opened(write, table, rows=64, weight="id", categorical=["color", "k"])
    total = merge(statistics_of(dataset))
    x = table["x"].to_numpy()
    assert total.rows == 1037
    assert total.numeric.n.tolist() == [1037]
    np.testing.assert_allclose(total.numeric.mean, [x.mean()], rtol=1e-13)
    np.testing.assert_allclose(total.numeric.variance, [x.var()], rtol=1e-12)
    assert [v.to_pylist() for v in total.vocabularies] == [["blue", "green", "red"], list(range(-5, 6))]
    late = table["late"].to_numpy()
    assert total.classes == {0: int((late == 0).sum()), 1: int(late.sum())}
    assert total.label is not None
    np.testing.assert_allclose(total.label.mean, [late.mean()], rtol=1e-13)
    assert total.weight_sum == sum(range(1037))
    assert total.mean_weight == sum(range(1037)) / 1037
    assert total.describe() == []


def test_a_large_mean_does_not_swallow_the_variance(write: Write) -> None:
    x = 1e9 + np.tile([0.0, 1.0], 500)
    total = merge(statistics_of(opened(write, pa.table({"x": x, "late": [0, 1] * 500}), rows=7)))
    # sum of squares minus square of the sum would be off by a hundred here
    np.testing.assert_allclose(total.numeric.variance, [0.25], rtol=1e-6)


@given(st.data())
def test_any_grouping_of_shards_gives_the_same_bytes(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 20))
    rng = np.random.default_rng(count)
    shards = []
    for i in range(count):
        moments = Moments.of(rng.normal(size=(int(rng.integers(0, 9)), 3)) * 10.0**i)
        values = Statistics(
            9, 0, moments, (pa.array([f"v{i % 3}"]),), moments, {i % 2: 9}, float(rng.random()), {"c": i}
        )
        shards.append(ShardStatistics(i, values))
    expected = merge(shards)
    order = data.draw(st.permutations(range(count)))
    cut = data.draw(st.integers(0, count))
    arrived = [pickle.loads(pickle.dumps([shards[i] for i in part])) for part in (order[:cut], order[cut:])]
    result = merge([s for part in arrived for s in part])
    for name in ("n", "mean", "m2"):
        assert getattr(result.numeric, name).tobytes() == getattr(expected.numeric, name).tobytes()
    assert result.weight_sum == expected.weight_sum
    assert list(result.classes or {}) == list(expected.classes or {})
    assert result.vocabularies == expected.vocabularies


def test_the_order_of_merging_matters_so_the_tree_is_fixed() -> None:
    """Why there is a tree at all: added one by one, the same moments have other bytes."""
    rng = np.random.default_rng(0)
    parts = [Moments.of(rng.normal(size=(5, 40)) * 10.0 ** (i % 7)) for i in range(13)]
    chain = parts[0]
    for part in parts[1:]:
        chain = chain + part
    tree = tree_reduce(parts, Moments.__add__)
    np.testing.assert_allclose(tree.m2, chain.m2, rtol=1e-12)
    assert tree.m2.tobytes() != chain.m2.tobytes()


def test_the_shape_of_the_tree() -> None:
    shapes = {n: tree_reduce([str(i) for i in range(n)], lambda a, b: f"({a}{b})") for n in (1, 2, 3, 6, 9)}
    assert shapes == {1: "0", 2: "(01)", 3: "((01)2)", 6: "(((01)(23))(45))", 9: "((((01)(23))((45)(67)))8)"}


def test_merging_with_nothing_seen_keeps_the_other() -> None:
    nothing = Moments.of(np.full((3, 2), np.nan))
    seen = Moments.of(np.array([[1.0, 2.0], [3.0, 2.0]]))
    for total in (nothing + seen, seen + nothing):
        assert (total.n.tolist(), total.mean.tolist(), total.m2.tolist()) == ([2, 2], [2.0, 2.0], [2.0, 0.0])


# -- missing values ---------------------------------------------------------------------------------------------------


def gaps() -> pa.Table:
    return pa.table(
        {
            "x": pa.array([1.0, None, float("nan"), 4.0, 7.0, 6.0]),
            "i": pa.array([None, 2, 3, 4, 5, 6], pa.int32()),
            "c": ["a", "b", None, "a", "c", "a"],
            "v": pa.array(
                [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], None, [1.0, None], [5.0, 6.0]], pa.list_(pa.float32(), 2)
            ),
            "late": pa.array([0, 1, 0, 1, 0, 1]),
        }
    )


def test_missing_values_are_refused_by_name_and_place(write: Write) -> None:
    found = violations(opened(write, gaps(), rows=3))
    where = [p.split("t.parquet, ")[1].split(" missing")[0] for p in found]
    assert where == [
        "row group 0: column 'x' has 2",
        "row group 0: column 'i' has 1",
        "row group 0: column 'c' has 1",
        "row group 1: column 'v' has 2",
    ]
    assert all('set nulls = "impute" or "drop"' in p for p in found)


def test_imputing_leaves_missing_values_out_of_the_moments(write: Write) -> None:
    total = merge(statistics_of(opened(write, gaps(), rows=4, nulls="impute")))
    assert total.numeric.n.tolist() == [4, 5, 5, 4]
    np.testing.assert_allclose(total.numeric.mean, [4.5, 4.0, 9 / 5, 12 / 4])
    assert total.vocabularies[0].to_pylist() == ["a", "b", "c"]
    assert (total.rows, total.dropped) == (6, 0)
    assert total.nulls == {"x": 2, "i": 1, "c": 1, "v": 2}
    assert total.describe()[0] == "1 missing values in column 'c'"


def test_dropping_leaves_the_rows_out(write: Write) -> None:
    total = merge(statistics_of(opened(write, gaps(), rows=4, nulls="drop")))
    assert (total.rows, total.dropped, total.weight_sum) == (6, 5, 1.0)
    assert total.numeric.mean.tolist() == [6.0, 6.0, 5.0, 6.0]
    assert total.classes == {1: 1}
    assert "5 of 6 rows dropped" in total.describe()
    assert total.mean_weight == 1 / 6


def test_a_missing_label_or_weight_cannot_be_imputed(write: Write) -> None:
    table = pa.table({"x": [1.0, 2.0], "late": [None, 1], "w": [1.0, float("nan")]})
    found = violations(opened(write, table, nulls="impute", weight="w"))
    assert [p.split(": ", 1)[1] for p in found] == [
        "column 'late' has 1 missing values (null or NaN); set nulls = \"drop\" to leave such rows out",
        "column 'w' has 1 missing values (null or NaN); set nulls = \"drop\" to leave such rows out",
    ]
    nothing = opened(write, table, nulls="drop", weight="w")
    with pytest.raises(InputError, match='nulls = "drop" leaves no row: each of 2 misses a value'):
        merge(statistics_of(nothing))


# -- values that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (pa.array([1.0, float("inf")]), "column 'x' has 1 infinite values; write finite numbers"),
        (pa.array([1.0, -1e39]), "column 'x' has numbers beyond float32 (3.4e38), such as 1e+39; scale it"),
        (pa.array([1, 2**53 + 1]), "column 'x' has integers beyond 2^53, such as 9007199254740993"),
        (pa.array([-(2**60), None]), "column 'x' has integers beyond 2^53, such as -1152921504606846976"),
        (pa.array([1, 2**63], pa.uint64()), "column 'x' has integers beyond 2^53, such as 9223372036854775808"),
        (pa.array([[1.0, 2.0], [float("inf"), 3.0]], pa.list_(pa.float32(), 2)), "column 'x' has 1 infinite values"),
    ],
)
def test_numbers_that_cannot_be_held(write: Write, values: pa.Array, sentence: str) -> None:
    found = violations(opened(write, pa.table({"x": values, "late": [0, 1]}), nulls="impute"))
    assert len(found) == 1
    assert f"t.parquet, row group 0: {sentence}" in found[0]


def test_the_largest_numbers_that_can_be_held(write: Write) -> None:
    table = pa.table({"x": [3.4e38, -3.4e38], "i": [2**53, -(2**53)], "late": [0, 1]})
    assert merge(statistics_of(opened(write, table))).numeric.mean.tolist() == [0.0, 0.0]


def test_negative_weights_and_weights_without_a_sum(write: Write) -> None:
    table = pa.table({"x": [1.0, 2.0], "late": [0, 1], "w": [-1, 2]})
    assert "column 'w' has 1 negative weights; weights must be >= 0" in violations(opened(write, table, weight="w"))[0]
    zero = table.set_column(2, "w", pa.array([0, 0]))
    vanishing = table.set_column(2, "w", pa.array([1e-46, 1e-46]))
    for nothing in (zero, vanishing):
        (found,) = violations(opened(write, nothing, weight="w"))
        assert found.startswith("the weights must have a positive sum, got 0")


def test_a_label_of_large_integers_is_not_told_to_be_a_category(write: Write) -> None:
    table = pa.table({"x": [1.0, 2.0], "late": pa.array([1, 2**63], pa.uint64())})
    (found,) = violations(opened(write, table))
    assert found.endswith("column 'late' has integers beyond 2^53, such as 9223372036854775808; write smaller ones")


def test_an_unsigned_category_beyond_int64(write: Write) -> None:
    table = pa.table({"x": pa.array([1, 2**63], pa.uint64()), "late": [0, 1]})
    assert "column 'x' cannot be read as categories" in violations(opened(write, table, categorical=["x"]))[0]


def test_many_violations_are_counted(write: Write) -> None:
    table = pa.table({**{f"x{i}": [float("inf"), 1.0] for i in range(30)}, "late": [0, 1]})
    found = violations(opened(write, table))
    assert len(found) == 21
    assert found[-1] == "and 10 more"


def test_a_fault_of_many_row_groups_is_one_sentence(write: Write) -> None:
    """With how many values in how many row groups there are, and the first place."""
    table = pa.table(
        {
            "age": [None, 1.0, None, None, 2.0, None],
            "{}": [1.0, None, None, 1.0, 1.0, 1.0],
            "id": [2**53 + 1, 1, 2**54, 1, 1, 1],
            "x": [1.0, 1.0, 1.0, 1.0, 1.0, float("inf")],
            "late": [0, 1] * 3,
        }
    )
    dataset = opened(write, table, rows=2)
    found = [p.replace(dataset.where(0).partition("t.parquet")[0], "") for p in violations(dataset)]
    remedy = 'set nulls = "impute" or "drop", or leave the column out'
    assert found == [
        f"column 'age' has 4 missing values (null or NaN) in 3 row groups, first in t.parquet, row group 0; {remedy}",
        f"column '{{}}' has 2 missing values (null or NaN) in 2 row groups, first in t.parquet, row group 0; {remedy}",
        "column 'id' has integers beyond 2^53 in 2 row groups, first in t.parquet, row group 0, such as "
        "9007199254740993; use it as categorical, or write smaller",
        "t.parquet, row group 2: column 'x' has 1 infinite values; write finite numbers",
    ]


def test_booleans_and_decimals_are_numbers(write: Write) -> None:
    decimals = pa.array([Decimal("1.25"), Decimal("2.75")], pa.decimal128(5, 2))
    total = merge(statistics_of(opened(write, pa.table({"b": [True, False], "d": decimals, "late": ["n", "y"]}))))
    assert total.numeric.mean.tolist() == [0.5, 2.0]
    assert total.label is None
    assert total.classes == {"n": 1, "y": 1}


def test_a_label_of_many_values_is_no_class(write: Write) -> None:
    n = 10_001
    table = pa.table({"x": [0.0, 1.0] * (n // 2) + [0.0], "late": np.arange(n) / 7})
    total = merge(statistics_of(opened(write, table, rows=4000)))
    assert total.classes is None
    assert total.label is not None
    np.testing.assert_allclose(total.label.mean, [(n - 1) / 14])


def test_statistics_of_a_wide_list_column(write: Write) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 130)).astype(np.uint8)
    column = pa.FixedSizeListArray.from_arrays(pa.array(images.ravel()), 130)
    total = merge(statistics_of(opened(write, pa.table({"image": column, "late": [0, 1] * 25}), rows=20)))
    np.testing.assert_allclose(total.numeric.mean, images.mean(axis=0))
    np.testing.assert_allclose(total.numeric.variance, images.var(axis=0))
