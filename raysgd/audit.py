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
from raysgd.plan import open_tables, plan_from_manifest
from raysgd.protocol.gate import Commit
from raysgd.protocol.ledger import (
    Line,
    Parts,
    Record,
    Rollback,
    check,
    entry,
    extend,
    parse,
    rollback,
    row_problems,
    surviving,
    to_line,
)
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
        #: everything written so far, folded, and the lines that this attempt adds
        self._lines: list[Line] = _begun(storage)
        #: the lines as they are in the file, by their place
        self._written = dict(enumerate(self._lines))
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

    def flush(self) -> None:
        """Append what is new, and the newest record of each shard again, if it has grown."""
        changed = [i for i, line in enumerate(self._lines) if self._written.get(i) is not line]
        if changed:
            self._storage.append(NAME, "".join(f"{to_line(self._lines[i])}\n" for i in changed))
        self._written |= {i: self._lines[i] for i in changed}


def _begun(storage: Storage) -> list[Line]:
    """What attempts before this one wrote. A damaged ledger is put aside, for people: a run goes on without it, and its
    audit says what is missing."""
    if not storage.exists(NAME):
        return []
    data = storage.read(NAME)
    if not data.endswith(b"\n"):  # the writing of the last line was interrupted
        data = data[: data.rfind(b"\n") + 1]
        storage.write_atomic(NAME, data)
    try:
        return _parsed(storage, data)
    except InputError:
        storage.write_atomic(DAMAGED, data)
        storage.write_atomic(NAME, b"")
        return []


def _parsed(storage: Storage, data: bytes) -> list[Line]:
    try:
        return parse(data.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{storage.uri}/{NAME} is damaged: {error}") from None
    except InputError as error:
        raise InputError([f"{storage.uri}/{NAME}, {problem}" for problem in error.problems]) from None


@dataclass(frozen=True)
class Audit:
    """What a run's ledger and checkpoints say. problems: one sentence each; empty where all invariants hold.

    steps: committed by every server, each once
    dealt, replaced, rolled_back: how often virtual workers were dealt, servers replaced, and all went back
    rows: whether the rows themselves were checked, for which the data must be there
    """

    problems: tuple[str, ...]
    steps: int
    attempts: int
    dealt: int
    replaced: int
    rolled_back: int
    checkpoints: int
    rows: bool


def audit(storage: Storage) -> Audit:
    """Check a run's ledger (I1, I2, I4, I6) and its checkpoints (I8). Raises InputError where there is no ledger."""
    if not storage.exists(NAME):
        raise InputError(f"{storage.uri} has no {NAME}: nothing was trained there, or by an older raysgd")
    lines = _parsed(storage, storage.read(NAME))
    found: list[str] = []
    steps = checkpoints.steps(storage)
    for step in steps:
        try:
            checkpoints.load(storage, step)
        except CheckpointError as error:
            found.append(f"I8: {error}")
    last = checkpoints.load(storage, "last")
    n_virtual = int(last.manifest["config"]["train"]["virtual_workers"])
    sampler, note = _sampler(storage, last.manifest)
    if note:
        found.append(note)
    whole: list[Record] = []
    attempts = sorted({line.attempt for line in lines})
    for attempt in attempts:
        own, begin, end = _of_attempt(lines, attempt)
        n_shards = max((line.shards for line in own if isinstance(line, Record)), default=0) or None
        problems = check(own, n_virtual, sampler, n_shards=n_shards, begin=begin)
        found += [f"attempt {attempt}: {problem}" for problem in problems]
        records = surviving(own)
        whole += [record for record in records if record.shard == 0]
        if records and end is not None and max(record.end for record in records) < end:
            found.append(f"attempt {attempt}: I1: nothing tells of the steps up to {end}, where the next one began")
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
        len({(r.attempt, r.parts) for r in records}),
        len({(r.attempt, r.shard, r.generation) for r in records if r.generation}),
        sum(isinstance(line, Rollback) and line.attempt == before.attempt for before, line in pairwise(lines)),
        len(steps),
        sampler is not None,
    )


def _of_attempt(lines: Sequence[Line], attempt: int) -> tuple[list[Line], int, int | None]:
    """The lines of one attempt as if it were the only one, cut where the next begins; where it begins, and ends."""
    own = [line for line in lines if line.attempt == attempt]
    begin, base = 0, 0
    if isinstance(own[0], Rollback):
        begin, base = own[0].step, own[0].timeline
        own = own[1:]
    shifted: list[Line] = [replace(line, timeline=line.timeline - base) for line in own]
    later = [line.step for line in lines if isinstance(line, Rollback) and line.attempt > attempt]
    if not later:
        return shifted, begin, None
    end = min(later)
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
