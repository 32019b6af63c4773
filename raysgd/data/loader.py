"""Read the windows of some virtual workers, draw minibatches from them at random; one window is read ahead.

    shards on disk ──read, encode──▶ pieces ──▶ open window of v, its permutation ──gather──▶ batch(step, v)
                     └─ kept up to cache_bytes      one more window, the earliest needed, is read meanwhile

Rows stay in file order and are gathered step by step: a batch is then in the core's cache when its gradient is
computed, and to lay a window out anew would take longer.

What is read ahead or kept changes nothing but time: which rows, and their order, is the sampler's alone.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from types import TracebackType

import numpy as np
import numpy.typing as npt

from raysgd.data.dataset import Dataset
from raysgd.data.encode import Encoder
from raysgd.data.sampler import Piece, Sampler, Window
from raysgd.errors import InputError
from raysgd.learn.batch import Batch, concatenate
from raysgd.learn.parameters import Range


def read_batch(dataset: Dataset, encoder: Encoder, shard: int) -> tuple[Batch, int]:
    """Read and encode one shard in file order: (the rows, how many category values are unseen or missing).

    The label is encoded where ``dataset`` has one. Raises InputError with file and row group.
    """
    table = dataset.read(shard, as_dictionary=True)
    try:
        return encoder.apply(table, with_label=dataset.schema.label is not None)
    except InputError as error:
        raise InputError([f"{dataset.where(shard)}: {problem}" for problem in error.problems]) from error


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    """A window: where it is in the plan. Ordered by the step that needs it first."""

    step: int
    virtual_worker: int
    epoch: int
    window: int


@dataclass(frozen=True, slots=True)
class _Filled:
    """A window's rows in file order, and (n_rows,) the positions of those that are drawn first, second ...

    begin: what to take off ``step * rows_per_draw`` for the first of them that is drawn at a step
    """

    rows: Batch
    order: npt.NDArray[np.intp]
    unseen: int
    begin: int


class Loader:
    """The minibatches of a run of virtual workers. Use from one thread; it has one more of its own.

    dataset:         the training table
    encoder:         fitted to it
    sampler:         the plan
    virtual_workers: those that this loader serves
    cache_bytes:     decoded shards are kept in memory up to this size, the first that come
    end_step:        no window that is first needed at this step or later is read ahead; None: no end

    Holds the open window of each virtual worker and one more. ``unseen``: category values read so far that training
    statistics do not have, or that are missing.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: Encoder,
        sampler: Sampler,
        virtual_workers: Range,
        cache_bytes: int = 0,
        *,
        end_step: int | None = None,
    ) -> None:
        assert sampler.n_rows == dataset.n_rows, "the sampler's plan is made for this table"
        self.unseen = 0
        self._dataset = dataset
        self._encoder = encoder
        self._sampler = sampler
        self._virtual_workers = virtual_workers
        self._end_step = end_step
        self._cache = _ShardCache(cache_bytes)
        #: virtual worker -> its open window; at most one each
        self._open: dict[int, tuple[_Place, _Filled]] = {}
        #: virtual worker -> (step, batch) handed out last, so that asking again reads nothing
        self._last: dict[int, tuple[int, Batch | None]] = {}
        self._ahead: tuple[_Place, Future[_Filled]] | None = None
        self._step = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raysgd-read-ahead")

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def batch(self, step: int, virtual_worker: int) -> Batch | None:
        """The rows that ``virtual_worker`` draws at ``step``, None where it draws none.

        Cheapest for steps in order; any other is served too, by reading its windows.

        Raises InputError where a file changed, is damaged, or holds what cannot be encoded.
        """
        begin, end = self._virtual_workers.begin, self._virtual_workers.end
        assert begin <= virtual_worker < end, f"{virtual_worker} is none of {self._virtual_workers}"
        last = self._last.get(virtual_worker)
        if last is not None and last[0] == step:
            return last[1]
        if step not in (self._step, self._step + 1):
            self._jump(step)
        self._step = step
        batch = self._from_open(step, virtual_worker)
        if batch is None:
            draws = self._sampler.draws(step, virtual_worker)
            parts = [self._draw(step, virtual_worker, draw) for draw in draws]
            batch = concatenate(parts) if parts else None
        self._last[virtual_worker] = (step, batch)
        return batch

    def draw(self, step: int) -> None:
        """Have the batches of all virtual workers at ``step`` ready for :meth:`batch`."""
        for v in range(self._virtual_workers.begin, self._virtual_workers.end):
            self.batch(step, v)

    def close(self) -> None:
        """End the thread and forget all windows."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None
        self._open.clear()
        self._last.clear()
        self._cache.clear()

    def _from_open(self, step: int, virtual_worker: int) -> Batch | None:
        """The batch of a step, where it lies inside the open window as nearly all do: without asking the plan."""
        current = self._open.get(virtual_worker)
        if current is None:
            return None
        window, count = current[1], self._sampler.rows_per_draw
        begin = step * count - window.begin
        if begin < 0 or begin + count > len(window.order):
            return None
        return window.rows.take(window.order[begin : begin + count])

    def _draw(self, step: int, virtual_worker: int, draw: tuple[int, int, int]) -> Batch:
        index, begin, end = draw
        window = self._window(step, virtual_worker, index)
        return window.rows.take(window.order[begin:end])

    def _jump(self, step: int) -> None:
        """Let go of every window that ``step`` does not draw from."""
        for v, (place, _) in list(self._open.items()):
            if place != self._first_needed(step, v):
                del self._open[v]
        self._last.clear()
        self._drop_ahead_unless_needed(step)

    def _window(self, step: int, virtual_worker: int, window: int) -> _Filled:
        place = self._place(self._sampler.epoch(step), virtual_worker, window)
        assert place is not None
        current = self._open.get(virtual_worker)
        if current is not None and current[0] == place:
            return current[1]
        # First let go of the old one: no more than one window for each virtual worker, and one ahead.
        del current
        self._open.pop(virtual_worker, None)
        filled = self._take_ahead(place) or self._fill(place)
        self.unseen += filled.unseen
        self._open[virtual_worker] = (place, filled)
        self._read_ahead()
        return filled

    def _take_ahead(self, place: _Place) -> _Filled | None:
        """The window that was read ahead, if it is this one."""
        if self._ahead is None or self._ahead[0] != place:
            return None
        _, future = self._ahead
        self._ahead = None
        return future.result()

    def _drop_ahead_unless_needed(self, step: int) -> None:
        if self._ahead is None or self._ahead[0] in self._next_places(step):
            return
        _, future = self._ahead
        self._ahead = None
        if not future.cancel():
            future.exception()  # waits for it: two windows ahead at once would break the promise on memory

    def _read_ahead(self) -> None:
        if self._ahead is not None:
            return
        places = [p for p in self._next_places(self._step) if self._end_step is None or p.step < self._end_step]
        if places:
            place = min(places)
            self._ahead = (place, self._thread.submit(self._fill, place))

    def _next_places(self, step: int) -> list[_Place]:
        """The window that each virtual worker opens next."""
        places = []
        for v in range(self._virtual_workers.begin, self._virtual_workers.end):
            current = self._open.get(v)
            place = self._first_needed(step, v) if current is None else self._after(current[0])
            if place is not None:
                places.append(place)
        return places

    def _first_needed(self, step: int, virtual_worker: int) -> _Place | None:
        draws = self._sampler.draws(step, virtual_worker)
        epoch = self._sampler.epoch(step)
        if draws:
            return self._place(epoch, virtual_worker, draws[0][0])
        return self._place(epoch + 1, virtual_worker, 0)

    def _after(self, place: _Place) -> _Place | None:
        v, windows = place.virtual_worker, self._sampler.windows(place.epoch, place.virtual_worker)
        if place.window + 1 < len(windows):
            return self._place(place.epoch, v, place.window + 1)
        return self._place(place.epoch + 1, v, 0)

    def _place(self, epoch: int, virtual_worker: int, window: int) -> _Place | None:
        windows = self._sampler.windows(epoch, virtual_worker)
        if not windows:
            return None
        first = windows[window].begin // self._sampler.rows_per_draw
        return _Place(epoch * self._sampler.steps_per_epoch + first, virtual_worker, epoch, window)

    def _fill(self, place: _Place) -> _Filled:
        """Read a window: it and one shard in memory, no more."""
        sampler, v = self._sampler, place.virtual_worker
        window = sampler.windows(place.epoch, v)[place.window]
        rows = self._single(window.pieces[0]) if len(window.pieces) == 1 else self._joined(window)
        inputs = self._encoder.inputs
        vocabularies = inputs.categories and not inputs.hash_bits
        unseen = int((rows.codes == inputs.n_codes).sum()) if vocabularies else 0
        begin = place.epoch * sampler.steps_per_epoch * sampler.rows_per_draw + window.begin
        return _Filled(rows, sampler.window_permutation(place.epoch, v, place.window), unseen, begin)

    def _single(self, piece: Piece) -> Batch:
        """The rows of one piece, as views where these take no more memory."""
        decoded, kept = self._decoded(piece.shard)
        rows = decoded.slice(piece.begin, piece.end)
        return rows if kept or len(piece) == len(decoded) else rows.copy()

    def _joined(self, window: Window) -> Batch:
        """The rows of a window's pieces, one piece after the other; each shard is read once."""
        inputs = self._encoder.inputs
        rows = Batch(
            np.empty((window.rows, inputs.numeric), np.float32),
            np.empty((window.rows, len(inputs.categories)), np.int32),
            np.empty(window.rows, np.float32),
            np.ones(window.rows, np.float32) if self._weighted else None,
        )
        at: dict[int, list[tuple[int, Piece]]] = {}
        begin = 0
        for piece in window.pieces:
            at.setdefault(piece.shard, []).append((begin, piece))
            begin += len(piece)
        for shard, pieces in at.items():
            decoded, _ = self._decoded(shard)
            for begin, piece in pieces:
                _put(rows.slice(begin, begin + len(piece)), decoded.slice(piece.begin, piece.end))
        return rows

    @property
    def _weighted(self) -> bool:
        return self._encoder.columns.weight is not None or self._encoder.nulls == "drop"

    def _decoded(self, shard: int) -> tuple[Batch, bool]:
        """A shard's rows, and whether they are kept."""
        decoded = self._cache.get(shard)
        if decoded is not None:
            return decoded, True
        decoded, _ = read_batch(self._dataset, self._encoder, shard)
        return decoded, self._cache.offer(shard, decoded)


class _ShardCache:
    """Decoded shards, the first that come, up to a size; none is ever replaced: an epoch reads each just once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._shards: dict[int, Batch] = {}
        self._lock = Lock()

    def get(self, shard: int) -> Batch | None:
        return self._shards.get(shard)

    def offer(self, shard: int, rows: Batch) -> bool:
        """Keep these rows of a shard, if there is room; whether they are kept."""
        with self._lock:
            if shard not in self._shards and self._size + rows.nbytes <= self._limit:
                self._shards[shard] = rows
                self._size += rows.nbytes
            return self._shards.get(shard) is rows

    def clear(self) -> None:
        self._shards.clear()


def _put(into: Batch, rows: Batch) -> None:
    """Copy rows; where ``into`` has weights and they have none, they keep the weight that is there."""
    into.numeric[...] = rows.numeric
    into.codes[...] = rows.codes
    into.label[...] = rows.label
    if into.weight is not None and rows.weight is not None:
        into.weight[...] = rows.weight
