"""Batches: slices are views, rows can be taken and put together."""

from __future__ import annotations

import numpy as np
from learn_batches import random_batch

from raysgd.learn.batch import Batch, Inputs, concatenate

INPUTS = Inputs(3, (2, 4))


def same(a: Batch, b: Batch) -> bool:
    pairs = zip((a.numeric, a.codes, a.label), (b.numeric, b.codes, b.label), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs) and (
        np.array_equal(a.weight, b.weight) if a.weight is not None else b.weight is None
    )


def test_slices_are_views_and_taken_rows_are_fresh():
    batch = random_batch(10, INPUTS, 2, weighted=True)
    part = batch.slice(2, 7)
    assert len(part) == 5
    assert np.shares_memory(part.numeric, batch.numeric)
    assert np.shares_memory(part.weight, batch.weight)
    taken = batch.take(np.array([2, 3, 4, 5, 6]))
    assert same(part, taken)
    assert not np.shares_memory(taken.numeric, batch.numeric)
    assert taken.numeric.flags.c_contiguous


def test_concatenating_slices_gives_the_whole():
    for weighted in (False, True):
        batch = random_batch(10, INPUTS, 2, weighted=weighted)
        assert same(concatenate([batch.slice(0, 3), batch.slice(3, 3), batch.slice(3, 10)]), batch)
    assert concatenate([batch]) is batch


def test_a_part_without_weights_weighs_one():
    first, second = random_batch(3, INPUTS, 2), random_batch(2, INPUTS, 2, weighted=True)
    whole = concatenate([first, second])
    assert whole.weight.tolist() == [1.0, 1.0, 1.0, *second.weight.tolist()]
    assert whole.weight.dtype == np.float32


def test_nbytes_and_codes():
    assert random_batch(10, INPUTS, 2).nbytes == 10 * (3 * 4 + 2 * 4 + 4)
    assert random_batch(10, INPUTS, 2, weighted=True).nbytes == 10 * (3 * 4 + 2 * 4 + 4 + 4)
    assert INPUTS.n_codes == 6
