"""Named arrays over a flat vector and how it is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysgd.learn.parameters import Array, Layout, Range, block_width, even_split

LAYOUT = Layout(
    (Array("weights", (4, 3)), Array("bias", (3,), penalized=False), Array("none", (0, 2)), Array("v", (5,)))
)


def test_views_share_the_flat_vector_without_gap_or_overlap():
    flat = np.zeros(LAYOUT.n_params, np.float32)
    views = LAYOUT.views(flat)
    assert {key: view.shape for key, view in views.items()} == {a.name: a.shape for a in LAYOUT.arrays}
    for i, view in enumerate(views.values(), start=1):
        view[...] = i
    assert flat.tolist() == [1.0] * 12 + [2.0] * 3 + [4.0] * 5


def test_ranges_and_penalized():
    assert LAYOUT.ranges() == {
        "weights": Range(0, 12),
        "bias": Range(12, 15),
        "none": Range(15, 15),
        "v": Range(15, 20),
    }
    assert LAYOUT.penalized(Range(0, 20)).tolist() == [True] * 12 + [False] * 3 + [True] * 5
    assert LAYOUT.penalized(Range(11, 16)).tolist() == [True, False, False, False, True]
    assert (len(Range(3, 7)), Range(3, 7).slice) == (4, slice(3, 7))


@given(st.integers(1, 10**7), st.integers(1, 200))
def test_shards_cover_the_vector_begin_on_blocks_and_differ_by_one_block(n_params, parts):
    width = block_width(n_params)
    blocks = -(-n_params // width)
    if parts > blocks:
        with pytest.raises(ValueError, match=rf"num_servers must be in \[1, {blocks}\]"):
            even_split(n_params, parts)
        return
    shards = even_split(n_params, parts)
    assert [shards[0].begin, *(shard.end for shard in shards)] == [*(shard.begin for shard in shards), n_params]
    assert all(shard.begin % width == 0 for shard in shards)
    sizes = [-(-len(shard) // width) for shard in shards]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 10**9))
def test_block_width(n_params):
    width = block_width(n_params)
    assert width & (width - 1) == 0
    assert 1 <= width <= 65_536
    assert n_params < 64 or n_params // width >= 64
    assert width == 65_536 or n_params < 128 * width


@pytest.mark.parametrize("parts", [0, -1, 11])
def test_impossible_splits_are_refused(parts):
    with pytest.raises(ValueError, match=f"got {parts}"):
        even_split(10, parts)
