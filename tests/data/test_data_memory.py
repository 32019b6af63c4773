"""Peak memory of the statistics pass and of an epoch stays flat when the table is ten times longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COLUMNS = 24
ROWS = 100_000
PROGRAM = """
import sys
from raysgd.data.dataset import ArrowDataset, open_dataset
from raysgd.data.encode import Encoder
from raysgd.data.loader import Loader, read_batch
from raysgd.data.moments import merge, shard_statistics
from raysgd.data.sampler import Sampler
from raysgd.learn.parameters import Range

dataset = open_dataset(ArrowDataset(sys.argv[1], label="late"))
total = merge([shard_statistics(dataset, i) for i in range(len(dataset.shards))])
encoder = Encoder.fit(total, dataset.schema, "class")
for i in range(len(dataset.shards)):
    read_batch(dataset, encoder, i)
sampler = Sampler(dataset.shard_rows, 1024, 4, 0, 10_000)
rows = 0
with Loader(dataset, encoder, sampler, Range(0, 4), end_step=sampler.steps_per_epoch) as loader:
    for step in range(sampler.steps_per_epoch):
        for v in range(4):
            batch = loader.batch(step, v)
            rows += 0 if batch is None else len(batch)
assert rows == dataset.n_rows
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1])
"""


def peak_megabytes(path: Path) -> float:
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", PROGRAM, str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout) / 1024


def write_table(path: Path, groups: int) -> Path:
    """Row groups of 10,000 rows; few distinct values, so that the file stays small."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=500).astype(np.float32)
    table = pa.table(
        {f"x{i}": values[rng.integers(0, 500, 10_000)] for i in range(COLUMNS)}
        | {"late": rng.integers(0, 2, 10_000).astype(np.int8)}
    )
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(groups):
            writer.write_table(table)
    return path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_peak_memory_is_flat_on_a_table_ten_times_longer(tmp_path: Path) -> None:
    small = peak_megabytes(write_table(tmp_path / "small.parquet", ROWS // 10_000))
    large = peak_megabytes(write_table(tmp_path / "large.parquet", ROWS // 1_000))
    decoded = 9 * ROWS * COLUMNS * 4 / 2**20  # what the longer table takes more, were it all in memory: 82 MB
    assert large - small < 0.25 * decoded, (small, large)
