"""Counter-based randomness: the same bytes for ever, and random."""

from __future__ import annotations

import numpy as np
import pytest

from raysgd.learn.random import permutation, stable_argsort, uniform, words


def test_golden_words():
    """Philox-4x64 keyed by BLAKE2b: runs are resumed by these, so they may never change."""
    assert [hex(word) for word in words(3, 0, "rows", 1, 2).tolist()] == [
        "0x5e5e56c0552957b2",
        "0x5cac32f1d2a31c87",
        "0x3bb36d58e0d4ca45",
    ]
    assert permutation(10, 5, "shards", 3).tolist() == [6, 0, 5, 9, 7, 8, 2, 1, 3, 4]


def test_streams_differ_by_seed_purpose_and_every_index_and_nothing_runs_together():
    names = [
        (0, "rows"),
        (1, "rows"),
        (0, "shards"),
        (0, "rows", 0),
        (0, "rows", 1),
        (0, "rows", 0, 1),
        (0, "rows", 1, 0),
    ]
    names += [(0, "rows", 11), (0, "rows", 1, 1), (-1, "rows"), (2**70, "rows")]
    assert len({words(4, *name).tobytes() for name in names}) == len(names)


def test_a_stream_is_a_prefix_of_itself_and_the_global_generator_is_not_touched():
    before = np.random.get_state()[1].tobytes()
    assert (words(7, 0, "a")[:5] == words(5, 0, "a")).all()
    assert np.random.get_state()[1].tobytes() == before
    assert words(0, 0, "a").shape == permutation(0, 0, "a").shape == uniform(0, 0, "a").shape == (0,)


@pytest.mark.parametrize("count", [1, 2, 17, 1000])
def test_permutations_are_permutations(count):
    assert sorted(permutation(count, 3, "x").tolist()) == list(range(count))


def test_equal_words_keep_their_order(monkeypatch):
    monkeypatch.setattr("raysgd.learn.random.words", lambda count, *_: np.arange(count, dtype=np.uint64) % 2)
    assert permutation(1000, 0, "x").tolist() == [*range(0, 1000, 2), *range(1, 1000, 2)]


def test_every_permutation_of_four_is_as_likely():
    """Chi-squared over 24 permutations, 23 degrees of freedom: above 49.7 once in a thousand; the draw is fixed."""
    draws = [tuple(permutation(4, 0, "chi", i).tolist()) for i in range(4800)]
    counts = np.array([draws.count(order) for order in set(draws)])
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7


def test_uniform_is_symmetric_exact_and_uniform():
    values = uniform(100_000, 0, "u")
    assert values.dtype == np.float32
    assert -1 <= values.min() < values.max() < 1
    steps = values.astype(np.float64) * 2**24
    assert (steps == np.rint(steps)).all()
    assert not (values == 0).any()
    counts, _ = np.histogram(values, bins=20, range=(-1, 1))
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # 19 degrees of freedom, once in a thousand


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 70_000])
def test_stable_argsort_is_numpys(count: int) -> None:
    keys = words(count, 1, "keys")
    assert np.array_equal(stable_argsort(keys), np.argsort(keys, kind="stable"))
    few = keys % np.uint64(50_000)  # alike in the bits that are looked at first
    assert np.array_equal(stable_argsort(few), np.argsort(few, kind="stable"))
