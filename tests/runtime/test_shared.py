"""Shared memory and doorbells, with the real state machines in threads and processes; no Ray."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import inf

import numpy as np
import pytest

from raysgd.errors import RunError
from raysgd.learn.batch import Batch, Float32, Inputs, Target
from raysgd.learn.models import LogisticRegression
from raysgd.learn.parameters import Range, block_width, even_split
from raysgd.learn.transforms import SGD
from raysgd.protocol.client import Client
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.generation import Generation, join
from raysgd.protocol.kept import Kept
from raysgd.protocol.membership import Assignment, Membership, deal
from raysgd.protocol.messages import Gone, Halted, Norms, Pull, Pulled, Push, PushReply, Verdict
from raysgd.protocol.rounds import Rounds
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.stale import shard_class
from raysgd.protocol.tree import Partial, cover
from raysgd.protocol.update import PlannedRows, Rule
from raysgd.runtime import shared
from raysgd.runtime.board import Board, BoardAddress
from raysgd.runtime.segment import ASLEEP, Address, Doorbell, Ringer, Segment, site
from raysgd.runtime.shared import SharedMemory, SharedServer
from raysgd.runtime.worker import LoopReport, train_loop
from raysgd.simulate import Problem, simulate

pytestmark = pytest.mark.skipif(site() is None, reason="memory is shared on x86-64 Linux only")

V = 8
STEPS = 30


def rate(_step: int) -> float:
    return 0.1


def batch(step: int, v: int) -> Batch:
    random = np.random.default_rng([step, v])
    numeric = random.standard_normal((4, 40)).astype(np.float32)
    return Batch(numeric, np.zeros((4, 0), np.int32), (numeric[:, 0] > 0).astype(np.float32))


def problem() -> Problem:
    learner = LogisticRegression().bind(Inputs(40), Target(2))
    return Problem(learner, Rule(SGD(momentum=0.9), rate, PlannedRows(4 * V, 4 * V * STEPS, STEPS)), batch, V)


@contextmanager
def serving(p: Problem, spans: tuple[Range, ...], start: Generation) -> Iterator[list[SharedServer]]:
    """A server for each span, on its own thread."""
    servers = []
    with ExitStack() as stack:
        for i, span in enumerate(spans):
            kind = shard_class(p.consistency)
            board = Board.create(len(span), Kept(kind.BUFFERS))
            stack.callback(board.segment.close)
            shard = kind(
                i,
                p.rule,
                p.learner.layout.penalized(span),
                n_virtual=V,
                generation=start.cut(span),
                n_shards=len(spans),
                width=block_width(p.learner.layout.n_params),
                consistency=p.consistency,
                buffers=board.params,
                on_write=partial(Board.announce, board),
            )
            servers.append(SharedServer(shard, board, threading.Lock(), lambda: None))
            stack.callback(servers[-1].close)
        yield servers


def assignments(n_workers: int) -> list[Assignment]:
    membership = Membership(V)
    return [membership.assign(i, run) for i, run in enumerate(deal(V, n_workers))]


def connect(
    servers: list[SharedServer],
    spans: tuple[Range, ...],
    assignment: Assignment,
    timeout_s: float = 30.0,
    exact: bool = True,
) -> SharedMemory:
    nodes = cover(assignment.run, V)
    incarnations = tuple(assignment.incarnations_of(node) for node in nodes)
    memory = SharedMemory([s.address for s in servers], nodes, incarnations, spans, exact=exact, timeout_s=timeout_s)
    for server, span in zip(servers, spans, strict=True):
        server.shard.fence(assignment.run, assignment.incarnations[0])
        server.attach(memory.address, span)
    return memory


def train(n_workers: int, n_servers: int, until: int = STEPS, p: Problem | None = None) -> Generation:
    p = p or problem()
    spans = even_split(p.learner.layout.n_params, n_servers)
    with serving(p, spans, p.initial()) as servers:
        reports: list[LoopReport] = []

        def work(assignment: Assignment, memory: SharedMemory) -> None:
            client = Client(assignment, V, spans, start=0, until=until, consistency=p.consistency)
            reports.append(train_loop(client, memory, p.learner, p.batch, p.local))
            memory.close()

        pairs = [(a, connect(servers, spans, a, exact=p.consistency.exact)) for a in assignments(n_workers)]
        threads = [threading.Thread(target=work, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [r.done.reason for r in reports] == ["reached"] * n_workers
        return join([s.shard.snapshot(until) for s in servers])


@pytest.mark.parametrize(("n_workers", "n_servers"), [(1, 1), (2, 1), (3, 2), (8, 3)])
def test_the_bytes_are_those_of_the_simulator(n_workers: int, n_servers: int) -> None:
    assert train(n_workers, n_servers).digest() == simulate(problem(), STEPS).final.digest()


@pytest.mark.parametrize("staleness", [1, 3, inf])
@pytest.mark.parametrize(("n_workers", "n_servers"), [(1, 1), (2, 1), (3, 2), (8, 3)])
def test_with_staleness_all_that_is_pushed_counts(n_workers: int, n_servers: int, staleness: float) -> None:
    """No deadlock in many short runs, and the loss is that of BSP."""
    p = replace(problem(), consistency=Consistency(staleness))

    def loss(params: Float32) -> float:
        out = np.empty_like(params)
        return sum(p.learner.value_and_grad(params, batch(step, 0), out) for step in range(100)) / 400

    want = loss(simulate(problem(), STEPS).final.params)
    assert want < 0.2
    for _ in range(5):
        assert loss(train(n_workers, n_servers, p=p).params) == pytest.approx(want, abs=0.05)


@pytest.mark.parametrize("n_workers", [1, 3])
def test_local_steps_are_those_of_the_simulator(n_workers: int) -> None:
    p = problem()
    p = replace(p, rule=replace(p.rule, rounds=Rounds(4, STEPS)))
    assert train(n_workers, 2, until=9, p=p).digest() == simulate(p, 9).final.digest()


def test_a_part_of_a_norm_that_was_lost_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shard says by itself goes nowhere, as to a server that died meanwhile; only what is asked for arrives."""
    monkeypatch.setattr(shared, "ASK_AFTER", 2)
    p = problem()
    p = replace(p, rule=replace(p.rule, clip_norm=0.1))
    spans, said = even_split(p.learner.layout.n_params, 2), queue.SimpleQueue[Norms | None]()
    with serving(p, spans, p.initial()) as servers:

        def tell(shard: ServerShard) -> None:
            for norms in shard.outbox:
                if norms.asks:
                    said.put(norms)
            shard.outbox.clear()

        def carry() -> None:
            while (norms := said.get()) is not None:
                server = servers[norms.to]
                with server.lock:
                    server.shard.norms(norms)
                    for answer in server.shard.outbox:
                        said.put(answer)
                    server.shard.outbox.clear()
                    server.publish()

        for server in servers:
            server.on_advance = partial(tell, server.shard)
        carrier = threading.Thread(target=carry)
        carrier.start()
        [assignment] = assignments(1)
        memory = connect(servers, spans, assignment)
        client = Client(assignment, V, spans, start=0, until=3)
        assert train_loop(client, memory, p.learner, p.batch).done.reason == "reached"
        memory.close()
        said.put(None)
        carrier.join(30)
        assert join([s.shard.snapshot(3) for s in servers]).digest() == simulate(p, 3).final.digest()


