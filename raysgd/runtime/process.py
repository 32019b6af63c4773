"""What a Ray actor's process asks of the operating system."""

from __future__ import annotations

import ctypes
import signal
import sys

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
