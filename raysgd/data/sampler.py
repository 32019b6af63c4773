"""Which rows a virtual worker draws at a step: a pure function of (seed, step, virtual worker).

    shards permuted    | 3 |   0   | 2 |  4  |    1    |      one order an epoch, N rows in all
    virtual workers    |    v = 0     |      v = 1     |      equal runs of positions: [vN // V, (v + 1)N // V)
    pieces             | 3 |   0   |2 |2|  4 |    1    |      only shards on a boundary are read twice
    windows of v = 1                  |  w=0 |   w=1   |      several pieces; their rows are permuted jointly
    stream of v = 1                   [ b ][ b ][ b ][]       and cut into minibatches of b = batch_size / V rows

Nothing is dropped and nothing drawn twice: each epoch is a permutation of the rows. Resuming is setting an integer.

Source: the window shuffle of ``tf.data`` and of webdataset, made exact: a pure function instead of a buffer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from raysgd.errors import InputError
from raysgd.learn.batch import Int64
from raysgd.learn.random import permutation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [begin, end) of one shard, counted from the shard's first row."""

    shard: int
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Window:
    """Pieces whose rows are permuted jointly.

    begin: position of the window's first row in the stream of its virtual worker
    rows:  rows in all pieces together
    """

    pieces: tuple[Piece, ...]
    begin: int
    rows: int

    @property
    def end(self) -> int:
        return self.begin + self.rows


