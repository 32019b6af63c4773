"""The ledger: which server shard committed which steps, from whom; and the checker that reads it afterwards.

    commits ──entry──▶ Record, grown while the parts stay the same ──to_line──▶ one line of JSON ──check──▶ sentences
                                                                  ledger_lines.py

One record covers a range of steps with one assignment, so it costs nothing a step. Lines are only ever appended, and
may be written again, also in a longer form. A roll-back appends a line that opens a new timeline; what older timelines
committed from its step on is void. Everything is plain data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, TypeAlias

import numpy as np

from raysgd.learn.batch import Int64
from raysgd.learn.parameters import Range
from raysgd.protocol.gate import Commit

#: nodes of the tree, left to right, with the incarnation of each virtual worker below them
Parts: TypeAlias = tuple[tuple[Range, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Steps [begin, end), committed by one server shard from the same parts.

    attempt: of the run;  generation: how many times the server was replaced;  rows: in all these steps together
    shards: how many servers there were; 0: not known
    """

    attempt: int
    generation: int
    timeline: int
    shard: int
    begin: int
    end: int
    parts: Parts
    rows: int
    shards: int = 0


@dataclass(frozen=True, slots=True)
class Rollback:
    """All shards have returned to ``step``: commits of older timelines from it on are void."""

    attempt: int
    timeline: int
    step: int


@dataclass(frozen=True, slots=True)
class Midway:
    """A checkpoint was taken at ``step``, between two boundaries: everybody stopped, and went on under new incarnations
    with what they carried before."""

    attempt: int
    timeline: int
    step: int


Line: TypeAlias = Record | Rollback | Midway


