"""How requests reach the server shards and replies come back. Nothing above this file knows the way.

Today: one actor call per server shard and exchange, arrays in the call itself (Ray moves the large ones through its
object store). Whatever replaces it keeps :class:`Transport`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray

from raysgd.errors import RunError
from raysgd.learn.batch import Float32
from raysgd.protocol.messages import Reply, Request
from raysgd.runtime.calls import GONE

#: seconds between two looks whether to stop
LOOK_S = 0.1


class ServerLostError(RunError):
    """A server actor cannot be reached any more."""


class Transport(Protocol):
    """Carries requests to the shards they name. ``stopped``: whether a wait is to end without an answer."""

    stopped: Callable[[], bool]

    def outputs(self, step: int) -> list[Float32] | None:
        """Where the sums that are pushed for ``step`` are best computed, one vector a node; None: anywhere."""
        ...

    def exchange(self, requests: Sequence[Request], wait: bool = True) -> list[Reply] | None:
        """Send requests, and return what is answered of these and of earlier ones, in any order.

        wait: until something is, or the transport is stopped; None where nothing came in time: say everything again
        """
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


class ActorCalls:
    """Requests as actor calls: one call for each shard named, all at the same time.

    Calls that are not answered yet go on while the worker computes; their replies come with a later exchange.
    """

    def __init__(self, servers: Sequence[Any], timeout_s: float = 30.0) -> None:
        self.servers = servers
        self.timeout_s = timeout_s
        self.stopped: Callable[[], bool] = lambda: False
        self._calls: list[Any] = []

    def outputs(self, step: int) -> list[Float32] | None:  # noqa: ARG002
        """Anywhere: the call takes a copy."""
        return None

    def exchange(self, requests: Sequence[Request], wait: bool = True) -> list[Reply] | None:
        """One call for each shard that requests name; what came back of any call."""
        by_shard: dict[int, list[Request]] = {}
        for request in requests:
            by_shard.setdefault(request.shard, []).append(request)
        self._calls += [self.servers[shard].exchange.remote(group) for shard, group in by_shard.items()]
        done = self._answered(wait)
        if done and self._calls:
            more, self._calls = ray.wait(self._calls, num_returns=len(self._calls), timeout=0)
            done += more
        if not done:
            return None if wait and not self.stopped() else []
        try:
            return [reply for answer in ray.get(done) for reply in answer]
        except ray.exceptions.ActorUnavailableError:
            return None
        except GONE as error:
            raise ServerLostError(f"a server actor died: {error}") from error

    def _answered(self, wait: bool) -> list[Any]:
        """One call that is answered, where there is one before the time is up."""
        deadline = time.monotonic() + (self.timeout_s if wait else 0.0)
        while True:
            left = deadline - time.monotonic()
            done, self._calls = ray.wait(self._calls, num_returns=1, timeout=max(0.0, min(left, LOOK_S)))
            if done or left <= LOOK_S or self.stopped():
                return list(done)

    def close(self) -> None:
        """Nothing is held."""
