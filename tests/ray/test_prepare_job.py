"""prepare, predict and evaluate over Ray tasks: the bytes of one process, also where tasks die; jobs tell the truth."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import ray
from ray_runs import ROOT, Marked, wait_for

from raysgd import checkpoint, cli, fitted
from raysgd.data.dataset import ArrowDataset, open_dataset
from raysgd.data.encode import Encoder
from raysgd.data.moments import merge, shard_statistics
from raysgd.data.source import Preparation
from raysgd.errors import InputError, RunError
from raysgd.learn.models import MLP
from raysgd.prepared import prepare
from raysgd.protocol.generation import Generation
from raysgd.runtime.tasks import RETRIES, Tasks
from raysgd.sections import model_to_dict
from raysgd.storage import Storage

# Workers cannot import this file: the functions below go with the calls.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

N_ROWS = 4_000
SMALL: dict[str, Any] = {"piece_bytes": 200_000, "file_rows": 1_000, "row_group_rows": 300}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with clicks.csv, the same as Parquet, and a run of an MLP with made-up weights."""
    place = tmp_path_factory.mktemp("jobs")
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {"id": np.arange(N_ROWS), **{f"x{i}": rng.normal(size=N_ROWS) for i in range(20)}}
    columns["late"] = columns["x0"] + rng.normal(size=N_ROWS) > 0
    rows = pa.table(columns)
    pa.csv.write_csv(rows, place / "clicks.csv")
    pq.write_table(rows, place / "clicks.parquet", row_group_size=333)
    _run(place / "run", str(place / "clicks.parquet"))
    return place


def _run(path: Path, data: str) -> None:
    names = [f"x{i}" for i in range(20)]
    dataset = open_dataset(ArrowDataset(data, label="late", numeric=names))
    encoder = Encoder.fit(merge([shard_statistics(dataset, s.index) for s in dataset.shards]), dataset.schema, "class")
    model = MLP(hidden=(64,))
    learner = model.bind(encoder.inputs, encoder.target)
    params = learner.initial(0)
    facts = {"encoder": encoder.to_json(), "model": model_to_dict(model)}
    storage = Storage.open(path)
    checkpoint.save(storage, Generation(3, params, {"momentum": np.zeros_like(params)}), learner.layout, facts)
    storage.write_atomic("config.toml", f'[data]\npath = "{data}"\nvalidation = "{data}"\nlabel = "late"\n'
                         '[model]\ntype = "mlp"\n'.encode())  # fmt: skip


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.usefixtures("ray_cluster")
def test_prepare_writes_the_same_bytes_with_any_number_of_workers(table: Path, tmp_path: Path) -> None:
    job = Preparation(str(table / "clicks.csv"), **SMALL)
    prepare(job, str(tmp_path / "here"))
    for workers in (1, 3):
        prepare(job, str(tmp_path / f"{workers}"), Tasks(workers))
        assert contents(tmp_path / f"{workers}") == contents(tmp_path / "here")


def _dies_first(shared: tuple[str, Any], item: int) -> Any:
    """Kills its process the first time that it is called for an item which is divisible by three."""
    marks, (function, rest) = shared
    mark = Path(marks) / f"{function.__name__}-{item}"
    if item % 3 == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return function(rest, item)


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_that_are_killed_are_run_again_to_the_same_bytes(table: Path, tmp_path: Path) -> None:
    job = Preparation(str(table / "clicks.csv"), **{**SMALL, "piece_bytes": 400_000})
    prepare(job, str(tmp_path / "here"))
    (tmp_path / "marks").mkdir()
    spread = Tasks(2)

    def killing(function: Any, shared: Any, items: Any) -> Iterator[Any]:
        return spread(_dies_first, (str(tmp_path / "marks"), (function, shared)), items)

    prepare(job, str(tmp_path / "out"), killing)
    assert len(list((tmp_path / "marks").iterdir())) >= 4
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


