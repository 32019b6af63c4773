"""The axes of consistency in the simulator: staleness, local steps, and the gradient's norm over several shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from test_simulate import HOSTILE, STEPS, V, problem, truth

from raysgd.errors import DivergedError
from raysgd.learn.batch import Batch, Float32
from raysgd.learn.losses import add_l2
from raysgd.learn.parameters import Range
from raysgd.learn.transforms import SGD, AdaGrad
from raysgd.protocol import shard as shard_module
from raysgd.protocol.compute import leaf
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.messages import Verdict
from raysgd.protocol.rounds import Rounds
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.stale import StaleShard
from raysgd.protocol.tree import Partial, add
from raysgd.simulate import Faults, Problem, simulate


def stale(staleness: float, **changes: object) -> Problem:
    p = problem()
    return replace(p, consistency=Consistency(staleness), rule=replace(p.rule, **changes))  # type: ignore[arg-type]


def loss(p: Problem, params: Float32) -> float:
    """The mean loss over an epoch's rows."""
    out, total, rows = np.empty_like(params), 0.0, 0
    for step in range(p.rule.planned.steps_per_epoch):
        for v in range(p.n_virtual):
            batch = p.batch(step, v)
            if batch is not None:
                total += p.learner.value_and_grad(params, batch, out)
                rows += len(batch)
    return total / rows


def observed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The staleness of every push that a shard accepts from here on."""
    seen: list[int] = []
    accept = StaleShard._accept

    def noting(self: StaleShard, push: object) -> None:
        seen.append(push.step - push.read)  # type: ignore[attr-defined]
        accept(self, push)  # type: ignore[arg-type]

    monkeypatch.setattr(StaleShard, "_accept", noting)
    return seen


# -- staleness


@pytest.mark.parametrize("staleness", [1, 2, 4, inf])
def test_hostile_schedules_keep_the_bound_and_count_everything_once(
    staleness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2 and I7 are checked by the simulator itself; the loss is that of BSP, or nearly."""
    seen = observed(monkeypatch)
    bsp = simulate(problem(), STEPS).final.params
    for seed in range(40):
        p = stale(staleness)
        outcome = simulate(p, STEPS, n_workers=1 + seed % V, n_servers=2, faults=Faults(seed, **HOSTILE))
        assert outcome.violations == []
        assert outcome.final.step == STEPS
        assert abs(loss(p, outcome.final.params) - loss(p, bsp)) < 0.05
    assert max(seen) == staleness if staleness < 4 else 2 < max(seen) <= staleness


@pytest.mark.parametrize("optimizer", ["momentum", "adagrad"])
@pytest.mark.parametrize("n_workers", [1, 2, 4, 8])
def test_without_faults_the_loss_is_that_of_bsp(optimizer: str, n_workers: int) -> None:
    """With momentum 0.9, and pushes that are fractions of a step: what diverges where they are not scaled."""
    p = problem(optimizer=optimizer)
    bsp = simulate(p, 2 * STEPS).final.params
    fresh = replace(p, consistency=Consistency(2))
    ssp = simulate(fresh, 2 * STEPS, n_workers=n_workers, n_servers=2, faults=Faults(1, in_order=True)).final.params
    assert loss(p, ssp) == pytest.approx(loss(p, bsp), abs=0.02)


def test_the_number_of_pushes_does_not_change_the_dynamics() -> None:
    """A step in parts decays the momentum once in all: constant gradients move the parameters alike."""
    rule, start = SGD(momentum=0.9), np.zeros(1, np.float32)

    def moved(parts: int) -> float:
        transform, factor = rule.part(1 / parts)
        w, m = start.copy(), {"momentum": start.copy()}
        for _ in range(200 * parts):
            new, new_m = np.empty(1, np.float32), {"momentum": np.empty(1, np.float32)}
            transform.update(np.float32([1.0 / parts]), np.float32(0.01 * factor), w, m, new, new_m)
            w, m = new, new_m
        return float(w[0])

    assert moved(1) == pytest.approx(-0.01 * (200 / 0.1 - 0.9 * (1 - 0.9**200) / 0.1**2), rel=1e-4)
    assert [moved(parts) for parts in (2, 4, 8)] == pytest.approx([moved(1)] * 3, rel=0.03)


def caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the tests above would notice what was planted."""
    p = stale(2)
    bsp = loss(p, simulate(problem(), STEPS).final.params)
    plant(monkeypatch)
    for seed in range(20):
        try:
            outcome = simulate(p, STEPS, n_workers=4, n_servers=2, faults=Faults(seed, **HOSTILE))
        except (AssertionError, KeyError, DivergedError):
            return True
        if outcome.violations or not abs(loss(p, outcome.final.params) - bsp) < 0.05:
            return True
    return False


def unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each push is divided by its own rows, not by those of its step."""
    write = ServerShard._write

    def own(self: ServerShard, step: int, rate: float, gradients: list[Float32 | None], *rest: object, **more: object):  # type: ignore[no-untyped-def]
        share = float(more["share"])  # type: ignore[arg-type]
        whole = [None if g is None else g / np.float32(share) for g in gradients]
        return write(self, step, rate, whole, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ServerShard, "_write", own)


def without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither workers nor servers look at the bound."""
    monkeypatch.setattr(Consistency, "oldest", lambda _self, _step: 0)


def without_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push that comes again is applied again."""
    monkeypatch.setattr(StaleShard, "_timely", lambda _self, _push: Verdict.ACCEPTED)


@pytest.mark.parametrize("plant", [unscaled, without_bound, without_clocks], ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert caught(plant, monkeypatch)


def test_the_hunt_finds_nothing_in_the_real_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not caught(lambda _: None, monkeypatch)


def test_a_stale_shard_takes_no_snapshot_in_the_middle_of_a_step() -> None:
    p = stale(2)
    made = StaleShard(0, p.rule, p.learner.layout.penalized(Range(0, 19)), n_virtual=V, generation=p.initial())
    assert made.snapshot(0).step == 0
    made.clocks.advance(Range(0, 2))
    with pytest.raises(KeyError, match="at steps 0 to 1, not at 0"):
        made.snapshot(0)


# -- local steps


def with_rounds(local_steps: int) -> Problem:
    p = problem()
    return replace(p, rule=replace(p.rule, rounds=Rounds(local_steps, p.rule.planned.steps_per_epoch)))


def test_one_local_step_changes_no_byte() -> None:
    assert simulate(with_rounds(1), STEPS).final.digest() == truth()


@pytest.mark.parametrize("local_steps", [3, 5, 100])
def test_local_steps_are_the_plain_loop(local_steps: int) -> None:
    """Written down once more: V walks of plain SGD, the sums of their gradients added along the tree, one update."""
    p = with_rounds(local_steps)
    params = p.learner.initial(p.seed)
    momentum = np.zeros_like(params)
    penalized = p.learner.layout.penalized(Range(0, len(params)))
    n_rounds = p.rule.rounds.per_epoch + 1
    for index in range(n_rounds):
        steps = p.rule.rounds.steps(index)
        rate, first = np.float32(p.rule.rate(steps.start)), p.rule.planned(steps.start)
        sums = []
        for v in range(V):
            w, total = params.copy(), np.zeros_like(params)
            for step in steps:
                part = leaf(p.learner, w, p.batch(step, v))
                gradient = np.zeros_like(params) if part.gradient is None else part.gradient
                if p.rule.planned(step) != first:
                    gradient = gradient * np.float32(first / p.rule.planned(step))
                total += gradient
                mean = gradient * np.float32(V / first)
                add_l2(mean, w, p.rule.l2, penalized)
                w = w - rate * mean
            sums.append(Partial(total, 0.0, 1))
        while len(sums) > 1:
            sums = [add(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        assert sums[0].gradient is not None
        mean = sums[0].gradient / np.float32(first)
        add_l2(mean, params, p.rule.l2 * len(steps), penalized)
        momentum = np.float32(0.9) * momentum + mean
        params = params - rate * momentum
    final = simulate(p, n_rounds).final
    assert final.params.tobytes() == params.tobytes()


@pytest.mark.parametrize("local_steps", [2, 4])
def test_local_steps_end_in_the_same_bytes_whatever_happens(local_steps: int) -> None:
    p = with_rounds(local_steps)
    want = simulate(p, 10).final.digest()
    for seed in range(20):
        faults = Faults(seed, **HOSTILE)
        outcome = simulate(p, 10, n_workers=1 + seed % V, n_servers=1 + seed % 3, faults=faults)
        assert (outcome.violations, outcome.final.digest()) == ([], want)


def test_averaging_of_local_steps_without_momentum() -> None:
    """Plain SGD as the outer rule is the average of the walks."""
    p = with_rounds(4)
    p = replace(p, rule=replace(p.rule, transform=SGD(), l2=0.0, rate=lambda _step: 0.5))
    params = p.learner.initial(p.seed)
    ends = []
    for v in range(V):
        w = params.copy()
        for step in range(4):
            part = leaf(p.learner, w, p.batch(step, v))
            assert part.gradient is not None
            w = w - np.float32(0.5) * part.gradient * np.float32(V / 32)
        ends.append(w)
    assert np.allclose(simulate(p, 1).final.params, np.mean(ends, axis=0), rtol=1e-5, atol=1e-6)


def test_local_steps_and_staleness_together() -> None:
    p = replace(with_rounds(3), consistency=Consistency(2))
    bsp = loss(p, simulate(problem(), STEPS).final.params)
    for seed in range(10):
        outcome = simulate(p, 8, n_workers=4, n_servers=2, faults=Faults(seed, **HOSTILE))
        assert outcome.violations == []
        assert abs(loss(p, outcome.final.params) - bsp) < 0.1


# -- the gradient's norm


def clipped(clip_norm: float = 0.3) -> Problem:
    p = problem()
    return replace(p, rule=replace(p.rule, clip_norm=clip_norm))


def test_clipping_is_the_plain_loop() -> None:
    torch = pytest.importorskip("torch")
    p = clipped()
    params = p.learner.initial(p.seed)
    momentum = np.zeros_like(params)
    penalized = p.learner.layout.penalized(Range(0, len(params)))
    scaled = 0
    for step in range(STEPS):
        sums = [leaf(p.learner, params, p.batch(step, v)) for v in range(V)]
        gradient = np.sum([s.gradient for s in sums if s.gradient is not None], axis=0, dtype=np.float64)
        gradient = gradient / p.rule.planned(step) + p.rule.l2 * penalized * params
        tensor = torch.nn.Parameter(torch.zeros(len(params), dtype=torch.float64))
        tensor.grad = torch.from_numpy(gradient)
        scaled += float(torch.nn.utils.clip_grad_norm_([tensor], 0.3)) > 0.3
        momentum = 0.9 * momentum + tensor.grad.numpy()
        params = (params - p.rule.rate(step) * momentum).astype(np.float32)
    assert 0 < scaled < STEPS
    assert np.allclose(simulate(p, STEPS).final.params, params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_servers", [1, 2, 3, 5])
def test_neither_workers_nor_servers_nor_faults_change_a_clipped_byte(n_servers: int) -> None:
    want = simulate(clipped(), STEPS).final.digest()
    for seed in range(20):
        faults = Faults(seed, retry=0.002, **HOSTILE)
        outcome = simulate(clipped(), STEPS, n_workers=1 + seed % V, n_servers=n_servers, faults=faults)
        assert (outcome.violations, outcome.final.digest()) == ([], want)


def test_a_norm_that_is_not_reached_changes_no_byte() -> None:
    assert simulate(clipped(1e9), STEPS, n_servers=3).final.digest() == truth()


def test_a_gradient_that_is_not_finite_is_refused_by_every_shard() -> None:
    p = clipped()

    def poisoned(step: int, v: int) -> Batch | None:
        batch = p.batch(step, v)
        if step == 3 and v == 5 and batch is not None:
            numeric = batch.numeric.copy()
            numeric[0, 3] = np.nan
            batch = Batch(numeric, batch.codes, batch.label)
        return batch

    with pytest.raises(DivergedError, match="step 3"):
        simulate(replace(p, batch=poisoned), STEPS, n_workers=3, n_servers=2, faults=Faults(1))


def test_norms_from_one_shard_only_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: each shard limits the norm of its own part."""
    want = simulate(clipped(), STEPS).final.digest()
    real = shard_module.clip_factor
    monkeypatch.setattr(shard_module, "clip_factor", lambda sums, limit: real(sums[:1], limit))
    assert simulate(clipped(), STEPS, n_servers=2).final.digest() != want


def test_equal_parts_of_a_step_are_the_step_under_adagrad() -> None:
    transform, factor = AdaGrad().part(0.25)
    w, a = np.ones(1, np.float32), {"accumulator": np.full(1, 900.0, np.float32)}
    new, new_a = np.empty(1, np.float32), {"accumulator": np.empty(1, np.float32)}
    for _ in range(4):
        transform.update(np.float32([1.0]), np.float32(factor), w, a, new, new_a)
        w, a = new.copy(), {"accumulator": new_a["accumulator"].copy()}
    assert a["accumulator"] == 900.0 + 4.0**2
    assert 1 - w[0] == pytest.approx(4 / 916**0.5, rel=0.01)
