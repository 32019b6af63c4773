"""Training reaches scikit-learn's optimum on the digits data: full batches and minibatches.

1797 rows in batches of 120 leave a last one of 117. With 128 it has 5 rows, whose mean gradient is as noisy as it
sounds: the distance to the optimum is then three hundred times as large.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression as ScikitLogisticRegression

from raysgd.learn.batch import Batch, Inputs, Target
from raysgd.learn.losses import add_l2, l2_penalty, runs
from raysgd.learn.models import LogisticRegression, SoftmaxRegression
from raysgd.learn.parameters import Range
from raysgd.learn.random import permutation
from raysgd.learn.schedules import Constant, CosineDecay
from raysgd.learn.transforms import SGD

L2 = 0.1
FAMILIES = {"logistic": (LogisticRegression(l2=L2), 2), "softmax": (SoftmaxRegression(l2=L2), 10)}


@cache
def digits(classes):
    """(1797, 64) standardized, zero variance scaled by 1; ten classes, or odd against even."""
    x, y = load_digits(return_X_y=True)
    spread = x.std(axis=0)
    x = ((x - x.mean(axis=0)) / np.where(spread > 0, spread, 1)).astype(np.float32)
    label = (y % 2 if classes == 2 else y).astype(np.float32)
    return Batch(np.ascontiguousarray(x), np.empty((len(x), 0), np.int32), label)


@cache
def scikit(classes):
    """Coefficients (64, k), centred intercepts (k,): C = 1 / (l2 n) makes the objectives the same."""
    batch = digits(classes)
    fit = ScikitLogisticRegression(C=1 / (L2 * len(batch)), tol=1e-10, max_iter=10_000)
    fit.fit(batch.numeric.astype(np.float64), batch.label)
    return fit.coef_.T, fit.intercept_ - (fit.intercept_.mean() if classes > 2 else 0)


def objective(bound, params, batch):
    mask = bound.layout.penalized(Range(0, bound.layout.n_params))
    loss = bound.loss.value(bound.scores(params, batch), batch.label).mean()
    return float(loss) + l2_penalty(params, L2, mask)


def train(bound, batch, optimizer, steps, batch_size):
    """Plain minibatch descent as the servers do it: mean gradient, L2, transform, next generation."""
    penalized = runs(bound.layout.penalized(Range(0, bound.layout.n_params)))
    per_epoch = -(-len(batch) // batch_size)
    rate = optimizer.learning_rate.resolve(per_epoch, steps)
    params, gradient = bound.initial(0), np.empty(bound.layout.n_params, np.float32)
    state = {slot: np.zeros_like(params) for slot in optimizer.slots}
    for step in range(steps):
        epoch, i = divmod(step, per_epoch)
        rows = permutation(len(batch), 0, "rows", epoch)[i * batch_size : (i + 1) * batch_size]
        bound.value_and_grad(params, batch.take(rows), gradient)
        gradient /= np.float32(len(rows))
        add_l2(gradient, params, L2, penalized)
        new, new_state = np.empty_like(params), {slot: np.empty_like(params) for slot in state}
        optimizer.update(gradient, np.float32(rate(step)), params, state, new, new_state)
        params, state = new, new_state
    return params


@pytest.mark.parametrize(
    ("optimizer", "steps", "batch_size"),
    [
        (SGD(Constant(0.1), momentum=0.9), 400, 1797),
        (SGD(CosineDecay(0.05), momentum=0.9), 60 * 15, 120),
        (SGD(CosineDecay(0.05), momentum=0.9, nesterov=True), 60 * 15, 120),
    ],
    ids=["full batch", "minibatch", "minibatch, nesterov"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_scikit_learns_optimum(name, optimizer, steps, batch_size):
    model, classes = FAMILIES[name]
    batch, (weights, bias) = digits(classes), scikit(classes)
    bound = model.bind(Inputs(64), Target(classes))
    params = train(bound, batch, optimizer, steps, batch_size)
    views = bound.layout.views(params)
    best = np.concatenate([weights.ravel(), bias]).astype(np.float32)
    assert objective(bound, params, batch) - objective(bound, best, batch) < 1e-3
    assert objective(bound, params, batch) - objective(bound, best, batch) > -1e-6
    centre = views["bias"].mean() if classes > 2 else 0
    np.testing.assert_allclose(views["weights"], weights, atol=0.02)
    np.testing.assert_allclose(views["bias"] - centre, bias, atol=0.02)
