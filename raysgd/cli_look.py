"""``raysgd status`` and ``raysgd watch``: how a run stands, from any machine that sees its storage."""

from __future__ import annotations

import json

import click

from raysgd.console import Outcome, find_run, finite, told
from raysgd.report import summary


@click.command()
@click.argument("run")
@told
def status(run: str) -> Outcome:
    """Show how RUN stands, in a few lines: state, step, losses, speed, time left, and when it was last heard of."""
    from raysgd.report.watching import look, silent
    from raysgd.storage import Storage

    path = find_run(run)
    facts = look(Storage.open(path))
    return {"run": path, **facts, "silent": silent(facts)}, summary.standing


@click.command()
@click.argument("run")
@click.option(
    "--every", "every_s", type=click.FloatRange(0.1, 3600), default=2.0, metavar="SECONDS", help="Between two looks."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def watch(run: str, every_s: float, as_json: bool) -> int:
    """Follow RUN until it ends, a line at each change; the exit code is the run's own.

    1 where nothing was heard of it for twenty minutes: its driver may be dead.
    """
    from raysgd.report.watching import follow, silent
    from raysgd.storage import Storage

    path, code = find_run(run), 0
    for facts in follow(Storage.open(path), every_s):
        line = {"run": path, **facts, "silent": silent(facts)}
        click.echo(json.dumps(finite(line), allow_nan=False) if as_json else summary.watched(line))
        code = 1 if facts["exit_code"] is None else facts["exit_code"]
    return int(code)
