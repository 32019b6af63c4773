"""What a run does when a step is not finite, when the time for a checkpoint comes, and when a processor is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disturbing import Said
from ray_runs import curve, one_process_digests, spec_of, status_of, write_table

from raysgd import checkpoint
from raysgd.audit import audit
from raysgd.errors import DivergedError, RunError
from raysgd.report.progress import Silent
from raysgd.runtime.gang import Gang
from raysgd.runtime.trainer import Trainer
from raysgd.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return write_table(tmp_path / "runs")


#: squared errors of numbers: a label can be as large as float32 allows
LINEAR: dict[str, Any] = {
    "data__label": "y",
    "data__numeric": ["x0", "x1", "x2"],
    "data__categorical": [],
    "model__type": "linear_regression",
    "optimizer__learning_rate": 0.05,
    "run__checkpoint_every": 5,
    "run__validate_every": "1epoch",
}


def with_label(place: Path, poisoned: float | None) -> None:
    """A number to predict; in train/b.parquet, row group 2, row 7 one that overflows."""
    for file in [*(place / "train").glob("*.parquet"), place / "valid.parquet"]:
        table = pq.read_table(file)
        y = table["x0"].to_numpy() + 0.5
        if file.name == "b.parquet" and poisoned is not None:
            y[2 * 60 + 7] = poisoned
            x0 = table["x0"].to_numpy().copy()
            x0[2 * 60 + 7] = 5.0
            table = table.set_column(table.column_names.index("x0"), "x0", pa.array(x0))
        groups = 60 if file.name == "b.parquet" else 170
        pq.write_table(table.append_column("y", pa.array(y)), file, row_group_size=groups)


def test_a_poisoned_row_is_named(place: Path) -> None:
    with_label(place, 3e38)
    spec = spec_of(place, scaling__num_workers=3, scaling__num_servers=2, train__local_steps=1, **LINEAR)
    with pytest.raises(DivergedError, match=r"b\.parquet, row group 2, row 7, has") as diverged:
        Trainer.from_spec(spec, report=Silent()).fit()
    status = status_of(place / "runs" / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert f"step {diverged.value.step} diverged" in status["message"]
    saved = checkpoint.steps(Storage.open(place / "runs" / "run"))
    assert not saved or saved[-1] <= diverged.value.step


def test_half_the_rate_until_it_goes_well(place: Path) -> None:
    """From a rate far too large down to one that works; where it went back to is a checkpoint, and the run finishes."""
    with_label(place, None)
    settings = {**LINEAR, "optimizer__learning_rate": 8.0, "optimizer__momentum": 0.0, "train__epochs": 4}
    said = Said()
    spec = spec_of(place, scaling__num_workers=2, train__on_divergence="lower_learning_rate", **settings)
    result = Trainer.from_spec(spec, report=said).fit()
    assert result.step == 80
    halved = [line for line in said.lines if "half the learning rate" in line]
    assert halved, said.lines
    assert f"({len(halved)} of at most 10 times)" in halved[-1]
    assert np.isfinite(result.metrics["valid_loss"])
    manifest = checkpoint.load(Storage.open(place / "runs" / "run"), "last").manifest
    assert len(manifest["plan"]["lowered"]) == len(halved)
    rates = [line["learning_rate"] for line in result.history if line["kind"] == "train"]
    assert rates[-1] == 8.0 / 2 ** len(halved)
    # The same run once more is complete, and says so.
    again = Said()
    assert Trainer.from_spec(spec, report=again).fit().digest == result.digest
    assert any("nothing to do" in line for line in again.lines)


def test_a_rate_that_no_halving_cures_ends_the_run(place: Path) -> None:
    with_label(place, 3e38)
    said = Said()
    spec = spec_of(place, scaling__num_workers=2, train__on_divergence="lower_learning_rate", **LINEAR)
    with pytest.raises(DivergedError, match=r"b\.parquet, row group 2, row 7"):
        Trainer.from_spec(spec, report=said).fit()
    assert sum("half the learning rate" in line for line in said.lines) == 10


@pytest.mark.parametrize("sparse", [False, True])
def test_checkpoints_by_time_change_no_byte(place: Path, sparse: bool) -> None:
    settings: dict[str, Any] = {
        "train__epochs": 150,
        "scaling__num_workers": 3,
        "scaling__num_servers": 2,
        "run__checkpoint_every": 3000,
        "run__validate_every": 3000,
    }
    if sparse:
        settings |= {"model__type": "hashed_logistic_regression", "model__hash_bits": 12}
    timed = spec_of(place, run__name="timed", run__checkpoint_seconds=0.3, **settings)
    result = Trainer.from_spec(timed, report=Silent()).fit()
    assert result.step == 3000
    assert result.digest == one_process_digests(timed, [3000])[3000]
    saved = checkpoint.steps(Storage.open(place / "runs" / "timed"))
    assert len(saved) > 2, saved
    middle = saved[len(saved) // 2]
    found = checkpoint.load(Storage.open(place / "runs" / "timed"), middle)
    assert found.digest() == one_process_digests(timed, [middle])[middle]
    audited = audit(Storage.open(place / "runs" / "timed"))
    assert (audited.problems, audited.dealt) == ((), 1), "nobody was lost, nobody came"
    assert audited.midway >= 2
    untimed = spec_of(place, run__name="untimed", **settings)
    Trainer.from_spec(untimed, report=Silent()).fit()
    assert curve(place / "runs" / "timed") == curve(place / "runs" / "untimed")


def other_processor(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Workers from the ``first`` on compute as another family of processors would."""
    options, asked = Gang._options, []

    def changed(self: Gang, cpus: float, bundle: Any) -> dict[str, Any]:
        made = options(self, cpus, bundle)
        if cpus == self.scaling.worker_cpus:
            asked.append(cpus)
            if len(asked) > first:
                made["runtime_env"]["env_vars"] = {**made["runtime_env"]["env_vars"], "OPENBLAS_CORETYPE": "Prescott"}
        return made

    monkeypatch.setattr(Gang, "_options", changed)


#: products of matrices large enough that the kernels differ
MLP = {"model__type": "mlp", "model__hidden": [64, 64], "optimizer__learning_rate": 0.05}


def test_who_joins_with_another_processor_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_processor(monkeypatch, 1)
    said = Said()
    spec = spec_of(place, scaling__num_workers=(1, 2), train__epochs=150, **MLP)
    result = Trainer.from_spec(spec, report=said).fit()
    assert result.step == 3000
    assert any("is refused: its processor computes other bytes" in line for line in said.lines), said.lines
    assert any("OPENBLAS_CORETYPE" in line for line in said.lines)


def test_processors_that_differ_from_the_beginning_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_processor(monkeypatch, 1)
    with pytest.raises(RunError, match="cannot take part: its processor computes other bytes"):
        Trainer.from_spec(spec_of(place, scaling__num_workers=2, **MLP), report=Silent()).fit()
