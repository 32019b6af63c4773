"""A file of rows that appears whole or not at all: Parquet, Arrow IPC or CSV, written batch by batch."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, FileType, LocalFileSystem

from raysgd.errors import InputError

#: The suffixes that :class:`RowFile` can write.
SUFFIXES = (".parquet", ".arrow", ".feather", ".csv")


class RowFile:
    """A context manager: ``write`` batches of ``schema``; the file ``out`` is there when the block ends well.

    out: a local path or a URI that ends in one of :data:`SUFFIXES`; replaced where it exists
    schema: of every batch

    Raises InputError as :func:`target` does, and where the format cannot hold a column's type.
    """

    def __init__(self, out: str, schema: pa.Schema) -> None:
        self._out = out
        self._schema = schema
        self._filesystem, self._path = target(out)
        directory, slash, name = self._path.rpartition("/")
        # A leading dot: whoever reads the directory meanwhile passes it over.
        self._temporary = f"{directory}{slash}.{name}.{secrets.token_hex(4)}.tmp"
        self._stream: Any = None
        self._writer: Any = None

    def __enter__(self) -> RowFile:
        try:
            self._stream = self._filesystem.open_output_stream(self._temporary)
            self._writer = self._new_writer()
        except (pa.ArrowException, OSError) as error:
            self._discard()
            raise InputError(f"{self._out} cannot be written: {error}") from error
        return self

    def _new_writer(self) -> Any:
        suffix = PurePosixPath(self._path).suffix
        if suffix == ".parquet":
            return pq.ParquetWriter(self._stream, self._schema)
        if suffix == ".csv":
            return pa.csv.CSVWriter(self._stream, self._schema)
        return pa.ipc.new_file(self._stream, self._schema)

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds the rows of ``batch``."""
        try:
            self._writer.write_batch(batch)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise InputError(f"{self._out} cannot hold these columns: {error}") from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._close()
                self._filesystem.move(self._temporary, self._path)
        finally:
            self._discard()

    def _close(self) -> None:
        """Closes what is open, each once, also where closing fails."""
        for name in ("_writer", "_stream"):
            part = getattr(self, name)
            setattr(self, name, None)
            if part is not None:
                part.close()

    def _discard(self) -> None:
        """Deletes what is not the finished file; a full disk does not stop that."""
        for _ in range(2):  # the stream stays open where closing the writer fails
            with contextlib.suppress(OSError, pa.ArrowException):
                self._close()
        if self._filesystem.get_file_info(self._temporary).type == FileType.File:
            self._filesystem.delete_file(self._temporary)


def target(out: str) -> tuple[Any, str]:
    """The filesystem of a file to be written and its path there.

    Raises InputError where the suffix is none of :data:`SUFFIXES`, the local directory does not exist, or a
    directory has that name.

    >>> target("late.xlsx")
    Traceback (most recent call last):
        ...
    raysgd.errors.InputError: late.xlsx must end in one of .parquet, .arrow, .feather, .csv
    """
    if PurePosixPath(out).suffix not in SUFFIXES:
        raise InputError(f"{out} must end in one of {', '.join(SUFFIXES)}")
    filesystem, path = _located(out)
    if isinstance(filesystem, LocalFileSystem) and not os.path.isdir(os.path.dirname(path)):
        raise InputError(f"the directory of {out} does not exist: create it first")
    if filesystem.get_file_info(path).type == FileType.Directory:
        raise InputError(f"{out} is a directory: give the name of a file in it")
    return filesystem, path


def _located(out: str) -> tuple[Any, str]:
    if "://" not in out:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(out))
    try:
        filesystem, path = FileSystem.from_uri(out)
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise InputError(f"{out} names no storage that can be opened: {error}") from error
    return filesystem, str(path)
