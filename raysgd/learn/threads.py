"""One BLAS thread a process: the number of threads changes the order of sums, and so the bytes."""

from __future__ import annotations

import os
import sys

#: The environment of every process that computes.
SINGLE_THREADED = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


def single_threaded() -> None:
    """Have this process compute with one thread; too late, and without effect, where numpy is loaded."""
    if "numpy" not in sys.modules:
        os.environ.update(SINGLE_THREADED)
