"""The pure parts of bench/: tables are functions of their seed, figures and sizes are formed as they say. No timing."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench import __main__ as command
from bench import categories, proc, safety, tables
from bench.measure import Asked, Figures

ROWS = 1_000


@pytest.mark.parametrize("name", ["measure", "memory", "proc", "start", "training"])
def test_examples(name: str) -> None:
    result = doctest.testmod(import_module(f"bench.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", [*command.PARTS, *command.LONG])
def test_every_part_can_be_asked(name: str) -> None:
    assert callable(command.part(name))


@pytest.mark.parametrize("write", [tables.write_numbers, tables.write_images])
def test_tables_are_functions_of_their_seed(write: object, tmp_path: Path) -> None:
    assert callable(write)
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        found.append(write(tmp_path / name, ROWS, seed=seed).read_bytes())
    first, again, other = found
    assert first == again
    assert first != other


def test_numbers_in_memory_are_those_in_the_file(tmp_path: Path) -> None:
    x, y = tables.numbers(ROWS)
    stored = pq.ParquetFile(tables.write_numbers(tmp_path, ROWS, shard_rows=300)).read()
    assert np.array_equal(np.column_stack([stored[name].to_numpy() for name in stored.column_names[:-1]]), x)
    assert np.array_equal(stored["label"].to_numpy(), y)
    assert stored.column_names[-1] == "label"


def test_categories_are_functions_of_their_seed(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        parquet, text, loss = categories.write(tmp_path / name, ROWS, seed)
        found.append((parquet.read_bytes(), text.read_bytes(), loss))
    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


def test_text_has_the_rows_of_the_table(tmp_path: Path) -> None:
    parquet, text, _ = categories.write(tmp_path, ROWS)
    lines = text.read_text().splitlines()
    assert len(lines) == ROWS
    for line, row in zip(lines, pq.ParquetFile(parquet).read().to_pylist(), strict=True):
        label, numbers, values = line.split(" |")
        assert label == ("1" if row["label"] else "-1")
        assert {k: np.float32(v) for k, v in (word.split(":") for word in numbers.split()[1:])} == {
            k: np.float32(v) for k, v in row.items() if k.startswith("n")
        }
        assert dict(word.split("=") for word in values.split()[1:]) == {k: row[k] for k in row if k.startswith("c")}


def test_categories_are_skewed_and_within_their_column() -> None:
    (rows,) = categories.blocks(20_000)
    for ids, values in zip(rows.ids, categories.CARDINALITIES, strict=True):
        assert ids.max() < values
        counts = np.bincount(ids.astype(np.int64), minlength=2)
        # of a law in proportion to log(1 + 1 / (k + 1)): the chance of value 0 is log 2 / log(values)
        assert counts[0] / len(ids) == pytest.approx(np.log(2) / np.log(values), abs=0.02)
    assert rows.label.mean() == pytest.approx(rows.chance.mean(), abs=0.02)


def test_ratios_are_formed_round_by_round() -> None:
    assert Figures((2.0, 9.0)).ratio(Figures((1.0, 3.0))).values == (2.0, 3.0)
    assert Figures((2.0, 9.0)).minus(Figures((1.0, 3.0))).times(2).values == (2.0, 12.0)
    assert Asked().rounds > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", safety.WAYS)
def test_steps_can_be_taken_without_each_check(way: str) -> None:
    """The bench reaches into the state machine; ``block`` sees to it that every step counted."""
    shard, gradients = safety.fresh(100_000), [np.ones(100_000, np.float32) for _ in range(2)]
    for check in safety.CHECKS:
        with safety.without(check, shard):
            safety.block(shard, way, gradients)
    safety.block(shard, way, gradients)
    assert shard.version == 5 * safety.steps_of_a_block(100_000)
    assert len(shard.commits) == 3 * safety.steps_of_a_block(100_000)  # two of the four were without a ledger


def test_a_process_tree_and_its_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in proc.descendants(os.getpid())
        taken = proc.memory(child.pid)
        assert taken is not None
        assert 0 < taken.pss <= taken.rss
    assert proc.memory(child.pid) is None
    assert proc.role(child.pid) is None
