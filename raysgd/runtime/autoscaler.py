"""What Ray's autoscaler could still add, from the file that it was started with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml

from raysgd.capacity import Growth, NodeType

#: seconds that the head may take to answer
ASK_S = 10.0

#: the resource that Ray gives to the head alone
HEAD = "node:__internal_head__"


def growth() -> Growth | None:
    """What an autoscaler could add to the cluster now; None: there is none, or nobody can tell, as on Kubernetes.

    Asks the head, on which the autoscaler runs.
    """
    address = ray.get_runtime_context().gcs_address
    there = ray.remote(num_cpus=0, resources={HEAD: 1e-3}, max_retries=0)(_config)
    asked = there.remote(address)
    try:
        config = ray.get(asked, timeout=ASK_S)
    except ray.exceptions.RayError:  # no head, or one that cannot import this package: nobody can tell
        return None
    types = Counter(kind for kind in map(_type_of, _alive()) if kind is not None)
    return None if config is None else of_config(config, types, len(_alive()))


def of_config(config: Mapping[str, Any], present: Mapping[str, int], n_nodes: int) -> Growth:
    """What a cluster file allows beyond the nodes that are there. present: nodes by type, where that is known

    >>> kinds = {"head": {"max_workers": 0}, "spot": {"resources": {"CPU": 4}, "max_workers": 3}}
    >>> file = {"max_workers": 2, "available_node_types": kinds, "head_node_type": "head"}
    >>> of_config(file, {"spot": 1}, 2).describe()
    'an autoscaler can add 1 node: spot (4 CPU)'
    """
    most = int(config.get("max_workers", 0))
    left = max(0, most - (n_nodes - 1))  # the head does not count
    types = []
    for name, kind in config.get("available_node_types", {}).items():
        if name == config.get("head_node_type") and not kind.get("max_workers"):
            continue
        more = min(left, int(kind.get("max_workers", most)) - present.get(name, 0))
        resources = {key: float(amount) for key, amount in (kind.get("resources") or {}).items()}
        types.append(NodeType(name, resources, max(0, more)))
    return Growth(tuple(types), min(left, sum(t.more for t in types)))


def nodes() -> list[dict[str, float]]:
    """What the living nodes have."""
    return [dict(node["Resources"]) for node in _alive()]


def _alive() -> Sequence[Mapping[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _type_of(node: Mapping[str, Any]) -> str | None:
    name: str | None = node.get("Labels", {}).get("ray.io/node-group") or node.get("node_type_name") or None
    return name


def _config(address: str) -> dict[str, Any] | None:
    """On the head: the file of the autoscaler that watches the cluster at ``address``."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if f"--gcs-address={address}" in words:
                for word in words:
                    name, _, path = word.partition("=")
                    if name == "--autoscaling-config" and path:
                        loaded: dict[str, Any] = yaml.safe_load(Path(path).expanduser().read_text())
                        return loaded
        except (OSError, ValueError, yaml.YAMLError):
            continue
    return None
