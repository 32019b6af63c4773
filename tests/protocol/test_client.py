"""The worker's half: what it says, says again, and takes no notice of."""

from __future__ import annotations

import numpy as np
import pytest

from raysgd.learn.parameters import Range
from raysgd.protocol.client import Client, Compute, Done
from raysgd.protocol.membership import Assignment, Membership
from raysgd.protocol.messages import Gone, Halted, NotYet, Pull, Pulled, Push, PushReply, Verdict
from raysgd.protocol.tree import Partial

SPANS = (Range(0, 2), Range(2, 5))


def client(until: int = 3) -> Client:
    assignment = Membership(8).assign(0, Range(3, 8))
    return Client(assignment, 8, SPANS, start=0, until=until)


def params(shard: int, version: int) -> Pulled:
    return Pulled(shard, version, np.full(len(SPANS[shard]), 10 * version + shard, np.float32))


def sums(compute: Compute) -> list[Partial]:
    return [Partial(np.arange(5, dtype=np.float32) + node.begin, 1.0, 2) for node in compute.nodes]


def to_version(c: Client, version: int) -> Compute:
    """Drive a fresh client until it is asked to compute step ``version``."""
    c.begin()
    step = c.handle(params(0, 0)) + c.handle(params(1, 0))
    for v in range(1, version + 1):
        assert isinstance(step[0], Compute)
        c.computed(step[0].step, sums(step[0]))
        step = c.handle(params(0, v)) + c.handle(params(1, v))
    assert isinstance(step[0], Compute)
    return step[0]


def test_a_step_begins_when_every_shard_has_answered() -> None:
    c = client()
    assert c.begin() == [Pull(0, 0), Pull(1, 0)]
    assert c.handle(params(1, 0)) == []
    [compute] = c.handle(params(0, 0))
    assert isinstance(compute, Compute)
    assert compute.step == 0
    assert compute.params.tolist() == [0, 0, 1, 1, 1]
    assert compute.nodes == (Range(3, 4), Range(4, 8))


def test_pushes_carry_the_shards_slice_and_the_incarnations_of_the_node() -> None:
    c = client()
    said = c.computed(0, sums(to_version(c, 0)))
    pushes = [i for i in said if isinstance(i, Push)]
    assert [(p.shard, p.step, p.node, p.incarnations) for p in pushes] == [
        (shard, 0, node, (1,) * len(node)) for shard in (0, 1) for node in (Range(3, 4), Range(4, 8))
    ]
    assert [p.partial.gradient.tolist() for p in pushes if p.partial.gradient is not None] == [
        [3, 4],
        [4, 5],
        [5, 6, 7],
        [6, 7, 8],
    ]
    assert [i for i in said if isinstance(i, Pull)] == [Pull(0, 1), Pull(1, 1)]


def test_a_retry_says_again_what_is_unanswered_and_no_more() -> None:
    c = client()
    said = c.computed(0, sums(to_version(c, 0)))
    assert c.retry() == said
    assert c.handle(params(0, 1)) == []
    assert c.retry() == [i for i in said if not isinstance(i, Compute | Done) and i.shard == 1]


def test_repeated_late_and_foreign_replies_change_nothing() -> None:
    c = client()
    compute = to_version(c, 1)
    c.computed(1, sums(compute))
    before = c.retry()
    for reply in (params(0, 0), params(0, 1), NotYet(0, 1), Gone(0, 1, 2), Halted(0, 1, None)):
        assert c.handle(reply) == []
    assert c.computed(0, sums(compute)) == []
    assert c.handle(PushReply(0, 0, Range(4, 8), Verdict.FENCED)) == []
    assert c.retry() == before


def test_not_yet_asks_again() -> None:
    c = client()
    c.computed(0, sums(to_version(c, 0)))
    assert c.handle(NotYet(1, 1)) == [Pull(1, 1)]


def test_it_ends_when_the_last_version_is_on_every_shard() -> None:
    c = client(until=1)
    c.computed(0, sums(to_version(c, 0)))
    assert c.handle(params(1, 1)) == []
    assert c.done is None
    assert c.handle(params(0, 1)) == [Done("reached", 1)]
    assert c.params.tolist() == [10, 10, 11, 11, 11]
    assert c.retry() == []


@pytest.mark.parametrize(
    ("reply", "done"),
    [
        (PushReply(0, 0, Range(4, 8), Verdict.FENCED), Done("fenced", 0)),
        (PushReply(0, 0, Range(4, 8), Verdict.MALFORMED), Done("malformed", 0)),
        (Halted(0, 1, None), Done("frozen", 1)),
        (Halted(0, 1, 0), Done("diverged", 0)),
        (Gone(0, 1, 5), Done("gone", 1)),
    ],
)
def test_it_ends_when_told(reply: PushReply | Halted | Gone, done: Done) -> None:
    c = client()
    c.computed(0, sums(to_version(c, 0)))
    assert c.handle(reply) == [done]
    assert c.done == done
    assert c.handle(params(0, 1)) == []


@pytest.mark.parametrize("verdict", [Verdict.ACCEPTED, Verdict.DUPLICATE, Verdict.EARLY, Verdict.FROZEN])
def test_other_verdicts_leave_the_answer_to_the_pull(verdict: Verdict) -> None:
    c = client()
    c.computed(0, sums(to_version(c, 0)))
    assert c.handle(PushReply(0, 0, Range(4, 8), verdict)) == []
    assert c.done is None


def test_incarnations_only_rise() -> None:
    membership = Membership(4)
    first = membership.assign(0, Range(0, 4))
    second = membership.assign(1, Range(2, 4))
    third = membership.assign(2, Range(0, 4))
    assert first.incarnations == (1, 1, 1, 1)
    assert second == Assignment(1, Range(2, 4), (2, 2))
    assert third.incarnations == (3, 3, 3, 3)
