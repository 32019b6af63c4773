"""The simulator is an oracle only if it sees bugs: they are planted one at a time, and must show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hostile import STEPS, V, bsp_loss, problem, truth, wrong

from raysgd import simulate_sparse
from raysgd.errors import DivergedError
from raysgd.learn.batch import Batch, Float32, Int64
from raysgd.learn.parameters import Range
from raysgd.protocol import membership as membership_module
from raysgd.protocol import sparse_shard as sparse_module
from raysgd.protocol import update as update_module
from raysgd.protocol.client import Client
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.gate import Gate
from raysgd.protocol.generation import Generation
from raysgd.protocol.membership import Assignment, Membership, Share
from raysgd.protocol.messages import Pull, Pulled, Push, Verdict
from raysgd.protocol.replica import Copied, Sealed
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.stale import StaleShard
from raysgd.protocol.tally import Tally
from raysgd.protocol.tree import EMPTY, Partial, TreeSum, add, cover
from raysgd.simulate import Faults, Outcome, driver, servers, simulate

Patch = pytest.MonkeyPatch

#: schedules within which each must be seen
BOUND = 40


@dataclass(frozen=True)
class Bug:
    plant: Callable[[Patch], None]
    #: what is trained while it is hunted, and how else the faults are mixed
    kind: str = "bsp"
    faults: dict[str, float] = field(default_factory=dict)


BUGS: dict[str, Bug] = {}


def bug(kind: str = "bsp", **faults: float) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def note(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        BUGS[plant.__name__] = Bug(plant, kind, faults)
        return plant

    return note


# -- server shards


@bug()
def no_dedup(patch: Patch) -> None:
    """What comes twice is added twice."""

    def offer(self: TreeSum, node: Range, partial: Partial) -> bool:
        self.parts[node] = add(self.parts.get(node, EMPTY), partial)
        return True

    patch.setattr(TreeSum, "offer", offer)


@bug()
def late_pushes_count(patch: Patch) -> None:
    """A push for a committed step counts for the step at hand."""
    judge = ServerShard._judge

    def lenient(self: ServerShard, push: Push) -> Verdict:
        verdict = judge(self, push)
        late = verdict is Verdict.DUPLICATE and push.step < self.version
        if late and self._pending.offer(push.node, push.partial):
            self._pending_incarnations[push.node] = push.incarnations
            return Verdict.ACCEPTED
        return verdict

    patch.setattr(ServerShard, "_judge", lenient)


@bug()
def no_fence(patch: Patch) -> None:
    patch.setattr(Gate, "_current", lambda _self, _push: True)


@bug()
def fence_acknowledged_before_it_is_raised(patch: Patch) -> None:
    """The shard says yes at once, but for some pushes more takes those of before, too."""
    fence, current = Gate.fence, Gate._current
    before: dict[int, list[int]] = {}
    grace: dict[int, int] = {}

    def later(self: Gate[Any], run: Range, incarnation: int) -> int:
        before[id(self)], grace[id(self)] = list(self.incarnations), 3
        return fence(self, run, incarnation)

    def judged(self: Gate[Any], push: Push) -> bool:
        grace[id(self)] = grace.get(id(self), 0) - 1
        old = before.get(id(self))
        if old is not None and grace[id(self)] >= 0 and tuple(old[push.node.slice]) == push.incarnations:
            return True
        return current(self, push)

    patch.setattr(Gate, "fence", later)
    patch.setattr(Gate, "_current", judged)


@bug()
def late_fences_lower_incarnations(patch: Patch) -> None:
    def lowering(self: Gate[Any], run: Range, incarnation: int) -> int:
        self.fences += 1
        self.incarnations[run.slice] = [incarnation] * len(run)
        return self.clocks.of(run)

    patch.setattr(Gate, "fence", lowering)


@bug()
def sums_in_order_of_arrival(patch: Patch) -> None:
    def arrange(self: ServerShard) -> object:
        nodes, parts = tuple(self._pending.parts), list(self._pending.parts.values())
        return nodes, parts, [(0 if i == 1 else len(nodes) + i - 2, i) for i in range(1, len(nodes))]

    patch.setattr(ServerShard, "_arrange", arrange)


@bug()
def previous_generation_overwritten_too_early(patch: Patch) -> None:
    """Nothing is left to serve to a successor that begins one step back."""
    apply = ServerShard._apply

    def in_place(self: ServerShard, factor: np.float32 | None) -> None:
        apply(self, factor)
        self._previous.params[...] = self._newest.params
        self._previous.step = -1

    patch.setattr(ServerShard, "_apply", in_place)


@bug()
def update_in_place(patch: Patch) -> None:
    """The next version is written over the one that is served."""
    write = ServerShard._write

    def over(self: ServerShard, *arguments: Any, **named: Any) -> bool:
        now, target = self._generations[self.sequence % 2], self._generations[(self.sequence + 1) % 2]
        kept = now.copy()
        done = write(self, *arguments, **named)
        now.take(Generation(kept.step, target.params, target.state))
        return done

    patch.setattr(ServerShard, "_write", over)


@bug()
def published_before_it_is_sealed(patch: Patch) -> None:
    """A version is served as soon as the first of its pushes is there."""
    pull = ServerShard.pull

    def early(self: ServerShard, asked: Pull) -> object:
        if asked.version == self.version + 1 and self._pending.parts:
            return Pulled(self.index, asked.version, self._newest.params.copy())
        return pull(self, asked)

    patch.setattr(ServerShard, "pull", early)


@bug("ssp")
def unscaled_stale_push(patch: Patch) -> None:
    """Each push is divided by its own rows, not by those of its step."""
    write = ServerShard._write

    def own(self: ServerShard, step: int, rate: float, gradients: Sequence[Float32 | None], *rest: Any, **more: Any):  # type: ignore[no-untyped-def]
        whole = [None if g is None else g / np.float32(more["share"]) for g in gradients]
        return write(self, step, rate, whole, *rest, **more)

    patch.setattr(ServerShard, "_write", own)


@bug("ssp")
def stale_pushes_count_again(patch: Patch) -> None:
    patch.setattr(StaleShard, "_timely", lambda _self, _push: Verdict.ACCEPTED)


@bug("ssp")
def no_bound_on_staleness(patch: Patch) -> None:
    patch.setattr(Consistency, "oldest", lambda _self, _step: 0)


@bug("sparse")
def sparse_pulls_mix_versions(patch: Patch) -> None:
    """A pull of the version before gets the values of the newest."""
    patch.setattr(sparse_module, "_restore", lambda _values, _ids, _record: None)


# -- successors of servers


@bug()
def half_written_generation_taken_for_whole(patch: Patch) -> None:
    remains = servers.remains

    def careless(dead: ServerShard) -> tuple[Generation, Generation | None]:
        newest, previous = remains(dead)
        if previous is not None or dead.version == 0:
            return newest, previous
        half = dead._generations[(dead.sequence + 1) % 2].copy()
        half.step = newest.step + 1
        return half, newest

    patch.setattr(servers, "remains", careless)


@bug(lose=0.1, server_kill=0.1)
def successor_without_the_generation_before(patch: Patch) -> None:
    remains = servers.remains
    patch.setattr(servers, "remains", lambda dead: (remains(dead)[0], None))


@bug()
def commits_lost_with_a_server(patch: Patch) -> None:
    begin = ServerShard.__init__

    def forgetful(self: ServerShard, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **{**named, "commits": ()})

    patch.setattr(ServerShard, "__init__", forgetful)


@bug()
def commits_told_twice(patch: Patch) -> None:
    """A shard forgets nothing and tells it all again."""
    patch.setattr(Gate, "drain", lambda self, _since: list(self.commits))


@bug()
def no_refence_after_a_server_was_replaced(patch: Patch) -> None:
    patch.setattr(Membership, "refence", lambda _self: [])


@bug("clipped", lose=0.3, server_kill=0.1, checkpoint_every=2, kill=0.0)
def successor_that_does_not_know_its_norm(patch: Patch) -> None:
    """One that sealed a step is succeeded, while another waits for its part of that step's norm."""
    remains = servers.remains
    patch.setattr(servers, "remains", lambda sim, index: {**remains(sim, index), "last_norms": None})


