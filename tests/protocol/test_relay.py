"""A node's relay: when it pushes what, whom it tells of a refusal, and the whole protocol through relays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from raysgd.learn.batch import Batch, Float32, Inputs, Target
from raysgd.learn.models import LogisticRegression
from raysgd.learn.parameters import Range
from raysgd.learn.transforms import SGD
from raysgd.protocol.membership import Assignment
from raysgd.protocol.messages import Gone, Halted, NotYet, Pull, Pulled, Push, PushReply, Reply, Request, Verdict
from raysgd.protocol.relay import Relay, whole_nodes
from raysgd.protocol.tree import EMPTY, Partial, cover
from raysgd.protocol.update import PlannedRows, Rule
from raysgd.simulate import Faults, Outcome, Problem, Simulation, simulate

V = 8


def relay(*nodes: tuple[int, int], version: int = 0) -> Relay:
    """A relay that has ``version`` and passes on what ``nodes`` fill."""
    made = Relay(0, V)
    made.cover = whole_nodes([Range(*node) for node in nodes], V)
    [pull] = made.ask(version)
    assert made.handle(pull, pulled(version)) == [pulled(version)]
    return made


def pulled(version: int) -> Pulled:
    return Pulled(0, version, NOTHING)


NOTHING = np.zeros(0, np.float32)


def push(begin: int, end: int, step: int = 0, *, value: float = 1.0, incarnation: int = 1) -> Push:
    partial = Partial(np.full(2, value, np.float32), value, end - begin)
    return Push(0, step, Range(begin, end), (incarnation,) * (end - begin), partial, step)


def nodes(requests: Sequence[Request]) -> list[tuple[int, int] | int]:
    """Pushes by their node, pulls by their version."""
    return [(r.node.begin, r.node.end) if isinstance(r, Push) else r.version for r in requests]


def refusal(request: Request, verdict: Verdict = Verdict.FENCED) -> PushReply:
    assert isinstance(request, Push)
    return PushReply(0, request.step, request.node, verdict)


def test_an_aligned_run_is_one_vector_and_one_pull() -> None:
    r = relay((4, 6), (6, 8))
    assert r.push(push(6, 8, value=2.0)).verdict is Verdict.ACCEPTED
    assert r.ready() == []
    r.push(push(4, 6, value=0.5))
    [whole, pull] = r.ready()
    assert isinstance(whole, Push)
    assert (whole.node, whole.incarnations, whole.step) == (Range(4, 8), (1,) * 4, 0)
    assert whole.partial.gradient is not None
    assert (whole.partial.gradient.tolist(), whole.partial.loss, whole.partial.rows) == ([2.5, 2.5], 2.5, 4)
    assert pull == Pull(0, 1)
    assert r.ready() == []


def test_each_node_of_the_cover_goes_as_soon_as_it_is_complete() -> None:
    r = relay((2, 4), (4, 5), (5, 6), (6, 8))
    r.push(push(4, 5))
    r.push(push(2, 4))
    assert nodes(r.ready()) == [(2, 4)]
    r.push(push(6, 8))
    assert nodes(r.ready()) == []
    r.push(push(5, 6))
    assert nodes(r.ready()) == [(4, 8), 1]


def test_the_sum_runs_along_the_tree() -> None:
    """(a + b) + (c + d), although a + b + c + d in another order gives other bits."""
    r, values = relay((4, 8)), [1.0, 1e-8, -1.0, 1e-8]
    for i in (2, 0, 3, 1):
        r.push(push(4 + i, 5 + i, value=values[i]))
    [whole, _] = r.ready()
    a, b, c, d = (np.float32(v) for v in values)
    assert isinstance(whole, Push)
    assert whole.partial.gradient is not None
    assert whole.partial.gradient[0] == (a + b) + (c + d) != ((a + c) + b) + d


def test_the_absent_are_skipped() -> None:
    r = relay((4, 8))
    r.push(push(4, 6, value=-0.0))
    r.push(Push(0, 0, Range(6, 8), (1, 1), EMPTY, 0))
    [whole, _] = r.ready()
    assert isinstance(whole, Push)
    assert whole.partial.gradient is not None
    assert np.signbit(whole.partial.gradient).all()  # -0.0 + 0 would be 0
    empty = relay((4, 8))
    empty.push(Push(0, 0, Range(4, 8), (1,) * 4, EMPTY, 0))
    assert empty.ready() == [Push(0, 0, Range(4, 8), (1,) * 4, EMPTY, 0), Pull(0, 1)]


def test_what_the_cover_does_not_know_is_passed_on_as_it_is() -> None:
    r = relay()
    r.push(push(4, 6))
    assert nodes(r.ready()) == [(4, 6), 1]
    r.push(push(6, 8))
    assert nodes(r.ready()) == [(6, 8)]


def test_a_version_ends_the_step() -> None:
    r = relay((4, 8))
    r.push(push(4, 8))
    [_, pull] = r.ready()
    assert r.handle(pull, NotYet(0, 1)) == [Pull(0, 1)]
    assert r.handle(pull, pulled(1)) == [pulled(1)]
    assert (r.version, r.retry(), r.ready()) == (1, [], [])
    assert r.handle(pull, pulled(1)) == []
    assert r.handle(pull, NotYet(0, 1)) == []
    verdicts = [r.push(push(4, 8, step)).verdict for step in (0, 1, 1, 2)]
    assert verdicts == [Verdict.DUPLICATE, Verdict.ACCEPTED, Verdict.DUPLICATE, Verdict.EARLY]
    assert nodes(r.ready()) == [(4, 8), 2]


def test_the_unanswered_is_said_again() -> None:
    r = relay((2, 4), (4, 8))
    assert r.retry() == []
    r.push(push(4, 8))
    assert nodes(r.ready()) == nodes(r.retry()) == [(4, 8)]
    r.push(push(2, 4))
    assert nodes(r.ready()) == [(2, 4), 1]
    assert nodes(r.retry()) == nodes(r.retry()) == [(2, 4), (4, 8), 1]


def test_a_successor_starts_empty_and_says_the_same() -> None:
    first, second = relay((4, 6), (6, 8), version=3), Relay(0, V)
    for r in (first, second):
        if r is second:
            r.cover = first.cover
            [pull] = r.ask(3)
            r.handle(pull, pulled(3))
        for node in ((4, 6), (6, 8)):
            r.push(push(*node, step=3))
    assert nodes(first.ready()) == nodes(second.ready()) == [(4, 8), 4]


def test_newer_incarnations_replace_the_older() -> None:
    r = relay((4, 8))
    r.push(push(4, 8, value=100.0))
    assert nodes(r.ready()) == [(4, 8), 1]
    assert r.push(push(4, 6, incarnation=2)).verdict is Verdict.ACCEPTED
    assert r.push(push(4, 8, value=100.0)).verdict is Verdict.FENCED
    assert r.ready() == []
    r.push(push(6, 8, incarnation=3))
    [whole] = r.ready()
    assert isinstance(whole, Push)
    assert (whole.incarnations, whole.partial.loss) == ((2, 2, 3, 3), 2.0)
    assert r.push(push(6, 7, incarnation=3)).verdict is Verdict.DUPLICATE


def test_the_fenced_one_is_told_and_the_others_are_not() -> None:
    r = relay((4, 6), (6, 8))
    r.push(push(4, 6))
    r.push(push(6, 8))
    [whole, _] = r.ready()
    alone = r.handle(whole, refusal(whole))
    assert nodes(alone) == [(4, 6), (6, 8)]  # type: ignore[arg-type]
    assert r.handle(whole, refusal(whole)) == []  # repeated
    left, right = alone
    assert isinstance(left, Push)
    assert isinstance(right, Push)
    assert r.handle(left, refusal(left, Verdict.ACCEPTED)) == []
    assert r.handle(right, refusal(right)) == [PushReply(0, 0, Range(6, 8), Verdict.FENCED)]
    assert r.push(push(6, 8, incarnation=2)).verdict is Verdict.ACCEPTED
    assert nodes(r.ready()) == [(6, 8)]
    assert r.handle(right, refusal(right)) == []  # late: of the predecessor
    assert r.handle(Pull(0, 1), pulled(1)) == [pulled(1)]
    for node in ((4, 6), (6, 8)):
        r.push(push(*node, step=1, incarnation=2))
    assert nodes(r.ready()) == [(4, 8), 2]  # the next step is summed again


@pytest.mark.parametrize("diverged", [None, 0])
def test_the_end_is_told(diverged: int | None) -> None:
    r = relay((4, 8))
    r.push(push(4, 8))
    [_, pull] = r.ready()
    halted = Halted(0, 1, diverged)
    assert r.handle(pull, halted) == [halted]
    assert (r.frozen, r.diverged) == (diverged is None, diverged)
    assert r.push(push(4, 8)).verdict is Verdict.FROZEN
    assert (r.ready(), r.retry(), r.handle(pull, halted)) == ([], [], [])


def test_a_relay_that_was_left_behind_catches_up() -> None:
    r = relay((4, 8))
    assert r.ask(5) == [Pull(0, 5)]
    assert r.ask(6) == []
    assert r.handle(Pull(0, 5), Gone(0, 5, oldest=7)) == [Pull(0, 7)]
    assert r.handle(Pull(0, 7), pulled(7)) == [pulled(7)]
    assert (r.version, r.ask(7)) == (7, [])


def test_nonsense_is_malformed() -> None:
    r = relay((4, 8))
    assert r.push(push(3, 5)).verdict is Verdict.MALFORMED
    assert r.push(Push(0, 0, Range(4, 6), (1,), EMPTY, 0)).verdict is Verdict.MALFORMED


# -- the whole protocol: workers of several nodes, each node with relays to all shards, under a hostile network

STEPS = 15
HOSTILE = {"duplicate": 0.15, "lose": 0.03, "kill": 0.05}


def rate(_step: int) -> float:
    return 0.2


@cache
def problem() -> Problem:
    def batch(step: int, v: int) -> Batch | None:
        random = np.random.default_rng([step, v])
        rows = int(random.integers(0, 4))
        numeric = random.standard_normal((rows, 6)).astype(np.float32)
        return Batch(numeric, np.zeros((rows, 0), np.int32), (numeric[:, 0] > 0).astype(np.float32)) if rows else None

    learner = LogisticRegression().bind(Inputs(6), Target(2))
    return Problem(learner, Rule(SGD(momentum=0.9), rate, PlannedRows(16, 16 * STEPS, STEPS)), batch, V)


@dataclass(frozen=True)
class Answer:
    """A shard's reply to a relay, with what it replies to."""

    request: Request
    reply: Reply

    @property
    def version(self) -> int:
        return self.request.step if isinstance(self.request, Push) else self.request.version


