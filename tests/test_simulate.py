"""The protocol under a hostile network: whatever the schedule, the same bytes; and the planted bugs are caught."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from raysgd.data.sampler import Sampler
from raysgd.errors import DivergedError
from raysgd.learn.batch import Batch, Inputs, Target
from raysgd.learn.models import LogisticRegression
from raysgd.learn.parameters import Range
from raysgd.learn.schedules import ExponentialDecay
from raysgd.learn.transforms import SGD, AdaGrad
from raysgd.protocol import compute as compute_module
from raysgd.protocol.messages import Verdict
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.tree import EMPTY, Partial, TreeSum, add
from raysgd.protocol.update import PlannedRows, Rule
from raysgd.simulate import Faults, Outcome, Problem, simulate

V = 8
STEPS = 20
HOSTILE = {"duplicate": 0.15, "lose": 0.03, "kill": 0.05}


@cache
def problem(n_virtual: int = V, optimizer: str = "momentum", n_rows: int = 431) -> Problem:
    """Logistic regression on 13 numbers and a category; 431 rows divide by nothing."""
    random = np.random.default_rng(7)
    numeric = random.standard_normal((n_rows, 13)).astype(np.float32)
    codes = random.integers(0, 5, (n_rows, 1)).astype(np.int32)
    label = (numeric[:, 0] + 0.5 * random.standard_normal(n_rows) > 0).astype(np.float32)
    table = Batch(numeric, codes, label)
    batch_size = 4 * n_virtual
    sampler = Sampler([200, 1, 130, 100], batch_size, n_virtual, seed=3, window_rows=60)
    transform = SGD(momentum=0.9) if optimizer == "momentum" else AdaGrad()
    planned = PlannedRows(batch_size, sampler.n_rows, sampler.steps_per_epoch)
    rate = ExponentialDecay(0.3, decay_rate=0.5, every="1epoch").resolve(sampler.steps_per_epoch, STEPS)
    learner = LogisticRegression().bind(Inputs(13, (5,)), Target(2))

    def batch(step: int, v: int) -> Batch | None:
        rows = sampler.row_ids(step, v)
        return table.take(rows) if len(rows) else None

    return Problem(learner, Rule(transform, rate, planned, l2=0.01), batch, n_virtual)


def run(seed: int, n_workers: int, **faults: float) -> Outcome:
    return simulate(problem(), STEPS, n_workers=n_workers, n_servers=2, faults=Faults(seed, **{**HOSTILE, **faults}))


@cache
def truth(n_virtual: int = V, optimizer: str = "momentum") -> str:
    return simulate(problem(n_virtual, optimizer), STEPS).final.digest()


def test_planned_rows_are_the_samplers() -> None:
    rows = [sum(len(problem().batch(step, v) or ()) for v in range(V)) for step in range(2 * STEPS)]
    assert [problem().rule.planned(step) for step in range(2 * STEPS)] == rows
    assert len(set(rows)) == 2


def test_the_protocol_is_the_plain_loop() -> None:
    """Written down once more without any of the protocol: leaves, pairwise sums, one update."""
    p = problem()
    params = p.learner.initial(p.seed)
    momentum = np.zeros_like(params)
    penalized = p.learner.layout.penalized(Range(0, len(params)))
    for step in range(STEPS):
        sums: list[Partial] = [compute_module.leaf(p.learner, params, p.batch(step, v)) for v in range(V)]
        while len(sums) > 1:
            sums = [add(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        assert sums[0].gradient is not None
        gradient = sums[0].gradient / np.float32(p.rule.planned(step))
        gradient[penalized] += np.float32(0.01) * params[penalized]
        momentum = np.float32(0.9) * momentum + gradient
        params = params - np.float32(p.rule.rate(step)) * momentum
    final = simulate(p, STEPS).final
    assert final.params.tobytes() == params.tobytes()
    assert final.state["momentum"].tobytes() == momentum.tobytes()


@pytest.mark.parametrize("n_workers", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("n_servers", [1, 2, 3])
def test_neither_workers_nor_servers_change_a_byte(n_workers: int, n_servers: int) -> None:
    outcome = simulate(problem(), STEPS, n_workers=n_workers, n_servers=n_servers, faults=Faults(n_workers))
    assert outcome.final.digest() == truth()


@pytest.mark.parametrize(
    ("n_virtual", "optimizer"), [(1, "momentum"), (5, "momentum"), (8, "adagrad"), (13, "adagrad")]
)
def test_other_trees_and_optimizers(n_virtual: int, optimizer: str) -> None:
    p = problem(n_virtual, optimizer)
    outcome = simulate(p, STEPS, n_workers=min(3, n_virtual), n_servers=3, faults=Faults(1, 0.1, 0.02, 0.1))
    assert not outcome.violations
    assert outcome.final.digest() == truth(n_virtual, optimizer)


def test_hostile_schedules_end_in_the_same_bytes() -> None:
    outcomes = [run(seed, n_workers=1 + seed % V) for seed in range(100)]
    assert {o.final.digest() for o in outcomes} == {truth()}
    assert [v for o in outcomes for v in o.violations] == []
    delivered = sum(o.delivered for o in outcomes)
    assert min(o.final.step for o in outcomes) >= 20
    assert sum(o.duplicated for o in outcomes) >= 0.1 * delivered
    assert sum(o.reordered for o in outcomes) >= 0.1 * delivered
    assert len({o.order for o in outcomes}) >= 0.95 * len(outcomes)
    assert sum(o.kills for o in outcomes) >= 50
    assert sum(o.lost for o in outcomes) >= 100


def test_a_schedule_replays_from_its_seed() -> None:
    assert run(5, 3).order == run(5, 3).order != run(6, 3).order


@pytest.mark.parametrize("stop", range(STEPS + 1))
def test_stopping_at_any_step_and_going_on_with_others_changes_nothing(stop: int) -> None:
    first = simulate(problem(), stop, n_workers=3, n_servers=2, faults=Faults(stop, **HOSTILE))
    second = simulate(problem(), STEPS, n_workers=5, n_servers=3, faults=Faults(stop, **HOSTILE), start=first.final)
    assert first.final.step == stop
    assert second.final.digest() == truth()


def test_a_step_that_is_not_finite_is_never_sealed() -> None:
    p = problem()

    def poisoned(step: int, v: int) -> Batch | None:
        batch = p.batch(step, v)
        if step == 7 and v == 5 and batch is not None:
            numeric = batch.numeric.copy()
            numeric[0, 3] = np.nan
            batch = Batch(numeric, batch.codes, batch.label)
        return batch

    with pytest.raises(DivergedError, match="step 7"):
        simulate(Problem(p.learner, p.rule, poisoned, V), STEPS, n_workers=3, n_servers=2, faults=Faults(1))


# -- planted bugs: each makes the test above fail


def caught(seeds: range = range(12)) -> bool:
    """Whether hostile schedules show that something is wrong: other bytes, a violation, or no end at all."""
    for seed in seeds:
        try:
            outcome = run(seed, n_workers=1 + seed % V, kill=0.2)
        except (AssertionError, KeyError, DivergedError):
            return True
        if outcome.violations or outcome.final.digest() != truth():
            return True
    return False


def without_dedup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push is judged by the fence alone; what comes twice, or late, is added to the step at hand."""

    def offer(self: TreeSum, node: Range, partial: Partial) -> bool:
        self.parts[node] = add(self.parts.get(node, EMPTY), partial)
        return True

    judge = ServerShard._judge

    def lenient(self: ServerShard, push: object) -> Verdict:
        verdict = judge(self, push)  # type: ignore[arg-type]
        if verdict is Verdict.DUPLICATE:
            self._pending.offer(push.node, push.partial)  # type: ignore[attr-defined]
            return Verdict.ACCEPTED
        return verdict

    monkeypatch.setattr(TreeSum, "offer", offer)
    monkeypatch.setattr(ServerShard, "_judge", lenient)


