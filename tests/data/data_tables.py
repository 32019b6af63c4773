"""Small tables for the tests of the data plane."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def make_table(n: int, seed: int = 0) -> pa.Table:
    """n rows: two numbers, a string and an integer category, a label of two classes, the row's own id."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "x": rng.normal(3.0, 2.0, n),
            "k": rng.integers(-5, 6, n).astype(np.int32),
            "color": pa.array(rng.choice(["red", "green", "blue"], n).tolist()),
            "late": rng.integers(0, 2, n).astype(np.int8),
            "id": np.arange(n, dtype=np.int32),
        }
    )
