"""The cost model: what must hold whatever the constants are, its phases by hand, what a dry run tells of them."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import cost_scale
from bench.measure import Asked
from raysgd import cli
from raysgd.cost import ALIKE, Job, Machine, Network, best_servers, memory, predict, sums_pushed
from raysgd.learn.parameters import Range
from raysgd.outlook import remaining
from raysgd.protocol.membership import deal
from raysgd.protocol.tree import cover
from raysgd.report import summary

JOBS = st.builds(
    Job,
    n_params=st.integers(1, 10**9),
    batch_size=st.integers(64, 10**6),
    virtual_workers=st.just(64),
    workers=st.integers(1, 64),
    servers=st.integers(1, 64),
    nodes=st.integers(1, 16),
    local_steps=st.integers(1, 16),
)


def unit(**given_constants: float) -> Machine:
    """A machine on which nothing costs anything but what is named."""
    nothing: dict[str, Any] = {f.name: 0.0 for f in fields(Machine)}
    return Machine(
        **{**nothing, "cores": 64, "flops": float("inf"), "spilled": 1.0, "cache": float("inf"), **given_constants}
    )


FREE = Network(float("inf"), 0.0)


def test_each_constant_counts_as_often_as_it_occurs() -> None:
    """One hand-made job: 2 nodes with 2 workers each, 2 servers on them, V = 8, 1,000 parameters, 80 rows."""
    job = Job(1_000, 80, 8, workers=4, servers=2, nodes=2, row_flops=7.0, row_codes=3)
    seconds = {
        "control_s": 1.0,
        "worker_s": 1.0,  # one more on its node
        "cold_s": 1.0,
        "batch_s": 2.0,  # virtual workers each
        "row_s": 20.0,
        "code_s": 60.0,
        "read_s": 1_000.0 + 2_000.0,  # a pull, and a gradient for each virtual worker
        "update_s": 500.0,  # each server has half of them
        "add_s": 1_000.0,  # three sums: of two workers, and of the other node
        "call_s": 1.0,
        "client_s": 1.0,
        "server_s": 1.0,
        "store_s": 8_000.0,
    }
    assert {*seconds, "cores", "flops", "cache", "spilled", "object_s"} == {f.name for f in fields(Machine)}
    for name, expected in seconds.items():
        # A row is computed in no time but that of the constant: so that a step counts as one with work.
        found = predict(job, unit(**{"batch_s": 1e-9, name: 1.0}), FREE).step_s
        assert found == pytest.approx(expected, abs=1e-6), name
    large = replace(job, n_params=52_000)  # a server's half of it is too large to go with a call
    assert predict(large, unit(object_s=1.0), FREE).step_s == 2.0
    assert predict(replace(large, servers=3), unit(object_s=1.0), FREE).step_s == 0.0
    assert predict(job, unit(flops=1.0), FREE).step_s == 20 * 7
    assert predict(job, unit(), Network(1.0, 0.0)).step_s == 8_000  # half of the vector, twice, and of the other half
    assert predict(job, unit(), Network(float("inf"), 1.0)).step_s == 2
    assert predict(replace(job, nodes=1), unit(call_s=1.0, store_s=1.0), Network(1.0, 1.0)).step_s == 0


def test_what_shares_cores_or_memory_waits() -> None:
    """Four workers on two cores take turns; beyond the cache two servers of a node are as one, and slower."""
    job = Job(1_000, 80, 8, workers=4, servers=2)
    assert predict(job, unit(row_s=1.0, cores=2), FREE).step_s == 2 * 20
    assert predict(replace(job, compute_s=0.0), unit(control_s=1.0, cold_s=9.0, cores=2), FREE).step_s == 2
    assert predict(job, unit(update_s=1.0), FREE).step_s == 500
    assert predict(job, unit(update_s=1.0, cache=1.0, spilled=1.5), FREE).step_s == 1_500
    assert predict(replace(job, slots=0), unit(update_s=1.0), FREE).step_s == 375


def test_bytes_are_those_of_the_messages() -> None:
    cost = predict(Job(1_000, 80, 8, workers=4, servers=2, nodes=2))
    assert (cost.pushed, cost.pulled, cost.across) == (16_000, 16_000, 8_000)
    assert predict(Job(1_000, 80, 8, workers=3)).pushed == 3 * 2 * 4_000


@settings(deadline=None)
@given(job=JOBS)
def test_more_is_never_faster(job: Job) -> None:
    """More parameters or rows, a slower network, fewer local steps: never less time; all phases are at least 0."""
    cost = predict(job)
    assert min(cost.compute, cost.control, cost.pull, cost.update, cost.calls, cost.wire) >= 0
    assert 0 < cost.step_s == cost.round_s / job.local_steps
    # Where a model leaves the cache it becomes slower, never faster.
    assert predict(replace(job, n_params=2 * job.n_params)).step_s >= cost.step_s
    assert predict(replace(job, batch_size=2 * job.batch_size)).step_s >= cost.step_s
    assert predict(job, network=Network.gbit(0.1)).step_s >= predict(job, network=Network.gbit(10)).step_s
    assert predict(replace(job, local_steps=2 * job.local_steps)).step_s <= cost.step_s * (1 + 1e-9)


@settings(deadline=None)
@given(workers=st.integers(1, 64), virtual=st.integers(1, 64))
def test_sums_pushed_are_the_trees(workers: int, virtual: int) -> None:
    """At least what the membership deals needs, and never more than the protocol promises."""
    workers = min(workers, virtual)
    dealt = max(len(cover(run, virtual)) for run in deal(virtual, workers))
    assert dealt <= sums_pushed(virtual, workers)
    assert sums_pushed(virtual, workers) <= max(1, 2 * int(np.ceil(np.log2(max(2, virtual)))))


def test_many_workers_are_counted_without_walking_the_tree() -> None:
    assert sums_pushed(4_096, 1_024) == len(cover(Range(0, 4), 4_096)) == 1
    assert sums_pushed(10_000, 10_000) == 1
    assert sums_pushed(10_240, 1_000) > 1


@settings(deadline=None)
@given(job=JOBS)
def test_the_best_number_of_servers_is_as_good_as_any(job: Job) -> None:
    best = best_servers(job)
    took = predict(replace(job, servers=best)).step_s
    for servers in (1, 2, 4, 8, 16):
        if servers <= min(max(job.nodes, 2), job.n_params):
            assert took <= ALIKE * predict(replace(job, servers=servers)).step_s


def test_the_documented_rule_is_near_the_best() -> None:
    """32 n / (bandwidth server_s), at most one a node: nowhere in docs/cost.md more than a fifth longer."""
    machine, network = cost_scale.MACHINE, cost_scale.NETWORK
    for n_params in cost_scale.SIZES:
        for workers in cost_scale.WORKERS[1:]:
            job = cost_scale.job_of(n_params, workers)
            rule = min(job.nodes, max(1, round(32 * n_params / (network.bandwidth * machine.server_s))))
            took = predict(replace(job, servers=rule), machine, network).step_s
            best = min(predict(replace(job, servers=s), machine, network).step_s for s in range(1, job.nodes + 1))
            assert took <= 1.2 * best, (n_params, workers, rule)


def test_the_table_in_the_docs_is_that_of_the_model() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "cost.md").read_text()
    assert cost_scale.run(Asked()) in page, "python -m bench cost_scale, and put its table into docs/cost.md"


def test_the_table_of_ten_thousand_workers() -> None:
    text = cost_scale.run(Asked())
    assert len(text.splitlines()) == 2 + len(cost_scale.SIZES) * len(cost_scale.WORKERS)
    assert "| 10,000 | 625 |" in text


def test_memory_by_hand() -> None:
    job = Job(1_000, 80, 8, workers=3, servers=2)
    found = memory(job, window_bytes=5, cache_bytes=7, buffers=2)
    assert found.worker == 7 + 4 * 5 + (2 * 2 + 2 + 1) * 4_000
    assert found.server == 500 * 4 * (2 * 2 + 2)


TOML = """
[data]
path = "train"
label = "late"
[model]
type = "{model}"
[train]
batch_size = 64
epochs = 3
[scaling]
num_workers = 2
num_servers = 2
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table in ten row groups: two numbers, a category of 50 values of which the row groups each show some."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    n = 1_000
    table = pa.table(
        {
            "x": random.standard_normal(n),
            "y": random.standard_normal(n),
            "kind": [f"k{i}" for i in np.sort(random.integers(0, 50, n))],
            "late": random.random(n) > 0.5,
        }
    )
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "a.parquet", row_group_size=100)
    return tmp_path


