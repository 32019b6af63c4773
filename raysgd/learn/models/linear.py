"""Linear, logistic and softmax regression: one affine map and a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from raysgd.learn.batch import Batch, Float32, Inputs, Target, joined_weights
from raysgd.learn.checks import float32_problems
from raysgd.learn.losses import CrossEntropy, Logistic, Loss, RowByRow, Squared, TargetKind
from raysgd.learn.models.affine import InputLayer
from raysgd.learn.models.base import Model, ValueAndGrad, refuse_unfit
from raysgd.learn.parameters import Layout


@dataclass(frozen=True)
class BoundLinear:
    """An affine map under a loss; the scores are its outputs."""

    inputs: Inputs
    loss: Loss
    layer: InputLayer
    init_scale: float

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.layer.arrays)

    def initial(self, seed: int) -> Float32:
        params = np.empty(self.layer.end, np.float32)
        self.layer.initialize(params, self.init_scale, seed)
        return params

    def value_and_grad(self, params: Float32, batch: Batch, out: Float32) -> float:
        with np.errstate(over="ignore", invalid="ignore"):  # the servers judge whether the gradient is finite
            scores = self.layer.forward(params, batch)
            value, delta = self.loss.value_and_gradient(scores, batch.label, batch.weight)
            self.layer.backward(delta, batch, out)
        return value

    @cached_property
    def row_by_row(self) -> RowByRow | None:
        """The loss, where :meth:`forward` can be used."""
        return self.loss if isinstance(self.loss, RowByRow) else None

    def forward(self, params: Float32, batches: Sequence[Batch]) -> list[tuple[float, Float32]]:
        """For each batch the sum of its losses, and their gradient by the scores, for :meth:`backward`.

        All rows go through the loss together: of small batches the calls cost more than the arithmetic. What adds rows
        up is called batch by batch, so that the bytes are those of :meth:`value_and_grad`. What overflows warns, unless
        the caller has numpy ignore it.
        """
        loss = self.row_by_row
        assert loss is not None
        ends = list(accumulate(map(len, batches)))
        cuts = [slice(end - len(batch), end) for end, batch in zip(ends, batches, strict=True)]
        label, weight = np.concatenate([batch.label for batch in batches]), joined_weights(batches)
        scores = np.empty((ends[-1], self.layer.outputs), np.float32)
        for cut, batch in zip(cuts, batches, strict=True):
            self.layer.forward(params, batch, scores[cut])
        losses, delta = loss.row_by_row(scores, label, weight)
        return [(loss.total(losses[cut]), delta[cut]) for cut in cuts]

    def backward(self, delta: Float32, batch: Batch, out: Float32) -> None:
        """The gradient of a batch into ``out`` (n_params,), from what :meth:`forward` gave for it."""
        self.layer.backward(delta, batch, out)

    def scores(self, params: Float32, batch: Batch) -> Float32:
        with np.errstate(over="ignore", invalid="ignore"):
            return self.layer.forward(params, batch)


@dataclass(frozen=True)
class LinearRegression:
    """``s = x w + b`` under the squared loss, ``(s - y)^2 / 2``.

    l2: factor of ``||w||^2 / 2`` on the mean loss, never on the bias
    init_scale: standard deviation of the first predictions

    >>> bound = LinearRegression().bind(Inputs(numeric=2, categories=(3,)), Target())
    >>> [(array.name, array.shape) for array in bound.layout.arrays]
    [('weights', (2, 1)), ('codes', (3, 1)), ('bias', (1,))]
    """

    l2: float = 0.0
    init_scale: float = 0.01

    @property
    def target_kind(self) -> TargetKind:
        return "number"

    def problems(self) -> list[str]:
        return _linear_problems(self.l2, self.init_scale)

    def bind(self, inputs: Inputs, target: Target) -> ValueAndGrad:
        return _bind(self, self.init_scale, Squared(), inputs, target)


@dataclass(frozen=True)
class LogisticRegression:
    """``P(class 1) = 1 / (1 + exp(-(x w + b)))`` under the logistic loss, for exactly two classes.

    l2: factor of ``||w||^2 / 2`` on the mean loss, never on the bias (``1 / (l2 n_rows)`` is scikit-learn's C)
    init_scale: standard deviation of the first scores

    >>> import numpy as np
    >>> bound = LogisticRegression().bind(Inputs(numeric=1), Target(classes=2))
    >>> batch = Batch(np.array([[2.0]], np.float32), np.empty((1, 0), np.int32), np.array([1.0], np.float32))
    >>> out = np.empty(2, np.float32)
    >>> value = bound.value_and_grad(np.zeros(2, np.float32), batch, out)
    >>> round(value, 6), out
    (0.693147, array([-1. , -0.5], dtype=float32))
    """

    l2: float = 0.0
    init_scale: float = 0.01

    @property
    def target_kind(self) -> TargetKind:
        return "class"

    def problems(self) -> list[str]:
        return _linear_problems(self.l2, self.init_scale)

    def bind(self, inputs: Inputs, target: Target) -> ValueAndGrad:
        return _bind(self, self.init_scale, Logistic(), inputs, target)


@dataclass(frozen=True)
class SoftmaxRegression:
    """``P(class j) = exp(s_j) / sum_i exp(s_i)``, ``s = x W + b``, under the cross-entropy, for two or more classes.

    l2: factor of ``||W||^2 / 2`` on the mean loss, never on the bias
    init_scale: standard deviation of the first scores

    >>> SoftmaxRegression().bind(Inputs(numeric=64), Target(classes=10)).layout.n_params
    650
    """

    l2: float = 0.0
    init_scale: float = 0.01

    @property
    def target_kind(self) -> TargetKind:
        return "class"

    def problems(self) -> list[str]:
        return _linear_problems(self.l2, self.init_scale)

    def bind(self, inputs: Inputs, target: Target) -> ValueAndGrad:
        return _bind(self, self.init_scale, CrossEntropy(), inputs, target)


def _linear_problems(l2: float, init_scale: float) -> list[str]:
    return float32_problems("l2", l2, at_least=0) + float32_problems("init_scale", init_scale, at_least=0)


def _bind(model: Model, init_scale: float, loss: Loss, inputs: Inputs, target: Target) -> BoundLinear:
    refuse_unfit(model, loss, target)
    return BoundLinear(inputs, loss, InputLayer(inputs, loss.outputs(target)), init_scale)
