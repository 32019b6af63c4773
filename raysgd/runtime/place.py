"""Where the actors are, and what follows: whose virtual workers are neighbours, and which nodes need a relay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import ray

from raysgd.runtime.segment import site


def here() -> str | None:
    """What names the Ray node of this actor among all: actors that read the same can share memory. None: none can.

    Two Ray nodes on one machine count as two.
    """
    machine = site()
    return None if machine is None else f"{machine} {ray.get_runtime_context().get_node_id()}"


def by_node(workers: Sequence[str | None], servers: Sequence[str | None]) -> list[int]:
    """An order of the workers, given by their places, in which those of one node are neighbours.

    Nodes with more workers come first, which aligns more of their runs with the tree; then those with more servers.

    >>> by_node(["a", "b", "c", "b"], ["c"])
    [1, 3, 2, 0]
    """
    count, served = Counter(workers), Counter(servers)
    first = {place: i for i, place in reversed(list(enumerate(workers)))}
    return sorted(range(len(workers)), key=lambda i: (-count[workers[i]], -served[workers[i]], first[workers[i]], i))


def relay_hosts(workers: Sequence[str | None], servers: Sequence[str | None]) -> dict[str, int]:
    """For each node that has workers but lacks a server: the first of its workers.

    >>> relay_hosts(["a", "a", "b", "b", None], ["a", "a"]), relay_hosts(["a", "b"], ["a", "b"])
    ({'b': 2}, {'a': 0, 'b': 1})
    """
    lacking = [place for place in workers if place is not None and any(server != place for server in servers)]
    return {place: workers.index(place) for place in lacking}
