"""Initial weights: their distribution, and their bytes."""

from __future__ import annotations

import numpy as np
import pytest

from raysgd.learn.initializers import fan_in_uniform


@pytest.mark.parametrize(("fan_in", "scale"), [(1, 1.0), (28, 0.01), (300, 2**0.5)])
def test_zero_mean_uniform_with_the_standard_deviation_promised(fan_in, scale):
    n, std = 100_000, scale / fan_in**0.5
    values = fan_in_uniform((n // 10, 10), fan_in, scale, 0, "w").astype(np.float64)
    assert values.shape == (n // 10, 10)
    assert abs(values.mean()) < 5 * std / n**0.5
    assert values.std() == pytest.approx(std, rel=0.01)
    bound = 3**0.5 * std
    assert np.abs(values).max() <= bound * (1 + 1e-6)
    deciles = np.quantile(values, np.linspace(0.1, 0.9, 9))
    np.testing.assert_allclose(deciles, bound * np.linspace(-0.8, 0.8, 9), atol=0.02 * bound)


def test_values_depend_on_seed_and_name_and_on_nothing_else():
    values = fan_in_uniform((8,), 4, 1.0, 0, "layer", 1)
    assert values.dtype == np.float32
    assert values.tobytes() == fan_in_uniform((2, 4), 4, 1.0, 0, "layer", 1).tobytes()
    others = [fan_in_uniform((8,), 4, 1.0, *name) for name in ((1, "layer", 1), (0, "layer", 2), (0, "hidden", 1))]
    assert len({values.tobytes(), *(other.tobytes() for other in others)}) == 4


def test_no_inputs_count_as_one():
    assert fan_in_uniform((3,), 0, 1.0, 0, "w").tobytes() == fan_in_uniform((3,), 1, 1.0, 0, "w").tobytes()
    assert fan_in_uniform((0, 5), 3, 1.0, 0, "w").shape == (0, 5)


def test_golden_bytes():
    """The same on every machine and numpy version: words of Philox, one product, one correctly rounded root."""
    assert fan_in_uniform((4,), 7, 0.5, 3, "golden").tobytes().hex() == "1c9567bb1c27f0bd3022383e3da0c3bd"
