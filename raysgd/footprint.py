"""How much memory the parameters of a run take, server by server and worker by worker: told before any is reserved.

    a server    P / servers, times its buffers, times 1 + the optimizer's arrays; of a hashed model one buffer
    a worker    P for the parameters, two gradients for each node of the tree that it pushes, one for each level below
    the driver  P times 1 + the optimizer's arrays, at a checkpoint

P: bytes of the parameters. What Python, Ray and the rows take comes on top. Where categories have vocabularies, or
classes are found in the data, P is known only after the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raysgd.data.columns import Columns
from raysgd.errors import InputError
from raysgd.learn.batch import Inputs, Target
from raysgd.learn.models.base import ValueAndGrad
from raysgd.learn.models.hashed import BoundHashed
from raysgd.learn.parameters import even_split
from raysgd.plan import hash_bits
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.membership import deal
from raysgd.protocol.stale import shard_class
from raysgd.protocol.tree import cover, depth
from raysgd.spec import RunSpec

#: bytes of a parameter
FLOAT32 = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes that the parameters take: of the largest server, of the largest worker, of the driver.

    n_params: parameters;  servers, workers: how many there are, at the least; replicas of servers are servers, too
    """

    n_params: int
    servers: int
    workers: int
    server: int
    worker: int
    driver: int

    @property
    def total(self) -> int:
        return self.servers * self.server + self.workers * self.worker + self.driver

    def describe(self) -> str:
        each = f"{shown(self.server)} a server, {shown(self.worker)} a worker, {shown(self.driver)} the driver"
        numbers = f"{self.servers} servers and {self.workers} workers"
        return f"{self.n_params:,} parameters need {each}: {shown(self.total)} with {numbers}"

    def refuse(self, places: Sequence[int]) -> None:
        """Raises InputError where that is more than there is. places: bytes available on each node; none: not known"""
        largest = max(self.server, self.worker)
        if not places or (self.total <= sum(places) and largest <= max(places)):
            return
        there = shown(sum(places)) if len(places) == 1 else f"{shown(sum(places))} on {len(places)} nodes"
        raise InputError(
            f"the model does not fit into memory: {self.describe()}; available: {there}. "
            "Take a smaller model, fewer workers, or larger or more machines"
        )


def shown(count: int) -> str:
    """Bytes for people.

    >>> shown(1_234), shown(4_200_000_000), shown(25 * 10**15)
    ('1.2 kB', '4.2 GB', '25,000.0 TB')
    """
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1000:,.1f} kB"


def footprint(spec: RunSpec, learner: ValueAndGrad) -> Footprint:
    """What a run of this spec takes at the least. Raises InputError where there are more servers than blocks of
    parameters."""
    n_params, scaling, train = learner.layout.n_params, spec.scaling, spec.train
    try:
        longest = max(len(span) for span in even_split(n_params, scaling.num_servers))
    except ValueError as error:
        raise InputError(f"scaling.{error}") from error
    copies, workers = 1 + len(spec.optimizer.slots), scaling.least_workers
    servers = scaling.num_servers * (1 + scaling.replicas)
    driver = copies * n_params * FLOAT32
    if isinstance(learner, BoundHashed):
        return Footprint(n_params, servers, workers, copies * longest * FLOAT32, 0, driver)
    buffers = shard_class(Consistency(train.staleness)).BUFFERS
    pushed = [cover(run, train.virtual_workers) for run in deal(train.virtual_workers, workers)]
    vectors = max(1 + 2 * len(nodes) + max(depth(len(node)) for node in nodes) for nodes in pushed)
    server, worker = buffers * copies * longest * FLOAT32, vectors * n_params * FLOAT32
    return Footprint(n_params, servers, workers, server, worker, driver)


def learner_of(spec: RunSpec, columns: Columns) -> ValueAndGrad | None:
    """The model where its size can be told from the schema alone, None where it takes the statistics."""
    bits = hash_bits(spec)
    if columns.categorical and not bits:
        return None
    inputs = Inputs(columns.n_numeric, (1 << bits,) * len(columns.categorical) if bits else (), bits)
    number = spec.model.target_kind == "number"
    try:
        learner = spec.model.bind(inputs, Target(0 if number else 2))
    except InputError:
        return None  # told with the statistics, and then with the classes that there are
    if number:
        return learner
    try:
        spec.model.bind(inputs, Target(3))
    except InputError:
        return learner  # of two classes only
    return None


def available_here() -> list[int]:
    """Bytes that this machine, or the container around this process, can still give; [] where nobody tells."""
    found = []
    for file, key in (
        ("/proc/meminfo", "MemAvailable:"),
        ("/sys/fs/cgroup/memory.max", ""),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", ""),
    ):
        try:
            text = Path(file).read_text()
        except OSError:
            continue
        words = next((line.removeprefix(key).split() for line in text.splitlines() if line.startswith(key)), [])
        if words and words[0].isdecimal():
            found.append(int(words[0]) * (1024 if key else 1))
    return [min(found)] if found else []
