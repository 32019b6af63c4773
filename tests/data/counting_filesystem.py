"""A local filesystem that counts which bytes of its files are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs


class Reads:
    """(begin, end) of every read, and how many files were opened."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.opened = 0

    def clear(self) -> None:
        self.ranges.clear()
        self.opened = 0

    def row_groups(self, path: Path) -> set[int]:
        """The row groups of a Parquet file of which some column's bytes were read."""
        metadata = pq.ParquetFile(path).metadata
        touched = set()
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            for c in map(group.column, range(group.num_columns)):
                begin = c.dictionary_page_offset or c.data_page_offset
                # The footer's first read and the magic bytes may brush a group: only the inside of a chunk counts.
                if any(a < begin + c.total_compressed_size and begin < b for a, b in self.ranges if b - a > 8):
                    touched.add(g)
        return touched


class _CountedFile:
    def __init__(self, path: str, reads: Reads) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._reads = reads
        reads.opened += 1

    def read(self, size: int = -1) -> bytes:
        begin = self._file.tell()
        content = self._file.read(size)
        self._reads.ranges.append((begin, begin + len(content)))
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Counting(fs.FSSpecHandler):  # its other methods are not called
    def __init__(self, root: Path, reads: Reads) -> None:
        self._root = root
        self._reads = reads
        self._local = fs.LocalFileSystem()

    def get_type_name(self) -> str:
        return "counting"

    def _info(self, info: fs.FileInfo) -> fs.FileInfo:
        return fs.FileInfo(str(Path(info.path).relative_to(self._root)), info.type, size=info.size)

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._info(self._local.get_file_info(str(self._root / p))) for p in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        inner = fs.FileSelector(str(self._root / selector.base_dir), recursive=selector.recursive)
        return [self._info(i) for i in self._local.get_file_info(inner)]

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_CountedFile(str(self._root / path), self._reads), mode="r")


def counting_filesystem(root: Path) -> tuple[fs.PyFileSystem, Reads]:
    """A filesystem over the directory ``root``, and the record of what is read through it."""
    reads = Reads()
    return fs.PyFileSystem(_Counting(root, reads)), reads
