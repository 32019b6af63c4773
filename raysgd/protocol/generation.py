"""Parameters and optimizer state after a number of steps: of one shard, or of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from raysgd.learn.batch import Float32
from raysgd.learn.parameters import Range


@dataclass(slots=True)
class Generation:
    """``step`` steps are in it. params, and each array of state: (n,) float32, n the shard's or the model's size."""

    step: int
    params: Float32
    state: dict[str, Float32] = field(default_factory=dict)

    def copy(self) -> Generation:
        return Generation(self.step, self.params.copy(), {k: v.copy() for k, v in self.state.items()})

    def take(self, other: Generation) -> None:
        """Become a copy of another of the same size, in the memory that is here."""
        self.step = other.step
        self.params[...] = other.params
        for slot, array in other.state.items():
            self.state[slot][...] = array

    def cut(self, span: Range) -> Generation:
        """A copy of one shard's part of a whole generation."""
        return Generation(self.step, self.params[span.slice], {k: v[span.slice] for k, v in self.state.items()}).copy()

    def block(self, part: slice) -> Generation:
        """Views of some coordinates."""
        return Generation(self.step, self.params[part], {k: v[part] for k, v in self.state.items()})

    def release(self) -> None:
        """Forget the arrays: whoever needs them has copies."""
        self.params, self.state = np.empty(0, np.float32), {}

    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(map(finite, (self.params, *self.state.values())))

    def digest(self) -> str:
        """SHA-256 over the step and the whole arrays: for a whole model it cannot depend on the sharding.

        The bytes hashed: ``step=<decimal>``, then for ``params`` and each state array in order of name:
        newline, name, newline, the float32 values little-endian.
        """
        hasher = sha256(f"step={self.step}".encode())
        for name, array in [("params", self.params), *sorted(self.state.items())]:
            hasher.update(f"\n{name}\n".encode())
            hasher.update(np.ascontiguousarray(array, dtype="<f4").data)
        return hasher.hexdigest()


def finite(values: Float32) -> bool:
    # A finite sum of squares has finite terms, at the speed of BLAS; only large numbers need the second look.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values @ values)) or bool(np.isfinite(values).all())


def join(shards: Sequence[Generation]) -> Generation:
    """The whole generation from its shards, in shard order; all must be of the same step."""
    steps = {g.step for g in shards}
    assert len(steps) == 1, f"shards of different steps: {sorted(steps)}"
    state = {name: np.concatenate([g.state[name] for g in shards]) for name in shards[0].state}
    return Generation(steps.pop(), np.concatenate([g.params for g in shards]), state)
