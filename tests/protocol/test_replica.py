"""A server shard and the one that follows it: the same bytes, told when both have them."""

from __future__ import annotations

import random
from math import inf
from typing import Any

import numpy as np
import pytest

from raysgd.learn.parameters import Range
from raysgd.learn.transforms import SGD
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.gate import BACKLOG
from raysgd.protocol.generation import Generation
from raysgd.protocol.messages import Halted, NotYet, Pull, Pulled, Push, Verdict
from raysgd.protocol.replica import Copied
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.stale import StaleShard
from raysgd.protocol.tree import EMPTY, Partial
from raysgd.protocol.update import PlannedRows, Rule

V = 4
RULE = Rule(SGD(momentum=0.9), lambda _step: 0.5, PlannedRows(8, 800, 100), 0.01)


def shard(generation: Generation | None = None) -> ServerShard:
    start = generation or Generation(0, np.ones(3, np.float32), {"momentum": np.zeros(3, np.float32)})
    return ServerShard(0, RULE, np.array([True, True, False]), n_virtual=V, generation=start)


def pair() -> tuple[ServerShard, ServerShard]:
    primary = shard()
    primary.fence(Range(0, V), 1)
    copy = primary.copy()
    primary.copied = Copied(copy.newest.step)
    return primary, shard(copy.newest)


