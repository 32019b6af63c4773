"""What a preparation reads: files of one kind, found, opened, and cut into pieces that are read one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import pyarrow as pa

from raysgd.data.dataset import Dataset, open_table
from raysgd.data.files import SUFFIXES, Found, find_files
from raysgd.data.text import (
    COMPRESSIONS,
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    Dialect,
    Guess,
    TextFile,
    TextPiece,
    header,
    infer,
    pieces_of,
)
from raysgd.errors import InputError
from raysgd.learn.checks import count_problems

#: Bytes that a byte of Parquet or Arrow takes in memory, about.
DECODED = 3

_TEXT = {
    suffix + packed: (kind, name)
    for kind, suffixes in (("csv", CSV_SUFFIXES), ("json", JSON_SUFFIXES))
    for suffix in suffixes
    for packed, name in (("", None), *COMPRESSIONS.items())
}


@dataclass(frozen=True)
class Preparation:
    """What is prepared, and how. Everything but where it lies determines the bytes.

    path: a file, a directory, a glob, or a list of these, of one kind: .csv, .tsv; .jsonl, .ndjson, .json (each also
        .gz, .zst, .bz2); .parquet, .arrow
    seed: of the shuffle
    row_group_rows, file_rows: rows of a row group and of an output file, about; small tables get smaller row groups
    types: by column, its Arrow type, as ``{"zip": "string"}``, instead of the one that its values look like
    delimiter: between the values of a CSV line; newlines_in_values: quoted ones may span lines
    missing_text: in CSV columns of text, empty values, NA, null and the like are missing, too
    piece_bytes: of text that one call reads

    >>> Preparation("clicks", seed=-1).problems()
    ['seed must be a whole number >= 0, got -1']
    """

    path: str | Sequence[str]
    _: KW_ONLY
    seed: int = 0
    row_group_rows: int = 16_384
    file_rows: int = 262_144
    types: Mapping[str, str] = field(default_factory=dict)
    delimiter: str = ","
    newlines_in_values: bool = False
    missing_text: bool = False
    piece_bytes: int = 33_554_432
    filesystem: Any = None

    def problems(self) -> list[str]:
        """One sentence for each violation."""
        found = count_problems("seed", self.seed, at_least=0)
        for name in ("row_group_rows", "file_rows", "piece_bytes"):
            found += count_problems(name, getattr(self, name))
        if len(self.delimiter.encode()) != 1 or self.delimiter in '"\n\r':
            found.append(f"delimiter must be one byte, neither a quote nor a line's end, got {self.delimiter!r}")
        for column, name in self.types.items():
            try:
                pa.type_for_alias(name)
            except (ValueError, TypeError):
                allowed = "string, bool, int64, float32, float64, date32, timestamp[ms] or another of Arrow's names"
                found.append(f"the type of column {column!r} must be {allowed}, got {name!r}")
        return found


@dataclass(frozen=True)
class Source:
    """The opened input. files: those of text, None where it is a table of Parquet or Arrow

    described: what stands for the input where two preparations are compared
    """

    filesystem: Any
    dialect: Dialect | None
    pieces: tuple[TextPiece | int, ...]
    table: Dataset | None
    described: list[list[Any]]

    def where(self, piece: int) -> str:
        """How messages name a piece."""
        at = self.pieces[piece]
        if isinstance(at, TextPiece):
            return f"{at.file.path}, bytes {at.begin:,} to {at.end:,}"
        assert self.table is not None
        return self.table.where(at)


@dataclass(frozen=True)
class Scanned:
    """What one piece holds: rows, bytes in memory, what its columns look like."""

    rows: int
    nbytes: int
    guesses: dict[str, Guess]


def open_source(job: Preparation) -> Source:
    """Find the files, read footers or first lines, cut the input into pieces.

    Raises InputError with everything that these tell: mixed kinds, columns that differ, files that are damaged.
    """
    if problems := job.problems():
        raise InputError(problems)
    found = find_files(job.path, job.filesystem, (*SUFFIXES, *_TEXT))
    kinds = {_kind(path) for path, _ in found.files}
    if len(kinds) > 1:
        raise InputError(f"{job.path} has files of several kinds ({', '.join(sorted(map(str, kinds)))}): give one")
    kind = kinds.pop()
    if kind == "table":
        if job.types:
            raise InputError(f"types are for CSV and JSON lines, {found.files[0][0]} has its own: leave --type out")
        table = open_table(found)
        described = [[f.relative, f.size, f.digest] for f in table.files]
        return Source(found.filesystem, None, tuple(range(len(table.shards))), table, described)
    return _open_text(job, found, str(kind))


def _kind(path: str) -> str | None:
    name = path.lower()
    if name.endswith(SUFFIXES):
        return "table"
    text = next((kind for suffix, (kind, _) in _TEXT.items() if name.endswith(suffix)), None)
    if text is None:
        raise InputError(f"{path} must end in one of {', '.join((*SUFFIXES, *_TEXT))}")
    return text


def _open_text(job: Preparation, found: Found, kind: str) -> Source:
    types = {column: pa.type_for_alias(name) for column, name in job.types.items()}
    files = []
    for path, relative in found.files:
        info = found.filesystem.get_file_info(path)
        packed = next(name for suffix, (_, name) in _TEXT.items() if path.lower().endswith(suffix))
        tabs = job.delimiter == "," and ".tsv" in path.lower()
        names = header(found.filesystem, path, packed, "\t" if tabs else job.delimiter) if kind == "csv" else ()
        files.append(TextFile(path, relative, info.size, info.mtime_ns or 0, names, packed))
    delimiter = "\t" if job.delimiter == "," and ".tsv" in files[0].path.lower() else job.delimiter
    dialect = Dialect(kind, delimiter, job.newlines_in_values, job.missing_text, types)
    problems = [
        f"{f.path} has the columns {', '.join(f.names)}, {files[0].path} has {', '.join(files[0].names)}"
        for f in files[1:]
        if set(f.names) != set(files[0].names)
    ]
    if kind == "csv":
        unknown = [column for column in types if column not in files[0].names]
        problems += [f"--type names column {column!r}, which {files[0].path} has not" for column in unknown]
    if problems:
        raise InputError(problems[:20])
    pieces = tuple(piece for file in files for piece in pieces_of(file, dialect, job.piece_bytes))
    described = [[f.relative, f.size, f.mtime_ns] for f in files]
    return Source(found.filesystem, dialect, pieces, None, described)


def scan(source: Source, piece: int) -> Scanned:
    """Look at one piece. Raises InputError with file, line and column where it cannot be parsed."""
    at = source.pieces[piece]
    if isinstance(at, TextPiece):
        assert source.dialect is not None
        return Scanned(*infer(source.filesystem, at, source.dialect))
    table = source.table
    assert table is not None
    shard = table.shards[at]
    file = next(f for f in table.files if f.path == shard.path)
    return Scanned(shard.rows, DECODED * file.size * shard.rows // max(1, sum(file.group_rows)), {})
