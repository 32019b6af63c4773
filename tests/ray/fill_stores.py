"""Keeps the object stores of all nodes of a cluster full until it is killed: ``python fill_stores.py ADDRESS``.

Prints "full" when each holds twice what it has room for: the rest is on disk.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SIZE = 8 << 20


class Filler:
    """Holds the newest ``count`` objects of its node."""

    def __init__(self, count: int) -> None:
        self.count, self.held = count, list[Any]()

    def put(self) -> None:
        self.held = [*self.held[-self.count :], ray.put(np.ones(SIZE, np.uint8))]


def main(address: str) -> None:
    ray.init(address=address, log_to_driver=False, logging_level="error")
    fillers, most = [], 0
    for node in ray.nodes():
        if node["Alive"]:
            count = 2 * int(node["Resources"]["object_store_memory"]) // SIZE
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            fillers.append(ray.remote(Filler).options(num_cpus=0, scheduling_strategy=there).remote(count))
            most = max(most, count)
    for turn in itertools.count():
        ray.get([filler.put.remote() for filler in fillers])
        if turn == most:
            print("full", flush=True)
        time.sleep(0.0 if turn < most else 0.1)


if __name__ == "__main__":
    main(sys.argv[1])
