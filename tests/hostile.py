"""Small problems, and schedules with faults of all kinds that the tests and ``make soak`` put them through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import inf

import numpy as np

from raysgd.data.sampler import Sampler
from raysgd.errors import RaysgdError
from raysgd.learn.batch import Batch, Float32, Inputs, Int64, Target
from raysgd.learn.losses import Loss
from raysgd.learn.models import LogisticRegression
from raysgd.learn.models.base import ValueAndGrad
from raysgd.learn.models.hashed import HashedLogisticRegression
from raysgd.learn.parameters import Layout
from raysgd.learn.schedules import ExponentialDecay
from raysgd.learn.transforms import SGD
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.rounds import Rounds
from raysgd.protocol.update import PlannedRows, Rule
from raysgd.simulate import Faults, Outcome, Problem, simulate
from raysgd.simulate_sparse import simulate_sparse

V = 8
N_SERVERS = 2
N_ROWS = 61
BITS = 4

#: versions that are trained: a round of three local steps is one
STEPS = {"bsp": 20, "ssp": 20, "counted": 20, "sparse": 20, "clipped": 20, "local": 12, "copied": 20}
#: of eight schedules four are of the plain kind
MIX = ("bsp", "bsp", "copied", "bsp", "bsp", "ssp or counted", "sparse", "clipped or local")

#: every kind of fault; in a schedule of 20 steps about: 1 worker killed, 1 in 2 hung, 1 server dead, 1 in 5 rolled back
EVERYTHING = {
    "duplicate": 0.1,
    "lose": 0.03,
    "kill": 0.03,
    "kill_all": 0.003,
    "hang": 0.012,
    "stillborn": 0.2,
    "join": 0.012,
    "drain": 0.012,
    "slow": 0.03,
    "server_kill": 0.025,
    "node_loss": 0.005,
    "midway": 0.02,
    "checkpoint_every": 6,
}

#: with a replica of every server, more of them are lost with their memory
COPIED = {"replicas": True, "replica_kill": 0.02, "node_loss": 0.03}

#: how far the loss under SSP may be from BSP's, which is 0.3
SSP_LOSS = 0.03


#: what a broken protocol may raise instead of ending badly
RAISED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RaysgdError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Remembered:
    """A sampler whose draws are remembered: the same few steps are drawn by thousands of schedules."""

    def __init__(self, sampler: Sampler) -> None:
        self.n_rows, self.steps_per_epoch = sampler.n_rows, sampler.steps_per_epoch
        self.rows_in_step = cache(sampler.rows_in_step)
        self._row_ids = cache(sampler.row_ids)

    def row_ids(self, step: int, virtual_worker: int) -> Int64:
        return self._row_ids(step, virtual_worker)


@dataclass(frozen=True)
class Counting:
    """A model whose gradient is how often each parameter is meant, whatever the parameters are: whole numbers.

    Without momentum, and with powers of two for rate and rows, float32 sums are exact: so each gradient has counted
    once exactly if the bytes are those of one worker, also where staleness is allowed (ASP).
    """

    like: ValueAndGrad

    @property
    def layout(self) -> Layout:
        return self.like.layout

    @property
    def loss(self) -> Loss:
        return self.like.loss

    @property
    def inputs(self) -> Inputs:
        return self.like.inputs

    def initial(self, seed: int) -> Float32:  # noqa: ARG002 - nothing is random here
        return np.zeros(self.layout.n_params, np.float32)

    def value_and_grad(self, params: Float32, batch: Batch, out: Float32) -> float:  # noqa: ARG002 - see above
        out[:] = np.bincount(batch.codes[:, 0], minlength=len(out))
        out[-1] = len(batch)
        return float(len(batch))

    def scores(self, params: Float32, batch: Batch) -> Float32:
        return self.like.scores(params, batch)


@cache
def problem(kind: str) -> Problem:
    """Logistic regression on three numbers and a category, one row a virtual worker; 61 rows divide by nothing."""
    random = np.random.default_rng(7)
    numeric = random.standard_normal((N_ROWS, 3)).astype(np.float32)
    codes = random.integers(0, 2**BITS, (N_ROWS, 1)).astype(np.int32)
    label = (numeric[:, 0] + 0.5 * random.standard_normal(N_ROWS) > 0).astype(np.float32)
    table = Batch(numeric, codes, label)
    rows = Remembered(Sampler([20, 1, 25, 15], V, V, seed=3, window_rows=9))
    rate = ExponentialDecay(0.3, decay_rate=0.5, every="1epoch").resolve(rows.steps_per_epoch, 20)
    rule = Rule(SGD(momentum=0.9), rate, PlannedRows(V, N_ROWS, rows.steps_per_epoch), l2=0.01)
    sparse = HashedLogisticRegression(BITS).bind(Inputs(3, (2**BITS,), BITS), Target(2))
    dense = LogisticRegression().bind(Inputs(3, (2**BITS,)), Target(2))

    @cache
    def batch(step: int, v: int) -> Batch | None:
        ids = rows.row_ids(step, v)
        return table.take(ids) if len(ids) else None

    made = Problem(sparse if kind == "sparse" else dense, rule, batch, V, rows=rows)
    changed = {
        "ssp": replace(made, consistency=Consistency(2)),
        "counted": replace(
            made,
            learner=Counting(dense),
            rule=Rule(SGD(), lambda _step: 0.5, PlannedRows(V, V * rows.steps_per_epoch, rows.steps_per_epoch)),
            consistency=Consistency(inf),
        ),
        "clipped": replace(made, rule=replace(rule, clip_norm=0.3)),
        "local": replace(made, rule=replace(rule, rounds=Rounds(3, rows.steps_per_epoch))),
    }
    return changed.get(kind, made)


def train(kind: str, **how: object) -> Outcome:
    run = simulate_sparse if kind == "sparse" else simulate
    return run(problem(kind), STEPS[kind], **how)  # type: ignore[arg-type]


@cache
def truth(kind: str) -> str:
    """The digest of one worker and one server without faults."""
    return train(kind).final.digest()


def loss(params: Float32) -> float:
    """The dense model's mean loss over all rows."""
    p, out = problem("bsp"), np.empty_like(params)
    assert p.rows is not None
    batches = [p.batch(step, v) for step in range(p.rows.steps_per_epoch) for v in range(V)]
    return sum(p.learner.value_and_grad(params, batch, out) for batch in batches if batch) / N_ROWS


