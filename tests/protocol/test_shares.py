"""Who is dealt how many virtual workers, by what was measured: a table, and what noise may not do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysgd.protocol import shares
from raysgd.protocol.membership import Assign, Draining, Event, Joined, Left, Membership, Silent
from raysgd.protocol.shares import LONGEST_REST_S, QUIET_S, REST_S, Measured, runs_of, shared

V = 8


def measured(membership: Membership, at: float, slow: dict[int, float], other_s: float = 0.0) -> Measured:
    """One second for a virtual worker, times how slow its worker is; ``other_s`` of a step go elsewhere."""
    seconds = {a.worker: slow.get(a.worker, 1.0) for a in membership.assignments}
    step_s = max(seconds[a.worker] * len(a.run) for a in membership.assignments)
    return Measured(at, step_s + other_s, seconds)


def carry(membership: Membership) -> dict[int, int]:
    return {a.worker: len(a.run) for a in membership.assignments}


def crew(workers: int, n_virtual: int = V, most: int | None = None) -> Membership:
    membership = Membership(n_virtual, workers, most)
    for worker in range(workers):
        membership.handle(Joined(worker))
    return membership


# -- the table: workers, virtual workers; who is slow, and how much; seconds of a step spent elsewhere; who carries what
# after two measurements, None: nothing moves

TABLE = {
    "all alike": (4, 8, {}, 0.0, None),
    "ten times slower: nothing is left to it": (4, 8, {0: 10.0}, 0.0, {1: 3, 2: 3, 3: 2}),
    "where there are many parts it keeps some": (4, 64, {0: 10.0}, 0.0, {0: 2, 1: 21, 2: 21, 3: 20}),
    "of two": (2, 8, {1: 10.0}, 0.0, {0: 8}),
    "two of five": (5, 10, {1: 5.0, 3: 8.0}, 0.0, {0: 4, 2: 3, 4: 3}),
    "one part each: others take two": (8, 8, {7: 10.0}, 0.0, {0: 2, **dict.fromkeys(range(1, 7), 1)}),
    "twice as slow is noise": (4, 8, {0: 2.0}, 0.0, None),
    "just below": (4, 8, {0: 2.99}, 0.0, None),
    "three times, and a third is won": (4, 16, {0: 3.0}, 0.0, {0: 1, 1: 5, 2: 5, 3: 5}),
    "a step spends its time elsewhere": (4, 8, {0: 10.0}, 60.0, None),
    "more than half are slow: that is how fast workers are": (3, 8, {0: 10.0, 1: 10.0}, 0.0, None),
    "alone": (1, 8, {0: 10.0}, 0.0, None),
}


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.replace(" ", "-"))
def test_the_table(case: str) -> None:
    workers, n_virtual, slow, other_s, after = TABLE[case]
    membership = crew(workers, n_virtual)
    even = carry(membership)
    assert membership.handle(measured(membership, 100.0, slow, other_s)) == []
    decisions = membership.handle(measured(membership, 102.0, slow, other_s))
    assert carry(membership) == (even if after is None else after)
    if after is None:
        assert decisions == []
    else:
        (assign,) = decisions
        assert isinstance(assign, Assign)
        assert assign.assignments == membership.assignments
        assert all(f"worker {w} is {times:.1f} times slower" in assign.why for w, times in slow.items())


def test_fresh_incarnations_go_with_moved_shares() -> None:
    membership = crew(3)
    before = list(membership.incarnations)
    move(membership, 100.0, {0: 10.0})
    assert all(n > o for o, n in zip(before, membership.incarnations, strict=True))


def move(membership: Membership, at: float, slow: dict[int, float]) -> bool:
    """Whether two measurements make the shares move."""
    taken = [membership.handle(measured(membership, at + i, slow)) for i in range(2)]
    return any(taken)


def test_once_slow_is_not_slow() -> None:
    membership = crew(3)
    for at in range(0, 100, 2):
        for event in (measured(membership, at, {0: 10.0}), measured(membership, at + 1, {})):
            assert membership.handle(event) == []


def test_a_slow_worker_that_carries_nothing_is_tried_later_and_later() -> None:
    membership, at, waits = crew(4), 100.0, []
    for _ in range(8):
        assert move(membership, at, {0: 10.0})
        assert 0 not in carry(membership)
        since = at + 1
        while 0 not in carry(membership):
            at += 2
            membership.handle(measured(membership, at, {}))
        assert carry(membership) == dict.fromkeys(range(4), 2)
        waits.append(at - since)
        at += QUIET_S
    assert waits[:3] == pytest.approx([REST_S, 2 * REST_S, 4 * REST_S], abs=4)
    assert waits[-1] == pytest.approx(LONGEST_REST_S, abs=4)


def test_it_stays_where_a_trial_would_win_nothing() -> None:
    membership = crew(4)
    assert move(membership, 100.0, {0: 10.0})
    for at in range(200, 1000, 2):
        assert membership.handle(measured(membership, at, {}, other_s=10.0)) == []


def test_one_that_kept_some_gets_its_share_back_when_it_recovers() -> None:
    membership = crew(4, 64)
    assert move(membership, 100.0, {0: 10.0})
    assert not move(membership, 105.0, {})  # it rests first
    assert not move(membership, 140.0, {0: 2.0})  # twice as slow is no recovery
    assert move(membership, 150.0, {})
    assert carry(membership) == dict.fromkeys(range(4), 16)
    assert not move(membership, 150.0 + QUIET_S - 2, {0: 10.0})
    assert move(membership, 150.0 + QUIET_S + 1, {0: 10.0})


def test_a_spare_worker_steps_in_for_a_slow_one() -> None:
    membership = crew(2, V, most=2)
    membership.handle(Joined(2))
    assert carry(membership) == {0: 4, 1: 4}
    assert move(membership, 100.0, {1: 10.0})
    assert carry(membership) == {0: 4, 2: 4}


def test_who_comes_and_goes_is_dealt_with_beside_a_slow_one() -> None:
    membership = crew(3)
    assert move(membership, 100.0, {0: 10.0})
    assert carry(membership) == {1: 4, 2: 4}
    membership.handle(Joined(3))
    assert sorted(carry(membership).values()) == [2, 3, 3]
    for gone in (Left(1, "gone"), Left(2, "gone"), Draining(3)):
        membership.handle(gone)
    assert carry(membership) == {0: 8}  # better a slow one than none
    membership.handle(Left(0, "gone"))
    assert membership.pace.slow == {}


def test_measurements_of_others_than_the_carriers_change_nothing() -> None:
    membership = crew(3)
    events: list[Event] = [
        Measured(1.0, 30.0, {0: 10.0, 1: 1.0}),
        Measured(2.0, 30.0, {0: 10.0, 1: 1.0, 2: 1.0, 3: 1.0}),
        Measured(3.0, 30.0, {0: 10.0, 1: 1.0, 2: 0.0}),
    ]
    assert [membership.handle(event) for event in events * 2] == [[]] * 6
    assert Membership(V).handle(Measured(1.0, 1.0, {})) == []


@pytest.mark.parametrize("seed", range(20))
def test_twofold_noise_moves_nothing(seed: int) -> None:
    """A day in which every worker's rate is anything from its usual to twice as long."""
    membership, random = crew(4), np.random.default_rng(seed)
    for at in range(0, 86_400, 20):
        slow = dict(enumerate(random.uniform(1.0, 2.0, 4)))
        assert membership.handle(measured(membership, at, slow)) == []


