"""Up to ten thousand workers in the cost model: where servers saturate, and how many servers to use. No measuring.

16 workers a node, 10 Gbit/s, a worker computes 100 ms a step; servers are on nodes of their own share of the cluster.
"""

from __future__ import annotations

from dataclasses import replace

from bench.measure import Asked, table
from raysgd.cost import Job, Machine, Network, best_servers, predict

PER_NODE = 16
WORKERS = (16, 128, 1_024, 10_000)
SIZES = (100_000, 1_000_000, 10_000_000, 100_000_000)
SERVERS = (1, 4, 16, 64, 256)
MACHINE = Machine(cores=32)
NETWORK = Network.gbit(10)


def job_of(n_params: int, workers: int, servers: int = 1) -> Job:
    """``workers`` aligned workers on full nodes."""
    return Job(
        n_params, 64 * workers, virtual_workers=workers, workers=workers, servers=servers,
        nodes=max(1, workers // PER_NODE), compute_s=0.1,
    )  # fmt: skip


def run(_asked: Asked) -> str:
    """Milliseconds a step by parameters, workers and servers; the best number of servers; local steps 8 with it."""
    rows = []
    for n_params in SIZES:
        for workers in WORKERS:
            job = job_of(n_params, workers)
            took = [
                f"{1e3 * predict(replace(job, servers=s), MACHINE, NETWORK).step_s:,.0f}" if s <= job.nodes else ""
                for s in SERVERS
            ]
            best = best_servers(job, MACHINE, NETWORK)
            cost = predict(replace(job, servers=best), MACHINE, NETWORK)
            local = predict(replace(job, servers=best, local_steps=8), MACHINE, NETWORK)
            shown = [f"{cost.efficiency:.2f}", f"{local.efficiency:.2f}"]
            rows.append([f"{n_params:,}", f"{workers:,}", job.nodes, *took, best, f"{1e3 * cost.step_s:,.0f}", *shown])
    servers = [f"{s} server{'s' * (s > 1)}, ms" for s in SERVERS]
    head = ["parameters", "workers", "nodes", *servers, "best", "then, ms", "efficiency", "with 8 local steps"]
    return table(head, rows)
