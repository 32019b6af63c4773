"""What losing a worker costs, and what one that joins saves: the real trainer, with compute that sleeps.

Two cores show no speed-up beyond two workers, so each of the 12 virtual workers sleeps before its gradient (a failpoint
in the real workers): a step takes as long as the largest share. Everything else is real: a SIGKILL, the notice of it,
fencing, dealing anew, a process that starts and joins. Logistic regression on 28 numbers, one server, a local Ray.
Seconds are those from the first step to the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import Asked, alternate, table
from bench.processes import Child, say
from bench.tables import write_numbers

N_VIRTUAL = 12
#: rows a step, and steps an epoch
BATCH, STEPS_PER_EPOCH = 48, 100
#: seconds that each virtual worker sleeps, and epochs; the same where a bench is quick
SIZE, QUICK = (0.05, 2), (0.01, 1)

#: by name: workers, and what is done at half of the steps
CONTESTANTS: dict[str, tuple[Any, str]] = {
    "2 workers, undisturbed": (2, ""),
    "3 workers, undisturbed": (3, ""),
    "3 workers, one killed at half, none comes for it": (3, "kill"),
    "3 workers, one killed at half, another starts": (3, "replace"),
    "3 workers, a fourth starts at half and joins": ((3, 4), "join"),
    "4 workers, undisturbed": (4, ""),
}


def train(path: str, directory: str, workers: Any, epochs: int, at_half: Callable[[Any], None]) -> tuple[float, str]:
    """Seconds from the first step to the last checkpoint, and the digest. at_half: gets the gang"""
    import raysgd
    from raysgd.report.progress import Silent
    from raysgd.runtime.attempt import Attempt

    taken: list[float] = []
    run, tick, half = Attempt.run, Attempt._tick, [at_half]

    def timed(attempt: Attempt) -> None:
        began = time.perf_counter()
        run(attempt)
        attempt.settle()
        taken.append(time.perf_counter() - began)

    def watching(attempt: Attempt) -> None:
        tick(attempt)
        if half and attempt.curve.step >= epochs * STEPS_PER_EPOCH // 2:
            half.pop()(attempt.gang)

    Attempt.run, Attempt._tick = timed, watching  # type: ignore[method-assign]
    trainer = raysgd.Trainer(
        model=raysgd.LogisticRegression(),
        data=raysgd.ArrowDataset(path, label="label"),
        optimizer=raysgd.SGD(0.01, momentum=0.9),
        batch_size=BATCH,
        epochs=epochs,
        virtual_workers=N_VIRTUAL,
        scaling_config=raysgd.ScalingConfig(num_workers=workers, placement_timeout_s=120.0),
        run_config=raysgd.RunConfig(name="bench", storage_path=directory, checkpoint_every=epochs * STEPS_PER_EPOCH),
        report=Silent(),
    )
    result = trainer.fit()
    assert not half, "it was over before half of its steps were seen"
    return taken[0], result.digest


def main(path: str, name: str, epochs: int) -> None:
    """One run; says its seconds and its digest."""
    import ray

    from raysgd.runtime.gang import Gang

    workers, what = CONTESTANTS[name]
    most = max(workers) if isinstance(workers, tuple) else workers
    ray.init("local", num_cpus=most + 1, include_dashboard=False, log_to_driver=False, logging_level="error")
    # The fourth worker's CPU is somebody else's until half of the steps.
    holder = ray.remote(num_cpus=1)(type("Holder", (), {"here": lambda _: True})).remote() if what == "join" else None
    if holder is not None:
        ray.get(holder.here.remote())

    def at_half(gang: Gang) -> None:
        if what == "kill":
            gang.ask_workers = lambda *_: None  # type: ignore[method-assign]
        if what in ("kill", "replace"):
            os.kill(list(gang.workers.values())[1].process.pid, signal.SIGKILL)
        if what == "join":
            assert len(gang.workers) == 3, "the fourth was there before"
            ray.kill(holder)

    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory, redirect_stdout(sys.stderr):
        found = train(path, directory, workers, epochs, at_half)
    ray.shutdown()
    say(found)


def seconds(path: str, name: str, sleep_s: float, epochs: int, digests: set[str]) -> float:
    environment = {"RAYSGD_FAILPOINTS": f"worker.virtual:sleep={sleep_s}"}
    child = Child("bench.elastic", path, name, epochs, environment=environment)
    taken, digest = child.hear()
    child.end()
    digests.add(digest)
    print(f"{name}: {taken:.1f} s", file=sys.stderr, flush=True)
    return float(taken)


def run(asked: Asked) -> str:
    """The table of runs."""
    sleep_s, epochs = QUICK if asked.quick else SIZE
    digests: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        path = str(write_numbers(Path(directory), BATCH * STEPS_PER_EPOCH, shard_rows=BATCH * STEPS_PER_EPOCH // 4))
        found = alternate(
            {name: partial(seconds, path, name, sleep_s, epochs, digests) for name in CONTESTANTS}, asked.rounds
        )
    two, three = (found[f"{n} workers, undisturbed"] for n in (2, 3))
    rows = [[name, figures, figures.ratio(two), figures.ratio(three)] for name, figures in found.items()]
    same = "all to the same bytes" if len(digests) == 1 else f"NOT to the same bytes: {digests}"
    bars = "bars: one killed and none comes < 1 against 2 workers; a fourth joins < 1 against 3 workers"
    steps = (
        f"{epochs * STEPS_PER_EPOCH} steps, {N_VIRTUAL} virtual workers that sleep {1e3 * sleep_s:g} ms each; {same}"
    )
    return f"{table(['run', 'seconds', 'against 2 workers', 'against 3 workers'], rows)}\n\n{steps}\n\n{bars}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
