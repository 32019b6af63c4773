"""Who carries which virtual worker, and the incarnation number that fences those who no longer do."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from raysgd.learn.parameters import Range


@dataclass(frozen=True, slots=True)
class Assignment:
    """A contiguous run of virtual workers, carried by one worker, with one incarnation for each of them."""

    worker: int
    run: Range
    incarnations: tuple[int, ...]

    def incarnations_of(self, node: Range) -> tuple[int, ...]:
        """The incarnations of the virtual workers of ``node``, which lies inside the run."""
        begin = self.run.begin
        return self.incarnations[node.begin - begin : node.end - begin]


def deal(n_virtual: int, n_workers: int) -> tuple[Range, ...]:
    """``n_virtual`` virtual workers as ``n_workers`` contiguous runs that differ by at most one.

    >>> deal(8, 3)
    (Range(begin=0, end=2), Range(begin=2, end=5), Range(begin=5, end=8))
    """
    assert 1 <= n_workers <= n_virtual, (n_workers, n_virtual)
    cuts = [i * n_virtual // n_workers for i in range(n_workers + 1)]
    return tuple(Range(a, b) for a, b in pairwise(cuts))


class Membership:
    """The current incarnation of every virtual worker; raised at each assignment, never lowered."""

    def __init__(self, n_virtual: int) -> None:
        self.incarnations = [0] * n_virtual

    def assign(self, worker: int, run: Range) -> Assignment:
        """Give ``run`` to ``worker`` under fresh incarnations.

        The caller raises them at every server shard, and awaits that, before the worker may push.
        """
        fresh = max(self.incarnations[run.slice]) + 1
        self.incarnations[run.slice] = [fresh] * len(run)
        return Assignment(worker, run, (fresh,) * len(run))
