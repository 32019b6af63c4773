"""Standard output is for results: what Ray has to say of deaths goes to standard error."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ray_runs import ROOT, raysgd_command, write_table


def test_deaths_are_told_on_standard_error(tmp_path: Path) -> None:
    """Every worker dies at step 3, until the run gives up."""
    place = write_table(tmp_path / "runs")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(ROOT), "RAYSGD_FAILPOINTS": "worker.compute@3:kill"}
    command = raysgd_command("train", str(place / "run.toml"), "--set", "run.failure_config.max_failures=2")
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert "is lost at step" in done.stdout, done.stdout
    assert "raylet" not in done.stdout
    assert "A worker died or was killed" in done.stderr, "Ray has told nothing: is this still worth a test?"
    assert "losses without progress: 3, 2 are borne (run.failure_config.max_failures)" in done.stderr