def dry(capsys: pytest.CaptureFixture[str], model: str, *words: str) -> dict[str, Any]:
    Path("run.toml").write_text(TOML.format(model=model))
    assert cli.main(["train", "run.toml", "--dry-run", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_dry_run_tells_the_plan(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = dry(capsys, "logistic_regression")
    told = {
        name: facts[name] for name in ("training_rows", "training_shards", "steps_per_epoch", "total_steps", "epochs")
    }
    # 16 steps of 64 rows, the last of 40.
    assert list(told.values()) == [1_000, 10, 16, 48, 3]
    assert (facts["workers"], facts["servers"], facts["batch_size"], facts["virtual_workers"]) == (2, 2, 64, 8)
    assert 3 + 10 < facts["parameters"] < 3 + 50
    assert not facts["parameters_exact"]
    n = facts["parameters"]
    assert facts["pushed_bytes_per_step"] == facts["pulled_bytes_per_step"] == 2 * 4 * n
    assert facts["server_memory_bytes"] == -(-n // 2) * 4 * (2 + 2)  # two generations without momentum, and sums
    assert facts["predicted_step_ms"] > 0
    assert facts["predicted_rows_per_s"] == pytest.approx(64 / facts["predicted_step_ms"] * 1e3, rel=0.01)
    assert not (place / "runs").exists()


def test_it_says_what_it_knows_exactly(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All row groups are read where there are few; hashed and numeric models need none."""
    pq.write_table(pq.read_table(place / "train" / "a.parquet"), place / "train" / "a.parquet", row_group_size=250)
    facts = dry(capsys, "logistic_regression")
    assert (facts["parameters"], facts["parameters_exact"]) == (2 + 50 + 1, True)
    hashed = dry(capsys, "hashed_logistic_regression")
    assert hashed["parameters"] > 2**17
    assert "predicted_step_ms" not in hashed
    assert hashed["server_memory_bytes"] > 4 * hashed["parameters"] // 2


def test_people_are_told_that_parameters_are_estimated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run.toml").write_text(TOML.format(model="mlp"))
    assert cli.main(["train", "run.toml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "from a few row groups: the others may add categories" in out
    assert "predicted step ms" in out


def test_a_sample_that_shows_one_class_only_is_no_fault(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sorted by label, four row groups of ten can lack a class: then only the parameters are unknown."""
    table = pq.read_table(place / "train" / "a.parquet")
    late = pa.array([i >= 990 for i in range(1_000)])
    sorted_table = table.set_column(3, "late", late)
    pq.write_table(sorted_table, place / "train" / "a.parquet", row_group_size=100)
    facts = dry(capsys, "logistic_regression")
    assert facts["parameters"] is None
    assert "4 of 10 row groups do not show the parameters" in facts["note"]


def test_what_a_dry_run_sees_that_training_refuses_it_refuses(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing values in row groups that it reads: one sentence a column, and that it has not read all."""
    table = pq.read_table(place / "train" / "a.parquet")
    gaps = pa.array([None if i % 10 == 0 else float(i) for i in range(1_000)])
    pq.write_table(table.set_column(0, "x", gaps), place / "train" / "a.parquet", row_group_size=100)
    Path("run.toml").write_text(TOML.format(model="logistic_regression"))
    assert cli.main(["train", "run.toml", "--dry-run", "--json"]) == cli.BAD_INPUT
    missing, rest = json.loads(capsys.readouterr().out)["error"]
    assert missing.startswith("column 'x' has 40 missing values (null or NaN) in 4 row groups, first in ")
    assert missing.endswith('row group 0; set nulls = "impute" or "drop", or leave the column out')
    assert rest == "only 4 of 10 row groups were read: others may have more"
    assert dry(capsys, "logistic_regression", "--set", "data.nulls=impute")["parameters"] > 3


@pytest.mark.usefixtures("place")
def test_the_predicted_time_is_that_of_the_steps_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """And of those that are left: as far as the run is asked to go."""
    facts = dry(capsys, "logistic_regression")
    assert (facts["ends_at_step"], facts["steps_left"]) == (48, 48)
    assert facts["predicted_seconds"] == round(48 * facts["predicted_step_ms"] / 1e3, 1)
    assert dry(capsys, "logistic_regression", "--set", "run.stop_after_steps=5")["steps_left"] == 5
    assert cli.main(["train", "run.toml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "for the steps alone: Ray's start (some seconds), validation and checkpoints come on top" in out
    ended = remaining({**facts, "begins_at_step": 48, "predicted_step_ms": 1e3})
    assert (ended["steps_left"], ended["predicted_seconds"]) == (0, 0.0)
    told = summary.dry_run(ended)
    assert "0: nothing is left to train" in told
    assert "on top" not in told
