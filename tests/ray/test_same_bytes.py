"""On real Ray: the trained bytes do not depend on workers, servers, or on where a run was stopped and continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray_runs import STEPS_PER_EPOCH, curve, one_process_digests, spec_of, status_of, write_table

from raysgd import cli
from raysgd.learn.models import MLP
from raysgd.learn.transforms import SGD, AdaGrad
from raysgd.report.progress import Silent
from raysgd.runtime.trainer import Result, Trainer

pytestmark = pytest.mark.usefixtures("ray_cluster")

END = 2 * STEPS_PER_EPOCH

#: what changes the bytes, by the name of the variant
VARIANTS: dict[str, dict[str, Any]] = {
    "adagrad": {"optimizer": AdaGrad(learning_rate=0.1)},
    "mlp": {"model": MLP(hidden=(8,), l2=0.001), "optimizer": SGD(learning_rate=0.1, momentum=0.9, nesterov=True)},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the table and of the runs of this module."""
    return write_table(tmp_path_factory.mktemp("same") / "bytes")


@pytest.fixture(scope="module")
def truth(place: Path) -> dict[int, str]:
    """The digest at every step, from one process without Ray."""
    return one_process_digests(spec_of(place), range(1, END + 1))


def fit(place: Path, name: str, parts: dict[str, Any] | None = None, **settings: Any) -> Result:
    """Train the run of this name; ``parts`` replaces whole sections of the spec."""
    spec = replace(spec_of(place, run__name=name, **settings), **(parts or {}))
    return Trainer.from_spec(spec, report=Silent()).fit()


@pytest.fixture(scope="module")
def whole(place: Path) -> Result:
    """The undisturbed run: one worker, one server."""
    return fit(place, "whole")


def test_one_worker_is_one_process(whole: Result, truth: dict[int, str]) -> None:
    assert (whole.step, whole.stopped) == (END, False)
    assert whole.digest == truth[END]


@pytest.mark.parametrize(("workers", "servers"), [(2, 3), (3, 1), (4, 2), (5, 1), (7, 3)])
def test_workers_and_servers_change_no_byte(
    place: Path, truth: dict[int, str], capsys: pytest.CaptureFixture[str], workers: int, servers: int
) -> None:
    name = f"w{workers}s{servers}"
    result = fit(place, name, scaling__num_workers=workers, scaling__num_servers=servers)
    assert result.digest == truth[END]
    assert cli.main(["digest", str(place / "runs" / name), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == truth[END]
    assert curve(place / "runs" / name) == curve(place / "runs" / "whole")


#: (stop here, with so many workers and servers), the last to the end
HISTORIES = {
    "first-step": [(1, 1, 2), (None, 3, 1)],
    "mid-epoch": [(13, 3, 1), (14, 2, 1), (None, 1, 3)],
    "epochs-end": [(STEPS_PER_EPOCH, 2, 2), (33, 1, 1), (None, 5, 1)],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_stopped_and_continued_with_others(
    place: Path,
    whole: Result,
    truth: dict[int, str],
    request: pytest.FixtureRequest,
    history: list[tuple[int | None, int, int]],
) -> None:
    name = request.node.callspec.id
    for stop, workers, servers in history:
        scaling = {"scaling__num_workers": workers, "scaling__num_servers": servers}
        result = fit(place, name, **scaling, **({} if stop is None else {"run__stop_after_steps": stop}))
        reached = stop or END
        assert (result.step, result.stopped, result.digest) == (reached, reached < END, truth[reached])
        status = status_of(place / "runs" / name)
        assert (status["state"], status["exit_code"]) == ("stopped" if reached < END else "succeeded", 0)
        assert (status["step"], status["digest"]) == (reached, truth[reached])
    assert status["attempt"] == len(history)
    assert result.metrics == whole.metrics
    assert curve(place / "runs" / name) == curve(place / "runs" / "whole")


def test_a_complete_run_is_left_as_it_is(place: Path, whole: Result) -> None:
    run = place / "runs" / "whole"
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    again = fit(place, "whole", scaling__num_workers=2)
    assert (again.digest, again.metrics) == (whole.digest, whole.metrics)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_rules_and_models(place: Path, variant: str) -> None:
    parts, stop = VARIANTS[variant], STEPS_PER_EPOCH + 3
    expected = one_process_digests(replace(spec_of(place), **parts), [stop, END])
    scaling = {"scaling__num_workers": 3, "scaling__num_servers": 2}
    assert fit(place, variant, parts, **scaling, run__stop_after_steps=stop).digest == expected[stop]
    assert fit(place, variant, parts, scaling__num_workers=2).digest == expected[END]
