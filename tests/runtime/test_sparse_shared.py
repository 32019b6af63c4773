"""Shared memory for sparse models, with the real state machines in threads; no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import pytest

from raysgd.learn.batch import Batch, Inputs, Target
from raysgd.learn.models.hashed import BoundHashed, FactorizationMachine, HashedLogisticRegression
from raysgd.learn.parameters import Range, even_split
from raysgd.learn.transforms import AdaGrad
from raysgd.protocol.generation import Generation, join
from raysgd.protocol.kept import Kept
from raysgd.protocol.membership import Assignment, Membership, deal
from raysgd.protocol.messages import Halted, PushReply, Verdict
from raysgd.protocol.sparse import Sparse, SparsePartial, SparsePull, SparsePulled, SparsePush, SparseReply
from raysgd.protocol.sparse_client import SparseClient
from raysgd.protocol.sparse_shard import make_sparse_shard
from raysgd.protocol.tree import cover
from raysgd.protocol.update import PlannedRows, Rule
from raysgd.runtime.board import WRITING, Board
from raysgd.runtime.report import LoopReport
from raysgd.runtime.segment import site
from raysgd.runtime.sparse_loop import scores_at, sparse_loop
from raysgd.runtime.sparse_shared import SparseSharedMemory, SparseSharedServer
from raysgd.simulate import Problem
from raysgd.simulate_sparse import simulate_sparse

pytestmark = pytest.mark.skipif(site() is None, reason="memory is shared on x86-64 Linux only")

V = 8
STEPS = 30
BITS = 12
INPUTS = Inputs(3, (2**BITS,) * 4, BITS)
LOGISTIC = HashedLogisticRegression(BITS).bind(INPUTS, Target(2))
MACHINE = FactorizationMachine(BITS, factors=2).bind(INPUTS, Target(2))


def batch(step: int, v: int) -> Batch:
    random = np.random.default_rng([step, v])
    numeric = random.standard_normal((5, 3)).astype(np.float32)
    codes = np.minimum(random.zipf(1.4, (5, 4)), 2**BITS - 1).astype(np.int32)
    return Batch(numeric, codes, (numeric[:, 0] > 0).astype(np.float32))


def problem(learner: BoundHashed = LOGISTIC) -> Problem:
    return Problem(learner, Rule(AdaGrad(), lambda _: 0.1, PlannedRows(5 * V, 5 * V * STEPS, STEPS)), batch, V)


@contextmanager
def serving(learner: BoundHashed, spans: tuple[Range, ...]) -> Iterator[list[SparseSharedServer]]:
    """A server for each span, on its own thread."""
    servers = []
    with ExitStack() as stack:
        for i, span in enumerate(spans):
            board = Board.create(len(span), Kept(1))
            stack.callback(board.segment.close)
            rule = problem(learner).rule
            announce = partial(Board.announce, board)
            shard = make_sparse_shard(
                i,
                rule,
                span,
                learner,
                n_virtual=V,
                seed=0,
                generation=None,
                buffers=board.params,
                on_write=announce,
            )
            servers.append(SparseSharedServer(shard, board, threading.Lock(), lambda: None))
            stack.callback(servers[-1].close)
        yield servers


def connect(
    servers: list[SparseSharedServer], spans: tuple[Range, ...], assignment: Assignment, timeout_s: float = 30.0
) -> SparseSharedMemory:
    nodes = cover(assignment.run, V)
    incarnations = tuple(assignment.incarnations_of(node) for node in nodes)

    def call(shard: int, pull: SparsePull) -> SparseReply:
        with servers[shard].lock:
            return servers[shard].shard.pull(pull)

    capacity = spans[-1].end
    boards = [s.address for s in servers]
    memory = SparseSharedMemory(boards, nodes, incarnations, spans, capacity, call, timeout_s=timeout_s)
    for server, span in zip(servers, spans, strict=True):
        server.shard.fence(assignment.run, assignment.incarnations[0])
        server.attach(memory.address, span)
    return memory


def train(learner: BoundHashed, n_workers: int, n_servers: int) -> tuple[Generation, list[LoopReport]]:
    spans = even_split(learner.layout.n_params, n_servers)
    membership = Membership(V)
    with serving(learner, spans) as servers:
        reports: list[LoopReport] = []

        def work(assignment: Assignment) -> None:
            memory = connect(servers, spans, assignment)
            client = SparseClient(assignment, V, spans, start=0, until=STEPS)
            reports.append(sparse_loop(client, memory, learner, batch))
            memory.close()

        runs = [membership.assign(i, run) for i, run in enumerate(deal(V, n_workers))]
        threads = [threading.Thread(target=work, args=(assignment,)) for assignment in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [r.done.reason for r in reports] == ["reached"] * n_workers
        return join([s.shard.snapshot(STEPS) for s in servers]), reports


@pytest.mark.parametrize("learner", [LOGISTIC, MACHINE], ids=["logistic", "machine"])
@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (2, 2), (3, 1), (5, 3)])
def test_the_bytes_of_the_simulation(learner: BoundHashed, workers: int, servers: int) -> None:
    found, reports = train(learner, workers, servers)
    assert found.digest() == simulate_sparse(problem(learner), STEPS).final.digest()
    assert sum(r.rows for r in reports) == STEPS * V * 5


def test_bytes_moved_follow_what_is_touched() -> None:
    _, reports = train(LOGISTIC, 1, 2)
    touched = 0
    for step in range(STEPS):
        codes = np.concatenate([batch(step, v).codes.ravel() for v in range(V)])
        touched += len(np.unique(codes)) + LOGISTIC.tail
    assert reports[0].moved == 16 * touched  # ids and values, pulled and pushed


def push(node: Range, step: int, incarnation: int, ids: list[int]) -> SparsePush:
    vector = Sparse(np.array(ids, np.int32), np.ones(len(ids), np.float32))
    return SparsePush(0, step, node, (incarnation,) * len(node), SparsePartial(vector, 1.0, 1))


def test_a_version_that_is_written_over_is_asked_for() -> None:
    """A successor reads version t while the shard is at t + 1, and while it is just being written."""
    spans = (Range(0, LOGISTIC.layout.n_params),)
    with serving(LOGISTIC, spans) as servers:
        assignment = Membership(V).assign(0, Range(0, V))
        memory = connect(servers, spans, assignment)
        ids = np.array([5, 9], np.int32)
        memory.exchange([push(Range(0, V), 0, 1, [5])], wait=False)
        reply = memory.exchange([SparsePull(0, 1, ids)])
        assert reply is not None
        (new,) = reply
        assert isinstance(new, SparsePulled)
        assert new.values[0] != 0
        (old,) = memory.exchange([SparsePull(0, 0, ids)]) or []
        assert isinstance(old, SparsePulled)
        assert old.values.tolist() == [0, 0]
        servers[0].board.words[WRITING] = 2  # as if the next scatter had begun
        (again,) = memory.exchange([SparsePull(0, 1, ids)]) or []
        assert isinstance(again, SparsePulled)
        assert again.values.tolist() == new.values.tolist()
        memory.close()


def test_the_dead_are_told() -> None:
    spans = (Range(0, LOGISTIC.layout.n_params),)
    with serving(LOGISTIC, spans) as servers:
        membership = Membership(V)
        memory = connect(servers, spans, membership.assign(0, Range(0, V)), timeout_s=5.0)
        with servers[0].lock:
            servers[0].shard.fence(Range(0, V), 7)
        found = memory.exchange([push(Range(0, V), 0, 1, [5]), SparsePull(0, 1, np.array([5], np.int32))])
        assert found == [PushReply(0, 0, Range(0, V), Verdict.FENCED)]
        memory.close()


def test_a_frozen_shard_answers() -> None:
    spans = (Range(0, LOGISTIC.layout.n_params),)
    with serving(LOGISTIC, spans) as servers:
        memory = connect(servers, spans, Membership(V).assign(0, Range(0, V)), timeout_s=5.0)
        with servers[0].lock:
            servers[0].shard.freeze()
            servers[0].publish()
        began = time.monotonic()
        assert memory.exchange([SparsePull(0, 1, np.array([5], np.int32))]) == [Halted(0, 1, None)]
        assert time.monotonic() - began < 5
        memory.close()


def test_scores_at_a_version_are_those_of_the_whole_vector() -> None:
    spans = even_split(MACHINE.layout.n_params, 2)
    with serving(MACHINE, spans) as servers:
        memory = connect(servers, spans, Membership(V).assign(0, Range(0, V)))
        rows = batch(3, 1)
        found = scores_at(0, rows, MACHINE, memory, spans)
        assert found.tobytes() == MACHINE.scores(MACHINE.initial(0), rows).tobytes()
        nothing = scores_at(0, rows.slice(0, 0), MACHINE, memory, spans)
        assert nothing.shape == (0, 1)
        memory.close()


class Late:
    """A way that brings answers to earlier requests first."""

    def __init__(self, way: SparseSharedMemory) -> None:
        self.way = way

    def exchange(self, requests: list[SparsePull], wait: bool = True) -> list[SparseReply] | None:
        values = np.full(len(requests[0].ids), np.nan, np.float32) if requests else np.empty(0, np.float32)
        late = [PushReply(0, 0, Range(0, V), Verdict.ACCEPTED), SparsePulled(0, 0, values, token=0)]
        return [*late, *(self.way.exchange(requests, wait) or [])]


def test_late_answers_are_told_apart() -> None:
    spans = (Range(0, MACHINE.layout.n_params),)
    with serving(MACHINE, spans) as servers:
        memory = connect(servers, spans, Membership(V).assign(0, Range(0, V)))
        rows = batch(3, 1)
        expected = MACHINE.scores(MACHINE.initial(0), rows)
        assert scores_at(0, rows, MACHINE, Late(memory), spans).tobytes() == expected.tobytes()
        memory.close()
