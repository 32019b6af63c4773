"""One attempt at a run: segments of steps, and between them validation and checkpoints.

    train to the next boundary (workers run their own loops) ─▶ validate? ─▶ checkpoint? ─▶ next segment

A boundary is a multiple of ``validate_every`` or ``checkpoint_every``, or the end. During a segment the driver only
watches: it reads the servers' commits, for the ledger and the loss curve. Who trains is the crew's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import isfinite
from typing import Any

import numpy as np

from raysgd import checkpoint as checkpoints
from raysgd.audit import Ledger
from raysgd.errors import DivergedError, InputError, RunError, SaveError
from raysgd.interrupts import held_off
from raysgd.learn.metrics import combine
from raysgd.learn.parameters import Range
from raysgd.learn.schedules import next_multiple
from raysgd.plan import Plan
from raysgd.protocol.gate import Commit
from raysgd.protocol.generation import Generation
from raysgd.protocol.tally import Tally
from raysgd.report.curve import Curve
from raysgd.report.progress import Report
from raysgd.runtime.calls import call
from raysgd.runtime.crew import Crew, RollBackError
from raysgd.runtime.drain import HURRY_S
from raysgd.runtime.gang import Gang
from raysgd.runtime.meters import Carrier, Meters, Standing
from raysgd.runtime.report import LoopReport
from raysgd.scoring import refuse_no_loss
from raysgd.storage import Storage

#: coordinates that are read from a server at a time
PART = 1 << 22


class _CheckpointDueError(Exception):
    """The time has come for a checkpoint."""


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
    #: bytes of ids and values that the workers of a sparse model pulled and pushed, in so many steps
    moved: int = 0
    trained: int = 0
    #: writes checkpoints while training goes on, one at a time
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "raysgd-checkpoint"))
    _saving: Future[None] | None = None
    _saved_at: float = field(default_factory=time.monotonic)
    _saved_step: int = 0
    #: of the commits that were read last
    _staleness: int = 0
    #: the version that the virtual worker furthest ahead had reached when the attempt began
    _ahead: int = 0

    def begin(self, generation: Generation | None, tallies: Sequence[Tally] | None = None) -> None:
        """Start the servers at ``generation`` (None: version 0) and give every worker its virtual workers.

        tallies: by server, what is in the generation beyond its step. The first segment ends where all meet again.
        Raises InputError where the run is to stop before.
        """
        self.step = 0 if generation is None else generation.step
        self._ahead = max((max(tally.clocks) for tally in tallies or ()), default=0)
        if self.plan.rounds.at(self.plan.end_step) < self._ahead:
            reached = self.plan.rounds.begin(self._ahead)
            raise InputError(f"run.stop_after_steps must be at least {reached}, which some workers have reached before")
        assert self.ledger.end(0) == self.step
        self.crew.begin(self.plan.shards(generation, tallies))

    @cached_property
    def crew(self) -> Crew:
        crew = Crew(self.gang, self.plan, lambda: self.curve.step, self.report.say)
        crew.settled = self._settled
        return crew

    @cached_property
    def meters(self) -> Meters:
        return Meters(str(self.plan.spec.run.name))

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.storage, self.attempt, self.step, len(self.plan.spans()))

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
        self.settle()
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
        scored = self.crew.score(self.plan.rounds.at(self.step), len(self.plan.tables.validation.shards))
        metrics = combine([block for blocks, _ in scored for block in blocks])
        refuse_no_loss(metrics, self.plan.tables.validation)
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
        whole, tallies = self.crew.surviving(partial(self._read_state, version))
        generation = replace(whole, step=step)
        assert self.curve.step == step, (self.curve.step, step)
        facts = {**self.plan.facts(), "attempt": self.attempt, "metrics": self._metrics(step)}
        facts |= {"epoch": step / self.plan.steps_per_epoch, "curve": self.curve.open_line}
        facts["canary"] = self.crew.canary
        if tallies is not None:
            facts["tallies"] = checkpoints.tallies_told(version, tallies)
        self.settle()
        try:
            facts["ledger"] = self.ledger.flush()  # before the checkpoint counts: what is in it is told
        except SaveError as error:
            self._unsaved(error)
            return
        self._saved_at, self._saved_step = time.monotonic(), step
        self._saving = self._writer.submit(self._publish, generation, facts)

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is published; what went wrong with it is told or raised.

        A full disk is no reason to stop training: the checkpoint before it stays, and the next may succeed. At the end
        it is one.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except SaveError as error:
            self._unsaved(error)

    def _unsaved(self, error: SaveError) -> None:
        if self.step >= self.plan.end_step:
            raise error
        self.report.say(f"warning: {error}; the checkpoint before it stays")

    def close(self) -> None:
        """Wait for the checkpoint that is being written, however the attempt ended."""
        self._writer.shutdown(wait=True)

    def _publish(self, generation: Generation, facts: dict[str, Any]) -> None:
        """Write a checkpoint, while training goes on."""
        saved = checkpoints.save(self.storage, generation, self.plan.learner.layout, facts)
        checkpoints.prune(self.storage, self.plan.spec.run.checkpoint_config.num_to_keep)
        self.on_checkpoint(generation.step, saved.digest())

    def _read_state(self, version: int) -> tuple[Generation, list[Tally] | None]:
        """Parameters and state of all servers at a version; where staleness is allowed as they are, with what is in
        them unless they are all of that version."""
        if self.plan.consistency.exact:
            return self._read_parts(version, lambda server, part: server.snapshot.remote(version, part)), None
        while True:
            before = self._tallies()
            whole = self._read_parts(version, lambda server, part: server.cut.remote(part))
            if [n for n, _ in self._tallies()] == [n for n, _ in before]:  # else pushes came that were on their way
                break
        tallies = [tally for _, tally in before]
        met = all({*tally.clocks} == {version} for tally in tallies)
        return whole, None if met else tallies

    def _tallies(self) -> list[tuple[int, Tally]]:
        asked = [server.tally.remote() for server in self.gang.server_actors]
        found: list[tuple[int, Tally]] = self.gang.call(asked, "reading the clocks")
        return found

    def _read_parts(self, version: int, read: Callable[[Any, Range], Any]) -> Generation:
        """The whole from parts of coordinates, so that there is one copy of it."""
        n_params, slots = self.plan.learner.layout.n_params, self.plan.spec.optimizer.slots
        state = {slot: np.empty(n_params, np.float32) for slot in slots}
        whole = Generation(version, np.empty(n_params, np.float32), state)
        for server, span in zip(self.gang.server_actors, self.plan.spans(), strict=True):
            for begin in range(0, len(span), PART):
                part = Range(begin, min(begin + PART, len(span)))
                [found] = self.gang.call([read(server, part)], "reading the servers' state")
                whole.block(slice(span.begin + part.begin, span.begin + part.end)).take(found)
        return whole

    def halt(self) -> None:
        """Stop where the run stands, with a checkpoint: frozen shards differ by one version at most, and the
        smaller one is sealed by all. Where staleness is allowed the smallest clock is, and what is beyond it is told.
        """
        frozen = min(call([s.freeze.remote() for s in self.gang.server_actors], "freezing the servers", timeout=5.0))
        committed = self.plan.rounds.begin(frozen)
        self._read_commits(below=committed)
        self.settle()
        if committed > 0 and committed not in checkpoints.steps(self.storage):
            self.save(committed)
            self.settle()
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
        """The next step at which something is due and nobody is beyond it: where a round ends."""
        until = self.step
        while until < self.plan.end_step:
            until = min(self.plan.end_step, *(self.plan.rounds.after(self._next(name, until)) for name in names))
            if self.plan.rounds.at(until) >= self._ahead:
                break
        return until

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
        while (ended := self._run(begin, end)) is None:
            self._save_midway()
        self.crew.surviving(partial(self._read_commits, until))
        for report in ended:
            if report.done.reason == "diverged":
                raise self._diverged(report.done.step)
        self.moved += sum(report.moved for report in ended)
        self.trained += until - self.step
        for report in ended:
            if report.done.reason != "reached":
                raise RunError(f"a worker ended at step {report.done.step}: {report.done.reason}")
        self.step = until

    def _run(self, begin: int, end: int) -> list[LoopReport] | None:
        """Train from version ``begin`` to ``end``; None where the time has come for a checkpoint in between."""
        try:
            return self.crew.run(begin, end, self._tick)
        except _CheckpointDueError:
            return None

    def _tick(self) -> None:
        self._read_commits()
        self.meters.tell(self._standing())
        seconds = self.plan.spec.run.checkpoint_seconds
        if self.crew.notices.hurry:
            seconds = min(HURRY_S, seconds or HURRY_S)
        due = seconds is not None and time.monotonic() - self._saved_at >= seconds
        new = self.crew.running and self.curve.step > self._saved_step
        if due and new and self._saving_is_over():
            raise _CheckpointDueError
        if self.crew.running and self.crew.notices.leaving:
            raise _CheckpointDueError

    def _saving_is_over(self) -> bool:
        return self._saving is None or self._saving.done()

    def _save_midway(self) -> None:
        """A checkpoint of the newest version that all servers hold, between two boundaries."""
        version = self.crew.pause()
        step = self.plan.rounds.begin(version)
        self.crew.surviving(partial(self._read_commits, step))
        self.ledger.midway(step)
        if step > 0 and step == self.curve.step:
            self.save(step)
        if self.crew.notices.leaving:
            self._leave(step)
        self.crew.resume()
        self._saved_at = time.monotonic()

    def _leave(self, step: int) -> None:
        """Have all begin anew elsewhere, from where they stand; not where that could not be saved."""
        why = self.crew.notices.leaving
        self.settle()
        if step == 0 or step in checkpoints.steps(self.storage):
            raise RollBackError(f"{why}: no step is lost", charged=False)
        self.report.say(f"{why}; without a checkpoint its servers stay as long as they can")
        self.crew.notices.stay()

    def _diverged(self, version: int) -> DivergedError:
        """What to say of the round that could not be applied."""
        self.settle()
        suspect, saved = self.crew.suspect(version), checkpoints.steps(self.storage)
        said = "a gradient, a parameter or the optimizer's state became NaN or infinite"
        if suspect is not None:
            size, where = suspect
            how = f"has the largest gradient ({size:.3g})" if isfinite(size) else "has a gradient that is not finite"
            said += f"; of its rows {where}, {how}"
        kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "there is no checkpoint yet"
        remedy = "First lower the learning rate; then look for extreme values in the data"
        return DivergedError(self.plan.rounds.begin(version), f"{said}; {kept}. {remedy}")

    def _read_commits(self, below: int | None = None) -> None:
        """Take the new commits of steps below ``below`` into the ledger, those of shard 0 into the curve.

        below: default: the first step that not every server tells of
        """
        before, rounds, servers = self.curve.step, self.plan.rounds, self.gang.server_actors
        since = [before, *(self.ledger.end(i) for i in range(1, len(servers)))]
        reading = [s.commits.remote(rounds.at(step)) for s, step in zip(servers, since, strict=True)]
        by_server = [self._in_steps(found) for found in self.gang.call(reading, "reading the commits")]
        first = by_server[0]
        if below is None:
            ends = [c[-1].step + c[-1].steps if c else begin for c, begin in zip(by_server, since, strict=True)]
            below = min(ends)
        self._staleness = max((c.staleness for c in first), default=0)
        with held_off():  # what is in the curve is not asked for again: it must be in the ledger, too
            self.curve.extend([c for c in first if c.step < below])
            for shard, commits in enumerate(by_server):
                counted = [c for c in commits if c.step < self.curve.step]
                self.ledger.take(shard, counted, self.crew.parts(), self.gang.replaced[shard])
        if self.curve.step > before:
            self.crew.committed(self.curve.step)
            if self.curve.recent is not None:
                self.report.train(self.curve.step, **self.curve.recent)

    def _standing(self) -> Standing:
        """How the run stands, for its metrics."""
        plan, gang, crew = self.plan, self.gang, self.crew
        told = {n: gang.workers[n].pulse.told for n in crew.shares if n in gang.workers}
        carriers = {
            n: Carrier(len(share.assignment.run), len(share.nodes), told[n])
            for n, share in crew.shares.items()
            if n in told
        }
        return Standing(
            step=self.curve.step,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
            attempt=self.attempt,
            recent=self.curve.recent,
            valid_loss=self.scores[max(self.scores)]["loss"] if self.scores else None,
            staleness=self._staleness,
            workers=len(gang.workers),
            awaited=len(gang.asked),
            checkpoint_step=self._saved_step,
            checkpoint_age_s=time.monotonic() - self._saved_at,
            push_bytes=0 if plan.sparse else 4 * plan.learner.layout.n_params,
            carriers=carriers,
            server_steps=tuple(self.ledger.end(i) for i in range(len(gang.servers))),
            server_replaced=tuple(gang.replaced),
        )

    def _in_steps(self, commits: list[Commit]) -> list[Commit]:
        """Commits of rounds as commits of steps."""
        rounds = self.plan.rounds
        return [c._replace(step=rounds.begin(c.step), steps=len(rounds.steps(c.step))) for c in commits]

    def _settled(self, version: int) -> None:
        """Everybody has stopped and others will carry on: what was committed is noted under who committed it."""
        self._read_commits(self.plan.rounds.begin(version))
        self.ledger.flush()
