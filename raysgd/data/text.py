r"""CSV and JSON lines in pieces of whole lines: read one, as a table of given or of inferred types.

    file   |aaaa\nbb|bb\ncc\n|d...        a piece is a range of bytes; it has the lines that begin in it
    piece  |   0    |   1    |  2

What cannot be parsed is refused with file, line and column: the line is found by halving the piece.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from raysgd.errors import InputError

#: What the names of such files end in; the compressed ones are read as a whole.
CSV_SUFFIXES, JSON_SUFFIXES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

#: Bytes of the longest line, and of the largest file that must be read as a whole.
MAX_LINE, MAX_WHOLE = 64 << 20, 1 << 30

#: Bytes of a file's beginning that are looked through for whole numbers with leading zeros.
ZEROS_BYTES = 1 << 20

_LEADING_ZERO = r"^\s*[+-]?0\d"
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of lines. names: of a CSV file's columns, from its first line; () for JSON lines

    compression: as pyarrow names it, None where the file is plain
    """

    path: str
    relative: str
    size: int
    mtime_ns: int
    names: tuple[str, ...] = ()
    compression: str | None = None


@dataclass(frozen=True, slots=True)
class TextPiece:
    """The lines of ``file`` that begin in the bytes [begin, end)."""

    file: TextFile
    begin: int
    end: int


@dataclass(frozen=True)
class Dialect:
    """How lines become columns.

    kind: "csv" or "json";  delimiter: between the values of a CSV line
    newlines_in_values: quoted values may span lines, so that files are read as a whole
    missing_text: in CSV columns of text, empty values, NA, null and the like are missing, too
    types: by column, what the user says that it is
    """

    kind: str
    delimiter: str = ","
    newlines_in_values: bool = False
    missing_text: bool = False
    types: Mapping[str, pa.DataType] = field(default_factory=dict)


@dataclass(frozen=True)
class Guess:
    """What a column of a piece looks like.

    numbers, values: how many values are numbers, of how many that are there
    odd: of the first value that is no number: its line in the piece, from 0, and the value
    zeros: the first value with leading zeros, which a whole number loses; looked for at the beginning of a CSV file
    """

    type: pa.DataType
    numbers: int = 0
    values: int = 0
    odd: tuple[int, str] | None = None
    zeros: str | None = None


def pieces_of(file: TextFile, dialect: Dialect, piece_bytes: int) -> list[TextPiece]:
    """The pieces of a file: as long as ``piece_bytes``, whoever reads them."""
    if file.compression or dialect.newlines_in_values:
        if file.size > MAX_WHOLE:
            why = "compressed" if file.compression else "--newlines-in-values"
            raise InputError(f"{file.path} has {file.size:,} bytes, of at most {MAX_WHOLE:,} ({why}): split it")
        return [TextPiece(file, 0, file.size)]
    return [TextPiece(file, at, min(at + piece_bytes, file.size)) for at in range(0, file.size, piece_bytes)]


def header(fs: Any, path: str, compression: str | None, delimiter: str) -> tuple[str, ...]:
    """The column names in the first line of a CSV file. Raises InputError where names are empty or the same."""
    with _stream(fs, path, compression) as stream:
        first = b""
        while b"\n" not in first and len(first) < MAX_LINE and (more := stream.read(1 << 16)):
            first += more
    line = _decoded(first.partition(b"\n")[0].removeprefix(_BYTE_ORDER_MARK).rstrip(b"\r"), f"{path}, line 1")
    names = next(csv.reader([line], delimiter=delimiter), [])
    if not names:
        raise InputError(f"{path}, line 1: the names of the columns were expected, got an empty line")
    if bad := [n for n in dict.fromkeys(names) if not n or names.count(n) > 1]:
        found = ", ".join(f"{n!r} {names.count(n)} times" for n in bad)
        raise InputError(f"{path}, line 1: column names must be there and differ, got {found}")
    return tuple(names)


def read_lines(fs: Any, piece: TextPiece) -> tuple[int, bytes]:
    """The offset and the bytes of a piece's lines, without a CSV file's first line.

    Raises InputError where the file changed, or a line is longer than ``MAX_LINE``.
    """
    file = piece.file
    if file.compression:
        with _stream(fs, file.path, file.compression) as stream:
            data = stream.read(MAX_WHOLE + 1)
        if len(data) > MAX_WHOLE:
            raise InputError(f"{file.path} has more than {MAX_WHOLE:,} bytes when decompressed: split it")
        start = 0
    else:
        start, data = _range(fs, piece)
    if piece.begin == 0:
        skipped = 0
        if data.startswith(_BYTE_ORDER_MARK):
            skipped = len(_BYTE_ORDER_MARK)
        if file.names:
            skipped = data.find(b"\n") + 1 or len(data)
        start, data = start + skipped, data[skipped:]
    return start, data


