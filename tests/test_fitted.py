"""A trained model without Ray: predictions against the formula, streamed files, checkpoints made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from raysgd import checkpoint, fitted
from raysgd.data.dataset import ArrowDataset, open_dataset
from raysgd.data.encode import Encoder
from raysgd.data.moments import merge, shard_statistics
from raysgd.errors import CheckpointError, InputError
from raysgd.fitted import FittedModel
from raysgd.learn.models import MLP, LinearRegression, LogisticRegression, Model, SoftmaxRegression
from raysgd.protocol.generation import Generation
from raysgd.sections import model_to_dict
from raysgd.storage import Storage

CARRIERS = np.array(["AA", "DL", "UA"])


def rows(n_rows: int, seed: int = 0) -> pa.Table:
    """A table with two numbers, a category, a text that is not used, and a label that depends on them."""
    rng = np.random.default_rng(seed)
    delay, distance = rng.normal(10, 5, n_rows), rng.normal(500, 100, n_rows)
    carrier = rng.integers(0, 3, n_rows)
    late = delay + carrier * 3 + rng.normal(0, 2, n_rows) > 13
    columns = {"delay": delay, "distance": distance, "carrier": CARRIERS[carrier], "late": late}
    return pa.table({**columns, "id": [f"row {i}" for i in range(n_rows)]})


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Training data in row groups of 100."""
    pq.write_table(rows(1000), tmp_path / "train.parquet", row_group_size=100)
    return tmp_path / "train.parquet"


def encoder_of(path: Path, kind: Any = "class", label: str = "late", nulls: str = "refuse") -> Encoder:
    spec = ArrowDataset(str(path), label=label, numeric=["delay", "distance"], categorical=["carrier"], nulls=nulls)
    dataset = open_dataset(spec)
    statistics = merge([shard_statistics(dataset, shard.index) for shard in dataset.shards])
    return Encoder.fit(statistics, dataset.schema, kind, nulls)


def fit(path: Path, model: Model | None = None, **options: Any) -> FittedModel:
    """A model with parameters that are far enough from zero to tell rows apart."""
    encoder = encoder_of(path, **options)
    learner = (LogisticRegression() if model is None else model).bind(encoder.inputs, encoder.target)
    params = np.linspace(-1, 1, learner.layout.n_params).astype(np.float32)
    return FittedModel(encoder, learner, params)


def save(run: Path, model: FittedModel, hyper: Model, step: int = 1, **metrics: float) -> Storage:
    """The model as a run's checkpoint after ``step`` steps."""
    facts = {"epoch": 1, "encoder": model.encoder.to_json(), "model": model_to_dict(hyper), "metrics": metrics}
    storage = Storage.open(run)
    checkpoint.save(storage, Generation(step, model.params, {}), model.learner.layout, facts)
    return storage


def by_formula(model: FittedModel, table: pa.Table) -> npt.NDArray[np.float64]:
    """P(late) in float64 from the arrays of a logistic regression."""
    arrays = model.learner.layout.views(model.params)
    x = np.column_stack([table["delay"].to_numpy(), table["distance"].to_numpy()])
    score = (x - model.encoder.mean) * model.encoder.scale @ arrays["weights"][:, 0] + arrays["bias"][0]
    codes = dict(zip(CARRIERS.tolist(), arrays["codes"][:, 0].tolist(), strict=True))
    score += [codes.get(c, 0.0) for c in table["carrier"].to_pylist()]
    return np.asarray(1 / (1 + np.exp(-score)))


