"""Plain numpy training loops on one core, data in memory: what the machine gives without any framework.

Each step gathers its rows at random from the whole table; momentum 0.9. ``python -m bench.bare NAME ROWS BATCH STEPS``
says rows a second.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np

from bench.processes import say
from bench.tables import CLASSES, PIXELS, Float32, images, numbers

RATE, MOMENTUM = np.float32(0.01), np.float32(0.9)
HIDDEN = 512


def logistic(n_rows: int, batch: int, take: bool = True) -> Callable[[np.ndarray], None]:
    """One step of logistic regression over the rows named, taken into a buffer or (slower) as ``x[index]``."""
    x, y = numbers(n_rows)
    w, momentum = np.zeros(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32)
    rows, label = np.empty((batch, x.shape[1]), np.float32), np.empty(batch, np.float32)

    def step(index: np.ndarray) -> None:
        nonlocal w, momentum
        nonlocal rows, label
        if take:
            x.take(index, axis=0, out=rows, mode="clip")
            y.take(index, out=label, mode="clip")
        else:
            rows, label = x[index], y[index]
        p = rows @ w
        np.negative(p, out=p)
        np.exp(p, out=p)
        p += np.float32(1)
        np.divide(np.float32(1), p, out=p)
        p -= label
        momentum *= MOMENTUM
        momentum += (p @ rows) / np.float32(batch)
        w -= RATE * momentum

    return step


def mlp(n_rows: int, batch: int) -> Callable[[np.ndarray], None]:
    """One step of the MLP 784-512-512-10, ReLU and cross-entropy, over the rows named."""
    x, y = images(n_rows)
    random = np.random.default_rng(0)
    widths = (PIXELS, HIDDEN, HIDDEN, CLASSES)
    weights: list[Float32] = [
        (random.standard_normal((a, b)) * np.sqrt(2 / a)).astype(np.float32) for a, b in pairwise(widths)
    ]
    biases = [np.zeros(b, np.float32) for b in widths[1:]]
    params = [*weights, *biases]
    momenta = [np.zeros_like(p) for p in params]
    each = np.arange(batch)

    def step(index: np.ndarray) -> None:
        a0 = x.take(index, axis=0, mode="clip")
        a1 = np.maximum(a0 @ weights[0] + biases[0], 0)
        a2 = np.maximum(a1 @ weights[1] + biases[1], 0)
        delta = a2 @ weights[2] + biases[2]
        delta -= delta.max(axis=1, keepdims=True)
        np.exp(delta, out=delta)
        delta /= delta.sum(axis=1, keepdims=True)
        delta[each, y[index]] -= 1
        delta /= np.float32(batch)
        d2 = delta @ weights[2].T
        d2 *= a2 > 0
        d1 = d2 @ weights[1].T
        d1 *= a1 > 0
        gradients = (a0.T @ d1, a1.T @ d2, a2.T @ delta, d1.sum(0), d2.sum(0), delta.sum(0))
        for p, m, g in zip(params, momenta, gradients, strict=True):
            np.multiply(m, MOMENTUM, out=m)
            np.add(m, g, out=m)
            np.subtract(p, RATE * m, out=p)

    return step


def rows_per_s(step: Callable[[np.ndarray], None], n_rows: int, batch: int, steps: int) -> float:
    """Over ``steps`` steps after a few; the permutations of the rows are drawn beforehand."""
    random = np.random.default_rng(1)
    warm = 5
    order = np.concatenate([random.permutation(n_rows) for _ in range(-(-batch * (steps + warm) // n_rows))])
    for i in range(warm):
        step(order[i * batch : (i + 1) * batch])
    began = time.perf_counter()
    for i in range(warm, warm + steps):
        step(order[i * batch : (i + 1) * batch])
    return batch * steps / (time.perf_counter() - began)


def scikit_learn(n_rows: int) -> float:
    """Rows a second of ``SGDClassifier.partial_fit`` over the whole table in one call, which shuffles by itself."""
    from sklearn.linear_model import SGDClassifier

    x, y = numbers(n_rows)
    model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.01)
    model.partial_fit(x[:1000], y[:1000], classes=[0.0, 1.0])
    began = time.perf_counter()
    model.partial_fit(x, y)
    return n_rows / (time.perf_counter() - began)


def main(name: str, n_rows: int, batch: int, steps: int) -> None:
    if name == "scikit_learn":
        say(scikit_learn(n_rows))
    else:
        makers: dict[str, Callable[[int, int], Callable[[np.ndarray], None]]] = {
            "logistic": logistic,
            "logistic_indexing": partial(logistic, take=False),
            "mlp": mlp,
        }
        say(rows_per_s(makers[name](n_rows, batch), n_rows, batch, steps))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
