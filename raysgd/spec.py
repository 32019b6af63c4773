"""What a run is made of: frozen dataclasses that say what is wrong with them, and the part that determines the bytes.

data, model, optimizer, train   determine the trained bytes; resuming compares them
scaling, run                    never do
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import floor, inf
from numbers import Integral
from pathlib import PurePath
from typing import Any

from raysgd.capacity import Resources, resource_problems, total
from raysgd.data.dataset import ArrowDataset
from raysgd.learn.checks import (
    address_problems,
    choice_problems,
    count_problems,
    float32_problems,
    number_problems,
    shown,
    text_problems,
)
from raysgd.learn.models import MLP, FactorizationMachine, HashedLogisticRegression
from raysgd.learn.models.base import Model
from raysgd.learn.schedules import Duration, duration_problems
from raysgd.learn.transforms import FTRL, SGD, AdaGrad
from raysgd.sections import MODELS, OPTIMIZERS, Table, field_table, plain, to_table, type_name

#: Fields of ArrowDataset that say where the rows lie, not what they are: fingerprints are compared instead.
PLACES = ("path", "filesystem")

#: What can be done where a step gives NaN or infinite values.
ON_DIVERGENCE = ("stop", "lower_learning_rate")

#: File systems allow 255 bytes a name.
MAX_NAME_BYTES = 200


@dataclass(frozen=True)
class TrainConfig:
    """How the rows become steps: every field determines the trained bytes.

    batch_size: rows per step over all workers, a multiple of ``virtual_workers``
    epochs: passes over the data
    seed: of the initial weights and of every shuffle
    virtual_workers: equal parts of every batch; the most workers that can ever carry them
    staleness: steps that the parameters may lag which a gradient is computed from: 0 is bulk-synchronous (BSP), k
        stale-synchronous (SSP), inf asynchronous (ASP); only BSP gives the same bytes every time
    local_steps: steps that a virtual worker takes by itself, plain SGD, between two pushes
    clip_norm: the greatest norm of the mean gradient, which is scaled to it; None: no limit; needs staleness 0
    on_divergence: where a step gives NaN or infinite values: "stop", or "lower_learning_rate": go back to the last
        good state and go on with smaller steps

    >>> TrainConfig(batch_size=100).problems()
    ['batch_size must be a multiple of virtual_workers (8), got 100; use 96 or 104']
    """

    batch_size: int = 512
    epochs: int = 1
    seed: int = 0
    virtual_workers: int = 8
    staleness: float = 0
    local_steps: int = 1
    clip_norm: float | None = None
    on_divergence: str = "stop"

    def __post_init__(self) -> None:
        given: object = self.staleness
        if given == "inf":  # as JSON has it
            object.__setattr__(self, "staleness", inf)

    def problems(self) -> list[str]:
        """One sentence for each violation."""
        counts = [count_problems(name, getattr(self, name)) for name in ("batch_size", "epochs", "virtual_workers")]
        found = [*counts[0], *counts[1], *count_problems("seed", self.seed, at_least=0), *counts[2]]
        if not counts[0] and not counts[2] and self.batch_size % self.virtual_workers:
            found.append(self._multiple())
        if self.staleness != inf and count_problems("staleness", self.staleness, at_least=0):
            found.append(f"staleness must be a whole number >= 0 or inf, got {shown(self.staleness)}")
        found += count_problems("local_steps", self.local_steps)
        if self.clip_norm is not None:
            found += (clip := float32_problems("clip_norm", self.clip_norm, above=0))
            if not clip and self.staleness != 0:
                found.append(
                    "clip_norm needs staleness 0: the norm is that of a whole step, and with staleness pushes count "
                    f"one by one; got staleness {self.staleness!r}"
                )
        return found + choice_problems("on_divergence", self.on_divergence, ON_DIVERGENCE)

    def _multiple(self) -> str:
        below = self.batch_size // self.virtual_workers * self.virtual_workers
        use = f"{below} or {below + self.virtual_workers}" if below else str(self.virtual_workers)
        allowed = f"a multiple of virtual_workers ({self.virtual_workers})"
        return f"batch_size must be {allowed}, got {self.batch_size}; use {use}"


@dataclass(frozen=True)
class ScalingConfig:
    """What the cluster lends to the run: never changes the trained bytes.

    num_workers: Ray actors that compute gradients: a number, or a pair (least, most) between which it may change while
        the run goes on
    num_servers: Ray actors that hold the parameters
    replicas: copies of every server on another node than its own, 0 or 1: with one, a node can be lost without a step
    worker_cpus, server_cpus: logical CPUs that each of them asks for
    worker_resources, server_resources: what else each of them asks for: Ray's resources by name and amount. Nodes that
        alone have one keep others out: servers on machines that stay, workers on those that come and go
    cache_bytes: decoded rows that each worker keeps in memory, bytes
    placement_timeout_s: seconds to wait for an existing cluster to place the actors

    >>> ScalingConfig(num_workers=0).problems()
    ['num_workers must be a whole number >= 1, got 0']
    >>> ScalingConfig(num_workers=(2, 6)).least_workers, ScalingConfig(num_workers=3).most_workers
    (2, 3)
    """

    num_workers: Any = 1  # int or (int, int): least_workers and most_workers are what it means
    num_servers: int = 1
    replicas: int = 0
    worker_cpus: float = 1.0
    server_cpus: float = 0.5
    worker_resources: dict[str, float] = field(default_factory=dict)
    server_resources: dict[str, float] = field(default_factory=dict)
    cache_bytes: int = 268_435_456
    placement_timeout_s: float = 25.0

    def __post_init__(self) -> None:
        if isinstance(self.num_workers, list):  # as JSON and TOML have a pair
            object.__setattr__(self, "num_workers", tuple(self.num_workers))

    @property
    def least_workers(self) -> int:
        """The workers without which a run does not begin."""
        return int(self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers)

    @property
    def most_workers(self) -> int:
        """The workers beyond which none joins."""
        return int(self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers)

    @property
    def cpus(self) -> float:
        """Logical CPUs that the actors of a run ask for together at the least."""
        servers = self.num_servers * (1 + self.replicas)
        return self.least_workers * self.worker_cpus + servers * self.server_cpus

    def local_workers(self, cores: int) -> int:
        """How many workers a cluster that is started on a machine of so many cores has room for: as many as the cores
        bear beside the servers, between the least and the most.

        >>> [ScalingConfig(num_workers=(1, 4)).local_workers(cores) for cores in (1, 2, 3, 4, 16)]
        [1, 1, 2, 3, 4]
        """
        servers = self.num_servers * (1 + self.replicas) * self.server_cpus
        borne = floor((cores - servers) / self.worker_cpus + 1e-9)  # three times 0.1 is 0.3
        return min(max(borne, self.least_workers), self.most_workers)

    def local_cpus(self, cores: int) -> float:
        """Logical CPUs of a cluster that is started on a machine of so many cores.

        >>> ScalingConfig(num_workers=(1, 4)).local_cpus(4), ScalingConfig(num_workers=2).local_cpus(16)
        (3.5, 2.5)
        """
        return self.cpus + (self.local_workers(cores) - self.least_workers) * self.worker_cpus

    def local_room(self, cores: int) -> str:
        """What to say of that room where the number of workers is a range.

        >>> ScalingConfig(num_workers=(1, 4)).local_room(2), ScalingConfig(num_workers=4).local_room(2)
        (', room for 1 of at most 4 workers', '')
        """
        if self.least_workers == self.most_workers:
            return ""
        return f", room for {self.local_workers(cores)} of at most {self.most_workers} workers"

    @property
    def asks(self) -> dict[str, list[Resources]]:
        """What each actor asks for at the least, by kind.

        >>> ScalingConfig(num_workers=(1, 4), server_resources={"stays": 0.001}).asks
        {'worker': [{'CPU': 1.0}], 'server': [{'CPU': 0.5, 'stays': 0.001}]}
        """
        worker, server = (
            {"CPU": self.worker_cpus, **self.worker_resources},
            {"CPU": self.server_cpus, **self.server_resources},
        )
        found: dict[str, list[Resources]] = {
            "worker": [worker] * self.least_workers,
            "server": [server] * self.num_servers,
        }
        return found | ({"replica": [server] * self.num_servers} if self.replicas else {})

    @property
    def resources(self) -> dict[str, float]:
        """What the actors ask for together besides CPUs, workers that may come later included."""
        most = [self.worker_resources] * self.most_workers
        return total([*most, *[self.server_resources] * self.num_servers * (1 + self.replicas)])

    def problems(self) -> list[str]:
        """One sentence for each violation."""
        return [
            *self._worker_problems(),
            *count_problems("num_servers", self.num_servers),
            *self._replica_problems(),
            *_cpu_problems("worker_cpus", self.worker_cpus),
            *_cpu_problems("server_cpus", self.server_cpus),
            *resource_problems("worker_resources", self.worker_resources),
            *resource_problems("server_resources", self.server_resources),
            *count_problems("cache_bytes", self.cache_bytes, at_least=0),
            *number_problems("placement_timeout_s", self.placement_timeout_s, above=0),
        ]

    def _replica_problems(self) -> list[str]:
        good = isinstance(self.replicas, Integral) and not isinstance(self.replicas, bool) and 0 <= self.replicas <= 1
        return [] if good else [f"replicas must be 0 or 1, got {shown(self.replicas)}"]

    def _worker_problems(self) -> list[str]:
        given = self.num_workers
        if isinstance(given, Integral):
            return count_problems("num_workers", given)
        pair = isinstance(given, tuple) and len(given) == 2 and not any(count_problems("", count) for count in given)
        if pair and given[0] <= given[1]:
            return []
        allowed = "a whole number >= 1 or a pair of them, the least and the most"
        return [f"num_workers must be {allowed}, got {shown(given)}"]


def _cpu_problems(name: str, value: object) -> list[str]:
    """Ray counts CPUs in ten-thousandths."""
    found = number_problems(name, value, above=0)
    if found or float(value) >= 1e-4:  # type: ignore[arg-type]
        return found
    return [f"{name} must be at least 0.0001, got {shown(value)}"]


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints stay: the ``num_to_keep`` newest and the best, or all of them (None).

    >>> CheckpointConfig(num_to_keep=0).problems()
    ['num_to_keep must be a whole number >= 1, got 0']
    """

    num_to_keep: int | None = None

    def problems(self) -> list[str]:
        """One sentence for each violation."""
        return [] if self.num_to_keep is None else count_problems("num_to_keep", self.num_to_keep)


