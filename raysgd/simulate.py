"""The protocol in one process: the same state machines that the Ray actors hold, under a seeded, hostile network.

Messages are delivered in random order, repeated, lost; workers are killed and their shares dealt again while the
dead go on pushing garbage. Whatever the schedule, BSP must end in the same bytes. This is the oracle of the tests,
and the plainest way to train without Ray: ``simulate(problem, steps)``.

    in flight: [request | reply | compute] ──one at random──▶ state machine ──▶ more in flight
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from raysgd.errors import DivergedError
from raysgd.learn.batch import Batch, Float32
from raysgd.learn.losses import runs
from raysgd.learn.models.base import ValueAndGrad
from raysgd.learn.parameters import Range, block_width, even_split
from raysgd.protocol.client import Client, Compute, Done
from raysgd.protocol.compute import LocalSteps, subtree_sums
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.generation import Generation, join
from raysgd.protocol.membership import Assignment, Membership, deal
from raysgd.protocol.messages import Norms, Pull, Push, PushReply, Verdict
from raysgd.protocol.sparse import SparsePull, SparsePush
from raysgd.protocol.stale import shard_class
from raysgd.protocol.tree import Partial, pieces
from raysgd.protocol.update import Rule


@dataclass(frozen=True)
class Problem:
    """What is trained: ``batch(step, v)`` gives virtual worker v's rows of a step, or None."""

    learner: ValueAndGrad
    rule: Rule
    batch: Callable[[int, int], Batch | None]
    n_virtual: int
    seed: int = 0
    consistency: Consistency = field(default_factory=Consistency)

    @property
    def local(self) -> LocalSteps | None:
        """How virtual workers walk by themselves, where a round is several steps."""
        if self.rule.rounds.local_steps == 1:
            return None
        layout = self.learner.layout
        return LocalSteps(self.rule, self.n_virtual, runs(layout.penalized(Range(0, layout.n_params))))

    def initial(self) -> Generation:
        params = self.learner.initial(self.seed)
        return Generation(0, params, {slot: np.zeros_like(params) for slot in self.rule.transform.slots})


@dataclass(frozen=True, slots=True)
class Faults:
    """How hostile the schedule is: probabilities per delivery (``kill``: per commit).

    ``retry``: how often a worker's timer fires, per delivery; ``in_order`` delivers first come, first served.
    """

    seed: int = 0
    duplicate: float = 0.0
    lose: float = 0.0
    kill: float = 0.0
    retry: float = 0.01
    in_order: bool = False


@dataclass(slots=True)
class Outcome:
    """What came out, and how hostile the schedule really was. ``order``: a digest of the order of deliveries."""

    final: Generation
    delivered: int = 0
    duplicated: int = 0
    reordered: int = 0
    lost: int = 0
    kills: int = 0
    order: str = ""
    #: invariants that did not hold, as sentences; empty in a correct protocol
    violations: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Worker:
    client: Any
    #: a zombie was declared dead but runs on; what it pushes is garbage
    zombie: bool = False
    #: deliveries after which a zombie is really dead
    breath: int = 100


@dataclass(frozen=True, slots=True)
class _Delivery:
    serial: int
    #: whom it concerns: a worker, or the shard that is told another's norms
    worker: int
    content: Any


def simulate(
    problem: Problem,
    until: int,
    *,
    n_workers: int = 1,
    n_servers: int = 1,
    faults: Faults | None = None,
    start: Generation | None = None,
) -> Outcome:
    """Train from ``start`` (default: the initial generation) to version ``until`` (steps) and check the invariants.

    Raises DivergedError where a step's result is not finite.
    """
    simulation = _Simulation(
        problem,
        until,
        n_workers=n_workers,
        n_servers=n_servers,
        faults=faults or Faults(retry=0.0, in_order=True),
        start=start,
    )
    return simulation.run()


