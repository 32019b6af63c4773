"""When a push counts, and how old the parameters may be that it was computed from.

0     bulk-synchronous (BSP): step t is computed from exactly version t
k     stale-synchronous (SSP): from version t - k or a newer one; pushes are applied as they come
inf   asynchronous (ASP): from whatever is newest
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf


@dataclass(frozen=True, slots=True)
class Consistency:
    """``staleness``: how many steps the version that a worker computes from may lag behind its own clock.

    >>> Consistency().oldest(7), Consistency(2).oldest(7), Consistency(float("inf")).oldest(7)
    (7, 5, 0)
    >>> Consistency(2).admits(step=7, read=5), Consistency(2).admits(step=7, read=4)
    (True, False)
    """

    staleness: float = 0

    @property
    def exact(self) -> bool:
        """Whether a step is computed from exactly one version, the same on every shard."""
        return self.staleness == 0

    def oldest(self, step: int) -> int:
        """The oldest version from which a worker may compute ``step``."""
        if self.staleness == 0:  # asked several times a step
            return step
        return 0 if isinf(self.staleness) else max(0, step - int(self.staleness))

    def admits(self, step: int, read: int) -> bool:
        """Whether a push for ``step`` that was computed from version ``read`` keeps the bound."""
        return self.oldest(step) <= read <= step
