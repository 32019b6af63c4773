"""What /proc says of a process and all that descend from it: memory, by process and together. Linux only.

RSS counts a shared page in every process that has it, PSS a share in each: the sums of PSS are what a job takes.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

MB = 1e6


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, shared pages whole (rss) and by shares (pss); of the latter, what belongs to no file."""

    rss: int
    pss: int
    anonymous: int = 0
    shared: int = 0


def descendants(pid: int) -> list[int]:
    """The process and all that descend from it, as far as their parents live."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            stat = (directory / "stat").read_text()
        except OSError:
            continue
        children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(directory.name))
    found, ahead = [], [pid]
    while ahead:
        found.append(ahead.pop())
        ahead += children.get(found[-1], [])
    return found


def memory(pid: int) -> Memory | None:
    """What the process takes now; None where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:] if line.endswith("kB")}
    if "Rss" not in sizes:
        return None
    return Memory(*(1024 * sizes.get(name, 0) for name in ("Rss", "Pss", "Pss_Anon", "Pss_Shmem")))


def role(pid: int) -> str | None:
    """What kind of process it is: the name that Ray gives, else that of the program; None where it has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return kind(words)


def kind(words: list[str]) -> str | None:
    """The kind of process that a command line stands for.

    >>> kind(["ray::Worker.run"]), kind(["/usr/bin/python", "-u", "/ray/dashboard.py"]), kind(["python", "-m", "a.b"])
    ('ray::Worker', 'dashboard.py', 'a.b')
    """
    first = words[0].split()[0] if words and words[0].split() else None
    if first is None:
        return None
    if first.startswith("ray::"):
        return first.split(".")[0]
    modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]
    scripts = [Path(word).name for word in words[1:] if word.endswith(".py")]
    return next(iter(modules + scripts), Path(first).name)


def shm_used() -> int:
    """Bytes of /dev/shm in use, whoever uses them."""
    stat = os.statvfs("/dev/shm")
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


@dataclass
class Watch:
    """Samples a process tree from a thread until the block ends.

    total: the largest sum of PSS at one moment;  by_role: the largest PSS of one process of each kind
    shm: the largest use of /dev/shm beyond that at the beginning
    """

    pid: int
    interval_s: float = 0.1
    total: int = 0
    shm: int = 0
    by_role: dict[str, Memory] = field(default_factory=dict)

    def __enter__(self) -> Watch:
        self._shm_before = shm_used()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _sample_on(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._sample()

    def _sample(self) -> None:
        total = 0
        for pid in descendants(self.pid):
            found, name = memory(pid), "the driver" if pid == self.pid else role(pid)
            if found is not None and name is not None:
                total += found.pss
                self.by_role[name] = max(self.by_role.get(name, Memory(0, 0)), found, key=lambda taken: taken.pss)
        self.total = max(self.total, total)
        self.shm = max(self.shm, shm_used() - self._shm_before)


@dataclass
class Series:
    """One quantity over time: ``at`` in seconds, ``bytes``."""

    at: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def add(self, value: int) -> None:
        self.at.append(time.monotonic())
        self.bytes.append(value)

    def slope(self) -> float:
        """Bytes a second by least squares over the last two thirds, when caches are full; 0 for fewer than 3 samples.

        >>> Series([0.0, 1.0, 2.0, 3.0], [9, 2, 4, 6]).slope()
        2.0
        """
        skip = len(self.at) // 3
        at, values = self.at[skip:], self.bytes[skip:]
        if len(at) < 3:
            return 0.0
        middle, mean = sum(at) / len(at), sum(values) / len(at)
        spread = sum((t - middle) ** 2 for t in at)
        return sum((t - middle) * (v - mean) for t, v in zip(at, values, strict=True)) / spread
