"""The loop: one delivery or one timer at a time, and the invariants that are judged on the way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from raysgd.errors import DivergedError
from raysgd.learn.batch import Float32, Float64
from raysgd.learn.parameters import block_width, even_split
from raysgd.protocol.client import Client, Compute, Done
from raysgd.protocol.compute import subtree_sums
from raysgd.protocol.generation import Generation, finite
from raysgd.protocol.ledger import check
from raysgd.protocol.membership import Assignment, Event, Joined, Membership, Share
from raysgd.protocol.messages import Norms, NotYet, Pull, Pulled, Push, PushReply, Verdict
from raysgd.protocol.sparse import SparsePull, SparsePush
from raysgd.protocol.stale import shard_class
from raysgd.protocol.tally import Tally
from raysgd.protocol.tree import Partial
from raysgd.simulate import driver, replicas, servers
from raysgd.simulate.network import Delivery, Network
from raysgd.simulate.problem import Faults, Outcome, Problem
from raysgd.simulate.processes import Process, befall

#: deliveries after which a process that was declared dead is really dead
BREATH = 60


def simulate(
    problem: Problem,
    until: int,
    *,
    n_workers: int = 1,
    n_servers: int = 1,
    faults: Faults | None = None,
    start: Generation | None = None,
    most: int | None = None,
) -> Outcome:
    """Train from ``start`` (default: the initial generation) to version ``until`` (steps) and check the invariants.

    n_workers: to begin with;  most: to carry virtual workers at once, where others join; default: all of them
    Raises DivergedError where a step's result is not finite.
    """
    faults = faults or Faults(retry=0.0, in_order=True)
    return Simulation(
        problem, until, n_workers=n_workers, n_servers=n_servers, faults=faults, start=start, most=most
    ).run()


@dataclass(slots=True)
class Seat:
    """One assignment as a worker's process carries it out."""

    worker: int
    client: Any
    begun: bool = False
    #: others carry its virtual workers and every shard knows it: what it pushes from now on is garbage
    zombie: bool = False
    breath: int = BREATH
    #: what came while its process hung
    mail: list[Any] = field(default_factory=list)


