"""The only ``ray.init``: join the cluster that is there, or start one for this process alone."""

from __future__ import annotations

import math
import os
import secrets
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._private import utils as ray_utils
from ray._private import worker as ray_worker
from ray.job_config import JobConfig

from raysgd.errors import InputError, RunError
from raysgd.footprint import available_here
from raysgd.interrupts import heard_at_last, sigterm_interrupts, undisturbed
from raysgd.learn.checks import address_problems
from raysgd.learn.threads import SINGLE_THREADED
from raysgd.runtime.guard import descendants, guarded, take_along
from raysgd.runtime.process import Process
from raysgd.runtime.token import refuse_strangers

__all__ = ["SINGLE_THREADED", "Session", "session"]

#: seconds that a cluster's host may take to answer a connection; Ray alone would try for many minutes
CONNECT_S = 8.0


@dataclass(frozen=True, slots=True)
class Session:
    """The cluster in use. ``started`` says whether it is ours to shut down; ``notes`` are lines for the user.

    own: Ray's own processes by name, where we started them and the system tells
    """

    started: bool
    notes: tuple[str, ...] = ()
    own: Mapping[str, Process] = field(default_factory=dict)

    def dead(self) -> list[str]:
        """Of Ray's own processes those that died."""
        return [name for name, process in self.own.items() if not process.alive()]

    def memory(self) -> list[int]:
        """Bytes that each node can give: where the cluster is ours what is free, else what Ray counts on."""
        if self.started:
            return available_here()
        return [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]

    def check(self) -> None:
        """Raises RunError where our own cluster is dead: nobody comes back then.

        Without its ``gcs_server`` actors go on, but nobody new can come, and Ray ends this process within a minute.
        """
        if dead := self.dead():
            died = f"the local Ray cluster died ({', '.join(dead)})"
            raise RunError(f"{died}; the same command starts another one and continues")


def cores() -> int:
    """The cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def will_start(address: str | None) -> bool:
    """Whether :func:`session` will start a cluster of its own. Raises InputError where the address is none."""
    return not ray.is_initialized() and _address(address) == "local"


def _address(given: str | None) -> str:
    address = given or os.environ.get("RAY_ADDRESS") or "local"
    if problems := address_problems("the address (--address or RAY_ADDRESS)", address):
        raise InputError(problems)
    return address


@contextmanager
def session(
    cpus: float,
    address: str | None = None,
    resources: Mapping[str, float] | None = None,
    room: str = "",
    about: Mapping[str, str] | None = None,
) -> Iterator[Session]:
    """A connected Ray for the duration of the block; from its start on SIGTERM ends the block by Interrupted.

    An initialised Ray is used as it is; else ``address``, else ``RAY_ADDRESS``; else a local cluster is started
    with as many logical CPUs as are asked for, and shut down at the end. Whether an existing one has room is not
    looked at here.

    resources: others than CPUs that a cluster of our own is to have, by name
    room: what else to say of a cluster of our own
    about: what an existing cluster's dashboard and `ray list jobs` tell of this process, as the job's metadata
    """
    with sigterm_interrupts():
        if ray.is_initialized():
            yield Session(started=False)
            return
        address = _address(address)
        if address != "local":
            _connect(address, about or {})
            try:
                yield Session(started=False, notes=(f"joined the Ray cluster at {address}",))
            finally:
                ray.shutdown()
            return
        with guarded() as settled:
            before = _below()
            notes = _start(cpus, resources or {}, room)
            settled()
            rest = [Process.of(pid) for pid in _below() - before]
            cluster = Session(started=True, notes=notes, own=_own(rest))
            try:
                yield cluster
            finally:
                with undisturbed():
                    died = cluster.dead()
                    ray.shutdown()
                    if died:  # Ray's agents hang in reports to who is dead
                        take_along([(process.pid, process.started) for process in rest])


@contextmanager
def _sigterm_stays_ours() -> Iterator[None]:
    """Ray takes SIGTERM for itself as it starts, twice, and ends the process by exit codes of its own: not here."""
    taken = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda _handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = taken


def _below() -> set[int]:
    """The processes that descend from this one; none where the system does not tell."""
    return descendants(os.getpid()) if sys.platform == "linux" else set()


def _own(processes: Iterable[Process]) -> dict[str, Process]:
    """Of these the ones without which no cluster is, by name."""
    found = {}
    for process in processes:
        try:
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if (name := command[0].rpartition(b"/")[2].decode(errors="replace")) in ("raylet", "gcs_server"):
            found[name] = process
    return found


def _connect(address: str, about: Mapping[str, str]) -> None:
    _one_error_only()
    refuse_absent(address)
    refuse_strangers(address)
    _deaths_to_stderr()
    try:
        with _sigterm_stays_ours(), heard_at_last():
            job = JobConfig(metadata=dict(about))
            ray.init(address=address, job_config=job, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise RunError(f"no Ray cluster could be joined at {address!r}: {error}") from error


def refuse_absent(address: str) -> None:
    """Raises RunError where nobody takes a connection at the address's host and port. Nothing is known where "auto"
    finds no cluster: that is found out by joining.
    """
    where = address.rpartition("://")[2] if "://" in address else services.canonicalize_bootstrap_address(address)
    if where is None:
        return
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        why = f"no answer within {CONNECT_S:g} s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        found = "" if where == address or "://" in address else f" (that is {where})"
        raise RunError(
            f"no Ray cluster at {address}{found}: a connection there was tried: {why}. Is Ray running (`ray status` on "
            "its head), are host and port right (--address or RAY_ADDRESS), does the network let this machine through? "
            "Without an address a local Ray is started"
        ) from error


def _start(cpus: float, resources: Mapping[str, float], room: str) -> tuple[str, ...]:
    asked = max(1, math.ceil(cpus))
    notes = [f"started a local Ray cluster with {asked} logical CPUs{room}"]
    if asked > cores():
        notes.append(
            f"warning: the run asks for {asked} CPUs and this machine has {cores()} cores: "
            "the answer is the same, but the workers share the cores"
        )
    _private_token()
    _one_error_only()
    _deaths_to_stderr()
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    with _sigterm_stays_ours(), heard_at_last():
        ray.init("local", num_cpus=asked, resources=dict(resources), **options)
    return tuple(notes)


def _one_error_only() -> None:
    """The first worker's error ends the run and is told; Ray would print the others' as unhandled at the end."""
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")


def _deaths_to_stderr() -> None:
    """Ray prints whose processes died on standard output, whatever ``log_to_driver`` says: results go there."""
    shown = ray_worker.print_to_stdstream
    if getattr(shown, "to_stderr", False):
        return

    def elsewhere(data: dict[str, Any], ignore_prefix: bool) -> None:
        shown({**data, "is_err": True}, ignore_prefix)

    elsewhere.to_stderr = True  # type: ignore[attr-defined]
    ray_worker.print_to_stdstream = elsewhere


def _private_token() -> None:
    """Give our own local cluster a token that lives in this process's environment alone.

    Ray switches token authentication on for a local cluster unless ``RAY_AUTH_MODE`` says otherwise. Left to itself
    it also writes the token to ``~/.ray/auth_token``, where later clusters of the machine silently pick it up.
    The token stays for the life of the process: Ray's core keeps it after a shutdown.
    """
    given = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if not any(name in os.environ for name in given) and not Path.home().joinpath(".ray", "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
