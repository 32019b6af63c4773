"""Losses per row, their gradients, and the L2 penalty.

A loss sees scores (n_rows, k) float32 and labels (n_rows,) float32 (a number, or the class index). It is finite
and free of warnings for every finite score; infinite scores mean that training has diverged, and may give NaN.
Training sums in float32 arrays with a float64 total; reported losses are float64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from raysgd.learn.batch import Float32, Float64, Target
from raysgd.learn.parameters import Range

TargetKind: TypeAlias = Literal["class", "number"]

_ZERO, _ONE = np.float32(0), np.float32(1)


_Scores = TypeVar("_Scores", Float32, Float64)


def _shifted(scores: _Scores) -> _Scores:
    """(n_rows, k) less the largest of each row: the largest is 0, so its exp is 1 and no sum is 0."""
    # Of a few columns, numpy finds the largest ten times faster along the first axis of a transposed copy.
    few = scores.shape[1] <= 32
    largest: _Scores = np.maximum.reduce(scores.T.copy(), axis=0) if few else np.maximum.reduce(scores, axis=1)
    with np.errstate(over="ignore"):  # the difference of two finite float32 may be -inf, whose exp is right: 0
        shifted: _Scores = scores - largest[:, None]
    return shifted


@runtime_checkable
class Loss(Protocol):
    """How wrong scores are."""

    @property
    def name(self) -> str: ...

    @property
    def target_kind(self) -> TargetKind: ...

    def target_problems(self, target: Target) -> list[str]:
        """Why this loss cannot train on ``target``; empty where it can."""
        ...

    def outputs(self, target: Target) -> int:
        """k, how many scores a row needs."""
        ...

    def value(self, scores: Float32, label: Float32) -> Float64:
        """(n_rows,) float64: the loss of each row."""
        ...

    def value_and_gradient(
        self, scores: Float32, label: Float32, weight: Float32 | None = None
    ) -> tuple[float, Float32]:
        """The weighted sum of the rows' losses, and its gradient by the scores, (n_rows, k) float32, fresh."""
        ...

    def probabilities(self, scores: Float32) -> Float64 | None:
        """(n_rows, classes) float64, or None where the target is a number."""
        ...

    def predictions(self, scores: Float32) -> npt.NDArray[np.float32] | npt.NDArray[np.intp]:
        """(n_rows,): the number as float32, or the class index as intp."""
        ...


@runtime_checkable
class RowByRow(Loss, Protocol):
    """A loss whose arithmetic on a row follows that row alone: rows of several batches can go through it together, to
    the bytes that each batch by itself would give. (That of a matrix product depends on how many rows there are.)"""

    def row_by_row(self, scores: Float32, label: Float32, weight: Float32 | None = None) -> tuple[Any, Float32]:
        """(n_rows,) what :meth:`total` adds up; and the gradient by the scores, (n_rows, k) float32, fresh."""
        ...

    def total(self, losses: Any) -> float:
        """The sum of the losses of some consecutive rows."""
        ...


@dataclass(frozen=True)
class Squared:
    """``(score - y)^2 / 2`` for a number y.

    >>> Squared().value_and_gradient(np.array([[3.0]], np.float32), np.array([1.0], np.float32))
    (2.0, array([[2.]], dtype=float32))
    """

    @property
    def name(self) -> str:
        return "squared"

    @property
    def target_kind(self) -> TargetKind:
        return "number"

    def target_problems(self, target: Target) -> list[str]:
        if target.classes == 0:
            return []
        return [
            f"label must be a number for the squared loss, got {target.classes} classes: use logistic or cross_entropy"
        ]

    def outputs(self, target: Target) -> int:  # noqa: ARG002 - the protocol's signature
        return 1

    def value(self, scores: Float32, label: Float32) -> Float64:
        difference = scores[:, 0].astype(np.float64) - label
        return 0.5 * difference * difference

    def value_and_gradient(
        self, scores: Float32, label: Float32, weight: Float32 | None = None
    ) -> tuple[float, Float32]:
        squares, gradient = self.row_by_row(scores, label, weight)
        return self.total(squares), gradient

    def row_by_row(self, scores: Float32, label: Float32, weight: Float32 | None = None) -> tuple[Float64, Float32]:
        gradient = scores - label[:, None]
        squares = gradient[:, 0].astype(np.float64)
        np.multiply(squares, squares, out=squares)
        if weight is not None:
            np.multiply(squares, weight, out=squares)
            np.multiply(gradient, weight[:, None], out=gradient)
        return squares, gradient

    def total(self, losses: Float64) -> float:
        return 0.5 * float(np.add.reduce(losses))

    def probabilities(self, scores: Float32) -> Float64 | None:  # noqa: ARG002 - the protocol's signature
        return None

    def predictions(self, scores: Float32) -> npt.NDArray[np.float32]:
        return scores[:, 0]


