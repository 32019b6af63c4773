"""The loader: the sampler's rows, whatever is read ahead; reads and holds no more than it says."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from counting_filesystem import counting_filesystem
from data_tables import make_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysgd.data.dataset import ArrowDataset, Dataset, open_dataset
from raysgd.data.encode import Encoder
from raysgd.data.loader import Loader, _Filled
from raysgd.data.moments import merge, shard_statistics
from raysgd.data.sampler import Sampler
from raysgd.errors import InputError
from raysgd.learn.batch import Batch
from raysgd.learn.parameters import Range

Write = Callable[..., Path]


def opened(write: Write, n: int = 1000, rows: int = 37, **roles: Any) -> tuple[Dataset, Encoder]:
    """A table whose label is the row's id."""
    roles = {"label": "id", "categorical": ["color", "k"], **roles}
    dataset = open_dataset(ArrowDataset(str(write(make_table(n), rows=rows)), **roles))
    return dataset, encoder_of(dataset)


def encoder_of(dataset: Dataset) -> Encoder:
    total = merge([shard_statistics(dataset, i) for i in range(len(dataset.shards))])
    return Encoder.fit(total, dataset.schema, "number", dataset.nulls)


def expected(dataset: Dataset, encoder: Encoder) -> Batch:
    """All rows in file order."""
    return encoder.apply(pa.concat_tables([dataset.read(i) for i in range(len(dataset.shards))]))[0]


def same_bytes(batch: Batch | None, rows: Batch) -> bool:
    if batch is None:
        return len(rows) == 0
    pairs = [(batch.numeric, rows.numeric), (batch.codes, rows.codes), (batch.label, rows.label)]
    if rows.weight is not None:
        assert batch.weight is not None
        pairs.append((batch.weight, rows.weight))
    assert all(a.flags.c_contiguous for a, _ in pairs)
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.fixture(params=[{}, {"weight": "late"}, {"nulls": "drop"}], ids=["plain", "weighted", "drop"])
def table(request: pytest.FixtureRequest, write: Write) -> tuple[Dataset, Encoder]:
    return opened(write, **request.param)


@pytest.mark.parametrize("cache_bytes", [0, 9000, 10**9])
@pytest.mark.parametrize("window_rows", [20, 100, 5000])
def test_two_epochs_in_order_are_the_samplers(
    table: tuple[Dataset, Encoder], cache_bytes: int, window_rows: int
) -> None:
    dataset, encoder = table
    rows = expected(dataset, encoder)
    sampler = Sampler(dataset.shard_rows, 64, 8, 0, window_rows)
    with Loader(dataset, encoder, sampler, Range(2, 7), cache_bytes) as loader:
        for t in range(2 * sampler.steps_per_epoch):
            for v in range(2, 7):
                assert same_bytes(loader.batch(t, v), rows.take(sampler.row_ids(t, v)))


def test_every_row_comes_once_an_epoch_whoever_carries_which_part(write: Write) -> None:
    dataset, encoder = opened(write, n=501)
    sampler = Sampler(dataset.shard_rows, 40, 5, 3, 90, fragment_rows=11)
    for cuts in ([0, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5]):
        seen = []
        for a, b in pairwise(cuts):
            with Loader(dataset, encoder, sampler, Range(a, b)) as loader:
                batches = [loader.batch(t, v) for t in range(sampler.steps_per_epoch) for v in range(a, b)]
                seen += [b.label.copy() for b in batches if b is not None]
        assert sorted(np.concatenate(seen).astype(int).tolist()) == list(range(501))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), min_size=1, max_size=12), st.sampled_from([16, 60]))
def test_any_jump_gives_the_same_rows(write: Write, asked: list[tuple[int, int]], window_rows: int) -> None:
    dataset, encoder = opened(write, n=300, rows=25)
    rows = expected(dataset, encoder)
    sampler = Sampler(dataset.shard_rows, 12, 4, 1, window_rows)
    with Loader(dataset, encoder, sampler, Range(0, 4), 2000, end_step=61) as loader:
        for t, v in asked:
            assert same_bytes(loader.batch(t, v), rows.take(sampler.row_ids(t, v)))
            assert same_bytes(loader.batch(t, v), rows.take(sampler.row_ids(t, v)))  # asked again


