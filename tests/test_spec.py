"""A run's dataclasses: what is wrong with them, and the part that determines the bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem

from raysgd.data.dataset import ArrowDataset
from raysgd.learn.models import MLP, FactorizationMachine, HashedLogisticRegression, LogisticRegression
from raysgd.learn.schedules import Constant, ExponentialDecay, StepDecay
from raysgd.learn.transforms import FTRL, SGD, AdaGrad
from raysgd.spec import (
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    RunSpec,
    ScalingConfig,
    TrainConfig,
    differences,
)


def a_spec(**changes: Any) -> RunSpec:
    data = ArrowDataset("train", label="late", categorical=["carrier"])
    return replace(RunSpec(data, None, LogisticRegression(), SGD()), **changes)


@pytest.mark.parametrize("name", ["batch_size", "epochs", "virtual_workers"])
@pytest.mark.parametrize("value", [0, -8, 1.5, True, "8", None, nan])
def test_a_count_that_is_none_is_named(name: str, value: object) -> None:
    found = replace(TrainConfig(), **{name: value}).problems()  # type: ignore[arg-type]
    assert found == [f"{name} must be a whole number >= 1, got {value!r}"]


def test_a_seed_may_be_zero_and_nothing_below() -> None:
    assert TrainConfig(seed=0).problems() == []
    assert TrainConfig(seed=-1).problems() == ["seed must be a whole number >= 0, got -1"]


@pytest.mark.parametrize("staleness", [-1, "0", True, 1.5, nan, -inf])
def test_a_staleness_that_is_none_is_refused(staleness: Any) -> None:
    (sentence,) = TrainConfig(staleness=staleness).problems()
    assert sentence == f"staleness must be a whole number >= 0 or inf, got {staleness!r}"


@pytest.mark.parametrize("staleness", [0, 1, 16, inf, "inf"])
def test_every_consistency_is_taken(staleness: Any) -> None:
    assert TrainConfig(staleness=staleness).problems() == []


def test_what_the_axes_do_not_allow_together() -> None:
    (sentence,) = TrainConfig(staleness=2, clip_norm=1.0).problems()
    assert sentence.startswith("clip_norm needs staleness 0")
    assert TrainConfig(clip_norm=0.0).problems() == ["clip_norm must be > 0, got 0.0"]
    assert TrainConfig(local_steps=0).problems() == ["local_steps must be a whole number >= 1, got 0"]
    spec = RunSpec(ArrowDataset("t", label="y"), None, LogisticRegression(), AdaGrad(), TrainConfig(local_steps=4))
    (sentence,) = spec.problems()
    assert sentence.startswith("train.local_steps must be 1 with AdaGrad, got 4")


@pytest.mark.parametrize(("batch", "use"), [(100, "96 or 104"), (5, "8"), (513, "512 or 520")])
def test_a_batch_that_is_no_multiple_says_what_would_be(batch: int, use: str) -> None:
    (sentence,) = TrainConfig(batch_size=batch).problems()
    assert sentence == f"batch_size must be a multiple of virtual_workers (8), got {batch}; use {use}"


@pytest.mark.parametrize("name", ["worker_cpus", "server_cpus", "placement_timeout_s"])
@pytest.mark.parametrize("value", [0, -1.0, nan, inf, "1", True])
def test_an_amount_is_a_finite_number_above_zero(name: str, value: object) -> None:
    (sentence,) = replace(ScalingConfig(), **{name: value}).problems()  # type: ignore[arg-type]
    assert sentence.startswith(f"{name} must be ")
    assert sentence.endswith(f"got {value!r}")


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", ".hidden", "a\\b", "C:", 7, "a\0", "a\x1b[2J", "\udcff"])
def test_a_run_name_is_one_directory_name(name: Any) -> None:
    (sentence,) = RunConfig(name=name).problems()
    allowed = "one directory name without '/', ':' or a first '.', of at most 200 bytes"
    assert sentence == f"name must be {allowed}, got {name!r}"


def test_a_run_name_fits_a_file_system() -> None:
    assert RunConfig(name="é" * 100).problems() == []
    (sentence,) = RunConfig(name="é" * 101).problems()
    assert sentence.endswith("of at most 200 bytes, got '" + "é" * 59 + "… (103 characters)")


def test_every_field_of_a_run_config_is_judged() -> None:
    wrong = RunConfig(
        storage_path="",
        validate_every="often",
        checkpoint_every=0,
        checkpoint_seconds=0,
        log_every=True,
        stop_after_steps=0,
        address="",
        checkpoint_config=CheckpointConfig(num_to_keep=0),
        failure_config=FailureConfig(max_failures=-2),
    )
    fields = ["storage_path", "validate_every", "checkpoint_every", "checkpoint_seconds", "log_every"]
    fields += ["stop_after_steps", "address", "num_to_keep", "failure_config.max_failures"]
    assert [sentence.split()[0] for sentence in wrong.problems()] == fields
    other = RunConfig(checkpoint_config=3, failure_config=None)  # type: ignore[arg-type]
    assert other.problems() == [
        "checkpoint_config must be a CheckpointConfig, got 3",
        "failure_config must be a FailureConfig, got None",
    ]


@pytest.mark.parametrize("seconds", [0, -1.0, nan, inf, "600", True])
def test_seconds_between_checkpoints_are_a_number_above_zero(seconds: Any) -> None:
    (sentence,) = RunConfig(checkpoint_seconds=seconds).problems()
    assert sentence.startswith("checkpoint_seconds must be ")
    assert RunConfig(checkpoint_seconds=0.5).problems() == []


@pytest.mark.parametrize("count", [-2, 1.5, True, "3", None, nan])
def test_failures_are_counted_or_not_limited(count: Any) -> None:
    (sentence,) = FailureConfig(count).problems()
    assert sentence == f"max_failures must be a whole number >= -1 (no limit), got {count!r}"
    assert [FailureConfig(good).problems() for good in (-1, 0, 3)] == [[], [], []]


@pytest.mark.parametrize("policy", ["Stop", "", None, 1, ["stop"]])
def test_divergence_has_two_policies(policy: Any) -> None:
    (sentence,) = TrainConfig(on_divergence=policy).problems()
    assert sentence == f"on_divergence must be one of 'stop', 'lower_learning_rate', got {policy!r}"
    assert TrainConfig(on_divergence="lower_learning_rate").problems() == []


def test_a_path_object_is_a_storage_path() -> None:
    assert RunConfig(storage_path=Path("runs") / "mine").storage_path == "runs/mine"  # type: ignore[arg-type]


def test_a_storage_path_in_a_ray_job_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    (sentence,) = RunConfig().problems()
    assert sentence.startswith("storage_path must not lie in a Ray job's working directory")
    assert RunConfig(storage_path=str(tmp_path / "runs")).problems() == []
    assert RunConfig(storage_path="s3://bucket/runs").problems() == []


def test_a_sound_spec_has_no_problems() -> None:
    assert a_spec().problems() == []
    assert a_spec(validation=ArrowDataset("valid", label="late", categorical=("carrier",))).problems() == []


def test_every_section_begins_its_sentences() -> None:
    spec = a_spec(
        data=ArrowDataset("train", label="late", nulls="ignore"),
        model=LogisticRegression(l2=-1.0),
        optimizer=SGD(learning_rate="fast", momentum=1.5),  # type: ignore[arg-type]
        train=TrainConfig(epochs=0),
        scaling=ScalingConfig(num_servers=0),
        run=RunConfig(address=""),
    )
    keys = [sentence.split()[0] for sentence in spec.problems()]
    assert keys == [
        "data.nulls",
        "model.l2",
        "optimizer.learning_rate",
        "optimizer.momentum",
        "train.epochs",
        "scaling.num_servers",
        "run.address",
    ]


def test_more_workers_than_parts_says_what_to_do() -> None:
    (sentence,) = a_spec(scaling=ScalingConfig(num_workers=9)).problems()
    assert sentence.startswith("scaling.num_workers must be at most train.virtual_workers (8), got 9: ")
    assert a_spec(scaling=ScalingConfig(num_workers=8)).problems() == []


@pytest.mark.parametrize(
    "workers", [(0, 2), (3, 2), (1, 2, 3), (1,), (), (1, 2.0), (True, 2), ("1", "2"), (1, None), "2-6", 2.0, None]
)
def test_workers_are_a_number_or_the_least_and_the_most(workers: Any) -> None:
    allowed = "a whole number >= 1 or a pair of them, the least and the most"
    assert ScalingConfig(num_workers=workers).problems() == [f"num_workers must be {allowed}, got {workers!r}"]


@pytest.mark.parametrize("workers", [0, -1, True])
def test_a_number_of_workers_that_is_none(workers: int) -> None:
    assert ScalingConfig(workers).problems() == [f"num_workers must be a whole number >= 1, got {workers!r}"]


def test_the_least_workers_are_what_a_run_asks_for() -> None:
    for given in ((2, 6), [2, 6], np.array([2, 6]).tolist(), (np.int64(2), np.int64(6))):
        scaling = ScalingConfig(given, num_servers=2, worker_cpus=1.5, server_cpus=0.25)
        assert (scaling.problems(), scaling.num_workers) == ([], (2, 6))
        assert (scaling.least_workers, scaling.most_workers, scaling.cpus) == (2, 6, 3.5)
    one = ScalingConfig(3)
    assert (one.least_workers, one.most_workers, one.cpus) == (3, 3, 3.5)
    (sentence,) = a_spec(scaling=ScalingConfig((2, 9))).problems()
    assert sentence.startswith("scaling.num_workers must be at most train.virtual_workers (8), got (2, 9): ")
    assert a_spec(scaling=ScalingConfig((2, 8))).problems() == []


def test_a_label_is_needed() -> None:
    assert a_spec(data=ArrowDataset("train")).problems() == ["data.label is missing: name the column to predict"]


def test_validation_roles_are_those_of_training() -> None:
    (sentence,) = a_spec(validation=ArrowDataset("valid", label="early")).problems()
    assert sentence == "validation.label must be that of data ('late') or left out, got 'early'"


def test_things_of_another_type_are_named() -> None:
    spec = a_spec(model="logistic", optimizer=None, data="train", train={}, validation="valid")
    keys = [sentence.split()[0] for sentence in spec.problems()]
    assert keys == ["model", "optimizer", "data", "train", "validation"]


def test_what_determines_the_bytes_is_json_without_places() -> None:
    spec = a_spec(model=MLP(hidden=(4, 3)), optimizer=SGD(ExponentialDecay(0.1, 0.5, "1epoch"), momentum=0.9))
    found = spec.determining()
    assert list(found) == ["data", "model", "optimizer", "train"]
    assert json.loads(json.dumps(found)) == found
    assert found["data"]["label"] == "late"
    moved = replace(spec.data, path="elsewhere", filesystem=LocalFileSystem())
    other = replace(spec, data=moved, scaling=ScalingConfig(num_workers=3), run=RunConfig(name="other"))
    assert other.determining() == found


def test_numbers_of_numpy_become_json() -> None:
    spec = a_spec(train=TrainConfig(epochs=np.int64(3)), optimizer=SGD(learning_rate=np.float64(0.5)))  # type: ignore[arg-type]
    assert spec.problems() == []
    assert json.dumps(spec.determining()) == json.dumps(
        a_spec(train=TrainConfig(epochs=3), optimizer=SGD(learning_rate=0.5)).determining()
    )


def test_a_constant_rate_is_the_number_however_it_is_written() -> None:
    assert a_spec(optimizer=SGD(Constant(0.2))).determining() == a_spec(optimizer=SGD(0.2)).determining()


def test_differences_name_every_key_with_both_values() -> None:
    old = a_spec(train=TrainConfig(epochs=5)).determining()
    new = a_spec(
        train=TrainConfig(epochs=6, seed=1),
        model=LogisticRegression(l2=0.5),
        optimizer=SGD(ExponentialDecay(0.1, 0.5, 7)),
        data=ArrowDataset("train", label="late", weight="w"),
    ).determining()
    assert differences(old, old) == []
    found = differences(old, new)
    assert "train.epochs is 5 in the run, 6 in the config" in found
    assert "train.seed is 0 in the run, 1 in the config" in found
    assert "model.l2 is 0.0 in the run, 0.5 in the config" in found
    assert "data.categorical is ['carrier'] in the run, not set in the config" in found
    assert "data.weight is not set in the run, 'w' in the config" in found
    assert [sentence.split()[0] for sentence in found if "learning_rate" in sentence] == ["optimizer.learning_rate"]
    assert len(found) == 6


def hashed(**changes: Any) -> list[str]:
    parts = {"model": HashedLogisticRegression(), "optimizer": AdaGrad(), "train": TrainConfig(), **changes}
    return RunSpec(data=ArrowDataset("flights", label="late"), validation=None, **parts).problems()


def test_hashed_models_refuse_what_would_need_more() -> None:
    assert hashed() == []
    assert hashed(optimizer=SGD(momentum=0.9, nesterov=True)) == []
    assert hashed(optimizer=FTRL(l1=0.1)) == []
    assert hashed(train=TrainConfig(staleness=2)) == ["train.staleness must be 0 with hashed categories, got 2"]
    assert hashed(optimizer=SGD(), train=TrainConfig(local_steps=4)) == [
        "train.local_steps must be 1 with hashed categories, got 4"
    ]
    assert hashed(train=TrainConfig(clip_norm=1.0)) == [
        "train.clip_norm must be left out with hashed categories, got 1.0"
    ]
    assert hashed(model=HashedLogisticRegression(31)) == ["model.hash_bits must be a whole number in [1, 30], got 31"]


def test_ftrl_refuses_what_it_cannot_do() -> None:
    ftrl = FTRL()
    assert hashed(model=FactorizationMachine(), optimizer=ftrl) == [
        "optimizer.type ftrl begins with weights of zero, from which factorization_machine cannot move: "
        "use adagrad or sgd"
    ]
    assert hashed(model=LogisticRegression(l2=0.1), optimizer=ftrl) == [
        "model.l2 must be 0 with ftrl, got 0.1: set optimizer.l2"
    ]
    assert hashed(model=LogisticRegression(), optimizer=ftrl, train=TrainConfig(staleness=1)) == [
        "train.staleness must be 0 with ftrl, got 1: use sgd"
    ]
    assert hashed(optimizer=FTRL(StepDecay(0.1, 0.5, (3,)), l1=-1)) == [
        "optimizer.learning_rate must be a constant for ftrl, whose rates decay by themselves, "
        "got StepDecay(initial=0.1, factor=0.5, at=(3,))",
        "optimizer.l1 must be >= 0, got -1",
    ]


@pytest.mark.parametrize("given", [2, -1, True, 1.0, "1"])
def test_replicas_are_none_or_one(given: Any) -> None:
    assert ScalingConfig(replicas=given).problems() == [f"replicas must be 0 or 1, got {given!r}"]


def test_replicas_ask_for_cpus() -> None:
    assert ScalingConfig(num_workers=2, num_servers=3, server_cpus=0.5, replicas=1).cpus == 5


def test_replicas_go_with_every_model_and_consistency() -> None:
    one = ScalingConfig(replicas=1)
    assert a_spec(model=HashedLogisticRegression(4), scaling=one).problems() == []
    assert a_spec(scaling=one).problems() == []
    assert a_spec(train=TrainConfig(staleness=2), scaling=one).problems() == []


@pytest.mark.parametrize(
    ("workers", "servers", "cores", "room"),
    [
        ((1, 2), 1, 2, 1),  # the server's half is not there for a second
        ((1, 2), 1, 3, 2),
        ((1, 4), 2, 5, 4),
        ((1, 4), 1, 64, 4),
        ((3, 6), 1, 2, 3),
        (4, 1, 64, 4),
        (4, 1, 1, 4),
        ((4, 4), 1, 1, 4),
    ],
)
def test_a_local_cluster_has_room_for_as_many_workers_as_the_cores_bear(
    workers: Any, servers: int, cores: int, room: int
) -> None:
    scaling = ScalingConfig(num_workers=workers, num_servers=servers)
    assert scaling.local_workers(cores) == room
    assert scaling.local_cpus(cores) == room + servers / 2
    assert scaling.cpus <= scaling.local_cpus(cores)


def test_a_local_cluster_counts_cpus_as_ray_does() -> None:
    """In ten-thousandths: three workers of 0.1 fit into what one server of 0.7 leaves."""
    scaling = ScalingConfig(num_workers=(1, 9), worker_cpus=0.1, server_cpus=0.7)
    assert scaling.local_workers(1) == 3
