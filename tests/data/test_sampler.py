"""The sampler: every row once, whatever the shards; a pure function; random enough."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysgd.data.sampler import Piece, Sampler, close_windows
from raysgd.errors import InputError


@st.composite
def samplers(draw: st.DrawFn) -> Sampler:
    rows = draw(st.lists(st.one_of(st.integers(0, 4), st.integers(0, 120)), min_size=1, max_size=12).filter(any))
    workers = draw(st.integers(1, 13))
    fragments = draw(st.one_of(st.none(), st.integers(1, 40)))
    return Sampler(
        rows,
        batch_size=workers * draw(st.integers(1, 9)),
        virtual_workers=workers,
        seed=draw(st.integers(0, 3)),
        window_rows=draw(st.integers(1, 150)),
        fragment_rows=fragments,
    )


@settings(deadline=None)
@given(samplers(), st.integers(0, 2))
def test_an_epoch_draws_every_row_exactly_once(sampler: Sampler, epoch: int) -> None:
    drawn = []
    for t in range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch):
        batch = [sampler.row_ids(t, v) for v in range(sampler.virtual_workers)]
        assert sum(map(len, batch)) == sampler.rows_in_step(t) > 0
        assert all(len(b) <= sampler.rows_per_draw for b in batch)
        drawn += batch
    ids = np.concatenate(drawn)
    assert sorted(ids.tolist()) == list(range(sampler.n_rows))


@settings(deadline=None)
@given(samplers())
def test_the_parts_of_virtual_workers_differ_by_one_row_at_most(sampler: Sampler) -> None:
    rows = [sum(w.rows for w in sampler.windows(0, v)) for v in range(sampler.virtual_workers)]
    assert sum(rows) == sampler.n_rows
    assert max(rows) - min(rows) <= 1


@settings(deadline=None)
@given(samplers())
def test_windows_tile_the_stream_and_only_the_last_is_short(sampler: Sampler) -> None:
    for v in range(sampler.virtual_workers):
        windows = sampler.windows(1, v)
        position = 0
        for window in windows:
            assert window.begin == position
            assert window.rows == sum(len(p) for p in window.pieces)
            assert all(len(p) > 0 for p in window.pieces)
            position = window.end
        assert all(w.rows >= sampler.window_rows for w in windows[:-1])
        assert len(windows) < 2 or 2 * windows[-1].rows >= sampler.window_rows


@settings(deadline=None)
@given(samplers())
def test_without_fragments_only_boundary_shards_are_read_twice(sampler: Sampler) -> None:
    whole = Sampler(sampler.shard_rows, sampler.batch_size, sampler.virtual_workers, sampler.seed, sampler.window_rows)
    readers = [p.shard for v in range(whole.virtual_workers) for w in whole.windows(0, v) for p in w.pieces]
    shared = len(readers) - len(set(readers))
    assert shared <= whole.virtual_workers - 1


@settings(deadline=None)
@given(samplers(), st.data())
def test_any_step_alone_draws_what_it_draws_in_sequence(sampler: Sampler, data: st.DataObject) -> None:
    steps = 2 * sampler.steps_per_epoch
    sequence = {(t, v): sampler.row_ids(t, v) for t in range(steps) for v in range(sampler.virtual_workers)}
    fresh = pickle.loads(pickle.dumps(sampler))
    t = data.draw(st.integers(0, steps - 1))
    for v in reversed(range(sampler.virtual_workers)):
        assert (fresh.row_ids(t, v) == sequence[t, v]).all()


def test_the_plan_does_not_change_between_versions() -> None:
    """Golden: a change here changes the trained bytes of every run. Rewrite only on purpose."""
    sampler = Sampler([5, 3, 8, 1], batch_size=6, virtual_workers=3, seed=7, window_rows=4)
    assert sampler.steps_per_epoch == 3
    assert [[sampler.row_ids(t, v).tolist() for v in range(3)] for t in range(4)] == GOLDEN


def test_two_epochs_and_two_seeds_draw_in_different_orders() -> None:
    def epoch(seed: int, e: int) -> list[int]:
        sampler = Sampler([50] * 4, 20, 2, seed, 100)
        steps = range(e * sampler.steps_per_epoch, (e + 1) * sampler.steps_per_epoch)
        return [i for t in steps for v in range(2) for i in sampler.row_ids(t, v).tolist()]

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0), epoch(1, 1)]
    assert len({tuple(o) for o in orders}) == 4


def test_more_virtual_workers_than_rows() -> None:
    sampler = Sampler([3], batch_size=8, virtual_workers=8, seed=0, window_rows=10)
    assert sampler.steps_per_epoch == 1
    assert sampler.rows_in_step(0) == 3
    assert sorted(int(i) for v in range(8) for i in sampler.row_ids(0, v)) == [0, 1, 2]


def test_a_last_window_below_half_joins_the_one_before() -> None:
    assert [w.rows for w in close_windows([Piece(0, 0, 10), Piece(1, 0, 4)], 10)] == [14]
    assert [w.rows for w in close_windows([Piece(0, 0, 10), Piece(1, 0, 5)], 10)] == [10, 5]
    assert close_windows([], 10) == ()


def test_a_hundred_thousand_shards_are_planned_by_virtual_worker() -> None:
    sampler = Sampler([1000] * 100_000, 1024, 8, 0, 65_536)
    pieces = [p for w in sampler.windows(0, 3) for p in w.pieces]
    assert sum(map(len, pieces)) == sampler.n_rows // 8
    assert len(sampler._plans) == 1  # the plans of the other seven are not made


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([0, 0], 8, 8, 0, 10), "the data must have at least one row, got none"),
        (([9], 12, 8, 0, 10), "batch_size must be a positive multiple of virtual_workers = 8, got 12"),
        (([9], 8, 0, 0, 10), "virtual_workers must be >= 1, got 0"),
        (([9], 8, 8, 0, 0), "window_rows must be >= 1, got 0"),
    ],
)
def test_a_plan_that_cannot_be_drawn_is_refused(arguments: tuple[list[int], int, int, int, int], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        Sampler(*arguments)
    assert caught.value.problems == (sentence,)


GOLDEN = [[[5, 8], [10, 13], [15, 2]], [[6, 7], [14, 11], [3, 0]], [[16], [9, 12], [4, 1]], [[11, 10], [1, 14], [4, 3]]]
