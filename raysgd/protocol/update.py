"""From the summed gradient to the next generation: block by block, while a block is in the cache.

    parts of a step ──fixed tree──▶ sum / planned rows + l2 w ──▶ transform ──▶ generation t + 1, beside t ──▶ finite?

Everything here is elementwise, so neither blocks nor shards change a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import frexp
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from raysgd.learn.batch import Float32, Float64
from raysgd.learn.losses import add_l2, runs
from raysgd.learn.transforms import Transform
from raysgd.protocol.generation import Generation
from raysgd.protocol.rounds import Rounds

#: coordinates a pass: the vectors that an update touches, this long, fit the L2 cache of a recent core
BLOCK = 65_536


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """What a step's gradient sum is divided by: its planned rows, times the mean sample weight.

    Every step has ``batch_size`` rows but the last of an epoch, which has what is left.

    >>> planned = PlannedRows(batch_size=4, n_rows=10, steps_per_epoch=3)
    >>> [planned(step) for step in range(4)]
    [4.0, 4.0, 2.0, 4.0]
    """

    batch_size: int
    n_rows: int
    steps_per_epoch: int
    mean_weight: float = 1.0

    def __call__(self, step: int) -> float:
        last = step % self.steps_per_epoch == self.steps_per_epoch - 1
        rows = self.n_rows - (self.steps_per_epoch - 1) * self.batch_size if last else self.batch_size
        return rows * self.mean_weight


@dataclass(frozen=True)
class Rule:
    """How a summed gradient becomes the next version: the same object on every shard of a run.

    g = sum / planned(step) + l2 * steps * w on penalized coordinates;  (w, state) <- transform(g, rate(step))

    step is the round's first, ``steps`` its number of steps: one, unless workers take several local steps.
    clip_norm: where the norm of g over all shards is greater, g is scaled to it
    """

    transform: Transform
    rate: Callable[[int], float]
    planned: PlannedRows
    l2: float = 0.0
    rounds: Rounds = field(default_factory=Rounds)
    clip_norm: float | None = None


#: one block of a generation: views of the parameters and of each array of state
Cell: TypeAlias = tuple[Float32, dict[str, Float32]]


class Update:
    """Applies a rule to one shard's coordinates.

    penalized: (len(shard),) bool;  width: coordinates a block of the gradient's norm, see ``block_width``
    """

    def __init__(self, rule: Rule, penalized: npt.NDArray[np.bool_], width: int = 1) -> None:
        self.rule = rule
        size = len(penalized)
        length = BLOCK if rule.clip_norm is None else max(BLOCK, width)
        self.width = width
        self.blocks = [slice(begin, min(begin + length, size)) for begin in range(0, size, length)]
        self._penalized = [runs(penalized[block]) for block in self.blocks]
        self._scratch = np.empty(min(length, size), np.float32)
        self._sums: list[Float32] = []
        self._length = min(length, size)

    def cells(self, generation: Generation) -> list[Cell]:
        """A generation cut into this update's blocks; views."""
        return [
            (generation.params[block], {slot: array[block] for slot, array in generation.state.items()})
            for block in self.blocks
        ]

    def write(
        self,
        index: int,
        rate: float,
        gradients: Sequence[Float32 | None],
        order: Sequence[tuple[int, int]],
        now: Sequence[Cell],
        target: Sequence[Cell],
        *,
        share: float = 1.0,
        factor: np.float32 | None = None,
    ) -> bool:
        """Write the next generation from parts of the round ``index``; False where it is not finite.

        rate: the learning rate;  gradients, order: the parts and how to add them, as ``additions`` gives it
        share: of the step that they are (1: the whole);  factor: that the norm's limit scales the gradient by
        """
        rule, transform = self.rule, self.rule.transform
        if share != 1:
            transform, scale = transform.part(share)
            rate *= scale
        planned, l2 = np.float32(rule.planned(rule.rounds.begin(index))), self._l2(index, share)
        rate32, finite = np.float32(rate), True
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for i in range(len(self.blocks)):
                params, state = now[i]
                g = self._gradient(i, gradients, order, planned, l2, params)
                if factor is not None:
                    np.multiply(g, factor, out=g)
                new_params, new_state = target[i]
                transform.update(g, rate32, params, state, new_params, new_state)
                finite = finite and _finite(new_params)
                if not transform.shows:
                    finite = finite and all(map(_finite, new_state.values()))
        return finite

    def square_sums(
        self, index: int, gradients: Sequence[Float32 | None], order: Sequence[tuple[int, int]], now: Sequence[Cell]
    ) -> Float64:
        """The sum of squares of g in each of the norm's blocks, float64: the same whatever the shards are."""
        rule, sums = self.rule, []
        planned, l2 = np.float32(rule.planned(rule.rounds.begin(index))), self._l2(index, 1.0)
        with np.errstate(over="ignore", invalid="ignore"):
            for i in range(len(self.blocks)):
                g = self._gradient(i, gradients, order, planned, l2, now[i][0]).astype(np.float64)
                np.multiply(g, g, out=g)
                whole = len(g) // self.width * self.width
                sums.append(np.add.reduce(g[:whole].reshape(-1, self.width), axis=1))
                if whole < len(g):
                    sums.append(np.add.reduce(g[whole:], keepdims=True))
        return np.concatenate(sums)

    def summed(self, gradients: Sequence[Float32 | None], order: Sequence[tuple[int, int]]) -> Float32 | None:
        """The parts' sum over the whole shard, in memory of its own; None where all are absent."""
        size = sum(block.stop - block.start for block in self.blocks)
        out: Float32 = np.empty(size, np.float32)
        for block in self.blocks:
            total = self._total(gradients, order, block, block.stop - block.start)
            if total is None:
                return None
            out[block] = total
        return out

    def _l2(self, index: int, share: float) -> float:
        return self.rule.l2 * share * len(self.rule.rounds.steps(index)) if self.rule.l2 else 0.0

    def _gradient(
        self,
        i: int,
        gradients: Sequence[Float32 | None],
        order: Sequence[tuple[int, int]],
        planned: np.float32,
        l2: float,
        params: Float32,
    ) -> Float32:
        """Block ``i`` of g, in memory that the next call writes over."""
        block, n = self.blocks[i], len(params)
        total = self._total(gradients, order, block, n)
        # A sum that was made here is divided where it is: the less memory a block takes, the more the cache holds.
        summed = total is not None and any(total.base is memory for memory in self._sums)
        g = total if total is not None and summed else self._scratch[:n]
        if total is None:
            g.fill(0.0)
        else:
            _divide(total, planned, g)
        if l2:
            add_l2(g, params, l2, self._penalized[i])
        return g

    def _total(
        self, gradients: Sequence[Float32 | None], order: Sequence[tuple[int, int]], block: slice, n: int
    ) -> Float32 | None:
        """The parts' sum over one block; a part that is absent is passed over, never added as zeros."""
        terms = [None if g is None else g[block] for g in gradients]
        for k, (i, j) in enumerate(order):
            left, right = terms[i], terms[j]
            if left is None or right is None:
                terms.append(right if left is None else left)
            else:
                while k >= len(self._sums):  # an addition before may have had nothing to add
                    self._sums.append(np.empty(self._length, np.float32))
                terms.append(np.add(left, right, out=self._sums[k][:n]))
        return terms[-1]