@pytest.mark.parametrize("form", [lambda t: t, lambda t: t.combine_chunks().to_batches()[0], lambda t: t.to_pydict()])
def test_probabilities_are_those_of_the_formula(train: Path, form: Callable[[pa.Table], Any]) -> None:
    model, table = fit(train), rows(300, seed=1)
    probabilities = model.predict_proba(form(table))
    np.testing.assert_allclose(probabilities[:, 1], by_formula(model, table), atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    predicted = model.predict(form(table))
    assert predicted.dtype == np.bool_
    assert (predicted == (probabilities[:, 1] > 0.5)).all()
    assert 0 < predicted.sum() < 300


def test_columns_that_are_not_used_may_be_absent(train: Path) -> None:
    model, table = fit(train), rows(10)
    assert (model.predict(table.drop_columns(["late", "id"])) == model.predict(table)).all()


def test_blocks_do_not_show(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, table = fit(train), rows(300)
    whole = model.predict_proba(table)
    monkeypatch.setattr(fitted, "BLOCK_ROWS", 7)
    np.testing.assert_allclose(model.predict_proba(table), whole, rtol=1e-6)


def test_no_rows_give_no_predictions(train: Path) -> None:
    model, nothing = fit(train), rows(10).slice(0, 0)
    assert model.predict(nothing).shape == (0,)
    assert model.predict_proba(nothing).shape == (0, 2)


def test_classes_come_back_as_the_label_had_them(train: Path) -> None:
    table = pq.read_table(train)
    names = pa.array([["no", "perhaps", "yes"][i % 3] for i in range(len(table))])
    pq.write_table(table.set_column(3, "late", names), train)
    model = fit(train, SoftmaxRegression())
    assert model.classes == ("no", "perhaps", "yes")
    found = model.predict(rows(50))
    assert set(found.tolist()) <= set(model.classes)
    assert (np.array(model.classes)[model.predict_proba(rows(50)).argmax(axis=1)] == found).all()


def test_a_number_has_no_probabilities(train: Path) -> None:
    model = fit(train, LinearRegression(), kind="number")
    assert model.predict(rows(50)).dtype == np.float32
    with pytest.raises(InputError, match="a model that predicts a number has no probabilities"):
        model.predict_proba(rows(50))


@pytest.mark.parametrize(
    ("table", "part"),
    [
        (pa.table({"delay": [1.0], "carrier": ["AA"]}), "'distance' does not exist"),
        (pa.table({"delay": [1.0], "distance": ["far"], "carrier": ["AA"]}), "'distance' must hold numbers"),
        ({"delay": [1.0], "distance": [2.0], "carrier": ["AA", "DL"]}, "columns of equal length"),
        ([[1.0, 2.0]], "got list"),
        ({"delay": [float("nan")], "distance": [2.0], "carrier": ["AA"]}, "missing values"),
    ],
)
def test_rows_that_cannot_be_used(train: Path, table: Any, part: str) -> None:
    with pytest.raises(InputError, match=part):
        fit(train).predict(table)


def test_rows_that_training_would_have_dropped(train: Path, tmp_path: Path) -> None:
    """In memory they are refused; in a file their prediction is null."""
    model, table = fit(train, nulls="drop"), rows(10)
    holes = table.set_column(0, "delay", pa.array([None if i in (2, 7) else float(i) for i in range(10)]))
    with pytest.raises(InputError, match="2 rows miss a value"):
        model.predict(holes)
    pq.write_table(holes, tmp_path / "holes.parquet")
    out = tmp_path / "out.parquet"
    counts = model.predict_file(str(tmp_path / "holes.parquet"), str(out))
    assert counts == {"rows": 10, "unseen": 0, "missing": 2}
    found = pq.read_table(out)
    for name in ("prediction", "probability_True", "probability_False"):
        assert [i for i, v in enumerate(found[name].to_pylist()) if v is None] == [2, 7]


def test_metrics_are_scikit_learns(train: Path, tmp_path: Path) -> None:
    model, table = fit(train), rows(500, seed=1)
    pq.write_table(table, tmp_path / "valid.parquet", row_group_size=70)
    seen: list[tuple[int, int]] = []
    found = model.evaluate(str(tmp_path / "valid.parquet"), lambda done, total: seen.append((done, total)))
    late, probability = table["late"].to_numpy(), by_formula(model, table)
    assert found["rows"] == 500
    assert found["unseen"] == 0
    assert found["loss"] == pytest.approx(log_loss(late, probability), abs=1e-6)
    assert found["auc"] == pytest.approx(roc_auc_score(late, probability), abs=1e-4)
    assert found["accuracy"] == np.mean((probability > 0.5) == late)
    assert seen == [(min(500, 70 * i), 500) for i in range(1, 9)]


def test_unseen_categories_are_counted(train: Path, tmp_path: Path) -> None:
    table = rows(10).set_column(2, "carrier", pa.array(["AA"] * 7 + ["ZZ"] * 3))
    pq.write_table(table, tmp_path / "new.parquet")
    model = fit(train)
    assert model.evaluate(str(tmp_path / "new.parquet"))["unseen"] == 3
    assert model.predict_file(str(tmp_path / "new.parquet"), str(tmp_path / "out.csv"))["unseen"] == 3
    np.testing.assert_allclose(model.predict_proba(table)[:, 1], by_formula(model, table), atol=1e-6)


def read(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    return pa.csv.read_csv(path) if path.suffix == ".csv" else pa.feather.read_table(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".csv"])
def test_a_file_is_predicted(train: Path, tmp_path: Path, suffix: str) -> None:
    model, out = fit(train), tmp_path / f"out{suffix}"
    out.write_text("an older file")
    table = rows(250, seed=1).drop_columns(["late"])
    pq.write_table(table, tmp_path / "new.parquet", row_group_size=60)
    seen: list[int] = []
    counts = model.predict_file(
        ArrowDataset(str(tmp_path / "new.parquet")), str(out), ["id", "delay"], lambda done, _: seen.append(done)
    )
    assert counts == {"rows": 250, "unseen": 0, "missing": 0}
    assert seen == [60, 120, 180, 240, 250]
    found = read(out)
    assert found.column_names == ["id", "delay", "prediction", "probability_False", "probability_True"]
    assert found["id"].equals(table["id"])
    assert found["prediction"].to_pylist() == model.predict(table).tolist()
    np.testing.assert_allclose(found["probability_True"], model.predict_proba(table)[:, 1], rtol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["new.parquet", out.name, "train.parquet"])


@pytest.mark.parametrize(
    ("out", "columns", "part"),
    [
        ("out.xlsx", [], r"must end in one of \.parquet"),
        ("nowhere/out.csv", [], "does not exist: create it first"),
        ("taken.csv", [], "is a directory"),
        ("out.csv", ["carier"], "did you mean 'carrier'"),
        ("out.csv", ["id", "id"], "would have two columns 'id'"),
        ("train.parquet", [], "is one of the files to read"),
    ],
)
def test_an_output_that_cannot_be(train: Path, tmp_path: Path, out: str, columns: list[str], part: str) -> None:
    (tmp_path / "taken.csv").mkdir()
    before = train.read_bytes()
    with pytest.raises(InputError, match=part):
        fit(train).predict_file(str(train), str(tmp_path / out), columns)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken.csv", "train.parquet"]
    assert train.read_bytes() == before


def test_a_file_that_fails_midway_is_not_there(train: Path, tmp_path: Path) -> None:
    """The third row group misses a value: it is named, and nothing is left of the output."""
    table = rows(100)
    holes = table.set_column(0, "delay", pa.array([None if i == 50 else float(i) for i in range(100)]))
    pq.write_table(holes, tmp_path / "new.parquet", row_group_size=20)
    with pytest.raises(InputError, match=r"new\.parquet, row group 2: column 'delay' has 1 missing"):
        fit(train).predict_file(str(tmp_path / "new.parquet"), str(tmp_path / "out.parquet"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.parquet", "train.parquet"]


def test_a_column_that_csv_cannot_hold(train: Path, tmp_path: Path) -> None:
    table = rows(10).append_column("list", pa.array([[1, 2]] * 10))
    pq.write_table(table, tmp_path / "new.parquet")
    with pytest.raises(InputError, match=r"out\.csv cannot (hold these columns|be written)"):
        fit(train).predict_file(str(tmp_path / "new.parquet"), str(tmp_path / "out.csv"), ["list"])
    assert not (tmp_path / "out.csv").exists()


# Not ru_maxrss: a child process inherits its parent's.
MEMORY = """
import sys
from raysgd import fitted
model = fitted.load(sys.argv[1])
rows = model.predict_file(sys.argv[2], sys.argv[3])["rows"]
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(rows, int(peak.split()[1]) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_stays_flat_on_a_table_ten_times_larger(train: Path, tmp_path: Path) -> None:
    """The larger table is 160 MB decoded; the peaks of two processes may differ by a quarter of that."""
    save(tmp_path / "run", fit(train), LogisticRegression())
    table = rows(50_000).drop_columns(["id"])
    peaks = {}
    for groups in (10, 100):
        with pq.ParquetWriter(tmp_path / "new.parquet", table.schema) as writer:
            for _ in range(groups):
                writer.write_table(table)
        arguments = [str(tmp_path / name) for name in ("run", "new.parquet", "out.parquet")]
        done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
        n_rows, peaks[groups] = map(int, done.stdout.split())
        assert n_rows == groups * 50_000
    assert peaks[100] - peaks[10] < 40, peaks


@pytest.mark.parametrize(
    "hyper", [LogisticRegression(l2=0.1), SoftmaxRegression(), MLP(hidden=(5,), activation="tanh")], ids=repr
)
def test_a_checkpoint_is_a_model(train: Path, tmp_path: Path, hyper: Model) -> None:
    model = fit(train, hyper)
    save(tmp_path / "run", model, hyper, step=7)
    found = fitted.load(tmp_path / "run")
    assert found.step == 7
    assert found.path == str(tmp_path / "run" / "checkpoints" / "step-00000007")
    assert (found.predict_proba(rows(50)) == model.predict_proba(rows(50))).all()


def test_the_best_the_last_and_any_step(train: Path, tmp_path: Path) -> None:
    model, hyper = fit(train), LogisticRegression()
    for step, loss in {1: 0.5, 2: 0.3, 3: 0.4}.items():
        save(tmp_path / "run", model, hyper, step, valid_loss=loss)
    assert fitted.load(tmp_path / "run").step == 2
    assert fitted.load(tmp_path / "run", "last").step == 3
    assert fitted.load(tmp_path / "run", which=1).step == 1
    with pytest.raises(InputError, match="which must be 'best', 'last' or a step"):
        fitted.load(tmp_path / "run", "newest")
    with pytest.raises(CheckpointError):
        fitted.load(tmp_path / "run", which=4)


def test_a_damaged_checkpoint_is_passed_over_loudly(train: Path, tmp_path: Path) -> None:
    model, hyper = fit(train), LogisticRegression()
    storage = save(tmp_path / "run", model, hyper, step=1)
    save(tmp_path / "run", model, hyper, step=2)
    damaged = "checkpoints/step-00000002/params.safetensors"
    data = bytearray(storage.read(damaged))
    data[-1] ^= 1
    storage.write_atomic(damaged, bytes(data))
    with pytest.warns(UserWarning, match="a damaged checkpoint was passed over: .*step-00000002"):
        assert fitted.load(tmp_path / "run", "last").step == 1


@pytest.mark.parametrize("key", ["encoder", "model"])
@pytest.mark.parametrize("value", [None, {}, [], "x", {"type": "mlp", "layers": 3}, {"type": "mlp", "hidden": [0]}])
def test_a_manifest_that_does_not_fit(train: Path, tmp_path: Path, key: str, value: Any) -> None:
    storage = save(tmp_path / "run", fit(train), LogisticRegression())
    name = "checkpoints/step-00000001/manifest.json"
    manifest = json.loads(storage.read(name)) | {key: value}
    storage.write_atomic(name, checkpoint.sealed(manifest))
    with pytest.raises(CheckpointError, match=r"the manifest is not of this form|the parameters are"):
        fitted.load(tmp_path / "run")


def test_another_model_does_not_take_the_parameters(train: Path, tmp_path: Path) -> None:
    save(tmp_path / "run", fit(train), MLP(hidden=(3,)))
    with pytest.raises(CheckpointError, match="the parameters are"):
        fitted.load(tmp_path / "run")


def test_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run at"):
        fitted.load(tmp_path)
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        fitted.load(tmp_path)


def test_rows_of_which_none_counts_have_no_loss(train: Path, tmp_path: Path) -> None:
    model, table = fit(train, nulls="drop"), rows(30, seed=1)
    nothing = table.set_column(0, "delay", pa.nulls(30, pa.float64()))
    pq.write_table(nothing, tmp_path / "nothing.parquet")
    why = 'no row has a weight, so there is no loss: nulls = "drop" leaves out each that misses a value; give rows'
    with pytest.raises(InputError, match=f"{tmp_path}/nothing.parquet: {why}"):
        model.evaluate(str(tmp_path / "nothing.parquet"))