@bug("counted")
def stale_successor_that_does_not_know_its_clocks(patch: Patch) -> None:
    """Its parameters hold pushes of steps that its clocks do not count."""
    remains = servers.remains
    patch.setattr(servers, "remains", lambda sim, index: {"generation": remains(sim, index)["generation"]})


@bug("counted", midway=0.2, node_loss=0.05, replicas=False)
def stale_checkpoint_without_its_clocks(patch: Patch) -> None:
    """As above, but for all shards, at a roll-back."""
    midway = driver.midway

    def forgetful(sim: Any) -> None:
        midway(sim)
        sim.tallies = [None] * len(sim.shards)

    patch.setattr(driver, "midway", forgetful)


@bug("counted", midway=0.2, node_loss=0.05, replicas=False)
def what_was_carried_over_is_answered_for_by_the_dead(patch: Patch) -> None:
    """The parts of a checkpoint count under incarnations from before the roll-back."""

    def kept(self: Tally, step: int) -> Tally:
        return Tally(self.clocks, tuple(r for r in self.rounds if r.step >= step))

    patch.setattr(Tally, "since", kept)


@bug("counted", replicas=True, node_loss=0.05)
def a_stale_replica_applies_what_it_has(patch: Patch) -> None:
    def again(self: StaleShard, sealed: Any) -> int:
        self._accept(sealed.push)
        return self.sequence

    patch.setattr(StaleShard, "follow", again)


