"""Ten minutes of steps at full speed: does anything grow?

Logistic regression with 2 workers and a server on a local Ray. Every few seconds the RSS of every process of the run
and the use of /dev/shm are read. A leak is a slope that stays: it is fitted over the last two thirds, when caches are
full.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import Asked, table
from bench.proc import MB, Series, descendants, memory, role, shm_used
from bench.processes import Child, listen, say
from bench.tables import write_numbers
from bench.training import Job

INTERVAL_S = 5.0


def main(directory: str) -> None:
    """Train what the bench tells until it is interrupted."""
    from raysgd.errors import Interrupted

    job: Job = listen()
    try:
        job.fit(directory)
    except Interrupted:
        say("interrupted")
    else:
        say("ended before it was interrupted")


def watch(pid: int, seconds: float) -> dict[str, Series]:
    """RSS by process, all together, and /dev/shm, for so long."""
    found: dict[str, Series] = {"all processes": Series(), "/dev/shm": Series()}
    end = time.monotonic() + seconds
    interval = min(INTERVAL_S, seconds / 6)
    while time.monotonic() < end:
        time.sleep(interval)
        sizes = {p: taken.rss for p in descendants(pid) if (taken := memory(p)) is not None}
        found["all processes"].add(sum(sizes.values()))
        found["/dev/shm"].add(shm_used())
        for p, size in sizes.items():
            found.setdefault(f"{role(p) or 'ended'} ({p})", Series()).add(size)
    return found


def rows_of(found: dict[str, Series]) -> list[list[object]]:
    """A line for each series that lasted, the largest first."""
    longest = max(len(series.bytes) for series in found.values())
    lasting = {name: series for name, series in found.items() if len(series.bytes) > longest / 2}
    return [
        [
            name,
            *(f"{value / MB:.1f}" for value in (s.bytes[0], s.bytes[-1], max(s.bytes))),
            f"{60 * s.slope() / MB:+.2f}",
        ]
        for name, s in sorted(lasting.items(), key=lambda item: -max(item[1].bytes))
    ]


def run(asked: Asked) -> str:
    """The table of the soak."""
    seconds = min(asked.seconds, 30.0) if asked.quick else asked.seconds
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as name:
        directory = Path(name)
        path = write_numbers(directory, 2**18, shard_rows=16_384)
        child = Child("bench.soak", directory)
        child.tell(Job({"type": "logistic_regression"}, str(path), "label", 512, 8, epochs=10**6))
        metrics = directory / "bench" / "metrics.jsonl"
        while not metrics.exists():  # the first epoch has ended
            if child.process.poll() is not None:
                raise RuntimeError(f"the run ended with {child.process.returncode}")
            time.sleep(0.1)
        found = watch(child.process.pid, seconds)
        child.process.send_signal(signal.SIGTERM)
        ending = child.hear()
        child.end()
        steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()][-1]
    said = f"{steps:,} steps in about {seconds:.0f} s; {ending}\n\n"
    return said + table(["process", "first, MB", "last, MB", "largest, MB", "slope, MB/min"], rows_of(found))


if __name__ == "__main__":
    main(sys.argv[1])
