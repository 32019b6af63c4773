"""The command line: exit codes, one JSON object on standard output, texts for people. No Ray."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysgd import checkpoint, cli
from raysgd.data.dataset import ArrowDataset, open_dataset
from raysgd.data.encode import Encoder
from raysgd.data.moments import merge, shard_statistics
from raysgd.errors import CheckpointError, DivergedError, InputError, Interrupted, RunError
from raysgd.learn.models import LogisticRegression
from raysgd.protocol.generation import Generation
from raysgd.report import status
from raysgd.report.metrics_log import MetricsLog
from raysgd.report.status import Status
from raysgd.sections import model_to_dict
from raysgd.storage import Storage

CONFIG = """
[data]
path = "train.parquet"
validation = "valid.parquet"
label = "late"
[model]
type = "logistic_regression"
[run]
name = "flights"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: data, a TOML file, and a run of 20 steps at runs/flights."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, n_rows in (("train", 200), ("valid", 50)):
        delay = rng.normal(size=n_rows)
        pq.write_table(pa.table({"delay": delay, "late": delay > 0.5}), f"{name}.parquet", row_group_size=40)
    Path("flights.toml").write_text(CONFIG)
    a_run(Storage.open("runs/flights"))
    return tmp_path


def a_run(storage: Storage) -> None:
    """A run of 20 steps by hand: config, status, metrics, a checkpoint at 10 and a worse one at 20."""
    dataset = open_dataset(ArrowDataset("train.parquet", label="late"))
    encoder = Encoder.fit(merge([shard_statistics(dataset, s.index) for s in dataset.shards]), dataset.schema, "class")
    layout = LogisticRegression().bind(encoder.inputs, encoder.target).layout
    with MetricsLog(storage) as log:
        for step, weight in ((10, 1.0), (20, 2.0)):
            facts = {
                "encoder": encoder.to_json(),
                "model": model_to_dict(LogisticRegression()),
                "metrics": {"valid_loss": weight},
            }
            params = np.full(layout.n_params, weight, np.float32)
            saved = checkpoint.save(storage, Generation(step, params, {"momentum": params * 0}), layout, facts)
            log.train(step=step, epoch=1, rows=9 * step, loss=0.5, learning_rate=0.1, rows_per_s=1e6)
            log.validation(step=step, epoch=1, metrics={"loss": weight})
    storage.write_atomic("config.toml", CONFIG.replace('"valid', f'"{Path.cwd()}/valid').encode())
    status.write(storage, Status("succeeded", step=20, total_steps=20, digest=saved.digest()))


