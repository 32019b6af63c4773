"""Gathers the facts that ``raysgd/upcheck.py`` judges: one actor on each node, which takes no CPU."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysgd.errors import RunError
from raysgd.runtime import node_facts
from raysgd.runtime.calls import first_line
from raysgd.runtime.session import SINGLE_THREADED, session
from raysgd.storage import Storage
from raysgd.upcheck import ClusterFacts, NodeFacts

#: seconds that all nodes together may take to answer
ANSWER_S = 20.0


def look(storage_path: str, address: str | None) -> ClusterFacts:
    """The facts of the cluster at ``address``, or of the one around this process; a new local one where there is none.

    Raises RunError where it cannot be joined.
    """
    storage, word = Storage.open(storage_path), f".raysgd-check-{secrets.token_hex(4)}"
    with session(1, address) as cluster, _as_before(storage):
        here = _try_here(storage, word)
        answers, silent = _ask(storage.uri, word)
        nodes = tuple(NodeFacts(**told, seen=_clear(storage, f"{word}-{i}")) for i, told in answers.items())
        _clear(storage, word)
        client = bool(ray.util.client.ray.is_connected())
    return ClusterFacts(node_facts.versions(), storage.uri, nodes, silent, here, client, cluster.started)


@contextmanager
def _as_before(storage: Storage) -> Iterator[None]:
    """A directory that was not there before goes again, if nothing is in it."""
    new = storage.is_local and not os.path.isdir(storage.base)
    yield
    if new:
        with suppress(OSError):
            os.rmdir(storage.base)


def _try_here(storage: Storage, word: str) -> str:
    """What is wrong with writing to the storage from this process; the directory is made as a run would make it."""
    try:
        storage.write_atomic(word, b"raysgd up-check\n")
    except OSError as error:
        return str(error)
    return ""


def _clear(storage: Storage, name: str) -> bool:
    """Whether this process sees the file, which goes."""
    try:
        found = storage.exists(name)
        if found:
            storage.filesystem.delete_file(storage.path(name))
    except OSError:
        return False
    return found


def _ask(storage_path: str, word: str) -> tuple[dict[int, dict[str, Any]], dict[str, str]]:
    """What each living node told, by number, and why others did not, by name."""
    cloudpickle.register_pickle_by_value(node_facts)
    try:
        actor = ray.remote(num_cpus=0, max_restarts=0)(node_facts.Look)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        lookers = [actor.options(**_on(node)).remote() for node in nodes]
        calls = [looker.look.remote(storage_path, f"{word}-{i}", word) for i, looker in enumerate(lookers)]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=ANSWER_S)
        found: dict[int, dict[str, Any]] = {}
        silent: dict[str, str] = {}
        for i, (node, looker) in enumerate(zip(nodes, lookers, strict=True)):
            try:
                if calls[i] not in done:
                    raise RunError(f"no answer within {ANSWER_S:g} s")
                known = {"name": _name(node), "store": int(node["Resources"].get("object_store_memory", 0))}
                found[i] = {**known, **ray.get(calls[i]), "skew_s": _skew(looker)}
            except (ray.exceptions.RayError, RunError) as error:
                silent[_name(node)] = first_line(error)
    finally:
        with suppress(ValueError):
            cloudpickle.unregister_pickle_by_value(node_facts)
    for looker in lookers:
        ray.kill(looker)
    return found, silent


def _on(node: Mapping[str, Any]) -> dict[str, Any]:
    near = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return {"scheduling_strategy": near, "runtime_env": {"env_vars": SINGLE_THREADED}}


def _skew(looker: Any) -> float:
    """Seconds by which the node's clock is ahead; less than a call takes counts as none."""
    before = time.time()
    told = float(ray.get(looker.clock.remote(), timeout=5.0))
    after = time.time()
    return max(0.0, told - after) - max(0.0, before - told)


def _name(node: Mapping[str, Any]) -> str:
    head = "node:__internal_head__" in node["Resources"]
    return f"{node['NodeManagerAddress']}" + (" (head)" if head else "")
