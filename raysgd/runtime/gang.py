"""The actors of one attempt: placed, called with a time limit, watched for signs of life, and gone at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from raysgd.errors import InputError, RunError
from raysgd.learn.parameters import Range
from raysgd.protocol.kept import Kept
from raysgd.runtime.board import BoardAddress
from raysgd.runtime.calls import GONE, ActorLostError, call, lost, result
from raysgd.runtime.place import here, relay_hosts
from raysgd.runtime.process import Process
from raysgd.runtime.pulse import SUSPECT_S, Pulse
from raysgd.runtime.reserve import Bundle, free_cpus, reserve
from raysgd.runtime.server import Place, ServerActor
from raysgd.runtime.session import SINGLE_THREADED
from raysgd.runtime.worker import WorkerActor
from raysgd.spec import ScalingConfig


@dataclass
class Member:
    """A worker or server actor. site: its node's name"""

    actor: Any
    process: Process
    site: str | None
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def id(self) -> str:
        return str(self.actor._actor_id.hex())


@dataclass
class Asked:
    """A worker that Ray was asked for. ``ready``: its process and its node, when it is there"""

    actor: Any
    ready: list[Any]


class Gang:
    """Worker and server actors; ``close`` kills them all, whatever state they are in.

    timeout_s: how long placing may take; default: ``scaling.placement_timeout_s``
    """

    def __init__(self, scaling: ScalingConfig, timeout_s: float | None = None) -> None:
        self.scaling = scaling
        self.timeout_s = scaling.placement_timeout_s if timeout_s is None else timeout_s
        #: by number: the workers that are there, and those that were asked for
        self.workers: dict[int, Member] = {}
        self.asked: dict[int, Asked] = {}
        self.servers: list[Member] = []
        #: how often each server was replaced
        self.replaced: list[int] = []
        #: each server's node, and where its parameters are shared
        self.boards: list[Place] = []
        #: by node: a server that holds the memory of those there, to take the place of one of them
        self.spares: dict[str, Member] = {}
        self._coming: dict[str, Asked] = {}
        #: by shard: the server on another node that follows it, see :class:`~raysgd.runtime.replicas.Replicas`
        self.replicas: dict[int, Member] = {}
        self.replicas_asked: dict[int, Asked] = {}
        #: the worker that relays for a node, and where the parameters of far shards are on it
        self.relays: dict[str, tuple[int, dict[int, BoardAddress]]] = {}
        #: the CPUs reserved for each worker, then for each server, where there are several nodes: group and index in it
        self.bundles: list[Bundle] = []
        #: where there are replicas: by shard, the bundle of its server, and that of its replica on another node
        self.server_bundles: list[Bundle] = []
        self.replica_bundles: list[Bundle] = []
        #: bundles of workers that nobody uses
        self._free: list[Bundle] = []
        self._bundle_of: dict[int, Bundle] = {}
        #: called while calls are awaited: looks who is alive
        self.watch: Callable[[], None] | None = None
        #: raises where the cluster itself is dead
        self.check_cluster: Callable[[], None] = lambda: None
        #: bytes available on each node; [] where nobody tells
        self.memory: Callable[[], Sequence[int]] = list
        #: what its actors are called after, with something that no other run's are
        self.name = "run"
        self._unique = uuid4().hex[:6]
        #: tells people
        self.say: Callable[[str], None] = lambda _line: None
        self._site = here()
        self._numbers = self._named = 0
        #: by when workers are asked for: how many
        self._later: list[tuple[float, int]] = []
        #: why workers died while they started, until somebody has been told
        self.stillborn: list[ActorLostError] = []

    # -- placing

    def place(self) -> None:
        """Start the servers and the least number of workers, and wait until the cluster has placed them: spread over
        the nodes where there are several. Ask for the other workers.

        Raises InputError as :func:`reserve` does.
        """
        deadline = time.monotonic() + self.timeout_s
        scaling = self.scaling
        self.bundles = reserve(scaling, self.timeout_s, self.say)
        if self.bundles:  # what is reserved needs only to start
            deadline = time.monotonic() + self.timeout_s
        least = scaling.least_workers
        self._free = self.bundles[:least]
        self.server_bundles = self.bundles[least : least + scaling.num_servers]
        self.replica_bundles = self.bundles[least + scaling.num_servers :]
        for _ in range(least):
            self.ask_worker()
        bundles: list[Bundle | None] = [*self.server_bundles] or [None] * scaling.num_servers
        asked = [self._server_options(f"server-{i}", b) for i, b in enumerate(bundles)]
        servers = [ServerActor.options(**options).remote() for options in asked]
        self._await_placed(servers, deadline)
        ready = call([ref for a in servers for ref in (a.process.remote(), a.site.remote())], "starting the servers")
        self.servers = [Member(a, ready[2 * i], ready[2 * i + 1]) for i, a in enumerate(servers)]
        self.replaced = [0] * len(servers)
        for number in list(self.asked):
            self._adopt(number)
        for _ in range(scaling.most_workers - least):
            self.ask_worker()

    def ask_worker(self) -> int:
        """Ask Ray for one more worker; :meth:`joined` tells when it is there."""
        number, self._numbers = self._numbers, self._numbers + 1
        bundle = self._free.pop(0) if self._free else None
        if bundle is not None:
            self._bundle_of[number] = bundle
        options = self._options(self.scaling.worker_cpus, bundle) | {"resources": self.scaling.worker_resources}
        options["name"] = self._called(f"worker-{number}")
        actor = WorkerActor.options(**options).remote()
        self.asked[number] = Asked(actor, [actor.process.remote(), actor.site.remote()])
        return number

    def ask_workers(self, count: int, after_s: float) -> None:
        """Ask for ``count`` workers, not before ``after_s`` seconds from now."""
        self._later.append((time.monotonic() + after_s, count))

    def joined(self) -> list[int]:
        """The workers that have come since (``stillborn``: that died instead); asks for those whose time has come."""
        now = time.monotonic()
        due = [count for when, count in self._later if when <= now]
        self._later = [(when, count) for when, count in self._later if when > now]
        for _ in range(sum(due)):
            self.ask_worker()
        found = []
        for number, asked in list(self.asked.items()):
            done, _ = ray.wait(asked.ready, num_returns=len(asked.ready), timeout=0)
            if len(done) == len(asked.ready):
                try:
                    self._adopt(number)
                except ActorLostError as error:
                    self.stillborn.append(error)
                else:
                    found.append(number)
        return found

    def _adopt(self, number: int) -> None:
        """Take in a worker that is there; raises ActorLostError where it died while it started."""
        asked = self.asked.pop(number)
        try:
            process, site = call(asked.ready, f"starting worker {number}")
        except ActorLostError:
            if number in self._bundle_of:
                self._free.append(self._bundle_of.pop(number))
            raise
        self.workers[number] = Member(asked.actor, process, site)

    # -- the servers

    def begin(self, shards: Sequence[Callable[..., Any]], spans: Sequence[Range], kept: Kept) -> None:
        """Give each server the state machine of its shard, memory for it, and its peers."""
        begun = [
            s.actor.begin.remote(make, span, kept) for s, make, span in zip(self.servers, shards, spans, strict=True)
        ]
        self.boards = self.call(begun, "starting the servers")
        self.meet()

    def meet(self) -> None:
        """Make the servers know one another."""
        actors = self.server_actors
        self.call([a.meet.remote(actors) for a in actors], "starting the servers")

    @property
    def server_actors(self) -> list[Any]:
        return [s.actor for s in self.servers]

    def ask_replica(self, index: int, bundle: Bundle) -> None:
        """Ask Ray for a server that can follow that of a shard."""
        actor = ServerActor.options(**self._server_options(f"replica-{index}", bundle)).remote()
        self.replicas_asked[index] = Asked(actor, [actor.process.remote(), actor.site.remote()])

    def ask_spares(self) -> None:
        """On every node with a server have one more, which holds the memory of those there; it asks for no CPU."""
        for site in {s.site for s in self.servers if s.site is not None} - set(self.spares) - set(self._coming):
            node = site.rpartition(" ")[2]
            near = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {**self._options(0, None), "scheduling_strategy": near, "name": self._called("spare")}
            actor = ServerActor.options(**options).remote()
            held = [a for place, a in self.boards if place == site]
            self._coming[site] = Asked(actor, [actor.process.remote(), actor.hold.remote(held)])

    def look_for_spares(self) -> None:
        """Take in the spares that have come, and give up those that are dead or hung: others are asked for."""
        for site, spare in list(self.spares.items()):
            try:
                alive = not self.hung(spare)
            except ActorLostError:
                alive = False
            if not alive:
                del self.spares[site]
                self.bury(spare)
        for site, asked in list(self._coming.items()):
            done, _ = ray.wait(asked.ready, num_returns=len(asked.ready), timeout=0)
            if len(done) < len(asked.ready):
                continue
            del self._coming[site]
            try:
                self.spares[site] = Member(asked.actor, ray.get(asked.ready[0]), site)
                ray.get(asked.ready[1])
            except (ray.exceptions.RayError, RunError):  # without a spare a run goes back to its checkpoint
                self.spares.pop(site, None)

    def succeed(self, index: int, make: Callable[..., Any], span: Range, since: int) -> bool:
        """Replace a dead server by its node's spare; False where there is none that holds its memory, with all of the
        steps from ``since`` on."""
        dead, (site, address) = self.servers[index], self.boards[index]
        self.bury(dead)
        spare = self.spares.pop(site or "", None)
        if spare is None or address is None:
            return False
        try:
            succeeded = spare.actor.succeed.remote(address, make, span, since)
            self.boards[index] = call([succeeded], f"replacing server {index}", timeout=10.0)[0]
        except RunError:
            self.bury(spare)
            return False
        self.servers[index] = spare
        self.replaced[index] += 1
        self.meet()
        return True

    # -- the ways between them

    def relay(self, workers: Sequence[int], spans: Sequence[Range], n_virtual: int, version: int) -> None:
        """On each node that has ``workers`` but lacks a server, have one stand in for it from ``version`` on."""
        begun, before = {}, {host for host, _ in self.relays.values()}
        sites = [self.workers[w].site for w in workers]
        for site, host in relay_hosts(sites, [place for place, _ in self.boards]).items():
            number = workers[host]
            far = {
                i: s.actor
                for i, (s, (place, _)) in enumerate(zip(self.servers, self.boards, strict=True))
                if place != site
            }
            begun[site] = number, self.workers[number].actor.relay_to.remote(far, spans, n_virtual, version)
        idle = before & set(self.workers) - {host for host, _ in begun.values()}
        ended = [self.workers[host].actor.relay_to.remote({}, spans, n_virtual, version) for host in idle]
        self.call(ended, "ending relays")
        boards = self.call([ref for _, ref in begun.values()], "starting the relays")
        self.relays = {site: (host, at) for (site, (host, _)), at in zip(begun.items(), boards, strict=True)}

    def reachable(self, worker: int) -> list[Place]:
        """The servers' places as the worker sees them: those of other nodes are where its node's relay is."""
        site = self.workers[worker].site
        _, relayed = self.relays.get(site or "", (0, {}))
        return [(site, relayed[i]) if i in relayed else place for i, place in enumerate(self.boards)]

    def readers(self, worker: int) -> list[Any]:
        """The actors that read the worker's gradients from memory: its node's servers, and the worker that relays."""
        site = self.workers[worker].site
        near = [s.actor for s, (place, _) in zip(self.servers, self.boards, strict=True) if place == site]
        host = self.relays[site][0] if site in self.relays else worker
        return near if host == worker else [*near, self.workers[host].actor]

    def traffic(self) -> list[str]:
        """A line for each relay: what went between its node and others."""
        calls = [self.workers[host].actor.traffic.remote() for host, _ in self.relays.values()]
        return [traffic.describe() for traffic in self.call(calls, "counting the traffic") if traffic.nodes]

    def call(self, refs: Sequence[Any], what: str) -> list[Any]:
        """The results of actor calls, as :func:`call` gives them, while somebody looks who is alive."""
        return call(refs, what, watch=self.watch)

    # -- the end

    def lost(self, member: Member) -> None:
        """Forget a worker whose death is believed; what was reserved for it serves the next."""
        for number, worker in list(self.workers.items()):
            if worker is member:
                del self.workers[number]
                if number in self._bundle_of:
                    self._free.append(self._bundle_of.pop(number))
                    self._use_free()
        self.bury(member)

    def _use_free(self) -> None:
        """Have whoever was asked for elsewhere, and has not come, asked for where CPUs are reserved: on a new node Ray
        may reserve them anew before it places anybody."""
        for number in [n for n in self.asked if n not in self._bundle_of][: len(self._free)]:
            ray.kill(self.asked.pop(number).actor)
            self.ask_worker()

    def bury(self, member: Member) -> None:
        """Make a death true before it is believed: nothing shares memory with the process from here on.

        By its pid, on its own node; Ray's kill of a process that was stopped returns at once, and the process lives.
        Where nobody of its node answers the node itself is gone, and nobody there shares its memory.
        """
        ray.kill(member.actor)
        if self._is_here(member) and member.process.kill():
            return
        for other in self.neighbours(member):
            try:
                if call([other.actor.kill.remote(member.process)], "ending a process", timeout=10.0)[0]:
                    return
            except RunError:
                continue

    def hung(self, member: Member) -> bool:
        """Whether the actor is hung. Raises ActorLostError where it is dead."""
        try:
            return member.pulse.look(member.actor.beat.remote, partial(self._cpu_ticks, member))
        except GONE as error:
            raise lost("no sign of life", error, member.id) from error

    def refuse_hung(self) -> None:
        """Raises ActorLostError where a worker is dead or hung; a hung one is made dead."""
        self.check_cluster()
        for number, worker in self.workers.items():
            if self.hung(worker):
                self.bury(worker)
                raise ActorLostError(f"worker {number} hung for {worker.pulse.silent_s:.1f} s", worker.id)

    def _is_here(self, member: Member) -> bool:
        """Whether the actor is on this process's own node."""
        return self._site is not None and member.site == self._site

    def _cpu_ticks(self, member: Member) -> int | None:
        if self._is_here(member):
            return member.process.cpu_ticks()
        for other in self.neighbours(member):
            try:
                ticks: int | None = call([other.actor.cpu_ticks.remote(member.process)], "CPU time", timeout=1.0)[0]
            except RunError:
                continue
            return ticks
        return None

    def neighbours(self, member: Member) -> list[Member]:
        """Other actors of the same node, as far as they answer: who waits for a node that is gone waits in vain."""
        everyone = [*self.servers, *self.spares.values(), *self.replicas.values(), *self.workers.values()]
        near = [m for m in everyone if m is not member and m.site is not None and m.site == member.site]
        return [m for m in near if m.pulse.silent_s < SUSPECT_S]

    def close(self) -> None:
        members = (*self.workers.values(), *self.servers, *self.spares.values(), *self.replicas.values())
        waiting = (*self.asked.values(), *self._coming.values(), *self.replicas_asked.values())
        for actor in [*(m.actor for m in members), *(a.actor for a in waiting)]:
            ray.kill(actor)
        for group in {group.id: group for group, _ in self.bundles}.values():
            remove_placement_group(group)
        self.workers, self.servers, self.relays, self.bundles, self.replica_bundles = {}, [], {}, [], []
        self.asked, self._coming, self.spares = {}, {}, {}
        self.replicas, self.replicas_asked = {}, {}

    # -- what Ray is asked for

    def _server_options(self, called: str, bundle: Bundle | None) -> dict[str, Any]:
        options = {"resources": self.scaling.server_resources, "name": self._called(called)}
        return self._options(self.scaling.server_cpus, bundle) | options

    def _called(self, what: str) -> str:
        """An actor's name in Ray's dashboard; no two are the same, since Ray keeps those of the dead for a while."""
        self._named += 1
        return f"raysgd/{self.name}/{what}/{self._unique}-{self._named}"

    def _options(self, cpus: float, bundle: Bundle | None) -> dict[str, Any]:
        options: dict[str, Any] = {"num_cpus": cpus, "runtime_env": {"env_vars": SINGLE_THREADED}}
        if bundle is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(*bundle)
        return options

    def _await_placed(self, servers: Sequence[Any], deadline: float) -> None:
        scaling = self.scaling
        pids = [*(a.ready[0] for a in self.asked.values()), *(actor.process.remote() for actor in servers)]
        names = [*(f"worker {n}" for n in self.asked), *(f"server {i}" for i in range(len(servers)))]
        ready, pending = ray.wait(pids, num_returns=len(pids), timeout=max(0.0, deadline - time.monotonic()))
        if pending:
            free = free_cpus()
            for actor in servers:
                ray.kill(actor)
            raise InputError(
                f"the cluster placed {len(ready)} of {len(pids)} actors within {self.timeout_s:g} s: "
                f"a worker asks for {scaling.worker_cpus:g} CPUs, a server for {scaling.server_cpus:g}; "
                f"{free}. Ask for fewer, or wait until other jobs end"
            )
        for ref, name in zip(pids, names, strict=True):
            result(ref, f"starting {name}")


def same_node(site: str | None, boards: Sequence[Place]) -> list[BoardAddress] | None:
    """Where a worker at ``site`` finds the parameters of all servers in memory; None where one is on another node.

    >>> same_node("a", [("a", None)]), same_node(None, [(None, None)])
    (None, None)
    """
    found = [address for place, address in boards if place == site and address is not None]
    return found if site is not None and len(found) == len(boards) else None


def shared_out(things: Mapping[int, Any] | Sequence[int], count: int) -> dict[int, range]:
    """``count`` things to do, shared out over workers by number: contiguous, even to one.

    >>> shared_out([3, 7], 5)
    {3: range(0, 2), 7: range(2, 5)}
    """
    numbers = list(things)
    n = len(numbers)
    return {number: range(i * count // n, (i + 1) * count // n) for i, number in enumerate(numbers)}
