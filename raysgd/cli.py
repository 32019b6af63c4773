"""``raysgd``: prepare, train, evaluate, predict, plot, inspect, status, watch, audit, digest, up-check.

Each command prints for people, and with ``--json`` one JSON object on standard output (errors too, as
``{"error": [sentences]}``) and everything else on standard error. Exit codes: 0 well, 1 a run failed, 2 bad input,
130 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from raysgd.cli_cluster import up_check
from raysgd.cli_look import status, watch
from raysgd.cli_tables import evaluate, predict, prepare
from raysgd.console import (
    BAD_INPUT,
    CONFIG,
    FAILED,
    INTERRUPTED,
    OK,
    Outcome,
    checkpoint_of,
    find_run,
    not_yet,
    quietly,
    told,
)
from raysgd.encoding import decoded, quote
from raysgd.errors import CheckpointError, InputError, Interrupted, RunError
from raysgd.report import summary


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    arguments = decoded(list(sys.argv[1:] if argv is None else argv))
    as_json = "--json" in arguments
    try:
        code = cli.main(arguments, prog_name="raysgd", standalone_mode=False)
        return int(code or OK)
    except click.ClickException as error:
        if not as_json:
            error.show()
        return _refused(as_json, [error.format_message()], BAD_INPUT, shown=True)
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ or error  # click turns an interrupt into an Abort
        sentence = cause.message if isinstance(cause, Interrupted) else "interrupted"
        return _refused(as_json, [sentence], getattr(cause, "exit_code", INTERRUPTED))
    except InputError as error:
        return _refused(as_json, list(error.problems), BAD_INPUT, text=str(error))
    except CheckpointError as error:
        return _refused(as_json, [str(error)], BAD_INPUT)
    except RunError as error:
        return _refused(as_json, [str(error)], FAILED)
    except MemoryError as error:
        return _refused(as_json, [f"not enough memory: {error}; a smaller model, or more servers"], FAILED)
    except BrokenPipeError:
        # Whoever read the output is gone; Python would complain about it once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _refused(as_json, [str(error)], FAILED)
    except Exception as error:  # noqa: BLE001 - the last resort: the promise of one JSON object holds for bugs too
        traceback.print_exc()
        return _refused(as_json, [f"{type(error).__name__}: {error}"], FAILED, shown=True)


def _refused(as_json: bool, sentences: list[str], code: int, text: str | None = None, shown: bool = False) -> int:
    if as_json:
        print(json.dumps({"error": sentences}))
    elif not shown:
        print(f"raysgd: {text or sentences[0]}", file=sys.stderr)
    return code


def _version() -> str:
    try:
        return version("raysgd")
    except PackageNotFoundError:
        return "unknown (not installed)"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="raysgd")
def cli() -> None:
    """Stochastic gradient descent on tables: the same bytes on one core or on many."""


def _workers(text: str) -> int | tuple[int, int]:
    """``4``; ``2-6`` or ``2,6``: the least and the most."""
    pair = re.fullmatch(r"([0-9]{1,18})[,-]([0-9]{1,18})", text)
    if pair:
        return int(pair[1]), int(pair[2])
    if _WHOLE.fullmatch(text):
        return int(text)
    allowed = "a whole number, as 4, or the least and the most, as 2-6 or 2,6"
    raise click.BadParameter(f"{text!r} is no number of workers: give {allowed}")


#: int() takes digits of all scripts, too
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


def _whole(text: str) -> int:
    if _WHOLE.fullmatch(text):
        return int(text)
    raise click.BadParameter(f"{text!r} is no whole number: give one in the digits 0 to 9, as 4")


_run = click.argument("run")


@cli.command()
@click.argument("config")
@click.option("--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a field of CONFIG.")
@click.option("--name", help="The run's name: the same name continues the run. Default: run.name, or that of the file.")
@click.option("--storage-path", metavar="DIR", help="Where runs lie: a directory or a URI such as s3://bucket/runs.")
@click.option(
    "--num-workers", type=_workers, metavar="N|LEAST-MOST", help="Ray actors that compute gradients, as 4 or 2-6."
)
@click.option("--num-servers", type=_whole, metavar="N", help="Ray actors that hold the parameters.")
@click.option("--address", help="The Ray cluster to run on. Default: the one around this process, or a new one.")
@click.option("--fresh", is_flag=True, help="Delete what the run has and start over.")
@click.option("--dry-run", is_flag=True, help="Check everything that can be checked without training.")
@quietly
@told
def train(config: str, sets: tuple[str, ...], fresh: bool, dry_run: bool, quiet: bool, **options: Any) -> Outcome:
    """Train what CONFIG (a TOML file) describes, or continue it."""
    from raysgd.config import load
    from raysgd.report.progress import report_to

    spec = load(config, sets, _overrides(**options))

    from raysgd.runtime.trainer import Trainer  # Ray is loaded for a config that has no fault

    report = report_to(sys.stdout, quiet)
    trainer = Trainer.from_spec(spec, fresh=fresh, report=report)
    if dry_run:
        return dict(trainer.dry_run()), summary.dry_run
    try:
        result = trainer.fit()
    finally:
        report.close()
    names = ("path", "step", "stopped", "metrics", "checkpoint", "digest")
    return {name: getattr(result, name) for name in names}, summary.trained


def _overrides(
    name: str | None,
    storage_path: str | None,
    num_workers: int | tuple[int, int] | None,
    num_servers: int | None,
    address: str | None,
) -> dict[str, Any]:
    """What the flags say, as ``section.key``. A path on the command line is relative to the current directory."""
    if storage_path and "://" not in storage_path:
        storage_path = os.path.abspath(os.path.expanduser(storage_path))
    found = {
        "run.name": name,
        "run.storage_path": storage_path,
        "run.address": address,
        "scaling.num_workers": num_workers,
        "scaling.num_servers": num_servers,
    }
    return {key: value for key, value in found.items() if value is not None}


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option("-o", "--output", "out", required=True, metavar="OUT", help="A .png, .svg or .pdf file.")
@told
def plot(runs: tuple[str, ...], out: str) -> Outcome:
    """Draw train and validation loss over the steps of one or several RUNs, the learning rate below."""
    from raysgd.report import metrics_log
    from raysgd.report.plot import format_of, loss_curve
    from raysgd.storage import Storage

    picture_format = format_of(out)
    paths = [find_run(run) for run in runs]
    lines = {_shown(path, paths): metrics_log.read(Storage.open(path)) for path in paths}
    picture = loss_curve(lines, picture_format)
    directory, _, name = out.rpartition("/")
    Storage.open(directory or ("/" if out.startswith("/") else ".")).write_atomic(name, picture)
    return {"picture": out, "runs": paths}, summary.drawn


def _shown(path: str, paths: list[str]) -> str:
    """A run's name, or its whole path where two runs of different places have the same name."""
    name = path.rpartition("/")[2]
    return name if sum(p.rpartition("/")[2] == name for p in paths) == 1 else path


