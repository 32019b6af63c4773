"""What a driver does: it carries out Membership's decisions, ends segments of steps, and keeps checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from raysgd.protocol.gate import Commit
from raysgd.protocol.generation import join
from raysgd.protocol.ledger import entry, extend
from raysgd.protocol.membership import Assign, Assignment, Committed, Decision, Fail, Kill, Left, Start, Stillborn, Wait
from raysgd.simulate import replicas

if TYPE_CHECKING:
    from raysgd.simulate.simulation import Simulation


def boundary(sim: Simulation, step: int) -> int:
    """The version at which the segment that begins at ``step`` ends."""
    every = sim.faults.checkpoint_every
    return min(sim.until, (step // every + 1) * every) if every else sim.until


def act(sim: Simulation, decisions: Sequence[Decision]) -> None:
    for decision in decisions:
        if isinstance(decision, Assign):
            assign(sim, decision.assignments)
        elif isinstance(decision, Start):
            for _ in range(decision.count):
                sim.later(sim.random.randrange(60) + int(10 * decision.after_s), partial(come, sim))
        elif isinstance(decision, Kill):
            sim.later(sim.random.randrange(20), partial(sim.take, Left(decision.worker, "killed")))
        elif isinstance(decision, Wait):
            relieve(sim)
        else:
            assert isinstance(decision, Fail)
            sim.violation(f"the run failed: {decision.why}")


def come(sim: Simulation) -> None:
    """A worker that was asked for: it is up, or died on the way."""
    if sim.random.random() < sim.faults.stillborn:
        sim.outcome.faults["stillborn"] += 1
        sim.take(Stillborn("it died while it started"))
    else:
        sim.join()


def relieve(sim: Simulation) -> None:
    """Whoever carried virtual workers does so no longer, but does not know it yet."""
    sim.current = []


def assign(sim: Simulation, assignments: Sequence[Assignment]) -> None:
    """Raise the incarnations at every shard, then read the clocks and begin. Not while a shard is down: the recovery
    deals again."""
    relieve(sim)
    if sim.down:
        return
    for shard in range(len(sim.shards)):
        fence(sim, shard, assignments)
        for _ in range(0 if sim.faults.in_order else sim.random.randrange(4)):
            if sim.network.flight and not sim.over:
                sim.deliver()
        if sim.down:
            return
    replicas.fill(sim)
    for seat in sim.seats:
        seat.zombie = True
    for assignment in assignments:
        sim.start(assignment)


def fence(sim: Simulation, shard: int, assignments: Sequence[Assignment]) -> None:
    """A fence may come again, late, but to the same process alone: a successor has another address."""
    for a in assignments:
        raise_it = partial(sim.shards[shard].fence, a.run, a.incarnations[0])
        raise_it()
        sim.truth[shard][a.run.slice] = a.incarnations
        if sim.random.random() < sim.faults.duplicate:
            sim.later(sim.random.randrange(300), raise_it)


def arrive(sim: Simulation) -> None:
    """A segment has ended: a checkpoint, and the next one under the same assignments."""
    poll(sim)
    if sim.over:
        return
    versions = [shard.version for shard in sim.shards]
    if versions != [sim.goal] * len(versions):
        sim.violation(f"I4: shards at versions {versions} where all workers reached {sim.goal}")
        return
    sim.checkpoint = join([shard.snapshot(sim.goal) for shard in sim.shards])
    sim.tallies = [None] * len(sim.shards)
    sim.over = sim.goal == sim.until
    if sim.over:
        return
    sim.goal = boundary(sim, sim.goal)
    assignments = [sim.seats[index].client.assignment for index in sim.current]
    relieve(sim)
    for assignment in assignments:
        sim.start(assignment)


def midway(sim: Simulation) -> None:
    """A checkpoint between two boundaries: everybody stops, and goes on under new incarnations."""
    poll(sim)
    step = min(int(shard.told_clocks.min()) for shard in sim.shards)
    if sim.over or sim.down or not sim.current or step <= sim.checkpoint.step:
        return
    sim.outcome.faults["midway"] += 1
    if sim.problem.consistency.exact:
        sim.checkpoint = join([shard.snapshot(step) for shard in sim.shards])
    else:
        cuts = [shard.cut() for shard in sim.shards]
        sim.checkpoint = join([replace(cut, step=step) for cut in cuts])
        sim.tallies = [shard.tally().since(step) for shard in sim.shards]
    act(sim, sim.membership.refence())


def poll(sim: Simulation) -> None:
    """Ask the shards what they committed since, and note what all of them did; not while one of them is dead."""
    if sim.down:
        return
    found = [shard.drain(told) for shard, told in zip(sim.shards, sim.told, strict=True)]
    until = min(commits[-1].step + 1 if commits else told for commits, told in zip(found, sim.told, strict=True))
    for i, commits in enumerate(found):
        for commit in commits:
            if commit.step < until:
                note(sim, i, commit)
    sim.take(Committed(min(sim.told)))


def note(sim: Simulation, shard: int, commit: Commit) -> None:
    if commit.staleness > sim.problem.consistency.staleness:
        sim.violation(f"I7: shard {shard}, step {commit.step}: {commit.staleness} steps stale")
    record = entry(commit, attempt=0, generation=sim.successions[shard], timeline=sim.timeline, shard=shard)
    steps = sim.problem.rule.rounds.steps(commit.step)
    extend(sim.outcome.ledger, replace(record, begin=steps.start, end=steps.stop))
    sim.told[shard] = max(sim.told[shard], commit.step + 1)
