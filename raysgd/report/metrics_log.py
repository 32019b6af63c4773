"""``metrics.jsonl``: one JSON object a line, for people and programs, appended while the run goes on.

    {"kind": "train", "step": 577, "epoch": 1, "rows": 295424, "loss": 0.31, "learning_rate": 0.05,
     "rows_per_s": 811000.0, "time": "2026-01-31T12:00:00.000Z"}
    {"kind": "validation", "step": 577, "epoch": 1, "loss": 0.39, "accuracy": 0.85, "auc": 0.88, "time": ...}

step: steps committed so far; epoch: epochs begun or completed at that step, as the trainer counts them
rows: rows used so far; loss: mean over the rows since the line before (train), over the whole set (validation),
always without the penalty; learning_rate: of the last step; time: UTC. What is not finite is null.
interim: true, only in lines that are there because the run was stopped at that step

A resumed run first drops the lines beyond the step it continues from, and the interim ones: so each step occurs once,
and the lines become those of a run that was never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from typing import Any

from raysgd.errors import RunError, SaveError
from raysgd.interrupts import held_off
from raysgd.storage import Storage

NAME = "metrics.jsonl"

#: Seconds between two writes where every append rewrites the whole file (object stores).
_REMOTE_INTERVAL_S = 10.0


def utc(seconds: float) -> str:
    """Unix time as ISO 8601 in UTC, to the millisecond.

    >>> utc(0.0)
    '1970-01-01T00:00:00.000Z'
    """
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class MetricsLog:
    """Appends to a run's ``metrics.jsonl``. Also a context manager.

    storage: the run's directory
    now: the wall clock, Unix seconds
    say: takes a warning where lines cannot be written, as on a full disk: they wait; None: that is an error at once

    At the end of the block they are written, or it is a SaveError.
    """

    def __init__(
        self, storage: Storage, now: Callable[[], float] = time.time, say: Callable[[str], None] | None = None
    ) -> None:
        self._storage = storage
        self._say = say
        self._warned = False
        self._now = now
        #: Lines that are not in the file yet; on a local directory only where they could not be written.
        self._pending: list[str] = []
        self._flushed = now()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self._append()
        except RunError:
            if error is None:  # else that one is told
                raise

    def rewind(self, step: int, validated: bool = True) -> None:
        """Drops interim lines, those beyond ``step``, and a last one that a crash cut short; 0 starts over.

        Unless ``validated``, a line about the validation at ``step`` goes too: it will be written again.
        """
        self._pending.clear()
        if not self._storage.exists(NAME):
            return
        lines = [record for record in read(self._storage) if not record.get("interim")]
        kept = [record for record in lines if record["step"] <= step] if step > 0 else []
        if not validated:
            kept = [record for record in kept if (record["kind"], record["step"]) != ("validation", step)]
        with self._storage.saving(NAME):
            self._storage.write_atomic(NAME, "".join(map(_line, kept)).encode())

    def train(
        self,
        *,
        step: int,
        epoch: int,
        rows: int,
        loss: float,
        learning_rate: float,
        rows_per_s: float,
        interim: bool = False,
    ) -> dict[str, Any]:
        """Adds a line about training and returns it."""
        values = {"rows": rows, "loss": loss, "learning_rate": learning_rate, "rows_per_s": rows_per_s}
        return self._write("train", step, epoch, values, interim)

    def validation(
        self, *, step: int, epoch: int, metrics: Mapping[str, float], interim: bool = False
    ) -> dict[str, Any]:
        """Adds a line about validation, with all of ``metrics``, and returns it."""
        return self._write("validation", step, epoch, metrics, interim)

    def _write(self, kind: str, step: int, epoch: int, values: Mapping[str, float], interim: bool) -> dict[str, Any]:
        mark = {"interim": True} if interim else {}
        record = {"kind": kind, "step": step, "epoch": epoch, **values, **mark, "time": utc(self._now())}
        self._pending.append(_line(record))
        waited = self._now() - self._flushed
        if self._storage.is_local or not 0 <= waited < _REMOTE_INTERVAL_S:  # a clock set back does not hold lines up
            self.flush()
        return record

    def flush(self) -> None:
        """Writes the lines that are not in the file yet."""
        try:
            self._append()
        except SaveError as error:
            if self._say is None:
                raise
            if not self._warned:
                self._say(f"warning: {error}; the lines wait until then")
            self._warned = True

    def _append(self) -> None:
        with held_off():  # a line that is written twice is counted twice
            if self._pending:
                with self._storage.saving(NAME):
                    self._storage.append(NAME, "".join(self._pending))
                self._warned = False
            self._pending.clear()
        self._flushed = self._now()


def read(storage: Storage) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl`` in order; [] where there is none. Torn lines are passed over."""
    if not storage.exists(NAME):
        return []
    return list(_records(storage.read(NAME).decode(errors="replace")))


def _records(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a kill can cut a line short
        if isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("kind"), str):
            yield record


def _line(record: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity: they become null."""
    plain = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def epoch_loss(history: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean training loss over the newest epoch of ``history``; None where there is none, or one is not finite.

    >>> line = {"kind": "train", "epoch": 1}
    >>> epoch_loss([{**line, "rows": 30, "loss": 2.0}, {**line, "rows": 40, "loss": 6.0}])
    3.0
    """
    lines = [line for line in history if line["kind"] == "train"]
    newest = [i for i, line in enumerate(lines) if line["epoch"] == lines[-1]["epoch"]]
    rows = [lines[i]["rows"] - (lines[i - 1]["rows"] if i else 0) for i in newest]
    losses = [lines[i]["loss"] for i in newest]
    if not sum(rows) or None in losses:
        return None
    return float(sum(n * loss for n, loss in zip(rows, losses, strict=True)) / sum(rows))
