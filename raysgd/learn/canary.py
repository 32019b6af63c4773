"""A gradient that every machine of a run must compute to the same bytes.

Another family of processors can add a matrix product in another order. Whoever joins a run shows a hash of the gradient
of the run's own model over rows that are made up; where the hashes differ, so would the trained bytes.
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np

from raysgd.learn.batch import Batch
from raysgd.learn.models.base import ValueAndGrad
from raysgd.learn.models.hashed import BoundHashed
from raysgd.learn.random import words

#: rows of the batches that are tried: kernels for matrices differ by size
SIZES = (1, 7, 64)

SEED, PURPOSE = 0, "canary"


def canary(learner: ValueAndGrad) -> str:
    """SHA-256, in hex, of the losses and gradients over batches of made-up rows; of a sparse model, of a product alone.

    >>> from raysgd.learn.batch import Inputs, Target
    >>> from raysgd.learn.models import LogisticRegression
    >>> learner = LogisticRegression().bind(Inputs(numeric=3, categories=(4,)), Target(classes=2))
    >>> canary(learner) == canary(learner)
    True
    """
    hasher = sha256()
    if isinstance(learner, BoundHashed):  # a gradient of all its weights would be as large as the model
        for n in SIZES:
            a = _numbers(n * 64, n).reshape(n, 64)
            hasher.update((a @ a[0]).tobytes() + np.exp(a[0]).tobytes())
        return hasher.hexdigest()
    params, out = learner.initial(SEED), np.empty(learner.layout.n_params, np.float32)
    for n in SIZES:
        value = learner.value_and_grad(params, _rows(learner, n), out)
        hasher.update(np.float64(value).tobytes())
        hasher.update(out.data)
    return hasher.hexdigest()


def _rows(learner: ValueAndGrad, n: int) -> Batch:
    inputs = learner.inputs
    bits = words(n * (1 + len(inputs.categories)), SEED, PURPOSE, n)
    label = (bits[:n] % np.uint64(2)).astype(np.float32)  # two classes, or the numbers 0 and 1: any loss takes them
    codes = np.empty((n, len(inputs.categories)), np.int32)
    for column in range(codes.shape[1]):
        codes[:, column] = bits[n * (1 + column) : n * (2 + column)] % np.uint64(max(1, inputs.n_codes))
    return Batch(_numbers(n * inputs.numeric, n).reshape(n, inputs.numeric), codes, label)


def _numbers(count: int, n: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Uniform in [-2, 2)."""
    fractions = (words(count, SEED, PURPOSE, n, 1) >> np.uint64(40)).astype(np.float32)
    return fractions * np.float32(2.0**-22) - np.float32(2)
