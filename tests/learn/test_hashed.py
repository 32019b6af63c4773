"""Hashed models against finite differences, the pairwise sum, scikit-learn, and compact against full vectors."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from raysgd.errors import InputError
from raysgd.learn.batch import Batch, Inputs, Target
from raysgd.learn.compact import unique_inverse
from raysgd.learn.hashing import uniform_at
from raysgd.learn.models.hashed import BoundHashed, FactorizationMachine, HashedLogisticRegression
from raysgd.learn.parameters import Range

BITS = 6


def rows(n_rows=20, n_numeric=3, n_categories=4, classes=2, seed=0, *, weighted=False, absent=0.0) -> Batch:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**BITS, (n_rows, n_categories)).astype(np.int32)
    codes[random.random(codes.shape) < absent] = 2**BITS
    label = random.integers(0, 2, n_rows) if classes else random.standard_normal(n_rows)
    weight = random.integers(0, 4, n_rows).astype(np.float32) / 2 if weighted else None
    numeric = random.standard_normal((n_rows, n_numeric)).astype(np.float32)
    return Batch(numeric, codes, label.astype(np.float32), weight)


def bound(factors=0, batch: Batch | None = None, loss="logistic") -> BoundHashed:
    batch = rows() if batch is None else batch
    inputs = Inputs(batch.numeric.shape[1], (2**BITS,) * batch.codes.shape[1], BITS)
    if not factors:
        return HashedLogisticRegression(BITS).bind(inputs, Target(2))
    return FactorizationMachine(BITS, factors, loss).bind(inputs, Target(0 if loss == "squared" else 2))


def value64(learner: BoundHashed, params: np.ndarray, batch: Batch) -> float:
    """The weighted loss sum in float64, the second-order term pair by pair."""
    d = learner.width
    cut = len(params) - learner.tail
    table, weights, bias = params[:cut].reshape(-1, d), params[cut:-1].reshape(-1, d), params[-1]
    total = 0.0
    for i in range(len(batch)):
        present = [c for c in batch.codes[i] if c < len(table)]
        x = np.concatenate([np.ones(len(present)), batch.numeric[i].astype(np.float64)])
        w = np.concatenate([table[present], weights])
        score = bias + x @ w[:, 0]
        score += sum(x[a] * x[b] * (w[a, 1:] @ w[b, 1:]) for a, b in combinations(range(len(x)), 2))
        y, weight = batch.label[i], 1.0 if batch.weight is None else batch.weight[i]
        loss = (score - y) ** 2 / 2 if learner.loss.name == "squared" else np.logaddexp(0, score * (1 - 2 * y))
        total += weight * loss
    return total


CASES = {
    "logistic": {},
    "logistic-weighted": {"weighted": True, "absent": 0.2},
    "no-numbers": {"n_numeric": 0},
    "one-category": {"n_categories": 1},
    "no-categories": {"n_categories": 0},
}


@pytest.mark.parametrize("factors", [0, 1, 5])
@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_the_value(case: str, factors: int) -> None:
    batch = rows(**CASES[case])
    loss = "squared" if factors == 1 else "logistic"
    learner = bound(factors, batch, loss)
    params = np.random.default_rng(1).normal(0, 0.3, learner.layout.n_params).astype(np.float32)
    gradient = np.full_like(params, np.nan)
    value = learner.value_and_grad(params, batch, gradient)
    exact = params.astype(np.float64)
    assert value == pytest.approx(value64(learner, exact, batch), rel=1e-5)
    used = [c for c in unique_inverse(batch.codes.ravel())[0] if c < 2**BITS][:6]
    coordinates = learner.coordinates(np.array(used, np.int32))
    for c in coordinates:
        step = np.zeros_like(exact)
        step[c] = 1e-5
        slope = (value64(learner, exact + step, batch) - value64(learner, exact - step, batch)) / 2e-5
        assert gradient[c] == pytest.approx(slope, rel=1e-4, abs=1e-4), c
    untouched = np.setdiff1d(np.arange(len(params)), learner.coordinates(np.unique(batch.codes[batch.codes < 2**BITS])))
    assert not gradient[untouched].any()
    assert not np.signbit(gradient[: -learner.tail][gradient[: -learner.tail] == 0]).any(), "no -0.0 in the table"


@pytest.mark.parametrize("factors", [0, 4])
@pytest.mark.parametrize("absent", [0.0, 0.3])
def test_compact_is_full(factors: int, absent: float) -> None:
    batch = rows(absent=absent)
    learner = bound(factors, batch)
    full = np.random.default_rng(2).normal(0, 0.3, learner.layout.n_params).astype(np.float32)
    unique, inverse = unique_inverse(batch.codes.ravel())
    unique = unique[unique < 2**BITS]
    ids = learner.coordinates(unique)
    assert (np.diff(ids) > 0).all()
    compact = Batch(batch.numeric, inverse.reshape(batch.codes.shape), batch.label)
    out, out_compact = np.empty_like(full), np.empty(len(ids), np.float32)
    assert learner.value_and_grad(full[ids], compact, out_compact) == learner.value_and_grad(full, batch, out)
    assert out_compact.tobytes() == out[ids].tobytes()
    assert learner.scores(full[ids], compact).tobytes() == learner.scores(full, batch).tobytes()


def test_initial_values_are_pure_functions_of_seed_and_coordinate() -> None:
    learner = bound(3)
    whole = learner.initial(7)
    for span in (Range(0, 5), Range(5, 40), Range(40, len(whole))):
        part = np.zeros(len(span), np.float32)
        learner.initialize(part, span, 7)
        assert part.tobytes() == whole[span.slice].tobytes()
    table = whole[: -learner.tail].reshape(-1, 4)
    assert not table[:, 0].any()
    assert (table[:, 1:] != 0).all()
    assert whole[-1] == 0
    bound_of = np.float32(0.05 * np.sqrt(3.0))
    assert table[3, 2] == uniform_at(np.array([3 * 4 + 2]), 7, "initial/factors")[0] * bound_of
    assert not bound(0).initial(7).any()


def test_the_optimum_is_that_of_scikit_learn() -> None:
    """Newton's method on our gradients and penalty, against scikit-learn on one-hot columns."""
    batch = rows(n_rows=400, seed=3)
    learner = bound(0, batch)
    n, l2 = learner.layout.n_params, 0.01
    penalized = learner.layout.penalized(Range(0, n))
    one_hot = np.zeros((len(batch), n))
    np.add.at(one_hot, (np.arange(len(batch))[:, None], batch.codes), 1.0)
    one_hot[:, -learner.tail : -1] = batch.numeric
    one_hot[:, -1] = 1.0
    params, gradient = np.zeros(n, np.float32), np.empty(n, np.float32)
    for _ in range(20):
        learner.value_and_grad(params, batch, gradient)
        p = 1 / (1 + np.exp(-one_hot @ params))
        hessian = (one_hot * (p * (1 - p))[:, None]).T @ one_hot / len(batch)
        hessian += l2 * np.diag(penalized) + 1e-9 * np.eye(n)
        g = gradient / len(batch) + l2 * params * penalized
        params = (params - np.linalg.solve(hessian, g)).astype(np.float32)
    peer = LogisticRegression(C=1 / (l2 * len(batch)), tol=1e-10, max_iter=10_000)
    peer.fit(one_hot[:, :-1], batch.label)
    np.testing.assert_allclose(params[:-1], peer.coef_[0], atol=2e-4)
    np.testing.assert_allclose(params[-1], peer.intercept_[0], atol=2e-4)


def test_what_cannot_be_used_is_told() -> None:
    assert HashedLogisticRegression(0).problems() == ["hash_bits must be a whole number in [1, 30], got 0"]
    assert HashedLogisticRegression(True).problems() == ["hash_bits must be a whole number in [1, 30], got True"]
    assert FactorizationMachine(28, 8).problems() == [
        "hash_bits: (1 + factors) * 2^hash_bits must be below 2^31, got 9 * 2^28; lower one of the two"
    ]
    assert len(FactorizationMachine(99, 0, "hinge", -1.0, 0.0).problems()) == 5
    with pytest.raises(InputError, match="2 classes"):
        HashedLogisticRegression(4).bind(Inputs(1, (16,), 4), Target(3))
    assert FactorizationMachine(loss="squared").target_kind == "number"
