"""Sparse shards under a hostile network: one digest whatever the schedule, and the bytes of one plain loop."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from raysgd.data.sampler import Sampler
from raysgd.errors import DivergedError
from raysgd.learn.batch import Batch, Inputs, Target
from raysgd.learn.models.hashed import BoundHashed, FactorizationMachine, HashedLogisticRegression
from raysgd.learn.parameters import Range
from raysgd.learn.schedules import as_schedule
from raysgd.learn.transforms import FTRL, SGD, AdaGrad, Transform
from raysgd.protocol.tree import Partial
from raysgd.protocol.update import PlannedRows, Rule
from raysgd.simulate import Faults, Problem, simulate
from raysgd.simulate_sparse import simulate_sparse

V = 8
STEPS = 12
BITS = 9
HOSTILE = {"duplicate": 0.15, "lose": 0.03, "kill": 0.05}
OPTIMIZERS: dict[str, Transform] = {
    "momentum": SGD(0.1, momentum=0.9),
    "nesterov": SGD(0.1, momentum=0.9, nesterov=True),
    "adagrad": AdaGrad(0.1),
    "ftrl": FTRL(0.1, l1=0.01, l2=0.01),
}
MODELS = {"logistic": HashedLogisticRegression(BITS), "machine": FactorizationMachine(BITS, factors=3)}


@cache
def problem(model: str = "logistic", optimizer: str = "adagrad", n_rows: int = 431, weighted: bool = False) -> Problem:
    """Four numbers and three hashed categories, one of them with many values; 431 rows divide by nothing."""
    random = np.random.default_rng(7)
    numeric = random.standard_normal((n_rows, 4)).astype(np.float32)
    codes = np.minimum(random.zipf(1.3, (n_rows, 3)), 2**BITS - 1).astype(np.int32)
    label = (numeric[:, 0] + codes[:, 0] % 2 - 0.5 + random.standard_normal(n_rows) > 0).astype(np.float32)
    weight = None
    if weighted:  # dropped rows: of no weight, and they touch nothing
        weight = (random.random(n_rows) < 0.8).astype(np.float32)
        codes[weight == 0] = 2**BITS
        numeric[weight == 0] = 0
    table = Batch(numeric, codes, label, weight)
    batch_size = 4 * V
    sampler = Sampler([200, 1, 130, 100], batch_size, V, seed=3, window_rows=60)
    transform = OPTIMIZERS[optimizer]
    planned = PlannedRows(batch_size, sampler.n_rows, sampler.steps_per_epoch)
    rate = as_schedule(transform.learning_rate).resolve(sampler.steps_per_epoch, STEPS)
    learner = MODELS[model].bind(Inputs(4, (2**BITS,) * 3, BITS), Target(2))

    def batch(step: int, v: int) -> Batch | None:
        rows = sampler.row_ids(step, v)
        return table.take(rows) if len(rows) else None

    l2 = 0.0 if optimizer == "ftrl" else 0.01
    return Problem(learner, Rule(transform, rate, planned, l2=l2), batch, V, seed=5)


@cache
def truth(model: str, optimizer: str, weighted: bool = False) -> str:
    return simulate_sparse(problem(model, optimizer, weighted=weighted), STEPS).final.digest()


def plain_loop(p: Problem) -> dict[str, np.ndarray]:
    """Written down once more with full vectors and masks: leaves, pairwise sums, and updates where a row was."""
    learner = p.learner
    assert isinstance(learner, BoundHashed)
    params = learner.initial(p.seed)
    state = {slot: np.zeros_like(params) for slot in p.rule.transform.slots}
    penalized = learner.layout.penalized(Range(0, len(params)))
    for step in range(STEPS):
        batches = [p.batch(step, v) for v in range(V)]
        touched = np.zeros(len(params), np.bool_)
        touched[-learner.tail :] = True
        sums: list[Partial | None] = []
        for b in batches:
            if b is None:
                sums.append(None)
                continue
            gradient = np.empty_like(params)
            sums.append(Partial(gradient, learner.value_and_grad(params, b, gradient), len(b)))
            table = touched[: -learner.tail].reshape(-1, learner.width)
            table[b.codes[b.codes < 2**BITS]] = True
        while len(sums) > 1:
            pairs = zip(sums[::2], sums[1::2], strict=True)
            sums = [(a or b) if a is None or b is None else Partial(a.gradient + b.gradient, 0.0, 0) for a, b in pairs]
        g = sums[0].gradient / np.float32(p.rule.planned(step))
        if p.rule.l2:
            g[penalized] += np.float32(p.rule.l2) * params[penalized]
        new, new_state = np.empty_like(params), {slot: np.empty_like(params) for slot in state}
        with np.errstate(all="ignore"):
            p.rule.transform.update(g, np.float32(p.rule.rate(step)), params, state, new, new_state)
        params = np.where(touched, new, params)
        state = {slot: np.where(touched, new_state[slot], state[slot]) for slot in state}
    return {"params": params, **state}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_the_protocol_is_the_plain_loop(model: str, optimizer: str) -> None:
    final = simulate_sparse(problem(model, optimizer), STEPS).final
    expected = plain_loop(problem(model, optimizer))
    assert expected.keys() == {"params", *final.state}
    for name, values in {"params": final.params, **final.state}.items():
        assert values.tobytes() == expected[name].tobytes(), name
    if optimizer == "momentum":  # what no row touched is as it began
        untouched = expected["params"] == problem(model, optimizer).learner.initial(5)
        assert 0.2 < untouched.mean() < 0.95


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("optimizer", ["momentum", "adagrad"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("workers", "servers"), [(1, 3), (2, 1), (3, 2), (5, 4), (8, 2)])
def test_workers_and_servers_change_no_byte(
    model: str, optimizer: str, weighted: bool, workers: int, servers: int
) -> None:
    outcome = simulate_sparse(problem(model, optimizer, weighted=weighted), STEPS, n_workers=workers, n_servers=servers)
    assert outcome.final.digest() == truth(model, optimizer, weighted)
    assert outcome.violations == []


@pytest.mark.parametrize("seed", range(40))
def test_hostile_schedules_change_no_byte(seed: int) -> None:
    model, optimizer = list(MODELS)[seed % 2], list(OPTIMIZERS)[seed % 4]
    outcome = simulate_sparse(
        problem(model, optimizer),
        STEPS,
        n_workers=1 + seed % 7,
        n_servers=1 + seed % 3,
        faults=Faults(seed, **HOSTILE),
    )
    assert outcome.violations == []
    assert outcome.final.digest() == truth(model, optimizer)


def test_the_schedules_are_hostile() -> None:
    outcomes = [
        simulate_sparse(problem(), STEPS, n_workers=3, n_servers=2, faults=Faults(seed, **HOSTILE)) for seed in range(8)
    ]
    assert len({o.order for o in outcomes}) == 8
    assert min(o.reordered for o in outcomes) > 50
    assert sum(o.kills for o in outcomes) > 5
    assert sum(o.lost for o in outcomes) > 50


def test_a_run_that_touches_everything_is_the_dense_one() -> None:
    """Where every step's rows touch every coordinate, sparse and dense training are the same function."""
    whole = problem("logistic", "momentum")
    codes = np.arange(32, dtype=np.int32).reshape(32, 1)
    rows = [whole.batch(0, v) for v in range(V)]
    batches = [Batch(b.numeric, codes[4 * v : 4 * v + 4], b.label) for v, b in enumerate(rows) if b is not None]
    learner = HashedLogisticRegression(5).bind(Inputs(4, (32,), 5), Target(2))
    every = Problem(learner, whole.rule, lambda _, v: batches[v], V, seed=5)
    sparse = simulate_sparse(every, STEPS, n_workers=3).final
    dense = simulate(every, STEPS, n_workers=2).final
    assert sparse.digest() == dense.digest()


def test_a_diverging_run_names_its_step() -> None:
    p = problem("machine", "momentum")
    rule = Rule(SGD(1e30), lambda _: 1e30, p.rule.planned)
    with pytest.raises(DivergedError):
        simulate_sparse(Problem(p.learner, rule, p.batch, V), STEPS, n_workers=3, n_servers=2)
