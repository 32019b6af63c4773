"""Shuffle a table of any size on disk: CSV, JSON lines, Parquet or Arrow in, evenly cut Parquet out; no Ray.

    pieces of the input           scatter                      gather
    0 ─ rows ─▶ each row to a random output file ─┐   ┌─▶ file 0: its rows of all pieces, permuted
    1 ─ rows ─▶ one Arrow file per piece, with    ├──▶┼─▶ file 1
    2 ─ rows ─▶ one batch per output file         ┘   └─▶ file 2

To which file a row goes is drawn from (seed, piece), the order within a file from (seed, file): together every order
of the rows is equally likely. Pieces, files and draws follow from the data and the settings alone, so the bytes are
the same whoever carries a piece or a file, and how often: a call that is repeated writes the same file again.

A table is never in memory as a whole: a scatter holds one piece, a gather one output file.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from pyarrow.fs import FileType, LocalFileSystem

from raysgd import failpoints
from raysgd.data.columns import value_type
from raysgd.data.source import Preparation, Scanned, Source
from raysgd.data.text import Guess, TextPiece, infer, line_of, read, read_lines, replace_types
from raysgd.errors import InputError
from raysgd.learn.random import permutation, words

#: Bytes of an output file in memory, about: wide rows make more files.
FILE_BYTES = 256 << 20
#: A small table still has about this many row groups, of at least so many rows: there is something to shuffle.
LEAST_GROUPS, LEAST_GROUP_ROWS = 64, 1_024
#: Share of numbers from which on a CSV column with other values, too, is taken for a mistake.
MOSTLY = 0.9


@dataclass(frozen=True)
class Layout:
    """What the output will be. rows: of each piece;  n_files;  group_rows: of a row group at the most"""

    schema: pa.Schema
    rows: tuple[int, ...]
    n_files: int
    group_rows: int

    @property
    def n_rows(self) -> int:
        return sum(self.rows)


@dataclass(frozen=True)
class Shuffle:
    """One preparation, as every call needs it. pieces, files: the directories on ``filesystem`` that it writes"""

    source: Source
    layout: Layout
    seed: int
    filesystem: Any
    pieces: str
    files: str


def settle(job: Preparation, source: Source, scans: Sequence[Scanned]) -> Layout:
    """What will be written, from what all pieces hold.

    Raises InputError where there are no rows, or a column holds values of kinds that do not go together.
    """
    rows, nbytes = sum(s.rows for s in scans), sum(s.nbytes for s in scans)
    if rows == 0:
        raise InputError(f"{job.path} has no rows")
    if source.table is not None:
        schema = pa.schema([pa.field(f.name, value_type(f.type)) for f in source.table.arrow_schema])
    else:
        schema = _schema(source, scans)
    n_files = max(1, round(rows / job.file_rows), -(-nbytes // FILE_BYTES))
    group_rows = min(job.row_group_rows, max(LEAST_GROUP_ROWS, -(-rows // LEAST_GROUPS)))
    return Layout(schema, tuple(s.rows for s in scans), n_files, group_rows)


def _schema(source: Source, scans: Sequence[Scanned]) -> pa.Schema:
    assert source.dialect is not None
    names = list(dict.fromkeys(name for s in scans for name in s.guesses))
    problems, fields = [], []
    for name in names:
        guesses = [(i, s.guesses[name]) for i, s in enumerate(scans) if name in s.guesses]
        kind = guesses[0][1].type
        for i, guess in guesses:
            joined = common(kind, guess.type, source.dialect.kind)
            if joined is None:
                problems += _other_kind(source, i, name, kind, guess.type)
                break
            kind = joined
        if pa.types.is_string(kind) and name not in source.dialect.types and source.dialect.kind == "csv":
            problems += _mostly_numbers(source, name, guesses)
        fields.append(pa.field(name, pa.string() if pa.types.is_null(kind) else kind))
    if problems:
        raise InputError(problems[:20])
    return pa.schema(fields)


def warnings(layout: Layout, scans: Sequence[Scanned]) -> list[str]:
    """Sentences about columns that lose something: codes with leading zeros that became whole numbers."""
    found = []
    for column in layout.schema:
        seen = next((g.zeros for s in scans if (g := s.guesses.get(column.name)) and g.zeros is not None), None)
        if seen is not None and pa.types.is_integer(column.type):
            name = column.name
            lost = f"column {name!r} has values with leading zeros, as {seen!r}, and became whole numbers without them"
            found.append(f"{lost}: --type {name}=string keeps codes as they are")
    return found


def _other_kind(source: Source, piece: int, name: str, before: pa.DataType, here: pa.DataType) -> list[str]:
    """The sentence about a column that is of another kind in this piece: with the line, where one shows it."""
    at = source.pieces[piece]
    assert isinstance(at, TextPiece)
    assert source.dialect is not None
    try:
        infer(source.filesystem, at, replace_types(source.dialect, {**source.dialect.types, name: before}))
    except InputError as error:
        return list(error.problems)
    return [f"column {name!r} is {before} before and {here} in {source.where(piece)}"]


def common(a: pa.DataType, b: pa.DataType, kind: str) -> pa.DataType | None:
    """The type of a column that looks like ``a`` here and like ``b`` there; None where there is none.

    >>> str(common(pa.int64(), pa.float64(), "csv")), str(common(pa.null(), pa.bool_(), "json"))
    ('double', 'bool')
    """
    if a.equals(b) or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if {str(a), str(b)} == {"int64", "double"}:
        return pa.float64()
    # In CSV all is text; in JSON only times are told from it by their look.
    texts = all(pa.types.is_string(t) or pa.types.is_timestamp(t) for t in (a, b))
    return pa.string() if kind == "csv" or texts else None


def _mostly_numbers(source: Source, name: str, guesses: Sequence[tuple[int, Guess]]) -> list[str]:
    numbers, values = sum(g.numbers for _, g in guesses), sum(g.values for _, g in guesses)
    first = next(((i, g.odd) for i, g in guesses if g.odd is not None), None)
    if first is None or not MOSTLY * values <= numbers < values:
        return []
    i, (line, value) = first
    at = source.pieces[i]
    assert isinstance(at, TextPiece)
    start, _ = read_lines(source.filesystem, at)
    where = f"{at.file.path}, line {line_of(source.filesystem, at.file, start, line)}, column {name!r}"
    return [
        f"{where}: {value!r} is no number, but {numbers:,} of {values:,} values are: "
        f"correct it, or say what the column is: --type {name}=string"
    ]


def scatter(job: Shuffle, piece: int) -> int:
    """Send the rows of a piece to their output files: write the piece's Arrow file. Returns how many there are."""
    failpoints.reach("prepare.scatter")
    table = _read(job, piece)
    n_rows, n_files = table.num_rows, job.layout.n_files
    if n_rows != job.layout.rows[piece]:
        raise InputError(f"{job.source.where(piece)} changed while it was in use; start again")
    # The upper half of a word times n_files, over 2^32: even to one in millions.
    draws = words(n_rows, job.seed, "prepare/file", piece) >> np.uint64(32)
    target = ((draws * np.uint64(n_files)) >> np.uint64(32)).astype(np.uint32)
    order = np.argsort(target, kind="stable")
    ends = np.searchsorted(target[order], np.arange(n_files), side="right")
    table = table.take(pa.array(order)).combine_chunks()

    def write(stream: Any) -> None:
        with pa.ipc.new_file(stream, job.layout.schema) as writer:
            begin = 0
            for end in ends.tolist():
                writer.write_batch(_one_batch(table.slice(begin, end - begin)))
                begin = end

    _write(job.filesystem, f"{job.pieces}/{_piece_name(piece)}", write)
    return int(n_rows)


