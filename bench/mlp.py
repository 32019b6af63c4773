"""S4: the MLP 784-512-512-10, batches of 1024, decoded shards warm, 2 workers.

raysgd V = 2, V = 8   the real Trainer on a local Ray: whole epochs, once nearly all shards are in the workers' caches
bare numpy            the same mathematics in a plain loop on one core, data in memory
DDP                   PyTorch over gloo, 2 processes, data in memory
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import ddp
from bench.measure import Asked, alternate, comparison
from bench.processes import answer
from bench.tables import write_images
from bench.training import Job

BATCH = 1024
MODEL = {"type": "mlp", "hidden": [512, 512], "loss": "cross_entropy"}


def run(asked: Asked) -> str:
    """The table of S4."""
    n_rows, warm, epochs, steps = (8_192, 2, 2, 10) if asked.quick else (24_576, 5, 12, 120)
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        path = write_images(Path(directory), n_rows)
        contestants: dict[str, Callable[[], float]] = {
            f"raysgd V = {v}": Job(
                MODEL, str(path), "digit", BATCH, virtual_workers=v, epochs=epochs, warm_epochs=warm
            ).rows_per_s
            for v in (2, 8)
        }
        contestants["bare numpy, one core"] = partial(answer, "bench.bare", "mlp", n_rows, BATCH, steps)
        contestants["DDP, 2 processes"] = partial(ddp.rows_per_s, "mlp", n_rows, BATCH, steps)
        found = alternate(contestants, asked.rounds)
    bars = "\n\nbars: >= 1.7 x bare numpy with V = 2, >= 1.45 x with V = 8; >= 1.5 x DDP"
    return comparison(found, ["raysgd V = 2", "raysgd V = 8"], "k rows/s", 1e-3) + bars
