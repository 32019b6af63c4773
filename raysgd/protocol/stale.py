"""A server shard where staleness is allowed: every push is applied when it comes (SSP, ASP).

    push ─▶ malformed? fenced? ─▶ its virtual workers' next step? read recently enough? ─▶ applied at once, clocks + 1

The version is the minimum of the clocks: the steps that are in the parameters from every virtual worker. A push is
divided by the planned rows of its whole step and decays the optimizer's state by its share of the step, so the steps
add up to those of BSP whatever their order (unscaled, four workers with momentum 0.9 diverge). The learning rate
follows the minimum: completed steps, never pushes.

Three buffers of parameters: a reader that has begun to copy the newest has a whole push's time before it is written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raysgd.learn.parameters import Range
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.gate import Commit, Tagged
from raysgd.protocol.generation import Generation
from raysgd.protocol.messages import Halted, NotYet, Pull, Pulled, Push, Verdict
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.update import Rule


def shard_class(consistency: Consistency) -> type[ServerShard]:
    """The state machine that serves this consistency."""
    return ServerShard if consistency.exact else StaleShard


def succeeds(consistency: Consistency, rule: Rule, n_shards: int) -> bool:
    """Whether the memory of a dense shard that died is enough for a successor; else all shards go back to a checkpoint.

    Not where staleness is allowed: a generation does not say which virtual workers' later steps are in it. Not where
    shards limit the gradient's norm together: one that sealed a step is the only one that knows its part of that norm,
    for which another may still wait.
    """
    return consistency.exact and (rule.clip_norm is None or n_shards == 1)


class _Round:
    """What was accepted of one step so far."""

    def __init__(self) -> None:
        self.loss, self.rows, self.staleness = 0.0, 0, 0
        self.parts: list[tuple[Range, tuple[int, ...], int]] = []

    def add(self, push: Push) -> None:
        self.loss += push.partial.loss
        self.rows += push.partial.rows
        self.staleness = max(self.staleness, push.step - push.read)
        self.parts.append((push.node, push.incarnations, push.partial.rows))


class StaleShard(ServerShard):
    """The state machine of one server shard under SSP and ASP."""

    BUFFERS = 3

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._rounds: dict[int, _Round] = {}

    @property
    def version(self) -> int:
        """Steps that every virtual worker has committed."""
        return self.clocks.minimum

    def stands(self, nodes: Sequence[Range], incarnations: Sequence[tuple[int, ...]]) -> bool:  # noqa: ARG002
        """Never: pushes are applied one by one."""
        return False

    def pull(self, pull: Pull) -> Pulled | NotYet | Halted:
        """The newest parameters, if they have the version asked for."""
        version = self.version
        if version >= pull.version:
            return Pulled(self.index, version, self._newest.params.copy())
        return self._later(pull.version)

    def snapshot(self, version: int, part: Range | None = None) -> Generation:
        """A copy, where all virtual workers stand at ``version``. KeyError elsewhere: it holds parts of later steps."""
        clocks = self.clocks.steps
        if int(clocks.min()) != version or int(clocks.max()) != version:
            raise KeyError(f"shard {self.index} is at steps {clocks.min()} to {clocks.max()}, not at {version}")
        copy = self._newest.copy() if part is None else self._newest.cut(part)
        copy.step = version
        return copy

    def _timely(self, push: Tagged) -> Verdict:
        """Whether the push is the next of all its virtual workers, computed from a version that is new enough."""
        clocks = self.clocks.steps[push.node.slice]
        first, last = int(clocks.min()), int(clocks.max())
        if push.step < first:
            return Verdict.DUPLICATE
        if self.frozen or self.diverged is not None:
            return Verdict.FROZEN
        if push.step > last:
            return Verdict.EARLY
        if first != last:
            return Verdict.MALFORMED  # counted for some of them: their sum cannot be taken apart
        return Verdict.ACCEPTED if self.consistency.admits(push.step, push.read) else Verdict.STALE

    def _accept(self, push: Push) -> None:
        before, share = self.version, len(push.node) / self.n_virtual
        if not self._write(push.step, self._rate(before), [push.partial.gradient], (), share=share):
            self.diverged = push.step
            return
        self._rounds.setdefault(push.step, _Round()).add(push)
        self.clocks.advance(push.node)
        self._newest.step = self.version
        for step in range(before, self.version):
            done = self._rounds.pop(step)
            parts = tuple(sorted(done.parts))
            self.commits.append(Commit(step, done.loss, done.rows, self._rate(step), parts, done.staleness))
