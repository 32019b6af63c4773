"""Bad input: refused with one clear message and exit code 2, before Ray is started, and nothing is touched.

What only the values show (nulls, infinities, one class) is in ray/test_bad_rows.py: the statistics pass finds it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysgd import checkpoint, cli, config
from raysgd.data.moments import shard_statistics
from raysgd.plan import open_tables, plan_from_statistics
from raysgd.protocol.generation import Generation
from raysgd.report import status
from raysgd.report.status import Status
from raysgd.storage import Storage

CONFIG = """
[data]
path = "train"
validation = "valid"
label = "late"
[model]
type = "logistic_regression"
[optimizer]
learning_rate = 0.1
momentum = 0.9
[train]
batch_size = 16
[run]
name = "flights"
"""

Refused = Callable[..., list[str]]


def table(n_rows: int = 100, seed: int = 0) -> pa.Table:
    """Numbers ``delay`` and ``hour``, strings ``carrier``, booleans ``late``."""
    rng = np.random.default_rng(seed)
    delay = rng.normal(size=n_rows)
    carrier = rng.choice(["AA", "UA"], n_rows).tolist()
    return pa.table({"delay": delay, "hour": rng.integers(24, size=n_rows), "carrier": carrier, "late": delay > 0.3})


def write(data: pa.Table, path: str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    pq.write_table(data, path, row_group_size=40)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: train/ of two files, valid/ of one, and run.toml, which has no fault. No Ray."""
    monkeypatch.chdir(tmp_path)
    write(table(100, 0), "train/a.parquet")
    write(table(100, 1), "train/b.parquet")
    write(table(50, 2), "valid/a.parquet")
    Path("run.toml").write_text(CONFIG)

    def init(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", init)
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:  # noqa: ARG001
    """Runs ``raysgd train run.toml``; returns the sentences after it was refused and nothing was touched."""

    # The cluster of other tests is around this process: as if there were none.
    monkeypatch.setattr("ray.is_initialized", lambda: False)

    def run(*arguments: str) -> list[str]:
        before = contents()
        capsys.readouterr()
        assert cli.main(["train", "run.toml", *arguments, "--json"]) == cli.BAD_INPUT
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        (line,) = out.splitlines()
        found = json.loads(line)
        assert list(found) == ["error"]
        assert contents() == before
        return list(found["error"])

    return run


def contents() -> dict[str, bytes | None]:
    """Every file and directory below the current one."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path().rglob("*")}


def sets(*sentences: str) -> list[str]:
    return [word for sentence in sentences for word in ("--set", sentence)]


def test_the_config_itself_has_no_fault(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents()
    assert cli.main(["train", "run.toml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(here / "runs" / "flights")
    assert contents() == before


# -- what the schema shows: how many parameters there will be

NUMBERS_ONLY = ('data.numeric=["delay", "hour"]', "data.categorical=[]")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_more_servers_than_parameters(refused: Refused, dry: list[str]) -> None:
    (sentence,) = refused(*dry, "--num-servers", "4", *sets(*NUMBERS_ONLY))
    assert sentence == "scaling.num_servers must be in [1, 3] for 3 parameters, got 4"
    hashed = sets("model.type=hashed_logistic_regression", "model.hash_bits=4")
    (sentence,) = refused(*dry, "--num-servers", "20", *hashed)
    assert sentence == "scaling.num_servers must be in [1, 19] for 19 parameters, got 20"


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.skipif(sys.platform != "linux", reason="nobody tells how much memory there is")
def test_a_model_that_does_not_fit_into_memory(refused: Refused, dry: list[str]) -> None:
    mlp = sets("model.type=mlp", "model.loss=squared", "model.hidden=[1000000, 1000000]", 'data.label="delay"')
    (sentence,) = refused(*dry, *mlp, *sets('data.numeric=["hour"]', "data.categorical=[]", "run.name=large"))
    assert sentence.startswith(
        "the model does not fit into memory: 1,000,004,000,001 parameters need 16.0 TB a server, "
    )
    assert "with 1 servers and 1 workers; available: " in sentence


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_address_in_the_environment_that_is_none(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, dry: list[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    (sentence,) = refused(*dry)
    assert sentence.startswith("the address (--address or RAY_ADDRESS) must be HOST:PORT, ray://HOST:PORT, ")
    assert sentence.endswith("is for `ray job submit`")


def test_a_dry_run_says_how_much_memory_it_takes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    assert cli.main(["train", "run.toml", "--dry-run", "--json", *sets(*NUMBERS_ONLY)]) == 0
    assert json.loads(capsys.readouterr().out)["memory"].startswith("3 parameters need 0.0 kB a server, ")
    assert cli.main(["train", "run.toml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] is None, "categories: only the data tells"


# -- what the config alone shows: Ray is not even imported


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("optimizer.learning_rate=0", "optimizer.learning_rate must be > 0, got 0"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be > 0, got -1"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a number > 0, got 'fast'"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate must be a finite number > 0, got nan"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate must be a finite number > 0, got inf"),
        ("optimizer.learning_rate=true", "optimizer.learning_rate must be a number > 0, got True"),
        ("optimizer.momentum=1.5", "optimizer.momentum must be in [0, 1), got 1.5"),
        ("optimizer.momentum=1", "optimizer.momentum must be in [0, 1), got 1"),
        ("optimizer.learning_rte=1", "unknown key optimizer.learning_rte; did you mean 'learning_rate'?"),
        ("optimizer.type=adam", "optimizer.type is unknown: 'adam'; allowed are sgd, adagrad, ftrl"),
        ("optimiser.momentum=0", "unknown section [optimiser]; did you mean 'optimizer'?"),
        (
            "model.type=logistic_regresion",
            "model.type is unknown: 'logistic_regresion'; did you mean 'logistic_regression'?",
        ),
        ("train.batch_size=20", "train.batch_size must be a multiple of virtual_workers (8), got 20; use 16 or 24"),
        ("train.batch_size=16.0", "train.batch_size must be a whole number >= 1, got 16.0"),
        ("train.epochs=true", "train.epochs must be a whole number >= 1, got True"),
        ("train.epochs=0", "train.epochs must be a whole number >= 1, got 0"),
        ("train.seed=-1", "train.seed must be a whole number >= 0, got -1"),
        ("train.staleness=-1", "train.staleness must be a whole number >= 0 or inf, got -1"),
        ("scaling.num_servers=false", "scaling.num_servers must be a whole number >= 1, got False"),
        ("scaling.worker_cpus=0", "scaling.worker_cpus must be > 0, got 0"),
        ("scaling.server_cpus=0.00001", "scaling.server_cpus must be at least 0.0001, got 1e-05"),
        ("run.stop_after_steps=0", "run.stop_after_steps must be a whole number >= 1, got 0"),
        ("data.nulls=ignore", "data.nulls must be one of 'refuse', 'impute', 'drop', got 'ignore'"),
        ("data.path=[]", "data.path must be a file, a directory, a glob, or a list of these, got []"),
        ('data.path="a\\u0000"', "data.path must not contain a null character, got 'a\\x00'"),
    ],
)
def test_a_field_that_cannot_be_used(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, sentence: str, problem: str
) -> None:
    monkeypatch.setitem(sys.modules, "raysgd.runtime.trainer", None)  # whoever imports it fails
    assert refused(*sets(sentence)) == [problem]


@pytest.mark.usefixtures("here")
def test_more_workers_than_virtual_workers(refused: Refused) -> None:
    (sentence,) = refused("--num-workers", "9")
    assert sentence.startswith("scaling.num_workers must be at most train.virtual_workers (8), got 9: ask for fewer")


def test_every_violation_is_in_one_message(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "raysgd.runtime.trainer", None)
    bad = sets("optimizer.learning_rate=0", "train.epoch=3", "train.batch_size=12", "data.label=5", "run.name=../x")
    found = refused(*bad, "--num-workers", "0")
    names = ["train.epoch", "data.label", "optimizer.learning_rate", "train.batch_size", "scaling.num_workers", "run."]
    assert len(found) == len(names)
    for name in names:
        assert sum(name in sentence for sentence in found) == 1


@pytest.mark.parametrize(
    "text",
    [
        "\0",
        "a" + ".a" * 2_000 + " = 1\n",
        "[[data]]\n[[model]]\n[[train]]\n",
        "data = 1\nmodel = 2\noptimizer = 3\ntrain = 4\nscaling = 5\nrun = 6\n",
        CONFIG.replace("batch_size = 16", f"batch_size = 1{'0' * 5_000}"),
        CONFIG.replace("batch_size = 16", f"batch_size = 0x1{'0' * 5_000}"),
        CONFIG.replace("momentum = 0.9", f"momentum = 1{'0' * 400}"),
        CONFIG.replace("learning_rate = 0.1", "learning_rate = 1979-05-27T07:32:00Z"),
        CONFIG.replace(
            "learning_rate = 0.1",
            "".join(f'learning_rate{".schedule" * i}.type = "warm_up"\n' for i in range(500)),
        ),
        CONFIG.replace(
            "learning_rate = 0.1",
            f'learning_rate = {{type = "warm_up", schedule = 1, over = "{"9" * 5_000}epochs"}}',
        ),
        CONFIG.replace('name = "flights"', 'name = "\\u001b[2J"'),
        CONFIG.replace('name = "flights"', f'name = "{"x" * 300}"'),
        CONFIG.replace('path = "train"', 'path = "[z-a]*"'),
        CONFIG.replace('path = "train"', f'path = "{"x" * 5_000}"'),
        CONFIG.replace('path = "train"', 'path = [["train"]]'),
    ],
    ids=range(15),
)
@pytest.mark.usefixtures("here")
def test_a_hostile_config(refused: Refused, text: str) -> None:
    Path("run.toml").write_text(text)
    assert refused()


# -- what footers and schemas show: Ray is imported, not started


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("data.path=trian", "{here}/trian does not exist"),
        ('data.path="train/*.arrow"', "{here}/train/*.arrow matches no file"),
        ("data.validation=vaild", "validation: {here}/vaild does not exist"),
        ("data.label=laet", "label column 'laet' does not exist; did you mean 'late'?"),
        ("data.label=zzz", "label column 'zzz' does not exist; the columns are 'delay', 'hour', 'carrier', 'late'"),
        ("data.weight=huor", "weight column 'huor' does not exist; did you mean 'hour'?"),
        (
            "data.label=carrier model.type=linear_regression",
            "label 'carrier' must hold numbers for this model, got strings: "
            "use logistic_regression, softmax_regression or an mlp with another loss",
        ),
        ("data.weight=late", "column 'late' can have one role, got label, weight"),
        (
            'data.numeric=["carrier"]',
            "numeric column 'carrier' must hold numbers, got string: "
            "name it in categorical=[...] or write it as numbers",
        ),
        (
            'data.categorical=["delay"]',
            "categorical column 'delay' must hold strings, integers or booleans, got double: cast it",
        ),
        ("train.batch_size=800", "train.batch_size must be at most the number of training rows (200), got 800"),
    ],
)
def test_data_that_does_not_fit_the_config(refused: Refused, here: Path, sentence: str, problem: str) -> None:
    assert refused(*sets(*sentence.split())) == [problem.format(here=here)]


def test_data_that_was_not_uploaded_with_a_ray_job(refused: Refused) -> None:
    (sentence,) = refused(*sets("data.path=/tmp/ray/working_dir_files/_ray_pkg_0/data"))
    assert "does not exist in this Ray job's working directory" in sentence
    assert "give an absolute path or a URI" in sentence


@pytest.mark.usefixtures("here")
def test_an_empty_directory(refused: Refused) -> None:
    os.mkdir("empty")
    (sentence,) = refused(*sets("data.path=empty"))
    assert sentence == f"no .parquet, .pq, .arrow, .feather, .ipc file in {os.path.abspath('empty')}"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty (0 bytes)"),
        (b"<html><body>404 Not Found</body></html>", "is neither Parquet nor Arrow IPC: it begins with b'<html><b'"),
        (b"PAR1", "is truncated: its footer is missing"),
        (b"PAR1" + b"\xff" * 40 + b"PAR1", "is damaged: its footer claims"),
        (b"PAR1" + b"\0" * 40 + b"PAR1", "is damaged"),
        (b"city,late\nOslo,1\n", "it begins with b'city,lat'; `raysgd prepare` converts CSV and JSON lines"),
        (b"\x80\x04K\x01.", "is neither Parquet nor Arrow IPC"),  # a pickle
    ],
)
@pytest.mark.usefixtures("here")
def test_a_file_that_is_no_table(refused: Refused, content: bytes, part: str) -> None:
    Path("train/c.parquet").write_bytes(content)
    (sentence,) = refused()
    assert sentence.startswith(os.path.abspath("train/c.parquet"))
    assert part in sentence


@pytest.mark.usefixtures("here")
def test_truncated_files_are_all_named(refused: Refused) -> None:
    for name in ("a", "b"):
        path = Path(f"train/{name}.parquet")
        path.write_bytes(path.read_bytes()[:-1])
    found = refused()
    assert [os.path.basename(sentence.split(" is truncated")[0]) for sentence in found] == ["a.parquet", "b.parquet"]


@pytest.mark.usefixtures("here")
def test_a_dangling_link(refused: Refused) -> None:
    os.symlink("nowhere.parquet", "train/c.parquet")
    assert refused() == [f"{os.path.abspath('train/c.parquet')} does not exist: it is a link to nowhere.parquet"]


@pytest.mark.usefixtures("here")
def test_tables_without_rows(refused: Refused) -> None:
    write(table().slice(0, 0), "empty/a.parquet")
    assert refused(*sets("data.path=empty")) == [f"{os.path.abspath('empty')} has no rows (1 files)"]


@pytest.mark.usefixtures("here")
def test_files_whose_schemas_differ_name_files_and_columns(refused: Refused) -> None:
    a, b = os.path.abspath("train/a.parquet"), os.path.abspath("train/b.parquet")
    other = table().drop_columns(["hour"]).append_column("day", pa.array([1] * 100))
    write(other.set_column(0, "delay", pa.array(["1.5"] * 100)), "train/b.parquet")
    assert refused() == [
        f"{b} has no column 'hour', {a} has",
        f"{b} has a column 'day', {a} has not",
        f"column 'delay' is string in {b}, double in {a}; write all files with one schema",
    ]


@pytest.mark.usefixtures("here")
def test_validation_data_of_another_schema(refused: Refused) -> None:
    other = table().drop_columns(["hour"])
    write(other.set_column(0, "delay", pa.array(["1.5"] * 100)), "valid/a.parquet")
    (sentence,) = refused()
    assert sentence == "validation: numeric column 'hour' does not exist; the columns are 'delay', 'carrier', 'late'"
    write(table().set_column(0, "delay", pa.array(["1.5"] * 100)), "valid/a.parquet")
    (sentence,) = refused()
    assert sentence.startswith("validation: numeric column 'delay' must hold numbers, got string")


@pytest.mark.parametrize("name", ["carrier", "late"])
@pytest.mark.usefixtures("here")
def test_validation_data_of_another_kind(refused: Refused, name: str) -> None:
    data = table()
    other = pa.array(["yes", "no"] * 50 if name == "late" else range(100))
    write(data.set_column(data.column_names.index(name), name, other), "valid/a.parquet")
    (sentence,) = refused(*sets('data.categorical=["carrier"]'))
    types = {"carrier": "int64, string", "late": "string, bool"}[name]
    assert sentence == f"validation: column {name!r} is {types} in the training data; write both with one type"


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (pa.timestamp("us"), "write what matters of it as numbers (hour, weekday, days since a date)"),
        (pa.list_(pa.int64()), "write it as a fixed-size list of numbers, or as one column per element"),
        (pa.struct([("a", pa.int64())]), "write its fields as columns"),
        (pa.binary(), "write it as a string or as a fixed-size list of numbers"),
        (pa.null(), "it holds only nulls: leave it out"),
        (pa.list_(pa.string(), 2), "only fixed-size lists of numbers can be used"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("here")
def test_a_type_that_no_role_takes_is_refused_by_name(refused: Refused, kind: pa.DataType, remedy: str) -> None:
    write(table().append_column("odd", pa.nulls(100, kind)), "train/a.parquet")
    (sentence,) = refused(*sets("data.path=train/a.parquet"))
    assert sentence.startswith("column 'odd' has type ")
    assert sentence.endswith(f"{remedy}; or choose columns with numeric=[...] and categorical=[...]")
    (sentence,) = refused(*sets("data.path=train/a.parquet", 'data.numeric=["odd"]'))
    assert sentence.startswith("numeric column 'odd' has type ")


@pytest.mark.usefixtures("here")
def test_two_columns_of_one_name(refused: Refused) -> None:
    columns = [*table().columns, table()["hour"]]
    write(pa.table(columns, names=[*table().column_names, "hour"]), "twice/a.parquet")
    (sentence,) = refused(*sets("data.path=twice"))
    assert sentence == f"{os.path.abspath('twice/a.parquet')} has 2 columns named 'hour'; names must differ"


# -- the run's directory


@pytest.mark.parametrize("place", ["run.toml", "run.toml/deeper", "/proc/raysgd"])
@pytest.mark.usefixtures("here")
def test_a_storage_path_that_cannot_be_written(refused: Refused, place: str) -> None:
    (sentence,) = refused("--storage-path", place)
    assert "choose another storage path" in sentence
    assert os.path.join(os.path.abspath(place), "flights") in sentence


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl", "status.json", "loss.png"])
@pytest.mark.parametrize(("make", "kind"), [(os.makedirs, "a directory"), (os.mkfifo, "no file")])
@pytest.mark.usefixtures("here")
def test_a_name_that_is_no_file(refused: Refused, name: str, make: Callable[[str], None], kind: str) -> None:
    os.makedirs("runs/flights")
    make(f"runs/flights/{name}")
    sentence = f"{os.path.abspath('runs/flights')}/{name} is {kind}: move it away, or choose another --name"
    assert refused() == refused("--fresh") == [sentence]


@pytest.mark.parametrize("uri", ["foo://bucket/runs", "s3://"])
@pytest.mark.usefixtures("here")
def test_a_storage_uri_that_names_no_storage(refused: Refused, uri: str) -> None:
    (sentence,) = refused("--storage-path", uri)
    assert sentence.startswith(f"{uri} names no ")


@pytest.fixture
def run(here: Path) -> Path:
    """The directory of a run that stands at step 5."""
    spec = config.load("run.toml")
    tables = open_tables(spec)
    plan, _ = plan_from_statistics(spec, tables, [shard_statistics(tables.train, s.index) for s in tables.train.shards])
    first = plan.initial()
    path = here / "runs" / "flights"
    storage = Storage.open(path)
    checkpoint.save(storage, Generation(5, first.params, first.state), plan.learner.layout, plan.facts())
    status.write(storage, Status("stopped", step=5, total_steps=plan.total_steps))
    return path


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("train.seed=1", "train.seed is 0 in the run, 1 in the config"),
        ("train.batch_size=32", "train.batch_size is 16 in the run, 32 in the config"),
        ("train.epochs=2", "train.epochs is 1 in the run, 2 in the config"),
        ("train.virtual_workers=4", "train.virtual_workers is 8 in the run, 4 in the config"),
        ("optimizer.learning_rate=0.2", "optimizer.learning_rate is 0.1 in the run, 0.2 in the config"),
        ("model.l2=0.1", "model.l2 is 0.0 in the run, 0.1 in the config"),
        ("data.nulls=drop", "data.nulls is 'refuse' in the run, 'drop' in the config"),
        ('data.numeric=["delay"]', "data.numeric is not set in the run, ['delay'] in the config"),
        (
            "data.path=valid",
            "the training data is not that of the run: files, sizes, rows or schema differ",
        ),
    ],
)
def test_a_run_is_not_continued_with_something_else(refused: Refused, run: Path, change: str, difference: str) -> None:
    remedy = f"{run} holds another run: choose another --name, or --fresh to delete it and start over"
    assert refused(*sets(change)) == [difference, remedy]


def test_all_differences_are_told(refused: Refused, run: Path) -> None:
    found = refused(*sets("train.seed=1", "optimizer.momentum=0.5", "model.type=softmax_regression"))
    assert found[:-1] == [
        "model.type is 'logistic_regression' in the run, 'softmax_regression' in the config",
        "optimizer.momentum is 0.9 in the run, 0.5 in the config",
        "train.seed is 0 in the run, 1 in the config",
    ]
    assert str(run) in found[-1]


@pytest.mark.usefixtures("run")
def test_a_run_is_not_continued_on_rows_that_changed(refused: Refused) -> None:
    write(table(100, 7), "train/b.parquet")
    assert refused()[0] == "the training data is not that of the run: files, sizes, rows or schema differ"


def test_a_run_whose_checkpoints_are_all_damaged(refused: Refused, run: Path) -> None:
    (run / "checkpoints" / "step-00000005" / "params.safetensors").write_bytes(b"\x80\x04K\x01.")
    (sentence,) = refused()
    assert f"{run} has no checkpoint that can be used" in sentence


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"state": "flying"}',
        b'{"state": ["failed"]}',
        b'{"state": "failed", "attempt": "x"}',
        b'{"state": "failed", "exit_code": []}',
        b'{"state": "failed", "details": null}',
        b'{"state": "failed", "message": {"a": 1}}',
        b"[" * 100_000,
    ],
)
@pytest.mark.usefixtures("run")
def test_a_status_that_is_none_of_ours_is_none(capsys: pytest.CaptureFixture[str], text: bytes) -> None:
    Path("runs/flights/status.json").write_bytes(text)
    assert cli.main(["train", "run.toml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["begins_at_step"] == 5
    assert cli.main(["inspect", "flights", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] is None
    assert cli.main(["inspect", "flights"]) == 0


@pytest.mark.usefixtures("run")
def test_a_stored_config_that_is_none_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for text in (b"\xff", b"[data]\npath = 1", b"data = 1"):
        Path("runs/flights/config.toml").write_bytes(text)
        assert cli.main(["evaluate", "flights", "--json"]) == cli.BAD_INPUT
        assert json.loads(capsys.readouterr().out)["error"]
        assert cli.main(["inspect", "flights"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "train", "step": 1}',
        '{"kind": "train", "step": 1, "loss": "x", "learning_rate": []}',
        '{"kind": "validation", "step": -5, "loss": {"a": 1}}',
        '{"kind": "train", "step": 1, "loss": true}',
        '{"kind": "x", "step": 1}',
    ],
)
@pytest.mark.usefixtures("run")
def test_metrics_that_are_none_of_ours(capsys: pytest.CaptureFixture[str], line: str) -> None:
    good = '{"kind": "train", "step": 2, "loss": 0.5, "learning_rate": 0.1}\n'
    Path("runs/flights/metrics.jsonl").write_text(good + line + "\n")
    for command in (["inspect", "flights"], ["plot", "flights", "-o", "loss.svg"]):
        assert cli.main(command) == 0
        assert "Traceback" not in capsys.readouterr().err
