"""The worker actor: reads its rows, runs its own loop against the servers, scores validation blocks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from raysgd.data.dataset import Dataset
from raysgd.data.encode import Encoder
from raysgd.data.loader import Loader
from raysgd.data.moments import ShardStatistics, shard_statistics
from raysgd.data.sampler import Sampler
from raysgd.errors import RunError
from raysgd.learn.batch import Batch, Float32
from raysgd.learn.metrics import BlockScore, pooled
from raysgd.learn.models.base import ValueAndGrad
from raysgd.learn.models.hashed import BoundHashed
from raysgd.learn.parameters import Range
from raysgd.protocol.client import Client, Compute, Done, Instruction
from raysgd.protocol.compute import LocalSteps, subtree_sums
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.membership import Assignment
from raysgd.protocol.messages import Request
from raysgd.protocol.sparse import SparsePull, SparseReply
from raysgd.protocol.sparse_client import SparseClient
from raysgd.protocol.tree import cover
from raysgd.runtime.place import here
from raysgd.runtime.process import die_with_parent
from raysgd.runtime.relay import NodeRelay, Traffic, actor_calls
from raysgd.runtime.report import LoopReport
from raysgd.runtime.shared import BoardAddress, SharedMemory, SlotsAddress
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


def train_loop(
    client: Client,
    transport: Transport,
    learner: ValueAndGrad,
    batch: Callable[[int, int], Batch | None],
    local: LocalSteps | None = None,
    ahead: Callable[[int], None] | None = None,
) -> LoopReport:
    """Carry out the client's instructions until it is done.

    Requests go out before a gradient is computed, and answers that are there by then are taken first; without a
    gradient to compute the worker waits.

    ahead: draws the rows of a step, which is done while the servers apply the one before
    """
    rows, compute_s, wait_s = 0, 0.0, 0.0
    scratch: list[Float32] = []
    requests, compute = _sorted(client.begin())
    while client.done is None:
        began = time.perf_counter()
        if requests or compute is None:
            replies = transport.exchange(requests, wait=False)
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
            sums = subtree_sums(learner, compute, batch, local, transport.outputs(compute.step), scratch)
            rows += sum(s.rows for s in sums)
            requests, compute = _sorted(client.computed(compute.step, sums))
            compute_s += time.perf_counter() - began
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

    def pid(self) -> int:
        return os.getpid()

    def statistics(self, dataset: Dataset, shards: Sequence[int], vocabularies: bool = True) -> list[ShardStatistics]:
        """One pass over these data shards."""
        return [shard_statistics(dataset, shard, vocabularies=vocabularies) for shard in shards]

    def site(self) -> str | None:
        """The name of this node: processes of the same name can share memory."""
        return here()

    def relay_to(
        self, servers: Mapping[int, Any], spans: Sequence[Range], n_virtual: int, version: int
    ) -> dict[int, BoardAddress]:
        """Stand in on this node for servers of other nodes from ``version`` on; returns the boards."""
        if self.relay is not None:
            self.relay.close()
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

    def connect(self, assignment: Assignment) -> bool:
        """Open the way to the servers; whether it is shared memory."""
        return not isinstance(self._transport(assignment), ActorCalls)

    def run(self, assignment: Assignment, start: int, until: int) -> LoopReport:
        """Train the assignment's virtual workers from version ``start`` until ``until`` is committed everywhere; both
        count rounds."""
        assert self.task is not None
        if self.relay is not None:
            self.relay.ask(start)
        task = self.task
        if isinstance(task.learner, BoundHashed):
            return self._run_sparse(task, task.learner, assignment, start, until)
        client = Client(assignment, task.n_virtual, task.spans, start=start, until=until, consistency=task.consistency)
        loader = self._loader(assignment.run)
        ahead = loader.draw if task.local is None else None
        report = train_loop(client, self._transport(assignment), task.learner, loader.batch, task.local, ahead)
        if self.relay is not None:
            self.relay.check()
        if report.done.reason == "reached":
            self.params = (until, client.params)
        return report

    def _run_sparse(
        self, task: Task, learner: BoundHashed, assignment: Assignment, start: int, until: int
    ) -> LoopReport:
        client = SparseClient(assignment, task.n_virtual, task.spans, start=start, until=until)
        return sparse_loop(client, self._transport(assignment), learner, self._loader(assignment.run).batch)

    def score(self, version: int, shards: Sequence[int]) -> tuple[list[BlockScore], int]:
        """Scores of validation shards at the version where the last ``run`` ended, and how many categories were
        unseen."""
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

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
            self.loader = None

    def _transport(self, assignment: Assignment) -> Any:
        """The way to the servers for this assignment; a new assignment gets fresh memory."""
        if self.transport is not None and self.transport[0] == assignment:
            return self.transport[1]
        if self.transport is not None:
            self.transport[1].close()
        transport = self._shared(assignment) or ActorCalls(self.servers)
        self.transport = (assignment, transport)
        return transport

    def _shared(self, assignment: Assignment) -> Any:
        """Shared memory, where the servers are on this node and the system lets processes share it."""
        if self.boards is None:
            return None
        assert self.task is not None
        nodes = cover(assignment.run, self.task.n_virtual)
        incarnations = tuple(assignment.incarnations_of(node) for node in nodes)
        try:
            shared = self._memory(self.task, self.boards, nodes, incarnations)
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
        touched = rows * len(learner.inputs.categories) * learner.width + learner.tail
        capacity = min(learner.layout.n_params, touched)
        return SparseSharedMemory(boards, nodes, incarnations, task.spans, capacity, self._call)

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


WorkerActor = ray.remote(max_restarts=0, max_task_retries=0)(Worker)
