"""S9: what the checks of a step cost: one server in one process, two workers' gradients a step, each check on and off.

finite   no value of the new generation is NaN or infinite
judge    shape and type, node of the tree, fence, duplicate, order, whether the consistency admits it; where a step is
         taken in bulk, whether anything was fenced since that was last looked at, and whether steps are still taken
ledger   the record of the commit: who contributed what

Off means that the check is taken out of the running state machine here; the product has no switch. Every push is right,
so that nothing else changes. Steps with a check and without it alternate in one process, a few of each at a time; what
a check costs is the difference between the quickest of either, as timeit has it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.measure import Asked, Figures, table
from bench.processes import answer, say
from bench.scale import rate

SIZES = (25_000, 1_000_000)
#: how a server takes a step: from memory that it shares with all workers, or push by push from other nodes
WAYS = ("in bulk", "push by push")
CHECKS = ("finite", "judge", "ledger", "all of them")


def steps_of_a_block(n_params: int) -> int:
    """Few where a step is long: then what else the machine does falls on both sides of a comparison alike."""
    return max(2, 500_000 // n_params)


class NoLedger(list):  # type: ignore[type-arg]
    """Takes no record."""

    def append(self, _item: object) -> None:
        return


@contextmanager
def without(check: str, shard: Any) -> Iterator[None]:
    """The shard without one check, or without all."""
    from raysgd.protocol import shard as module
    from raysgd.protocol import update
    from raysgd.protocol.messages import Push, Verdict

    def accept(push: Push) -> Verdict:
        shard._pending.parts[push.node] = push.partial
        shard._pending_incarnations[push.node] = push.incarnations
        return Verdict.ACCEPTED

    def take(nodes: list[Any], incarnations: list[Any], sums: list[Any]) -> bool:
        shard._pending.parts = dict(zip(nodes, sums, strict=True))
        shard._pending_incarnations = dict(zip(nodes, incarnations, strict=True))
        shard._complete()
        return True

    with ExitStack() as stack:
        if check in ("finite", "all of them"):
            stack.enter_context(patch.object(update, "_finite", lambda _values: True))
        if check in ("judge", "all of them"):
            stack.enter_context(patch.object(shard, "_judge", accept))
            stack.enter_context(patch.object(shard, "push_all", take))
        if check in ("ledger", "all of them"):
            stack.enter_context(patch.object(module, "Commit", lambda *_parts: None))
            stack.enter_context(patch.object(shard, "commits", NoLedger()))
        yield


def block(shard: Any, way: str, gradients: list[np.ndarray]) -> float:
    """Seconds a step over a few steps."""
    from raysgd.learn.parameters import Range
    from raysgd.protocol.messages import Push
    from raysgd.protocol.tree import Partial

    steps = range(shard.version, shard.version + steps_of_a_block(len(gradients[0])))
    nodes, incarnations = [Range(v, v + 1) for v in range(len(gradients))], [(1,) for _ in gradients]
    sums = [Partial(gradient, 1.0, 512) for gradient in gradients]
    pushes = [[Push(0, step, *parts, step) for parts in zip(nodes, incarnations, sums, strict=True)] for step in steps]
    stood = shard.fences if shard.stands(nodes, incarnations) else -1
    began = time.perf_counter()
    for of_step in pushes:
        if way == "in bulk":
            assert shard.fences == stood
            shard.push_all(nodes, incarnations, sums)
        else:
            for push in of_step:
                shard.push(push)
    seconds = (time.perf_counter() - began) / len(steps)
    assert shard.version == steps.stop
    return seconds


def fresh(n_params: int) -> Any:
    """A shard that takes the pushes of two virtual workers."""
    from raysgd.learn.parameters import Range
    from raysgd.learn.transforms import SGD
    from raysgd.protocol.generation import Generation
    from raysgd.protocol.shard import ServerShard
    from raysgd.protocol.update import PlannedRows, Rule

    start = Generation(0, np.zeros(n_params, np.float32), {"momentum": np.zeros(n_params, np.float32)})
    rule = Rule(SGD(momentum=0.9), rate, PlannedRows(1024, 1 << 40, 1 << 30))
    shard = ServerShard(0, rule, np.ones(n_params, np.bool_), n_virtual=2, generation=start)
    shard.fence(Range(0, 2), 1)
    return shard


def main(way: str, n_params: int, blocks: int) -> None:
    """Says the seconds of the quickest step with everything, and for each check what is saved without it."""
    shard = fresh(n_params)
    gradients = [np.ones(n_params, np.float32) for _ in range(2)]
    block(shard, way, gradients)
    on: dict[str, list[float]] = {check: [] for check in CHECKS}
    off: dict[str, list[float]] = {check: [] for check in CHECKS}
    for _ in range(blocks):
        for check in CHECKS:
            on[check].append(block(shard, way, gradients))
            with without(check, shard):
                off[check].append(block(shard, way, gradients))
            shard.drain(shard.version)  # as the driver does
    say((min(map(min, on.values())), {check: min(on[check]) - min(off[check]) for check in CHECKS}))


def row(asked: Asked, n_params: int, way: str) -> list[object]:
    blocks = max(3, int((2e6 if asked.quick else 4e7) / (n_params + 1e5) / steps_of_a_block(n_params)))
    found = [answer("bench.safety", way, n_params, blocks) for _ in range(asked.rounds)]
    whole = Figures(tuple(step for step, _ in found))
    costs = [Figures(tuple(saved[check] for _, saved in found)) for check in CHECKS]
    share = Figures(tuple(saved["all of them"] / step for step, saved in found))
    return [f"{n_params:,}", way, whole.times(1e6), *(cost.times(1e6) for cost in costs), share.times(100)]


def run(asked: Asked) -> str:
    """The table of S9."""
    rows = [row(asked, n_params, way) for n_params in SIZES for way in WAYS]
    head = ["parameters", "taken", "step, us", *(f"{check}, us" for check in CHECKS), "all of them, %"]
    bars = "\n\nbars: <= 10 us at 25 k parameters, <= 3 % at 1 M. Heartbeats and a ledger on disk are not built yet"
    return table(head, rows) + bars


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