class Relayed(Simulation):
    """Workers speak to the relays of their node, in memory; relays speak to the shards through the network.

    Deliveries to relay (node, shard) have the address -1 - (node * shards + shard).
    """

    def __init__(self, n_nodes: int, n_workers: int, n_servers: int, faults: Faults) -> None:
        self.n_nodes = n_nodes
        self.relays = [[Relay(s, V) for s in range(n_servers)] for _ in range(n_nodes)]
        self.boards: list[list[dict[int, Float32]]] = [[{} for _ in range(n_servers)] for _ in range(n_nodes)]
        #: pushes to the shards by (node, step), of schedules in which nothing is lost
        self.pushed: dict[tuple[int, int], list[Range]] = {}
        super().__init__(problem(), STEPS, n_workers=n_workers, n_servers=n_servers, faults=faults, start=None)

    def node(self, worker: int) -> int:
        return self.seats[worker].client.assignment.run.begin * self.n_nodes // V

    def start(self, assignment: Assignment) -> None:
        super().start(assignment)
        for node, relays in enumerate(self.relays):
            living = [self.seats[i].client.nodes for i in self.current if self.node(i) == node]
            for r in relays:
                r.cover = whole_nodes([n for nodes_ in living for n in nodes_], V)

    def retry(self, seats: Sequence[int]) -> None:
        super().retry(seats)
        for node in sorted({self.node(index) for index in seats}):
            for r in self.relays[node]:
                self.out(node, r, r.retry())

    def out(self, node: int, r: Relay, requests: Sequence[Request]) -> None:
        for request in requests:
            if isinstance(request, Push) and r.index == 0:
                self.pushed.setdefault((node, request.step), []).append(request.node)
            self.send(-1 - (node * len(self.shards) + r.index), [request])

    def receive(self, index: int, content: object) -> None:
        if index < 0:
            node, shard = divmod(-1 - index, len(self.shards))
            self.receive_relay(node, self.relays[node][shard], content)
        elif isinstance(content, Push | Pull):
            node = self.node(index)
            r = self.relays[node][content.shard]
            self.send(index, [r.push(content) if isinstance(content, Push) else self.read(node, r, content)])
            self.out(node, r, r.ready())
        else:
            super().receive(index, content)  # type: ignore[arg-type]

    def receive_relay(self, node: int, r: Relay, content: object) -> None:
        address = -1 - (node * len(self.shards) + r.index)
        if isinstance(content, Push):
            self.send(address, [Answer(content, self.push(content))])  # type: ignore[list-item]
        elif isinstance(content, Pull):
            self.send(address, [Answer(content, self.pull(content))])  # type: ignore[list-item]
        else:
            assert isinstance(content, Answer)
            for said in r.handle(content.request, content.reply):
                if isinstance(said, Pulled):
                    board = self.boards[node][r.index]
                    board[said.version] = said.params
                    self.boards[node][r.index] = {v: p for v, p in board.items() if v >= said.version - 1}
                elif isinstance(said, PushReply):
                    assert isinstance(content.request, Push)
                    self.refuse(said, content.request.incarnations)
                elif isinstance(said, Push | Pull):
                    self.out(node, r, [said])

    def refuse(self, said: PushReply, incarnations: tuple[int, ...]) -> None:
        """Pass a refusal on to the worker, living or dead, that carries that node under those incarnations."""
        for i, seat in enumerate(self.seats):
            client = seat.client
            if said.node in client.nodes and client.assignment.incarnations_of(said.node) == incarnations:
                self.send(i, [said])

    def read(self, node: int, r: Relay, pull: Pull) -> Reply:
        board = self.boards[node][r.index]
        if pull.version in board:
            return Pulled(r.index, pull.version, board[pull.version].copy())
        if pull.version < r.version:
            return Gone(r.index, pull.version, min(board))
        self.out(node, r, r.ask(pull.version))
        return NotYet(r.index, pull.version)


