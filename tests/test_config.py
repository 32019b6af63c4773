"""TOML and --set to a run and back: exact round trips, every violation in one message."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysgd import config
from raysgd.data.dataset import ArrowDataset
from raysgd.errors import InputError
from raysgd.learn.models import MLP, LinearRegression, LogisticRegression, SoftmaxRegression
from raysgd.learn.schedules import Constant, CosineDecay, ExponentialDecay, InverseTimeDecay, StepDecay, WarmUp
from raysgd.learn.transforms import SGD, AdaGrad
from raysgd.spec import CheckpointConfig, FailureConfig, RunConfig, RunSpec, ScalingConfig, TrainConfig

MINIMAL = """
[data]
path = "train"
validation = "valid"
label = "late"
[model]
type = "logistic_regression"
"""


def refusal(text: str, *sets: str, **overrides: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        config.loads(text, "/here", sets, overrides)
    return list(caught.value.problems)


def test_a_minimal_config_takes_the_defaults() -> None:
    spec = config.loads(MINIMAL, "/here")
    assert spec.data == ArrowDataset("/here/train", label="late")
    assert spec.validation == ArrowDataset("/here/valid", label="late")
    assert (spec.model, spec.optimizer) == (LogisticRegression(), SGD())
    assert (spec.train, spec.scaling) == (TrainConfig(), ScalingConfig())
    assert spec.run == RunConfig(storage_path="/here/runs")


def test_every_section_is_read() -> None:
    text = (
        MINIMAL
        + """
    hidden = [32, 16]
    [optimizer]
    type = "sgd"
    momentum = 0.9
    [optimizer.learning_rate]
    type = "warm_up"
    over = 100
    schedule = { type = "step_decay", initial = 0.1, factor = 0.5, at = ["2epochs", 30] }
    [train]
    batch_size = 64
    [scaling]
    num_workers = 2
    worker_cpus = 0.5
    [run]
    num_to_keep = 3
    log_every = "0.1epoch"
    checkpoint_seconds = 600
    [run.failure_config]
    max_failures = -1
    """
    )
    spec = config.loads(text.replace("logistic_regression", "mlp"))
    assert spec.model == MLP(hidden=(32, 16))
    schedule = WarmUp(StepDecay(0.1, factor=0.5, at=("2epochs", 30)), over=100)
    assert spec.optimizer == SGD(learning_rate=schedule, momentum=0.9)
    assert (spec.train.batch_size, spec.scaling.num_workers, spec.scaling.worker_cpus) == (64, 2, 0.5)
    assert spec.run.checkpoint_config == CheckpointConfig(num_to_keep=3)
    assert (spec.run.log_every, spec.run.checkpoint_seconds) == ("0.1epoch", 600)
    assert spec.run.failure_config == FailureConfig(max_failures=-1)


rates = st.floats(1e-6, 10.0)
cpus = st.floats(1e-4, 10.0)
durations = st.one_of(st.integers(1, 10_000), st.sampled_from(["1epoch", "0.5epoch", "3epochs"]))
plain_schedules = st.one_of(
    st.builds(Constant, rates),
    st.builds(ExponentialDecay, rates, st.floats(0.01, 1.0), durations, st.booleans()),
    st.builds(StepDecay, rates, st.floats(0.01, 1.0), st.lists(durations, min_size=1, max_size=3).map(tuple)),
    st.builds(InverseTimeDecay, rates, st.floats(0.01, 1.0), durations, st.booleans()),
    st.builds(CosineDecay, rates.map(lambda r: r + 10.0), rates, st.none() | durations),
)
schedules = plain_schedules | st.builds(WarmUp, rates | plain_schedules, durations)
optimizers = st.one_of(
    st.builds(SGD, rates | schedules, st.floats(0.0, 0.96875, width=32)),
    st.builds(AdaGrad, rates | schedules, st.floats(1e-12, 1e-3)),
)
models = st.one_of(
    st.builds(LinearRegression, st.floats(0.0, 1.0, width=32), rates),
    st.builds(LogisticRegression, st.floats(0.0, 1.0, width=32), rates),
    st.builds(SoftmaxRegression, st.floats(0.0, 1.0, width=32), rates),
    st.builds(MLP, st.lists(st.integers(1, 99), min_size=1, max_size=3).map(tuple), st.sampled_from(["relu", "tanh"])),
)
names = st.text(min_size=1, max_size=8)
datasets = st.builds(
    ArrowDataset,
    st.sampled_from(["/data/train", "s3://bucket/train", "/data/*.parquet"]),
    label=names,
    numeric=st.none() | st.lists(names, max_size=3).map(tuple),
    categorical=st.none() | st.lists(names, max_size=3).map(tuple),
    weight=st.none() | names,
    nulls=st.sampled_from(["refuse", "impute", "drop"]),
)


def workers(most: int) -> st.SearchStrategy[Any]:
    """A number of workers, or a pair of the least and the most."""
    counts = st.integers(1, most)
    return counts | st.tuples(counts, counts).map(lambda pair: tuple(sorted(pair)))


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    data = draw(datasets)
    parts = draw(st.integers(1, 8))
    return RunSpec(
        data=data,
        validation=draw(st.none() | st.just(replace(data, path="/data/valid"))),
        model=draw(models),
        optimizer=draw(optimizers),
        train=TrainConfig(
            parts * draw(st.integers(1, 99)),
            draw(st.integers(1, 9)),
            draw(st.integers(0, 2**63 - 1)),
            parts,
            on_divergence=draw(st.sampled_from(["stop", "lower_learning_rate"])),
        ),
        scaling=ScalingConfig(
            draw(workers(parts)), draw(st.integers(1, 3)), draw(st.integers(0, 1)), draw(cpus), draw(cpus)
        ),
        run=RunConfig(
            name=draw(st.none() | st.sampled_from(["flights", "täglich", "a b"])),
            storage_path=draw(st.sampled_from(["/runs", "gs://bucket/runs"])),
            validate_every=draw(durations),
            log_every=draw(st.none() | durations),
            stop_after_steps=draw(st.none() | st.integers(1, 99)),
            checkpoint_seconds=draw(st.none() | rates | st.integers(1, 9_999)),
            checkpoint_config=CheckpointConfig(draw(st.none() | st.integers(1, 9))),
            failure_config=FailureConfig(draw(st.integers(-1, 99))),
            address=draw(st.none() | st.just("ray://head:10001")),
        ),
    )


def as_tuples(data: ArrowDataset) -> ArrowDataset:
    """TOML's lists as the tuples that were written."""
    names = {n: None if (v := getattr(data, n)) is None else tuple(v) for n in ("numeric", "categorical")}
    return replace(data, **names)


