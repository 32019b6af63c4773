"""Every kind of fault at once, thousands of schedules: nothing is lost, nothing counts twice, nothing hangs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from math import inf

import pytest
import soak
from hostile import EVERYTHING, N_SERVERS, STEPS, V, complaints, problem, schedule, truth, wrong

from raysgd.protocol.consistency import Consistency
from raysgd.protocol.ledger import Record, Rollback
from raysgd.protocol.membership import Membership, deal
from raysgd.protocol.messages import Verdict
from raysgd.protocol.shard import ServerShard
from raysgd.simulate import Faults, simulate

SCHEDULES = 2_000


@cache
def found() -> soak.Found:
    return soak.soak(range(SCHEDULES))


def test_two_thousand_schedules_with_faults_of_all_kinds() -> None:
    """Those of ``make soak`` that come first: I1 to I7, and I10."""
    assert found().broken == []
    assert found().schedules == SCHEDULES


def test_the_schedules_are_hostile() -> None:
    faults = found().faults
    assert set(found().kinds) == set(STEPS)
    assert min(found().kinds.values()) >= 100
    for kind in (
        "kill",
        "hang",
        "join",
        "drain",
        "slow",
        "stillborn",
        "server_kill",
        "server_kill in a write",
        "midway",
    ):
        assert faults[kind] >= 0.2 * SCHEDULES, kind
    for kind in ("kill_all", "node_loss", "promotion", "roll-back", "share moved"):
        assert faults[kind] >= 0.05 * SCHEDULES, kind
    for kind in ("duplicated", "reordered"):
        assert faults[kind] >= 0.05 * found().deliveries, kind
    assert found().recomputed >= 0.2 * SCHEDULES


#: each kind of fault by itself, often
ALONE = {
    "kill": 0.2,
    "kill_all": 0.05,
    "hang": 0.1,
    "join": 0.2,
    "drain": 0.1,
    "slow": 0.3,
    "server_kill": 0.2,
    "node_loss": 0.05,
    "midway": 0.1,
}


@pytest.mark.parametrize("fault", ALONE)
def test_one_kind_of_fault_alone(fault: str) -> None:
    counts: Counter[str] = Counter()
    for seed in range(20):
        calm = dict.fromkeys(ALONE, 0.0) | {fault: ALONE[fault]}
        outcome = schedule(seed, "bsp", **calm)
        assert complaints(outcome, "bsp") == []
        counts += outcome.faults
    assert counts[fault] >= 20
    assert set(counts) <= {fault, "stillborn", "server_kill in a write", "roll-back", "share moved"}


#: a third of all messages lost, servers and replicas lost all the time
LOSSY = {"lose": 0.3, "node_loss": 0.1, "replica_kill": 0.1, "replicas": True, "kill": 0.01, "midway": 0.02}


@pytest.mark.parametrize("kind", STEPS)
def test_what_servers_tell_each_other_arrives_however_much_is_lost(kind: str) -> None:
    """To the norms of a promoted replica's replica."""
    for seed in range(25):
        assert wrong(seed, kind, **LOSSY) == [], seed


def test_a_schedule_replays_from_its_seed() -> None:
    first, again, other = schedule(5), schedule(5), schedule(6)
    assert (first.order, first.faults, first.ledger) == (again.order, again.faults, again.ledger)
    assert first.order != other.order


def test_servers_that_keep_their_memory_lose_no_step() -> None:
    """Half of them die while they write: the half-written generation is written anew."""
    deaths: Counter[str] = Counter()
    for seed in range(60):
        outcome = schedule(seed, "bsp", server_kill=0.1, node_loss=0.0)
        assert complaints(outcome, "bsp") == []
        assert outcome.recomputed == 0
        assert not any(isinstance(line, Rollback) for line in outcome.ledger)
        deaths += outcome.faults
    assert deaths["server_kill"] > 60
    assert deaths["server_kill in a write"] > 60


def test_a_lost_memory_costs_no_more_than_the_steps_since_the_checkpoint() -> None:
    lost = 0
    for seed in range(40):
        outcome = schedule(seed, "bsp", node_loss=0.05)
        assert complaints(outcome, "bsp") == []
        assert outcome.recomputed <= outcome.faults["roll-back"] * int(EVERYTHING["checkpoint_every"])
        lost += outcome.recomputed
    assert lost > 40


def test_the_ledger_is_short() -> None:
    """One record covers the steps until the assignment changes."""
    outcome = simulate(problem("bsp"), STEPS["bsp"], n_workers=3, n_servers=2)
    assert [(r.shard, r.begin, r.end) for r in outcome.ledger if isinstance(r, Record)] == [(0, 0, 20), (1, 0, 20)]


def test_asynchronous_schedules_count_everything_once() -> None:
    p = problem("ssp")
    for staleness in (1, inf):
        changed = replace(p, consistency=Consistency(staleness))
        for seed in range(20):
            faults = Faults(seed, **EVERYTHING)  # type: ignore[arg-type]
            outcome = simulate(changed, 20, n_workers=1 + seed % V, n_servers=N_SERVERS, faults=faults)
            assert outcome.violations == []


# -- what the simulation says of a run that goes wrong


def test_a_run_that_cannot_end_is_reported() -> None:
    outcome = simulate(problem("bsp"), 20, n_workers=2, faults=Faults(1, lose=1.0, patience=500))
    assert len(outcome.violations) == 1
    assert outcome.violations[0].startswith("I10: no end after 500 deliveries: shards at [0], down []; worker 0 at 0")


def test_a_run_in_which_nobody_can_say_anything_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "refence", lambda _self: [])
    found_wrong = [wrong(seed, "bsp", server_kill=0.1, kill=0.0, join=0.0, drain=0.0, hang=0.0) for seed in range(5)]
    assert all(found_wrong)
    assert any("I10: nobody has anything to say" in sentences[0] for sentences in found_wrong)


def test_deals_of_the_simulation_are_the_memberships() -> None:
    outcome = simulate(problem("bsp"), 20, n_workers=3, n_servers=2)
    (record, _) = outcome.ledger
    assert isinstance(record, Record)
    assert sorted({node.begin for node, _ in record.parts} & {run.begin for run in deal(V, 3)}) == [0, 2, 5]


# -- the soak


def test_the_soak_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--count", "30", "--first", "7", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "30 schedules in" in said
    assert "every invariant held in every schedule" in said
    assert "server_kill in a write" in said


def test_the_soak_names_the_seed_and_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in STEPS:
        truth(kind)
    judge = ServerShard._judge

    def frozen(self: ServerShard, push: object) -> Verdict:
        return Verdict.FENCED if self.version == 9 else judge(self, push)  # type: ignore[arg-type]

    monkeypatch.setattr(ServerShard, "_judge", frozen)
    assert soak.main(["--count", "2", "--first", "10", "--processes", "1"]) == 1
    said = capsys.readouterr().out
    assert "seed 10 (bsp): living worker" in said
    assert "replay: make soak SOAK_ARGS='--first 10 --count 1'" in said
    assert "2 schedules are wrong" in said
