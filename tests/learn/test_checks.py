"""Sentences about hyperparameters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raysgd.learn.checks import choice_problems, count_problems, flag_problems, number_problems


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (1.5, "momentum must be in [0, 1), got 1.5"),
        (1, "momentum must be in [0, 1), got 1"),
        (-0.1, "momentum must be in [0, 1), got -0.1"),
        ("0.9", "momentum must be a number in [0, 1), got '0.9'"),
        (True, "momentum must be a number in [0, 1), got True"),
        (None, "momentum must be a number in [0, 1), got None"),
        (1j, "momentum must be a number in [0, 1), got 1j"),
        (math.nan, "momentum must be a finite number in [0, 1), got nan"),
        (math.inf, "momentum must be a finite number in [0, 1), got inf"),
    ],
)
def test_a_bad_number_is_named_with_what_is_allowed(value, sentence):
    assert number_problems("momentum", value, at_least=0, below=1) == [sentence]


@pytest.mark.parametrize("value", [0, 0.0, 0.5, np.float32(0.25), np.float64(0.999), np.int64(0)])
def test_numbers_within_the_bounds_have_no_problem(value):
    assert number_problems("momentum", value, at_least=0, below=1) == []


@pytest.mark.parametrize(
    ("bounds", "allowed"),
    [
        ({"above": 0}, "> 0"),
        ({"at_least": 0}, ">= 0"),
        ({"below": 3}, "< 3"),
        ({"at_most": 3}, "<= 3"),
        ({"above": 0, "at_most": 1}, "in (0, 1]"),
    ],
)
def test_every_kind_of_interval_has_its_words(bounds, allowed):
    assert number_problems("x", "?", **bounds) == [f"x must be a number {allowed}, got '?'"]


def test_numbers_beyond_float64_and_int64() -> None:
    assert number_problems("x", 10**400, above=0) == [
        f"x must be a finite number > 0, got 1{'0' * 59}… (401 characters)"
    ]
    assert count_problems("x", 2**63 - 1) == []
    assert count_problems("x", 2**63) == ["x must be a whole number below 2^63, got 9223372036854775808"]
    (sentence,) = count_problems("x", 1 << 100_000)
    assert sentence == "x must be a whole number below 2^63, got an integer of thousands of digits"


def test_a_number_without_bounds():
    assert number_problems("x", "?") == ["x must be a number, got '?'"]
    assert number_problems("x", math.inf) == ["x must be a finite number, got inf"]
    assert number_problems("x", -1e30) == []


@pytest.mark.parametrize("value", [0, -1, 2.5, 2.0, True, "3", None, math.nan])
def test_a_bad_count(value):
    assert count_problems("epochs", value) == [f"epochs must be a whole number >= 1, got {value!r}"]


def test_good_counts():
    assert count_problems("epochs", 1) == count_problems("epochs", np.int64(5)) == []
    assert count_problems("staleness", 0, at_least=0) == []


def test_flags_and_choices():
    assert flag_problems("nesterov", False) == []
    assert flag_problems("nesterov", 1) == ["nesterov must be true or false, got 1"]
    assert choice_problems("loss", "squared", ("squared", "logistic")) == []
    assert choice_problems("loss", ["squared"], ("squared",)) == ["loss must be one of 'squared', got ['squared']"]
