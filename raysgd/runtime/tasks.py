"""Calls of a pure function on many items, shared out over a cluster as Ray tasks; the results come in order.

items 0 1 2 3 4 5 6 ...      num_workers tasks at a time, and as many results that wait for their turn
          └─ a task that is lost with its process or its node is run again: the function must bear that
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from raysgd.errors import InputError, RaysgdError, RunError
from raysgd.runtime import autoscaler
from raysgd.runtime.calls import first_line, result
from raysgd.runtime.reserve import free_cpus
from raysgd.runtime.session import SINGLE_THREADED, session

#: how often a task is run again that was lost with its process or its node
RETRIES = 5

#: seconds that a cluster may take to run the first, empty task; our own may take longer to start
PLACEMENT_TIMEOUT_S, START_TIMEOUT_S = 25.0, 180.0


class Tasks:
    """Ray tasks on ``num_workers`` CPUs of a connected cluster: what ``raysgd.prepared.prepare`` takes as ``calls``."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        options = {"num_cpus": 1, "max_retries": RETRIES, "runtime_env": {"env_vars": SINGLE_THREADED}}
        self._task = ray.remote(**options)(_task)

    def refuse_unplaced(self, timeout_s: float) -> None:
        """Raises InputError where the cluster cannot run anything within ``timeout_s`` seconds."""
        probe = self._task.remote(_nothing, None, None)
        if not ray.wait([probe], timeout=timeout_s)[0]:
            ray.cancel(probe, force=True)
            free = free_cpus()
            raise InputError(f"no CPU was free for a task within {timeout_s:g} s; {free}. Wait until other jobs end")
        result(probe, "starting the first task")

    def __call__(self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]) -> Iterator[Any]:
        """``function(shared, item)`` for each item, the results in order.

        ``shared`` is sent to each node once. Raises what a call raised, and RunError where one was lost too often.
        """
        kept = ray.put(shared)
        name = getattr(function, "__name__", "task")
        running: deque[Any] = deque()
        try:
            for item in items:
                running.append(self._task.options(name=f"raysgd.{name}").remote(function, kept, item))
                # Twice as many as there are CPUs: a slow one does not leave the others idle.
                if len(running) >= 2 * self.num_workers:
                    yield _result(running.popleft(), name)
            while running:
                yield _result(running.popleft(), name)
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


def _task(function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
    try:
        return function(shared, item)
    except OSError as error:  # a full disk, a store that does not answer: told as here, without Ray's traceback
        raise RunError(f"{function.__name__} {item}: {error}") from None


def _nothing(_shared: Any, _item: Any) -> None:
    """What the first task does."""


def _result(ref: Any, name: str) -> Any:
    try:
        return result(ref, name)
    except RaysgdError:
        raise
    except ray.exceptions.RayError as error:
        raise RunError(f"{name}: a task was lost {RETRIES + 1} times: {first_line(error)}") from error


def _refuse_too_small(num_workers: int) -> None:
    growth, total = autoscaler.growth(), float(ray.cluster_resources().get("CPU", 0.0))
    if num_workers > total and growth is None:  # an autoscaler sees the tasks that wait
        remedy = "ask for fewer workers, or add nodes"
        raise InputError(f"the command asks for {num_workers} CPUs and the Ray cluster has {total:g} in all: {remedy}")


@contextmanager
def tasks(num_workers: int, address: str | None, say: Callable[[str], None]) -> Iterator[Tasks]:
    """Tasks on the cluster at ``address``, on the one around this process, or on one of our own.

    Raises InputError where an existing cluster has too few CPUs, or none that is free within 25 seconds.
    """
    with session(num_workers, address) as cluster:
        for line in cluster.notes:
            say(line)
        _refuse_too_small(num_workers)
        began = time.monotonic()
        found = Tasks(num_workers)
        found.refuse_unplaced(START_TIMEOUT_S if cluster.started else PLACEMENT_TIMEOUT_S)
        say(f"{num_workers} workers after {time.monotonic() - began:.1f} s")
        yield found
