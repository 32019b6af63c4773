"""S1: one synchronous step without compute: two workers' gradients summed, momentum applied, parameters seen by both.

raysgd   the real state machines and shared memory, 2 workers and 1 server in processes of their own; from 250,000
         parameters on 2 servers, each on a core while the workers wait
gloo     torch.distributed's all-reduce in 2 processes, and the same update in each
Open MPI its all-reduce over shared memory in 2 processes, and the same update in numpy in each
"""

from __future__ import annotations

import sys
import threading
import time
from functools import partial

import numpy as np

from bench import mpi
from bench.measure import Asked, Figures, alternate, skipped, table
from bench.processes import Child, listen, rendezvous, say

N_VIRTUAL, N_WORKERS = 8, 2
SIZES = (100, 25_000, 250_000, 1_000_000, 10_000_000)


def steps_for(n_params: int) -> int:
    """Counted steps: a second or so for each contestant."""
    return int(min(4000, max(40, 4e8 / (n_params + 1e5))))


def rate(_step: int) -> float:
    return 0.1


def servers_for(n_params: int) -> int:
    return 1 if n_params < 250_000 else 2


def raysgd_server(n_params: int, index: int) -> None:
    from raysgd.learn.parameters import Range, even_split
    from raysgd.learn.transforms import SGD
    from raysgd.protocol.generation import Generation
    from raysgd.protocol.shard import ServerShard
    from raysgd.protocol.update import PlannedRows, Rule
    from raysgd.runtime.board import Board
    from raysgd.runtime.shared import SharedServer

    span = even_split(n_params, servers_for(n_params))[index]
    board = Board.create(len(span))
    start = Generation(0, np.zeros(len(span), np.float32), {"momentum": np.zeros(len(span), np.float32)})
    shard = ServerShard(
        index,
        Rule(SGD(momentum=0.9), rate, PlannedRows(1024, 1 << 40, 1 << 30)),
        np.ones(len(span), np.bool_),
        n_virtual=N_VIRTUAL,
        generation=start,
        buffers=board.params,
        on_write=partial(Board.announce, board),
    )
    shard.fence(Range(0, N_VIRTUAL), 1)
    server = SharedServer(shard, board, threading.Lock(), lambda: None)
    say(server.address)
    while (slots := listen()) is not None:
        server.attach(slots, span)
        say("attached")
    server.close()


def raysgd_worker(n_params: int, index: int) -> None:
    from raysgd.learn.parameters import even_split
    from raysgd.protocol.client import Client, Compute
    from raysgd.protocol.membership import Membership, deal
    from raysgd.protocol.tree import Partial
    from raysgd.runtime.shared import SharedMemory

    steps = steps_for(n_params)
    warm = steps // 4
    spans = even_split(n_params, servers_for(n_params))
    assignment = Membership(N_VIRTUAL).assign(index, deal(N_VIRTUAL, N_WORKERS)[index])
    client = Client(assignment, N_VIRTUAL, spans, start=0, until=warm + steps)
    memory = SharedMemory(listen(), client.nodes, tuple(map(assignment.incarnations_of, client.nodes)), spans)
    say(memory.address)
    listen()
    pending = client.begin()
    began = 0.0
    while client.done is None:
        compute = next((i for i in pending if isinstance(i, Compute)), None)
        if compute is not None:
            if compute.step == warm:
                began = time.perf_counter()
            # A gradient is computed where the servers read it; what stands there is as good as any.
            sums = [Partial(gradient, 1.0, 64) for gradient in memory.outputs(compute.step)]
            pending = client.computed(compute.step, sums)
        else:
            pending = [i for reply in memory.exchange(pending) or [] for i in client.handle(reply)]  # type: ignore[arg-type]
    say((time.perf_counter() - began) / steps)
    memory.close()


def gloo_worker(n_params: int, index: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=index, world_size=N_WORKERS)
    steps = steps_for(n_params)
    params, momentum, gradient = torch.zeros(n_params), torch.zeros(n_params), torch.zeros(n_params)
    began = 0.0
    for step in range(steps // 4 + steps):
        if step == steps // 4:
            began = time.perf_counter()
        dist.all_reduce(gradient)  # in place, as of a gradient that was just computed; zeros stay zeros
        momentum.mul_(0.9).add_(gradient, alpha=1 / 1024)
        params.sub_(momentum, alpha=0.1)
    say((time.perf_counter() - began) / steps)
    dist.destroy_process_group()


def raysgd_step(n_params: int) -> float:
    """Milliseconds a step, the slower worker's."""
    servers = [Child("bench.step", "raysgd_server", n_params, i) for i in range(servers_for(n_params))]
    boards = [server.hear() for server in servers]
    workers = [Child("bench.step", "raysgd_worker", n_params, i) for i in range(N_WORKERS)]
    for worker in workers:
        worker.tell(boards)
        slots = worker.hear()
        for server in servers:
            server.tell(slots)
            server.hear()
    for worker in workers:
        worker.tell("go")
    seconds = max(worker.hear() for worker in workers)
    for child in (*workers, *servers):
        child.end()
    return 1e3 * float(seconds)


def gloo_step(n_params: int) -> float:
    """Milliseconds a step, the slower process's."""
    meeting = rendezvous()
    workers = [Child("bench.step", "gloo_worker", n_params, i, environment=meeting) for i in range(N_WORKERS)]
    seconds = max(worker.hear() for worker in workers)
    for worker in workers:
        worker.end()
    return 1e3 * float(seconds)


def mpi_step(n_params: int) -> float:
    """Milliseconds a step, the slower process's."""
    return 1e3 * mpi.step_seconds(n_params, steps_for(n_params))


def run(asked: Asked) -> str:
    """The table of S1."""
    contestants = {"raysgd": raysgd_step, "gloo + update": gloo_step, "Open MPI + numpy update": mpi_step}
    reasons = {}
    if reason := mpi.missing():
        reasons["Open MPI"] = reason
        del contestants["Open MPI + numpy update"]
    peers = list(contestants)[1:]
    rows = []
    for n_params in SIZES[:2] if asked.quick else SIZES:
        found: dict[str, Figures] = alternate(
            {name: partial(measure, n_params) for name, measure in contestants.items()}, asked.rounds
        )
        ratios = [found["raysgd"].ratio(found[peer]) for peer in peers]
        rows.append([f"{n_params:,}", *found.values(), *ratios])
    head = ["parameters", *(f"{name}, ms" for name in contestants), *(f"raysgd / {peer}" for peer in peers)]
    bars = (
        "\n\nbars: <= 1/10 of gloo at 100 parameters, <= 1/4 at 1 M, <= 1/2 at 10 M;"
        " <= 1.2 x Open MPI at 25 k, below it from 250 k on"
    )
    return table(head, rows) + skipped(reasons) + bars


if __name__ == "__main__":
    {"raysgd_server": raysgd_server, "raysgd_worker": raysgd_worker, "gloo_worker": gloo_worker}[sys.argv[1]](
        *map(int, sys.argv[2:])
    )