@dataclass(frozen=True)
class Logistic:
    """``log(1 + exp(-s))`` for class 1, ``log(1 + exp(s))`` for class 0: s is the log odds of class 1.

    With ``m = s`` for class 0 and ``-s`` for class 1: ``max(m, 0) + log1p(exp(-|m|))``, which neither overflows
    nor cancels.

    >>> value, gradient = Logistic().value_and_gradient(np.array([[0.0]], np.float32), np.array([1.0], np.float32))
    >>> round(value, 6), gradient
    (0.693147, array([[-0.5]], dtype=float32))
    """

    @property
    def name(self) -> str:
        return "logistic"

    @property
    def target_kind(self) -> TargetKind:
        return "class"

    def target_problems(self, target: Target) -> list[str]:
        if target.classes == 2:
            return []
        if target.classes == 0:
            return ["label must have 2 classes for the logistic loss, got a number: use squared"]
        remedy = 'use cross_entropy (softmax_regression, or loss = "cross_entropy" of an mlp)'
        return [f"label must have 2 classes for the logistic loss, got {target.classes}: {remedy}"]

    def outputs(self, target: Target) -> int:  # noqa: ARG002 - the protocol's signature
        return 1

    def value(self, scores: Float32, label: Float32) -> Float64:
        margin = scores[:, 0].astype(np.float64) * (1.0 - 2.0 * label)
        return np.asarray(np.maximum(margin, 0.0) + np.log1p(np.exp(-np.abs(margin))))

    def value_and_gradient(
        self, scores: Float32, label: Float32, weight: Float32 | None = None
    ) -> tuple[float, Float32]:
        losses, gradient = self.row_by_row(scores, label, weight)
        return self.total(losses), gradient

    def row_by_row(self, scores: Float32, label: Float32, weight: Float32 | None = None) -> tuple[Float32, Float32]:
        # One expression a line, into few arrays: at 128 rows the calls cost more than the arithmetic.
        sign = _ONE - label
        sign -= label  # 1 for class 0, -1 for class 1
        margin = sign * scores[:, 0]
        tail = np.abs(margin)
        np.negative(tail, out=tail)
        np.exp(tail, out=tail)  # exp(-|m|) in [0, 1]
        positive = np.maximum(margin, _ZERO)
        losses = np.log1p(tail)
        losses += positive
        # sigmoid(m) = exp(min(m, 0)) / (1 + exp(-|m|))
        np.minimum(margin, _ZERO, out=margin)
        np.exp(margin, out=margin)
        tail += _ONE
        margin /= tail
        margin *= sign
        if weight is not None:
            losses *= weight
            margin *= weight
        return losses, margin[:, None]

    def total(self, losses: Float32) -> float:
        return float(np.add.reduce(losses, dtype=np.float64))

    def probabilities(self, scores: Float32) -> Float64 | None:
        score = scores[:, 0].astype(np.float64)
        tail = np.exp(-np.abs(score))
        likely, unlikely = 1.0 / (1.0 + tail), tail / (1.0 + tail)
        positive = score >= 0
        return np.stack([np.where(positive, unlikely, likely), np.where(positive, likely, unlikely)], axis=1)

    def predictions(self, scores: Float32) -> npt.NDArray[np.intp]:
        return (scores[:, 0] > 0).astype(np.intp)