class _Simulation:
    #: instructions that a worker carries out by itself: they cannot be lost
    LOCAL: tuple[type[Any], ...] = (Compute,)

    def __init__(
        self, problem: Problem, until: int, *, n_workers: int, n_servers: int, faults: Faults, start: Generation | None
    ) -> None:
        self.problem, self.until, self.faults = problem, until, faults
        whole = start or problem.initial()
        layout = problem.learner.layout
        self.spans = even_split(layout.n_params, n_servers)
        self.shards = self.make_shards(whole)
        self.random = random.Random(faults.seed)
        self.membership = Membership(problem.n_virtual)
        #: the simulation's own knowledge of who may push, per shard: the oracle of the fence
        self.truth = [[0] * problem.n_virtual for _ in self.shards]
        self.workers: list[_Worker] = []
        self.flight: list[_Delivery] = []
        self.serial = 0
        self.outcome = Outcome(whole)
        self.order = sha256()
        self.deal(n_workers)

    def run(self) -> Outcome:
        while not all(w.zombie or w.client.done for w in self.workers):
            # A timer fires when nothing is on its way, and now and then although something is.
            if not self.flight or self.random.random() < self.faults.retry:
                self.retry()
            else:
                self.deliver()
        self.outcome.order = self.order.hexdigest()
        self.outcome.final = join([s.snapshot(min(s.version for s in self.shards)) for s in self.shards])
        self.check()
        return self.outcome

    # -- what is dense here, and sparse in simulate_sparse.py

    def make_shards(self, whole: Generation) -> list[Any]:
        problem, layout = self.problem, self.problem.learner.layout
        return [
            shard_class(problem.consistency)(
                i,
                problem.rule,
                layout.penalized(span),
                n_virtual=problem.n_virtual,
                generation=whole.cut(span),
                n_shards=len(self.spans),
                width=block_width(layout.n_params),
                consistency=problem.consistency,
            )
            for i, span in enumerate(self.spans)
        ]

    def make_client(self, assignment: Assignment, start: int) -> Any:
        n_virtual = self.problem.n_virtual
        return Client(
            assignment,
            n_virtual,
            self.spans,
            start=start,
            until=self.until,
            consistency=self.problem.consistency,
            nodes=pieces(assignment.run, n_virtual, [s.clocks.steps for s in self.shards]),
        )

    def compute(self, worker: _Worker, content: Any) -> list[Any]:
        """What the worker's client says to the result of an instruction that needs no other process."""
        sums = subtree_sums(self.problem.learner, content, self.problem.batch, self.problem.local)
        if worker.zombie:
            sums = [_garbage(s) for s in sums]
        return list(worker.client.computed(content.step, sums))

    # -- membership

    def deal(self, n_workers: int) -> None:
        """Deal all virtual workers anew; whoever carried them before is believed dead, and runs on."""
        for worker in self.workers:
            worker.zombie = True
        for run in deal(self.problem.n_virtual, n_workers):
            self.start(run)

    def start(self, run: Range) -> None:
        assignment = self.membership.assign(len(self.workers), run)
        begins = []
        for shard, truth in zip(self.shards, self.truth, strict=True):
            begins.append(shard.fence(run, assignment.incarnations[0]))
            truth[run.slice] = assignment.incarnations
        client = self.make_client(assignment, min(begins))
        self.workers.append(_Worker(client))
        self.send(assignment.worker, client.begin())

    def kill(self) -> None:
        """Kill one worker and replace it, or deal everything anew to another number of workers."""
        self.outcome.kills += 1
        living = [i for i, w in enumerate(self.workers) if not w.zombie]
        if self.random.random() < 0.5:
            victim = self.workers[self.random.choice(living)]
            victim.zombie = True
            self.start(victim.client.assignment.run)
        else:
            self.deal(self.random.randint(1, self.problem.n_virtual))

    # -- the network

    def send(self, worker: int, contents: Sequence[Any]) -> None:
        for content in contents:
            if isinstance(content, Done):
                if content.reason == "diverged":
                    raise DivergedError(content.step, "a gradient, a parameter or its state is not finite")
                if content.reason != "reached" and not self.workers[worker].zombie:
                    self.outcome.violations.append(f"living worker {worker} ended with {content}")
                continue
            self.flight.append(_Delivery(self.serial, worker, content))
            self.serial += 1

    def retry(self) -> None:
        for i, worker in enumerate(self.workers):
            if not worker.zombie:
                self.send(i, worker.client.retry())

    def deliver(self) -> None:
        at = 0 if self.faults.in_order else self.random.randrange(len(self.flight))
        delivery = self.flight.pop(at)
        if any(d.serial < delivery.serial for d in self.flight):
            self.outcome.reordered += 1
        if not isinstance(delivery.content, self.LOCAL):
            if self.random.random() < self.faults.lose:
                self.outcome.lost += 1
                return
            if self.random.random() < self.faults.duplicate:
                self.outcome.duplicated += 1
                self.flight.append(_Delivery(self.serial, delivery.worker, delivery.content))
                self.serial += 1
        self.outcome.delivered += 1
        self.order.update(_name(delivery).encode())
        self.receive(delivery.worker, delivery.content)

    def receive(self, index: int, content: Any) -> None:
        if isinstance(content, Norms):
            self.shards[index].norms(content)
            self.tell(index)
            return
        worker = self.workers[index]
        if worker.zombie:
            worker.breath -= 1
            if worker.breath < 0:
                return
        if isinstance(content, self.LOCAL):
            self.send(index, self.compute(worker, content))
        elif isinstance(content, Push | SparsePush):
            self.send(index, [self.push(content)])
        elif isinstance(content, Pull | SparsePull):
            self.send(index, [self.shards[content.shard].pull(content)])
        else:
            self.send(index, worker.client.handle(content))

    def push(self, push: Any) -> PushReply:
        shard = self.shards[push.shard]
        version = shard.version
        reply: PushReply = shard.push(push)
        current = tuple(self.truth[push.shard][push.node.slice]) == push.incarnations
        if reply.verdict is Verdict.ACCEPTED and not current:
            taken = f"shard {push.shard} took a push of the dead: step {push.step}, {push.node}"
            self.outcome.violations.append(f"I6: {taken}")
        if shard.version > version and self.random.random() < self.faults.kill:
            self.kill()
        self.tell(push.shard)
        return reply

    def tell(self, shard: int) -> None:
        """Carry what a shard has to say to the others."""
        for norms in self.shards[shard].outbox:
            self.flight.append(_Delivery(self.serial, norms.to, norms))
            self.serial += 1
        self.shards[shard].outbox.clear()

    # -- the invariants

    def check(self) -> None:
        """I2, I4 and I7, from the shards' own records of what they committed."""
        violations = self.outcome.violations
        if len({s.version for s in self.shards}) != 1:
            violations.append(f"I4: shards ended at versions {[s.version for s in self.shards]}")
        for shard in self.shards:
            steps = [c.step for c in shard.commits]
            if len(set(steps)) != len(steps):
                violations.append(f"I2: shard {shard.index} committed a step twice: {steps}")
            for commit in shard.commits:
                if commit.staleness > self.problem.consistency.staleness:
                    violations.append(f"I7: shard {shard.index}, step {commit.step}: {commit.staleness} steps stale")
                virtual = [v for node, _, _ in commit.parts for v in range(node.begin, node.end)]
                if sorted(virtual) != list(range(self.problem.n_virtual)):
                    violations.append(f"I2: shard {shard.index}, step {commit.step}: virtual workers {virtual}")


def _garbage(partial: Partial) -> Partial:
    """What a process pushes whose memory is no longer its own."""
    gradient: Float32 | None = None if partial.gradient is None else partial.gradient + np.float32(1.0)
    return Partial(gradient, partial.loss + 1.0, partial.rows)


def _name(delivery: _Delivery) -> str:
    content = delivery.content
    node = getattr(content, "node", "")
    return f"{delivery.worker} {type(content).__name__} {getattr(content, 'shard', '')} {_step(content)} {node};"


def _step(content: Any) -> int:
    return int(content.step if hasattr(content, "step") else content.version)
