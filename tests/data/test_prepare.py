"""``prepare``: every row once, in random order, the same bytes whoever does the work, whole or not at all."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from data_tables import make_table
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from raysgd.data import prepare as steps
from raysgd.data.calls import here
from raysgd.data.dataset import ArrowDataset, open_dataset
from raysgd.data.files import find_files
from raysgd.data.prepare import common
from raysgd.data.source import Preparation
from raysgd.data.text import Dialect, TextFile, parse, pieces_of, read_lines
from raysgd.errors import InputError
from raysgd.prepared import prepare
from raysgd.report import summary

ROOT = Path(__file__).resolve().parent.parent.parent
N_ROWS = 5_000
SMALL = {"piece_bytes": 20_000, "file_rows": 1_200, "row_group_rows": 300}


def write_csv(directory: Path, table: pa.Table) -> None:
    pa.csv.write_csv(table.slice(0, 3_000), directory / "a.csv")
    pa.csv.write_csv(table.slice(3_000), directory / "b.csv")


def write_json(directory: Path, table: pa.Table) -> None:
    (directory / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def write_parquet(directory: Path, table: pa.Table) -> None:
    pq.write_table(table.slice(0, 3_000), directory / "a.parquet", row_group_size=700)
    pq.write_table(table.slice(3_000), directory / "b.parquet", row_group_size=2_000)


def write_gzip(directory: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pa.csv.write_csv(table, sink)
    (directory / "a.csv.gz").write_bytes(gzip.compress(sink.getvalue().to_pybytes()))


@pytest.fixture
def given_rows(tmp_path: Path) -> Callable[..., Path]:
    """The directory of a table, written by one of the functions above."""

    def write(writer: Callable[[Path, pa.Table], None], n_rows: int = N_ROWS) -> Path:
        (tmp_path / "in").mkdir()
        writer(tmp_path / "in", make_table(n_rows))
        return tmp_path / "in"

    return write


def rows_of(out: Path) -> pa.Table:
    dataset = open_dataset(ArrowDataset(str(out), label="late"))
    return pa.concat_tables([dataset.read(s.index, dataset.arrow_schema.names) for s in dataset.shards])


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of every file of a data set."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize("writer", [write_csv, write_json, write_parquet, write_gzip])
def test_every_row_once_in_another_order(given_rows: Callable[..., Path], tmp_path: Path, writer: Any) -> None:
    facts = prepare(Preparation(str(given_rows(writer)), **SMALL), str(tmp_path / "out"))
    rows, original = rows_of(tmp_path / "out"), make_table(N_ROWS)
    assert facts["rows"] == N_ROWS
    assert rows.column_names == original.column_names
    ids = rows["id"].to_numpy()
    expected = original.take(pa.array(ids))
    assert sorted(ids.tolist()) == list(range(N_ROWS))
    for name in original.column_names:
        assert rows[name].to_pylist() == expected[name].to_pylist(), name
    # The correlation of two independent orders has the standard deviation 1 / sqrt(n).
    assert abs(np.corrcoef(ids, np.arange(N_ROWS))[0, 1]) < 5 / np.sqrt(N_ROWS)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 5 / np.sqrt(N_ROWS)


def test_row_groups_are_even_and_as_large_as_asked(given_rows: Callable[..., Path], tmp_path: Path) -> None:
    settings = {**SMALL, "row_group_rows": 2_000, "file_rows": 2_500}
    facts = prepare(Preparation(str(given_rows(write_csv)), **settings), str(tmp_path / "out"))
    assert facts["row_group_rows"] == steps.LEAST_GROUP_ROWS  # 5,000 rows in 64 groups would be too few each
    assert len(facts["files"]) == 2
    for path in (tmp_path / "out").glob("*.parquet"):
        metadata = pq.ParquetFile(path).metadata
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        assert max(rows) - min(rows) <= 1
        assert max(rows) <= steps.LEAST_GROUP_ROWS
        assert sum(rows) == facts["files"][path.name]["rows"]


def test_a_sorted_file_is_mixed(given_rows: Callable[..., Path], tmp_path: Path) -> None:
    """The label of each row group is as of a random sample: what the warning about randomness asks for."""

    def sort(directory: Path, table: pa.Table) -> None:
        write_csv(directory, table.sort_by("late"))

    prepare(Preparation(str(given_rows(sort)), **SMALL), str(tmp_path / "out"))
    dataset = open_dataset(ArrowDataset(str(tmp_path / "out"), label="late"))
    whole = make_table(N_ROWS)["late"].to_numpy().mean()
    for shard in dataset.shards:
        mean = dataset.read(shard.index, ["late"])["late"].to_numpy().mean()
        assert abs(mean - whole) < 5 * np.sqrt(whole * (1 - whole) / shard.rows)


def backwards_and_twice(function: Any, shared: Any, items: Sequence[Any]) -> Iterator[Any]:
    """Calls in another order, each repeated: as of a cluster on which tasks are lost."""
    found = {item: (function(shared, item), function(shared, item))[1] for item in reversed(items)}
    return (found[item] for item in items)


@pytest.mark.parametrize("writer", [write_csv, write_json, write_parquet])
def test_the_same_bytes_in_whatever_order_calls_are_made(
    given_rows: Callable[..., Path], tmp_path: Path, writer: Any
) -> None:
    job = Preparation(str(given_rows(writer)), **SMALL)
    prepare(job, str(tmp_path / "one"), here)
    prepare(job, str(tmp_path / "other"), backwards_and_twice)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    prepare(Preparation(job.path, **{**SMALL, "seed": 1}), str(tmp_path / "seed"))
    assert contents(tmp_path / "one") != contents(tmp_path / "seed")


LINES = st.lists(st.text(alphabet="ab \r", max_size=6), max_size=12)


@settings(deadline=None)
@given(lines=LINES, end=st.booleans(), piece_bytes=st.integers(1, 12))
def test_pieces_hold_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: bool, piece_bytes: int
) -> None:
    data = ("\n".join(lines) + ("\n" if end else "")).encode()
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(data)
    pieces = pieces_of(TextFile(str(path), "lines", len(data), 0), Dialect("json"), piece_bytes)
    found = [read_lines(fs.LocalFileSystem(), piece) for piece in pieces]
    assert b"".join(text for _, text in found) == data
    assert all(data[start : start + len(text)] == text for start, text in found)
    assert all(text.endswith(b"\n") for _, text in found[:-1] if text and start_is_not_last(found, text))


def start_is_not_last(found: list[tuple[int, bytes]], text: bytes) -> bool:
    """Whether there are lines after this piece's."""
    at = next(i for i, (_, other) in enumerate(found) if other is text)
    return any(later for _, later in found[at + 1 :])


