"""Two Ray nodes on this machine until SIGTERM: ``python two_raylets.py TEMP_DIR HEAD_CPUS SECOND_CPUS``.

Prints the cluster's address when both are there, and the pid of the raylet of each node but the head; SIGUSR1 adds
another one like the second.
"""

from __future__ import annotations

import signal
import sys

from ray.cluster_utils import Cluster


def main(temp_dir: str, head_cpus: int, second_cpus: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
    common = {"object_store_memory": 128 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "temp_dir": temp_dir, **common})
    try:
        add(cluster, second_cpus)
        print(f"address={cluster.address}", flush=True)
        while signal.sigwait([signal.SIGTERM, signal.SIGUSR1]) == signal.SIGUSR1:
            add(cluster, second_cpus)
    finally:
        cluster.shutdown()


def add(cluster: Cluster, cpus: int) -> None:
    node = cluster.add_node(num_cpus=cpus, object_store_memory=128 * 2**20)
    print(f"raylet={node.all_processes['raylet'][0].process.pid}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