def test_whatever_is_measured_moves_are_rare() -> None:
    """Somebody else is ten times slower every few seconds, all day: each rests longer and longer."""
    membership, random, moves = crew(4), np.random.default_rng(0), 0
    for at in range(0, 86_400, 2):
        if at % 12 == 0:
            slow = {int(random.integers(4)): 10.0}
        moves += bool(membership.handle(measured(membership, at, slow)))
    assert 0 < moves < 4 * 2 * (86_400 / LONGEST_REST_S + 6)


@settings(deadline=None)
@given(st.integers(1, 12), st.lists(st.sampled_from([1.0, 1.5, 3.0, 10.0]), min_size=1, max_size=4))
def test_the_last_is_done_as_soon_as_can_be(n_virtual: int, costs: list[float]) -> None:
    counts = shared(n_virtual, costs)
    assert sum(counts) == n_virtual
    assert [len(run) for run in runs_of(counts)] == counts
    others = (s for s in product(range(n_virtual + 1), repeat=len(costs)) if sum(s) == n_virtual)
    assert _done(counts, costs) == min(_done(split, costs) for split in others)


def _done(split: Sequence[int], costs: Sequence[float]) -> float:
    return max(n * cost for n, cost in zip(split, costs, strict=True))


def test_the_thresholds_leave_room_for_noise() -> None:
    assert shares.RECOVERED < 2.0 < shares.SLOW


def test_nothing_moves_to_nobody() -> None:
    """All are being killed when what they did before is measured: whoever comes next is dealt to."""
    membership = crew(2)
    told = measured(membership, 100.0, {0: 10.0})
    for worker in (0, 1):
        membership.handle(Silent(worker, 3, 5.0))
    assert [membership.handle(event) for event in (told, told)] == [[], []]