class Sampler:
    """The plan of every epoch.

    shard_rows:      rows of each shard
    batch_size:      rows of a step over all virtual workers, a multiple of ``virtual_workers``
    virtual_workers: parts V into which every batch is cut
    seed:            names the permutations
    window_rows:     a window closes as soon as it holds this many rows
    fragment_rows:   shards longer than this are cut into equal fragments, and these are permuted instead of shards:
                     for few shards whose labels differ. Each is then decoded by several virtual workers. None: never

    Raises InputError where no rows or no such cut exist.

    >>> sampler = Sampler([4, 3, 5], batch_size=4, virtual_workers=2, seed=0, window_rows=4)
    >>> sampler.steps_per_epoch, [sampler.rows_in_step(t) for t in range(3)]
    (3, [4, 4, 4])
    >>> epoch = np.concatenate([sampler.row_ids(t, v) for t in range(3) for v in range(2)])
    >>> sorted(epoch.tolist()) == list(range(12))
    True
    """

    def __init__(
        self,
        shard_rows: Sequence[int],
        batch_size: int,
        virtual_workers: int,
        seed: int,
        window_rows: int,
        *,
        fragment_rows: int | None = None,
    ) -> None:
        self.shard_rows: Int64 = np.asarray(shard_rows, np.int64)
        self.batch_size = batch_size
        self.virtual_workers = virtual_workers
        self.seed = seed
        self.window_rows = window_rows
        self.fragment_rows = fragment_rows
        self.n_rows = int(self.shard_rows.sum())
        if problems := self.problems():
            raise InputError(problems)
        #: rows that one virtual worker draws at a full step
        self.rows_per_draw = batch_size // virtual_workers
        self.steps_per_epoch = ceil_div(ceil_div(self.n_rows, virtual_workers), self.rows_per_draw)
        self._first_row: Int64 = np.cumsum(self.shard_rows) - self.shard_rows
        self._fragments = cut(self.shard_rows, fragment_rows)
        self._orders: _Recent[tuple[npt.NDArray[np.intp], Int64]] = _Recent(2)
        self._plans: _Recent[_Plan] = _Recent(2 * virtual_workers)
        self._permutations: _Recent[npt.NDArray[np.intp]] = _Recent(virtual_workers)

    def problems(self) -> list[str]:
        """Every reason why this plan cannot be drawn, one sentence each."""
        problems = []
        if self.n_rows < 1:
            problems.append("the data must have at least one row, got none")
        if self.virtual_workers < 1:
            problems.append(f"virtual_workers must be >= 1, got {self.virtual_workers}")
        elif self.batch_size < 1 or self.batch_size % self.virtual_workers:
            problems.append(
                f"batch_size must be a positive multiple of virtual_workers = {self.virtual_workers}, "
                f"got {self.batch_size}"
            )
        if self.window_rows < 1:
            problems.append(f"window_rows must be >= 1, got {self.window_rows}")
        if self.fragment_rows is not None and self.fragment_rows < 1:
            problems.append(f"fragment_rows must be >= 1 or None, got {self.fragment_rows}")
        return problems

    def __getstate__(self) -> dict[str, Any]:
        # Without the caches: a pickled sampler is its arguments.
        names = ("shard_rows", "batch_size", "virtual_workers", "seed", "window_rows", "fragment_rows")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def epoch(self, step: int) -> int:
        """The epoch that the global step ``step`` belongs to."""
        return step // self.steps_per_epoch

    def rows_in_step(self, step: int) -> int:
        """Rows of the global batch at ``step``: batch_size, fewer at the end of an epoch."""
        begin = step % self.steps_per_epoch * self.rows_per_draw
        share, longer = divmod(self.n_rows, self.virtual_workers)
        short = min(max(share - begin, 0), self.rows_per_draw)
        long = min(max(share + 1 - begin, 0), self.rows_per_draw)
        return (self.virtual_workers - longer) * short + longer * long

    def windows(self, epoch: int, virtual_worker: int) -> tuple[Window, ...]:
        """The windows of one virtual worker in the order in which it draws from them."""
        return self._plan(epoch, virtual_worker).windows

    def draws(self, step: int, virtual_worker: int) -> list[tuple[int, int, int]]:
        """(window, begin, end): the batch is permuted rows [begin, end) of these windows, one after the other.

        Empty where the virtual worker has no rows left at this step; counts of rows start at the window's begin.
        """
        plan = self._plan(self.epoch(step), virtual_worker)
        begin = step % self.steps_per_epoch * self.rows_per_draw
        end = min(begin + self.rows_per_draw, plan.rows)
        draws: list[tuple[int, int, int]] = []
        index = bisect_right(plan.begins, begin) - 1
        while begin < end:
            window = plan.windows[index]
            draws.append((index, begin - window.begin, min(end, window.end) - window.begin))
            begin, index = window.end, index + 1
        return draws

    def window_permutation(self, epoch: int, virtual_worker: int, window: int) -> npt.NDArray[np.intp]:
        """(rows,) the joint order of a window's rows, these being counted through its pieces."""
        rows = self.windows(epoch, virtual_worker)[window].rows
        return permutation(rows, self.seed, "rows", epoch, virtual_worker, window)

    def window_row_ids(self, epoch: int, virtual_worker: int, window: int) -> Int64:
        """(rows,) ids of a window's rows in file order of its pieces, before they are permuted."""
        pieces = self.windows(epoch, virtual_worker)[window].pieces
        first = self._first_row
        return np.concatenate([np.arange(first[p.shard] + p.begin, first[p.shard] + p.end) for p in pieces])

    def row_ids(self, step: int, virtual_worker: int) -> Int64:
        """(n_rows,) ids of the rows drawn at ``step``, in order; ids count through the shards as they are listed."""
        epoch = self.epoch(step)
        parts = [np.empty(0, np.int64)]
        for window, begin, end in self.draws(step, virtual_worker):
            key = (epoch, virtual_worker, window)
            order = self._permutations.get(key, partial(self.window_permutation, *key))
            parts.append(self.window_row_ids(*key)[order[begin:end]])
        return np.concatenate(parts)

    def place(self, row: int) -> tuple[int, int]:
        """(shard, row in the shard) of a row id.

        >>> Sampler([4, 3], batch_size=2, virtual_workers=1, seed=0, window_rows=4).place(5)
        (1, 1)
        """
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        while not self.shard_rows[shard]:
            shard -= 1
        return shard, row - int(self._first_row[shard])

    def _order(self, epoch: int) -> tuple[npt.NDArray[np.intp], Int64]:
        """The permuted fragments, and the position in the epoch at which each ends."""

        def order() -> tuple[npt.NDArray[np.intp], Int64]:
            _, begins, ends = self._fragments
            fragments = permutation(len(begins), self.seed, "shards", epoch)
            return fragments, np.cumsum((ends - begins)[fragments])

        return self._orders.get(epoch, order)

    def _plan(self, epoch: int, virtual_worker: int) -> _Plan:
        def plan() -> _Plan:
            return _Plan(close_windows(self._pieces(epoch, virtual_worker), self.window_rows))

        return self._plans.get((epoch, virtual_worker), plan)

    def _pieces(self, epoch: int, virtual_worker: int) -> list[Piece]:
        begin = virtual_worker * self.n_rows // self.virtual_workers
        end = (virtual_worker + 1) * self.n_rows // self.virtual_workers
        shard_of, _, shard_ends = self._fragments
        order, ends = self._order(epoch)
        pieces = []
        index = int(np.searchsorted(ends, begin, side="right"))
        while begin < end:
            fragment, position_end = order[index], int(ends[index])
            to_row = int(shard_ends[fragment]) - position_end
            if (stop := min(end, position_end)) > begin:
                pieces.append(Piece(int(shard_of[fragment]), begin + to_row, stop + to_row))
            begin, index = stop, index + 1
        return pieces


