"""Initial weights: a pure function of seed and name, by exact arithmetic only."""

from __future__ import annotations

from math import prod, sqrt

import numpy as np

from raysgd.learn.batch import Float32
from raysgd.learn.random import uniform


def fan_in_uniform(shape: tuple[int, ...], fan_in: int, scale: float, seed: int, *name: str | int) -> Float32:
    """Uniform on (-a, a), ``a = scale * sqrt(3 / fan_in)``: mean 0, standard deviation ``scale / sqrt(fan_in)``.

    Multiplications and one square root, both correctly rounded in IEEE 754: the same bits on every machine.

    shape: of the result, float32
    fan_in: how many inputs a unit adds up (0 counts as 1)
    scale: the standard deviation of a unit's output for inputs of unit variance
    name: of the array; arrays of different names get independent values

    >>> float(abs(fan_in_uniform((100, 8), 12, 0.5, 0, "weights")).max()) < 0.25
    True

    Source: LeCun, Bottou, Orr, Müller, "Efficient backprop", 1998 (``scale = 1``); He, Zhang, Ren, Sun, "Delving
    deep into rectifiers", ICCV 2015 (``scale = sqrt(2)``).
    """
    bound = np.float32(scale * sqrt(3.0 / max(1, fan_in)))
    purpose = "/".join(["initial", *map(str, name)])
    return (uniform(prod(shape), seed, purpose) * bound).reshape(shape)
