"""What a model is to the rest of the system: hyperparameters that bind to a table's shape, and a gradient.

    LogisticRegression(l2=1e-4) --bind(inputs, target)--> value_and_grad(params, batch, out) -> loss sum

The left side is what users write and what a run stores. The right side is what workers call: it owns no
parameters, so the servers may cut the flat vector as they like.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from raysgd.errors import InputError
from raysgd.learn.batch import Batch, Float32, Inputs, Target
from raysgd.learn.losses import Loss, TargetKind
from raysgd.learn.parameters import Layout


@runtime_checkable
class ValueAndGrad(Protocol):
    """A model bound to inputs and a target: pure functions of (params, batch). Pickles."""

    @property
    def layout(self) -> Layout: ...

    @property
    def loss(self) -> Loss: ...

    @property
    def inputs(self) -> Inputs: ...

    def initial(self, seed: int) -> Float32:
        """(n_params,) float32: the parameters before step 0, a pure function of the seed."""
        ...

    def value_and_grad(self, params: Float32, batch: Batch, out: Float32) -> float:
        """The weighted sum of the rows' losses; its gradient overwrites ``out``. No L2: the servers add it.

        params, out: (n_params,) float32, without memory in common
        """
        ...

    def scores(self, params: Float32, batch: Batch) -> Float32:
        """(n_rows, k) float32: what the loss judges. ``batch.label`` is not read."""
        ...


@runtime_checkable
class Model(Protocol):
    """The hyperparameters of a model: a frozen dataclass."""

    @property
    def l2(self) -> float: ...

    @property
    def target_kind(self) -> TargetKind:
        """What a label is encoded as: a class index or a number."""
        ...

    def problems(self) -> list[str]:
        """Every violation, one sentence each, beginning with the field's name."""
        ...

    def bind(self, inputs: Inputs, target: Target) -> ValueAndGrad:
        """The model for a table of this shape. Raises InputError where the target does not fit."""
        ...


def refuse_unfit(model: Model, loss: Loss, target: Target) -> None:
    """Raises InputError with every reason why ``model`` cannot be bound to ``target``."""
    if problems := model.problems() + loss.target_problems(target):
        raise InputError(problems)
