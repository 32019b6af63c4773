"""What is in a shard's arrays where staleness is allowed: through JSON, and what is none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from raysgd.learn.parameters import Range
from raysgd.protocol.gate import Commit
from raysgd.protocol.tally import CARRIED, Tally

#: four virtual workers at 5, 5, 4 and 7; steps from 3 on are told of
TALLY = Tally(
    (5, 5, 4, 7),
    (
        Commit(3, 2.5, 8, 0.1, ((Range(0, 2), (4, 4), 4), (Range(2, 3), (4,), 2), (Range(3, 4), (1,), 2)), 1),
        Commit(4, 1.5, 6, 0.1, ((Range(0, 2), (4, 4), 4), (Range(3, 4), (1,), 2)), 0),
        Commit(5, math.nan, 2, 0.1, ((Range(3, 4), (1,), 2),), 2),
        Commit(6, 0.5, 2, 0.1, ((Range(3, 4), (1,), 2),), 2),
    ),
)


def told(version: int = 3) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(TALLY.since(version).as_dict(), allow_nan=False))
    return found


@pytest.mark.parametrize("version", [3, 4])
def test_it_comes_back_from_json_without_who_pushed(version: int) -> None:
    back = Tally.from_dict(told(version), version)
    assert (back.clocks, back.version) == (TALLY.clocks, 4)
    assert [r.step for r in back.rounds] == list(range(version, 7))
    for found, was in zip(back.rounds, TALLY.rounds[version - 3 :], strict=True):
        assert (found.rows, found.staleness) == (was.rows, was.staleness)
        assert found.loss == was.loss or (math.isnan(found.loss) and math.isnan(was.loss))
        assert [(node, rows) for node, _, rows in found.parts] == [(node, rows) for node, _, rows in was.parts]
        assert {i for _, incarnations, _ in found.parts for i in incarnations} == {CARRIED}


def test_it_is_whole_where_each_counted_step_is_told() -> None:
    assert TALLY.whole(3)
    assert not TALLY.whole(2)
    assert not Tally(TALLY.clocks, TALLY.rounds[:-1]).whole(3)
    assert not Tally((5, 5, 5, 7), TALLY.rounds).whole(3)


def _set(*path: Any) -> Callable[[Any, Any], None]:
    def change(found: Any, value: Any) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "value"),
    [
        (_set("clocks"), []),
        (_set("clocks"), [5, 5, 4]),
        (_set("clocks"), [5, 5, 4, 7.0]),
        (_set("clocks"), [5, 5, 4, True]),
        (_set("clocks"), [5, 5, -4, 7]),
        (_set("clocks"), [5, 5, 2, 7]),
        (_set("clocks"), "5547"),
        (_set("rounds"), []),
        (_set("rounds", 0, "step"), 2),
        (_set("rounds", 1, "step"), 3),
        (_set("rounds", 0, "rows"), -1),
        (_set("rounds", 0, "rows"), "8"),
        (_set("rounds", 0, "loss"), "much"),
        (_set("rounds", 0, "staleness"), None),
        (_set("rounds", 1, "parts"), [[0, 3, 6]]),
        (_set("rounds", 1, "parts"), [[0, 2, 4], [0, 2, 4]]),
        (_set("rounds", 1, "parts"), [[0, 2]]),
        (_set("rounds", 3, "parts"), [[3, 4, 2, 1]]),
        (_set("rounds", 0), None),
    ],
)
def test_what_is_none_is_refused(change: Callable[[Any, Any], None], value: Any) -> None:
    found = told()
    change(found, value)
    with pytest.raises((ValueError, KeyError, TypeError)):
        Tally.from_dict(found, 3)
