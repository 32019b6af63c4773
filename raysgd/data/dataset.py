"""Open a table of Parquet or Arrow IPC files: check the schemas, list the shards, read one of them.

files sorted by relative path     a.parquet           b.parquet
shards: one per row group         | 0 | 1 |  2  |     | 3 |  4  |
row ids                           0 ............................ n_rows - 1
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from raysgd.data.columns import Columns, Roles, is_string, left_out, listing, matching, resolve, value_type
from raysgd.data.files import Footer, Found, find_files, footer_bytes, footer_digest, parquet_metadata, read_footer
from raysgd.errors import InputError
from raysgd.learn.checks import choice_problems, count_problems

NULLS = ("refuse", "impute", "drop")


@dataclass(frozen=True)
class ArrowDataset:
    """Where a table lies and what its columns are for. Nothing is opened before :func:`open_dataset`.

    path:            a file, a directory, a glob, or a list of these; local, or a URI such as ``s3://bucket/table``
    label:           the column to predict
    numeric:         number columns and fixed-size lists of numbers; default: all others of such a type
    categorical:     string, integer or boolean columns; default: all other strings and dictionaries
    weight:          the column of sample weights; default: every row weighs 1
    nulls:           what a missing value does: "refuse" the data, "impute" the mean, "drop" the row
    window_rows:     rows that are shuffled jointly, if the order of the file does not ask for more
    max_window_rows: the most rows that may be shuffled jointly: the limit of a worker's memory
    filesystem:      a ``pyarrow.fs.FileSystem`` that ``path`` lies on; default: found from the path

    >>> ArrowDataset("train", label="late", nulls="ignore").problems()
    ["nulls must be one of 'refuse', 'impute', 'drop', got 'ignore'"]
    """

    path: str | Sequence[str]
    _: KW_ONLY
    label: str | None = None
    numeric: Sequence[str] | None = None
    categorical: Sequence[str] | None = None
    weight: str | None = None
    nulls: str = "refuse"
    window_rows: int = 65_536
    max_window_rows: int = 1_048_576
    filesystem: Any = None

    def problems(self) -> list[str]:
        """One sentence for each violation."""
        found = self._path_problems()
        for name in ("label", "weight"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                found.append(f"{name} must be the name of a column, got {value!r}")
        for name in ("numeric", "categorical"):
            value = getattr(self, name)
            if value is not None and not _are_names(value):
                found.append(f"{name} must be a list of column names, got {value!r}")
        found += choice_problems("nulls", self.nulls, NULLS)
        sizes = [count_problems(name, getattr(self, name)) for name in ("window_rows", "max_window_rows")]
        found += sizes[0] + sizes[1]
        if not any(sizes) and self.window_rows > self.max_window_rows:
            found.append(f"window_rows must be <= max_window_rows = {self.max_window_rows}, got {self.window_rows}")
        return found

    def _path_problems(self) -> list[str]:
        single = isinstance(self.path, str | os.PathLike)
        found = []
        if not (self.path if isinstance(self.path, str) else single or (_are_names(self.path) and self.path)):
            found.append(f"path must be a file, a directory, a glob, or a list of these, got {self.path!r}")
        elif "\0" in str(self.path if single else "".join(map(str, self.path))):
            found.append(f"path must not contain a null character, got {self.path!r}")
        if self.filesystem is not None and not isinstance(self.filesystem, FileSystem):
            found.append(f"filesystem must be a pyarrow.fs.FileSystem, got {self.filesystem!r}")
        return found

    def roles(self) -> Roles:
        """The roles that the user named."""
        numeric = None if self.numeric is None else tuple(self.numeric)
        categorical = None if self.categorical is None else tuple(self.categorical)
        return Roles(self.label, numeric, categorical, self.weight)


def _are_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str | os.PathLike) for v in value)


@dataclass(frozen=True, slots=True)
class Shard:
    """One row group of one file: the unit that is read. ``first_row``: the id of its first row."""

    index: int
    path: str
    group: int
    rows: int
    first_row: int


@dataclass(frozen=True, slots=True)
class File:
    """One file of a data set, as its footer described it when the set was opened."""

    path: str
    relative: str
    kind: str
    size: int
    group_rows: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class Dataset:
    """An opened table. Cheap to pickle: it holds what the footers said, no open file.

    schema:      the role of each column
    arrow_schema: name and type of every column of the files
    nulls:       what a missing value does
    """

    filesystem: Any
    files: tuple[File, ...]
    schema: Columns
    arrow_schema: pa.Schema
    nulls: str = "refuse"
    ignored: tuple[str, ...] = field(default=(), repr=False)

    def __getstate__(self) -> dict[str, Any]:
        names = ("filesystem", "files", "schema", "arrow_schema", "nulls", "ignored")
        return {name: self.__dict__[name] for name in names}

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """Every row group that has rows, in the order of the files."""
        shards: list[Shard] = []
        first = 0
        for file in self.files:
            for group, rows in enumerate(file.group_rows):
                if rows:
                    shards.append(Shard(len(shards), file.path, group, rows, first))
                    first += rows
        return tuple(shards)

    @cached_property
    def n_rows(self) -> int:
        """Rows in all shards."""
        return sum(sum(file.group_rows) for file in self.files)

    @property
    def shard_rows(self) -> list[int]:
        """Rows of each shard."""
        return [shard.rows for shard in self.shards]

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that change when a file, a row count, the schema or a footer does. Moving the set keeps it."""
        files = [[f.relative, f.size, list(f.group_rows), f.digest] for f in self.files]
        columns = [[c.name, str(c.type)] for c in self.arrow_schema]
        return blake2b(json.dumps([columns, files]).encode(), digest_size=16).hexdigest()

    @cached_property
    def _file_of(self) -> dict[str, File]:
        return {file.path: file for file in self.files}

    @cached_property
    def _strings(self) -> list[str]:
        return [f.name for f in self.arrow_schema if is_string(f.type)]

    def without_label(self) -> Dataset:
        """The same table for prediction: neither label nor weight is read."""
        return replace(self, schema=replace(self.schema, label=None, weight=None))

    def describe(self) -> list[str]:
        """Lines that say what was found and which column was chosen for what."""
        columns = self.schema
        wide = [name if width == 1 else f"{name} ({width} numbers)" for name, width in columns.numeric]
        groups, files = counted(len(self.shards), "row group"), counted(len(self.files), "file")
        lines = [f"{counted(self.n_rows, 'row')} in {groups} of {files}"]
        lines.append(f"numeric ({len(wide)}): {listing(wide)}" if wide else "numeric: none")
        if columns.categorical:
            lines.append(f"categorical ({len(columns.categorical)}): {listing(columns.categorical)}")
        else:
            lines.append("categorical: none")
        lines += [f"{role}: {name}" for role, name in (("label", columns.label), ("weight", columns.weight)) if name]
        if out := left_out(self.arrow_schema, columns):
            lines.append(f"left out ({len(out)}): {listing(out)}")
        if self.ignored:
            lines.append(f"other files passed over ({len(self.ignored)}): {listing(self.ignored, 5)}")
        return lines

    def read(self, shard_index: int, columns: Sequence[str] | None = None, *, as_dictionary: bool = False) -> pa.Table:
        """The rows of one shard: exactly ``columns``, default those that have a role.

        as_dictionary: leave the strings of Parquet dictionary-encoded: twice as fast to read

        Raises InputError with file and row group where the file changed since it was opened, or is damaged.
        """
        shard = self.shards[shard_index]
        names = list(self.schema.names if columns is None else columns)
        with self._explained(shard), self.filesystem.open_input_file(shard.path) as source:
            file = self._file_of[shard.path]
            kind, footer = footer_bytes(source, shard.path)
            if (kind, source.size(), footer_digest(footer)) != (file.kind, file.size, file.digest):
                raise InputError(f"{shard.path} changed while it was in use; start again with --fresh")
            if kind == "parquet":
                table = _read_row_group(source, footer, shard.group, names, self._strings if as_dictionary else [])
            else:
                table = _read_record_batch(source, shard.group, names)
        if table.num_rows != shard.rows:
            raise InputError(f"{self.where(shard_index)}: {shard.rows} rows were expected, got {table.num_rows}")
        return table

    def where(self, shard_index: int) -> str:
        """``path, row group i``: how messages name a shard."""
        shard = self.shards[shard_index]
        return f"{shard.path}, row group {shard.group}"

    @contextmanager
    def _explained(self, shard: Shard) -> Iterator[None]:
        where = self.where(shard.index)
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(f"{shard.path} is gone: it was there when the data set was opened") from error
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{where} is damaged: {error}") from error


