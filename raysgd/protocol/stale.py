"""A server shard where staleness is allowed: every push is applied when it comes (SSP, ASP).

    push ─▶ malformed? fenced? ─▶ its virtual workers' next step? read recently enough? ─▶ applied at once, clocks + 1

The version is the minimum of the clocks: the steps that are in the parameters from every virtual worker. A push is
divided by the planned rows of its whole step and decays the optimizer's state by its share of the step, so the steps
add up to those of BSP whatever their order (unscaled, four workers with momentum 0.9 diverge). The learning rate
follows the minimum: completed steps, never pushes.

Three buffers of parameters: a reader that has begun to copy the newest has a whole push's time before it is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from raysgd.learn.batch import Int64
from raysgd.learn.parameters import Range
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.gate import Commit, Tagged
from raysgd.protocol.generation import Generation
from raysgd.protocol.messages import Halted, NotYet, Pull, Pulled, Push, Verdict
from raysgd.protocol.replica import Applied, Copied, Copy, Sealed
from raysgd.protocol.shard import ServerShard
from raysgd.protocol.tally import CARRIED, Part, Tally


def shard_class(consistency: Consistency) -> type[ServerShard]:
    """The state machine that serves this consistency."""
    return ServerShard if consistency.exact else StaleShard


@dataclass(slots=True)
class _Round:
    """What was accepted of one step so far."""

    loss: float = 0.0
    rows: int = 0
    staleness: int = 0
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def of(cls, commit: Commit) -> _Round:
        return cls(commit.loss, commit.rows, commit.staleness, list(commit.parts))

    def add(self, push: Push) -> None:
        self.loss += push.partial.loss
        self.rows += push.partial.rows
        self.staleness = max(self.staleness, push.step - push.read)
        self.parts.append((push.node, push.incarnations, push.partial.rows))

    def commit(self, step: int, rate: float) -> Commit:
        return Commit(step, self.loss, self.rows, rate, tuple(sorted(self.parts)), self.staleness)


class StaleShard(ServerShard):
    """The state machine of one server shard under SSP and ASP.

    tally: what is in the generation that it begins with; default: every virtual worker's steps up to the generation's
    on_seal: called with each push that was applied and the sequence number of its buffer, which is whole then
    """

    BUFFERS = 3

    def __init__(
        self,
        *arguments: Any,
        tally: Tally | None = None,
        on_seal: Callable[[int, Push, Int64], None] | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._rounds: dict[int, _Round] = {}
        #: of a replica: pushes by their number that came before others
        self._early: dict[int, Push] = {}
        self._on_seal = on_seal
        if tally is not None:
            self.clocks.steps[:] = tally.clocks
            for commit in tally.rounds:
                self._rounds[commit.step] = _Round.of(commit)
            self._commit(min((commit.step for commit in tally.rounds), default=self.version))

    @property
    def version(self) -> int:
        """Steps that every virtual worker has committed."""
        return self.clocks.minimum

    @property
    def told_clocks(self) -> Int64:
        """As of every shard; not beyond what the replica holds, too."""
        held = self.clocks.steps if self.copied is None else self.copied.clocks
        assert held is not None
        steps: Int64 = held.copy()
        return steps

    @property
    def held_clocks(self) -> Int64:
        """As they are here, whatever the replica holds: a push that counts for some of a node cannot be taken again."""
        steps: Int64 = self.clocks.steps.copy()
        return steps

    @property
    def told(self) -> int:
        """As of every shard: what the replica holds, too."""
        return self.version if self.copied is None else int(self.told_clocks.min())

    def tally(self) -> Tally:
        """What is in the arrays: of steps that the driver was told of no more than the clocks."""
        open_rounds = (self._rounds[step].commit(step, self._rate(step)) for step in sorted(self._rounds))
        return Tally(tuple(self.clocks.steps.tolist()), (*self.commits, *open_rounds))

    def fence(self, run: Range, incarnation: int) -> int:
        """As of every shard. What a checkpoint or a successor carried over is from now on this incarnation's."""
        begin = super().fence(run, incarnation)
        for record in self._rounds.values():
            record.parts = [self._answered(part, run) for part in record.parts]
        self.commits = [c._replace(parts=tuple(self._answered(part, run) for part in c.parts)) for c in self.commits]
        return begin

    def _answered(self, part: Part, run: Range) -> Part:
        """A part of a round, under the incarnations that hold now for those of ``run`` whose part was carried over."""
        node, incarnations, rows = part
        if CARRIED not in incarnations:
            return part
        leaves = zip(range(node.begin, node.end), incarnations, strict=True)
        held = self.incarnations
        return node, tuple(held[v] if i == CARRIED and run.begin <= v < run.end else i for v, i in leaves), rows

    def drain(self, since: int) -> list[Commit]:
        """As of every shard; not what was carried over and nobody answers for yet."""
        told = super().drain(since)
        return list(takewhile(lambda c: not any(CARRIED in incarnations for _, incarnations, _ in c.parts), told))

    def stands(self, nodes: Sequence[Range], incarnations: Sequence[tuple[int, ...]]) -> bool:  # noqa: ARG002
        """Never: pushes are applied one by one."""
        return False

    def pull(self, pull: Pull) -> Pulled | NotYet | Halted:
        """The newest parameters, if they have the version asked for."""
        version = self.told
        if version >= pull.version:
            return Pulled(self.index, version, self._newest.params.copy())
        return self._later(pull.version)

    def snapshot(self, version: int, part: Range | None = None) -> Generation:
        """A copy, where all virtual workers stand at ``version``. KeyError elsewhere: it holds parts of later steps."""
        clocks = self.clocks.steps
        if int(clocks.min()) != version or int(clocks.max()) != version:
            raise KeyError(f"shard {self.index} is at steps {clocks.min()} to {clocks.max()}, not at {version}")
        return self.cut(part)

    def cut(self, part: Range | None = None) -> Generation:
        """A copy of the newest parameters and state, of which :meth:`tally` says what is in them."""
        copy = self._newest.copy() if part is None else self._newest.cut(part)
        copy.step = self.version
        return copy

    def copy(self) -> Copy:
        """All that a replica begins with; until it says that it has that, the shard goes on alone."""
        self.copied = None
        return Copy(self.cut(), None, [], self.tally())

    def copied_to(self, sequence: int) -> None:
        """As of every shard; the replica holds the same steps of the same virtual workers."""
        self.copied = Copied(sequence, self.clocks.steps.copy())

    def follow(self, sealed: Sealed | Applied) -> int:
        """As a replica, take over a push that the primary applied; how many were taken over, from the begin's step on.

        One that is here already is passed over; one that comes too early waits for those before it.
        """
        assert isinstance(sealed, Applied)
        if sealed.number >= self.sequence:
            self._early[sealed.number] = sealed.push
        while (push := self._early.pop(self.sequence, None)) is not None:
            self._accept(push)
            assert self.diverged is None, "the primary applied it"
        self._forget_commits()
        return self.sequence

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
        if self._on_seal is not None:
            self._on_seal(self.sequence, push, self.clocks.steps)
        if self.copied is not None:
            self.copied.say(Applied(self.index, self.copied.next, _kept(push)))
        self._commit(before)

    def _commit(self, before: int) -> None:
        """Steps from ``before`` on that are complete now are committed."""
        self._newest.step = self.version
        for step in range(before, self.version):
            self.commits.append(self._rounds.pop(step).commit(step, self._rate(step)))


def _kept(push: Push) -> Push:
    """The push with a gradient of its own: the memory that it came in is written over."""
    gradient = push.partial.gradient
    return push if gradient is None else replace(push, partial=replace(push.partial, gradient=gradient.copy()))
