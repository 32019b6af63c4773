"""Encoding: standardized numbers, codes, labels; what training did not see; exact round trips."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_tables import make_table

from raysgd.data.columns import Columns
from raysgd.data.dataset import ArrowDataset, open_dataset
from raysgd.data.encode import Encoder
from raysgd.data.loader import read_batch
from raysgd.data.moments import Moments, Statistics, merge, shard_statistics
from raysgd.errors import InputError
from raysgd.learn.batch import Inputs, Target

Write = Callable[..., Path]


def fitted(write: Write, table: pa.Table, kind: str = "class", **roles: object) -> Encoder:
    roles = {"label": "late", **roles}
    dataset = open_dataset(ArrowDataset(str(write(table, "fit.parquet", 40)), **roles))  # type: ignore[arg-type]
    total = merge([shard_statistics(dataset, i) for i in range(len(dataset.shards))])
    return Encoder.fit(total, dataset.schema, kind, dataset.nulls)  # type: ignore[arg-type]


def refused(encoder: Encoder, table: pa.Table) -> str:
    with pytest.raises(InputError) as caught:
        encoder.apply(table)
    return str(caught.value)


def test_training_data_comes_out_standardized_and_coded(write: Write) -> None:
    table = make_table(1000)
    encoder = fitted(write, table, categorical=["color", "k"])
    batch, unseen = encoder.apply(table)
    assert encoder.inputs == Inputs(2, (3, 11))
    assert encoder.target == Target(2)
    assert unseen == 0
    assert (batch.numeric.dtype, batch.codes.dtype, batch.label.dtype) == (np.float32, np.int32, np.float32)
    assert batch.numeric.flags.c_contiguous
    assert batch.codes.flags.c_contiguous
    assert batch.weight is None
    np.testing.assert_allclose(batch.numeric.mean(axis=0, dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(batch.numeric.std(axis=0, dtype=np.float64), 1, rtol=1e-6)
    names = np.array(["blue", "green", "red"])
    assert (names[batch.codes[:, 0]] == table["color"].to_numpy()).all()
    assert (batch.codes[:, 1] - 3 - 5 == table["k"].to_numpy()).all()
    assert (batch.label == table["late"].to_numpy()).all()


def test_the_arithmetic_is_float64_until_the_end(write: Write) -> None:
    x = 1e9 + np.arange(8.0)
    encoder = fitted(write, pa.table({"x": x, "late": [0, 1] * 4}))
    expected = ((x - encoder.mean) * encoder.scale).astype(np.float32)
    batch, _ = encoder.apply(pa.table({"x": x, "late": [0, 1] * 4}))
    assert batch.numeric[:, 0].tobytes() == expected.tobytes()
    np.testing.assert_allclose(batch.numeric[:, 0], (np.arange(8) - 3.5) / np.arange(8).std(), rtol=1e-6)


def test_a_constant_column_scales_by_one(write: Write) -> None:
    table = pa.table({"x": [0.1] * 97, "y": np.arange(97.0), "late": [0, 1] * 48 + [0]})
    encoder = fitted(write, table)
    assert encoder.scale[0] == 1.0
    batch, _ = encoder.apply(table)
    np.testing.assert_allclose(batch.numeric[:, 0], 0, atol=1e-7)


def test_what_rounding_leaves_of_a_constant_is_no_variance() -> None:
    columns = Columns((("x", 1),), (), "late")
    for mean, m2, scale in ((1e6, 1e-19, 1.0), (0.0, 0.0, 1.0), (1e6, 1e-12 * 100, 1e6), (0.0, 1e-28, 1e15)):
        moments = Moments(np.array([100]), np.array([mean]), np.array([m2]))
        statistics = Statistics(100, 0, moments, (), None, {0: 50, 1: 50}, 100.0)
        np.testing.assert_allclose(Encoder.fit(statistics, columns, "class").scale, [scale])


def test_every_number_type_and_list_encodes_as_its_float64(write: Write) -> None:
    table = pa.table(
        {
            "f16": pa.array(np.array([1, 2, 4], np.float16)),
            "u8": pa.array([1, 2, 4], pa.uint8()),
            "b": [True, False, True],
            "d": pa.array([Decimal("1.5"), Decimal("2.5"), Decimal("0.5")], pa.decimal128(4, 1)),
            "v": pa.array([[1, 2], [3, 4], [5, 9]], pa.list_(pa.int16(), 2)),
            "late": [0, 1, 1],
        }
    )
    encoder = fitted(write, table)
    raw = np.array([[1, 1, 1, 1.5, 1, 2], [2, 2, 0, 2.5, 3, 4], [4, 4, 1, 0.5, 5, 9]])
    expected = (raw - raw.mean(axis=0)) / raw.std(axis=0)
    for t in (table, pa.concat_tables([table.slice(0, 1), table.slice(1)])):  # one chunk, several chunks
        np.testing.assert_allclose(encoder.apply(t)[0].numeric, expected, rtol=1e-6)
    np.testing.assert_allclose(encoder.apply(table.slice(1))[0].numeric, expected[1:], rtol=1e-6)
    record_batch = table.to_batches()[0]
    np.testing.assert_allclose(encoder.apply(record_batch)[0].numeric, expected, rtol=1e-6)


def test_the_bytes_of_a_row_do_not_depend_on_the_rows_around_it(write: Write) -> None:
    table = make_table(333)
    encoder = fitted(write, table)
    whole, _ = encoder.apply(table)
    parts = [encoder.apply(table.slice(a, 37))[0] for a in range(0, 333, 37)]
    assert np.concatenate([p.numeric for p in parts]).tobytes() == whole.numeric.tobytes()
    assert np.concatenate([p.codes for p in parts]).tobytes() == whole.codes.tobytes()


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0, 1, 1], (0, 1)),
        ([True, False, True], (False, True)),
        ([2, 1, 2], (1, 2)),
        ([-1, 1, -1], (-1, 1)),
        ([1.0, 0.0, 1.0], (0, 1)),
        ([1.0, -0.0, 0.0], (0, 1)),
        (["no", "yes", "no"], ("no", "yes")),
        (["b", "é", "a"], ("a", "b", "é")),
        ([10, 9, 100], (9, 10, 100)),
        (pa.array(["u", "v", "u"]).dictionary_encode(), ("u", "v")),
    ],
)
def test_labels_of_every_kind_become_positions(write: Write, labels: object, classes: tuple[object, ...]) -> None:
    table = pa.table({"x": [1.0, 2.0, 3.0], "late": labels})
    encoder = fitted(write, table)
    assert encoder.classes == classes
    assert list(map(type, encoder.classes)) == list(map(type, classes))
    batch, _ = encoder.apply(table)
    assert [classes[int(i)] for i in batch.label] == table["late"].to_pylist()
    restored = Encoder.from_json(json.loads(json.dumps(encoder.to_json())))
    assert restored.apply(table)[0].label.tolist() == batch.label.tolist()


def test_labels_of_another_type_of_number_are_understood(write: Write) -> None:
    encoder = fitted(write, pa.table({"x": [1.0, 2.0], "late": [0, 1]}))
    for labels in ([1.0, 0.0], [True, False], pa.array([1, 0], pa.uint8())):
        assert encoder.apply(pa.table({"x": [1.0, 2.0], "late": labels}))[0].label.tolist() == [1.0, 0.0]


def test_labels_that_no_model_can_use(write: Write) -> None:
    def fit(labels: object, kind: str = "class") -> str:
        with pytest.raises(InputError) as caught:
            fitted(write, pa.table({"x": [1.0, 2.0], "late": labels}), kind)
        return str(caught.value)

    assert fit([1, 1]) == "label 'late' must have at least two classes, got only 1"
    assert "holds numbers such as 0.5, which name no class" in fit([0.5, 1.0])
    assert "must hold numbers for this model" in fit(["a", "b"], "number")


def test_a_number_label_is_left_as_it_is(write: Write) -> None:
    table = pa.table({"x": [1.0, 2.0], "late": [2.5, -1e30]})
    encoder = fitted(write, table, "number")
    assert (encoder.target, encoder.classes) == (Target(0), ())
    assert encoder.apply(table)[0].label.tolist() == [2.5, float(np.float32(-1e30))]


def test_a_label_that_training_did_not_see_is_named(write: Write) -> None:
    encoder = fitted(write, make_table(50))
    other = make_table(3).set_column(3, "late", pa.array([0, 7, 1]))
    message = "label 'late' has values that training did not: 7; its classes are 0, 1"
    assert refused(encoder, other) == message
    words = make_table(3).set_column(3, "late", pa.array(["0", "1", "0"]))
    assert "label column 'late' must hold int64 as in training, got string" in refused(encoder, words)


def test_unseen_and_missing_categories_take_the_last_code(write: Write) -> None:
    encoder = fitted(write, make_table(50), categorical=["color", "k"], nulls="impute")
    table = make_table(4)
    table = table.set_column(2, "color", pa.array(["red", "violet", None, "blue"]))
    table = table.set_column(1, "k", pa.array([5, 6, -5, None], pa.int64()))
    for t in (table, table.set_column(2, "color", table["color"].dictionary_encode())):
        batch, unseen = encoder.apply(t)
        assert batch.codes.tolist() == [[2, 13], [14, 14], [14, 3], [0, 14]]
        assert unseen == 4


def test_missing_values_by_policy(write: Write) -> None:
    training = make_table(50)
    table = make_table(3).set_column(0, "x", pa.array([None, float("nan"), 3.0]))
    told = refused(fitted(write, training), table)
    assert "column 'x' has 2 missing values (null or NaN): fill them or leave such rows out" in told
    imputed, _ = fitted(write, training, nulls="impute").apply(table)
    assert imputed.numeric[:2, 0].tolist() == [0.0, 0.0]
    assert imputed.weight is None
    dropped, _ = fitted(write, training, nulls="drop").apply(table)
    assert dropped.weight is not None
    assert dropped.weight.tolist() == [0.0, 0.0, 1.0]
    assert not dropped.numeric[:2].any()
    assert not dropped.codes[:2].any()
    assert dropped.numeric[2].tobytes() == imputed.numeric[2].tobytes()


def test_a_missing_label_is_dropped_or_refused(write: Write) -> None:
    table = make_table(3).set_column(3, "late", pa.array([None, 1, 0]))
    for nulls in ("refuse", "impute"):
        message = refused(fitted(write, make_table(50), nulls=nulls), table)
        assert message.startswith("column 'late' has 1 missing values")
    batch, _ = fitted(write, make_table(50), nulls="drop").apply(table)
    assert batch.weight is not None
    assert batch.weight.tolist() == [0.0, 1.0, 1.0]


def test_weights(write: Write) -> None:
    encoder = fitted(write, make_table(50), weight="id")
    batch, _ = encoder.apply(make_table(4))
    assert batch.weight is not None
    assert batch.weight.tolist() == [0.0, 1.0, 2.0, 3.0]
    negative = make_table(2).set_column(4, "id", pa.array([-1, 2]))
    assert refused(encoder, negative) == "column 'id' has negative weights; weights must be >= 0"


def test_prediction_needs_neither_label_nor_weight(write: Write) -> None:
    encoder = fitted(write, make_table(50), weight="id")
    table = make_table(5).drop_columns(["late", "id"])
    batch, _ = encoder.apply(table, with_label=False)
    assert (batch.label.tolist(), batch.weight) == ([0.0] * 5, None)
    assert "label column 'late' does not exist" in refused(encoder, table)


def test_columns_that_changed_their_type_are_named(write: Write) -> None:
    encoder = fitted(write, make_table(50))
    words = make_table(2).set_column(0, "x", pa.array(["1", "2"]))
    assert "numeric column 'x' must hold numbers, got string" in refused(encoder, words)
    numbers = make_table(2).set_column(2, "color", pa.array([1, 2]))
    assert "categorical column 'color' must hold string as in training, got int64" in refused(encoder, numbers)
    wide = make_table(2).set_column(0, "x", pa.array([[1.0, 2.0]] * 2, pa.list_(pa.float64(), 2)))
    assert "column 'x' must have 1 numbers a row as in training, got 2" in refused(encoder, wide)


def test_values_far_from_training_are_refused_without_a_warning(write: Write) -> None:
    encoder = fitted(write, pa.table({"x": [1.0, 1.0 + 1e-9], "late": [0, 1]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (1e300, float("inf")):
            assert "column 'x' has infinite values, or numbers too far" in refused(
                encoder, pa.table({"x": [x], "late": [0]})
            )


def test_no_numeric_or_no_categorical_columns_and_no_rows(write: Write) -> None:
    table = make_table(20)
    only_codes = fitted(write, table, numeric=[], categorical=["color"])
    assert only_codes.inputs == Inputs(0, (3,))
    assert only_codes.apply(table)[0].numeric.shape == (20, 0)
    only_numbers = fitted(write, table, numeric=["x"], categorical=[])
    assert only_numbers.inputs == Inputs(1, ())
    assert only_numbers.apply(table)[0].codes.shape == (20, 0)
    for encoder in (only_codes, only_numbers):
        assert len(encoder.apply(table.slice(0, 0))[0]) == 0


def test_an_encoder_survives_json_to_the_bit(write: Write) -> None:
    table = make_table(1000).append_column("flag", pa.array([True, False] * 500))
    encoder = fitted(write, table, categorical=["color", "k", "flag"])
    state = json.loads(json.dumps(encoder.to_json()))
    restored = Encoder.from_json(state)
    assert restored.mean.tobytes() == encoder.mean.tobytes()
    assert restored.scale.tobytes() == encoder.scale.tobytes()
    assert restored.vocabularies == encoder.vocabularies
    assert restored.columns == encoder.columns
    assert restored.to_json() == state
    before, after = encoder.apply(table)[0], restored.apply(table)[0]
    assert before.numeric.tobytes() == after.numeric.tobytes()
    assert before.codes.tobytes() == after.codes.tobytes()


def test_an_error_in_a_file_names_file_and_row_group(write: Write) -> None:
    encoder = fitted(write, make_table(50))
    odd = make_table(50).set_column(3, "late", pa.array([0] * 45 + [9] * 5))
    valid = open_dataset(ArrowDataset(str(write(odd, "valid.parquet", 40)), label="late"), encoder.columns)
    assert len(read_batch(valid, encoder, 0)[0]) == 40
    with pytest.raises(InputError, match=r"valid\.parquet, row group 1: label 'late' has values"):
        read_batch(valid, encoder, 1)
