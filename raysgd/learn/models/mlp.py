"""The multilayer perceptron: an affine map from numbers and codes, then dense layers, ReLU or tanh between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import sqrt
from typing import Literal

import numpy as np

from raysgd.errors import InputError
from raysgd.learn.batch import Batch, Float32, Inputs, Target
from raysgd.learn.checks import choice_problems, count_problems, float32_problems
from raysgd.learn.initializers import fan_in_uniform
from raysgd.learn.losses import CrossEntropy, Logistic, Loss, Squared, TargetKind
from raysgd.learn.models.affine import InputLayer, sum_rows
from raysgd.learn.models.base import ValueAndGrad, refuse_unfit
from raysgd.learn.parameters import Array, Layout

_LOSSES: dict[str, Loss] = {loss.name: loss for loss in (Logistic(), CrossEntropy(), Squared())}
_GAIN = {"relu": sqrt(2.0), "tanh": 1.0}


@dataclass(frozen=True)
class DenseLayer:
    """``z = a weights + bias``. Its parameters begin at ``begin``: "weights" (fan_in, k), "bias" (k,)."""

    fan_in: int
    outputs: int
    prefix: str
    begin: int

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (
            Array(self.prefix + "weights", (self.fan_in, self.outputs)),
            Array(self.prefix + "bias", (self.outputs,), penalized=False),
        )

    @cached_property
    def end(self) -> int:
        return self._middle + self.outputs

    @cached_property
    def _middle(self) -> int:
        return self.begin + self.fan_in * self.outputs

    def initialize(self, out: Float32, scale: float, seed: int) -> None:
        size = self._middle - self.begin
        out[self.begin : self._middle] = fan_in_uniform((size,), self.fan_in, scale, seed, self.prefix + "weights")
        out[self._middle : self.end] = 0

    def forward(self, params: Float32, a: Float32) -> Float32:
        """a: (n_rows, fan_in) float32; returns (n_rows, k) float32, fresh."""
        z: Float32 = np.matmul(a, self._weights(params))
        z += params[self._middle : self.end]
        return z

    def backward(self, params: Float32, a: Float32, delta: Float32, out: Float32) -> Float32:
        """Writes its gradient into ``out`` (n_params,) and returns the one by ``a``, (n_rows, fan_in)."""
        np.matmul(a.T, delta, out=self._weights(out))
        sum_rows(delta, out[self._middle : self.end])
        # For a single output the product is an outer one, which BLAS does three times slower.
        product = np.multiply if self.outputs == 1 else np.matmul
        below: Float32 = product(delta, self._weights(params).T)
        return below

    def _weights(self, flat: Float32) -> Float32:
        return flat[self.begin : self._middle].reshape(self.fan_in, self.outputs)


@dataclass(frozen=True)
class BoundMLP:
    """Layers over one flat vector under a loss."""

    inputs: Inputs
    loss: Loss
    activation: Literal["relu", "tanh"]
    first: InputLayer
    rest: tuple[DenseLayer, ...]
    init_scale: float

    @cached_property
    def layout(self) -> Layout:
        return Layout(sum((layer.arrays for layer in self.rest), self.first.arrays))

    def initial(self, seed: int) -> Float32:
        """He's scale before ReLU, LeCun's before tanh and the outputs, times ``init_scale``."""
        params = np.empty(self.rest[-1].end, np.float32)
        hidden = self.init_scale * _GAIN[self.activation]
        self.first.initialize(params, hidden, seed)
        for layer in self.rest[:-1]:
            layer.initialize(params, hidden, seed)
        self.rest[-1].initialize(params, self.init_scale, seed)
        return params

    def value_and_grad(self, params: Float32, batch: Batch, out: Float32) -> float:
        with np.errstate(over="ignore", invalid="ignore"):  # the servers judge whether the gradient is finite
            activations, scores = self._forward(params, batch)
            value, delta = self.loss.value_and_gradient(scores, batch.label, batch.weight)
            for layer, a in zip(reversed(self.rest), reversed(activations), strict=True):
                delta = layer.backward(params, a, delta, out)
                self._times_derivative(delta, a)
            self.first.backward(delta, batch, out)
        return value

    def scores(self, params: Float32, batch: Batch) -> Float32:
        with np.errstate(over="ignore", invalid="ignore"):
            return self._forward(params, batch)[1]

    def _forward(self, params: Float32, batch: Batch) -> tuple[list[Float32], Float32]:
        """The hidden layers' outputs, (n_rows, width) each, and the scores."""
        z = self.first.forward(params, batch)
        activations = []
        for layer in self.rest:
            a = np.tanh(z, out=z) if self.activation == "tanh" else np.maximum(z, np.float32(0), out=z)
            activations.append(a)
            z = layer.forward(params, a)
        return activations, z

    def _times_derivative(self, delta: Float32, a: Float32) -> None:
        """delta *= f'(z) in place, read off a = f(z): a > 0 for ReLU (0 at 0), 1 - a^2 for tanh."""
        if self.activation == "tanh":
            slope = a * a
            np.subtract(np.float32(1), slope, out=slope)
            np.multiply(delta, slope, out=delta)
        else:
            np.multiply(delta, a > 0, out=delta)