@bug("sparse", server_kill=0.1)
def a_sparse_successor_does_not_finish_the_write(patch: Patch) -> None:
    """Its predecessor died in the middle of it."""
    patch.setattr(simulate_sparse, "Store", lambda version, arrays, _record: sparse_module.Store(version, arrays))


@bug()
def one_shard_alone_rolls_back(patch: Patch) -> None:
    replace_shard = servers.replace

    def only_lost(sim: Any, index: int, shard: ServerShard) -> None:
        if index in sim.down:
            replace_shard(sim, index, shard)

    patch.setattr(servers, "replace", only_lost)


@bug()
def roll_back_without_optimizer_state(patch: Patch) -> None:
    roll_back = servers.roll_back

    def parameters_alone(sim: Any) -> None:
        whole = sim.checkpoint
        sim.checkpoint = Generation(whole.step, whole.params, {k: np.zeros_like(v) for k, v in whole.state.items()})
        roll_back(sim)

    patch.setattr(servers, "roll_back", parameters_alone)


# -- assignments


def latest(patch: Patch) -> None:
    """Whoever takes over begins where the furthest shard is, not the last."""
    at = Share.at

    def late(assignment: Assignment, n_virtual: int, clocks: Sequence[Int64]) -> Share:
        furthest = max(int(c[assignment.run.slice].min()) for c in clocks)
        return replace(at(assignment, n_virtual, clocks), start=furthest)

    patch.setattr(Share, "at", late)


@bug()
def clocks_maximum_instead_of_minimum(patch: Patch) -> None:
    latest(patch)


@bug("ssp")
def stale_clocks_maximum_instead_of_minimum(patch: Patch) -> None:
    latest(patch)


@bug("ssp")
def nodes_not_cut_where_clocks_differ(patch: Patch) -> None:
    """The dead left some leaves ahead of others; they are pushed together all the same."""
    patch.setattr(membership_module, "pieces", lambda run, n_virtual, _clocks: cover(run, n_virtual))


@bug()
def incarnations_reused(patch: Patch) -> None:
    """A share that is dealt again keeps its number."""

    def same(self: Membership, worker: int, run: Range) -> Assignment:
        fresh = max(1, *self.incarnations[run.slice])
        self.incarnations[run.slice] = [fresh] * len(run)
        return Assignment(worker, run, (fresh,) * len(run))

    patch.setattr(Membership, "assign", same)


@bug()
def rows_skipped_at_reassignment(patch: Patch) -> None:
    """Whoever takes over leaves out the last of its rows at the step where it begins."""
    computed, begin = Client.computed, Client.begin

    def noting(self: Client) -> object:
        self.first = self.step if self.step else None  # type: ignore[attr-defined]
        return begin(self)

    def skipping(self: Client, step: int, sums: list[Partial]) -> object:
        if step == self.first:  # type: ignore[attr-defined]
            sums = [*sums[:-1], EMPTY]
        return computed(self, step, sums)

    patch.setattr(Client, "begin", noting)
    patch.setattr(Client, "computed", skipping)


@bug()
def a_virtual_worker_forgotten_in_the_deal(patch: Patch) -> None:
    deal = membership_module.deal

    def short(n_virtual: int, n_workers: int, costs: Sequence[float] = ()) -> tuple[Range, ...]:
        *runs, last = deal(n_virtual, n_workers, costs)
        return (*runs, Range(last.begin, last.end - (n_workers == 3 and len(last) > 1)))

    patch.setattr(membership_module, "deal", short)