class Captured:
    """Runs a command line; what it printed where."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self.capsys.readouterr()
        code = cli.main(arguments)
        self.out, self.err = self.capsys.readouterr()
        return code

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert self(*arguments, "--json") == code
        assert len(self.out.splitlines()) == 1
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Captured:  # noqa: ARG001 - it runs there
    return Captured(capsys)


class FakeTrainer:
    """Stands where the trainer stands: remembers what it was given and does what the test says."""

    def __init__(self) -> None:
        self.spec: Any = None
        self.options: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.closed = False

    def from_spec(self, spec: Any, **options: Any) -> FakeTrainer:
        self.spec, self.options = spec, options
        return self

    def dry_run(self) -> dict[str, Any]:
        return {
            "run": "/runs/flights",
            "columns": ["200 rows", "label: late"],
            "total_steps": 20,
            "validation_rows": None,
        }

    def fit(self) -> SimpleNamespace:
        print("chatter of a library")
        self.options["report"].say("2 workers")
        if self.error is not None:
            raise self.error
        return SimpleNamespace(
            path="/runs/flights",
            step=20,
            stopped=False,
            metrics={"valid_loss": 0.25, "rate": float("nan")},
            checkpoint="/runs/flights/checkpoints/step-00000020",
            digest="5f0c",
            history=[],
        )


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> FakeTrainer:
    fake = FakeTrainer()
    module = ModuleType("raysgd.runtime.trainer")
    module.Trainer = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "raysgd.runtime.trainer", module)
    return fake


def test_train_passes_on_what_was_asked(here: Path, run: Captured, trainer: FakeTrainer) -> None:
    flags = ["--name", "other", "--storage-path", "mine", "--num-workers", "3", "--num-servers", "2"]
    sets = ["--set", "train.epochs=4", "--set", "scaling.num_workers=5", "--address", "auto", "--fresh"]
    assert run("train", "flights.toml", *flags, *sets) == 0
    spec = trainer.spec
    assert (spec.run.name, spec.run.storage_path, spec.run.address) == ("other", str(here / "mine"), "auto")
    assert (spec.scaling.num_workers, spec.scaling.num_servers, spec.train.epochs) == (3, 2, 4)
    assert trainer.options["fresh"] is True
    assert "2 workers" in run.out
    for part in ("done: 20 steps", "run         /runs/flights", "5f0c", "valid_loss 0.25"):
        assert part in run.out


@pytest.mark.parametrize(
    ("flag", "workers"), [("3", 3), ("2-6", (2, 6)), ("2,6", (2, 6)), ("4-4", (4, 4)), ("1-8", (1, 8))]
)
def test_train_takes_the_least_and_the_most_workers(
    run: Captured, trainer: FakeTrainer, flag: str, workers: object
) -> None:
    assert run("train", "flights.toml", "--num-workers", flag) == 0
    assert trainer.spec.scaling.num_workers == workers


@pytest.mark.usefixtures("trainer")
def test_train_speaks_json_on_standard_output_alone(run: Captured) -> None:
    assert run.json("train", "flights.toml") == {
        "path": "/runs/flights",
        "step": 20,
        "stopped": False,
        "metrics": {"valid_loss": 0.25, "rate": None},
        "checkpoint": "/runs/flights/checkpoints/step-00000020",
        "digest": "5f0c",
    }
    assert run.err.splitlines() == ["chatter of a library", "2 workers"]


@pytest.mark.usefixtures("trainer")
def test_train_can_be_quiet(run: Captured) -> None:
    assert run("train", "flights.toml", "-q") == 0
    assert "2 workers" not in run.out + run.err
    assert "done: 20 steps" in run.out


def test_a_dry_run_trains_nothing(run: Captured, trainer: FakeTrainer) -> None:
    trainer.error = AssertionError("fit was called")
    assert run("train", "flights.toml", "--dry-run") == 0
    assert "nothing was trained" in run.out
    assert "total steps  20" in run.out
    assert run.json("train", "flights.toml", "--dry-run") == trainer.dry_run()


@pytest.mark.parametrize(
    ("error", "code", "sentences"),
    [
        (InputError(["a is wrong", "b is wrong"]), 2, ["a is wrong", "b is wrong"]),
        (CheckpointError("no checkpoint"), 2, ["no checkpoint"]),
        (RunError("a worker died"), 1, ["a worker died"]),
        (DivergedError(7, "NaN"), 1, ["step 7 diverged: NaN"]),
        (PermissionError(13, "Permission denied"), 1, ["[Errno 13] Permission denied"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (Interrupted(143), 143, ["interrupted"]),
        (ZeroDivisionError("a bug"), 1, ["ZeroDivisionError: a bug"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_end_has_its_code(
    run: Captured, trainer: FakeTrainer, error: BaseException, code: int, sentences: list[str]
) -> None:
    trainer.error = error
    assert run.json("train", "flights.toml", code=code) == {"error": sentences}
    assert run("train", "flights.toml") == code
    assert all(sentence in run.err for sentence in sentences)
    assert not any(sentence in run.out for sentence in sentences)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "flights.toml", "--num-workers", "two"], "'two' is no number of workers: give a whole number, as 4"),
        (["train", "flights.toml", "--num-workers", "2-"], "'2-' is no number of workers"),
        (["train", "flights.toml", "--num-workers", "٣"], "'٣' is no number of workers: give a whole number, as 4"),
        (["train", "flights.toml", "--num-workers", "2-٣"], "'2-٣' is no number of workers"),
        (["train", "flights.toml", "--num-workers", "1_0"], "'1_0' is no number of workers"),
        (["train", "flights.toml", "--num-servers", "٣"], "'٣' is no whole number: give one in the digits 0 to 9"),
        (["train", "flights.toml", "--set", "train.epochs=٣"], "train.epochs must be a whole number >= 1, got '٣'"),
        (["train", "flights.toml", "--set", "run.log_every=٣epoch"], "run.log_every must be a number of steps >= 1"),
        (
            ["train", "flights.toml", "--address", "nowhere"],
            "run.address must be HOST:PORT, ray://HOST:PORT, 'auto' or",
        ),
        (
            ["train", "flights.toml", "--num-workers", "6-2"],
            "scaling.num_workers must be a whole number >= 1 or a pair",
        ),
        (["train", "flights.toml", "--num-workers", "2,9"], "virtual_workers (8), got (2, 9)"),
        (["train", "flights.toml", "--num-workers", "-1"], "scaling.num_workers must be a whole number >= 1, got -1"),
        (["train", "flights.toml", "--num-worker", "2"], "No such option"),
        (["trian"], "No such command 'trian'"),
        (["predict", "flights", "--data", "x"], "Missing option '-o'"),
        (["plot", "-o", "loss.png"], "Missing argument"),
        (["train", "missing.toml"], "missing.toml does not exist"),
        (["train", "flights.toml", "--set", "train.epochs=0"], "train.epochs must be a whole number >= 1, got 0"),
        (["train", "flights.toml", "--num-workers", "9"], "scaling.num_workers must be at most"),
        (["train", "flights.toml", "--storage-path", ""], "run.storage_path must be text"),
        (["evaluate", "nowhere"], "there is no run 'nowhere'"),
        (["inspect", "no/where"], "there is no run at"),
        (["digest", "valid.parquet"], "there is no run"),
        (["evaluate", "flights", "--data", "missing.parquet"], "missing.parquet"),
        (["predict", "flights", "--data", "valid.parquet", "-o", "out.xlsx"], "must end in one of"),
        (["plot", "flights", "-o", "loss.gif"], "must end in one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_ends_with_two(run: Captured, arguments: list[str], part: str) -> None:
    assert run(*arguments) == 2
    assert part in run.err
    assert run.out == ""
    assert any(part in sentence for sentence in run.json(*arguments, code=2)["error"])
    assert run.err == ""


def test_bad_input_is_told_before_ray_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "flights.toml").write_text(CONFIG)
    code = "import sys; from raysgd.cli import main; code = main(sys.argv[1:]); print(code, 'ray' in sys.modules)"
    arguments = ["train", str(tmp_path / "flights.toml"), "--set", "train.epoch=1"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert "did you mean 'epochs'?" in done.stderr


def test_evaluate_scores_the_best_checkpoint(here: Path, run: Captured) -> None:
    found = run.json("evaluate", "runs/flights")
    assert (found["step"], found["run"]) == (10, str(here / "runs" / "flights"))
    assert found["data"] == str(here / "valid.parquet")
    assert found["metrics"]["rows"] == 50
    assert found["metrics"]["auc"] == 1.0
    other = run.json("evaluate", "flights", "--data", "train.parquet")
    assert other["metrics"]["rows"] == 200
    assert run("evaluate", "flights") == 0
    assert "rows        50" in run.out


def test_evaluate_without_validation_data_says_so(run: Captured) -> None:
    Path("runs/flights/config.toml").write_text(CONFIG.replace('validation = "valid.parquet"', ""))
    (sentence,) = run.json("evaluate", "flights", code=2)["error"]
    assert sentence.endswith("names no validation data: give some with --data")


def test_predict_writes_a_file(run: Captured) -> None:
    arguments = ["predict", "flights", "--data", "valid.parquet", "-o", "out.parquet", "--columns", "delay,late"]
    found = run.json(*arguments)
    assert found["rows"] == 50
    assert (found["output"], found["step"], found["unseen"], found["missing"]) == ("out.parquet", 10, 0, 0)
    names = ["delay", "late", "prediction", "probability_False", "probability_True"]
    assert pq.read_table("out.parquet").column_names == names
    assert run("predict", "flights", "--data", "valid.parquet", "-o", "out.csv", "--columns", "delay") == 0
    assert run.out.startswith("50 rows predicted into out.csv")


def test_plot_draws_runs_in_one_picture(here: Path, run: Captured) -> None:
    a_run(Storage.open("elsewhere/flights"))
    assert run("plot", "flights", "elsewhere/flights", "-o", "loss.svg") == 0
    assert run.out == "drawn: loss.svg\n"
    picture = Path("loss.svg").read_text()
    assert "runs/flights train" in picture
    assert "elsewhere/flights validation" in picture
    assert run.json("plot", "flights", "-o", str(here / "loss.png"))["runs"] == [str(here / "runs" / "flights")]
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_how_a_run_stands(run: Captured) -> None:
    found = run.json("inspect", "flights")
    assert found["status"]["state"] == "succeeded"
    assert found["checkpoints"] == [10, 20]
    assert found["metrics"]["train"]["step"] == found["metrics"]["validation"]["step"] == 20
    assert found["config"]["model"] == {"type": "logistic_regression"}
    assert run("inspect", "flights") == 0
    for part in ("state succeeded", "step 20", "checkpoints 10, 20", "[model]", "last validation line step 20"):
        assert part in " ".join(run.out.split())


@pytest.fixture
def running(here: Path) -> Path:
    """A run that goes on: at step 3 of 20, nothing saved yet."""
    storage = Storage.open("runs/new")
    with MetricsLog(storage) as log:
        log.train(step=3, epoch=1, rows=30, loss=0.5, learning_rate=0.1, rows_per_s=1e6)
    status.write(storage, Status("running", total_steps=20))
    return here


@pytest.mark.usefixtures("running")
def test_inspect_tells_the_step_of_a_run_that_goes_on(run: Captured) -> None:
    found = run.json("inspect", "new")
    assert (found["step"], found["status"]["step"]) == (3, 0)
    assert run("inspect", "new") == 0
    assert ["step", "3"] in [line.split() for line in run.out.splitlines()]


@pytest.mark.usefixtures("running")
def test_what_a_run_that_goes_on_has_not_yet(run: Captured) -> None:
    goes_on = "the run goes on, at step 3 of 20; its first checkpoint (run.checkpoint_every) is to come"
    for command in (["digest"], ["evaluate"], ["predict", "--data", "valid.parquet", "-o", "out.csv"]):
        (sentence,) = run.json(command[0], "new", *command[1:], code=2)["error"]
        assert sentence == f"{Path('runs/new').absolute()} has no checkpoint yet: {goes_on}"
    (sentence,) = run.json("audit", "new", code=2)["error"]
    assert sentence.endswith(f"has no ledger.jsonl yet, which comes with the first checkpoint: {goes_on}")


@pytest.mark.usefixtures("running")
def test_a_run_that_ended_without_a_checkpoint_has_none(run: Captured) -> None:
    status.write(Storage.open("runs/new"), Status("failed", total_steps=20))
    assert run.json("digest", "new", code=2)["error"][0].endswith("has no checkpoint")
    assert "nothing was trained there" in run.json("audit", "new", code=2)["error"][0]


def test_watch_ends_where_nothing_is_heard_any_more(run: Captured) -> None:
    """A driver that was killed writes no end: the exit code is that of a run that failed."""
    status.write(Storage.open("runs/dead"), Status("running", total_steps=20), now=lambda: 0.0)
    assert run("watch", "dead") == 1
    assert run.out.startswith("running · 0/20 steps · no news for ")
    assert run("status", "dead") == 0
    told = [line.split("  ")[0] for line in run.out.splitlines()]
    assert "silent" not in told
    assert "left" not in told
    assert re.match(r"no news for .*: the driver may be dead; its command continues it", told[-1])
    assert run("watch", "flights") == 0


def test_inspect_of_a_run_that_has_only_begun(run: Captured) -> None:
    Storage.open("runs/new").write_atomic("config.toml", b"no toml")
    found = run.json("inspect", "new")
    assert (found["status"], found["config"], found["checkpoints"]) == (None, None, [])
    assert run("inspect", "new") == 0
    assert "never started" in run.out


def test_digest_is_the_last_checkpoints(run: Captured) -> None:
    expected = checkpoint.load(Storage.open("runs/flights"), "last").digest()
    assert run("digest", "flights") == 0
    assert run.out == f"{expected}\n"
    assert run.json("digest", "flights")["step"] == 20


def test_a_damaged_checkpoint_is_passed_over_loudly(run: Captured) -> None:
    Path("runs/flights/checkpoints/step-00000020/params.safetensors").write_bytes(b"")
    assert run.json("digest", "flights")["step"] == 10
    assert "warning: a damaged checkpoint was passed over" in run.err


def test_the_module_runs_and_knows_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "raysgd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("raysgd, version ")
    help_text = subprocess.run(
        [sys.executable, "-m", "raysgd", "-h"], capture_output=True, text=True, check=True
    ).stdout
    for command in ("train", "evaluate", "predict", "plot", "inspect", "digest"):
        assert f"\n  {command} " in help_text
