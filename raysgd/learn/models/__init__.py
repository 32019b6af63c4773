"""The model families, one file each, and the protocol that users' own models follow."""

from raysgd.learn.models.base import Model, ValueAndGrad
from raysgd.learn.models.hashed import FactorizationMachine, HashedLogisticRegression
from raysgd.learn.models.linear import LinearRegression, LogisticRegression, SoftmaxRegression
from raysgd.learn.models.mlp import MLP

__all__ = [
    "MLP",
    "FactorizationMachine",
    "HashedLogisticRegression",
    "LinearRegression",
    "LogisticRegression",
    "Model",
    "SoftmaxRegression",
    "ValueAndGrad",
]
