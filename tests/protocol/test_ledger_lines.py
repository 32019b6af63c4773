"""The ledger's lines: they come back, and no damage passes through, whichever line it befalls."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysgd.errors import InputError
from raysgd.learn.parameters import Range
from raysgd.protocol.ledger import Line, Midway, Record, Rollback, fold
from raysgd.protocol.ledger_lines import NOTHING, TOLD, from_line, parse, sha_of, to_line, to_text

PARTS = ((Range(0, 4), (12, 1, 3, 4)), (Range(4, 8), (2, 2, 2, 2)))
RECORD = Record(0, 0, 0, 1, 3, 17, PARTS, 448)
LINES = [
    Record(0, 0, 0, 0, 0, 9, PARTS, 288, 2),
    RECORD,
    Midway(0, 0, 9),
    Rollback(1, 1, 8),
    Record(1, 2, 1, 0, 8, 19, PARTS, 352, 2),
    Record(1, 0, 1, 0, 19, 20, ((Range(0, 8), (1,) * 8),), 32, 2),
]


def made(lines: list[Line]) -> bytes:
    return to_text(lines, 0, NOTHING)[0].encode()


WHOLE = made(LINES)
ROWS = WHOLE.splitlines(keepends=True)

numbers = st.integers(0, 2**40)
nodes = st.tuples(st.builds(lambda b, n: Range(b, b + n), st.integers(0, 99), st.integers(1, 9)), st.tuples(numbers))
records = st.builds(
    Record, *[numbers] * 4, numbers, numbers, st.lists(nodes, max_size=3).map(tuple), numbers, st.integers(0, 9)
)
a_line = records | st.builds(Rollback, *[numbers] * 3) | st.builds(Midway, *[numbers] * 3)
a_ledger = st.lists(a_line, max_size=8, unique=True)


def refusal(data: bytes) -> list[str]:
    """What a ledger is refused with; [] where it is taken."""
    try:
        parse(data)
    except InputError as error:
        return list(error.problems)
    return []


# -- whole ledgers


@settings(deadline=None)
@given(a_ledger, st.integers(0, 8))
def test_lines_come_back(lines: list[Line], cut: int) -> None:
    """Written at once or in two goes: the same text."""
    first, sha = to_text(lines[:cut], 0, NOTHING)
    second, last = to_text(lines[cut:], len(lines[:cut]), sha)
    text = (first + second).encode()
    found = parse(text)
    assert (text, last) == (made(lines), found.sha)
    assert (found.lines, len(found.shas), found.torn) == (fold(lines), len(lines), "")


def test_an_empty_ledger_is_one() -> None:
    found = parse(b"")
    assert (found.lines, found.shas, found.sha, found.torn) == ([], (), NOTHING, "")


def test_a_record_that_has_grown_replaces_its_shorter_form() -> None:
    grown = Record(0, 0, 0, 1, 3, 20, PARTS, 544)
    assert parse(made([RECORD, Rollback(0, 1, 2), grown])).lines == [grown, Rollback(0, 1, 2)]


# -- damage

DAMAGE: dict[str, Callable[[int], list[bytes]]] = {
    "removed": lambda i: [*ROWS[:i], *ROWS[i + 1 :]],
    "repeated": lambda i: [*ROWS[: i + 1], *ROWS[i:]],
    "repeated at the end": lambda i: [*ROWS, ROWS[i]],
    "all from it on repeated": lambda i: [*ROWS, *ROWS[i:]],
    "swapped with the next": lambda i: [*ROWS[:i], *reversed(ROWS[i : i + 2]), *ROWS[i + 2 :]],
    "all from it on reversed": lambda i: [*ROWS[:i], *reversed(ROWS[i:])],
    "cut short": lambda i: [*ROWS[:i], ROWS[i][:-7] + b"\n", *ROWS[i + 1 :]],
    "its newline lost": lambda i: [*ROWS[:i], ROWS[i][:-1], *ROWS[i + 1 :]],
    "an empty line before it": lambda i: [*ROWS[:i], b"\n", *ROWS[i:]],
    "that of another ledger": lambda i: [*ROWS[:i], made([*LINES[:i], Rollback(9, 9, 9)]).splitlines(True)[i]],
}

#: at the last line these are cuts that only the manifest of a checkpoint tells of, and nothing else
HARMLESS = {("removed", 5), ("its newline lost", 5), ("swapped with the next", 5), ("all from it on reversed", 5)}
#: where the damage shows, from the line that it befalls
AFTER = {"repeated": 1}


@pytest.mark.parametrize("i", range(len(ROWS)))
@pytest.mark.parametrize("name", DAMAGE, ids=lambda name: name.replace(" ", "-"))
def test_each_damage_of_each_line_is_told_by_its_number(name: str, i: int) -> None:
    damaged = b"".join(DAMAGE[name](i))
    if name == "that of another ledger":
        assert refusal(damaged) == []  # by itself it is a ledger, cut off there
        damaged += b"".join(ROWS[i + 1 :]) or ROWS[i]
        where = i + 2
    elif (name.endswith("repeated") and name != "repeated") or name == "repeated at the end":
        where = len(ROWS) + 1
    else:
        where = i + 1 + AFTER.get(name, 0)
    if (name, i) in HARMLESS:
        assert refusal(damaged) == []
    else:
        assert refusal(damaged)[0].startswith(f"line {where}: "), refusal(damaged)


@pytest.mark.parametrize("i", range(len(ROWS)))
def test_each_byte_of_each_line_counts(i: int) -> None:
    """Each flipped in three bits, and each gone: told by the number of the line."""
    line = ROWS[i]
    for at in range(len(line) - 1):
        for bit in (0, 3, 7):
            flipped = line[:at] + bytes([line[at] ^ 1 << bit]) + line[at + 1 :]
            assert refusal(b"".join([*ROWS[:i], flipped, *ROWS[i + 1 :]]))[0].startswith(f"line {i + 1}: ")
        gone = line[:at] + line[at + 1 :]
        assert refusal(b"".join([*ROWS[:i], gone, *ROWS[i + 1 :]]))[0].startswith(f"line {i + 1}: ")


@settings(deadline=None)
@given(a_ledger.filter(lambda lines: len(lines) > 1), st.randoms(use_true_random=False))
def test_lines_in_any_other_order_are_refused(lines: list[Line], chance: random.Random) -> None:
    """Any lines of a ledger in any number, but for its beginnings."""
    rows = made(lines).splitlines(keepends=True)
    drawn = chance.choices(rows, k=chance.randint(1, 2 * len(rows)))
    assert (refusal(b"".join(drawn)) == []) == (drawn == rows[: len(drawn)])


@settings(deadline=None)
@given(a_ledger.filter(bool), st.data())
def test_any_other_byte_anywhere_is_refused(lines: list[Line], data: st.DataObject) -> None:
    whole = made(lines)
    at = data.draw(st.integers(0, len(whole) - 2))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[at]))
    assert refusal(whole[:at] + bytes([other]) + whole[at + 1 :])
    assert refusal(whole[:at] + bytes([other]) + whole[at:])


def test_every_damaged_line_is_told_but_not_without_end() -> None:
    lines: list[Line] = [Rollback(0, i, i) for i in range(50)]
    rows = made(lines).splitlines(keepends=True)
    rows[3], rows[40] = rows[3].replace(b"rollback", b"rollbacc"), rows[40].replace(b'"attempt":0', b'"attempt":1')
    told = refusal(b"".join(rows))
    assert [one.partition(":")[0] for one in told] == ["line 4", "line 41"]
    told = refusal(b"".join(row.replace(b"rollback", b"rollbacc") for row in rows))
    assert [*told[TOLD - 1 :]] == [told[TOLD - 1], f"and {50 - TOLD} lines more"]
    assert told[TOLD - 1].startswith(f"line {TOLD}: ")


# -- a line whose writing was interrupted


@pytest.mark.parametrize("i", range(len(ROWS)))
def test_a_torn_last_line_is_told_from_garbage(i: int) -> None:
    before, line = b"".join(ROWS[:i]), ROWS[i]
    for cut in range(1, len(line)):
        found = parse(before + line[:cut])
        assert (found.lines, found.torn) == (fold(LINES[:i]), line[:cut].decode())
        assert parse(before + line[:cut] + b"\0" * 9).torn, "a power cut can leave zeros"
        # only the beginning of this very line: not of another one, and no other text
        if cut > len('{"line":'):
            other = made([Rollback(0, n, 0) for n in range(1, 9)]).splitlines()[(i + 1) % 8][:cut]
            assert refusal(before + other)[0].startswith(f"line {i + 1}: what follows the last newline")
        for garbage in (line[:cut] + b"x", b" " + line[:cut], line[:cut] + b"\xff"):
            assert refusal(before + garbage)[0].startswith(f"line {i + 1}: "), garbage
    for garbage in (b"garbage", b"{", b"[]", b"\r", line[:-2] + b"x"):
        assert (refusal(before + garbage) == []) == (garbage == b"{"), garbage


def test_a_whole_line_without_its_newline_must_be_the_next() -> None:
    before, line = b"".join(ROWS[:3]), ROWS[3][:-1]
    assert parse(before + line).lines == fold(LINES[:3])
    assert refusal(before + line.replace(b'"rollback":8', b'"rollback":9'))
    assert refusal(before + ROWS[2][:-1])


# -- single lines


def sealed(fields: dict[str, object]) -> str:
    """A line whose checksum is right, whatever it says."""
    body = json.dumps(fields, separators=(",", ":"))
    return json.dumps({**fields, "sha": sha256((NOTHING + body).encode()).hexdigest()[:16]}, separators=(",", ":"))


GOOD = json.loads(to_line(RECORD, 1, NOTHING))
del GOOD["sha"]


@pytest.mark.parametrize(
    "fields",
    [
        {**GOOD, "begin": -1},
        {**GOOD, "begin": 3.0},
        {**GOOD, "begin": "3"},
        {**GOOD, "begin": True},
        {**GOOD, "begin": None},
        {**GOOD, "more": 1},
        {**GOOD, "line": "1"},
        {**GOOD, "parts": [[0, 4]]},
        {**GOOD, "parts": [[0, 4, 1]]},
        {**GOOD, "parts": {"0": 1}},
        {**GOOD, "parts": [[0, 4, ["1", 1, 1, 1]]]},
        {k: v for k, v in GOOD.items() if k != "rows"},
        {k: v for k, v in GOOD.items() if k != "line"},
        {"line": 1, "attempt": 0, "timeline": 1, "rollback": -1},
        {"line": 1, "attempt": 0, "rollback": 1},
        {},
    ],
)
def test_what_no_ledger_says_is_refused(fields: dict[str, object]) -> None:
    assert from_line(sealed(GOOD), 1, NOTHING) == RECORD
    for before in (NOTHING, None):
        with pytest.raises(InputError, match=r"not a line of a ledger|damaged"):
            from_line(sealed(fields), 1, before)


def test_after_a_line_that_cannot_be_read_the_form_still_counts() -> None:
    text = to_line(RECORD, 4, "1" * 16)
    assert from_line(text, 4, None) == RECORD
    with pytest.raises(InputError, match="damaged"):
        from_line(text, 4, NOTHING)
    with pytest.raises(InputError, match="not a line"):
        from_line(text[:-1], 4, None)
    with pytest.raises(InputError, match="damaged"):
        from_line(text.replace(":", ": ", 1), 4, None)
    with pytest.raises(InputError, match="damaged"):
        from_line(text.replace(f',"sha":"{sha_of(text)}"', ""), 4, None)


@pytest.mark.parametrize("text", ["", "[]", "null", "7", '"line"', "[" * 10_000, "NaN"])
def test_what_is_no_line_is_refused_briefly(text: str) -> None:
    with pytest.raises(InputError, match="not a line of a ledger") as caught:
        from_line(text, 1, NOTHING)
    assert len(str(caught.value)) < 300


@settings(deadline=None)
@given(st.binary())
def test_no_bytes_break_the_reader(data: bytes) -> None:
    assert refusal(b"x" + data)
    assert refusal(data + b"\n")
