"""The bytes of a gradient are a function of the rows' values alone: not of where in memory they lie."""

from __future__ import annotations

import numpy as np
import pytest
from learn_batches import random_batch

from raysgd.learn.batch import Batch, Inputs, Target
from raysgd.learn.models import MLP, LinearRegression, LogisticRegression, SoftmaxRegression

CASES = {
    "linear": (LinearRegression(), 0),
    "logistic": (LogisticRegression(), 2),
    "softmax": (SoftmaxRegression(), 5),
    "softmax of many": (SoftmaxRegression(), 40),
    "mlp relu": (MLP(hidden=(33, 5)), 2),
    "mlp tanh": (MLP(hidden=(9,), activation="tanh", loss="cross_entropy"), 3),
}
INPUTS = [Inputs(28), Inputs(5, (3, 40)), Inputs(0, (7,)), Inputs(131, (3,))]


def at_offset(array, offset):
    """A copy whose first byte lies ``offset`` bytes beyond a 64-byte boundary."""
    raw = np.empty(array.nbytes + 128, np.uint8)
    begin = (-raw.ctypes.data) % 64 + offset
    moved = raw[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    assert array.size == 0 or (moved.ctypes.data - offset) % 64 == 0
    return moved


def result(bound, params, batch, out):
    value = bound.value_and_grad(params, batch, out)
    return value, out.tobytes(), bound.scores(params, batch).tobytes()


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_alignment_gives_the_same_bytes(name, inputs):
    model, classes = CASES[name]
    bound = model.bind(inputs, Target(classes))
    params = bound.initial(0) + np.random.default_rng(1).normal(0, 0.3, bound.layout.n_params).astype(np.float32)
    for n_rows in (1, 2, 7, 31, 64, 129, 500):
        batch = random_batch(n_rows, inputs, classes, weighted=True)
        expected = result(bound, params, batch, np.empty_like(params))
        for offset in range(0, 64, 4):
            other = (3 * offset + 4) % 64
            moved = Batch(
                at_offset(batch.numeric, offset),
                at_offset(batch.codes, other),
                at_offset(batch.label, other),
                at_offset(batch.weight, offset),
            )
            got = result(bound, at_offset(params, other), moved, at_offset(np.empty_like(params), offset))
            assert got == expected, (n_rows, offset)


@pytest.mark.parametrize("name", CASES)
def test_a_slice_of_a_larger_batch_gives_the_bytes_of_its_copy(name):
    model, classes = CASES[name]
    inputs = INPUTS[1]
    bound = model.bind(inputs, Target(classes))
    params, batch = bound.initial(0), random_batch(300, inputs, classes)
    for begin in (1, 17, 100):
        view, copy = batch.slice(begin, begin + 128), batch.take(np.arange(begin, begin + 128))
        expected = result(bound, params, copy, np.empty_like(params))
        assert result(bound, params, view, np.empty_like(params)) == expected


@pytest.mark.parametrize("name", CASES)
def test_what_out_held_before_does_not_matter(name):
    model, classes = CASES[name]
    bound = model.bind(INPUTS[1], Target(classes))
    params, batch = bound.initial(0), random_batch(50, INPUTS[1], classes, unseen=0.1)
    first = result(bound, params, batch, np.full_like(params, np.nan))
    assert result(bound, params, batch, np.full_like(params, -0.0)) == first
    assert b"\x00\x00\xc0\x7f" not in first[1]  # no NaN is left over
