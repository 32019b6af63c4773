"""Hashed models on real Ray: one digest for all workers, servers, transports and interruptions; and what is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disturbing import Said, first_dies
from ray_runs import STEPS_PER_EPOCH, curve, one_process_digests, spec_of, write_table

import raysgd
from raysgd.audit import audit
from raysgd.learn.models import FactorizationMachine, HashedLogisticRegression
from raysgd.learn.transforms import FTRL, SGD, AdaGrad
from raysgd.report.progress import Silent
from raysgd.runtime import crew, gang
from raysgd.runtime.trainer import Result, Trainer
from raysgd.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")

END = 2 * STEPS_PER_EPOCH

VARIANTS: dict[str, dict[str, Any]] = {
    "logistic-adagrad": {"model": HashedLogisticRegression(14), "optimizer": AdaGrad(0.1)},
    "logistic-ftrl": {"model": HashedLogisticRegression(14), "optimizer": FTRL(0.1, l1=0.001)},
    "machine-momentum": {"model": FactorizationMachine(12, factors=3, l2=0.001), "optimizer": SGD(0.05, momentum=0.9)},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual table with two more categories, of which one has many values and the other misses some."""
    directory = write_table(tmp_path_factory.mktemp("sparse") / "bytes")
    random = np.random.default_rng(1)
    for file in [*(directory / "train").glob("*.parquet"), directory / "valid.parquet"]:
        table = pq.read_table(file)
        many = random.zipf(1.3, table.num_rows).astype(np.int64)
        some = [None if i % 7 == 0 else f"value {i % 11}" for i in many.tolist()]
        table = table.append_column("many", pa.array(many)).append_column("some", pa.array(some))
        pq.write_table(table, file, row_group_size=60)
    return directory


def spec_for(place: Path, variant: str, **settings: Any) -> Any:
    spec = spec_of(place, data__categorical=["kind", "many", "some"], data__nulls="impute", **settings)
    return replace(spec, **VARIANTS[variant])


@pytest.fixture(scope="module")
def truth(place: Path) -> dict[str, dict[int, str]]:
    """The digests from one process without Ray."""
    return {name: one_process_digests(spec_for(place, name), [STEPS_PER_EPOCH + 3, END]) for name in VARIANTS}


def fit(place: Path, variant: str, name: str, workers: int, servers: int, **settings: Any) -> Result:
    scaling = {"scaling__num_workers": workers, "scaling__num_servers": servers}
    spec = spec_for(place, variant, run__name=f"{variant}-{name}", **scaling, **settings)
    return Trainer.from_spec(spec, report=Silent()).fit()


@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_workers_and_servers_change_no_byte(
    place: Path, truth: dict[str, dict[int, str]], variant: str, workers: int, servers: int
) -> None:
    result = fit(place, variant, f"w{workers}s{servers}", workers, servers)
    assert (result.step, result.digest) == (END, truth[variant][END])
    assert np.isfinite(result.metrics["valid_loss"])


@pytest.mark.parametrize("variant", ["logistic-adagrad", "machine-momentum"])
def test_stopped_and_continued_with_others(place: Path, truth: dict[str, dict[int, str]], variant: str) -> None:
    stop = STEPS_PER_EPOCH + 3
    assert fit(place, variant, "stopped", 3, 2, run__stop_after_steps=stop).digest == truth[variant][stop]
    whole = fit(place, variant, "whole", 1, 2)
    result = fit(place, variant, "stopped", 2, 1)
    assert result.digest == whole.digest == truth[variant][END]
    assert result.metrics == whole.metrics
    runs = place / "runs"
    assert curve(runs / f"{variant}-stopped") == curve(runs / f"{variant}-whole")


def test_through_actor_calls(place: Path, truth: dict[str, dict[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []

    def mixed(site: str | None, boards: list[gang.Place]) -> Any:
        chosen.append(None if len(chosen) % 2 else gang.same_node(site, boards))
        return chosen[-1]

    monkeypatch.setattr(crew, "same_node", mixed)
    result = fit(place, "logistic-adagrad", "mixed", 3, 2)
    assert len(chosen) == 3
    assert result.digest == truth["logistic-adagrad"][END]


def test_the_fitted_model_scores_as_the_run_did(place: Path) -> None:
    result = fit(place, "machine-momentum", "fitted", 2, 2)
    model = raysgd.load(place / "runs" / "machine-momentum-fitted", "last")
    found = model.evaluate(str(place / "valid.parquet"))
    assert found["loss"] == result.metrics["valid_loss"]
    assert found["unseen"] == 0
    table = pq.read_table(place / "valid.parquet")
    new = table.set_column(table.schema.get_field_index("kind"), "kind", pa.array(["never seen"] * len(table)))
    assert model.predict_proba(new).shape == (len(table), 2)


@pytest.mark.parametrize(
    ("variant", "order"),
    [
        ("logistic-ftrl", "server.sealed"),
        ("machine-momentum", "server.sealed"),
        ("machine-momentum", "server.applied"),
    ],
)
def test_a_killed_server_is_succeeded_by_its_spare(
    place: Path, monkeypatch: pytest.MonkeyPatch, variant: str, order: str
) -> None:
    """When its record is sealed and nothing of it written, when all is written, when others know: the same bytes."""
    settings: dict[str, Any] = {"train__epochs": 30, "run__validate_every": 400, "run__checkpoint_every": 600}
    [want] = one_process_digests(spec_for(place, variant, **settings), [600]).values()
    first_dies(monkeypatch, f"{order}@450:kill", "worker.compute:sleep=0.005")
    name, said = f"{variant}-{order}", Said()
    scaling = {"scaling__num_workers": 2, "scaling__num_servers": 2}
    result = Trainer.from_spec(spec_for(place, variant, run__name=name, **scaling, **settings), report=said).fit()
    assert (result.step, result.digest) == (600, want)
    assert sum("its spare goes on from its memory" in line for line in said.lines) == 1, said.lines
    found = audit(Storage.open(place / "runs" / name))
    assert (found.problems, found.steps, found.rows) == ((), 600, True)
