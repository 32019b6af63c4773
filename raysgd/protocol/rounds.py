"""Rounds: what one push covers. With one local step a round is a step; with H of them a round is up to H steps.

    epoch of 10 steps, H = 4      |0 1 2 3|4 5 6 7|8 9|10 11 12 13|...
    rounds                         0       1       2   3

No round crosses the end of an epoch. Versions, clocks and pushes count rounds; people, schedules, the data's order and
checkpoints count steps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rounds:
    """``local_steps``: steps a round (H), the last round of an epoch may have fewer.

    >>> rounds = Rounds(local_steps=4, steps_per_epoch=10)
    >>> [rounds.steps(r) for r in range(4)]
    [range(0, 4), range(4, 8), range(8, 10), range(10, 14)]
    >>> rounds.after(5), rounds.at(8), rounds.at(10)
    (8, 2, 3)
    """

    local_steps: int = 1
    steps_per_epoch: int = 1

    @property
    def per_epoch(self) -> int:
        return -(-self.steps_per_epoch // self.local_steps)

    def begin(self, index: int) -> int:
        """The first step of a round; as a version: the steps that are in it."""
        if self.local_steps == 1:
            return index
        epoch, nth = divmod(index, self.per_epoch)
        return epoch * self.steps_per_epoch + nth * self.local_steps

    def steps(self, index: int) -> range:
        """The steps of a round."""
        return range(self.begin(index), self.begin(index + 1))

    def after(self, step: int) -> int:
        """The first end of a round at ``step`` or later, in steps."""
        if self.local_steps == 1:
            return step
        epoch, nth = divmod(step, self.steps_per_epoch)
        rounded = -(-nth // self.local_steps) * self.local_steps
        return epoch * self.steps_per_epoch + min(rounded, self.steps_per_epoch)

    def end(self, total: int, stop: int | None) -> int:
        """Where a run of ``total`` steps ends that is to stop at the step ``stop``, if any: with a round.

        >>> rounds = Rounds(local_steps=4, steps_per_epoch=10)
        >>> rounds.end(20, None), rounds.end(20, 5), rounds.end(20, 99)
        (20, 8, 20)
        """
        return total if stop is None else min(self.after(stop), total)

    def at(self, step: int) -> int:
        """The round that begins at ``step``, where a round begins."""
        assert self.after(step) == step, f"step {step} is inside a round of {self.local_steps} steps"
        if self.local_steps == 1:
            return step
        epoch, nth = divmod(step, self.steps_per_epoch)
        return epoch * self.per_epoch + nth // self.local_steps
