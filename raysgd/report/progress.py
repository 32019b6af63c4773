"""What a run says while it goes on: a progress line on a terminal, plain lines elsewhere, or nothing.

flights ━━━━━━━━━━━━━━━━━━━━━ 1,154/2,880 steps · 812,000 rows/s · loss 0.3942 · rate 0.025 · 0:00:21 left
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

#: Seconds between two plain lines where no terminal redraws them.
PLAIN_INTERVAL_S = 5.0


class Report(Protocol):
    """Whom a trainer tells. Every call returns at once and raises nothing about the run."""

    def say(self, text: str) -> None:
        """A sentence that people should read: what was chosen, a warning."""
        ...

    def start(self, step: int, total_steps: int) -> None:
        """Training begins, or goes on, at ``step`` committed steps."""
        ...

    def train(self, step: int, *, loss: float, learning_rate: float, rows_per_s: float) -> None:
        """``step`` steps are committed."""
        ...

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The parameters after ``step`` steps were scored."""
        ...

    def close(self) -> None:
        """Training is over. Further calls do nothing but ``say``."""
        ...


class Silent:
    """A report that says nothing (``-q``)."""

    def say(self, text: str) -> None: ...

    def start(self, step: int, total_steps: int) -> None: ...

    def train(self, step: int, *, loss: float, learning_rate: float, rows_per_s: float) -> None: ...

    def validation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Plain:
    """Lines for a file or a pipe: the first, the last, and between them one every few seconds.

    stream: where the lines go
    clock: seconds that never run backwards
    """

    def __init__(
        self, stream: TextIO, clock: Callable[[], float] = time.monotonic, interval_s: float = PLAIN_INTERVAL_S
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._interval_s = interval_s
        self._left = TimeLeft(clock)
        self._total = 0
        self._spoken: float | None = None

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def start(self, step: int, total_steps: int) -> None:
        self._total, self._spoken = total_steps, None
        self._left.start(step, total_steps)

    def train(self, step: int, *, loss: float, learning_rate: float, rows_per_s: float) -> None:
        now = self._clock()
        due = self._spoken is None or now - self._spoken >= self._interval_s
        if not due and step < self._total:
            return
        self._spoken = now
        words = describe(loss, learning_rate, rows_per_s)
        self.say(f"step {step:,}/{self._total:,} · {words} · {self._left.text(step)}")

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.say(validation_line(step, metrics))

    def close(self) -> None: ...


#: columns of a terminal that the words beside the bar need: a narrow one does without the bar
WORDS_WIDTH = 80


class Live:
    """One line at the bottom of a terminal that redraws itself; sentences scroll by above it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._left = TimeLeft(clock)
        self._bar: Bar | None = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def start(self, step: int, total_steps: int) -> None:
        self.close()
        columns: list[ProgressColumn] = [
            Steps(),
            TextColumn("{task.fields[words]}", markup=False),
        ]
        if (width := min(24, self._console.width - WORDS_WIDTH)) >= 4:
            columns.insert(0, BarColumn(bar_width=width))
        self._bar = Bar(*columns, console=self._console, transient=True, refresh_per_second=5)
        self._bar.add_task("train", completed=step, total=total_steps, words="")
        self._left.start(step, total_steps)
        self._bar.start()

    def train(self, step: int, *, loss: float, learning_rate: float, rows_per_s: float) -> None:
        if self._bar is not None:
            words = f"{describe(loss, learning_rate, rows_per_s)} · {self._left.text(step)}"
            self._bar.update(self._bar.task_ids[0], completed=step, words=words)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.say(validation_line(step, metrics))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


class Steps(ProgressColumn):
    """``1,154/2,880 steps``, never cut and never on two lines."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed):,}/{int(task.total or 0):,} steps", no_wrap=True, overflow="ignore")


class TimeLeft:
    """How long the rest takes if the steps go on as they went since the start."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begun, self._first, self._total = clock(), 0, 0

    def start(self, step: int, total_steps: int) -> None:
        self._begun, self._first, self._total = self._clock(), step, total_steps

    def text(self, step: int) -> str:
        """``0:01:05 left``; ``-:--:-- left`` before anything is known."""
        done = step - self._first
        if done <= 0:
            return "-:--:-- left"
        seconds = round((self._clock() - self._begun) * max(0, self._total - step) / done)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


def describe(loss: float, learning_rate: float, rows_per_s: float) -> str:
    """What is known of the last steps, for people.

    >>> describe(0.39421, 0.025, 812_345.6)
    '812,346 rows/s · loss 0.3942 · rate 0.025'
    """
    return f"{rows_per_s:,.0f} rows/s · loss {loss:.4g} · rate {learning_rate:.4g}"


def validation_line(step: int, metrics: Mapping[str, float]) -> str:
    """The metrics of a validation, for people.

    >>> validation_line(577, {"loss": 0.39421, "rows": 32_829, "auc": 0.88})
    'validation after step 577: loss 0.39421, auc 0.88, rows 32,829'
    """
    names = sorted(metrics, key=lambda name: (name == "rows", name != "loss"))
    values = [f"{n} {metrics[n]:,}" if isinstance(metrics[n], int) else f"{n} {metrics[n]:.5g}" for n in names]
    return f"validation after step {step:,}: {', '.join(values)}"


def report_to(stream: TextIO, quiet: bool = False) -> Report:
    """The report that fits the stream: live on a terminal, plain lines elsewhere, nothing when ``quiet``."""
    if quiet:
        return Silent()
    console = Console(file=stream)
    return Live(console) if console.is_terminal and not console.is_dumb_terminal else Plain(stream)
