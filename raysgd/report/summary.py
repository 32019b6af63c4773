"""The facts that a command found, as text for people. The same facts are printed as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

Facts = Mapping[str, Any]


def table(rows: Mapping[str, Any]) -> str:
    """Names and values in two columns; what is None is left out.

    >>> print(table({"step": 2880, "digest": None, "loss": 0.39421}))
    step  2,880
    loss  0.39421
    """
    shown = {name: value(v) for name, v in rows.items() if v is not None}
    width = max(map(len, shown), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in shown.items())


def value(given: Any) -> str:
    """A value for people: counts with commas, numbers with five digits, tables and lists on one line.

    >>> value({"loss": 0.394213, "rows": 32829, "rows_per_s": 386780.4})
    'loss 0.39421, rows 32,829, rows_per_s 386,780'
    """
    if isinstance(given, Mapping):
        return ", ".join(f"{name} {value(v)}" for name, v in given.items())
    if isinstance(given, list | tuple):
        return ", ".join(map(value, given))
    if isinstance(given, bool) or not isinstance(given, int | float):
        return str(given)
    if isinstance(given, int):
        return f"{given:,}"
    return f"{given:,.0f}" if 1e4 <= abs(given) < 1e15 else f"{given:,.5g}"


def trained(facts: Facts) -> str:
    """What came out of ``train``, and where it is."""
    ended = "stopped as asked" if facts["stopped"] else "done"
    return "\n".join(
        [
            f"{ended}: {facts['step']:,} steps",
            table(
                {"run": facts["path"], "checkpoint": facts["checkpoint"], "digest": facts["digest"]} | metrics(facts)
            ),
        ]
    )


def metrics(facts: Facts) -> dict[str, Any]:
    """The metrics among the facts, empty where there are none."""
    return {"metrics": facts["metrics"]} if facts["metrics"] else {}


def dry_run(facts: Facts) -> str:
    """What ``train --dry-run`` found."""
    numbers = {name.replace("_", " "): given for name, given in facts.items() if name not in ("columns", "note")}
    if facts.get("parameters") is not None and not numbers.pop("parameters exact", True):
        numbers["parameters"] = f"{facts['parameters']:,}, from a few row groups: the others may add categories"
    if facts.get("steps_left") == 0:
        numbers["steps left"] = "0: nothing is left to train"
    elif (seconds := numbers.get("predicted seconds")) is not None:
        beside = "Ray's start (some seconds), validation and checkpoints come on top"
        numbers["predicted seconds"] = f"{value(seconds)} for the steps alone: {beside}"
    numbers |= {"": facts["note"]} if facts.get("note") else {}
    head = "nothing was trained; what can be checked before is well"
    return "\n".join([head, *facts["columns"], table(numbers)])


def prepared(facts: Facts) -> str:
    """What came out of ``prepare``."""
    files = facts["files"]
    size = sum(file["bytes"] for file in files.values())
    head = "prepared" if facts["new"] else "nothing to do: prepared before from these files with these settings"
    columns = [f"{name} {kind}" for name, kind in facts["columns"].items()]
    rows = {
        "data set": facts["out"],
        "rows": facts["rows"],
        "files": f"{len(files):,}, {size:,} bytes, row groups of about {facts['row_group_rows']:,} rows",
        "columns": columns,
    }
    return "\n".join([head, table(rows), *(f"warning: {sentence}" for sentence in facts.get("warnings", ()))])


def scored(facts: Facts) -> str:
    """What came out of ``evaluate``."""
    head = {"checkpoint": facts["checkpoint"], "data": facts["data"]}
    return table(head | dict(facts["metrics"]))


def predicted(facts: Facts) -> str:
    """What came out of ``predict``."""
    lines = [f"{facts['rows']:,} rows predicted into {facts['output']} by {facts['checkpoint']}"]
    if facts["unseen"]:
        lines.append(f"{facts['unseen']:,} category values were not seen in training: they contributed nothing")
    if facts["missing"]:
        lines.append(f"{facts['missing']:,} rows miss a value: their prediction is null")
    return "\n".join(lines)


def drawn(facts: Facts) -> str:
    """What came out of ``plot``."""
    return f"drawn: {facts['picture']}"


def digest(facts: Facts) -> str:
    """What came out of ``digest``: nothing else, so that two of them can be compared."""
    return str(facts["digest"])


def audited(facts: Facts) -> str:
    """What came out of ``audit``."""
    how = "each row once an epoch" if facts["rows"] else "the rows themselves not checked: the data is not there"
    return "\n".join(
        [
            f"{facts['steps']:,} steps: committed once by every server, from every virtual worker; {how}",
            f"{facts['checkpoints']:,} checkpoints: whole",
            f"attempts: {facts['attempts']}; virtual workers dealt: {facts['dealt']} times; servers replaced: "
            f"{facts['replaced']}; gone back to a checkpoint: {facts['rolled_back']} times",
            *([f"stopped for a checkpoint and gone on as before: {facts['midway']} times"] if facts["midway"] else []),
            *(f"note: {note}" for note in facts["notes"]),
        ]
    )


def standing(facts: Facts) -> str:
    """What came out of ``status``."""
    apart = ("silent", "silent_s", "seconds_left")
    rows = {name.replace("_", " "): given for name, given in facts.items() if name not in apart}
    for name, label in (("seconds_left", "left"), ("silent_s", "last news")):
        if facts[name] is not None:
            rows[label] = duration(facts[name]) + (" ago" if name == "silent_s" else "")
    return "\n".join([table(rows), *([no_news(facts["silent_s"])] if facts.get("silent") else [])])


def no_news(seconds: float) -> str:
    """The sentence about a run that says it goes on, and of which nothing was heard for a while.

    >>> no_news(3723.4)
    'no news for 1:02:03: the driver may be dead; its command continues it'
    """
    return f"no news for {duration(seconds)}: the driver may be dead; its command continues it"


def watched(facts: Facts) -> str:
    """One line of ``watch``.

    >>> watched({"state": "running", "step": 40, "total_steps": 80, "train_loss": 0.5, "rows_per_s": 2e6,
    ...     "valid_loss": None, "seconds_left": 62.0, "silent_s": 1.0, "message": None, "silent": False})
    'running · 40/80 steps · loss 0.5 · 2,000,000 rows/s · 0:01:02 left'
    """
    total = "" if facts["total_steps"] is None else f"/{facts['total_steps']:,}"
    words = [facts["state"], f"{facts['step']:,}{total} steps"]
    for name, label in (("train_loss", "loss"), ("valid_loss", "validation loss")):
        if facts[name] is not None:
            words.append(f"{label} {value(facts[name])}")
    if facts["state"] == "running":
        if facts["rows_per_s"] is not None:
            words.append(f"{value(float(facts['rows_per_s']))} rows/s")
        if facts["seconds_left"] is not None:
            words.append(f"{duration(facts['seconds_left'])} left")
        if facts["silent"]:
            words.append(no_news(facts["silent_s"]))
    if facts["message"]:
        words.append(facts["message"])
    return " · ".join(words)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3723.4)
    '1:02:03'
    """
    return str(timedelta(seconds=int(seconds)))


def inspected(facts: Facts) -> str:
    """What came out of ``inspect``."""
    status = facts["status"] or {"state": "never started"}
    keys = ("state", "message", "step", "total_steps", "attempt", "exit_code", "started", "updated", "digest")
    rows = {key.replace("_", " "): status.get(key) for key in keys if status.get(key) != ""}
    rows["step"] = facts["step"]
    rows["checkpoints"] = facts["checkpoints"] or None
    for kind, record in facts["metrics"].items():
        if record is not None:
            rows[f"last {kind} line"] = {k: v for k, v in record.items() if k not in ("kind", "time")}
    lines = [f"run {facts['run']}", table(rows)]
    for section, fields in (facts["config"] or {}).items():
        if isinstance(fields, Mapping):
            lines += ["", f"[{section}]", table(fields)]
    return "\n".join(lines)
