"""``ledger.jsonl``: which server committed which steps from whom; and ``raysgd audit``, which reads it afterwards.

    commits of all servers ──Ledger.take──▶ records ──flush, before each checkpoint──▶ ledger.jsonl ──audit──▶ sentences

An attempt that continues a run opens a timeline at the step it begins with: what was written beyond it is void. So the
records that count are, attempt by attempt, those up to where the next one began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from raysgd import checkpoint as checkpoints
from raysgd import config
from raysgd.errors import CheckpointError, InputError, RaysgdError
from raysgd.interrupts import held_off
from raysgd.plan import open_tables, plan_from_manifest
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
    rollback,
    row_problems,
    surviving,
)
from raysgd.protocol.ledger_lines import Parsed, parse, to_text
from raysgd.spec import differences
from raysgd.storage import Storage

NAME = "ledger.jsonl"

#: where a ledger that cannot be read is put aside
DAMAGED = "ledger.damaged.jsonl"


class Ledger:
    """The records of one attempt, as its driver writes them.

    begin: the step that the attempt begins with;  n_shards: how many servers it has
    """

    def __init__(self, storage: Storage, attempt: int, begin: int, n_shards: int) -> None:
        self._storage, self._attempt, self._n_shards = storage, attempt, n_shards
        begun = _begun(storage)
        #: everything written so far, folded, and the lines that this attempt adds
        self._lines: list[Line] = begun.lines
        #: the lines as they are in the file, by their place; how many the file has, and the last one's ``sha``
        self._written = dict(enumerate(self._lines))
        self._count, self._sha = len(begun.shas), begun.sha
        if self._lines or begin:
            rollback(self._lines, begin, attempt)
        self._timeline = max((line.timeline for line in self._lines), default=0)
        self._ends: dict[int, int] = {}
        self._begin = begin

    def end(self, shard: int) -> int:
        """The first step of which this ledger has nothing from a shard."""
        return self._ends.get(shard, self._begin)

    def take(self, shard: int, commits: Sequence[Commit], parts: Parts, generation: int) -> None:
        """Note a shard's commits, in steps and in order; those that an earlier reading noted are passed over.

        parts: who was assigned, for commits that a successor found in memory without them: nobody else passes the fence
        """
        noted = self.end(shard)
        for commit in commits:
            if commit.step < noted:
                continue
            line = entry(commit, attempt=self._attempt, generation=generation, timeline=self._timeline, shard=shard)
            extend(self._lines, replace(line, parts=line.parts or parts, shards=self._n_shards))
            self._ends[shard] = max(self.end(shard), commit.step + commit.steps)

    def midway(self, step: int) -> None:
        """Note that everybody stops for a checkpoint at ``step``, and goes on with what was carried before."""
        self._lines.append(Midway(self._attempt, self._timeline, step))

    def flush(self) -> dict[str, Any]:
        """Append what is new, and the newest record of each shard again, if it has grown; synced.

        Returns how many lines there are and the last one's ``sha``: a checkpoint that says so tells of lines cut off.
        Raises SaveError where that cannot be written; the file is then as it was.
        """
        changed = [i for i, line in enumerate(self._lines) if self._written.get(i) is not line]
        if changed:
            text, sha = to_text([self._lines[i] for i in changed], self._count, self._sha)
            with held_off():  # what is written and not known to be would be written again
                self._append(text)
                self._count, self._sha = self._count + len(changed), sha
                self._written |= {i: self._lines[i] for i in changed}
        return {"lines": self._count, "sha": self._sha}

    def _append(self, text: str) -> None:
        with self._storage.saving(NAME):
            self._storage.append(NAME, text, sync=True)


def last_attempt(storage: Storage) -> int:
    """The greatest attempt of which the ledger tells; 0 where there is none, or one that will be put aside."""
    try:
        found = parse(storage.read(NAME)).lines
    except (FileNotFoundError, InputError):
        return 0
    return max((line.attempt for line in found), default=0)


def _begun(storage: Storage) -> Parsed:
    """What attempts before this one wrote; a line whose writing was interrupted is cut off.

    A damaged ledger is put aside, for people: a run goes on without it, and its audit says what is missing.
    """
    nothing = Parsed([], (), "")
    if not storage.exists(NAME):
        return nothing
    data = storage.read(NAME)
    try:
        found = parse(data)
    except InputError:
        with storage.saving(DAMAGED):
            storage.write_atomic(DAMAGED, data)
            storage.write_atomic(NAME, b"")
        return nothing
    if found.torn:
        with storage.saving(NAME):
            storage.write_atomic(NAME, data[: data.rfind(b"\n") + 1])
    return found


@dataclass(frozen=True)
class Audit:
    """What a run's ledger and checkpoints say. problems: one sentence each; empty where all invariants hold.

    steps: committed by every server, each once
    dealt, replaced, rolled_back: how often virtual workers were dealt, servers replaced, and all went back
    midway: how often everybody stopped for a checkpoint between two boundaries, and went on as before
    rows: whether the rows themselves were checked, for which the data must be there
    notes: what is worth knowing and no violation
    """

    problems: tuple[str, ...]
    steps: int = 0
    attempts: int = 0
    dealt: int = 0
    midway: int = 0
    replaced: int = 0
    rolled_back: int = 0
    checkpoints: int = 0
    rows: bool = False
    notes: tuple[str, ...] = ()


def audit(storage: Storage) -> Audit:
    """Check a run's ledger (I1, I2, I4, I6) and its checkpoints (I8). Raises InputError where there is no ledger."""
    if not storage.exists(NAME):
        raise InputError(f"{storage.uri} has no {NAME}: nothing was trained there, or by an older raysgd")
    try:
        parsed, found = parse(storage.read(NAME)), []
    except InputError as error:
        parsed, found = None, [f"{NAME}, {problem}" for problem in error.problems]
    steps = checkpoints.steps(storage)
    for step in steps:
        try:
            manifest = checkpoints.load(storage, step).manifest
            found += [] if parsed is None else _cut_off(parsed, step, manifest.get("ledger"))
        except CheckpointError as error:
            found.append(f"I8: {error}")
    if parsed is None or found:  # what a damaged ledger says of the run is not worth telling
        return Audit(tuple(found), checkpoints=len(steps))
    audited = _audit_lines(storage, parsed.lines)
    number = len(parsed.shas) + 1
    torn = (
        f"{NAME}, line {number}: its writing was interrupted; nothing that counts was in it, it goes at the next start"
    )
    notes = (*([torn] if parsed.torn else []), *audited.notes)
    return replace(audited, checkpoints=len(steps), notes=notes)


