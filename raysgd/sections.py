"""Models, optimizers and schedules as plain tables with a ``type``: what a TOML file and a manifest hold.

SGD(ExponentialDecay(0.1, 0.5, "1epoch"), momentum=0.9)
<-> {"type": "sgd", "learning_rate": {"type": "exponential_decay", "initial": 0.1, ...}, "momentum": 0.9}
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from raysgd.errors import InputError
from raysgd.learn.models import (
    MLP,
    FactorizationMachine,
    HashedLogisticRegression,
    LinearRegression,
    LogisticRegression,
    SoftmaxRegression,
)
from raysgd.learn.models.base import Model
from raysgd.learn.schedules import Constant, CosineDecay, ExponentialDecay, InverseTimeDecay, StepDecay, WarmUp
from raysgd.learn.transforms import FTRL, SGD, AdaGrad

Table = dict[str, Any]
Kinds = Mapping[str, type[Any]]

MODELS: Kinds = MappingProxyType(
    {
        "linear_regression": LinearRegression,
        "logistic_regression": LogisticRegression,
        "softmax_regression": SoftmaxRegression,
        "mlp": MLP,
        "hashed_logistic_regression": HashedLogisticRegression,
        "factorization_machine": FactorizationMachine,
    }
)
OPTIMIZERS: Kinds = MappingProxyType({"sgd": SGD, "adagrad": AdaGrad, "ftrl": FTRL})
SCHEDULES: Kinds = MappingProxyType(
    {
        "constant": Constant,
        "exponential_decay": ExponentialDecay,
        "step_decay": StepDecay,
        "inverse_time_decay": InverseTimeDecay,
        "cosine_decay": CosineDecay,
        "warm_up": WarmUp,
    }
)

#: The fields, of optimizers and of schedules, that can be a schedule.
_SCHEDULED = ("learning_rate", "schedule")


def nearest(word: str, allowed: Collection[str]) -> str:
    """The end of a sentence about an unknown word: the nearest allowed one, or all of them.

    >>> nearest("epoch", ["epochs", "seed"])
    "did you mean 'epochs'?"
    >>> nearest("zzz", ["epochs", "seed"])
    'allowed are epochs, seed'
    """
    close = get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(allowed)}"


def plain(value: Any) -> Any:
    """``value`` in types of JSON and TOML: tuples as lists, schedules as tables; paths and numpy's scalars too."""
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and value == math.inf:
        return "inf"  # JSON has no infinity
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return to_table(value, SCHEDULES)
    return value


def type_name(value: object, kinds: Kinds) -> str | None:
    """The ``type`` under which a table of ``kinds`` names this object's class, or None."""
    return next((name for name, cls in kinds.items() if type(value) is cls), None)


def to_table(value: Any, kinds: Kinds) -> Table:
    """``{"type": ..., field: value, ...}`` of one of our dataclasses; fields that are None are left out.

    Raises InputError for a class that has no ``type``.

    >>> to_table(SGD(learning_rate=0.5), OPTIMIZERS)
    {'type': 'sgd', 'learning_rate': 0.5, 'momentum': 0.0, 'nesterov': False}
    """
    name = type_name(value, kinds)
    if name is None:
        raise InputError(f"{value!r} must be one of {', '.join(cls.__name__ for cls in kinds.values())}")
    return {"type": name, **field_table(value)}


def field_table(value: Any, skip: Collection[str] = ()) -> Table:
    """The fields of a dataclass that are not None, as plain values."""
    found = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in skip}
    return {name: plain(v) for name, v in found.items() if v is not None}


def from_table(table: Any, kinds: Kinds, where: str, default: str | None = None) -> Any:
    """The object that ``to_table`` wrote. ``where`` (as "optimizer") begins each sentence.

    Raises InputError with every unknown type, unknown key and missing key, nested ones too. Values are not
    judged here: that is the object's own ``problems()``.

    >>> from_table({"type": "sgd", "learning_rate": {"type": "constant", "rate": 0.5}}, OPTIMIZERS, "optimizer")
    SGD(learning_rate=Constant(rate=0.5), momentum=0.0, nesterov=False)
    """
    if not isinstance(table, Mapping):
        raise InputError(f"{where} must be a table with a type, got {table!r}")
    name = table.get("type", default)
    if not isinstance(name, str) or name not in kinds:
        found = "is missing" if name is None else f"is unknown: {name!r}"
        raise InputError(f"{where}.type {found}; {nearest(str(name), kinds)}")
    values = {key: value for key, value in table.items() if key != "type"}
    return build(kinds[name], values, where)


def build(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """``cls(**values)`` with lists as tuples and tables as schedules. Raises InputError with every violation."""
    names = [f.name for f in fields(cls)]
    problems = [f"unknown key {where}.{key}; {nearest(key, names)}" for key in values if key not in names]
    missing = [f.name for f in fields(cls) if _required(f) and f.name not in values]
    problems += [f"{where}.{name} is missing" for name in missing]
    arguments: Table = {}
    for name in (n for n in names if n in values):
        try:
            arguments[name] = _given(name, values[name], f"{where}.{name}")
        except InputError as error:
            problems += error.problems
            missing += [f.name for f in fields(cls) if _required(f) and f.name == name]
    if not problems:
        return cls(**arguments)
    if not missing:  # what else is wrong with it belongs into the same message
        problems += [f"{where}.{sentence}" for sentence in cls(**arguments).problems()]
    raise InputError(problems)


def _given(name: str, value: Any, where: str) -> Any:
    """The inverse of ``plain``: lists as tuples; tables as schedules, where a field can be one."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Mapping) and name in _SCHEDULED:
        return from_table(value, SCHEDULES, where)
    return value


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def model_to_dict(model: Model) -> Table:
    """The model's hyperparameters as the ``[model]`` section, for a manifest.

    >>> model_to_dict(LogisticRegression(l2=0.1))
    {'type': 'logistic_regression', 'l2': 0.1, 'init_scale': 0.01}
    """
    return to_table(model, MODELS)


def model_from_dict(table: Mapping[str, Any]) -> Model:
    """The model that ``model_to_dict`` wrote. Raises InputError where it is not one."""
    return cast(Model, from_table(table, MODELS, "model"))
