"""Sentences about hyperparameters that cannot be used: what came, what is allowed.

Configuration dataclasses never raise in their constructors; each has ``problems()``, which collects the
sentences of these functions, so that one message lists every violation. Wrong types (strings, booleans as
counts, NaN) are violations like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from numbers import Integral, Real

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
