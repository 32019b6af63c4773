"""What the commands share: how they tell what they found, how they find runs, and who does their work."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import click

from raysgd.errors import CheckpointError, InputError, RaysgdError
from raysgd.interrupts import sigterm_interrupts

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

#: The resolved config in a run's directory.
CONFIG = "config.toml"

#: What a command returns: the facts, and how to tell them to people.
Outcome = tuple[dict[str, Any], Callable[[Mapping[str, Any]], str]]

quietly = click.option("-q", "--quiet", is_flag=True, help="No progress.")


def told(command: Callable[..., Outcome]) -> Callable[..., None]:
    """Gives a command ``--json`` and prints what it returns. Until then standard output belongs to people."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
    @wraps(command)
    def run(as_json: bool, **arguments: Any) -> None:
        elsewhere = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        with elsewhere:
            facts, text = command(**arguments)
        click.echo(json.dumps(finite(facts), allow_nan=False) if as_json else text(facts))

    return run


def finite(value: Any) -> Any:
    """The same without what JSON does not have: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find_run(run: str) -> str:
    """The path of a run, given as its directory, its URI or its name under ``./runs``. Raises InputError."""
    from raysgd.fitted import open_run

    try:
        return open_run(run).uri
    except InputError:
        if "/" in run:
            raise
    with contextlib.suppress(InputError):
        return open_run(os.path.join("runs", run)).uri
    raise InputError(f"there is no run {run!r}, here or in {os.path.abspath('runs')}: give the run's directory")


def model_of(path: str) -> Any:
    """The model of a run's best checkpoint; damaged ones are told."""
    from raysgd import fitted

    return fitted.from_checkpoint(checkpoint_of(path, "best"))


def checkpoint_of(path: str, which: str) -> Any:
    """The best or the last checkpoint of a run; damaged ones are told. Raises CheckpointError where there is none."""
    from raysgd import checkpoint
    from raysgd.storage import Storage

    storage = Storage.open(path)
    try:
        found = checkpoint.load(storage, which)
    except CheckpointError:
        if not checkpoint.steps(storage) and (yet := not_yet(storage)):
            raise CheckpointError(f"{path} has no checkpoint yet: {yet}") from None
        raise
    tell_skipped(found.skipped)
    return found


def not_yet(storage: Any) -> str:
    """Why a run may lack what comes with its first checkpoint; "" where it does not say that it goes on."""
    from raysgd.report import summary
    from raysgd.report.watching import look, silent

    facts = look(storage)
    if facts["state"] != "running":
        return ""
    if silent(facts):
        return summary.no_news(facts["silent_s"])
    of = "" if facts["total_steps"] is None else f" of {facts['total_steps']:,}"
    return f"the run goes on, at step {facts['step']:,}{of}; its first checkpoint (run.checkpoint_every) is to come"


def tell_skipped(sentences: Sequence[str]) -> None:
    """Warn of checkpoints that are damaged."""
    for sentence in sentences:
        click.echo(f"warning: a damaged checkpoint was passed over: {sentence}", err=True)


def shared_out(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options that say who does its work: ``num_workers``, ``address`` and ``status``."""
    workers = click.IntRange(min=1)
    for option in (
        click.option("--status", metavar="DIR", help="Keep a status.json there that says how the command stands."),
        click.option("--address", help="The Ray cluster to work on. Default: the one around this process, or none."),
        click.option("--num-workers", type=workers, default=1, help="Ray tasks at a time. 1, and no cluster: no Ray."),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def calls_by(num_workers: int, address: str | None, quiet: bool) -> Iterator[Any]:
    """Who carries out a command's calls: this process where one worker is asked for and no cluster, else Ray tasks."""
    from raysgd.data.calls import here

    if num_workers == 1 and address is None and not os.environ.get("RAY_ADDRESS"):
        yield here
        return
    from raysgd.runtime.tasks import tasks

    def said(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    with tasks(num_workers, address, said) as carried:
        yield carried


@contextlib.contextmanager
def standing(directory: str | None) -> Iterator[dict[str, Any]]:
    """Keep ``status.json`` in a directory: running, then how the block ended. What is put into the dict goes with it.

    SIGTERM ends the block as Ctrl-C does, with exit code 143.
    """
    from raysgd.report import status
    from raysgd.report.status import Status
    from raysgd.storage import Storage

    details: dict[str, Any] = {}
    if directory is None:
        with sigterm_interrupts():
            yield details
        return
    storage = Storage.open(directory)
    storage.refuse_unwritable()
    running = status.write(storage, Status("running"))

    def end(state: status.State, code: int, message: str = "") -> None:
        ended = running.moved(state, exit_code=code, message=message)
        status.write(storage, replace(ended, details=finite(details)))

    try:
        with sigterm_interrupts():
            yield details
    except KeyboardInterrupt as error:
        end("interrupted", getattr(error, "exit_code", INTERRUPTED), "interrupted; the same command starts over")
        raise
    except BaseException as error:
        code = BAD_INPUT if isinstance(error, InputError | click.ClickException) else FAILED
        end("failed", code, str(error) if isinstance(error, RaysgdError) else repr(error))
        raise
    end("succeeded", OK)
