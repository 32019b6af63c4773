"""From a :class:`Compute` instruction to the sums that are pushed: one leaf per virtual worker, along the tree.

With one local step a leaf is a gradient. With H of them a virtual worker walks H steps of plain SGD by itself, from the
parameters that were pulled, and the leaf is the sum of the gradients that it met on its way: times the learning rate
that is how far it went, so the servers' average of leaves is the average of the ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from raysgd import failpoints
from raysgd.learn.batch import Batch, Float32
from raysgd.learn.losses import add_l2
from raysgd.learn.models.base import ValueAndGrad
from raysgd.learn.models.linear import BoundLinear
from raysgd.learn.parameters import Range
from raysgd.protocol.client import Compute
from raysgd.protocol.tree import EMPTY, Partial, depth, sum_leaves
from raysgd.protocol.update import Rule


def leaf(learner: ValueAndGrad, params: Float32, batch: Batch | None, out: Float32 | None = None) -> Partial:
    """One virtual worker's gradient and loss sums over its rows of a step, in ``out``; EMPTY where it has none."""
    if batch is None or len(batch) == 0:
        return EMPTY
    gradient = np.empty_like(params) if out is None else out
    loss = learner.value_and_grad(params, batch, gradient)
    return Partial(gradient, loss, len(batch))


def leaves(
    learner: ValueAndGrad, params: Float32, run: Sequence[int], batch: Callable[[int], Batch | None]
) -> Callable[[int, Float32], Partial]:
    """What computes the leaf of each virtual worker of ``run``, in memory that is given to it."""
    if len(run) == 1 or not isinstance(learner, BoundLinear) or learner.row_by_row is None:
        return lambda v, out: leaf(learner, params, batch(v), out)
    rows = {v: found for v in run if (found := batch(v)) is not None and len(found)}
    passed = dict(zip(rows, learner.forward(params, tuple(rows.values())) if rows else (), strict=True))

    def of(v: int, out: Float32) -> Partial:
        if v not in rows:
            return EMPTY
        loss, delta = passed[v]
        learner.backward(delta, rows[v], out)
        return Partial(out, loss, len(rows[v]))

    return of


@dataclass(frozen=True)
class LocalSteps:
    """How a virtual worker walks by itself: w <- w - rate (n_virtual gradient / planned + l2 w), at the round's rate.

    penalized: the ranges of the flat vector that L2 applies to
    """

    rule: Rule
    n_virtual: int
    penalized: tuple[Range, ...]

    def leaf(
        self,
        learner: ValueAndGrad,
        params: Float32,
        round_index: int,
        batch: Callable[[int], Batch | None],
        out: Float32 | None = None,
    ) -> Partial:
        """The sum over a round's steps of one virtual worker's gradients, each at where it then stood, in ``out``.

        A step whose planned rows are not the first one's counts by their ratio: the servers divide by the first's.
        """
        steps = self.rule.rounds.steps(round_index)
        if len(steps) == 1:
            return leaf(learner, params, batch(steps.start), out)
        rate, first = np.float32(self.rule.rate(steps.start)), self.rule.planned(steps.start)
        w, gradient, total = params.copy(), np.empty_like(params), np.empty_like(params) if out is None else out
        total.fill(0)
        loss, rows = 0.0, 0
        for step in steps:
            rows_of_step = batch(step)
            if rows_of_step is None or len(rows_of_step) == 0:
                gradient.fill(0)
            else:
                loss += learner.value_and_grad(w, rows_of_step, gradient)
                rows += len(rows_of_step)
            planned = self.rule.planned(step)
            if planned != first:
                np.multiply(gradient, np.float32(first / planned), out=gradient)
            np.add(total, gradient, out=total)
            if step + 1 < steps.stop:
                np.multiply(gradient, np.float32(self.n_virtual / first), out=gradient)
                add_l2(gradient, w, self.rule.l2, self.penalized)
                np.multiply(gradient, rate, out=gradient)
                np.subtract(w, gradient, out=w)
        return Partial(total, loss, rows) if rows else EMPTY

    def leaves(
        self, learner: ValueAndGrad, compute: Compute, run: Sequence[int], batch: Callable[[int, int], Batch | None]
    ) -> Callable[[int, Float32], Partial]:
        """As the function of that name, for a round."""
        # Read in the order of the steps, all virtual workers of one before the next: as the windows of data open.
        rows = {(s, v): batch(s, v) for s in self.rule.rounds.steps(compute.step) for v in run}
        return lambda v, out: self.leaf(learner, compute.params, compute.step, lambda step: rows[step, v], out)


def subtree_sums(
    learner: ValueAndGrad,
    compute: Compute,
    batch: Callable[[int, int], Batch | None],
    local: LocalSteps | None = None,
    outputs: Sequence[Float32] | None = None,
    scratch: list[Float32] | None = None,
) -> list[Partial]:
    """The sum of the leaves below each node of ``compute``; ``batch(step, v)`` gives virtual worker v's rows.

    local: where a round is several steps; ``compute.step`` is then the round
    outputs: (n_params,) for each node, where its sum is best written to; None: fresh memory
    scratch: (n_params,) vectors, kept from call to call; those that lack are added
    """

    spare = [] if scratch is None else scratch
    while len(spare) < max(depth(len(node)) for node in compute.nodes):
        spare.append(np.empty_like(compute.params))

    run = [v for node in compute.nodes for v in range(node.begin, node.end)]
    with np.errstate(over="ignore", invalid="ignore"):  # the shard refuses what is not finite
        if local is None:
            of = leaves(learner, compute.params, run, partial(batch, compute.step))
        else:
            of = local.leaves(learner, compute, run, batch)
        if failpoints.armed:
            of = partial(_reaching, of, compute.step)
        return [
            _sum_into(np.empty_like(compute.params) if outputs is None else outputs[k], node, of, spare)
            for k, node in enumerate(compute.nodes)
        ]


def _reaching(of: Callable[[int, Float32], Partial], step: int, v: int, out: Float32) -> Partial:
    failpoints.reach("worker.virtual", step)
    return of(v, out)


def _sum_into(out: Float32, node: Range, leaf: Callable[[int, Float32], Partial], spare: list[Float32]) -> Partial:
    """The sum below ``node`` with its gradient in ``out``."""
    total = sum_leaves(node, leaf, [out, *spare])
    if total.gradient is None or total.gradient is out:
        return total
    np.copyto(out, total.gradient)  # absent leaves left it elsewhere
    return Partial(out, total.loss, total.rows)
