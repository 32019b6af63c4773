"""Whether a cluster can ever give what a run asks for: now, or with what an autoscaler could still add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from raysgd.learn.checks import number_problems, shown

#: what Ray calls resources: "CPU", or any name, and how much
Resources: TypeAlias = Mapping[str, float]

#: Ray counts in ten-thousandths
UNIT = 1e-4


@dataclass(frozen=True, slots=True)
class NodeType:
    """A kind of node that an autoscaler can add. more: how many of it can still come"""

    name: str
    resources: Resources
    more: int


@dataclass(frozen=True, slots=True)
class Growth:
    """What an autoscaler can still add: nodes of these types, ``more`` of them in all."""

    types: tuple[NodeType, ...]
    more: int

    @property
    def unknown(self) -> bool:
        """Whether nodes can be added of which nobody says what they have."""
        return any(t.more > 0 and not t.resources for t in self.types)

    def most(self, resource: str) -> float:
        """The most of a resource that can be added: the nodes that have most of it.

        >>> Growth((NodeType("small", {"CPU": 2}, 5), NodeType("large", {"CPU": 8}, 1)), 3).most("CPU")
        12.0
        """
        each = sorted((t.resources.get(resource, 0.0) for t in self.types for _ in range(t.more)), reverse=True)
        return float(sum(each[: self.more]))

    def describe(self) -> str:
        """For people.

        >>> Growth((NodeType("worker", {"CPU": 4.0, "spot": 1.0}, 2),), 2).describe()
        'an autoscaler can add 2 nodes: worker (4 CPU, 1 spot)'
        >>> Growth((), 0).describe()
        'the autoscaler can add no more nodes'
        """
        kinds = [t for t in self.types if t.more > 0]
        if not kinds or self.more <= 0:
            return "the autoscaler can add no more nodes"
        nodes = "1 node" if self.more == 1 else f"{self.more} nodes"
        shown = (f"{t.name} ({told(t.resources)})" if t.resources else t.name for t in kinds)
        return f"an autoscaler can add {nodes}: {', '.join(shown)}"


def told(resources: Resources) -> str:
    """Resources for people, without those that every node has.

    >>> told({"CPU": 2.5, "memory": 7e9, "GPU": 0.0, "node:10.0.0.1": 1.0})
    '2.5 CPU'
    """
    shown = {name: amount for name, amount in resources.items() if amount and not _own(name)}
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "nothing"


def total(asks: Sequence[Resources]) -> dict[str, float]:
    """The sum of several.

    >>> total([{"CPU": 1.0}, {"CPU": 0.5, "stays": 0.25}])
    {'CPU': 1.5, 'stays': 0.25}
    """
    found: dict[str, float] = {}
    for ask in asks:
        for name, amount in ask.items():
            found[name] = found.get(name, 0.0) + amount
    return found


def covers(have: Resources, asked: Resources) -> bool:
    """Whether there is enough of everything.

    >>> covers({"CPU": 2.0}, {"CPU": 2.0}), covers({"CPU": 2.0}, {"CPU": 1.0, "stays": 0.1})
    (True, False)
    """
    return all(have.get(name, 0.0) + UNIT / 2 >= amount for name, amount in asked.items())


def never(asks: Mapping[str, Sequence[Resources]], nodes: Sequence[Resources], growth: Growth | None) -> list[str]:
    """Why the asks, by who asks, can never be met all at once by these nodes and those that can be added; [] where
    nothing shows that they cannot.

    A sentence for each that fits on no node, and for each resource of which there is too little.

    >>> never({"worker": [{"CPU": 8.0}]}, [{"CPU": 4.0}, {"CPU": 4.0}], None)
    ['a worker asks for 8 CPU: no node has as much (at most 4 CPU)']
    >>> never({"worker": [{"CPU": 1.0}] * 3}, [{"CPU": 1.0}], Growth((NodeType("spot", {"CPU": 1.0}, 1),), 1))
    ['3 CPU are asked for: the cluster has 1 in all, 1 can be added']
    """
    if growth is not None and growth.unknown:
        return []
    kinds = [*nodes, *(t.resources for t in growth.types if t.more > 0 and growth.more > 0)] if growth else nodes
    found = []
    for who, wanted in asks.items():
        for ask in {tuple(sorted(a.items())): a for a in wanted}.values():
            if not any(covers(kind, ask) for kind in kinds):
                largest = {name: max((k.get(name, 0.0) for k in kinds), default=0.0) for name in ask}
                found.append(f"a {who} asks for {told(ask)}: no node has as much (at most {told(largest)})")
    asked = total([ask for wanted in asks.values() for ask in wanted])
    for name, amount in asked.items() if not found else ():
        have, more = sum(n.get(name, 0.0) for n in nodes), growth.most(name) if growth else 0.0
        if have + more + UNIT / 2 < amount:
            added = f", {more:g} can be added" if growth else ""
            found.append(f"{amount:g} {name} are asked for: the cluster has {have:g} in all{added}")
    return found


def resource_problems(name: str, value: object) -> list[str]:
    """Amounts by name, as Ray takes them: parts of one, or whole numbers.

    >>> resource_problems("worker_resources", {"CPU": 2, "spot": 0})
    ["worker_resources must not name 'CPU': set worker_cpus", 'worker_resources.spot must be > 0, got 0']
    """
    if not isinstance(value, Mapping):
        return [f"{name} must be a table of amounts by name, as {{ spot = 1 }}, got {shown(value)}"]
    found = []
    for key, amount in value.items():
        if not isinstance(key, str) or not key.strip():
            found.append(f"{name} must have names, got {shown(key)}")
        elif key == "CPU":
            found.append(f"{name} must not name 'CPU': set {name.replace('resources', 'cpus')}")
        elif key in ("GPU", "memory", "object_store_memory"):
            found.append(f"{name} must not name {key!r}: only resources of your own, which a node was started with")
        elif not (wrong := number_problems(f"{name}.{key}", amount, above=0)) and amount > 1 and amount % 1:
            found.append(f"{name}.{key} must be a whole number, or less than 1, got {shown(amount)}")
        else:
            found += wrong
    return found


def _own(name: str) -> bool:
    return name.startswith(("node:", "memory", "object_store_memory", "accelerator_type"))
