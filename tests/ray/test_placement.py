"""An existing cluster that is too small, or whose CPUs are taken: refused with what was asked and what there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray_runs import spec_of, status_of, write_table

from raysgd import cli
from raysgd.spec import ScalingConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return write_table(tmp_path / "table")


def test_more_than_the_cluster_has(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec_of(place, scaling__num_workers=8, scaling__num_servers=2)
    assert spec.scaling.cpus == 8.5
    counts = ["--num-workers", "8", "--num-servers", "2", "--set", "scaling.placement_timeout_s=1"]
    assert cli.main(["train", str(place / "run.toml"), "-q", *counts]) == 2
    error = capsys.readouterr().err
    assert "asks for 8.5 CPUs" in error
    assert "the Ray cluster has 8 CPU in all, 1 s later, too" in error
    assert "no autoscaler is known that could add nodes" in error
    assert status_of(place / "runs" / "run")["exit_code"] == 2


def test_a_resource_that_no_node_has(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", "scaling.server_resources={ raysgd_stays = 0.001 }", "--set", "scaling.placement_timeout_s=1"]
    assert cli.main(["train", str(place / "run.toml"), "-q", *sets]) == 2
    error = capsys.readouterr().err
    assert "a server asks for 0.25 CPU, 0.001 raysgd_stays: no node has as much (at most 8 CPU)" in error


def test_more_than_is_free(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before any actor of the run is started, also where the workers alone would fit."""
    import ray

    class Occupant:
        """Takes CPUs and does nothing. Local, so that it is sent by value: workers cannot import this file."""

        def ready(self) -> bool:
            return True

    occupant = ray.remote(num_cpus=6)(Occupant).remote()
    assert ray.get(occupant.ready.remote(), timeout=60)
    words = ["train", str(place / "run.toml"), "-q", "--set", "scaling.server_cpus=0.5"]
    soon = ["--set", "scaling.placement_timeout_s=1"]
    try:
        assert cli.main([*words, *soon, "--num-workers", "2"]) == 2
        error = capsys.readouterr().err
        assert "asks for 2.5 CPUs" in error
        assert "2 of 8 CPUs" in error
        assert status_of(place / "runs" / "run")["state"] == "failed"
    finally:
        ray.kill(occupant)
    # With the default the wait ends within 30 s; here it is over as soon as the occupant's CPUs are free.
    assert ScalingConfig().placement_timeout_s <= 30
    assert cli.main([*words, "--num-workers", "2", "--set", "run.stop_after_steps=1"]) == 0
