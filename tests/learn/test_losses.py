"""Losses against finite differences, closed forms and PyTorch; stability at extreme scores; the penalty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from raysgd.learn.batch import Target
from raysgd.learn.losses import CrossEntropy, Logistic, Loss, Squared, add_l2, l2_penalty, runs
from raysgd.learn.parameters import Array, Layout, Range

#: loss, its scores a row, the number of classes
TABLE = [
    (Squared(), 1, 0),
    (Logistic(), 1, 2),
    (CrossEntropy(), 2, 2),
    (CrossEntropy(), 7, 7),
    (CrossEntropy(), 40, 40),
]
every_loss = pytest.mark.parametrize(("loss", "k", "classes"), TABLE, ids=lambda x: getattr(x, "name", str(x)))


def rows(k, classes, n=50, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n) if classes else rng.standard_normal(n)
    weight = rng.integers(0, 4, n) / 2
    return (scale * rng.standard_normal((n, k))).astype(np.float32), label.astype(np.float32), weight.astype(np.float32)


@every_loss
def test_finite_differences(loss, k, classes):
    """Central differences of the float64 value, step 1e-4: their own error is below 1e-7."""
    scores, label, weight = rows(k, classes)
    _, gradient = loss.value_and_gradient(scores, label, weight)
    wide, step = scores.astype(np.float64), 1e-4
    for j in range(k):
        shift = np.zeros_like(wide)
        shift[:, j] = step
        slope = (loss.value(wide + shift, label) - loss.value(wide - shift, label)) / (2 * step)
        np.testing.assert_allclose(gradient[:, j], slope * weight, rtol=1e-5, atol=1e-6)


@every_loss
def test_the_training_value_is_the_weighted_sum_of_the_reported_ones(loss, k, classes):
    scores, label, weight = rows(k, classes)
    values = loss.value(scores, label)
    assert values.dtype == np.float64
    assert loss.value_and_gradient(scores, label, weight)[0] == pytest.approx(float((values * weight).sum()), rel=1e-6)
    assert loss.value_and_gradient(scores, label)[0] == pytest.approx(float(values.sum()), rel=1e-6)


@every_loss
def test_weights_of_one_change_nothing_and_weights_of_zero_remove_the_row(loss, k, classes):
    scores, label, _ = rows(k, classes)
    value, gradient = loss.value_and_gradient(scores, label)
    value_of_ones, gradient_of_ones = loss.value_and_gradient(scores, label, np.ones_like(label))
    assert value == pytest.approx(value_of_ones, rel=1e-12)
    assert gradient.tobytes() == gradient_of_ones.tobytes()
    kept = (np.arange(len(label)) % 3 > 0).astype(np.float32)
    part, gradient_of_part = loss.value_and_gradient(scores, label, kept)
    assert part == pytest.approx(loss.value_and_gradient(scores[kept > 0], label[kept > 0])[0], rel=1e-6)
    assert not gradient_of_part[kept == 0].any()


@every_loss
def test_shapes_and_types_and_fresh_arrays(loss, k, classes):
    scores, label, _ = rows(k, classes)
    before = scores.tobytes(), label.tobytes()
    value, gradient = loss.value_and_gradient(scores, label)
    assert isinstance(loss, Loss)
    assert type(value) is float
    assert (gradient.shape, gradient.dtype) == ((50, k), np.float32)
    assert gradient.flags.c_contiguous
    assert before == (scores.tobytes(), label.tobytes())
    assert loss.outputs(Target(classes)) == k


@every_loss
def test_no_rows(loss, k, classes):  # noqa: ARG001 - the table's columns
    empty, none = np.empty((0, k), np.float32), np.empty(0, np.float32)
    value, gradient = loss.value_and_gradient(empty, none, none)
    assert (value, gradient.shape) == (0.0, (0, k))
    assert loss.value(empty, none).shape == loss.predictions(empty).shape == (0,)


@every_loss
def test_pytorch(loss, k, classes):
    scores, label, _ = rows(k, classes)
    z = torch.tensor(scores.astype(np.float64), requires_grad=True)
    y = torch.tensor(label.astype(np.float64))
    if loss.name == "squared":
        total = functional.mse_loss(z[:, 0], y, reduction="sum") / 2
    elif loss.name == "logistic":
        total = functional.binary_cross_entropy_with_logits(z[:, 0], y, reduction="sum")
    else:
        total = functional.cross_entropy(z, y.long(), reduction="sum")
    total.backward()
    value, gradient = loss.value_and_gradient(scores, label)
    assert value == pytest.approx(total.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=2e-6, atol=1e-6)


@every_loss
@pytest.mark.parametrize("extreme", [30.0, 90.0, 1e4, 1e30, 3e38])
def test_extreme_scores_are_finite_and_silent(loss, k, classes, extreme):
    label = np.repeat(np.arange(classes or 2, dtype=np.float32), 2)
    scores = np.full((len(label), k), -extreme, np.float32)
    scores[::2] = extreme
    scores[:, 1:] *= -1
    value, gradient = loss.value_and_gradient(scores, label)
    values = loss.value(scores, label)
    assert np.isfinite(values).all()
    assert np.isfinite(gradient).all()
    if extreme < 1e38 or loss.name != "cross_entropy":  # there the difference of two scores is no float32
        assert value == pytest.approx(values.sum(), rel=1e-6)
    if loss.target_kind == "class":
        assert np.abs(gradient).max() <= 1
        np.testing.assert_allclose(loss.probabilities(scores).sum(axis=1), 1.0, rtol=1e-12)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_logistic_at_infinite_scores(label):
    scores = np.array([[np.inf], [-np.inf]], np.float32)
    y = np.array([label, label], np.float32)
    right = 0 if label else 1
    value, gradient = Logistic().value_and_gradient(scores[[right]], y[:1])
    assert value == 0
    assert gradient[0, 0] == 0
    assert np.isinf(Logistic().value_and_gradient(scores, y)[0])


def test_logistic_keeps_its_digits_far_out():
    """The gradient of class 0 at s = -40 is exp(-40), not 0; the loss too."""
    value, gradient = Logistic().value_and_gradient(np.array([[-40.0]], np.float32), np.array([0.0], np.float32))
    assert value == pytest.approx(np.exp(-40.0), rel=1e-5)
    assert gradient[0, 0] == pytest.approx(np.exp(-40.0), rel=1e-5)


def test_a_nan_score_shows():
    for loss, k, _ in TABLE:
        scores = np.zeros((2, k), np.float32)
        scores[1] = np.nan
        value, gradient = loss.value_and_gradient(scores, np.zeros(2, np.float32))
        assert np.isnan(value)
        assert np.isnan(gradient[1]).all()


def test_probabilities_and_predictions():
    scores = np.array([[-1.0], [0.0], [2.0]], np.float32)
    p = Logistic().probabilities(scores)
    np.testing.assert_allclose(p[:, 1], 1 / (1 + np.exp([1.0, 0.0, -2.0])), rtol=1e-12)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-15)
    assert Logistic().predictions(scores).tolist() == [0, 0, 1]
    assert Squared().probabilities(scores) is None
    assert Squared().predictions(scores).tolist() == [-1.0, 0.0, 2.0]
    scores = np.array([[0.0, 1.0, 3.0], [2.0, 2.0, 1.0]], np.float32)
    p = CrossEntropy().probabilities(scores)
    np.testing.assert_allclose(p, torch.softmax(torch.tensor(scores, dtype=torch.float64), 1).numpy(), rtol=1e-12)
    assert CrossEntropy().predictions(scores).tolist() == [2, 0]


def test_the_target_must_fit_the_loss():
    assert Squared().target_problems(Target(0)) == Logistic().target_problems(Target(2)) == []
    assert CrossEntropy().target_problems(Target(2)) == CrossEntropy().target_problems(Target(9)) == []
    assert "got 3: use cross_entropy" in Logistic().target_problems(Target(3))[0]
    assert "got a number" in Logistic().target_problems(Target(0))[0]
    assert "got a number" in CrossEntropy().target_problems(Target(0))[0]
    assert "got 2 classes" in Squared().target_problems(Target(2))[0]


def test_l2_is_the_gradient_of_its_penalty_and_leaves_biases_alone():
    layout = Layout((Array("a", (3, 2)), Array("b", (2,), penalized=False), Array("c", (4,))))
    mask = layout.penalized(Range(0, layout.n_params))
    rng = np.random.default_rng(0)
    params = rng.standard_normal(12).astype(np.float32)
    gradient = np.zeros(12, np.float32)
    add_l2(gradient, params, 0.3, mask)
    for i in range(12):
        shift = np.zeros(12)
        shift[i] = 1e-4
        slope = (l2_penalty(params + shift, 0.3, mask) - l2_penalty(params - shift, 0.3, mask)) / 2e-4
        assert gradient[i] == pytest.approx(slope, abs=1e-6)
    assert not gradient[~mask].any()


def test_l2_by_mask_by_ranges_and_by_shard_give_the_same_bytes():
    rng = np.random.default_rng(0)
    n = 40_000
    mask = rng.random(n) < 0.999
    mask[2_000:38_000] = True  # a run of several blocks
    params, gradient = rng.standard_normal((2, n)).astype(np.float32)
    whole, by_ranges, by_shard = gradient.copy(), gradient.copy(), gradient.copy()
    add_l2(whole, params, 0.1, mask)
    add_l2(by_ranges, params, 0.1, runs(mask))
    for shard in (slice(0, 77), slice(77, 20_001), slice(20_001, n)):
        add_l2(by_shard[shard], params[shard], 0.1, mask[shard])
    assert whole.tobytes() == by_ranges.tobytes() == by_shard.tobytes()
    assert whole[~mask].tobytes() == gradient[~mask].tobytes()
    assert whole[mask].tobytes() == (gradient + np.float32(0.1) * params)[mask].tobytes()


def test_runs():
    assert runs(np.zeros(3, bool)) == runs(np.zeros(0, bool)) == ()
    assert runs(np.ones(3, bool)) == (Range(0, 3),)
    assert runs(np.array([False, True, True, False, True])) == (Range(1, 3), Range(4, 5))
