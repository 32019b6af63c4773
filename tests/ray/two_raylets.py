"""Ray nodes on this machine until SIGTERM: ``python two_raylets.py TEMP_DIR HEAD_CPUS SECOND_CPUS [MORE_CPUS ...]``.

Prints each node with the pid of its raylet, the head first, and the cluster's address when all are there; SIGUSR1 adds
another node like the second.
"""

from __future__ import annotations

import signal
import sys

from ray.cluster_utils import Cluster

SIGNALS = [signal.SIGTERM, signal.SIGUSR1]


def main(temp_dir: str, head_cpus: int, *more: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    common = {"object_store_memory": 128 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "temp_dir": temp_dir, **common})
    try:
        tell(cluster.head_node)
        for cpus in more:
            add(cluster, cpus)
        print(f"address={cluster.address}", flush=True)
        while signal.sigwait(SIGNALS) == signal.SIGUSR1:
            add(cluster, more[0])
    finally:
        cluster.shutdown()


def add(cluster: Cluster, cpus: int) -> None:
    tell(cluster.add_node(num_cpus=cpus, object_store_memory=128 * 2**20))


def tell(node: object) -> None:
    print(f"node={node.node_id} raylet={node.all_processes['raylet'][0].process.pid}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
