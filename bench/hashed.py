"""S5: 26 skewed categories and 13 numbers hashed into 2^22 weights.

raysgd, warm      2 workers and servers, 2 virtual workers, AdaGrad; epochs after the shards are in memory
raysgd, Parquet   the first epoch of the same run
VW, text          Vowpal Wabbit, its defaults (adaptive, normalized, invariant), from its own text
VW, cache         the same from its binary cache, made beforehand
VW, cache, --sgd  the same cache, plain stochastic gradient descent

Vowpal Wabbit's speed is rows over the wall time of the command, less that of the same command on an empty file; ours is
rows over the time between commits. The loss is progressive: each row is scored before it is learned.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from bench import categories
from bench.measure import Asked, Figures, alternate, table
from bench.processes import ENVIRONMENT, answer
from bench.training import Job, speed

#: (seconds, progressive loss) of one pass over the table
Pass = tuple[float, float]
BITS = 22


def vw_command() -> list[str] | None:
    """Vowpal Wabbit's command, or that of its Python package; None where neither is installed."""
    if shutil.which("vw") is not None:
        return ["vw"]
    return [sys.executable, "-m", "vowpalwabbit"] if find_spec("vowpalwabbit") is not None else None


def vw(command: list[str], text: Path, *options: str) -> Pass:
    """One pass of Vowpal Wabbit."""
    whole = [*command, "-d", str(text), "--loss_function", "logistic", "-b", str(BITS), *options]
    began = time.perf_counter()
    done = subprocess.run(whole, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    found = re.search(r"average loss = (\S+)", done.stdout + done.stderr)
    loss = float(found[1]) if found and found[1] != "n.a." else float("nan")
    return seconds, loss


def passes(command: list[str], directory: Path, text: Path) -> dict[str, Callable[[], Pass]]:
    """Vowpal Wabbit's ways through the table; its cache is made here."""
    cache = ("--cache_file", str(directory / "categories.cache"))
    vw(command, text, *cache)
    return {
        "VW, text": partial(vw, command, text),
        "VW, cache": partial(vw, command, text, *cache),
        "VW, cache, --sgd": partial(vw, command, text, *cache, "--sgd", "--learning_rate", "0.1"),
    }


#: rows a step, and AdaGrad's rate: with 8,192 rows the first epoch learns too little to come near VW's loss
BATCH, RATE = 6144, 0.06


def raysgd_pass(table: Path) -> tuple[float, float, float]:
    """(rows a second warm, rows a second in the first epoch, the first epoch's progressive loss)."""
    model = {"type": "hashed_logistic_regression", "hash_bits": BITS}
    job = Job(model, str(table), "label", BATCH, 2, epochs=10, num_servers=2, learning_rate=RATE, adagrad=True)
    history = answer("bench.training", task=job)
    return speed(history, job.warm_epochs), history[0]["rows_per_s"], history[0]["loss"]


def run(asked: Asked) -> str:
    """The table of S5."""
    command = vw_command()
    if command is None:
        return "skipped: no command vw, and no Python package: pip install vowpalwabbit"
    n_rows = 50_000 if asked.quick else 1_000_000
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as name:
        directory = Path(name)
        parquet, text, floor = categories.write(directory, n_rows)
        nothing = directory / "empty.vw"
        nothing.touch()
        losses: dict[str, float] = {}

        def rows_per_s(contestant: str, one_pass: Callable[[], Pass]) -> float:
            idle, _ = vw(command, nothing)
            seconds, losses[contestant] = one_pass()
            return n_rows / (seconds - idle)

        cold: list[float] = []

        def warm() -> float:
            rows_warm, rows_cold, losses["raysgd, warm"] = raysgd_pass(parquet)
            cold.append(rows_cold)
            return rows_warm

        contestants = passes(command, directory, text)
        runs: dict[str, Callable[[], float]] = {
            name: partial(rows_per_s, name, one_pass) for name, one_pass in contestants.items()
        }
        found: dict[str, Figures] = alternate({"raysgd, warm": warm, **runs}, asked.rounds)
        losses["raysgd, Parquet"] = losses["raysgd, warm"]
        found["raysgd, Parquet"] = Figures(tuple(cold))
    rows = [
        [name, figures.times(1e-6), figures.ratio(found["VW, cache"]), f"{losses[name]:.4f}"]
        for name, figures in sorted(found.items())
    ]
    law = f"\n\n{n_rows:,} rows; the loss of whoever knew the law: {floor:.4f}"
    bars = "\n\nbars: loss within 0.003 of VW's default; >= 4 x VW from its cache, >= 2.5 x from cold Parquet"
    return table(["contestant", "M rows/s", "against VW, cache", "progressive loss"], rows) + law + bars
