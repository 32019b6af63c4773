"""``raysgd``: train, evaluate, predict, plot, inspect, audit, digest, up-check.

Each command prints for people, and with ``--json`` one JSON object on standard output (errors too, as
``{"error": [sentences]}``) and everything else on standard error. Exit codes: 0 well, 1 a run failed, 2 bad input,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from raysgd.cli_cluster import up_check
from raysgd.errors import CheckpointError, InputError, Interrupted, RunError
from raysgd.report import summary

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

#: The resolved config in a run's directory.
CONFIG = "config.toml"

#: What a command returns: the facts, and how to tell them to people.
Outcome = tuple[dict[str, Any], Callable[[Mapping[str, Any]], str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
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


def told(command: Callable[..., Outcome]) -> Callable[..., None]:
    """Gives a command ``--json`` and prints what it returns. Until then standard output belongs to people."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
    @wraps(command)
    def run(as_json: bool, **arguments: Any) -> None:
        elsewhere = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        with elsewhere:
            facts, text = command(**arguments)
        click.echo(json.dumps(_finite(facts), allow_nan=False) if as_json else text(facts))

    return run


def _finite(value: Any) -> Any:
    """The same without what JSON does not have: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress.")
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
@_quiet
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
@_run
@click.option("--data", metavar="PATH", help="Labelled data. Default: the run's validation data.")
@_quiet
@told
def evaluate(run: str, data: str | None, quiet: bool) -> Outcome:
    """Score the best checkpoint of RUN on labelled data."""
    from raysgd.data.dataset import ArrowDataset
    from raysgd.sections import plain

    path = find_run(run)
    model = _model(path)
    source = _validation(path) if data is None else ArrowDataset(data)
    with _rows_bar("evaluate", quiet) as on_rows:
        metrics = model.evaluate(source, on_rows)
    facts = {"run": path, "checkpoint": model.path, "step": model.step, "data": plain(source.path), "metrics": metrics}
    return facts, summary.scored


@cli.command()
@_run
@click.option("--data", required=True, metavar="PATH", help="The rows to predict: a file, directory or glob.")
@click.option("-o", "--output", "out", required=True, metavar="OUT", help="A .parquet, .arrow, .feather or .csv file.")
@click.option("--columns", multiple=True, metavar="NAME[,NAME...]", help="Columns of the data to carry over.")
@_quiet
@told
def predict(run: str, data: str, out: str, columns: tuple[str, ...], quiet: bool) -> Outcome:
    """Predict rows with the best checkpoint of RUN, row group by row group."""
    model = _model(find_run(run))
    names = [name for entry in columns for name in entry.split(",") if name]
    with _rows_bar("predict", quiet) as on_rows:
        counts = model.predict_file(data, out, names, on_rows)
    return {"output": out, "checkpoint": model.path, "step": model.step, **counts}, summary.predicted


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
    from raysgd.report import metrics_log, status
    from raysgd.storage import Storage

    path = find_run(run)
    storage = Storage.open(path)
    standing = status.read(storage)
    lines = metrics_log.read(storage)
    last = {kind: next((r for r in reversed(lines) if r["kind"] == kind), None) for kind in ("train", "validation")}
    facts = {
        "run": path,
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
    from raysgd.audit import audit as audited
    from raysgd.storage import Storage

    path = find_run(run)
    found = audited(Storage.open(path))
    if found.problems:
        raise RunError("\n  - ".join([f"{path}: it does not hold that all counted once", *found.problems]))
    return {"run": path, **asdict(found)}, summary.audited


@cli.command()
@_run
@told
def digest(run: str) -> Outcome:
    """The SHA-256 of RUN's last parameters, optimizer state and step: the same for any workers and servers."""
    from raysgd import checkpoint
    from raysgd.storage import Storage

    found = checkpoint.load(Storage.open(find_run(run)), "last")
    _tell_skipped(found.skipped)
    return {"digest": found.digest(), "step": found.step, "checkpoint": found.path}, summary.digest


cli.add_command(up_check)


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


def _model(path: str) -> Any:
    from raysgd import checkpoint, fitted
    from raysgd.storage import Storage

    found = checkpoint.load(Storage.open(path), "best")
    _tell_skipped(found.skipped)
    return fitted.from_checkpoint(found)


def _tell_skipped(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        click.echo(f"warning: a damaged checkpoint was passed over: {sentence}", err=True)


def _validation(path: str) -> Any:
    """The validation data that the run's stored config names."""
    from raysgd.config import loads
    from raysgd.storage import Storage

    storage = Storage.open(path)
    text = storage.read(CONFIG).decode(errors="replace") if storage.exists(CONFIG) else None
    spec = None if text is None else loads(text, path, source=f"{path}/{CONFIG}")
    if spec is None or spec.validation is None:
        raise InputError(f"{path} names no validation data: give some with --data")
    return spec.validation


def _stored_tables(storage: Any) -> dict[str, Any] | None:
    """The sections of the run's stored config as they are, or None where they cannot be read."""
    try:
        return tomllib.loads(storage.read(CONFIG).decode())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _rows_bar(title: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of rows on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
