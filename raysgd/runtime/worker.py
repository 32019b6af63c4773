"""The worker actor: reads its rows, runs its own loop against the servers, scores validation blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from raysgd import failpoints
from raysgd.data.dataset import Dataset
from raysgd.data.encode import Encoder
from raysgd.data.loader import Loader
from raysgd.data.moments import ShardStatistics, shard_statistics
from raysgd.data.sampler import Sampler
from raysgd.errors import RunError
from raysgd.learn.batch import Batch, Float32
from raysgd.learn.canary import canary
from raysgd.learn.metrics import BlockScore, pooled
from raysgd.learn.models.base import ValueAndGrad
from raysgd.learn.models.hashed import BoundHashed
from raysgd.learn.parameters import Range
from raysgd.learn.suspect import suspect
from raysgd.plan import Plan
from raysgd.protocol.client import Client, Compute, Done, Instruction
from raysgd.protocol.compute import LocalSteps, subtree_sums
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.membership import Assignment, Share
from raysgd.protocol.messages import Request
from raysgd.protocol.sparse import SparsePull, SparseReply
from raysgd.protocol.sparse_client import SparseClient
from raysgd.runtime.board import BoardAddress
from raysgd.runtime.calls import control
from raysgd.runtime.place import here
from raysgd.runtime.process import Process, die_with_parent
from raysgd.runtime.rates import Meter, Reading
from raysgd.runtime.relay import NodeRelay, Traffic, actor_calls
from raysgd.runtime.report import LoopReport
from raysgd.runtime.shared import SharedMemory, SlotsAddress
from raysgd.runtime.sparse_loop import scores_at, sparse_loop
from raysgd.runtime.sparse_shared import SparseSharedMemory
from raysgd.runtime.transport import ActorCalls, Transport
from raysgd.scoring import score_rows, score_shard


@dataclass(frozen=True)
class Task:
    """What a worker needs besides its assignment; the same for all workers of a run."""

    learner: ValueAndGrad
    encoder: Encoder
    train: Dataset
    validation: Dataset | None
    sampler: Sampler
    n_virtual: int
    spans: tuple[Range, ...]
    #: no window beyond this step is read ahead
    end_step: int
    cache_bytes: int
    consistency: Consistency = field(default_factory=Consistency)
    #: how virtual workers walk by themselves, where a round is several steps
    local: LocalSteps | None = None

    @classmethod
    def of(cls, plan: Plan) -> Task:
        return cls(
            plan.learner,
            plan.encoder,
            plan.tables.train,
            plan.tables.validation,
            plan.sampler,
            plan.spec.train.virtual_workers,
            plan.spans(),
            plan.end_step,
            plan.spec.scaling.cache_bytes,
            plan.consistency,
            plan.local,
        )


def train_loop(
    client: Client,
    transport: Transport,
    learner: ValueAndGrad,
    batch: Callable[[int, int], Batch | None],
    local: LocalSteps | None = None,
    ahead: Callable[[int], None] | None = None,
    meter: Meter | None = None,
) -> LoopReport:
    """Carry out the client's instructions until it is done.

    Requests go out before a gradient is computed, and answers that are there by then are taken first; without a
    gradient to compute the worker waits. Where the transport was stopped the loop ends before the next step.

    ahead: draws the rows of a step, which is done while the servers apply the one before
    """
    rows, compute_s, wait_s, before_s = 0, 0.0, 0.0, 0.0
    scratch: list[Float32] = []
    requests, compute = _sorted(client.begin())
    while client.done is None:
        if transport.stopped():
            return LoopReport(Done("stopped", client.step), rows, compute_s, wait_s)
        began = time.perf_counter()
        if requests or compute is None:
            replies = transport.exchange(requests, wait=False)
            if failpoints.armed and compute is None:
                failpoints.reach("worker.pushed", client.step - 1)
            if not replies and compute is None:
                if ahead is not None and client.step < client.until:
                    ahead(client.step)
                replies = transport.exchange((), wait=True)
            pending = client.retry() if replies is None else [i for reply in replies for i in client.handle(reply)]
            requests, found = _sorted(pending)
            compute = compute or found
            wait_s += time.perf_counter() - began
        if compute is not None and not requests and client.done is None:
            began = time.perf_counter()
            if failpoints.armed:
                failpoints.reach("worker.compute", compute.step)
            sums = subtree_sums(learner, compute, batch, local, transport.outputs(compute.step), scratch)
            rows += sum(s.rows for s in sums)
            if failpoints.armed:
                failpoints.reach("worker.computed", compute.step)
            requests, compute = _sorted(client.computed(compute.step, sums))
            computed_s = time.perf_counter() - began
            compute_s += computed_s
            if meter is not None:
                meter.step(computed_s, computed_s + wait_s - before_s)
                before_s = wait_s
    return LoopReport(client.done, rows, compute_s, wait_s)


def _sorted(instructions: Sequence[Instruction]) -> tuple[list[Request], Compute | None]:
    """What is to be sent, and what is to be computed."""
    requests: list[Request] = []
    compute = None
    for instruction in instructions:
        if isinstance(instruction, Compute):
            compute = instruction
        elif not isinstance(instruction, Done):
            requests.append(instruction)
    return requests, compute


class Worker:
    """One worker: it keeps its decoded windows and the last parameters it pulled between calls."""

    def __init__(self) -> None:
        die_with_parent()
        failpoints.reach("worker.start")
        self.task: Task | None = None
        self.servers: Sequence[Any] = ()
        self.boards: Sequence[BoardAddress] | None = None
        #: actors that read this worker's gradients from its memory
        self.readers: Sequence[Any] = ()
        #: where this worker stands in for servers of other nodes
        self.relay: NodeRelay | None = None
        #: the transport, and the assignment that it serves
        self.transport: tuple[Assignment, Any] | None = None
        self.loader: Loader | None = None
        self.loaded: Range | None = None
        self.params: tuple[int, Float32] | None = None
        #: calls of ``run`` up to this number are to end
        self.stop_at = -1
        self.call = 0
        self.meter = Meter(0)

    @control
    def stop(self, call: int) -> None:
        """End the calls of :meth:`run` up to this number, those that have not begun included."""
        self.stop_at = max(self.stop_at, call)

    @control
    def beat(self) -> Reading:
        """A sign of life, also while ``run`` is running: what was done so far."""
        return self.meter.reading

    @control
    def process(self) -> Process:
        return Process.this()

    @control
    def cpu_ticks(self, process: Process) -> int | None:
        """CPU time of a process of this node."""
        return process.cpu_ticks()

    @control
    def kill(self, process: Process) -> bool:
        """Make the death of a process of this node true; whether it is."""
        return process.kill()

    def statistics(self, dataset: Dataset, shards: Sequence[int], vocabularies: bool = True) -> list[ShardStatistics]:
        """One pass over these data shards."""
        return [shard_statistics(dataset, shard, vocabularies=vocabularies) for shard in shards]

    def site(self) -> str | None:
        """The name of this node: processes of the same name can share memory."""
        return here()

    def relay_to(
        self, servers: Mapping[int, Any], spans: Sequence[Range], n_virtual: int, version: int
    ) -> dict[int, BoardAddress]:
        """Stand in on this node for servers of other nodes from ``version`` on, if any; returns the boards."""
        if self.relay is not None:
            self.relay.close()
            self.relay = None
        if not servers:
            return {}
        self.relay = NodeRelay({shard: actor_calls(s) for shard, s in servers.items()}, spans, n_virtual)
        self.relay.ask(version)
        return self.relay.boards

    def attach(self, slots: SlotsAddress) -> None:
        """Pass on what a worker of this node pushes to servers of other nodes."""
        assert self.relay is not None
        self.relay.attach(slots)

    def traffic(self) -> Traffic | None:
        """What this worker's relay sent and got."""
        return None if self.relay is None else self.relay.traffic()

    def prepare(
        self,
        task: Task,
        servers: Sequence[Any],
        boards: Sequence[BoardAddress] | None,
        readers: Sequence[Any],
    ) -> None:
        """Get ready to run. ``boards``: where the parameters are, if on this node; ``readers``: who attaches slots."""
        self.task, self.servers, self.boards, self.readers = task, servers, boards, readers

    def connect(self, share: Share) -> bool:
        """Open the way to the servers; whether it is shared memory."""
        return not isinstance(self._transport(share), ActorCalls)

    def run(self, share: Share, until: int, call: int = 0) -> LoopReport:
        """Train the share's virtual workers until version ``until`` is committed everywhere; versions count rounds.

        call: the number of this call, for :meth:`stop`
        """
        assert self.task is not None
        if self.relay is not None:
            self.relay.ask(share.start)
        task, self.call = self.task, call
        if isinstance(task.learner, BoundHashed):
            return self._run_sparse(task, task.learner, share, until)
        client = Client(
            share.assignment,
            task.n_virtual,
            task.spans,
            start=share.start,
            until=until,
            consistency=task.consistency,
            nodes=share.nodes,
        )
        loader = self._loader(share.assignment.run)
        ahead = loader.draw if task.local is None else None
        transport = self._transport(share)
        report = train_loop(client, transport, task.learner, loader.batch, task.local, ahead, self.meter)
        if self.relay is not None:
            self.relay.check()
        if report.done.reason in ("reached", "diverged"):
            self.params = (report.done.step, client.params)
        return report

    def _run_sparse(self, task: Task, learner: BoundHashed, share: Share, until: int) -> LoopReport:
        client = SparseClient(share.assignment, task.n_virtual, task.spans, start=share.start, until=until)
        batch = self._loader(share.assignment.run).batch
        return sparse_loop(client, self._transport(share), learner, batch, self.meter)

    def score(self, version: int, shards: Sequence[int]) -> tuple[list[BlockScore], int]:
        """Scores of validation shards at the version where the last ``run`` ended, and how many categories were
        unseen."""
        failpoints.reach("worker.score", version)
        assert self.task is not None
        assert self.task.validation is not None
        task, validation, learner = self.task, self.task.validation, self.task.learner
        if isinstance(learner, BoundHashed):
            assert self.transport is not None
            scores = partial(scores_at, version, learner=learner, transport=self.transport[1], spans=task.spans)
            scored = [score_rows(learner.loss, scores, task.encoder, validation, s) for s in shards]
        else:
            assert self.params is not None
            assert self.params[0] == version, (self.params[0], version)
            scored = [score_shard(learner, self.params[1], task.encoder, validation, s) for s in shards]
        return pooled([s for s, _ in scored]), sum(u for _, u in scored)

    def suspect(self, share: Share, version: int) -> tuple[float, str] | None:
        """Of this worker's rows of the round that could not be applied the one with the largest gradient: its size, and
        where it is. None: it has none of the rows, or no parameters to tell by."""
        assert self.task is not None
        task, worst = self.task, None
        if self.params is None or self.params[0] != version or isinstance(task.learner, BoundHashed):
            return None
        steps = [version] if task.local is None else task.local.rule.rounds.steps(version)
        loader = self._loader(share.assignment.run)
        for step in steps:
            for v in range(share.assignment.run.begin, share.assignment.run.end):
                batch = loader.batch(step, v)
                if batch is None or not len(batch):
                    continue
                found = suspect(task.learner, self.params[1], batch)
                if worst is None or found.size > worst[0]:
                    shard, row = task.sampler.place(int(task.sampler.row_ids(step, v)[found.row]))
                    worst = found.size, f"{task.train.where(shard)}, row {row}"
        return worst

    def canary(self) -> str:
        """SHA-256 of a gradient of this model over made-up rows: equal where processors compute to the same bytes."""
        assert self.task is not None
        return canary(self.task.learner)

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
            self.loader = None

    def _stopped(self) -> bool:
        return self.call <= self.stop_at

    def _transport(self, share: Share) -> Any:
        """The way to the servers for this assignment; a new assignment gets fresh memory."""
        if self.transport is not None and self.transport[0] == share.assignment:
            return self.transport[1]
        if self.transport is not None:
            self.transport[1].close()
            self.transport = None
        transport = self._shared(share) or ActorCalls(self.servers)
        transport.stopped = self._stopped
        self.transport = (share.assignment, transport)
        self.meter = Meter(share.assignment.incarnations[0])
        return transport

    def _shared(self, share: Share) -> Any:
        """Shared memory, where the servers are on this node and the system lets processes share it."""
        if self.boards is None:
            return None
        assert self.task is not None
        incarnations = tuple(share.assignment.incarnations_of(node) for node in share.nodes)
        try:
            shared = self._memory(self.task, self.boards, share.nodes, incarnations)
            ray.get([reader.attach.remote(shared.address) for reader in self.readers], timeout=30.0)
            if self.relay is not None and isinstance(shared, SharedMemory):
                self.relay.attach(shared.address)
        except RunError:  # such as /proc mounted with hidepid: another way serves, to the same bytes
            return None
        return shared

    def _memory(
        self,
        task: Task,
        boards: Sequence[BoardAddress],
        nodes: tuple[Range, ...],
        incarnations: tuple[tuple[int, ...], ...],
    ) -> SharedMemory | SparseSharedMemory:
        learner = task.learner
        if not isinstance(learner, BoundHashed):
            return SharedMemory(boards, nodes, incarnations, task.spans, exact=task.consistency.exact)
        rows = max(len(node) for node in nodes) * task.sampler.rows_per_draw
        return SparseSharedMemory(boards, nodes, incarnations, task.spans, learner.touched(rows), self._call)

    def _call(self, shard: int, pull: SparsePull) -> SparseReply:
        """A pull that shared memory cannot answer, by an actor call."""
        replies: list[SparseReply] = ray.get(self.servers[shard].exchange.remote([pull]), timeout=30.0)
        return replies[0]

    def _loader(self, run: Range) -> Loader:
        if self.loader is None or self.loaded != run:
            self.close()
            assert self.task is not None
            task = self.task
            self.loader = Loader(
                task.train, task.encoder, task.sampler, run, cache_bytes=task.cache_bytes, end_step=task.end_step
            )
            self.loaded = run
        return self.loader


#: ``run`` takes one thread; what must be answered meanwhile has another
WorkerActor = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1})(Worker)
