"""How long nobody trains after a loss: the longest time without a new version in the seconds that follow a SIGKILL.

Logistic regression on 28 numbers, 3 workers and 2 servers on a local Ray: the real trainer. Beside it a thread looks at
the first server's board every millisecond and kills workers and servers by turns. Decoding the windows anew is part of
the time, and so is the pause in which the replacement of a worker joins.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from bench.measure import Asked, table
from bench.processes import Child, say
from bench.tables import write_numbers

#: seconds after a kill that are looked at: a replacement and a spare come in this time
LOOK_S = 5.0


class Killer(threading.Thread):
    """Kills, and looks at the version. gaps: by kind, the longest times without a new version, seconds"""

    def __init__(self, kills: int) -> None:
        super().__init__(daemon=True)
        self.kills, self.gang = kills, None
        self.gaps: dict[str, list[float]] = {"worker": [], "server": []}
        self._seen: tuple[Any, Any] = (None, None)

    def run(self) -> None:
        while (self._version() or 0) < 1000:
            time.sleep(0.05)
        time.sleep(LOOK_S)
        choose = random.Random(0)
        for turn in range(2 * self.kills):
            kind = ("worker", "server")[turn % 2]
            assert self.gang is not None
            among = list(self.gang.workers.values()) if kind == "worker" else self.gang.servers
            os.kill(choose.choice(among).process.pid, signal.SIGKILL)
            self.gaps[kind].append(self._longest_gap())
        os.kill(os.getpid(), signal.SIGINT)

    def _longest_gap(self) -> float:
        began = last = time.perf_counter()
        longest, version = 0.0, self._version()
        while last - began < LOOK_S:
            time.sleep(0.001)
            now = time.perf_counter()
            if (newest := self._version()) != version:
                longest, last, version = max(longest, now - last), now, newest
            assert now - last < 120, "it does not go on"
        return longest

    def _version(self) -> int | None:
        """The newest version on the first server's board, whoever is the first server."""
        from raysgd.runtime.board import NEWEST, Board

        boards = [] if self.gang is None else self.gang.boards
        if not boards:
            return None
        if boards[0][1] is not self._seen[0]:
            self._seen = boards[0][1], Board.attach(boards[0][1])
        return int(self._seen[1].words[NEWEST])


def main(path: str, kills: int) -> None:
    """Train until all kills are done; says the gaps."""
    import raysgd
    from raysgd.errors import Interrupted
    from raysgd.report.progress import Silent
    from raysgd.runtime.gang import Gang

    killer = Killer(kills)
    begin = Gang.begin

    def watched(gang: Gang, *arguments: Any) -> None:
        begin(gang, *arguments)
        killer.gang = gang

    Gang.begin = watched  # type: ignore[method-assign]
    killer.start()
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        trainer = raysgd.Trainer(
            model=raysgd.LogisticRegression(),
            data=raysgd.ArrowDataset(path, label="label"),
            optimizer=raysgd.SGD(0.01, momentum=0.9),
            batch_size=512,
            epochs=10**6,
            scaling_config=raysgd.ScalingConfig(num_workers=3, num_servers=2),
            run_config=raysgd.RunConfig(
                name="bench", storage_path=directory, failure_config=raysgd.FailureConfig(max_failures=-1)
            ),
            report=Silent(),
        )
        with redirect_stdout(sys.stderr), suppress(Interrupted):  # Ray tells of every death there
            trainer.fit()
    say(killer.gaps)


def run(asked: Asked) -> str:
    """The table of losses and their gaps."""
    kills = 2 if asked.quick else 20
    with tempfile.TemporaryDirectory(prefix="raysgd-bench-") as directory:
        path = write_numbers(Path(directory), 2**18, shard_rows=16_384)
        child = Child("bench.recovery", path, kills)
        gaps: dict[str, list[float]] = child.hear()
        child.end()
    rows = []
    for kind, bar in (("worker", 1.0), ("server", 2.0)):
        ordered = sorted(gaps[kind])
        figures = [f"{value:.3f}" for value in (ordered[len(ordered) // 2], ordered[-1])]
        rows.append([f"{kind} killed", len(ordered), *figures, bar])
    return table(["what", "kills", "median, s", "longest, s", "bar, s"], rows)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
