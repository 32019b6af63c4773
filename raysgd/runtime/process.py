"""What a Ray actor's process asks of the operating system."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass

from raysgd.runtime.guard import stat_field

PR_SET_PDEATHSIG = 1
PR_SET_TIMERSLACK = 29


def die_with_parent() -> None:
    """Be killed when the process that started this one is gone.

    Actors live on for 40 s after their raylet was killed, and would go on pushing. Linux only; elsewhere nothing
    happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def wake_on_time() -> None:
    """Have this thread's short sleeps end within a microsecond of their time, not within 50. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_TIMERSLACK, 1000)


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine, told from a later one of the same pid by when it was started."""

    pid: int
    started: str

    @classmethod
    def this(cls) -> Process:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, stat_field(pid, 19) or "")

    def alive(self) -> bool:
        """Whether it runs: one that has ended and that nobody has asked after does not."""
        return stat_field(self.pid, 19) == self.started and stat_field(self.pid, 0) != "Z"

    def cpu_ticks(self) -> int | None:
        """CPU time that it has used, in ticks of the system's clock; None: it is gone, or this system does not tell."""
        user, system = stat_field(self.pid, 11), stat_field(self.pid, 12)
        if user is None or system is None or stat_field(self.pid, 19) != self.started:
            return None
        return int(user) + int(system)

    def kill(self, timeout_s: float = 5.0) -> bool:
        """SIGKILL, and whether it is certain that the process is gone: a stopped one goes, too."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        except (AttributeError, OSError):  # not Linux: nobody shares memory there
            return False
        try:
            if self.started and stat_field(self.pid, 19) != self.started:
                return True
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            gone = select.poll()
            gone.register(handle, select.POLLIN)
            return bool(gone.poll(1e3 * timeout_s))
        finally:
            os.close(handle)