def test_virtual_workers_without_rows_give_none(write: Write) -> None:
    dataset, encoder = opened(write, n=3)
    sampler = Sampler(dataset.shard_rows, 8, 8, 0, 10)
    with Loader(dataset, encoder, sampler, Range(0, 8)) as loader:
        batches = [loader.batch(t, v) for t in range(3) for v in range(8)]
    assert [0 if b is None else len(b) for b in batches] == [
        len(sampler.row_ids(t, v)) for t in range(3) for v in range(8)
    ]


def test_unseen_categories_are_counted_in_every_epoch(write: Write) -> None:
    dataset, encoder = opened(write, n=120)
    odd = make_table(120).set_column(2, "color", pa.array(["violet"] * 7 + ["red"] * 113))
    other = open_dataset(ArrowDataset(str(write(odd, "odd.parquet", 30)), label="id"), dataset.schema)
    sampler = Sampler(other.shard_rows, 8, 2, 0, 40)
    with Loader(other, encoder, sampler, Range(0, 2), end_step=2 * sampler.steps_per_epoch) as loader:
        for t in range(2 * sampler.steps_per_epoch):
            for v in range(2):
                loader.batch(t, v)
        assert loader.unseen == 14


# -- what is read, what is held ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3, 11, 24, 30])
def test_continuing_reads_only_the_row_groups_of_the_steps_windows(write: Write, tmp_path: Path, step: int) -> None:
    """Counted on the filesystem: which bytes of the file were asked for."""
    write(make_table(1000), "t.parquet", 20)
    filesystem, reads = counting_filesystem(tmp_path)
    dataset = open_dataset(ArrowDataset("t.parquet", label="id", filesystem=filesystem))
    encoder = encoder_of(dataset)
    sampler = Sampler(dataset.shard_rows, 40, 4, 0, 60)
    assert sampler.steps_per_epoch == 25
    wanted = shards_of_step(sampler, step)
    reads.clear()
    with Loader(dataset, encoder, sampler, Range(0, 4), end_step=step + 1) as loader:
        for v in range(4):
            assert loader.batch(step, v) is not None
    assert reads.row_groups(tmp_path / "t.parquet") == wanted
    assert len(wanted) < len(dataset.shards) / 2


def test_an_epoch_reads_each_row_group_once_but_for_boundaries(write: Write, tmp_path: Path) -> None:
    write(make_table(1000), "t.parquet", 20)
    filesystem, reads = counting_filesystem(tmp_path)
    dataset = open_dataset(ArrowDataset("t.parquet", label="id", filesystem=filesystem))
    encoder = encoder_of(dataset)
    sampler = Sampler(dataset.shard_rows, 40, 4, 0, 60)
    reads.clear()
    with Loader(dataset, encoder, sampler, Range(0, 4), end_step=sampler.steps_per_epoch) as loader:
        for t in range(sampler.steps_per_epoch):
            for v in range(4):
                loader.batch(t, v)
    assert reads.row_groups(tmp_path / "t.parquet") == set(range(50))
    assert 50 <= reads.opened <= 50 + 3


class Windows:
    """Counts the windows in memory, those being filled included, whenever one more begins."""

    def __init__(self) -> None:
        self.filling = 0
        self.most = 0
        self.filled: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()

    def count(self) -> int:
        return self.filling + len(self.filled)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fill = Loader._fill

        def counted(loader: Loader, place: Any) -> _Filled:
            with self._lock:
                self.filling += 1
                self.most = max(self.most, self.count())
            filled = fill(loader, place)
            with self._lock:
                self.filled.add(_Tracked.of(filled))
                self.filling -= 1
            return filled

        monkeypatch.setattr(Loader, "_fill", counted)


