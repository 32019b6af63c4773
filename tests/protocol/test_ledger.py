"""The ledger: records that grow, and a checker that finds what is planted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysgd.data.sampler import Sampler
from raysgd.learn.batch import Int64
from raysgd.learn.parameters import Range
from raysgd.protocol.gate import Commit
from raysgd.protocol.ledger import (
    Line,
    Midway,
    Parts,
    Record,
    Rollback,
    check,
    dealt,
    entry,
    extend,
    fold,
    rollback,
    surviving,
)
from raysgd.protocol.ledger_lines import NOTHING, parse, to_text
from raysgd.protocol.membership import deal

V = 8
STEPS = 20
N_SHARDS = 2


@cache
def sampler() -> Sampler:
    return Sampler([20, 1, 25, 15], V, V, seed=3, window_rows=9)


def parts(n_workers: int, incarnation: int) -> Parts:
    return tuple((run, (incarnation,) * len(run)) for run in deal(V, n_workers))


def commit(step: int, made_of: Parts) -> Commit:
    rows = sampler().rows_in_step(step)
    told = tuple((node, incarnations, rows if i == 0 else 0) for i, (node, incarnations) in enumerate(made_of))
    return Commit(step, 0.0, rows, 0.1, told)


def record(begin: int, end: int, shard: int = 0, n_workers: int = 2, incarnation: int = 1, timeline: int = 0) -> Record:
    rows = sum(sampler().rows_in_step(step) for step in range(begin, end))
    return Record(0, 0, timeline, shard, begin, end, parts(n_workers, incarnation), rows)


def history(seed: int) -> list[Line]:
    """A run as a correct one writes it: shards a step apart, new assignments, servers replaced, roll-backs, a second
    attempt."""
    chance = random.Random(seed)
    lines: list[Line] = []
    at, successions = [0] * N_SHARDS, [0] * N_SHARDS
    attempt, timeline, incarnation, checkpoint = 0, 0, 1, 0
    made_of = parts(chance.randint(1, V), incarnation)
    while min(at) < STEPS:
        shard = chance.randrange(N_SHARDS)
        if at[shard] < STEPS and at[shard] == min(at):
            where = {"attempt": attempt, "generation": successions[shard], "timeline": timeline, "shard": shard}
            record_of_one = entry(commit(at[shard], made_of), **where)
            assert record_of_one.end == at[shard] + 1
            extend(lines, record_of_one)
            at[shard] += 1
        dice = chance.random()
        if dice < 0.15:
            incarnation += 1
            made_of = parts(chance.randint(1, V), incarnation)
        if dice < 0.05:
            successions[shard] += 1
        if len(set(at)) == 1 and chance.random() < 0.1:
            checkpoint = at[0]
        if dice > 0.95:
            if dice > 0.98:
                attempt, incarnation, successions = attempt + 1, 0, [0] * N_SHARDS
            incarnation += 1
            made_of = parts(chance.randint(1, V), incarnation)
            timeline = rollback(lines, checkpoint, attempt).timeline
            at = [checkpoint] * N_SHARDS
    return lines


def found(lines: list[Line]) -> list[str]:
    return found_of(lines, STEPS)


def found_of(lines: list[Line], end: int) -> list[str]:
    return check(lines, V, sampler(), n_shards=N_SHARDS, end=end)


# -- records


def test_commits_from_the_same_parts_are_one_record() -> None:
    lines: list[Line] = []
    for step in range(4):
        for shard in (0, 1):
            extend(lines, entry(commit(step, parts(2, 1)), attempt=0, generation=0, timeline=0, shard=shard))
    assert lines == [record(0, 4), record(0, 4, shard=1)]


@pytest.mark.parametrize(
    "change", [{"attempt": 1}, {"generation": 1}, {"timeline": 1}, {"parts": parts(3, 1)}, {"parts": parts(2, 2)}]
)
def test_whatever_changes_begins_a_record(change: dict[str, object]) -> None:
    lines: list[Line] = [record(0, 4)]
    extend(lines, replace(record(4, 5), **change))  # type: ignore[arg-type]
    assert len(lines) == 2
    assert lines[0] == record(0, 4)


@pytest.mark.parametrize("step", [3, 5])
def test_a_step_that_comes_again_or_too_late_continues_nothing(step: int) -> None:
    lines: list[Line] = [record(0, 4)]
    extend(lines, record(step, step + 1))
    assert lines == [record(0, 4), record(step, step + 1)]


def test_a_round_of_several_steps_is_as_long_as_it_says() -> None:
    made = entry(commit(6, parts(2, 1))._replace(steps=3), attempt=1, generation=2, timeline=3, shard=4)
    assert (made.attempt, made.generation, made.timeline, made.shard, made.begin, made.end) == (1, 2, 3, 4, 6, 9)


def test_a_roll_back_opens_the_next_timeline() -> None:
    lines: list[Line] = [record(0, 9)]
    assert rollback(lines, 5) == Rollback(0, 1, 5)
    assert rollback(lines, 3, attempt=1) == Rollback(1, 2, 3)
    assert lines == [record(0, 9), Rollback(0, 1, 5), Rollback(1, 2, 3)]
    assert surviving(lines) == [replace(record(0, 9), end=3)]
    assert surviving([record(0, 9), Rollback(0, 1, 0)]) == []
    again = record(5, 9, timeline=1)
    assert surviving([record(0, 9), Rollback(0, 1, 5), again]) == [replace(record(0, 9), end=5), again]


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_lines_may_be_written_again(seed: int) -> None:
    """The shorter forms of a record before it, it itself after it, and roll-backs: the same in the end."""
    lines, chance = history(seed), random.Random(seed)
    written: list[Line] = []
    for line in lines:
        if isinstance(line, Record):
            ends = sorted(chance.sample(range(line.begin + 1, line.end), min(2, line.end - line.begin - 1)))
            written += [replace(line, end=end, rows=0) for end in ends]
        written += [line] * chance.randint(1, 2)
        written += [earlier for earlier in lines[: lines.index(line)] if chance.random() < 0.1]
    assert fold(written) == lines


def test_a_checkpoint_midway_deals_nothing() -> None:
    """Incarnations rise after it, as after a loss; it is told apart by its line."""
    lines: list[Line] = [record(0, 4), record(0, 3, shard=1), Midway(0, 0, 3)]
    lines += [record(3, 9, shard=1, incarnation=2), record(4, 9, incarnation=2)]
    assert (dealt(lines), found_of(lines, 9)) == (1, [])
    mixed = replace(record(4, 5), parts=((Range(0, 4), (2,) * 4), (Range(4, 8), (1,) * 4)))
    assert dealt([*lines[:3], mixed, record(5, 9, incarnation=2)]) == 1, "one had pushed before it stopped"
    assert dealt([*lines[:2], mixed, record(5, 9, incarnation=2)]) == 2
    assert dealt([line for line in lines if not isinstance(line, Midway)]) == 2
    lines += [record(9, 12, incarnation=3)]
    assert dealt(lines) == 2
    lines += [Midway(0, 0, 12), record(12, 14, n_workers=3, incarnation=4)]
    assert dealt(lines) == 3, "others carry on after it"
    rollback(lines, 12)
    assert dealt([*lines, record(12, 14, n_workers=3, incarnation=5, timeline=1)]) == 4
    assert check([Midway(0, 1, 3)], V, sampler(), end=0) == ["I4: step 3, timeline 1: nobody opened this timeline"]


# -- the checker


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_a_correct_history_has_nothing_to_find(seed: int) -> None:
    assert found(history(seed)) == []


def clean() -> list[Line]:
    """Four records, a roll-back from 13 to 9, four records more; the epochs have 8 steps."""
    lines: list[Line] = [record(0, 6), record(0, 6, shard=1)]
    lines += [record(6, 13, n_workers=3, incarnation=2), record(6, 12, shard=1, n_workers=3, incarnation=2)]
    rollback(lines, 9)
    lines += [record(9, STEPS, incarnation=3, timeline=1), record(9, STEPS, shard=1, incarnation=3, timeline=1)]
    return lines


def changed(at: int, **fields: object) -> Callable[[], list[Line]]:
    def lines() -> list[Line]:
        made = clean()
        made[at] = replace(made[at], **fields)  # type: ignore[arg-type]
        return made

    return lines


def without(at: int) -> Callable[[], list[Line]]:
    return lambda: [line for i, line in enumerate(clean()) if i != at]


def with_more(*more: Line) -> Callable[[], list[Line]]:
    return lambda: [*clean(), *more]


ONE_TWICE: Parts = ((Range(0, 4), (3,) * 4), (Range(3, 8), (3,) * 5))
ONE_MISSING: Parts = ((Range(0, 4), (3,) * 4), (Range(5, 8), (3,) * 3))
ONE_OLDER: Parts = ((Range(0, 4), (3,) * 4), (Range(4, 8), (3, 3, 1, 3)))
UNNUMBERED: Parts = ((Range(0, 4), (3,) * 4), (Range(4, 8), (3,)))

PLANTED: dict[str, tuple[Callable[[], list[Line]], str]] = {
    "a record lost": (without(1), "I1: shard 1 did not commit steps 0 to 5"),
    "a record lost behind": (without(6), "I4: the shards end at different steps: {0: 20, 1: 9}"),
    "a roll-back lost": (without(4), "I4: shard 0, steps 9 to 19, timeline 1: nobody opened this timeline"),
    "a step committed twice": (with_more(record(9, 10, incarnation=4, timeline=1)), "I2: shard 0 committed steps 9 to"),
    "by another server": (
        with_more(replace(record(12, 14, incarnation=4, timeline=1), generation=1)),
        "I2: shard 0 committed steps 12 to 13 twice",
    ),
    "by the old timeline": (with_more(record(8, 9, incarnation=4)), "I2: shard 0 committed steps 8 to 8 twice"),
    "one virtual worker twice": (changed(5, parts=ONE_TWICE), "committed from virtual workers [0, 1, 2, 3, 3, 4"),
    "one virtual worker missing": (changed(5, parts=ONE_MISSING), "not from each of 8 once"),
    "an older incarnation": (changed(5, parts=ONE_OLDER), "older incarnations than before, of virtual workers [6]"),
    "an incarnation for two": (changed(5, parts=UNNUMBERED), "not one incarnation for each virtual worker"),
    "pushes from before the roll-back": (
        changed(5, parts=parts(3, 2)),
        "I6: shard 0, steps 9 to 19, timeline 1: incarnations from before the roll-back",
    ),
    "rows lost": (changed(0, rows=40), "I1: shard 0, steps 0 to 5, timeline 0: 40 rows were committed, the steps have"),
    "no step": (changed(0, end=0), "a record covers no step"),
    "one shard rolled back": (changed(4, step=12), "I2: shard 0 committed steps 9 to 11 twice"),
    "not far enough": (changed(4, step=7), "I1: shard 0 did not commit steps 7 to 8"),
    "timelines that skip": (with_more(Rollback(0, 3, STEPS)), "timeline 3 was opened after 1"),
    "more than there should be": (
        with_more(record(20, 21, incarnation=3, timeline=1)),
        "I4: the shards end at different steps: {0: 21, 1: 20}",
    ),
    "more on every shard": (
        with_more(record(20, 21, incarnation=3, timeline=1), record(20, 21, shard=1, incarnation=3, timeline=1)),
        "I4: the shards committed up to step 21, not 20",
    ),
    "nothing at all": (lambda: [], "I1: shard 0 did not commit steps 0 to 19"),
}


def test_the_clean_one_is_clean() -> None:
    assert found(clean()) == []


@pytest.mark.parametrize("name", PLANTED, ids=lambda name: name.replace(" ", "-"))
def test_what_is_planted_is_found(name: str) -> None:
    lines, sentence = PLANTED[name]
    assert any(sentence in one for one in found(lines())), found(lines())


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_no_surviving_record_can_be_lost_or_doubled(seed: int) -> None:
    lines = history(seed)
    victim = random.Random(seed).choice([r for r in lines if isinstance(r, Record) and _survives(r, lines)])
    assert found([line for line in lines if line != victim]) != []
    assert found([*lines, victim]) != []


def _survives(line: Record, lines: list[Line]) -> bool:
    return any(r.begin == line.begin and replace(r, end=line.end) == line for r in surviving(lines))


class SameRowTwice:
    """A sampler in which one row takes the place of another."""

    def __init__(self) -> None:
        self.n_rows, self.steps_per_epoch = sampler().n_rows, sampler().steps_per_epoch

    def rows_in_step(self, step: int) -> int:
        return sampler().rows_in_step(step)

    def row_ids(self, step: int, virtual_worker: int) -> Int64:
        ids = sampler().row_ids(step, virtual_worker)
        return np.where(ids == 17, 18, ids) if step >= self.steps_per_epoch else ids


def test_rows_are_counted_one_by_one() -> None:
    sentences = check(clean(), V, SameRowTwice(), n_shards=N_SHARDS, end=STEPS)
    assert sentences == ["I1: shards [0, 1], epoch 1: 2 rows were not used once, the first is row 17: 0 times"]


def test_an_attempt_that_begins_in_the_middle() -> None:
    lines: list[Line] = [record(8, STEPS), record(8, STEPS, shard=1)]
    assert check(lines, V, sampler(), n_shards=2, begin=8, end=STEPS) == []
    assert check(lines, V, sampler(), n_shards=2, end=STEPS)[0] == "I1: shard 0 did not commit steps 0 to 7"
    assert check(lines, V, begin=8) == []


MUTATIONS: dict[str, Callable[[Record], Record]] = {
    "begins earlier": lambda r: replace(r, begin=r.begin - 1),
    "begins later": lambda r: replace(r, begin=r.begin + 1),
    "ends earlier": lambda r: replace(r, end=r.end - 1),
    "ends later": lambda r: replace(r, end=r.end + 1),
    "a row more": lambda r: replace(r, rows=r.rows + 1),
    "a row less": lambda r: replace(r, rows=r.rows - 1),
    "by the other shard": lambda r: replace(r, shard=1 - r.shard),
    "of another shard": lambda r: replace(r, shard=N_SHARDS),
    "without its last node": lambda r: replace(r, parts=r.parts[:-1]),
    "with its first node twice": lambda r: replace(r, parts=(r.parts[0], *r.parts)),
    "with an incarnation more": lambda r: replace(r, parts=((r.parts[0][0], (*r.parts[0][1], 1)), *r.parts[1:])),
}


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(MUTATIONS)), st.data())
def test_any_change_of_any_record_that_counts_is_found(seed: int, name: str, data: st.DataObject) -> None:
    """Also one that whoever wrote it has numbered and chained well: it comes back from its lines, and is found."""
    lines = history(seed)
    victim = data.draw(st.sampled_from([r for r in lines if isinstance(r, Record) and _survives(r, lines)]))
    planted = [MUTATIONS[name](line) if line is victim else line for line in lines]
    text, _ = to_text([line for line in planted if not (isinstance(line, Record) and line.begin < 0)], 0, NOTHING)
    assert found(parse(text.encode()).lines) != []
