"""Stochastic gradient descent on tables, scaled across machines with Ray: the same bytes on one core or on many.

    result = raysgd.Trainer(model=raysgd.LogisticRegression(), data=raysgd.ArrowDataset("train", label="late")).fit()
    model = raysgd.load("runs/flights")

``import raysgd`` loads nothing but this file: each name comes from its own module when it is first used, and Ray
with the first Trainer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysgd.data.dataset import ArrowDataset
    from raysgd.errors import CheckpointError, DivergedError, InputError, RaysgdError, RunError
    from raysgd.fitted import FittedModel, load
    from raysgd.learn.models import (
        MLP,
        FactorizationMachine,
        HashedLogisticRegression,
        LinearRegression,
        LogisticRegression,
        SoftmaxRegression,
    )
    from raysgd.learn.schedules import Constant, CosineDecay, ExponentialDecay, InverseTimeDecay, StepDecay, WarmUp
    from raysgd.learn.transforms import FTRL, SGD, AdaGrad
    from raysgd.runtime.trainer import Result, Trainer
    from raysgd.spec import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

__all__ = [
    "FTRL",
    "MLP",
    "SGD",
    "AdaGrad",
    "ArrowDataset",
    "CheckpointConfig",
    "CheckpointError",
    "Constant",
    "CosineDecay",
    "DivergedError",
    "ExponentialDecay",
    "FactorizationMachine",
    "FailureConfig",
    "FittedModel",
    "HashedLogisticRegression",
    "InputError",
    "InverseTimeDecay",
    "LinearRegression",
    "LogisticRegression",
    "RaysgdError",
    "Result",
    "RunConfig",
    "RunError",
    "ScalingConfig",
    "SoftmaxRegression",
    "StepDecay",
    "Trainer",
    "WarmUp",
    "load",
]

#: Where each public name comes from.
_HOMES = {
    "raysgd.data.dataset": ("ArrowDataset",),
    "raysgd.errors": ("CheckpointError", "DivergedError", "InputError", "RaysgdError", "RunError"),
    "raysgd.fitted": ("FittedModel", "load"),
    "raysgd.learn.models": (
        "MLP",
        "FactorizationMachine",
        "HashedLogisticRegression",
        "LinearRegression",
        "LogisticRegression",
        "SoftmaxRegression",
    ),
    "raysgd.learn.schedules": (
        "Constant",
        "CosineDecay",
        "ExponentialDecay",
        "InverseTimeDecay",
        "StepDecay",
        "WarmUp",
    ),
    "raysgd.learn.transforms": ("FTRL", "SGD", "AdaGrad"),
    "raysgd.runtime.trainer": ("Result", "Trainer"),
    "raysgd.spec": ("CheckpointConfig", "FailureConfig", "RunConfig", "ScalingConfig"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """The public name from its own module, loaded now."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'raysgd' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
