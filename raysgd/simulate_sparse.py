"""Sparse shards and clients under the same hostile network: :mod:`raysgd.simulate` for hashed models."""

from __future__ import annotations

from typing import Any

import numpy as np

from raysgd.learn.models.hashed import BoundHashed
from raysgd.protocol.gate import Commit
from raysgd.protocol.generation import Generation
from raysgd.protocol.membership import Share
from raysgd.protocol.sparse import Sparse, SparsePartial
from raysgd.protocol.sparse_client import SparseClient, SparseCompute, Touch
from raysgd.protocol.sparse_compute import Touched, sparse_sums, touch
from raysgd.protocol.sparse_shard import Record, SparseShard, Store, make_sparse_shard
from raysgd.simulate import Faults, Outcome, Problem, Simulation
from raysgd.simulate.simulation import Seat


def simulate_sparse(
    problem: Problem,
    until: int,
    *,
    n_workers: int = 1,
    n_servers: int = 1,
    faults: Faults | None = None,
    start: Generation | None = None,
    most: int | None = None,
) -> Outcome:
    """As :func:`~raysgd.simulate.simulate`, for a problem whose learner is a :class:`BoundHashed`."""
    faults = faults or Faults(retry=0.0, in_order=True)
    return SparseSimulation(
        problem, until, n_workers=n_workers, n_servers=n_servers, faults=faults, start=start, most=most
    ).run()


class SparseSimulation(Simulation):
    LOCAL = (Touch, SparseCompute)

    @property
    def learner(self) -> BoundHashed:
        assert isinstance(self.problem.learner, BoundHashed)
        return self.problem.learner

    def successor(self, index: int) -> Any:
        """Its store is where it died, also in the middle of a write."""
        dead = self.shards[index].store
        arrays = {name: array.copy() for name, array in dead.arrays.items()}
        store = Store(dead.version, arrays, dead.record)
        store.recover()
        return SparseShard(
            index,
            self.problem.rule,
            self.spans[index],
            store,
            n_virtual=self.problem.n_virtual,
            unpenalized=self.learner.layout.unpenalized(),
            commits=self.untold(index, dead.record),
        )

    def untold(self, index: int, record: Record | None) -> list[Commit]:
        """What a shard committed and did not tell the driver: its record's step, too, in whose write it may have
        died."""
        known = self.shards[index].commits
        found = [*known, *([record.commit] if record is not None and record.commit not in known else [])]
        return [commit for commit in found if commit.step >= self.told[index]]

    def make_shard(self, index: int, generation: Generation, **more: Any) -> Any:
        problem, span = self.problem, self.spans[index]
        return make_sparse_shard(
            index,
            problem.rule,
            span,
            self.learner,
            n_virtual=problem.n_virtual,
            seed=problem.seed,
            generation=generation,
            **more,
        )

    def make_client(self, share: Share) -> SparseClient:
        return SparseClient(share.assignment, self.problem.n_virtual, self.spans, start=share.start, until=self.goal)

    def compute(self, seat: Seat, content: Touch | SparseCompute) -> list[Any]:
        touched: Touched = touch(self.learner, content.step, content.nodes, self.problem.batch)
        if isinstance(content, Touch):
            return list(seat.client.touched(content.step, touched.ids))
        sums = sparse_sums(self.learner, touched, content.values, content.nodes)
        if seat.zombie:
            sums = [_garbage(s) for s in sums]
        return list(seat.client.computed(content.step, sums))


def _garbage(partial: SparsePartial) -> SparsePartial:
    """What a process pushes whose memory is no longer its own."""
    vector = partial.vector
    if vector is not None:
        vector = Sparse(vector.ids, vector.values + np.float32(1.0))
    return SparsePartial(vector, partial.loss + 1.0, partial.rows)