def norm_sums(size: int, width: int) -> int:
    """How many sums of squares :meth:`Update.square_sums` gives for a shard of ``size`` coordinates, at most."""
    return size // width + size // max(BLOCK, width) + 2


def clip_factor(square_sums: Sequence[Float64], clip_norm: float) -> np.float32 | None:
    """What scales the gradient so that its norm is at most ``clip_norm``; None where it is.

    square_sums: of all shards, in order; they are added block by block in float64. A norm that is not finite gives a
    factor that is not: the step is then refused.
    """
    total = 0.0
    for value in np.concatenate(square_sums).tolist():
        total += value
    norm = float(np.sqrt(total))
    return None if norm <= clip_norm else np.float32(clip_norm / norm if np.isfinite(norm) else np.nan)


def _divide(total: Float32, planned: np.float32, out: Float32) -> None:
    """``total / planned``; by a power of two as a product, which has the same bits and takes half the time."""
    if frexp(planned)[0] == 0.5:
        np.multiply(total, np.float32(1) / planned, out=out)
    else:
        np.divide(total, planned, out=out)


def _finite(values: Float32) -> bool:
    # A finite sum of squares has finite terms, at the speed of BLAS; only large numbers need the second look.
    square = float(values @ values)
    return square - square == 0.0 or bool(np.isfinite(values).all())
