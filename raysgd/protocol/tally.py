"""Which steps of which virtual workers are in a shard's arrays where staleness is allowed: what goes with a copy.

    shard ──tally──▶ Tally ─┬─ to the replica on another node, with the arrays
                            ├─ board ─▶ the successor of a shard that died
                            └─ as_dict ─▶ a checkpoint's manifest ─▶ from_dict ─▶ the shard of a later attempt

Under BSP a version says it all. Elsewhere a shard holds parts of many steps, and a shard beside it others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from raysgd.learn.parameters import Range
from raysgd.protocol.gate import Commit
from raysgd.protocol.tree import is_node

#: of a round: a node of the tree, the incarnations that pushed it, its rows
Part: TypeAlias = tuple[Range, tuple[int, ...], int]

#: in place of an incarnation: the part was pushed before the arrays were copied; the next who carries it answers for it
CARRIED = -1


@dataclass(frozen=True, slots=True)
class Tally:
    """clocks: steps committed of each virtual worker;  rounds: what is in the arrays of each step, ascending

    A round of a step below the smallest clock is complete; one that was told to the driver is left out.
    """

    clocks: tuple[int, ...]
    rounds: tuple[Commit, ...] = ()

    @property
    def version(self) -> int:
        """Steps that every virtual worker has committed."""
        return min(self.clocks)

    def since(self, step: int) -> Tally:
        """Without what is known of steps before ``step``, and without who pushed: for a checkpoint of that step."""
        rounds = (r for r in self.rounds if r.step >= step)
        return Tally(self.clocks, tuple(r._replace(parts=carried(r.parts)) for r in rounds))

    def whole(self, step: int) -> bool:
        """Whether the rounds from ``step`` on tell of everything that the clocks count."""
        found = {r.step: sorted(v for node, _, _ in r.parts for v in range(node.begin, node.end)) for r in self.rounds}
        return all(
            found.get(t, []) == [v for v, clock in enumerate(self.clocks) if clock > t]
            for t in range(step, max(self.clocks))
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON. The learning rate is a function of the step, and incarnations are of the attempt that ended."""
        rounds = [
            {
                "step": r.step,
                "loss": r.loss if math.isfinite(r.loss) else None,
                "rows": r.rows,
                "staleness": r.staleness,
                "parts": [[node.begin, node.end, rows] for node, _, rows in r.parts],
            }
            for r in self.rounds
        ]
        return {"clocks": list(self.clocks), "rounds": rounds}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], step: int) -> Tally:
        """Raises ValueError, KeyError or TypeError where it is none of a checkpoint of the version ``step``."""
        clocks = tuple(_count(c) for c in found["clocks"])
        rounds = tuple(_round(entry, len(clocks)) for entry in found["rounds"])
        steps = [r.step for r in rounds]
        tally = cls(clocks, rounds)
        if not clocks or steps != sorted(set(steps)) or (steps and steps[0] < step) or tally.version < step:
            raise ValueError(f"clocks {clocks} and rounds of steps {steps} are not of version {step}")
        if not tally.whole(step):
            raise ValueError(f"the rounds do not tell of what the clocks {clocks} count")
        return tally


def carried(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts of a round without the incarnations that pushed them."""
    return tuple((node, (CARRIED,) * len(node), rows) for node, _, rows in parts)


def _round(entry: Mapping[str, Any], n_virtual: int) -> Commit:
    loss = math.nan if entry["loss"] is None else float(entry["loss"])
    parts = carried([(Range(_count(b), _count(e)), (), _count(rows)) for b, e, rows in entry["parts"]])
    if not all(is_node(node, n_virtual) for node, _, _ in parts):
        raise ValueError(f"parts {entry['parts']} are not nodes of the tree over {n_virtual} virtual workers")
    rows, staleness = _count(entry["rows"]), _count(entry["staleness"])
    return Commit(_count(entry["step"]), loss, rows, math.nan, parts, staleness)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
