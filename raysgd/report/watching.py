"""How a run stands, from what it has written: for whoever sees its storage, on whatever machine.

status.json ─┐
metrics.jsonl ─┴─▶ look ─▶ facts ─▶ a few lines (``raysgd status``), or one line a change (``raysgd watch``)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from raysgd.report import metrics_log, status
from raysgd.storage import Storage

#: seconds without news after which a run that says it goes on is called silent; metrics may be written that rarely
SILENT_S = 60.0

#: seconds without news after which nobody follows such a run any more; an autoscaler gets fifteen minutes for nodes
GIVEN_UP_S = 1200.0

#: lines over which the speed is a mean: an epoch's, unless ``log_every`` says otherwise
SPEED_LINES = 20


def look(storage: Storage, now: Callable[[], float] = time.time) -> dict[str, Any]:
    """The facts; None is what is not known. now: the wall clock, Unix seconds

    step: of the newest line or change of state;  silent_s: seconds since, by this machine's clock
    train_loss: mean over the newest epoch so far, as ``raysgd train`` tells it at its end
    rows_per_s: mean over the newest lines, training alone;  seconds_left: at that speed
    """
    standing, lines = status.read(storage), metrics_log.read(storage)
    train, validation = (_newest(lines, kind) for kind in ("train", "validation"))
    times = (standing and standing.updated, *(line and line.get("time") for line in (train, validation)))
    news = max((seconds for t in times if (seconds := _seconds(t)) is not None), default=None)
    step = max([standing.step if standing else 0, *(int(line["step"]) for line in (train, validation) if line)])
    facts: dict[str, Any] = {
        "state": standing.state if standing else "never started",
        "step": step,
        "total_steps": standing.total_steps if standing else None,
        "epoch": train.get("epoch") if train else None,
        "train_loss": _known(metrics_log.epoch_loss, lines),
        "valid_loss": validation.get("loss") if validation else None,
        "learning_rate": train.get("learning_rate") if train else None,
        "rows_per_s": _known(_speed, lines),
        "seconds_left": None,
        "silent_s": None if news is None else max(0.0, now() - news),
        "checkpoint_step": standing.step if standing and standing.digest else None,
        "attempt": standing.attempt if standing else None,
        "exit_code": standing.exit_code if standing else None,
        "message": (standing.message or None) if standing else None,
    }
    going = facts["state"] == "running" and not silent(facts)
    if going and train and standing and standing.total_steps and facts["rows_per_s"]:
        rows_a_step = train["rows"] / train["step"] if train["step"] else 0.0
        facts["seconds_left"] = (standing.total_steps - step) * rows_a_step / facts["rows_per_s"]
    return facts


def silent(facts: Mapping[str, Any]) -> bool:
    """Whether the run says that it goes on, and nothing of it has been seen for a while."""
    return facts["state"] == "running" and (facts["silent_s"] or 0.0) > SILENT_S


def follow(
    storage: Storage,
    every_s: float,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[dict[str, Any]]:
    """The facts at each change, looked for every ``every_s`` seconds; the last are those of the run's end.

    A run that falls silent is told once, and followed on: another attempt may continue it. After ``GIVEN_UP_S`` seconds
    without news it is followed no more.
    """
    told: tuple[Any, ...] | None = None
    while True:
        facts = look(storage, now)
        change = (facts["state"], facts["step"], facts["attempt"], facts["valid_loss"], silent(facts))
        if change != told:
            told = change
            yield facts
        if facts["exit_code"] is not None or (silent(facts) and facts["silent_s"] > GIVEN_UP_S):
            return
        sleep(every_s)


def _known(
    told: Callable[[Sequence[Mapping[str, Any]]], float | None], lines: Sequence[Mapping[str, Any]]
) -> float | None:
    """What the lines tell; None where they are not as a run writes them."""
    try:
        return told(lines)
    except (KeyError, TypeError):
        return None


def _speed(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Rows a second over the newest lines together: the last one may be of a single step.

    >>> line = {"kind": "train", "rows_per_s": 100.0}
    >>> _speed([{**line, "rows": 300}, {**line, "rows": 310, "rows_per_s": 1.0}])  # 3 s and 10 s
    23.846153846153847
    """
    trained = [line for line in lines if line["kind"] == "train"]
    rows = seconds = 0.0
    for i, line in list(enumerate(trained))[-SPEED_LINES:]:
        own = line["rows"] - (trained[i - 1]["rows"] if i else 0)
        if line["rows_per_s"]:
            rows, seconds = rows + own, seconds + own / line["rows_per_s"]
    return rows / seconds if seconds else None


def _newest(lines: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((line for line in reversed(lines) if line["kind"] == kind), None)


def _seconds(moment: Any) -> float | None:
    """ISO 8601 as Unix seconds; None where it is none."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (TypeError, ValueError):
        return None
