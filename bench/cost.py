"""The cost model (raysgd/cost.py): its constants measured on this machine, and its predictions against what is seen.

constants  each by itself; everywhere the fastest stretch counts, in which least else went on
messages   the real state machines and shared memory without compute, 1 to 4 workers, 100 to 10 M parameters
sleepers   up to a hundred workers that sleep 100 ms instead of computing
training   the real Trainer, shards warm: logistic regression on 28 numbers and an MLP, 1 and 2 workers
two nodes  the same over two Ray nodes on this machine: calls and the object store, no real network
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.measure import Asked, table
from bench.processes import answer, listen, say
from bench.scale import step_seconds
from bench.tables import COLUMNS, write_images, write_numbers
from bench.training import Job as Training
from raysgd.cost import Job, Machine, Network, predict

HIDDEN = 256
MLP_PARAMS = 785 * HIDDEN + (HIDDEN + 1) * 10
MLP_FLOPS = 6.0 * MLP_PARAMS - 2 * 784 * HIDDEN
LOGISTIC, MLP = {"type": "logistic_regression"}, {"type": "mlp", "hidden": [HIDDEN], "loss": "cross_entropy"}
#: two Ray nodes on one machine: what they share has no bandwidth of its own
LOOPBACK = Network(bandwidth=float("inf"), latency=0.0)


@dataclass(frozen=True)
class Tables:
    """The data that is trained on."""

    numbers: Path
    mixed: Path
    images: Path

    @classmethod
    def written(cls, directory: Path, rows: int) -> Tables:
        images = write_images(directory, rows // 8, 512)
        return cls(write_numbers(directory, rows, 4096), write_mixed(directory, rows, 4096), images)


def least(seconds: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of so many calls."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        seconds()
        found.append(time.perf_counter() - began)
    return min(found)


def update_seconds(n_params: int, sums: int) -> float:
    """The least time of a whole step at a server that has ``sums`` gradients in its memory."""
    from raysgd.learn.parameters import Range
    from raysgd.learn.transforms import SGD
    from raysgd.protocol.generation import Generation
    from raysgd.protocol.shard import ServerShard
    from raysgd.protocol.tree import Partial
    from raysgd.protocol.update import PlannedRows, Rule

    start = Generation(0, np.zeros(n_params, np.float32), {"momentum": np.zeros(n_params, np.float32)})
    rule = Rule(SGD(momentum=0.9), lambda _: 0.1, PlannedRows(1024, 1 << 40, 1 << 30))
    shard = ServerShard(0, rule, np.ones(n_params, np.bool_), n_virtual=sums, generation=start)
    shard.fence(Range(0, sums), 1)
    nodes = [Range(i, i + 1) for i in range(sums)]
    given = [Partial(np.ones(n_params, np.float32), 1.0, 512) for _ in nodes]
    ones = [(1,)] * sums
    assert shard.stands(nodes, ones)
    return least(lambda: shard.push_all(nodes, ones, given), int(min(300, max(8, 1e8 / n_params))))


def worker_seconds(model: dict[str, Any], path: Path, label: str, batch: int) -> float:
    """The least time in which a worker gets the rows of four virtual workers of eight, and computes their gradients."""
    from raysgd.data.dataset import ArrowDataset
    from raysgd.data.loader import Loader
    from raysgd.data.moments import shard_statistics
    from raysgd.learn.parameters import Range
    from raysgd.learn.transforms import SGD
    from raysgd.plan import open_tables, plan_from_statistics
    from raysgd.sections import model_from_dict
    from raysgd.spec import RunSpec, TrainConfig

    spec = RunSpec(ArrowDataset(str(path), label=label), None, model_from_dict(model), SGD(0.01), TrainConfig(batch))
    tables = open_tables(spec)
    plan, _ = plan_from_statistics(spec, tables, [shard_statistics(tables.train, s.index) for s in tables.train.shards])
    params = plan.initial().params
    out = np.empty_like(params)
    with Loader(tables.train, plan.encoder, plan.sampler, Range(0, 4), 2**30) as loader:

        def step(at: int) -> None:
            for v in range(4):
                plan.learner.value_and_grad(params, loader.batch(at, v), out)

        steps = plan.steps_per_epoch
        for at in range(steps):
            step(at)
        counted = iter(range(steps, 3 * steps))
        return least(lambda: step(next(counted)), min(2 * steps, 400))


def write_mixed(directory: Path, n_rows: int, shard_rows: int) -> Path:
    """Four numbers and three categories of 16, 3 and 105 values, as flights have them, and a label."""
    random = np.random.Generator(np.random.Philox(0))
    columns: dict[str, Any] = {f"x{i}": random.standard_normal(n_rows, np.float32) for i in range(4)}
    for name, values in (("carrier", 16), ("origin", 3), ("dest", 105)):
        columns[name] = np.array([f"{name}{i}" for i in range(values)])[random.integers(0, values, n_rows)]
    columns["label"] = (columns["x0"] + random.standard_normal(n_rows, np.float32) > 0).astype(np.int8)
    pq.write_table(pa.table(columns), directory / "mixed.parquet", row_group_size=shard_rows)
    return directory / "mixed.parquet"


def calls() -> None:
    """Says seconds of actor calls between two Ray nodes: alone, each of many; and a byte there and back."""
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    small = {"object_store_memory": 256 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **small})
    cluster.add_node(num_cpus=2, object_store_memory=256 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")

    @ray.remote(num_cpus=0)
    class Echo:
        def same(self, value: Any) -> Any:
            return value if value is None else value + 1  # as a server does: another array than that which came

    mine = ray.get_runtime_context().get_node_id()
    other = next(n["NodeID"] for n in ray.nodes() if n["NodeID"] != mine)
    far = Echo.options(scheduling_strategy=NodeAffinitySchedulingStrategy(other, soft=False)).remote()
    ray.get(far.same.remote(None))
    alone = least(lambda: ray.get(far.same.remote(None)), 300)
    many = least(lambda: ray.get([far.same.remote(None) for _ in range(200)]), 10) / 200
    submitted = least(lambda: [far.same.remote(None) for _ in range(200)], 10) / 200
    vector = np.ones(1_000_000, np.float32)
    big = least(lambda: ray.get(far.same.remote(vector)), 30)
    say({"alone": alone, "many": many, "submitted": submitted, "byte": (big - alone) / (2 * vector.nbytes)})
    ray.shutdown()
    cluster.shutdown()


def two_nodes() -> None:
    """Trains over two Ray nodes of this machine: says the lines of metrics.jsonl."""
    import ray
    from ray.cluster_utils import Cluster

    job = listen()
    small = {"object_store_memory": 256 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **small})
    cluster.add_node(num_cpus=1, object_store_memory=256 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        say(job.fit(directory))
    ray.shutdown()
    cluster.shutdown()


def measured(quick: bool, tables: Tables) -> Machine:
    """The constants of this machine."""
    small, large = (25_000, 250_000) if quick else (250_000, 10_000_000)
    one, two, four = (update_seconds(small, k) / small for k in (1, 2, 4))
    far = update_seconds(large, 2) / large
    copies = [np.ones(small, np.float32), np.empty(small, np.float32)]
    few, many = (worker_seconds(LOGISTIC, tables.numbers, "label", batch) for batch in (64, 8192))
    row_s = (many - few) / (4096 - 32)
    codes_s = (worker_seconds(LOGISTIC, tables.mixed, "label", 8192) - few) / (4096 - 32)
    narrow, wide = (worker_seconds(MLP, tables.images, "digit", batch) for batch in (64, 2048))
    flops = MLP_FLOPS * (1024 - 32) / (wide - narrow)
    steps = 200 if quick else 3000
    lone, pair = (min(step_seconds(w, 1, steps, 100, 0, fastest=True) for _ in range(2)) for w in (1, 2))
    between = answer("bench.cost", "calls")
    # What a step of the Trainer takes beyond what its workers compute, and beyond a step in which nobody does.
    worked = worker_seconds(LOGISTIC, tables.numbers, "label", 2048)
    training = Training(LOGISTIC, str(tables.numbers), "label", 2048, 8, 3 if quick else 60, 3, 2, cache_bytes=2**29)
    working = 2048 / _rows_per_s(training, 1)
    return Machine(
        control_s=lone,
        worker_s=max(0.0, pair - lone),
        cold_s=max(0.0, working - pair - worked),
        batch_s=few / 4,
        row_s=max(0.0, row_s - 4 * COLUMNS / flops),
        code_s=max(0.0, (codes_s - row_s) / 3),
        flops=flops,
        read_s=least(lambda: np.copyto(copies[1], copies[0]), 200) / small,
        update_s=one,
        add_s=max(0.0, (four - two) / 2),
        spilled=far / two,
        call_s=between["alone"],
        client_s=between["submitted"],
        server_s=between["many"],
        store_s=between["byte"],
    )


def messages(machine: Machine, asked: Asked) -> list[list[object]]:
    """Steps without compute: parameters, workers, predicted and measured."""
    found = []
    sizes = (100, 25_000) if asked.quick else (100, 25_000, 250_000, 1_000_000, 10_000_000)
    for n_params in sizes:
        for workers in (1, 2) if asked.quick else (1, 2, 4):
            steps = 100 if asked.quick else int(min(3000, max(40, 2e8 / (n_params + 1e5))))
            # These workers compute nothing and do not copy what they pull.
            job = Job(n_params, workers, virtual_workers=workers, workers=workers, compute_s=0.0)
            took = min(step_seconds(workers, 1, steps, n_params, 0, fastest=True) for _ in range(asked.rounds))
            found.append(_line("no compute", job, took, replace(machine, read_s=0.0)))
    return found


def sleepers(machine: Machine, asked: Asked) -> list[list[object]]:
    """Workers that sleep 100 ms, with 250,000 parameters."""
    found = []
    for workers, servers in ((4, 1),) if asked.quick else ((16, 1), (64, 1), (64, 2), (100, 1)):
        job = Job(250_000, workers, virtual_workers=workers, workers=workers, servers=servers, compute_s=0.1)
        took = step_seconds(workers, servers, 3 if asked.quick else 15)
        found.append(_line("sleeping 100 ms", job, took, replace(machine, read_s=0.0)))
    return found


def trained(machine: Machine, asked: Asked, tables: Tables) -> list[list[object]]:
    """The real Trainer on one node, and over two: the fastest epoch once shards are warm."""
    cases = (
        ("logistic regression", LOGISTIC, tables.numbers, "label", 2048, Job(COLUMNS + 1, 2048)),
        ("the same, 3 categories", LOGISTIC, tables.mixed, "label", 512, Job(129, 512, row_flops=16.0, row_codes=3)),
        ("MLP", MLP, tables.images, "digit", 512, Job(MLP_PARAMS, 512, row_flops=MLP_FLOPS)),
    )
    found = []
    for name, model, path, label, batch, job in cases:
        for workers, nodes in ((1, 1), (2, 1), (2, 2)):
            epochs = 3 if asked.quick else (60 if nodes == 1 else 8)
            training = Training(model, str(path), label, batch, 8, epochs, 3, workers, cache_bytes=2**29)
            took = min(batch / _rows_per_s(training, nodes) for _ in range(asked.rounds))
            placed = replace(job, workers=workers, nodes=nodes)
            where = f"{name}, two nodes" if nodes > 1 else name
            found.append(_line(where, placed, took, _one_machine(machine, nodes)))
    return found


def _rows_per_s(training: Training, nodes: int) -> float:
    """Rows a second in the fastest epoch."""
    if nodes == 1:
        history = answer("bench.training", task=training)
    else:
        history = answer("bench.cost", "two_nodes", task=training)
    return float(max(line["rows_per_s"] for line in history[training.warm_epochs :]))


def _one_machine(machine: Machine, nodes: int) -> Machine:
    """Nodes that share this machine's cores have only a part of them each."""
    return replace(machine, cores=max(1, machine.cores // nodes))


def _line(what: str, job: Job, took: float, machine: Machine) -> list[object]:
    cost = predict(job, machine, LOOPBACK)
    off = cost.step_s / took - 1
    shown = [f"{1e3 * seconds:.3g}" for seconds in (cost.step_s, took)]
    return [what, f"{job.n_params:,}", job.workers, job.servers, *shown, f"{100 * off:+.0f}%"]


def run(asked: Asked) -> str:
    """The constants, and the table of predictions."""
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        tables = Tables.written(Path(directory), 16_384 if asked.quick else 131_072)
        machine = measured(asked.quick, tables)
        lines = [*messages(machine, asked), *sleepers(machine, asked), *trained(machine, asked, tables)]
    names = [f.name for f in fields(Machine)]
    constants = [[name, f"{getattr(machine, name):.3g}", f"{getattr(Machine(), name):.3g}"] for name in names]
    head = ["what", "parameters", "workers", "servers", "predicted, ms", "measured, ms", "off by"]
    return f"{table(['constant', 'here', 'default'], constants)}\n\n{table(head, lines)}"


if __name__ == "__main__":
    {"calls": calls, "two_nodes": two_nodes}[sys.argv[1]]()