def _range(fs: Any, piece: TextPiece) -> tuple[int, bytes]:
    path, begin, end = piece.file.path, piece.begin, piece.end
    at = max(0, begin - 1)  # whether a line begins at ``begin`` is told by the byte before
    with fs.open_input_file(path) as source:
        if source.size() != piece.file.size:
            raise InputError(f"{path} changed while it was in use; start again")
        source.seek(at)
        parts = [source.read(end - at)]
        more = b"" if parts[0].endswith(b"\n") else source.read(1 << 16)
        while more:
            cut = more.find(b"\n") + 1
            parts.append(more[:cut] if cut else more)
            if sum(map(len, parts)) - (end - at) > MAX_LINE:
                raise InputError(f"{path}: a line is longer than {MAX_LINE:,} bytes; is this a text file of lines?")
            more = b"" if cut else source.read(1 << 16)
    data = b"".join(parts)
    cut = data.find(b"\n") + 1 or len(data) if begin else 0
    return at + cut, data[cut:]


def infer(fs: Any, piece: TextPiece, dialect: Dialect) -> tuple[int, int, dict[str, Guess]]:
    """(rows, bytes in memory, what each column looks like) of a piece. Raises InputError with file, line, column."""
    start, data = read_lines(fs, piece)
    table = _parsed(fs, piece, dialect, start, data, None)
    if dialect.kind == "csv" and any(pa.types.is_binary(f.type) for f in table.schema):
        _refuse_bytes(fs, piece, start, data)
    lines = None if dialect.newlines_in_values else _line_numbers(data)
    guesses = {
        f.name: _guess(table.column(f.name), lines, given=f.name in dialect.types or dialect.kind == "json")
        for f in table.schema
    }
    if dialect.kind == "csv" and piece.begin == 0:
        whole = [f.name for f in table.schema if pa.types.is_integer(f.type) and f.name not in dialect.types]
        for name, value in _leading_zeros(data, piece.file.names, dialect, whole).items():
            guesses[name] = replace(guesses[name], zeros=value)
    return table.num_rows, table.nbytes, guesses


def _leading_zeros(data: bytes, names: tuple[str, ...], dialect: Dialect, columns: list[str]) -> dict[str, str]:
    """Of columns of whole numbers, the first value with leading zeros near the beginning of the data."""
    if not columns:
        return {}
    head = data if len(data) <= ZEROS_BYTES else data[: data.rfind(b"\n", 0, ZEROS_BYTES) + 1]
    try:
        table = parse(head, names, replace_types(dialect, dict.fromkeys(columns, pa.string())), None)
    except pa.ArrowException:  # a quoted value spans the cut
        return {}
    found = {}
    for name in columns:
        texts = table.column(name)
        led = texts.filter(pc.match_substring_regex(texts, _LEADING_ZERO))
        if len(led):
            found[name] = led[0].as_py()
    return found


def read(fs: Any, piece: TextPiece, dialect: Dialect, schema: pa.Schema) -> pa.Table:
    """The rows of a piece, with exactly the columns of ``schema``. Raises InputError with file, line and column."""
    start, data = read_lines(fs, piece)
    return _parsed(fs, piece, dialect, start, data, schema)


def line_of(fs: Any, file: TextFile, offset: int, line: int) -> int:
    """The number, from 1, of the line that is ``line`` lines after ``offset``."""
    with _stream(fs, file.path, file.compression) as stream:
        found = line + 1
        while offset > 0 and (data := stream.read(min(offset, 1 << 20))):
            found += data.count(b"\n")
            offset -= len(data)
    return found


def _guess(column: pa.ChunkedArray, lines: Any, given: bool) -> Guess:
    kind, there = column.type, len(column) - column.null_count
    if given or not pa.types.is_string(kind):
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        return Guess(kind, there if number else 0, there)
    number = pc.match_substring_regex(column, _NUMBER).fill_null(False).to_numpy()
    filled = ~pc.is_in(column, value_set=pa.array(pa.csv.ConvertOptions().null_values)).to_numpy()
    filled &= column.is_valid().to_numpy()
    odd = np.flatnonzero(filled & ~number)
    first = None
    if len(odd):
        row = int(odd[0])
        first = (row if lines is None else int(lines[row]), column[row].as_py())
    return Guess(kind, int(number.sum()), int(filled.sum()), first)


def _parsed(fs: Any, piece: TextPiece, dialect: Dialect, start: int, data: bytes, schema: pa.Schema | None) -> pa.Table:
    try:
        table = parse(data, piece.file.names, dialect, schema)
    except pa.ArrowException as error:
        raise InputError(_explained(fs, piece, dialect, start, data, schema, error)) from None
    if not dialect.newlines_in_values and table.num_rows != (lines := len(_line_numbers(data))):
        what = "a quoted value spans lines: --newlines-in-values reads files as a whole"
        what = "each line must hold one object" if dialect.kind == "json" else what
        at = line_of(fs, piece.file, start, 0)
        raise InputError(f"{piece.file.path}, from line {at} on: {lines:,} lines have {table.num_rows:,} rows; {what}")
    return table


