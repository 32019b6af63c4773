"""S6: the wall time from the command ``raysgd train`` to the first committed step, statistics pass excluded.

The run stops after one step, so that the driver reads its commit at once; the line of metrics.jsonl tells when. The
statistics pass lies between two lines of the command's output. ``ray.init`` alone is a process that starts the same
cluster and nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from functools import partial
from pathlib import Path

from bench.measure import Asked, Figures, alternate, table
from bench.processes import ENVIRONMENT
from bench.tables import write_numbers

CONFIG = """
[data]
path = "numbers.parquet"
label = "label"
[model]
type = "logistic_regression"
[scaling]
num_workers = 2
[run]
name = "run"
storage_path = "runs"
stop_after_steps = 1
log_every = 1
"""

#: as raysgd starts its own cluster for 2 workers and a server
RAY = (
    "import ray; ray.init('local', num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level='error');"
    " print('ready', flush=True); ray.shutdown()"
)

#: parts of the way, by the line of output that ends each
STAGES = (
    ("imports, config, footers", "row group"),
    ("ray.init", "started a local Ray cluster"),
    ("placing the actors", "reading the statistics"),
    ("statistics pass", "steps:"),
)


def lines(command: list[str], directory: Path) -> list[tuple[float, str]]:
    """The lines of a command's output, each with the seconds since its start."""
    began = time.time()
    found = []
    with subprocess.Popen(
        command, cwd=directory, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found.append((time.time() - began, line.rstrip()))
    if process.returncode != 0:
        raise RuntimeError(f"{command} ended with {process.returncode}: {found[-5:]}")
    return found


def ray_alone(directory: Path) -> float:
    """Seconds until ``ray.init`` returns in a fresh process."""
    return next(at for at, line in lines([sys.executable, "-c", RAY], directory) if line == "ready")


def stages(said: list[tuple[float, str]], first_step: float) -> dict[str, float]:
    """The seconds of each part of the way, ``STAGES`` and "first step"; they add up to ``first_step``.

    >>> said = [(1.0, "9 rows in 1 row group of 1 file"), (4.0, "started a local Ray cluster")]
    >>> stages([*said, (5.0, "reading the statistics"), (5.5, "steps: 1")], 6.0)["first step"]
    0.5
    """
    ends = [next(at for at, line in said if mark in line) for _, mark in STAGES]
    begins = [0.0, *ends]
    parts = {name: end - begin for (name, _), begin, end in zip(STAGES, begins, ends, strict=False)}
    return {**parts, "first step": first_step - ends[-1]}


def command(directory: Path, seen: list[dict[str, float]]) -> float:
    """Seconds to the first committed step without the statistics pass; its stages are added to ``seen``."""
    began = time.time()
    said = lines([sys.executable, "-m", "raysgd", "train", "run.toml", "--fresh"], directory)
    with (directory / "runs" / "run" / "metrics.jsonl").open() as metrics:
        first = json.loads(next(metrics))
    found = stages(said, datetime.fromisoformat(first["time"]).timestamp() - began)
    seen.append(found)
    return sum(found.values()) - found["statistics pass"]


def run(asked: Asked) -> str:
    """The table of S6."""
    seen: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as name:
        directory = Path(name)
        write_numbers(directory, 65_536, shard_rows=8_192)
        (directory / "run.toml").write_text(CONFIG)
        found = alternate(
            {"command": partial(command, directory, seen), "ray": partial(ray_alone, directory)}, asked.rounds
        )
    rows: list[tuple[object, object]] = [
        ("command to first step, without the statistics pass", found["command"]),
        ("`ray.init` alone, from the start of its process", found["ray"]),
        ("difference (bar: <= 2)", found["command"].minus(found["ray"])),
    ]
    rows += [(f"... {stage}", Figures(tuple(s[stage] for s in seen))) for stage in seen[0]]
    return table(["what", "s"], rows)
