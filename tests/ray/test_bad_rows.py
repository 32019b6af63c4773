"""Bad values that no footer shows: the statistics pass finds them, before step 1, and leaves an existing run alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysgd import checkpoint, cli
from raysgd.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")

CONFIG = """
[data]
path = "train"
validation = "valid"
label = "late"
categorical = ["carrier"]
weight = "weight"
[model]
type = "logistic_regression"
[train]
batch_size = 16
epochs = 2
[scaling]
num_workers = 2
server_cpus = 0.25
[run]
name = "flights"
stop_after_steps = 3
"""


def columns(seed: int = 0, n_rows: int = 60) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    delay = rng.normal(size=n_rows)
    return {
        "delay": delay,
        "count": rng.integers(100, size=n_rows),
        "carrier": rng.choice(["AA", "UA"], n_rows).tolist(),
        "weight": rng.uniform(0.5, 1.5, n_rows),
        "late": delay > 0.3,
    }


def write(path: str, **changes: Any) -> None:
    """A file of three row groups; ``changes`` put a value into row 25 (row group 1), or replace a whole column."""
    table = columns()
    for name, value in changes.items():
        values = list(table[name])
        if isinstance(value, list):
            values = value
        else:
            values[25] = value
        table[name] = pa.array(values, from_pandas=False)
    Path(path).parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=20)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("train/a.parquet")
    write("train/b.parquet")
    write("valid/a.parquet")
    Path("run.toml").write_text(CONFIG)
    return tmp_path


Refused = Callable[..., list[str]]


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:  # noqa: ARG001 - it runs there
    """Runs ``raysgd train run.toml``; the sentences after it was refused, with no step done and no file of weights."""

    def run(*arguments: str) -> list[str]:
        capsys.readouterr()
        assert cli.main(["train", "run.toml", *arguments, "--json"]) == cli.BAD_INPUT
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert len(out.splitlines()) == 1
        status = json.loads(Path("runs/flights/status.json").read_text())
        assert (status["state"], status["exit_code"], status["step"]) == ("failed", 2, 0)
        assert not Path("runs/flights/checkpoints").exists()
        found = json.loads(out)
        assert list(found) == ["error"]
        return list(found["error"])

    return run


@pytest.mark.usefixtures("here")
def test_every_bad_value_of_every_file_is_in_one_message(refused: Refused) -> None:
    a, b = "train/a.parquet", "train/b.parquet"
    write(a, delay=None, count=2**53 + 1, carrier=None, late=None)
    write(b, delay=math.inf, weight=-1.0)
    here = Path.cwd()
    allowed = 'set nulls = "impute" or "drop", or leave the column out'
    assert refused() == [
        f"{here}/{a}, row group 1: column 'delay' has 1 missing values (null or NaN); {allowed}",
        f"{here}/{a}, row group 1: column 'carrier' has 1 missing values (null or NaN); {allowed}",
        f"{here}/{a}, row group 1: column 'late' has 1 missing values (null or NaN); "
        'set nulls = "drop" to leave such rows out',
        f"{here}/{a}, row group 1: column 'count' has integers beyond 2^53, such as 9007199254740993; "
        "use it as categorical, or write smaller",
        f"{here}/{b}, row group 1: column 'delay' has 1 infinite values; write finite numbers",
        f"{here}/{b}, row group 1: column 'weight' has 1 negative weights; weights must be >= 0",
    ]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"weight": [0.0] * 60}, "the weights must have a positive sum, got 0 (in float32, where 1e-46 is 0, too)"),
        ({"late": [True] * 60}, "label 'late' must have at least two classes, got only True"),
    ],
    ids=["weights", "one class"],
)
@pytest.mark.usefixtures("here")
def test_values_that_only_all_rows_together_show(refused: Refused, changes: dict[str, Any], part: str) -> None:
    write("train/a.parquet", **changes)
    (sentence,) = refused("--set", "data.path=train/a.parquet")
    assert sentence == part


@pytest.mark.parametrize(
    ("changes", "nulls", "why"),
    [
        ({"weight": [0.0] * 60}, "refuse", "weights of 0 in column 'weight' (in float32, where 1e-46 is 0, too)"),
        ({"weight": [1e-46] * 60}, "refuse", "weights of 0 in column 'weight'"),
        ({"delay": [math.nan] * 60}, "drop", 'nulls = "drop" leaves out each that misses a value and weights of 0'),
    ],
    ids=["zero", "vanishing", "dropped"],
)
@pytest.mark.usefixtures("here")
def test_validation_data_that_weighs_nothing(refused: Refused, changes: dict[str, Any], nulls: str, why: str) -> None:
    """Before step 1: the untrained model is scored first."""
    write("valid/a.parquet", **changes)
    (sentence,) = refused("--set", f"data.nulls={nulls}")
    assert sentence.startswith(f"{Path.cwd()}/valid/a.parquet: no row has a weight, so there is no loss: {why}")
    assert sentence.endswith("; give rows that count")


@pytest.mark.usefixtures("here")
def test_a_damaged_row_group_behind_a_valid_footer(refused: Refused) -> None:
    path = Path("train/b.parquet")
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(0)
    damaged = bytearray(path.read_bytes())
    begin = chunk.data_page_offset
    damaged[begin : begin + 16] = b"\xff" * 16
    path.write_bytes(bytes(damaged))
    (sentence,) = refused()
    assert sentence.startswith(f"{path.absolute()}, row group 2 is damaged: ")


@pytest.mark.usefixtures("here")
def test_more_servers_than_parameters(refused: Refused) -> None:
    (sentence,) = refused("--num-servers", "9")
    assert sentence == "scaling.num_servers must be in [1, 5] for 5 parameters, got 9"


@pytest.mark.usefixtures("here")
def test_a_model_that_does_not_fit_into_memory(refused: Refused) -> None:
    """Categories: how large it is only the statistics tell. Nothing of it was reserved by then."""
    (sentence,) = refused("--set", "model.type=mlp", "--set", "model.hidden=[1000000, 1000000]")
    assert sentence.startswith("the model does not fit into memory: 1,000,0")
    assert " TB a server, " in sentence


@pytest.mark.usefixtures("here")
def test_validation_rows_are_judged_before_step_1(refused: Refused) -> None:
    write("valid/a.parquet", delay=None)
    (sentence,) = refused()
    assert sentence.startswith(f"{Path('valid/a.parquet').absolute()}, row group 1: column 'delay' has 1 missing")


@pytest.mark.usefixtures("here")
def test_a_label_that_training_did_not_have(refused: Refused) -> None:
    classes = {"train/a.parquet": ["no", "yes"], "train/b.parquet": ["no", "yes"], "valid/a.parquet": ["no", "maybe"]}
    for path, values in classes.items():
        write(path, late=values * 30)
    (sentence,) = refused()
    assert "label 'late' has values that training did not: 'maybe'; its classes are 'no', 'yes'" in sentence


@pytest.mark.usefixtures("here")
def test_an_existing_run_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "run.toml", "--json"]) == 0
    digest = json.loads(capsys.readouterr().out)["digest"]
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    write("train/b.parquet", delay=None)
    assert cli.main(["train", "run.toml", "--set", "run.stop_after_steps=5", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["error"]
    assert found[0] == "the training data is not that of the run: files, sizes, rows or schema differ"
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()} == before
    assert checkpoint.load(Storage.open("runs/flights")).digest() == digest