def test_doorbells_are_only_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ringer, "ring", lambda _self, _name, _words: None)
    monkeypatch.setattr(shared, "RESCAN_S", 0.001)
    assert train(2, 2).digest() == simulate(problem(), STEPS).final.digest()


def test_rings_beyond_number_neither_block_nor_fail() -> None:
    segment = Segment.create(0)
    bell, ringer = Doorbell(segment.words), Ringer()
    segment.words[ASLEEP] = 1
    for _ in range(1000):
        ringer.ring(bell.name, segment.words)
    began = time.monotonic()
    assert not bell.wait(60.0, lambda: False)
    assert time.monotonic() - began < 50  # a ring ends the wait
    segment.words[ASLEEP] = 1
    bell.close()
    ringer.ring(bell.name, segment.words)
    ringer.close()
    segment.close()


def test_nothing_is_left() -> None:
    train(2, 2)
    descriptors, files = len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    for _ in range(3):
        train(2, 2)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert set(os.listdir("/dev/shm")) - files == set()


@contextmanager
def one_worker() -> Iterator[tuple[SharedServer, SharedMemory, Callable[[int, float, int], list[Push | Pull]]]]:
    """One server, one worker with all virtual workers; and what makes its requests for a step."""
    p = problem()
    n = p.learner.layout.n_params
    with serving(p, (Range(0, n),), p.initial()) as [server]:
        memory = connect([server], (Range(0, n),), assignments(1)[0], timeout_s=0.3)

        def requests(step: int, value: float, pull: int) -> list[Push | Pull]:
            partial_sum = Partial(np.full(n, value, np.float32), 1.0, 4 * V)
            return [Push(0, step, Range(0, V), (1,) * V, partial_sum, step), Pull(0, pull)]

        yield server, memory, requests
        memory.close()


