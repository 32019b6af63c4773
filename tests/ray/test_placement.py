"""An existing cluster that is too small, or whose CPUs are taken: refused with what was asked and what there is."""

from __future__ import annotations

import time
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
    began = time.monotonic()
    assert cli.main(["train", str(place / "run.toml"), "-q", "--num-workers", "8", "--num-servers", "2"]) == 2
    assert time.monotonic() - began < 30
    error = capsys.readouterr().err
    assert "asks for 8.5 CPUs" in error
    assert "has 8 in all" in error
    assert status_of(place / "runs" / "run")["exit_code"] == 2


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
