"""Calls of a pure function on many items, by whoever carries them out: this process here, a cluster in ``runtime``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

#: Calls ``function(shared, item)`` for every item, somewhere, and gives the results in order. The function is one of a
#: module's own, and may be called again for an item whose result was lost.
Calls: TypeAlias = Callable[[Callable[[Any, Any], Any], Any, Sequence[Any]], Iterator[Any]]


def here(function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]) -> Iterator[Any]:
    """The calls one after the other in this process.

    >>> list(here(lambda shared, item: shared + item, 10, [1, 2]))
    [11, 12]
    """
    return (function(shared, item) for item in items)
