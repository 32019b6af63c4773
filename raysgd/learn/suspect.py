"""Which row of a minibatch is to blame where a step is not finite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysgd.learn.batch import Batch, Float32
from raysgd.learn.models.base import ValueAndGrad


@dataclass(frozen=True, slots=True, order=True)
class Suspect:
    """The row whose gradient is largest. size: the largest absolute value in it, inf where one is not finite

    row: its place in the batch
    """

    size: float
    row: int


def suspect(learner: ValueAndGrad, params: Float32, batch: Batch) -> Suspect:
    """The row with the largest gradient at ``params`` (n_params,), each row by itself; of equals the first.

    >>> from raysgd.learn.batch import Inputs, Target
    >>> from raysgd.learn.models import LinearRegression
    >>> learner = LinearRegression().bind(Inputs(numeric=1), Target())
    >>> batch = Batch(np.ones((2, 1), np.float32), np.empty((2, 0), np.int32), np.array([1, 1e30], np.float32))
    >>> suspect(learner, np.zeros(2, np.float32), batch).row
    1
    """
    out = np.empty_like(params)
    found = [Suspect(_size(learner, params, batch.slice(i, i + 1), out), i) for i in range(len(batch))]
    return max(found, key=lambda s: (s.size, -s.row))


def _size(learner: ValueAndGrad, params: Float32, row: Batch, out: Float32) -> float:
    with np.errstate(all="ignore"):
        learner.value_and_grad(params, row, out)
        size = float(np.max(np.abs(out)))
    return size if np.isfinite(size) else np.inf
