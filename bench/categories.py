"""A synthetic table like those of clicks: 26 skewed categories and 13 numbers, labels by a logistic law over both.

Columns have from 4 to 1,000,000 values, evenly spaced in the logarithm; value k of a column is drawn with a chance in
proportion to about 1 / (k + 1), Zipf's law, and written as eight hexadecimal digits. All of it is a pure function of
(rows, seed).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

N_CATEGORIES, N_NUMBERS = 26, 13
CARDINALITIES = tuple(round(4 * 250_000 ** (j / (N_CATEGORIES - 1))) for j in range(N_CATEGORIES))
BIAS, EFFECT, SLOPE = -1.0, 0.35, 0.2
#: rows that are made, and written, at a time
BLOCK = 65_536

UInt64 = npt.NDArray[np.uint64]
HEX = np.array([f"{i:02x}".encode() for i in range(256)], "S2")


@dataclass(frozen=True)
class Rows:
    """numbers: (n, 13) float32;  ids: (26, n) uint64, values of each column;  label: (n,) 0 or 1;  chance: (n,) of 1"""

    numbers: npt.NDArray[np.float32]
    ids: UInt64
    label: npt.NDArray[np.int8]
    chance: npt.NDArray[np.float64]

    def values(self, column: int) -> pa.Array:
        """A category's values as strings of eight hexadecimal digits."""
        low = (mixed(self.ids[column], column) >> np.uint64(32)).astype("<u4")
        digits = np.ascontiguousarray(HEX[low.view(np.uint8)]).view("S8")
        offsets = pa.py_buffer(np.arange(0, 8 * len(low) + 1, 8, dtype=np.int32))
        return pa.StringArray.from_buffers(len(low), offsets, pa.py_buffer(digits))

    def table(self) -> pa.Table:
        """Columns label, n00 ... n12, c00 ... c25."""
        columns: dict[str, pa.Array] = {"label": pa.array(self.label)}
        columns |= {f"n{j:02d}": pa.array(np.ascontiguousarray(self.numbers[:, j])) for j in range(N_NUMBERS)}
        return pa.table(columns | {f"c{j:02d}": self.values(j) for j in range(N_CATEGORIES)})

    def text(self) -> bytes:
        """Lines of Vowpal Wabbit's text: ``1 |n n00:0.1 ... |c c00=5f0c12ab ...``."""
        table = self.table()
        parts: list[object] = [pc.if_else(pc.equal(table["label"], 1), "1 |n", "-1 |n")]
        for name in table.column_names[1:]:
            number = name.startswith("n")
            parts.append(f"{' |c' if name == 'c00' else ''} {name}{':' if number else '='}")
            parts.append(pc.cast(table[name], pa.string()) if number else table[name])
        lines = pa.concat_arrays(pc.binary_join_element_wise(*parts, "\n", "").chunks)
        _, offsets, data = lines.buffers()
        end = int(np.frombuffer(offsets, np.int32)[len(lines)])
        return memoryview(data)[:end].tobytes()


def mixed(ids: UInt64, column: int) -> UInt64:
    """(n,) words that stand for (column, value): the finalizer of SplitMix64."""
    z = ids + np.uint64(0x9E3779B97F4A7C15 * (column + 1) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def blocks(n_rows: int, seed: int = 0) -> Iterator[Rows]:
    """The table's rows, 65,536 at a time."""
    slopes = np.random.Generator(np.random.Philox(seed)).standard_normal(N_NUMBERS) * SLOPE
    for index, begin in enumerate(range(0, n_rows, BLOCK)):
        n = min(BLOCK, n_rows - begin)
        random = np.random.Generator(np.random.Philox(key=[seed, index + 1]))
        numbers = np.round(random.standard_normal((n, N_NUMBERS)), 4).astype(np.float32)
        ids = np.stack([(c ** random.random(n)).astype(np.uint64) - np.uint64(1) for c in CARDINALITIES])
        score = BIAS + numbers @ slopes
        for column in range(N_CATEGORIES):
            score += EFFECT * ((mixed(ids[column], column) & np.uint64(0xFFFFFFFF)) / 2.0**31 - 1)
        chance = 1 / (1 + np.exp(-score))
        yield Rows(numbers, ids, (random.random(n) < chance).astype(np.int8), chance)


def write(directory: Path, n_rows: int, seed: int = 0) -> tuple[Path, Path, float]:
    """The table as Parquet and as text: their paths, and the mean log loss of whoever knew the law."""
    parquet, text = directory / "categories.parquet", directory / "categories.vw"
    loss, writer = 0.0, None
    with text.open("wb") as lines:
        for rows in blocks(n_rows, seed):
            table = rows.table()
            writer = writer or pq.ParquetWriter(parquet, table.schema)
            writer.write_table(table, row_group_size=BLOCK)
            lines.write(rows.text())
            loss -= float(np.log(np.where(rows.label == 1, rows.chance, 1 - rows.chance)).sum())
    assert writer is not None
    writer.close()
    return parquet, text, loss / n_rows
