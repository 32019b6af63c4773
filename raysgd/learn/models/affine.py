"""The affine map from a batch to k outputs a row: numbers are multiplied, category codes are looked up.

    z[i] = numeric[i] @ weights + sum_j codes_weights[codes[i, j]] + bias

One-hot is an index: the gradient of a code is the sum of its rows', scattered. The code ``n_codes`` (a value that
training did not see) contributes zero and gets no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raysgd.learn.batch import Batch, Float32, Inputs
from raysgd.learn.initializers import fan_in_uniform
from raysgd.learn.parameters import Array


@dataclass(frozen=True)
class InputLayer:
    """k units over numbers and codes. Its parameters begin at ``begin`` of the flat vector.

    Arrays, those without coordinates left out: "weights" (n_numeric, k), "codes" (n_codes, k), "bias" (k,).
    """

    inputs: Inputs
    outputs: int
    prefix: str = ""
    begin: int = 0

    @property
    def arrays(self) -> tuple[Array, ...]:
        k = self.outputs
        arrays = (
            Array(self.prefix + "weights", (self.inputs.numeric, k)),
            Array(self.prefix + "codes", (self.inputs.n_codes, k)),
            Array(self.prefix + "bias", (k,), penalized=False),
        )
        return tuple(array for array in arrays if array.size)

    @property
    def end(self) -> int:
        return int(self._slices[2].stop)

    @cached_property
    def _slices(self) -> tuple[slice, slice, slice]:
        """Where weights, codes and bias lie in the flat vector."""
        a = self.begin
        b = a + self.inputs.numeric * self.outputs
        c = b + self.inputs.n_codes * self.outputs
        return slice(a, b), slice(b, c), slice(c, c + self.outputs)

    def initialize(self, out: Float32, scale: float, seed: int) -> None:
        """Weights by fan-in into ``out`` (n_params,); the bias is zero. A row has one code per categorical column."""
        fan_in = self.inputs.numeric + len(self.inputs.categories)
        for where, name in zip(self._slices[:2], ("weights", "codes"), strict=True):
            shape = (where.stop - where.start,)
            out[where] = fan_in_uniform(shape, fan_in, scale, seed, self.prefix + name)
        out[self._slices[2]] = 0

    def forward(self, params: Float32, batch: Batch, out: Float32 | None = None) -> Float32:
        """(n_rows, k) float32, in ``out`` or fresh."""
        weights, codes, bias = self._slices
        k = self.outputs
        z: Float32 = np.matmul(batch.numeric, params[weights].reshape(-1, k), out=out)
        if codes.start < codes.stop:
            self._look_up(z, params[codes].reshape(-1, k), batch)
        z += params[bias]
        return z

    def backward(self, delta: Float32, batch: Batch, out: Float32) -> None:
        """Writes the gradient of its parameters into ``out`` (n_params,); delta: (n_rows, k), by the outputs."""
        weights, codes, bias = self._slices
        np.matmul(batch.numeric.T, delta, out=out[weights].reshape(-1, self.outputs))
        if codes.start < codes.stop:
            self._scatter(delta, batch, out[codes])
        sum_rows(delta, out[bias])

    def _look_up(self, z: Float32, table: Float32, batch: Batch) -> None:
        """z[i] += table[codes[i, j]] for every column j, unseen codes left out."""
        codes, unseen = batch.codes, self._has_unseen(batch)
        if self.outputs == 1 and not unseen:
            z += np.matmul(table[:, 0].take(codes, mode="clip"), self._ones)
            return
        for column in codes.T:
            rows = column < self.inputs.n_codes if unseen else slice(None)
            z[rows] += table.take(column[rows], axis=0, mode="clip")

    def _scatter(self, delta: Float32, batch: Batch, out: Float32) -> None:
        """out[codes[i, j]] = the sum of delta[i] over its rows, in row order, column by column.

        out: (n_codes * k,) float32. ``np.add.at`` over flat indices adds in the order of the indices.
        """
        codes, unseen, k = batch.codes, self._has_unseen(batch), self.outputs
        out.fill(0)
        if k == 1 and not unseen:
            np.add.at(out, codes.ravel(), np.repeat(delta[:, 0], codes.shape[1]))
            return
        lanes = np.arange(k)
        for column in codes.T:
            rows = column < self.inputs.n_codes if unseen else slice(None)
            index = column[rows].astype(np.intp)[:, None] * k + lanes
            np.add.at(out, index.ravel(), delta[rows].ravel())

    def _has_unseen(self, batch: Batch) -> bool:
        return len(batch) > 0 and bool(np.maximum.reduce(batch.codes, axis=None) >= self.inputs.n_codes)

    @cached_property
    def _ones(self) -> Float32:
        return np.ones((len(self.inputs.categories), 1), np.float32)


def sum_rows(delta: Float32, out: Float32) -> None:
    """``out[j] = sum_i delta[i, j]``; by BLAS where there are several columns, which numpy adds far slower."""
    if delta.shape[1] == 1:
        np.add.reduce(delta, axis=0, out=out)
    else:
        np.matmul(np.ones(len(delta), np.float32), delta, out=out)