def parse(data: bytes, names: tuple[str, ...], dialect: Dialect, schema: pa.Schema | None) -> pa.Table:
    """Lines as a table; schema: of the result, None: types are inferred where the dialect does not give them."""
    if not data.strip():
        return (schema or pa.schema([(n, dialect.types.get(n, pa.null())) for n in names])).empty_table()
    if dialect.kind == "csv":
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            read_options=pa.csv.ReadOptions(use_threads=False, column_names=names, block_size=len(data) + 1),
            parse_options=pa.csv.ParseOptions(
                delimiter=dialect.delimiter, newlines_in_values=dialect.newlines_in_values
            ),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict(dialect.types) if schema is None else {f.name: f.type for f in schema},
                strings_can_be_null=dialect.missing_text,
                quoted_strings_can_be_null=False,
            ),
        )
        return table if schema is None else table.select(schema.names)
    given = pa.schema(list(dialect.types.items())) if schema is None else schema
    table = pa.json.read_json(
        pa.BufferReader(data),
        read_options=pa.json.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pa.json.ParseOptions(
            explicit_schema=given, unexpected_field_behavior="infer" if schema is None else "error"
        ),
    )
    return table if schema is None else table.select(schema.names)


def _explained(
    fs: Any,
    piece: TextPiece,
    dialect: Dialect,
    start: int,
    data: bytes,
    schema: pa.Schema | None,
    error: pa.ArrowException,
) -> str:
    """The sentence about the first line that cannot be parsed."""
    lines = data.split(b"\n")

    def fails(count: int) -> pa.ArrowException | None:
        try:
            parse(b"\n".join(lines[:count]), piece.file.names, dialect, schema)
        except pa.ArrowException as found:
            return found
        return None

    good, bad = 0, len(lines)
    while bad - good > 1:
        middle = (good + bad) // 2
        if (found := fails(middle)) is None:
            good = middle
        else:
            bad, error = middle, found
    where = f"{piece.file.path}, line {line_of(fs, piece.file, start, bad - 1)}"
    column, why = _column_of(dialect, piece.file.names, lines[bad - 1], schema, str(error))
    return f"{where}{'' if column is None else f', column {column!r}'}: {why}"


def _column_of(
    dialect: Dialect, names: tuple[str, ...], line: bytes, schema: pa.Schema | None, message: str
) -> tuple[str | None, str]:
    """Which column of the line the message is about, and the message without what is said already."""
    if found := re.match(r"In CSV column #(\d+): (?:Row #\d+: )?(.*)", message, re.DOTALL):
        return names[int(found[1])], found[2]
    short = re.sub(r"^(?:CSV|JSON) parse error: (?:Row #\d+: )?", "", message)
    short = re.sub(r" in row \d+$", "", short)[:300]
    if found := re.match(r"Column\(/([^)]*)\) (.*)", short, re.DOTALL):
        return found[1], found[2]
    if dialect.kind == "json":
        fields = dict(dialect.types) if schema is None else {f.name: f.type for f in schema}
        alone = partial(replace_types, dialect)
        return _json_column(line, fields, alone, others_allowed=schema is None), short
    return None, short


def _json_column(
    line: bytes,
    fields: Mapping[str, pa.DataType],
    alone: Callable[[dict[str, pa.DataType]], Dialect],
    others_allowed: bool,
) -> str | None:
    """The first column of an object that is not of its type, or has none though all must."""
    try:
        given = json.loads(line)
    except ValueError:
        return None
    for name in given if isinstance(given, dict) else ():
        if name not in fields:
            if others_allowed:
                continue
            return str(name)
        try:
            parse(json.dumps({name: given[name]}).encode(), (), alone({name: fields[name]}), None)
        except pa.ArrowException:
            return str(name)
    return None


def replace_types(dialect: Dialect, types: Mapping[str, pa.DataType]) -> Dialect:
    """The same dialect, with these types."""
    return replace(dialect, types=types)


def _refuse_bytes(fs: Any, piece: TextPiece, start: int, data: bytes) -> None:
    for number, line in enumerate(data.split(b"\n")):
        try:
            line.decode()
        except UnicodeDecodeError:
            where = f"{piece.file.path}, line {line_of(fs, piece.file, start, number)}"
            raise InputError(f"{where}: no UTF-8 text; convert the file") from None


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise InputError(f"{where}: no UTF-8 text; convert the file") from None


def _line_numbers(data: bytes) -> np.ndarray[Any, np.dtype[np.intp]]:
    """The lines, from 0, that are not blank."""
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    begins = np.concatenate([[0], ends + 1])
    stops = np.concatenate([ends, [len(data)]])
    length = stops - begins
    carriage = np.zeros(len(length), np.bool_)
    one = length == 1
    carriage[one] = np.frombuffer(data, np.uint8)[begins[one]] == ord("\r")
    return np.flatnonzero((length > 0) & ~carriage)


def _stream(fs: Any, path: str, compression: str | None) -> Any:
    return fs.open_input_stream(path, compression=compression)
