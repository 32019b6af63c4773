"""Progress: a line that redraws itself on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raysgd.report.progress import Live, Plain, Report, Silent, TimeLeft, report_to


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def drive(report: Report, clock: Clock, steps: int, seconds: float) -> None:
    """A run of ``steps`` steps, ``seconds`` each."""
    report.say("2 workers")
    report.start(0, steps)
    for step in range(1, steps + 1):
        clock.seconds += seconds
        report.train(step, loss=0.5, learning_rate=0.1, rows_per_s=1e6)
    report.validation(steps, {"loss": 0.4, "rows": 7})
    report.close()


def test_plain_lines_are_few_and_include_first_and_last() -> None:
    stream, clock = io.StringIO(), Clock()
    drive(Plain(stream, clock, interval_s=5.0), clock, steps=100, seconds=0.1)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "2 workers",
        "step 1/100 · 1,000,000 rows/s · loss 0.5 · rate 0.1 · 0:00:10 left",
        *[line for line in lines if line.startswith("step 51/100") or line.startswith("step 52/100")],
        "step 100/100 · 1,000,000 rows/s · loss 0.5 · rate 0.1 · 0:00:00 left",
        "validation after step 100: loss 0.4, rows 7",
    ]
    assert len(lines) == 5


def test_time_left_counts_from_where_the_run_continued() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    left.start(1000, 5000)
    assert left.text(1000) == "-:--:-- left"
    clock.seconds = 10.0
    assert left.text(2000) == "0:00:30 left"
    clock.seconds = 4000.0
    assert left.text(2000) == "3:20:00 left"


def test_a_terminal_shows_steps_rate_and_sentences() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=120)
    drive(Live(console, clock), clock, steps=3, seconds=1.0)
    text = stream.getvalue()
    for part in ("2 workers", "3/3 steps", "1,000,000 rows/s", "loss 0.5", "rate 0.1", "0:00:00 left", "loss 0.4"):
        assert part in text


def test_a_sentence_is_shown_as_it_is() -> None:
    """Square brackets are no markup: they are column names and paths."""
    stream = io.StringIO()
    Live(Console(file=stream, force_terminal=True, width=80)).say("numeric = [bold]")
    assert "numeric = [bold]" in stream.getvalue()


def test_calls_around_a_run_do_no_harm() -> None:
    for report in (Live(Console(file=io.StringIO(), force_terminal=True)), Plain(io.StringIO()), Silent()):
        report.train(1, loss=0.5, learning_rate=0.1, rows_per_s=1.0)
        report.close()
        report.close()


def test_the_report_fits_the_stream(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(report_to(io.StringIO()), Plain)
    quiet = report_to(io.StringIO(), quiet=True)
    assert isinstance(quiet, Silent)
    clock = Clock()
    drive(quiet, clock, 2, 1.0)
    assert capsys.readouterr() == ("", "")
