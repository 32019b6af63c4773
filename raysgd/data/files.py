"""Find the files of a data set and read their footers: Parquet and Arrow IPC on any pyarrow filesystem.

Nothing here imports ``pyarrow.dataset``: that costs 1.2 s and pandas in every actor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from posixpath import basename, commonpath, dirname, relpath
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from raysgd.data.columns import listing
from raysgd.errors import InputError

SUFFIXES = (".parquet", ".pq", ".arrow", ".feather", ".ipc")

#: A file of this name says that the data set of its directory is being written: it is not whole.
UNFINISHED = "_PREPARING"
_GLOB = re.compile(r"[*?\[]")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class Found:
    """Files to read: (path, path relative to the data set) in order, and names that were passed over."""

    filesystem: Any
    files: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Footer:
    """What a file's footer says.

    kind:       "parquet" or "ipc"
    size:       bytes of the file
    group_rows: rows of each row group (Parquet) or record batch (IPC)
    digest:     hex BLAKE2b of the footer's bytes
    """

    kind: str
    size: int
    group_rows: tuple[int, ...]
    digest: str
    schema: pa.Schema


def find_files(path: str | Sequence[str], filesystem: Any = None, suffixes: tuple[str, ...] = SUFFIXES) -> Found:
    """All data files under a path: a file, a directory, a glob, or a list of these.

    Directories are searched recursively; names that begin with ``_`` or ``.`` are skipped. Files are sorted by
    their path relative to the directory, to the part before the glob's first wildcard, or to what a list's files share.

    suffixes: what the names of data files in a directory end in, in small letters

    Raises InputError where something does not exist, is listed twice, is not yet whole, or no file is found.
    """
    single = isinstance(path, str | os.PathLike)
    paths = [os.fspath(path)] if isinstance(path, str | os.PathLike) else [os.fspath(p) for p in path]
    if not paths:
        raise InputError("path must name at least one file, got an empty list")
    located = [_locate(p, filesystem) for p in paths]
    if len({fs.type_name for fs, _ in located}) > 1:
        raise InputError(f"path must lie on one filesystem, got {listing(paths)}")
    fs = located[0][0]
    searches = [_search(fs, base, suffixes) for _, base in located]
    files = [f for search in searches for f in search[0]]
    ignored = [name for search in searches for name in search[1]]
    if len(set(files)) < len(files):
        twice = sorted({f for f in files if files.count(f) > 1})
        raise InputError(f"path names files twice: {listing(twice)}; list each once")
    if not files:
        other = f"; other files there: {listing(ignored, 5)}" if ignored else ""
        raise InputError(f"no {', '.join(suffixes)} file in {listing(paths, 5)}{other}")
    root = searches[0][2] if single else commonpath([dirname(f) for f in files])
    pairs = sorted(((f, relpath(f, root) if root else f) for f in files), key=lambda pair: pair[1])
    return Found(fs, tuple(pairs), tuple(ignored))


def _locate(path: str, filesystem: Any) -> tuple[Any, str]:
    if filesystem is not None:
        return filesystem, path.rstrip("/") or path
    if _SCHEME.match(path):
        return _from_uri(path)
    return LocalFileSystem(), os.path.abspath(os.path.expanduser(path))


def _from_uri(uri: str) -> tuple[Any, str]:
    # A wildcard is not allowed in a URI: cut it off, then put it back.
    wild = _GLOB.search(uri)
    base = uri if wild is None else uri[: uri.rindex("/", 0, wild.start())]
    try:
        fs, path = FileSystem.from_uri(base)
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise InputError(f"path {uri!r} cannot be opened: {error}") from error
    return fs, path.rstrip("/") + uri[len(base) :].rstrip("/")


def _search(fs: Any, path: str, suffixes: tuple[str, ...]) -> tuple[list[str], list[str], str]:
    """(files, ignored names, root) of one path."""
    try:
        info = fs.get_file_info(path)
        if info.type == FileType.Directory:
            return (*_inside(fs, path, suffixes), path)
        if info.type == FileType.File:
            return [path], [], dirname(path)
        if _GLOB.search(path):
            return _matching(fs, path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if os.path.islink(path) and isinstance(fs, LocalFileSystem):
        raise InputError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    if "working_dir_files" in path.split("/"):
        remedy = "files that git ignores are not uploaded; give an absolute path or a URI that every node can read"
        raise InputError(f"{path} does not exist in this Ray job's working directory: {remedy}")
    raise InputError(f"{path} does not exist")


def _inside(fs: Any, directory: str, suffixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    files: list[str] = []
    ignored: list[str] = []
    for path in [*_listed(fs, directory), *_dangling(fs, directory)]:
        inner = relpath(path, directory or ".") if directory else path
        if basename(path) == UNFINISHED:
            remedy = "`raysgd prepare` is writing it, or was ended: run it again"
            raise InputError(f"{dirname(path)} is not whole: {remedy}")
        if any(part.startswith(("_", ".")) for part in inner.split("/")):
            continue
        if path.lower().endswith(suffixes):
            files.append(path)
        else:
            ignored.append(inner)
    return files, ignored


def _listed(fs: Any, directory: str) -> list[str]:
    infos = fs.get_file_info(FileSelector(directory, recursive=True))
    return [i.path for i in infos if i.type == FileType.File]


def _dangling(fs: Any, directory: str) -> list[str]:
    # pyarrow's listing leaves them out without a word; opening them says what is wrong.
    if not isinstance(fs, LocalFileSystem):
        return []
    paths = [os.path.join(top, name) for top, _, names in os.walk(directory) for name in names]
    return [p for p in paths if os.path.islink(p) and not os.path.exists(p)]


def _matching(fs: Any, pattern: str) -> tuple[list[str], list[str], str]:
    root = dirname(pattern[: _GLOB.search(pattern).start()] + "x")  # type: ignore[union-attr]
    if fs.get_file_info(root).type != FileType.Directory:
        raise InputError(f"{pattern} matches nothing: {root} is not a directory")
    try:
        expression = re.compile(glob_expression(pattern))
    except re.error as error:
        raise InputError(f"{pattern} is no pattern of file names: {error}") from error
    files = [p for p in [*_listed(fs, root), *_dangling(fs, root)] if expression.fullmatch(p)]
    if not files:
        raise InputError(f"{pattern} matches no file")
    return [f for f in files if not basename(f).startswith(("_", "."))], [], root


def glob_expression(pattern: str) -> str:
    """The regular expression of a glob: ``*`` and ``?`` stay within a directory, ``**/`` crosses them.

    >>> import re
    >>> [bool(re.fullmatch(glob_expression("a/**/x*.pq"), p)) for p in ("a/x1.pq", "a/b/c/x.pq", "a/b/y.pq")]
    [True, True, False]
    """
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    out = []
    for token in tokens:
        if token.startswith("[") and len(token) > 2:
            out.append("[^" + token[2:] if token[1] == "!" else token)
        else:
            out.append(special.get(token) or re.escape(token))
    return "".join(out)


def read_footer(fs: Any, path: str) -> Footer:
    """Read and check one file's footer.

    Raises InputError where the file is empty, truncated, of another format, or gone.
    """
    try:
        with fs.open_input_file(path) as source:
            kind, content = footer_bytes(source, path)
            if kind == "ipc":
                return _ipc_footer(source, footer_digest(content))
            metadata = parquet_metadata(content)
            rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            return Footer(kind, source.size(), rows, footer_digest(content), metadata.schema.to_arrow_schema())
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist" + _link(path)) from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def _link(path: str) -> str:
    return f": it is a link to {os.readlink(path)}" if os.path.islink(path) else ""


def _ipc_footer(source: Any, digest: str) -> Footer:
    reader = pa.ipc.open_file(source)
    # A batch's row count stands only in front of the batch: decode its first column, nothing else.
    first = pa.ipc.IpcReadOptions(included_fields=[0])
    counter = pa.ipc.open_file(source, options=first)
    rows = tuple(counter.get_batch(i).num_rows for i in range(counter.num_record_batches))
    return Footer("ipc", source.size(), rows, digest, reader.schema)


def footer_digest(content: bytes) -> str:
    """Hex BLAKE2b of a footer."""
    return blake2b(content, digest_size=16).hexdigest()


@lru_cache(maxsize=8)
def parquet_metadata(footer: bytes) -> pq.FileMetaData:
    """The metadata of a Parquet footer. Given to ``ParquetFile``, it saves the read of the file's last 64 KiB."""
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"))


