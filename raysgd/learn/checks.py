"""Sentences about hyperparameters that cannot be used: what came, what is allowed.

Configuration dataclasses never raise in their constructors; each has ``problems()``, which collects the
sentences of these functions, so that one message lists every violation. Wrong types (strings, booleans as
counts, NaN) are violations like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import isfinite
from numbers import Integral, Real

import numpy as np

#: Counts lie below: what files, messages and numpy hold as a 64-bit integer.
LARGEST_COUNT = 2**63 - 1


def number_problems(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> list[str]:
    """Empty where ``value`` is a finite number within the bounds, else one sentence.

    >>> number_problems("momentum", 1.5, at_least=0, below=1)
    ['momentum must be in [0, 1), got 1.5']
    >>> number_problems("learning_rate", "fast", above=0)
    ["learning_rate must be a number > 0, got 'fast'"]
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    finite = number and _is_finite(value)  # type: ignore[arg-type]
    if finite and _within(float(value), above, at_least, below, at_most):  # type: ignore[arg-type]
        return []
    kind = "" if finite else "a finite number " if number else "a number "
    allowed = f"{kind}{_interval(above, at_least, below, at_most)}".rstrip()
    return [f"{name} must be {allowed}, got {shown(value)}"]


def float32_problems(name: str, value: object, **bounds: float) -> list[str]:
    """As :func:`number_problems`, for numbers that are computed with as float32: there, too, the bounds must hold, and
    nothing may become infinite or vanish.

    >>> float32_problems("learning_rate", 1e39, above=0)
    ['learning_rate must be a number > 0 in float32, too; got 1e+39, which is inf there']
    >>> float32_problems("momentum", 0.999999999, at_least=0, below=1)
    ['momentum must be a number in [0, 1) in float32, too; got 0.999999999, which is 1.0 there']
    """
    if found := number_problems(name, value, **bounds):
        return found
    given = float(value)  # type: ignore[arg-type]
    with np.errstate(over="ignore", under="ignore"):
        kept = float(np.float32(given))
    limits = [bounds.get(side) for side in ("above", "at_least", "below", "at_most")]
    if isfinite(kept) and (kept != 0 or given == 0) and _within(kept, *limits):
        return []
    return [f"{name} must be a number {_interval(*limits)} in float32, too; got {shown(value)}, which is {kept} there"]


def _is_finite(value: Real) -> bool:
    """Whether float64 holds it as a finite number; integers can be larger."""
    try:
        return isfinite(value)
    except OverflowError:
        return False


def shown(value: object) -> str:
    """The value as Python writes it, cut where it is longer than a line; integers can be too long to write."""
    try:
        text = repr(value)
    except ValueError:
        return "an integer of thousands of digits"
    return text if len(text) <= 100 else f"{text[:60]}… ({len(text)} characters)"


def _within(
    value: float, above: float | None, at_least: float | None, below: float | None, at_most: float | None
) -> bool:
    return (
        (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )


def _interval(above: float | None, at_least: float | None, below: float | None, at_most: float | None) -> str:
    low = above if at_least is None else at_least
    high = below if at_most is None else at_most
    if low is None and high is None:
        return ""
    if high is None:
        return f"{'>' if at_least is None else '>='} {low}"
    if low is None:
        return f"{'<' if at_most is None else '<='} {high}"
    return f"in {'(' if at_least is None else '['}{low}, {high}{')' if at_most is None else ']'}"


def count_problems(name: str, value: object, *, at_least: int = 1) -> list[str]:
    """Empty where ``value`` is a whole number >= ``at_least``, below 2^63 and no boolean, else one sentence.

    >>> count_problems("epochs", 0), count_problems("epochs", True), count_problems("epochs", 3)
    (['epochs must be a whole number >= 1, got 0'], ['epochs must be a whole number >= 1, got True'], [])
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < at_least:
        return [f"{name} must be a whole number >= {at_least}, got {shown(value)}"]
    if int(value) > LARGEST_COUNT:
        return [f"{name} must be a whole number below 2^63, got {shown(value)}"]
    return []


def flag_problems(name: str, value: object) -> list[str]:
    """Empty where ``value`` is True or False, else one sentence.

    >>> flag_problems("nesterov", "yes")
    ["nesterov must be true or false, got 'yes'"]
    """
    return [] if isinstance(value, bool) else [f"{name} must be true or false, got {value!r}"]


def choice_problems(name: str, value: object, choices: Iterable[str]) -> list[str]:
    """Empty where ``value`` is one of ``choices``, else one sentence.

    >>> choice_problems("activation", "gelu", ("relu", "tanh"))
    ["activation must be one of 'relu', 'tanh', got 'gelu'"]
    """
    allowed = list(choices)
    if isinstance(value, str) and value in allowed:
        return []
    return [f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"]


def text_problems(name: str, value: object) -> list[str]:
    """[] for text that is not blank, else the sentence that says so."""
    good = isinstance(value, str) and value.strip() and "\0" not in value
    return [] if good else [f"{name} must be text, got {shown(value)}"]


_ADDRESS = re.compile(
    r"(?:[a-z][a-z0-9_.+-]*://)?(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?):([0-9]{1,5})"
)


def address_problems(name: str, value: object) -> list[str]:
    """Empty where ``value`` has the form of a Ray cluster's address, else one sentence.

    >>> address_problems("address", "10.0.0.1:6379"), address_problems("address", "10.0.0.1")
    ([], ["address must be HOST:PORT, ray://HOST:PORT, 'auto' or 'local', got '10.0.0.1'"])
    """
    if isinstance(value, str) and value in ("auto", "local"):
        return []
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match and 0 < int(match[1]) < 1 << 16 and not str(value).startswith(("http://", "https://")):
        return []
    found = [f"{name} must be HOST:PORT, ray://HOST:PORT, 'auto' or 'local', got {shown(value)}"]
    jobs = isinstance(value, str) and value.startswith(("http://", "https://"))
    return [f"{found[0]}; the address of the dashboard is for `ray job submit`"] if jobs else found