@dataclass(frozen=True)
class FailureConfig:
    """How many losses of workers or servers without progress between them a run bears.

    max_failures: -1: no limit; 0: the first loss ends the run

    >>> FailureConfig(max_failures=-2).problems()
    ['max_failures must be a whole number >= -1 (no limit), got -2']
    """

    max_failures: int = 3

    def problems(self) -> list[str]:
        """One sentence for each violation."""
        found = count_problems("max_failures", self.max_failures, at_least=-1)
        return [sentence.replace(">= -1", ">= -1 (no limit)", 1) for sentence in found]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lies and what it writes when: never changes the trained bytes.

    name: the run's directory under ``storage_path``; the same name continues the run
    storage_path: a directory or a URI (``s3://bucket/runs``) that every node can reach
    validate_every, checkpoint_every, log_every: steps, or epochs as ``"1epoch"``; log_every=None chooses
    checkpoint_seconds: a checkpoint also where this long has passed since the last one; None: only ``checkpoint_every``
    stop_after_steps: ends cleanly with a checkpoint after this step, without changing any schedule
    address: of a running Ray cluster; None starts one or takes the one around it

    >>> RunConfig(name="../flights").problems()
    ["name must be one directory name without '/', ':' or a first '.', of at most 200 bytes, got '../flights'"]
    """

    name: str | None = None
    storage_path: str = "runs"
    validate_every: Duration = "1epoch"
    checkpoint_every: Duration = "1epoch"
    checkpoint_seconds: float | None = None
    stop_after_steps: int | None = None
    log_every: Duration | None = None
    checkpoint_config: CheckpointConfig = field(default_factory=CheckpointConfig)
    failure_config: FailureConfig = field(default_factory=FailureConfig)
    address: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.storage_path, os.PathLike):
            object.__setattr__(self, "storage_path", os.fspath(self.storage_path))

    def problems(self) -> list[str]:
        """One sentence for each violation."""
        found = self._name_problems() + self._storage_problems()
        found += duration_problems("validate_every", self.validate_every)
        found += duration_problems("checkpoint_every", self.checkpoint_every)
        if self.checkpoint_seconds is not None:
            found += number_problems("checkpoint_seconds", self.checkpoint_seconds, above=0)
        found += [] if self.log_every is None else duration_problems("log_every", self.log_every)
        found += [] if self.stop_after_steps is None else count_problems("stop_after_steps", self.stop_after_steps)
        found += [] if self.address is None else address_problems("address", self.address)
        if not isinstance(self.checkpoint_config, CheckpointConfig):
            found.append(f"checkpoint_config must be a CheckpointConfig, got {self.checkpoint_config!r}")
        else:
            found += self.checkpoint_config.problems()
        if not isinstance(self.failure_config, FailureConfig):
            return [*found, f"failure_config must be a FailureConfig, got {self.failure_config!r}"]
        return found + [f"failure_config.{sentence}" for sentence in self.failure_config.problems()]

    def _name_problems(self) -> list[str]:
        if self.name is None:
            return []
        if isinstance(self.name, str) and self.name.isprintable() and not set(self.name) & set("/\\:"):
            fits = self.name.strip() and not self.name.startswith(".")
            if fits and len(self.name.encode()) <= MAX_NAME_BYTES:
                return []
        allowed = f"one directory name without '/', ':' or a first '.', of at most {MAX_NAME_BYTES} bytes"
        return [f"name must be {allowed}, got {shown(self.name)}"]

    def _storage_problems(self) -> list[str]:
        found = text_problems("storage_path", self.storage_path)
        if found or "://" in self.storage_path:
            return found
        if "working_dir_files" not in PurePath(os.path.abspath(self.storage_path)).parts:
            return []
        remedy = "give an absolute path outside of it or a URI (--storage-path)"
        return [f"storage_path must not lie in a Ray job's working directory, which goes with the job; {remedy}"]


@dataclass(frozen=True)
class RunSpec:
    """Everything that ``raysgd train`` and ``Trainer`` know about a run.

    The validation data takes its column roles from ``data``: what it names itself must agree.
    """

    data: ArrowDataset
    validation: ArrowDataset | None
    model: Model
    optimizer: SGD | AdaGrad | FTRL
    train: TrainConfig = field(default_factory=TrainConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def problems(self) -> list[str]:
        """One sentence for each violation, each beginning with ``section.field``."""
        found = self._kind_problems()
        if found:
            return found
        for section in ("data", "validation", "model", "optimizer", "train", "scaling", "run"):
            part = getattr(self, section)
            sentences = [] if part is None else [f"{section}.{sentence}" for sentence in part.problems()]
            # What the validation data has from the training data is told once.
            found += [s for s in sentences if s.replace("validation.", "data.", 1) not in found]
        return found + self._between()

    def _kind_problems(self) -> list[str]:
        found = []
        if type_name(self.model, MODELS) is None:
            found.append(f"model must be one of {_names(MODELS)}, got {self.model!r}")
        if type_name(self.optimizer, OPTIMIZERS) is None:
            found.append(f"optimizer must be one of {_names(OPTIMIZERS)}, got {self.optimizer!r}")
        kinds = {"data": ArrowDataset, "train": TrainConfig, "scaling": ScalingConfig, "run": RunConfig}
        for section, cls in kinds.items():
            if not isinstance(getattr(self, section), cls):
                found.append(f"{section} must be of type {cls.__name__}, got {getattr(self, section)!r}")
        if not isinstance(self.validation, ArrowDataset | None):
            found.append(f"validation must be of type ArrowDataset or None, got {self.validation!r}")
        return found

    def _between(self) -> list[str]:
        """Violations that only two sections together show."""
        found = []
        if self.data.label is None:
            found.append("data.label is missing: name the column to predict")
        found += self._share_problems()
        if isinstance(self.optimizer, AdaGrad) and self.train.local_steps != 1:
            found.append(
                f"train.local_steps must be 1 with AdaGrad, got {self.train.local_steps}: between two pushes workers "
                "take plain steps at the optimizer's rate, and AdaGrad's is of another scale; use SGD"
            )
        return found + self._sparse_problems() + self._role_problems()

    def _share_problems(self) -> list[str]:
        scaling, parts = self.scaling, self.train.virtual_workers
        if scaling.problems() or count_problems("", parts) or scaling.most_workers <= parts:
            return []
        allowed = f"at most train.virtual_workers ({parts})"
        remedy = "ask for fewer workers, or raise train.virtual_workers (which changes the trained bytes)"
        return [f"scaling.num_workers must be {allowed}, got {scaling.num_workers}: {remedy}"]

    def _sparse_problems(self) -> list[str]:
        """What a hashed model, of which a step touches few weights, does not go together with; and FTRL with others."""
        model, found = self.model, []
        hashed = isinstance(model, HashedLogisticRegression | FactorizationMachine)
        for name, allowed in (("staleness", 0), ("local_steps", 1), ("clip_norm", None)) if hashed else ():
            if (given := getattr(self.train, name)) != allowed:
                only = "left out" if allowed is None else str(allowed)
                found.append(f"train.{name} must be {only} with hashed categories, got {given!r}")
        if isinstance(self.optimizer, FTRL):
            if isinstance(model, MLP | FactorizationMachine):
                found.append(
                    "optimizer.type ftrl begins with weights of zero, from which "
                    f"{type_name(model, MODELS)} cannot move: use adagrad or sgd"
                )
            if model.l2 != 0:
                found.append(f"model.l2 must be 0 with ftrl, got {model.l2!r}: set optimizer.l2")
            for name, allowed in (("staleness", 0), ("local_steps", 1)):
                if (given := getattr(self.train, name)) != allowed and not hashed:
                    found.append(f"train.{name} must be {allowed} with ftrl, got {given!r}: use sgd")
        return found

    def _role_problems(self) -> list[str]:
        if self.validation is None:
            return []
        found = []
        for name in ("label", "numeric", "categorical", "weight"):
            own, training = getattr(self.validation, name), getattr(self.data, name)
            if own is not None and plain(own) != plain(training):
                found.append(f"validation.{name} must be that of data ({training!r}) or left out, got {own!r}")
        return found

    def determining(self) -> Table:
        """The sections data, model, optimizer and train as JSON's own types, without paths and file systems.

        A constant rate is the number, however it was written.
        """
        optimizer = to_table(self.optimizer, OPTIMIZERS)
        rate = optimizer["learning_rate"]
        if isinstance(rate, dict) and rate["type"] == "constant":
            optimizer["learning_rate"] = rate["rate"]
        return {
            "data": field_table(self.data, skip=PLACES),
            "model": to_table(self.model, MODELS),
            "optimizer": optimizer,
            "train": field_table(self.train),
        }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """One sentence for each key whose value in ``a`` (the stored run) is not that in ``b`` (what is asked for).

    >>> differences({"train": {"epochs": 5, "seed": 0}}, {"train": {"epochs": 6, "seed": 0}})
    ['train.epochs is 5 in the run, 6 in the config']
    """
    return _differences(a, b, "")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key in [*a, *(k for k in b if k not in a)]:
        old, new = a.get(key), b.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {_shown(old)} in the run, {_shown(new)} in the config")
    return found


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)


def _names(kinds: Mapping[str, type[Any]]) -> str:
    return ", ".join(cls.__name__ for cls in kinds.values())


def config_fields(cls: type[Any], skip: tuple[str, ...] = ()) -> list[str]:
    """The names of a config dataclass's fields: the keys of its section."""
    return [f.name for f in fields(cls) if f.name not in skip]
