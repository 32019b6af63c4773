"""What the board of a server tells of its buffers where staleness is allowed: whatever moment it died in, the truth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from raysgd.errors import RunError
from raysgd.learn.parameters import Range
from raysgd.learn.transforms import SGD
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.generation import Generation
from raysgd.protocol.kept import Kept
from raysgd.protocol.messages import Push, Verdict
from raysgd.protocol.stale import StaleShard
from raysgd.protocol.tally import CARRIED
from raysgd.protocol.tree import Partial
from raysgd.protocol.update import PlannedRows, Rule
from raysgd.runtime import pushes as pushes_module
from raysgd.runtime.board import Board
from raysgd.runtime.segment import site

pytestmark = pytest.mark.skipif(site() is None, reason="memory is shared on x86-64 Linux only")

V = 4
SIZE = 5
KEPT = Kept(StaleShard.BUFFERS, ("momentum",), V)
RULE = Rule(SGD(momentum=0.9), lambda step: 0.5 / (1 + step), PlannedRows(8, 800, 100), 0.01)


class DiedError(Exception):
    """The server's process ends here."""


def serve(board: Board, **begin: Any) -> StaleShard:
    """A shard as its server keeps it in the board."""
    assert board.pushes is not None
    made = StaleShard(
        0,
        RULE,
        np.ones(SIZE, np.bool_),
        n_virtual=V,
        consistency=Consistency(math.inf),
        buffers=board.params,
        state=board.state,
        on_write=board.announce,
        on_seal=board.pushes.seal,
        **begin,
    )
    board.pushes.begin(made.sequence, made.tally())
    made.fence(Range(0, V), 1)
    return made


def fresh() -> tuple[Board, StaleShard]:
    board = Board.create(SIZE, KEPT)
    start = Generation(0, np.ones(SIZE, np.float32), {"momentum": np.zeros(SIZE, np.float32)})
    return board, serve(board, generation=start)


def push(shard: StaleShard, choose: random.Random) -> None:
    """Of some virtual worker its next step, or of two that stand alike."""
    begin = choose.randrange(V)
    node = Range(begin, begin + 1)
    clocks = shard.clocks.steps
    if begin % 2 == 0 and clocks[begin] == clocks[begin + 1] and choose.random() < 0.5:
        node = Range(begin, begin + 2)
    step = int(clocks[begin])
    gradient = np.array([choose.gauss(0, 1) for _ in range(SIZE)], np.float32)
    part = Partial(gradient, choose.random(), choose.randrange(1, 4))
    incarnations = tuple(shard.incarnations[node.slice])
    reply = shard.push(Push(0, step, node, incarnations, part, max(0, step - choose.randrange(3))))
    assert reply.verdict is Verdict.ACCEPTED


def state(shard: StaleShard, since: int = 0) -> tuple[Any, ...]:
    """Everything that must survive."""
    tally = shard.tally()
    rounds = [
        (r.step, round(r.loss, 9), r.rows, sorted((p[0], p[2]) for p in r.parts), r.staleness)
        for r in tally.rounds
        if r.step >= since
    ]
    return shard.cut().digest(), tally.clocks, rounds


def dies(shard: StaleShard, where: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on the server dies in the middle of the next push: ``where``."""
    update, seal = shard.update, shard._on_seal

    def half(*given: Any, **more: Any) -> bool:
        update_write(*given, **more)
        for params, kept in given[5]:
            params[len(params) // 2 :] = np.nan
            for array in kept.values():
                array[1:] = np.nan
        raise DiedError

    def before_seal(*_: Any) -> None:
        raise DiedError

    def after_seal(*given: Any) -> None:
        assert seal is not None
        seal(*given)
        raise DiedError

    update_write = update.write
    if where == "write":
        monkeypatch.setattr(update, "write", half)
    else:
        shard._on_seal = before_seal if where == "before the seal" else after_seal
    return monkeypatch.undo


@pytest.mark.parametrize("where", ["between", "write", "before the seal", "after the seal"])
@pytest.mark.parametrize("seed", range(8))
def test_a_successor_finds_what_counts(seed: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three servers die one after the other, and each successor goes on from its predecessor's board."""
    choose = random.Random(seed)
    board, shard = fresh()
    told = 0
    for life in range(3):
        for _ in range(choose.randrange(1, 40)):
            push(shard, choose)
        told = max(told, shard.version - choose.randrange(min(3, shard.version + 1)))
        shard.drain(told)
        want = state(shard, told)
        if where != "between":
            dies(shard, where, monkeypatch)
            with pytest.raises(DiedError):
                push(shard, choose)
            monkeypatch.undo()
        if where == "after the seal":  # then it counts, although nobody was told
            assert shard.clocks.steps.sum() > sum(want[1])
        remains = board.survives(told)
        assert remains.tally is not None
        old, board = board, Board.create(SIZE, KEPT)
        shard = serve(board, **remains.arguments())
        old.segment.close()
        found = state(shard, told)
        if where == "after the seal":
            assert sum(found[1]) > sum(want[1])
            assert shard.cut().finite()
        else:
            assert found == want
        shard.fence(Range(0, V), 2 + life)


def test_who_pushed_survives() -> None:
    """Nodes whose incarnation was one number keep it; others are answered for by who comes next."""
    board, shard = fresh()
    shard.fence(Range(0, 1), 7)
    gradient = np.zeros(SIZE, np.float32)
    for node in (Range(0, 2), Range(2, 4)):
        incarnations = tuple(shard.incarnations[node.slice])
        shard.push(Push(0, 0, node, incarnations, Partial(gradient, 1.0, 2), 0))
    tally = board.survives(0).tally
    assert tally is not None
    [done] = tally.rounds
    assert done.parts == ((Range(0, 2), (CARRIED, CARRIED), 2), (Range(2, 4), (1, 1), 2))
    successor = serve(Board.create(SIZE, KEPT), **board.survives(0).arguments())
    [told] = successor.drain(0)
    assert told.parts[0] == (Range(0, 2), (1, 1), 2)
    board.segment.close()


def test_a_memory_that_tells_too_little_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes_module, "KEPT", 6)
    board, shard = fresh()
    for step in range(3):
        for v in range(V):
            part = Partial(np.zeros(SIZE, np.float32), 1.0, 2)
            shard.push(Push(0, step, Range(v, v + 1), (1,), part, step))
    tally = board.survives(2).tally
    assert tally is not None
    assert (tally.clocks, [(r.step, r.rows) for r in tally.rounds]) == ((3, 3, 3, 3), [(2, 8)])
    with pytest.raises(RunError, match="pushes since step 1"):
        board.survives(1)
    board.segment.close()
