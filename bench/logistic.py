"""S2: logistic regression on 28 numbers, batches of 2048, decoded shards warm, rows truly shuffled, 2 workers.

raysgd V = 8, V = 2   the real Trainer on a local Ray: whole epochs, once nearly all shards are in the workers' caches
bare numpy            one core, rows gathered at random from 2 M: as x[index], and, faster, by take into a buffer
DDP                   PyTorch over gloo, 2 processes, data in memory
scikit-learn          SGDClassifier.partial_fit, one core
Ray Train             with Ray Data's shuffled batches, 2 workers: measured once, because it takes long
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import ddp, ray_train
from bench.measure import Asked, alternate, comparison, skipped
from bench.processes import answer
from bench.tables import write_numbers
from bench.training import Job

BATCH = 2048
GATHERED_ROWS = 2_000_000


def run(asked: Asked) -> str:
    """The table of S2."""
    n_rows, epochs, share = (2**18, 3, 0.1) if asked.quick else (2**20, 8, 1.0)
    gathered = int(GATHERED_ROWS * share)
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        path = write_numbers(Path(directory), n_rows)
        contestants: dict[str, Callable[[], float]] = {
            f"raysgd V = {v}": Job(
                {"type": "logistic_regression"}, str(path), "label", BATCH, virtual_workers=v, epochs=epochs
            ).rows_per_s
            for v in (8, 2)
        }
        steps = int(8000 * share)
        for name, loop in (("x[index]", "logistic_indexing"), ("take into a buffer", "logistic")):
            loop_of = partial(answer, "bench.bare", loop, gathered, BATCH, steps)
            contestants[f"bare numpy, one core, {name}"] = loop_of
        contestants["DDP, 2 processes"] = partial(ddp.rows_per_s, "logistic", gathered, BATCH, int(1500 * share))
        contestants["scikit-learn, one core"] = partial(answer, "bench.bare", "scikit_learn", n_rows, 0, 0)
        found = alternate(contestants, asked.rounds)
        others, reasons = ray_train.measured(path, "label", BATCH)
    ours = [name for name in found if name.startswith("raysgd")]
    bars = "\n\nbars: >= 1.7 x bare numpy, >= 10 x DDP"
    return comparison(found, ours, "M rows/s", 1e-6) + others + skipped(reasons) + bars
