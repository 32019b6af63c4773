"""Where staleness is allowed: what a board says of each buffer of parameters, for the successor of a server that died.

    per buffer: sequence, sealed last; the clocks         words
    sequence, step, node, incarnation, rows, loss, staleness   a ring of the newest pushes, one a sequence number

A buffer's seal is broken before it is written to and set when its clocks and its push are there. So of whatever moment
the server dies in, the buffer with the greatest seal is whole, and its clocks say what is in it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from raysgd.errors import RunError
from raysgd.learn.batch import Int64
from raysgd.learn.parameters import Range
from raysgd.protocol.gate import Commit
from raysgd.protocol.messages import Push
from raysgd.protocol.tally import CARRIED, Tally

#: pushes that are kept, and the numbers of each
KEPT, NUMBERS = 32_768, 8

#: in place of a seal: the buffer is being written to, or never was
BROKEN = np.iinfo(np.int64).min


class Pushes:
    """memory: (size(buffers, n_virtual),) int64 of the board."""

    def __init__(self, memory: Int64, buffers: int, n_virtual: int) -> None:
        heads = memory[: buffers * (1 + n_virtual)].reshape(buffers, 1 + n_virtual)
        self._seals, self._clocks = heads[:, 0], heads[:, 1:]
        ring = memory[len(memory) - KEPT * NUMBERS :].view(np.float64)
        self._ring: npt.NDArray[np.float64] = ring.reshape(KEPT, NUMBERS)

    @staticmethod
    def size(buffers: int, n_virtual: int) -> int:
        """How many int64 it takes."""
        return buffers * (1 + n_virtual) + KEPT * NUMBERS

    def clear(self) -> None:
        self._seals[:] = BROKEN
        self._ring[:, 0] = -math.inf

    def begin(self, sequence: int, tally: Tally) -> None:
        """The buffer of ``sequence`` is whole and holds what the tally says."""
        parts = [(r, k) for r in tally.rounds for k in range(len(r.parts))]
        for at, (r, k) in enumerate(parts[-KEPT:], sequence + 1 - min(len(parts), KEPT)):
            node, incarnations, rows = r.parts[k]
            self._note(at, r.step, node, incarnations, rows, 0.0 if k else r.loss, r.staleness)
        self._seal(sequence, np.array(tally.clocks, np.int64))

    def announce(self, sequence: int) -> None:
        """The buffer of ``sequence`` is about to be written to."""
        self._seals[sequence % len(self._seals)] = BROKEN

    def seal(self, sequence: int, push: Push, clocks: Int64) -> None:
        """The buffer of ``sequence`` is whole, with this push in it; ``clocks`` as they are then."""
        told = push.partial
        self._note(sequence, push.step, push.node, push.incarnations, told.rows, told.loss, push.step - push.read)
        self._seal(sequence, clocks)

    def survives(self, since: int) -> tuple[int, Tally]:
        """The newest whole buffer's sequence number, and what is in it: of the steps from ``since`` on who pushed.

        Call it when nobody writes any more. Raises RunError where more was pushed since than is kept.
        """
        sequence = int(self._seals.max())
        clocks = tuple(self._clocks[int(self._seals.argmax())].tolist())
        rounds: dict[int, Commit] = {}
        for at in range(sequence - KEPT + 1, sequence + 1):
            known, step, begin, end, incarnation, rows, loss, staleness = self._ring[at % KEPT].tolist()
            if known != at or step < since:
                continue
            part = (Range(int(begin), int(end)), (int(incarnation),) * int(end - begin), int(rows))
            r = rounds.get(int(step), Commit(int(step), 0.0, 0, math.nan, ()))
            rounds[int(step)] = r._replace(
                loss=r.loss + loss,
                rows=r.rows + int(rows),
                parts=(*r.parts, part),
                staleness=max(r.staleness, int(staleness)),
            )
        tally = Tally(clocks, tuple(rounds[step] for step in sorted(rounds)))
        if not tally.whole(since):
            raise RunError(f"of the pushes since step {since} the memory of the server that died tells the last {KEPT}")
        return sequence, tally

    def _note(
        self, at: int, step: int, node: Range, incarnations: tuple[int, ...], rows: int, loss: float, staleness: int
    ) -> None:
        incarnation = incarnations[0] if len({*incarnations}) == 1 else CARRIED
        self._ring[at % KEPT] = (at, step, node.begin, node.end, incarnation, rows, loss, staleness)

    def _seal(self, sequence: int, clocks: Int64) -> None:
        buffer = sequence % len(self._seals)
        self._clocks[buffer] = clocks
        self._seals[buffer] = sequence  # last
