"""The errors that raysgd raises on purpose. Any room may import this one; it imports nothing."""

from __future__ import annotations

from collections.abc import Sequence


class RaysgdError(Exception):
    """Base of every error that raysgd raises on purpose."""


class InputError(RaysgdError, ValueError):
    """What the user gave cannot be used: data, configuration, arguments (exit code 2).

    ``problems`` holds one sentence for each violation: what came, what is allowed, what to do.

    >>> print(InputError(["a must be > 0, got -1", "unknown key 'b'"]))
    2 problems:
      - a must be > 0, got -1
      - unknown key 'b'
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        # Exception.args holds the constructor's own argument: so the error survives pickling by Ray.
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  - {p}" for p in self.problems)


class CheckpointError(RaysgdError):
    """A checkpoint is incomplete, damaged, or not one of ours."""


class RunError(RaysgdError):
    """A run could not go on: an actor died, resources did not come, a step diverged (exit code 1)."""


class SaveError(RunError):
    """A checkpoint could not be written, as on a full disk; what was saved before stays."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to end (Ctrl-C: 130, SIGTERM: 143); what it had is in a checkpoint."""

    def __init__(self, exit_code: int = 130, message: str = "interrupted") -> None:
        self.exit_code, self.message = exit_code, message
        super().__init__(exit_code, message)


class DivergedError(RunError):
    """A gradient or a parameter became NaN or infinite. ``step`` is the step that could not be applied."""

    def __init__(self, step: int, detail: str) -> None:
        self.step = step
        self.detail = detail
        super().__init__(step, detail)

    def __str__(self) -> str:
        return f"step {self.step} diverged: {self.detail}"
