"""Validation metrics: against scikit-learn, and the same whoever scored which block."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score, root_mean_squared_error

from raysgd.learn.losses import CrossEntropy, Logistic, Squared
from raysgd.learn.metrics import N_BINS, BlockScore, auc, combine, pooled, score_block, tree_sum


def logistic_rows(n=40_000, bias=0.0, scale=1.5, seed=0):
    """Scores and labels drawn from the probabilities they state: calibrated, as a trained model's."""
    rng = np.random.default_rng(seed)
    scores = (bias + scale * rng.standard_normal((n, 1))).astype(np.float32)
    label = (rng.random(n) < (1 + np.tanh(scores[:, 0] / 2)) / 2).astype(np.float32)
    return scores, label


def blocks_of(loss, scores, label, weight=None, size=1000):
    parts = [slice(i, i + size) for i in range(0, len(label), size)]
    return [score_block(loss, scores[s], label[s], None if weight is None else weight[s]) for s in parts]


@pytest.mark.parametrize(("bias", "scale"), [(0, 1.5), (0, 0.02), (-4, 1), (-7, 0.5), (0, 30), (3, 200)])
def test_auc_agrees_with_the_exact_one(bias, scale):
    scores, label = logistic_rows(bias=bias, scale=scale)
    got = combine(blocks_of(Logistic(), scores, label))
    assert got["auc"] == pytest.approx(roc_auc_score(label, scores[:, 0]), abs=5e-5)


def test_auc_counts_ties_half():
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 4, (5000, 1)).astype(np.float32)
    label = (rng.random(5000) < 0.3 + 0.05 * scores[:, 0]).astype(np.float32)
    got = combine([score_block(Logistic(), scores, label)])
    assert got["auc"] == pytest.approx(roc_auc_score(label, scores[:, 0]), abs=1e-12)


def test_auc_of_counts_beyond_int64_products():
    histogram = np.zeros((2, 3), np.int64)
    histogram[:, 0], histogram[:, 2] = (3 * 10**12, 10**12), (10**12, 3 * 10**12)
    assert auc(histogram) == (9 + 2 * 3 / 2) / 16


def test_auc_is_left_out_where_only_one_class_occurs():
    scores, label = logistic_rows(100)
    assert "auc" not in combine([score_block(Logistic(), scores, np.zeros_like(label))])
    assert "auc" not in combine([score_block(Logistic(), scores, np.ones_like(label))])


def test_bins_follow_the_order_of_the_scores_out_to_infinity():
    far = np.array([-np.inf, -3e38, -1e6, -40, -8, -1, -1e-3, 0, 1e-3, 1, 8, 40, 1e6, 3e38, np.inf], np.float32)
    block = [score_block(Logistic(), far[[i]][:, None], np.zeros(1, np.float32)).histogram for i in (1, 3, 7, 11, 13)]
    bins = [int(np.flatnonzero(histogram[0])[0]) for histogram in block]
    assert bins == sorted(set(bins))
    assert bins[0] >= 0
    assert bins[-1] == N_BINS - 1
    with np.errstate(all="ignore"):  # a diverged model: what is reported is NaN, and nothing fails
        score_block(Logistic(), np.append(far, np.float32(np.nan))[:, None], np.zeros(16, np.float32))


def test_logistic_metrics():
    scores, label = logistic_rows()
    got = combine(blocks_of(Logistic(), scores, label))
    p = 1 / (1 + np.exp(-scores[:, 0].astype(np.float64)))
    assert list(got) == ["loss", "rows", "accuracy", "auc"]
    assert got["rows"] == 40_000
    assert got["loss"] == pytest.approx(log_loss(label, p), rel=1e-10)
    assert got["accuracy"] == accuracy_score(label, p > 0.5)


