"""The relay's thread between workers in threads and servers that answer from a pool of threads; no Ray cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import ray
from test_shared import STEPS, V, problem, serving

from raysgd.errors import RunError
from raysgd.learn.parameters import Range, even_split
from raysgd.protocol.client import Client
from raysgd.protocol.generation import join
from raysgd.protocol.membership import Assignment, Membership, deal
from raysgd.protocol.messages import Halted, NotYet, Pull, Pulled, Push, PushReply, Reply, Request, Verdict
from raysgd.protocol.tree import Partial, cover
from raysgd.runtime.relay import NodeRelay, Send, Traffic
from raysgd.runtime.segment import site
from raysgd.runtime.shared import SharedMemory, SharedServer
from raysgd.runtime.worker import LoopReport, train_loop
from raysgd.simulate import simulate

pytestmark = pytest.mark.skipif(site() is None, reason="memory is shared on x86-64 Linux only")


class Far:
    """A server elsewhere: answers requests as its actor does, in the threads of a pool, after ``fault``."""

    def __init__(self, server: SharedServer, pool: ThreadPoolExecutor) -> None:
        self.server, self.pool = server, pool
        self.requests: list[list[Request]] = []
        #: raised by the next calls, in their order
        self.faults: list[Exception] = []

    def __call__(self, requests: list[Request]) -> Future[list[Reply]]:
        self.requests.append(requests)
        return self.pool.submit(self.exchange, requests)

    def exchange(self, requests: list[Request]) -> list[Reply]:
        if self.faults:
            raise self.faults.pop(0)
        return [self.push(r) if isinstance(r, Push) else self.pull(r) for r in requests]

    def push(self, push: Push) -> Reply:
        with self.server.lock:
            version = self.server.shard.version
            reply = self.server.shard.push(push)
            if self.server.shard.version != version or self.server.shard.diverged is not None:
                self.server.publish()
        return reply

    def pull(self, pull: Pull) -> Reply:
        for _ in range(200):
            with self.server.lock:
                reply = self.server.shard.pull(pull)
            if not isinstance(reply, NotYet):
                return reply
            time.sleep(0.001)
        return reply


@contextmanager
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


def memory(
    assignment: Assignment, spans: tuple[Range, ...], near: dict[int, SharedServer], relay: NodeRelay | None
) -> SharedMemory:
    """A worker's memory: with the boards of its node's servers and relay, read by both."""
    boards = {i: server.address for i, server in near.items()} | (relay.boards if relay else {})
    nodes = cover(assignment.run, V)
    incarnations = tuple(assignment.incarnations_of(node) for node in nodes)
    made = SharedMemory([boards[i] for i in range(len(spans))], nodes, incarnations, spans, timeout_s=5.0)
    for i, server in near.items():
        server.attach(made.address, spans[i])
    if relay is not None:
        relay.attach(made.address)
    return made


def train(n_workers: int, homes: list[int], n_nodes: int) -> tuple[str, dict[int, Traffic]]:
    """The digest after STEPS steps, and each node's traffic. Server i is on node ``homes[i]``; workers are spread."""
    p = problem()
    spans = even_split(p.learner.layout.n_params, len(homes))
    membership = Membership(V)
    assignments = [membership.assign(i, run) for i, run in enumerate(deal(V, n_workers))]
    reports: list[LoopReport] = []
    with serving(p, spans, p.initial()) as servers, pool() as threads:
        fars = [Far(server, threads) for server in servers]
        relays: dict[int, NodeRelay] = {}
        for node in range(n_nodes):
            if far := {i: fars[i] for i, home in enumerate(homes) if home != node}:
                sends: dict[int, Send] = dict(far)
                relays[node] = NodeRelay(sends, spans, V)
                relays[node].ask(0)

        def work(assignment: Assignment, shared: SharedMemory) -> None:
            client = Client(assignment, V, spans, start=0, until=STEPS)
            reports.append(train_loop(client, shared, p.learner, p.batch))
            shared.close()

        pairs = []
        for i, assignment in enumerate(assignments):
            for server in servers:
                server.shard.fence(assignment.run, assignment.incarnations[0])
            node = i * n_nodes // n_workers
            near = {s: servers[s] for s, home in enumerate(homes) if home == node}
            pairs.append((assignment, memory(assignment, spans, near, relays.get(node))))
        workers = [threading.Thread(target=work, args=pair) for pair in pairs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [r.done.reason for r in reports] == ["reached"] * n_workers
        traffic = {node: relay.traffic() for node, relay in relays.items()}
        for relay in relays.values():
            relay.close()
        return join([s.shard.snapshot(STEPS) for s in servers]).digest(), traffic


@pytest.mark.parametrize(
    ("n_workers", "homes", "n_nodes"), [(4, [0], 2), (3, [0], 2), (2, [0, 1], 2), (5, [0, 0, 2], 3), (1, [1, 2], 1)]
)
def test_the_bytes_and_the_traffic(n_workers: int, homes: list[int], n_nodes: int) -> None:
    digest, traffic = train(n_workers, homes, n_nodes)
    assert digest == simulate(problem(), STEPS).final.digest()
    runs = deal(V, n_workers)
    for node, seen in traffic.items():
        mine = [runs[i] for i in range(n_workers) if i * n_nodes // n_workers == node]
        shards = [i for i, home in enumerate(homes) if home != node]
        assert seen.nodes == cover(Range(mine[0].begin, mine[-1].end), V)
        assert seen.shards == tuple(shards)
        assert seen.pushes == STEPS * len(seen.nodes) * len(shards)
        assert seen.versions == (STEPS + 1) * len(shards)
        n_params = sum(len(even_split(problem().learner.layout.n_params, len(homes))[i]) for i in shards)
        assert seen.pushed_bytes == 4 * n_params * STEPS * len(seen.nodes)
        assert seen.pulled_bytes == 4 * n_params * (STEPS + 1)


@contextmanager
def one_node(timeout_s: float = 30.0) -> Iterator[tuple[SharedServer, Far, NodeRelay, list[SharedMemory]]]:
    """One far server; a node with its relay and two workers, [0,4) and [4,8), each under incarnation 1."""
    p = problem()
    spans = (Range(0, p.learner.layout.n_params),)
    with serving(p, spans, p.initial()) as [server], pool() as threads:
        far = Far(server, threads)
        relay = NodeRelay({0: far}, spans, V, timeout_s=timeout_s)
        relay.ask(0)
        membership = Membership(V)
        workers = []
        for i, run in enumerate(deal(V, 2)):
            server.shard.fence(run, 1)
            workers.append(memory(membership.assign(i, run), spans, {}, relay))
        yield server, far, relay, workers
        for worker in workers:
            worker.close()
        relay.close()


def requests(step: int, node: Range, value: float = 1.0, incarnation: int = 1) -> list[Request]:
    n = problem().learner.layout.n_params
    sums = Partial(np.full(n, value, np.float32), 1.0, 4 * len(node))
    return [Push(0, step, node, (incarnation,) * len(node), sums, step), Pull(0, step + 1)]


def both(workers: list[SharedMemory], step: int, **how: float) -> list[list[Reply] | None]:
    """What the two workers' exchanges of a step bring."""
    with ThreadPoolExecutor(2) as threads:
        asked = [partial(w.exchange, requests(step, node, **how)) for w, node in zip(workers, deal(V, 2), strict=True)]
        return [f.result() for f in [threads.submit(ask) for ask in asked]]


def test_what_diverged_is_told() -> None:
    with one_node() as (_, _far, _relay, workers):
        assert all(isinstance((replies or [None])[-1], Pulled) for replies in both(workers, 0))
        assert both(workers, 1, value=np.nan) == [[Halted(0, 2, diverged=1)]] * 2


def test_the_frozen_are_told() -> None:
    with one_node() as (server, _far, _relay, workers):
        with server.lock:
            server.shard.freeze()
            server.publish()
        assert both(workers, 0) == [[Halted(0, 1, diverged=None)]] * 2


def test_the_fenced_one_is_told_and_a_successor_goes_on() -> None:
    with one_node() as (server, _far, relay, workers):
        second = deal(V, 2)[1]
        with server.lock:
            server.shard.fence(second, 2)
        with ThreadPoolExecutor(2) as threads:
            living = threads.submit(workers[0].exchange, requests(0, deal(V, 2)[0]))
            assert workers[1].exchange(requests(0, second)) == [PushReply(0, 0, second, Verdict.FENCED)]
            successor = memory(
                Assignment(2, second, (2,) * 4), (Range(0, problem().learner.layout.n_params),), {}, relay
            )
            replies = successor.exchange(requests(0, second, incarnation=2))
            assert [type(r) for r in replies or []] == [Pulled]
            assert [type(r) for r in living.result() or []] == [Pulled]
        assert server.shard.commits[0].parts == ((Range(0, 4), (1,) * 4, 16), (Range(4, 8), (2,) * 4, 16))
        successor.close()


def test_what_ray_cannot_reach_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysgd.runtime.relay.PAUSE_S", 0.01)
    with one_node() as (server, far, relay, workers):
        both(workers, 0)
        far.faults += [
            ray.exceptions.ActorUnavailableError("away", None),
            ray.exceptions.ActorUnavailableError("away", None),
        ]
        assert all(isinstance((replies or [None])[-1], Pulled) for replies in both(workers, 1))
        assert relay.traffic().repeated == 2
        assert server.shard.version == 2


def test_a_call_that_is_never_answered_is_said_again() -> None:
    with one_node(timeout_s=0.05) as (_, far, relay, workers):
        both(workers, 0)
        answer, never = far.exchange, threading.Event()

        def first_hangs(asked: list[Request]) -> list[Reply]:
            far.exchange = answer  # type: ignore[method-assign]
            never.wait(30)
            return answer(asked)

        far.exchange = first_hangs  # type: ignore[method-assign]
        assert all(isinstance((replies or [None])[-1], Pulled) for replies in both(workers, 1))
        assert relay.traffic().repeated >= 1
        never.set()
        assert all(isinstance((replies or [None])[-1], Pulled) for replies in both(workers, 2))


def test_a_dead_server_ends_the_relay_and_leaves_nobody_waiting() -> None:
    with one_node() as (_, far, relay, workers):
        both(workers, 0)
        far.faults += [ray.exceptions.RayActorError()]
        assert both(workers, 1) == [[Halted(0, 2, diverged=None)]] * 2
        with pytest.raises(RunError, match="server 0, from another node"):
            relay.check()
