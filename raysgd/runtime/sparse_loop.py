"""A worker's loop for sparse models, and scores at values that are pulled slice by slice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np

from raysgd import failpoints
from raysgd.errors import RunError
from raysgd.learn.batch import Batch, Float32
from raysgd.learn.models.hashed import BoundHashed
from raysgd.learn.parameters import Range
from raysgd.protocol.client import Done
from raysgd.protocol.messages import Gone, Halted, NotYet
from raysgd.protocol.sparse import SparsePull, SparsePulled, SparseRequest
from raysgd.protocol.sparse_client import SparseClient, SparseCompute, SparseInstruction, Touch
from raysgd.protocol.sparse_compute import Touched, sparse_sums, touch
from raysgd.runtime.rates import Meter
from raysgd.runtime.report import LoopReport

#: one for each slice of rows that is scored, so that late answers to an earlier one are told apart
_TOKENS = count(1)


def sparse_loop(
    client: SparseClient,
    transport: Any,
    learner: BoundHashed,
    batch: Callable[[int, int], Batch | None],
    meter: Meter | None = None,
) -> LoopReport:
    """Carry out the client's instructions until it is done.

    Pushes go out before the next step's coordinates are looked for, so that the servers work meanwhile.
    """
    rows, moved, compute_s, wait_s = 0, 0, 0.0, 0.0
    #: compute and wait when the step before ended
    before = 0.0, 0.0
    touched: Touched | None = None
    requests, local = _sorted(client.begin())
    while client.done is None:
        if transport.stopped():
            return LoopReport(Done("stopped", client.step), rows, compute_s, wait_s, moved)
        began = time.perf_counter()
        if requests or local is None:
            replies = transport.exchange(requests, wait=local is None)
            pending = client.retry() if replies is None else [i for reply in replies for i in client.handle(reply)]
            requests, found = _sorted(pending)
            local = local or found
            wait_s += time.perf_counter() - began
        if local is None or requests or client.done is not None:
            continue
        began, ends = time.perf_counter(), not isinstance(local, Touch)
        if isinstance(local, Touch):
            if failpoints.armed:
                failpoints.reach("worker.compute", local.step)
            touched = touch(learner, local.step, local.nodes, batch)
            requests, local = _sorted(client.touched(local.step, touched.ids))
        else:
            assert touched is not None
            assert touched.step == local.step, (touched.step, local.step)
            sums = sparse_sums(learner, touched, local.values, local.nodes, transport.outputs(local.step))
            rows += sum(s.rows for s in sums)
            moved += touched.ids.nbytes + local.values.nbytes + sum(s.vector.nbytes for s in sums if s.vector)
            requests, local = _sorted(client.computed(local.step, sums))
        compute_s += time.perf_counter() - began
        if ends and meter is not None:
            meter.step(compute_s - before[0], compute_s + wait_s - sum(before))
            before = compute_s, wait_s
    return LoopReport(client.done, rows, compute_s, wait_s, moved)


def _sorted(instructions: Sequence[SparseInstruction]) -> tuple[list[SparseRequest], Touch | SparseCompute | None]:
    """What is to be sent, and what is to be done here."""
    local = next((i for i in instructions if isinstance(i, Touch | SparseCompute)), None)
    return [i for i in instructions if not isinstance(i, Touch | SparseCompute | Done)], local


def scores_at(version: int, batch: Batch, learner: BoundHashed, transport: Any, spans: Sequence[Range]) -> Float32:
    """(n_rows, k) the scores of rows at a version that the servers hold; only what the rows touch is pulled."""
    touched = touch(learner, 0, (Range(0, 1),), lambda _step, _v: batch)
    if not touched.nodes[0].leaves:
        return np.empty((0, 1), np.float32)
    cuts = np.searchsorted(touched.ids, [span.begin for span in spans] + [spans[-1].end])
    values = np.empty(len(touched.ids), np.float32)
    token = next(_TOKENS)
    missing = {s: SparsePull(s, version, touched.ids[cuts[s] : cuts[s + 1]], token) for s in range(len(spans))}
    requests: list[SparsePull] = list(missing.values())
    while missing:
        replies = transport.exchange(requests, wait=True)
        requests = list(missing.values()) if replies is None else []
        for reply in replies or []:
            if isinstance(reply, Gone | Halted | NotYet) and reply.version == version:
                raise RunError(f"server {reply.shard} does not hold version {version}: {reply}")
            if isinstance(reply, SparsePulled) and reply.token == token:
                missing.pop(reply.shard, None)
                values[cuts[reply.shard] : cuts[reply.shard + 1]] = reply.values
    return learner.scores(values, touched.nodes[0].leaves[0])
