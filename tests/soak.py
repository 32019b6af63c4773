"""A hundred thousand hostile schedules over all cores: ``make soak``, or ``make soak SOAK_ARGS='--count 5000'``.

Prints how often each kind of fault struck. A schedule in which an invariant does not hold is printed with the command
that replays it, and the exit code is 1.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context

from hostile import RAISED, complaints, kind_of, schedule

#: schedules that one task runs, and seconds between two lines of progress
CHUNK, PROGRESS_S = 25, 10.0


@dataclass
class Found:
    """What a number of schedules had in them. broken: (seed, what is wrong)"""

    schedules: int = 0
    deliveries: int = 0
    recomputed: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Found) -> None:
        self.schedules += other.schedules
        self.deliveries += other.deliveries
        self.recomputed += other.recomputed
        self.kinds += other.kinds
        self.faults += other.faults
        self.broken += other.broken


def soak(seeds: range) -> Found:
    """Run one schedule for each seed."""
    found = Found()
    for seed in seeds:
        kind = kind_of(seed)
        try:
            outcome = schedule(seed)
        except RAISED as error:
            found.broken.append((seed, f"{type(error).__name__}: {error}"))
            continue
        found.broken += [(seed, sentence) for sentence in complaints(outcome, kind)]
        found.faults += outcome.faults + Counter(
            duplicated=outcome.duplicated, lost=outcome.lost, reordered=outcome.reordered
        )
        found.kinds[kind] += 1
        found.schedules += 1
        found.deliveries += outcome.delivered
        found.recomputed += outcome.recomputed
    return found


@contextmanager
def results(chunks: Sequence[range], processes: int) -> Iterator[Iterator[Found]]:
    """What each chunk found, as it comes; with one process in this one."""
    if processes == 1:
        yield map(soak, chunks)
        return
    with get_context("spawn").Pool(processes) as pool:
        yield pool.imap_unordered(soak, chunks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="schedules to run")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes at once")
    options = parser.parse_args(arguments)
    end = options.first + options.count
    chunks = [range(begin, min(begin + CHUNK, end)) for begin in range(options.first, end, CHUNK)]
    began = said = time.monotonic()
    total = Found()
    with results(chunks, min(options.processes, len(chunks))) as found:
        for one in found:
            total.add(one)
            for seed, sentence in one.broken:
                print(f"seed {seed} ({kind_of(seed)}): {sentence}", flush=True)
                print(f"    replay: make soak SOAK_ARGS='--first {seed} --count 1'", flush=True)
            now = time.monotonic()
            if now - said >= PROGRESS_S:
                said, rate = now, total.schedules / (now - began)
                left = (options.count - total.schedules) / rate
                print(
                    f"{total.schedules:,} of {options.count:,} schedules, {rate:.0f}/s, {left:.0f} s left", flush=True
                )
    seconds = time.monotonic() - began
    print(f"{total.schedules:,} schedules in {seconds:.1f} s, {total.deliveries:,} deliveries")
    for name, counts in (("trained", total.kinds), ("faults", total.faults)):
        print(f"{name}: {', '.join(f'{kind} {count:,}' for kind, count in sorted(counts.items()))}")
    print(f"versions computed again after roll-backs: {total.recomputed:,}")
    broken = len({seed for seed, _ in total.broken})
    print(f"{broken} schedules are wrong" if broken else "every invariant held in every schedule")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