def gather(job: Shuffle, index: int) -> tuple[str, int, int]:
    """Write one output file: (name, rows, bytes). Its row groups differ by one row at the most."""
    failpoints.reach("prepare.gather")
    batches = [_batch(job, piece, index) for piece in range(len(job.source.pieces))]
    table = pa.Table.from_batches(batches, job.layout.schema)
    n_rows = table.num_rows
    table = table.take(pa.array(permutation(n_rows, job.seed, "prepare/rows", index)))
    name = f"part-{index:05d}.parquet"

    def write(stream: Any) -> None:
        groups = max(1, -(-n_rows // job.layout.group_rows))
        with pq.ParquetWriter(stream, job.layout.schema, write_page_checksum=True) as writer:
            for g in range(groups):
                begin, end = g * n_rows // groups, (g + 1) * n_rows // groups
                writer.write_table(table.slice(begin, end - begin), row_group_size=max(1, end - begin))

    _write(job.filesystem, f"{job.files}/{name}", write)
    return name, n_rows, int(job.filesystem.get_file_info(f"{job.files}/{name}").size)


def _read(job: Shuffle, piece: int) -> pa.Table:
    at, source = job.source.pieces[piece], job.source
    if isinstance(at, TextPiece):
        assert source.dialect is not None
        return read(source.filesystem, at, source.dialect, job.layout.schema)
    assert source.table is not None
    return source.table.read(at, job.layout.schema.names).cast(job.layout.schema)


def _batch(job: Shuffle, piece: int, index: int) -> pa.RecordBatch:
    path = f"{job.pieces}/{_piece_name(piece)}"
    try:
        with job.filesystem.open_input_file(path) as source:
            return pa.ipc.open_file(source).get_batch(index)
    except FileNotFoundError as error:
        where = "every node must see the output directory: give a shared one, or a URI"
        raise InputError(f"{path} is not there, though it was written: {where}") from error


def _piece_name(piece: int) -> str:
    return f"piece-{piece:06d}.arrow"


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _write(fs: Any, path: str, write: Any) -> None:
    """Write a file that appears whole; on a local disk it is synced. A repeated call replaces it by the same bytes."""
    local = isinstance(fs, LocalFileSystem)
    directory, _, name = path.rpartition("/")
    temporary = f"{directory}/.{name}.{secrets.token_hex(4)}.tmp" if local else path
    try:
        with fs.open_output_stream(temporary) as stream:
            write(stream)
        if local:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            fs.move(temporary, path)
    finally:
        if local and fs.get_file_info(temporary).type == FileType.File:
            fs.delete_file(temporary)
