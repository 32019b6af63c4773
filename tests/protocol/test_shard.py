"""One server shard: what it takes, what it refuses, and which generations it holds."""

from __future__ import annotations

import numpy as np
import pytest

from raysgd.learn.parameters import Range
from raysgd.learn.transforms import SGD
from raysgd.protocol.generation import Generation, join
from raysgd.protocol.messages import Gone, Halted, NotYet, Pull, Pulled, Push, Verdict
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.tree import EMPTY, Partial
from raysgd.protocol.update import PlannedRows, Rule

V = 4
RUN = Range(0, V)


def rate(_step: int) -> float:
    return 0.5


def shard(step: int = 0, l2: float = 0.0) -> ServerShard:
    rule = Rule(SGD(momentum=0.5), rate, PlannedRows(8, 800, 100), l2)
    start = Generation(step, np.ones(3, np.float32), {"momentum": np.zeros(3, np.float32)})
    made = ServerShard(0, rule, np.array([True, True, False]), n_virtual=V, generation=start)
    made.fence(RUN, 1)
    return made


def push(step: int, begin: int = 0, end: int = V, value: float = 8.0, incarnation: int = 1) -> Push:
    partial = Partial(np.full(3, value, np.float32), 2.0, 8)
    return Push(0, step, Range(begin, end), (incarnation,) * (end - begin), partial, step)


def test_a_complete_step_is_applied_and_sealed() -> None:
    s = shard(l2=0.5)
    assert s.push(push(0)).verdict is Verdict.ACCEPTED
    assert s.version == 1
    # g = 8 / 8 rows + l2 * w where penalized; M = g; w = 1 - 0.5 M
    assert s.snapshot(1).state["momentum"].tolist() == [1.5, 1.5, 1.0]
    assert s.snapshot(1).params.tolist() == [0.25, 0.25, 0.5]
    assert [(c.step, c.loss, c.rows, c.rate) for c in s.commits] == [(0, 2.0, 8, 0.5)]
    assert s.clocks.steps.tolist() == [1] * V


def test_a_step_without_a_gradient_still_counts() -> None:
    s = shard()
    s.push(Push(0, 0, RUN, (1,) * V, EMPTY, 0))
    assert s.version == 1
    assert s.snapshot(1).params.tolist() == [1.0, 1.0, 1.0]


def test_two_generations_are_kept_and_older_ones_are_gone() -> None:
    s = shard()
    for step in range(3):
        s.push(push(step))
    assert isinstance(s.pull(Pull(0, 3)), Pulled)
    assert isinstance(s.pull(Pull(0, 2)), Pulled)
    assert s.pull(Pull(0, 1)) == Gone(0, 1, oldest=2)
    assert s.pull(Pull(0, 4)) == NotYet(0, 4)
    with pytest.raises(KeyError, match="versions 2 and 3, not 1"):
        s.snapshot(1)


def test_what_was_pulled_is_never_written_to() -> None:
    s = shard()
    pulled = s.pull(Pull(0, 0))
    assert isinstance(pulled, Pulled)
    before = pulled.params.copy()
    for step in range(3):
        s.push(push(step))
    assert pulled.params.tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("late", "verdict"),
    [
        (push(4, 0, 2), Verdict.ACCEPTED),
        (push(3), Verdict.DUPLICATE),
        (push(5), Verdict.EARLY),
        (push(4, 0, 2, incarnation=0), Verdict.FENCED),
        (push(4, 0, 2, incarnation=2), Verdict.FENCED),
        (push(3, incarnation=0), Verdict.FENCED),
        (push(4, 1, 3), Verdict.MALFORMED),
        (push(4, 0, 8), Verdict.MALFORMED),
        (Push(0, 4, Range(0, 2), (1,), EMPTY, 4), Verdict.MALFORMED),
        (Push(0, 4, Range(0, 1), (1,), Partial(np.ones(2, np.float32), 0.0, 1), 4), Verdict.MALFORMED),
        (Push(0, 4, Range(0, 1), (1,), Partial(np.ones(3), 0.0, 1), 4), Verdict.MALFORMED),  # type: ignore[arg-type]
    ],
)
def test_verdicts(late: Push, verdict: Verdict) -> None:
    s = shard(step=4)
    assert s.push(late).verdict is verdict
    assert s.version == 4


def test_a_push_that_comes_twice_counts_once() -> None:
    s = shard()
    verdicts = [s.push(push(0, 0, 2)).verdict for _ in range(3)] + [s.push(push(0, 2, 4)).verdict]
    assert verdicts == [Verdict.ACCEPTED, Verdict.DUPLICATE, Verdict.DUPLICATE, Verdict.ACCEPTED]
    once = shard()
    once.push(push(0, 2, 4))
    once.push(push(0, 0, 2))
    assert s.snapshot(1).digest() == once.snapshot(1).digest()


