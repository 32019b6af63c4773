"""Opening tables: what is found, which column plays which role, and what is refused with which sentence."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from data_tables import make_table
from pyarrow import fs

from raysgd.data.columns import Columns
from raysgd.data.dataset import ArrowDataset, Dataset, open_dataset
from raysgd.errors import InputError

Write = Callable[..., Path]


def refused(*args: object, **kwargs: object) -> str:
    with pytest.raises(InputError) as caught:
        open_dataset(*args, **kwargs)  # type: ignore[arg-type]
    return str(caught.value)


def everything(dataset: Dataset) -> pa.Table:
    return pa.concat_tables([dataset.read(i) for i in range(len(dataset.shards))])


def test_a_directory_is_read_in_the_order_of_relative_paths(tmp_path: Path, write: Write) -> None:
    table = make_table(700)
    write(table.slice(400, 300), "d/z/c.parquet", 90)
    write(table.slice(0, 150), "d/a.parquet", 100)
    write(table.slice(150, 250), "d/b/b.pq", 1000)
    write(table, "d/_temporary/x.parquet")
    write(table, "d/b/.hidden.parquet")
    (tmp_path / "d" / "README.md").write_text("about")
    dataset = open_dataset(ArrowDataset(str(tmp_path / "d"), label="late"))
    assert dataset.n_rows == 700
    assert [s.rows for s in dataset.shards] == [100, 50, 250, 90, 90, 90, 30]
    assert [s.first_row for s in dataset.shards] == [0, 100, 150, 400, 490, 580, 670]
    assert everything(dataset).equals(table.select(dataset.schema.names))
    assert "other files passed over (1): README.md" in dataset.describe()


def test_file_glob_list_uri_and_filesystem_find_the_same_rows(tmp_path: Path, write: Write) -> None:
    table = make_table(300)
    a, b = write(table.slice(0, 200), "d/a.parquet"), write(table.slice(200), "d/b.parquet")
    write(table, "d/other/c.parquet")
    local = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    specs = [
        ArrowDataset(str(tmp_path / "d" / "?.parquet"), label="late"),
        ArrowDataset([str(b), str(a)], label="late"),
        ArrowDataset(f"file://{tmp_path}/d/*.parquet", label="late"),
        ArrowDataset("d/[ab].parquet", label="late", filesystem=local),
    ]
    datasets = [open_dataset(s) for s in specs]
    assert all(everything(d).equals(table.select(d.schema.names)) for d in datasets)
    assert len({d.fingerprint for d in datasets}) == 1
    assert open_dataset(ArrowDataset(str(tmp_path / "**" / "*.parquet"), label="late")).n_rows == 600
    assert open_dataset(ArrowDataset(a, label="late")).n_rows == 200  # type: ignore[arg-type]


def test_arrow_ipc_files_give_the_same_shards_as_parquet(tmp_path: Path) -> None:
    table = make_table(250)
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    pa.feather.write_feather(table, str(tmp_path / "t.feather"), compression="lz4", chunksize=100)
    for name in ("t.arrow", "t.feather"):
        dataset = open_dataset(ArrowDataset(str(tmp_path / name), label="late"))
        assert dataset.shard_rows == [100, 100, 50]
        assert everything(dataset).equals(table.select(dataset.schema.names))
        assert dataset.read(2, ["late", "color"]).equals(table.slice(200).select(["late", "color"]))


def test_the_fingerprint_moves_with_the_set_and_changes_with_its_bytes(tmp_path: Path, write: Write) -> None:
    table = make_table(200)
    write(table, "one/a.parquet")
    write(table, "two/a.parquet")
    write(table.set_column(0, "x", pa.array([0.0] * 200)), "three/a.parquet")
    write(table, "four/b.parquet")
    prints = [open_dataset(ArrowDataset(str(tmp_path / d), label="late")).fingerprint for d in ("one", "two")]
    assert prints[0] == prints[1]
    others = [open_dataset(ArrowDataset(str(tmp_path / d), label="late")).fingerprint for d in ("three", "four")]
    assert len({prints[0], *others}) == 3


def test_a_dataset_pickles_small_and_opens_where_it_lands(write: Write) -> None:
    dataset = open_dataset(ArrowDataset(str(write(make_table(500))), label="late"))
    assert len(dataset.shards) == 5
    packed = pickle.dumps(dataset)
    assert len(packed) < 2000
    assert everything(pickle.loads(packed)).equals(everything(dataset))


# -- roles ------------------------------------------------------------------------------------------------------------


def typed() -> pa.Table:
    return pa.table(
        {
            "f": [1.5, 2.5],
            "i": [1, 2],
            "b": [True, False],
            "d": pa.array([Decimal("1.5"), Decimal("2.5")], pa.decimal128(5, 2)),
            "s": ["u", "v"],
            "e": pa.array(["p", "q"]).dictionary_encode(),
            "image": pa.array([[1, 2, 3], [4, 5, 6]], pa.list_(pa.uint8(), 3)),
            "y": [0, 1],
            "w": [1.0, 2.0],
        }
    )


def test_roles_by_type(write: Write) -> None:
    dataset = open_dataset(ArrowDataset(str(write(typed())), label="y", weight="w"))
    numeric = (("f", 1), ("i", 1), ("b", 1), ("d", 1), ("image", 3))
    assert dataset.schema == Columns(numeric, ("s", "e"), "y", "w")
    assert dataset.schema.n_numeric == 7
    assert dataset.describe() == [
        "2 rows in 1 row group of 1 file",
        "numeric (5): f, i, b, d, image (3 numbers)",
        "categorical (2): s, e",
        "label: y",
        "weight: w",
    ]


def test_one_role_given_the_other_by_type(write: Write) -> None:
    path = str(write(typed()))
    given = open_dataset(ArrowDataset(path, label="y", categorical=["i"]))
    assert given.schema.categorical == ("i",)
    assert [n for n, _ in given.schema.numeric] == ["f", "b", "d", "image", "w"]
    assert "left out (2): s (string), e (dictionary<values=string, indices=int32, ordered=0>)" in given.describe()
    both = open_dataset(ArrowDataset(path, label="y", numeric=["f"], categorical=[]))
    assert both.schema == Columns((("f", 1),), (), "y")
    assert open_dataset(ArrowDataset(path, label="y", numeric=["f"])).schema.categorical == ("s", "e")


def test_validation_takes_the_roles_of_training(write: Write) -> None:
    path = str(write(typed()))
    training = open_dataset(ArrowDataset(path, label="y", numeric=["i"], categorical=["s"])).schema
    valid = write(typed().drop_columns(["f"]), "valid.parquet")
    assert open_dataset(ArrowDataset(str(valid), label="y"), training).schema == training
    unlabelled = write(typed().drop_columns(["y"]), "predict.parquet")
    assert "label column 'y' does not exist" in refused(ArrowDataset(str(unlabelled)), training)
    predict = open_dataset(ArrowDataset(str(unlabelled)), training, need_label=False)
    assert predict.schema.names == ("i", "s")
    narrow = write(typed().drop_columns(["s", "e"]).rename_columns({"i": "I"}), "narrow.parquet")
    message = refused(ArrowDataset(str(narrow)), training)
    assert "numeric column 'i' does not exist; did you mean 'I'?" in message
    assert "categorical column 's' does not exist" in message


@pytest.mark.parametrize(
    ("roles", "sentence"),
    [
        ({"label": "z"}, "label column 'z' does not exist; the columns are 'f', 'i'"),
        ({"label": "y", "weight": "s"}, "weight column 's' must hold numbers, got string"),
        ({"label": "y", "numeric": ["s"]}, "numeric column 's' must hold numbers, got string: name it in categorical"),
        ({"label": "y", "categorical": ["f"]}, "categorical column 'f' must hold strings, integers or booleans"),
        ({"label": "y", "numeric": ["f", "f"]}, "column 'f' can have one role, got numeric, numeric"),
        ({"label": "y", "numeric": ["f", "y"]}, "column 'y' can have one role, got label, numeric"),
        ({"label": "image"}, "label column 'image' has type fixed_size_list"),
        ({"label": "y", "numeric": [], "categorical": []}, "no column is left to learn from"),
        ({}, "label must name the column to predict"),
        ({"label": 3}, "label must be the name of a column, got 3"),
        ({"label": "y", "categorical": "s"}, "categorical must be a list of column names, got 's'"),
        ({"label": "y", "window_rows": 0}, "window_rows must be a whole number >= 1, got 0"),
        ({"label": "y", "window_rows": 9, "max_window_rows": 8}, "window_rows must be <= max_window_rows = 8, got 9"),
        ({"label": "y", "nulls": None}, "nulls must be one of 'refuse', 'impute', 'drop', got None"),
        ({"label": "y", "filesystem": "s3"}, "filesystem must be a pyarrow.fs.FileSystem, got 's3'"),
    ],
)
def test_roles_that_do_not_fit(write: Write, roles: dict[str, object], sentence: str) -> None:
    assert sentence in refused(ArrowDataset(str(write(typed())), **roles))  # type: ignore[arg-type]


def test_a_label_that_does_not_exist_suggests_the_nearest(write: Write) -> None:
    message = refused(ArrowDataset(str(write(make_table(10))), label="laet"))
    assert message == "label column 'laet' does not exist; did you mean 'late'?"


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        (pa.array([0, 1], pa.timestamp("s")), "write what matters of it as numbers"),
        (pa.array([[1], [2, 3]]), "write it as a fixed-size list of numbers"),
        (pa.array([{"a": 1}, {"a": 2}]), "write its fields as columns"),
        (pa.array([b"a", b"b"]), "write it as a string"),
        (pa.nulls(2), "it holds only nulls"),
        (pa.array([["a"], ["b"]], pa.list_(pa.string(), 1)), "only fixed-size lists of numbers"),
    ],
)
def test_types_that_no_role_takes_are_named_with_the_remedy(write: Write, values: pa.Array, remedy: str) -> None:
    path = str(write(typed().append_column("odd", values)))
    for spec in (ArrowDataset(path, label="y"), ArrowDataset(path, label="y", numeric=["odd"])):
        message = refused(spec)
        assert "column 'odd' has type" in message
        assert "which cannot be used" in message
        assert remedy in message
    assert open_dataset(ArrowDataset(path, label="y", categorical=["s"])).schema.categorical == ("s",)


# -- files that cannot be used ----------------------------------------------------------------------------------------


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "a.csv").write_text("x\n1\n")
    os.symlink(tmp_path / "nowhere", tmp_path / "link.parquet")
    assert "missing.parquet does not exist" in refused(ArrowDataset(str(tmp_path / "missing.parquet"), label="y"))
    assert "no .parquet, .pq" in refused(ArrowDataset(str(tmp_path / "empty"), label="y"))
    assert "other files there: a.csv" in refused(ArrowDataset(str(tmp_path / "csv"), label="y"))
    assert "matches no file" in refused(ArrowDataset(str(tmp_path / "*.pq"), label="y"))
    assert "is a link to" in refused(ArrowDataset(str(tmp_path / "link.parquet"), label="y"))
    assert "link.parquet does not exist: it is a link to" in refused(ArrowDataset(str(tmp_path), label="y"))
    assert "path must be a file" in refused(ArrowDataset("", label="y"))
    assert "path must be a file" in refused(ArrowDataset([], label="y"))
    assert "cannot be opened" in refused(ArrowDataset("nope://bucket/a", label="y"))


def test_files_that_are_something_else(tmp_path: Path, write: Write) -> None:
    good = write(make_table(100), "good.parquet").read_bytes()
    with pa.ipc.new_stream(tmp_path / "stream.arrow", make_table(3).schema) as stream:
        stream.write_table(make_table(3))
    odd = {
        "empty.parquet": (b"", "is empty (0 bytes)"),
        "page.parquet": (
            b"<!DOCTYPE html><html></html>",
            "is neither Parquet nor Arrow IPC: it begins with b'<!DOCTYP'",
        ),
        "cut.parquet": (good[: len(good) // 2], "is truncated: its footer is missing"),
        "long.parquet": (good[:-8] + b"\xff\xff\xff\x7fPAR1", "is damaged: its footer claims 2147483647 bytes"),
        "torn.parquet": (good[:-600] + b"\xff" * 592 + good[-8:], "is damaged"),
        "stream.arrow": ((tmp_path / "stream.arrow").read_bytes(), "is an Arrow stream"),
    }
    for name, (content, sentence) in odd.items():
        (tmp_path / name).write_bytes(content)
        message = refused(ArrowDataset(str(tmp_path / name), label="late"))
        assert message.startswith(str(tmp_path / name))
        assert sentence in message
    # one message for the whole directory, a sentence for each
    assert all(name in refused(ArrowDataset(str(tmp_path), label="late")) for name in odd)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path, write: Write) -> None:
    good = write(make_table(20), "good.parquet").read_bytes()
    for size in range(0, len(good), 7):
        (tmp_path / "cut.parquet").write_bytes(good[:size])
        refused(ArrowDataset(str(tmp_path / "cut.parquet"), label="late"))


def test_no_rows_duplicate_names_and_schemas_that_differ(tmp_path: Path, write: Write) -> None:
    table = make_table(10)
    assert "has no rows" in refused(ArrowDataset(str(write(table.slice(0, 0), "none.parquet")), label="late"))
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([0])], ["x", "x", "late"])
    assert "has 2 columns named 'x'" in refused(ArrowDataset(str(write(twice, "twice.parquet")), label="late"))
    write(table, "d/a.parquet")
    write(table.drop_columns(["color"]), "d/b.parquet")
    write(table.set_column(0, "x", table["x"].cast(pa.string())).append_column("new", table["k"]), "d/c.parquet")
    message = refused(ArrowDataset(str(tmp_path / "d"), label="late"))
    assert "b.parquet has no column 'color'" in message
    assert "c.parquet has a column 'new'" in message
    assert "column 'x' is string in" in message


def test_what_may_differ_between_files(tmp_path: Path, write: Write) -> None:
    table = make_table(10)
    write(table, "d/a.parquet")
    dictionary = table.set_column(2, "color", table["color"].dictionary_encode())
    write(dictionary.select(["late", "id", "color", "x", "k"]), "d/b.parquet")
    write(table.slice(0, 0), "d/c.parquet")
    dataset = open_dataset(ArrowDataset(str(tmp_path / "d"), label="late"))
    assert dataset.shard_rows == [10, 10]
    assert dataset.read(1)["color"].to_pylist() == dataset.read(0)["color"].to_pylist()


def test_a_file_that_changes_after_opening_is_named(write: Write) -> None:
    path = write(make_table(250))
    dataset = open_dataset(ArrowDataset(str(path), label="late"))
    write(make_table(250, seed=1))
    with pytest.raises(InputError, match=r"t\.parquet changed while it was in use"):
        dataset.read(1)
    path.unlink()
    with pytest.raises(InputError, match=r"t\.parquet is gone"):
        dataset.read(1)


def test_flipped_bits_are_found_where_checksums_are_written(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(make_table(400), path, row_group_size=200, write_page_checksum=True, compression="none")
    dataset = open_dataset(ArrowDataset(str(path), label="late"))
    group = pq.ParquetFile(path).metadata.row_group(1)
    x = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "x")
    content = bytearray(path.read_bytes())
    content[x.data_page_offset + x.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    dataset.read(0)
    with pytest.raises(InputError, match=r"t\.parquet, row group 1 is damaged"):
        dataset.read(1)


def test_the_data_plane_imports_neither_dataset_nor_pandas() -> None:
    code = (
        "import sys, raysgd.data.loader, raysgd.data.spread; "
        "sys.exit(any(m in sys.modules for m in ('pyarrow.dataset', 'pandas', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
