"""One attempt at a run: segments of steps, and between them validation and checkpoints.

    train to the next boundary (workers run their own loops) ─▶ validate? ─▶ checkpoint? ─▶ next segment

A boundary is a multiple of ``validate_every`` or ``checkpoint_every``, or the end. During a segment the driver only
watches: it reads the commits of server shard 0 for the loss curve, and ends the attempt when an actor dies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import numpy as np

from raysgd import checkpoint as checkpoints
from raysgd.errors import DivergedError, RunError
from raysgd.learn.metrics import combine
from raysgd.learn.parameters import Range
from raysgd.learn.schedules import next_multiple
from raysgd.plan import Plan
from raysgd.protocol.generation import Generation, join
from raysgd.protocol.membership import Assignment, Membership, deal
from raysgd.report.curve import Curve
from raysgd.report.progress import Report
from raysgd.runtime.gang import Gang, call, gather, same_node
from raysgd.runtime.report import LoopReport
from raysgd.runtime.worker import Task
from raysgd.storage import Storage

#: coordinates of a sparse model that are read from a server at a time
PART = 1 << 22


@dataclass
class Attempt:
    """Carries a run from the generation it begins with to its end. ``step`` is the version that all servers hold."""

    plan: Plan
    storage: Storage
    report: Report
    curve: Curve
    gang: Gang
    attempt: int
    on_checkpoint: Callable[[int, str], None]
    step: int = 0
    #: validation metrics by step
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    assignments: list[Assignment] = field(default_factory=list)
    #: bytes of ids and values that the workers of a sparse model pulled and pushed, in so many steps
    moved: int = 0
    trained: int = 0

    def begin(self, generation: Generation | None) -> None:
        """Start the servers at ``generation`` (None: version 0) and give every worker its virtual workers."""
        plan, gang = self.plan, self.gang
        self.step = 0 if generation is None else generation.step
        gang.begin(plan.shards(generation), plan.spans(), plan.buffers)
        task = Task(
            plan.learner,
            plan.encoder,
            plan.tables.train,
            plan.tables.validation,
            plan.sampler,
            plan.spec.train.virtual_workers,
            plan.spans(),
            self.plan.end_step,
            plan.spec.scaling.cache_bytes,
            plan.consistency,
            plan.local,
        )
        if plan.consistency.exact and not plan.sparse:  # relays copy whole vectors
            gang.relay(plan.spans(), plan.spec.train.virtual_workers, plan.rounds.at(self.step))
        boards = [same_node(site, gang.reachable(i)) for i, site in enumerate(gang.sites)]
        prepared = [
            w.prepare.remote(task, gang.servers, boards[i], gang.readers(i)) for i, w in enumerate(gang.workers)
        ]
        call(prepared, "preparing the workers")
        membership = Membership(plan.spec.train.virtual_workers)
        runs = deal(plan.spec.train.virtual_workers, len(gang.workers))
        self.assignments = [membership.assign(worker, run) for worker, run in enumerate(runs)]
        fences = [s.fence.remote(a.run, a.incarnations[0]) for s in gang.servers for a in self.assignments]
        call(fences, "fencing")
        connected = [w.connect.remote(a) for w, a in zip(gang.workers, self.assignments, strict=True)]
        sharing = sum(call(connected, "connecting the workers"))
        if sharing < len(gang.workers):
            self.report.say(f"{sharing} of {len(gang.workers)} workers share memory on their node")

    def run(self) -> None:
        """Train to the end, with validation and checkpoints on the way."""
        self.report.start(self.step, self.plan.total_steps)
        if self._unscored():
            # Scores the untrained model, and so finds what is wrong with the validation data before step 1; or does
            # what an attempt that was interrupted at a boundary had left to do.
            self._train_to(self.step)
            self.validate()
            if self.step > 0:
                self.save(self.step)
        while self.step < self.plan.end_step:
            self._train_to(self._boundary("validate_every", "checkpoint_every"))
            last = self.step == self.plan.end_step
            if self.plan.tables.validation is not None and (last or self._due("validate_every")):
                self.validate()
            if last or self._due("checkpoint_every"):
                self.save(self.step)
        if self.plan.sparse and self.trained:
            self.report.say(
                f"{self.moved / self.trained:,.0f} bytes moved a step: ids and values of what its rows touch"
            )
        self.curve.flush(interim=self.step < self.plan.total_steps)
        for line in self.gang.traffic():
            self.report.say(f"between nodes: {line}")

    def validate(self) -> None:
        """Score the validation data at the version that was just reached, shared out over the workers."""
        assert self.plan.tables.validation is not None
        shares = self.gang.shares(len(self.plan.tables.validation.shards))
        version = self.plan.rounds.at(self.step)
        calls = [w.score.remote(version, share) for w, share in zip(self.gang.workers, shares, strict=True)]
        scored = gather(calls, "validation", self._watch)
        metrics = combine([block for blocks, _ in scored for block in blocks])
        unseen = sum(count for _, count in scored)
        if unseen:
            metrics["unseen"] = unseen
        due = self._due("validate_every") or self.step == self.plan.total_steps
        self.curve.validation(self.step, metrics, interim=not due)
        self.scores[self.step] = metrics  # after the line: what the manifest says is scored has its line
        self.report.validation(self.step, metrics)

    def save(self, step: int) -> None:
        """Write a checkpoint of a version that every server holds."""
        version = self.plan.rounds.at(step)
        generation = replace(self._snapshot(version), step=step)
        assert self.curve.step == step, (self.curve.step, step)
        facts = {**self.plan.facts(), "attempt": self.attempt, "metrics": self._metrics(step)}
        facts |= {"epoch": step / self.plan.steps_per_epoch, "curve": self.curve.open_line}
        saved = checkpoints.save(self.storage, generation, self.plan.learner.layout, facts)
        checkpoints.prune(self.storage, self.plan.spec.run.checkpoint_config.num_to_keep)
        self.on_checkpoint(step, saved.digest())

    def _snapshot(self, version: int) -> Generation:
        """Parameters and state of all servers at a version; of a sparse model in parts, so that there is one copy."""
        servers, reading = self.gang.servers, "reading the servers' state"
        if not self.plan.sparse:
            return join(call([s.snapshot.remote(version) for s in servers], reading))
        n_params = self.plan.learner.layout.n_params
        slots = self.plan.spec.optimizer.slots
        whole = Generation(
            version, np.empty(n_params, np.float32), {slot: np.empty(n_params, np.float32) for slot in slots}
        )
        for server, span in zip(servers, self.plan.spans(), strict=True):
            for begin in range(0, len(span), PART):
                part = Range(begin, min(begin + PART, len(span)))
                found = call([server.part.remote(version, part)], reading)[0]
                into = whole.block(slice(span.begin + part.begin, span.begin + part.end))
                into.params[...] = found.params
                for slot in slots:
                    into.state[slot][...] = found.state[slot]
        return whole

    def halt(self) -> None:
        """Stop where the run stands, with a checkpoint: frozen shards differ by one version at most, and the
        smaller one is sealed by all.

        Not where staleness is allowed: there a shard holds parts of many steps, and only at the end of a segment, when
        all workers have met, is it a version. Such a run goes back to its last checkpoint.
        """
        frozen = min(call([s.freeze.remote() for s in self.gang.servers], "freezing the servers", timeout=5.0))
        committed = self.plan.rounds.begin(frozen)
        if not self.plan.consistency.exact and committed != self.step:
            self.report.say(f"staleness is allowed: the run continues from its last checkpoint, not from {committed:,}")
            committed = self.step
        self._read_commits(below=committed)
        if committed > 0 and committed not in checkpoints.steps(self.storage):
            self.save(committed)
        self.curve.flush(interim=committed < self.plan.total_steps)
        self.step = committed

    def _unscored(self) -> bool:
        """Whether the step that the attempt begins with should have been validated and was not."""
        if self.plan.tables.validation is None or self.step in self.scores:
            return False
        return self._due("validate_every") or self.step in (0, self.plan.end_step)

    def _metrics(self, step: int) -> dict[str, Any]:
        """What the manifest says of the validation; JSON has no NaN and no infinity: they become null."""
        scores = self.scores.get(step, {}).items()
        return {f"valid_{name}": value if isfinite(value) else None for name, value in scores}

    def _boundary(self, *names: str) -> int:
        """The next step at which something is due: where a round ends."""
        return min(self.plan.end_step, *(self.plan.rounds.after(self._next(name, self.step)) for name in names))

    def _due(self, name: str) -> bool:
        """Whether it has become due since the round before."""
        rounds = self.plan.rounds
        before = rounds.begin(rounds.at(self.step) - 1)
        return self._next(name, before) <= self.step

    def _next(self, name: str, after: int) -> int:
        return next_multiple(getattr(self.plan.spec.run, name), self.plan.steps_per_epoch, after)

    def _train_to(self, until: int) -> None:
        self.curve.resume()
        begin, end = self.plan.rounds.at(self.step), self.plan.rounds.at(until)
        calls = [w.run.remote(a, begin, end) for w, a in zip(self.gang.workers, self.assignments, strict=True)]
        ended: list[LoopReport] = gather(calls, f"training steps {self.step} to {until}", self._watch)
        self._read_commits(below=until)
        for report in ended:
            if report.done.reason == "diverged":
                saved = checkpoints.steps(self.storage)
                raise DivergedError(
                    self.plan.rounds.begin(report.done.step),
                    "a gradient, a parameter or the optimizer's state became NaN or infinite; "
                    + (f"the checkpoint of step {saved[-1]} is kept" if saved else "there is no checkpoint yet")
                    + ". First lower the learning rate; then look for extreme values in the data",
                )
        self.moved += sum(report.moved for report in ended)
        self.trained += until - self.step
        for worker, report in enumerate(ended):
            if report.done.reason != "reached":
                raise RunError(f"worker {worker} ended at step {report.done.step}: {report.done.reason}")
        self.step = until

    def _watch(self) -> None:
        self.gang.check_servers()
        self._read_commits()

    def _read_commits(self, below: int | None = None) -> None:
        """Take shard 0's new commits of steps below ``below`` into the curve.

        Unless the caller knows better, the newest is left out: shard 0 alone has it for certain, while the pushes that
        completed it prove that all shards sealed the step before.
        """
        before, rounds = self.curve.step, self.plan.rounds
        since = rounds.at(before)
        commits = call([self.gang.servers[0].commits.remote(since)], "reading the commits of server 0")[0]
        in_steps = [c._replace(step=rounds.begin(c.step), steps=len(rounds.steps(c.step))) for c in commits]
        self.curve.extend(in_steps[:-1] if below is None else [c for c in in_steps if c.step < below])
        if self.curve.step > before and self.curve.recent is not None:
            self.report.train(self.curve.step, **self.curve.recent)
