"""Whole runs on odd tables: weights, dropped and imputed rows, labels of every kind, against one process and numpy."""

from __future__ import annotations

from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray_runs import one_process_digests

import raysgd
from raysgd.learn.batch import Inputs, Target
from raysgd.learn.models.base import Model
from raysgd.report.progress import Silent
from raysgd.runtime.trainer import Result, Trainer

pytestmark = pytest.mark.usefixtures("ray_cluster")

N_ROWS = 160
RANDOM = np.random.default_rng(0)
X, Z = RANDOM.normal(size=(2, N_ROWS))
WEIGHT = RANDOM.integers(0, 4, N_ROWS)
HOLES = RANDOM.random(N_ROWS) < 0.2
KIND = RANDOM.choice(["a", "b", "", "é"], N_ROWS)
LATE = X + Z / 2 > 0

#: row groups of the written files: of one row, of none, and others
CUTS = (0, 0, 50, 51, 51, 130, N_ROWS)


def fit(place: Path, parts: list[pa.Table], model: Model, batch_size: int = 24, **roles: Any) -> Result:
    """Train two epochs with two workers and two servers, and in one process; the table is its own validation data."""
    path = place / "table with ünï"
    path.mkdir()
    for i, part in enumerate(parts):
        with pq.ParquetWriter(path / f"{i}.parquet", part.schema) as file:
            for begin, end in pairwise(CUTS):
                file.write_table(part.slice(begin, end - begin))
    trainer = Trainer(
        model=model,
        data=raysgd.ArrowDataset(str(path), label="the label", **roles),
        validation=raysgd.ArrowDataset(str(path)),
        optimizer=raysgd.SGD(learning_rate=0.5, momentum=0.5),
        batch_size=batch_size,
        epochs=2,
        scaling_config=raysgd.ScalingConfig(num_workers=2, num_servers=2, server_cpus=0.25),
        run_config=raysgd.RunConfig(name="run", storage_path=str(place / "runs")),
        report=Silent(),
    )
    result = trainer.fit()
    assert result.digest == one_process_digests(trainer.spec, [result.step])[result.step]
    assert raysgd.load(result.path, "last").evaluate(str(path))["loss"] == result.metrics["valid_loss"]
    return result


def test_weights_and_dropped_rows_are_those_of_the_formula(tmp_path: Path) -> None:
    """Two steps over the whole table: M <- 0.5 M + g, w <- w - 0.5 M, g = sum of weight * error * x / sum of weight."""
    y = 2 * X - Z + 1
    table = pa.table({"x": np.where(HOLES, np.nan, X), "z": Z, "w": WEIGHT, "the label": y})
    result = fit(tmp_path, [table], raysgd.LinearRegression(), N_ROWS, weight="w", nulls="drop")
    kept = ~HOLES
    inputs = np.stack([X, Z], axis=1)[kept]
    rows = np.c_[(inputs - inputs.mean(axis=0)) / inputs.std(axis=0), np.ones(kept.sum())]
    share = WEIGHT[kept] / WEIGHT[kept].sum()
    params = raysgd.LinearRegression().bind(Inputs(2), Target(0)).initial(0).astype(np.float64)
    momentum = np.zeros(3)
    for _ in range(2):
        momentum = 0.5 * momentum + rows.T @ (share * (rows @ params - y[kept]))
        params -= 0.5 * momentum
    np.testing.assert_allclose(raysgd.load(result.path, "last").params, params, rtol=1e-5)
    assert result.step == 2
    assert result.metrics["valid_loss"] == pytest.approx(share @ (rows @ params - y[kept]) ** 2 / 2, rel=1e-5)
    assert result.metrics["valid_rows"] == (WEIGHT[kept] > 0).sum()


def test_imputed_numbers_missing_categories_and_class_names(tmp_path: Path) -> None:
    decimals = [None if hole else Decimal(f"{x:.3f}") for x, hole in zip(X, HOLES, strict=True)]
    table = pa.table(
        {
            "x y'\"`": pa.array(decimals, pa.decimal128(10, 3)),
            "中": pa.array(KIND, mask=HOLES),
            "the label": np.where(LATE, "spät", "früh"),
        }
    )
    result = fit(tmp_path, [table], raysgd.LogisticRegression(l2=0.01), nulls="impute")
    model = raysgd.load(result.path)
    assert model.classes == ("früh", "spät")
    assert result.metrics["valid_unseen"] == HOLES.sum()
    assert result.metrics["valid_auc"] > 0.75
    assert (model.predict(table) == np.where(LATE, "spät", "früh")).mean() == result.metrics["valid_accuracy"]


def test_dictionaries_that_differ_between_files(tmp_path: Path) -> None:
    parts = []
    for names, index in ((["b", "a"], pa.int8()), (["c", "a", "b"], pa.int32())):
        kinds = RANDOM.choice(names, N_ROWS)
        dictionary = pa.DictionaryArray.from_arrays(
            pa.array([names.index(k) for k in kinds], index), pa.array(names, pa.string())
        )
        label = pa.array([{"a": 7, "b": -1, "c": 3}[k] for k in kinds], pa.int16())
        parts.append(pa.table({"kind": dictionary, "the label": label}))
    result = fit(tmp_path, parts, raysgd.SoftmaxRegression())
    assert raysgd.load(result.path).classes == (-1, 3, 7)
    assert result.metrics["valid_accuracy"] == 1.0
    assert raysgd.load(result.path).predict({"kind": ["a", "b", "c"]}).tolist() == [7, -1, 3]


def test_lists_of_numbers_and_labels_of_one_and_minus_one(tmp_path: Path) -> None:
    image = pa.FixedSizeListArray.from_arrays(pa.array(np.stack([X, Z, X * Z], axis=1).ravel(), pa.float32()), 3)
    label = np.where(LATE, 1.0, -1.0)
    table = pa.table({"image": image, "flag": Z > 0, "the label": label, "unused": KIND})
    result = fit(tmp_path, [table], raysgd.MLP(hidden=(8, 4), activation="tanh"), numeric=["image", "flag"])
    model = raysgd.load(result.path)
    assert model.classes == (-1, 1)
    assert (model.predict(table) == label).mean() == result.metrics["valid_accuracy"] > 0.9
