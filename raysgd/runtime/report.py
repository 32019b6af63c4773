"""How a worker's loop ended."""

from __future__ import annotations

from dataclasses import dataclass

from raysgd.protocol.client import Done


@dataclass(frozen=True, slots=True)
class LoopReport:
    """How a call of ``run`` ended. Times in seconds; ``rows``: trained by this worker in this call.

    moved: bytes of ids and values pulled and pushed, where the model is sparse
    """

    done: Done
    rows: int
    compute_s: float
    wait_s: float
    moved: int = 0
