"""Sentences about hyperparameters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raysgd.learn.checks import (
    address_problems,
    choice_problems,
    count_problems,
    flag_problems,
    float32_problems,
    number_problems,
)
from raysgd.learn.models import MLP, FactorizationMachine, HashedLogisticRegression, LogisticRegression
from raysgd.learn.schedules import Constant, CosineDecay, ExponentialDecay, InverseTimeDecay, StepDecay, WarmUp
from raysgd.learn.transforms import FTRL, SGD, AdaGrad


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


@pytest.mark.parametrize("value", [1e39, 3.5e38, 1e-46, np.float64(1e300), 5e-324, 10**39])
def test_what_float32_cannot_hold_is_named(value):
    assert number_problems("learning_rate", value, above=0) == []
    kept = "inf" if value > 1 else "0.0"
    assert float32_problems("learning_rate", value, above=0) == [
        f"learning_rate must be a number > 0 in float32, too; got {value!r}, which is {kept} there"
    ]


@pytest.mark.parametrize("value", [3.4e38, 2e-45, 1e-40, 1, np.float32(0.1)])
def test_what_float32_holds_has_no_problem(value):
    assert float32_problems("learning_rate", value, above=0) == []


def test_bounds_hold_in_float32_too():
    assert float32_problems("momentum", 1 - 1e-7, at_least=0, below=1) == []
    assert len(float32_problems("momentum", 1 - 1e-9, at_least=0, below=1)) == 1
    assert float32_problems("l2", 0.0, at_least=0) == []
    assert float32_problems("l2", "x", at_least=0) == number_problems("l2", "x", at_least=0)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (SGD(1e39), "learning_rate"),
        (SGD(0.1, momentum=1 - 1e-12), "momentum"),
        (SGD(ExponentialDecay(1e39, 0.5, 1)), "learning_rate.initial"),
        (SGD(Constant(1e-50)), "learning_rate.rate"),
        (SGD(StepDecay(1e39, 0.5, (1,))), "learning_rate.initial"),
        (SGD(InverseTimeDecay(1e39, 0.5, 1)), "learning_rate.initial"),
        (SGD(CosineDecay(0.1, final=1e-50)), "learning_rate.final"),
        (SGD(WarmUp(1e39, 1)), "learning_rate.schedule"),
        (AdaGrad(1e39), "learning_rate"),
        (AdaGrad(0.1, epsilon=1e-50), "epsilon"),
        *((FTRL(0.1, **{name: 1e39}), name) for name in ("l1", "l2", "beta")),
        (LogisticRegression(l2=1e39), "l2"),
        (LogisticRegression(init_scale=1e-50), "init_scale"),
        (MLP(hidden=(2,), init_scale=1e39), "init_scale"),
        (HashedLogisticRegression(l2=1e-60), "l2"),
        (FactorizationMachine(init_scale=1e39), "init_scale"),
    ],
)
def test_each_hyperparameter_is_refused_by_name_where_float32_cannot_hold_it(given, name):
    (sentence,) = given.problems()
    assert sentence.startswith(f"{name} must be a number ")
    assert " in float32, too; got " in sentence


@pytest.mark.parametrize(
    "value", ["auto", "local", "10.0.0.1:6379", "head:6379", "ray://head.example:10001", "[::1]:6379", "a_b-c.d:1"]
)
def test_addresses_of_clusters(value):
    assert address_problems("address", value) == []


@pytest.mark.parametrize(
    "value",
    ["", " ", "head", "head:", ":6379", "head:0", "head:65536", "head:٣", "a b:1", "ray://", "head:1/x", 7, None],
)
def test_what_is_no_address(value):
    (sentence,) = address_problems("address", value)
    assert sentence == f"address must be HOST:PORT, ray://HOST:PORT, 'auto' or 'local', got {value!r}"


def test_the_dashboards_address_is_for_jobs():
    assert address_problems("address", "http://head:8265")[0].endswith("is for `ray job submit`")