BAD: dict[str, tuple[dict[str, bytes], dict[str, Any], list[str]]] = {
    "too few values": ({"a.csv": b"x,y\n1,2\n\n3\n"}, {}, ["a.csv, line 4: Expected 2 columns, got 1"]),
    "no number": (
        {"a.csv": b"x,y\n" + b"1,2\n" * 4000 + b"1,oops\n" + b"1,2\n" * 100},
        {},
        ["a.csv, line 4002, column 'y': 'oops' is no number, but 4,100 of 4,101 values are", "--type y=string"],
    ),
    "not of its type": (
        {"a.csv": b"x,y\n" + b"1,2\n" * 6000 + b"1.5,2\n"},
        {"types": {"x": "int64"}},
        ["a.csv, line 6002, column 'x'", "invalid value '1.5'"],
    ),
    "bytes": ({"a.csv": b"x,y\n1,a\n1,\xff\n"}, {}, ["a.csv, line 3: no UTF-8 text"]),
    "two columns of one name": ({"a.csv": b"x,x\n1,2\n"}, {}, ["a.csv, line 1", "'x' 2 times"]),
    "other columns": ({"a.csv": b"x,y\n1,2\n", "b.csv": b"x,z\n1,2\n"}, {}, ["b.csv has the columns x, z"]),
    "empty": ({"a.csv": b""}, {}, ["a.csv, line 1: the names of the columns were expected"]),
    "no rows": ({"a.csv": b"x,y\n"}, {}, ["has no rows"]),
    "values over lines": ({"a.csv": b'x,y\n1,"a\nb"\n'}, {}, ["from line 2 on: 2 lines have 1 rows", "--newlines-in-"]),
    "no JSON": ({"a.jsonl": b'{"x": 1}\n' * 3000 + b'{"x": \n'}, {}, ["a.jsonl, line 3001: Invalid value."]),
    "an array": ({"a.json": b'{"x": 1}\n[1]\n'}, {}, ["a.json, line 2", "changed from object to array"]),
    "another kind in JSON": (
        {"a.jsonl": b'{"x": 1}\n' * 3000 + b'{"x": "a"}\n'},
        {"piece_bytes": 10**6},
        ["a.jsonl, line 3001, column 'x': changed from number to string"],
    ),
    "another kind in another piece": (
        {"a.jsonl": b'{"x": 1}\n' * 3000 + b'{"x": "a"}\n' * 3000},
        {"piece_bytes": 27_000},
        ["a.jsonl, line 3001, column 'x'", "from number to string"],
    ),
    "a given type in JSON": (
        {"a.jsonl": b'{"y": 0, "x": 1}\n{"y": 0, "x": 2.5}\n'},
        {"types": {"x": "int64"}},
        ["a.jsonl, line 2, column 'x'", "couldn't parse:2.5"],
    ),
    "kinds mixed": ({"a.csv": b"x\n1\n", "b.jsonl": b"{}\n"}, {}, ["files of several kinds (csv, json)"]),
    "an unknown type": ({"a.csv": b"x\n1\n"}, {"types": {"x": "number"}}, ["the type of column 'x' must be"]),
    "an unknown column": ({"a.csv": b"x\n1\n"}, {"types": {"z": "int64"}}, ["--type names column 'z'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    files, settings, sentences = BAD[case]
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(InputError) as refused:
        prepare(Preparation(str(tmp_path / "in"), **{"piece_bytes": 7_000, **settings}), str(tmp_path / "out"))
    for sentence in sentences:
        assert sentence in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_parquet_file_is_refused(tmp_path: Path, given_rows: Callable[..., Path]) -> None:
    source = given_rows(write_parquet)
    path = source / "a.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet is truncated"):
        prepare(Preparation(str(source)), str(tmp_path / "out"))


def test_numbers_are_whole_where_all_are() -> None:
    """Types are the narrowest that hold all values, also over pieces."""
    assert [str(common(pa.int64(), t, "csv")) for t in (pa.float64(), pa.null(), pa.string())] == [
        "double",
        "int64",
        "string",
    ]
    assert common(pa.int64(), pa.string(), "json") is None
    assert str(common(pa.timestamp("s"), pa.string(), "json")) == "string"
    table = parse(b"1,a\n2.5,\n", ("x", "y"), Dialect("csv"), None)
    assert table.schema.types == [pa.float64(), pa.string()]


def test_leading_zeros_that_are_lost_are_told(tmp_path: Path) -> None:
    """Where whole numbers were inferred; text, numbers such as 0.5 and a lone 0 lose nothing."""
    lines = [f"{i:03d},x{i:03d},0.{i % 10},{i % 3},{i:03d}" for i in range(200)]
    (tmp_path / "a.csv").write_text("\n".join(["zip,name,share,few,kept", *lines]) + "\n")
    facts = prepare(Preparation(str(tmp_path / "a.csv"), types={"kept": "string"}), str(tmp_path / "out"))
    assert facts["columns"]["zip"] == "int64"
    (sentence,) = facts["warnings"]
    assert sentence == (
        "column 'zip' has values with leading zeros, as '000', and became whole numbers without them: "
        "--type zip=string keeps codes as they are"
    )
    assert f"warning: {sentence}" in summary.prepared(facts)
    again = prepare(Preparation(str(tmp_path / "a.csv"), types={"kept": "string"}), str(tmp_path / "out"))
    assert (again["new"], again["warnings"]) == (False, [sentence])
    whole = prepare(
        Preparation(str(tmp_path / "a.csv"), types=dict.fromkeys(("kept", "zip"), "string")), f"{tmp_path}/b"
    )
    assert "warnings" not in whole


def test_leading_zeros_are_looked_for_at_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a part of a file, which may end within a quoted value."""
    monkeypatch.setattr("raysgd.data.text.ZEROS_BYTES", 60)
    (tmp_path / "a.csv").write_text("zip,text\n" + "".join(f'{i:04d},"a\nb"\n' for i in range(1, 500)))
    job = Preparation(str(tmp_path / "a.csv"), newlines_in_values=True)
    assert prepare(job, str(tmp_path / "out"))["rows"] == 499


def test_empty_text_is_missing_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('x,kind,late\n1,a,0\n2,,1\n,"",0\n3,NA,1\n')
    for missing, expected in ((False, ["", "", "NA", "a"]), (True, ["", "a"])):
        out = tmp_path / f"{missing}"
        prepare(Preparation(str(tmp_path / "a.csv"), missing_text=missing), str(out))
        rows = rows_of(out)
        assert sorted(rows["kind"].drop_null().to_pylist()) == expected
        assert rows["x"].null_count == 1


def test_the_same_again_does_nothing_and_others_are_refused(given_rows: Callable[..., Path], tmp_path: Path) -> None:
    job, out = Preparation(str(given_rows(write_csv)), **SMALL), tmp_path / "out"
    assert prepare(job, str(out))["new"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not prepare(job, str(out))["new"]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    other = Preparation(job.path, **{**SMALL, "seed": 1})
    with pytest.raises(InputError, match="was not prepared from these files with these settings"):
        prepare(other, str(out))
    assert prepare(other, str(out), overwrite=True)["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="choose another directory"):
        prepare(job, str(tmp_path / "mine"))
    with pytest.raises(InputError, match="must lie outside of"):
        prepare(job, str(tmp_path / "in" / "out"))


KILLED = """
import sys
from raysgd.data.source import Preparation
from raysgd.prepared import prepare
from raysgd.report import summary
prepare(Preparation(sys.argv[1], piece_bytes=20_000, file_rows=1_200, row_group_rows=300), sys.argv[2])
"""


@pytest.mark.parametrize("place", ["storage.write", "storage.fsync", "storage.rename", "storage.sync@3"])
def test_killed_it_leaves_all_or_nothing(given_rows: Callable[..., Path], tmp_path: Path, place: str) -> None:
    source, out = str(given_rows(write_csv)), tmp_path / "out"
    prepare(Preparation(source, **SMALL), str(tmp_path / "whole"))
    env = {"PYTHONPATH": str(ROOT), "RAYSGD_FAILPOINTS": f"{place}:kill", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", KILLED, source, str(out)], env=env, check=False, timeout=60)
    assert done.returncode == -9
    if out.exists():
        assert contents(out) == contents(tmp_path / "whole")
    prepare(Preparation(source, **SMALL), str(out))
    assert contents(out) == contents(tmp_path / "whole")


def test_in_a_bucket_an_unfinished_data_set_is_refused(given_rows: Callable[..., Path], tmp_path: Path) -> None:
    """There directories cannot be renamed: a file says that what is there is not whole."""
    bucket = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    job = Preparation(str(given_rows(write_csv)), **SMALL)

    def dies(function: Any, shared: Any, items: Sequence[Any]) -> Iterator[Any]:
        if function is steps.gather:
            function(shared, items[0])
            raise KeyboardInterrupt
        return here(function, shared, items)

    with pytest.raises(KeyboardInterrupt):
        prepare(job, "b/out", dies, filesystem=bucket)
    assert (tmp_path / "b" / "out" / "part-00000.parquet").exists()
    with pytest.raises(InputError, match="b/out is not whole: `raysgd prepare` is writing it"):
        find_files("b/out", bucket)
    prepare(job, "b/out", filesystem=bucket)
    assert len(find_files("b/out", bucket).files) == 4
    prepare(job, str(tmp_path / "local"))
    assert contents(tmp_path / "b" / "out") == contents(tmp_path / "local")


def test_a_file_that_changes_meanwhile_is_refused(given_rows: Callable[..., Path], tmp_path: Path) -> None:
    source = given_rows(write_csv)

    def meddling(function: Any, shared: Any, items: Sequence[Any]) -> Iterator[Any]:
        if function is steps.scatter:
            with (source / "a.csv").open("ab") as file:
                file.write(b"1.0,1,red,0,9\n")
        return here(function, shared, items)

    with pytest.raises(InputError, match=r"a\.csv changed while it was in use"):
        prepare(Preparation(str(source), **SMALL), str(tmp_path / "out"), meddling)
    assert not (tmp_path / "out").exists()