def test_a_version_that_does_not_come_is_no_answer() -> None:
    with one_worker() as (_, memory, _requests):
        assert memory.exchange([Pull(0, 5)]) is None


def test_the_fenced_are_told() -> None:
    with one_worker() as (server, memory, requests):
        with server.lock:
            server.shard.fence(Range(0, V), 7)
        assert memory.exchange(requests(0, 1.0, 1)) == [PushReply(0, 0, Range(0, V), Verdict.FENCED)]
        assert server.shard.version == 0


def test_what_diverged_is_never_published() -> None:
    with one_worker() as (server, memory, requests):
        [first] = memory.exchange(requests(0, 1.0, 1)) or []
        assert isinstance(first, Pulled)
        good = first.params.tobytes()
        assert memory.exchange(requests(1, np.nan, 2)) == [Halted(0, 2, diverged=1)]
        [again] = memory.exchange([Pull(0, 1)]) or []
        assert isinstance(again, Pulled)
        assert again.params.tobytes() == good
        assert server.shard.snapshot(1).params.tobytes() == good


def test_the_frozen_are_told() -> None:
    with one_worker() as (server, memory, requests):
        with server.lock:
            server.shard.freeze()
            server.publish()
        assert memory.exchange(requests(0, 1.0, 1)) == [Halted(0, 1, diverged=None)]


def test_older_versions_are_gone() -> None:
    with one_worker() as (_, memory, requests):
        for step in range(3):
            memory.exchange(requests(step, 1.0, step + 1))
        assert isinstance((memory.exchange([Pull(0, 2)]) or [None])[0], Pulled)
        assert memory.exchange([Pull(0, 1)]) == [Gone(0, 1, oldest=2)]


def test_a_push_that_is_said_again_counts_once() -> None:
    with one_worker() as (server, memory, requests):
        memory.exchange(requests(0, 1.0, 1))
        before = server.shard.snapshot(1).digest()
        assert isinstance((memory.exchange(requests(0, 2.0, 1)) or [None])[0], Pulled)
        assert server.shard.version == 1
        assert server.shard.snapshot(1).digest() == before


#: publishes versions as fast as it goes until its standard input ends; every float of version t is t
WRITER = """
import os, select, sys
from raysgd.protocol.kept import Kept
from raysgd.runtime.board import NEWEST, SEQUENCE, Board
board, version = Board.create(100_000, Kept(3)), 0
address = board.segment.address
print(address.pid, address.fd, address.size, address.token.hex(), flush=True)
while not select.select([0], [], [], 0)[0]:
    version += 1
    board.announce(version)
    board.at(version).fill(version)
    board.words[SEQUENCE] = version
    board.words[NEWEST] = version
"""


def test_a_reader_never_sees_a_torn_version() -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        pid, fd, size, token = writer.stdout.readline().split()
        segment = Address(int(pid), int(fd), int(size), bytes.fromhex(token.decode()))
        board = Board.attach(BoardAddress(segment, b"", 100_000, Kept(3)))
        out = np.empty(100_000, np.float32)
        whole, refused = 0, 0
        while whole < 200 or refused < 20:
            version = board.copy(out)
            if version is not None:
                assert (out == out[0]).all()
                assert out[0] >= version
                whole += 1
            else:
                refused += 1
        writer.stdin.close()
        assert writer.wait(30) == 0


def test_nobody_waits_for_a_server_that_died_while_it_wrote() -> None:
    """It announced a write and did not come to tell of it: whoever copies is never sure, and ends when told to."""
    p = replace(problem(), consistency=Consistency(inf))
    span = Range(0, p.learner.layout.n_params)
    with serving(p, (span,), p.initial()) as [server]:
        memory = SharedMemory([server.address], (Range(0, V),), ((1,) * V,), (span,), exact=False)
        server.board.announce(server.shard.sequence + 3)
        asked = iter(range(50))
        memory.stopped = lambda: next(asked, None) is None
        assert memory.exchange([Pull(0, 0)], wait=True) == []
        memory.close()


def test_a_segment_that_is_gone_or_another_is_refused() -> None:
    segment = Segment.create(100)
    there = Segment.attach(segment.address)
    segment.words[3] = 42
    assert there.words[3] == 42
    other = Address(segment.address.pid, segment.address.fd, segment.address.size, b"\0" * 16)
    with pytest.raises(RunError, match="not the segment it was"):
        Segment.attach(other)
    segment.close()
    with pytest.raises(RunError, match=r"cannot be shared|not the segment it was"):
        Segment.attach(segment.address)
    assert there.words[3] == 42
