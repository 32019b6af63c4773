"""What a step takes, predicted: from parameters, rows, workers, servers, nodes and network. Pure arithmetic.

    BSP, H local steps:   T = compute + round / H
    round = control + pull + update                                    on one node
          + between: calls, latency, bytes over the slowest link       where workers and servers are on several

All phases of a round follow one another: a worker cannot begin before it has the new version, a server cannot update
before it has the last gradient. Within a phase the slowest counts.

docs/cost.md says where the constants of :class:`Machine` come from, and how far predictions were off; ``python -m bench
cost`` measures those of another machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, log2

from raysgd.learn.parameters import Range
from raysgd.protocol.tree import cover

#: Bytes of a parameter.
FLOAT = 4

#: Bytes beyond which Ray does not send an argument or a result with the call, but through its object stores.
INLINE = 100 * 1024

#: Steps whose times differ by less than this factor are alike.
ALIKE = 1.05


@dataclass(frozen=True)
class Machine:
    """One node. Times in seconds, as docs/cost.md says where from.

    cores:      that compute at the same time
    control_s:  a step of one worker and one server without work: messages, and three processes awake
    worker_s:   what each further worker adds to it
    cold_s:     what a step with work takes longer: processes wake from sleep, and code is no longer in the cache
    batch_s:    a virtual worker's share of a step, before the first row: about fifty numpy calls
    row_s:      a row of a batch, whatever its width: gathering it
    code_s:     each category of a row: looked up, and its gradient scattered
    flops:      float32 operations a second of one core in matrix products
    read_s:     copying a parameter
    update_s:   updating a parameter with momentum from one pushed sum: seven passes over a block in the cache
    add_s:      adding one more pushed sum to it
    cache:      bytes beyond which memory limits the update: it is ``spilled`` times slower, and servers that share the
                memory gain nothing from being several
    call_s:     a call through the relays between nodes, there and back, without data
    client_s:   one more such call at its sender;  server_s: at its receiver, one after the other
    object_s:   a vector that is too large to go with its call: put into a store, asked for, fetched
    store_s:    each byte of it, from one node's store into another's
    """

    cores: int = 2
    control_s: float = 35e-6
    worker_s: float = 8e-6
    cold_s: float = 68e-6
    batch_s: float = 11e-6
    row_s: float = 30e-9
    code_s: float = 3e-9
    flops: float = 150e9
    read_s: float = 0.06e-9
    update_s: float = 0.47e-9
    add_s: float = 0.12e-9
    cache: float = 8e6
    spilled: float = 1.5
    call_s: float = 1.3e-3
    client_s: float = 0.03e-3
    server_s: float = 0.24e-3
    object_s: float = 4e-3
    store_s: float = 2.4e-9


@dataclass(frozen=True)
class Network:
    """Between nodes. bandwidth: bytes a second of a node, each way;  latency: seconds one way

    >>> Network.gbit(10).bandwidth
    1250000000.0
    """

    bandwidth: float = 1.25e9
    latency: float = 0.1e-3

    @classmethod
    def gbit(cls, rate: float, latency: float = 0.1e-3) -> Network:
        """A network of so many gigabits a second."""
        return cls(rate * 1e9 / 8, latency)


@dataclass(frozen=True)
class Job:
    """What is trained, and on what.

    n_params:     length of the flat vector
    batch_size:   rows a step over all workers;  virtual_workers: its equal parts
    row_flops:    operations a row; by default 4 a parameter: a product forward, one back
    row_codes:    categories of a row
    compute_s:    seconds of a worker's step, where they are known: row_flops and the machine are then not asked
    slots:        vectors of optimizer state that an update reads and writes
    workers, servers, nodes: nodes carry workers evenly; servers are on ``server_nodes`` of them (default: spread)
    """

    n_params: int
    batch_size: int
    virtual_workers: int = 8
    workers: int = 1
    servers: int = 1
    nodes: int = 1
    local_steps: int = 1
    row_flops: float | None = None
    row_codes: int = 0
    compute_s: float | None = None
    slots: int = 1
    server_nodes: int | None = None

    @property
    def carried(self) -> int:
        """Virtual workers of the worker that carries most."""
        return ceil(self.virtual_workers / self.workers)

    @property
    def pushed(self) -> int:
        """Vectors that this worker pushes: nodes of the tree that cover its run; one where it is aligned."""
        return sums_pushed(self.virtual_workers, self.workers)

    @property
    def places(self) -> int:
        """Nodes with a server."""
        return min(self.nodes, self.servers, self.server_nodes or self.nodes)


@dataclass(frozen=True)
class Cost:
    """Seconds of a round's phases, and the bytes that go between processes in it.

    compute:  the slowest worker's gradients, of all its local steps
    control:  messages and waking;  pull: copying a version;  update: the busiest node's servers
    calls:    actor calls between nodes, with latency;  wire: bytes over the busiest link, and through the object stores
    pushed, pulled: bytes of all gradients and of all versions;  across: those of them that leave a node
    """

    compute: float
    control: float
    pull: float
    update: float
    calls: float
    wire: float
    pushed: int
    pulled: int
    across: int
    local_steps: int = 1

    @property
    def round_s(self) -> float:
        """Seconds of a round: ``local_steps`` steps and one exchange."""
        return self.compute + self.control + self.pull + self.update + self.calls + self.wire

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.round_s / self.local_steps

    @property
    def efficiency(self) -> float:
        """The share of the time in which workers compute."""
        return self.compute / self.round_s


def sums_pushed(virtual_workers: int, workers: int) -> int:
    """The most vectors that one worker pushes a round.

    1 where runs are whole subtrees (V / W is a power of two), else at most 2 ceil(log2 V).

    >>> sums_pushed(8, 2), sums_pushed(8, 8), sums_pushed(8, 3)
    (1, 1, 2)
    """
    if workers > 256:  # the answer depends on V / W alone, near enough
        run = virtual_workers / workers
        return 1 if run == int(run) and log2(run).is_integer() else 2 * ceil(log2(max(2.0, run)))
    cuts = [i * virtual_workers // workers for i in range(workers + 1)]
    return max(len(cover(Range(a, b), virtual_workers)) for a, b in pairwise(cuts))


def predict(job: Job, machine: Machine | None = None, network: Network | None = None) -> Cost:
    """The cost of a round.

        compute = H (v batch_s + r (row_s + codes code_s + row_flops / flops) + v n read_s) max(1, W' / cores)
        control = (control_s + (W' - 1) worker_s + cold_s) max(1, W' / cores);  no cold_s where nothing is computed
        pull    = n read_s max(1, W' / cores)
        update  = n S' / S (update_s + (k - 1) add_s) / min(S', cores),     k = W' pushed + sums from other nodes;
                  beyond the cache: times spilled, and not divided
        calls   = call_s + 2 latency + (S - 1) client_s + (N - 1) server_s; 2 object_s more where 4 n / S > INLINE
        wire    = 2 (n / S) S' (N - 1) 4 bytes / bandwidth + 2 n 4 bytes store_s

    v, r: virtual workers and rows of the busiest worker; W', S': workers and servers of its node; N nodes. A relay adds
    its node's gradients: one vector goes each way between a node and a server, whatever the number of workers there.

    >>> fast = predict(Job(1_000_000, 4096, workers=4, nodes=4), network=Network.gbit(10))
    >>> slow = predict(Job(1_000_000, 4096, workers=4, nodes=4), network=Network.gbit(1))
    >>> fast.step_s < slow.step_s
    True
    """
    machine, network = machine or Machine(), network or Network()
    n, here = job.n_params, ceil(job.workers / job.nodes)
    served = ceil(job.servers / job.places)
    shared = max(1.0, here / machine.cores)
    far = job.nodes - 1 if job.places == 1 else job.nodes - ceil(job.places / job.servers)
    update = n * served / job.servers * _updating(job, machine, here * job.pushed + far)
    beyond = FLOAT * n * served / job.servers * (3 + job.slots) > machine.cache
    update *= machine.spilled if beyond else 1 / min(served, machine.cores)
    compute = _compute(job, machine) * shared
    calls = wire = 0.0
    if far:
        calls = machine.call_s + 2 * network.latency + (job.servers - 1) * machine.client_s + far * machine.server_s
        calls += 2 * machine.object_s if FLOAT * n / job.servers > INLINE else 0.0
        busiest = max(far * served / job.servers, 1.0)  # of the vector: at a node with servers, at one without
        wire = 2 * FLOAT * n * (busiest / network.bandwidth + machine.store_s)
    return Cost(
        compute=compute if job.compute_s is None else job.local_steps * job.compute_s,
        control=shared * (machine.control_s + (here - 1) * machine.worker_s + (machine.cold_s if compute else 0.0)),
        pull=n * machine.read_s * shared,
        update=update,
        calls=calls,
        wire=wire,
        pushed=FLOAT * n * job.workers * job.pushed,
        pulled=FLOAT * n * job.workers,
        across=2 * FLOAT * n * far if job.nodes > 1 else 0,
        local_steps=job.local_steps,
    )


def _updating(job: Job, machine: Machine, sums: int) -> float:
    """Seconds a parameter at a server: of eight passes two are over each vector of optimizer state."""
    return machine.update_s * (6 + 2 * job.slots) / 8 + (sums - 1) * machine.add_s


def _compute(job: Job, machine: Machine) -> float:
    """Seconds of the busiest worker's gradients between two pushes, on a core of its own."""
    if job.compute_s is not None:
        return job.local_steps * job.compute_s
    flops = 4.0 * job.n_params if job.row_flops is None else job.row_flops
    rows = job.batch_size / job.virtual_workers * job.carried
    once = job.carried * (machine.batch_s + job.n_params * machine.read_s)
    return job.local_steps * (once + rows * (machine.row_s + job.row_codes * machine.code_s + flops / machine.flops))


def best_servers(job: Job, machine: Machine | None = None, network: Network | None = None, most: int = 4096) -> int:
    """The number of servers, a power of two, with which a step is predicted to take least; the fewer where alike.

    On several nodes each server is on a node of its own, as far as there are nodes. More servers share out bytes and
    updates, and cost a call each at every node:

        near the best:  servers = 32 n / (bandwidth server_s),  at most one a node

    >>> job = Job(10_000_000, 8192, virtual_workers=64, workers=64, nodes=16, compute_s=0.1)
    >>> best_servers(job, network=Network.gbit(10))
    16
    """
    took, servers = {}, 1
    while servers <= min(most, max(job.nodes, (machine or Machine()).cores), job.n_params):
        took[servers] = predict(replace(job, servers=servers, server_nodes=None), machine, network).step_s
        servers *= 2
    return min(servers for servers, seconds in took.items() if seconds <= ALIKE * min(took.values()))


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker and of one server, beyond an idle actor's (about 190 MB, of which half is shared)."""

    worker: int
    server: int


def memory(job: Job, *, window_bytes: int, cache_bytes: int, buffers: int = 2) -> Memory:
    """Memory that a run takes.

        worker = cache + (v + 1) windows + (2 pushed + ceil(log2 v) + 1) n 4 bytes: slots of two steps, sums, a pull
        server = n / S (buffers (1 + slots) + 2) 4 bytes: generations, and the sum that is formed

    window_bytes: decoded rows that are shuffled jointly;  cache_bytes: of ``scaling.cache_bytes``, or all decoded rows

    >>> memory(Job(1_000, 64, workers=8), window_bytes=10, cache_bytes=100)
    Memory(worker=12120, server=24000)
    """
    vectors = 2 * job.pushed + ceil(log2(max(1, job.carried))) + 1
    worker = cache_bytes + (job.carried + 1) * window_bytes + vectors * FLOAT * job.n_params
    server = ceil(job.n_params / job.servers) * FLOAT * (buffers * (1 + job.slots) + 2)
    return Memory(worker, server)