@cache
def truth() -> str:
    return simulate(problem(), STEPS).final.digest()


@pytest.mark.parametrize("n_nodes", [1, 2, 3])
@pytest.mark.parametrize("n_workers", [1, 2, 3, 4, 7, 8])
def test_relays_change_no_byte_and_push_the_cover_once(n_nodes: int, n_workers: int) -> None:
    simulation = Relayed(n_nodes, n_workers, 2, Faults(retry=0.0))
    outcome = simulation.run()
    assert not outcome.violations
    assert outcome.final.digest() == truth()
    for (node, step), pushed in simulation.pushed.items():
        assert tuple(sorted(pushed)) == simulation.relays[node][0].cover, (node, step)
    nodes_with_workers = {simulation.node(i) for i in range(n_workers)}
    assert set(simulation.pushed) == {(node, step) for node in nodes_with_workers for step in range(STEPS)}


@pytest.mark.parametrize("seed", range(60))
def test_relays_under_a_hostile_network(seed: int) -> None:
    simulation = Relayed(1 + seed % 3, 1 + seed % 8, 1 + seed % 2, Faults(seed, **HOSTILE))
    outcome: Outcome = simulation.run()
    assert not outcome.violations
    assert outcome.final.digest() == truth()


def test_the_cover_of_a_contiguous_run() -> None:
    for begin in range(V):
        for end in range(begin + 1, V + 1):
            leaves = [Range(v, v + 1) for v in range(begin, end)]
            assert whole_nodes(leaves, V) == cover(Range(begin, end), V)
