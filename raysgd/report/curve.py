"""The loss curve as it grows: commits in, lines of ``metrics.jsonl`` out, one every ``log_every`` steps.

Lines end at multiples of ``log_every`` wherever a run began, and a line that was begun goes on from the checkpoint: so
a continued run writes the lines of an undisturbed one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan
from typing import Any, Protocol

from raysgd.report.metrics_log import MetricsLog

#: Steps at most over which the progress line's loss and speed are means.
RECENT = 100


class Commit(Protocol):
    """What is known of one push of all workers: of one step, or of several.

    step: the first;  steps: how many;  loss: sum over their rows;  rows: how many;  rate: the learning rate
    """

    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def rows(self) -> int: ...
    @property
    def rate(self) -> float: ...


class Curve:
    """Groups committed steps into lines.

    log: where the lines go
    step: the step that the run begins at
    begun: the line that was begun before ``step``, as :attr:`open_line` gave it
    log_every: steps a line
    steps_per_epoch, rows_per_epoch, mean_weight: to count epochs and rows, and to turn sums of losses into means
    clock: seconds that never run backwards
    """

    def __init__(
        self,
        log: MetricsLog,
        *,
        step: int,
        begun: Mapping[str, Any] | None = None,
        log_every: int,
        steps_per_epoch: int,
        rows_per_epoch: int,
        batch_size: int,
        mean_weight: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._log_every = log_every
        self._steps_per_epoch = steps_per_epoch
        self._rows_per_epoch = rows_per_epoch
        self._batch_size = batch_size
        self._mean_weight = mean_weight
        self._clock = clock
        #: the first step that is not in the curve yet
        self.step = step
        #: (sum of losses, rows, seconds, rate) of the newest commits
        self._newest: deque[tuple[float, int, float, float]] = deque(maxlen=min(log_every, RECENT))
        self._seen = clock()
        #: of the line that is being filled
        self._loss, self._rows, self._rate, self._seconds = 0.0, 0, 0.0, 0.0
        if begun is not None:
            self._loss = nan if begun["loss"] is None else float(begun["loss"])
            self._rows, self._rate = int(begun["rows"]), float(begun["rate"])

    @property
    def open_line(self) -> dict[str, Any]:
        """The line that is not full yet, for a checkpoint: sum of losses (null: not finite), rows, last rate."""
        return {"loss": self._loss if isfinite(self._loss) else None, "rows": self._rows, "rate": self._rate}

    @property
    def recent(self) -> dict[str, float] | None:
        """Loss, rate and speed as :meth:`Report.train` takes them: means over as many steps as a line, or a hundred."""
        if not self._newest:
            return None
        losses, rows, seconds, rates = zip(*self._newest, strict=True)
        return {
            "loss": sum(losses) / (sum(rows) * self._mean_weight),
            "learning_rate": rates[-1],
            "rows_per_s": sum(rows) / max(sum(seconds), 1e-9),
        }

    def extend(self, commits: Sequence[Commit]) -> None:
        """Take new commits, in order; those already taken are passed over."""
        new = [c for c in commits if c.step >= self.step]
        if not new:
            return
        now = self._clock()
        # Commits come in bunches: each took its share of the time since the last bunch.
        seconds = (now - self._seen) / len(new)
        self._seen = now
        for commit in new:
            self._add(commit, seconds)

    def resume(self) -> None:
        """Training goes on after a break, which counts for no step."""
        self._seen = self._clock()

    def validation(self, step: int, metrics: Mapping[str, float], interim: bool = False) -> None:
        """A line about validation at ``step``; ``interim``: only because the run stops here."""
        self._log.validation(step=step, epoch=self._epoch(step), metrics=metrics, interim=interim)

    def flush(self, interim: bool = False) -> None:
        """Write the line that is not full yet: at the end of an attempt; ``interim``: not the end of the run."""
        if self._rows:
            self._write(interim)
        self._log.flush()

    def _add(self, commit: Commit, seconds: float) -> None:
        assert commit.step == self.step, f"commit {commit.step} after {self.step - 1}"
        self.step = commit.step + commit.steps
        self._loss += commit.loss
        self._rows += commit.rows
        self._rate = commit.rate
        self._seconds += seconds
        self._newest.append((commit.loss, commit.rows, seconds, commit.rate))
        if self.step // self._log_every > commit.step // self._log_every:
            self._write()

    def _write(self, interim: bool = False) -> None:
        self._log.train(
            step=self.step,
            epoch=self._epoch(self.step),
            rows=self._rows_used(self.step),
            loss=self._loss / (self._rows * self._mean_weight),
            learning_rate=self._rate,
            rows_per_s=self._rows / self._seconds if self._seconds else nan,  # nan: nobody knows how long it took
            interim=interim,
        )
        self._loss, self._rows, self._seconds = 0.0, 0, 0.0

    def _epoch(self, step: int) -> int:
        """Epochs begun at ``step`` committed steps: 0 before the first step, 1 to the end of the first epoch."""
        return -(-step // self._steps_per_epoch)

    def _rows_used(self, step: int) -> int:
        epochs, steps = divmod(step, self._steps_per_epoch)
        return epochs * self._rows_per_epoch + steps * self._batch_size
