"""unique_inverse is numpy's, whatever the ids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysgd.learn.compact import merge_inverse, unique_inverse


@given(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 5) | st.integers(2**16 - 2, 2**16 + 2), max_size=50))
def test_as_numpy(ids: list[int]) -> None:
    array = np.array(ids, np.int32)
    unique, inverse = unique_inverse(array)
    expected, places = np.unique(array, return_inverse=True)
    assert (unique.dtype, inverse.dtype) == (np.int32, np.intp)
    assert np.array_equal(unique, expected)
    assert np.array_equal(inverse, places)


@pytest.mark.parametrize("bits", [10, 22, 30])
def test_many(bits: int) -> None:
    array = np.random.default_rng(bits).integers(0, 2**bits, 50_000).astype(np.int32)
    unique, inverse = unique_inverse(array)
    assert np.array_equal(unique, np.unique(array))
    assert np.array_equal(unique[inverse], array)


@given(st.lists(st.sets(st.integers(0, 40) | st.integers(2**30, 2**31 - 1)), min_size=1, max_size=5))
def test_merging(parts: list[set[int]]) -> None:
    arrays = [np.array(sorted(part), np.int32) for part in parts]
    unique, inverse = merge_inverse(arrays)
    expected, places = np.unique(np.concatenate(arrays), return_inverse=True)
    assert (unique.dtype, inverse.dtype) == (np.int32, np.intp)
    assert np.array_equal(unique, expected)
    assert np.array_equal(inverse, places)
