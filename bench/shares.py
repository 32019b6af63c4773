"""The third of S10: BSP with shares that move against BSP with shares that stay, one of four workers ten times slower.

The real trainer on a local Ray, to the same bytes; each virtual worker costs a sleep, of the first worker ten times
as long. The time is that between the first line of the loss curve and the last: also that in which nobody knows yet.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stdout
from datetime import datetime
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from bench.measure import Asked, Figures, alternate
from bench.processes import Child, say
from bench.tables import write_numbers

N_WORKERS, ROWS, N_ROWS, LOG_EVERY = 4, 128, 2**14, 10
#: seconds for one virtual worker
PART_S = 0.002


def main(path: str, steps: int, moves: int) -> None:
    """Train; says the seconds, the digest, and what was said of shares."""
    import raysgd
    from raysgd.report.progress import Silent
    from raysgd.runtime import rates
    from raysgd.runtime.gang import Gang

    if not moves:
        rates.WINDOW_S = inf
    options, asked, said = Gang._options, list[float](), list[str]()

    def slowed(gang: Gang, cpus: float, bundle: Any) -> dict[str, Any]:
        made = options(gang, cpus, bundle)
        if cpus == gang.scaling.worker_cpus:
            asked.append(PART_S * (1 if asked else 10))
            order = {"RAYSGD_FAILPOINTS": f"worker.virtual:sleep={asked[-1]}"}
            made["runtime_env"]["env_vars"] = {**made["runtime_env"]["env_vars"], **order}
        return made

    class Said(Silent):
        def say(self, line: str) -> None:
            if "shares move" in line:
                said.append(line)

    Gang._options = slowed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        trainer = raysgd.Trainer(
            model=raysgd.LogisticRegression(),
            data=raysgd.ArrowDataset(path, label="label"),
            optimizer=raysgd.SGD(0.01, momentum=0.9),
            batch_size=ROWS,
            epochs=-(-steps * ROWS // N_ROWS),
            scaling_config=raysgd.ScalingConfig(num_workers=N_WORKERS, server_cpus=0.5),
            run_config=raysgd.RunConfig(
                name="bench",
                storage_path=directory,
                log_every=LOG_EVERY,
                stop_after_steps=steps,
                checkpoint_every=steps,
            ),
            report=Said(),
        )
        with redirect_stdout(sys.stderr):
            result = trainer.fit()
    lines = [line for line in result.history if line["kind"] == "train" and line["step"] % LOG_EVERY == 0]
    first, last = (datetime.fromisoformat(line["time"]) for line in (lines[0], lines[-1]))
    say(((last - first).total_seconds(), result.digest, said))


def moved(asked: Asked) -> tuple[list[list[object]], list[str]]:
    """Rows of the table of S10, and what was said of shares in the last round."""
    steps, digests = (200 if asked.quick else 1000), set[str]()
    told: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        path = write_numbers(Path(directory), N_ROWS, shard_rows=2048)

        def run(moves: int) -> float:
            child = Child("bench.shares", path, steps, moves)
            seconds, digest, told[moves] = child.hear()
            child.end()
            digests.add(digest)
            assert len(digests) == 1, "the bytes are not the same"
            return float(seconds)

        names = {"BSP, shares stay": 0, "BSP, shares move": 1}
        found: dict[str, Figures] = alternate(
            {name: partial(run, moves) for name, moves in names.items()}, asked.rounds
        )
    stay = found["BSP, shares stay"]
    return [["slow, on Ray", name, found[name], found[name].ratio(stay)] for name in names], told[1]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
