"""Memory that processes of one node share, and doorbells between them. Linux only; nothing outlives its processes.

A segment is a memfd: it has no name in any file system, so nothing can be left behind. Its pages are reserved when it
is made, because a write into memory that cannot be had dies of SIGBUS. Another process maps it through its maker's
``/proc/<pid>/fd/<fd>`` and checks the token in its first bytes, in case pid and fd were used again.

A doorbell is a datagram to an abstract Unix socket: non-blocking, and no more than a hint. Whoever waits looks at the
shared state: for a while without pause, then at every ring and whenever the wait runs out. A word in its own segment
says that it sleeps; others ring only then.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raysgd.errors import RunError
from raysgd.learn.batch import Float32

TOKEN_BYTES = 16

#: seconds for which a waiting process stays awake
SPIN_S = 200e-6

#: seconds that waits must have taken of late for a nap to be worth its two switches
NAP_FROM_S = 50e-6

#: bytes before the arrays of a segment: the token, then words
HEADER_BYTES = 4096


def site() -> str | None:
    """What names this node among all nodes: processes that read the same can share memory. None where they cannot.

    Words that one process writes after data are read in that order on x86-64 alone; elsewhere memory is not shared.
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return None
    namespace = os.readlink("/proc/self/ns/pid")
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {namespace} {os.getuid()}"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a segment can be mapped from: while its maker lives."""

    pid: int
    fd: int
    size: int
    token: bytes


class Segment:
    """A mapped segment. ``words``: int64 after the token;  ``floats``, ``longs``, ``doubles``: behind the header.

    Words are memory views: an item of an array takes twice the time to read, a field of a record ten times.
    """

    def __init__(self, memory: mmap.mmap, address: Address) -> None:
        self.address = address
        self._memory = memory
        self.words: memoryview[int] = memoryview(memory)[TOKEN_BYTES:HEADER_BYTES].cast("q")

    @classmethod
    def create(cls, size: int) -> Segment:
        """A zeroed segment of ``size`` bytes behind the header. Raises RunError where there is no memory for it."""
        total = HEADER_BYTES + size
        fd = os.memfd_create("raysgd", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, total)
        except OSError as error:
            os.close(fd)
            raise RunError(f"no memory for a shared segment of {total:,} bytes: {error.strerror}") from error
        memory = mmap.mmap(fd, total)
        token = secrets.token_bytes(TOKEN_BYTES)
        memory[:TOKEN_BYTES] = token
        # The descriptor stays open: it is what others map the segment through.
        return cls(memory, Address(os.getpid(), fd, total, token))

    @classmethod
    def attach(cls, address: Address) -> Segment:
        """Map another process's segment. Raises RunError where it is gone."""
        try:
            fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RunError(f"the memory of process {address.pid} cannot be shared: {error.strerror}") from error
        try:
            if os.fstat(fd).st_size != address.size:
                raise RunError(f"the memory of process {address.pid} is not the segment it was")
            memory = mmap.mmap(fd, address.size)
        finally:
            os.close(fd)
        if memory[:TOKEN_BYTES] != address.token:
            raise RunError(f"the memory of process {address.pid} is not the segment it was")
        return cls(memory, address)

    def floats(self, offset: int, count: int) -> Float32:
        """``count`` float32 at ``offset`` bytes behind the header, a view."""
        return np.frombuffer(self._memory, np.float32, count, HEADER_BYTES + offset)

    def longs(self, count: int) -> memoryview[int]:
        """The first ``count`` int64 behind the header, a view."""
        return memoryview(self._memory)[HEADER_BYTES : HEADER_BYTES + 8 * count].cast("q")

    def doubles(self, count: int) -> memoryview[float]:
        """The same as float64."""
        return memoryview(self._memory)[HEADER_BYTES : HEADER_BYTES + 8 * count].cast("d")

    def close(self) -> None:
        """Give the descriptor back; the mapping itself goes with the last view of it."""
        if self.address.pid == os.getpid():
            with suppress(OSError):
                os.close(self.address.fd)


#: the word of a waiting process's own segment that says whether it sleeps
ASLEEP = 0


class Doorbell:
    """An abstract datagram socket to wait at.

    words: those of the waiting process's own segment
    naps: whether it may leave its core to others until an answer can be expected: for servers, which wait while others
          compute; their timers must be fine (:func:`~raysgd.runtime.process.wake_on_time`)
    """

    def __init__(self, words: memoryview[int], naps: bool = False) -> None:
        self.name = b"\0raysgd-" + secrets.token_hex(12).encode()
        self._words, self._naps = words, naps
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(self.name)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        #: of the last waits, means in which newer ones count more: how many seconds they took, and the share of these,
        #: naps left out, in which this thread was running
        self._usual = self._alone = 0.0

    def wait(self, timeout: float, ready: Callable[[], bool], *, spin_s: float = SPIN_S) -> bool:
        """Wait until ``ready``, at most ``timeout`` seconds or to the first ring; whether it is.

        Looks for ``spin_s`` before it sleeps, giving its core to whoever else wants it: to be woken takes the system
        many times longer than the answer of a neighbour who is awake. Where waits took too long of late to stay awake
        for, it sleeps at once. A server that nobody takes the core from naps first, for half of what waits took: it may
        be holding two workers on one of two cores.
        """
        began, used, napped = time.perf_counter(), time.thread_time() if self._naps else 0.0, 0.0
        if self._usual > 2 * spin_s:
            spin_s = 0.0
        elif self._naps and self._usual > NAP_FROM_S and self._alone > 0.5 and not ready():
            napped = 0.5 * self._usual
            time.sleep(napped)
        is_ready = self._watch(min(spin_s, timeout), ready) or self._sleep(timeout, ready)
        took = time.perf_counter() - began
        if self._naps:
            self._alone += ((time.thread_time() - used) / max(took - napped, 1e-6) - self._alone) / 8
        self._usual += (min(took, 4 * SPIN_S) - self._usual) / 8
        return is_ready

    def _watch(self, spin_s: float, ready: Callable[[], bool]) -> bool:
        """Look until ``ready``, for ``spin_s`` seconds; whether it is."""
        until = time.perf_counter() + spin_s
        while not ready():
            if time.perf_counter() >= until:
                return False
            os.sched_yield()
        return True

    def _sleep(self, timeout: float, ready: Callable[[], bool]) -> bool:
        self._words[ASLEEP] = 1
        try:
            if not ready():  # what came before the word was seen does not ring
                self._poll.poll(1e3 * timeout)
            with suppress(BlockingIOError):
                while True:
                    self._socket.recv(1)
            return ready()
        finally:
            self._words[ASLEEP] = 0

    def close(self) -> None:
        self._socket.close()


class Ringer:
    """Rings doorbells. Never waits: a bell that is gone, or has rings enough, is passed over."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def ring(self, name: bytes, words: memoryview[int]) -> None:
        """Wake whoever waits at ``name``, if the ``words`` of its segment say that it sleeps."""
        if not words[ASLEEP]:
            return
        with suppress(OSError):  # full or gone: the receiver looks by itself before long
            self._socket.sendto(b"!", name)

    def close(self) -> None:
        self._socket.close()
