"""S7: cost grows as the work, and the step survives many workers.

update      one server's update (two workers' gradients summed, momentum, finiteness) from 250 k to 50 M parameters,
            over ``np.add`` of the same bytes: the update reads two gradients, parameters and momentum and writes the
            two latter, 24 bytes a parameter, as much as ``np.add`` on twice as many numbers
efficiency  64 workers whose gradients take 1 MB and whose computing is a sleep of 100 ms: the ideal time of a step over
            the one seen. The real state machines and shared memory, in processes of their own
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np

from bench.measure import Asked, Figures, alternate, table
from bench.processes import Child, answer, listen, say

SIZES = (250_000, 1_000_000, 4_000_000, 10_000_000, 50_000_000)
N_WORKERS, GRADIENT, COMPUTE_S = 64, 250_000, 0.1


def rate(_step: int) -> float:
    return 0.1


def repeats(n_params: int) -> int:
    return int(min(200, max(5, 2e8 / n_params)))


def update(n_params: int) -> None:
    """Says the median seconds of taking a whole step, as a server does that shares memory with all workers."""
    from raysgd.learn.parameters import Range
    from raysgd.learn.transforms import SGD
    from raysgd.protocol.generation import Generation
    from raysgd.protocol.shard import ServerShard
    from raysgd.protocol.tree import Partial
    from raysgd.protocol.update import PlannedRows, Rule

    start = Generation(0, np.zeros(n_params, np.float32), {"momentum": np.zeros(n_params, np.float32)})
    rule = Rule(SGD(momentum=0.9), rate, PlannedRows(1024, 1 << 40, 1 << 30))
    shard = ServerShard(0, rule, np.ones(n_params, np.bool_), n_virtual=2, generation=start)
    shard.fence(Range(0, 2), 1)
    nodes, sums = [Range(0, 1), Range(1, 2)], [Partial(np.ones(n_params, np.float32), 1.0, 512) for _ in range(2)]
    assert shard.stands(nodes, [(1,), (1,)])
    seconds = []
    for _ in range(3 + repeats(n_params)):
        began = time.perf_counter()
        assert shard.push_all(nodes, [(1,), (1,)], sums)
        seconds.append(time.perf_counter() - began)
    assert shard.version == 3 + repeats(n_params)
    say(median(seconds[3:]))


def addition(n_params: int) -> None:
    """Says the median seconds of ``np.add`` on 2 n_params numbers: 24 bytes a parameter."""
    a, b, c = (np.ones(2 * n_params, np.float32) for _ in range(3))
    seconds = []
    for _ in range(3 + repeats(n_params)):
        began = time.perf_counter()
        np.add(a, b, out=c)
        seconds.append(time.perf_counter() - began)
    say(median(seconds[3:]))


def server(n_virtual: int, n_servers: int, index: int, total: int = GRADIENT) -> None:
    """A server shard over shared memory, until there is nothing more to hear."""
    from raysgd.learn.parameters import Range, even_split
    from raysgd.learn.transforms import SGD
    from raysgd.protocol.generation import Generation
    from raysgd.protocol.shard import ServerShard
    from raysgd.protocol.update import PlannedRows, Rule
    from raysgd.runtime.board import Board
    from raysgd.runtime.shared import SharedServer

    span = even_split(total, n_servers)[index]
    n_params = len(span)
    board = Board.create(n_params)
    shard = ServerShard(
        index,
        Rule(SGD(momentum=0.9), rate, PlannedRows(1024, 1 << 40, 1 << 30)),
        np.ones(n_params, np.bool_),
        n_virtual=n_virtual,
        generation=Generation(0, np.zeros(n_params, np.float32), {"momentum": np.zeros(n_params, np.float32)}),
        buffers=board.params,
        on_write=partial(Board.announce, board),
    )
    shard.fence(Range(0, n_virtual), 1)
    shared = SharedServer(shard, board, threading.Lock(), lambda: None)
    say(shared.address)
    while (slots := listen()) is not None:
        shared.attach(slots, span)
        say("attached")
    shared.close()


def worker(
    n_virtual: int, n_servers: int, index: int, steps: int, total: int = GRADIENT, sleep_ms: int = int(1e3 * COMPUTE_S)
) -> None:
    """One virtual worker that sleeps instead of computing: says the seconds of the steps after the first two, and of a
    step in the fastest fiftieth of them."""
    from raysgd.learn.parameters import Range, even_split
    from raysgd.protocol.client import Client, Compute
    from raysgd.protocol.membership import Membership
    from raysgd.protocol.tree import Partial
    from raysgd.runtime.shared import SharedMemory

    spans = even_split(total, n_servers)
    assignment = Membership(n_virtual).assign(index, Range(index, index + 1))
    client = Client(assignment, n_virtual, spans, start=0, until=steps)
    memory = SharedMemory(listen(), client.nodes, tuple(map(assignment.incarnations_of, client.nodes)), spans)
    say(memory.address)
    listen()
    pending = client.begin()
    times: list[float] = []
    while client.done is None:
        compute = next((i for i in pending if isinstance(i, Compute)), None)
        if compute is not None:
            if compute.step >= 2:
                times.append(time.perf_counter())
            if sleep_ms:
                time.sleep(sleep_ms / 1e3)
            # A gradient is computed where the server reads it; what stands there is as good as any.
            pending = client.computed(compute.step, [Partial(memory.outputs(compute.step)[0], 1.0, 16)])
        else:
            pending = [i for reply in memory.exchange(pending) or [] for i in client.handle(reply)]  # type: ignore[arg-type]
    times.append(time.perf_counter())
    block = max(1, len(times) // 50)
    fastest = min((b - a) / block for a, b in zip(times, times[block:], strict=False))
    say((times[-1] - times[0], fastest))
    memory.close()


def step_seconds(
    n_workers: int,
    n_servers: int,
    steps: int,
    total: int = GRADIENT,
    sleep_ms: int = int(1e3 * COMPUTE_S),
    *,
    fastest: bool = False,
) -> float:
    """Seconds a step, the slowest worker's, start-up excluded; total: parameters.

    fastest: only of the fastest fiftieth of the steps, in which least else went on
    """
    servers = [Child("bench.scale", "server", n_workers, n_servers, i, total) for i in range(n_servers)]
    boards = [one.hear() for one in servers]
    asked = (2 + steps, total, sleep_ms)
    workers = [Child("bench.scale", "worker", n_workers, n_servers, i, *asked) for i in range(n_workers)]
    for one in workers:
        one.tell(boards)
    for one in workers:
        slots = one.hear()
        for serving in servers:
            serving.tell(slots)
            serving.hear()
    for one in workers:
        one.tell("go")
    heard = [one.hear() for one in workers]
    for child in (*workers, *servers):
        child.end()
    return max(block for _, block in heard) if fastest else max(seconds for seconds, _ in heard) / steps


def updates(asked: Asked) -> str:
    rows = []
    for n_params in SIZES[:2] if asked.quick else SIZES:
        contestants: dict[str, Callable[[], float]] = {
            name: partial(answer, "bench.scale", name, n_params) for name in ("update", "addition")
        }
        found: dict[str, Figures] = alternate(contestants, asked.rounds)
        ratio = found["update"].ratio(found["addition"])
        rows.append([f"{n_params:,}", found["update"].times(1e3), found["addition"].times(1e3), ratio])
    head = ["parameters", "update, ms", "`np.add` of the same bytes, ms", "update / `np.add` (bar: <= 1.5)"]
    return table(head, rows)


def efficiencies(asked: Asked) -> str:
    sizes, steps = (((1, 1), (4, 2)), 3) if asked.quick else (((1, 1), (8, 1), (N_WORKERS, 1), (N_WORKERS, 2)), 20)
    found = alternate({f"{w} and {n}": partial(step_seconds, w, n, steps) for w, n in sizes}, asked.rounds)
    rows = []
    for name, seconds in found.items():
        efficiency = Figures(tuple(COMPUTE_S / value for value in seconds.values))
        rows.append([name, seconds.times(1e3), efficiency])
    return table(["workers and servers", "step, ms", f"efficiency (bar at {N_WORKERS}: >= 0.85)"], rows)


def run(asked: Asked) -> str:
    """The tables of S7."""
    return f"{updates(asked)}\n\n{efficiencies(asked)}"


if __name__ == "__main__":
    {"update": update, "addition": addition, "server": server, "worker": worker}[sys.argv[1]](*map(int, sys.argv[2:]))
