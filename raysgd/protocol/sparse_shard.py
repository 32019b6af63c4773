"""One server's half for a model of which a step touches few coordinates: memory and work follow those.

    pushes ─▶ Gate ─ complete ─▶ union of the ids ─▶ new values ─ finite ─▶ record, sealed ─▶ scatter ─▶ version t + 1

There is one copy of parameters and state, written in place. What makes a step atomic is its record: ids, old and new
values, whole before the first coordinate changes. Whoever finds a record that is newer than the arrays writes its new
values again, which a part of them having been written before does not change. The old values answer a pull of the
version before, which the successor of a lost worker may need.

A coordinate that no row of a step touches keeps its value and its state: momentum is frozen, no penalty is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raysgd.learn.batch import Float32, Int32
from raysgd.learn.compact import Index
from raysgd.learn.models.hashed import BoundHashed
from raysgd.learn.parameters import Range
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.gate import Commit, Gate
from raysgd.protocol.generation import Generation, finite
from raysgd.protocol.messages import Gone, Halted, NotYet, PushReply, Verdict
from raysgd.protocol.replica import Copied
from raysgd.protocol.sparse import SparsePull, SparsePulled, SparsePush, SparseSum
from raysgd.protocol.update import Rule

PARAMS = "params"

#: Coordinates that are written at a time.
BLOCK = 16_384


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that takes the arrays from version ``commit.step`` to the next one, and back.

    ids: (m,) intp, ascending, counted from the shard's begin;  old, new: "params" and each slot, (m,) float32
    """

    ids: Index
    old: dict[str, Float32]
    new: dict[str, Float32]
    commit: Commit

    @property
    def version(self) -> int:
        """The version that the new values make."""
        return self.commit.step + 1

    @property
    def nbytes(self) -> int:
        return int(self.ids.nbytes + sum(a.nbytes for values in (self.old, self.new) for a in values.values()))


@dataclass(slots=True)
class Store:
    """What outlives a shard that dies between two instructions.

    arrays: "params" and each slot, (len(shard),) float32, at ``version`` if ``record`` is None or of that version;
    else somewhere between the record's old and new values
    """

    version: int
    arrays: dict[str, Float32]
    record: Record | None = None
    #: called with a version before the first value of it is written
    on_write: Callable[[int], None] = field(default=lambda _: None)
    #: called with a record before it counts: whoever finds it there later writes its values again
    on_seal: Callable[[Record], None] = field(default=lambda _: None)

    def seal(self, record: Record) -> None:
        """From here on the step counts, whatever becomes of this process."""
        self.on_seal(record)
        self.record = record

    def writes(self) -> Iterator[None]:
        """Write the record's new values, a block of one array at a time, and then its version. Repeats do no harm."""
        record = self.record
        if record is None:
            return
        self.on_write(record.version)
        for name, values in record.new.items():
            for begin in range(0, len(values), BLOCK):
                block = slice(begin, begin + BLOCK)
                self.arrays[name][record.ids[block]] = values[block]
                yield
        self.version = record.version

    def recover(self) -> None:
        """Bring the arrays to the newest sealed version, wherever the writing of it ended."""
        for _ in self.writes():
            pass


@dataclass(frozen=True, slots=True, eq=False)
class SealedRecord:
    """From a sparse shard to its replica: the record of a step that it sealed."""

    shard: int
    record: Record

    @property
    def number(self) -> int:
        return self.record.commit.step


@dataclass(frozen=True, slots=True)
class SparseCopy:
    """What a successor or a replica begins with: arrays, what takes them to the newest version, and the records of
    commits that the driver was not told of yet."""

    arrays: Generation
    record: Record | None
    commits: list[Commit]

    def arguments(self) -> dict[str, Any]:
        """What a shard takes that begins with it."""
        return {"generation": self.arrays, "record": self.record, "commits": self.commits}