def _read_row_group(source: Any, footer: bytes, group: int, names: list[str], dictionaries: list[str]) -> pa.Table:
    metadata = parquet_metadata(footer)
    file = pq.ParquetFile(source, metadata=metadata, read_dictionary=dictionaries, page_checksum_verification=True)
    return file.read_row_group(group, columns=names, use_threads=False).select(names)


def _read_record_batch(source: Any, group: int, names: list[str]) -> pa.Table:
    everything = pa.ipc.open_file(source).schema.names
    options = pa.ipc.IpcReadOptions(included_fields=sorted(everything.index(n) for n in names), use_threads=False)
    batch = pa.ipc.open_file(source, options=options).get_batch(group)
    return pa.Table.from_batches([batch]).select(names)


def counted(count: int, noun: str) -> str:
    """A count with its noun.

    >>> counted(1, "file"), counted(1_200, "file")
    ('1 file', '1,200 files')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def open_dataset(spec: ArrowDataset, columns_from: Columns | None = None, *, need_label: bool = True) -> Dataset:
    """Find the files of ``spec``, read their footers, check their schemas and settle the columns' roles.

    columns_from: the roles of the training data: for validation, and for prediction. A label or weight that ``spec``
                  names replaces theirs; other roles that it names are not looked at.
    need_label:   False for prediction: label and weight are neither needed nor read.

    Raises InputError with a sentence for each violation, file and column named.
    """
    if problems := spec.problems():
        raise InputError(problems)
    table = open_table(find_files(spec.path, spec.filesystem))
    columns = _columns(spec, table.arrow_schema, columns_from, need_label)
    if table.n_rows == 0:
        raise InputError(f"{spec.path} has no rows ({len(table.files)} files)")
    return replace(table, schema=columns, nulls=spec.nulls)


def open_table(found: Found) -> Dataset:
    """Read the footers of files and check their schemas; no column has a role.

    Raises InputError with a sentence for each violation, file and column named.
    """
    footers = _footers(found)
    schema = _common_schema([path for path, _ in found.files], footers)
    files = tuple(
        File(path, relative, f.kind, f.size, f.group_rows, f.digest)
        for (path, relative), f in zip(found.files, footers, strict=True)
    )
    return Dataset(found.filesystem, files, Columns(()), schema, ignored=found.ignored)


def _footers(found: Found) -> list[Footer]:
    def footer(path: str) -> Footer | InputError:
        try:
            return read_footer(found.filesystem, path)
        except InputError as error:
            return error

    with ThreadPoolExecutor(min(16, len(found.files))) as pool:
        results = list(pool.map(footer, [path for path, _ in found.files]))
    problems = [p for r in results if isinstance(r, InputError) for p in r.problems]
    if problems:
        raise InputError([*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])])
    return [r for r in results if isinstance(r, Footer)]


def _common_schema(paths: list[str], footers: list[Footer]) -> pa.Schema:
    first = _plain(footers[0].schema)
    problems = []
    for name in dict.fromkeys(first.names):
        if first.names.count(name) > 1:
            problems.append(f"{paths[0]} has {first.names.count(name)} columns named {name!r}; names must differ")
    types = {f.name: f.type for f in first}
    for path, footer in zip(paths[1:], footers[1:], strict=True):
        schema = _plain(footer.schema)
        if schema.equals(first):
            continue
        other = {f.name: f.type for f in schema}
        if len(other) < len(schema):
            problems.append(f"{path} has two columns of one name; names must differ")
        problems += [f"{path} has no column {n!r}, {paths[0]} has" for n in types if n not in other]
        problems += [f"{path} has a column {n!r}, {paths[0]} has not" for n in other if n not in types]
        problems += [
            f"column {n!r} is {other[n]} in {path}, {types[n]} in {paths[0]}; write all files with one schema"
            for n in types
            if n in other and other[n] != types[n]
        ]
    if problems:
        raise InputError([*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])])
    return footers[0].schema.remove_metadata()


def _plain(schema: pa.Schema) -> pa.Schema:
    """Without what may differ between files: metadata, nullability, a dictionary's encoding."""
    return pa.schema([pa.field(f.name, value_type(f.type)) for f in schema])


def _columns(spec: ArrowDataset, schema: pa.Schema, given: Columns | None, need_label: bool) -> Columns:
    if given is None:
        roles = spec.roles()
        problems = ["label must name the column to predict, got none"] if need_label and roles.label is None else []
        columns, more = resolve(schema, roles)
        problems += more
    else:
        label, weight = spec.label or given.label, spec.weight or given.weight
        columns = replace(given, label=label if need_label else None, weight=weight if need_label else None)
        problems = matching(schema, columns)
    if problems:
        raise InputError(problems)
    return columns