def push(primary: ServerShard, step: int, halves: int = 2) -> None:
    random = np.random.default_rng(step)
    for begin in range(0, V, V // halves):
        node = Range(begin, begin + V // halves)
        part = Partial(random.standard_normal(3).astype(np.float32), 2.0, 4)
        assert primary.push(Push(0, step, node, (1,) * len(node), part, step)).verdict is Verdict.ACCEPTED


@pytest.mark.parametrize("halves", [1, 2, 4])
def test_a_replica_comes_to_the_same_bytes(halves: int) -> None:
    primary, replica = pair()
    for step in range(5):
        push(primary, step, halves)
        assert primary.copied is not None
        [sealed] = primary.copied.outbox
        primary.copied.outbox.clear()
        assert primary.copied.confirm(replica.follow(sealed))
    assert replica.snapshot(5).digest() == primary.snapshot(5).digest()
    assert replica.snapshot(4).digest() == primary.snapshot(4).digest()
    assert replica.commits == primary.commits
    assert replica.told_clocks.tolist() == [5] * V


def test_a_step_is_told_when_the_replica_has_it() -> None:
    primary, replica = pair()
    push(primary, 0)
    assert (primary.version, primary.told) == (1, 0)
    assert isinstance(primary.pull(Pull(0, 1)), NotYet)
    assert isinstance(primary.pull(Pull(0, 0)), Pulled)
    assert (primary.drain(0), primary.told_clocks.tolist()) == ([], [0] * V)
    assert primary.copied is not None
    assert primary.copied.confirm(replica.follow(primary.copied.outbox[0]))
    assert isinstance(primary.pull(Pull(0, 1)), Pulled)
    assert [c.step for c in primary.drain(0)] == [0]
    assert not primary.copied.confirm(1)


def test_what_comes_again_or_too_early_is_passed_over() -> None:
    primary, replica = pair()
    push(primary, 0)
    assert primary.copied is not None
    [first] = primary.copied.outbox
    assert [replica.follow(first), replica.follow(first)] == [1, 1]
    primary.copied.confirm(1)
    push(primary, 1)
    other = shard()
    assert other.follow(primary.copied.outbox[-1]) == 0
    assert len(replica.commits) == 1


def test_what_is_not_confirmed_is_said_again_once() -> None:
    primary, _ = pair()
    push(primary, 0)
    assert primary.copied is not None
    primary.copied.say_again()
    assert len(primary.copied.outbox) == 1
    primary.copied.outbox.clear()
    primary.copied.say_again()
    assert [sealed.number for sealed in primary.copied.outbox] == [0]
    primary.copied.confirm(1)
    primary.copied.outbox.clear()
    primary.copied.say_again()
    assert primary.copied.outbox == []


def test_a_step_without_rows_is_followed() -> None:
    primary, replica = pair()
    primary.push(Push(0, 0, Range(0, V), (1,) * V, EMPTY, 0))
    assert primary.copied is not None
    assert primary.copied.outbox[0].gradient is None
    assert replica.follow(primary.copied.outbox[0]) == 1
    assert replica.snapshot(1).digest() == primary.snapshot(1).digest()


def test_alone_a_shard_tells_at_once() -> None:
    primary, _ = pair()
    push(primary, 0)
    copy = primary.copy()
    assert (primary.told, copy.newest.step, [c.step for c in copy.commits]) == (1, 1, [0])
    assert copy.previous is not None
    assert copy.previous.step == 0


def test_a_frozen_shard_says_what_may_be_told() -> None:
    primary, _ = pair()
    push(primary, 0)
    assert primary.freeze() == 0


# -- where staleness is allowed


def stale(**begin: Any) -> StaleShard:
    start = Generation(0, np.ones(3, np.float32), {"momentum": np.zeros(3, np.float32)})
    penalized = np.array([True, True, False])
    return StaleShard(0, RULE, penalized, n_virtual=V, consistency=Consistency(inf), **{"generation": start, **begin})


def stale_pair(before: int) -> tuple[StaleShard, StaleShard]:
    """A primary that took so many pushes, and a replica that begins with its copy."""
    primary = stale()
    primary.fence(Range(0, V), 1)
    for i in range(before):
        one_push(primary, i)
    replica = stale(**primary.copy().arguments())
    primary.copied_to(replica.sequence)
    return primary, replica


def one_push(primary: StaleShard, seed: int) -> None:
    choose = np.random.default_rng(seed)
    v = int(choose.integers(V))
    step = int(primary.clocks.steps[v])
    part = Partial(choose.standard_normal(3).astype(np.float32), 2.0, 4)
    assert primary.push(Push(0, step, Range(v, v + 1), (1,), part, step)).verdict is Verdict.ACCEPTED


@pytest.mark.parametrize("before", [0, 7])
def test_a_stale_replica_comes_to_the_same_bytes(before: int) -> None:
    """However many pushes are on their way, and in whatever order they come."""
    primary, replica = stale_pair(before)
    choose = random.Random(before)
    for i in range(60):
        one_push(primary, 100 + i)
        copied = primary.copied
        assert copied is not None
        if choose.random() < 0.3:
            told = primary.told
            copied.say_again()
            choose.shuffle(copied.outbox)
            for message in copied.outbox * 2:
                copied.confirm(replica.follow(message))
            copied.outbox.clear()
            assert primary.told >= told
        assert primary.told == int(primary.told_clocks.min()) <= primary.version
        assert (primary.told_clocks >= replica.clocks.steps - 1).all()
    assert copied is not None
    while copied.unconfirmed:
        for message in [*copied.unconfirmed.values()]:
            copied.confirm(replica.follow(message))
    assert replica.cut().digest() == primary.cut().digest()
    assert replica.tally() == primary.tally()
    assert primary.told == primary.version


def test_a_push_counts_for_others_when_the_replica_has_it() -> None:
    primary, replica = stale_pair(0)
    for v in range(V):
        part = Partial(np.ones(3, np.float32), 1.0, 2)
        primary.push(Push(0, 0, Range(v, v + 1), (1,), part, 0))
    assert (primary.version, primary.told, primary.drain(0), primary.freeze()) == (1, 0, [], 0)
    assert isinstance(primary.pull(Pull(0, 1)), Halted)
    assert primary.held_clocks.tolist() == [1] * V
    assert primary.copied is not None
    for message in primary.copied.outbox:
        primary.copied.confirm(replica.follow(message))
    assert (primary.told, [c.step for c in primary.drain(0)]) == (1, [0])
    assert isinstance(primary.pull(Pull(0, 1)), Pulled)


def test_the_gradient_that_is_sent_is_a_copy() -> None:
    """The memory that a push came in is the worker's, and written over when its push was judged."""
    primary, replica = stale_pair(0)
    gradient = np.ones(3, np.float32)
    primary.push(Push(0, 0, Range(0, 1), (1,), Partial(gradient, 1.0, 2), 0))
    gradient[:] = np.nan
    assert primary.copied is not None
    replica.follow(primary.copied.outbox[0])
    assert replica.cut().digest() == primary.cut().digest()


def test_a_primary_does_not_run_away_from_its_replica() -> None:
    primary, replica = stale_pair(0)
    assert primary.copied is not None
    for i in range(BACKLOG):
        assert not primary.backlogged
        one_push(primary, i)
    assert primary.backlogged
    primary.copied.confirm(replica.follow(primary.copied.outbox[0]))
    assert not primary.backlogged
