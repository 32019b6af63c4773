"""One server's half: fence, dedup, sum along the tree, apply, seal.

    push ─▶ malformed? ─▶ fenced? ─▶ duplicate? early? ─▶ TreeSum ─ complete ─▶ t+1 beside t ─ finite ─▶ sealed

Two generations. Version t+1 is written into the buffer of t-1 while t stays whole. When may t-1 go? A worker
pushes for step t only after it pulled version t from *every* shard, so the complete set of pushes for step t,
without which t+1 is not written, proves that all shards sealed t: step t-1 is committed everywhere and no one will
need to return to version t-1. The pushes themselves are the witnesses; servers exchange nothing.

But where the gradient's norm is limited: then a complete shard says its sums of squares (``outbox``) and waits for
those of all others. "Step" here is a round: see :class:`~raysgd.protocol.rounds.Rounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from raysgd.learn.batch import Float32, Float64
from raysgd.learn.parameters import Range
from raysgd.protocol.consistency import Consistency
from raysgd.protocol.gate import Commit, Gate
from raysgd.protocol.generation import Generation
from raysgd.protocol.messages import Gone, Halted, Norms, NotYet, Pull, Pulled, Push, PushReply, Verdict
from raysgd.protocol.replica import Applied, Copied, Copy, Sealed
from raysgd.protocol.tree import Order, Partial, TreeSum, add_up, additions, is_node
from raysgd.protocol.update import Rule, Update, clip_factor


class ServerShard(Gate[TreeSum]):
    """The state machine of one server shard under BSP: requests in, replies out; it never waits."""

    #: generations of parameters that are kept
    BUFFERS = 2

    def __init__(
        self,
        index: int,
        rule: Rule,
        penalized: npt.NDArray[np.bool_],
        *,
        n_virtual: int,
        generation: Generation,
        n_shards: int = 1,
        width: int = 1,
        consistency: Consistency | None = None,
        buffers: Sequence[Float32] | None = None,
        state: Sequence[dict[str, Float32]] | None = None,
        on_write: Callable[[int], None] | None = None,
        previous: Generation | None = None,
        commits: Sequence[Commit] = (),
        last_norms: tuple[int, Float64] | None = None,
        on_norms: Callable[[int, Float64], None] | None = None,
    ) -> None:
        """Begin at ``generation``; the successor of a shard that died also at the one before, where that was whole.

        buffers: where parameters are kept, ``BUFFERS`` of (len(shard),) float32; :attr:`sequence` says which
        state: the same for the optimizer's state
        on_write: called with a sequence number before its buffer is written to
        n_shards, width: of the whole model, for the gradient's norm
        commits: what the one that died had committed and not told
        last_norms: the step before ``generation`` and this shard's sums of squares of it: another may wait for them
        on_norms: called with these before a step is written
        """
        super().__init__(index, n_virtual, TreeSum(n_virtual), generation.step, consistency)
        self.commits += commits
        self.rule = rule
        self.n_shards = n_shards
        self.update = Update(rule, penalized, width)
        self._on_write = on_write
        self._generations = self._allocate(generation, previous, buffers, state)
        self._cells = [self.update.cells(g) for g in self._generations]
        #: generations written so far, the first included, begun at the step it is of; the newest lies at its remainder
        self.sequence = generation.step
        #: nodes as they came last, the same left to right, the places of these among those, and how to add them
        self._arranged: tuple[tuple[Range, ...], tuple[Range, ...], list[int], Order] = ((), (), [], ())
        #: sums of squares by shard, of the step at hand; and (step, this shard's own) of the step before
        self._norms: dict[int, Float64] = {}
        self._last_norms: tuple[int, Float64] | None = None
        self._on_norms = on_norms
        if last_norms is not None:
            self._note_norms(*last_norms)

    def _allocate(
        self,
        generation: Generation,
        previous: Generation | None,
        buffers: Sequence[Float32] | None,
        state: Sequence[dict[str, Float32]] | None,
    ) -> list[Generation]:
        """The generations to write in turn; those of ``generation`` and of ``previous`` hold them."""
        count, made = self.BUFFERS, []
        for i in range(count):
            params = np.empty_like(generation.params) if buffers is None else buffers[i]
            empty = (
                {slot: np.empty_like(array) for slot, array in generation.state.items()} if state is None else state[i]
            )
            made.append(Generation(-1, params, empty))  # of no step: scratch
        for given in (previous, generation):
            if given is not None:
                made[given.step % count].take(given)
        return made

    @property
    def version(self) -> int:
        """The newest sealed version."""
        return self._newest.step

    @property
    def has_previous(self) -> bool:
        """Whether the version before the newest is whole."""
        return self._previous.step >= 0

    @property
    def _newest(self) -> Generation:
        return self._generations[self.sequence % self.BUFFERS]

    @property
    def _previous(self) -> Generation:
        return self._generations[(self.sequence - 1) % self.BUFFERS]

    def push(self, push: Push) -> PushReply:
        """Judge one push and, when it completes its step, write and seal the next generation."""
        verdict = self._judge(push)
        if verdict is Verdict.ACCEPTED:
            self._accept(push)
        else:
            self.ask_norms()  # a worker waits: norms may have been lost
        return PushReply(self.index, push.step, push.node, verdict)

    def stands(self, nodes: Sequence[Range], incarnations: Sequence[tuple[int, ...]]) -> bool:
        """Whether pushes of exactly these nodes would be all that a step takes, and none of them fenced."""
        if any(not is_node(node, self.n_virtual) for node in nodes):
            return False
        leaves = sorted(v for node in nodes for v in range(node.begin, node.end))
        current = all(tuple(self.incarnations[n.slice]) == i for n, i in zip(nodes, incarnations, strict=True))
        return current and leaves == list(range(self.n_virtual))

    def push_all(self, nodes: Sequence[Range], incarnations: Sequence[tuple[int, ...]], sums: list[Partial]) -> bool:
        """All pushes of the step at hand at once, where :meth:`stands` holds for them; False: push them one by one."""
        if self.frozen or self.diverged is not None or self._pending.parts:
            return False
        self._pending.parts = dict(zip(nodes, sums, strict=True))
        self._pending_incarnations = dict(zip(nodes, incarnations, strict=True))
        self._complete()
        return True

    def pull(self, pull: Pull) -> Pulled | NotYet | Gone | Halted:
        """The parameters at exactly the version asked for."""
        for generation in (self._newest, self._previous):
            if self.told >= pull.version == generation.step >= 0:  # scratch is of none
                return Pulled(self.index, pull.version, generation.params.copy())
        if pull.version < self.version:
            held = self._previous.step
            return Gone(self.index, pull.version, oldest=held if held >= 0 else self.version)
        return self._later(pull.version)

    def copy(self) -> Copy:
        """All that a replica begins with; until it says that it has that, the shard goes on alone."""
        self.copied = None
        previous = self._previous.copy() if self.has_previous else None
        return Copy(self._newest.copy(), previous, list(self.commits), last_norms=self._last_norms)

    def copied_to(self, sequence: int) -> None:
        """A replica has begun with a copy: from now on a step is told to others when that has it, too.

        sequence: what the replica counts at the moment
        """
        self.copied = Copied(sequence)

    def follow(self, sealed: Sealed | Applied) -> int:
        """As a replica, take over a step that the primary sealed; the version that is here now.

        A step that is here already is passed over, and so is one that comes too early: it is said again.
        """
        assert isinstance(sealed, Sealed)
        step, commit = sealed.number, sealed.commit
        if step == self.version:
            finite = self._write(step, commit.rate, [sealed.gradient], (), factor=sealed.factor)
            assert finite, "the primary sealed it"
            self._seal(step, commit)
            if sealed.square_sums is not None:
                self._note_norms(step, sealed.square_sums)
            self._forget_commits()
        return self.version

    def ask_norms(self) -> None:
        """Where only others' sums of squares are missing, have them said again: such as to a successor of this shard,
        whose predecessor was told."""
        if self._pending.complete:
            self._say_norms(asks=True)

    def norms(self, norms: Norms) -> None:
        """Take another shard's sums of squares; answer where it is a step behind and asks."""
        if norms.step == self.version and self.rule.clip_norm is not None:
            self._norms[norms.shard] = norms.square_sums
            own = self._norms.get(self.index)
            if norms.asks and own is not None:
                self.outbox.append(Norms(self.index, norms.shard, norms.step, own))
            if self._pending.complete:
                self._complete()
        elif norms.asks and self._last_norms is not None and norms.step == self._last_norms[0]:
            self.outbox.append(Norms(self.index, norms.shard, *self._last_norms))

    def snapshot(self, version: int, part: Range | None = None) -> Generation:
        """A copy of one of the two generations, of all coordinates or some. KeyError where ``version`` is neither."""
        for generation in (self._newest, self._previous):
            if generation.step == version >= 0:
                return generation.copy() if part is None else generation.cut(part)
        raise KeyError(f"shard {self.index} holds versions {self._previous.step} and {self.version}, not {version}")

    def _shaped(self, push: Push) -> bool:
        gradient = push.partial.gradient
        return gradient is None or (gradient.shape == self._newest.params.shape and gradient.dtype == np.float32)

    def _accept(self, push: Push) -> None:  # noqa: ARG002 - where staleness is allowed it counts by itself
        if self._pending.complete:
            self._complete()

    def _complete(self) -> None:
        """Apply the step at hand, where its norm need not be known, or is."""
        factor = None
        if self.rule.clip_norm is not None:
            if self.index not in self._norms:
                _, parts, order = self._arrange()
                now = self._cells[self.sequence % self.BUFFERS]
                gradients = [p.gradient for p in parts]
                self._norms[self.index] = self.update.square_sums(self.version, gradients, order, now)
                self._say_norms()
            if len(self._norms) < self.n_shards:
                return
            factor = clip_factor([self._norms[i] for i in range(self.n_shards)], self.rule.clip_norm)
            self._note_norms(self.version, self._norms[self.index])
            self._norms = {}
        self._apply(factor)

    def _note_norms(self, step: int, square_sums: Float64) -> None:
        """Keep this shard's part of a step's norm: another may wait for it when the step is sealed here."""
        self._last_norms = step, square_sums
        if self._on_norms is not None:
            self._on_norms(step, square_sums)

    def _say_norms(self, asks: bool = False) -> None:
        """Tell the others this shard's sums of squares; ``asks``: those whose are missing, to have them again."""
        own = self._norms.get(self.index)
        if own is None:
            return
        others = [i for i in range(self.n_shards) if i != self.index and not (asks and i in self._norms)]
        self.outbox += [Norms(self.index, other, self.version, own, asks) for other in others]

    def _arrange(self) -> tuple[tuple[Range, ...], list[Partial], Order]:
        """The pending nodes, left to right, what they contribute, and how to add it along the tree."""
        given = tuple(self._pending.parts)
        if given != self._arranged[0]:  # step by step they are the same, and in the same order
            nodes = tuple(sorted(given))
            self._arranged = given, nodes, [given.index(n) for n in nodes], additions(self._pending.root, nodes)
        _, nodes, places, order = self._arranged
        parts = list(self._pending.parts.values())
        return nodes, [parts[i] for i in places], order

    def _apply(self, factor: np.float32 | None) -> None:
        """Write generation t+1 into the buffers of t-1 and seal it if it is finite."""
        step, (nodes, parts, order) = self.version, self._arrange()
        rate, gradients = self._rate(step), [p.gradient for p in parts]
        loss = add_up([p.loss for p in parts], order)
        if self.copied is not None:
            gradients, order = [self.update.summed(gradients, order)], ()
        if not self._write(step, rate, gradients, order, factor=factor):
            self.diverged = step
            return
        told = tuple((n, self._pending_incarnations[n], p.rows) for n, p in zip(nodes, parts, strict=True))
        commit = Commit(step, loss, sum(p.rows for p in parts), rate, told)
        self._seal(step, commit)
        if self.copied is not None:
            square_sums = None if self._last_norms is None else self._last_norms[1]
            self.copied.say(Sealed(self.index, gradients[0], commit, factor, square_sums))
        self._pending.parts = {}
        self._pending_incarnations = {}

    def _seal(self, step: int, commit: Commit) -> None:
        """What was written is version ``step`` + 1."""
        self._newest.step = step + 1
        self.clocks.advance(self._pending.root)
        self.commits.append(commit)

    def _rate(self, step: int) -> float:
        return self.rule.rate(self.rule.rounds.begin(step))

    def _write(
        self,
        step: int,
        rate: float,
        gradients: Sequence[Float32 | None],
        order: Sequence[tuple[int, int]],
        *,
        share: float = 1.0,
        factor: np.float32 | None = None,
    ) -> bool:
        """Write the next generation; it becomes the newest if it is finite. The caller gives it its step."""
        after = self.sequence + 1
        if self._on_write is not None:
            self._on_write(after)
        target = self._generations[after % self.BUFFERS]
        target.step = -1  # neither generation: what it holds meanwhile is not a state
        now, into = self._cells[self.sequence % self.BUFFERS], self._cells[after % self.BUFFERS]
        if not self.update.write(step, rate, gradients, order, now, into, share=share, factor=factor):
            return False
        self.sequence = after
        return True
