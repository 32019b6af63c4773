"""``raysgd up-check``: what a cluster is like before a run."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict

import click


@click.command(name="up-check")
@click.option("--address", help="The Ray cluster to look at. Default: the one around this process, or a new one.")
@click.option("--storage-path", metavar="DIR", default="runs", help="Where runs will lie: a directory or a URI.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def up_check(address: str | None, storage_path: str, as_json: bool) -> int:
    """Check a cluster before a run: versions, storage, authentication, memory, clocks, processors.

    One line each, with what to do; the exit code is 1 where one is an error.
    """
    from raysgd.runtime.look import look
    from raysgd.upcheck import failed, judge

    with contextlib.redirect_stdout(sys.stderr):
        lines = judge(look(storage_path, address))
    checks = [asdict(line) for line in lines]
    click.echo(json.dumps({"checks": checks}) if as_json else "\n".join(map(str, lines)))
    return 1 if failed(lines) else 0