@cache
def bsp_loss() -> float:
    return loss(train("bsp").final.params)


def kind_of(seed: int) -> str:
    kind = MIX[seed // V % len(MIX)]
    return kind if kind in STEPS else kind.split(" or ")[seed % 2]


def schedule(seed: int, kind: str | None = None, **changes: float) -> Outcome:
    """One schedule. The seed decides what is trained, how many workers begin, and how many may carry at once."""
    kind = kind or kind_of(seed)
    copied = kind == "copied" or (kind in ("clipped", "local", "ssp", "counted", "sparse") and seed % 4 < 2)
    faults = Faults(seed, **{**EVERYTHING, **(COPIED if copied else {}), **changes})  # type: ignore[arg-type]
    most = 1 + (5 * seed + seed // V) % V
    return train(kind, n_workers=1 + seed % V, n_servers=N_SERVERS, faults=faults, most=most)


def complaints(outcome: Outcome, kind: str) -> list[str]:
    """What is wrong with how a schedule ended; nothing, in a correct protocol."""
    if outcome.violations:
        return outcome.violations
    if kind == "ssp":
        apart = abs(loss(outcome.final.params) - bsp_loss())
        return [] if apart < SSP_LOSS else [f"the loss is {apart} from that of BSP"]
    digest = outcome.final.digest()
    return [] if digest == truth(kind) else [f"I3: the digest is {digest}, not {truth(kind)}"]


def wrong(seed: int, kind: str | None = None, **changes: float) -> list[str]:
    """What is wrong with one schedule; an exception is a complaint, too."""
    kind = kind or kind_of(seed)
    try:
        return complaints(schedule(seed, kind, **changes), kind)
    except RAISED as error:
        return [f"{type(error).__name__}: {error}"]
