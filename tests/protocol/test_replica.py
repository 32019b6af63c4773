"""A server shard and the one that follows it: the same bytes, told when both have them."""

from __future__ import annotations

import numpy as np
import pytest

from raysgd.learn.parameters import Range
from raysgd.learn.transforms import SGD
from raysgd.protocol.generation import Generation
from raysgd.protocol.messages import NotYet, Pull, Pulled, Push, Verdict
from raysgd.protocol.replica import Copied
from raysgd.protocol.shard import ServerShard
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
    assert [sealed.step for sealed in primary.copied.outbox] == [0]
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