@given(specs())
def test_a_run_survives_its_toml(spec: RunSpec) -> None:
    text = config.dumps(spec)
    found = config.loads(text, "/elsewhere")
    validation = None if found.validation is None else as_tuples(found.validation)
    assert replace(found, data=as_tuples(found.data), validation=validation) == spec
    assert config.dumps(found) == text
    assert found.determining() == spec.determining()


@given(models)
def test_a_model_survives_its_table(model: Any) -> None:
    assert config.model_from_dict(config.model_to_dict(model)) == model


def test_relative_paths_are_written_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    data = ArrowDataset(["a.parquet", Path("b.parquet")], label="late")  # type: ignore[list-item]
    text = config.dumps(RunSpec(data, ArrowDataset("valid"), LogisticRegression(), SGD()))
    found = config.loads(text, "/elsewhere")
    assert found.data.path == [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    assert found.validation is not None
    assert found.validation.path == str(tmp_path / "valid")
    assert found.run.storage_path == str(tmp_path / "runs")


def test_paths_resolve_against_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "flights.toml").write_text(
        MINIMAL.replace('"train"', '["../a.parquet", "s3://bucket/b.parquet", "/c.parquet"]')
    )
    monkeypatch.chdir(tmp_path)
    spec = config.load(os.path.join("jobs", "flights.toml"), overrides={"run.storage_path": "/given"})
    assert spec.data.path == [str(tmp_path / "a.parquet"), "s3://bucket/b.parquet", "/c.parquet"]
    assert spec.validation is not None
    assert spec.validation.path == str(tmp_path / "jobs" / "valid")
    assert spec.run.storage_path == "/given"
    assert spec.run.name == "flights"


def test_a_link_in_a_path_is_followed_before_dots(tmp_path: Path) -> None:
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "train").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "deep")
    spec = config.loads(MINIMAL.replace('"train"', '"../train"'), tmp_path / "link")
    assert os.path.realpath(str(spec.data.path)) == str(tmp_path / "far" / "train")


def test_sets_are_toml_or_text_and_reach_into_tables() -> None:
    sets = [
        "train.epochs=3",
        "run.name=flights",
        "data.numeric=['a', \"b\"]",
        'optimizer.learning_rate={type = "constant", rate = 0.5}',
        "optimizer.learning_rate.rate=0.25",
        "data.label=a=b",
        "scaling.num_workers=[2, 6]",
        "run.failure_config.max_failures=0",
        " optimizer.nesterov = true ",
        "optimizer.momentum=0.5",
    ]
    spec = config.loads(MINIMAL, "/here", sets)
    assert (spec.train.epochs, spec.run.name, spec.data.label) == (3, "flights", "a=b")
    assert spec.data.numeric == ["a", "b"]
    assert (spec.scaling.num_workers, spec.run.failure_config) == ((2, 6), FailureConfig(max_failures=0))
    assert spec.optimizer == SGD(Constant(0.25), momentum=0.5, nesterov=True)