def _dies(_shared: None, _item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _disk_full(_shared: None, item: int) -> None:
    raise OSError(28, "No space left on device", f"part-{item}")


def _refuses(_shared: None, item: int) -> None:
    raise InputError(f"a.csv, line {item}: no")


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_task_raises_is_told_as_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysgd.runtime.tasks.RETRIES", 0)
    with pytest.raises(RunError, match=r"_dies: a task was lost 1 times"):
        list(Tasks(1)(_dies, None, [1]))
    with pytest.raises(RunError, match=r"_disk_full 7: .*No space left on device: 'part-7'"):
        list(Tasks(1)(_disk_full, None, [7]))
    with pytest.raises(InputError, match=r"^a\.csv, line 5: no$"):
        list(Tasks(1)(_refuses, None, [5]))
    assert RETRIES > 0


@pytest.mark.usefixtures("ray_cluster")
def test_predict_and_evaluate_write_the_same_bytes(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fitted.load(table / "run")
    data = str(table / "clicks.parquet")
    alone = model.predict_file(data, str(tmp_path / "alone.parquet"), ["id"])
    spread = str(tmp_path / "spread.parquet")
    words = ["predict", str(table / "run"), "--data", data, "-o", spread, "--columns", "id", "--num-workers", "3"]
    status = tmp_path / "status"
    assert cli.main([*words, "--status", str(status), "--json", "-q"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {name: facts[name] for name in alone} == alone
    assert (tmp_path / "spread.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()
    told = json.loads((status / "status.json").read_text())
    assert (told["state"], told["exit_code"], told["details"]["rows"]) == ("succeeded", 0, N_ROWS)

    expected = model.evaluate(data)
    assert cli.main(["evaluate", str(table / "run"), "--num-workers", "2", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == expected


@pytest.mark.usefixtures("ray_cluster")
def test_too_many_workers_are_refused_and_the_status_says_so(table: Path, tmp_path: Path) -> None:
    out, status = tmp_path / "out", tmp_path / "status"
    words = ["prepare", str(table / "clicks.csv"), "-o", str(out), "--num-workers", "99", "--status", str(status)]
    assert cli.main(words) == 2
    told = json.loads((status / "status.json").read_text())
    assert (told["state"], told["exit_code"]) == ("failed", 2)
    assert "asks for 99 CPUs and the Ray cluster has 8" in told["message"]
    assert not out.exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_without_a_free_cpu_is_told() -> None:
    holder = ray.remote(_Holder).options(num_cpus=8).remote()
    ray.get(holder.ping.remote())
    try:
        with pytest.raises(InputError, match=r"no CPU was free for a task within 1 s; available now: 0 of 8 CPUs"):
            Tasks(1).refuse_unplaced(1.0)
    finally:
        ray.kill(holder)
    wait_for("the CPUs", lambda: ray.available_resources().get("CPU", 0) == 8)


class _Holder:
    def ping(self) -> None: ...


def test_a_job_that_is_asked_to_end_says_so_and_leaves_nothing(table: Path, tmp_path: Path) -> None:
    """jobs/prepare.py on a Ray of its own, SIGTERM in mid-run; then the same command again, to the end."""
    out, status = tmp_path / "out", tmp_path / "status"
    words = [str(table / "clicks.csv"), "--output", str(out), "--num-workers", "2", "--status", str(status)]
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), *words]
    job = Marked(command, tmp_path, {"RAYSGD_FAILPOINTS": "prepare.gather:sleep=60"})
    try:
        wait_for("the pieces", lambda: list(tmp_path.glob(".out.preparing/pieces/*.arrow")), timeout=150)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(150) == 143
        job.gone()
    finally:
        job.end()
    told = json.loads((status / "status.json").read_text())
    assert (told["state"], told["exit_code"]) == ("interrupted", 143)
    assert not out.exists()
    again = Marked(command, tmp_path)
    try:
        assert again.wait(150) == 0, again.text
        again.gone()
    finally:
        again.end()
    prepare(Preparation(str(table / "clicks.csv")), str(tmp_path / "here"))
    assert contents(out) == contents(tmp_path / "here")
    assert json.loads((status / "status.json").read_text())["state"] == "succeeded"
