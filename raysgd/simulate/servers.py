"""What befalls server shards: they die, also while they write, and are succeeded; or all return to a checkpoint.

dies ─┬─ its memory is whole ──▶ successor: newest sealed generation, the one before, what it had not told ─┐
      ├─ is lost, or not enough ──▶ its replica, where it has one ──────────────────────────────────────────┤
      └─ that, too ──▶ all shards from the checkpoint, a new timeline ──────────────────────────────────────┤
                                                 fences, clocks, fresh clients ◀── Membership.refence() ◀───┘
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from raysgd.protocol.gate import Commit
from raysgd.protocol.ledger import rollback as open_timeline
from raysgd.protocol.sparse_shard import SparseShard, Store
from raysgd.protocol.stale import StaleShard
from raysgd.protocol.tally import Tally
from raysgd.protocol.update import Cell, Update
from raysgd.simulate import driver, replicas

if TYPE_CHECKING:
    from raysgd.simulate.simulation import Simulation


class Died(Exception):  # noqa: N818 - a fault, not an error
    """A server's process ends in the middle of an instruction."""


class Dying:
    """An update whose process ends while it writes a generation: some of it is there, the rest is as it was."""

    def __init__(self, update: Update, chance: random.Random) -> None:
        self._update, self._random = update, chance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._update, name)

    def write(
        self, index: int, rate: float, gradients: Any, order: Any, now: Any, target: Sequence[Cell], **how: Any
    ) -> bool:
        made = [(np.empty_like(params), {k: np.empty_like(s) for k, s in state.items()}) for params, state in target]
        self._update.write(index, rate, gradients, order, now, made, **how)
        for (params, state), (new, new_state) in zip(target, made, strict=True):
            for into, values in [(params, new), *((state[k], new_state[k]) for k in state)]:
                written = self._random.randrange(len(into) + 1)
                into[:written] = values[:written]
        raise Died


def remains(sim: Simulation, index: int) -> dict[str, Any]:
    """What is found in a dead shard's memory: the newest generation that was told, and the one before unless it was
    being written over; where staleness is allowed the newest that was sealed, and what is in it. And what it had not
    told the driver."""
    dead = sim.shards[index]
    if isinstance(dead, StaleShard):
        tally = dead.tally()
        rounds = tuple(r for r in tally.rounds if r.step >= sim.told[index])
        return {"generation": dead.cut(), "tally": Tally(tally.clocks, rounds)}
    try:
        previous = dead.snapshot(dead.told - 1)
    except KeyError:
        previous = None
    told = dead.told
    norms = sim.norms[dead].get(told - 1)
    return {
        "generation": dead.snapshot(told),
        "previous": previous,
        "commits": untold(sim, index, told),
        "last_norms": None if norms is None else (told - 1, norms),
    }


def untold(sim: Simulation, index: int, version: int) -> list[Commit]:
    """What a shard committed before ``version`` and did not tell the driver."""
    return [commit for commit in sim.shards[index].commits if sim.told[index] <= commit.step < version]


class DyingStore(Store):
    """What a sparse shard writes in place, whose process ends on the way. left: blocks that it still writes"""

    left = 0

    @classmethod
    def of(cls, store: Store, chance: random.Random) -> DyingStore:
        made = cls(store.version, store.arrays, store.record)
        made.left = chance.randrange(3)
        return made

    def recover(self) -> None:
        """Some of the record's blocks are written."""
        for _ in self.writes():
            if self.left == 0:
                raise Died
            self.left -= 1
        raise Died


def strike(sim: Simulation, *, memory_lost: bool) -> None:
    """A server will die: at a random moment, or while it writes the next generation."""
    index = sim.random.randrange(len(sim.shards))
    shard = sim.shards[index]
    if not memory_lost and sim.random.random() < 0.5:
        if isinstance(shard, SparseShard):
            shard.store = DyingStore.of(shard.store, sim.random)
        else:
            shard.update = Dying(shard.update, sim.random)
    else:
        sim.outcome.faults["node_loss" if memory_lost else "server_kill"] += 1
        sim.later(sim.random.randrange(60), partial(die, sim, index, memory_lost=memory_lost))


def die(sim: Simulation, index: int, *, memory_lost: bool = False) -> None:
    if index not in sim.down:
        sim.later(sim.random.randrange(40), partial(recover, sim, index))
    sim.down[index] = memory_lost or sim.down.get(index, False)


def recover(sim: Simulation, index: int) -> None:
    """Put a successor in a dead shard's place; when all are there, deal anew."""
    if index not in sim.down:
        return  # all returned to a checkpoint meanwhile
    driver.relieve(sim)
    if not sim.down[index]:
        succeed(sim, index)
    elif not replicas.promote(sim, index):
        roll_back(sim)
    if not sim.down:
        driver.act(sim, sim.membership.refence())


def succeed(sim: Simulation, index: int) -> None:
    """Its replica goes on with the successor; where staleness is allowed that may be further, and another one comes."""
    replace(sim, index, sim.successor(index))
    if isinstance(sim.shards[index], StaleShard):
        sim.replicas[index] = None
    if (replica := sim.replicas[index]) is not None:
        sim.shards[index].copied_to(replica.shard.sequence)
    del sim.down[index]


def replace(sim: Simulation, index: int, shard: Any) -> None:
    """Its incarnations are all 0, as no assignment's are: nobody may push before they are raised."""
    sim.shards[index] = shard
    sim.waiting[index].clear()
    sim.successions[index] += 1
    sim.truth[index] = [0] * sim.problem.n_virtual


def roll_back(sim: Simulation) -> None:
    """All shards return to the checkpoint; what they committed since is void."""
    checkpoint = sim.checkpoint
    sim.outcome.faults["roll-back"] += 1
    lost = max(shard.version for shard in sim.shards) - checkpoint.step
    sim.outcome.recomputed += lost
    if sim.faults.checkpoint_every and lost > sim.faults.checkpoint_every:
        sim.violation(f"I5: {lost} steps are lost where checkpoints are {sim.faults.checkpoint_every} apart")
    for i, span in enumerate(sim.spans):
        more = {} if sim.tallies[i] is None else {"tally": sim.tallies[i]}
        replace(sim, i, sim.make_shard(i, checkpoint.cut(span), **more))
        sim.replicas[i] = None
    sim.timeline = open_timeline(sim.outcome.ledger, sim.problem.rule.rounds.begin(checkpoint.step)).timeline
    sim.told = [checkpoint.step] * len(sim.shards)
    sim.down.clear()
