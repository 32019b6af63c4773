"""Update rules: from the gradient and generation t to generation t + 1.

Every rule is elementwise, so cutting the vector into shards or blocks anywhere cannot change a bit. Generation t
(parameters and slots) is only read; generation t + 1 is written beside it, so a server killed in the middle of
an update has lost nothing. No temporary is made. What overflows warns, unless the caller has numpy ignore it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from raysgd.learn.batch import Float32
from raysgd.learn.checks import flag_problems, float32_problems
from raysgd.learn.schedules import Constant, Schedule, rate_problems


@runtime_checkable
class Transform(Protocol):
    """An elementwise update rule with its learning rate."""

    @property
    def learning_rate(self) -> float | Schedule: ...

    @property
    def shows(self) -> bool:
        """Whether state that is not finite always makes the parameters so, in the same step."""
        ...

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the optimizer state, each a float32 vector like the parameters that starts as zeros."""
        ...

    def problems(self) -> list[str]:
        """Every violation, one sentence each, beginning with the field's name."""
        ...

    def update(
        self,
        gradient: Float32,
        rate: np.float32,
        params: Float32,
        state: Mapping[str, Float32],
        new_params: Float32,
        new_state: Mapping[str, Float32],
    ) -> None:
        """Write generation t + 1 into ``new_params``, ``new_state``.

        gradient: (n,) float32, the mean gradient with L2; may be overwritten
        params, state[slot]: (n,) float32, generation t, only read
        new_params, new_state[slot]: (n,) float32, written; no memory in common with generation t
        """
        ...

    def part(self, share: float) -> tuple[Transform, float]:
        """The rule for a push that is ``share`` of a step (0 to 1], and a factor of the rate: where pushes are applied
        one by one, all of a step's together decay the state as the rule decays it once."""
        ...


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum, as in PyTorch.

    ``M <- momentum * M + g``, ``w <- w - rate * M``; with ``nesterov``, ``w <- w - rate * (g + momentum * M)``;
    without momentum, ``w <- w - rate * g`` and no slot.

    Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum", ICML 2013.

    >>> w, new = np.array([1.0], np.float32), np.empty(1, np.float32)
    >>> SGD().update(np.array([2.0], np.float32), np.float32(0.25), w, {}, new, {})
    >>> new
    array([0.5], dtype=float32)
    """

    learning_rate: float | Schedule = 0.1
    momentum: float = 0.0
    nesterov: bool = False

    @property
    def shows(self) -> bool:
        return True

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum > 0 else ()

    def problems(self) -> list[str]:
        found = rate_problems("learning_rate", self.learning_rate)
        found += (momentum := float32_problems("momentum", self.momentum, at_least=0, below=1))
        found += flag_problems("nesterov", self.nesterov)
        if self.nesterov is True and not momentum and self.momentum == 0:
            found.append("nesterov needs momentum in (0, 1), got momentum 0: set momentum or leave nesterov out")
        return found

    def update(
        self,
        gradient: Float32,
        rate: np.float32,
        params: Float32,
        state: Mapping[str, Float32],
        new_params: Float32,
        new_state: Mapping[str, Float32],
    ) -> None:
        # The step is made in the gradient's memory, which is in the cache, and the new parameters are written once.
        step = gradient
        if self.momentum == 0:
            np.multiply(gradient, rate, out=step)
        else:
            momentum, trace = np.float32(self.momentum), new_state["momentum"]
            np.multiply(state["momentum"], momentum, out=trace)
            np.add(trace, gradient, out=trace)
            if self.nesterov:
                np.multiply(trace, momentum, out=new_params)
                np.add(gradient, new_params, out=step)
                np.multiply(step, rate, out=step)
            else:
                np.multiply(trace, rate, out=step)
        np.subtract(params, step, out=new_params)

    def part(self, share: float) -> tuple[SGD, float]:
        """``M <- mu^s M + g``, ``w <- w - rate (1 - mu^s) / (1 - mu) M`` for a push that is s of a step.

        A step's pushes decay M by mu in all, and each gradient moves the parameters by rate / (1 - mu) times itself in
        the end, into however many pushes the step is cut: without this scaling four workers with momentum 0.9 diverge.

        >>> SGD(momentum=0.0).part(0.25)[1], round(SGD(momentum=0.81).part(0.5)[1], 6)
        (1.0, 0.526316)
        """
        if share == 1 or self.momentum == 0:
            return self, 1.0
        momentum = self.momentum**share
        return replace(self, momentum=momentum), (1 - momentum) / (1 - self.momentum)


@dataclass(frozen=True)
class AdaGrad:
    """``A <- A + g^2``, ``w <- w - rate * g / (sqrt(A) + epsilon)``; A starts at zero.

    Source: Duchi, Hazan, Singer, "Adaptive subgradient methods", JMLR 12, 2011.

    >>> w, A = np.ones(1, np.float32), np.zeros(1, np.float32)
    >>> new, new_A = np.empty_like(w), np.empty_like(A)
    >>> g = np.array([2.0], np.float32)
    >>> AdaGrad().update(g, np.float32(0.5), w, {"accumulator": A}, new, {"accumulator": new_A})
    >>> new, new_A
    (array([0.5], dtype=float32), array([4.], dtype=float32))
    """

    learning_rate: float | Schedule = 0.1
    epsilon: float = 1e-10

    #: of a step, that a gradient is
    share: ClassVar[float] = 1.0

    @property
    def shows(self) -> bool:
        return False  # a square that overflows divides the step to nothing

    @property
    def slots(self) -> tuple[str, ...]:
        return ("accumulator",)

    def problems(self) -> list[str]:
        return rate_problems("learning_rate", self.learning_rate) + float32_problems("epsilon", self.epsilon, above=0)

    def update(
        self,
        gradient: Float32,
        rate: np.float32,
        params: Float32,
        state: Mapping[str, Float32],
        new_params: Float32,
        new_state: Mapping[str, Float32],
    ) -> None:
        accumulator = new_state["accumulator"]
        np.multiply(gradient, gradient, out=accumulator)
        if self.share != 1:
            np.divide(accumulator, np.float32(self.share), out=accumulator)
        np.add(state["accumulator"], accumulator, out=accumulator)
        np.sqrt(accumulator, out=new_params)
        np.add(new_params, np.float32(self.epsilon), out=new_params)
        step = np.divide(gradient, new_params, out=gradient)
        np.multiply(step, rate, out=step)
        np.subtract(params, step, out=new_params)

    def part(self, share: float) -> tuple[AdaGrad, float]:
        """``A <- A + g^2 / s`` for a push that is s of a step: equal pushes add up to the square of their sum.

        >>> AdaGrad().part(0.5)[0].share, AdaGrad().part(1.0)[0] == AdaGrad()
        (0.5, True)
        """
        return (self if share == 1 else _AdaGradPart(self.learning_rate, self.epsilon, share)), 1.0


@dataclass(frozen=True)
class _AdaGradPart(AdaGrad):
    """AdaGrad for pushes that are ``share`` of a step each."""

    share: float = 1.0  # type: ignore[misc]  # what is the class's there is this one's own


@dataclass(frozen=True)
class FTRL:
    """FTRL-proximal: gradient descent with AdaGrad's rates, and weights that an L1 penalty holds at exactly zero.

    ``sigma = (sqrt(n + g^2) - sqrt(n)) / alpha``, ``z <- z + g - sigma * w``, ``n <- n + g^2``; then
    ``w = 0`` where ``|z| <= l1``, else ``w = -(z - sign(z) * l1) / ((beta + sqrt(n)) / alpha + l2)``.

    alpha is ``learning_rate``, a constant: the rates decay by themselves. z and n start at zero, and the weights follow
    from them: an initial weight counts in the first gradient alone. l1, l2: penalties on the sum of the steps' mean
    losses, biases included; exact also where a step touches few weights.

    Source: McMahan et al., "Ad click prediction: a view from the trenches", KDD 2013, algorithm 1.

    >>> w, state = np.zeros(1, np.float32), {slot: np.zeros(1, np.float32) for slot in FTRL().slots}
    >>> new, new_state = np.empty_like(w), {slot: np.empty_like(w) for slot in state}
    >>> FTRL(l1=1.0).update(np.array([3.0], np.float32), np.float32(0.5), w, state, new, new_state)
    >>> new, new_state["z"], new_state["n"]
    (array([-0.25], dtype=float32), array([3.], dtype=float32), array([9.], dtype=float32))
    """

    learning_rate: float | Schedule = 0.1
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    @property
    def shows(self) -> bool:
        return False  # a square that overflows divides the weight to nothing

    @property
    def slots(self) -> tuple[str, ...]:
        return ("n", "z")

    def problems(self) -> list[str]:
        found = rate_problems("learning_rate", self.learning_rate)
        if not found and not isinstance(self.learning_rate, Constant | Real):
            given = f"got {self.learning_rate!r}"
            found = [f"learning_rate must be a constant for ftrl, whose rates decay by themselves, {given}"]
        for name in ("beta", "l1", "l2"):
            found += float32_problems(name, getattr(self, name), at_least=0)
        return found

    def update(
        self,
        gradient: Float32,
        rate: np.float32,
        params: Float32,
        state: Mapping[str, Float32],
        new_params: Float32,
        new_state: Mapping[str, Float32],
    ) -> None:
        alpha, root = rate, new_params
        n, z = new_state["n"], new_state["z"]
        np.multiply(gradient, gradient, out=n)
        np.add(n, state["n"], out=n)
        np.sqrt(n, out=root)
        np.sqrt(state["n"], out=z)
        np.subtract(root, z, out=z)
        np.divide(z, alpha, out=z)  # sigma
        np.multiply(z, params, out=z)
        np.subtract(gradient, z, out=z)
        np.add(state["z"], z, out=z)
        np.add(root, np.float32(self.beta), out=root)
        np.divide(root, alpha, out=root)
        np.add(root, np.float32(self.l2), out=root)
        # z less its part within [-l1, l1], so 0 where |z| <= l1
        np.clip(z, np.float32(-self.l1), np.float32(self.l1), out=gradient)
        np.subtract(gradient, z, out=gradient)
        np.divide(gradient, root, out=root, where=gradient != 0)
        np.copyto(root, np.float32(0), where=gradient == 0)

    def part(self, share: float) -> tuple[FTRL, float]:
        """Whole steps only: a run with staleness refuses it."""
        assert share == 1, share
        return self, 1.0