@bug(slow=0.3)
def a_moved_share_keeps_its_incarnation(patch: Patch) -> None:
    """Whoever carried it before may go on pushing."""
    measured = Membership._measured

    def kept(self: Membership, event: Any) -> Any:
        before = list(self.incarnations)
        if not measured(self, event):
            return []
        self.incarnations[:] = before
        self.assignments = tuple(replace(a, incarnations=tuple(before[a.run.slice])) for a in self.assignments)
        return [membership_module.Assign(self.assignments)]

    patch.setattr(Membership, "_measured", kept)


@bug()
def the_dead_are_dealt_to(patch: Patch) -> None:
    """A worker that left keeps what it carried, and nobody else begins."""
    left = Membership._left

    def kept(self: Membership, event: Any) -> Any:
        return [d for d in left(self, event) if not isinstance(d, membership_module.Assign)]

    patch.setattr(Membership, "_left", kept)


# -- the hunt


def hunt(kind: str, **faults: float) -> int | None:
    """The number of schedules after which something is wrong; None: nothing is."""
    for seed in range(BOUND):
        if wrong(seed, kind, **{"patience": 20_000, **faults}):
            return seed + 1
    return None


@pytest.fixture(scope="module", autouse=True)
def truths() -> None:
    """Computed by the real protocol, before any bug is there."""
    assert all(truth(kind) for kind in STEPS)
    assert bsp_loss()


# -- replicas


@bug("copied")
def told_before_the_replica_has_it(patch: Patch) -> None:
    patch.setattr(ServerShard, "told", property(lambda self: self.version))


@bug("copied")
def a_replica_applies_what_it_has(patch: Patch) -> None:
    follow = ServerShard.follow

    def again(self: ServerShard, sealed: Sealed) -> int:
        return follow(self, replace(sealed, commit=sealed.commit._replace(step=self.version)))

    patch.setattr(ServerShard, "follow", again)


@bug("copied")
def never_said_again_to_a_replica(patch: Patch) -> None:
    patch.setattr(Copied, "say_again", lambda _self: None)


@bug("copied", midway=0.0, replica_kill=0.1, node_loss=0.1)
def a_copy_without_what_the_driver_was_not_told(patch: Patch) -> None:
    copy = ServerShard.copy
    patch.setattr(ServerShard, "copy", lambda self: replace(copy(self), commits=[]))


@bug("copied")
def another_rate_at_the_replica(patch: Patch) -> None:
    follow = ServerShard.follow

    def faster(self: ServerShard, sealed: Sealed) -> int:
        return follow(self, replace(sealed, commit=sealed.commit._replace(rate=self._rate(0))))

    patch.setattr(ServerShard, "follow", faster)


@bug("clipped", replicas=True, node_loss=0.05, lose=0.3)
def a_promoted_replica_without_the_norms(patch: Patch) -> None:
    """Another shard may still wait for what the dead primary knew."""
    follow = ServerShard.follow
    patch.setattr(ServerShard, "follow", lambda self, sealed: follow(self, replace(sealed, square_sums=None)))


def test_there_are_many_bugs_to_plant() -> None:
    assert len(BUGS) >= 20


@pytest.mark.parametrize("kind", STEPS)
def test_the_hunt_finds_nothing_in_the_real_protocol(kind: str) -> None:
    assert hunt(kind) is None


@pytest.mark.parametrize("name", [name for name, planted in BUGS.items() if planted.faults])
def test_nor_where_the_faults_are_mixed_otherwise(name: str) -> None:
    assert hunt(BUGS[name].kind, **BUGS[name].faults) is None


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str, monkeypatch: Patch) -> None:
    BUGS[name].plant(monkeypatch)
    assert hunt(BUGS[name].kind, **BUGS[name].faults) is not None


# -- what is not finite


@cache
def poisoned() -> Any:
    """The plain problem with one number that is NaN, at step 6."""
    p = problem("bsp")

    def batch(step: int, v: int) -> Batch | None:
        whole = p.batch(step, v)
        if step == 6 and v == 5 and whole is not None:
            return Batch(np.full_like(whole.numeric, np.nan), whole.codes, whole.label)
        return whole

    return replace(p, batch=batch)


def diverging(seed: int) -> Outcome:
    faults = Faults(seed, duplicate=0.1, lose=0.03, kill=0.05, server_kill=0.03)
    return simulate(poisoned(), STEPS["bsp"], n_workers=1 + seed % V, n_servers=2, faults=faults)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_not_finite_names_its_step(seed: int) -> None:
    with pytest.raises(DivergedError, match="step 6"):
        diverging(seed)


def test_what_is_not_finite_and_sealed_is_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(update_module, "_finite", lambda _values: True)
    assert all("not finite" in diverging(seed).violations[0] for seed in range(10))