def ceil_div(a: int, b: int) -> int:
    """The least integer >= a / b."""
    return (a + b - 1) // b


def cut(shard_rows: Int64, fragment_rows: int | None) -> tuple[Int64, Int64, Int64]:
    """(shard, begin, end), each (n_fragments,): every shard in equal parts of at most ``fragment_rows`` rows.

    >>> [a.tolist() for a in cut(np.array([5, 0, 2]), 3)]
    [[0, 0, 1, 2], [0, 2, 0, 0], [2, 5, 0, 2]]
    """
    parts = np.ones_like(shard_rows)
    if fragment_rows is not None:
        parts = np.maximum(1, (shard_rows + fragment_rows - 1) // fragment_rows)
    shard = np.repeat(np.arange(len(shard_rows)), parts)
    part = np.arange(len(shard)) - np.repeat(np.cumsum(parts) - parts, parts)
    rows, parts = shard_rows[shard], parts[shard]
    return shard, part * rows // parts, (part + 1) * rows // parts


def close_windows(pieces: Sequence[Piece], window_rows: int) -> tuple[Window, ...]:
    """Pieces grouped in order: a window closes at ``window_rows`` rows; a last one below half joins the one before.

    >>> [w.rows for w in close_windows([Piece(0, 0, 5), Piece(1, 0, 5), Piece(2, 0, 9), Piece(3, 0, 2)], 8)]
    [10, 11]
    """
    groups: list[list[Piece]] = []
    rows = window_rows
    for piece in pieces:
        if rows >= window_rows:
            groups.append([])
            rows = 0
        groups[-1].append(piece)
        rows += len(piece)
    if len(groups) > 1 and 2 * rows < window_rows:
        last = groups.pop()
        groups[-1].extend(last)
    windows = []
    begin = 0
    for group in groups:
        windows.append(Window(tuple(group), begin, sum(map(len, group))))
        begin = windows[-1].end
    return tuple(windows)


class _Plan:
    """The windows of one virtual worker in one epoch, with what a look-up by stream position needs."""

    def __init__(self, windows: tuple[Window, ...]) -> None:
        self.windows = windows
        self.begins = [w.begin for w in windows]
        self.rows = windows[-1].end if windows else 0


class _Recent(OrderedDict[Hashable, T]):
    """The ``size`` values asked for last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def get(self, key: Hashable, make: Callable[[], T]) -> T:  # type: ignore[override]
        if key in self:
            self.move_to_end(key)
            return self[key]
        value = self[key] = make()
        if len(self) > self._size:
            self.popitem(last=False)
        return value
