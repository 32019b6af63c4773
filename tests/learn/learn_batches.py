"""Random batches for the tests of learn/."""

from __future__ import annotations

import numpy as np

from raysgd.learn.batch import Batch, Inputs


def random_batch(n_rows, inputs: Inputs, classes: int, seed: int = 0, *, weighted=False, unseen=0.0) -> Batch:
    """Normal numbers, uniform codes (a share ``unseen`` of them never seen in training), uniform labels."""
    rng = np.random.default_rng(seed)
    codes = np.empty((n_rows, len(inputs.categories)), np.int32)
    first = 0
    for j, count in enumerate(inputs.categories):
        codes[:, j] = first + rng.integers(0, count, n_rows) if count else inputs.n_codes
        first += count
    codes[rng.random(codes.shape) < unseen] = inputs.n_codes
    label = rng.integers(0, classes, n_rows) if classes else rng.standard_normal(n_rows)
    weight = rng.integers(0, 4, n_rows).astype(np.float32) / 2 if weighted else None
    return Batch(
        rng.standard_normal((n_rows, inputs.numeric)).astype(np.float32), codes, label.astype(np.float32), weight
    )
