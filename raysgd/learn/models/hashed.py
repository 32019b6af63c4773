"""Models on hashed categories: a table of 2^hash_bits rows, of which a minibatch touches few.

flat vector   [ hashed: 2^hash_bits rows of 1 + k | weights: p rows of 1 + k | bias ]
compact one   [ the rows that a batch touches     | weights                  | bias ]

A row is a linear weight and k factors (k = 0 in logistic regression). Both vectors have the same form, so the same
functions serve: of the full vector with the codes as they are, and of a compact one with each code's position in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raysgd.errors import InputError
from raysgd.learn.batch import Batch, Float32, Inputs, Int32, Target
from raysgd.learn.checks import choice_problems, count_problems, float32_problems
from raysgd.learn.hashing import MAX_BITS, uniform_at
from raysgd.learn.losses import Logistic, Loss, Squared, TargetKind
from raysgd.learn.models.base import Model, refuse_unfit
from raysgd.learn.parameters import Array, Layout, Range

#: Coordinates are int32 in messages.
MAX_PARAMS = 2**31 - 1

#: Coordinates whose initial values are made at a time.
BLOCK = 1 << 20

LOSSES: dict[str, type[Loss]] = {"logistic": Logistic, "squared": Squared}


@dataclass(frozen=True)
class BoundHashed:
    """A hashed model bound to a table's shape: a :class:`~raysgd.learn.models.base.ValueAndGrad`, and what a sparse
    shard and its clients need besides."""

    inputs: Inputs
    loss: Loss
    factors: int
    init_scale: float

    @property
    def width(self) -> int:
        """Floats a row of the table has: the weight, then the factors."""
        return 1 + self.factors

    @property
    def tail(self) -> int:
        """Coordinates behind the table, which every step touches."""
        return self.inputs.numeric * self.width + 1

    @cached_property
    def layout(self) -> Layout:
        d, p = self.width, self.inputs.numeric
        arrays = (Array("hashed", (self.inputs.n_codes, d)), Array("weights", (p, d)), Array("bias", (1,), False))
        return Layout(tuple(array for array in arrays if array.size))

    def touched(self, rows: int) -> int:
        """Coordinates that so many rows touch at most."""
        return min(self.layout.n_params, rows * len(self.inputs.categories) * self.width + self.tail)

    def initial(self, seed: int) -> Float32:
        """(n_params,) float32. Training makes only what it needs of it, with :meth:`initialize`."""
        params = np.zeros(self.layout.n_params, np.float32)
        self.initialize(params, Range(0, len(params)), seed)
        return params

    def initialize(self, out: Float32, span: Range, seed: int) -> None:
        """The initial values of the coordinates ``span`` into ``out``, which is zero: small random factors.

        Each is a pure function of seed and coordinate; weights and bias begin at zero, which costs no memory.
        """
        if not self.factors:
            return
        bound = np.float32(self.init_scale * np.sqrt(3.0))
        end = min(span.end, self.layout.n_params - 1)  # the last one is the bias
        for begin in range(span.begin, end, BLOCK):
            coordinates = np.arange(begin, min(begin + BLOCK, end))
            values = uniform_at(coordinates, seed, "initial/factors") * bound
            values[coordinates % self.width == 0] = 0
            out[begin - span.begin : begin - span.begin + len(values)] = values

    def coordinates(self, rows: Int32) -> Int32:
        """(m,) int32, sorted: the coordinates of these rows of the table (sorted), and all those behind it."""
        d = self.width
        lanes = rows if d == 1 else (rows[:, None] * np.int32(d) + np.arange(d, dtype=np.int32)).ravel()
        return np.concatenate([lanes, self._tail])

    def value_and_grad(self, params: Float32, batch: Batch, out: Float32) -> float:
        """See the protocol; ``params`` may be compact, codes being positions in it.

        No coordinate of the table gets a gradient of -0.0, so to add one that is absent elsewhere changes no bit.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # the servers judge whether the gradient is finite
            if self.factors:
                return self._machine_gradient(params, batch, out)
            return self._linear_gradient(params, batch, out)

    def scores(self, params: Float32, batch: Batch) -> Float32:
        with np.errstate(over="ignore", invalid="ignore"):
            if self.factors:
                return self._machine(params, batch)[0]
            return self._linear(params, batch)

    def _parts(self, flat: Float32) -> tuple[Float32, Float32, Float32]:
        """Views: the table (rows, width), the numbers' weights (p, width), the bias (1,)."""
        cut, d = len(flat) - self.tail, self.width
        return flat[:cut].reshape(-1, d), flat[cut:-1].reshape(-1, d), flat[-1:]

    def _linear(self, params: Float32, batch: Batch) -> Float32:
        table, weights, bias = self._parts(params)
        z: Float32 = np.matmul(batch.numeric, weights)
        z += np.matmul(_rows(table, batch)[..., 0], self._ones)
        z += bias
        return z

    def _linear_gradient(self, params: Float32, batch: Batch, out: Float32) -> float:
        value, delta = self.loss.value_and_gradient(self._linear(params, batch), batch.label, batch.weight)
        table, weights, bias = self._parts(out)
        _scatter(table, batch, np.repeat(delta[:, 0], batch.codes.shape[1]))
        np.matmul(batch.numeric.T, delta, out=weights)
        np.add.reduce(delta, axis=0, out=bias)
        return value

    def _machine(self, params: Float32, batch: Batch) -> tuple[Float32, Float32, Float32]:
        """Scores (n_rows, 1); each row's sums of factors (n_rows, k); the rows looked up (n_rows, c, 1 + k).

        ``sum over pairs <v_i, v_j> x_i x_j = (sum_f (sum_i v_if x_i)^2 - sum_i v_if^2 x_i^2) / 2``
        """
        table, weights, bias = self._parts(params)
        looked_up = _rows(table, batch)
        linear, factors = looked_up[..., 0], looked_up[..., 1:]
        sums = np.add.reduce(factors, axis=1)
        sums += np.matmul(batch.numeric, weights[:, 1:])
        squares = np.add.reduce(np.square(factors), axis=(1, 2))
        squares += np.matmul(np.square(batch.numeric), np.add.reduce(np.square(weights[:, 1:]), axis=1))
        z: Float32 = np.matmul(batch.numeric, weights[:, :1])
        z[:, 0] += np.add.reduce(linear, axis=1)
        z[:, 0] += (np.add.reduce(np.square(sums), axis=1) - squares) * np.float32(0.5)
        z += bias
        return z, sums, looked_up

    def _machine_gradient(self, params: Float32, batch: Batch, out: Float32) -> float:
        scores, sums, gradient = self._machine(params, batch)
        value, delta = self.loss.value_and_gradient(scores, batch.label, batch.weight)
        factors = gradient[..., 1:]
        np.subtract(sums[:, None, :], factors, out=factors)
        gradient[..., 0] = 1
        gradient *= delta[:, :, None]
        table, weights, bias = self._parts(out)
        _scatter(table, batch, gradient.ravel())
        x, v = batch.numeric, self._parts(params)[1][:, 1:]
        weights[:, :1] = np.matmul(x.T, delta)
        weights[:, 1:] = np.matmul(x.T, delta * sums) - np.matmul(np.square(x).T, delta) * v
        np.add.reduce(delta, axis=0, out=bias)
        return value

    @cached_property
    def _tail(self) -> Int32:
        n = self.layout.n_params
        return np.arange(n - self.tail, n, dtype=np.int32)

    @cached_property
    def _ones(self) -> Float32:
        return np.ones((len(self.inputs.categories), 1), np.float32)


