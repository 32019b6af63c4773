"""Validation metrics that do not depend on who scored which rows.

Rows are scored in fixed blocks. Counts are integers and add up exactly in any grouping; losses are float64 sums
per block, added along one fixed tree over the block index. AUC comes from counts per bin of the score.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from operator import add

import numpy as np
import numpy.typing as npt

from raysgd.learn.batch import Float32, Int64
from raysgd.learn.losses import Loss
from raysgd.learn.tree import tree_reduce

#: Bins of the score of class 1.
N_BINS = 65_536


@dataclass(frozen=True)
class BlockScore:
    """What is known of one block of rows. Rows of weight zero (dropped ones) do not count.

    rows: number of rows
    weight: float64 sum of their weights
    loss_sum: float64 weighted sum of their losses
    correct: rows whose class is predicted, None where the target is a number
    squared_error: float64 weighted sum of squared errors, None where the target is a class
    histogram: (2, N_BINS) int64 rows by class and bin of the score, None but for the logistic loss, or where
        :func:`pooled` has added it to another block's
    """

    rows: int
    weight: float
    loss_sum: float
    correct: int | None = None
    squared_error: float | None = None
    histogram: Int64 | None = None


def score_block(loss: Loss, scores: Float32, label: Float32, weight: Float32 | None = None) -> BlockScore:
    """The metrics of one block, to be merged by :func:`combine`.

    scores: (n_rows, k) float32; label: (n_rows,) float32; weight: (n_rows,) float32 or None for ones

    >>> from raysgd.learn.losses import Logistic
    >>> scores = np.array([[-2.0], [1.0], [3.0]], np.float32)
    >>> block = score_block(Logistic(), scores, np.array([0, 0, 1], np.float32))
    >>> block.rows, block.correct
    (3, 2)
    """
    counted = None if weight is None else weight > 0
    rows = len(label) if counted is None else int(np.count_nonzero(counted))
    values = loss.value(scores, label)
    total = float(rows) if weight is None else float(np.add.reduce(weight, dtype=np.float64))
    block = BlockScore(rows, total, _weighted_sum(values, weight))
    if loss.target_kind == "number":
        error = loss.predictions(scores).astype(np.float64) - label
        return replace(block, squared_error=_weighted_sum(error * error, weight))
    hit = loss.predictions(scores) == label
    correct = int(np.count_nonzero(hit if counted is None else hit & counted))
    histogram = _histogram(scores[:, 0], label, counted) if scores.shape[1] == 1 else None
    return replace(block, correct=correct, histogram=histogram)


def _weighted_sum(values: npt.NDArray[np.float64], weight: Float32 | None) -> float:
    return float(np.add.reduce(values if weight is None else values * weight))


def _histogram(score: Float32, label: Float32, counted: npt.NDArray[np.bool_] | None) -> Int64:
    """(2, N_BINS) int64: rows by class and bin.

    The bins are even in s / (8 + |s|): 4,096 a unit of log odds around 0, still 164 a unit at 32, in exact
    arithmetic. Bins even in the probability would be too coarse where positives are rare.
    """
    if counted is not None:
        score, label = score[counted], label[counted]
    odds = np.clip(np.nan_to_num(score.astype(np.float64)), -1e30, 1e30)
    bins = ((odds / (8.0 + np.abs(odds)) + 1.0) * (N_BINS // 2)).astype(np.intp)
    np.minimum(bins, N_BINS - 1, out=bins)
    flat = np.bincount(bins + N_BINS * (label > 0), minlength=2 * N_BINS)
    return flat.reshape(2, N_BINS).astype(np.int64, copy=False)


def pooled(blocks: Sequence[BlockScore]) -> list[BlockScore]:
    """The same blocks with all histograms added into the first one's: a megabyte to send instead of many.

    >>> blocks = [BlockScore(1, 1.0, 0.5, 1, None, np.ones((2, N_BINS), np.int64)) for _ in range(3)]
    >>> [block.histogram is None for block in pooled(blocks)]
    [False, True, True]
    """
    total = _total_histogram(blocks)
    return [replace(block, histogram=total if i == 0 else None) for i, block in enumerate(blocks)]


def _total_histogram(blocks: Iterable[BlockScore]) -> Int64 | None:
    total: Int64 | None = None
    for block in blocks:
        if block.histogram is not None:
            total = block.histogram.copy() if total is None else np.add(total, block.histogram, out=total)
    return total


def tree_sum(values: Sequence[float]) -> float:
    """The float64 sum along the fixed tree: a node over n leaves splits at the largest power of two below n.

    >>> tree_sum([1.0, 2.0, 3.0]) == (1.0 + 2.0) + 3.0, tree_sum([])
    (True, 0.0)
    """
    return float(tree_reduce(values, add)) if values else 0.0


def combine(blocks: Sequence[BlockScore]) -> dict[str, float]:
    """The metrics over all blocks, which must be in the order of their index.

    "loss": the weighted mean loss, without the penalty; "rows": rows of positive weight; for classes "accuracy",
    for the logistic loss also "auc" (left out where only one class occurs); for a number "rmse". Only "rows"
    where there are none.

    >>> combine([BlockScore(2, 2.0, 1.0, correct=1), BlockScore(2, 2.0, 3.0, correct=2)])
    {'loss': 1.0, 'rows': 4, 'accuracy': 0.75}
    """
    rows = sum(block.rows for block in blocks)
    weight = tree_sum([block.weight for block in blocks])
    if rows == 0 or weight <= 0:
        return {"rows": rows}
    metrics: dict[str, float] = {"loss": tree_sum([block.loss_sum for block in blocks]) / weight, "rows": rows}
    if blocks[0].correct is not None:
        metrics["accuracy"] = sum(block.correct or 0 for block in blocks) / rows
    if blocks[0].squared_error is not None:
        metrics["rmse"] = sqrt(tree_sum([block.squared_error or 0.0 for block in blocks]) / weight)
    histogram = _total_histogram(blocks)
    if histogram is not None and (area := auc(histogram)) is not None:
        metrics["auc"] = area
    return metrics


def auc(histogram: Int64) -> float | None:
    """The area under the ROC curve from rows by class and bin, (2, bins) int64: ties within a bin count half.

    None where only one class occurs. The counting is in whole numbers, exact for any number of rows.

    >>> auc(np.array([[3, 1, 0], [0, 1, 3]]))
    0.96875

    Source: Mann, Whitney, "On a test of whether one of two random variables is stochastically larger", 1947.
    """
    negative, positive = histogram
    occupied = np.flatnonzero(negative + positive)
    below, twice = 0, 0
    for n, p in zip(negative[occupied].tolist(), positive[occupied].tolist(), strict=True):
        twice += p * (2 * below + n)
        below += n
    positives = int(np.add.reduce(positive))
    return twice / (2 * positives * below) if positives and below else None