def footer_bytes(source: Any, path: str) -> tuple[str, bytes]:
    """("parquet" | "ipc", the footer) of an open file.

    Raises InputError where the first and last bytes are those of neither format.
    """
    size = source.size()
    if size == 0:
        raise InputError(f"{path} is empty (0 bytes)")
    source.seek(0)
    head = source.read(min(size, 8))
    tail = b""
    if size >= 12:
        source.seek(size - 10)
        tail = source.read(10)
    if head.startswith(b"PAR1") and tail.endswith(b"PAR1"):
        kind, length, trailer = "parquet", int.from_bytes(tail[2:6], "little"), 8
    elif head.startswith(b"ARROW1") and tail.endswith(b"ARROW1"):
        kind, length, trailer = "ipc", int.from_bytes(tail[:4], "little"), 10
    else:
        raise InputError(f"{path} {_foreign(head)}")
    if length + trailer > size:
        raise InputError(f"{path} is damaged: its footer claims {length} bytes of {size}")
    source.seek(size - trailer - length)
    content = source.read(length)
    source.seek(0)
    return kind, content


def _foreign(head: bytes) -> str:
    if head.startswith((b"PAR1", b"ARROW1")):
        return "is truncated: its footer is missing; write it again"
    if head.startswith(b"FEA1"):
        return "is Feather version 1, which cannot be used; write it again as Feather version 2"
    if head.startswith(b"PARE"):
        return "is encrypted Parquet, which cannot be used"
    if head.startswith(b"\xff\xff\xff\xff"):
        return "is an Arrow stream, which cannot be read by row group; write it as an Arrow file"
    return f"is neither Parquet nor Arrow IPC: it begins with {head!r}; `raysgd prepare` converts CSV and JSON lines"