def _rows(table: Float32, batch: Batch) -> Float32:
    """(n_rows, c, width) fresh: the table's rows of each code; zeros for codes behind the table."""
    codes, n = batch.codes, len(table)
    if not n:
        return np.zeros((*codes.shape, table.shape[1]), np.float32)
    found: Float32 = table.take(codes, axis=0, mode="clip")
    if _has_absent(batch, n):
        found[codes >= n] = 0
    return found


def _scatter(table: Float32, batch: Batch, values: Float32) -> None:
    """``table[codes[i, j]] = the sum of values[i, j]`` over its rows, in row order. values: (n_rows * c * width,).

    Begins at +0.0, so that no sum is -0.0.
    """
    n, d = table.shape
    index = batch.codes.ravel().astype(np.intp, copy=False)
    if _has_absent(batch, n):
        present = index < n
        index, values = index[present], values.reshape(-1, d)[present].ravel()
    if d > 1:
        index = (index[:, None] * d + np.arange(d)).ravel()
    flat = table.reshape(-1)
    flat.fill(0)
    np.add.at(flat, index, values)


def _has_absent(batch: Batch, n: int) -> bool:
    return batch.codes.size > 0 and bool(np.maximum.reduce(batch.codes, axis=None) >= n)


@dataclass(frozen=True)
class HashedLogisticRegression:
    """``P(class 1) = 1 / (1 + exp(-s))``, ``s = sum_j w[hash(x_j)] + v numbers + b``, for exactly two classes.

    hash_bits: 2^hash_bits weights for all categories together; no vocabulary, and no value is unseen
    l2: factor of ``||w||^2 / 2`` on the mean loss, for the weights that a step touches; never on the bias

    >>> bound = HashedLogisticRegression(hash_bits=4).bind(Inputs(1, (16, 16), hash_bits=4), Target(classes=2))
    >>> [(array.name, array.shape) for array in bound.layout.arrays]
    [('hashed', (16, 1)), ('weights', (1, 1)), ('bias', (1,))]
    """

    hash_bits: int = 22
    l2: float = 0.0

    @property
    def target_kind(self) -> TargetKind:
        return "class"

    def problems(self) -> list[str]:
        return bits_problems(self.hash_bits) + float32_problems("l2", self.l2, at_least=0)

    def bind(self, inputs: Inputs, target: Target) -> BoundHashed:
        return _bind(self, BoundHashed(inputs, Logistic(), 0, 0.0), target)