def test_a_successor_replaces_the_parts_of_the_dead() -> None:
    s = shard()
    s.push(push(0, 0, 1, value=1.0))
    assert s.fence(Range(0, 2), 2) == 0
    assert s.push(push(0, 1, 2, value=1.0)).verdict is Verdict.FENCED
    assert s.push(push(0, 0, 2, value=2.0, incarnation=2)).verdict is Verdict.ACCEPTED
    s.push(push(0, 2, 4, value=6.0))
    assert s.snapshot(1).params.tolist() == [0.5] * 3
    assert s.commits[0].parts == ((Range(0, 2), (2, 2), 8), (Range(2, 4), (1, 1), 8))


def test_a_fence_is_never_lowered() -> None:
    s = shard()
    s.fence(RUN, 5)
    s.fence(RUN, 3)
    assert s.incarnations == [5] * V


def test_a_frozen_shard_takes_nothing_and_says_so() -> None:
    s = shard()
    s.push(push(0))
    assert s.freeze() == 1
    assert s.push(push(1)).verdict is Verdict.FROZEN
    assert s.push(push(0)).verdict is Verdict.DUPLICATE
    assert s.pull(Pull(0, 2)) == Halted(0, 2, diverged=None)
    assert isinstance(s.pull(Pull(0, 1)), Pulled)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_is_not_sealed(value: float) -> None:
    s = shard()
    s.push(push(0))
    good = s.snapshot(1).digest()
    for begin in (0, 2):  # 3e38 twice overflows in the sum
        s.push(push(1, begin, begin + 2, value=value))
    assert s.diverged == 1
    assert s.version == 1
    assert s.snapshot(1).digest() == good
    assert s.pull(Pull(0, 2)) == Halted(0, 2, diverged=1)
    assert isinstance(s.pull(Pull(0, 1)), Pulled)
    assert s.push(push(1)).verdict is Verdict.FROZEN


def test_commits_are_handed_out_from_a_step_on() -> None:
    s = shard()
    for step in range(4):
        s.push(push(step))
    assert [c.step for c in s.drain(2)] == [2, 3]
    assert [c.step for c in s.drain(0)] == [2, 3]


def successor(dead: ServerShard, previous: bool = True) -> ServerShard:
    """Begun from what the memory of the dead one holds; nobody may push to it yet."""
    version = dead.version
    return ServerShard(
        0,
        dead.rule,
        np.array([True, True, False]),
        n_virtual=V,
        generation=dead.snapshot(version),
        previous=dead.snapshot(version - 1) if previous else None,
        commits=dead.drain(version - 1),
    )


def test_a_successor_holds_both_generations_and_goes_on_to_the_same_bytes() -> None:
    s = shard(l2=0.5)
    for step in range(3):
        s.push(push(step))
    s.push(push(3, 0, 2))  # pending: lost with it
    new = successor(s)
    assert (new.version, new.clocks.steps.tolist(), new.incarnations) == (3, [3] * V, [0] * V)
    for version in (2, 3):
        assert new.snapshot(version).digest() == s.snapshot(version).digest()
    assert new.push(push(3)).verdict is Verdict.FENCED
    assert new.fence(RUN, 2) == 3
    assert new.push(push(3, incarnation=1)).verdict is Verdict.FENCED
    for begin in (0, 2):
        new.push(push(3, begin, begin + 2, incarnation=2))
    s.push(push(3, 2, 4))
    assert new.snapshot(4).digest() == s.snapshot(4).digest()
    assert new.snapshot(3).digest() == s.snapshot(3).digest()
    assert [c.step for c in new.drain(0)] == [2, 3]


@pytest.mark.parametrize("begin", [0, 3])
def test_what_is_not_there_is_not_served(begin: int) -> None:
    """Neither a generation that was being written over, nor memory that holds none."""
    s = shard(step=begin)
    s.push(push(begin))
    new = successor(s, previous=False)
    for version in (-1, begin):
        assert new.pull(Pull(0, version)) == Gone(0, version, oldest=begin + 1)
        with pytest.raises(KeyError):
            new.snapshot(version)
    assert isinstance(new.pull(Pull(0, begin + 1)), Pulled)


def test_a_digest_does_not_depend_on_the_cut() -> None:
    random = np.random.default_rng(0)
    whole = Generation(7, random.random(10).astype(np.float32), {"momentum": random.random(10).astype(np.float32)})
    for cut in range(1, 10):
        shards = [whole.cut(Range(0, cut)), whole.cut(Range(cut, 10))]
        assert join(shards).digest() == whole.digest()
    other = whole.copy()
    other.state["momentum"][3] = np.nextafter(other.state["momentum"][3], np.float32(1))
    assert other.digest() != whole.digest()
    assert Generation(8, whole.params, whole.state).digest() != whole.digest()
