"""The ledger's lines of JSON, each chained to the one before it, so that no line can go, come again, move or change.

    {"line":8, ..., "sha":"9c1f5e02ab34d671"}     sha: of the line before, and of this one without its own

A writer that is killed leaves the beginning of a line after the last newline: it does not count, and is told from
whatever else may stand there. Lines that are cut off whole are missed by the manifests of checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from raysgd.errors import InputError
from raysgd.learn.parameters import Range
from raysgd.protocol.ledger import Line, Midway, Record, Rollback, fold

#: what the first line is chained to
NOTHING = "0" * 16

#: how many damaged lines are told one by one
TOLD = 20

_SHA = re.compile(r'"sha":"([0-9a-f]{16})"\}\Z')


def to_line(line: Line, number: int, before: str) -> str:
    """One line of JSON without its newline. number: counted from 1;  before: the ``sha`` of the line before"""
    fields: dict[str, Any] = {"line": number, "attempt": line.attempt, "timeline": line.timeline}
    if isinstance(line, Rollback):
        fields["rollback"] = line.step
    elif isinstance(line, Midway):
        fields["midway"] = line.step
    else:
        fields |= {"generation": line.generation, "shard": line.shard, "begin": line.begin, "end": line.end}
        if line.shards:
            fields["shards"] = line.shards
        fields |= {"rows": line.rows, "parts": [[n.begin, n.end, list(i)] for n, i in line.parts]}
    body = _dumps(fields)
    return f'{body[:-1]},"sha":"{sha256((before + body).encode()).hexdigest()[:16]}"}}'


def sha_of(text: str) -> str | None:
    """What a line says to be its ``sha``; None where it says none."""
    found = _SHA.search(text)
    return None if found is None else found[1]


def to_text(lines: Iterable[Line], number: int, before: str) -> tuple[str, str]:
    """What is appended after line ``number``, whose ``sha`` is ``before``: lines, and the ``sha`` of the last."""
    text = []
    for own, line in enumerate(lines, start=number + 1):
        text.append(to_line(line, own, before))
        before = sha_of(text[-1]) or NOTHING
    return "".join(f"{one}\n" for one in text), before


def from_line(text: str, number: int, before: str | None) -> Line:
    """The line that ``to_line`` wrote. InputError where it is not exactly that.

    before: None where the line before is so damaged that its ``sha`` is not known: this one's is then believed
    """
    try:
        fields = json.loads(text)
        line, own = _line(fields), _whole(fields["line"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError([f"not a line of a ledger ({error!r}): {_shown(text)}"]) from None
    if own != number:
        why = f"{own - number} before it are missing" if own > number else "it stands there again, or was moved"
        raise _MisplacedError(f"it is numbered {own}: {why}", own)
    if (to_line(line, number, before or NOTHING) if before else _resealed(line, number, text)) != text:
        raise InputError([f"damaged, its checksum or form is wrong, or the line before it is another: {_shown(text)}"])
    return line


class _MisplacedError(InputError):
    """A line of another number. ``own``: that number"""

    def __init__(self, problem: str, own: int) -> None:
        super().__init__([problem])
        self.own = own


def _resealed(line: Line, number: int, text: str) -> str:
    """The line as it would be written, with the ``sha`` that it has."""
    return _SHA.sub(f'"sha":"{sha_of(text)}"}}', to_line(line, number, NOTHING))


@dataclass(frozen=True)
class Parsed:
    """A whole ledger. lines: folded;  shas: of each line of the file;  torn: what follows the last newline, "" for none

    A torn line is one whose writing was interrupted: nothing that counts was in it.
    """

    lines: list[Line]
    shas: tuple[str, ...]
    torn: str

    @property
    def sha(self) -> str:
        return self.shas[-1] if self.shas else NOTHING


def parse(data: bytes) -> Parsed:
    """The lines of a whole ledger. InputError names each line that is damaged, missing, repeated or moved."""
    *texts, tail = data.decode("ascii", "backslashreplace").split("\n")
    lines: list[Line] = []
    shas: list[str] = []
    problems: list[str] = []
    before: str | None = NOTHING
    expected = 1
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(from_line(text, expected, before))
        except _MisplacedError as error:
            problems.append(f"line {number}: {error.problems[0]}")
            expected = error.own
        except InputError as error:
            problems.append(f"line {number}: {error.problems[0]}")
        before = sha_of(text)
        shas.append(before or "")
        expected += 1
    if tail and not _is_torn(tail, expected, before):
        problems.append(f"line {len(texts) + 1}: what follows the last newline is no beginning of it: {_shown(tail)}")
    if problems:
        more = [f"and {len(problems) - TOLD} lines more"] if len(problems) > TOLD else []
        raise InputError([*problems[:TOLD], *more])
    return Parsed(fold(lines), tuple(shas), tail)


def _partial(atoms: Iterable[str]) -> re.Pattern[str]:
    """What matches every beginning of these atoms in a row; zeros may follow, which a power cut can leave."""
    pattern = ""
    for atom in reversed(list(atoms)):
        pattern = f"(?:{atom}{pattern})?"
    return re.compile(f"{pattern}\0*\\Z")


def _atoms(*fields: str) -> list[str]:
    """``a=[0-9]+`` as the atoms of ``,"a":[0-9]+``."""
    found = []
    for field in fields:
        name, _, value = field.partition("=")
        found += [*(re.escape(c) for c in f',"{name}":'), *(f"(?:{v})" for v in value.split("&"))]
    return found


_NUMBER = "[0-9]+"
_COMMON = _atoms(f"attempt={_NUMBER}", f"timeline={_NUMBER}")
_END = [*_atoms('sha="'), *["[0-9a-f]"] * 16, '"', r"\}"]
_FORMS = [_partial([*_COMMON, *_atoms(f"{name}={_NUMBER}"), *_END]) for name in ("rollback", "midway")] + [
    _partial(
        [
            *_COMMON,
            *_atoms(*(f"{name}={_NUMBER}" for name in ("generation", "shard", "begin", "end", *shards, "rows"))),
            *_atoms(r"parts=\[&\[[\[\],0-9]*"),
            *_END,
        ]
    )
    for shards in ((), ("shards",))
]


def _is_torn(tail: str, number: int, before: str | None) -> bool:
    """Whether this is the beginning of line ``number``, as a writer that is killed leaves it; or all of it."""
    head = f'{{"line":{number}'
    if not tail.startswith(head):
        return head.startswith(tail.rstrip("\0"))
    if sha_of(tail) is None:
        return any(form.match(tail, len(head)) for form in _FORMS)
    try:
        from_line(tail, number, before)
    except InputError:
        return False
    return True


def _line(fields: dict[str, Any]) -> Line:
    if "rollback" in fields:
        return Rollback(*(_whole(fields[name]) for name in ("attempt", "timeline", "rollback")))
    if "midway" in fields:
        return Midway(*(_whole(fields[name]) for name in ("attempt", "timeline", "midway")))
    parts = tuple(
        (Range(_whole(begin), _whole(end)), tuple(map(_whole, incarnations)))
        for begin, end, incarnations in fields["parts"]
    )
    numbers = {
        name: _whole(fields[name]) for name in ("attempt", "generation", "timeline", "shard", "begin", "end", "rows")
    }
    return Record(parts=parts, **numbers, shards=_whole(fields.get("shards", 0)))


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"not a whole number: {value!r}")
    return value


def _dumps(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"), allow_nan=False)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:120]}...")
