"""The only ``ray.init``: join the cluster that is there, or start one for this process alone."""

from __future__ import annotations

import math
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from raysgd.errors import InputError, RunError
from raysgd.learn.threads import SINGLE_THREADED
from raysgd.runtime.guard import descendants, guarded
from raysgd.runtime.process import Process

__all__ = ["SINGLE_THREADED", "Session", "session"]


@dataclass(frozen=True, slots=True)
class Session:
    """The cluster in use. ``started`` says whether it is ours to shut down; ``notes`` are lines for the user.

    raylet: Ray's own process on this node, where we started it and the system tells
    """

    started: bool
    notes: tuple[str, ...] = ()
    raylet: Process | None = None

    def check(self) -> None:
        """Raises RunError where our own cluster is dead: nobody comes back then."""
        if self.raylet is not None and not self.raylet.alive():
            raise RunError("the local Ray cluster died; the same command starts another one and continues")


@contextmanager
def session(cpus: float, address: str | None = None) -> Iterator[Session]:
    """A connected Ray for the duration of the block.

    An initialised Ray is used as it is; else ``address``, else ``RAY_ADDRESS``; else a local cluster is started
    with as many logical CPUs as are asked for, and shut down at the end. Raises InputError where an existing
    cluster is too small, with what was asked and what there is.
    """
    if ray.is_initialized():
        _refuse_too_small(cpus)
        yield Session(started=False)
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is not None and address != "local":
        _connect(address)
        try:
            _refuse_too_small(cpus)
            yield Session(started=False, notes=(f"joined the Ray cluster at {address}",))
        finally:
            ray.shutdown()
        return
    notes = _start(cpus)
    with guarded():
        try:
            yield Session(started=True, notes=notes, raylet=_raylet())
        finally:
            with _undisturbed():
                ray.shutdown()


def _raylet() -> Process | None:
    """The raylet below this process."""
    for pid in descendants(os.getpid()) if sys.platform == "linux" else ():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if command[0].endswith(b"/raylet"):
            return Process.of(pid)
    return None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C once more does not keep our cluster from being shut down; only the main thread can see to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _connect(address: str) -> None:
    _one_error_only()
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(f"no Ray cluster could be joined at {address!r}: {error}") from error


def _start(cpus: float) -> tuple[str, ...]:
    asked = max(1, math.ceil(cpus))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    notes = [f"started a local Ray cluster with {asked} logical CPUs"]
    if asked > cores:
        notes.append(
            f"warning: the run asks for {asked} CPUs and this machine has {cores} cores: "
            "the answer is the same, but the workers share the cores"
        )
    _private_token()
    _one_error_only()
    ray.init("local", num_cpus=asked, include_dashboard=False, log_to_driver=False, logging_level="error")
    return tuple(notes)


def _refuse_too_small(cpus: float) -> None:
    total = float(ray.cluster_resources().get("CPU", 0.0))
    if cpus > total:
        raise InputError(
            f"the run asks for {cpus:g} CPUs and the Ray cluster has {total:g} in all: "
            "lower scaling.num_workers, scaling.worker_cpus or scaling.server_cpus, or add nodes"
        )


def _one_error_only() -> None:
    """The first worker's error ends the run and is told; Ray would print the others' as unhandled at the end."""
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")


def _private_token() -> None:
    """Give our own local cluster a token that lives in this process's environment alone.

    Ray switches token authentication on for a local cluster unless ``RAY_AUTH_MODE`` says otherwise. Left to itself
    it also writes the token to ``~/.ray/auth_token``, where later clusters of the machine silently pick it up.
    The token stays for the life of the process: Ray's core keeps it after a shutdown.
    """
    given = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(name in os.environ for name in given) and not Path.home().joinpath(".ray", "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
