"""The bytes of a gradient are a function of the rows' values alone: not of where in memory they lie."""

from __future__ import annotations

import numpy as np
import pytest
from learn_batches import random_batch

from raysgd.learn.batch import Batch, Inputs, Target
from raysgd.learn.losses import Logistic, Squared
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


@pytest.mark.parametrize("name", ["linear", "logistic"])
@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_batches_that_pass_through_the_loss_together_give_the_bytes_of_each_by_itself(name, inputs):
    model, classes = CASES[name]
    bound = model.bind(inputs, Target(classes))
    random = np.random.default_rng(2)
    params = bound.initial(0) + random.normal(0, 0.3, bound.layout.n_params).astype(np.float32)
    for sizes in ([1], [1, 1, 1], [256] * 4, [128] * 8, [31, 1, 64, 7, 129, 2, 500], [15, 16, 17, 33], [9000, 8193]):
        for weighted in ([False] * len(sizes), [i % 2 == 0 for i in range(len(sizes))]):
            batches = [
                random_batch(n, inputs, classes, seed=i, weighted=w, unseen=0.1)
                for i, (n, w) in enumerate(zip(sizes, weighted, strict=True))
            ]
            for batch, (value, delta) in zip(batches, bound.forward(params, batches), strict=True):
                together, alone = np.empty_like(params), np.empty_like(params)
                bound.backward(delta, batch, together)
                assert bound.value_and_grad(params, batch, alone) == value
                assert together.tobytes() == alone.tobytes()


@pytest.mark.parametrize("loss", [Logistic(), Squared()], ids=lambda loss: loss.name)
def test_a_losses_arithmetic_does_not_depend_on_a_rows_place(loss):
    """Every length and every begin: numpy takes rows in lanes of a register, and what is left over differently."""
    random = np.random.default_rng(3)
    extremes = np.array([0.0, -0.0, 1e-38, -1e-42, 88.7, -88.8, 104.0, -104.1, 3e38, -3e38], np.float32)
    scores = np.concatenate([random.normal(0, 8, 300).astype(np.float32), extremes])[random.permutation(310), None]
    label = random.integers(0, 2, 310).astype(np.float32)
    losses, gradient = loss.row_by_row(scores, label)
    for begin in range(64):
        for n in (*range(1, 70), 200, 246):
            rows = slice(begin, begin + n)
            some, part = loss.row_by_row(scores[rows].copy(), label[rows].copy())
            assert some.tobytes() == losses[rows].tobytes()
            assert part.tobytes() == gradient[rows].tobytes()


def test_which_losses_pass_together():
    """The cross-entropy adds up a row by a matrix product: its bytes may depend on how many rows there are."""
    bound = {name: model.bind(INPUTS[0], Target(classes)) for name, (model, classes) in CASES.items()}
    assert [name for name, b in bound.items() if getattr(b, "row_by_row", None)] == ["linear", "logistic"]
