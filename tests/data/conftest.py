"""Tables on disk for the tests of the data plane."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(table, name="t.parquet", rows=100)``: a Parquet file with such row groups; returns its path."""

    def write(table: pa.Table, name: str = "t.parquet", rows: int = 100) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=rows)
        return path

    return write
