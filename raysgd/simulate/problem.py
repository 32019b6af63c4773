"""What is trained, how hostile the schedule is, and what came out: plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from raysgd.learn.batch import Batch
from raysgd.learn.losses import runs
from raysgd.learn.models.base import ValueAndGrad
from raysgd.learn.parameters import Range
from raysgd.protocol.compute import LocalSteps
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.generation import Generation
from raysgd.protocol.ledger import Line, Rows
from raysgd.protocol.update import Rule


@dataclass(frozen=True)
class Problem:
    """What is trained: ``batch(step, v)`` gives virtual worker v's rows of a step, or None.

    rows: the sampler behind ``batch``, for the check of which rows were used; None: they are not checked
    """

    learner: ValueAndGrad
    rule: Rule
    batch: Callable[[int, int], Batch | None]
    n_virtual: int
    seed: int = 0
    consistency: Consistency = field(default_factory=Consistency)
    rows: Rows | None = None

    @property
    def local(self) -> LocalSteps | None:
        """How virtual workers walk by themselves, where a round is several steps."""
        if self.rule.rounds.local_steps == 1:
            return None
        layout = self.learner.layout
        return LocalSteps(self.rule, self.n_virtual, runs(layout.penalized(Range(0, layout.n_params))))

    def initial(self) -> Generation:
        params = self.learner.initial(self.seed)
        return Generation(0, params, {slot: np.zeros_like(params) for slot in self.rule.transform.slots})


@dataclass(frozen=True, slots=True)
class Faults:
    """How hostile the schedule is: probabilities per delivery (``duplicate``, ``lose``) or per commit of a shard (what
    befalls processes).

    retry: how often some worker's timer fires, per delivery;  in_order: deliver first come, first served
    checkpoint_every: versions between two checkpoints, which a lost memory rolls back to; 0: only the start is one
    patience: deliveries after which a run that has not ended is called stuck; 0: as many as ``steps`` ask for
    """

    seed: int = 0
    duplicate: float = 0.0
    lose: float = 0.0
    kill: float = 0.0
    retry: float = 0.01
    in_order: bool = False
    #: all workers are killed
    kill_all: float = 0.0
    #: a worker hangs; if it wakes, then as one that is believed dead
    hang: float = 0.0
    #: a worker that was asked for dies while it starts
    stillborn: float = 0.0
    #: a worker that nobody asked for joins
    join: float = 0.0
    #: a worker is announced to go, and goes
    drain: float = 0.0
    #: the workers' rates are compared; some are slow, and their shares move
    slow: float = 0.0
    #: a server's process dies, half of them while they write; its memory outlives it
    server_kill: float = 0.0
    #: a server dies with its memory
    node_loss: float = 0.0
    #: a checkpoint is taken between two boundaries
    midway: float = 0.0
    #: every server has a replica; which dies
    replicas: bool = False
    replica_kill: float = 0.0
    checkpoint_every: int = 0
    patience: int = 0

    def deliveries(self, steps: int) -> int:
        """The most deliveries that ``steps`` steps may take."""
        return self.patience or 20_000 + 2_000 * steps


@dataclass(slots=True)
class Outcome:
    """What came out, and how hostile the schedule really was. ``order``: a digest of the order of deliveries."""

    final: Generation
    delivered: int = 0
    duplicated: int = 0
    reordered: int = 0
    lost: int = 0
    #: how often each fault of a process befell one
    faults: Counter[str] = field(default_factory=Counter)
    #: versions that were computed once more after a roll-back, as the driver reports them
    recomputed: int = 0
    order: str = ""
    #: what the servers committed, as the driver was told
    ledger: list[Line] = field(default_factory=list)
    #: invariants that did not hold, as sentences; empty in a correct protocol
    violations: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.faults["kill"]