@cli.command()
@_run
@told
def inspect(run: str) -> Outcome:
    """Show how RUN stands: its status, its checkpoints, its last metrics, its config."""
    from raysgd import checkpoint
    from raysgd.report import metrics_log
    from raysgd.report.status import read as read_status
    from raysgd.report.watching import look
    from raysgd.storage import Storage

    path = find_run(run)
    storage = Storage.open(path)
    standing = read_status(storage)
    lines = metrics_log.read(storage)
    last = {kind: next((r for r in reversed(lines) if r["kind"] == kind), None) for kind in ("train", "validation")}
    facts = {
        "run": path,
        "step": look(storage)["step"],
        "status": None if standing is None else asdict(standing),
        "config": _stored_tables(storage),
        "checkpoints": checkpoint.steps(storage),
        "metrics": last,
    }
    return facts, summary.inspected


@cli.command()
@_run
@told
def audit(run: str) -> Outcome:
    """Check from RUN's ledger and checkpoints that every row and every update counted exactly once."""
    from raysgd.audit import NAME as LEDGER
    from raysgd.audit import audit as audited
    from raysgd.storage import Storage

    path = find_run(run)
    storage = Storage.open(path)
    if not storage.exists(LEDGER) and (yet := not_yet(storage)):
        raise InputError(f"{path} has no {LEDGER} yet, which comes with the first checkpoint: {yet}")
    found = audited(storage)
    if found.problems:
        raise RunError("\n  - ".join([f"{path}: it does not hold that all counted once", *found.problems]))
    return {"run": path, **asdict(found)}, summary.audited


@cli.command()
@_run
@told
def digest(run: str) -> Outcome:
    """The SHA-256 of RUN's last parameters, optimizer state and step: the same for any workers and servers."""
    found = checkpoint_of(find_run(run), "last")
    return {"digest": found.digest(), "step": found.step, "checkpoint": found.path}, summary.digest


cli.add_command(up_check)
cli.add_command(status)
cli.add_command(watch)


def _stored_tables(storage: Any) -> dict[str, Any] | None:
    """The sections of the run's stored config as they are, or None where they cannot be read."""
    try:
        return tomllib.loads(storage.read(CONFIG).decode())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


for command in (prepare, evaluate, predict, quote):
    cli.add_command(command)

if __name__ == "__main__":
    sys.exit(main())
