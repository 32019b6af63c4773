"""The order of the file does not show in the result: flights sorted by label train as well as shuffled ones.

In one process: the simulator drives the classes that the actors hold, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from raysgd import config
from raysgd.data.loader import Loader
from raysgd.data.moments import shard_statistics
from raysgd.data.sampler import Sampler
from raysgd.learn.metrics import combine
from raysgd.learn.parameters import Range
from raysgd.plan import Plan, open_tables, plan_from_statistics
from raysgd.scoring import score_shard
from raysgd.simulate import Problem, simulate

pytestmark = pytest.mark.slow

FLIGHTS_TOML = Path(__file__).resolve().parent.parent / "jobs" / "flights.toml"
#: learning rate 0.2: at the start of the decay that flights.toml has, and all the time
RATES = ["optimizer.learning_rate.initial=0.2", "optimizer.learning_rate=0.2"]


def planned(data: Path, *sets: str) -> tuple[Plan, list[str]]:
    """What flights.toml plans for the flights in ``data``, and what it says about it."""
    spec = config.load(FLIGHTS_TOML, [f"data.path={data}/train", f"data.validation={data}/valid", *sets])
    tables = open_tables(spec)
    return plan_from_statistics(spec, tables, [shard_statistics(tables.train, s.index) for s in tables.train.shards])


def held_out_loss(plan: Plan) -> float:
    """Train to the end and score the validation data."""
    tables, train = plan.tables, plan.spec.train
    assert tables.validation is not None
    virtual_workers = Range(0, train.virtual_workers)
    with Loader(
        tables.train, plan.encoder, plan.sampler, virtual_workers, cache_bytes=2**28, end_step=plan.total_steps
    ) as loader:
        problem = Problem(plan.learner, plan.rule, loader.batch, train.virtual_workers, train.seed)
        params = simulate(problem, plan.total_steps).final.params
    shards = range(len(tables.validation.shards))
    return combine([score_shard(plan.learner, params, plan.encoder, tables.validation, i)[0] for i in shards])["loss"]


def warnings_in(notes: Sequence[str]) -> list[str]:
    return [note for note in notes if note.startswith("warning")]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seed", range(3))
def test_flights_sorted_by_label_train_like_shuffled_ones(
    flights_sorted: Path, flights_shuffled: Path, rate: str, seed: int
) -> None:
    losses = []
    for data in (flights_sorted, flights_shuffled):
        plan, notes = planned(data, rate, f"train.seed={seed}")
        assert not warnings_in(notes)
        losses.append(held_out_loss(plan))
    assert losses[0] == pytest.approx(losses[1], abs=0.001)


def test_small_windows_would_show(flights_sorted: Path, flights_shuffled: Path) -> None:
    """The test above can fail: what the plan decides about windows and fragments is what makes it pass."""
    plan, _ = planned(flights_sorted, RATES[0])
    rows, train = plan.tables.train.shard_rows, plan.spec.train
    small = Sampler(rows, train.batch_size, train.virtual_workers, train.seed, window_rows=1)
    shuffled, _ = planned(flights_shuffled, RATES[0])
    assert held_out_loss(replace(plan, sampler=small)) > held_out_loss(shuffled) + 0.003


@pytest.mark.parametrize("limit", [4_096, 16_384])
def test_windows_that_must_stay_too_small_are_warned_about(
    flights_sorted: Path, flights_shuffled: Path, limit: int
) -> None:
    sets = (f"data.window_rows={limit}", f"data.max_window_rows={limit}")
    plan, notes = planned(flights_sorted, *sets)
    assert plan.sampler.window_rows == limit
    (warning,) = warnings_in(notes)
    assert f"max_window_rows = {limit:,} rows" in warning
    assert "raise max_window_rows" in warning
    assert not warnings_in(planned(flights_shuffled, *sets)[1])


def test_windows_that_grow_are_told(flights_sorted: Path) -> None:
    plan, notes = planned(flights_sorted, "train.virtual_workers=2", "data.window_rows=20_000")
    assert plan.sampler.window_rows > 20_000
    assert not warnings_in(notes)
    assert f"windows of {plan.sampler.window_rows:,} rows instead of 20,000" in "\n".join(notes)
