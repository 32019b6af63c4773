"""Membership as a table of events and decisions, and what holds after any events at all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysgd.learn.parameters import Range
from raysgd.protocol.membership import (
    HANGS_IN_ONE_STEP,
    LONGEST_BACKOFF_S,
    Assign,
    Committed,
    Decision,
    Draining,
    Event,
    Fail,
    Joined,
    Kill,
    Left,
    Membership,
    Share,
    Silent,
    Start,
    Stillborn,
    Wait,
    deal,
)

V = 8


def after(events: Sequence[Event], **how: int) -> tuple[Membership, list[Decision]]:
    """A membership that has taken the events, and what it decided at the last."""
    membership = Membership(V, **{"least": 1, "most": V, **how})
    decisions: list[Decision] = []
    for event in events:
        decisions = membership.handle(event)
    return membership, decisions


def joined(*workers: int) -> list[Event]:
    return [Joined(w) for w in workers]


def carriers(decisions: Sequence[Decision]) -> list[tuple[int, int, int]]:
    """(worker, begin, end) of the one Assign among the decisions."""
    (assign,) = [d for d in decisions if isinstance(d, Assign)]
    return [(a.worker, a.run.begin, a.run.end) for a in assign.assignments]


def without_assign(decisions: Sequence[Decision]) -> list[Decision]:
    return [d for d in decisions if not isinstance(d, Assign)]


# -- the table: how many begin, how many carry; events; what the last decides besides Assign; who then carries what

HALVES = [(0, 0, 4), (1, 4, 8)]
#: three that die while they start, each followed by progress
DYING = [event for step in (2, 3, 4) for event in (Stillborn("died"), Committed(step))]
TABLE = {
    "too few to begin": (3, 3, joined(0, 1), [], None),
    "enough to begin": (2, 2, joined(0, 1), [], HALVES),
    "one leaves before the begin": (2, 2, [*joined(0), Left(0, "gone")], [Start(1)], None),
    "one joins in mid-run": (1, 8, joined(0, 1), [], HALVES),
    "fewer go on than began": (2, 2, [*joined(0, 1), Left(0, "gone")], [Start(1)], [(1, 0, 8)]),
    "a replacement joins": (2, 2, [*joined(0, 1), Left(0, "gone"), Joined(2)], [], [(1, 0, 4), (2, 4, 8)]),
    "a spare one joins: nobody is disturbed": (2, 2, joined(0, 1, 2), [], None),
    "a spare one is lost": (2, 2, [*joined(0, 1, 2), Left(2, "gone")], [Start(1)], None),
    "a spare one steps in": (2, 2, [*joined(0, 1, 2), Left(0, "gone")], [Start(1)], [(1, 0, 4), (2, 4, 8)]),
    "all are lost": (2, 2, [*joined(0, 1), Left(0, "gone"), Left(1, "gone")], [Start(1, 1.0), Wait(0)], None),
    "one joins after all were lost": (
        2,
        2,
        [*joined(0, 1), Left(0, "gone"), Left(1, "gone"), Joined(2)],
        [],
        [(2, 0, 8)],
    ),
    "one is announced to go": (2, 2, [*joined(0, 1), Draining(0)], [Start(1)], [(1, 0, 8)]),
    "it has gone": (2, 2, [*joined(0, 1), Draining(0), Left(0, "gone")], [], None),
    "another came before it went": (
        2,
        2,
        [*joined(0, 1), Draining(0), Joined(2)],
        [],
        [(1, 0, 4), (2, 4, 8)],
    ),
    "all are to go: they go on while they can": (1, 2, [*joined(0), Draining(0)], [Start(1)], None),
    "all are to go, and one joins": (1, 2, [*joined(0), Draining(0), Joined(1)], [], [(1, 0, 8)]),
    "the last goes": (1, 2, [*joined(0), Draining(0), Left(0, "gone")], [Wait(0)], None),
    "announced twice": (2, 2, [*joined(0, 1), Draining(0), Draining(0)], [], None),
    "whoever was announced before the begin": (2, 2, [Joined(0), Draining(0), Joined(1)], [], [(1, 0, 8)]),
    "silent": (
        2,
        2,
        [*joined(0, 1), Silent(0, 7, 3.0)],
        [Kill(0, "it hung for 3.0 s in step 7: no answer, and no CPU time")],
        None,
    ),
    "silent for longer": (2, 2, [*joined(0, 1), Silent(0, 7, 3.0), Silent(0, 7, 4.0)], [], None),
    "dead of it": (2, 2, [*joined(0, 1), Silent(0, 7, 3.0), Left(0, "killed")], [Start(1)], [(1, 0, 8)]),
    "whoever is being killed is given nothing": (
        2,
        8,
        [*joined(0, 1), Silent(0, 7, 3.0), Joined(2)],
        [],
        [(1, 0, 4), (2, 4, 8)],
    ),
    "nobody but one that is being killed": (
        1,
        8,
        [*joined(0, 1), Silent(0, 7, 3.0), Left(1, "gone")],
        [Start(1), Wait(1)],
        None,
    ),
    "unknown workers change nothing": (1, 8, [*joined(0), Left(5, "gone")], [], None),
    "a joined one joins": (1, 8, joined(0, 0), [], None),
    "progress": (1, 8, [*joined(0), Committed(5)], [], None),
    "one dies while it starts": (2, 2, [*joined(0, 1), Left(0, "gone"), Stillborn("2 died")], [Start(1, 1.0)], None),
    "and again, while another makes progress": (
        2,
        2,
        [*joined(0, 1), Committed(1), Left(0, "gone"), *DYING, Stillborn("5 died")],
        [Start(1, 4.0)],
        None,
    ),
    "one that came and died before it had done anything is no better": (
        2,
        2,
        [*joined(0, 1), Committed(1), Left(0, "gone"), Stillborn("x"), Committed(2), Joined(2), Left(2, "gone")],
        [Start(1, 1.0)],
        [(1, 0, 8)],
    ),
    "one that took part makes up for those that did not": (
        2,
        2,
        [*joined(0, 1), Committed(1), Left(0, "gone"), Stillborn("x"), Joined(2), Committed(2), Left(2, "gone")],
        [Start(1, 0.0)],
        [(1, 0, 8)],
    ),
    "more than can carry": (1, 20, joined(*range(9)), [], None),
}


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.replace(" ", "-"))
def test_the_table(case: str) -> None:
    least, most, events, decided, carry = TABLE[case]
    _, decisions = after(events, least=least, most=most)
    assert without_assign(decisions) == decided
    if carry is None:
        assert decisions == decided
    else:
        assert carriers(decisions) == carry


def test_three_hangs_in_one_step_blame_the_step() -> None:
    hangs = [Silent(w, 41, 3.0) for w in range(HANGS_IN_ONE_STEP)]
    _, decisions = after([*joined(*range(8)), *hangs])
    assert decisions == [Fail("step 41 hangs: 3 workers in a row hung in it, last 2")]


def test_hangs_in_other_steps_and_of_spare_workers_do_not() -> None:
    elsewhere = [Silent(w, 41 + w, 3.0) for w in range(5)]
    _, decisions = after([*joined(*range(8)), *elsewhere])
    assert [type(d) for d in decisions] == [Kill]
    spare = [Silent(w, 41, 3.0) for w in range(2, 7)]
    _, decisions = after([*joined(*range(8)), *spare], least=2, most=2)
    assert [type(d) for d in decisions] == [Kill]


def test_a_budget_of_losses_and_its_refill() -> None:
    membership, _ = after(joined(0, 1, 2, 3), max_failures=2)
    assert isinstance(membership.handle(Left(0, "gone"))[0], Start)
    assert isinstance(membership.handle(Left(1, "gone"))[0], Start)
    membership.handle(Committed(1))
    for worker in (2, 3):
        assert isinstance(membership.handle(Left(worker, "gone"))[0], Start)
    membership.handle(Committed(1))  # no progress since
    membership.handle(Joined(4))
    why = "worker 4 was lost: out of memory; losses without progress: 3, 2 are borne (run.failure_config.max_failures)"
    assert membership.handle(Left(4, "out of memory")) == [Fail(why)]


def test_no_loss_is_borne_where_none_is_allowed() -> None:
    _, decisions = after([*joined(0, 1), Left(0, "gone")], max_failures=0)
    assert decisions == [
        Fail("worker 0 was lost: gone; losses without progress: 1, none is borne (run.failure_config.max_failures)")
    ]


def test_an_announced_loss_is_not_charged() -> None:
    _, decisions = after([*joined(0, 1), Draining(0), Left(0, "gone")], max_failures=0)
    assert decisions == []


def test_a_server_is_charged_to_the_same_budget() -> None:
    membership, _ = after([*joined(0, 1), Left(0, "gone")], max_failures=2)
    assert membership.charge("server 1 was lost: gone") == []
    why = "server 0 was lost: gone; losses without progress: 3, 2 are borne (run.failure_config.max_failures)"
    assert membership.charge("server 0 was lost: gone") == [Fail(why)]


def test_a_share_begins_at_the_least_that_any_shard_has() -> None:
    assignment = Membership(4).assign(0, Range(0, 4))
    share = Share.at(assignment, 4, [np.array([5, 5, 6, 6]), np.array([6, 6, 6, 6])])
    assert (share.assignment, share.start, share.nodes) == (assignment, 5, (Range(0, 2), Range(2, 4)))


def test_the_reason_of_a_kill_is_told() -> None:
    _, decisions = after([*joined(0), Silent(0, 7, 3.0), Left(0, "SIGKILL")], max_failures=0)
    assert decisions == [
        Fail(
            "worker 0 was lost: it hung for 3.0 s in step 7: no answer, and no CPU time; "
            "losses without progress: 1, none is borne (run.failure_config.max_failures)"
        )
    ]


def test_a_hang_is_no_progress_and_hides_none() -> None:
    """The step that a silent worker names is what the watcher read: it may be ahead of what was told, or behind."""
    membership, _ = after([*joined(0, 1, 2), Committed(5), Left(0, "gone")])
    membership.handle(Silent(1, 3, 3.0))
    membership.handle(Committed(5))
    assert membership.failures == 1
    membership.handle(Silent(2, 9, 3.0))
    membership.handle(Committed(9))
    assert membership.failures == 0


def test_replacements_come_later_and_later_but_not_never() -> None:
    membership, _ = after([])
    waits = []
    for worker in range(2000):
        membership.handle(Joined(worker))
        (start, _) = membership.handle(Left(worker, "dies while it starts"))
        assert isinstance(start, Start)
        waits.append(start.after_s)
    assert waits[:4] == [0.0, 1.0, 2.0, 4.0]
    assert waits[-1] == max(waits) == LONGEST_BACKOFF_S
    membership.handle(Joined(2000))
    membership.handle(Committed(1))
    assert membership.handle(Left(2000, "gone")) == [Start(1), Wait(0)]


def test_neighbours_are_those_of_one_node() -> None:
    events = [Joined(0, "a"), Joined(1, "b"), Joined(2, "a"), Joined(3, "b"), Joined(4, None)]
    _, decisions = after(events)
    assert [worker for worker, _, _ in carriers(decisions)] == [0, 2, 1, 3, 4]
    _, decisions = after([*events, Left(0, "gone")])
    assert [worker for worker, _, _ in carriers(decisions)] == [1, 3, 2, 4]


def test_never_more_carriers_than_virtual_workers() -> None:
    membership, _ = after(joined(*range(20)), most=20)
    assert [a.run for a in membership.assignments] == list(deal(V, V))


def test_a_refence_is_the_same_under_fresh_incarnations() -> None:
    membership, before = after(joined(0, 1, 2))
    again = membership.refence()
    assert carriers(again) == carriers(before)
    for old, new in zip(before[0].assignments, again[0].assignments, strict=True):  # type: ignore[union-attr]
        assert all(n > o for o, n in zip(old.incarnations, new.incarnations, strict=True))
    nobody, _ = after([])
    assert nobody.refence() == []
    waiting, _ = after([*joined(0), Left(0, "gone")])
    assert waiting.refence() == [Wait(0)]


WORKERS = st.integers(0, 11)
EVENTS = st.one_of(
    st.builds(Joined, WORKERS, st.sampled_from([None, "a", "b", "c"])),
    st.builds(Left, WORKERS, st.just("gone")),
    st.builds(Silent, WORKERS, st.integers(0, 3), st.just(3.0)),
    st.builds(Draining, WORKERS),
    st.builds(Committed, st.integers(0, 3)),
    st.just("refence"),
)


@settings(deadline=None)
@given(
    n_virtual=st.integers(1, 13),
    least=st.integers(1, 4),
    most=st.none() | st.integers(1, 16),
    max_failures=st.integers(-1, 6),
    events=st.lists(EVENTS, max_size=60),
)
def test_whatever_happens(
    n_virtual: int, least: int, most: int | None, max_failures: int, events: list[Event | str]
) -> None:
    """The newest Assign covers all virtual workers once, in contiguous runs, by living workers that are not being
    killed; incarnations rise strictly; and somebody carries where anybody can."""
    membership = Membership(n_virtual, least, most, max_failures)
    killed: set[int] = set()
    begun = False
    for event in events:
        incarnations = list(membership.incarnations)
        decisions = membership.refence() if isinstance(event, str) else membership.handle(event)
        if any(isinstance(d, Fail) for d in decisions):
            return
        killed = (killed | {d.worker for d in decisions if isinstance(d, Kill)}) & set(membership.living)
        begun = begun or any(isinstance(d, Assign) for d in decisions)
        assigned = [d for d in decisions if isinstance(d, Assign)]
        assert len(assigned) <= 1
        for assign in assigned:
            assert assign.assignments == membership.assignments
            for a in assign.assignments:
                assert a.incarnations == tuple(membership.incarnations[a.run.slice])
            assert all(n > o for o, n in zip(incarnations, membership.incarnations, strict=True))
        if not assigned:
            assert membership.incarnations == incarnations
        if event == "refence" and begun:
            assert decisions
        newest = membership.assignments
        assert len(newest) <= membership.most
        if newest:
            runs = [a.run for a in newest]
            assert (runs[0].begin, runs[-1].end) == (0, n_virtual)
            assert all(a.end == b.begin for a, b in pairwise(runs))
            assert all(len(run) for run in runs)
            workers = [a.worker for a in newest]
            assert len(set(workers)) == len(workers)
            assert set(workers) <= set(membership.living)
            if assigned:
                assert not killed & set(workers)
        assert bool(newest) or not begun or set(membership.living) <= killed


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 13)), min_size=1, max_size=20))
def test_runs_given_by_hand_get_fresh_incarnations(runs: list[tuple[int, int]]) -> None:
    membership = Membership(13)
    for begin, width in runs:
        run = Range(begin, min(13, begin + width))
        before = membership.incarnations[run.slice]
        assignment = membership.assign(0, run)
        assert all(n > o for o, n in zip(before, assignment.incarnations, strict=True))
        assert tuple(membership.incarnations[run.slice]) == assignment.incarnations
