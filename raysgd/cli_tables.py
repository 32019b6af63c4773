"""The commands that go through a table once, here or shared out over a cluster: prepare, evaluate, predict.

What they write is the same, byte for byte, whoever does the work.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from raysgd.console import CONFIG, Outcome, calls_by, find_run, model_of, quietly, shared_out, standing, told
from raysgd.errors import InputError
from raysgd.learn.threads import single_threaded
from raysgd.report import summary
from raysgd.report.counting import counting


@click.command()
@click.argument("data", nargs=-1, required=True, metavar="PATH [PATH ...]")
@click.option("-o", "--output", "out", required=True, metavar="DIR", help="The directory of the data set, or its URI.")
@click.option("--seed", type=int, default=0, help="Of the shuffle. Default: 0.")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="COLUMN=TYPE",
    help="A column of text is of this Arrow type, as zip=string, which keeps leading zeros.",
)
@click.option(
    "--delimiter", default=",", help="Between the values of a CSV line. Default: a comma; in .tsv files a tab."
)
@click.option("--newlines-in-values", is_flag=True, help="Quoted values may span lines: files are read as a whole.")
@click.option("--missing-text", is_flag=True, help="Empty values, NA and null are missing in columns of text, too.")
@click.option("--row-group-rows", type=int, default=16_384, help="Rows of a row group, about. Default: 16384.")
@click.option("--file-rows", type=int, default=262_144, help="Rows of a file, about. Default: 262144.")
@click.option("--overwrite", is_flag=True, help="Replace a data set that is there.")
@shared_out
@quietly
@told
def prepare(
    data: tuple[str, ...],
    out: str,
    types: tuple[str, ...],
    overwrite: bool,
    num_workers: int,
    address: str | None,
    status: str | None,
    quiet: bool,
    **settings: Any,
) -> Outcome:
    """Shuffle CSV, JSON lines or Parquet on disk into a data set of evenly cut Parquet files."""
    single_threaded()
    from raysgd import prepared
    from raysgd.data.source import Preparation

    with standing(status) as details:
        paths = [os.path.expanduser(path) for path in data]
        job = Preparation(paths[0] if len(paths) == 1 else paths, types=_types(types), **settings)
        with calls_by(num_workers, address, quiet) as calls, counting(sys.stderr, quiet) as told_progress:
            facts = prepared.prepare(job, out, calls, overwrite=overwrite, on_progress=told_progress)
        facts = {name: fact for name, fact in facts.items() if name != "settings"}
        details.update(out=facts["out"], rows=facts["rows"])
    return facts, summary.prepared


def _types(given: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for sentence in given:
        column, equals, name = sentence.rpartition("=")
        if not equals or not column:
            raise InputError(f"--type needs COLUMN=TYPE, as zip=string, got {sentence!r}")
        found[column] = name
    return found


@click.command()
@click.argument("run")
@click.option("--data", metavar="PATH", help="Labelled data. Default: the run's validation data.")
@shared_out
@quietly
@told
def evaluate(
    run: str, data: str | None, num_workers: int, address: str | None, status: str | None, quiet: bool
) -> Outcome:
    """Score the best checkpoint of RUN on labelled data."""
    single_threaded()
    from raysgd.data.dataset import ArrowDataset
    from raysgd.sections import plain

    with standing(status) as details:
        path = find_run(run)
        model = model_of(path)
        source = _validation(path) if data is None else ArrowDataset(data)
        with calls_by(num_workers, address, quiet) as calls, counting(sys.stderr, quiet) as on:
            metrics = model.evaluate(source, lambda done, rows: on("evaluating rows", done, rows), calls)
        facts = {"run": path, "checkpoint": model.path, "step": model.step, "data": plain(source.path)}
        details.update(facts, metrics=metrics)
    return {**facts, "metrics": metrics}, summary.scored


@click.command()
@click.argument("run")
@click.option("--data", required=True, metavar="PATH", help="The rows to predict: a file, directory or glob.")
@click.option("-o", "--output", "out", required=True, metavar="OUT", help="A .parquet, .arrow, .feather or .csv file.")
@click.option("--columns", multiple=True, metavar="NAME[,NAME...]", help="Columns of the data to carry over.")
@shared_out
@quietly
@told
def predict(
    run: str,
    data: str,
    out: str,
    columns: tuple[str, ...],
    num_workers: int,
    address: str | None,
    status: str | None,
    quiet: bool,
) -> Outcome:
    """Predict rows with the best checkpoint of RUN, row group by row group."""
    single_threaded()
    with standing(status) as details:
        model = model_of(find_run(run))
        names = [name for entry in columns for name in entry.split(",") if name]
        with calls_by(num_workers, address, quiet) as calls, counting(sys.stderr, quiet) as on:
            counts = model.predict_file(data, out, names, lambda done, rows: on("predicting rows", done, rows), calls)
        facts = {"output": out, "checkpoint": model.path, "step": model.step, **counts}
        details.update(facts)
    return facts, summary.predicted


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
