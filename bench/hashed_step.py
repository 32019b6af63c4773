"""One step of logistic regression on hashed categories, the state machines in one process: 2^22 against 2^26.

26 categories, of which few are frequent, and 13 numbers a row; AdaGrad; ids hashed beforehand. CPU time of the process,
beside a plain numpy loop (``np.unique``, ``bincount``, no protocol). Bytes: ids and values pulled and pushed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import process_time

import numpy as np

from bench.measure import Asked, Figures, table
from raysgd.learn.batch import Batch, Inputs, Target
from raysgd.learn.models import HashedLogisticRegression
from raysgd.learn.models.hashed import BoundHashed
from raysgd.learn.parameters import even_split
from raysgd.learn.transforms import AdaGrad
from raysgd.protocol.membership import Assignment, deal
from raysgd.protocol.sparse import SparsePull, SparsePush
from raysgd.protocol.sparse_client import SparseClient, SparseCompute, Touch
from raysgd.protocol.sparse_compute import Touched, sparse_sums, touch
from raysgd.protocol.sparse_shard import SparseShard, make_sparse_shard
from raysgd.protocol.update import PlannedRows, Rule

CATEGORIES, NUMBERS = 26, 13
BATCH, WORKERS, SERVERS, STEPS = 4096, 2, 2, 40


def rows_of(bits: int, n_rows: int) -> Batch:
    """Rows whose categories follow Zipf's law, hashed to ``bits``."""
    random = np.random.default_rng(0)
    values = random.zipf(1.25, (n_rows, CATEGORIES)).astype(np.uint64) * np.uint64(CATEGORIES)
    values += np.arange(CATEGORIES, dtype=np.uint64)
    codes = (values * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - bits)).astype(np.int32)
    numeric = random.standard_normal((n_rows, NUMBERS)).astype(np.float32)
    return Batch(numeric, codes, (random.random(n_rows) < 0.3).astype(np.float32))