@dataclass(frozen=True)
class FactorizationMachine:
    """``s = b + sum_i w_i x_i + sum_{i < j} <v_i, v_j> x_i x_j`` over hashed categories (x = 1) and numbers.

    hash_bits: 2^hash_bits rows of weight and factors for all categories together
    factors: k, the length of each v
    loss: "logistic" (two classes) or "squared" (a number)
    l2: factor of ``(||w||^2 + ||v||^2) / 2`` on the mean loss, for those that a step touches; never on the bias
    init_scale: standard deviation of the first factors; weights begin at zero

    Source: Rendle, "Factorization machines", ICDM 2010.

    >>> machine = FactorizationMachine(hash_bits=4, factors=2)
    >>> machine.bind(Inputs(1, (16, 16), hash_bits=4), Target(classes=2)).layout.n_params
    52
    """

    hash_bits: int = 22
    factors: int = 8
    loss: str = "logistic"
    l2: float = 0.0
    init_scale: float = 0.05

    @property
    def target_kind(self) -> TargetKind:
        return "number" if self.loss == "squared" else "class"

    def problems(self) -> list[str]:
        found = bits_problems(self.hash_bits) + count_problems("factors", self.factors)
        if not found and self.factors << self.hash_bits > MAX_PARAMS:
            allowed = f"(1 + factors) * 2^hash_bits must be below 2^31, got {1 + self.factors} * 2^{self.hash_bits}"
            found.append(f"hash_bits: {allowed}; lower one of the two")
        found += choice_problems("loss", self.loss, LOSSES)
        found += float32_problems("l2", self.l2, at_least=0)
        return found + float32_problems("init_scale", self.init_scale, above=0)

    def bind(self, inputs: Inputs, target: Target) -> BoundHashed:
        loss = LOSSES.get(self.loss, Logistic)()
        return _bind(self, BoundHashed(inputs, loss, self.factors, self.init_scale), target)


def bits_problems(bits: object) -> list[str]:
    """Empty where ``bits`` can be ``hash_bits``, else one sentence.

    >>> bits_problems(31)
    ['hash_bits must be a whole number in [1, 30], got 31']
    """
    if isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= MAX_BITS:
        return []
    return [f"hash_bits must be a whole number in [1, {MAX_BITS}], got {bits!r}"]


def _bind(model: Model, bound: BoundHashed, target: Target) -> BoundHashed:
    refuse_unfit(model, bound.loss, target)
    if (n := bound.layout.n_params) > MAX_PARAMS:
        raise InputError(f"hash_bits: the model would have {n:,} parameters; at most {MAX_PARAMS:,}: lower hash_bits")
    return bound