@dataclass(frozen=True)
class CrossEntropy:
    """``log(sum_j exp(s_j)) - s_y`` for class y, with the largest score of each row taken off first.

    >>> value, gradient = CrossEntropy().value_and_gradient(np.zeros((1, 2), np.float32), np.array([1.0], np.float32))
    >>> round(value, 6), gradient
    (0.693147, array([[ 0.5, -0.5]], dtype=float32))
    """

    @property
    def name(self) -> str:
        return "cross_entropy"

    @property
    def target_kind(self) -> TargetKind:
        return "class"

    def target_problems(self, target: Target) -> list[str]:
        if target.classes >= 2:
            return []
        return ["label must have 2 or more classes for the cross-entropy loss, got a number: use squared"]

    def outputs(self, target: Target) -> int:
        return target.classes

    def value(self, scores: Float32, label: Float32) -> Float64:
        shifted = _shifted(scores.astype(np.float64))
        own = shifted[np.arange(len(label)), label.astype(np.intp)]
        return np.asarray(np.log(np.add.reduce(np.exp(shifted), axis=1)) - own)

    def value_and_gradient(
        self, scores: Float32, label: Float32, weight: Float32 | None = None
    ) -> tuple[float, Float32]:
        shifted = _shifted(scores)
        rows, own = np.arange(len(label)), label.astype(np.intp)
        own_score = shifted[rows, own].astype(np.float64)
        gradient = np.exp(shifted, out=shifted)
        total = np.matmul(gradient, np.ones(gradient.shape[1], np.float32))
        loss = np.log(total, dtype=np.float64) - own_score
        gradient /= total[:, None]
        gradient[rows, own] -= _ONE
        if weight is not None:
            loss *= weight
            gradient *= weight[:, None]
        return float(np.add.reduce(loss)), gradient

    def probabilities(self, scores: Float32) -> Float64 | None:
        likelihood = np.exp(_shifted(scores.astype(np.float64)))
        return np.asarray(likelihood / np.add.reduce(likelihood, axis=1)[:, None])

    def predictions(self, scores: Float32) -> npt.NDArray[np.intp]:
        return np.asarray(np.argmax(scores, axis=1))


#: Coordinates per pass of :func:`add_l2`.
_BLOCK = 16_384


def runs(mask: npt.NDArray[np.bool_]) -> tuple[Range, ...]:
    """The maximal ranges in which ``mask`` (n,) is true.

    >>> runs(np.array([True, True, False, True]))
    (Range(begin=0, end=2), Range(begin=3, end=4))
    """
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return tuple(Range(int(a), int(b)) for a, b in edges.reshape(-1, 2))


def add_l2(gradient: Float32, params: Float32, l2: float, penalized: npt.NDArray[np.bool_] | Sequence[Range]) -> None:
    """``gradient += l2 * params`` in place, where penalized: the gradient of ``l2 / 2 * ||w||^2``.

    gradient, params: (n,) float32; ``gradient`` is the mean gradient, so once a step and not once a push
    penalized: a mask (n,) of :meth:`Layout.penalized`, or its ranges (:func:`runs`), which are faster

    >>> gradient = np.zeros(2, np.float32)
    >>> add_l2(gradient, np.array([2.0, 2.0], np.float32), 0.5, [Range(0, 1)])
    >>> gradient
    array([1., 0.], dtype=float32)
    """
    if l2 == 0:
        return
    factor = np.float32(l2)
    for run in runs(penalized) if isinstance(penalized, np.ndarray) else penalized:
        for begin in range(run.begin, run.end, _BLOCK):
            part = slice(begin, min(begin + _BLOCK, run.end))
            gradient[part] += factor * params[part]


def l2_penalty(params: Float32, l2: float, penalized: npt.NDArray[np.bool_]) -> float:
    """``l2 / 2 * ||w||^2`` over the penalized coordinates of ``params`` (n,), in float64. Never in a reported loss.

    >>> l2_penalty(np.array([2.0, 5.0], np.float32), 0.5, np.array([True, False]))
    1.0
    """
    weights = params[penalized].astype(np.float64)
    return 0.5 * l2 * float(np.add.reduce(weights * weights))
