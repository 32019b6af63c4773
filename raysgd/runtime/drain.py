"""Nodes that are announced to go: Ray's drain notice, which a spot instance's end, the autoscaler or an operator gives.

ray drain-node ─▶ Ray places nothing there any more, what runs there goes on ─▶ the node dies at its deadline
                              └─▶ workers hand over; where servers are there, all move while there is room
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import ray
from ray._private import state as private
from ray.util import client

from raysgd.runtime.gang import Gang

#: seconds between two looks, each a call of 0.3 ms
LOOK_S = 1.0

#: seconds between two checkpoints, at most, while servers will go with their node
HURRY_S = 10.0


class Notices:
    """The nodes that were announced to go, also those that have gone since: Ray forgets them.

    nodes: by id;  leaving: why all actors are to move, as soon as there is a checkpoint; for people
    hurry: whether servers will go with their node, because nowhere else is room for all
    """

    def __init__(self) -> None:
        self.nodes: frozenset[str] = frozenset()
        self.leaving: str | None = None
        self.hurry = False
        self._looked = (
            float("inf") if client.ray.is_connected() else float("-inf")
        )  # who is not in the cluster hears none
        #: whether those with servers on such nodes stay as long as they can
        self._stays = False
        self._told: set[int] = set()

    def look(self, gang: Gang, *, movable: bool) -> list[int]:
        """Ask Ray, now and then; the workers that are to hand over, each once.

        movable: whether servers are to move, which takes a checkpoint; else they stay until their node goes
        """
        if time.monotonic() < self._looked + LOOK_S:
            return []
        self._looked = time.monotonic()
        ask = getattr(private.state, "get_draining_nodes", dict)  # not promised to be in other versions of Ray
        self.nodes |= ask().keys()
        if not self.nodes:
            return []
        going = [str(i) for i, server in enumerate(gang.servers) if self.concern(server.site)]
        self.hurry = bool(going)
        if going and movable and not self._stays and fit(_asks(gang), self._room(gang)):
            self.leaving = f"the node of server {', '.join(going)} will go"
            return []
        told = {number for number, worker in gang.workers.items() if self.concern(worker.site)} - self._told
        self._told |= told
        return sorted(told)

    def stay(self) -> None:
        """Servers do not move: no checkpoint could be written."""
        self.leaving, self._stays = None, True

    def concern(self, site: str | None) -> bool:
        """Whether the node of this name will go, or went as announced."""
        return node_of(site) in self.nodes

    def _room(self, gang: Gang) -> list[float]:
        """CPUs that are free on each node that stays, or that the gang itself has there."""
        room = defaultdict(float)
        for node, found in private.available_resources_per_node().items():
            room[node] = found.get("CPU", 0.0)
        for member in gang.workers.values():
            room[node_of(member.site)] += gang.scaling.worker_cpus
        for member in gang.servers:
            room[node_of(member.site)] += gang.scaling.server_cpus
        return [room[node["NodeID"]] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in self.nodes]


def node_of(site: str | None) -> str:
    """The id of the Ray node that is named so; "" where it is not known.

    >>> node_of("0f3a 5e 77aa"), node_of(None)
    ('77aa', '')
    """
    return (site or "").rpartition(" ")[2]


def _asks(gang: Gang) -> list[float]:
    scaling = gang.scaling
    return [scaling.worker_cpus] * scaling.least_workers + [scaling.server_cpus] * scaling.num_servers


def fit(asks: Sequence[float], room: Sequence[float]) -> bool:
    """Whether all fit: the largest first, each where it fits first.

    >>> fit([1, 1, 2], [2, 2]), fit([1, 1, 2], [3, 0.5]), fit([], [])
    (True, False, True)
    """
    left = list(room)
    for ask in sorted(asks, reverse=True):
        at = next((i for i, cpus in enumerate(left) if cpus + 1e-9 >= ask), None)
        if at is None:
            return False
        left[at] -= ask
    return True
