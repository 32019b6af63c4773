"""S8: the memory of a whole job against that of as many idle actors with the same imports, and the formula.

    allowed = idle + caches + 3 (P + S) + W (slots + ceil(log2(V / W)) + 1) P

P, S: bytes of the parameters and of the optimizer's state; W workers, V virtual ones; slots: gradients in a worker's
shared memory, two steps of one for each node that it pushes. Taken is the largest sum of PSS over the driver, Ray's own
processes and the actors, sampled ten times a second, and the largest use of /dev/shm (of the whole machine).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log2
from pathlib import Path

from bench.measure import Asked, Figures, table
from bench.proc import MB, Memory, Watch
from bench.processes import Child, listen, say
from bench.tables import write_images
from bench.training import Job

N_WORKERS, N_VIRTUAL = 2, 8
CACHE_BYTES = 32_000_000
HIDDEN = (2048, 2048)
WIDTHS = (784, *HIDDEN, 10)
PARAMS = sum((a + 1) * b for a, b in pairwise(WIDTHS))


def allowance(params: int, state: int, n_workers: int, n_virtual: int, cache_bytes: int, n_nodes: int = 1) -> int:
    """Bytes that the formula grants beyond the idle actors; params, state: bytes of each.

    >>> allowance(10, 10, n_workers=2, n_virtual=8, cache_bytes=100)
    360
    """
    copies = 2 * n_nodes + ceil(log2(n_virtual / n_workers)) + 1
    return n_workers * cache_bytes + 3 * (params + state) + n_workers * copies * params


@dataclass(frozen=True)
class Peak:
    """total: bytes of PSS together;  shm: bytes of /dev/shm;  by_role: the largest process of each kind"""

    total: int
    shm: int
    by_role: dict[str, Memory]


def idle() -> None:
    """The driver's imports, Ray, and the actors of a run, placed; until there is nothing more to hear."""
    from raysgd.runtime import trainer  # noqa: F401 - what the driver of a run imports
    from raysgd.runtime.gang import Gang
    from raysgd.runtime.session import session
    from raysgd.spec import ScalingConfig

    scaling = ScalingConfig(num_workers=N_WORKERS)
    with session(scaling.cpus):
        gang = Gang(scaling, 180.0)
        gang.place()
        say("placed")
        listen()
        gang.close()


def idle_peak() -> Peak:
    child = Child("bench.memory", "idle")
    with Watch(child.process.pid) as watch:
        child.hear()
        child.end()
    return Peak(watch.total, watch.shm, watch.by_role)


def job_peak(job: Job) -> Peak:
    child = Child("bench.training")
    with Watch(child.process.pid) as watch:
        child.tell(job)
        child.hear()
        child.end()
    return Peak(watch.total, watch.shm, watch.by_role)


def run(asked: Asked) -> str:
    """The tables of S8."""
    n_rows, epochs = (4_096, 1) if asked.quick else (16_384, 1)
    found: list[tuple[Peak, Peak]] = []
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        path = write_images(Path(directory), n_rows, shard_rows=1_024)
        model = {"type": "mlp", "hidden": list(HIDDEN), "loss": "cross_entropy"}
        job = Job(model, str(path), "digit", 512, N_VIRTUAL, epochs, 1, N_WORKERS, cache_bytes=CACHE_BYTES)
        for _ in range(asked.rounds):
            found.append((idle_peak(), job_peak(job)))
    granted = allowance(4 * PARAMS, 4 * PARAMS, N_WORKERS, N_VIRTUAL, CACHE_BYTES)
    whole = [[(p.total, p.shm) for p in pair] for pair in found]
    bound = Figures(tuple(idle[0] + granted for idle, _ in whole))
    totals = Figures(tuple(taken[0] for _, taken in whole))
    rows = [
        ["idle actors", Figures(tuple(i[0] for i, _ in whole)).times(1 / MB), shm([i[1] for i, _ in whole])],
        ["the job", totals.times(1 / MB), shm([j[1] for _, j in whole])],
        [f"allowed: idle + {granted / MB:.0f}", bound.times(1 / MB), ""],
        ["the job / allowed (bar: <= 1)", totals.ratio(bound), ""],
    ]
    at_rest, at_work = (peak.by_role for peak in found[-1])
    kinds = [
        [kind, *(f"{size / MB:.0f}" for size in (at_rest.get(kind, Memory(0, 0)).pss, m.pss, m.anonymous, m.shared))]
        for kind, m in sorted(at_work.items(), key=lambda item: -item[1].pss)
    ]
    sizes = (
        f"\n\n{PARAMS:,} parameters ({4 * PARAMS / MB:.0f} MB) and momentum, {N_WORKERS} workers, V = {N_VIRTUAL}, "
        f"caches of {CACHE_BYTES / MB:.0f} MB, {n_rows * 785 * 4 / MB:.0f} MB of decoded rows\n\n"
    )
    largest = table(["largest process of each kind, last round", "idle", "job", "anonymous", "shared, MB"], kinds)
    return table(["what", "sum of PSS, MB", "/dev/shm, MB"], rows) + sizes + largest


def shm(values: list[int]) -> Figures:
    return Figures(tuple(value / MB for value in values))


if __name__ == "__main__":
    {"idle": idle}[sys.argv[1]]()
