"""Real flights on real Ray, two workers and a server: as good as scikit-learn, and everything works on the run."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score

import raysgd
from raysgd import checkpoint, cli, config
from raysgd.report import metrics_log
from raysgd.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).resolve().parent.parent.parent
FLIGHTS_TOML = ROOT / "jobs" / "flights.toml"
EPOCH = 576


def command(*arguments: str) -> str:
    """What ``raysgd ARGUMENTS`` prints on standard output; it must succeed."""
    with redirect_stdout(io.StringIO()) as out:
        assert cli.main(arguments) == 0
    return out.getvalue()


def facts(*arguments: str) -> dict[str, Any]:
    """The one JSON object that it prints with ``--json``."""
    (line,) = command(*arguments, "--json").splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


@dataclass(frozen=True)
class Trained:
    """The run's directory, and what ``raysgd train --json`` printed."""

    path: Path
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def run(ray_cluster: None, flights: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:  # noqa: ARG001
    """The one training run of these tests: flights.toml as it is, on other paths."""
    storage = tmp_path_factory.mktemp("runs")
    sets = [f"data.path={flights}/train", f"data.validation={flights}/valid"]
    options = [word for entry in sets for word in ("--set", entry)]
    return Trained(
        storage / "flights", facts("train", str(FLIGHTS_TOML), *options, "--storage-path", str(storage), "--quiet")
    )


@pytest.fixture(scope="module")
def held_out(flights: Path) -> pa.Table:
    return pa.concat_tables([pq.ParquetFile(file).read() for file in sorted((flights / "valid").glob("*.parquet"))])


def test_the_settings_are_the_ones_that_count() -> None:
    spec = config.load(FLIGHTS_TOML)
    assert isinstance(spec.optimizer, raysgd.SGD)
    assert isinstance(spec.optimizer.learning_rate, raysgd.ExponentialDecay)
    assert (spec.optimizer.learning_rate.initial, spec.optimizer.momentum) == (0.1, 0.9)
    assert (spec.train.batch_size, spec.train.epochs) == (512, 5)
    assert (spec.scaling.num_workers, spec.scaling.num_servers) == (2, 1)


def test_as_good_as_scikit_learn(run: Trained, flights_reference: Any) -> None:
    for metrics in (
        {name.removeprefix("valid_"): value for name, value in run.facts["metrics"].items()},
        facts("evaluate", str(run.path))["metrics"],
    ):
        assert metrics["loss"] <= flights_reference.log_loss + 0.001
        assert metrics["auc"] >= flights_reference.auc - 0.0015


def test_the_directory_is_complete(run: Trained) -> None:
    assert run.facts["path"] == str(run.path)
    assert (run.facts["step"], run.facts["stopped"]) == (5 * EPOCH, False)
    assert (run.path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["attempt"]) == ("succeeded", 0, 1)
    assert status["step"] == status["total_steps"] == 5 * EPOCH
    assert status["digest"] == run.facts["digest"]
    stored = config.load(run.path / "config.toml")
    assert stored.train == config.load(FLIGHTS_TOML).train
    storage = Storage.open(run.path)
    assert checkpoint.steps(storage) == [epoch * EPOCH for epoch in range(1, 6)]
    for step in checkpoint.steps(storage):
        assert checkpoint.load(storage, step).manifest["metrics"]["valid_loss"] < 0.3
        names = {path.name for path in (run.path / "checkpoints" / f"step-{step:08}").iterdir()}
        assert names == {"manifest.json", "params.safetensors", "state.safetensors"}
    described = (FLIGHTS_TOML.parent.parent / "docs" / "run-directory.md").read_text()
    assert [key for key in checkpoint.load(storage).manifest if f"`{key}`" not in described] == []


def test_the_curve_is_complete(run: Trained) -> None:
    lines = metrics_log.read(Storage.open(run.path))
    train = [line for line in lines if line["kind"] == "train"]
    steps = [line["step"] for line in train]
    assert steps == sorted(set(steps))
    assert steps[-1] == 5 * EPOCH
    assert len(steps) >= 50
    assert train[-1]["rows"] == 5 * 294_527
    assert all(0 < line["rows_per_s"] < 2e7 for line in train), "no two cores are that fast"
    scored = {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}
    assert set(scored) >= {0, *(epoch * EPOCH for epoch in range(1, 6))}
    assert scored[0] == pytest.approx(np.log(2), abs=0.01)


def test_predicted_probabilities_have_the_reported_loss(run: Trained, flights: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.parquet"
    counts = facts("predict", str(run.path), "--data", str(flights / "valid"), "-o", str(out), "--columns", "late")
    table = pq.ParquetFile(out).read()
    assert counts["rows"] == len(table) == 32_819
    assert table.column_names == ["late", "prediction", "probability_0", "probability_1"]
    late, probability = table["late"].to_numpy(), table["probability_1"].to_numpy()
    reported = facts("evaluate", str(run.path))
    assert reported["checkpoint"] == counts["checkpoint"]
    assert log_loss(late, probability) == pytest.approx(reported["metrics"]["loss"], abs=1e-6)
    assert roc_auc_score(late, probability) == pytest.approx(reported["metrics"]["auc"], abs=5e-5)
    assert np.mean(late == table["prediction"].to_numpy()) == pytest.approx(reported["metrics"]["accuracy"], abs=1e-9)


def test_the_training_data_can_be_evaluated_too(run: Trained, flights: Path) -> None:
    metrics = facts("evaluate", str(run.path), "--data", str(flights / "train"))["metrics"]
    assert metrics["rows"] == 294_527
    assert metrics["unseen"] == 0
    assert metrics["loss"] == pytest.approx(0.282, abs=0.003)


#: A command's words ({run}, {data} and {out} are filled in), and what people must be able to read in its output.
COMMANDS: dict[str, tuple[str, str]] = {
    "evaluate": ("evaluate {run} --quiet", r"loss +0\.28\d+\n(.*\n)*rows +32,819"),
    "predict": ("predict {run} --data {data} -o {out}.parquet", r"32,819 rows predicted into .*\.parquet"),
    "plot": ("plot {run} {run}/../flights -o {out}.svg", r"drawn: .*\.svg"),
    "inspect": ("inspect {run}", r"state +succeeded\n(.*\n)*checkpoints +576, 1,152(.*\n)*\[optimizer\]"),
    "digest": ("digest {run}", r"^[0-9a-f]{64}$"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_for_people_and_for_programs(name: str, run: Trained, flights: Path, tmp_path: Path) -> None:
    words, pattern = COMMANDS[name]
    arguments = words.format(run=run.path, data=flights / "valid", out=tmp_path / "out").split()
    assert re.search(pattern, command(*arguments).rstrip())
    assert facts(*arguments)


def test_digest_and_inspect_agree_with_the_run(run: Trained) -> None:
    assert facts("digest", str(run.path))["digest"] == run.facts["digest"]
    inspected = facts("inspect", str(run.path))
    assert inspected["status"]["digest"] == run.facts["digest"]
    assert inspected["metrics"]["validation"]["loss"] == run.facts["metrics"]["valid_loss"]
    assert inspected["config"]["train"]["batch_size"] == 512


def test_a_loaded_model_predicts(run: Trained, held_out: pa.Table) -> None:
    features = held_out.drop_columns(["late"])
    best, last = raysgd.load(run.path), raysgd.load(run.path, which="last")
    losses = {line["step"]: line["loss"] for line in metrics_log.read(Storage.open(run.path)) if "auc" in line}
    assert best.step == min((epoch * EPOCH for epoch in range(1, 6)), key=lambda step: losses[step])
    assert last.step == 5 * EPOCH
    for model in (best, last):
        probabilities = model.predict_proba(features)
        assert probabilities.shape == (32_819, 2)
        assert model.classes == (0, 1)
        assert log_loss(held_out["late"].to_numpy(), probabilities[:, 1]) == pytest.approx(losses[model.step], abs=1e-6)
        assert np.array_equal(model.predict(features), (probabilities[:, 1] > 0.5).astype(np.int8))


def example() -> str:
    """The Python example of README.md, which is the one that the package was asked for."""
    (found,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_example_of_the_readme(
    run: Trained,
    flights: Path,
    held_out: pa.Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Word for word, where its relative paths lead somewhere; it has the settings of flights.toml, so its bytes."""
    shutil.copytree(flights, tmp_path / "data" / "flights")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example(), "README.md", "exec"), names)
    result, model = names["result"], names["model"]
    assert result.digest == run.facts["digest"]
    assert result.metrics["valid_loss"] == run.facts["metrics"]["valid_loss"]
    assert Path(result.checkpoint).is_dir()
    predict: Callable[[pa.Table], np.ndarray] = result.model.predict
    assert np.array_equal(predict(held_out), model.predict(held_out))
    assert result.model.predict_proba(held_out).shape == (32_819, 2)


@pytest.mark.parametrize(
    "setting", [*(f"train.staleness={k}" for k in (2, "inf")), *(f"train.local_steps={h}" for h in (4, 16))]
)
def test_other_consistencies_learn_as_well(run: Trained, flights: Path, tmp_path: Path, setting: str) -> None:
    """Momentum 0.9 and four workers: the loss of BSP, where pushes count one by one or cover several steps."""
    sets = (f"data.path={flights}/train", f"data.validation={flights}/valid", "run.validate_every=5epoch", setting)
    words = [word for one in sets for word in ("--set", one)]
    storage = ("--storage-path", str(tmp_path), "--num-workers", "4")
    trained = facts("train", str(ROOT / "jobs" / "flights.toml"), "--name", "run", "-q", *storage, *words)
    assert trained["step"] == 5 * EPOCH
    assert trained["metrics"]["valid_loss"] == pytest.approx(run.facts["metrics"]["valid_loss"], abs=0.003)