@dataclass(frozen=True)
class MLP:
    """Fully connected hidden layers, then linear outputs under the loss.

    hidden: units per hidden layer, first to last
    activation: "relu" or "tanh"
    loss: "logistic" (two classes), "cross_entropy" (two or more classes), "squared" (a number)
    l2: factor of ``||w||^2 / 2`` over all weights on the mean loss, never on biases
    init_scale: factor of the initial weights' standard deviation

    >>> bound = MLP(hidden=(8,)).bind(Inputs(numeric=2, categories=(3, 2)), Target(classes=2))
    >>> [(array.name, array.shape) for array in bound.layout.arrays]  # doctest: +NORMALIZE_WHITESPACE
    [('layer0/weights', (2, 8)), ('layer0/codes', (5, 8)), ('layer0/bias', (8,)),
     ('layer1/weights', (8, 1)), ('layer1/bias', (1,))]
    """

    hidden: tuple[int, ...] = (64,)
    activation: Literal["relu", "tanh"] = "relu"
    loss: Literal["logistic", "cross_entropy", "squared"] = "logistic"
    l2: float = 0.0
    init_scale: float = 1.0

    @property
    def target_kind(self) -> TargetKind:
        return "number" if self.loss == "squared" else "class"

    def problems(self) -> list[str]:
        return (
            _hidden_problems(self.hidden)
            + choice_problems("activation", self.activation, _GAIN)
            + choice_problems("loss", self.loss, _LOSSES)
            + float32_problems("l2", self.l2, at_least=0)
            + float32_problems("init_scale", self.init_scale, above=0)
        )

    def bind(self, inputs: Inputs, target: Target) -> ValueAndGrad:
        if problems := self.problems():
            raise InputError(problems)
        loss = _LOSSES[self.loss]
        refuse_unfit(self, loss, target)
        first = InputLayer(inputs, self.hidden[0], "layer0/")
        rest: list[DenseLayer] = []
        begin = first.end
        for i, (fan_in, width) in enumerate(pairwise((*self.hidden, loss.outputs(target))), start=1):
            rest.append(DenseLayer(fan_in, width, f"layer{i}/", begin))
            begin = rest[-1].end
        return BoundMLP(inputs, loss, self.activation, first, tuple(rest), self.init_scale)


def _hidden_problems(hidden: object) -> list[str]:
    if isinstance(hidden, str) or not isinstance(hidden, Sequence) or len(hidden) == 0:
        return [f"hidden must be a list of one or more layer widths such as [64, 32], got {hidden!r}"]
    return [problem for i, width in enumerate(hidden) for problem in count_problems(f"hidden[{i}]", width)]
