"""Clocks: how many steps of each virtual worker are committed."""

from __future__ import annotations

import numpy as np

from raysgd.learn.batch import Int64
from raysgd.learn.parameters import Range


class Clocks:
    """One counter per virtual worker. Their minimum is the version under BSP.

    >>> clocks = Clocks(3, start=5); clocks.advance(Range(0, 2)); clocks.minimum, clocks.of(Range(0, 2))
    (5, 6)
    """

    def __init__(self, n_virtual: int, start: int = 0) -> None:
        self.steps: Int64 = np.full(n_virtual, start, np.int64)

    @property
    def minimum(self) -> int:
        return int(self.steps.min())

    def of(self, run: Range) -> int:
        """The minimum over a run of virtual workers: where a successor has to begin."""
        return int(self.steps[run.slice].min())

    def advance(self, run: Range) -> None:
        """One more committed step for each virtual worker of ``run``."""
        self.steps[run.slice] += 1
