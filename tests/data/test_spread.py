"""Do labels differ between shards, and what follows for windows and fragments."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from raysgd.data.moments import Moments, ShardStatistics, Statistics
from raysgd.data.spread import LabelSpread, choose_fragment_rows, choose_window_rows, label_spread


def shards_of(label: npt.NDArray[np.float64], rows: int, classes: bool) -> list[ShardStatistics]:
    shards = []
    for i, begin in enumerate(range(0, len(label), rows)):
        y = label[begin : begin + rows]
        values, counts = np.unique(y, return_counts=True)
        named = dict(zip(values.tolist(), counts.tolist(), strict=True)) if classes else None
        shards.append(
            ShardStatistics(i, Statistics(len(y), 0, Moments.join([]), (), Moments.of(y[:, None]), named, 0.0))
        )
    return shards


def labels(kind: str, seed: int, n: int = 20_000) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return {
        "rare": (rng.random(n) < 0.01).astype(np.float64),
        "classes": rng.integers(0, 10, n).astype(np.float64),
        "number": rng.normal(size=n),
        "skewed": rng.exponential(size=n),
    }[kind]


@pytest.mark.parametrize("kind", ["rare", "classes", "number", "skewed"])
@pytest.mark.parametrize("seed", range(20))
def test_random_order_is_not_found_to_differ(kind: str, seed: int) -> None:
    spread = label_spread(shards_of(labels(kind, seed), 250, kind in ("rare", "classes")))
    assert not spread.differs
    assert spread.correlation < 0.01


@pytest.mark.parametrize("kind", ["rare", "classes", "number", "skewed"])
def test_sorted_order_is_found(kind: str) -> None:
    spread = label_spread(shards_of(np.sort(labels(kind, 0)), 250, kind in ("rare", "classes")))
    assert spread.differs
    assert spread.correlation > 0.5


def test_a_slow_drift_is_found() -> None:
    label = labels("number", 0) + np.linspace(0, 0.5, 20_000)
    spread = label_spread(shards_of(label, 250, classes=False))
    assert spread.differs
    assert spread.correlation == pytest.approx(0.5**2 / 12, rel=0.5)


def test_what_cannot_differ() -> None:
    assert label_spread(shards_of(labels("rare", 0), 20_000, classes=True)) == LabelSpread(0.0, 0.0)  # one shard
    assert not label_spread(shards_of(np.ones(1000), 10, classes=True)).differs
    assert not label_spread(shards_of(np.ones(1000), 10, classes=False)).differs
    assert not label_spread(shards_of(np.arange(10.0), 1, classes=False)).differs  # one row each


def test_constant_shards_that_differ() -> None:
    spread = label_spread(shards_of(np.repeat([1.0, 2.0], 10), 10, classes=False))
    assert spread.differs
    assert spread.correlation == 1.0


SORTED = LabelSpread(z=100.0, correlation=1.0)


def windows(shard_rows: list[int], virtual_workers: int, spread: LabelSpread = SORTED, **change: int) -> object:
    given = {"batch_size": 512, "window_rows": 65_536, "max_window_rows": 1_048_576, **change}
    return choose_window_rows(spread, shard_rows, virtual_workers=virtual_workers, **given)


def test_windows_grow_to_the_whole_run_of_a_small_table() -> None:
    assert windows([16_384] * 18, 1) == (18 * 16_384, None)
    assert windows([16_384] * 18, 2) == (9 * 16_384, None)
    assert windows([16_384] * 18, 8) == (65_536, None)  # more than a run as it is


def test_windows_do_not_grow_where_labels_do_not_differ() -> None:
    assert windows([16_384] * 1800, 8, LabelSpread(1.0, 0.001)) == (65_536, None)


def test_windows_grow_as_far_as_needed_and_no_further() -> None:
    weak = LabelSpread(z=10.0, correlation=0.02)  # excess of 4 shards: 0.02 * 512 / (4 * 8) = 0.32
    assert windows([16_384] * 18_000, 8, weak) == (131_072, None)


def test_beyond_the_limit_the_warning_says_what_is_lost() -> None:
    rows, warning = windows([16_384] * 18_000, 2)  # type: ignore[misc]
    assert rows == 1_048_576
    assert "max_window_rows = 1,048,576" in warning
    assert "varies 5.0 times as much" in warning  # 1 + 512 / (64 * 2)


def test_fragments_only_where_few_shards_differ_much() -> None:
    flights = [16_384] * 18
    assert choose_fragment_rows(SORTED, flights, 8) == 4608
    assert choose_fragment_rows(SORTED, flights, 1) is None
    assert choose_fragment_rows(LabelSpread(50.0, 0.02), flights, 8) is None
    assert choose_fragment_rows(LabelSpread(1.0, 0.9), flights, 8) is None
    assert choose_fragment_rows(SORTED, [16_384] * 64, 8) is None