class Simulation:
    """One schedule. What befalls workers is in processes.py, what befalls server shards in servers.py, and what
    the driver does about it in driver.py."""

    #: instructions that a worker carries out by itself: they cannot be lost
    LOCAL: tuple[type[Any], ...] = (Compute,)

    def __init__(
        self,
        problem: Problem,
        until: int,
        *,
        n_workers: int,
        n_servers: int,
        faults: Faults,
        start: Generation | None = None,
        most: int | None = None,
    ) -> None:
        self.problem, self.until, self.faults = problem, until, faults
        whole = start or problem.initial()
        self.random = random.Random(faults.seed)
        self.outcome = Outcome(whole)
        self.network = Network(faults, self.outcome, self.random, self.LOCAL)
        self.spans = even_split(problem.learner.layout.n_params, n_servers)
        #: by shard's process and step: its sums of squares, as they lie in its memory
        self.norms: WeakKeyDictionary[Any, dict[int, Float64]] = WeakKeyDictionary()
        self.shards = [self.make_shard(i, whole.cut(span)) for i, span in enumerate(self.spans)]
        #: the simulation's own knowledge of who may push, per shard: the oracle of the fence
        self.truth = [[0] * problem.n_virtual for _ in self.shards]
        #: (shard, version) -> the parameters that were served first: no other may ever be
        self.published: dict[tuple[int, int], bytes] = {}
        #: by shard: pulls of versions that it does not have yet
        self.waiting: list[list[Delivery]] = [[] for _ in self.shards]
        #: shards whose process is dead, and whether their memory is lost, too
        self.down: dict[int, bool] = {}
        #: by shard: its replica; and how many there were
        self.replicas: list[replicas.Replica | None] = [None] * n_servers
        self.replica_number = 0
        #: by shard: the commits before which the driver was told of, and how many processes it had before this one
        self.told, self.successions = [whole.step] * n_servers, [0] * n_servers
        self.begin, self.checkpoint, self.timeline = whole.step, whole, 0
        #: by shard: what is in the checkpoint, where it was taken while virtual workers stood apart
        self.tallies: list[Tally | None] = [None] * n_servers
        self.goal = driver.boundary(self, whole.step)
        self.membership = Membership(problem.n_virtual, n_workers, problem.n_virtual if most is None else most)
        self.processes: dict[int, Process] = {}
        #: by step: workers that were noticed to hang in it
        self.hangs: Counter[int] = Counter()
        self.seats: list[Seat] = []
        #: the seats that carry all virtual workers; none while they are being dealt
        self.current: list[int] = []
        self.timers: list[tuple[int, int, Callable[[], None]]] = []
        self.now, self._timer = 0, 0
        self.over = False
        for _ in range(n_workers):
            self.join()

    def run(self) -> Outcome:
        patience = self.faults.deliveries(self.until - self.begin)
        while not self.over:
            self.turn()
            if self.now > patience:
                self.violation(f"I10: no end after {patience} deliveries: {self.standing()}")
        self.outcome.order = self.network.order()
        self.outcome.final = self.checkpoint
        if not self.outcome.violations:
            self.check()
        return self.outcome

    def turn(self) -> None:
        self.now += 1
        if self.timers and self.timers[0][0] <= self.now:
            heappop(self.timers)[2]()
        elif not self.network.flight:
            self.retry(self.current)
            if not self.network.flight:
                self.wait()
        # A worker's timer fires when nothing is on its way, and now and then although something is.
        elif self.current and self.random.random() < self.faults.retry:
            self.retry([self.random.choice(self.current)])
        else:
            self.deliver()
        if self.current and not self.down and all(self.seats[i].client.done for i in self.current):
            driver.arrive(self)

    def wait(self) -> None:
        """Nothing is on its way and no worker has anything to say: time passes until the next timer."""
        if self.timers:
            self.now = max(self.now, self.timers[0][0] - 1)
        else:
            self.violation(f"I10: nobody has anything to say: {self.standing()}")

    def later(self, deliveries: int, action: Callable[[], None]) -> None:
        heappush(self.timers, (self.now + deliveries, self._timer, action))
        self._timer += 1

    def violation(self, sentence: str) -> None:
        self.outcome.violations.append(sentence)
        self.over = True

    def standing(self) -> str:
        clients = [f"worker {self.seats[i].worker} at {self.seats[i].client.step}" for i in self.current]
        return (
            f"shards at {[s.version for s in self.shards]}, down {sorted(self.down)}; {', '.join(clients) or 'nobody'}"
        )

    # -- what is dense here, and sparse in simulate_sparse.py

    def successor(self, index: int) -> Any:
        """The shard that goes on from a dead one's memory."""
        return self.make_shard(index, **servers.remains(self, index))

    def make_shard(self, index: int, generation: Generation, **more: Any) -> Any:
        """more: what else a shard takes that begins where another was"""
        problem, layout = self.problem, self.problem.learner.layout
        norms: dict[int, Float64] = {}
        made = shard_class(problem.consistency)(
            index,
            problem.rule,
            layout.penalized(self.spans[index]),
            n_virtual=problem.n_virtual,
            generation=generation,
            n_shards=len(self.spans),
            width=block_width(layout.n_params),
            consistency=problem.consistency,
            on_norms=norms.__setitem__,
            **more,
        )
        self.norms[made] = norms
        return made

    def make_client(self, share: Share) -> Any:
        return Client(
            share.assignment,
            self.problem.n_virtual,
            self.spans,
            start=share.start,
            until=self.goal,
            consistency=self.problem.consistency,
            nodes=share.nodes,
        )

    def compute(self, seat: Seat, content: Any) -> list[Any]:
        """What the worker's client says to the result of an instruction that needs no other process."""
        if self.problem.consistency.exact and not seat.zombie:
            served = b"".join(self.published.get((i, content.step), b"") for i in range(len(self.shards)))
            if content.params.tobytes() != served:
                self.violation(f"I4: worker {seat.worker} computes step {content.step} from no version of it")
        sums = subtree_sums(self.problem.learner, content, self.problem.batch, self.problem.local)
        if seat.zombie:
            sums = [_garbage(s) for s in sums]
        return list(seat.client.computed(content.step, sums))

    # -- what the driver does is in driver.py; these are what it needs of one worker

    def take(self, event: Event) -> None:
        driver.act(self, self.membership.handle(event))

    def join(self) -> None:
        worker = len(self.processes)
        self.processes[worker] = Process.RUNNING
        self.take(Joined(worker, self.random.choice("abc")))

    def start(self, assignment: Assignment) -> None:
        """Begin where all shards' clocks say, under incarnations that all of them know."""
        share = Share.at(assignment, self.problem.n_virtual, [s.held_clocks for s in self.shards])
        self.current.append(len(self.seats))
        self.seats.append(Seat(assignment.worker, self.make_client(share)))
        self.begin_seat(self.current[-1])

    def begin_seat(self, index: int) -> None:
        seat = self.seats[index]
        if self.processes[seat.worker] is Process.RUNNING:
            seat.begun = True
            self.send(index, seat.client.begin())

    # -- the network

    def send(self, index: int, contents: Sequence[Any]) -> None:
        for content in contents:
            if isinstance(content, Done):
                if content.reason == "diverged":
                    raise DivergedError(content.step, "a gradient, a parameter or its state is not finite")
                if content.reason != "reached" and index in self.current:
                    self.violation(f"living worker {self.seats[index].worker} ended with {content}")
                continue
            self.network.send(index, content)

    def retry(self, seats: Sequence[int]) -> None:
        """These workers say again what is unanswered, and so do servers to their replicas."""
        replicas.say_again(self)
        for index in seats:
            seat = self.seats[index]
            if self.processes[seat.worker] is Process.RUNNING:
                self.send(index, seat.client.retry())

    def deliver(self) -> None:
        delivery = self.network.next()
        if delivery is not None:
            self.receive(delivery.address, delivery.content)

    def receive(self, index: int, content: Any) -> None:
        if isinstance(content, Norms):
            if index not in self.down:
                self.at(index, partial(self.shards[index].norms, content))
            return
        if isinstance(content, replicas.Between):
            replicas.receive(self, index, content)
            return
        if isinstance(content, Push | SparsePush):
            self.answer(index, self.push(content))
            return
        if isinstance(content, Pull | SparsePull):
            reply = self.pull(content)
            if isinstance(reply, NotYet) and self.random.random() < 0.8:
                self.waiting[content.shard].append(Delivery(-1, index, content))  # answered when there is something new
            else:
                self.answer(index, reply)
            return
        seat = self.seats[index]
        process = self.processes[seat.worker]
        if process is Process.HUNG:
            seat.mail.append(content)
        elif process is Process.RUNNING:
            if seat.zombie:
                seat.breath -= 1
                if seat.breath < 0:
                    return
            self.send(
                index, self.compute(seat, content) if isinstance(content, self.LOCAL) else seat.client.handle(content)
            )

    def answer(self, index: int, reply: Any) -> None:
        if reply is not None:
            self.send(index, [reply])

    # -- the shards

    def pull(self, pull: Any) -> Any:
        """A shard's answer; None from a dead one."""
        if pull.shard in self.down:
            return None
        reply = self.shards[pull.shard].pull(pull)
        if isinstance(reply, Pulled) and not finite(reply.params):
            self.violation(f"shard {pull.shard} serves version {reply.version}, which is not finite")
        if isinstance(reply, Pulled) and self.problem.consistency.exact:
            served = reply.params.tobytes()
            if self.published.setdefault((pull.shard, reply.version), served) != served:
                self.violation(f"I3: shard {pull.shard} serves two different versions {reply.version}")
        return reply

    def push(self, push: Any) -> PushReply | None:
        """A shard's verdict; None from a dead one."""
        if push.shard in self.down:
            return None
        reply: PushReply | None = self.at(push.shard, partial(self.shards[push.shard].push, push))
        current = tuple(self.truth[push.shard][push.node.slice]) == push.incarnations
        if reply is not None and reply.verdict is Verdict.ACCEPTED and not current:
            self.violation(f"I6: shard {push.shard} took a push of the dead: step {push.step}, {push.node}")
        return reply

    def at(self, index: int, ask: Callable[[], Any]) -> Any:
        """Have a shard do something; None where its process ends in the middle of it."""
        shard = self.shards[index]
        before = shard.version
        try:
            result = ask()
        except servers.Died:
            self.outcome.faults["server_kill in a write"] += 1
            servers.die(self, index)
            return None
        if shard.version > before:
            self.wake_readers(index)
            befall(self)
            if self.random.random() < 0.2 and not self.over:
                self.later(0, partial(driver.poll, self))
        self.tell(index)
        return result

    def wake_readers(self, shard: int) -> None:
        """Those whose pull came too early ask again."""
        for delivery in self.waiting[shard]:
            self.network.send(delivery.address, delivery.content)
        self.waiting[shard].clear()

    def tell(self, shard: int) -> None:
        """Carry what a shard has to say to the others."""
        for norms in self.shards[shard].outbox:
            self.network.send(norms.to, norms)
        self.shards[shard].outbox.clear()
        replicas.tell(self, shard)

    # -- the invariants that can only be judged at the end

    def check(self) -> None:
        """I1, I2, I4 and I6, from what the servers' commits say; the others were judged on the way."""
        at = self.problem.rule.rounds.begin
        self.outcome.violations += check(
            self.outcome.ledger,
            self.problem.n_virtual,
            self.problem.rows,
            n_shards=len(self.shards),
            begin=at(self.begin),
            end=at(self.until),
        )


def _garbage(partial_sum: Partial) -> Partial:
    """What a process pushes whose memory is no longer its own."""
    gradient: Float32 | None = None if partial_sum.gradient is None else partial_sum.gradient + np.float32(1.0)
    return Partial(gradient, partial_sum.loss + 1.0, partial_sum.rows)
