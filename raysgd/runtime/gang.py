"""The actors of one attempt: placed together, called with a time limit, and gone at the end."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raysgd.errors import InputError, RaysgdError, RunError
from raysgd.learn.parameters import Range
from raysgd.runtime.place import by_node, relay_hosts
from raysgd.runtime.server import ServerActor
from raysgd.runtime.session import SINGLE_THREADED
from raysgd.runtime.shared import BoardAddress
from raysgd.runtime.worker import WorkerActor
from raysgd.spec import ScalingConfig

#: colours that Ray puts into tracebacks
_ANSI = re.compile(r"\x1b\[[0-9;]*m")

#: no answer to a control call after this long is an error: nothing blocks for ever
CALL_TIMEOUT_S = 120.0

#: seconds between two looks at long calls
WATCH_S = 0.25


#: a server's node, and where its parameters are shared there
Place: TypeAlias = tuple[str | None, BoardAddress | None]


class Gang:
    """Worker and server actors; ``close`` kills them all, whatever state they are in.

    timeout_s: how long placing may take; default: ``scaling.placement_timeout_s``
    """

    def __init__(self, scaling: ScalingConfig, timeout_s: float | None = None) -> None:
        self.scaling = scaling
        self.timeout_s = scaling.placement_timeout_s if timeout_s is None else timeout_s
        self.workers: list[Any] = []
        self.servers: list[Any] = []
        #: each server's node, and where its parameters are shared
        self.boards: list[Place] = []
        #: each worker's node
        self.sites: list[str | None] = []
        #: the worker that relays for a node, and where the parameters of far shards are on it
        self.relays: dict[str, tuple[int, dict[int, BoardAddress]]] = {}
        #: the CPUs reserved for each worker, then for each server, where there are several nodes: group and index in it
        self.bundles: list[tuple[PlacementGroup, int]] = []

    def place(self) -> None:
        """Start all actors, and wait until the cluster has placed them: spread over the nodes where there are several.

        Raises InputError where the CPUs for all of them are not free, or not on nodes where they fit, within
        ``timeout_s``.
        """
        deadline = time.monotonic() + self.timeout_s
        self._await_free(deadline)
        if sum("CPU" in node["Resources"] for node in ray.nodes() if node["Alive"]) > 1:
            self._reserve(deadline)
        scaling = self.scaling
        workers = range(scaling.num_workers)
        servers = range(scaling.num_workers, scaling.num_workers + scaling.num_servers)
        self.workers = [WorkerActor.options(**self._options(scaling.worker_cpus, i)).remote() for i in workers]
        self.servers = [ServerActor.options(**self._options(scaling.server_cpus, i)).remote() for i in servers]
        self._await_placed(deadline)

    def begin(self, shards: Sequence[Callable[..., Any]], spans: Sequence[Range], buffers: int) -> None:
        """Give each server the state machine of its shard, with ``buffers`` of parameters, and its peers; make the
        workers of one node neighbours."""
        begun = [s.begin.remote(make, span, buffers) for s, make, span in zip(self.servers, shards, spans, strict=True)]
        self.boards = call(begun, "starting the servers")
        call([s.meet.remote(self.servers) for s in self.servers], "starting the servers")
        sites = call([w.site.remote() for w in self.workers], "locating the workers")
        order = by_node(sites, [place for place, _ in self.boards])
        self.workers, self.sites = [self.workers[i] for i in order], [sites[i] for i in order]

    def relay(self, spans: Sequence[Range], n_virtual: int, version: int) -> None:
        """On each node that has workers but lacks a server, have one worker stand in for it from ``version`` on."""
        begun = {}
        for site, host in relay_hosts(self.sites, [place for place, _ in self.boards]).items():
            far = {
                i: s for i, (s, (place, _)) in enumerate(zip(self.servers, self.boards, strict=True)) if place != site
            }
            begun[site] = host, self.workers[host].relay_to.remote(far, spans, n_virtual, version)
        boards = call([ref for _, ref in begun.values()], "starting the relays")
        self.relays = {site: (host, at) for (site, (host, _)), at in zip(begun.items(), boards, strict=True)}

    def reachable(self, worker: int) -> list[Place]:
        """The servers' places as the worker sees them: those of other nodes are where its node's relay is."""
        site = self.sites[worker]
        _, relayed = self.relays.get(site or "", (0, {}))
        return [(site, relayed[i]) if i in relayed else place for i, place in enumerate(self.boards)]

    def readers(self, worker: int) -> list[Any]:
        """The actors that read the worker's gradients from memory: its node's servers, and the worker that relays."""
        site = self.sites[worker]
        near = [s for s, (place, _) in zip(self.servers, self.boards, strict=True) if place == site]
        host = self.relays[site][0] if site in self.relays else worker
        return near if host == worker else [*near, self.workers[host]]

    def traffic(self) -> list[str]:
        """A line for each relay: what went between its node and others."""
        calls = [self.workers[host].traffic.remote() for host, _ in self.relays.values()]
        return [traffic.describe() for traffic in call(calls, "counting the traffic") if traffic.nodes]

    def shares(self, count: int) -> list[range]:
        """``count`` things to do, shared out over the workers: contiguous, even to one."""
        n = len(self.workers)
        return [range(i * count // n, (i + 1) * count // n) for i in range(n)]

    def check_servers(self) -> None:
        """Raises RunError where a server has died: workers that share its memory cannot tell."""
        for index, server in enumerate(self.servers):
            call([server.pid.remote()], f"server {index}")

    def close(self) -> None:
        for actor in [*self.workers, *self.servers]:
            ray.kill(actor)
        for group in {group.id: group for group, _ in self.bundles}.values():
            remove_placement_group(group)
        self.workers, self.servers, self.relays, self.bundles = [], [], {}, []

    def _options(self, cpus: float, actor: int) -> dict[str, Any]:
        options: dict[str, Any] = {"num_cpus": cpus, "runtime_env": {"env_vars": SINGLE_THREADED}}
        if self.bundles:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(*self.bundles[actor])
        return options

    def _reserve(self, deadline: float) -> None:
        """Take the CPUs of all actors before the first starts: servers and workers each on as many nodes as there are;
        packed, where they do not fit like that.

        One by one the actors could block each other: a server on the node whose last CPU a worker would need.
        """
        scaling = self.scaling
        workers, servers = [scaling.worker_cpus] * scaling.num_workers, [scaling.server_cpus] * scaling.num_servers
        half = (time.monotonic() + deadline) / 2
        if self._grouped([workers, servers], "SPREAD", half) or self._grouped([workers + servers], "PACK", deadline):
            return
        raise InputError(
            "the free CPUs of the cluster are not on nodes where all actors fit: "
            f"a worker asks for {scaling.worker_cpus:g} CPUs, a server for {scaling.server_cpus:g}. "
            "Ask for fewer, or wait until other jobs end"
        )

    def _grouped(self, asks: list[list[float]], strategy: str, deadline: float) -> bool:
        """Reserve the CPUs asked for, in a group for each kind, the larger first; False where they do not fit."""
        groups: dict[int, PlacementGroup] = {}
        for i in sorted(range(len(asks)), key=lambda i: asks[i][0], reverse=True):
            groups[i] = placement_group([{"CPU": cpus} for cpus in asks[i]], strategy)
            if not groups[i].wait(max(0.1, deadline - time.monotonic())):
                for group in groups.values():
                    remove_placement_group(group)
                return False
        self.bundles = [(groups[i], k) for i, ask in enumerate(asks) for k in range(len(ask))]
        return True

    def _await_free(self, deadline: float) -> None:
        """Wait until all that the run asks for is free, before the first actor takes a part of it."""
        while (cpus := self.scaling.cpus) > (free := float(ray.available_resources().get("CPU", 0.0))):
            if time.monotonic() >= deadline:
                total = float(ray.cluster_resources().get("CPU", 0.0))
                raise InputError(
                    f"the run asks for {cpus:g} CPUs ({self.scaling.num_workers} workers, {self.scaling.num_servers} "
                    f"servers); available within {self.timeout_s:g} s: {free:g} of {total:g} CPUs. "
                    "Ask for fewer, or wait until other jobs end"
                )
            time.sleep(WATCH_S)

    def _await_placed(self, deadline: float) -> None:
        scaling = self.scaling
        pids = [actor.pid.remote() for actor in (*self.workers, *self.servers)]
        ready, pending = ray.wait(pids, num_returns=len(pids), timeout=max(0.0, deadline - time.monotonic()))
        if pending:
            free = float(ray.available_resources().get("CPU", 0.0))
            total = float(ray.cluster_resources().get("CPU", 0.0))
            raise InputError(
                f"the cluster placed {len(ready)} of {len(pids)} actors within {self.timeout_s:g} s: "
                f"a worker asks for {scaling.worker_cpus:g} CPUs, a server for {scaling.server_cpus:g}; available now: "
                f"{free:g} of {total:g} CPUs. Ask for fewer, or wait until other jobs end"
            )
        call(ready, "starting the actors")


def same_node(site: str | None, boards: Sequence[Place]) -> list[BoardAddress] | None:
    """Where a worker at ``site`` finds the parameters of all servers in memory; None where one is on another node.

    >>> same_node("a", [("a", None)]), same_node(None, [(None, None)])
    (None, None)
    """
    found = [address for place, address in boards if place == site and address is not None]
    return found if site is not None and len(found) == len(boards) else None


def gather(refs: Sequence[Any], what: str, watch: Callable[[], None]) -> list[Any]:
    """The results of long actor calls, in order; ``watch`` is called every quarter of a second and at each result.

    Raises as :func:`call` does, at the first call that fails; there is no limit of time.
    """
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=WATCH_S)
        for ref in done:
            call([ref], f"{what}, worker {list(refs).index(ref)}")
        watch()
    return call(refs, what)


def call(refs: Sequence[Any], what: str, timeout: float | None = None) -> list[Any]:
    """The results of actor calls, in order.

    Raises the actor's own RaysgdError as it was raised there; RunError, which names ``what``, where an actor died or
    did not answer within ``timeout`` seconds (default 120).
    """
    limit = CALL_TIMEOUT_S if timeout is None else timeout
    try:
        return list(ray.get(list(refs), timeout=limit))
    except ray.exceptions.GetTimeoutError as error:
        raise RunError(f"{what}: no answer within {limit:g} s") from error
    except ray.exceptions.RayActorError as error:
        raise RunError(f"{what}: an actor died: {error}") from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaysgdError):
            raise error.cause from None
        raise RunError(f"{what}: {error.cause!r}\n{_ANSI.sub('', str(error))}") from error
