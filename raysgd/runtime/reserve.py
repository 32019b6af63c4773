"""Room for the actors of a run in a cluster that is there: waited for, reserved, asked of an autoscaler, or refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raysgd.capacity import Growth, Resources, covers, never, told, total
from raysgd.data.dataset import counted
from raysgd.errors import InputError
from raysgd.runtime import autoscaler
from raysgd.runtime.calls import WATCH_S
from raysgd.spec import ScalingConfig

#: what is reserved for one actor: the group, and the place in it
Bundle: TypeAlias = tuple[PlacementGroup, int]

#: what the actors of a group ask for, and how Ray is to place it
Ask: TypeAlias = tuple[Sequence[Resources], str]

#: seconds that an autoscaler may take to bring nodes: clouds need minutes
GROW_S = 900.0


def reserve(scaling: ScalingConfig, timeout_s: float, say: Callable[[str], None]) -> list[Bundle]:
    """What all actors of a run need, reserved: that of the least number of workers, then that of the servers, then that
    of their replicas. [] where a single node has room for all of them.

    Waits up to ``timeout_s`` until it is free; where the cluster is too small, until nodes have come, longer where an
    autoscaler can bring them. Raises InputError with what is asked and what there is, at once where an autoscaler's
    last node would not be enough.
    """
    asks, deadline = scaling.asks, time.monotonic() + timeout_s
    asked = total([ask for wanted in asks.values() for ask in wanted])
    alone = bool(scaling.replicas) and len(autoscaler.nodes()) < 2
    if alone and autoscaler.growth() is None:
        raise InputError(
            "scaling.replicas = 1 keeps a copy of every server on another node, and the cluster has one node: "
            "add nodes, or set it to 0"
        )
    while not covers(free := _free(), asked) or alone:
        if alone or too_small(asks):
            return _when_grown(scaling, timeout_s, deadline, say)
        if time.monotonic() >= deadline:
            raise InputError(
                f"the run asks for {_counted(scaling, asked)}; available within {timeout_s:g} s: "
                f"{_of(asked, free, ray.cluster_resources())}. Ask for fewer, or wait until other jobs end"
            )
        time.sleep(WATCH_S)
    return _spread(asks, deadline) if sum("CPU" in node for node in autoscaler.nodes()) > 1 else []


def too_small(asks: Mapping[str, Sequence[Resources]]) -> bool:
    """Whether the nodes that are there could not hold the actors even if nothing else ran on them."""
    return bool(never(asks, autoscaler.nodes(), None))


def _spread(asks: Mapping[str, Sequence[Resources]], deadline: float) -> list[Bundle]:
    """Take what all actors need before the first starts: servers and workers each on as many nodes as there are;
    packed, where they do not fit like that.

    One by one the actors could block each other: a server on the node whose last CPU a worker would need.
    """
    spread, packed = _ways(asks)
    bundles = _grouped(spread, (time.monotonic() + deadline) / 2) or _grouped(packed, deadline)
    if not bundles:
        raise InputError(
            "the free CPUs of the cluster are not on nodes where all actors fit: "
            f"{_each(asks)}. Ask for fewer, or wait until other jobs end"
        )
    return _in_order(bundles, asks)


def _ways(asks: Mapping[str, Sequence[Resources]]) -> tuple[list[Ask], list[Ask]]:
    """How to group what is asked for: spread over the nodes, or packed. A server and its replica never share a node."""
    workers, servers = asks["worker"], asks["server"]
    if "replica" not in asks:
        return [(workers, "SPREAD"), (servers, "SPREAD")], [([*workers, *servers], "PACK")]
    pairs: list[Ask] = [(pair, "STRICT_SPREAD") for pair in zip(servers, asks["replica"], strict=True)]
    return [(workers, "SPREAD"), *pairs], [(workers, "PACK"), *pairs]


def _in_order(bundles: list[Bundle], asks: Mapping[str, Sequence[Resources]]) -> list[Bundle]:
    """Those of the workers, then those of the servers, then those of the replicas."""
    if "replica" not in asks:
        return bundles
    n = len(asks["worker"])
    return [*bundles[:n], *bundles[n::2], *bundles[n + 1 :: 2]]


def _when_grown(scaling: ScalingConfig, timeout_s: float, deadline: float, say: Callable[[str], None]) -> list[Bundle]:
    """Ask for everything at once, which an autoscaler sees, and wait until nodes have come that hold it."""
    asks = scaling.asks
    _, packed = _ways(asks)
    groups = [placement_group([dict(ask) for ask in wanted], how) for wanted, how in packed]
    try:
        growth = autoscaler.growth()
        if why := _hopeless(asks, growth):
            raise InputError(_refusal(scaling, why, growth, None))
        if growth is not None:
            say(f"the cluster is too small yet: the run asks for {_counted(scaling)}; {growth.describe()}: waiting")
            if not growth.unknown:  # a list of machines is there, or is not: a cloud needs time
                deadline, timeout_s = time.monotonic() + GROW_S, GROW_S
        while not all(group.wait(WATCH_S) for group in groups):
            if time.monotonic() >= deadline:
                why = never(asks, autoscaler.nodes(), None) or ["no node came that has room for what is asked for"]
                raise InputError(_refusal(scaling, why, growth, timeout_s))
    except BaseException:
        for group in groups:
            remove_placement_group(group)
        raise
    return _in_order([(g, i) for g, (ask, _) in zip(groups, packed, strict=True) for i in range(len(ask))], asks)


def _hopeless(asks: Mapping[str, Sequence[Resources]], growth: Growth | None) -> list[str]:
    """Why not even an autoscaler can help; [] where there is none: nodes may be on their way."""
    return never(asks, autoscaler.nodes(), growth) if growth is not None else []


def _refusal(scaling: ScalingConfig, why: Sequence[str], growth: Growth | None, waited_s: float | None) -> str:
    said = f"the run asks for {_counted(scaling)} and the Ray cluster has {told(ray.cluster_resources())} in all"
    said += "" if waited_s is None else f", {waited_s:g} s later, too"
    can = "no autoscaler is known that could add nodes" if growth is None else growth.describe()
    remedy = "lower scaling.num_workers, scaling.worker_cpus or scaling.server_cpus, or add nodes"
    if growth is None:
        remedy += "; where nodes are on their way, raise scaling.placement_timeout_s"
    return f"{said}: {'; '.join(why)}; {can}: {remedy}"


def _grouped(asks: Sequence[Ask], deadline: float) -> list[Bundle]:
    """Reserve what is asked for, group by group, the larger actors first; [] where it does not fit."""
    groups: dict[int, PlacementGroup] = {}
    for i in sorted(range(len(asks)), key=lambda i: asks[i][0][0]["CPU"], reverse=True):
        groups[i] = placement_group([dict(ask) for ask in asks[i][0]], asks[i][1])
        if not groups[i].wait(max(0.1, deadline - time.monotonic())):
            for group in groups.values():
                remove_placement_group(group)
            return []
    return [(groups[i], k) for i, (ask, _) in enumerate(asks) for k in range(len(ask))]


def free_cpus() -> str:
    """What the cluster can still give, for people."""
    return f"available now: {_of({'CPU': 0.0}, _free(), ray.cluster_resources())}"


def _free() -> dict[str, float]:
    return dict(ray.available_resources())


def _of(asked: Resources, free: Resources, everything: Resources) -> str:
    """What is free of each resource that is asked for."""
    parts = (f"{free.get(name, 0.0):g} of {everything.get(name, 0.0):g} {_plural(name)}" for name in asked)
    return ", ".join(parts)


def _counted(scaling: ScalingConfig, asked: Resources | None = None) -> str:
    asked = total([ask for wanted in scaling.asks.values() for ask in wanted]) if asked is None else asked
    amounts = ", ".join(f"{amount:g} {_plural(name)}" for name, amount in asked.items())
    apart = ", each with a replica" if scaling.replicas else ""
    return f"{amounts} ({counted(scaling.least_workers, 'worker')}, {counted(scaling.num_servers, 'server')}{apart})"


def _each(asks: Mapping[str, Sequence[Resources]]) -> str:
    first = {who: wanted[0] for who, wanted in asks.items()}
    shown = {who: ", ".join(f"{amount:g} {_plural(name)}" for name, amount in a.items()) for who, a in first.items()}
    return f"a worker asks for {shown['worker']}, a server for {shown['server']}"


def _plural(name: str) -> str:
    return "CPUs" if name == "CPU" else name