def test_flags_are_stronger_than_sets() -> None:
    spec = config.loads(MINIMAL, "/here", ["scaling.num_workers=3"], {"scaling.num_workers": 4})
    assert spec.scaling.num_workers == 4


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("train.epochs", "--set needs section.key=value, got 'train.epochs'"),
        ("epochs=3", "--set needs section.key=value, got 'epochs'; did you mean 'train.epochs'?"),
        ("max_failures=3", "got 'max_failures'; allowed are run.failure_config.max_failures"),
        ("run.failure_config=3", "run.failure_config must be a table, got 3"),
        ("run.failure_config.max_failures=-2", "run.failure_config.max_failures must be a whole number >= -1"),
        (
            "run.failure_config.max_failure=2",
            "unknown key run.failure_config.max_failure; did you mean 'max_failures'?",
        ),
        ("scaling.num_workers=2-6", "scaling.num_workers must be a whole number >= 1 or a pair of them, the least and"),
        ('model={type="mlp"}', "--set needs section.key=value, got 'model', a whole section: set its keys one by one"),
        ("=3", "--set needs section.key=value"),
        ("train.=3", "--set needs section.key=value"),
        ("train.epochs.a=3", "train.epochs must be a whole number"),
        ("model.type.a=3", "--set model.type.a: type is no table"),
        ("train.epochs=1\nseed = 2", "train.epochs must be a whole number >= 1, got '1\\nseed = 2'"),
        ("train.epochs=[1", "train.epochs must be a whole number >= 1, got '[1'"),
        ("train.epochs=", "train.epochs must be a whole number >= 1, got ''"),
    ],
)
def test_a_set_that_cannot_be_used(sentence: str, problem: str) -> None:
    found = refusal(MINIMAL, sentence)
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize("rate", ["0", "-1", '"fast"', "nan", "inf", "true", "[0.1]", "1979-05-27"])
def test_a_learning_rate_that_is_none(rate: str) -> None:
    (sentence,) = refusal(MINIMAL, f"optimizer.learning_rate={rate}")
    assert sentence.startswith("optimizer.learning_rate must be ")


def test_unknown_words_suggest_the_nearest() -> None:
    text = MINIMAL + "ini_scale = 1\n[optimiser]\n[optimizer]\nmomentun = 0.9\n[train]\nepoch = 3\n[run]\nnmae = 'x'\n"
    assert refusal(text) == [
        "unknown section [optimiser]; did you mean 'optimizer'?",
        "unknown key model.ini_scale; did you mean 'init_scale'?",
        "unknown key optimizer.momentun; did you mean 'momentum'?",
        "unknown key train.epoch; did you mean 'epochs'?",
        "unknown key run.nmae; did you mean 'name'?",
    ]


def test_unknown_types_and_missing_keys() -> None:
    text = MINIMAL.replace("logistic_regression", "logistc_regression")
    assert refusal(text, 'optimizer.learning_rate={type = "exponential_decay", initial = 0.1}') == [
        "model.type is unknown: 'logistc_regression'; did you mean 'logistic_regression'?",
        "optimizer.learning_rate.decay_rate is missing",
        "optimizer.learning_rate.every is missing",
    ]
    assert refusal("")[:2] == [
        "data.path is missing: a file, directory, glob or list of them",
        "section [model] is missing; model.type is one of "
        "linear_regression, logistic_regression, softmax_regression, mlp, "
        "hashed_logistic_regression, factorization_machine",
    ]


def test_all_violations_are_in_one_message() -> None:
    """Also those of a section that has an unknown key besides."""
    text = MINIMAL + "[train]\nbatch_size = 100\nepoch = 3\n[optimizer]\nmomentum = 1.5\nrate = 3\n"
    found = refusal(text, "data.nulls=ignore", "scaling.num_workers=9", "epochs=3")
    assert sorted(found) == sorted(set(found))
    for part in (
        "train.batch_size",
        "train.epoch;",
        "optimizer.momentum must",
        "optimizer.rate",
        "data.nulls",
        "=value",
    ):
        assert sum(part in sentence for sentence in found) == 1, (part, found)
    assert sum("num_workers" in sentence for sentence in found) == 1


@pytest.mark.parametrize("section", ["data", "model", "optimizer", "train", "scaling", "run"])
def test_a_section_that_is_no_table(section: str) -> None:
    tables = dict.fromkeys(("data", "model", "optimizer", "train", "scaling", "run"), "")
    tables |= {"data": 'data = {path = "x", label = "y"}\n', "model": 'model = {type = "mlp"}\n'}
    tables[section] = f"{section} = 5\n"
    found = refusal("".join(tables.values()))
    assert any(sentence.startswith(f"{section} must be a") and "got 5" in sentence for sentence in found)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"[data\n", "line 1"),
        (b"[data]\npath = 'a'\n\nlabel = \n", "line 4"),
        (b"[data]\n\xff\n", "line 2"),
        (b"a = " + b"[" * 100_000, "no TOML"),
        (b"a = 1\na = 2\n", "line 2"),
    ],
)
def test_what_is_no_toml_names_file_and_line(tmp_path: Path, content: bytes, part: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.toml") as caught:
        config.load(file)
    assert part in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_file_that_is_not_there_or_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.toml does not exist"):
        config.load(tmp_path / "missing.toml")
    with pytest.raises(InputError, match="cannot be read"):
        config.load(tmp_path)
