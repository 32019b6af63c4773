"""What to do with a run directory that may already hold a run: begin, continue, refuse, or finish its books. No Ray."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Any

from raysgd import checkpoint as checkpoints
from raysgd.audit import DAMAGED as DAMAGED_LEDGER
from raysgd.audit import NAME as LEDGER
from raysgd.audit import last_attempt as ledger_attempt
from raysgd.checkpoint import Checkpoint
from raysgd.errors import InputError
from raysgd.learn.schedules import steps_in
from raysgd.plan import Plan, Tables
from raysgd.report import metrics_log, status
from raysgd.report.curve import Curve
from raysgd.report.metrics_log import MetricsLog
from raysgd.report.status import Status
from raysgd.spec import RunSpec, differences
from raysgd.storage import Storage

#: the loss curve as a picture
PICTURE = "loss.png"

#: what --fresh deletes: the files that raysgd writes, and nothing else that may lie there
OWN_FILES = (LEDGER, DAMAGED_LEDGER, metrics_log.NAME, status.NAME, "config.toml", PICTURE)

#: lines of the loss curve an epoch, unless ``log_every`` says otherwise
LINES_PER_EPOCH = 20


@dataclass(frozen=True)
class Beginning:
    """Where an attempt begins. ``checkpoint``: what it continues from, None for step 0; ``notes``: for the user."""

    attempt: int
    checkpoint: Checkpoint | None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def scores(self) -> dict[int, dict[str, float]]:
        """Validation metrics by step, as an attempt keeps them: of the checkpoint, if it was validated."""
        metrics = {} if self.checkpoint is None else self.checkpoint.manifest.get("metrics", {})
        scores = {k.removeprefix("valid_"): nan if v is None else float(v) for k, v in metrics.items()}
        return {self.step: scores} if scores else {}


def beginning(storage: Storage, spec: RunSpec, tables: Tables, fresh: bool) -> Beginning:
    """Read the run directory and decide; nothing that is written stays.

    Raises InputError where the directory cannot be used, and with every difference where it holds a run of another
    data, model, optimizer or train section; CheckpointError where it has checkpoints and none can be used.
    """
    storage.refuse_unwritable()
    try:
        storage.refuse_occupied(OWN_FILES)
        before, present = status.read(storage), checkpoints.steps(storage)
        attempts = (before.attempt if before else 0, checkpoints.last_attempt(storage), ledger_attempt(storage))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: what pyarrow raises for a path that its store cannot have
        raise InputError(f"{storage.uri} cannot be read: {error}; choose another storage path") from error
    attempt = 1 if fresh else max(attempts) + 1
    if fresh or not present:
        return Beginning(attempt, None)
    found = checkpoints.load(storage, "last")
    changed = _changes(found.manifest, spec, tables)
    if changed:
        raise InputError(
            [
                *changed,
                f"{storage.uri} holds another run: choose another --name, or --fresh to delete it and start over",
            ]
        )
    found.tallies_of(spec.scaling.num_servers)
    notes = [f"warning: a damaged checkpoint was passed over: {sentence}" for sentence in found.skipped]
    stored = found.manifest.get("fingerprints", {}).get("validation")
    if stored != tables.fingerprints["validation"]:
        notes.append("warning: the validation data is not that of the run so far: its losses cannot be compared")
    return Beginning(attempt, found, tuple(notes))


def clear(storage: Storage) -> None:
    """Delete what raysgd wrote there before."""
    storage.delete_dir(checkpoints.DIRECTORY)
    for name in OWN_FILES:
        storage.delete_file(name)


def forget_diverging(storage: Storage) -> None:
    """Delete the checkpoints after the best one by validation loss: training diverged, and they were on the way there.

    All of them where the untrained model was better: it has none. Where none was validated the newest stays.
    """
    if not checkpoints.steps(storage):
        return
    best = checkpoints.load(storage, "best")
    loss, untrained = best.manifest.get("metrics", {}).get("valid_loss", nan), _loss_untrained(storage)
    worse = untrained is not None and (loss is None or untrained < loss)  # null: infinite or NaN
    checkpoints.forget(storage, after=0 if worse else best.step)


def _loss_untrained(storage: Storage) -> float | None:
    """The validation loss at step 0, as the curve has it."""
    found = (line for line in metrics_log.read(storage) if (line["kind"], line["step"]) == ("validation", 0))
    loss = next(found, {}).get("loss")
    return loss if isinstance(loss, int | float) else None


def complete(begin: Beginning, plan: Plan) -> bool:
    """Whether nothing is left to do: the last step is saved, and was validated where there is data for it."""
    validated = bool(begin.scores) or plan.tables.validation is None
    return begin.step > plan.end_step or (begin.step == plan.end_step and validated)


def close_books(storage: Storage, begin: Beginning, plan: Plan) -> None:
    """Write what a driver that was killed after the last checkpoint owed: the curve's last line, and how the run ended.

    Nothing where the status says already that it ended at this checkpoint.
    """
    assert begin.checkpoint is not None
    digest, ended = begin.checkpoint.digest(), begin.step == plan.total_steps
    state: status.State = "succeeded" if ended else "stopped"
    before = status.read(storage) or Status("running", attempt=begin.attempt - 1)
    if (before.state, before.step, before.digest) == (state, begin.step, digest):
        return
    with MetricsLog(storage) as log:
        if ended:  # else the lines that are there because it stopped stay
            log.rewind(begin.step)
        curve = curve_from(log, begin, plan)
        if not any((line["kind"], line["step"]) == ("train", begin.step) for line in metrics_log.read(storage)):
            curve.flush(interim=not ended)
    facts = {"step": begin.step, "total_steps": plan.total_steps, "digest": digest, "message": ""}
    status.write(storage, before.moved(state, **facts))


def curve_from(log: MetricsLog, begin: Beginning, plan: Plan) -> Curve:
    """The loss curve from where an attempt begins, with the line that was begun before."""
    every, steps = plan.spec.run.log_every, plan.steps_per_epoch
    return Curve(
        log,
        step=begin.step,
        begun=None if begin.checkpoint is None else begin.checkpoint.manifest.get("curve"),
        log_every=max(1, steps // LINES_PER_EPOCH) if every is None else steps_in(every, steps),
        steps_per_epoch=steps,
        rows_per_epoch=plan.sampler.n_rows,
        batch_size=plan.spec.train.batch_size,
        mean_weight=plan.mean_weight,
    )


def _changes(manifest: Any, spec: RunSpec, tables: Tables) -> list[str]:
    found = differences(manifest.get("config", {}), spec.determining())
    if manifest.get("fingerprints", {}).get("train") != tables.fingerprints["train"]:
        found.append("the training data is not that of the run: files, sizes, rows or schema differ")
    return found
