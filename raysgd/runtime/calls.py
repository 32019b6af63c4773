"""Calls of actors that end: with results, with the actor's own error, or with the name of who is lost."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import ray

from raysgd.errors import RaysgdError, RunError

#: colours that Ray puts into tracebacks
_ANSI = re.compile(r"\x1b\[[0-9;]*m")

#: no answer to a control call after this long is an error: nothing blocks for ever
CALL_TIMEOUT_S = 120.0

#: seconds between two looks at who is alive, while calls are awaited
WATCH_S = 0.25


#: what Ray raises where an actor is gone
GONE = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)

F = TypeVar("F", bound=Callable[..., Any])


def untold(method: F) -> F:
    """A method of an actor whose calls Ray keeps no record of: there are several a second, and its records stay."""
    return cast(F, ray.method(enable_task_events=False)(method))


def control(method: F) -> F:
    """The same, answered also while another method is running, by a thread of its own."""
    return cast(F, ray.method(concurrency_group="control", enable_task_events=False)(method))


class ActorLostError(RunError):
    """An actor is dead, or Ray cannot reach it. actor: its id in hex, None where Ray does not say"""

    def __init__(self, message: str, actor: str | None = None) -> None:
        self.actor = actor
        super().__init__(message, actor)

    def __str__(self) -> str:
        return str(self.args[0])


class ResultLostError(ActorLostError):
    """Who computed a result may be alive, but the result went with the node that kept it, or with the way to it."""


def call(
    refs: Sequence[Any], what: str, timeout: float | None = None, watch: Callable[[], None] | None = None
) -> list[Any]:
    """The results of actor calls, in order; ``watch`` is called every quarter of a second meanwhile.

    Raises the actor's own RaysgdError as it was raised there; ActorLostError where an actor is lost; RunError, which
    names ``what``, where one did not answer within ``timeout`` seconds (default 120).
    """
    limit = CALL_TIMEOUT_S if timeout is None else timeout
    deadline = time.monotonic() + limit
    pending = list(refs)
    while pending:
        left = deadline - time.monotonic()
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, min(left, WATCH_S)))
        for ref in done:
            result(ref, what)  # the first that fails ends the wait for the others
        if pending and left <= 0:
            raise RunError(f"{what}: no answer within {limit:g} s")
        if pending and not done and watch is not None:
            watch()
    return [result(ref, what) for ref in refs]


def result(ref: Any, what: str) -> Any:
    """The result of a call that has ended; raises as :func:`call` does."""
    try:
        return ray.get(ref)
    except GONE as error:
        raise lost(what, error) from error
    except ray.exceptions.ObjectLostError as error:
        raise ResultLostError(f"{what}: Ray lost the result\n{error}") from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaysgdError):
            raise error.cause from None
        if isinstance(error.cause, GONE):  # one that the actor had called
            raise lost(what, error.cause) from error
        raise RunError(f"{what}: {error.cause!r}\n{_ANSI.sub('', str(error))}") from error


def lost(what: str, error: Exception, actor: str | None = None) -> ActorLostError:
    """What is raised where Ray says, by ``error``, that an actor is gone. actor: its id, where the caller knows it

    >>> print(lost("training, worker 1", ray.exceptions.OutOfMemoryError("used 9 of 8 GB")))
    training, worker 1: killed by Ray, because its node ran out of memory
    used 9 of 8 GB
    """
    how, said = "an actor died", _ANSI.sub("", str(error))
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        how = "killed by Ray, because its node ran out of memory"
    elif isinstance(error, ray.exceptions.ActorDiedError) and "creation task" in said:
        how = f"an actor failed: {said.strip().splitlines()[-1]}"
    return ActorLostError(f"{what}: {how}\n{said}", actor or getattr(error, "actor_id", None))


def first_line(error: Exception) -> str:
    """What people are told of an error: Ray's are pages long.

    >>> first_line(RunError("server 0 died\\n  class_name: Server"))
    'server 0 died'
    """
    return " ".join(str(error).split("\n", 1)[0].split())


def gather(refs: Sequence[Any], what: str, watch: Callable[[], None]) -> list[Any]:
    """The results of long actor calls, in order; ``watch`` is called every quarter of a second and at each result.

    Raises as :func:`call` does, at the first call that fails; there is no limit of time.
    """
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=WATCH_S)
        for ref in done:
            result(ref, f"{what}, worker {list(refs).index(ref)}")
        watch()
    return call(refs, what)
