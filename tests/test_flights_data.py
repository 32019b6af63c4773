"""The flights data set is the one that the documents describe."""

from __future__ import annotations

import json
import zipfile
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COLUMNS = ["dep_delay", "distance", "hour", "month", "carrier", "origin", "dest", "late"]


def table(directory: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(directory.glob("*.parquet"))])


def source_rows(flights_job: ModuleType) -> tuple[list[str], list[bytes]]:
    """The header's names and the raw rows of flights.csv."""
    with zipfile.ZipFile(flights_job.source_archive()) as archive:
        raw = archive.read("flights.csv")
    assert raw.endswith(b"\n")
    assert b"\r" not in raw
    assert b'"' not in raw
    header, *rows = raw[:-1].split(b"\n")
    return header.decode().split(","), rows


def test_counts(flights: Path) -> None:
    manifest = json.loads((flights / "flights.json").read_text())
    assert manifest["rows"] == 336_776
    assert manifest["without_arr_delay"] == 9_430
    assert (manifest["train"], manifest["valid"]) == (294_527, 32_819)
    assert manifest["rows"] == manifest["without_arr_delay"] + manifest["train"] + manifest["valid"]
    assert (manifest["train_late"], manifest["valid_late"]) == (72_172, 7_928)
    for name in ("train", "valid"):
        rows = table(flights / name)
        assert rows.num_rows == manifest[name]
        assert int(rows["late"].to_numpy().sum()) == manifest[f"{name}_late"]


def test_held_out_rows_and_labels_by_plain_python(flights: Path, flights_job: ModuleType) -> None:
    """The rule applied line by line, with Python's own parsing, gives the same rows in the same order."""
    names, rows = source_rows(flights_job)
    expected: dict[bool, list[list[str]]] = {False: [], True: []}
    for line in rows:
        row = dict(zip(names, line.decode().split(","), strict=True))
        if row["arr_delay"] != "NA":
            row["late"] = str(int(int(row["arr_delay"]) >= 15))
            held_out = int.from_bytes(blake2b(line, digest_size=8).digest(), "big") % 10 == 0
            expected[held_out].append([row[name] for name in COLUMNS])
    for name, wanted in (("train", expected[False]), ("valid", expected[True])):
        found = table(flights / name)
        for column, values in zip(COLUMNS, zip(*wanted, strict=True), strict=True):
            assert [str(v) for v in found[column].to_pylist()] == list(values), (name, column)


def test_schema_and_row_groups(flights: Path) -> None:
    files = sorted(flights.rglob("*.parquet"))
    assert [f.relative_to(flights).as_posix() for f in files] == [
        *(f"train/part-{part:03d}.parquet" for part in range(5)),
        "valid/part-000.parquet",
    ]
    for file in files:
        opened = pq.ParquetFile(file)
        assert opened.schema_arrow.names == COLUMNS
        assert opened.schema_arrow.types == [pa.int32()] * 4 + [pa.string()] * 3 + [pa.int8()]
        groups = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        assert set(groups[:-1]) <= {16_384}
        assert 0 < groups[-1] <= 16_384


def test_orders_hold_the_same_rows(flights: Path, flights_sorted: Path, flights_shuffled: Path) -> None:
    plain, by_label, shuffled = (table(path / "train") for path in (flights, flights_sorted, flights_shuffled))
    labels = by_label["late"].to_numpy()
    assert (np.diff(labels) >= 0).all()
    everything = [(name, "ascending") for name in COLUMNS]
    assert by_label.sort_by(everything).equals(plain.sort_by(everything))
    assert shuffled.sort_by(everything).equals(plain.sort_by(everything))
    # Shuffled: the file order of the label's neighbours tells nothing any more.
    late = shuffled["late"].to_numpy().astype(float)
    assert abs(np.corrcoef(late[:-1], late[1:])[0, 1]) < 0.01
    in_file_order = plain["late"].to_numpy().astype(float)
    assert np.corrcoef(in_file_order[:-1], in_file_order[1:])[0, 1] > 0.1
    valid = table(flights / "valid")
    assert table(flights_sorted / "valid").equals(valid)
    assert table(flights_shuffled / "valid").equals(valid)


def test_a_complete_data_set_is_left_as_it_is(
    flights: Path, flights_job: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*_: object) -> None:
        raise AssertionError("prepared twice")

    monkeypatch.setattr(flights_job, "write", must_not_run)
    before = {file: file.stat().st_mtime_ns for file in flights.rglob("*")}
    manifest = flights_job.prepare(flights)
    assert manifest == json.loads((flights / "flights.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in flights.rglob("*")} == before


def test_an_incomplete_one_is_written_again(tmp_path: Path, flights: Path, flights_job: ModuleType) -> None:
    out = tmp_path / "flights"
    flights_job.prepare(out, order="sorted")
    (out / "train" / "part-002.parquet").unlink()
    (tmp_path / "flights.partial" / "train").mkdir(parents=True)
    flights_job.prepare(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flights"]
    for file in flights.rglob("*.parquet"):
        assert (out / file.relative_to(flights)).read_bytes() == file.read_bytes()


def test_a_directory_with_something_else_is_not_touched(
    tmp_path: Path, flights_job: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert flights_job.main(["--out", str(tmp_path)]) == 2
    assert "is no flights data set: choose another directory with --out" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_without_the_package_the_remedy_is_named(
    tmp_path: Path, flights_job: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flights_job.importlib.util, "find_spec", lambda _: None)
    assert flights_job.main(["--out", str(tmp_path / "new")]) == 2
    assert "run `pip install 'raysgd[examples]'`" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_script_prints_the_counts(
    flights: Path, flights_job: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flights_job.main(["--out", str(flights)]) == 0
    printed = capsys.readouterr().out
    assert "336,776 flights, 9,430 without arr_delay left out" in printed
    assert "train: 294,527 rows in 5 file(s), 24.5% late" in printed


def test_the_reference_is_the_known_one(flights_reference: Any) -> None:
    """What every trained model is compared with; it moves only if the data or scikit-learn does."""
    assert flights_reference.log_loss == pytest.approx(0.28239, abs=1e-4)
    assert flights_reference.auc == pytest.approx(0.89917, abs=1e-4)