def test_softmax_metrics():
    rng = np.random.default_rng(0)
    scores, label = rng.standard_normal((999, 5)).astype(np.float32), rng.integers(0, 5, 999).astype(np.float32)
    got = combine(blocks_of(CrossEntropy(), scores, label, size=100))
    assert list(got) == ["loss", "rows", "accuracy"]
    assert got["loss"] == pytest.approx(log_loss(label, CrossEntropy().probabilities(scores)), rel=1e-10)
    assert got["accuracy"] == accuracy_score(label, scores.argmax(axis=1))


def test_squared_metrics_with_weights():
    rng = np.random.default_rng(0)
    scores, label = rng.standard_normal((999, 1)).astype(np.float32), rng.standard_normal(999).astype(np.float32)
    weight = rng.integers(0, 3, 999).astype(np.float32)
    got = combine(blocks_of(Squared(), scores, label, weight, size=100))
    wide = label.astype(np.float64), scores[:, 0].astype(np.float64)
    assert list(got) == ["loss", "rows", "rmse"]
    assert got["rmse"] == pytest.approx(root_mean_squared_error(*wide, sample_weight=weight), rel=1e-12)
    assert got["loss"] == pytest.approx(got["rmse"] ** 2 / 2, rel=1e-12)
    assert got["rows"] == np.count_nonzero(weight)


def test_rows_of_weight_zero_do_not_count():
    scores, label = logistic_rows(500)
    weight = (np.arange(500) % 3 > 0).astype(np.float32)
    dropped = combine([score_block(Logistic(), scores, label, weight)])
    left = combine([score_block(Logistic(), scores[weight > 0], label[weight > 0])])
    assert dropped == pytest.approx(left, rel=1e-12)
    assert {key: dropped[key] for key in ("rows", "accuracy", "auc")} == {
        key: left[key] for key in ("rows", "accuracy", "auc")
    }


def test_any_grouping_of_the_blocks_gives_the_same_bits():
    blocks = blocks_of(Logistic(), *logistic_rows(20_000), size=777)
    whole = combine(blocks)
    for workers in (1, 2, 3, 7):
        groups = np.array_split(np.arange(len(blocks)), workers)
        sent = [block for group in groups for block in pooled([blocks[i] for i in group])]
        assert sum(block.histogram is not None for block in sent) == workers
        assert combine(sent) == whole


def test_pooling_copies():
    blocks = blocks_of(Logistic(), *logistic_rows(300), size=100)
    before = blocks[0].histogram.sum()
    assert pooled(blocks)[0].histogram.sum() == 300
    assert blocks[0].histogram.sum() == before == 100


def test_tree_sum_follows_the_fixed_tree():
    leaves = [0.1 * 3**i for i in range(11)]
    a, b, c, d, e, f, g, h, i, j, k = leaves
    assert tree_sum(leaves) == (((a + b) + (c + d)) + ((e + f) + (g + h))) + ((i + j) + k)
    assert tree_sum(leaves[:6]) == ((a + b) + (c + d)) + (e + f)
    assert (tree_sum([]), tree_sum([1.5])) == (0.0, 1.5)
    assert tree_sum([1e16, 1.0, -1e16, 1.0]) == (1e16 + 1.0) + (-1e16 + 1.0)


def test_float_sums_follow_the_tree_over_the_block_index():
    a, b, c, d, e = sums = [1.0, 0.6, 0.5, 0.3, 0.5]
    expected = (((a + b) + (c + d)) + e) / 5
    assert expected not in (sum(sums) / 5, sum(reversed(sums)) / 5)
    got = combine([BlockScore(1, 1.0, value, None, value) for value in sums])
    assert got["loss"] == expected
    assert got["rmse"] == expected**0.5


def test_no_rows():
    assert combine([]) == {"rows": 0}
    empty = score_block(Logistic(), np.empty((0, 1), np.float32), np.empty(0, np.float32))
    assert (empty.rows, empty.weight, empty.loss_sum, empty.correct) == (0, 0.0, 0.0, 0)
    assert combine([empty]) == {"rows": 0}
    assert combine([empty, BlockScore(2, 2.0, 1.0, correct=1)])["loss"] == 0.5
