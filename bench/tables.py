"""Synthetic tables, each a pure function of its sizes and a seed: arrays, and the same rows as Parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Float32 = npt.NDArray[np.float32]

#: columns of the narrow table, as many as those of the HIGGS data set
COLUMNS = 28
PIXELS, CLASSES = 784, 10


def numbers(n_rows: int, seed: int = 0) -> tuple[Float32, Float32]:
    """(n_rows, 28) standard normal numbers, and (n_rows,) 0 or 1 by a logistic law over them."""
    random = np.random.Generator(np.random.Philox(seed))
    weights = random.standard_normal(COLUMNS, np.float32) / np.float32(2)
    x = random.standard_normal((n_rows, COLUMNS), np.float32)
    chance = 1 / (1 + np.exp(-(x @ weights)))
    return x, (random.random(n_rows, np.float32) < chance).astype(np.float32)


def write_numbers(directory: Path, n_rows: int, shard_rows: int = 65_536, seed: int = 0) -> Path:
    """The table of :func:`numbers` as ``numbers.parquet`` (columns f00 ... f27, label): its path."""
    x, y = numbers(n_rows, seed)
    columns = {f"f{j:02d}": pa.array(np.ascontiguousarray(x[:, j])) for j in range(COLUMNS)}
    path = directory / "numbers.parquet"
    pq.write_table(pa.table({**columns, "label": pa.array(y.astype(np.int8))}), path, row_group_size=shard_rows)
    return path


def images(n_rows: int, seed: int = 0) -> tuple[Float32, npt.NDArray[np.int64]]:
    """(n_rows, 784) numbers in [0, 1), and (n_rows,) one of ten classes by a linear law over them."""
    random = np.random.Generator(np.random.Philox(seed))
    weights = random.standard_normal((PIXELS, CLASSES), np.float32)
    x = random.random((n_rows, PIXELS), np.float32)
    return x, np.argmax((x - np.float32(0.5)) @ weights, axis=1)


def write_images(directory: Path, n_rows: int, shard_rows: int = 2_048, seed: int = 0) -> Path:
    """The table of :func:`images` as ``images.parquet`` (columns image, digit): its path."""
    x, y = images(n_rows, seed)
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), PIXELS)
    path = directory / "images.parquet"
    pq.write_table(pa.table({"image": pixels, "digit": pa.array(y.astype(np.int8))}), path, row_group_size=shard_rows)
    return path