class Rows(Protocol):
    """Which rows a step has: what :class:`~raysgd.data.sampler.Sampler` knows."""

    @property
    def n_rows(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def rows_in_step(self, step: int) -> int: ...

    def row_ids(self, step: int, virtual_worker: int) -> Int64: ...


def entry(commit: Commit, *, attempt: int, generation: int, timeline: int, shard: int) -> Record:
    """One commit as a record by itself."""
    parts = tuple((node, incarnations) for node, incarnations, _ in commit.parts)
    return Record(attempt, generation, timeline, shard, commit.step, commit.step + commit.steps, parts, commit.rows)


def extend(lines: list[Line], record: Record) -> None:
    """Append what was committed, or let it continue its shard's newest record where the parts are the same.

    A step that comes again continues nothing: the checker finds it.
    """
    at = next((i for i in range(len(lines) - 1, -1, -1) if _shard(lines[i]) == record.shard), None)
    newest = None if at is None else lines[at]
    if at is not None and isinstance(newest, Record) and newest.end == record.begin and _same(newest, record):
        lines[at] = replace(newest, end=record.end, rows=newest.rows + record.rows)
    else:
        lines.append(record)


def fold(lines: Iterable[Line]) -> list[Line]:
    """The lines of a file, in which a record may stand several times: its longest form, in its first place.

    Whoever takes over writes the newest record again, because it cannot know whether that was done.
    """
    kept: dict[Line, Line] = {}
    for line in lines:
        key = replace(line, end=0, rows=0) if isinstance(line, Record) else line
        known = kept.setdefault(key, line)
        if isinstance(line, Record) and isinstance(known, Record) and line.end > known.end:
            kept[key] = line
    return list(kept.values())


def rollback(lines: list[Line], step: int, attempt: int = 0) -> Rollback:
    """Open the next timeline at ``step``; also an attempt that begins at a checkpoint is one."""
    line = Rollback(attempt, 1 + max((known.timeline for known in lines), default=0), step)
    lines.append(line)
    return line


def dealt(lines: Sequence[Line]) -> int:
    """How often virtual workers were dealt: at the begin, and whenever somebody was lost or came.

    Incarnations rise then, and at a checkpoint midway, which is no deal, unless others carry on after it.
    """
    count, midway, before = 0, False, None
    for line in lines:
        if not isinstance(line, Record):
            midway = midway or isinstance(line, Midway)
        elif line.shard == 0:
            nodes = line.attempt, line.timeline, tuple(node for node, _ in line.parts)
            newest = max(_incarnations(line).values(), default=0)  # a step in between can have older ones, too
            if before is None or newest > before[1] or nodes[:2] != before[0][:2]:
                count += before is None or not midway or nodes != before[0]
                midway = False
            before = nodes, newest
    return count


def _shard(line: Line) -> int | None:
    return line.shard if isinstance(line, Record) else None


def _same(a: Record, b: Record) -> bool:
    """Whether two records differ in their steps alone."""
    return replace(a, begin=0, end=0, rows=0) == replace(b, begin=0, end=0, rows=0)


# -- the checker


def surviving(lines: Iterable[Line]) -> list[Record]:
    """The records that count, cut where a later timeline began; ``rows`` stays that of all that a record covered."""
    lines = list(lines)
    begins = [(line.timeline, line.step) for line in lines if isinstance(line, Rollback)]
    records = []
    for line in lines:
        if isinstance(line, Record):
            end = min([line.end, *(step for timeline, step in begins if timeline > line.timeline)])
            if line.begin < end:
                records.append(replace(line, end=end))
    return records


def check(
    lines: Sequence[Line],
    n_virtual: int,
    sampler: Rows | None = None,
    *,
    n_shards: int | None = None,
    begin: int = 0,
    end: int | None = None,
) -> list[str]:
    """What a ledger says against I1, I2, I4 and I6 on the surviving timeline, one sentence each.

    n_shards: of the server;  begin, end: the steps that should be committed; default: from 0 to the shards' last
    sampler: for the rows. Each epoch's are drawn once.
    """
    written = [line for line in lines if isinstance(line, Record)]
    records = surviving(lines)
    by_shard: dict[int, list[Record]] = {shard: [] for shard in range(n_shards or 0)}
    for record in records:
        by_shard.setdefault(record.shard, []).append(record)
    ends = {shard: max((r.end for r in own), default=begin) for shard, own in by_shard.items()}
    end = max(ends.values(), default=begin) if end is None else end
    found = [problem for record in written for problem in _record_problems(record, n_virtual, sampler)]
    found += _timeline_problems(lines)
    if len(set(ends.values())) > 1:
        found.append(f"I4: the shards end at different steps: {ends}")
    elif max(ends.values(), default=end) > end:
        found.append(f"I4: the shards committed up to step {max(ends.values())}, not {end}")
    for shard, own in by_shard.items():
        found += _coverage_problems(shard, sorted(own, key=lambda r: (r.begin, r.end)), begin, end)
    for shard in by_shard:
        found += _incarnation_problems([r for r in written if r.shard == shard])
    if sampler is not None and not found:
        found += row_problems(by_shard, sampler, begin, end)
    return found


def _name(record: Record) -> str:
    return f"shard {record.shard}, steps {record.begin} to {record.end - 1}, timeline {record.timeline}"


def _record_problems(record: Record, n_virtual: int, sampler: Rows | None) -> list[str]:
    if not 0 <= record.begin < record.end:
        return [f"I2: {_name(record)}: a record covers no step"]
    found = []
    virtual = [v for node, _ in record.parts for v in range(node.begin, node.end)]
    if sorted(virtual) != list(range(n_virtual)):
        found.append(
            f"I2: {_name(record)}: committed from virtual workers {virtual}, not from each of {n_virtual} once"
        )
    if any(len(incarnations) != len(node) for node, incarnations in record.parts):
        found.append(f"I6: {_name(record)}: not one incarnation for each virtual worker: {record.parts}")
    if sampler is not None:
        planned = sum(sampler.rows_in_step(step) for step in range(record.begin, record.end))
        if planned != record.rows:
            found.append(f"I1: {_name(record)}: {record.rows} rows were committed, the steps have {planned}")
    return found


def _timeline_problems(lines: Sequence[Line]) -> list[str]:
    """Timelines are opened one after the other, and records are of one that was."""
    found, known = [], 0
    for line in lines:
        if isinstance(line, Rollback):
            if line.timeline != known + 1:
                found.append(f"timeline {line.timeline} was opened after {known}")
            known = max(known, line.timeline)
        elif line.timeline > known:
            name = _name(line) if isinstance(line, Record) else f"step {line.step}, timeline {line.timeline}"
            found.append(f"I4: {name}: nobody opened this timeline")
    return found


def _coverage_problems(shard: int, own: Sequence[Record], begin: int, end: int) -> list[str]:
    """Steps of the surviving timeline that a shard committed twice, or not at all. own: by their begin"""
    found, at = [], begin
    for record in own:
        if record.begin < at:
            found.append(f"I2: shard {shard} committed steps {record.begin} to {min(at, record.end) - 1} twice")
        if record.begin > at:
            found.append(f"I1: shard {shard} did not commit steps {at} to {record.begin - 1}")
        at = max(at, record.end)
    if at < end:
        found.append(f"I1: shard {shard} did not commit steps {at} to {end - 1}")
    return found


def _incarnation_problems(own: Sequence[Record]) -> list[str]:
    """Incarnations that fall: somebody pushed whose share was given to another. Each attempt begins them anew."""
    found = []
    order = sorted(own, key=lambda r: (r.attempt, r.timeline, r.begin))
    for before, after in pairwise(order):
        if before.attempt != after.attempt:
            continue
        old, new = _incarnations(before), _incarnations(after)
        fell = sorted(v for v in old.keys() & new.keys() if new[v] < old[v])
        if fell:
            found.append(f"I6: {_name(after)}: older incarnations than before, of virtual workers {fell}")
        if before.timeline < after.timeline and any(new[v] == old[v] for v in old.keys() & new.keys()):
            found.append(f"I6: {_name(after)}: incarnations from before the roll-back")
    return found


def _incarnations(record: Record) -> dict[int, int]:
    return {
        v: i
        for node, incarnations in record.parts
        for v, i in zip(range(node.begin, node.end), incarnations, strict=False)
    }


def row_problems(by_shard: dict[int, list[Record]], sampler: Rows, begin: int, end: int) -> list[str]:
    """I1: over each whole epoch every row id once. by_shard: records that cover every step once, see above"""
    found = []
    per_epoch = sampler.steps_per_epoch
    for epoch in range(-(-begin // per_epoch), end // per_epoch):
        draws = {shard: _draws(own, epoch * per_epoch, (epoch + 1) * per_epoch) for shard, own in by_shard.items()}
        for drawn in set(draws.values()):
            ids = np.concatenate([sampler.row_ids(step, v) for step, v in drawn])
            counts = np.bincount(ids, minlength=sampler.n_rows)
            wrong = np.flatnonzero(counts != 1)
            if len(wrong):
                shards = [shard for shard, own in draws.items() if own == drawn]
                row = int(wrong[0])
                found.append(
                    f"I1: shards {shards}, epoch {epoch}: {len(wrong)} rows were not used once, "
                    f"the first is row {row}: {counts[row]} times"
                )
    return found


def _draws(own: Sequence[Record], begin: int, end: int) -> tuple[tuple[int, int], ...]:
    """(step, virtual worker) of everything that one shard committed of steps [begin, end)."""
    return tuple(
        (step, v)
        for record in own
        for step in range(max(begin, record.begin), min(end, record.end))
        for node, _ in record.parts
        for v in range(node.begin, node.end)
    )