def _cut_off(parsed: Parsed, step: int, told: Any) -> list[str]:
    """Whether the ledger still begins as it did when the checkpoint of ``step`` was published.

    told: what its manifest says of that; None: it was written by an older raysgd
    """
    if told is None:
        return []
    lines, there = int(told["lines"]), len(parsed.shas)
    if lines > there:
        return [f"{NAME}, line {there + 1}: missing, the checkpoint of step {step} knows of {lines} lines"]
    if lines and parsed.shas[lines - 1] != told["sha"]:
        return [f"{NAME}, line {lines}: it is another than the one that the checkpoint of step {step} knows of"]
    return []


def _audit_lines(storage: Storage, lines: Sequence[Line]) -> Audit:
    last = checkpoints.load(storage, "last")
    n_virtual = int(last.manifest["config"]["train"]["virtual_workers"])
    sampler, note = _sampler(storage, last.manifest)
    found = [note] if note else []
    whole: list[Record] = []
    attempts = sorted({line.attempt for line in lines})
    for attempt in attempts:
        own, begin, end = _of_attempt(lines, attempt, last.step)
        n_shards = max((line.shards for line in own if isinstance(line, Record)), default=0) or None
        problems = check(own, n_virtual, sampler, n_shards=n_shards, begin=begin)
        found += [f"attempt {attempt}: {problem}" for problem in problems]
        records = surviving(own)
        whole += [record for record in records if record.shard == 0]
        if records and max(record.end for record in records) < end:
            found.append(
                f"attempt {attempt}: I1: nothing tells of the steps up to {end}, of which there was a checkpoint"
            )
    if sampler is not None and not found:
        found += row_problems({0: whole}, sampler, 0, max((r.end for r in whole), default=0))
    committed = max((record.end for record in whole), default=0)
    if committed < last.step:
        found.append(f"I1: the newest checkpoint is of step {last.step}, the ledger ends at {committed}")
    records = [line for line in lines if isinstance(line, Record)]
    return Audit(
        tuple(found),
        committed,
        len(attempts),
        dealt(lines),
        sum(isinstance(line, Midway) for line in lines),
        len({(r.attempt, r.shard, r.generation) for r in records if r.generation}),
        sum(isinstance(line, Rollback) and line.attempt == before.attempt for before, line in pairwise(lines)),
        rows=sampler is not None,
        notes=_beyond(lines, last.step),
    )


def _beyond(lines: Sequence[Line], step: int) -> tuple[str, ...]:
    """What stands there beyond the newest checkpoint: it was about to be published, and may never be."""
    end = max((r.end for r in surviving(lines)), default=step)
    told = (
        f"steps {step} to {end - 1} are in no checkpoint: if nobody trains any more, the next start computes them again"
    )
    return (told,) if end > step else ()


def _of_attempt(lines: Sequence[Line], attempt: int, last: int) -> tuple[list[Line], int, int]:
    """The lines of one attempt as if it were the only one, cut where the next begins, or would, at the step ``last``;
    where it begins, and ends."""
    own = [line for line in lines if line.attempt == attempt]
    begin, base = 0, 0
    if isinstance(own[0], Rollback):
        begin, base = own[0].step, own[0].timeline
        own = own[1:]
    shifted: list[Line] = [replace(line, timeline=line.timeline - base) for line in own]
    end = min([line.step for line in lines if isinstance(line, Rollback) and line.attempt > attempt], default=last)
    rollback(shifted, end, attempt)
    return shifted, begin, end


def _sampler(storage: Storage, manifest: Any) -> tuple[Any, str | None]:
    """The run's sampler, for which its data must be there; or why there is none."""
    try:
        spec = config.loads(storage.read("config.toml").decode())
        if changed := differences(manifest["config"], spec.determining()):
            return None, f"config.toml is not that of the checkpoints: {'; '.join(changed)}"
        tables = open_tables(spec)
        if tables.fingerprints["train"] != manifest["fingerprints"]["train"]:
            return None, "the training data is not that of the run any more: which rows were used cannot be told"
        return plan_from_manifest(spec, tables, manifest).sampler, None
    except UnicodeDecodeError as error:
        return None, f"config.toml is damaged: {error}"
    except (RaysgdError, OSError):
        return None, None
