"""What a run tells Ray's metrics, from which Prometheus has them: how it stands, a few times a second, as gauges.

    Attempt ─▶ Standing ─▶ Meters.samples ─▶ ray.util.metrics ─▶ the agent of the driver's node ─▶ /metrics

Ray puts ``ray_`` before each name. ``clusters/grafana.json`` draws them. Where Ray has no agent they go nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import NamedTuple

from ray.util.metrics import Gauge

from raysgd.runtime.rates import Reading

#: every metric, and what it says; each has the tag ``run``
METRICS: dict[str, str] = {
    "raysgd_step": "Steps committed by all servers.",
    "raysgd_total_steps": "Steps at the end of the run.",
    "raysgd_epoch": "Epochs of training that are done, with fractions.",
    "raysgd_attempt": "The attempt: 1 for the first start of the run, one more at each continuation.",
    "raysgd_rows_per_second": "Rows used for training a second, over the newest steps.",
    "raysgd_train_loss": "Mean training loss of the newest steps.",
    "raysgd_learning_rate": "Learning rate of the newest step.",
    "raysgd_valid_loss": "Mean loss of the validation data, as it was scored last.",
    "raysgd_staleness_steps": "The most steps that a version lagged which a gradient was computed from.",
    "raysgd_workers": "Workers that are alive.",
    "raysgd_workers_awaited": "Workers that Ray was asked for and that are not there yet.",
    "raysgd_checkpoint_step": "Step of the newest checkpoint.",
    "raysgd_checkpoint_age_seconds": "Seconds since the newest checkpoint was begun.",
    "raysgd_worker_virtual_workers": "Virtual workers that a worker carries.",
    "raysgd_worker_waiting_share": "Share of a worker's time, since the last look, in which it waits for servers.",
    "raysgd_worker_pushed_bytes": "Bytes of gradients that a worker has handed to the servers; dense models only.",
    "raysgd_server_step": "Steps that a server has committed.",
    "raysgd_server_replaced": "How often a server was replaced by a spare or a replica.",
}

#: the tags of a metric besides ``run``
TAGS = {name: tag for name in METRICS for tag in ("worker", "server") if name.startswith(f"raysgd_{tag}_")}


class Sample(NamedTuple):
    """One number. tags: besides the run's name"""

    name: str
    value: float
    tags: dict[str, str]


@dataclass(frozen=True)
class Carrier:
    """A worker that carries virtual workers. pushes: vectors of ``push_bytes`` bytes that it pushes a step"""

    virtual_workers: int
    pushes: int
    reading: Reading | None


@dataclass(frozen=True)
class Standing:
    """How a run stands. recent: loss, learning rate and rows a second of the newest steps

    push_bytes: of one gradient, 0 where pushes have no fixed size;  server_steps, server_replaced: by server
    """

    step: int
    total_steps: int
    steps_per_epoch: int
    attempt: int
    recent: Mapping[str, float] | None
    valid_loss: float | None
    staleness: int
    workers: int
    awaited: int
    checkpoint_step: int
    checkpoint_age_s: float
    push_bytes: int
    carriers: Mapping[int, Carrier] = field(default_factory=dict)
    server_steps: tuple[int, ...] = ()
    server_replaced: tuple[int, ...] = ()


class Meters:
    """The gauges of one run. run: its name"""

    def __init__(self, run: str) -> None:
        self.run = run
        self._gauges: dict[str, Gauge] = {}
        #: by worker: the reading before, and bytes pushed under earlier deals and up to it
        self._before: dict[int, Reading] = {}
        self._pushed: dict[int, int] = {}

    def tell(self, standing: Standing) -> None:
        """Set the gauges; what is not a number stays as it was."""
        for name, value, tags in self.samples(standing):
            if isfinite(value):
                self._gauge(name).set(value, {"run": self.run, **tags})

    def samples(self, standing: Standing) -> list[Sample]:
        """What the gauges are set to; readings are compared with those of the call before."""
        recent = standing.recent or {}
        plain: dict[str, float | None] = {
            "raysgd_step": standing.step,
            "raysgd_total_steps": standing.total_steps,
            "raysgd_epoch": standing.step / standing.steps_per_epoch,
            "raysgd_attempt": standing.attempt,
            "raysgd_rows_per_second": recent.get("rows_per_s"),
            "raysgd_train_loss": recent.get("loss"),
            "raysgd_learning_rate": recent.get("learning_rate"),
            "raysgd_valid_loss": standing.valid_loss,
            "raysgd_staleness_steps": standing.staleness,
            "raysgd_workers": standing.workers,
            "raysgd_workers_awaited": standing.awaited,
            "raysgd_checkpoint_step": standing.checkpoint_step,
            "raysgd_checkpoint_age_seconds": standing.checkpoint_age_s,
        }
        found = [Sample(name, float(value), {}) for name, value in plain.items() if value is not None]
        for number, carrier in standing.carriers.items():
            found += self._of_worker(number, carrier, standing.push_bytes)
        for i, (step, replaced) in enumerate(zip(standing.server_steps, standing.server_replaced, strict=True)):
            tags = {"server": str(i)}
            found += [Sample("raysgd_server_step", step, tags), Sample("raysgd_server_replaced", replaced, tags)]
        return found

    def _of_worker(self, number: int, carrier: Carrier, push_bytes: int) -> list[Sample]:
        tags = {"worker": str(number)}
        found = [Sample("raysgd_worker_virtual_workers", carrier.virtual_workers, tags)]
        if (now := carrier.reading) is None:
            return found
        before = self._before.get(number, Reading(now.incarnation))
        if before.incarnation != now.incarnation:  # another share: counted anew
            before = Reading(now.incarnation)
        self._before[number] = now
        loop_s, compute_s = now.loop_s - before.loop_s, now.compute_s - before.compute_s
        if loop_s > 0:
            found.append(Sample("raysgd_worker_waiting_share", max(0.0, 1 - compute_s / loop_s), tags))
        if push_bytes:
            pushed = (now.steps - before.steps) * carrier.pushes * push_bytes
            self._pushed[number] = self._pushed.get(number, 0) + pushed
            found.append(Sample("raysgd_worker_pushed_bytes", self._pushed[number], tags))
        return found

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            keys = ("run", *([TAGS[name]] if name in TAGS else []))
            self._gauges[name] = Gauge(name, METRICS[name], keys)
        return self._gauges[name]