class AtOnce:
    """Reads ahead at the moment it is asked to: the most that a thread could hold, in every run of the test."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*arguments))
        return future

    def shutdown(self, **_: object) -> None:
        pass


class _Tracked(np.ndarray):  # type: ignore[type-arg]
    """The label array of a window: dies with the last view of it."""

    @classmethod
    def of(cls, filled: _Filled) -> _Tracked:
        tracked = filled.rows.label.view(cls)
        object.__setattr__(filled.rows, "label", tracked)
        return tracked

    __hash__ = object.__hash__


@pytest.mark.parametrize("begin", [0, 7])
def test_no_more_than_the_open_windows_and_one_ahead_are_held(
    write: Write, monkeypatch: pytest.MonkeyPatch, begin: int
) -> None:
    dataset, encoder = opened(write)
    sampler = Sampler(dataset.shard_rows, 64, 4, 0, 45)
    windows = Windows()
    windows.watch(monkeypatch)
    monkeypatch.setattr("raysgd.data.loader.ThreadPoolExecutor", AtOnce)
    assert len(sampler.windows(0, 0)) > 3
    with Loader(dataset, encoder, sampler, Range(0, 4)) as loader:
        for t in range(begin, begin + 2 * sampler.steps_per_epoch):
            for v in range(4):
                batch = loader.batch(t, v)  # held until the next is there, as any loop does
        del batch
        for t in (3, 17, 4, 30):  # jumps
            for v in range(4):
                loader.batch(t, v)
    assert windows.most == 5
    assert windows.count() == 0


@pytest.mark.parametrize(("begin", "step"), [(0, 20), (20, 3), (2, 40)])
def test_a_jump_reads_only_the_windows_of_its_step_and_reads_ahead_again(
    write: Write, tmp_path: Path, begin: int, step: int
) -> None:
    write(make_table(1000), "t.parquet", 20)
    filesystem, reads = counting_filesystem(tmp_path)
    dataset = open_dataset(ArrowDataset("t.parquet", label="id", filesystem=filesystem))
    sampler = Sampler(dataset.shard_rows, 40, 4, 0, 60)
    with Loader(dataset, encoder_of(dataset), sampler, Range(0, 4)) as loader:
        for v in range(4):
            loader.batch(begin, v)
        assert loader._ahead is not None
        loader._ahead[1].result()
        reads.clear()
        for v in range(4):
            loader.batch(step, v)
        assert loader._ahead is not None
        ahead, future = loader._ahead
        future.result()
        assert ahead in loader._next_places(step)
        allowed = shards_of_step(sampler, step) | pieces_of(sampler, ahead.epoch, ahead.virtual_worker, ahead.window)
        assert reads.row_groups(tmp_path / "t.parquet") == allowed


def pieces_of(sampler: Sampler, epoch: int, virtual_worker: int, window: int) -> set[int]:
    return {piece.shard for piece in sampler.windows(epoch, virtual_worker)[window].pieces}


def shards_of_step(sampler: Sampler, step: int) -> set[int]:
    """The shards of the windows that a step draws from."""
    epoch, workers = sampler.epoch(step), range(sampler.virtual_workers)
    return {s for v in workers for w, _, _ in sampler.draws(step, v) for s in pieces_of(sampler, epoch, v, w)}


# -- the thread -------------------------------------------------------------------------------------------------------


def test_closing_ends_the_thread_and_nothing_is_read_beyond_the_end(write: Write) -> None:
    dataset, encoder = opened(write)
    before = set(threading.enumerate())
    sampler = Sampler(dataset.shard_rows, 64, 4, 0, 45)
    loader = Loader(dataset, encoder, sampler, Range(0, 4), end_step=1)
    for v in range(4):
        loader.batch(0, v)
    assert loader._ahead is None
    loader.close()
    assert set(threading.enumerate()) == before
    loader.close()  # twice is once


def test_an_error_of_the_thread_is_raised_where_its_window_is_needed(write: Write, tmp_path: Path) -> None:
    dataset, encoder = opened(write)
    sampler = Sampler(dataset.shard_rows, 16, 1, 0, 200)
    with Loader(dataset, encoder, sampler, Range(0, 1)) as loader:
        assert loader.batch(0, 0) is not None
        assert loader._ahead is not None
        loader._ahead[1].result()
        (tmp_path / "t.parquet").unlink()
        first, second, _ = (w.begin // 16 for w in sampler.windows(0, 0)[:3])
        third = sampler.windows(0, 0)[2].begin // 16
        assert (first, second < third) == (0, True)
        for t in range(1, third):
            loader.batch(t, 0)
        with pytest.raises(InputError, match=r"t\.parquet is gone"):
            loader.batch(third, 0)
