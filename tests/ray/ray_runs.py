"""A small table, runs over it, and runs as processes of their own that can be told apart from all others."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysgd.config import load
from raysgd.data.loader import Loader
from raysgd.data.moments import shard_statistics
from raysgd.learn.parameters import Range
from raysgd.plan import hash_bits, open_tables, plan_from_statistics
from raysgd.simulate import Problem, simulate
from raysgd.simulate_sparse import simulate_sparse
from raysgd.spec import RunSpec

ROOT = Path(__file__).resolve().parent.parent.parent

#: 20 steps an epoch: 613 rows, batches of 32 over 8 virtual workers
STEPS_PER_EPOCH = 20

CONFIG = """
[data]
path = "train"
validation = "valid.parquet"
label = "late"
[model]
type = "logistic_regression"
l2 = 0.001
[optimizer]
type = "sgd"
momentum = 0.9
[optimizer.learning_rate]
type = "exponential_decay"
initial = 0.2
decay_rate = 0.7
every = "1epoch"
[train]
batch_size = 32
epochs = 2
[scaling]
server_cpus = 0.25
[run]
name = "run"
storage_path = "runs"
log_every = 7
"""


def write_table(directory: Path) -> Path:
    """613 + 100 rows, row groups of unequal sizes, five numbers and a category; returns the directory."""
    random = np.random.default_rng(0)
    n_rows = 713
    columns: dict[str, Any] = {f"x{i}": random.standard_normal(n_rows) for i in range(5)}
    columns["kind"] = random.choice(list("abcd"), n_rows)
    columns["late"] = columns["x0"] + random.standard_normal(n_rows) > 0
    table = pa.table(columns)
    (directory / "train").mkdir(parents=True)
    pq.write_table(table.slice(0, 400), directory / "train" / "a.parquet", row_group_size=170)
    pq.write_table(table.slice(400, 213), directory / "train" / "b.parquet", row_group_size=60)
    pq.write_table(table.slice(613), directory / "valid.parquet", row_group_size=30)
    (directory / "run.toml").write_text(CONFIG)
    return directory


def spec_of(directory: Path, **settings: Any) -> RunSpec:
    """The run of ``directory`` with settings as ``section__key=value``."""
    overrides = {name.replace("__", "."): value for name, value in settings.items()}
    return load(directory / "run.toml", overrides=overrides)


def one_process_digests(spec: RunSpec, steps: Sequence[int]) -> dict[int, str]:
    """What the same state machines come to in one process, without Ray, at each of the (ascending) steps."""
    tables = open_tables(spec)
    vocabularies = not hash_bits(spec)
    statistics = [shard_statistics(tables.train, s.index, vocabularies=vocabularies) for s in tables.train.shards]
    plan, _ = plan_from_statistics(spec, tables, statistics)
    n_virtual = spec.train.virtual_workers
    generation, found = plan.initial(), {}
    with Loader(tables.train, plan.encoder, plan.sampler, Range(0, n_virtual), end_step=steps[-1]) as loader:
        problem = Problem(plan.learner, plan.rule, loader.batch, n_virtual, spec.train.seed)
        for step in steps:
            start = replace(generation, step=plan.rounds.at(generation.step))
            run = simulate_sparse if plan.sparse else simulate
            generation = replace(run(problem, plan.rounds.at(step), start=start).final, step=step)
            found[step] = generation.digest()
    return found


def curve(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock tells; not one that is being written."""
    text = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "rows_per_s")} for line in lines]


def step_of(run: Path) -> int:
    """Steps in the run's loss curve; 0 where there is none yet."""
    lines = curve(run) if (run / "metrics.jsonl").exists() else []
    return int(lines[-1]["step"]) if lines else 0


def status_of(run: Path) -> dict[str, Any]:
    """What status.json says; {} where there is none yet."""
    try:
        found: dict[str, Any] = json.loads((run / "status.json").read_text())
    except FileNotFoundError:
        return {}
    return found


def wait_for(what: str, found: Callable[[], Any], timeout: float = 60.0) -> Any:
    """The first true value of ``found``; fails by name where none comes in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {timeout:g} s")


@dataclass
class Marked:
    """A process in a session of its own, whose environment carries a mark that all its children inherit."""

    command: list[str]
    cwd: Path
    environment: dict[str, str] = field(default_factory=dict)
    #: names taken out of the inherited environment
    without: tuple[str, ...] = ()
    mark: str = field(default_factory=lambda: f"RAYSGD_TEST_RUN={uuid.uuid4().hex}")

    def __post_init__(self) -> None:
        inherited = {k: v for k, v in os.environ.items() if k not in (*self.without, "RAY_ADDRESS")}
        name, _, value = self.mark.partition("=")
        env = {**inherited, "PYTHONPATH": str(ROOT), name: value, **self.environment}
        self.output = self.cwd / f"output-{value[:8]}.txt"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                self.command, cwd=self.cwd, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.output.read_text(errors="replace")

    def wait(self, timeout: float = 90.0) -> int:
        """Its exit code; minus the signal where one killed it."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:g} s:\n{self.text}") from None

    def living(self) -> dict[int, str]:
        """The command lines of all living processes that carry the mark or are of the session, by pid.

        Processes that give themselves a title can write over their environment; others begin sessions of their own.
        """
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                environment = (directory / "environ").read_bytes().split(b"\0")
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                session = int((directory / "stat").read_text().rpartition(")")[2].split()[3])
            except OSError:
                continue
            if command and (self.mark.encode() in environment or session == self.process.pid):
                found[int(directory.name)] = command.strip()[:200]
        return found

    def gone(self, timeout: float = 10.0) -> None:
        """Fails where a process with the mark is alive ``timeout`` seconds from now."""
        deadline = time.monotonic() + timeout
        while (left := self.living()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"left over after {timeout:g} s: {left}\n{self.text}"

    def end(self) -> None:
        """Kill what is left of it, whatever the test did."""
        for pid in self.living():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(30)


def raysgd_command(*arguments: str) -> list[str]:
    """The command line of ``raysgd`` as a process of its own."""
    return [sys.executable, "-m", "raysgd", *arguments]


@contextmanager
def ray_nodes(place: Path, *cpus: int, environment: dict[str, str] | None = None) -> Iterator[Marked]:
    """Ray nodes on this machine, the head's logical CPUs first, as processes of their own that go at the end.

    :func:`address_of` and :func:`raylets_of` read what they print.
    """
    temp_dir = tempfile.mkdtemp(prefix="rs", dir="/tmp")
    script = str(ROOT / "tests" / "ray" / "two_raylets.py")
    nodes = Marked([sys.executable, script, temp_dir, *map(str, cpus)], place, environment or {})
    try:
        wait_for("the nodes", lambda: address_of(nodes), 120)
        yield nodes
        nodes.process.terminate()
        assert nodes.wait(60) == 0, nodes.text
        nodes.gone()
    finally:
        nodes.end()
        shutil.rmtree(temp_dir, ignore_errors=True)


def address_of(nodes: Marked) -> str:
    """Where the cluster is joined; "" while it is not all there."""
    found = re.search(r"^address=(\S+)$", nodes.text, re.MULTILINE)
    return found[1] if found else ""


def raylets_of(nodes: Marked) -> dict[str, int]:
    """The raylet's pid of each node that was ever there, by its id, the head's first."""
    return {node: int(pid) for node, pid in re.findall(r"^node=(\S+) raylet=(\d+)$", nodes.text, re.MULTILINE)}
