"""A server's generations where its node can see them: parameters for its workers, all of it for a successor.

    newest | sequence | writing | frozen | diverged        words; newest last
    commits: step, loss, rows, rate, staleness             a ring, for the loss curve
    params of sequence s at s % buffers; each slot of the optimizer's state, the same
    what is in each buffer                                 where staleness is allowed, see pushes.py
    the record of the newest step                          where few coordinates are touched, see sparse_record.py

A buffer is announced in ``writing`` before it is written to. So whoever finds the memory after the server's death knows
which generations are whole, and a reader that copies knows whether it was overtaken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raysgd.errors import RunError
from raysgd.learn.batch import Float32, Float64
from raysgd.protocol.gate import Commit
from raysgd.protocol.generation import Generation
from raysgd.protocol.kept import Kept
from raysgd.protocol.replica import Copy
from raysgd.protocol.sparse_shard import SparseCopy
from raysgd.runtime.pushes import Pushes
from raysgd.runtime.segment import ASLEEP, Address, Segment
from raysgd.runtime.sparse_record import SparseRecord

#: words of a board, behind the one that says whether the server sleeps
NEWEST, SEQUENCE, WRITING, FROZEN, DIVERGED = range(ASLEEP + 1, ASLEEP + 6)

#: commits that a board keeps, and the numbers of each: step, loss, rows, learning rate, staleness
RECORDS, RECORD = 8192, 5


def aligned(count: int) -> int:
    """Bytes of ``count`` float32, rounded up to whole pages so that no two arrays share a cache line."""
    return -(-count * 4 // 4096) * 4096


@dataclass(frozen=True, slots=True)
class BoardAddress:
    """What a worker needs to follow one server shard of ``size`` coordinates, and a successor to take over from it."""

    segment: Address
    bell: bytes
    size: int
    kept: Kept = field(default_factory=Kept)


class Board:
    """A server shard's generations where its node can see them; what of it outlives the server's process.

    params: one (size,) float32 a buffer;  state: each slot, the same
    pushes: what is in each buffer, where a version does not tell
    sealed: the record of the newest step, where one buffer is written in place
    """

    def __init__(self, segment: Segment, size: int, kept: Kept) -> None:
        self.segment, self.size, self.kept = segment, size, kept
        self.words = segment.words
        self.records = segment.doubles(RECORDS * RECORD)
        buffers, slots = kept.buffers, kept.slots
        at, stride = self._records_bytes(), aligned(size)
        arrays = [segment.floats(at + i * stride, size) for i in range(buffers * (1 + len(slots)))]
        self.params = tuple(arrays[:buffers])
        self.state = tuple(
            {slot: arrays[(1 + k) * buffers + i] for k, slot in enumerate(slots)} for i in range(buffers)
        )
        at += len(arrays) * stride
        self.pushes: Pushes | None = None
        self.sealed: SparseRecord | None = None
        pushes, record, norms = self._behind(size, kept)
        if kept.n_virtual:
            self.pushes = Pushes(segment.floats(at, pushes).view(np.int64), buffers, kept.n_virtual)
        if kept.touched:
            self.sealed = SparseRecord(segment.floats(at + aligned(pushes), record), min(size, kept.touched), slots)
        #: of the newest two steps: the step, how many sums of squares, these
        self._norms = segment.floats(at + aligned(pushes) + aligned(record), norms).view(np.float64).reshape(2, -1)

    @staticmethod
    def _behind(size: int, kept: Kept) -> tuple[int, int, int]:
        """float32 that lie behind the generations: of the pushes, of the record, of the norms."""
        pushes = 2 * Pushes.size(kept.buffers, kept.n_virtual) if kept.n_virtual else 0
        record = SparseRecord.size(min(size, kept.touched), kept.slots) if kept.touched else 0
        return pushes, record, 2 * 2 * (2 + kept.norms)

    @staticmethod
    def _records_bytes() -> int:
        return aligned(2 * RECORDS * RECORD)

    @classmethod
    def create(cls, size: int, kept: Kept | None = None) -> Board:
        kept = kept or Kept()
        arrays = kept.buffers * (1 + len(kept.slots)) * aligned(size)
        behind = sum(aligned(count) for count in cls._behind(size, kept))
        board = cls(Segment.create(cls._records_bytes() + arrays + behind), size, kept)
        if board.pushes is not None:
            board.pushes.clear()
        if board.sealed is not None:
            board.sealed.clear()
        board._norms[:, 0] = -1.0
        return board

    @classmethod
    def attach(cls, address: BoardAddress) -> Board:
        return cls(Segment.attach(address.segment), address.size, address.kept)

    def address(self, bell: bytes) -> BoardAddress:
        """What others need. bell: of the server"""
        return BoardAddress(self.segment.address, bell, self.size, self.kept)

    def announce(self, sequence: int) -> None:
        """The buffer of ``sequence`` is about to be written to."""
        self.words[WRITING] = sequence
        if self.pushes is not None:
            self.pushes.announce(sequence)

    def at(self, sequence: int) -> Float32:
        """The buffer of ``sequence``, in place."""
        return self.params[sequence % len(self.params)]

    def copy(self, out: Float32) -> int | None:
        """Copy the newest parameters into ``out``; their version, or None where they were written over meanwhile.

        The version is read first: what is copied may be newer, never older.
        """
        words = self.words
        version = words[NEWEST]
        sequence = words[SEQUENCE]
        np.copyto(out, self.at(sequence))
        return version if words[WRITING] < sequence + len(self.params) else None

    def record(self, commits: Sequence[Commit], since: int) -> int:
        """Note the commits of steps >= ``since``, before the version that they are in; the step that comes next."""
        for commit in reversed(commits):
            if commit.step < since:
                break
            at = commit.step % RECORDS * RECORD
            self.records[at] = -1.0  # while it is half-written it is of no step
            self.records[at + 1] = commit.loss
            self.records[at + 2] = commit.rows
            self.records[at + 3] = commit.rate
            self.records[at + 4] = commit.staleness
            self.records[at] = commit.step
        return commits[-1].step + 1 if commits else since

    def norms(self, step: int, square_sums: Float64) -> None:
        """Note the shard's part of a step's norm, before the step is sealed: other shards may still wait for it."""
        entry = self._norms[step % 2]
        entry[0] = -1.0
        entry[1] = len(square_sums)
        entry[2 : 2 + len(square_sums)] = square_sums
        entry[0] = step

    def survives(self, since: int) -> Copy | SparseCopy:
        """What a successor finds after the death of the server, views: call it when nobody writes any more. Commits are
        without who took part in them.

        Raises RunError where its records do not tell of all steps from ``since`` on.
        """
        if self.pushes is not None:
            sequence, tally = self.pushes.survives(since)
            newest = Generation(tally.version, self.at(sequence), self.state[sequence % len(self.state)])
            return Copy(newest, None, [], tally)
        if self.sealed is not None:
            return self._survives_in_place(self.sealed, since)
        words = self.words
        version, sequence = words[NEWEST], words[SEQUENCE]
        newest = Generation(version, self.at(sequence), self.state[sequence % len(self.state)])
        previous = None
        if words[WRITING] <= sequence:  # else the buffer of the version before was being written over
            before = sequence - 1
            previous = Generation(version - 1, self.at(before), self.state[before % len(self.state)])
        entry = self._norms[(version - 1) % 2]
        norms = (version - 1, entry[2 : 2 + int(entry[1])].copy()) if entry[0] == version - 1 >= 0 else None
        return Copy(newest, previous, self._recorded(since, version), last_norms=norms)

    def _survives_in_place(self, sealed: SparseRecord, since: int) -> SparseCopy:
        """Of arrays that are written in place: as they are, and the record that takes them to the newest version."""
        version, record = self.words[NEWEST], sealed.survives()
        arrays = Generation(version, self.params[0], self.state[0])
        commits = self._recorded(since, version)
        if record is not None and record.version == version + 1:
            commits.append(record.commit)
        return SparseCopy(arrays, record, commits)

    def _recorded(self, since: int, version: int) -> list[Commit]:
        """The commits of steps [since, version). Raises RunError where one is not kept any more."""
        found = []
        for step in range(max(0, since), version):
            at = step % RECORDS * RECORD
            if self.records[at] != step:
                raise RunError(f"the memory of the server that died does not tell of step {step} any more")
            _, loss, rows, rate, staleness = self.records[at : at + RECORD].tolist()
            found.append(Commit(step, loss, int(rows), rate, (), int(staleness)))
        return found
