"""The record of a sparse shard's newest step where a successor finds it: in the board, sealed before it is carried out.

    version, sealed last | ids | old values | new values        of as many coordinates as a step can touch

The board's parameters are written in place. A record that is whole says how to bring them to its version, wherever the
writing ended; one whose seal is broken was not begun to be written from, and they are whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raysgd import failpoints
from raysgd.learn.batch import Float32, Int64
from raysgd.protocol.gate import Commit
from raysgd.protocol.sparse_shard import PARAMS, Record

#: int64 before the arrays: version, coordinates, rows; loss and rate as float64
HEAD = 8
BROKEN = -1


class SparseRecord:
    """memory: (size(capacity, slots),) float32 of the board.  slots: of the optimizer's state"""

    def __init__(self, memory: Float32, capacity: int, slots: Sequence[str]) -> None:
        self._words: Int64 = memory[: 2 * HEAD].view(np.int64)
        self._doubles = self._words.view(np.float64)
        names = (PARAMS, *slots)
        arrays = memory[2 * HEAD :].reshape(1 + 2 * len(names), capacity)
        self._ids = arrays[0].view(np.int32)
        self._old = dict(zip(names, arrays[1 : 1 + len(names)], strict=True))
        self._new = dict(zip(names, arrays[1 + len(names) :], strict=True))

    @staticmethod
    def size(capacity: int, slots: Sequence[str]) -> int:
        """How many float32 it takes."""
        return 2 * HEAD + (3 + 2 * len(slots)) * capacity

    def clear(self) -> None:
        self._words[0] = BROKEN

    def seal(self, record: Record) -> None:
        """Note a record; when this returns its step counts."""
        words, count, commit = self._words, len(record.ids), record.commit
        words[0] = BROKEN
        words[1:3] = count, commit.rows
        self._doubles[3:5] = commit.loss, commit.rate
        self._ids[:count] = record.ids
        for kept, values in ((self._old, record.old), (self._new, record.new)):
            for name, array in values.items():
                kept[name][:count] = array
        words[0] = record.version  # last
        if failpoints.armed:
            failpoints.reach("server.sealed", record.version)

    def survives(self) -> Record | None:
        """The newest record, without who took part in it; None where it is not whole."""
        version, count, rows = (int(word) for word in self._words[:3])
        if version == BROKEN:
            return None
        loss, rate = self._doubles[3:5].tolist()
        old, new = ({name: a[:count].copy() for name, a in kept.items()} for kept in (self._old, self._new))
        commit = Commit(version - 1, loss, rows, rate, ())
        return Record(self._ids[:count].astype(np.intp), old, new, commit)