@dataclass
class Machines:
    """Shards and clients, driven in turn; seconds by part."""

    bits: int
    rows: Batch
    seconds: dict[str, float] = field(default_factory=lambda: {"touch": 0.0, "compute": 0.0, "serve": 0.0})
    moved: int = 0

    def __post_init__(self) -> None:
        inputs = Inputs(NUMBERS, (1 << self.bits,) * CATEGORIES, self.bits)
        self.learner: BoundHashed = HashedLogisticRegression(self.bits).bind(inputs, Target(2))
        rule = Rule(AdaGrad(0.1), lambda _: 0.1, PlannedRows(BATCH, len(self.rows), len(self.rows) // BATCH))
        self.spans = even_split(self.learner.layout.n_params, SERVERS)
        self.shards: list[SparseShard] = [
            make_sparse_shard(i, rule, span, self.learner, n_virtual=WORKERS, seed=0, generation=None)
            for i, span in enumerate(self.spans)
        ]
        self.touched: dict[int, Touched] = {}

    def batch(self, step: int, v: int) -> Batch:
        share = BATCH // WORKERS
        begin = (step * BATCH + v * share) % (len(self.rows) - share)
        return self.rows.slice(begin, begin + share)

    def train(self, steps: int) -> None:
        begin = self.shards[0].version
        clients = [
            SparseClient(Assignment(w, run, (0,) * len(run)), WORKERS, self.spans, start=begin, until=begin + steps)
            for w, run in enumerate(deal(WORKERS, WORKERS))
        ]
        waiting = [(client, list(client.begin())) for client in clients]
        while any(client.done is None for client in clients):
            for client, todo in waiting:
                todo[:] = [i for instruction in todo for i in self.carry_out(client, instruction)]

    def carry_out(self, client: SparseClient, instruction: object) -> list[object]:
        began = process_time()
        if isinstance(instruction, Touch):
            touched = touch(self.learner, instruction.step, instruction.nodes, self.batch)
            self.touched[client.assignment.worker] = touched
            return self.took("touch", began, client.touched(instruction.step, touched.ids))
        if isinstance(instruction, SparseCompute):
            touched = self.touched[client.assignment.worker]
            sums = sparse_sums(self.learner, touched, instruction.values, instruction.nodes)
            self.moved += (
                touched.ids.nbytes + instruction.values.nbytes + sum(s.vector.nbytes for s in sums if s.vector)
            )
            return self.took("compute", began, client.computed(instruction.step, sums))
        if isinstance(instruction, SparsePush):
            return self.took("serve", began, client.handle(self.shards[instruction.shard].push(instruction)))
        if isinstance(instruction, SparsePull):
            return self.took("compute", began, client.handle(self.shards[instruction.shard].pull(instruction)))
        return []

    def took(self, part: str, began: float, result: list[object]) -> list[object]:
        self.seconds[part] += process_time() - began
        return result


def plain(bits: int, rows: Batch) -> Callable[[int], None]:
    """The same training as a loop of numpy on one core."""
    w, squares = np.zeros(1 << bits, np.float32), np.zeros(1 << bits, np.float32)
    v = np.zeros(NUMBERS, np.float32)

    def step(index: int) -> None:
        begin = index * BATCH % (len(rows) - BATCH)
        b = rows.slice(begin, begin + BATCH)
        ids, inverse = np.unique(b.codes, return_inverse=True)
        old = w[ids]
        z = old[inverse.reshape(b.codes.shape)].sum(axis=1) + b.numeric @ v
        delta = 1 / (1 + np.exp(-z)) - b.label
        g = np.bincount(inverse.ravel(), np.repeat(delta, CATEGORIES), len(ids)) / BATCH
        squares[ids] += g * g
        w[ids] = old - 0.1 * g / (np.sqrt(squares[ids]) + 1e-10)
        v[...] -= 0.1 * (delta @ b.numeric) / BATCH

    return step


class Contestant:
    """One size: the machines and the plain loop, measured now and then."""

    def __init__(self, bits: int) -> None:
        rows = rows_of(bits, 40 * BATCH)
        self.machines, self.loop = Machines(bits, rows), plain(bits, rows)
        self.parts: dict[str, list[float]] = {name: [] for name in (*self.machines.seconds, "all", "plain")}
        self.machines.train(STEPS)  # warm

    def measure(self) -> None:
        machines = self.machines
        machines.seconds = dict.fromkeys(machines.seconds, 0.0)
        began = process_time()
        machines.train(STEPS)
        self.parts["all"].append(1e3 * (process_time() - began) / STEPS)
        for name, seconds in machines.seconds.items():
            self.parts[name].append(1e3 * seconds / STEPS)
        began = process_time()
        for i in range(STEPS):
            self.loop(i)
        self.parts["plain"].append(1e3 * (process_time() - began) / STEPS)


def run(asked: Asked) -> str:
    """A table of CPU milliseconds a step and its parts, and of bytes; the sizes in alternation."""
    contestants = {bits: Contestant(bits) for bits in (22, 26)}
    rounds = asked.rounds
    for turn in range(rounds):
        for bits in contestants if turn % 2 == 0 else reversed(contestants):
            contestants[bits].measure()
    lines = []
    for bits, c in contestants.items():
        figures = [Figures(tuple(c.parts[name])) for name in ("touch", "compute", "serve", "all", "plain")]
        lines.append([f"2^{bits}", *figures, f"{c.machines.moved / STEPS / (rounds + 1):,.0f}"])
        assert c.machines.shards[0].version == (rounds + 1) * STEPS
    head = ["weights", "touch, ms", "compute", "serve", "a step in all", "plain numpy", "bytes moved"]
    text = f"Batches of {BATCH:,} rows, {WORKERS} workers, {SERVERS} servers, CPU time of one process.\n\n"
    ratio = Figures(tuple(contestants[26].parts["all"])).ratio(Figures(tuple(contestants[22].parts["all"])))
    return text + table(head, lines) + f"\n\n2^26 / 2^22: {ratio}"