def without_late_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push for a committed step counts for the step at hand."""
    judge = ServerShard._judge

    def lenient(self: ServerShard, push: object) -> Verdict:
        verdict = judge(self, push)  # type: ignore[arg-type]
        late = verdict is Verdict.DUPLICATE and push.step < self.version  # type: ignore[attr-defined]
        if late and self._pending.offer(push.node, push.partial):  # type: ignore[attr-defined]
            return Verdict.ACCEPTED
        return verdict

    monkeypatch.setattr(ServerShard, "_judge", lenient)


def without_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerShard, "_current", lambda _self, _push: True)


def without_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are added in the order in which they came."""

    def arrange(self: ServerShard) -> object:
        nodes, parts = tuple(self._pending.parts), list(self._pending.parts.values())
        return nodes, parts, [(0 if i == 1 else len(nodes) + i - 2, i) for i in range(1, len(nodes))]

    monkeypatch.setattr(ServerShard, "_arrange", arrange)


def with_one_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update overwrites the generation it reads: nothing to serve to a successor that begins one step back."""
    apply = ServerShard._apply

    def in_place(self: ServerShard, factor: np.float32 | None) -> None:
        apply(self, factor)
        self._previous.step = -1

    monkeypatch.setattr(ServerShard, "_apply", in_place)


BUGS = [without_dedup, without_late_check, without_fence, without_fixed_order, with_one_generation]


def test_the_hunt_finds_nothing_in_the_real_protocol() -> None:
    assert not caught()


@pytest.mark.parametrize("plant", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    truth()  # computed by the real protocol, before the bug is there
    plant(monkeypatch)
    assert caught()