class SparseShard(Gate[SparseSum]):
    """The state machine of one server shard: requests in, replies out; it never waits."""

    def __init__(
        self,
        index: int,
        rule: Rule,
        span: Range,
        store: Store,
        *,
        n_virtual: int,
        unpenalized: tuple[Range, ...] = (),
        consistency: Consistency | None = None,
        commits: Sequence[Commit] = (),
    ) -> None:
        """Begin at what ``store`` holds, a sealed record included.

        span: the shard's coordinates of the whole vector;  unpenalized: those, of the whole vector, without L2
        commits: what one that died had committed and not told
        """
        store.recover()
        super().__init__(index, n_virtual, SparseSum(n_virtual), store.version, consistency)
        self.commits += commits
        self.rule, self.span, self.store, self._unpenalized = rule, span, store, unpenalized
        #: bytes of pushes taken and of pulls answered since the begin: they follow the coordinates touched
        self.pushed_bytes = self.pulled_bytes = 0

    @property
    def version(self) -> int:
        """The newest sealed version."""
        return self.store.version

    def copy(self) -> SparseCopy:
        """All that a replica begins with; until it says that it has that, the shard goes on alone."""
        self.copied = None
        return SparseCopy(self.snapshot(self.version), self.store.record, list(self.commits))

    def copied_to(self, sequence: int) -> None:
        """As of every shard. A successor can be a step further than the replica: the record says which."""
        self.copied, record = Copied(sequence), self.store.record
        if record is not None and record.commit.step >= sequence:
            self.copied.say(SealedRecord(self.index, record))

    def follow(self, sealed: SealedRecord) -> int:
        """As a replica, take over a step that the primary sealed; the version that is here now.

        A step that is here already is passed over, and so is one that comes too early: it is said again.
        """
        if sealed.number == self.version:
            self._seal(sealed.record)
            self._forget_commits()
        return self.version

    @property
    def sequence(self) -> int:
        """As :class:`~raysgd.protocol.shard.ServerShard` counts: here the version."""
        return self.store.version

    def push(self, push: SparsePush) -> PushReply:
        """Judge one push and, when it completes its step, seal and write the next version."""
        vector = push.partial.vector
        verdict = self._judge(push)
        if verdict is Verdict.ACCEPTED:
            self.pushed_bytes += 0 if vector is None else vector.nbytes
            if self._pending.complete:
                self._apply()
        return PushReply(self.index, push.step, push.node, verdict)

    def pull(self, pull: SparsePull) -> SparsePulled | NotYet | Gone | Halted:
        """The values at exactly the version asked for."""
        if pull.version > self.told:
            return self._later(pull.version)
        record = self.store.record
        if pull.version < self.version - (record is not None):
            return Gone(self.index, pull.version, oldest=self.version - (record is not None))
        ids = pull.ids - np.int32(self.span.begin)
        values = self.store.arrays[PARAMS].take(ids)
        if record is not None and pull.version < self.version:
            _restore(values, ids, record)
        self.pulled_bytes += int(ids.nbytes + values.nbytes)
        return SparsePulled(self.index, pull.version, values, pull.token)

    def snapshot(self, version: int, part: Range | None = None) -> Generation:
        """A copy of one of the two versions, of all or of these coordinates of the shard. KeyError: it is neither."""
        part = part or Range(0, len(self.span))
        found = {name: array[part.slice].copy() for name, array in self.store.arrays.items()}
        record = self.store.record
        if version != self.version:
            if record is None or version != self.version - 1:
                raise KeyError(f"shard {self.index} holds version {self.version}, not {version}")
            begin, end = np.searchsorted(record.ids, (part.begin, part.end))
            for name, old in record.old.items():
                found[name][record.ids[begin:end] - part.begin] = old[begin:end]
        return Generation(version, found.pop(PARAMS), found)

    def _shaped(self, push: SparsePush) -> bool:
        vector = push.partial.vector
        return vector is None or vector.well_formed(self.span)

    def _apply(self) -> None:
        """Seal the record of the step that is complete, if it is finite, and write its values."""
        record = self._record()
        if not all(map(finite, record.new.values())):
            self.diverged = self.version
            return
        self._seal(record)
        if self.copied is not None:
            self.copied.say(SealedRecord(self.index, record))
        self._pending = SparseSum(self.n_virtual)
        self._pending_incarnations = {}

    def _seal(self, record: Record) -> None:
        self.store.seal(record)
        self.store.recover()
        self.commits.append(record.commit)
        self.clocks.advance(Range(0, self.n_virtual))

    def _record(self) -> Record:
        """Old and new values of the coordinates that the step touches."""
        step = self.version
        rate, planned = self.rule.rate(step), np.float32(self.rule.planned(step))
        total, told = self._pending.gradient(), self._pending.total()
        parts = tuple((n, self._pending_incarnations[n], p.rows) for n, p in sorted(self._pending.parts.items()))
        ids = np.subtract(total.ids, self.span.begin, dtype=np.intp)
        old = {name: array.take(ids) for name, array in self.store.arrays.items()}
        new = {name: np.empty_like(values) for name, values in old.items()}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            gradient = total.values / planned
            self._penalize(total.ids, gradient, old[PARAMS])
            self.rule.transform.update(gradient, np.float32(rate), old[PARAMS], old, new[PARAMS], new)
        return Record(ids, old, new, Commit(step, told.loss, told.rows, rate, parts))

    def _penalize(self, ids: Int32, gradient: Float32, params: Float32) -> None:
        if self.rule.l2 == 0:
            return
        penalty = np.float32(self.rule.l2) * params
        for span in self._unpenalized:
            begin, end = np.searchsorted(ids, (span.begin, span.end))
            penalty[begin:end] = 0
        gradient += penalty


def make_sparse_shard(
    index: int,
    rule: Rule,
    span: Range,
    learner: BoundHashed,
    *,
    n_virtual: int,
    seed: int,
    generation: Generation | None,
    record: Record | None = None,
    commits: Sequence[Commit] = (),
    buffers: Sequence[Float32] | None = None,
    state: Sequence[dict[str, Float32]] | None = None,
    on_write: Callable[[int], None] | None = None,
    on_seal: Callable[[Record], None] | None = None,
) -> SparseShard:
    """A shard that begins at its part of a generation, or at the initial values, which it makes itself.

    buffers, state: one of (len(span),) float32 zeros for the parameters, and for each slot of the optimizer's state
    record, commits: of a shard that died, whose arrays ``generation`` is: as it left them
    """
    params = np.zeros(len(span), np.float32) if buffers is None else buffers[0]
    empty = {s: np.zeros(len(span), np.float32) for s in rule.transform.slots} if state is None else state[0]
    if generation is None:
        learner.initialize(params, span, seed)
    else:
        Generation(0, params, empty).take(generation)
    store = Store(0 if generation is None else generation.step, {PARAMS: params, **empty})
    if on_write is not None:
        store.on_write = on_write
    if on_seal is not None:
        store.on_seal = on_seal
    if record is not None:
        store.seal(record)
    unpenalized = learner.layout.unpenalized()
    return SparseShard(index, rule, span, store, n_virtual=n_virtual, unpenalized=unpenalized, commits=commits)


def _restore(values: Float32, ids: Int32, record: Record) -> None:
    """Put the record's old values in place of the new ones. ids, values: (m,), of the shard."""
    if not len(record.ids):
        return
    place = np.minimum(np.searchsorted(record.ids, ids), len(record.ids) - 1)
    found = record.ids[place] == ids
    values[found] = record.old[PARAMS][place[found]]
