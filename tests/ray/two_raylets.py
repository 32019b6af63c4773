"""Ray nodes on this machine until SIGTERM: ``python two_raylets.py TEMP_DIR HEAD_CPUS SECOND_CPUS [MORE_CPUS ...]``.

Prints each node with the pid of its raylet, and the cluster's address when all are there.
"""

from __future__ import annotations

import signal
import sys

from ray.cluster_utils import Cluster


def main(temp_dir: str, head_cpus: int, *more: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    common = {"object_store_memory": 128 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "temp_dir": temp_dir, **common})
    try:
        for cpus in more:
            cluster.add_node(num_cpus=cpus, object_store_memory=128 * 2**20)
        for node in cluster.list_all_nodes():
            print(f"node={node.node_id} raylet={node.all_processes['raylet'][0].process.pid}", flush=True)
        print(f"address={cluster.address}", flush=True)
        signal.sigwait([signal.SIGTERM])
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
